"""Bounds of several draws: unbiased gradients of the right number, in the right order."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_sparse.infer import (
    BestOf,
    Bound,
    ControlVariate,
    DisARM,
    Estimator,
    ImplicitMixed,
    Importance,
    LocalExpectation,
    Mean,
    Renyi,
    SparseELBO,
)
from pyro_sparse.infer.bounds import contributions
from tests.infer.expectations import LAWS, Copies, Law, kl, log_likelihood, product, start

DRAWS = 100_000
BOUNDS = [Mean(sampled_kl=True), BestOf(), Importance(), Renyi(0.5), BestOf(as_published=True)]
ids = [repr(bound) for bound in BOUNDS]


def terms(law: Law, p: dict[str, Tensor], weighted: bool, order: int) -> tuple[Tensor, Tensor]:
    """The term of every value of the codes, and the probability of that value."""
    grid = law.grid(p, order)
    codes, weights, log_density = product(grid)
    fit = log_likelihood(codes, p["weight"], p["log_noise"])
    if not weighted:
        return fit - kl(law, grid), weights
    prior = torch.cartesian_prod(*law.log_prior(grid.codes).T).reshape(len(codes), -1).sum(-1)
    return fit + prior - log_density, weights


def by_hand(bound: Bound, values: Tensor) -> Tensor:
    """The formulas of the papers, over the first dimension."""
    count = len(values)
    if isinstance(bound, Mean):
        return values.sum(0) / count
    if isinstance(bound, BestOf):
        best = values[0]
        for value in values[1:]:
            best = torch.maximum(best, value)
        return best if bound.as_published else best - math.log(count)
    power = 1 - bound.order if isinstance(bound, Renyi) else 1.0
    return ((power * values).exp().sum(0) / count).log() / power


def expected(law: Law, p: dict[str, Tensor], bound: Bound, num_samples: int, order: int) -> Tensor:
    """E of the bound of independent draws: a sum over all their combinations."""
    value, weight = terms(law, p, bound.weighted, order)
    values = torch.cartesian_prod(*[value] * num_samples).reshape(-1, num_samples).T
    weights = torch.cartesian_prod(*[weight] * num_samples).reshape(-1, num_samples).prod(-1)
    return (weights * by_hand(bound, values)).sum()


def sampled(
    law: Law, bound: Bound, num_samples: int, atoms: int, estimator: Estimator | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    copies = Copies(law, DRAWS, atoms)
    elbo = SparseELBO(estimator, bound=bound, num_samples=num_samples)
    loss = elbo.differentiable_loss(copies.model, copies.guide)
    slopes = torch.autograd.grad(loss, list(copies.parameters.values()))
    return -loss.detach() / DRAWS, {
        name: -slope for name, slope in zip(copies.parameters, slopes, strict=True)
    }


def check(
    law: Law,
    bound: Bound,
    num_samples: int,
    *,
    atoms: int,
    order: int,
    estimator: Estimator | None = None,
) -> None:
    p = start(law, atoms)
    value = expected(law, p, bound, num_samples, order)
    exact = torch.autograd.grad(value, list(p.values()))
    mean, slopes = sampled(law, bound, num_samples, atoms, estimator)
    assert abs(float(mean - value.detach())) < 0.02  # four standard errors of a deviation of 1.5
    for slope, truth in zip(slopes.values(), exact, strict=True):
        # 1e-4 for the quadrature: the best of two has kinks where both are equal.
        error = slope.std(0) / math.sqrt(DRAWS) + 1e-4
        assert ((slope.mean(0) - truth) / error).abs().max() < 4


@pytest.mark.parametrize("bound", BOUNDS, ids=ids)
@pytest.mark.parametrize("name", ["spike_laplace", "soft_normal"])
def test_gradients_are_those_of_the_expected_bound(name: str, bound: Bound) -> None:
    check(LAWS[name], bound, 2, atoms=1, order=40)


@pytest.mark.parametrize("bound", [Importance(), Renyi(0.5)], ids=repr)
def test_gradients_of_bounds_of_three_draws(bound: Bound) -> None:
    check(LAWS["spike_laplace"], bound, 3, atoms=1, order=12)


def test_gradients_of_bounds_of_two_codes() -> None:
    check(LAWS["spike_normal"], Importance(), 2, atoms=2, order=5)


def test_a_single_draw_is_the_elbo() -> None:
    for bound in (BestOf(), Importance(), Renyi(0.5)):
        p = start(LAWS["spike_laplace"], 1)
        value = expected(LAWS["spike_laplace"], p, Mean(sampled_kl=True), 1, 40)
        mean, _ = sampled(LAWS["spike_laplace"], bound, 1, 1)
        assert abs(float(mean - value.detach())) < 0.02


@pytest.mark.parametrize("limit", [0.0, 1.5, math.inf])
def test_the_published_best_of_takes_pathwise_draws(limit: float) -> None:
    law = LAWS["spike_laplace"]
    bound = BestOf(as_published=True)
    check(law, bound, 2, atoms=1, order=40, estimator=ImplicitMixed(limit))


def test_bounds_lie_below_the_evidence_in_order() -> None:
    law, p = LAWS["spike_laplace"], start(LAWS["spike_laplace"])
    with torch.no_grad():
        value, weight = terms(law, p, True, 9)
        evidence = float((weight.log() + value).logsumexp(0))
    levels = {}
    for bound in (Mean(sampled_kl=True), BestOf(), Importance(), Renyi(0.5)):
        copies = Copies(law, 20_000)
        elbo = SparseELBO(bound=bound, num_samples=5)
        levels[type(bound)] = -elbo.loss(copies.model, copies.guide) / 20_000
    # Margins of several standard errors: 0.01 each.
    assert levels[BestOf] < levels[Importance] - 0.05
    assert levels[Mean] < levels[Renyi] - 0.05
    assert levels[Renyi] < levels[Importance] - 0.05
    assert levels[Importance] < evidence - 0.05


def test_best_of_as_published_is_no_bound() -> None:
    law = LAWS["spike_laplace"]
    copies = Copies(law, 500)
    for name, value in (("loc", 0.0), ("log_scale", 0.0), ("logits", math.log(3 / 7))):
        copies.parameters[name].data.fill_(value)  # the prior: no KL
    p = {name: value[0] for name, value in copies.parameters.items()}
    with torch.no_grad():
        value, weight = terms(law, p, True, 9)
        evidence = float((weight.log() + value).logsumexp(0))
    levels = {}
    for bound in (BestOf(as_published=True), BestOf()):
        elbo = SparseELBO(bound=bound, num_samples=50)
        levels[bound] = -elbo.loss(copies.model, copies.guide) / 500
    assert levels[BestOf(as_published=True)] > evidence + 0.5
    assert levels[BestOf()] < evidence - 0.5


@pytest.mark.parametrize("bound", BOUNDS, ids=ids)
def test_bounds_agree_with_their_formulas_and_do_not_overflow(bound: Bound) -> None:
    values = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(bound(values), by_hand(bound, values))
    torch.testing.assert_close(bound(values - 2000), bound(values) - 2000)


@pytest.mark.parametrize("bound", BOUNDS, ids=ids)
def test_contributions_leave_one_term_out(bound: Bound) -> None:
    values = torch.randn(4, 3, dtype=torch.float64)
    found = contributions(bound, values)
    for j in range(4):
        others = torch.cat([values[:j], values[j + 1 :]])
        replaced = torch.cat([others, others.mean(0, keepdim=True)])
        torch.testing.assert_close(found[j], by_hand(bound, values) - by_hand(bound, replaced))


# Refusals


@pytest.mark.parametrize("estimator", [ImplicitMixed(), LocalExpectation(), DisARM()], ids=repr)
@pytest.mark.parametrize("bound", [Mean(True), BestOf(), Importance(), Renyi(0.5)], ids=repr)
def test_a_pathwise_draw_may_not_meet_a_sampled_density(estimator: Estimator, bound: Bound) -> None:
    with pytest.raises(ValueError, match=r"LeaveOneOut\(\).*jump at the atom.*Mean\(\)"):
        SparseELBO(estimator, bound=bound)


@pytest.mark.parametrize("estimator", [LocalExpectation(), DisARM(), ControlVariate()], ids=repr)
def test_estimators_of_means_refuse_other_bounds(estimator: Estimator) -> None:
    with pytest.raises(ValueError, match=r"bound=Mean\(\)"):
        SparseELBO(estimator, bound=BestOf(as_published=True))


@pytest.mark.parametrize(
    ("order", "error"),
    [(1, ValueError), (math.inf, ValueError), ("a", TypeError), (True, TypeError)],
)
def test_orders_are_checked(order: object, error: type) -> None:
    with pytest.raises(error, match="order"):
        Renyi(order)  # type: ignore[arg-type]


def test_a_bound_needs_all_latents_in_the_same_plates() -> None:
    def model() -> None:
        with pyro.plate("data", 4, dim=-2):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 3, dim=-1):
                b = pyro.sample("b", dist.Normal(a, 1.0))
                pyro.sample("obs", dist.Normal(b, 1.0), obs=torch.zeros(4, 3))

    def guide() -> None:
        with pyro.plate("data", 4, dim=-2):
            pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 3, dim=-1):
                pyro.sample("b", dist.Normal(0.0, 1.0))

    with pytest.raises(NotImplementedError, match="all latent sites in the same plates"):
        SparseELBO(bound=Importance()).loss(model, guide)
