"""Thresholded laws, against numpy noise put through the published maps and against quadrature."""

import functools
import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_sparse.distributions.mixed import Mixed, SpikeAndSlab
from pyro_sparse.distributions.priors import check_prior, codes_prior, match, spread
from pyro_sparse.distributions.tails import Tails
from pyro_sparse.distributions.thresholded import (
    HardThresholded,
    ShiftedThresholded,
    SoftThresholded,
)
from pyro_sparse.infer import load, save

BASES = {"Normal": (dist.Normal, stats.norm), "Laplace": (dist.Laplace, stats.laplace)}
ONE_SIDED = {"one_sided": True}
# Law, what is passed to it, and the map of base noise in numpy: (noise, loc, threshold) -> code.
KINDS = {
    "soft": (
        SoftThresholded,
        {},
        lambda e, loc, t: np.sign(loc + e) * np.maximum(np.abs(loc + e) - t, 0),
    ),
    "soft-one-sided": (SoftThresholded, ONE_SIDED, lambda e, loc, t: np.maximum(loc + e - t, 0)),
    "shifted": (
        ShiftedThresholded,
        {},
        lambda e, loc, t: np.where(np.abs(e) > t, loc + np.sign(e) * (np.abs(e) - t), 0),
    ),
    "shifted-one-sided": (
        ShiftedThresholded,
        ONE_SIDED,
        lambda e, loc, t: np.where(e > t, loc + e - t, 0),
    ),
    "hard": (HardThresholded, {}, lambda e, loc, t: np.where(np.abs(loc + e) > t, loc + e, 0)),
}
# Location, scale, threshold.
VALUES = [(0.25, 0.35, 0.4), (-0.9, 0.4, 0.3), (0.0, 0.5, 0.2), (1.1, 0.3, 0.6)]


def double(value):
    return torch.tensor(value, dtype=torch.float64)


def build(kind, base, values, **more):
    law, options, _ = KINDS[kind]
    loc, scale, threshold = (torch.as_tensor(v, dtype=torch.float64) for v in values)
    return law(BASES[base][0](loc, scale), threshold, **options, **more)


NODES, WEIGHTS = np.polynomial.legendre.leggauss(60)


def expectation(kind, base, values, f, bends=()):
    """Expectation of f(code) by Gauss-Legendre over the base noise, split at every bend."""
    loc, scale, threshold = values
    noise, shape = BASES[base][1](scale=scale), KINDS[kind][2]
    cuts = {0.0, threshold, -threshold, threshold - loc, -threshold - loc, -loc, *bends}
    cuts |= {sign * far * scale for sign in (1, -1) for far in (1, 3, 6, 10, 20, 35)}
    cuts = np.array(sorted(cuts))
    half, middle = np.diff(cuts)[:, None] / 2, (cuts[1:] + cuts[:-1])[:, None] / 2
    e = middle + half * NODES
    return float((half * WEIGHTS * f(shape(e, loc, threshold)) * noise.pdf(e)).sum())


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=BASES)
def base(request):
    return request.param


@pytest.fixture(params=VALUES, ids=str)
def values(request):
    return request.param


# The law ------------------------------------------------------------------------------------------


def test_inclusion_and_moments_agree_with_quadrature(kind, base, values):
    law = build(kind, base, values)
    active = expectation(kind, base, values, lambda z: z != 0)
    mean = expectation(kind, base, values, lambda z: z)
    variance = expectation(kind, base, values, lambda z: (z - mean) ** 2)
    # A Laplace variable is beyond 35 scales with a probability of 6e-16.
    assert law.prob_active.item() == pytest.approx(active, abs=1e-10)
    assert law.mean.item() == pytest.approx(mean, abs=1e-10)
    assert law.variance.item() == pytest.approx(variance, abs=1e-10)
    assert law.slab.mean.item() == pytest.approx(mean / active, abs=1e-9)


def test_the_distribution_function_agrees_with_quadrature(kind, base, values):
    loc, _, threshold = values
    law = build(kind, base, values)
    for z in (-0.7, -0.05, 0.0, 0.05, 0.7, 1.3):
        bends = [z - loc + shift for shift in (0.0, threshold, -threshold)]
        below = functools.partial(np.greater_equal, z)
        expected = expectation(kind, base, values, below, bends)
        assert law.cdf(double(z)).item() == pytest.approx(expected, abs=1e-10)


def test_samples_are_those_of_noise_put_through_the_map(kind, base, values):
    loc, scale, threshold = values
    num_draws = 20_000
    rng = np.random.default_rng(0)
    noise = BASES[base][1](scale=scale).rvs(num_draws, random_state=rng)
    simulated = KINDS[kind][2](noise, loc, threshold)
    law = build(kind, base, values)
    draws = law.sample((num_draws,)).numpy()
    # The atom apart. One suite in about a hundred fails on one of these hundred and twenty.
    count = int((draws != 0).sum())
    assert stats.binomtest(count, num_draws, law.prob_active.item()).pvalue > 1e-4
    count = int((simulated != 0).sum())
    assert stats.binomtest(count, num_draws, law.prob_active.item()).pvalue > 1e-4
    active = simulated[simulated != 0]
    assert stats.ks_2samp(draws[draws != 0], active).pvalue > 1e-4
    slab = stats.kstest(active, lambda z: law.slab.cdf(torch.from_numpy(z)).numpy())
    assert slab.pvalue > 1e-4


def test_quantiles_invert_the_distribution_function(kind, base, values):
    law = build(kind, base, values)
    level = torch.linspace(1e-5, 1 - 1e-5, 201, dtype=torch.float64)
    codes = law.icdf(level)
    active = codes != 0
    torch.testing.assert_close(law.cdf(codes[active]), level[active], rtol=1e-9, atol=1e-12)
    assert (law.cdf(codes) >= level - 1e-9).all()
    assert (codes.diff() >= 0).all()


def test_the_entropy_agrees_with_quadrature(kind, base, values):
    law = build(kind, base, values)
    entropy = expectation(kind, base, values, lambda z: -law.log_prob(torch.from_numpy(z)).numpy())
    assert law.entropy().item() == pytest.approx(entropy, abs=1e-8)


@pytest.mark.parametrize("shape", [(), (3,), (2, 1)])
def test_shapes_and_dtypes(kind, base, shape, dtype):
    make, options, _ = KINDS[kind]
    scale = torch.full(shape, 0.5, dtype=dtype)
    narrow = make(BASES[base][0](torch.zeros((), dtype=dtype), scale), 0.3, **options)
    law = narrow.expand((4, *shape))
    assert type(law) is type(narrow)
    assert isinstance(law, Mixed)
    assert law.batch_shape == law.base.batch_shape == law.threshold.shape == (4, *shape)
    draws = law.sample((5,))
    for value in (draws, law.log_prob(draws), law.cdf(draws)):
        assert value.dtype == dtype
        assert value.shape == (5, 4, *shape)
    for value in (law.mean, law.variance, law.entropy(), law.prob_active, law.logits):
        assert value.dtype == dtype
        assert value.shape == (4, *shape)
    torch.testing.assert_close(law.log_prob(draws), narrow.log_prob(draws))
    assert law.to_event(1).log_prob(draws).shape == (5, 4, *shape)[:-1]
    assert match(law, torch.zeros((), dtype=torch.float64)).mean.dtype == torch.float64


def test_threshold_and_base_broadcast(kind):
    make, options, _ = KINDS[kind]
    law = make(dist.Normal(torch.zeros(3, 1), 1.0), torch.rand(4), **options)
    assert law.batch_shape == law.slab.batch_shape == law.logits.shape == (3, 4)


def test_at_threshold_zero_every_code_is_the_base(kind, base):
    make, options, _ = KINDS[kind]
    loc, scale = double(0.3).requires_grad_(), double(0.7).requires_grad_()
    plain = BASES[base][0](loc, scale)
    law = make(plain, 0.0, **options)
    z = double([0.4, 0.9, 2.0])
    # One-sided, the lower half of the base is zero even so; the density of the rest is its own.
    torch.testing.assert_close(law.log_prob(z), plain.log_prob(z))
    objective = law.mean + law.variance + law.entropy()
    assert all(g.isfinite() for g in torch.autograd.grad(objective, [loc, scale]))


def test_the_shifted_laplace_is_spike_and_slab():
    law = ShiftedThresholded(dist.Laplace(double(0.3), double(0.12)), 0.2)
    assert isinstance(law.slab, dist.Laplace)
    assert law.prob_active.item() == pytest.approx(math.exp(-0.2 / 0.12), rel=1e-12)
    # ../shared/systems-variational.md 1d.2.
    assert law.prob_active.item() == pytest.approx(0.188876, abs=1e-5)
    assert law.mean.item() == pytest.approx(0.056663, abs=1e-5)
    assert law.variance.item() == pytest.approx(0.019228, abs=1e-5)


def test_golden_values_of_normal_bases():
    # ../shared/systems-variational.md 1d.3 and 1d.4.
    law = ShiftedThresholded(dist.Normal(double(0.25), double(0.35)), 0.4)
    assert isinstance(law.slab, Tails)
    assert law.prob_active.item() == pytest.approx(0.253098, abs=1e-5)
    law = SoftThresholded(dist.Normal(double(0.35), double(0.3)), 0.25)
    assert 1 - law.prob_active.item() == pytest.approx(0.346691, abs=1e-5)
    assert law.mean.item() == pytest.approx(0.173724, abs=1e-5)


def test_the_location_moves_inclusion_only_where_it_meets_the_threshold(base):
    loc = torch.linspace(-2, 2, 5)
    plain = BASES[base][0](loc, 0.5)
    shifted = ShiftedThresholded(plain, 0.7).prob_active
    torch.testing.assert_close(shifted, shifted[:1].expand(5))
    assert (SoftThresholded(plain, 0.7).prob_active.diff().abs() > 0.01).all()


def test_the_mean_shrinks_and_the_mean_given_active_does_not(base):
    law = ShiftedThresholded(BASES[base][0](torch.tensor([-2.0, 0.4, 3.0]), 0.5), 0.7)
    assert (law.mean.abs() < 0.3 * law.base.loc.abs()).all()
    torch.testing.assert_close(law.slab.mean, law.base.loc)
    soft = SoftThresholded(law.base, 0.7)
    assert (soft.mean.abs() < soft.slab.mean.abs()).all()


# As a prior, moved and kept -----------------------------------------------------------------------


def test_what_is_derived_moves_with_base_and_threshold(kind, base, device):
    make, options, _ = KINDS[kind]
    law = make(BASES[base][0](torch.tensor([0.1, -0.7]), 0.3), 0.7, **options)
    before = law.logits, law.slab.mean, law.slab.variance, law.entropy()
    like = torch.zeros(1, dtype=torch.float64, device=device)
    moved = match(law, like)
    # As if made of the moved parts, and not of numbers rounded before.
    parts = BASES[base][0](law.base.loc.to(like), law.base.scale.to(like))
    fresh = make(parts, law.threshold.to(like), **options)
    z = fresh.sample((20,))
    for name in ("logits", "mean", "variance", "prob_active", "threshold"):
        assert torch.equal(getattr(moved, name), getattr(fresh, name)), name
    assert torch.equal(moved.log_prob(z), fresh.log_prob(z))
    assert torch.equal(moved.slab.entropy(), fresh.slab.entropy())
    assert moved.base.loc.dtype == moved.sample().dtype == torch.float64
    # The law itself is what it was.
    after = law.logits, law.slab.mean, law.slab.variance, law.entropy()
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(before, after))
    assert match(law, torch.zeros(1)) is law
    # A second time, from a law whose parts were evaluated.
    torch.testing.assert_close(match(moved, torch.zeros(1)).entropy(), law.entropy())


def test_an_expanded_law_derives_late_and_from_the_parts_it_was_expanded_from(kind, base):
    make, options, _ = KINDS[kind]
    law = make(BASES[base][0](torch.tensor([0.1, -0.7]), 0.3), 0.7, **options)
    wide = law.expand((3, 2))
    fresh = make(law.base.expand((3, 2)), law.threshold.expand(3, 2), **options)
    law.threshold = law.threshold + 1  # of the narrow law alone
    torch.testing.assert_close(wide.logits, fresh.logits)
    torch.testing.assert_close(wide.slab.mean, fresh.slab.mean)
    # A part of the wide law that is another object counts.
    wide.threshold = wide.threshold + 0.5
    moved = make(wide.base, wide.threshold, **options)
    torch.testing.assert_close(wide.logits, moved.logits)


def test_it_is_a_prior_of_codes(kind, base):
    make, options, _ = KINDS[kind]
    like = torch.zeros(1, dtype=torch.float64)
    law = make(BASES[base][0](torch.zeros(3, 1), 0.5), 0.4, **options)
    check_prior(law, has_rate=False)
    wide = spread(law, (3, 5), like=like)
    assert wide.event_shape == (3, 5)
    draw = wide.sample()
    torch.testing.assert_close(wide.log_prob(draw), match(law, like).log_prob(draw).sum())
    per_rate = codes_prior(
        lambda rate: make(BASES[base][0](0.0, 1 / rate), 0.4, **options),
        torch.rand(7, 3) + 1,
        (3, 5),
        like=like,
    )
    assert per_rate.batch_shape == (7,) and per_rate.event_shape == (3, 5)
    with pytest.raises(ValueError, match="prior of constants.*threshold"):
        check_prior(make(law.base, torch.tensor(0.4, requires_grad=True)), has_rate=False)


def test_a_bundle_brings_it_back(tmp_path, kind, base):
    make, options, _ = KINDS[kind]
    law = make(BASES[base][0](torch.randn(3), torch.rand(3) + 0.5), torch.rand(3), **options)
    save(tmp_path / "run", prior=law)
    back = load(tmp_path / "run")["prior"]
    assert type(back) is type(law) and back.one_sided is law.one_sided
    draw = law.sample((50,))
    assert torch.equal(back.log_prob(draw), law.log_prob(draw))


@pytest.mark.parametrize("threshold", [-0.1, math.nan])
def test_a_bundle_of_no_law_is_refused(tmp_path, threshold):
    base = dist.Normal(torch.zeros(2), torch.ones(2))
    law = SoftThresholded(base, torch.full((2,), threshold), validate_args=False)
    with pytest.raises(ValueError, match="SoftThresholded refuses its arguments.*threshold"):
        save(tmp_path / "run", prior=law)


def test_what_was_read_without_a_graph_gets_one(kind, base):
    inputs = [double(value).requires_grad_() for value in (0.25, 0.35, 0.4)]
    law = build(kind, base, inputs)
    with torch.no_grad():
        values = [law.logits, law.slab.mean, law.slab.variance, law.entropy()]
    law.sample()
    again = [law.logits, law.slab.mean, law.slab.variance, law.entropy()]
    torch.testing.assert_close(again, values)
    gradients = torch.autograd.grad(sum(again), inputs)
    fresh = build(kind, base, inputs)
    objective = fresh.logits + fresh.slab.mean + fresh.slab.variance + fresh.entropy()
    torch.testing.assert_close(gradients, torch.autograd.grad(objective, inputs))


# Errors -------------------------------------------------------------------------------------------


def test_what_is_no_threshold_of_a_known_base_is_refused(kind):
    make, options, _ = KINDS[kind]
    with pytest.raises(ValueError, match="threshold"):
        make(dist.Normal(0.0, 1.0), -0.1, **options)
    with pytest.raises(ValueError, match="threshold"):
        make(dist.Normal(0.0, 1.0), math.nan, **options)
    with pytest.raises(NotImplementedError, match=r"got StudentT.*overshoot\.register\(StudentT\)"):
        make(dist.StudentT(3.0), 0.1, **options)
    with pytest.raises(NotImplementedError, match="got Independent"):
        make(dist.Normal(torch.zeros(3), 1.0).to_event(1), 0.1, **options)
    with pytest.raises(TypeError, match="Expected base to be a distribution"):
        make(3.0, 0.1, **options)
    for value in (None, "a"):
        with pytest.raises(TypeError, match=f"threshold to be a number or a tensor, got {value!r}"):
            make(dist.Laplace(0.0, 1.0), value, **options)
    with pytest.raises(ValueError, match=r"base of \(3,\), threshold of \(2,\)"):
        make(dist.Laplace(torch.zeros(3), 1.0), torch.ones(2), **options)
    unchecked = make(dist.Normal(0.0, 1.0), -0.1, validate_args=False, **options)
    assert unchecked.threshold < 0


def test_laws_that_jump_refuse_a_pathwise_draw(base):
    hard = HardThresholded(BASES[base][0](0.1, 1.0), 0.5)
    with pytest.raises(NotImplementedError, match="LeaveOneOut, LocalExpectation or DisARM"):
        hard.rsample()
    shifted = ShiftedThresholded(BASES[base][0](0.1, 1.0), 0.5, one_sided=True)
    with pytest.raises(NotImplementedError, match="LeaveOneOut, LocalExpectation or DisARM"):
        shifted.rsample()
    assert shifted.rsample_slab((3,)).shape == (3,)
    assert not any(law.has_rsample for law in (hard, shifted, SoftThresholded(hard.base, 0.5)))


def test_values_outside_of_the_support_are_refused():
    law = HardThresholded(dist.Normal(0.1, 1.0), 0.5)
    assert law.log_prob(torch.tensor([0.0, 0.6, -0.6])).isfinite().all()
    with pytest.raises(ValueError, match="support"):
        law.log_prob(torch.tensor(0.3))
    with pytest.raises(ValueError, match="support"):
        SoftThresholded(dist.Normal(0.1, 1.0), 0.5, one_sided=True).log_prob(torch.tensor(-0.3))


# Gradients ----------------------------------------------------------------------------------------


def smooth(z):
    return np.sin(1.3 * z) + 0.3 * z**2


def check_unbiased(kind, base, values, gradients):
    """Gradients per draw, by parameter, against differences of the quadrature."""
    for i, gradient in enumerate(gradients):
        up, down = ([v + (j == i) * h for j, v in enumerate(values)] for h in (1e-4, -1e-4))
        truth = expectation(kind, base, up, smooth) - expectation(kind, base, down, smooth)
        truth /= 2e-4  # an error of 1e-8
        error = gradient.std().item() / math.sqrt(len(gradient))
        assert abs(gradient.mean().item() - truth) < 4 * error + 1e-6
        assert error < 0.1 * (0.3 + abs(truth))  # the test has power


def parameters(values, num_draws):
    return [double(value).expand(num_draws).clone().requires_grad_() for value in values]


@pytest.mark.parametrize("kind", ["soft", "soft-one-sided", "shifted"])
@pytest.mark.parametrize("values", [(0.25, 0.35, 0.4), (-0.4, 0.4, 0.3)], ids=str)
@pytest.mark.parametrize("draw", [lambda law: law.rsample(), Mixed.rsample], ids=["own", "mixed"])
def test_the_pathwise_gradient_is_unbiased(kind, base, values, draw):
    inputs = parameters(values, 40_000)
    z = draw(build(kind, base, inputs))
    gradients = torch.autograd.grad(((1.3 * z).sin() + 0.3 * z.square()).sum(), inputs)
    check_unbiased(kind, base, values, gradients)


@pytest.mark.parametrize("kind", ["hard", "shifted-one-sided"])
def test_the_slabs_draw_with_the_scores_of_gate_and_side_is_unbiased(kind, base):
    values = (0.25, 0.35, 0.3)
    inputs = parameters(values, 200_000)
    law = build(kind, base, inputs)
    slab, active = law.rsample_slab(), law.sample_active()
    z = torch.where(active, slab, 0.0)
    objective = (1.3 * z).sin() + 0.3 * z.square()
    # Read at codes that follow the parameters: the method takes them as constants.
    score = law.log_prob_gates(active, slab)
    surrogate = (objective + objective.detach() * score).sum()
    check_unbiased(kind, base, values, torch.autograd.grad(surrogate, inputs))


def test_log_probabilities_of_gates_count_the_side_of_a_gap(base):
    values = (0.25, 0.35, 0.3)
    law, soft = build("hard", base, values), build("soft", base, values)
    noise = BASES[base][1](loc=0.25, scale=0.35)
    active, codes = torch.tensor([True, True, False]), double([0.5, -0.4, 0.0])
    upper, lower = noise.sf(0.3), noise.cdf(-0.3)
    expected = np.log([upper, lower, 1 - upper - lower])
    np.testing.assert_allclose(law.log_prob_gates(active, codes), expected, rtol=1e-10)
    expected = np.log([upper + lower, upper + lower, 1 - upper - lower])
    np.testing.assert_allclose(soft.log_prob_gates(active, codes), expected, rtol=1e-10)


def test_log_probabilities_of_gates_are_stable():
    logits = torch.tensor([-200.0, 200.0, 200.0, -200.0], requires_grad=True)
    law = SpikeAndSlab(dist.Normal(0.0, 1.0), logits=logits)
    active = torch.tensor([True, True, False, False])
    value = law.log_prob_gates(active, torch.zeros(4))
    assert value.tolist() == [-200.0, 0.0, -200.0, 0.0]
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert gradient.tolist() == [1.0, 0.0, -1.0, 0.0]


def test_a_soft_draw_is_the_quantile_of_the_mixed_law(base):
    """The same code moves alike by the plain map and by the implicit rate of ``Mixed``."""
    inputs = [double(value).requires_grad_() for value in (0.25, 0.35, 0.4)]
    law = build("soft", base, inputs)
    for level in (0.001, 0.02, 0.8, 0.999):
        code = law.icdf(double(level)).detach()
        # Of the plain map: z = y -+ threshold with y = loc + scale * noise.
        sign = code.sign().item()
        noise = (code + sign * law.threshold - law.base.loc) / law.base.scale
        plain = [1.0, noise.item(), -sign]
        outer = law.log_prob(code)
        mass = 1 - law.cdf(code) if sign > 0 else -law.cdf(code)
        implicit = torch.autograd.grad(mass, inputs, retain_graph=True)
        found = [gradient.item() / outer.exp().item() for gradient in implicit]
        np.testing.assert_allclose(found, plain, atol=1e-9)


# float32 ------------------------------------------------------------------------------------------


def test_float32_values_and_gradients_are_finite_and_right(kind, base):
    make, options, _ = KINDS[kind]
    grid = torch.cartesian_prod(
        torch.tensor([0.0, 0.3, -5.0, 1e4]),  # loc
        torch.tensor([1e-8, 1e-3, 1.0, 1e4, 1e8]),  # scale
        torch.tensor([1e-8, 1.0, 1e4]),  # threshold
    )

    def numbers(dtype):
        # From float32, so that both precisions get the same inputs.
        inputs = [column.to(dtype).requires_grad_() for column in grid.T]
        law = make(BASES[base][0](inputs[0], inputs[1]), inputs[2], **options)
        width = law.slab.variance.sqrt()
        values = [law.logits, law.slab.mean, width, law.slab.entropy()]
        grads = [
            torch.autograd.grad(value.sum(), inputs, retain_graph=True, allow_unused=True)
            for value in values
        ]
        grads = [g for row in grads for g in row if g is not None]
        # A mean may be the small difference of the two sides.
        size = width + law.slab.mean.abs()
        values = [law.logits, law.slab.mean / size, width / size, law.slab.entropy()]
        return torch.stack(values).double(), torch.stack(grads).double()

    found, truth = numbers(torch.float32), numbers(torch.float64)
    assert found[0].isfinite().all()
    assert found[1].isfinite().all()
    # Moment ratios to 5e-6; loc - threshold is rounded, which moves the weights of the sides.
    loc, scale, threshold = grid.double().T
    rounding = (6e-8 * (loc.abs() + threshold) / scale).clamp(max=1e-3)
    assert ((found[0] - truth[0]).abs() <= 5e-5 * truth[0].abs() + 1e-5 + rounding).all()


def test_inclusion_keeps_its_digits_far_out():
    # P(active) = 2 Phi(-11.5) = 1.3e-30; scipy's log_ndtr in float64.
    law = ShiftedThresholded(dist.Normal(0.3, 1.0), 11.5)
    expected = math.log(2) + stats.norm.logcdf(-11.5)
    assert law.logits.item() == pytest.approx(expected, rel=1e-6)
    truth = stats.truncnorm(11.5, math.inf)
    assert law.slab.variance.item() == pytest.approx(truth.moment(2) - 23 * truth.mean() + 11.5**2)
    draws = law.slab.sample((20_000,)).double().numpy()
    distance = np.abs(draws - np.float32(0.3))
    # Adding the location rounds the codes to 3e-8, of a width of 0.09.
    assert stats.kstest(distance, lambda x: truth.cdf(x + 11.5)).pvalue > 1e-4


def test_a_narrow_interval_keeps_its_digits():
    # Within 1e-8 of zero: 2e-8 times the density there, to relative 1e-15.
    loc = torch.tensor([0.0, 0.3, -2.5, 9.0])
    for name, (make, law) in BASES.items():
        found = -SoftThresholded(make(loc, 1.0), 1e-8).logits.double().numpy()
        expected = math.log(2e-8) + law.logpdf(loc.double().numpy())
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("base", [dist.Laplace, dist.Normal])
@pytest.mark.parametrize("code", [0.7, -0.7])
@pytest.mark.parametrize("gap", [1.0, -1.0])
def test_the_gradient_is_right_where_location_and_threshold_meet(base, code, gap):
    # The tails change formula there, and both formulas must not be counted.
    threshold = torch.tensor(0.5, dtype=torch.float64)

    def log_prob(loc):
        law = SoftThresholded(base(loc, torch.ones_like(loc)), threshold)
        return law.log_prob(torch.tensor(code, dtype=torch.float64))

    loc = gap * threshold.clone()
    by_autograd = torch.autograd.functional.jacobian(log_prob, loc)
    step = 1e-6
    by_differences = (log_prob(loc + step) - log_prob(loc - step)) / (2 * step)
    torch.testing.assert_close(by_autograd, by_differences, rtol=1e-5, atol=1e-6)
