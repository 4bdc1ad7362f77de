"""Divergences of laws with an atom: against quadrature, golden values, and what is refused."""

import math

import mpmath
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, stats
from torch.distributions import kl_divergence

from pyro_sparse.distributions import (
    GammaThresholded,
    RelaxedSpikeAndSlab,
    SoftThresholded,
    SpikeAndSlab,
    kl_gates,
)


def double(value):
    return torch.as_tensor(value, dtype=torch.float64)


MAKE = {
    "Laplace": dist.Laplace,
    "Normal": dist.Normal,
    "Exponential": lambda loc, scale: dist.Exponential(1 / scale),
}
# scipy's Laplace takes the logarithm of a density that underflows.
LOG_DENSITY = {
    "Laplace": lambda z, loc, scale: -abs(z - loc) / scale - math.log(2 * scale),
    "Normal": lambda z, loc, scale: stats.norm.logpdf(z, loc, scale),
    "Exponential": lambda z, loc, scale: stats.expon.logpdf(z, scale=scale),
}
# Every pair with a finite divergence.
PAIRS = [(q, p) for q in MAKE for p in MAKE if p != "Exponential" or q == "Exponential"]


def slab(name, loc, scale):
    return MAKE[name](double(loc), double(scale))


def quadrature(q, p, loc, scale, other):
    """Integral of q log(q / p) over 60 scales of q either way, split at both locations."""
    edges = [loc + scale * d for d in (-60, -20, -5, -1, 0, 1, 5, 20, 60)]
    edges = sorted({*edges, 0.0, other})
    edges = [e for e in edges if loc - 60 * scale <= e <= loc + 60 * scale]

    def integrand(z):
        log_density = q(z)
        # Where the density underflows the product is zero.
        return math.exp(log_density) * (log_density - p(z)) if log_density > -700 else 0.0

    return sum(
        integrate.quad(integrand, a, b, epsabs=1e-11, epsrel=1e-11)[0]
        for a, b in zip(edges, edges[1:])
    )


def bernoulli(q, p):
    return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_divergence_is_the_integral(first, second):
    draw = np.random.default_rng(0)
    for _ in range(12):
        (loc, other), (scale, width) = draw.normal(0, 1, 2), 10 ** draw.uniform(-1, 1, 2)
        g, pi = draw.uniform(0.01, 0.99, 2)
        loc = 0.0 if first == "Exponential" else loc
        q, p = slab(first, loc, scale), slab(second, other, width)
        expected = quadrature(
            lambda z: LOG_DENSITY[first](z, loc, scale),  # noqa: B023
            lambda z: LOG_DENSITY[second](z, other, width),  # noqa: B023
            *(loc, scale, other),
        )
        between = kl_divergence(q, p).item()
        assert between == pytest.approx(expected, abs=1e-7, rel=1e-7) and between >= 0
        prior = SpikeAndSlab(p, probs=double(pi))
        mixed = kl_divergence(SpikeAndSlab(q, probs=double(g)), prior).item()
        assert mixed == pytest.approx(bernoulli(g, pi) + g * expected, abs=1e-7, rel=1e-7)
        assert mixed >= 0
        continuous = kl_divergence(q, prior).item()
        assert continuous == pytest.approx(expected - math.log(pi), abs=1e-7, rel=1e-7)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_divergence_is_the_mean_of_the_log_ratio_of_the_mixed_densities(first, second):
    q = SpikeAndSlab(slab(first, 0.4, 0.5), probs=double(0.3))
    p = SpikeAndSlab(slab(second, -0.2, 1.5), probs=double(0.1))
    z = q.sample((100_000,))
    ratio = q.log_prob(z) - p.log_prob(z)
    error = ratio.std().item() / math.sqrt(len(ratio))
    assert abs(ratio.mean().item() - kl_divergence(q, p).item()) < 4 * error


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_float32_agrees_with_float64(first, second):
    draw = np.random.default_rng(1)
    loc, other = draw.normal(0, 3, (2, 200))
    scale, width = 10 ** draw.uniform(-4, 4, (2, 200))
    logits = torch.from_numpy(draw.uniform(-30, 30, (2, 200)))
    results = []
    for kind in (torch.float32, torch.float64):
        a, b, c, d = (torch.from_numpy(x).float().to(kind) for x in (loc, other, scale, width))
        gates = logits.float().to(kind)
        q = SpikeAndSlab(MAKE[first](a, c), logits=gates[0])
        p = SpikeAndSlab(MAKE[second](b, d), logits=gates[1])
        results.append(kl_divergence(q, p).double())
    # Terms of the size of log(scale), about 10, and of the result are rounded.
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-5)


def test_laplace_against_normal_keeps_its_digits_far_from_zero():
    q, p = dist.Laplace(4097.0, 1.0), dist.Normal(4096.0, 1.0)
    exact = kl_divergence(dist.Laplace(double(1.0), 1.0), dist.Normal(double(0.0), 1.0))
    assert kl_divergence(q, p).item() == pytest.approx(exact.item(), rel=1e-6)


# Values from the algebra of the literature --------------------------------------------------------


def test_golden_values():
    active = math.exp(-0.2 / 0.12)
    q = SpikeAndSlab(dist.Laplace(double(0.3), 0.12), probs=double(active))
    p = SpikeAndSlab(dist.Laplace(double(0.0), 0.1), probs=double(0.1))
    assert q.prob_active.item() == pytest.approx(0.188876, abs=1e-6)
    assert q.mean.item() == pytest.approx(0.056663, abs=1e-6)
    assert q.variance.item() == pytest.approx(0.019228, abs=1e-6)
    assert kl_divergence(q, p).item() == pytest.approx(0.397694, abs=1e-6)


def test_a_gamma_threshold_diverges_as_the_spike_and_slab_it_is():
    q = GammaThresholded(double(0.3), 0.12, 2.0, 6.0)
    p = SpikeAndSlab(dist.Laplace(double(0.0), 0.1), probs=double(0.1))
    g = (1 + 1 / 0.72) ** -2.0
    slabs = math.log(0.1 / 0.12) + 3 + 1.2 * math.exp(-2.5) - 1
    assert kl_divergence(q, p).item() == pytest.approx(bernoulli(g, 0.1) + g * slabs, rel=1e-12)


# Gates --------------------------------------------------------------------------------------------

LOGITS = [-200.0, -30.0, -16.0, -3.0, -0.5, 0.0, 0.4, 2.0, 17.0, 60.0, 200.0]


def exact_gates(q, p):
    with mpmath.workdps(250):
        g, pi = (1 / (1 + mpmath.exp(-mpmath.mpf(x))) for x in (q, p))
        return float(g * mpmath.log(g / pi) + (1 - g) * mpmath.log((1 - g) / (1 - pi)))


@pytest.mark.parametrize("shift", [0.0, 1e-3, -0.2, 0.9, -1.1, 5.0, -40.0])
def test_gates_agree_with_extended_precision(dtype, shift):
    q = torch.tensor(LOGITS, dtype=dtype)
    p = q + shift
    ours = kl_gates(q, p)
    exact = np.array([exact_gates(*pair) for pair in zip(q.tolist(), p.tolist())])
    rounding = torch.finfo(dtype).eps
    # Cancelled digits: at most those of the smaller gate times the shift, in units of rounding.
    small = np.exp(-np.abs(q.double().numpy())) + np.exp(-np.abs(p.double().numpy()))
    slack = 8 * rounding * small * abs(shift) + 1e-37
    assert (np.abs(ours.numpy() - exact) <= 40 * rounding * exact + slack).all()


@pytest.mark.parametrize("q", LOGITS)
@pytest.mark.parametrize("p", [-40.0, -0.2, 0.3, 1.0, 200.0])
def test_the_slope_of_the_gates_is_exact(q, p):
    first, second = double(q).requires_grad_(), double(p).requires_grad_()
    kl_gates(first, second).backward()
    with mpmath.workdps(250):
        g, pi = (1 / (1 + mpmath.exp(-mpmath.mpf(x))) for x in (q, p))
        slopes = [float(g * (1 - g) * (mpmath.mpf(q) - p)), float(pi - g)]
    assert first.grad.item() == pytest.approx(slopes[0], rel=1e-9, abs=1e-15)
    assert second.grad.item() == pytest.approx(slopes[1], rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(
    ("q", "p", "expected"),
    [
        (-math.inf, -math.inf, 0.0),
        (math.inf, math.inf, 0.0),
        (-math.inf, math.inf, math.inf),
        (0.0, math.inf, math.inf),
        (0.0, -math.inf, math.inf),
        (-200.0, -math.inf, math.inf),
        (200.0, math.inf, math.inf),
        (-math.inf, 0.0, math.log(2)),
        (math.inf, 0.0, math.log(2)),
        (math.inf, -50.0, 50.0),
    ],
)
def test_sure_gates(dtype, q, p, expected):
    leaf = torch.tensor(q, dtype=dtype, requires_grad=True)
    scale = torch.tensor(0.5, dtype=dtype, requires_grad=True)
    slabs = dist.Laplace(0.1, scale), dist.Laplace(torch.zeros((), dtype=dtype), 1.0)
    value = kl_gates(leaf, torch.tensor(p, dtype=dtype))
    assert value.item() == pytest.approx(expected, rel=1e-6)
    first = SpikeAndSlab(slabs[0], logits=leaf)
    whole = kl_divergence(first, SpikeAndSlab(slabs[1], logits=torch.tensor(p, dtype=dtype)))
    between = kl_divergence(*slabs).item() * (0.5 if q == 0 else float(q > 0))
    assert whole.item() == pytest.approx(expected + between, rel=1e-6)
    grads = torch.autograd.grad(whole, [leaf, scale])
    assert all(grad.isfinite().all() for grad in grads)


# Shapes and wrappers ------------------------------------------------------------------------------


def laws(*shape):
    q = SpikeAndSlab(dist.Laplace(torch.randn(shape), 0.5), logits=torch.randn(shape))
    return q, SpikeAndSlab(dist.Normal(torch.zeros(shape[1:]), 1.0), 0.2)


def test_batches_broadcast_and_events_are_summed():
    q, p = laws(4, 2, 3)
    assert kl_divergence(q, p).shape == (4, 2, 3)
    p = p.expand((4, 2, 3))
    summed = kl_divergence(q.to_event(2), p.to_event(2))
    torch.testing.assert_close(summed, kl_divergence(q, p).sum((-1, -2)))
    # Pyro sums what both take for an event, and a law without a batch is an event of zero dims.
    torch.testing.assert_close(kl_divergence(q.to_event(0), p.to_event(0)), kl_divergence(q, p))


def test_masked_laws():
    q, p = laws(4, 3)
    p = p.expand((4, 3))
    kept = torch.rand(4, 3) < 0.5
    expected = torch.where(kept, kl_divergence(q, p), torch.zeros(4, 3))
    torch.testing.assert_close(kl_divergence(q.mask(kept), p.mask(kept)), expected)
    with pytest.raises(NotImplementedError, match="MaskedDistribution and q type SpikeAndSlab"):
        kl_divergence(q.mask(kept), p)


def test_different_numbers_of_event_dims_are_refused_with_both_shapes():
    q, p = laws(4, 3)
    p = p.expand((4, 3))
    message = r"one event shape, got \(3,\) and \(\) \(Independent and SpikeAndSlab\)"
    with pytest.raises(ValueError, match=message):
        kl_divergence(q.to_event(1), p)
    with pytest.raises(ValueError, match=r"one event shape, got \(\) and \(3,\)"):
        kl_divergence(q, p.to_event(1))
    with pytest.raises(ValueError, match="one event shape"):
        kl_divergence(q.to_event(1), p.to_event(2))


# What is refused ----------------------------------------------------------------------------------

MIXED = SpikeAndSlab(dist.Laplace(torch.zeros(3), 1.0), 0.3)
ONE_SIDED = SpikeAndSlab(dist.Exponential(torch.ones(3)), 0.3)
PLAIN = {
    "Laplace": dist.Laplace(torch.zeros(3), 1.0),
    "Normal": dist.Normal(torch.zeros(3), 1.0),
    "Exponential": dist.Exponential(torch.ones(3)),
    "StudentT": dist.StudentT(torch.ones(3) * 3),
    "RelaxedSpikeAndSlab": RelaxedSpikeAndSlab(dist.Normal(torch.zeros(3), 1.0), 0.5, 0.3),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_prior_without_an_atom_is_refused_by_name(name):
    law = GammaThresholded(torch.zeros(3), 1.0, 2.0, 3.0)
    slab = "Normal" if name == "RelaxedSpikeAndSlab" else name  # a gate needs no second one
    message = rf"atom at zero for a GammaThresholded, got {name}: .*SpikeAndSlab\({slab}\("
    with pytest.raises(ValueError, match=message):
        kl_divergence(law, PLAIN[name])
    with pytest.raises(ValueError, match=message):
        kl_divergence(law.to_event(1), PLAIN[name].to_event(1))


@pytest.mark.parametrize("q", [MIXED, PLAIN["Laplace"], PLAIN["Normal"]], ids=repr)
def test_two_sided_against_one_sided_is_refused(q):
    with pytest.raises(ValueError, match="two-sided (Laplace|Normal) against a one-sided Expon"):
        kl_divergence(q, ONE_SIDED)


def test_a_message_does_not_print_the_bounds():
    for base in (dist.Normal, dist.Laplace):
        p = SoftThresholded(base(torch.zeros(3), 1.0), 0.2, one_sided=True)
        with pytest.raises(ValueError, match="a one-sided Tails: the divergence") as caught:
            kl_divergence(MIXED, p)
        assert "tensor" not in str(caught.value)
    with pytest.raises(ValueError, match="a bounded Uniform: the divergence"):
        kl_divergence(MIXED, SpikeAndSlab(dist.Uniform(-torch.ones(3), 1.0), 0.3))


def test_a_point_is_refused():
    point = dist.Delta(torch.zeros(3))
    for q, p in ((point, MIXED), (point.to_event(1), MIXED.to_event(1))):
        with pytest.raises(ValueError, match=r"got Delta: .*the unit of the codes"):
            kl_divergence(q, p)


@pytest.mark.parametrize(
    "other",
    [
        dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(3, 2), 1.0)
        ),
        dist.Poisson(torch.ones(3)),
        dist.LogNormal(torch.zeros(3), 1.0),
    ],
    ids=["mixture", "counts", "no closed form"],
)
def test_unknown_pairs_are_not_implemented(other):
    with pytest.raises(NotImplementedError, match="No KL"):
        kl_divergence(other, MIXED)
    with pytest.raises(NotImplementedError, match="No KL"):
        kl_divergence(PLAIN["RelaxedSpikeAndSlab"], MIXED)
    unknown = SpikeAndSlab(dist.HalfCauchy(torch.ones(3)), 0.5)
    with pytest.raises(NotImplementedError, match="No KL"):
        kl_divergence(ONE_SIDED, unknown)
