"""Every part of benchmarks.pudle at toy size: what it claims is seen there already."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import pudle, pudle_codes, pudle_denoise


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    pudle.main([*arguments, "--out", str(folder)])
    assert (folder / f"pudle_{arguments[0]}.png").stat().st_size > 10_000
    found: dict[str, Any] = json.loads((folder / f"pudle_{arguments[0]}.json").read_text())
    return found


@pytest.mark.parametrize("signs", ["common", "independent"])
def test_the_least_squares_gradient_is_nearest_to_the_true_one(tmp_path: Path, signs: str) -> None:
    found = run(
        tmp_path, "gradient", "--data", "300", "--depths", "20", "60", "100", "--signs", signs
    )
    deepest = {name: values[-1] for name, values in found["to truth"].items()}
    assert deepest["least squares"] < 0.7 * deepest["decoder"]
    assert abs(deepest["lasso"] - deepest["decoder"]) < 0.01 * deepest["decoder"]
    lasso = found["to lasso"]
    assert lasso["lasso"][-1] < lasso["decoder"][-1] < 0.1 * lasso["decoder"][0]
    assert found["rate per layer from half the depth on"]["code"] == pytest.approx(0.94, abs=0.02)


def test_dictionaries_come_nearer_by_every_gradient(tmp_path: Path) -> None:
    found = run(
        tmp_path, "dictionary", "--data", "1000", "--batch", "50", "--depths", "20",
        "--steps", "60",
    )  # fmt: skip
    for one in found["runs"]["T = 20"].values():
        assert one["last"] < 0.95 * found["start"]


def test_supports_are_lost_with_distance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pudle_codes, "LAYERS", 60)
    found = run(tmp_path, "support", "--data", "10")
    wide = np.array(found["by active codes, rate 0.4, 200 x 400"]["f1"])
    assert wide[0].min() > 0.95
    assert wide[-1].mean() < 0.7
    assert wide[-1, -1] < 0.5 < wide[-1, 0]  # and the sooner, the more codes are active


def test_gradients_grow_with_depth_where_the_step_is_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pudle_codes, "DEPTHS", (5, 15, 60))
    found = run(tmp_path, "stability", "--data", "50")
    too_large = found["length by step"]["step 0.5"]
    assert too_large[1] > 1e3
    assert too_large[-1] is None
    for cured in ("rate from 0.8 to 0.2", "safe step"):
        assert max(found["length at step 0.44"][cured]) < 10
    assert max(found["length by step"]["step 0.2"]) < 10


def test_hard_thresholds_leave_less_bias_than_a_fixed_rate(tmp_path: Path) -> None:
    found = run(
        tmp_path, "decay", "--size", "100", "120", "--active", "3", "--steps", "60",
        "--shrinkages", "hard threshold", "fixed rate",
    )  # fmt: skip
    last = {name: one["last"] for name, one in found["runs"].items()}
    assert last["hard threshold"] < 0.7 * last["fixed rate"] < 0.7 * found["start"]


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    for name, count in (("cbsd432", pudle_denoise.HELD_OUT + 4), ("bsd68", 2)):
        (tmp_path / name).mkdir()
        for number in range(count):
            coarse = Image.fromarray(random.integers(0, 256, (8, 9), dtype=np.uint8))
            coarse.resize((90, 80), Image.Resampling.BICUBIC).save(
                tmp_path / name / f"{number}.png"
            )
    monkeypatch.setenv("PYRO_SPARSE_DATA", str(tmp_path))
    monkeypatch.setattr(pudle_denoise, "LEARNING_RATES", (3e-3,))
    monkeypatch.setattr(pudle_denoise, "WINDOW", 49)


@pytest.mark.usefixtures("photographs")
def test_denoisers_learn_and_their_weights_give_the_same_again(tmp_path: Path) -> None:
    weights = ("--weights", str(tmp_path / "weights"))
    trained = run(tmp_path, "denoise", "--epochs", "8", *weights)
    again = run(tmp_path, "denoise", "--evaluate", *weights)
    for name, row in trained["rows"].items():
        along = list(row["psnr held out by step"].values())
        assert along[-1] > along[0] + 1
        assert again["rows"][name]["psnr"] == row["psnr"]
