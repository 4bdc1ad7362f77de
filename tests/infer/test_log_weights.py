"""Weights against densities from scipy, enumeration and conjugate algebra."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from scipy import stats
from torch import Tensor, nn

from pyro_sparse.dictionaries import Conv, Dense
from pyro_sparse.distributions import SpikeAndSlab
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.infer.exact import enumerate_posterior
from pyro_sparse.infer.log_weights import log_weights
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding

F64 = torch.float64
NOISE, PROB = 0.5, 0.3


def data_plate(y: Tensor, num_data: int | None) -> Any:
    return pyro.plate("data", num_data or len(y), subsample=torch.arange(len(y)))


class Encoder(PyroModule):
    """A plain amortised spike-and-slab guide."""

    def __init__(self, num_features: int, num_atoms: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.loc = nn.Linear(num_features, num_atoms, dtype=F64)
        self.logits = nn.Linear(num_features, num_atoms, dtype=F64)
        self.scale = PyroParam(torch.full((num_atoms,), 0.5, dtype=F64), dist.constraints.positive)
        for p in (*self.loc.parameters(), *self.logits.parameters()):
            p.data = 0.3 * torch.randn(p.shape, generator=generator, dtype=F64)

    def forward(self, y: Tensor, num_data: int | None = None, mask: Tensor | None = None) -> None:
        slab = dist.Normal(self.loc(y), self.scale)
        with data_plate(y, num_data):
            pyro.sample("codes", SpikeAndSlab(slab, logits=self.logits(y)).to_event(1))


def spike_model(num_atoms: int = 3, num_features: int = 4) -> SparseCoding:
    prior = SpikeAndSlab(dist.Normal(torch.zeros((), dtype=F64), 1.0), PROB)
    return SparseCoding(Dense(num_atoms, num_features), Gaussian(NOISE), prior).double()


def signals(n: int = 5, num_features: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, num_features, generator=torch.Generator().manual_seed(seed), dtype=F64)


def mixed_log_prob(z: np.ndarray, prob: Any, loc: Any, scale: Any) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.where(z == 0, np.log1p(-prob), np.log(prob) + stats.norm.logpdf(z, loc, scale))


def evidence(y: np.ndarray, atoms: np.ndarray) -> np.ndarray:
    """Log-evidence of spike-and-slab codes, by all supports."""
    found = []
    for bits in range(2 ** len(atoms)):
        on = np.array([(bits >> k) & 1 for k in range(len(atoms))], dtype=bool)
        cov = NOISE**2 * np.eye(y.shape[1]) + atoms[on].T @ atoms[on]
        law = stats.multivariate_normal(np.zeros(y.shape[1]), cov)
        prior = on.sum() * math.log(PROB) + (~on).sum() * math.log(1 - PROB)
        found.append(prior + np.atleast_1d(law.logpdf(y)))
    return np.logaddexp.reduce(found, axis=0)


# The mixed measure


@pytest.mark.parametrize("vectorize", [True, False])
def test_weights_are_the_mixed_densities_of_the_draws(vectorize: bool) -> None:
    model, guide, y = spike_model(), Encoder(4, 3), signals()
    weights = log_weights(model, guide, y, num_samples=50, vectorize=vectorize)
    z = weights.draws["codes"].numpy()  # (50, 5, 3)
    atoms = model.dictionary.atoms.detach().numpy()
    assert z.shape == (50, 5, 3) and 0.1 < (z == 0).mean() < 0.9
    prior = mixed_log_prob(z, PROB, 0.0, 1.0).sum(-1)
    data = stats.norm.logpdf(y.numpy(), z @ atoms, NOISE).sum(-1)
    prob = torch.sigmoid(guide.logits(y)).detach().numpy()
    scale = guide.scale.detach().numpy()
    q = mixed_log_prob(z, prob, guide.loc(y).detach().numpy(), scale).sum(-1)
    np.testing.assert_allclose(weights.log_p["codes"], prior, rtol=1e-10)
    np.testing.assert_allclose(weights.log_p["obs"], data, rtol=1e-10)
    np.testing.assert_allclose(weights.log_q["codes"], q, rtol=1e-10)
    np.testing.assert_allclose(weights.local, data + prior - q, rtol=1e-9)
    assert bool((weights.shared == 0).all())
    assert not weights.local.requires_grad and not weights.draws["codes"].requires_grad


def test_an_exact_mixed_guide_gives_the_evidence_at_every_draw() -> None:
    # Orthonormal atoms: the posterior factorises, each code being spike-and-slab again.
    model, y = spike_model(4, 4), signals(6)
    model.dictionary.init_atoms_(torch.eye(4, dtype=F64))
    shrink = 1 / (1 + NOISE**2)
    ratio = stats.norm.logpdf(y.numpy(), 0, (1 + NOISE**2) ** 0.5) - stats.norm.logpdf(
        y.numpy(), 0, NOISE
    )
    logits = torch.from_numpy(ratio) + math.log(PROB / (1 - PROB))
    slab = dist.Normal(shrink * y, (shrink * NOISE**2) ** 0.5)

    def guide(y: Tensor, num_data: int) -> None:
        with data_plate(y, num_data):
            pyro.sample("codes", SpikeAndSlab(slab, logits=logits).to_event(1))

    weights = log_weights(model, guide, y, num_samples=40)
    truth = evidence(y.numpy(), np.eye(4))
    np.testing.assert_allclose(weights.local.numpy(), np.tile(truth, (40, 1)), atol=1e-9)


def test_mean_weight_is_the_evidence() -> None:
    model, guide, y = spike_model(), Encoder(4, 3), signals()
    weights = log_weights(model, guide, y, num_samples=20000, keep_draws=False)
    truth = evidence(y.numpy(), model.dictionary.atoms.detach().numpy())
    ratio = (weights.local - torch.from_numpy(truth)).exp()
    error = (ratio.mean(0) - 1).abs() / (ratio.std(0) / 20000**0.5)
    assert float(error.max()) < 4
    assert weights.draws == {}


# Auxiliary sites (F10), shared sites


def test_an_autoguide_counts_its_auxiliary_site_and_jacobian() -> None:
    y = signals(6, 1)[:, 0].exp()

    def model(y: Tensor, num_data: int) -> None:
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0, dtype=F64), 1.0))
        with data_plate(y, num_data):
            codes = pyro.sample("codes", dist.LogNormal(torch.zeros((), dtype=F64), 1.0))
            pyro.sample("obs", dist.Exponential(rate * codes), obs=y)

    guide = AutoNormal(model, init_scale=0.3)
    weights = log_weights(model, guide, y, num_samples=30)
    draws = {name: value.numpy() for name, value in weights.draws.items()}
    q = {}
    for name in ("rate", "codes"):  # parameters of the normal before the transformation
        median = getattr(guide.locs, name).exp().detach().numpy()
        spread = getattr(guide.scales, name).detach().numpy()
        q[name] = stats.lognorm.logpdf(draws[name], s=spread, scale=median)
    rate, codes = draws["rate"], draws["codes"]
    assert rate.shape == (30,) and codes.shape == (30, 6)
    prior = stats.gamma.logpdf(rate, 2.0)
    np.testing.assert_allclose(weights.shared, prior - q["rate"], rtol=1e-8, atol=1e-8)
    local = stats.lognorm.logpdf(codes, s=1.0) + stats.expon.logpdf(
        y.numpy(), scale=1 / (rate[:, None] * codes)
    )
    np.testing.assert_allclose(weights.local, local - q["codes"], rtol=1e-8, atol=1e-8)
    assert {*weights.log_q} == {"rate", "codes", "rate_unconstrained", "codes_unconstrained"}


def simplex_model(y: Tensor, num_data: int) -> None:
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3, dtype=F64)))
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=F64), 1.0))
    with data_plate(y, num_data):
        pyro.sample("obs", dist.Normal(shares[..., 0], scale), obs=y)


def test_a_joint_autoguide_of_sites_outside_the_data() -> None:
    # Also: a simplex has one free number fewer than elements, so nothing here is a point.
    y = signals(6, 1)[:, 0]
    guide = AutoMultivariateNormal(simplex_model, init_scale=0.3)
    weights = log_weights(simplex_model, guide, y, num_samples=4000)
    elbo = Trace_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=1)
    reference = -elbo.loss(simplex_model, guide, y, len(y))
    error = float(weights.joint.std()) * (2 / 4000) ** 0.5
    assert abs(float(weights.joint.mean()) - reference) < 4 * error


def test_joint_guides_of_local_sites_have_no_weight_of_a_datum() -> None:
    model, y = normal_model, signals(3, 1)[:, 0]
    with pytest.raises(NotImplementedError, match="ties all data together"):
        log_weights(model, AutoMultivariateNormal(model), y)


# Scales, masks, plates


def normal_model(y: Tensor, num_data: int, mask: Tensor | None = None) -> None:
    with data_plate(y, num_data):
        codes = pyro.sample("codes", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        law = dist.Normal(codes, 1.0)
        pyro.sample("obs", law if mask is None else law.mask(mask), obs=y)


def normal_guide(y: Tensor, num_data: int, mask: Tensor | None = None) -> None:
    with data_plate(y, num_data):
        pyro.sample("codes", dist.Normal(0.3 * y, 0.9))


def test_local_weights_know_no_scale_and_the_joint_one_does() -> None:
    y = signals(8, 1)[:, 0]
    small = log_weights(normal_model, normal_guide, y, num_samples=3000)
    large = log_weights(normal_model, normal_guide, y, num_samples=3000, num_data=80)
    assert torch.equal(small.local, large.local)
    elbo = Trace_ELBO(num_particles=3000, vectorize_particles=True, max_plate_nesting=1)
    reference = -elbo.loss(normal_model, normal_guide, y, 80)
    error = float(large.joint.std()) * (2 / 3000) ** 0.5
    assert abs(float(large.joint.mean()) - reference) < 4 * error


def test_masked_samples_leave_the_prior() -> None:
    y, mask = signals(4, 1)[:, 0], torch.tensor([True, False, True, False])
    weights = log_weights(normal_model, normal_guide, y, num_samples=20, mask=mask)
    z = weights.draws["codes"].numpy()
    ratio = stats.norm.logpdf(z) - stats.norm.logpdf(z, 0.3 * y.numpy(), 0.9)
    data = np.where(mask, stats.norm.logpdf(y.numpy(), z), 0.0)
    np.testing.assert_allclose(weights.local, ratio + data, rtol=1e-9)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("inner", [-1, -2], ids=["inner right", "inner left"])
def test_inner_plates_are_summed_for_each_datum(inner: int, vectorize: bool) -> None:
    y = signals(5, 2)
    y = y if inner == -1 else y.T  # dims from the right

    def plates() -> tuple[Any, Any]:
        return pyro.plate("rows", 5, dim=-3 - inner), pyro.plate("channels", 2, dim=inner)

    def program(loc: float, scale: float, observe: bool) -> Callable[..., None]:
        def run(batch: Tensor, num_data: int) -> None:
            scales = pyro.sample("level", dist.Normal(torch.tensor(loc, dtype=F64), scale))
            with pyro.plate("apart", 4):  # a plate beside that of the data
                pyro.sample("weights", dist.Normal(torch.tensor(loc, dtype=F64), scale))
            rows, channels = plates()
            with rows, channels:
                codes = pyro.sample("codes", dist.Normal(torch.tensor(loc, dtype=F64), scale))
                if observe:
                    pyro.sample("obs", dist.Normal(codes + scales, 1.0), obs=y)

        return run

    model, guide = program(0.0, 1.0, True), program(0.1, 0.8, False)
    weights = log_weights(
        model, guide, signals(5, 2), num_samples=9, plate="rows", vectorize=vectorize
    )
    level, codes, apart = (weights.draws[n].numpy() for n in ("level", "codes", "weights"))
    assert apart.shape == (9, 4) and codes.shape == (9, *y.shape)

    def ratio(z: np.ndarray) -> np.ndarray:
        return stats.norm.logpdf(z) - stats.norm.logpdf(z, 0.1, 0.8)

    local = ratio(codes) + stats.norm.logpdf(y.numpy(), codes + level[:, None, None])
    np.testing.assert_allclose(weights.local, local.sum(2 if inner == -1 else 1), rtol=1e-9)
    np.testing.assert_allclose(weights.shared, ratio(level) + ratio(apart).sum(1), rtol=1e-9)


# Draws


@given(st.integers(1, 40), st.integers(1, 50))
def test_any_chunks_make_the_draws_that_were_asked_for(num_samples: int, chunk: int) -> None:
    y = signals(3, 1)[:, 0]
    weights = log_weights(normal_model, normal_guide, y, num_samples=num_samples, chunk_size=chunk)
    assert weights.local.shape == weights.draws["codes"].shape == (num_samples, 3)
    assert len(weights.draws["codes"].unique()) == num_samples * 3  # no stream was used twice


def test_draws_are_a_function_of_the_seed() -> None:
    y = signals(3, 1)[:, 0]
    first, again, other = (
        log_weights(normal_model, normal_guide, y, num_samples=5, seed=seed).local
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def conv_pair() -> tuple[SparseCoding, Any, Tensor]:
    model = SparseCoding(
        Conv(2, 1, 3),
        Gaussian(NOISE),
        SpikeAndSlab(dist.Normal(0.0, 1.0), torch.tensor(PROB)),
        dictionary_prior=dist.Normal(0.0, 1.0),
    )

    def guide(y: Tensor, num_data: int) -> None:
        pyro.sample("dictionary", dist.Normal(0.0, 0.5).expand((2, 1, 3)).to_event(3))
        with data_plate(y, num_data):
            law = SpikeAndSlab(dist.Normal(0.0, 1.2), torch.tensor(0.4))
            pyro.sample("codes", law.expand((2, 6)).to_event(2))

    return model, guide, torch.randn(4, 1, 8)


def test_sampled_convolutional_atoms_take_one_run_a_draw() -> None:
    model, guide, y = conv_pair()
    weights = log_weights(model, guide, y, num_samples=6, vectorize=False)
    atoms, codes = weights.draws["dictionary"], weights.draws["codes"]
    for draw in range(6):
        predictor = model.dictionary.bind(atoms[draw]).forward(codes[draw])
        data = stats.norm.logpdf(y, predictor, NOISE).sum((1, 2))
        np.testing.assert_allclose(weights.log_p["obs"][draw], data, rtol=1e-4)
    ratio = stats.norm.logpdf(atoms) - stats.norm.logpdf(atoms, 0.0, 0.5)
    np.testing.assert_allclose(weights.shared, ratio.sum((1, 2, 3)), rtol=1e-4)


def averaging_model(y: Tensor, num_data: int) -> None:
    with data_plate(y, num_data):
        codes = pyro.sample("codes", dist.Normal(0.0, 1.0).expand((3,)).to_event(1))
        pyro.sample("obs", dist.Normal(codes.mean(), 0.1).expand((3,)).to_event(1), obs=y)


def counting_model(y: Tensor, num_data: int) -> None:
    with data_plate(y, num_data):
        codes = pyro.sample("codes", dist.Normal(0.0, 1.0).expand((3,)).to_event(1))
        n, k = codes.shape
        pyro.sample("obs", dist.Normal(codes, 1.0).to_event(1), obs=y)


def three_guide(y: Tensor, num_data: int) -> None:
    with data_plate(y, num_data):
        pyro.sample("codes", dist.Normal(0.0, 1.0).expand((3,)).to_event(1))


@pytest.mark.parametrize("model", [averaging_model, counting_model])
def test_programs_that_know_no_leading_dimension_are_found_out(model: Any) -> None:
    y = torch.ones(4, 3)
    with pytest.raises(ValueError, match="vectorize=False"):
        log_weights(model, three_guide, y, num_samples=20)
    assert log_weights(model, three_guide, y, num_samples=20, vectorize=False).local.shape == (
        20,
        4,
    )


def test_a_program_with_dropout_is_told_to_eval() -> None:
    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, y: Tensor, num_data: int) -> None:
            with data_plate(y, num_data):
                loc = self.dropout(10 * y)
                pyro.sample("codes", dist.Normal(loc, 1.0).to_event(1))

    def model(y: Tensor, num_data: int) -> None:
        with data_plate(y, num_data):
            codes = pyro.sample("codes", dist.Normal(0.0, 1.0).expand((3,)).to_event(1))
            pyro.sample("obs", dist.Normal(codes, 1.0).to_event(1), obs=y)

    program, y = Guide(), torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"dropout: call eval\(\)"):
        log_weights(model, program, y, num_samples=20)
    assert log_weights(model, program.eval(), y, num_samples=20).local.shape == (20, 4)


# Nothing is left behind


def test_nothing_global_moves() -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4, dtype=F64)
            self.encoder = Encoder(4, 3)
            self.norm.weight.requires_grad_(False)

        def forward(self, y: Tensor, num_data: int) -> None:
            self.encoder(self.norm(y), num_data)

    guide, model = Normalised(), spike_model()
    pyro.param("left", torch.ones(2))
    random, store = torch.get_rng_state(), pyro.get_param_store().get_state()
    buffers = [b.clone() for b in guide.buffers()]
    log_weights(model, guide, signals(), num_samples=5)
    assert torch.equal(random, torch.get_rng_state())
    assert pyro.get_param_store().get_state() == store
    assert all(torch.equal(a, b) for a, b in zip(buffers, guide.buffers()))
    assert not guide.norm.weight.requires_grad
    assert all(p.grad is None for p in guide.parameters())


def test_functions_find_their_parameters_and_modules_bring_their_own() -> None:
    y = signals(3, 1)[:, 0]
    pyro.param("loc", torch.tensor(5.0, dtype=F64))

    def function(y: Tensor, num_data: int) -> None:
        loc = pyro.param("loc", torch.tensor(-7.0, dtype=F64))
        with data_plate(y, num_data):
            pyro.sample("codes", dist.Normal(loc, 0.1))

    class Module(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.loc = PyroParam(torch.tensor(9.0, dtype=F64))

        def forward(self, y: Tensor, num_data: int) -> None:
            with data_plate(y, num_data):
                pyro.sample("codes", dist.Normal(self.loc, 0.1))

    for guide, loc in ((function, 5.0), (Module(), 9.0)):
        draws = log_weights(normal_model, guide, y, num_samples=50).draws["codes"]
        assert abs(float(draws.mean()) - loc) < 0.1
    assert float(pyro.param("loc").detach()) == 5.0


# Refusals


def laplace_model(rate: Any = None) -> SparseCoding:
    if rate is None:
        return SparseCoding(Dense(3, 4), Gaussian(NOISE), dist.Laplace(0.0, 1.0))
    return SparseCoding(Dense(3, 4), Gaussian(NOISE), lambda r: dist.Laplace(0.0, 1 / r), rate=rate)


def test_point_estimates_are_refused_by_name() -> None:
    y = torch.randn(5, 4)
    model = laplace_model()
    guide = UnrolledFISTA(model.dictionary, model.likelihood, model.prior)
    with pytest.raises(ValueError, match=r"Delta at \['codes'\].*no k-hat"):
        log_weights(model, guide, y)
    with pytest.raises(ValueError, match=r"Delta at \['codes'\]"):
        log_weights(model, AutoDelta(model), y)


def test_a_point_estimate_that_varies_with_another_site_is_one_too() -> None:
    model = laplace_model(dist.Gamma(2.0, 2.0))
    rest = AutoNormal(pyro.poutine.block(model, hide=["codes"]))
    guide = UnrolledFISTA(model.dictionary, model.likelihood, model.prior, rest=rest)
    with pytest.raises(ValueError, match=r"Delta at \['codes'\]"):
        log_weights(model, guide, torch.randn(5, 4))


def test_a_point_estimate_beside_an_autoguide_is_one_too() -> None:
    y = signals(4, 1)[:, 0]
    guide = AutoGuideList(simplex_model)
    guide.append(AutoDelta(pyro.poutine.block(simplex_model, expose=["shares"])))
    guide.append(AutoNormal(pyro.poutine.block(simplex_model, expose=["scale"])))
    with pytest.raises(ValueError, match=r"Delta at \['shares'\]"):
        log_weights(simplex_model, guide, y)


@pytest.mark.parametrize("atom_in", ["model", "guide"])
def test_an_atom_against_none_is_refused(atom_in: str) -> None:
    y = signals()

    def program(has_atom: bool, observe: bool) -> Callable[..., None]:
        def run(y: Tensor, num_data: int) -> None:
            law = dist.Normal(torch.zeros(4, dtype=F64), 1.0)
            with data_plate(y, num_data):
                mixed = SpikeAndSlab(law, 0.5) if has_atom else law
                codes = pyro.sample("codes", mixed.to_event(1))
                if observe:
                    pyro.sample("obs", dist.Normal(codes, 1.0).to_event(1), obs=y)

        return run

    model = program(atom_in == "model", True)
    guide = program(atom_in == "guide", False)
    with pytest.raises(ValueError, match="atom at zero at site 'codes'"):
        log_weights(model, guide, y)


def no_sites(y: Tensor, num_data: int) -> None:
    pass


def two_sites(y: Tensor, num_data: int) -> None:
    normal_guide(y, num_data)
    pyro.sample("more", dist.Normal(0.0, 1.0))


def observing(y: Tensor, num_data: int) -> None:
    normal_guide(y, num_data)
    pyro.sample("seen", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))


def impossible(y: Tensor, num_data: int) -> None:
    with data_plate(y, num_data):
        pyro.sample("codes", dist.Normal(torch.full((), 1e200, dtype=F64), 1.0))


@pytest.mark.parametrize(
    ("guide", "kind", "message"),
    [
        (no_sites, ValueError, "equal names, shapes and plates"),
        (two_sites, ValueError, "equal names, shapes and plates"),
        (observing, NotImplementedError, "'seen'"),
    ],
)
def test_guides_that_do_not_fit(guide: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        log_weights(normal_model, guide, signals(3, 1)[:, 0])


def test_draws_that_are_impossible_under_the_model_have_weight_zero() -> None:
    weights = log_weights(normal_model, impossible, signals(3, 1)[:, 0], num_samples=4)
    assert bool((weights.local == -math.inf).all())


def test_an_enumerated_posterior_is_a_guide_of_which_every_draw_weighs_the_evidence() -> None:
    """Its support has an atom at zero, though it is no law with gates."""
    model, y = spike_model(), signals()
    posterior: Any = enumerate_posterior(y, model.dictionary, model.prior, model.likelihood)

    def guide(y: Tensor, num_data: int) -> None:
        with data_plate(y, num_data):
            pyro.sample("codes", posterior)

    weights = log_weights(model, guide, y, num_samples=20).local
    torch.testing.assert_close(
        weights, posterior.log_evidence.expand_as(weights), atol=1e-6, rtol=0
    )


def test_numbers_that_are_none_are_named() -> None:
    def model(y: Tensor, num_data: int) -> None:
        with data_plate(y, num_data):
            codes = pyro.sample("codes", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            law = dist.Normal(codes * math.nan, 1.0, validate_args=False)
            pyro.sample("obs", law, obs=y)

    with pytest.raises(ValueError, match="nan at site 'obs' of the model"):
        log_weights(model, normal_guide, signals(3, 1)[:, 0])


def test_plates_that_are_not_served() -> None:
    y = signals(6, 1)[:, 0]

    def loop(y: Tensor, num_data: int) -> None:
        for i in pyro.plate("data", len(y)):
            pyro.sample(f"codes_{i}", dist.Normal(0.0, 1.0))

    def part(y: Tensor, num_data: int) -> None:
        with pyro.plate("data", len(y), subsample_size=2):
            pyro.sample("codes", dist.Normal(0.0, 1.0))

    def inner(y: Tensor, num_data: int) -> None:
        with pyro.plate("data", len(y)), pyro.plate("inner", 4, subsample_size=2):
            pyro.sample("codes", dist.Normal(0.0, 1.0))

    for program, message in (
        (loop, "got the sequential one"),
        (part, "got 2 of 6"),
        (inner, "got 2 of 4 in plate 'inner'"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            log_weights(program, program, y)
    with pytest.raises(ValueError, match=r"plate 'rows'.*got plates \['data'\]"):
        log_weights(normal_model, normal_guide, y, plate="rows")


def test_a_site_that_is_enumerated_in_the_model_alone() -> None:
    def model(y: Tensor, num_data: int) -> None:
        with data_plate(y, num_data):
            codes = pyro.sample("codes", dist.Normal(0.0, 1.0))
            law = dist.Bernoulli(0.5)
            sign = pyro.sample("sign", law, infer={"enumerate": "parallel"})
            pyro.sample("obs", dist.Normal(codes * sign, 1.0), obs=y)

    with pytest.raises(NotImplementedError, match="none for 'sign'"):
        log_weights(model, normal_guide, signals(3, 1)[:, 0])


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples >= 1"),
        ({"num_samples": 2.5}, TypeError, "num_samples"),
        ({"chunk_size": 0}, ValueError, "chunk_size >= 1"),
        ({"num_data": 2}, ValueError, "num_data >= 3"),
        ({"seed": -1}, ValueError, "seed >= 0"),
        ({"mask": torch.ones(3)}, TypeError, "boolean"),
        ({"mask": [True]}, TypeError, "boolean"),
        ({"plate": 1}, TypeError, "plate"),
        ({"y": [1.0]}, TypeError, "as_tensor"),
        ({"y": torch.tensor(1.0)}, ValueError, "signal_shape"),
        ({"y": torch.ones(0)}, ValueError, "signal_shape"),
        ({"model": 3}, TypeError, "model"),
        ({"guide": None}, TypeError, "guide"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_are_checked(options: dict[str, Any], kind: Any, message: str) -> None:
    given = {"model": normal_model, "guide": normal_guide, "y": signals(3, 1)[:, 0], **options}
    with pytest.raises(kind, match=message):
        log_weights(**given)
