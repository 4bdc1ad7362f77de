"""Slabs made of tails, against quadrature over the base density that they are cut from."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, special, stats

import pyro_sparse.distributions
from pyro_sparse.distributions.overshoots import LaplaceOvershoot, NormalOvershoot, overshoot
from pyro_sparse.distributions.slabs import (
    cdf,
    log_cdf,
    log_mills_ratio,
    log_survival,
    quantile,
)
from pyro_sparse.distributions.tails import Outside, Tails, as_tails

FAMILIES = {"Normal": (NormalOvershoot, stats.norm), "Laplace": (LaplaceOvershoot, stats.laplace)}
# Locations of the two overshoots and edges of the tails; scale 0.7. None: one-sided, or they meet.
SHAPES = {
    "meeting": (-0.4, -1.1, 0.3, None),
    "location-beyond-the-edge": (1.6, -2.1, 0.0, None),
    "one-sided": (-0.4, None, 0.2, None),
    "one-sided-beyond": (2.5, None, -0.2, None),
    "gap": (0.5, -1.3, 0.9, -0.9),
    "on-the-edge": (0.0, 0.0, 0.0, None),
}
SCALE = 0.7


def double(value):
    return torch.tensor(value, dtype=torch.float64)


class Reference:
    """Density of the tails by scipy, normalised by quadrature."""

    def __init__(self, law, above, below, upper, lower):
        self.law, self.above, self.below, self.upper = law, above, below, upper
        self.lower = upper if lower is None else lower
        self.mass = 1.0
        self.mass = self.expect(lambda z: 1.0)

    def pdf(self, z):
        if z > self.upper:
            return self.law.pdf(z - self.upper, self.above, SCALE) / self.mass
        if self.below is not None and z < self.lower:
            return self.law.pdf(self.lower - z, self.below, SCALE) / self.mass
        return 0.0

    def expect(self, f, high=math.inf):
        """Integral of f against the density up to ``high``."""
        far = 40 * SCALE
        cuts = {self.upper, self.upper + abs(self.above), self.upper + far, self.upper + 1.0}
        cuts |= {self.lower, self.lower - abs(self.below or 0), self.lower - far, self.lower - 1.0}
        cuts = sorted({min(cut, high) for cut in cuts})
        return sum(
            integrate.quad(lambda z: f(z) * self.pdf(z), a, b, epsabs=1e-14, epsrel=1e-12)[0]
            for a, b in zip(cuts, cuts[1:])
        )


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(params=SHAPES)
def pair(request, family):
    """Tails in float64 and their reference."""
    above, below, upper, lower = SHAPES[request.param]
    kind, law = family
    scale = double(SCALE)
    ours = Tails(
        kind(double(above), scale),
        None if below is None else kind(double(below), scale),
        upper=upper,
        lower=lower,
    )
    return ours, Reference(law, above, below, upper, lower)


# The law ------------------------------------------------------------------------------------------


def points(reference):
    grid = reference.upper + np.array([1e-6, 0.1, 0.5, 1.3, 2.9])
    down = reference.lower - np.array([1e-6, 0.1, 0.5, 1.3, 2.9])
    return grid if reference.below is None else np.concatenate([grid, down])


def test_the_density_is_that_of_the_base(pair):
    law, reference = pair
    z = points(reference)
    expected = [math.log(reference.pdf(value)) for value in z]
    # The mass of the reference has an error of quadrature.
    np.testing.assert_allclose(law.log_prob(torch.from_numpy(z)), expected, atol=1e-10)


def test_the_distribution_function_is_the_integral_of_the_density(pair):
    law, reference = pair
    z = points(reference)
    expected = [reference.expect(lambda _: 1.0, high=value) for value in z]
    np.testing.assert_allclose(law.cdf(torch.from_numpy(z)), expected, atol=1e-10)
    np.testing.assert_allclose(cdf(law, torch.from_numpy(z)), expected, atol=1e-10)
    np.testing.assert_allclose(log_cdf(law, torch.from_numpy(z)).exp(), expected, atol=1e-10)
    rest = log_survival(law, torch.from_numpy(z)).exp()
    np.testing.assert_allclose(rest, 1 - np.array(expected), atol=1e-10)


def test_the_mills_ratio_is_the_mass_beyond_over_the_density(pair):
    law, reference = pair
    z = points(reference)
    below = [reference.expect(lambda _: 1.0, high=value) for value in z]
    mass = np.where(z > 0, 1 - np.array(below), below)
    expected = mass / [reference.pdf(value) for value in z]
    found = log_mills_ratio(law, torch.from_numpy(z)).exp()
    # The mass of the far points is small beside the error of quadrature.
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_quantiles_invert_the_distribution_function(pair):
    law, _ = pair
    level = torch.linspace(1e-6, 1 - 1e-6, 101, dtype=torch.float64)
    torch.testing.assert_close(law.cdf(law.icdf(level)), level, rtol=1e-10, atol=1e-12)
    assert bool(law.support.check(law.icdf(level)).all())


def test_moments_and_entropy_agree_with_quadrature(pair):
    law, reference = pair
    mean = reference.expect(lambda z: z)
    assert law.mean.item() == pytest.approx(mean, abs=1e-10)
    variance = reference.expect(lambda z: (z - mean) ** 2)
    assert law.variance.item() == pytest.approx(variance, abs=1e-10)
    entropy = reference.expect(lambda z: -math.log(max(reference.pdf(z), 1e-300)))
    assert law.entropy().item() == pytest.approx(entropy, abs=1e-9)


@pytest.mark.parametrize("argument", [-2.5, -1 / SCALE, -0.6, 0.0, 1e-5, 0.4, 0.7])
def test_the_moment_generating_function_agrees_with_quadrature(pair, argument):
    law, reference = pair
    exists = reference.law is stats.norm or (
        argument < 1 / SCALE and (reference.below is None or argument > -1 / SCALE)
    )
    expected = {True: lambda: reference.expect(lambda z: math.exp(argument * z))}
    value = law.log_mgf(argument).exp().item()
    assert value == pytest.approx(expected.get(exists, lambda: math.inf)(), rel=2e-7)


def test_derivatives_of_the_moment_generating_function_are_the_cumulants(pair):
    law, _ = pair
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(law.log_mgf(t), t, create_graph=True)
    (second,) = torch.autograd.grad(first, t)
    torch.testing.assert_close(first.detach(), law.mean)
    torch.testing.assert_close(second, law.variance)


def test_samples_follow_the_distribution_function(pair):
    law, _ = pair
    draws = law.sample((20_000,))
    # One suite in about a thousand fails on one of these twelve.
    assert stats.kstest(draws.numpy(), lambda z: law.cdf(torch.from_numpy(z)).numpy()).pvalue > 1e-4


@pytest.mark.parametrize("shape", [(), (3,), (2, 1)])
def test_shapes_and_dtypes(family, shape, dtype):
    kind, _ = family
    side = kind(torch.full((1,) * len(shape), -0.5, dtype=dtype), torch.ones(shape, dtype=dtype))
    narrow = Tails(side, side, upper=0.2)
    law = narrow.expand((4, *shape))
    assert law.batch_shape == (4, *shape)
    assert law.event_shape == ()
    draws = law.rsample((5,))
    assert draws.shape == (5, 4, *shape)
    for value in (draws, law.log_prob(draws), law.cdf(draws), law.icdf(law.cdf(draws))):
        assert value.dtype == dtype
        assert value.shape == (5, 4, *shape)
    for value in (law.mean, law.variance, law.entropy(), law.log_mgf(0.1)):
        assert value.dtype == dtype
        assert value.shape == (4, *shape)
    torch.testing.assert_close(law.log_prob(draws), narrow.log_prob(draws))
    one = Tails(side, upper=0.2).expand((4, *shape))
    assert one.below is None
    assert one.sample((5,)).shape == (5, 4, *shape)


def test_the_support_follows_the_edges():
    side = NormalOvershoot(double(-1.0), double(1.0))
    value = double([-2.0, -0.5, 0.5, 2.0])
    assert Tails(side, side).support.check(value).all()
    assert Tails(side, upper=1.0).support.check(value).tolist() == [False, False, False, True]
    gap = Tails(side, side, upper=1.0, lower=-1.0)
    assert gap.support.check(value).tolist() == [True, False, False, True]
    assert "Outside" in repr(gap.support)
    assert gap.log_prob(value[:1]).isfinite().all()
    with pytest.raises(ValueError, match="within the support"):
        gap.log_prob(double(0.5))
    loose = Tails(side, side, upper=1.0, lower=-1.0, validate_args=False)
    assert loose.log_prob(double(0.5)) == -math.inf
    assert isinstance(gap.support, Outside)


def test_edges_that_cross_are_refused():
    side = NormalOvershoot(double(-1.0), double(1.0))
    with pytest.raises(ValueError, match="lower <= upper"):
        Tails(side, side, upper=0.0, lower=1.0)
    with pytest.raises(ValueError, match="below= with lower="):
        Tails(side, upper=0.0, lower=1.0)
    with pytest.raises(ValueError, match="scale"):
        NormalOvershoot(double(-1.0), double(-1.0))


# Gradients ----------------------------------------------------------------------------------------


def smooth(z):
    """A function whose expectation feels location, scale and side."""
    return np.sin(1.3 * z) + 0.3 * z**2


NODES, WEIGHTS = np.polynomial.legendre.leggauss(60)


def expected(law, above, below, upper, scale):
    """By Gauss-Legendre, split at every bend."""
    cuts = {upper, upper + max(above, 0), upper - max(below, 0)}
    cuts |= {upper + sign * far * scale for sign in (1, -1) for far in (1, 3, 6, 10, 20, 35)}
    cuts = np.array(sorted(cuts))
    half, middle = np.diff(cuts)[:, None] / 2, (cuts[1:] + cuts[:-1])[:, None] / 2
    z = middle + half * NODES
    inner = np.where(z > upper, z - upper - above, upper - z - below)
    density = half * WEIGHTS * law.pdf(inner / scale) / scale
    return float((smooth(z) * density).sum() / density.sum())


@pytest.mark.parametrize("values", [(-0.4, -1.1, 0.3, 0.7), (1.2, -1.6, 0.0, 0.5)])
def test_the_pathwise_gradient_is_unbiased(family, values):
    kind, law = family
    num_draws = 40_000
    parameters = [double(value).expand(num_draws).clone().requires_grad_() for value in values]
    above, below, upper, scale = parameters
    z = Tails(kind(above, scale), kind(below, scale), upper=upper).rsample()
    objective = (1.3 * z).sin() + 0.3 * z.square()
    found = torch.autograd.grad(objective.sum(), parameters)
    for i, gradient in enumerate(found):
        shifted = [[v + (j == i) * h for j, v in enumerate(values)] for h in (1e-4, -1e-4)]
        # Central differences: an error of 1e-8.
        truth = (expected(law, *shifted[0]) - expected(law, *shifted[1])) / 2e-4
        error = gradient.std().item() / math.sqrt(num_draws)
        assert abs(gradient.mean().item() - truth) < 4 * error + 1e-7
        assert error < 0.05 * (1 + abs(truth))  # the test has power


def test_the_gradient_is_that_of_the_quantile(family):
    """At a fixed level, against differences of the quantile itself."""
    kind, _ = family
    level = double([0.01, 0.2, 0.55, 0.9, 0.999])

    def code(above, below, upper, scale):
        return Tails(kind(above, scale), kind(below, scale), upper=upper).icdf(level)

    for values in [(-0.4, -1.1, 0.3, 0.7), (1.2, -1.6, 0.1, 0.5), (-30.0, -30.1, 0.0, 1.0)]:
        inputs = [double(value).requires_grad_() for value in values]
        assert torch.autograd.gradcheck(code, inputs, eps=1e-6, atol=1e-5, rtol=1e-5)


def test_quantiles_are_differentiable_in_the_level(family):
    kind, _ = family
    law = Tails(kind(double(0.6), double(0.5)), kind(double(-1.0), double(0.5)), upper=0.2)
    level = double([0.01, 0.1, 0.5, 0.99]).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: quantile(law, u, 1 - u), [level], atol=1e-5)


def test_a_gap_refuses_a_pathwise_draw_across_it(family):
    kind, _ = family
    loc = double(-0.5).requires_grad_()
    side, other = kind(loc, double(1.0)), kind(-1.5 - loc, double(1.0))
    law = Tails(side, other, upper=1.0, lower=-1.0)
    assert not law.has_rsample
    with pytest.raises(NotImplementedError, match="rsample_given_side"):
        law.rsample()


# Tails in float32 ---------------------------------------------------------------------------------

FAR = [-1e4, -300.0, -30.0, -11.5, -3.0, -1.0, 0.0, 2.0, 30.0, 1e4]


def exact_mean(distance):
    """Mean of a unit normal beyond ``distance``: distance + K_1 by a continued fraction."""
    far = 0.0
    for n in range(400, 0, -1):
        far = n / (distance + far)
    return far


@pytest.mark.parametrize("distance", [3.0, 11.5, 100.0, 1e4, 1e8])
def test_moments_of_far_tails(distance):
    side = NormalOvershoot(torch.tensor(-distance), torch.tensor(1.0))
    law = Tails(side, side, upper=torch.tensor(0.0))
    first = exact_mean(distance)
    assert Tails(side).mean.item() == pytest.approx(first, rel=2e-6)
    # E x^2 = 1 - t E x, in terms of which it is K_1 K_2 = K_1 (1 / K_1 - t).
    assert law.variance.item() == pytest.approx(first * (2 / distance), rel=3 / distance**2 + 2e-6)
    assert law.mean.item() == 0


@pytest.mark.parametrize("distance", [0.5, 11.5, 100.0, 1e4])
def test_float32_samples_of_far_tails_are_right(distance):
    side = NormalOvershoot(torch.tensor(-distance), torch.tensor(1.0))
    draws = side.sample((20_000,)).double().numpy()

    def below(x):
        # In float64 erfcx holds the ratio of the two masses to rounding.
        ratio = special.erfcx((distance + x) / math.sqrt(2)) / special.erfcx(
            distance / math.sqrt(2)
        )
        return 1 - ratio * np.exp(-x * x / 2 - distance * x)

    assert stats.kstest(draws, below).pvalue > 1e-4


@pytest.mark.parametrize("distance", [0.5, 2.0, 4.999, 5.001, 6.0, 8.0, 20.0, 1e3, 1e6])
def test_quantiles_of_far_tails_are_right(distance, dtype):
    outer = torch.tensor([1e-7, 1e-4, 0.01, 0.3, 0.7, 0.99, 0.9999], dtype=dtype)
    side = NormalOvershoot(torch.tensor(-distance, dtype=dtype), torch.tensor(1.0, dtype=dtype))
    x = side.quantile(outer, 1 - outer).double().numpy()
    # In float64 erfcx holds the ratio of the two masses to rounding.
    edge = side.loc.double().item() / -math.sqrt(2)
    ratio = special.erfcx(edge + x / math.sqrt(2)) / special.erfcx(edge)
    found = np.log(ratio) - x * x / 2 + side.loc.double().item() * x
    expected = torch.where(outer < 0.5, outer.double().log(), (outer.double() - 1).log1p())
    # In float32 a difference of logarithms is rounded by 1e-7, of a level of 1e-4 in one case.
    rtol, atol = {torch.float32: (2e-6, 1e-6), torch.float64: (1e-12, 1e-14)}[dtype]
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("loc", FAR)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_float32_agrees_with_float64(family, loc, scale):
    kind, _ = family

    def numbers(dtype):
        # From float32, so that both precisions get the same inputs.
        loc_, scale_ = torch.tensor(loc * scale), torch.tensor(scale)
        locs, scale_ = torch.stack([loc_, loc_ - scale_]).to(dtype), scale_.to(dtype)
        side, other = (kind(loc_, scale_) for loc_ in locs)
        law = Tails(side, other)
        level = torch.tensor([0.01, 0.3, 0.7, 0.99], dtype=dtype)
        quantiles = quantile(law, level, 1 - level)
        values = [side.mean, side.variance.sqrt(), law.variance.sqrt(), *quantiles]
        values = [value / scale for value in values]
        values += [side.log_mass, law.entropy() - math.log(scale)]
        return torch.stack([value.double() for value in values])

    found, truth = numbers(torch.float32), numbers(torch.float64)
    # The base itself cannot be drawn more finely than rounding of its location; for a location
    # beyond the edge the weight of the other tail is as uncertain.
    atol = 2e-6 * max(loc, 1.0) if loc >= 0 else 1e-30
    torch.testing.assert_close(found, truth, rtol=5e-5, atol=atol)


@pytest.mark.parametrize("loc", FAR)
def test_gradients_of_draws_agree_with_float64(family, loc):
    kind, _ = family

    def numbers(dtype, apart):
        loc_ = torch.tensor(loc, dtype=dtype, requires_grad=True)
        scale = torch.tensor(1.0, dtype=dtype, requires_grad=True)
        side = kind(loc_, scale)
        law = Tails(side, kind(loc_ - apart, scale) if apart else side)
        draws = law.icdf(torch.tensor([0.01, 0.3, 0.7, 0.99], dtype=dtype))
        rows = [torch.autograd.grad(z, [loc_, scale], retain_graph=True) for z in draws]
        return torch.tensor(rows).double()

    for apart in (0.0, 1.0):
        found, truth = numbers(torch.float32, apart), numbers(torch.float64, apart)
        # The level is rounded as well, and beyond the edge the draw, by 6e-8 of its location.
        atol = 1e-5 * max(loc, 0.0) + 1e-30
        torch.testing.assert_close(found, truth, rtol=2e-4, atol=atol)


@pytest.mark.parametrize("loc", FAR)
def test_float32_draws_and_gradients_are_finite(family, loc):
    kind, _ = family
    loc_, scale = torch.full((1000,), loc, requires_grad=True), torch.ones((), requires_grad=True)
    law = Tails(kind(loc_, scale), kind(loc_ - 1, scale))
    z = law.rsample()
    assert (z != 0).all()
    values = z.sum() + law.log_prob(z.detach()).sum() + law.entropy().sum() + law.mean.sum()
    gradients = torch.autograd.grad(values, [loc_, scale])
    assert z.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)


# Other laws as tails ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "law",
    [
        dist.Normal(double(0.3), double(0.7)),
        dist.Laplace(double(-0.4), double(0.2)),
        dist.Exponential(double(1.7)),
    ],
    ids=["Normal", "Laplace", "Exponential"],
)
def test_plain_laws_are_tails(law):
    tails = as_tails(law)
    draws = law.sample((50,))
    torch.testing.assert_close(tails.log_prob(draws), law.log_prob(draws))
    torch.testing.assert_close(tails.cdf(draws), law.cdf(draws))
    torch.testing.assert_close(tails.mean, law.mean)
    torch.testing.assert_close(tails.variance, law.variance)
    torch.testing.assert_close(tails.entropy(), law.entropy())
    assert as_tails(tails) is tails


def test_other_laws_are_refused_by_name():
    with pytest.raises(NotImplementedError, match=r"Tails, got StudentT"):
        as_tails(dist.StudentT(3.0))
    with pytest.raises(NotImplementedError, match=r"got StudentT. Register an Overshoot") as caught:
        overshoot(dist.StudentT(3.0), torch.zeros(()))
    assert "@pyro_sparse.distributions.overshoot.register(StudentT)" in str(caught.value)
    assert pyro_sparse.distributions.overshoot.register is overshoot.register


def test_two_sides_that_are_one_object_are_two_alike(family):
    kind, _ = family
    loc, scale = double([-1.0, 0.4]), double([0.5, 1.5])
    for edges in ({"upper": 0.3}, {"upper": 1.0, "lower": -0.6}):
        side = kind(loc, scale)
        one = Tails(side, side, **edges).expand((3, 2))
        two = Tails(kind(loc, scale), kind(loc, scale), **edges).expand((3, 2))
        assert one.below is one.above and two.below is not two.above
        z = two.icdf(double([[0.1], [0.6], [0.95]]).expand(3, 2))
        for name in ("mean", "variance", "log_weights"):
            torch.testing.assert_close(getattr(one, name), getattr(two, name))
        torch.testing.assert_close(one.entropy(), two.entropy())
        torch.testing.assert_close(one.log_prob(z), two.log_prob(z))
        torch.testing.assert_close(one.cdf(z), two.cdf(z))
