"""Divergences of tails, against quadrature over densities of scipy, and the published values."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch.distributions import kl_divergence

import pyro_sparse.distributions.kl
import pyro_sparse.distributions.tails_kl  # noqa: F401
from pyro_sparse.distributions.mixed import SpikeAndSlab
from pyro_sparse.distributions.tails import as_tails
from pyro_sparse.distributions.thresholded import (
    HardThresholded,
    ShiftedThresholded,
    SoftThresholded,
)

NODES, WEIGHTS = np.polynomial.legendre.leggauss(60)
BASES = {"Normal": (dist.Normal, stats.norm), "Laplace": (dist.Laplace, stats.laplace)}


def double(value):
    return torch.tensor(value, dtype=torch.float64)


class Slab:
    """A slab of ours, its log-density by scipy, and where that bends."""

    def __init__(self, kind, base, loc, scale, threshold):
        make, law = BASES[base]
        law, plain = law(loc, scale), make(double(loc), double(scale))
        two = "one-sided" not in kind
        shift, centre = threshold, 0.0
        upper, lower = threshold, -threshold
        if kind.startswith("shifted"):
            upper, lower, centre = loc + threshold, loc - threshold, loc
            self.ours = ShiftedThresholded(plain, threshold, one_sided=not two).slab
        elif kind.startswith("soft"):
            self.ours = SoftThresholded(plain, threshold, one_sided=not two).slab
        elif kind == "hard":
            shift = 0.0
            self.ours = HardThresholded(plain, threshold).slab
        elif kind == "plain":
            shift = upper = lower = 0.0
            self.ours = plain
        mass = law.sf(upper) + (law.cdf(lower) if two else 0.0)
        if kind == "plain":
            mass = 1.0
        # Without a gap of rounding errors where the tails meet.
        starts = (threshold, -threshold) if kind == "hard" else (centre, centre)

        def logpdf(z):
            up = z > starts[0]
            value = law.logpdf(np.where(up, z + shift, z - shift)) - math.log(mass)
            return np.where(up | (two & (z < starts[1])), value, -math.inf)

        self.logpdf = logpdf
        self.bends = {*starts, centre, loc, loc - shift, loc + shift}
        reach = [1, 3, 6, 10, 20, 40]
        self.bends |= {start + sign * scale * k for start in self.bends for k in reach
                       for sign in (1, -1)}  # fmt: skip


class Exponential(Slab):
    def __init__(self, scale):
        self.ours = dist.Exponential(double(1 / scale))
        self.logpdf = stats.expon(scale=scale).logpdf
        self.bends = {0.0}


def quadrature(q, p):
    cuts = np.array(sorted(q.bends | p.bends))
    cuts = cuts[(cuts >= min(q.bends)) & (cuts <= max(q.bends))]
    half, middle = np.diff(cuts)[:, None] / 2, (cuts[1:] + cuts[:-1])[:, None] / 2
    z = middle + half * NODES
    q_log, p_log = q.logpdf(z), p.logpdf(z)
    inside = np.isfinite(q_log)
    terms = np.exp(q_log[inside]) * (q_log[inside] - p_log[inside])
    return float((np.broadcast_to(half * WEIGHTS, z.shape)[inside] * terms).sum())


def draw(rng, kind, base, loc=None):
    loc = rng.normal() if loc is None else loc
    return Slab(kind, base, loc, math.exp(rng.uniform(-1.5, 0.7)), math.exp(rng.uniform(-2, 0.5)))


TWO_SIDED = ["soft", "shifted", "plain"]
ONE_SIDED = ["soft-one-sided"]


@pytest.mark.parametrize("p_base", BASES)
@pytest.mark.parametrize("q_base", BASES)
@pytest.mark.parametrize("p_kind", TWO_SIDED)
@pytest.mark.parametrize("q_kind", [*TWO_SIDED, *ONE_SIDED, "hard"])
def test_two_sided_priors_agree_with_quadrature(q_kind, q_base, p_kind, p_base):
    rng = np.random.default_rng(3)
    for _ in range(10):
        q, p = draw(rng, q_kind, q_base), draw(rng, p_kind, p_base)
        # Plain pairs too, through the same formulas.
        found = kl_divergence(as_tails(q.ours), as_tails(p.ours)).item()
        expected = quadrature(q, p)
        assert found == pytest.approx(expected, abs=1e-6, rel=1e-6)
        assert found >= 0
        # As they come, through what is registered for their types.
        found = kl_divergence(q.ours, p.ours).item()
        assert found == pytest.approx(expected, abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("p_base", BASES)
@pytest.mark.parametrize("q_base", BASES)
def test_one_sided_priors_agree_with_quadrature(q_base, p_base):
    rng = np.random.default_rng(4)
    for _ in range(10):
        q = draw(rng, "soft-one-sided", q_base)
        for p in (draw(rng, "soft-one-sided", p_base), Exponential(math.exp(rng.normal()))):
            found = kl_divergence(q.ours, p.ours).item()
            assert found == pytest.approx(quadrature(q, p), abs=1e-6, rel=1e-6)
        # Shifted ones start at their locations: that of the prior further down.
        loc = rng.normal()
        q = draw(rng, "shifted-one-sided", q_base, loc)
        p = draw(rng, "shifted-one-sided", p_base, loc - rng.exponential())
        found = kl_divergence(q.ours, p.ours).item()
        assert found == pytest.approx(quadrature(q, p), abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("p_base", BASES)
@pytest.mark.parametrize("q_base", BASES)
def test_hard_priors_agree_with_quadrature(q_base, p_base):
    rng = np.random.default_rng(5)
    for _ in range(10):
        q, p = Slab("hard", q_base, 0.4, 0.6, 0.5), Slab("hard", p_base, rng.normal(), 0.8, 0.3)
        found = kl_divergence(q.ours, p.ours).item()
        assert found == pytest.approx(quadrature(q, p), abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", ["soft", "soft-one-sided", "shifted", "shifted-one-sided", "hard"])
def test_a_law_does_not_diverge_from_itself(kind, base):
    rng = np.random.default_rng(6)
    for _ in range(10):
        law = as_tails(draw(rng, kind, base).ours)
        assert kl_divergence(law, law).item() == pytest.approx(0, abs=1e-12)


def test_plain_laws_on_either_side_are_registered():
    tails = SoftThresholded(dist.Normal(double(0.3), 1.0), 0.5).slab
    for law in (dist.Normal(double(0.1), 0.7), dist.Laplace(double(0.1), 0.7)):
        torch.testing.assert_close(kl_divergence(tails, law), kl_divergence(tails, as_tails(law)))
        torch.testing.assert_close(kl_divergence(law, tails), kl_divergence(as_tails(law), tails))
    law = dist.Exponential(double(2.0))
    torch.testing.assert_close(kl_divergence(law, tails), kl_divergence(as_tails(law), tails))


# Published values ---------------------------------------------------------------------------------


def normal(loc, scale):
    return dist.Normal(double(loc), double(scale))


def laplace(loc, scale):
    return dist.Laplace(double(loc), double(scale))


# ../shared/systems-variational.md 1d.2 to 1d.4.
GOLDEN = {
    "shifted-laplace": (
        ShiftedThresholded(laplace(0.3, 0.12), 0.2),
        SpikeAndSlab(laplace(0.0, 0.1), 0.1),
        0.397694,
    ),
    "shifted-normal-to-spike": (
        ShiftedThresholded(normal(0.25, 0.35), 0.4),
        SpikeAndSlab(normal(0.0, 0.3162), 0.1),
        0.199906,
    ),
    "shifted-normal-to-shifted": (
        ShiftedThresholded(normal(0.25, 0.35), 0.4),
        ShiftedThresholded(normal(0.0, 0.3162), 0.52),
        0.333466,
    ),
    "shifted-normal-to-soft": (
        ShiftedThresholded(normal(0.25, 0.35), 0.4),
        SoftThresholded(normal(0.0, 0.3162), 0.52),
        0.333466,
    ),
    "soft-normal": (
        SoftThresholded(normal(0.35, 0.3), 0.25),
        SoftThresholded(normal(0.0, 0.3162), 0.4),
        1.041951,
    ),
    "soft-laplace-1": (
        SoftThresholded(laplace(0.35, 0.15), 0.25),
        SoftThresholded(laplace(0.0, 0.1), 0.23),
        1.886937,
    ),
    "soft-laplace-2": (
        SoftThresholded(laplace(0.1, 0.15), 0.25),
        SoftThresholded(laplace(0.0, 0.1), 0.23),
        0.137532,
    ),
    "soft-laplace-3": (
        SoftThresholded(laplace(-0.6, 0.07), 0.2),
        SoftThresholded(laplace(0.0, 0.1), 0.2),
        5.354666,
    ),
    "relu": (
        SoftThresholded(normal(0.1, 0.3), 0.0, one_sided=True),
        SpikeAndSlab(dist.Exponential(double(5.0)), 0.15),
        0.682268,
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name):
    q, p, expected = GOLDEN[name]
    assert kl_divergence(q, p).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("law", [SoftThresholded, ShiftedThresholded, HardThresholded])
def test_a_threshold_only_loses_information(law, base):
    """The same map on both sides: the divergence is at most that of the bases."""
    make, options = BASES[base][0], {}
    loc = torch.randn(500, dtype=torch.float64)
    scale, prior_scale, threshold = (0.8 * torch.randn(3, 500).double()).exp()
    if law is ShiftedThresholded:
        # There the location comes in after the threshold; the noise alone is compared.
        loc = torch.zeros_like(loc)
    q, p = make(loc, scale), make(torch.zeros_like(loc), prior_scale)
    mixed = kl_divergence(law(q, threshold, **options), law(p, threshold, **options))
    assert (mixed >= -1e-10).all()
    assert (mixed <= kl_divergence(q, p) + 1e-10).all()


@pytest.mark.parametrize("base", BASES)
def test_the_published_divergence_bounds_that_of_shifted_laws(base):
    """The base's, used in place of the mixed law's, is looser for every location."""
    make = BASES[base][0]
    loc = torch.linspace(-3, 3, 41, dtype=torch.float64)[:, None, None]
    scale = torch.logspace(-1, 0.6, 15, dtype=torch.float64)[:, None]
    threshold = torch.logspace(-2, 0.5, 15, dtype=torch.float64)
    q, p = make(loc, scale), make(torch.zeros_like(loc), torch.ones_like(loc))
    mixed = kl_divergence(ShiftedThresholded(q, threshold), ShiftedThresholded(p, threshold))
    assert (mixed >= -1e-10).all()
    assert (mixed <= kl_divergence(q, p) + 1e-10).all()


# Infinite ones ------------------------------------------------------------------------------------


def test_infinite_divergences_are_refused():
    base = dist.Normal(torch.tensor(0.3), 1.0)
    soft, one = SoftThresholded(base, 0.5), SoftThresholded(base, 0.5, one_sided=True)
    hard = HardThresholded(base, 0.5)
    for q in (soft, hard):
        for p in (one, SpikeAndSlab(dist.Exponential(torch.tensor(1.0)), 0.5)):
            with pytest.raises(ValueError, match="one-sided"):
                kl_divergence(q, p)
    for q in (soft, one, SpikeAndSlab(base, 0.5), HardThresholded(base, 0.4)):
        with pytest.raises(ValueError, match="gap around zero .* HardThresholded with a threshold"):
            kl_divergence(q, hard)
    with pytest.raises(ValueError, match="gap around zero"):
        kl_divergence(soft.slab, hard.slab)
    assert kl_divergence(HardThresholded(base, 0.6), hard).isfinite()
    shifted = ShiftedThresholded(base, 0.5, one_sided=True)
    with pytest.raises(ValueError, match="starts no lower"):
        kl_divergence(one, shifted)
    assert kl_divergence(shifted, one).isfinite()


# float32 and gradients ----------------------------------------------------------------------------


@pytest.mark.parametrize("p_base", BASES)
@pytest.mark.parametrize("q_base", BASES)
@pytest.mark.parametrize("law", [SoftThresholded, ShiftedThresholded])
def test_float32_agrees_with_float64_far_out(law, q_base, p_base):
    grid = torch.cartesian_prod(
        torch.tensor([0.0, 0.3, -5.0, 40.0]),
        torch.tensor([1e-3, 0.2, 1.0, 50.0]),
        torch.tensor([1e-8, 0.5, 30.0]),
        torch.tensor([1e-2, 1.0, 100.0]),
    )

    def divergence(dtype):
        inputs = [column.to(dtype).requires_grad_() for column in grid.T]
        loc, scale, threshold, prior_scale = inputs
        q = law(BASES[q_base][0](loc, scale), threshold)
        p = SoftThresholded(BASES[p_base][0](torch.zeros_like(loc), prior_scale), threshold / 2)
        value = kl_divergence(as_tails(q.slab), as_tails(p.slab))
        (gradient,) = torch.autograd.grad(value.sum(), loc, retain_graph=True)
        rest = torch.autograd.grad(value.sum(), inputs)
        assert value.isfinite().all()
        assert all(g.isfinite().all() for g in rest)
        return value.detach().double(), gradient.double()

    found, truth = divergence(torch.float32), divergence(torch.float64)
    torch.testing.assert_close(found[0], truth[0], rtol=5e-5, atol=5e-5)
    size = truth[1].abs().amax() * 1e-6
    torch.testing.assert_close(found[1], truth[1], rtol=1e-3, atol=max(1e-3, size.item()))


@pytest.mark.parametrize("p_base", BASES)
@pytest.mark.parametrize("q_base", BASES)
@pytest.mark.parametrize("law", [SoftThresholded, ShiftedThresholded])
def test_gradients_agree_with_differences(law, q_base, p_base):
    def divergence(loc, scale, threshold, prior_loc, prior_scale):
        q = law(BASES[q_base][0](loc, scale), threshold)
        p = SoftThresholded(BASES[p_base][0](prior_loc, prior_scale), 0.3)
        return kl_divergence(q, p)

    for values in ((0.4, 0.5, 0.35, 0.1, 0.7), (-1.3, 0.2, 0.6, 0.9, 0.7), (0.2, 0.1, 1.9, 0.0, 1)):
        inputs = [double(float(value)).requires_grad_() for value in values]
        assert torch.autograd.gradcheck(divergence, inputs, atol=1e-6)
