"""CRsAE's benchmark on toy data: training, files of weights, the commands, the scorer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import common, crsae, crsae_speed, crsae_spikes, gabor
from benchmarks.objectives import AveragedError


def run(*arguments: object) -> None:
    command = [sys.executable, "-m", "benchmarks.crsae", *map(str, arguments)]
    root = Path(__file__).parents[1]
    subprocess.run(command, check=True, capture_output=True, cwd=root)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Smooth random pictures, and small nets for them."""
    monkeypatch.setattr(crsae, "ATOMS", 6)
    random = np.random.default_rng(0)
    (tmp_path / "cbsd432").mkdir()
    for i in range(10):
        coarse = Image.fromarray(random.integers(0, 256, (12, 12)).astype(np.uint8))
        coarse.resize((230, 224), Image.Resampling.BICUBIC).save(tmp_path / "cbsd432" / f"{i}.png")
    return tmp_path


def recording(seed: int = 0) -> dict[str, np.ndarray]:
    """Three cells in unit noise, of which samples far from all events are missing."""
    random = np.random.default_rng(seed)
    time = np.arange(21) - 10
    shapes = [np.exp(-(time**2) / 4), np.exp(-(time**2) / 20) * np.cos(time), np.sin(time / 4)]
    atoms = np.stack([-10 * shape / np.linalg.norm(shape) for shape in shapes])
    begins = np.arange(60, 5900, 60) + random.integers(-15, 15, len(range(60, 5900, 60)))
    cells = random.integers(3, size=len(begins))
    trace = random.normal(size=6000)
    for begin, cell in zip(begins, cells, strict=True):
        trace[begin : begin + 21] += atoms[cell]
    near = np.zeros(6000, bool)
    for begin in begins:
        near[begin - 5 : begin + 26] = True
    trace[~near] = np.nan
    return {
        "trace": trace.astype(np.float32),
        "true_spikes": begins[cells == crsae_spikes.CELL] + 10,
        "init_templates": atoms + 0.5 * random.normal(size=atoms.shape),
    }


@pytest.mark.parametrize("rates", ["fixed", "backprop", "em"])
def test_training_lowers_the_error_and_moves_the_rates_it_should(folder: Path, rates: str) -> None:
    protocol = crsae.Protocol(
        tied=True, rates=rates, steps=20, first_steps=10, crop=32, depth=4, first_depth=3
    )
    net, said = crsae.train(protocol, folder, seed=0)
    _, held_out = crsae.photographs(folder)
    assert said["held_out_psnr"] > crsae.validate(crsae.start(protocol, 0), held_out) + 0.5
    assert (net.rate() == crsae.RATE).all() == (rates == "fixed")


def test_evaluating_saved_weights_gives_what_the_net_gives(folder: Path) -> None:
    protocol = crsae.Protocol(tied=False, steps=2, first_steps=2, crop=37, depth=4)
    net, said = crsae.train(protocol, folder, seed=0)
    common.save_weights(folder / "w.safetensors", net.tensors(), said)
    assert (folder / "w.safetensors").stat().st_size < 1_000_000
    images = folder / "images"
    images.mkdir()
    for i in range(2):
        Image.open(folder / "cbsd432" / f"{i}.png").crop((0, 0, 50, 41)).save(images / f"{i}.png")
    run(
        "evaluate", "--weights", folder / "w.safetensors", "--images", images, "--sigma", 20,
        "--seed", 0, "--json", folder / "out.json",
    )  # fmt: skip
    found = json.loads((folder / "out.json").read_text())
    expected = crsae.denoise(net, common.pictures(images), 20 / 255, 0)
    assert found["psnr"].keys() == {"0", "1"}
    for name, row in expected["psnr"].items():
        assert found["psnr"][name] == pytest.approx(row, abs=2e-3)
    mean = np.mean([row["standard"] for row in found["psnr"].values()])
    assert found["psnr_mean"]["standard"] == pytest.approx(mean, abs=2e-3)


def test_two_shifts_estimate_the_error_of_the_average_of_all() -> None:
    net = crsae.build(
        {"atoms": torch.randn(5, 1, 7, 7), "rate": torch.full((5,), 2.0)}, 0.1, depth=3
    )
    y = torch.rand(1, 1, 32, 32)
    objective = AveragedError(net.guide, 0.0)(net.model, net.guide)
    with torch.no_grad():
        truth = (net.guide.predictor(y) - y).square().mean()
        alone = (net.guide.predictor(y, shifts=[(0, 0)]) - y).square().mean()
        torch.manual_seed(0)
        draws = torch.stack([objective(y, 1) for _ in range(144)])
    error = draws.std() / 12
    assert (draws.mean() - truth).abs() < 4 * error
    assert alone - truth > 8 * error  # a single shift alone would not do


def test_spikes_are_found_by_the_commands(tmp_path: Path) -> None:
    data = recording()
    np.savez(tmp_path / "X.npz", **data)
    tensors, settings = crsae_spikes.train(data, 0, epochs=2, width=200)
    common.save_weights(tmp_path / "w.safetensors", tensors, settings)
    run(
        "evaluate-spikes", "--weights", tmp_path / "w.safetensors", "--recording",
        tmp_path / "X.npz", "--json", tmp_path / "out.json",
    )  # fmt: skip
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["true_spikes"] == len(data["true_spikes"]) > 20
    assert found["misses"] + found["false_alarms"] <= 2
    rows = crsae_spikes.rows_of(data["trace"], 21, 200)
    likely = crsae_spikes.probable_events(tensors, rows, settings["cell"], 0, epochs=60)
    errors = crsae_spikes.score(likely.above(0.5), data["true_spikes"])
    assert errors["misses"] + errors["false_alarms"] <= 2
    assert likely.amplitudes.min() >= 0
    assert likely.amplitudes.max() <= 1
    codes_only = crsae_spikes.score(np.zeros(0), data["true_spikes"])
    assert codes_only == {"misses": len(data["true_spikes"]), "false_alarms": 0}


def test_rows_hold_every_observed_sample_once_and_know_its_number() -> None:
    trace = recording()["trace"]
    rows = crsae_spikes.rows_of(trace, 21, 200)
    observed = rows.mask[:, 0].numpy()
    numbers = rows.samples[observed]
    assert np.array_equal(np.sort(numbers), np.flatnonzero(np.isfinite(trace)))
    assert np.array_equal(rows.y[:, 0].numpy()[observed], trace[numbers])


def test_one_event_answers_for_one_spike() -> None:
    truth = np.array([100, 130, 500])
    score = crsae_spikes.score
    assert score(np.array([99, 101, 131, 700]), truth, 5) == {"misses": 1, "false_alarms": 2}
    assert score(np.array([115]), truth, 20) == {"misses": 2, "false_alarms": 0}
    assert score(np.array([112, 120]), truth, 20) == {"misses": 1, "false_alarms": 0}


def test_the_threshold_lies_between_two_groups() -> None:
    assert 1 < crsae_spikes.otsu(np.array([0.1, 0.2, 1.0, 5.0, 6.0, 6.5])) < 5
    assert 0 < crsae_spikes.otsu(np.array([5.0, 6.0, 6.5, 8.0])) < 5  # all are of one group


def test_every_solver_finds_the_same_minimum() -> None:
    data = recording()
    atoms = torch.from_numpy(data["init_templates"]).float()[:, None]
    atoms = atoms / atoms.flatten(1).norm(dim=1)[:, None, None]
    tensors = {"atoms": atoms, "rate": torch.full((3,), 3.0)}
    found = crsae_speed.compare(data["trace"], tensors, tol=1e-3, sampled=4)
    assert found["all_certified"]
    for row in found["one_by_one"].values():
        assert row["not_reached"] == 0


def test_gabor_functions_are_told_from_noise() -> None:
    rows, columns = np.mgrid[:7, :7]
    window = np.exp(-((rows - 3) ** 2 + (columns - 2.5) ** 2) / 6)
    atoms = [window * np.cos(columns + 0.4 * rows), np.random.default_rng(0).normal(size=(7, 7))]
    fits = gabor.r_squared(np.stack([*atoms, np.ones((7, 7))]))
    assert fits[0] > 0.99
    assert fits[1] < 0.6
    assert fits[2] == 0
