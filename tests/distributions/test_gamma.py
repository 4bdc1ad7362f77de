"""A Gamma threshold that is drawn, and one that has been integrated out, are the same law."""

import math

import mpmath
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_sparse.distributions import GammaThresholded, SpikeAndSlab, check_prior, match, spread
from pyro_sparse.infer import load, save


def draw_thresholds(loc, scale, concentration, rate, size):
    """Noise, a threshold each, and the shifted soft threshold, as published."""
    draw = np.random.default_rng(0)
    noise = draw.laplace(0, scale, size)
    threshold = draw.gamma(concentration, 1 / rate, size)
    beyond = loc + np.sign(noise) * (np.abs(noise) - threshold)
    return np.where(np.abs(noise) <= threshold, 0.0, beyond)


@pytest.mark.parametrize(
    "arguments",
    [(0.3, 0.12, 2.0, 6.0), (-0.5, 1.0, 0.4, 0.7), (0.0, 0.5, 3.0, 30.0)],
    ids=str,
)
def test_drawing_the_threshold_gives_the_same_codes(arguments):
    codes = draw_thresholds(*arguments, 100_000)
    law = GammaThresholded(*(torch.tensor(a, dtype=torch.float64) for a in arguments))
    active = codes[codes != 0]
    # With another seed one of a thousand would fail by chance.
    assert stats.binomtest(len(active), len(codes), law.prob_active.item()).pvalue > 1e-3

    def cdf(z):
        # Of active codes: the atom is subtracted and the rest rescaled.
        below = law.cdf(torch.from_numpy(z)).numpy() - (z >= 0) * (1 - law.prob_active.item())
        return below / law.prob_active.item()

    assert stats.kstest(active, cdf).pvalue > 1e-3
    ours = law.sample((50_000,)).numpy()
    assert stats.ks_2samp(ours[ours != 0], active).pvalue > 1e-3
    error = codes.std() / math.sqrt(len(codes))
    assert abs(codes.mean() - law.mean.item()) < 4 * error
    squares = (codes - codes.mean()) ** 2
    error = squares.std() / math.sqrt(len(codes))
    assert abs(squares.mean() - law.variance.item()) < 4 * error


def test_golden_value():
    law = GammaThresholded(torch.tensor(0.3, dtype=torch.float64), 0.12, 2.0, 6.0)
    assert law.prob_active.item() == pytest.approx(0.175230, abs=1e-6)


@pytest.mark.parametrize("rate", [1e-15, 1e-3, 1.0, 1e4, 1e8])
@pytest.mark.parametrize("scale", [1e-15, 0.1, 1e8])
@pytest.mark.parametrize("concentration", [1e-6, 0.5, 300.0])
def test_logits_and_slopes_hold_at_the_ends(dtype, concentration, scale, rate):
    leaves = [
        torch.tensor(x, dtype=dtype, requires_grad=True) for x in (scale, concentration, rate)
    ]
    logits = GammaThresholded(torch.zeros((), dtype=dtype), *leaves).logits
    with mpmath.workdps(60):
        b, a, r = (mpmath.mpf(x.item()) for x in leaves)
        cost = a * mpmath.log1p(1 / (r * b))
        exact = -mpmath.log(mpmath.expm1(cost))
        # d logit / d cost = -1 / (1 - e^-cost); d cost / d log b = -a / (1 + r b) = by log r.
        by_cost = 1 / mpmath.expm1(-cost)
        slopes = [-by_cost * a / (1 + r * b), by_cost * cost, -by_cost * a / (1 + r * b)]
    # The logarithms, of 40 at most, are rounded before they are summed and exponentiated.
    rounding = 80 * torch.finfo(dtype).eps
    assert logits.item() == pytest.approx(float(exact), rel=rounding, abs=rounding)
    logits.backward()
    for leaf, slope in zip(leaves, slopes):
        relative = leaf.grad.item() * leaf.item()
        assert relative == pytest.approx(float(slope), rel=2 * rounding, abs=1e-30)


def test_it_is_a_mixed_law_of_the_same_slab(dtype):
    loc, scale = torch.randn(4, 1, dtype=dtype), torch.rand(3, dtype=dtype) + 0.1
    law = GammaThresholded(loc, scale, 2.0, torch.tensor(6.0, dtype=dtype))
    assert law.batch_shape == (4, 3) and law.sample((2,)).dtype == dtype
    same = SpikeAndSlab(dist.Laplace(loc, scale), logits=law.logits)
    z = law.sample((5,))
    assert torch.equal(law.log_prob(z), same.log_prob(z))
    wide = law.expand((2, 4, 3))
    assert type(wide) is GammaThresholded and wide.concentration.shape == (2, 4, 3)
    torch.testing.assert_close(wide.log_prob(z[:2]), law.log_prob(z[:2]))
    assert wide.to_event(2).event_shape == (4, 3)


def test_every_parameter_gets_a_pathwise_gradient():
    leaves = [torch.full((1000,), x, requires_grad=True) for x in (0.3, 0.2, 2.0, 9.0)]
    GammaThresholded(*leaves).rsample().sum().backward()
    assert all(leaf.grad.isfinite().all() and leaf.grad.abs().sum() > 0 for leaf in leaves)


def test_as_a_prior_and_in_a_bundle(tmp_path):
    law = GammaThresholded(torch.zeros(3), 0.1, 2.0, 6.0)
    moved = match(law, torch.zeros(1, dtype=torch.float64))
    again = GammaThresholded(*(x.double() for x in (law.loc, law.scale, law.concentration)), 6.0)
    assert torch.equal(moved.logits, again.logits)  # nothing is kept in the old precision
    assert spread(law, (2, 3), like=torch.zeros(1)).event_shape == (2, 3)
    check_prior(law, has_rate=False)
    save(tmp_path / "run", law=law)
    back = load(tmp_path / "run")["law"]
    z = law.sample((20,))
    assert type(back) is GammaThresholded and torch.equal(back.log_prob(z), law.log_prob(z))


@pytest.mark.parametrize("name", ["scale", "concentration", "rate"])
def test_a_parameter_that_is_not_positive_is_refused(name):
    arguments = {"loc": 0.0, "scale": 1.0, "concentration": 1.0, "rate": 1.0, name: -1.0}
    with pytest.raises(ValueError, match=name):
        GammaThresholded(**arguments, validate_args=True)


@pytest.mark.parametrize("name", ["loc", "scale", "concentration", "rate"])
def test_what_is_no_parameter_is_refused_by_name(name):
    arguments = {"loc": 0.0, "scale": 1.0, "concentration": 1.0, "rate": torch.ones(3)}
    with pytest.raises(TypeError, match=f"{name} to be a number or a tensor, got 'a'"):
        GammaThresholded(**{**arguments, name: "a"})
    other = "loc" if name == "rate" else "rate"
    shapes = {other: torch.ones(3), name: torch.ones(2)}
    with pytest.raises(ValueError, match="shapes that broadcast") as caught:
        GammaThresholded(**{**arguments, **shapes})
    assert f"{name} of (2,)" in str(caught.value) and f"{other} of (3,)" in str(caught.value)
