"""The benchmark of Poisson denoising and of binomial templates, on toy data."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import dcea, dcea_counts, dcea_peers, dcea_places, dcea_report


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(dcea.HELD_OUT + 2):
        gray = np.cumsum(random.normal(size=(100, 96)), 1) * 8 + 120
        Image.fromarray(gray.clip(0, 255).astype(np.uint8)).save(folder / f"{number:02d}.png")
    return folder


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    module.main()


@pytest.mark.parametrize(("variant", "count"), [("constrained", 20_618), ("unconstrained", 61_516)])
def test_a_trained_net_is_read_again_and_evaluated(pictures, tmp_path, monkeypatch, variant, count):
    weights, out = tmp_path / "net.safetensors", tmp_path / "out.json"
    shared = ["--peak", 4, "--images", pictures]
    train = ["train", *shared, "--variant", variant, "--steps", 2, 1, "--out", weights]
    run(monkeypatch, dcea, *train)
    evaluate = ["evaluate", *shared, "--weights", weights, "--json", out]
    run(monkeypatch, dcea, *evaluate, "--seed", 0, "--draws", 2, "--names", "00", "01")
    found = json.loads(out.read_text())
    assert found["parameters"] == count
    assert sorted(found["psnr"]) == ["00", "01"]
    assert found["psnr_mean"]["published"] == pytest.approx(
        np.mean([found["psnr"][name]["published"] for name in ("00", "01")]), abs=1e-3
    )
    for one in found["psnr"].values():
        assert one["published"] > one["noisy_published"] + 3  # it starts as a denoiser
        assert one["spread_of_draws"] > 0


def test_weights_of_one_peak_are_refused_at_another(tmp_path, pictures, monkeypatch):
    weights = tmp_path / "net.safetensors"
    net = dcea.net(2.0, "constrained")
    settings = {"peak": 2.0, "variant": "constrained", "depth": dcea.DEPTH}
    dcea.common.save_weights(weights, dict(net.named_parameters()), settings)
    shared = ["--weights", weights, "--images", pictures, "--json", tmp_path / "out.json"]
    with pytest.raises(ValueError, match="Expected --peak 2, got 4"):
        run(monkeypatch, dcea, "evaluate", *shared, "--peak", 4)


@pytest.mark.parametrize("peak", [1.0, 4.0])
def test_the_bend_leaves_residuals_without_bias_in_a_gray_picture(peak):
    rate = torch.tensor(0.4 * peak)
    torch.manual_seed(0)
    counts = torch.poisson(rate.expand(400_000))
    bent = torch.nn.functional.elu(counts - rate, alpha=dcea.unbent(peak))
    assert abs(float(bent.mean())) < 4 * float(bent.std()) / 400_000**0.5


def test_draws_of_a_picture_do_not_depend_on_others():
    clean = torch.rand(20, 20)
    first = dcea.draws(clean, 4.0, 2, seed=3)
    torch.rand(5)
    assert torch.equal(torch.stack(first), torch.stack(dcea.draws(clean, 4.0, 2, seed=3)))


def test_rescaled_intervals_are_uniform_under_the_true_probabilities():
    random = np.random.default_rng(1)
    probabilities = np.broadcast_to(0.02 + 0.4 * (np.sin(np.arange(3000) / 40) > 0.5), (60, 3000))
    spikes = (random.random(probabilities.shape) < probabilities).astype(np.uint8)
    right = dcea_counts.fit_of(spikes, probabilities, spikes.mean(), seed=0)
    wrong = dcea_counts.fit_of(spikes, np.full(spikes.shape, spikes.mean()), spikes.mean(), seed=0)
    assert right["ks"] < 1.5 * right["ks_bound"]  # a true model is above it once in 10,000
    assert wrong["ks"] > 3 * wrong["ks_bound"]
    assert right["bits_per_spike"] > 0.3
    assert wrong["bits_per_spike"] == 0


def test_planted_responses_come_back_as_templates():
    random = np.random.default_rng(2)
    shape = 4 * np.hanning(40)
    log_odds = np.full((3, 3000), -5.0)
    for onset in range(500, 2500, 125):
        log_odds[:, onset : onset + 40] += shape
    probabilities = 1 / (1 + np.exp(-log_odds))[:, None]
    spikes = (random.random((3, 30, 3000)) < probabilities).astype(np.uint8)
    found = dcea_counts.Templates(spikes, 1.0, steps=8)
    assert np.corrcoef(found.log_odds.mean(0), log_odds[0])[0, 1] > 0.9
    assert float((found.codes > 0).float().mean()) < 0.1


def test_learning_on_the_picture_itself_denoises_it(monkeypatch):
    monkeypatch.setattr(dcea_peers, "SHIFTS", 1)
    monkeypatch.setattr(dcea_peers, "ROUNDS", 1)
    clean = torch.sin(torch.arange(40.0) / 6).expand(40, 40) / 3 + 0.6
    torch.manual_seed(0)
    counts = torch.poisson(4 * clean)
    estimate, about = dcea_peers.alternation(counts, 4.0)
    error, noise = ((x / 4 - clean).square().mean() for x in (estimate, counts))
    assert error < noise / 4
    assert about["seconds"] >= about["learning_seconds"]


def test_hidden_neurons_are_predicted_by_the_others(monkeypatch):
    monkeypatch.setattr(dcea_places, "EPOCHS", 20)
    monkeypatch.setattr(dcea_places, "ATOMS", 4)
    torch.manual_seed(0)
    together = torch.rand(1500, 1) < 0.5  # all neurons are busy, or none
    rates = torch.where(together, 4.0, 0.5).expand(-1, 10)
    y = torch.poisson(rates)
    guide = dcea_places.learn(y[:1000], 0.5, seed=0)
    expected = dcea_places.told_by_others(guide, y[1000:]).numpy()
    constant = y[:1000].mean(0).numpy()
    test = y[1000:].numpy()
    best = dcea_places.bits(test, rates[1000:].numpy(), constant)
    assert dcea_places.bits(test, expected, constant) > 0.8 * best
    assert dcea_places.bits(y.numpy(), np.broadcast_to(constant, y.shape), constant) == 0


def test_a_table_joins_runs_and_measures_the_distance_to_the_shipped_nets(tmp_path):
    files = []
    for name, value in (("02", 25.0), ("bridge", 21.0)):
        files.append(tmp_path / f"{name}.json")
        cell = {name: {"published": value, "standard": value + 0.5}}
        files[-1].write_text(json.dumps({"peak": 4.0, "psnr": cell}))
    found = dcea_report.table(4.0, {"constrained": files})["constrained"]
    assert found["psnr"]["house"]["ahead"] == pytest.approx(0.03)
    assert found["psnr"]["bridge"]["ahead"] == pytest.approx(-0.54)
    assert found["psnr_mean"] == {"published": 23.0, "standard": 23.5}
    with pytest.raises(ValueError, match="Expected results at peak 2, got 4.0"):
        dcea_report.table(2.0, {"constrained": files})
