"""Encoders: what they emit, before any training and for whatever data, and what they refuse."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from pyro_sparse.dictionaries import Composition, Conv, Dense, Overhang, Periodic
from pyro_sparse.distributions import SpikeAndSlab, Tails, overshoot
from pyro_sparse.guides import (
    GammaThresholdPosterior,
    Heads,
    PerDatum,
    SpikeAndSlabPosterior,
    Thresholded,
    UnrolledEncoder,
)
from pyro_sparse.infer import SparseELBO, load, save
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import ISTA, Proximal, Unrolled

F64 = torch.float64
DICTIONARIES = {
    "dense": (lambda: Dense(6, 4), (4,), (6,)),
    "conv1d": (lambda: Conv(3, 2, 4), (2, 11), (3, 8)),
    "overhang": (lambda: Conv(3, 2, 4, boundary=Overhang()), (2, 11), (3, 14)),
    "periodic": (lambda: Conv(3, 2, 4, boundary=Periodic()), (2, 11), (3, 11)),
    "conv2d": (lambda: Conv(3, 1, (3, 2), stride=(2, 1)), (1, 7, 6), (3, 3, 5)),
}
geometries = pytest.mark.parametrize("geometry", DICTIONARIES)


def untied(dictionary: Any, likelihood: Any, **options: Any) -> Unrolled:
    options["analysis"], options["synthesis"] = (copy.deepcopy(dictionary) for _ in range(2))
    return Unrolled(dictionary, likelihood, **options)


SOLVERS = {"tied": Unrolled, "untied": untied}
weights = pytest.mark.parametrize("weights", SOLVERS)


def make(
    geometry: str, weights: str = "tied", *, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[UnrolledEncoder, Tensor]:
    build, signal_shape, _ = DICTIONARIES[geometry]
    torch.manual_seed(1)
    solver = SOLVERS[weights](build().to(dtype), Gaussian(0.5), num_steps=4)
    encoder = UnrolledEncoder(solver, dist.Laplace(0.0, 0.75), **options)
    return encoder, torch.randn(5, *signal_shape, dtype=dtype)


def matrix(dictionary: Any, code_shape: tuple[int, ...]) -> Tensor:
    """Rows: what each unit code makes, flattened."""
    size = torch.Size(code_shape).numel()
    units = torch.eye(size, dtype=dictionary.like.dtype).reshape(size, *code_shape)
    return dictionary(units).detach().flatten(1)


# Heads --------------------------------------------------------------------------------------------


def test_heads_emit_each_name_in_the_shape_of_the_codes() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten())
    heads = Heads(network, 2 * 5 * 4, (3, 3, 5), names=GammaThresholdPosterior().names)
    emitted = heads(torch.randn(4, 1, 7, 6))
    assert list(emitted) == ["loc", "log_scale", "log_concentration", "log_rate"]
    assert {tuple(values.shape) for values in emitted.values()} == {(4, 3, 3, 5)}
    sum(values.sum() for values in emitted.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in heads.parameters())


def test_the_published_network_has_the_published_sizes() -> None:
    """Fallah & Rozell (2022): 256-512-1024-512-256 on patches of 16 x 16, 256 codes."""
    widths = (256, 256, 512, 1024, 512, 256)
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:]):
        layers += [nn.Linear(before, after), nn.ReLU()]
    family = GammaThresholdPosterior()
    guide = Thresholded(Heads(nn.Sequential(*layers), 256, 256, names=family.names), family)
    expected = sum((a + 1) * b for a, b in zip(widths, widths[1:])) + 4 * 257 * 256
    assert sum(p.numel() for p in guide.parameters()) == expected
    assert guide(torch.randn(2, 256)).shape == (2, 256)


class Two(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return y[:2, :1].expand(2, 7)


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: Heads(torch.relu, 4, 3), TypeError, "network to be a module, got builtin"),
        (lambda: Heads(nn.Identity(), 0, 3), ValueError, "num_features"),
        (lambda: Heads(nn.Identity(), 4, (3, 0)), ValueError, "code_shape"),
        (lambda: Heads(nn.Identity(), 4, 3, names="loc"), ValueError, "different names"),
        (lambda: Heads(nn.Identity(), 4, 3, names=()), ValueError, "different names"),
        (lambda: Heads(nn.Identity(), 4, 3, names=("loc", "loc")), ValueError, "different names"),
        (lambda: Heads(nn.Identity(), 4, 3, names=("a.b",)), ValueError, "without dots.*'a.b'"),
        (lambda: Heads(nn.Identity(), 4, 3, names=("",)), ValueError, "without dots"),
        (lambda: Heads(nn.Identity(), 4, 3, names=("keys",)), ValueError, "taken, got 'keys'"),
        (lambda: Heads(nn.Identity(), 4, 3, names=(1, 2)), TypeError, "as strings, got 1"),
        (
            lambda: Heads(nn.Linear(5, 4), 4, 3)(torch.ones(2, 7)),
            ValueError,
            r"that the network takes, got shape \(2, 7\).*cannot be multiplied",
        ),
        (lambda: Heads(nn.Identity(), 5, 3)(torch.ones(2, 4)), ValueError, r"\(2, 5\) from"),
        (lambda: Heads(nn.Identity(), 4, 3)(torch.ones(2, 1, 4)), ValueError, "nn.Flatten"),
        (lambda: Heads(Two(), 7, 3)(torch.ones(3, 4)), ValueError, r"\(3, 7\) .* got \(2, 7\)"),
    ],
    ids=range(14),
)
def test_what_makes_no_heads_is_refused(
    build: Callable[[], Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        build()


class Full(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("planted")


def test_a_full_memory_is_no_fault_of_the_data() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        Heads(Full(), 4, 3)(torch.ones(2, 7))


# Tables -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "error", "match"),
    [
        ([torch.zeros(3, 8)], TypeError, "dict from name to tensor, such as .* got list"),
        ({}, ValueError, "alike, got {}"),
        ({"loc": torch.zeros(3)}, ValueError, "alike"),
        ({"loc": torch.zeros(3, 8), "logits": torch.zeros(3, 7)}, ValueError, "alike"),
        ({"loc": 0.0}, TypeError, "loc to be a floating tensor, got float"),
        ({"loc": torch.zeros(3, 8, dtype=torch.long)}, TypeError, "floating tensor, dense"),
        ({"a.b": torch.zeros(3, 8)}, ValueError, "without dots"),
        ({1: torch.zeros(3, 8)}, TypeError, "as strings"),
    ],
    ids=range(8),
)
def test_what_makes_no_table_is_refused(
    parameters: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        PerDatum(parameters)


# Unrolled -----------------------------------------------------------------------------------------


@geometries
@weights
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_an_unrolled_encoder_emits_the_shape_of_the_codes_and_moves_every_parameter(
    geometry: str, weights: str, masked: bool, dtype: torch.dtype
) -> None:
    encoder, y = make(geometry, weights, dtype=dtype)
    mask = torch.rand(y.shape) < 0.7 if masked else None
    emitted = encoder(y, mask)
    assert set(emitted) == {*SpikeAndSlabPosterior().names, "codes"} == set(encoder.names)
    shape = (5, *DICTIONARIES[geometry][2])
    assert all(v.shape == shape and v.dtype == dtype for v in emitted.values())
    sum((values**2).sum() for values in emitted.values()).backward()
    decoder = {id(p) for p in encoder.unrolled.dictionary.parameters()}
    for name, parameter in encoder.named_parameters():
        if weights == "untied" and id(parameter) in decoder:
            assert parameter.grad is None, name  # the model's, moved by the decoder alone
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


@geometries
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_at_the_start_it_emits_the_conditional_law_of_each_code(
    geometry: str, masked: bool
) -> None:
    """Bayes' rule for one Gaussian code, with all others at the solver's; in matrices."""
    encoder, y = make(geometry, dtype=F64, init_probs=0.2, init_scale=1.5)
    mask = torch.rand(y.shape) < 0.7 if masked else torch.ones(y.shape, dtype=torch.bool)
    emitted = encoder(y, mask)
    code_shape = DICTIONARIES[geometry][2]
    atoms = matrix(encoder.unrolled.dictionary, code_shape)  # (codes, features)
    law = dist.Laplace(0.0, torch.tensor(0.75, dtype=F64)).expand(code_shape)
    codes = encoder.unrolled(y, law.to_event(len(code_shape)), mask=mask).detach().flatten(1)
    observed = mask.flatten(1).double()
    residual = (y.flatten(1) - codes @ atoms) * observed
    for k in range(atoms.shape[0]):
        energy = (observed * atoms[k] ** 2).sum(1)
        alone = (residual * atoms[k]).sum(1) + energy * codes[:, k]  # without code k
        precision = energy / 0.5**2 + 1 / 1.5**2
        mean = alone / 0.5**2 / precision
        # The ratio of evidences of a code that is active and one that is not.
        odds = -0.5 * torch.log(precision * 1.5**2) + precision * mean**2 / 2
        for name, expected in (
            ("loc", mean),
            ("log_scale", -precision.log() / 2),
            ("logits", odds + torch.log(torch.tensor(0.25, dtype=F64))),
        ):
            found = emitted[name].detach().flatten(1)[:, k]
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_of_one_gaussian_code_it_emits_the_exact_posterior_mean_field() -> None:
    """One atom, the model's own prior: the bound is the evidence of each datum."""
    dictionary, likelihood = Dense(1, 4), Gaussian(0.5)
    prior = SpikeAndSlab(dist.Normal(0.0, 1.5), 0.2)
    model = SparseCoding(dictionary, likelihood, prior).double()
    solver = Unrolled(dictionary, likelihood)
    encoder = UnrolledEncoder(solver, dist.Laplace(0.0, 1.0), init_probs=0.2, init_scale=1.5)
    y = torch.randn(7, 4, dtype=F64)
    guide = Thresholded(encoder.double())
    atom = dictionary.atoms.detach()[0]
    noise = torch.eye(4, dtype=F64) * float(likelihood.scale) ** 2
    zero = torch.zeros(4, dtype=F64)
    silent = dist.MultivariateNormal(zero, noise).log_prob(y)
    active = dist.MultivariateNormal(zero, noise + 1.5**2 * torch.outer(atom, atom)).log_prob(y)
    prob = torch.sigmoid(prior.logits.double())
    evidence = torch.logaddexp((1 - prob).log() + silent, prob.log() + active).sum()
    # float32 constants of the prior; Jensen's gap is quadratic in them.
    assert abs(float(-evidence) - SparseELBO().loss(model, guide, y)) < 1e-9


def half_normal(scale: float) -> Tails:
    return Tails(overshoot(dist.Normal(0.0, torch.tensor(scale, dtype=F64)), torch.zeros(())))


def test_of_one_code_that_is_not_negative_it_emits_the_exact_posterior() -> None:
    """The evidence of each datum, by a fine grid over the code, which half of the data oppose."""
    dictionary, likelihood = Dense(1, 4), Gaussian(0.5)
    model = SparseCoding(dictionary, likelihood, SpikeAndSlab(half_normal(1.5), 0.2)).double()
    options = {"init_probs": 0.2, "init_scale": 1.5, "one_sided": True}
    encoder = UnrolledEncoder(
        Unrolled(dictionary, likelihood), dist.Exponential(1.0), **options
    ).double()
    guide = Thresholded(encoder, SpikeAndSlabPosterior(one_sided=True))
    atom = dictionary.atoms.detach().numpy()[0]
    y = torch.linspace(-2, 3, 7, dtype=F64)[:, None] * torch.from_numpy(atom)
    y = y + 0.5 * torch.randn(7, 4, dtype=F64)
    grid = np.linspace(0, 20, 200_001)
    slab = scipy.stats.halfnorm.pdf(grid, scale=1.5)
    evidence = 0.0
    for one in y.numpy():
        silent = scipy.stats.norm.logpdf(one, scale=0.5).sum()
        given = scipy.stats.norm.logpdf(one[:, None] - atom[:, None] * grid, scale=0.5).sum(0)
        ratio = np.trapezoid(np.exp(given - silent) * slab, grid)
        evidence += silent + np.log(0.8 + 0.2 * ratio)
    assert abs(-evidence - SparseELBO().loss(model, guide, y)) < 1e-6  # float32 constants


def test_one_sided_an_unseen_code_gets_its_prior_back_too() -> None:
    encoder, y = make("conv1d", init_probs=0.2, init_scale=1.5, one_sided=True)
    mask = torch.ones(11, dtype=torch.bool)
    mask[2:8] = False
    law = SpikeAndSlabPosterior(one_sided=True)(encoder(y.where(mask, 0.0), mask))
    unseen = (slice(None), slice(None), slice(2, 5))
    torch.testing.assert_close(law.prob_active[unseen], torch.full((5, 3, 3), 0.2))
    mean = torch.full((5, 3, 3), 1.5 * math.sqrt(2 / math.pi))
    torch.testing.assert_close(law.slab.mean[unseen], mean)


def test_one_sided_log_odds_and_gradients_hold_far_on_either_side() -> None:
    """Data from 1000 noises below zero to 1000 above; in float32 as in float64."""
    found = {}
    for dtype in (torch.float32, F64):
        dictionary = Dense(1, 1, atoms=torch.ones(1, 1)).to(dtype)
        solver = Unrolled(dictionary, Gaussian(torch.ones((), dtype=dtype)), num_steps=3)
        encoder = UnrolledEncoder(solver, dist.Exponential(1.0), one_sided=True)
        emitted = encoder(torch.linspace(-1000, 1000, 41, dtype=dtype)[:, None])
        found[dtype] = emitted["logits"].detach().double()
        emitted["logits"].sum().backward()
        assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)
    torch.testing.assert_close(found[torch.float32], found[F64], rtol=1e-5, atol=1e-5)
    assert found[F64][0] > -20  # a ratio of evidences falls as one over the distance, no faster


def test_a_code_that_reaches_no_observed_sample_gets_its_prior_back() -> None:
    encoder, y = make("conv1d", init_probs=0.2, init_scale=1.5)
    mask = torch.ones(11, dtype=torch.bool)
    mask[2:8] = False  # codes 2, 3 and 4 reach samples 2 to 7 alone
    law = SpikeAndSlabPosterior()(encoder(y.where(mask, 0.0), mask))
    unseen = (slice(None), slice(None), slice(2, 5))
    torch.testing.assert_close(law.prob_active[unseen], torch.full((5, 3, 3), 0.2))
    torch.testing.assert_close(law.slab.mean[unseen], torch.zeros(5, 3, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(law.slab.stddev[unseen], torch.full((5, 3, 3), 1.5))
    assert (law.slab.stddev[:, :, :2] < 1.4).all()


def test_a_composition_is_served_though_it_states_no_squares() -> None:
    class Half:
        def forward(self, signal: Tensor) -> Tensor:
            return signal / 2

        adjoint = forward

    dictionary = Composition(Half(), Dense(6, 4), input_shape=(4,))
    encoder = UnrolledEncoder(Unrolled(dictionary, Gaussian(0.5)), dist.Laplace(0.0, 0.7))
    emitted = encoder(torch.randn(5, 4))
    assert {tuple(values.shape) for values in emitted.values()} == {(5, 6)}


def planted(num_data: int = 400, noise: float = 0.2) -> tuple[SparseCoding, Tensor, Tensor]:
    """32 atoms in 16 dimensions, a tenth of them active; the codes behind the data too."""
    torch.manual_seed(0)
    prior = SpikeAndSlab(dist.Normal(0.0, 1.0), 0.1)
    model = SparseCoding(Dense(32, 16), Gaussian(noise), prior)
    with torch.no_grad():
        trace = pyro.poutine.trace(model).get_trace(num_data=num_data)
    return model, trace.nodes["obs"]["value"], trace.nodes["codes"]["value"]


@weights
def test_before_any_training_it_finds_the_active_codes(weights: str) -> None:
    """AUC of P(active), 0.5 by chance; 0.817 measured, 0.821 for coordinate ascent from there."""
    model, y, codes = planted()
    solver = SOLVERS[weights](model.dictionary, model.likelihood)
    guide = Thresholded(UnrolledEncoder(solver, dist.Laplace(0.0, 0.2)))
    untrained = Thresholded(Heads(nn.Sequential(nn.Linear(16, 64), nn.ReLU()), 64, 32))
    truth = (codes != 0).flatten().numpy()
    scores = [
        roc_auc_score(truth, some.posterior(y).prob_active.detach().flatten().numpy())
        for some in (guide, untrained)
    ]
    assert scores[0] > 0.8 > 0.6 > scores[1]
    losses = [SparseELBO().loss(model, some, y) / len(y) for some in (guide, untrained)]
    assert losses[0] < 10 < 100 < losses[1]  # nats per datum


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda s: UnrolledEncoder(nn.Identity(), dist.Laplace(0, 1)), TypeError, "got Identity"),
        (lambda s: UnrolledEncoder(s, "laplace"), TypeError, "Expected prior"),
        (lambda s: UnrolledEncoder(s, lambda rate: dist.Laplace(0, 1 / rate)), TypeError, "rate="),
        (lambda s: UnrolledEncoder(s, dist.Laplace(0, 1), init_probs=0.0), ValueError, "(0, 1"),
        (lambda s: UnrolledEncoder(s, dist.Laplace(0, 1), init_probs=1.0), ValueError, "< 1"),
        (lambda s: UnrolledEncoder(s, dist.Laplace(0, 1), init_probs="a"), TypeError, "real"),
        (lambda s: UnrolledEncoder(s, dist.Laplace(0, 1), init_scale=0.0), ValueError, "(0, inf"),
        (
            lambda s: UnrolledEncoder(s, SpikeAndSlab(dist.Normal(0, 1), 0.1))(torch.ones(2, 4)),
            NotImplementedError,
            "prox",
        ),
        (
            lambda s: UnrolledEncoder(s, dist.Laplace(0.0, 1.0))(torch.ones(2, 5)),
            ValueError,
            "features",
        ),
    ],
    ids=range(9),
)
def test_what_makes_no_unrolled_encoder_is_refused(
    build: Callable[[Any], Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match.replace("(", r"\(")):
        build(Unrolled(Dense(6, 4), Gaussian(0.5)))


# Files --------------------------------------------------------------------------------------------


def shake(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def test_heads_of_torchs_layers_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    network = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 8))
    heads = Heads(network, 8, (3, 8)).to(dtype)
    shake(heads)
    save(tmp_path / "run", heads=heads)
    back = load(tmp_path / "run")["heads"]
    y = torch.randn(5, 2, 11, dtype=dtype)
    assert all(torch.equal(back(y)[name], values) for name, values in heads(y).items())
    assert (tmp_path / "run" / "weights.safetensors").stat().st_size < 3_000 + 4_500 * (
        1 + (dtype == F64)
    )


@weights
def test_an_unrolled_encoder_comes_back_tied_as_it_was(tmp_path: Path, weights: str) -> None:
    model, y, _ = planted(5)
    options = {"num_steps": 3, "method": ISTA(), "shrinkage": Proximal(decay=0.9), "lipschitz": 4.0}
    solver = SOLVERS[weights](model.dictionary, model.likelihood, **options)
    settings = {"init_probs": 0.3, "init_scale": 2.0, "one_sided": True}
    encoder = UnrolledEncoder(solver, dist.Laplace(0.0, 0.2), **settings)
    shake(encoder)
    save(tmp_path / "run", model=model, encoder=encoder)
    loaded = load(tmp_path / "run")
    back = loaded["encoder"]
    assert all(torch.equal(back(y)[name], values) for name, values in encoder(y).items())
    assert back.unrolled.dictionary is loaded["model"].dictionary
    assert {name: getattr(back, name) for name in settings} == settings
    assert (back.unrolled.analysis is None) == (weights == "tied")
