import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro.distributions import TorchDistribution, constraints

from pyro_sparse.distributions import (
    Conjugate,
    conjugate,
    penalty,
    prox,
    register_conjugate,
    register_prox,
)


def double(value):
    return torch.tensor(value, dtype=torch.float64)


# Each prior beside scipy's law of the same name, where its density is positive, and its mode.
CASES = {
    "laplace": (dist.Laplace(double(0.0), double(0.7)), scipy.stats.laplace(0.0, 0.7), -60.0),
    "laplace_loc": (dist.Laplace(double(1.3), double(0.4)), scipy.stats.laplace(1.3, 0.4), -60.0),
    "exponential": (dist.Exponential(double(1.7)), scipy.stats.expon(scale=1 / 1.7), 0.0),
    "normal": (dist.Normal(double(0.0), double(1.5)), scipy.stats.norm(0.0, 1.5), -60.0),
    "normal_loc": (dist.Normal(double(-0.8), double(0.6)), scipy.stats.norm(-0.8, 0.6), -60.0),
}
MODES = {"laplace": 0.0, "laplace_loc": 1.3, "exponential": 0.0, "normal": 0.0, "normal_loc": -0.8}

cases = pytest.mark.parametrize("name", CASES)


def scipy_penalty(name, codes):
    _, law, _ = CASES[name]
    return law.logpdf(MODES[name]) - law.logpdf(codes)


@cases
@given(value=st.floats(-8, 8), step=st.floats(0, 4))
def test_prox_beats_a_grid_search_of_its_objective(name, value, step):
    prior, law, lowest = CASES[name]

    def objective(codes):
        return -step * law.logpdf(codes) + (codes - value) ** 2 / 2

    grid = np.linspace(max(lowest, -10.0), 10.0, 4001)
    found = prox(prior, double(value), double(step)).numpy()
    # Strongly convex: an objective no higher than the grid's is a code within one spacing.
    assert objective(found) <= objective(grid).min() + 1e-12
    assert abs(found - grid[objective(grid).argmin()]) <= grid[1] - grid[0]


@pytest.mark.parametrize("name", ["laplace", "exponential"])
def test_prox_makes_exact_zeros(name):
    small = torch.linspace(0.0, 0.5, 11, dtype=torch.float64)
    assert (prox(CASES[name][0], small, 1.0) == 0).all()


def test_prox_of_a_laplace_stays_exactly_at_its_location():
    # Codes within the threshold of a location other than zero come to rest there.
    assert (prox(CASES["laplace_loc"][0], torch.linspace(1.0, 1.6, 7).double(), 1.0) == 1.3).all()


@pytest.mark.parametrize("shape", [(), (3,), (2, 1)])
@pytest.mark.parametrize("kind", [dist.Laplace, dist.Exponential, dist.Normal])
def test_prox_and_conjugate_look_through_wrappers(kind, shape):
    arguments = (double(2.0),) if kind is dist.Exponential else (double(0.0), double(0.5))
    plain = kind(*arguments)
    full = plain.expand((*shape, 4))
    codes = torch.randn(*shape, 4, dtype=torch.float64)
    wrapped = [
        full,
        full.to_event(1),
        full.to_event(len(full.batch_shape)),
        dist.Independent(dist.Independent(full, 0), 1),
    ]
    expected = prox(plain, codes, 0.3)
    for law in wrapped:
        torch.testing.assert_close(prox(law, codes, 0.3), expected, rtol=0, atol=0)
        slopes = 0.9 * codes.tanh()
        values = conjugate(law).value(slopes)
        torch.testing.assert_close(values, conjugate(plain).value(slopes))


def test_prox_broadcasts_a_threshold_for_each_atom():
    prior = dist.Laplace(0.0, torch.tensor([1.0, 0.5])).to_event(1)
    found = prox(prior, torch.full((3, 2), 4.0), torch.tensor([[1.0], [2.0], [0.0]]))
    assert found.tolist() == [[3.0, 2.0], [2.0, 0.0], [4.0, 4.0]]


@cases
def test_penalty_is_the_log_density_below_its_mode(name):
    prior, _, lowest = CASES[name]
    codes = np.linspace(max(lowest, -5.0), 5.0, 101)
    found = penalty(prior, torch.from_numpy(codes))
    np.testing.assert_allclose(found, scipy_penalty(name, codes), rtol=1e-12, atol=1e-12)


def test_penalty_sums_over_event_dimensions_alone():
    codes = torch.randn(5, 3, 4, dtype=torch.float64)
    prior = dist.Laplace(double(0.0), double(0.5)).expand((3, 4))
    expected = 2 * codes.abs()
    assert penalty(prior.to_event(2), codes).shape == (5,)
    torch.testing.assert_close(penalty(prior.to_event(2), codes), expected.sum((1, 2)))
    torch.testing.assert_close(penalty(prior.to_event(1), codes), expected.sum(2))


def test_penalty_is_infinite_outside_the_support():
    prior = dist.Exponential(double(2.0))
    assert penalty(prior, double([-1e-9, 0.0, 1.0])).tolist() == [torch.inf, 0.0, 2.0]


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e6])
def test_penalty_keeps_its_relative_accuracy_in_any_unit(size):
    # As a difference of log-densities it would lose log(scale) times the machine precision.
    codes = size * torch.randn(100, dtype=torch.float64)
    laplace = dist.Laplace(double(0.0), double(1 / size)).expand((100,)).to_event(1)
    expected = (codes.abs() * size).sum()
    torch.testing.assert_close(penalty(laplace, codes), expected, rtol=1e-13, atol=0)
    normal = dist.Normal(double(0.0), double(1.0)).expand((100,)).to_event(1)
    expected = (codes.square() / 2).sum()
    torch.testing.assert_close(penalty(normal, codes), expected, rtol=1e-13, atol=0)
    exponential = dist.Exponential(double(size)).expand((100,)).to_event(1)
    expected = (codes.abs() * size).sum()
    torch.testing.assert_close(penalty(exponential, codes.abs()), expected, rtol=1e-13, atol=0)


@cases
def test_conjugate_is_the_supremum_over_a_grid(name):
    prior, _, lowest = CASES[name]
    found = conjugate(prior)
    lower, upper = float(found.lower.clamp(min=-4.0)), float(found.upper.clamp(max=4.0))
    slopes = torch.linspace(lower, upper, 41, dtype=torch.float64)
    grid = np.arange(1000 * lowest, 60_000) / 1000  # holds every mode
    supremum = (np.outer(slopes, grid) - scipy_penalty(name, grid)).max(1)
    # A quadratic's grid maximum is short by at most spacing**2 / (8 scale**2) < 4e-7.
    np.testing.assert_allclose(found.value(slopes), supremum, atol=1e-6)
    assert (found.value(slopes).numpy() >= supremum - 1e-12).all()


@pytest.mark.parametrize("name", ["laplace", "laplace_loc", "exponential"])
def test_conjugate_is_finite_up_to_its_bounds_and_no_further(name):
    prior, _, lowest = CASES[name]
    found = conjugate(prior)

    def growth(slope):
        near, far = np.arange(10 * lowest, 600) / 10, np.arange(200 * lowest, 12_000) / 10
        return [np.max(slope * z - scipy_penalty(name, z)) for z in (near, far)]

    upper = float(found.upper)
    inside, outside = growth(0.999 * upper), growth(1.01 * upper)
    assert inside[1] - inside[0] == pytest.approx(0.0, abs=1e-9)
    assert outside[1] - outside[0] > 1.0


@cases
def test_fenchel_young_holds_with_equality_at_the_prox(name):
    # z = prox(u) with step 1 says that u - z is a slope of the penalty at z.
    prior, _, lowest = CASES[name]
    values = torch.linspace(-4.0, 4.0, 81, dtype=torch.float64)
    codes = prox(prior, values, 1.0)
    slopes = values - codes
    bounds = conjugate(prior)
    assert (slopes <= bounds.upper + 1e-12).all()
    assert (slopes >= bounds.lower - 1e-12).all()
    g = torch.from_numpy(scipy_penalty(name, codes.numpy()))
    torch.testing.assert_close(g + bounds.value(slopes), codes * slopes, rtol=0, atol=1e-12)
    others = np.linspace(max(lowest, -5.0), 5.0, 101)
    excess = (
        scipy_penalty(name, others)[:, None]
        + bounds.value(slopes).numpy()
        - np.outer(others, slopes)
    )
    assert excess.min() >= -1e-12


class ElasticNet(TorchDistribution):
    """Without a normalising constant: a solver does not ask for it."""

    arg_constraints = {}
    support = constraints.real

    def __init__(self, rate, precision):
        self.rate, self.precision = torch.as_tensor(rate), torch.as_tensor(precision)
        super().__init__(self.rate.shape, validate_args=False)

    @property
    def mode(self):
        return torch.zeros_like(self.rate)

    def log_prob(self, value):
        return -self.rate * value.abs() - self.precision * value.square() / 2


def test_a_users_own_prior_is_registered_in_a_few_lines_and_inherited():
    class Mine(ElasticNet):
        pass

    class Heir(Mine):
        pass

    with pytest.raises(NotImplementedError, match="No proximal step is known for Mine"):
        prox(Mine(1.0, 0.5), torch.ones(3), 1.0)
    with pytest.raises(NotImplementedError, match="No conjugate is known for Mine"):
        conjugate(Mine(1.0, 0.5))

    @register_prox(Mine)
    def _(prior, value, step):
        kept = (value.abs() - step * prior.rate).relu()
        return value.sign() * kept / (1 + step * prior.precision)

    @register_conjugate(Mine)
    def _(prior):
        bound = torch.full_like(prior.rate, torch.inf)
        return Conjugate(
            -bound, bound, lambda u: (u.abs() - prior.rate).relu().square() / 2 / prior.precision
        )

    for law in (Heir(1.0, 0.5), Heir(1.0, 0.5).expand((3,)).to_event(1)):
        assert prox(law, torch.tensor([4.0, -0.5, -2.5]), 1.0).tolist() == [2.0, 0.0, -1.0]
        assert conjugate(law).value(torch.tensor([0.5, 2.0])).tolist() == [0.0, 1.0]
        assert penalty(law, torch.tensor([2.0, 0.0, 0.0])).sum() == 3.0


def test_a_later_registration_replaces_the_earlier_one():
    class Own(dist.Laplace):
        pass

    register_prox(Own)(lambda prior, value, step: value)
    register_prox(Own)(lambda prior, value, step: -value)
    assert prox(Own(0.0, 1.0), torch.tensor(2.0), 1.0) == -2.0


@pytest.mark.parametrize("law", [dist.Gamma(1.0, 1.0), dist.Gamma(1.0, 1.0).expand((3,)), 3])
def test_an_unregistered_prior_is_named(law):
    with pytest.raises(NotImplementedError, match="known for (Gamma|int).*register_prox"):
        prox(law, torch.ones(3), 1.0)
    with pytest.raises(NotImplementedError, match="(?s)known for (Gamma|int).*register_conjugate"):
        conjugate(law)


def test_a_masked_prior_is_refused_rather_than_looked_through() -> None:
    prior = dist.Laplace(torch.zeros(3), 1.0).mask(torch.tensor([True, False, True]))
    with pytest.raises(NotImplementedError, match="MaskedDistribution"):
        prox(prior, torch.full((3,), 3.0), 1.0)
    with pytest.raises(NotImplementedError, match="MaskedDistribution"):
        conjugate(prior)
