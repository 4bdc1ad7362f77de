"""A feature that is masked is one that is not there, through everything that takes a mask."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_sparse.diagnostics import khat, loo, to_datatree
from pyro_sparse.dictionaries import Dense
from pyro_sparse.distributions import SpikeAndSlab
from pyro_sparse.guides import StructuredThresholded, Thresholded, UnrolledEncoder, UnrolledFISTA
from pyro_sparse.infer import (
    Exact,
    LeaveOneOut,
    SparseELBO,
    enumerate_posterior,
    gibbs,
    log_weights,
)
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import Unrolled, coordinate_ascent, solve
from pyro_sparse.solvers.problem import Problem

ATOMS, FEATURES, DATA = 4, 6, 5
SEEN = torch.tensor([True, False, True, True, False, True])
ONE = torch.tensor(1.0).double()
SLAB = SpikeAndSlab(dist.Normal(0 * ONE, ONE), 0.3 * ONE)
LAPLACE = dist.Laplace(0.0, 0.5)


class World:
    """Everything on all features, or on the observed ones alone."""

    def __init__(self, seen: Tensor, scale: float = 0.5) -> None:
        torch.manual_seed(0)
        atoms, y = torch.randn(ATOMS, FEATURES).double(), torch.randn(DATA, FEATURES).double()
        self.y = y[:, seen]
        self.dictionary = Dense(ATOMS, int(seen.sum()), atoms=atoms[:, seen], unit_norm=False)
        self.likelihood = Gaussian(torch.tensor(scale).double())
        self.model = SparseCoding(self.dictionary, self.likelihood, SLAB)
        self.lasso = SparseCoding(self.dictionary, self.likelihood, LAPLACE)

    def encoder(self) -> UnrolledEncoder:
        # One step bound for both: that of all features is larger.
        solver = Unrolled(self.dictionary, self.likelihood, num_steps=6, lipschitz=40.0)
        return UnrolledEncoder(solver, LAPLACE, init_probs=0.3)

    def thresholded(self) -> Thresholded:
        return Thresholded(self.encoder())

    def structured(self) -> StructuredThresholded:
        torch.manual_seed(1)
        return StructuredThresholded(self.encoder(), 0.1 * torch.eye(ATOMS).double())

    def unrolled(self) -> UnrolledFISTA:
        return UnrolledFISTA(self.dictionary, self.likelihood, LAPLACE, num_steps=6, lipschitz=40.0)


def elbo(world: World, guide: Any, model: Any, objective: SparseELBO, given: dict) -> Tensor:
    """Loss, and its gradients by every parameter, of the observed features."""
    torch.manual_seed(2)
    loss = objective.differentiable_loss(model, guide, world.y, 20, **given)
    named = {**dict(model.named_parameters()), **dict(guide.named_parameters())}
    slopes = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    parts = [loss.reshape(1)]
    for slope in slopes:
        if slope is not None:
            seen = SEEN if slope.shape == (ATOMS, FEATURES) else slice(None)
            parts.append((slope[:, seen] if slope.dim() == 2 else slope).flatten())
    return torch.cat(parts)


def tree(world: World, given: dict, group: str) -> np.ndarray:
    found = to_datatree(world.model, world.thresholded(), world.y, num_samples=30, **given)
    return np.asarray(found[group]["codes" if group == "posterior" else "obs"])


def parts(world: World) -> tuple[Any, ...]:
    return world.y, world.dictionary, SLAB, world.likelihood


CALLS: dict[str, Callable[[World, dict], Any]] = {
    "log-density": lambda w, m: poutine.trace(
        poutine.condition(w.model, {"codes": torch.ones(DATA, ATOMS).double()})
    ).get_trace(w.y, 20, **m).log_prob_sum(),
    "unrolled": lambda w, m: w.unrolled().encode(w.y, **m),
    "thresholded": lambda w, m: w.thresholded().posterior(w.y, **m).mean,
    "thresholded, active": lambda w, m: w.thresholded().posterior(w.y, **m).prob_active,
    "unrolled, ELBO": lambda w, m: elbo(w, w.unrolled(), w.lasso, SparseELBO(), m),
    "exact ELBO": lambda w, m: elbo(w, w.thresholded(), w.model, SparseELBO(Exact()), m),
    "sampled ELBO": lambda w, m: elbo(
        w, w.thresholded(), w.model, SparseELBO(LeaveOneOut(), num_samples=4), m
    ),
    "structured ELBO": lambda w, m: elbo(w, w.structured(), w.model, SparseELBO(), m),
    "log-weights": lambda w, m: log_weights(
        w.model, w.thresholded(), w.y, num_samples=30, **m
    ).local,
    "k-hat": lambda w, m: khat(
        log_weights(w.model, w.thresholded(), w.y, num_samples=200, **m).local
    ),
    "log-likelihood": lambda w, m: tree(w, m, "log_likelihood"),
    "posterior": lambda w, m: tree(w, m, "posterior"),
    "enumeration": lambda w, m: enumerate_posterior(*parts(w), **m).log_evidence,
    "coordinate ascent": lambda w, m: coordinate_ascent(*parts(w), **m).elbo,
    "solve": lambda w, m: solve(
        w.y, w.dictionary, LAPLACE, likelihood=w.likelihood, tol=1e-13, **m
    ).codes,
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("filler", [0.0, 1e6, torch.nan], ids=["zero", "huge", "nan"])
def test_a_masked_feature_is_one_that_is_not_there(call: str, filler: float) -> None:
    whole, part = World(torch.ones(FEATURES, dtype=torch.bool)), World(SEEN)
    whole.y = torch.where(SEEN, whole.y, filler)
    found = torch.as_tensor(CALLS[call](whole, {"mask": SEEN}))
    expected = torch.as_tensor(CALLS[call](part, {}))
    assert expected.isfinite().all()
    # The same algebra in another order, in float64; an iteration stops at a gap of 1e-13.
    torch.testing.assert_close(found, expected, rtol=1e-6 if call == "solve" else 1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["thresholded", "structured"])
def test_a_datum_without_an_observed_sample_has_its_prior_back(name: str) -> None:
    world = World(torch.ones(FEATURES, dtype=torch.bool))
    guide, hidden = getattr(world, name)(), torch.full_like(world.y, torch.nan)
    mask = torch.zeros_like(hidden, dtype=torch.bool)
    # Guide and prior are one law: every weight is 1 and the bound is tight at zero.
    weights = log_weights(world.model, guide, hidden, num_samples=50, mask=mask)
    torch.testing.assert_close(weights.local, torch.zeros(50, DATA).double(), rtol=0, atol=1e-12)
    assert SparseELBO().loss(world.model, guide, hidden, mask=mask) == pytest.approx(0, abs=1e-12)


def test_exact_references_have_the_prior_back() -> None:
    world = World(torch.ones(FEATURES, dtype=torch.bool))
    hidden = torch.full_like(world.y, torch.nan)
    mask = torch.zeros_like(hidden, dtype=torch.bool)
    found = enumerate_posterior(hidden, *parts(world)[1:], mask=mask)
    torch.testing.assert_close(found.log_evidence, torch.zeros(DATA).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(found.prob_active, torch.full((DATA, ATOMS), 0.3).double())
    draws = gibbs(hidden, *parts(world)[1:], mask=mask, num_samples=400, num_chains=4).codes
    active = (draws != 0).double().mean()
    # Draws of the prior are independent: 4 * 400 * 5 * 4 of them, four standard errors.
    assert float(active) == pytest.approx(0.3, abs=4 * (0.21 / 32_000) ** 0.5)


def test_a_masked_subsample_is_the_masked_whole_in_expectation() -> None:
    """Every minibatch of two of the five data, in turn: their mean is the objective itself."""
    world = World(torch.ones(FEATURES, dtype=torch.bool))
    mask = torch.rand(world.y.shape) < 0.6
    y, guide = torch.where(mask, world.y, torch.nan), world.thresholded()
    objective = SparseELBO(Exact())
    whole = objective.loss(world.model, guide, y, mask=mask)
    pairs = torch.combinations(torch.arange(DATA), 2)
    parts = [objective.loss(world.model, guide, y[i], DATA, mask=mask[i]) for i in pairs]
    assert np.mean(parts) == pytest.approx(whole, rel=1e-12)


def test_missing_samples_are_predicted_by_the_law_that_the_observed_ones_have() -> None:
    """In-painting: draws at masked samples have the moments of the exact posterior predictive."""
    world = World(torch.ones(FEATURES, dtype=torch.bool))
    y = torch.where(SEEN, world.y, torch.nan)[:1]
    exact = enumerate_posterior(y, *parts(world)[1:], mask=SEEN)

    class Guide(pyro.nn.PyroModule):
        def forward(self, y: Tensor, num_data: int | None = None, mask: Any = None) -> None:
            with pyro.plate("data", num_data or len(y)):
                pyro.sample("codes", SLAB.expand([ATOMS]).to_event(1))

    found = to_datatree(world.model, Guide(), y, num_samples=100_000, mask=SEEN)
    log_weight = np.asarray(found["sample_stats"]["log_weight"])[0, :, 0]
    weight = np.exp(log_weight - log_weight.max())
    drawn = np.asarray(found["posterior_predictive"]["obs"])[0, :, 0]
    mean = weight @ drawn / weight.sum()
    error = np.sqrt((weight**2) @ (drawn - mean) ** 2) / weight.sum()
    expected = (exact.mean @ world.dictionary.atoms.detach())[0].numpy()
    assert (np.abs(mean - expected) < 4 * error)[~SEEN.numpy()].all()
    assert (error[~SEEN.numpy()] < 0.1).all()


def test_what_was_not_observed_is_no_observed_data() -> None:
    world = World(torch.ones(FEATURES, dtype=torch.bool))
    found = to_datatree(world.model, world.thresholded(), world.y, num_samples=3, mask=SEEN)
    values = np.asarray(found["observed_data"]["obs"])
    np.testing.assert_array_equal(np.isnan(values), np.broadcast_to(~SEEN.numpy(), values.shape))
    np.testing.assert_array_equal(values[:, SEEN], world.y[:, SEEN])


def test_loo_counts_observed_samples_alone() -> None:
    noise = 3.0  # so much that the untrained guide is near the posterior
    whole, part = World(torch.ones(FEATURES, dtype=torch.bool), noise), World(SEEN, noise)
    found = [
        loo(to_datatree(w.model, w.thresholded(), w.y, num_samples=5000, **given))
        for w, given in ((whole, {"mask": SEEN}), (part, {}))
    ]
    assert float(found[0].elpd) == pytest.approx(float(found[1].elpd), rel=1e-9)


class Counting(Gaussian):
    """A residual with an inverse link that overflows, as that of counts does."""

    def residual(self, predictor: Tensor, y: Tensor) -> Tensor:
        return y - predictor.exp()


def test_what_no_datum_holds_down_may_overflow_where_it_is_masked() -> None:
    dictionary = Dense(1, 2, atoms=torch.tensor([[1.0, 1e4]]), unit_norm=False)
    mask, codes = torch.tensor([[True, False]]), torch.ones(1, 1)
    bound = dictionary.bind()
    law = LAPLACE.expand([1]).to_event(1)
    y = torch.tensor([[2.0, 0.0]])
    score = Problem(y, bound, bound, Counting(1.0), law, 1, mask).score(bound.forward(codes))
    torch.testing.assert_close(score, torch.tensor([[2.0 - np.e, 0.0]]), check_dtype=False)
    score.sum().backward()
    slope = dictionary.atoms.grad
    torch.testing.assert_close(slope, torch.tensor([[-np.e, 0.0]]), check_dtype=False)
