"""Laws of known signs, groups and known support: densities, draws, proxes, duals, divergences."""

import copy
import math
from functools import partial

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from pyro.distributions import Independent
from torch.distributions import biject_to, kl_divergence

from pyro_sparse.distributions import (
    GroupLaplace,
    KnownSupport,
    SignedLaplace,
    SpikeAndSlab,
    codes_prior,
    conjugate,
    match,
    penalty,
    prox,
    rate_statistic,
    restrict,
)

double = partial(torch.tensor, dtype=torch.float64)
SIGNS = double([1.0, 0.0, -1.0])
SCIPY = {
    1: scipy.stats.expon(scale=1 / 1.7),
    0: scipy.stats.laplace(scale=1 / 1.7),
    -1: None,  # the mirror image of the first
}
ACTIVE = torch.tensor([True, False, True])


def signed(rate=1.7):
    return SignedLaplace(double(rate), SIGNS)


def groups(**options):
    return GroupLaplace(double([0.7, 2.0]), (4,), **({"group": (2,)} | options))


LAWS = {
    "signed": signed,
    "group": groups,
    "one-sided group": partial(groups, one_sided=True),
    "known": lambda: KnownSupport(signed(), ACTIVE),
    "known groups": lambda: KnownSupport(GroupLaplace(double([[1.0], [2.0], [3.0]]), (2,)), ACTIVE),
}
laws = pytest.mark.parametrize("name", LAWS)


# Densities ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, 0, -1])
def test_a_signed_laplace_is_scipys_law_of_its_sign(sign):
    law, values = SignedLaplace(double(1.7), double(sign)), np.linspace(-4, 4, 83)
    known, mirror = (SCIPY[1], -1) if sign == -1 else (SCIPY[sign], 1)
    inside = torch.from_numpy(values[values * sign >= 0])
    np.testing.assert_allclose(law.log_prob(inside), known.logpdf(mirror * inside), rtol=1e-13)
    below = known.cdf(values) if mirror == 1 else known.sf(-values)
    np.testing.assert_allclose(law.cdf(torch.from_numpy(values)), below, rtol=1e-12, atol=1e-15)
    levels = torch.linspace(0.01, 0.99, 23, dtype=torch.float64)
    np.testing.assert_allclose(law.cdf(law.icdf(levels)), levels, rtol=1e-12)
    assert float(law.mean) == pytest.approx(mirror * known.mean())
    assert float(law.variance) == pytest.approx(known.var())
    assert float(law.entropy()) == pytest.approx(known.entropy())


@pytest.mark.parametrize("sign", [1, -1])
def test_the_wrong_sign_has_no_density(sign):
    wrong = double(-3.0 * sign)
    assert SignedLaplace(1.7, sign, validate_args=False).log_prob(wrong) == -torch.inf
    with pytest.raises(ValueError, match=r"within the support \(Signed"):
        SignedLaplace(1.7, sign, validate_args=True).log_prob(wrong)


@pytest.mark.parametrize("one_sided", [False, True])
def test_a_group_laplace_integrates_to_one_in_one_and_two_dimensions(one_sided):
    lowest = 0.0 if one_sided else -np.inf
    law = GroupLaplace(double(1.3), (1,), one_sided=one_sided)
    total, _ = scipy.integrate.quad(
        lambda x: law.log_prob(double([x])).exp().item(), lowest, np.inf
    )
    assert total == pytest.approx(1.0, abs=1e-7)
    plane = GroupLaplace(double(1.3), (2,), one_sided=one_sided)
    grid = torch.linspace(0.0 if one_sided else -16.0, 16.0, 801, dtype=torch.float64)
    density = plane.log_prob(torch.cartesian_prod(grid, grid)).exp().reshape(801, 801).numpy()
    mass = scipy.integrate.trapezoid(scipy.integrate.trapezoid(density, grid), grid)
    assert mass == pytest.approx(1.0, abs=1e-3)  # the kink at zero, on a grid of 0.04


@pytest.mark.parametrize("d", [1, 2, 3, 7])
def test_the_normaliser_is_the_integral_in_polar_coordinates(d):
    sphere = 2 * math.pi ** (d / 2) / scipy.special.gamma(d / 2)
    radial, _ = scipy.integrate.quad(lambda r: r ** (d - 1) * math.exp(-1.3 * r), 0, np.inf)
    law = GroupLaplace(double(1.3), (d,))
    assert float(law.log_prob(double([0.0] * d))) == pytest.approx(-math.log(sphere * radial))
    one_sided = GroupLaplace(double(1.3), (d,), one_sided=True)
    assert float(one_sided.log_prob(double([0.0] * d))) == pytest.approx(
        d * math.log(2) - math.log(sphere * radial)
    )


def test_groups_of_one_code_are_a_laplace():
    codes = torch.randn(5, 4, dtype=torch.float64)
    law = GroupLaplace(double(1.3), (4,), group=(1,))
    laplace = dist.Laplace(double(0.0), double(1 / 1.3)).expand((4,)).to_event(1)
    torch.testing.assert_close(law.log_prob(codes), laplace.log_prob(codes))
    torch.testing.assert_close(prox(law, codes, 0.4), prox(laplace, codes, 0.4))


@laws
def test_draws_have_the_moments_and_the_entropy(name):
    law, size = LAWS[name](), 40_000
    draws = law.rsample((size,))
    assert draws.shape == (size, *law.batch_shape, *law.event_shape)
    assert law.support.check(draws).all()
    # Five standard errors; the kurtosis of a Laplace is 6, of a group's code below that.
    error = 5 * (law.variance / size).sqrt()
    assert ((draws.mean(0) - law.mean).abs() <= error).all()
    assert ((draws.var(0) - law.variance).abs() <= 5 * law.variance * (8 / size) ** 0.5).all()
    surprise = -law.log_prob(draws)
    error = 5 * surprise.std(0) / size**0.5
    assert ((surprise.mean(0) - law.entropy()).abs() <= error + 1e-12).all()


def test_a_groups_length_is_gamma_and_its_direction_uniform():
    law = GroupLaplace(double(2.0), (3,))
    draws = law.rsample((4000,))
    lengths = law.lengths(draws)[:, 0]
    assert scipy.stats.kstest(lengths, scipy.stats.gamma(3, scale=0.5).cdf).pvalue > 1e-4
    height = draws[:, 1] / lengths  # of a uniform direction in space: uniform (Archimedes)
    assert scipy.stats.kstest(height, scipy.stats.uniform(-1, 2).cdf).pvalue > 1e-4


@laws
def test_expand_keeps_the_law(name):
    law = LAWS[name]()
    wide = law.expand((5, *law.batch_shape))
    codes = law.sample((5,))
    assert wide.event_shape == law.event_shape
    torch.testing.assert_close(wide.log_prob(codes), law.log_prob(codes))
    torch.testing.assert_close(prox(wide, codes + 0.3, 0.5), prox(law, codes + 0.3, 0.5))
    assert wide.rsample().shape == codes.shape


@laws
def test_pathwise_draws_have_the_gradient_of_their_expectation(name):
    """E|z| of codes is proportional to one over the rate; so is every single draw."""
    factor = double(1.0).requires_grad_()
    made = {
        "signed": lambda: SignedLaplace(1.7 * factor, SIGNS),
        "group": lambda: GroupLaplace(1.7 * factor, (4,), group=(2,)),
        "one-sided group": lambda: GroupLaplace(1.7 * factor, (4,), one_sided=True),
        "known": lambda: KnownSupport(SignedLaplace(1.7 * factor, SIGNS), ACTIVE),
        "known groups": lambda: KnownSupport(GroupLaplace(1.7 * factor, (2,)), ACTIVE),
    }[name]()
    draws = made.rsample((3,))
    (gradient,) = torch.autograd.grad(draws.abs().sum(), factor)
    torch.testing.assert_close(gradient, -draws.detach().abs().sum())


def test_known_support_is_a_point_mass_outside():
    base = dist.Normal(double(0.5), double(2.0))
    law = KnownSupport(base, ACTIVE, validate_args=False)
    values = double([0.3, 0.0, 0.0])
    assert law.log_prob(values).tolist() == [
        base.log_prob(values[0]),
        0.0,
        base.log_prob(values[2]),
    ]
    assert law.log_prob(double([0.3, 0.1, 0.0]))[1] == -torch.inf
    assert penalty(law, double([0.5, 0.1, 0.5])).tolist() == [0.0, torch.inf, 0.0]
    assert (law.sample((7,))[:, 1] == 0).all() and (law.sample((7,))[:, 0] != 0).all()
    with pytest.raises(ValueError, match="within the support"):
        KnownSupport(base, ACTIVE, validate_args=True).log_prob(double([0.3, 0.1, 0.0]))


def test_no_nan_comes_back_from_outside_the_support():
    values = double([0.5, 0.0, 0.7]).requires_grad_()
    law = KnownSupport(dist.Gamma(double(0.5), double(1.0)), ACTIVE)  # infinite at zero
    (gradient,) = torch.autograd.grad(law.log_prob(values).sum(), values)
    assert gradient.isfinite().all() and gradient[1] == 0


# Proxes, penalties, conjugates --------------------------------------------------------------------


@laws
def test_the_penalty_is_the_log_density_below_its_mode(name):
    law = LAWS[name]()
    codes = law.sample((20,))
    expected = law.log_prob(torch.zeros_like(codes)) - law.log_prob(codes)
    torch.testing.assert_close(penalty(law, codes), expected, rtol=1e-12, atol=1e-12)


@laws
@pytest.mark.parametrize("step", [0.0, 0.3, 1.5])
def test_the_prox_beats_every_other_point(name, step):
    law = LAWS[name]()
    values = 1.5 * torch.randn(40, *law.batch_shape, *law.event_shape, dtype=torch.float64)

    def objective(codes):
        terms = penalty(law, codes)
        total = terms.flatten(1).sum(1) if terms.dim() > 1 else terms
        total = torch.where(total.isinf(), total, step * total)
        return total + (codes - values).square().flatten(1).sum(1) / 2

    found = prox(law, values, double(step))
    best = objective(found)
    assert best.isfinite().all()
    for size in (1e-3, 1e-1, 1.0):
        for _ in range(40):
            other = restrict(law, found + size * torch.randn_like(found))
            assert (objective(other) >= best - 1e-12).all()
    torch.testing.assert_close(prox(law, values, 0.0), restrict(law, values))


def test_a_group_prox_is_scipys_minimum():
    law = groups(one_sided=True)
    value, step = double([1.4, -0.2, 0.9, 2.1]), 0.6
    rate = law.rate.numpy()

    def objective(z):
        lengths = [np.hypot(z[0], z[1]), np.hypot(z[2], z[3])]
        return step * (rate * lengths).sum() + ((z - value.numpy()) ** 2).sum() / 2

    found = scipy.optimize.minimize(
        objective, np.ones(4), bounds=[(0, None)] * 4, tol=1e-14, options={"maxiter": 1000}
    )
    np.testing.assert_allclose(prox(law, value, step), found.x, atol=2e-6)


@laws
def test_the_prox_has_the_gradient_of_finite_differences(name):
    law = LAWS[name]()
    values = (
        2 * torch.randn(3, *law.batch_shape, *law.event_shape, dtype=torch.float64)
    ).requires_grad_()
    step = double(0.31).requires_grad_()
    assert torch.autograd.gradcheck(lambda u, t: prox(law, u, t), (values, step))
    inside = law.sample((3,)).requires_grad_()
    (gradient,) = torch.autograd.grad(law.log_prob(inside).sum(), inside)
    assert gradient.isfinite().all()


def test_densities_have_the_gradient_of_finite_differences():
    codes = double([[0.4, -0.3, -1.0], [2.0, 0.7, -0.1]]).requires_grad_()
    rate = double([0.7, 1.0, 2.0]).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, r: SignedLaplace(r, SIGNS).log_prob(z), (codes, rate))
    pairs = torch.randn(3, 4, dtype=torch.float64).requires_grad_()
    rate = double([0.7, 1.0]).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z, r: GroupLaplace(r, (4,), group=(2,)).log_prob(z), (pairs, rate)
    )


def test_a_group_of_zeros_has_a_gradient_of_zero():
    codes = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(groups().log_prob(codes), codes)
    assert gradient.tolist() == [0.0] * 4


@laws
def test_fenchel_young_holds_with_equality_at_the_prox(name):
    """With step 1, what the prox takes off is a slope of the penalty at its value."""
    law = LAWS[name]()
    values = 2 * torch.randn(50, *law.batch_shape, *law.event_shape, dtype=torch.float64)
    codes = prox(law, values, 1.0)
    slopes = values - codes
    bounds = conjugate(law)
    assert (bounds.feasible(slopes) >= 1 - 1e-12).all()
    left = penalty(law, codes).flatten(1).sum(1) if law.batch_shape else penalty(law, codes)
    left = left + bounds.value(slopes).flatten(1).sum(1)
    torch.testing.assert_close(left, (codes * slopes).flatten(1).sum(1), rtol=0, atol=1e-11)


@laws
def test_the_conjugate_is_finite_up_to_its_gauge_and_no_further(name):
    """At a feasible slope no code gains; beyond it some code gains without bound."""
    law = LAWS[name]()
    slopes = torch.randn(200, *law.batch_shape, *law.event_shape, dtype=torch.float64) * 4
    shrink = conjugate(law).feasible(slopes).flatten(1).amin(1)
    assert (shrink < 1).sum() > 20
    shrink = shrink.reshape(-1, *[1] * (slopes.dim() - 1))

    def gain(factor):
        # The best direction of a positively homogeneous penalty is a prox of the slope.
        at = factor * shrink * slopes
        codes = 1e3 * prox(law, at, 1.0)
        terms = penalty(law, codes)
        return (at * codes).flatten(1).sum(1) - terms.reshape(len(codes), -1).sum(1)

    assert (gain(1 - 1e-12) <= 1e-6).all()
    assert (gain(1.1)[shrink.flatten() < 1] > 1.0).all()


def test_groups_over_any_dimension_are_those_of_a_moved_one():
    """Neurons in the middle, in front, or last: the same groups."""
    codes = torch.randn(6, 3, 5, 4, dtype=torch.float64)  # (n, atoms, neurons, time)
    rate = torch.rand(3, 1, 1, dtype=torch.float64) + 0.5
    middle = GroupLaplace(rate, (5, 4), group=(5, 1))
    last = GroupLaplace(rate, (5,))
    moved = codes.movedim(-2, -1)
    assert (middle.batch_shape, middle.event_shape) == ((3,), (5, 4))
    torch.testing.assert_close(middle.log_prob(codes), last.log_prob(moved).sum(-1))
    torch.testing.assert_close(
        prox(middle, codes, 0.4), prox(last, moved, 0.4).movedim(-1, -2), rtol=0, atol=0
    )


def test_a_rate_of_each_atom_reaches_its_groups():
    law = codes_prior(
        lambda rate: GroupLaplace(rate, (5,)),
        torch.tensor([1.0, 2.0, 3.0]),
        (3, 7, 5),
        torch.zeros(1),
    )
    assert law.event_shape == (3, 7, 5)
    codes = torch.randn(2, 3, 7, 5)
    expected = (codes.square().sum(-1).sqrt() * torch.tensor([1.0, 2.0, 3.0])[:, None]).sum((1, 2))
    torch.testing.assert_close(penalty(law, codes), expected)


# Statistics of rates ------------------------------------------------------------------------------


@laws
def test_the_statistic_gives_the_density_at_any_rate(name):
    scaled = {
        "signed": lambda r: SignedLaplace(r, SIGNS),
        "group": lambda r: GroupLaplace(r, (4,), group=(2,)),
        "one-sided group": lambda r: GroupLaplace(r, (4,), one_sided=True),
        "known": lambda r: KnownSupport(SignedLaplace(r, SIGNS), ACTIVE),
        "known groups": lambda r: KnownSupport(GroupLaplace(r, (2,)), ACTIVE),
    }[name]
    a, b = double(0.7), double(2.5)
    codes = scaled(a).sample((5,))
    found = rate_statistic(scaled(a), codes)
    power = torch.as_tensor(found.power).to(codes).expand(codes.shape)
    terms = power * (b / a).log() - (b - a) * found.value
    difference = scaled(b).log_prob(codes) - scaled(a).log_prob(codes)
    torch.testing.assert_close(terms.sum(), difference.sum(), rtol=1e-12, atol=0)


# Divergences --------------------------------------------------------------------------------------

PAIRS = {
    "signed": (lambda: SignedLaplace(double(0.8), SIGNS), signed),
    "to two-sided": (signed, lambda: SignedLaplace(double(0.8), 0 * SIGNS)),
    "exponential": (lambda: dist.Exponential(double(0.8)), lambda: SignedLaplace(double(2.0), 1)),
    "to exponential": (
        lambda: SignedLaplace(double(2.0), 1),
        lambda: dist.Exponential(double(0.8)),
    ),
    "laplace": (
        lambda: dist.Laplace(double(0.4), double(0.8)),
        lambda: SignedLaplace(double(2.0), 0),
    ),
    "normal": (
        lambda: dist.Normal(double(0.4), double(0.8)),
        lambda: SignedLaplace(double(2.0), 0),
    ),
    "to laplace": (signed, lambda: dist.Laplace(double(0.4), double(0.8))),
    "to normal": (signed, lambda: dist.Normal(double(0.4), double(0.8))),
    "group": (groups, lambda: GroupLaplace(double(1.1), (4,), group=(2,))),
    "one-sided group": (partial(groups, one_sided=True), groups),
    "known": (
        lambda: KnownSupport(dist.Laplace(double(0.2), double(0.5)), ACTIVE),
        lambda: KnownSupport(dist.Laplace(double(0.0), double(1.0)), ACTIVE),
    ),
    "known groups": (
        LAWS["known groups"],
        lambda: KnownSupport(GroupLaplace(double(1.5), (2,)), ACTIVE),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_divergence_is_the_mean_log_ratio(name):
    q, p = (make() for make in PAIRS[name])
    draws = q.sample((40_000,))
    ratio = q.log_prob(draws) - p.log_prob(draws)
    error = 5 * ratio.std(0) / len(draws) ** 0.5
    found = kl_divergence(q, p)
    assert found.shape == q.batch_shape
    assert ((found - ratio.mean(0)).abs() <= error + 1e-12).all()


def test_a_law_has_no_divergence_from_itself():
    for make in LAWS.values():
        assert (kl_divergence(make(), make()) == 0).all()


@pytest.mark.parametrize(("q", "p", "match"), [
    (SignedLaplace(1.0, -SIGNS), signed(), "signs of the prior, got others for 2 of 3 codes"),
    (dist.Exponential(1.0), signed(), "signs of the prior, got others for 1 of 3"),
    (dist.Laplace(0.0, 1.0), signed(), "got a two-sided Laplace.*Use SignedLaplace"),
    (groups(), groups(one_sided=True), "Expected a one-sided GroupLaplace in the guide"),
    (KnownSupport(signed(), ~ACTIVE), KnownSupport(signed(), ACTIVE), "another for 3 of 3 codes"),
    (dist.Laplace(0.0, 1.0), KnownSupport(signed(), ACTIVE), "Use KnownSupport.*in the guide"),
    (KnownSupport(signed(), ACTIVE), signed(), "Use KnownSupport.*in the model"),
    (
        SpikeAndSlab(dist.Laplace(0.0, 1.0), 0.5),
        KnownSupport(signed(), ACTIVE),
        r"use SpikeAndSlab in both, with probs=torch.where\(active",
    ),
    (SpikeAndSlab(dist.Laplace(0.0, 1.0), 0.5), signed(), "prior with an atom.*SignedLaplace"),
])  # fmt: skip
def test_a_divergence_that_is_infinite_by_what_the_laws_are_is_refused(q, p, match):
    with pytest.raises(ValueError, match=match):
        kl_divergence(q, p)
    with pytest.raises(ValueError, match=match):
        kl_divergence(Independent(q, 0), Independent(p, 0))


def test_other_groups_have_no_closed_form():
    with pytest.raises(NotImplementedError):
        kl_divergence(groups(), GroupLaplace(double(1.0), (4,)))


# Shapes, kinds, refusals --------------------------------------------------------------------------


@laws
def test_laws_move_to_another_precision_and_are_copied(name):
    law = LAWS[name]()
    codes = law.sample((3,))
    single = match(law, torch.zeros(1))
    assert single.sample().dtype == torch.float32
    torch.testing.assert_close(single.log_prob(codes.float()), law.log_prob(codes).float())
    torch.testing.assert_close(copy.deepcopy(law).log_prob(codes), law.log_prob(codes))
    assert match(law, torch.zeros(1, device="meta")).rsample().device.type == "meta"


def test_signs_have_a_bijection_and_a_known_support_has_none():
    law = signed()
    transform = biject_to(law.support)
    free = torch.randn(5, 3, dtype=torch.float64)
    values = transform(free)
    assert law.support.check(values).all()
    torch.testing.assert_close(transform.inv(values), free)
    slope = torch.autograd.functional.jacobian(transform, free[0]).diagonal().abs().log()
    torch.testing.assert_close(transform.log_abs_det_jacobian(free[0], values[0]), slope)
    with pytest.raises(NotImplementedError):
        biject_to(KnownSupport(law, ACTIVE).support)


def test_signed_codes_may_have_an_atom():
    law = SpikeAndSlab(signed(), probs=double(0.3))
    assert (law.log_prob(law.sample((50,))).isfinite()).all()
    other = SpikeAndSlab(SignedLaplace(double(0.5), SIGNS), probs=double(0.6))
    draws = law.sample((40_000,))
    ratio = law.log_prob(draws) - other.log_prob(draws)
    error = 5 * ratio.std(0) / 200
    assert ((kl_divergence(law, other) - ratio.mean(0)).abs() <= error).all()


@pytest.mark.parametrize(("make", "error", "match"), [
    (lambda: SignedLaplace("one", 1), TypeError, "Expected rate to be a number"),
    (lambda: SignedLaplace(1.0, "plus"), TypeError, "Expected signs to be a number"),
    (lambda: SignedLaplace(torch.ones(2), torch.ones(3)), ValueError, "shapes that broadcast"),
    (lambda: SignedLaplace(1.0, 2, validate_args=True), ValueError, r"OneOf\(-1, 0, 1\)"),
    (lambda: SignedLaplace(-1.0, 1, validate_args=True), ValueError, "rate.*GreaterThan"),
    (lambda: GroupLaplace("one", (2,)), TypeError, "Expected rate to be a number"),
    (lambda: GroupLaplace(0.0, (2,), validate_args=True), ValueError, "rate.*GreaterThan"),
    (lambda: GroupLaplace(1.0, (4,), group=(3,)), ValueError, r"divides the event.*got \(3,\)"),
    (lambda: GroupLaplace(1.0, (4, 2), group=(2,)), ValueError, "Write 1 for a dimension"),
    (lambda: GroupLaplace(1.0, (0,)), ValueError, "event_shape"),
    (lambda: GroupLaplace(torch.ones(3), (2,)), ValueError, r"to \(..., 1\), got.*1 more dim"),
    (lambda: prox(groups(), torch.ones(4), torch.ones(4)), ValueError, "one step.*Proximal()"),
    (lambda: KnownSupport("law", ACTIVE), TypeError, "Expected base to be a distribution"),
    (lambda: KnownSupport(signed(), [1, 0]), TypeError, "tensor of booleans.*got list"),
    (lambda: KnownSupport(signed(), double([0.5, 1, 0])), TypeError, "got other numbers"),
    (lambda: KnownSupport(signed(), torch.ones(2).bool()), ValueError, "shapes that broadcast"),
    (
        lambda: KnownSupport(SpikeAndSlab(dist.Laplace(0.0, 1.0), 0.5), ACTIVE),
        ValueError,
        r"got SpikeAndSlab.*probs=torch.where\(active, probs, 0.0\)",
    ),
    (
        lambda: SpikeAndSlab(KnownSupport(signed(), ACTIVE), 0.5),
        ValueError,
        "slab without zeros of its own, got KnownSupport",
    ),
])  # fmt: skip
def test_what_cannot_be_a_law_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()
