"""SparseELBO over programs of all shapes: sites, plates, scales, masks, training, and refusals."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_sparse.dictionaries import Conv, Dense
from pyro_sparse.distributions.mixed import SpikeAndSlab
from pyro_sparse.distributions.structured import StructuredSpikeAndSlab
from pyro_sparse.guides import Heads, SpikeAndSlabPosterior, Thresholded
from pyro_sparse.infer import (
    Checkpoints,
    ControlVariate,
    DisARM,
    Estimator,
    ImplicitMixed,
    Importance,
    LeaveOneOut,
    LocalExpectation,
    Mean,
    SparseELBO,
    fit,
)
from pyro_sparse.infer.estimators import Exact
from pyro_sparse.infer.schedules import LinearRamp, Scheduled, Warmup
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding

Program = Callable[..., Any]
# A low limit: near the default one the tails are so heavy that some hundred draws say little.
ESTIMATORS = [ImplicitMixed(5.0), LeaveOneOut(), LocalExpectation(), DisARM(), ControlVariate()]
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Affine:
    """Data, parameters and closed-form ELBO of codes under an affine Gaussian model.

    The expectation of a square is the square of the mean plus the variance: the reference.
    """

    def __init__(self, n: int = 5, atoms: int = 3, features: int = 4) -> None:
        self.y, self.atoms = double(n, features), double(atoms, features)
        self.loc = double(n, atoms).requires_grad_()
        self.log_scale = (double(n, atoms) * 0.3 - 1).requires_grad_()
        # Neither rare nor sure: some hundred repeats have to see every gate open and closed.
        self.logits = (0.5 * double(n, atoms)).requires_grad_()

    @property
    def parameters(self) -> list[Tensor]:
        return [self.loc, self.log_scale, self.logits]

    def law(self, index: Any = slice(None)) -> SpikeAndSlab:
        slab = dist.Laplace(self.loc[index], self.log_scale[index].exp())
        return SpikeAndSlab(slab, logits=self.logits[index])

    def prior(self) -> SpikeAndSlab:
        return SpikeAndSlab(dist.Laplace(torch.zeros_like(self.atoms[:, 0]), 1.0), 0.3)

    def fit(self, mask: Tensor | None = None) -> Tensor:
        """Expected log-likelihood of every datum."""
        g, b = self.logits.sigmoid(), self.log_scale.exp()
        mean = g * self.loc
        variance = g * (self.loc**2 + 2 * b**2) - mean**2
        square = (self.y - mean @ self.atoms) ** 2 + variance @ self.atoms**2
        terms = -square / (2 * 0.5**2) - math.log(0.5 * math.sqrt(2 * math.pi))
        return (terms if mask is None else terms * mask).sum(-1)

    def kl(self) -> Tensor:
        """KL of every datum; scale of the prior one, P(active) 0.3."""
        g, b, size = self.logits.sigmoid(), self.log_scale.exp(), self.loc.abs()
        gates = g * (g / 0.3).log() + (1 - g) * ((1 - g) / 0.7).log()
        slab = -b.log() + size + b * (-size / b).exp() - 1
        return (gates + g * slab).sum(-1)


def moments(
    elbo: SparseELBO, model: Program, guide: Program, parameters: list[Tensor], repeats: int
) -> tuple[Tensor, Tensor]:
    """Loss and gradients, one row for each repeat: means, and standard errors of the means."""
    rows = []
    for _ in range(repeats):
        loss = elbo.differentiable_loss(model, guide)
        slopes = torch.autograd.grad(loss, parameters, allow_unused=True)
        parts = [
            (torch.zeros_like(value) if slope is None else slope).flatten()
            for value, slope in zip(parameters, slopes, strict=True)
        ]
        rows.append(torch.cat([loss.detach().reshape(1), *parts]))
    table = torch.stack(rows)
    return table.mean(0), table.std(0) / math.sqrt(repeats)


def check_mean(
    elbo: SparseELBO,
    model: Program,
    guide: Program,
    parameters: list[Tensor],
    exact: Tensor,
    repeats: int = 200,
) -> None:
    """Loss and gradient are right on average, every entry within four standard errors."""
    slopes = torch.autograd.grad(exact, parameters, allow_unused=True)
    parts = [
        (torch.zeros_like(value) if slope is None else slope).flatten()
        for value, slope in zip(parameters, slopes, strict=True)
    ]
    truth = torch.cat([exact.detach().reshape(1), *parts])
    mean, error = moments(elbo, model, guide, parameters, repeats)
    assert ((mean - truth) / (error + 1e-9)).abs().max() < 4


# Plates, scales and masks


def plain(world: Affine, **handlers: Any) -> tuple[Program, Program]:
    def model() -> None:
        with pyro.plate("data", len(world.y), **handlers):
            z = pyro.sample("codes", world.prior().to_event(1))
            pyro.sample("obs", dist.Normal(z @ world.atoms, 0.5).to_event(1), obs=world.y)

    def guide() -> None:
        with pyro.plate("data", len(world.y), **handlers):
            pyro.sample("codes", world.law().to_event(1))

    return model, guide


@every_estimator
def test_the_mean_is_the_closed_form(estimator: Estimator) -> None:
    world = Affine()
    exact = (world.kl() - world.fit()).sum()
    check_mean(SparseELBO(estimator, num_samples=16), *plain(world), world.parameters, exact)


@every_estimator
def test_a_random_subsample_equals_the_full_data_in_expectation(estimator: Estimator) -> None:
    world = Affine()

    def model() -> None:
        with pyro.plate("data", 5, subsample_size=2) as index:
            z = pyro.sample("codes", world.prior().to_event(1))
            law = dist.Normal(z @ world.atoms, 0.5).to_event(1)
            pyro.sample("obs", law, obs=world.y[index])

    def guide() -> None:
        with pyro.plate("data", 5, subsample_size=2) as index:
            pyro.sample("codes", world.law(index).to_event(1))

    exact = (world.kl() - world.fit()).sum()
    check_mean(SparseELBO(estimator, num_samples=16), model, guide, world.parameters, exact, 300)


@every_estimator
def test_masked_samples_do_not_count(estimator: Estimator) -> None:
    world = Affine()
    mask = torch.rand(5, 4) < 0.6
    data = torch.where(mask, world.y, torch.tensor(1e6, dtype=torch.float64))

    def model() -> None:
        with pyro.plate("data", 5):
            z = pyro.sample("codes", world.prior().to_event(1))
            law = dist.Normal(z @ world.atoms, 0.5).mask(mask).to_event(1)
            pyro.sample("obs", law, obs=data)

    exact = (world.kl() - world.fit(mask)).sum()
    check_mean(
        SparseELBO(estimator, num_samples=16), model, plain(world)[1], world.parameters, exact
    )


def test_a_mean_over_random_masks_is_the_full_objective() -> None:
    world = Affine()
    keep = 0.5

    def model() -> None:
        mask = torch.rand(5, 4) < keep
        with pyro.plate("data", 5):
            z = pyro.sample("codes", world.prior().to_event(1))
            with poutine.scale(scale=1 / keep):
                law = dist.Normal(z @ world.atoms, 0.5).mask(mask).to_event(1)
                pyro.sample("obs", law, obs=world.y)

    exact = (world.kl() - world.fit()).sum()
    # One mask for each evaluation: what differs between those of a step has mean zero.
    elbo = SparseELBO(ControlVariate())
    check_mean(elbo, model, plain(world)[1], world.parameters, exact, 400)


@every_estimator
def test_data_masked_by_a_handler_do_not_count(estimator: Estimator) -> None:
    world = Affine()
    kept = torch.tensor([True, False, True, True, False])
    model, guide = plain(world)
    masked = tuple(poutine.mask(program, mask=kept) for program in (model, guide))
    exact = ((world.kl() - world.fit()) * kept).sum()
    check_mean(SparseELBO(estimator, num_samples=16), *masked, world.parameters, exact)


@every_estimator
@pytest.mark.parametrize("weight", [0.3, torch.tensor([1.0, 2.0, 0.5, 3.0, 0.1])], ids=["n", "vec"])
def test_scales_weight_every_term(estimator: Estimator, weight: Any) -> None:
    world = Affine()
    scaled = tuple(poutine.scale(program, scale=weight) for program in plain(world))
    exact = ((world.kl() - world.fit()) * weight).sum()
    check_mean(SparseELBO(estimator, num_samples=16), *scaled, world.parameters, exact)


def test_weights_of_data_and_a_bound_of_draws_are_refused() -> None:
    scaled = tuple(poutine.scale(p, scale=torch.ones(5) / 2) for p in plain(Affine()))
    with pytest.raises(NotImplementedError, match="Expected one scale of site 'codes'"):
        SparseELBO(bound=Importance()).loss(*scaled)


@every_estimator
def test_programs_without_a_plate(estimator: Estimator) -> None:
    world = Affine(n=1)

    def model() -> None:
        z = pyro.sample("codes", world.prior().to_event(1))
        pyro.sample("obs", dist.Normal(z @ world.atoms, 0.5).to_event(1), obs=world.y[0])

    def guide() -> None:
        pyro.sample("codes", world.law(0).to_event(1))

    exact = (world.kl() - world.fit()).sum()
    check_mean(SparseELBO(estimator, num_samples=16), model, guide, world.parameters, exact)


@every_estimator
def test_observations_in_an_inner_plate(estimator: Estimator) -> None:
    world = Affine()

    def model() -> None:
        with pyro.plate("data", 5, dim=-2):
            z = pyro.sample("codes", world.prior().to_event(1))  # (..., 5, 1, atoms)
            with pyro.plate("features", 4, dim=-1):
                predictor = (z @ world.atoms).squeeze(-2)
                pyro.sample("obs", dist.Normal(predictor, 0.5), obs=world.y)

    def guide() -> None:
        with pyro.plate("data", 5, dim=-2):
            loc, scale = world.loc.unsqueeze(1), world.log_scale.exp().unsqueeze(1)
            slab = dist.Laplace(loc, scale)
            law = SpikeAndSlab(slab, logits=world.logits.unsqueeze(1))
            pyro.sample("codes", law.to_event(1))

    exact = (world.kl() - world.fit()).sum()
    check_mean(SparseELBO(estimator, num_samples=16), model, guide, world.parameters, exact)


@pytest.mark.parametrize(
    "estimator",
    [ImplicitMixed(5.0), ImplicitMixed(0), LeaveOneOut(), DisARM(), ControlVariate()],
    ids=repr,
)
def test_codes_in_a_plate_of_atoms_that_act_together(estimator: Estimator) -> None:
    world = Affine()

    def codes(law: Any) -> tuple[Any, Tensor]:
        data = pyro.plate("data", 5, dim=-2)
        with data, pyro.plate("atoms", 3, dim=-1):
            return data, pyro.sample("codes", law)

    def model() -> None:
        data, z = codes(world.prior())
        with data:
            law = dist.Normal((z @ world.atoms).unsqueeze(-2), 0.5).to_event(1)
            pyro.sample("obs", law, obs=world.y.unsqueeze(-2))

    exact = (world.kl() - world.fit()).sum()
    check_mean(
        SparseELBO(estimator, num_samples=16),
        model,
        lambda: codes(world.law()),
        world.parameters,
        exact,
    )
    with pytest.raises(NotImplementedError, match=r"LocalExpectation flips.*\.to_event\(n\)"):
        SparseELBO(LocalExpectation()).differentiable_loss(model, lambda: codes(world.law()))


@every_estimator
def test_two_sites_of_codes(estimator: Estimator) -> None:
    world = Affine(atoms=4)
    first, last = (slice(None), slice(0, 1)), (slice(None), slice(1, 4))

    def half(cut: Any) -> SpikeAndSlab:
        return world.law(cut)

    def model() -> None:
        prior = SpikeAndSlab(dist.Laplace(torch.zeros(1).double(), 1.0), 0.3)
        with pyro.plate("data", 5):
            a = pyro.sample("a", prior.to_event(1))
            b = pyro.sample("b", prior.expand((3,)).to_event(1))
            z = torch.cat([a, b], -1)
            pyro.sample("obs", dist.Normal(z @ world.atoms, 0.5).to_event(1), obs=world.y)

    def guide() -> None:
        with pyro.plate("data", 5):
            pyro.sample("a", half(first).to_event(1))
            pyro.sample("b", half(last).to_event(1))

    exact = (world.kl() - world.fit()).sum()
    check_mean(SparseELBO(estimator, num_samples=16), model, guide, world.parameters, exact)


# Latent sites that depend on one another

COPIES = 60  # equal data: as many draws at a time


def gate_kl(q: Tensor, p: float) -> Tensor:
    rest = (1 - q).clamp(min=1e-300)  # far nodes of a sum
    return q * (q.clamp(min=1e-300) / p).log() + rest * (rest / (1 - p)).log()


class Chain:
    """Codes ``b`` whose gate depends on the code ``a``, with normal slabs of scale 0.5.

    The expectation over ``a`` is a Gauss-Hermite sum, that over ``b`` is closed.
    """

    def __init__(self) -> None:
        start = {"loc": 0.4, "odds": 0.2, "slope": 0.9, "shift": -0.3, "weight": 1.3}
        self.p = {
            name: torch.tensor(value, dtype=torch.float64).requires_grad_()
            for name, value in start.items()
        }

    def model(self) -> None:
        prior = SpikeAndSlab(dist.Normal(torch.zeros(COPIES).double(), 1.0), 0.3)
        with pyro.plate("data", COPIES):
            a = pyro.sample("a", prior)
            b = pyro.sample("b", prior)
            pyro.sample("obs", dist.Normal(self.p["weight"] * a - b, 0.7), obs=torch.ones(COPIES))

    def guide(self) -> None:
        p = self.p
        with pyro.plate("data", COPIES):
            a = pyro.sample("a", self.law(p["loc"], p["odds"]))
            pyro.sample("b", self.law(p["shift"], p["slope"] * a))

    def law(self, loc: Tensor, logits: Tensor) -> SpikeAndSlab:
        return SpikeAndSlab(dist.Normal(loc, 0.5), logits=logits).expand(
            (COPIES,) if not logits.dim() else logits.shape
        )

    def exact(self) -> Tensor:
        p = self.p
        node, weight = (torch.as_tensor(x) for x in np.polynomial.hermite_e.hermegauss(60))
        g = p["odds"].sigmoid()
        a = torch.cat([torch.zeros(1).double(), p["loc"] + 0.5 * node])
        weight = torch.cat([(1 - g).reshape(1), g * weight / math.sqrt(2 * math.pi)])
        slab = lambda loc: (loc**2 + 0.25 - 1) / 2 - math.log(0.5)  # noqa: E731
        h = (p["slope"] * a).sigmoid()
        mean, square = h * p["shift"], h * (p["shift"] ** 2 + 0.25)
        rest = 1 - p["weight"] * a
        fit = -(rest**2 + 2 * rest * mean + square) / (2 * 0.49)
        fit = fit - math.log(0.7 * math.sqrt(2 * math.pi))
        of_b = gate_kl(h, 0.3) + h * slab(p["shift"])
        of_a = gate_kl(g, 0.3) + g * slab(p["loc"])
        return COPIES * (of_a + (weight * (of_b - fit)).sum())


@pytest.mark.parametrize(
    ("estimator", "num_samples"),
    [(ImplicitMixed(), 1), (ImplicitMixed(0), 1), (ImplicitMixed(0), 3), (LeaveOneOut(), 2)],
    ids=["implicit", "score-1", "score-3", "leave_one_out"],
)
def test_gates_that_depend_on_codes_before(estimator: Estimator, num_samples: int) -> None:
    chain = Chain()
    elbo = SparseELBO(estimator, num_samples=num_samples)
    check_mean(elbo, chain.model, chain.guide, list(chain.p.values()), chain.exact(), 100)


@pytest.mark.parametrize("bound", [Mean(sampled_kl=True)], ids=repr)
def test_gates_that_depend_on_codes_before_with_a_sampled_kl(bound: Any) -> None:
    chain = Chain()
    elbo = SparseELBO(LeaveOneOut(), bound=bound)
    check_mean(elbo, chain.model, chain.guide, list(chain.p.values()), chain.exact(), 100)


@pytest.mark.parametrize("estimator", [LocalExpectation(), DisARM(), ControlVariate()], ids=repr)
def test_estimators_that_hold_other_sites_still_refuse_such_a_guide(estimator: Estimator) -> None:
    chain = Chain()
    with pytest.raises(NotImplementedError, match=r"depend on.*LeaveOneOut\(\)"):
        SparseELBO(estimator).differentiable_loss(chain.model, chain.guide)


class Structured:
    """Two codes of one structured law under an affine Gaussian model, by the same sums."""

    def __init__(self) -> None:
        start = {"logits": [-0.4, -0.8], "loc": [0.5, 0.6], "log_scale": [-0.7, -0.9], "c": 0.8}
        self.p = {
            name: torch.tensor(value, dtype=torch.float64).requires_grad_()
            for name, value in start.items()
        }
        self.weight = torch.tensor([1.0, 1.2], dtype=torch.float64)

    def model(self) -> None:
        prior = SpikeAndSlab(dist.Normal(torch.zeros(2).double(), 1.0), 0.3)
        with pyro.plate("data", COPIES):
            z = pyro.sample("codes", prior.to_event(1))
            pyro.sample("obs", dist.Normal(z @ self.weight, 0.7), obs=torch.ones(COPIES))

    def guide(self) -> None:
        p = self.p
        below = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
        law = StructuredSpikeAndSlab(p["logits"], p["loc"], p["log_scale"].exp(), p["c"] * below)
        with pyro.plate("data", COPIES):
            pyro.sample("codes", law)

    def exact(self) -> Tensor:
        node, weight = (torch.as_tensor(x) for x in np.polynomial.hermite_e.hermegauss(60))
        (l1, l2), (m1, m2), (s1, s2) = (self.p["logits"], self.p["loc"], self.p["log_scale"].exp())
        slab = lambda m, s: (m**2 + s**2 - 1) / 2 - s.log()  # noqa: E731
        g = (l1 + m1**2 / (2 * s1**2)).sigmoid()
        a = torch.cat([torch.zeros(1).double(), m1 + s1 * node])
        weight = torch.cat([(1 - g).reshape(1), g * weight / math.sqrt(2 * math.pi)])
        m = m2 - self.p["c"] * a
        h = (l2 + m**2 / (2 * s2**2)).sigmoid()
        w1, w2 = self.weight
        rest = 1 - w1 * a
        square = rest**2 - 2 * rest * w2 * h * m + w2**2 * h * (m**2 + s2**2)
        fit = -square / (2 * 0.49) - math.log(0.7 * math.sqrt(2 * math.pi))
        divergence = gate_kl(g, 0.3) + g * slab(m1, s1)
        return COPIES * (divergence + (weight * (gate_kl(h, 0.3) + h * slab(m, s2) - fit)).sum())


@pytest.mark.parametrize(
    ("estimator", "num_samples", "bound"),
    [
        (ImplicitMixed(), 1, Mean()),
        (LeaveOneOut(), 1, Mean()),
        (LeaveOneOut(), 3, Mean()),
        (LeaveOneOut(), 2, Mean(sampled_kl=True)),
    ],
    ids=["implicit", "score-1", "score-3", "sampled_kl"],
)
def test_structured_laws(estimator: Estimator, num_samples: int, bound: Any) -> None:
    world = Structured()
    elbo = SparseELBO(estimator, num_samples=num_samples, bound=bound)
    check_mean(elbo, world.model, world.guide, list(world.p.values()), world.exact(), 100)


@pytest.mark.parametrize("estimator", [LocalExpectation(), DisARM(), ControlVariate()], ids=repr)
def test_estimators_of_single_gates_refuse_structured_laws(estimator: Estimator) -> None:
    world = Structured()
    with pytest.raises(NotImplementedError, match=r"needs independent gates.*LeaveOneOut\(\)"):
        SparseELBO(estimator).differentiable_loss(world.model, world.guide)


SEQUENTIAL = [ImplicitMixed(5.0), LeaveOneOut(), LocalExpectation(), ControlVariate()]


@pytest.mark.parametrize("estimator", SEQUENTIAL, ids=lambda e: type(e).__name__)
def test_a_threshold_drawn_for_every_datum(estimator: Estimator) -> None:
    loc, log_scale, log_size = (
        torch.tensor(value, dtype=torch.float64).requires_grad_() for value in (0.4, -0.7, -0.5)
    )

    def model() -> None:
        with pyro.plate("data", COPIES):
            t = pyro.sample("threshold", dist.Gamma(2.0, torch.full((COPIES,), 4.0).double()))
            prior = SpikeAndSlab(dist.Laplace(torch.zeros(COPIES).double(), 1.0), (-t).exp())
            z = pyro.sample("codes", prior)
            pyro.sample("obs", dist.Normal(z, 0.5), obs=torch.ones(COPIES))

    def guide() -> None:
        with pyro.plate("data", COPIES):
            size = log_size.exp()
            t = pyro.sample("threshold", dist.Gamma(3.0, (3 / size).expand(COPIES)))
            b = log_scale.exp()
            odds = -t / b - (-torch.expm1(-t / b)).log()
            slab = dist.Laplace(loc.expand(t.shape), b)
            pyro.sample("codes", SpikeAndSlab(slab, logits=odds))

    node, weight = (torch.as_tensor(x) for x in np.polynomial.laguerre.laggauss(60))
    b, rate = log_scale.exp(), 3 / log_size.exp()
    t, weight = node / rate, weight * node**2 / 2  # Gamma(3, rate)
    g, prior = (-t / b).exp(), (-t).exp()
    slab = -b.log() + loc + b * (-loc / b).exp() - 1
    gates = g * (g / prior).log() + (1 - g) * ((1 - g) / (1 - prior)).log()
    square = 1 - 2 * g * loc + g * (loc**2 + 2 * b**2)
    fit = -square / (2 * 0.25) - math.log(0.5 * math.sqrt(2 * math.pi))
    of_t = torch.distributions.kl_divergence(
        torch.distributions.Gamma(torch.tensor(3.0).double(), rate),
        torch.distributions.Gamma(torch.tensor(2.0).double(), 4.0),
    )
    exact = COPIES * (of_t + (weight * (gates + g * slab - fit)).sum())
    parameters = [loc, log_scale, log_size]
    check_mean(SparseELBO(estimator, num_samples=16), model, guide, parameters, exact, 60)


@every_estimator
@pytest.mark.parametrize("num_samples", [2, 16])
def test_a_global_rate_with_an_autoguide(estimator: Estimator, num_samples: int) -> None:
    world = Affine(n=3)

    def model() -> None:
        rate = pyro.sample("rate", dist.LogNormal(torch.zeros(()).double(), 1.0))
        prior = SpikeAndSlab(dist.Laplace(torch.zeros(3).double(), 1 / rate), 0.3)
        with pyro.plate("data", 3):
            z = pyro.sample("codes", prior.to_event(1))
            pyro.sample("obs", dist.Normal(z @ world.atoms, 0.5).to_event(1), obs=world.y)

    rest = AutoNormal(poutine.block(model, expose=["rate"]), init_scale=0.4)
    rest()
    rest.double()

    def guide() -> None:
        rest()
        with pyro.plate("data", 3):
            pyro.sample("codes", world.law().to_event(1))

    node, weight = (torch.as_tensor(x) for x in np.polynomial.hermite_e.hermegauss(40))
    m, s = rest.locs.rate, rest.scales.rate
    log_rate, weight = m + s * node, weight / math.sqrt(2 * math.pi)
    g, b, size = world.logits.sigmoid(), world.log_scale.exp(), world.loc.abs()
    gates = g * (g / 0.3).log() + (1 - g) * ((1 - g) / 0.7).log()
    distance = (g * (size + b * (-size / b).exp())).sum()
    slab = (g * (-b.log() - 1)).sum() - g.sum() * log_rate + distance * log_rate.exp()
    of_rate = -s.log() + (s**2 + m**2 - 1) / 2
    exact = gates.sum() + (weight * slab).sum() + of_rate - world.fit().sum()
    parameters = [*world.parameters, rest.locs.rate]
    elbo = SparseELBO(estimator, num_samples=num_samples)
    check_mean(elbo, model, guide, parameters, exact, 2400 // num_samples)


def test_pyros_own_objective_has_the_same_mean() -> None:
    world = Affine(n=2, atoms=2, features=2)
    model, guide = plain(world)
    exact = (world.kl() - world.fit()).sum()
    theirs = Trace_ELBO(num_particles=20_000, vectorize_particles=True, max_plate_nesting=1)
    loss = theirs.differentiable_loss(model, guide)
    assert abs(float((loss - exact).detach())) < 0.3  # a deviation of about 10 nats
    slopes = torch.autograd.grad(loss, world.parameters)
    truth = torch.autograd.grad(exact, world.parameters)
    for slope, right in zip(slopes, truth, strict=True):
        assert (slope - right).norm() < 0.15 * right.norm() + 0.2


# Training


class Pair:
    def __init__(self) -> None:
        torch.manual_seed(1)
        dictionary, likelihood = Dense(6, 8), Gaussian(0.3)
        prior = SpikeAndSlab(dist.Laplace(0.0, 1.0), 0.3)
        family = SpikeAndSlabPosterior(dist.Laplace)
        encoder = Heads(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), 16, 6, family.names)
        self.model = SparseCoding(dictionary, likelihood, prior)
        self.guide = Thresholded(encoder, family)
        codes = torch.randn(40, 6) * (torch.rand(40, 6) < 0.3)
        self.y = codes @ torch.nn.functional.normalize(torch.randn(6, 8)) + 0.1 * torch.randn(40, 8)

    def values(self) -> list[Tensor]:
        both = nn.ModuleList([self.model, self.guide])
        return [value.detach().clone() for value in both.parameters()]


def test_svi_trains() -> None:
    pair = Pair()
    elbo = SparseELBO(ImplicitMixed(), num_samples=3)
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.01}), loss=elbo)
    losses = [svi.step(pair.y) for _ in range(150)]
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:20])
    assert svi.evaluate_loss(pair.y) > 0


def test_the_module_of_an_objective_has_the_parameters() -> None:
    pair = Pair()
    module = SparseELBO(LeaveOneOut())(pair.model, pair.guide)
    module(pair.y).backward()
    assert all(value.grad is not None for value in module.parameters())
    count = len(list(pair.model.parameters())) + len(list(pair.guide.parameters()))
    assert len(list(module.parameters())) == count


class Killed(Exception):
    pass


class Kill(Warmup):
    """A warm-up that ends the process, as it were."""

    until: int | None = None

    def after_step(self, progress: Any) -> None:
        if progress.step == self.until:
            raise Killed
        super().after_step(progress)


def train(folder: Path, until: int | None = None) -> tuple[list[Tensor], float]:
    pair = Pair()
    weight = Scheduled(LinearRamp(0.0, 1.0, num_steps=10))
    warmup = Kill(weight)
    warmup.until = until
    elbo = SparseELBO(ImplicitMixed(), num_samples=2, kl_weight=weight)
    options = {"batch_size": 16, "epochs": 5, "progress": False, "loss": elbo}
    checkpoints = Checkpoints(folder, every=1)
    fit(pair.model, pair.guide, pair.y, callbacks=[warmup], checkpoints=checkpoints, **options)
    return pair.values(), float(weight)


def test_fit_resumes_with_a_scheduled_kl_weight(tmp_path: Path) -> None:
    whole, weight = train(tmp_path / "whole")
    assert weight == 1.0
    with pytest.raises(Killed):
        train(tmp_path / "parts", until=7)
    parts, weight = train(tmp_path / "parts")
    assert weight == 1.0
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("num_samples", [1, 2, 4])
@pytest.mark.parametrize(
    "estimator", [ImplicitMixed(), LeaveOneOut(), LocalExpectation()], ids=repr
)
@pytest.mark.parametrize("geometry", ["dense", "conv"])
def test_library_models_take_any_number_of_draws(
    geometry: str, estimator: Estimator, num_samples: int
) -> None:
    dictionary = Dense(4, 10) if geometry == "dense" else Conv(2, 1, 3)
    y = torch.randn(3, 10) if geometry == "dense" else torch.randn(3, 1, 10)
    prior = SpikeAndSlab(dist.Laplace(0.0, 1.0), 0.3)
    model = SparseCoding(dictionary, Gaussian(0.5), prior)
    shape = model.codes_of(tuple(y.shape[1:]))
    logits = torch.zeros(3, *shape, requires_grad=True)

    def guide(y: Tensor, num_data: int | None = None, mask: Tensor | None = None) -> None:
        with pyro.plate("data", num_data or 3, subsample=torch.arange(3)):
            law = SpikeAndSlab(dist.Laplace(torch.zeros(3, *shape), 0.5), logits=logits)
            pyro.sample("codes", law.to_event(len(shape)))

    loss = SparseELBO(estimator, num_samples=num_samples).differentiable_loss(model, guide, y, 9)
    loss.backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.any()


def test_the_first_call_leaves_the_random_state_alone() -> None:
    world = Affine()
    model, guide = plain(world)
    losses = []
    for calls in (0, 1):
        elbo = SparseELBO(ImplicitMixed())
        for _ in range(calls):
            torch.manual_seed(3)
            elbo.loss(model, guide)
        torch.manual_seed(3)
        losses.append(elbo.loss(model, guide))
    assert losses[0] == losses[1]


def test_the_weight_of_the_kl_multiplies_it() -> None:
    world = Affine()
    model, guide = plain(world)
    weight = Scheduled(LinearRamp(0.0, 1.0, num_steps=4))
    elbo = SparseELBO(ImplicitMixed(), kl_weight=weight)
    losses = []
    for _ in range(5):
        torch.manual_seed(3)
        losses.append(elbo.loss(model, guide))
        weight.advance_()
    steps = np.diff(losses)
    np.testing.assert_allclose(steps, float(world.kl().sum().detach()) / 4)


# Refusals


def pairs(prior: Any, law: Any) -> tuple[Program, Program]:
    def model() -> None:
        with pyro.plate("data", 2):
            z = pyro.sample("codes", prior)
            pyro.sample("obs", dist.Normal(z, 1.0), obs=torch.zeros(2))

    def guide() -> None:
        with pyro.plate("data", 2):
            pyro.sample("codes", law)

    return model, guide


MIXED = SpikeAndSlab(dist.Laplace(torch.zeros(2), 1.0), 0.5)


class Bell(dist.TorchDistribution):
    """A slab of a user of which no KL is known."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.real
    has_rsample = True

    def __init__(self, loc: Tensor) -> None:
        self.inner = dist.Normal(loc, 1.0)
        super().__init__(loc.shape, validate_args=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.inner.log_prob(value)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.inner.rsample(sample_shape)

    @property
    def mean(self) -> Tensor:
        return self.inner.mean

    @property
    def variance(self) -> Tensor:
        return self.inner.variance

    def cdf(self, value: Tensor) -> Tensor:
        return self.inner.cdf(value)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Bell":
        return Bell(self.inner.loc.expand(batch_shape))


def test_an_atom_against_none_is_refused() -> None:
    model, guide = pairs(dist.Laplace(torch.zeros(2), 1.0), MIXED)
    with pytest.raises(ValueError, match=r"KL is infinite\. Use SpikeAndSlab\(Laplace"):
        SparseELBO(ImplicitMixed()).loss(model, guide)


def test_a_point_against_an_atom_is_refused() -> None:
    model, guide = pairs(MIXED, dist.Delta(torch.zeros(2)))
    with pytest.raises(ValueError, match=r"Delta against SpikeAndSlab.*guides\.Thresholded"):
        SparseELBO(ImplicitMixed()).loss(model, guide)


def test_an_unknown_kl_is_not_sampled_with_pathwise_draws() -> None:
    odds = torch.zeros(2, requires_grad=True)
    law = SpikeAndSlab(Bell(torch.zeros(2)), logits=odds)
    model, guide = pairs(MIXED, law)
    with pytest.raises(ValueError, match=r"KL in closed form at site 'codes'.*sampled_kl=True"):
        SparseELBO(ImplicitMixed()).loss(model, guide)
    elbo = SparseELBO(bound=Mean(sampled_kl=True))
    elbo.differentiable_loss(model, guide).backward()
    assert odds.grad.isfinite().all()


def test_sites_that_do_not_match_are_refused() -> None:
    model, guide = pairs(MIXED, MIXED)
    with pytest.raises(ValueError, match=r"got none for 'codes'"):
        SparseELBO(ImplicitMixed()).loss(model, lambda: None)

    def wider() -> None:
        guide()
        pyro.sample("other", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"'other' in the guide alone"):
        SparseELBO(ImplicitMixed()).loss(model, wider)


def test_a_factor_in_the_guide_is_refused() -> None:
    model, guide = pairs(MIXED, MIXED)

    def with_factor() -> None:
        guide()
        pyro.factor("weight", torch.tensor(1.0), has_rsample=True)

    with pytest.raises(NotImplementedError, match=r"factor site 'weight'"):
        SparseELBO(ImplicitMixed()).loss(model, with_factor)


@pytest.mark.parametrize("num_samples", [1, 2])
def test_batch_dimensions_without_a_plate_are_refused(num_samples: int) -> None:
    law = SpikeAndSlab(dist.Laplace(torch.zeros(2), 1.0), 0.5)

    def model() -> None:
        z = pyro.sample("codes", law)
        pyro.sample("obs", dist.Normal(z.sum(-1), 1.0), obs=torch.zeros(()))

    elbo = SparseELBO(ImplicitMixed(), num_samples=num_samples)
    with pytest.raises(ValueError, match=r"site 'codes' but those of its plates.*to_event\(n\)"):
        elbo.loss(model, lambda: pyro.sample("codes", law))


@pytest.mark.parametrize("estimator", [None, ImplicitMixed(), LeaveOneOut()], ids=str)
def test_a_discrete_latent_takes_the_score_function(estimator: Estimator | None) -> None:
    logits = torch.tensor([0.3, -1.0], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0.2, 2.0], dtype=torch.float64)

    def model() -> None:
        with pyro.plate("data", 2):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.2, dtype=torch.float64)))
            pyro.sample("obs", dist.Normal(torch.sin(2 * k), 1.0), obs=y)

    def guide() -> None:
        with pyro.plate("data", 2):
            pyro.sample("k", dist.Bernoulli(logits=logits))

    probs = logits.sigmoid()
    each = [dist.Normal(torch.sin(2 * k * torch.ones_like(y)), 1.0).log_prob(y) for k in (0.0, 1.0)]
    kl = probs * (probs / 0.2).log() + (1 - probs) * ((1 - probs) / 0.8).log()
    exact = ((1 - probs) * each[0] + probs * each[1] - kl).sum()
    (truth,) = torch.autograd.grad(exact, logits)
    found = []
    for _ in range(50):
        loss = SparseELBO(estimator, num_samples=200).differentiable_loss(model, guide)
        found.append(torch.autograd.grad(-loss, logits)[0])
    gradients = torch.stack(found)
    assert ((gradients.mean(0) - truth).abs() < 4 * gradients.std(0) / 50**0.5).all()
    assert (gradients.std(0) / 50**0.5 < 0.05 * truth.abs()).all()


def test_estimators_that_flip_gates_refuse_discrete_latents() -> None:
    def model() -> None:
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("obs", dist.Normal(k, 1.0), obs=torch.zeros(()))

    with pytest.raises(NotImplementedError, match=r"got Bernoulli. Use .*LeaveOneOut\(\)"):
        SparseELBO(DisARM()).loss(model, lambda: pyro.sample("k", dist.Bernoulli(0.5)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"estimator": "implicit"}, TypeError, "estimator to be a Estimator"),
        ({"bound": Exact()}, TypeError, "bound to be a Bound"),
        ({"num_samples": 0}, ValueError, "num_samples >= 1"),
        ({"num_plates": -1}, ValueError, "num_plates >= 0"),
        ({"base_kl": True, "bound": Importance()}, ValueError, "analytic KLs"),
    ],
    ids=["estimator", "bound", "num_samples", "num_plates", "base_kl"],
)
def test_arguments_are_checked(options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        SparseELBO(**options)
