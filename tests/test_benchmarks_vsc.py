"""The VSC benchmark on toy data: filter, measures, priors, and one round from training to table."""

import argparse
import json
import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, stats

from benchmarks import common, vsc, vsc_images, vsc_measures, vsc_report
from benchmarks.vsc_methods import GAMMA, METHODS, SCALES, SHIFTED
from benchmarks.vsc_settings import Setting, programs


def test_whitening_multiplies_a_wave_by_the_published_gain():
    frequency = 12 / 64
    wave = torch.cos(2 * math.pi * frequency * torch.arange(64.0)).expand(64, 64)
    gain = frequency * math.exp(-((frequency / 0.39) ** 4))
    torch.testing.assert_close(vsc_images.whiten(3 + wave), gain * wave, atol=1e-5, rtol=0)


def test_patches_are_of_the_picture_they_are_said_to_be_of():
    pictures = [torch.full((40, 50), float(value)) for value in (1, 2)]
    patches = vsc_images.cut(pictures, 3, seed=0)
    assert patches.shape == (6, 256)
    assert patches[:, 0].tolist() == [1, 1, 1, 2, 2, 2]
    with pytest.raises(ValueError, match="at least 32 pixels"):
        vsc_images.cut([torch.zeros(31, 60)], 1, seed=0)


def test_a_gabor_function_is_found_and_noise_is_none():
    rows, columns = np.mgrid[:16, :16] - 7.3
    along = 0.6 * columns + 0.8 * rows
    across = -0.8 * columns + 0.6 * rows
    wave = np.cos(2 * np.pi * 0.17 * along + 0.9)
    gabor = np.exp(-((along / 2.2) ** 2 + (across / 3.4) ** 2) / 2) * wave
    fitted, ratio = vsc_images.gabor_fit(gabor)
    assert ratio > 0.999
    assert fitted.shape == (16, 16)
    assert vsc_images.gabor_fit(np.random.default_rng(0).normal(size=(16, 16)))[1] < 0.5


def test_jaccard_index_of_all_pairs():
    supports = torch.tensor([[[1, 1, 0]], [[1, 0, 0]], [[0, 0, 1]]]).bool()
    assert vsc_measures.jaccard(supports).tolist() == [pytest.approx((0.5 + 0 + 0) / 3)]
    assert vsc_measures.jaccard(torch.zeros(3, 2, 4).bool()).tolist() == [1, 1]


def test_bounds_grow_with_the_draws_and_meet_where_weights_are_equal():
    found = vsc_measures.bounds(torch.randn(100, 5, generator=torch.Generator().manual_seed(0)))
    assert (found[1] < found[20]).all() and (found[20] < found[100]).all()
    same = vsc_measures.bounds(torch.full((100, 1), -3.0))
    assert all(values.item() == pytest.approx(-3) for values in same.values())


@pytest.mark.parametrize("base", [dist.Laplace, dist.Normal])
def test_priors_are_active_in_a_tenth_of_the_draws(base):
    law = {dist.Laplace: stats.laplace, dist.Normal: stats.norm}[base](scale=SCALES[base])
    assert 2 * law.sf(SHIFTED[base]) == pytest.approx(0.1, rel=1e-4)
    threshold = stats.gamma(3, scale=GAMMA[base] / 3)
    integral = integrate.quad(lambda t: 2 * law.sf(t) * threshold.pdf(t), 0, np.inf)[0]
    assert integral == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("name", Setting.of("linear").methods)
def test_every_method_makes_a_step(name):
    setting, y = Setting.of("linear"), torch.randn(8, 256)
    model, guide, found = vsc.fit(setting, name, y, steps=2, batch=4, seed=0)
    assert found["steps"] == 2
    measured = vsc_measures.measure(setting, METHODS[name], model, guide, y[:4], 2)
    if name != "fista":
        values = [measured["bound"][f"J={count}"][0] for count in (1, 20, 100)]
        assert values == sorted(values) and all(math.isfinite(value) for value in values)


@pytest.mark.parametrize("name", ["threshold-gaussian-max", "implicit-gaussian"])
def test_garments_are_decoded_by_the_published_network(name, tmp_path):
    setting, y = Setting.of("fashion"), torch.rand(8, 784)
    model, guide, found = vsc.fit(setting, name, y, steps=2, batch=4, seed=0)
    file = tmp_path / "w.safetensors"
    vsc.store(file, model, guide, {"kind": "fashion", "method": name, **found})
    assert file.stat().st_size < 1e6
    _, _, model, guide, _ = vsc.restore(file)
    measured = vsc_measures.measure(setting, METHODS[name], model, guide, y[:4], 1)
    assert math.isfinite(measured["bound"]["J=100"][0])


def test_a_gamma_threshold_integrated_out_gives_no_lower_bound_than_a_drawn_one():
    setting, method = Setting.of("linear"), METHODS["threshold-laplace-gamma-mean"]
    torch.manual_seed(0)
    model, guide = programs(setting, method)
    y = torch.randn(10, 256)
    drawn = vsc.infer.log_weights(model, guide, y, num_samples=300).local.mean()
    weighed, weighing = method.weighable(setting.around(model), guide)
    integrated = vsc.infer.log_weights(weighed, weighing, y, num_samples=300).local.mean()
    assert integrated > drawn


def test_from_training_to_table_and_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(vsc_images, "gabor_fit", lambda atom: (atom, 0.9))
    setting, y = Setting.of("linear"), torch.randn(40, 256)
    monkeypatch.setattr(vsc, "data_of", lambda *_: (y[:20], 2.0, 5))
    for name in ("exact-gaussian", "threshold-laplace-max", "fista"):
        model, guide, found = vsc.fit(setting, name, y, steps=3, batch=20, seed=0)
        settings = {
            "kind": "linear", "method": name, "seed": 0, "scale": 2.0, **found,
        }  # fmt: skip
        file = tmp_path / f"linear-{name}-0.safetensors"
        vsc.store(file, model, guide, settings)
        vsc.tested(file, "test", None)
    _, _, again, _, _ = vsc.restore(tmp_path / "linear-fista-0.safetensors")
    torch.testing.assert_close(again.dictionary.atoms, model.dictionary.atoms, rtol=1e-3, atol=1e-4)

    weights = tmp_path / "weights" / "linear.safetensors"
    content = vsc_report.table(tmp_path, "linear", "exact-gaussian", weights)
    assert content["best_published_sparse"] == "threshold-laplace-max, seed 0"
    gap = content["rows"]["threshold-laplace-max, seed 0"]["bound_less_reference"]["J=100"]
    values = [row["bound"]["J=100"][0] for row in content["rows"].values() if "bound" in row]
    assert gap[0] == pytest.approx(values[0] - values[1], abs=2e-3)
    assert (tmp_path / "results" / "vsc_linear.png").stat().st_size > 1000

    np.savez(
        tmp_path / "x.npz", images=np.random.default_rng(0).integers(0, 255, (3, 40, 40), np.uint8)
    )
    options = argparse.Namespace(
        weights=weights, images=tmp_path / "x.npz", json=tmp_path / "out.json", patches=4
    )
    vsc.evaluate(options)
    assert json.loads((tmp_path / "out.json").read_text())["data"] == 12
