"""The table of five guides: its search for a rate, and one quick round."""

import json
import sys

import pytest
import torch

from benchmarks import five_guides


def test_the_rate_is_found_at_which_so_many_codes_are_active():
    rate, tried = five_guides.equal_rate(lambda rate: rate, lambda rate: 80 / rate**0.7, target=4.0)
    assert 80 / rate**0.7 == pytest.approx(4.0, rel=five_guides.CLOSE)
    assert 1 < len(tried) <= five_guides.TRIALS


def test_a_rate_that_no_trial_comes_close_to_is_the_nearest_of_them():
    rate, tried = five_guides.equal_rate(lambda rate: rate, lambda rate: 10.0, target=4.0)
    assert len(tried) == five_guides.TRIALS
    assert rate in [one for one, _ in tried]


def test_data_have_the_signal_to_noise_ratio_that_is_said():
    made = five_guides.truth(0)
    y, codes = five_guides.draw(made, 20_000, 1)
    noise = y - made.dictionary(codes)
    ratio = 10 * torch.log10((y - noise).square().mean() / noise.square().mean())
    assert float(ratio) == pytest.approx(10.0, abs=0.3)
    assert float((codes != 0).float().mean()) == pytest.approx(five_guides.PROBS, abs=0.003)


@pytest.mark.parametrize("name", list(five_guides.SYSTEMS))
def test_a_guide_that_starts_at_the_true_atoms_finds_codes(name):
    made, system = five_guides.truth(0), five_guides.SYSTEMS[name]
    y, codes = five_guides.draw(made, 60, 1)
    guide = system.guide(made.dictionary, five_guides.RATE)
    found, probs = five_guides.codes_of(system, guide, y)
    assert ((probs >= 0) & (probs <= 1)).all()
    row = five_guides.measured(system, made, made, guide, y, codes)
    assert row["atom_correlation"] == pytest.approx(1.0, abs=1e-5)
    assert row["code_error"] < 1.0
    assert (row["own_bound"] is None) == system.point


def test_a_quick_round_is_a_whole_record(tmp_path, monkeypatch):
    out = tmp_path / "found.json"
    monkeypatch.setattr(five_guides, "TRIALS", 1)
    monkeypatch.setattr(five_guides, "LEARNING_RATES", (1e-2,))
    argv = ["five_guides", "--quick", "--json", str(out), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    five_guides.main()
    found = json.loads(out.read_text())
    assert list(found["guides"]) == ["VSC", "CRsAE", "DrSAE", "DCEA", "PUDLE"]
    assert (tmp_path / "five_guides.png").stat().st_size > 1000
    assert found["settings"]["seeds"] == 1
    targets = {name: row["own_bound"] is None for name, row in found["guides"].items()}
    assert targets == {name: system.point for name, system in five_guides.SYSTEMS.items()}
