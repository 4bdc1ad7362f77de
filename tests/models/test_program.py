"""Priors with an atom at zero, and sampled thresholds, in every program of codes."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_sparse.dictionaries import Conv, Dense
from pyro_sparse.distributions import GammaThresholded, Rate, SpikeAndSlab
from pyro_sparse.distributions.thresholded import (
    HardThresholded,
    ShiftedThresholded,
    SoftThresholded,
)
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.infer import fit, load, register_savable, save
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import DeepSparseCoding, SparseCoding

NOISE, SCALE, PROB, THRESHOLD = 0.3, 0.7, 0.3, 0.4


def tanh_decoder() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Tanh())


# Model of options, shape of a datum, shape of its codes.
GEOMETRIES = {
    "dense": (lambda **o: SparseCoding(Dense(6, 4), Gaussian(NOISE), **o), (4,), (6,)),
    "conv1d": (
        lambda **o: SparseCoding(Conv(3, 2, 4), Gaussian(NOISE), signal_shape=(2, 11), **o),
        (2, 11),
        (3, 8),
    ),
    "conv2d": (
        lambda **o: SparseCoding(
            Conv(3, 1, (3, 2), stride=(2, 1)), Gaussian(NOISE), signal_shape=(1, 7, 6), **o
        ),
        (1, 7, 6),
        (3, 3, 5),
    ),
    "deep": (
        lambda **o: DeepSparseCoding(
            tanh_decoder(), Gaussian(NOISE), code_shape=(2, 3), signal_shape=(4,), **o
        ),
        (4,),
        (2, 3),
    ),
}
geometries = pytest.mark.parametrize("geometry", GEOMETRIES)


def spike(slab: Any, probs: Any = PROB) -> SpikeAndSlab:
    return SpikeAndSlab(slab, probs=torch.as_tensor(probs))


class Tails:
    """Both tails of a law around zero beyond the threshold, each moved towards zero by ``move``."""

    def __init__(self, base: Any, move: float) -> None:
        self.base, self.move, self.prob = base, move, 2 * base.sf(THRESHOLD)

    def logpdf(self, value: Any) -> Any:
        return self.base.logpdf(np.abs(value) + self.move) - math.log(self.prob)

    def cdf(self, value: Any) -> Any:
        outer = self.base.sf(np.maximum(np.abs(value) + self.move, THRESHOLD)) / self.prob
        return np.where(value < 0, outer, 1 - outer)


NORMAL, LAPLACE = scipy.stats.norm(0, SCALE), scipy.stats.laplace(0, SCALE)


# Prior, its probability of being active, and its slab as scipy has it.
PRIORS = {
    "laplace": (lambda: spike(dist.Laplace(0.0, SCALE)), PROB, LAPLACE),
    "normal": (lambda: spike(dist.Normal(0.0, SCALE)), PROB, NORMAL),
    "exponential": (
        lambda: spike(dist.Exponential(1 / SCALE)),
        PROB,
        scipy.stats.expon(scale=SCALE),
    ),
    # A Gamma(3, rate 4) threshold integrated out: E exp(-t / b) is its Laplace transform.
    "gamma": (
        lambda: GammaThresholded(*map(torch.tensor, (0.0, SCALE, 3.0, 4.0))),
        (1 + 1 / (4 * SCALE)) ** -3,
        LAPLACE,
    ),
    "shifted laplace": (
        lambda: ShiftedThresholded(dist.Laplace(0.0, SCALE), THRESHOLD),
        math.exp(-THRESHOLD / SCALE),
        LAPLACE,
    ),
    "shifted normal": (
        lambda: ShiftedThresholded(dist.Normal(0.0, SCALE), THRESHOLD),
        2 * NORMAL.sf(THRESHOLD),
        Tails(NORMAL, THRESHOLD),
    ),
    "soft": (
        lambda: SoftThresholded(dist.Normal(0.0, SCALE), THRESHOLD),
        2 * NORMAL.sf(THRESHOLD),
        Tails(NORMAL, THRESHOLD),
    ),
    "hard": (
        lambda: HardThresholded(dist.Normal(0.0, SCALE), THRESHOLD),
        2 * NORMAL.sf(THRESHOLD),
        Tails(NORMAL, 0.0),
    ),
}
priors = pytest.mark.parametrize("prior", PRIORS)


def make(geometry: str, **options: Any) -> tuple[Any, tuple[int, ...], tuple[int, ...]]:
    build, signal_shape, code_shape = GEOMETRIES[geometry]
    return build(**options), signal_shape, code_shape


def trace(program: Any, *args: Any, **kwargs: Any) -> Any:
    found = poutine.trace(program).get_trace(*args, **kwargs)
    found.compute_log_prob()
    return found


def sparse_codes(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    # Positive and above the threshold, so that every slab has it.
    codes = 0.5 + torch.rand(shape, dtype=dtype)
    return torch.where(torch.rand(shape) < 0.5, codes, 0.0)


# Priors with an atom at zero


@geometries
@priors
def test_draws_have_exact_zeros_as_often_as_the_prior_says(geometry: str, prior: str) -> None:
    law, prob, slab = PRIORS[prior]
    model, signal_shape, code_shape = make(geometry, prior=law())
    found = trace(model, num_data=2000)
    codes = found.nodes["codes"]["value"]
    assert codes.shape == (2000, *code_shape)
    assert found.nodes["_RETURN"]["value"].shape == (2000, *signal_shape)
    active = (codes != 0).double()
    error = math.sqrt(prob * (1 - prob) / active.numel())
    assert abs(active.mean() - prob) < 4 * error
    # By atom and position too; seeded, 6 to 45 entries of 2000 draws each.
    per_entry = math.sqrt(prob * (1 - prob) / 2000)
    assert (active.mean(0) - prob).abs().max() < 4 * per_entry
    # Seeded, so the p-values are fixed; 1e-4 leaves room for versions.
    assert scipy.stats.kstest(codes[codes != 0][:4000].numpy(), slab.cdf).pvalue > 1e-4


@geometries
@priors
def test_log_joint_is_the_formula(geometry: str, prior: str) -> None:
    law, prob, slab = PRIORS[prior]
    model, signal_shape, code_shape = make(geometry, prior=law())
    model.double()
    y, codes = torch.randn(5, *signal_shape).double(), sparse_codes(5, *code_shape)
    found = trace(poutine.condition(model, {"codes": codes}), y, 20)
    z = codes.numpy()
    expected = np.where(z == 0, math.log(1 - prob), math.log(prob) + slab.logpdf(z))
    per_datum = found.nodes["codes"]["unscaled_log_prob"].detach()
    # PROB and SCALE were float32 in the prior.
    np.testing.assert_allclose(per_datum, expected.reshape(5, -1).sum(1), rtol=1e-6)
    assert found.nodes["codes"]["scale"] == 4.0
    law_of_codes = found.nodes["codes"]["fn"]
    assert (law_of_codes.batch_shape, law_of_codes.event_shape) == ((5,), code_shape)
    assert found.nodes["codes"]["log_prob"].dtype == torch.float64


@geometries
def test_everything_has_the_dtype_and_device_of_the_data(
    geometry: str, dtype: torch.dtype, device: torch.device
) -> None:
    rate = Rate(2.0)
    model, signal_shape, code_shape = make(geometry, prior=rate_to_spike, rate=rate)
    model.to(dtype).to(device)
    y = torch.randn(3, *signal_shape, dtype=dtype, device=device)
    fixed, *_ = make(geometry, prior=PRIORS["gamma"][0]())
    drawn, *_ = make(geometry, prior=threshold_to_spike, threshold=dist.Gamma(3.0, 4.0))
    for program in (model, fixed.to(dtype).to(device), drawn.to(dtype).to(device)):
        nodes = trace(program, y).nodes
        sites = [nodes[name] for name in ("threshold", "codes", "obs") if name in nodes]
        assert len(sites) >= 2
        for site in sites:
            for tensor in (site["value"], site["log_prob"]):
                assert (tensor.dtype, tensor.device.type) == (dtype, device.type)
        assert program(num_data=2).dtype == dtype


@register_savable(name="tests.rate_to_spike")
def rate_to_spike(rate: Tensor) -> SpikeAndSlab:
    return spike(dist.Laplace(0.0, 1 / rate))


@geometries
def test_a_learned_rate_gets_the_gradient_of_the_active_codes(geometry: str) -> None:
    _, _, code_shape = GEOMETRIES[geometry]
    rate = Rate(torch.linspace(0.5, 2.0, code_shape[0]))
    model, signal_shape, _ = make(geometry, prior=rate_to_spike, rate=rate)
    codes = sparse_codes(3, *code_shape, dtype=torch.float32)
    found = trace(poutine.condition(model, {"codes": codes}), torch.randn(3, *signal_shape))
    found.log_prob_sum().backward()
    # d/d log rate of a sum over active codes of log rate - rate |z|.
    by_atom = codes.transpose(0, 1).flatten(1)
    expected = (by_atom != 0).sum(1) - rate().detach() * by_atom.abs().sum(1)
    torch.testing.assert_close(rate.parametrizations.value.original.grad, expected)


class Gated(PyroModule):
    """A guide with an atom at zero, and a threshold where the model has one."""

    def __init__(self, code_shape: tuple[int, ...], signal_dims: int, *, threshold: bool) -> None:
        super().__init__()
        self.loc = nn.Parameter(0.1 * torch.randn(code_shape))
        self.log_scale = nn.Parameter(torch.full(code_shape, -1.0))
        self.logits = nn.Parameter(torch.zeros(code_shape))
        self.level = nn.Parameter(torch.full(code_shape, -1.0)) if threshold else None
        self.dims = len(code_shape)

    def forward(self, y: Tensor, num_data: int | None = None) -> None:
        slab = dist.Normal(self.loc, self.log_scale.exp())
        with pyro.plate("data", num_data or len(y), subsample=torch.arange(len(y))):
            if self.level is not None:
                law = dist.LogNormal(self.level, 0.3).to_event(self.dims)
                pyro.sample("threshold", law)
            pyro.sample("codes", SpikeAndSlab(slab, logits=self.logits).to_event(self.dims))


@geometries
@pytest.mark.parametrize("threshold", [False, True], ids=["fixed", "threshold"])
def test_pyros_own_elbo_trains_a_guide_with_an_atom(geometry: str, threshold: bool) -> None:
    drawn = {"prior": threshold_to_spike, "threshold": dist.Gamma(3.0, 4.0)}
    options = drawn if threshold else {"prior": spike(dist.Laplace(0.0, SCALE))}
    model, signal_shape, code_shape = make(geometry, **options)
    guide = Gated(code_shape, len(signal_shape), threshold=threshold)
    y = torch.randn(12, *signal_shape)
    before = [p.detach().clone() for p in nn.ModuleList([model, guide]).parameters()]
    history = fit(model, guide, y, loss=Trace_ELBO(), epochs=3, batch_size=5, progress=False)
    assert all(map(math.isfinite, history.step_loss))
    moved = nn.ModuleList([model, guide]).parameters()
    assert all(not torch.equal(old, new) for old, new in zip(before, moved))


def test_its_elbo_and_gradients_are_those_of_the_closed_form() -> None:
    """Linear decoder, Gaussian noise, Normal slabs: means and variances say it all."""
    prior, y = spike(dist.Normal(0.0, 1.0)), torch.tensor([[0.5, -1.0, 0.3, 1.2]]).double()
    model = SparseCoding(Dense(3, 4), Gaussian(0.8), prior).double()
    guide = Gated((3,), 1, threshold=False).double()

    mean, scale, gate = guide.loc, guide.log_scale.exp(), guide.logits.sigmoid()
    atoms = model.dictionary.atoms.detach()
    variance = gate * (scale**2 + mean**2) - (gate * mean) ** 2
    squares = (y - (gate * mean) @ atoms).square().sum() + (variance @ atoms.square()).sum()
    log_likelihood = -squares / (2 * 0.8**2) - 4 * math.log(0.8 * math.sqrt(2 * math.pi))
    gates = gate * (gate / PROB).log() + (1 - gate) * ((1 - gate) / (1 - PROB)).log()
    slabs = -scale.log() + (scale**2 + mean**2 - 1) / 2
    expected = (gates + gate * slabs).sum() - log_likelihood
    wanted = torch.autograd.grad(expected, [guide.loc, guide.log_scale, guide.logits])

    num_draws = 40_000
    elbo = Trace_ELBO(num_draws, max_plate_nesting=1, vectorize_particles=True)(model, guide)
    losses, gradients = [], []
    for _ in range(10):
        loss = elbo(y)
        parts = torch.autograd.grad(loss, [guide.loc, guide.log_scale, guide.logits])
        losses.append(loss.detach())
        gradients.append(torch.cat(parts))
    for draws, exact in ((torch.stack(losses), expected), (torch.stack(gradients), wanted)):
        exact = exact.detach() if isinstance(exact, Tensor) else torch.cat(exact)
        error = draws.std(0) / math.sqrt(10)
        # Errors are themselves estimated from ten: Student's t, 9 degrees, 10 numbers at 1e-5 each.
        assert ((draws.mean(0) - exact).abs() < 8 * error).all()
        assert (error < 0.05).all()


@geometries
def test_a_point_against_an_atom_is_refused(geometry: str) -> None:
    model, signal_shape, code_shape = make(geometry, prior=spike(dist.Laplace(0.0, SCALE)))

    class Point(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.point = nn.Parameter(torch.zeros(code_shape))

        def forward(self, y: Tensor, num_data: int) -> None:
            with pyro.plate("data", num_data, subsample=torch.arange(len(y))):
                pyro.sample("codes", dist.Delta(self.point, event_dim=len(code_shape)))

    with pytest.raises(ValueError, match="site 'codes', got Delta against SpikeAndSlab.*units"):
        fit(model, Point(), torch.randn(3, *signal_shape), progress=False)


@priors
def test_an_unrolled_encoder_refuses_a_prior_with_an_atom(prior: str) -> None:
    model = SparseCoding(Dense(6, 4), Gaussian(NOISE), PRIORS[prior][0]())
    guide = UnrolledFISTA(model.dictionary, model.likelihood, model.prior)
    with pytest.raises(NotImplementedError, match="with an atom at zero.*depends on their unit"):
        guide(torch.randn(3, 4))
    with pytest.raises(NotImplementedError, match="with an atom at zero"):
        fit(model, guide, torch.randn(3, 4), progress=False)


# Sampled thresholds


@register_savable(name="tests.threshold_to_spike")
def threshold_to_spike(threshold: Tensor) -> SpikeAndSlab:
    """The shifted threshold of a Laplace law: active with probability exp(-threshold / scale)."""
    slab = dist.Laplace(torch.zeros_like(threshold), SCALE)
    return SpikeAndSlab(slab, probs=(-threshold / SCALE).exp())


def with_threshold(geometry: str, **options: Any) -> tuple[Any, tuple, tuple]:
    options = {"prior": threshold_to_spike, "threshold": dist.Gamma(3.0, 4.0)} | options
    return make(geometry, **options)


@geometries
def test_a_threshold_is_a_latent_of_every_code_of_every_datum(geometry: str) -> None:
    model, signal_shape, code_shape = with_threshold(geometry)
    nodes = trace(model, torch.randn(5, *signal_shape), 40).nodes
    sites = [name for name, node in nodes.items() if node["type"] == "sample"]
    assert sites == ["data", "threshold", "codes", "obs"]
    for name in ("threshold", "codes"):
        law = nodes[name]["fn"]
        assert (law.batch_shape, law.event_shape) == ((5,), code_shape)
        (frame,) = nodes[name]["cond_indep_stack"]
        assert (frame.name, frame.dim, nodes[name]["scale"]) == ("data", -1, 8.0)


def threshold_to_shifted(threshold: Tensor) -> ShiftedThresholded:
    return ShiftedThresholded(dist.Laplace(torch.zeros_like(threshold), SCALE), threshold)


@geometries
@pytest.mark.parametrize("prior", [threshold_to_spike, threshold_to_shifted])
def test_log_joint_with_thresholds_is_the_formula(geometry: str, prior: Any) -> None:
    model, signal_shape, code_shape = with_threshold(geometry, prior=prior)
    model.double()
    y = torch.randn(5, *signal_shape).double()
    values = {
        "codes": sparse_codes(5, *code_shape),
        "threshold": 0.2 + sparse_codes(5, *code_shape),
    }
    found = trace(poutine.condition(model, values), y, 10)
    z, t = values["codes"].numpy(), values["threshold"].numpy()
    codes = np.where(z == 0, np.log1p(-np.exp(-t / SCALE)), -t / SCALE + LAPLACE.logpdf(z)).sum()
    hyper = scipy.stats.gamma(3.0, scale=1 / 4.0).logpdf(t).sum()
    latents = found.nodes["codes"]["log_prob_sum"] + found.nodes["threshold"]["log_prob_sum"]
    assert latents.item() == pytest.approx(2 * (codes + hyper), rel=1e-10)


@geometries
def test_codes_below_gamma_thresholds_have_the_integrated_law(geometry: str) -> None:
    model, *_ = with_threshold(geometry)
    codes = trace(model, num_data=2000).nodes["codes"]["value"]
    _, prob, slab = PRIORS["gamma"]
    active = (codes != 0).double()
    assert abs(active.mean() - prob) < 4 * math.sqrt(prob * (1 - prob) / active.numel())
    assert scipy.stats.kstest(codes[codes != 0][:4000].numpy(), slab.cdf).pvalue > 1e-4
    # Independent from code to code: a threshold shared by a datum's codes would correlate them.
    first, second = active.flatten(1)[:, :2].T
    correlation = torch.corrcoef(torch.stack([first, second]))[0, 1]
    assert abs(correlation) < 4 / math.sqrt(2000)


@geometries
def test_vectorised_particles_run_with_thresholds(geometry: str) -> None:
    model, signal_shape, code_shape = with_threshold(geometry)
    guide = Gated(code_shape, len(signal_shape), threshold=True)
    y = torch.randn(5, *signal_shape)
    elbo = Trace_ELBO(3000, vectorize_particles=True, max_plate_nesting=1)(model, guide)
    with torch.no_grad():
        together = torch.stack([elbo(y, 20) for _ in range(4)])
        one = Trace_ELBO(max_plate_nesting=1)(model, guide)
        apart = torch.stack([one(y, 20) for _ in range(400)])
    error = apart.std() / math.sqrt(400)
    assert abs(together.mean() - apart.mean()) < 4 * error


@geometries
def test_predictive_gives_thresholds_and_codes(geometry: str) -> None:
    model, signal_shape, code_shape = with_threshold(geometry)
    draws = Predictive(model, num_samples=3)(num_data=2)
    assert draws["threshold"].shape == draws["codes"].shape == (3, 2, *code_shape)
    assert draws["obs"].shape == (3, 2, *signal_shape)


def test_one_law_of_thresholds_per_atom_is_shared_by_its_positions() -> None:
    concentration = torch.tensor([[0.5], [3.0], [50.0]])
    model, *_ = with_threshold("conv1d", threshold=dist.Gamma(concentration, 4.0))
    active = trace(model, num_data=2000).nodes["codes"]["value"] != 0
    expected = (1 + 1 / (4 * SCALE)) ** -concentration[:, 0].double()
    error = (expected * (1 - expected) / (2000 * 8)).sqrt()
    assert ((active.double().mean((0, 2)) - expected).abs() <= 4 * error).all()


@geometries
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threshold": 0.3}, TypeError, "threshold to be a Pyro distribution.*got float.*prior"),
        ({"rate": 2.0}, NotImplementedError, "rate or threshold, got both"),
        ({"prior": dist.Laplace(0.0, 1.0)}, TypeError, "callable threshold -> distribution"),
        ({"prior": 3.0}, TypeError, "distribution or a callable"),
        (
            {"threshold": dist.Gamma(nn.Parameter(torch.tensor(3.0)), 1.0)},
            ValueError,
            "concentration.*require a gradient",
        ),
        ({"threshold": torch.distributions.Gamma(3.0, 4.0)}, TypeError, "Pyro distribution"),
        (
            {"threshold": dist.Normal(0.0, 1.0)},
            ValueError,
            "law of positive thresholds, such",
        ),
        ({"threshold": dist.Uniform(-0.1, 1.0)}, ValueError, "a Uniform, whose draws may be neg"),
        ({"threshold": dist.Normal(0.0, 1.0).expand([3]).to_event(1)}, ValueError, "positive"),
        ({"threshold": dist.Delta(torch.tensor(-0.1))}, ValueError, "positive"),
    ],
)
def test_bad_thresholds_are_refused_when_the_model_is_made(
    geometry: str, options: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        with_threshold(geometry, **options)


@pytest.mark.parametrize(
    "law",
    [
        dist.HalfNormal(1.0),
        dist.LogNormal(0.0, 1.0),
        dist.Uniform(0.0, 1.0),
        dist.Delta(torch.tensor(0.3)),
        dist.Exponential(1.0).expand([6]).to_event(1),
    ],
    ids=lambda law: type(law).__name__,
)
def test_laws_of_positive_thresholds_serve(law: Any) -> None:
    model, *_ = with_threshold("dense", threshold=law)
    assert (trace(model, num_data=3).nodes["threshold"]["value"] >= 0).all()


@geometries
def test_bad_thresholds_are_refused_when_the_model_runs(geometry: str) -> None:
    model, *_ = with_threshold(geometry, threshold=dist.Gamma(torch.full((7,), 3.0), 4.0))
    with pytest.raises(ValueError, match="Gamma that expands to the shape"):
        model(num_data=2)
    model, *_ = with_threshold(geometry, prior=lambda threshold: threshold)
    with pytest.raises(TypeError, match="Expected a Pyro distribution, got Tensor"):
        model(num_data=2)


@pytest.mark.parametrize("geometry", ["dense", "conv1d", "conv2d"])
@pytest.mark.parametrize(
    "options",
    [
        {"prior": spike(dist.Laplace(0.0, SCALE))},
        {"prior": rate_to_spike, "rate": Rate(2.0)},
        {"prior": threshold_to_spike, "threshold": dist.Gamma(3.0, 4.0)},
    ],
    ids=["fixed", "rate", "threshold"],
)
def test_a_saved_model_is_the_same_model(geometry: str, options: dict, tmp_path: Path) -> None:
    model, signal_shape, code_shape = make(geometry, **options)
    save(tmp_path / "bundle", model=model)
    loaded = load(tmp_path / "bundle")["model"]
    values = {
        "codes": sparse_codes(5, *code_shape).float(),
        "threshold": torch.ones(5, *code_shape),
    }
    y = torch.randn(5, *signal_shape)
    first, second = (trace(poutine.condition(m, values), y) for m in (model, loaded))
    assert first.log_prob_sum() == second.log_prob_sum()
