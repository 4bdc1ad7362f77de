"""What is asked of trained VSC methods: labels, gradients, pictures of codes, and ablations."""

import argparse
import json
import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from sklearn.decomposition import PCA
from torch import nn

from benchmarks import (
    common,
    vsc,
    vsc_ablations,
    vsc_gradients,
    vsc_labels,
    vsc_measures,
    vsc_samples,
)
from benchmarks.vsc_methods import ABLATED, METHODS
from benchmarks.vsc_settings import Setting, programs
from pyro_sparse.guides import Heads, Thresholded, ThresholdPosterior
from pyro_sparse.infer import Exact, ImplicitMixed, SparseELBO
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import DeepSparseCoding


def test_the_correlation_ratio_is_that_of_an_analysis_of_variance():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (40,), generator=generator)
    codes = torch.randn(40, 2, generator=generator).double()
    codes[:, 1] += labels
    groups = [codes[labels == k, 1].numpy() for k in range(3)]
    f = stats.f_oneway(*groups).statistic
    assert vsc_labels.correlation_ratios(codes, labels)[1].item() == pytest.approx(
        2 * f / (2 * f + 37)
    )
    constant = torch.cat([torch.full((40, 1), 0.3).double(), labels[:, None].double()], 1)
    assert vsc_labels.correlation_ratios(constant, labels).tolist() == [0, pytest.approx(1)]


def test_the_point_biserial_correlation_is_scipys():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(30, 3, generator=generator).double()
    attributes = torch.rand(30, 2, generator=generator) < 0.4
    found = vsc_labels.point_biserial(codes, attributes)
    for code in range(3):
        for attribute in range(2):
            expected = stats.pointbiserialr(
                attributes[:, attribute].numpy(), codes[:, code].numpy()
            )
            assert found[code, attribute].item() == pytest.approx(expected.statistic)
    assert vsc_labels.point_biserial(codes, attributes | True).tolist() == [[0, 0]] * 3


def test_garments_keep_their_classes_and_come_with_names(tmp_path):
    (tmp_path / "fashion_mnist").mkdir()
    for part, count in (("train", 3), ("test", 5)):
        images = np.arange(count, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
        labels = np.arange(count, dtype=np.uint8) + 2
        np.savez(tmp_path / "fashion_mnist" / f"fashion_{part}.npz", images=images, labels=labels)
    found = vsc_labels.labelled("fashion", 4, tmp_path)
    assert (found.y[:, 0] * 255).round().tolist() == [0, 1, 2, 3]
    assert found.labels.tolist() == [2, 3, 4, 5]
    assert len(found.train) == 3
    assert found.names[7:] == ("sneaker", "bag", "boot")


def test_principal_components_are_those_of_the_training_pictures():
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(50, 4, generator=generator) * torch.tensor([1.0, 5.0, 0.1, 2.0])
    found = vsc_labels.components(train, train[:3], 2)
    expected = PCA(2).fit(train.numpy()).transform(train[:3].numpy())
    assert np.abs(found.numpy()) == pytest.approx(np.abs(expected), rel=1e-4)


def test_a_code_of_the_class_stands_out_of_chance_and_noise_does_not():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) // 2
    codes = torch.randn(40, 6, generator=generator)
    assert vsc_labels.of_categories(codes, labels)["codes_above_chance"] == 0
    codes[:, 2] = labels + 0.1 * codes[:, 2]
    found = vsc_labels.of_categories(codes, labels)
    assert found["codes_above_chance"] == 1
    # Of two pictures of a person noise alone takes (20 - 1) / (40 - 1), on average.
    assert found["mean_eta2_of_chance"] == pytest.approx(19 / 39, abs=0.01)
    row = vsc_labels.of_attributes(codes, nn.functional.one_hot(labels // 10).bool(), ("a", "b"))
    expected = stats.pointbiserialr((labels // 10 == 1).numpy(), codes[:, 2].numpy()).statistic
    assert row["b"][0] == pytest.approx(abs(expected), abs=1e-3)
    assert row["b"][0] > row["b"][1]


def toy(
    features: int = 6, atoms: int = 4, count: int = 3
) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(atoms, features), nn.Tanh())
    model = DeepSparseCoding(
        decoder, Gaussian(0.5), code_shape=(atoms,), signal_shape=(features,),
        **METHODS["threshold-laplace-max"].prior(),
    )  # fmt: skip
    family = ThresholdPosterior(0.2, dist.Laplace)
    return (
        model,
        Thresholded(Heads(nn.Linear(features, 8), 8, atoms, family.names), family),
        (torch.randn(count, features)),
    )


def test_an_unbiased_gradient_is_at_its_noise_and_a_straight_one_is_not():
    model, guide, y = toy(count=100)
    made = vsc_gradients.objectives("threshold")
    chosen = {name: made[name] for name in ("leave-one-out, J=2", "straight-through as released")}
    rows = vsc_gradients.study(
        chosen, model, guide, y, steps=20, reference_steps=20, reference_draws=8
    )
    unbiased, straight = rows.values()
    assert unbiased["encoder"]["relative_bias"] < 2 * unbiased["encoder"]["of_noise_alone"]
    assert straight["encoder"]["relative_bias"] > 3 * straight["encoder"]["of_noise_alone"]
    # The decoder's gradient needs no reparameterisation: it is unbiased in both.
    assert straight["decoder"]["relative_bias"] < 2 * straight["decoder"]["of_noise_alone"]


def test_bias_noise_and_their_ratio_are_those_of_known_gradients():
    truth = vsc_gradients.Moments(torch.tensor([3.0, 4.0]), torch.zeros(2), 2)
    own = vsc_gradients.Moments(torch.tensor([3.0, 8.0]), torch.tensor([1.0, 2.0]), 2)
    found = vsc_gradients.judged(own, truth)
    assert found["median_snr"] == pytest.approx(3)
    assert found["relative_bias"] == pytest.approx(4 / 5)
    assert found["of_noise_alone"] == pytest.approx(math.sqrt(3 / 2) / 5, abs=1e-3)
    assert found["relative_sd"] == pytest.approx(math.sqrt(3) / 5, abs=0.01)


def test_moments_of_a_gradient_without_noise_are_its_value_and_nothing():
    model, guide, y = toy()
    method = METHODS["exact-laplace-fixed"]
    linear = DeepSparseCoding(
        nn.Linear(4, 6), Gaussian(0.5), code_shape=(4,), signal_shape=(6,), **method.prior()
    )
    objective = SparseELBO(Exact(), num_plates=1)
    found = vsc_gradients.slopes(objective, linear, guide, y, 3)
    (-objective.differentiable_loss(linear, guide, y) / 3).backward()
    own = torch.cat([p.grad.flatten() for p in linear.parameters()]).double()
    torch.testing.assert_close(found["decoder"].mean, own)
    assert found["decoder"].variance.max() < 1e-10


def test_objectives_are_of_the_law_they_differentiate():
    gates = vsc_gradients.objectives("gates")
    assert not any("straight" in name or "released" in name for name in gates)
    _, _, y = toy()
    method = METHODS["implicit-gaussian"]
    model = DeepSparseCoding(
        nn.Linear(4, 6), Gaussian(0.5), code_shape=(4,), signal_shape=(6,), **method.prior()
    )
    guide = method.guide(nn.Linear(6, 8), 8, 4)
    for objective in gates.values():
        found = vsc_gradients.slopes(objective, model, guide, y, 2)
        assert all(torch.isfinite(part.mean).all() for part in found.values())
    assert vsc_gradients.elbo(ImplicitMixed(), 2).num_samples == 2


@pytest.mark.parametrize("name", sorted(ABLATED))
def test_every_ablation_makes_a_step(name):
    setting, y = Setting.of("linear"), torch.randn(8, 256)
    model, guide, found = vsc.fit(setting, name, y, steps=2, batch=4, seed=0)
    assert found["steps"] == 2
    measured = vsc_measures.measure(setting, METHODS[name], model, guide, y[:4], 2)
    assert math.isfinite(measured["bound"]["J=100"][0])


def test_three_kinds_of_threshold_have_one_prior():
    names = ("exact-laplace", "exact-laplace-fixed", "exact-laplace-gamma")
    laws = [METHODS[name].prior()["prior"] for name in names]
    for law in laws:
        assert law.prob_active.item() == pytest.approx(0.1, rel=1e-4)
    at = torch.tensor([-0.3, 0.0, 0.1, 0.7])
    for law in laws[1:]:
        torch.testing.assert_close(law.log_prob(at), laws[0].log_prob(at), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("percent", [5, 20, 50])
def test_prior_inclusion_is_what_the_name_says(percent):
    method = METHODS[f"exact-gaussian-{percent}-percent"]
    assert method.prior()["prior"].prob_active.item() == pytest.approx(percent / 100)
    assert method.prior_variance == pytest.approx(0.1 * percent / 100)


def test_ablations_are_compared_with_the_reference_of_their_group(tmp_path, monkeypatch):
    for place, name in enumerate(vsc_ablations.names()):
        values = [float(place), place + 2.0]
        row = {
            "steps": 3, "processor_seconds": 1.0, "bound": {"J=1": [0, 1], "J=100": [place, 1]},
            "by_picture": {"J=100": values}, "active_codes": 2.0, "used_codes": 1, "jaccard": 0.5,
            "squared_error_per_pixel": {"single draw": [1, 0], "posterior mean": [1, 0]},
        }  # fmt: skip
        (tmp_path / f"linear-{name}-0.test.json").write_text(json.dumps(row))
    found = vsc_ablations.rows_of(tmp_path)
    assert vsc_ablations.GAP not in found["draws"]["J = 1"]
    assert found["draws"]["J = 20, best"][vsc_ablations.GAP] == [4, 0]
    assert found["threshold"]["free inclusion"][vsc_ablations.GAP] == [2, 0]
    assert found["inclusion"]["5 %"][vsc_ablations.GAP] == [-1, 0]
    vsc_ablations.draw(found, tmp_path / "ablations.png")
    assert (tmp_path / "ablations.png").stat().st_size > 1000


def test_traversals_change_one_code_alone_and_draws_are_of_the_prior():
    setting, method = Setting.of("linear"), METHODS["exact-gaussian-5-percent"]
    torch.manual_seed(0)
    model, guide = programs(setting, method)
    walk = vsc_samples.traversed(setting, model, [3, 7], 2.0, columns=5)
    expected = torch.linspace(-2, 2, 5)[:, None] * model.dictionary.atoms[7]
    torch.testing.assert_close(walk[1], expected)
    pictures = vsc_samples.drawn(setting, method, model, 4000)
    # Variance of a pixel: inclusion times the variance of the slab, times its atoms squared.
    atoms = model.dictionary.atoms.detach()
    torch.testing.assert_close(
        pictures.var(0).mean(), 0.05 * 0.1 * atoms.square().sum(0).mean(), rtol=0.05, atol=0
    )
    y = torch.randn(50, 256)
    assert vsc_samples.most_varying(guide, y, 2) == (
        vsc_labels.means(guide, y).var(0).topk(2).indices.tolist()
    )


def test_colours_are_put_last():
    flat = torch.arange(2 * 4 * 4.0).repeat(2)[: 3 * 4 * 2]
    assert vsc_samples.shown(flat, (3, 4, 2))[1, 0].tolist() == flat.view(3, 4, 2)[:, 1, 0].tolist()


def test_labels_and_pictures_of_trained_faces(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(vsc_labels, "PERMUTATIONS", 20)
    (tmp_path / "olivetti").mkdir()
    images = np.random.default_rng(0).integers(0, 255, (16, 64, 64), np.uint8)
    subject = np.repeat([0, 1], 8)
    np.savez(
        tmp_path / "olivetti" / "olivetti.npz",
        images=images, subject=subject, index=np.arange(16),
    )  # fmt: skip
    model, guide = programs(Setting.of("faces"), METHODS["implicit-gaussian"])
    stored = tmp_path / "faces-implicit-gaussian-0.safetensors"
    vsc.store(stored, model, guide, {"kind": "faces", "method": "implicit-gaussian", "seed": 0})
    options = argparse.Namespace(kind="faces", out=tmp_path, data=tmp_path, count=100)
    content = vsc_labels.run(options)
    assert content["pictures"] == 4
    found = content["rows"]["implicit-gaussian, seed 0"]
    assert (found["categories"], found["codes"]) == (2, 64)
    assert content["rows"]["principal components"]["codes"] == 12
    assert vsc_samples.run(options).stat().st_size > 1000
    assert (tmp_path / "results" / "vsc_faces_labels.png").stat().st_size > 1000
