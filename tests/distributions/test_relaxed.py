"""The relaxed gate: a density against extended precision, draws, moments, and its cold limit."""

import math

import mpmath
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, special, stats

from pyro_sparse.distributions import RelaxedSpikeAndSlab, SpikeAndSlab

MAKE = {
    "Laplace": lambda loc, scale: dist.Laplace(loc, scale),
    "Normal": lambda loc, scale: dist.Normal(loc, scale),
    "Exponential": lambda loc, scale: dist.Exponential(1 / scale),
}


def relaxed(name, loc, scale, temperature, logit, dtype=torch.float64):
    loc, scale, temperature, logit = (
        torch.as_tensor(x, dtype=dtype) for x in (loc, scale, temperature, logit)
    )
    return RelaxedSpikeAndSlab(MAKE[name](loc, scale), temperature, logits=logit)


def reference(name, loc, scale, temperature, logit, z):
    """Log-density and distribution function by adaptive quadrature over the gate, 25 digits."""
    with mpmath.workdps(25):
        z, loc, scale = mpmath.mpf(z), mpmath.mpf(loc), mpmath.mpf(scale)
        e = mpmath.exp

        def density(w):
            if name == "Laplace":
                return e(-abs(w - loc) / scale) / (2 * scale)
            if name == "Normal":
                return mpmath.npdf(w, loc, scale)
            return e(-w / scale) / scale

        def below(w):
            if name == "Laplace":
                tail = e(-abs(w - loc) / scale) / 2
                return tail if w < loc else 1 - tail
            return mpmath.ncdf(w, loc, scale) if name == "Normal" else 1 - e(-w / scale)

        def gate(t):
            return 1 / (1 + e(-t))

        def noise(t):
            x = e(-abs(temperature * t - logit))
            return temperature * x / (1 + x) ** 2

        bulk = mpmath.log(abs(z) / scale)
        centres = [bulk, bulk - 4, mpmath.mpf(0), mpmath.mpf(logit) / temperature]
        ratio = z / loc if loc else mpmath.mpf(-1)
        if 0 < ratio < 1:
            centres.append(mpmath.log(ratio / (1 - ratio)))
        low, high = min(centres) - 30, mpmath.mpf(60)
        steps = [0, 0.05, 0.2, 1, 3, 8, 20, 50, 100]
        edges = {c + sign * d for c in centres for d in steps for sign in (-1, 1)}
        edges = [low, *sorted(x for x in edges if low < x < high), high]
        open_gate = gate(logit - temperature * high)
        p = mpmath.quad(lambda t: noise(t) * density(z / gate(t)) / gate(t), edges)
        f = mpmath.quad(lambda t: noise(t) * below(z / gate(t)), edges)
        f += open_gate * below(z) + (gate(temperature * low - logit) if z > 0 else 0)
        return float(mpmath.log(p + open_gate * density(z))), float(f)


# Temperature, loc and value in scales, logit; the whole grid of the docstring took minutes.
CASES = [
    ("Laplace", 0.01, 4.0, 1.0, 2.5),
    ("Laplace", 0.5, 4.0, -1.0, 1e-6),
    ("Laplace", 10.0, -2.0, 0.5, -1.0),
    ("Normal", 0.01, 0.0, 2.0, -2e-13),
    ("Normal", 0.3, 8.0, -2.0, 3.0),
    ("Normal", 1.0, 8.5, 4.0, -1e-20),
    ("Normal", 3.0, 0.0, 0.1, 5.8),
    ("Exponential", 0.1, 0.0, -3.0, 0.7),
    ("Exponential", 5.0, 0.0, 3.0, 1e-3),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_density_and_cdf_agree_with_extended_precision(case):
    name, temperature, loc, logit, z = case
    scale = 0.4
    law = relaxed(name, loc * scale, scale, temperature, logit)
    value = torch.tensor(z * scale, dtype=torch.float64)
    log_density, below = reference(name, loc * scale, scale, temperature, logit, z * scale)
    assert law.log_prob(value).item() == pytest.approx(log_density, abs=1e-8)
    assert law.cdf(value).item() == pytest.approx(below, abs=1e-8)
    # In float32 the value, the parameters and the result are rounded, not the quadrature.
    single = relaxed(name, loc * scale, scale, temperature, logit, torch.float32)
    assert single.log_prob(value.float()).item() == pytest.approx(log_density, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_the_density_integrates_to_the_cdf(name, temperature):
    law = relaxed(name, 0.5, 0.4, temperature, -0.3)
    edges = np.array([1e-4, 1e-2, 0.2, 0.5, 1.0, 4.0])
    edges = torch.from_numpy(
        np.concatenate([-edges[::-1], edges]) if name != "Exponential" else edges
    )
    place, weight = np.polynomial.legendre.leggauss(60)
    low, high = edges[:-1, None], edges[1:, None]
    z = low + (high - low) * torch.from_numpy((place + 1) / 2)
    density = law.log_prob(torch.where(z == 0, 1e-300, z)).exp()
    mass = (density * torch.from_numpy(weight / 2)).sum(-1) * (edges[1:] - edges[:-1])
    inner = (edges[1:] * edges[:-1]) > 0  # the density is unbounded at zero
    torch.testing.assert_close(mass[inner], law.cdf(edges).diff()[inner], rtol=0, atol=2e-8)
    assert law.cdf(torch.tensor(60.0)).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("temperature", [0.2, 1.0, 4.0])
def test_draws_follow_the_cdf_and_the_moments(name, temperature):
    law = relaxed(name, 0.5, 0.4, temperature, -0.3)
    codes = law.sample((5_000,))
    assert stats.kstest(codes.numpy(), lambda z: law.cdf(torch.from_numpy(z)).numpy()).pvalue > 1e-3
    error = codes.std().item() / math.sqrt(len(codes))
    assert abs(codes.mean().item() - law.mean.item()) < 4 * error
    squares = (codes - law.mean).square()
    error = squares.std().item() / math.sqrt(len(codes))
    assert abs(squares.mean().item() - law.variance.item()) < 4 * error


@pytest.mark.parametrize("temperature", [0.01, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("logit", [-8.0, 0.0, 8.0])
def test_moments_agree_with_quadrature(temperature, logit):
    law = relaxed("Normal", 1.5, 0.4, temperature, logit)

    def moment(power):
        def f(x):
            return special.expit((x + logit) / temperature) ** power * stats.logistic.pdf(x)

        edges = sorted({-40, -logit - 20 * temperature, -logit, -logit + 20 * temperature, 0, 40})
        return sum(integrate.quad(f, a, b, limit=200)[0] for a, b in zip(edges, edges[1:]))

    first, second = moment(1), moment(2)
    assert law.mean.item() == pytest.approx(1.5 * first, rel=1e-7)
    variance = second * (0.16 + 2.25) - (1.5 * first) ** 2
    assert law.variance.item() == pytest.approx(variance, abs=1e-7)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
def test_icdf_inverts_cdf(name, temperature):
    law = relaxed(name, 0.5, 0.4, temperature, -0.3)
    u = torch.tensor([1e-6, 0.01, 0.2, 0.5, 0.8, 0.99, 1 - 1e-6], dtype=torch.float64)
    torch.testing.assert_close(law.cdf(law.icdf(u)), u, rtol=0, atol=1e-10)
    assert (law.icdf(u).diff() > 0).all()


def test_half_open_gates_have_the_probability_that_was_asked_for():
    # A slab at one, so that a code is its gate. log(probs) in place of log-odds would give
    # probs / (1 + probs): 0.286.
    law = RelaxedSpikeAndSlab(dist.Normal(1.0, 1e-6), 0.3, probs=0.4)
    gates = law.sample((50_000,))
    assert stats.binomtest(int((gates > 0.5).sum()), 50_000, 0.4).pvalue > 1e-3
    torch.testing.assert_close(law.gate_probs, torch.tensor(0.4))
    assert law.prob_active == 1


def test_it_becomes_spike_and_slab_when_it_is_cold():
    cold = relaxed("Laplace", 0.3, 0.5, 1e-3, -1.0)
    limit = SpikeAndSlab(cold.slab, logits=cold.logits)
    z = torch.tensor([-2.0, -0.1, 0.1, 0.3, 1.0, 3.0], dtype=torch.float64)
    # A gate is neither open nor closed with a probability of the order of the temperature.
    torch.testing.assert_close(cold.cdf(z), limit.cdf(z), rtol=0, atol=3e-3)
    torch.testing.assert_close(cold.mean, limit.mean, rtol=0, atol=1e-3)
    torch.testing.assert_close(cold.variance, limit.variance, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", MAKE)
def test_gradients_agree_with_finite_differences(name):
    draw = np.random.default_rng(0)
    start = [0.5, 0.4, 0.7, -0.3]
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in start]
    z = torch.from_numpy(np.abs(draw.normal(0, 0.6, 6))).requires_grad_()

    def both(loc, scale, temperature, logit, z):
        law = relaxed(name, loc, scale, temperature, logit)
        return torch.stack([law.log_prob(z), law.cdf(z)])

    leaves = leaves if name != "Exponential" else leaves[1:]
    head = [] if name != "Exponential" else [0.0]
    assert torch.autograd.gradcheck(
        lambda *x: both(*head, *x), (*leaves, z), eps=1e-5, atol=1e-6, rtol=1e-5
    )
    torch.manual_seed(0)
    law = relaxed(name, *head, *leaves)
    pathwise = torch.autograd.grad(law.rsample((100,)).sum(), leaves)
    assert all(grad.isfinite() and grad != 0 for grad in pathwise)


def test_at_zero():
    for temperature in (0.5, 1.0):
        law = relaxed("Laplace", 0.3, 0.5, temperature, -1.0)
        assert law.log_prob(torch.zeros(1)).item() == math.inf
    law = relaxed("Laplace", 0.3, 0.5, 2.5, -1.0)
    near = law.log_prob(torch.tensor([1e-30, 0.0], dtype=torch.float64))
    assert near[0].item() == pytest.approx(near[1].item(), abs=1e-8)
    assert law.cdf(torch.zeros(1)).item() == pytest.approx(math.exp(-0.6) / 2, rel=1e-12)
    positive = RelaxedSpikeAndSlab(dist.LogNormal(0.0, 0.5), 2.0, 0.5)
    assert positive.log_prob(torch.zeros(1)).item() == -math.inf
    assert positive.cdf(torch.zeros(1)).item() == 0


@pytest.mark.parametrize("shape", [(), (3,), (2, 1)], ids=str)
def test_shapes(shape, dtype):
    law = RelaxedSpikeAndSlab(
        dist.Laplace(torch.zeros(shape, dtype=dtype), 1.0), 0.5, logits=torch.zeros(shape)
    )
    for wide in (law, law.expand((4, 2, 3))):
        z = wide.rsample((5,))
        assert z.shape == (5, *wide.batch_shape) and z.dtype == dtype
        for value in (wide.log_prob(z), wide.cdf(z)):
            assert value.shape == z.shape and value.dtype == dtype
        torch.testing.assert_close(wide.log_prob(z), law.log_prob(z))
        assert wide.mean.shape == wide.variance.shape == wide.gate_probs.shape == wide.batch_shape
        assert wide.icdf(torch.full(wide.batch_shape, 0.3)).shape == wide.batch_shape
    assert law.to_event(0).has_rsample and type(law.expand((4, 2, 3))) is RelaxedSpikeAndSlab


def test_what_is_refused():
    with pytest.raises(ValueError, match="above zero.*Uniform, which is bounded"):
        RelaxedSpikeAndSlab(dist.Uniform(1.0, 2.0), 0.5, 0.5)
    with pytest.raises(ValueError, match="temperature"):
        RelaxedSpikeAndSlab(dist.Laplace(0.0, 1.0), -0.5, 0.5, validate_args=True)
    with pytest.raises(ValueError, match="exactly one"):
        RelaxedSpikeAndSlab(dist.Laplace(0.0, 1.0), 0.5)
    with pytest.raises(TypeError, match="temperature to be a number"):
        RelaxedSpikeAndSlab(dist.Laplace(0.0, 1.0), None, 0.5)
    with pytest.raises(ValueError, match=r"slab of \(3,\), temperature of \(2,\)"):
        RelaxedSpikeAndSlab(dist.Laplace(torch.zeros(3), 1.0), torch.ones(2), 0.5)
    nested = RelaxedSpikeAndSlab(dist.Laplace(0.0, 1.0), 0.5, 0.5)
    with pytest.raises(ValueError, match="without a gate of its own"):
        RelaxedSpikeAndSlab(nested, 0.5, 0.5)
    law = RelaxedSpikeAndSlab(dist.Exponential(1.0), 0.5, 0.5, validate_args=True)
    with pytest.raises(ValueError, match="support"):
        law.log_prob(torch.tensor(-1.0))
    assert law.cdf(torch.tensor(-1.0)) == 0
    with pytest.raises(NotImplementedError, match="mean of"):
        law.entropy()
