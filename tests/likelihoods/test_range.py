"""Accuracy over the range table: counts to 1e9, predictors to overflow, parameters 1e-8 to 1e8.

Errors are in rounding units of ``|log p| + |eta d log p / d eta| + 1``: what rounding of the inputs
alone would do. The truth is worked out with 60 digits at the rounded inputs.
"""

import itertools

import mpmath
import pytest
import torch

from pyro_sparse.distributions import (
    NaturalBinomial,
    NaturalGamma,
    NaturalNegativeBinomial,
    NaturalPoisson,
)

mpmath.mp.dps = 60
COUNTS = [0, 1, 2, 10, 16, 1000, 10**6, 10**9]
PREDICTORS = [-100.0, -50.0, -20.0, 0.0, 20.0, 50.0, 79.0]
FAR = [80.0, 88.0, 120.0, 1e3, -1e3]
PARAMETERS = [1e-8, 1e-3, 1.0, 30.0, 1e4, 1e8]
UNITS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def poisson(y, eta):
    return y * eta - mpmath.exp(eta) - mpmath.loggamma(y + 1), y - mpmath.exp(eta)


def binomial(y, eta, n):
    binom = mpmath.loggamma(n + 1) - mpmath.loggamma(y + 1) - mpmath.loggamma(n - y + 1)
    value = binom + y * eta - n * mpmath.log1p(mpmath.exp(eta))
    return value, y - n / (1 + mpmath.exp(-eta))


def negative_binomial(y, eta, r):
    binom = mpmath.loggamma(y + r) - mpmath.loggamma(y + 1) - mpmath.loggamma(r)
    mean = mpmath.exp(eta)
    value = binom + y * eta - y * mpmath.log(r + mean) - r * mpmath.log1p(mean / r)
    return value, (y - mean) / (1 + mean / r)


def gamma(y, eta, k):
    value = k * mpmath.log(k) - k * eta + (k - 1) * mpmath.log(y) - k * y * mpmath.exp(-eta)
    return value - mpmath.loggamma(k), k * (y * mpmath.exp(-eta) - 1)


def near(value):
    """Predictors around that of the largest likelihood, where deviances are small."""
    log = float(mpmath.log(value)) if value > 0 else 0.0
    return [log + shift for shift in (-3.0, -0.1, -1e-3, 0.0, 1e-3, 0.1, 3.0)]


def cases(family):
    if family == "poisson":
        for y in COUNTS:
            yield from ((y, eta) for eta in PREDICTORS + near(y))
    elif family == "binomial":
        for n in (1, 10, 1000, 10**6):
            for y in sorted({0, 1, n // 3, n - 1, n}):
                logits = near(y / (n - y)) if 0 < y < n else []
                yield from ((y, eta, n) for eta in [*PREDICTORS, -1e4, 1e4, *logits])
    elif family == "negative_binomial":
        for y, r in itertools.product(COUNTS, PARAMETERS):
            yield from ((y, eta, r) for eta in PREDICTORS + near(y))
    else:
        for y, k in itertools.product([1e-6, 1e-3, 1.0, 40.0, 1e6], PARAMETERS):
            # Further down y exp(-eta), or k times that, runs over the cap, where a tangent goes on.
            low = float(mpmath.log(max(k, 1) * y)) - 78
            yield from ((y, e, k) for e in PREDICTORS + near(y) if e > low)


LAWS = {
    "poisson": (poisson, NaturalPoisson),
    "binomial": (binomial, NaturalBinomial),
    "negative_binomial": (negative_binomial, NaturalNegativeBinomial),
    "gamma": (gamma, NaturalGamma),
}


def tabulate(family, dtype):
    """Data, predictors and parameters as tensors of a dtype, in columns."""
    rows = torch.tensor([[float(v) for v in row] for row in cases(family)], dtype=torch.float64)
    return [column.to(dtype) for column in rows.T]


@pytest.mark.parametrize("dtype", UNITS, ids=["float32", "float64"])
@pytest.mark.parametrize("family", LAWS)
def test_log_densities_are_right_to_sixteen_rounding_units(family, dtype, record_property):
    truth, law = LAWS[family]
    y, eta, *parameters = tabulate(family, dtype)
    values = law(eta, *parameters).log_prob(y)
    assert values.dtype == dtype
    worst, where = 0.0, None
    for row, found in zip(zip(y, eta, *parameters), values):
        exact = [mpmath.mpf(float(v)) for v in row]
        value, slope = truth(*exact)
        scale = UNITS[dtype] * (abs(value) + abs(exact[1] * slope) + 1)
        error = float(abs(mpmath.mpf(float(found)) - value) / scale)
        if error > worst:
            worst, where = error, [float(v) for v in row]
    record_property("worst_units", worst)
    print(f"{family} {dtype}: worst {worst:.2f} rounding units at {where}, {len(y)} points")
    assert worst <= 16, where


@pytest.mark.parametrize("dtype", UNITS, ids=["float32", "float64"])
@pytest.mark.parametrize("family", LAWS)
def test_values_and_gradients_are_finite_everywhere(family, dtype):
    y, eta, *parameters = tabulate(family, dtype)
    far = torch.tensor(FAR, dtype=dtype)
    y = torch.cat([y, y.repeat_interleave(len(FAR))])
    parameters = [torch.cat([p, p.repeat_interleave(len(FAR))]) for p in parameters]
    eta = torch.cat([eta, far.repeat(len(eta))]).requires_grad_()
    log_prob = LAWS[family][1](eta, *parameters).log_prob(y)
    assert torch.isfinite(log_prob).all()
    (gradient,) = torch.autograd.grad(log_prob.sum(), eta)
    assert torch.isfinite(gradient).all()


def test_gradients_by_learned_parameters_are_finite_too():
    for family in ("negative_binomial", "gamma"):
        y, eta, parameter = tabulate(family, torch.float32)
        parameter.requires_grad_()
        log_prob = LAWS[family][1](eta, parameter).log_prob(y)
        (gradient,) = torch.autograd.grad(log_prob.sum(), parameter)
        assert torch.isfinite(gradient).all()


def test_beyond_the_cap_the_exponential_goes_on_along_its_tangent():
    y = torch.tensor([0.0, 5.0])
    eta = torch.tensor([80.0, 90.0, 100.0])[:, None].requires_grad_()
    log_prob = NaturalPoisson(eta).log_prob(y)
    (gradient,) = torch.autograd.grad(log_prob.sum(), eta)
    # One slope for all that lies beyond: neither zero, which would hold a runaway predictor, nor
    # infinite.
    torch.testing.assert_close(gradient[1:], -2 * torch.tensor(80.0).exp().expand(2, 1))
    step = log_prob[2] - log_prob[1]
    torch.testing.assert_close(step, -10 * torch.tensor(80.0).exp().expand(2))
