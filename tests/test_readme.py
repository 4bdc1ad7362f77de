import json
import re
import warnings
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_readme_examples_run_and_find_the_atoms(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    recovered, gap, active, *report = capsys.readouterr().out.strip().splitlines()
    assert 1.5 < float(re.findall(r"[\d.]+", active)[0]) < 2.5  # two codes of a datum, on average
    assert float(re.findall(r"[\d.]+", recovered)[0]) > 0.99
    assert gap.endswith("tensor(True)")
    assert "not asked  training" in "\n".join(report)  # the report, to its last topics
    assert isinstance(names["dictionary"].atoms, torch.Tensor)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_page_on_posteriors_runs_and_knows_which_codes_are_active() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/posteriors.md").read_text(), re.S)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of k-hat, about some data
        exec(compile("".join(blocks), "posteriors.md", "exec"), names)
    torch.manual_seed(1)
    with torch.no_grad():
        trace = pyro.poutine.trace(names["model"]).get_trace(num_data=500)
        fresh, codes = trace.nodes["obs"]["value"], trace.nodes["codes"]["value"]
        found = names["guide"].posterior(fresh).prob_active
    active = codes != 0
    assert roc_auc_score(active.flatten(), found.flatten()) > 0.8
    assert abs(found.mean() - active.float().mean()) < 0.05


def test_the_page_on_encoders_runs_and_comes_nearer_to_the_atoms() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/encoders.md").read_text(), re.S)
    names: dict[str, Any] = {}
    exec(compile("".join(blocks), "encoders.md", "exec"), names)
    losses = names["history"].epoch_loss
    assert losses[-1] < losses[0]
    codes = names["guide"].encode(names["y"])
    assert 0.02 < (codes != 0).float().mean() < 0.9
    assert names["certified"].converged.all()
    for found in (names["certified"].codes, names["encoder"].encode(names["recorded"])):
        assert (found >= 0).all() and (found > 0).any()
        assert (found[:, :, ~names["active"][0]] == 0).all()


@pytest.mark.slow
def test_the_page_on_any_program_runs_and_finds_the_atoms() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/any_program.md").read_text(), re.S)
    names: dict[str, Any] = {}
    exec(compile("".join(blocks), "any_program.md", "exec"), names)
    history = names["history"].epoch_loss
    assert history[-1] < history[0]
    assert names["found"].diagonal().min() > 0.95
    assert 0.2 < (names["best"]["signed"] == 0).float().mean() < 0.95
    gaps = names["codes"]["signed"][:20] - names["best"]["signed"]
    assert gaps.abs().mean() < 0.1  # ten layers against the MAP codes


def test_readme_numbers_are_those_of_the_committed_run() -> None:
    summary = json.loads((ROOT / "docs/figures/summary.json").read_text())
    table = re.search(
        r"<!-- numbers: begin.*?numbers: end -->", (ROOT / "README.md").read_text(), re.S
    )
    assert table is not None
    decibels = [float(number) for number in re.findall(r"([\d.]+) dB", table[0])]
    expected = [summary[key] for key in ("psnr_noisy", "psnr_dct", "psnr_learned")]
    assert decibels == [round(value, 2) for value in expected]
    f1 = re.search(r"\| ([\d.]+) \|$", table[0], re.M)
    assert f1 is not None and float(f1[1]) == round(summary["spike_f1"], 3)


def test_committed_run_reaches_what_the_demo_promises() -> None:
    summary = json.loads((ROOT / "docs/figures/summary.json").read_text())
    assert summary["psnr_learned"] - summary["psnr_noisy"] >= 7.3
    assert summary["psnr_learned"] - summary["psnr_dct"] >= 0.3
    assert summary["spike_f1"] >= 0.95
