"""The normal tail against forty digits of mpmath."""

import functools

import mpmath
import pytest
import torch

from pyro_sparse.distributions.gaussian_tail import (
    hazard,
    hazard_and_mean,
    log_ndtr,
    log_tail,
    moment_ratio,
    normal_tail,
    tail_variance,
)

# Both sides of where the formulas change over, and far out.
POINTS = [-1000.0, -50.0, -10.0, -3.001, -2.999, -2.001, -1.999, -1.001, -0.5, 0.0, 0.5, 3.0, 8.0]
# Rounding is magnified by a factor below 700 where the closed form ends.
TOLERANCE = {torch.float32: 5e-5, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def digits():
    with mpmath.workdps(40):
        yield


@functools.cache
def integral(order, a):
    """Integral of x^order exp(-x^2 / 2 + a x) over the positive numbers."""
    size = 1 / (1 + abs(a)) if a < 0 else mpmath.mpf(1)
    cuts = [0, size, 5 * size, 20 * size, 60 * size, 150 * size + max(a, 0)]
    return mpmath.quad(lambda x: x**order * mpmath.exp(-x * x / 2 + a * x), cuts)


def ratio(order, a):
    return integral(order, a) / integral(order - 1, a)


def third_moment(a):
    """Third central moment, a small difference far out: hence the forty digits."""
    first, second, third = (integral(n, a) / integral(0, a) for n in (1, 2, 3))
    return third - 3 * first * second + 2 * first**3


REFERENCES = {
    "log_tail": (log_tail, lambda a: mpmath.log(integral(0, a) / mpmath.sqrt(2 * mpmath.pi))),
    "log_ndtr": (
        log_ndtr,
        lambda a: mpmath.log(integral(0, a) / mpmath.sqrt(2 * mpmath.pi)) - a * a / 2,
    ),
    "hazard": (hazard, lambda a: 1 / integral(0, a)),
    "first": (moment_ratio, lambda a: ratio(1, a)),
    "second": (lambda a: moment_ratio(a, 2), lambda a: ratio(2, a)),
    "third": (lambda a: moment_ratio(a, 3), lambda a: ratio(3, a)),
    "variance": (tail_variance, lambda a: ratio(1, a) * (ratio(2, a) - ratio(1, a))),
    "skew": (lambda a: normal_tail(a).skew, lambda a: third_moment(a)),
}
DERIVATIVES = {
    "log_tail": (log_tail, lambda a: ratio(1, a)),
    "log_ndtr": (log_ndtr, lambda a: 1 / integral(0, a)),
    "hazard": (hazard, lambda a: -ratio(1, a) / integral(0, a)),
    "first": (moment_ratio, lambda a: ratio(1, a) * (ratio(2, a) - ratio(1, a))),
    "second": (
        lambda a: moment_ratio(a, 2),
        lambda a: ratio(2, a) * (ratio(3, a) - ratio(2, a)),
    ),
    # The derivative of a cumulant is the next one.
    "variance": (tail_variance, lambda a: third_moment(a)),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_values_keep_their_digits(name, dtype):
    function, reference = REFERENCES[name]
    points = torch.tensor(POINTS, dtype=dtype)
    expected = [float(reference(mpmath.mpf(point.item()))) for point in points]
    torch.testing.assert_close(
        function(points).double(),
        torch.tensor(expected, dtype=torch.float64),
        rtol=TOLERANCE[dtype],
        atol=1e-30,
    )


@pytest.mark.parametrize("name", DERIVATIVES)
def test_gradients_keep_their_digits(name, dtype):
    function, reference = DERIVATIVES[name]
    points = torch.tensor(POINTS, dtype=dtype, requires_grad=True)
    (found,) = torch.autograd.grad(function(points).sum(), points)
    expected = [float(reference(mpmath.mpf(point.item()))) for point in points]
    torch.testing.assert_close(
        found.double(),
        torch.tensor(expected, dtype=torch.float64),
        rtol=TOLERANCE[dtype],
        atol=1e-30,
    )


@pytest.mark.parametrize("function", [f for f, _ in REFERENCES.values()], ids=REFERENCES)
def test_first_and_second_derivatives_agree_with_differences(function):
    points = torch.linspace(-6, 6, 13, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, points)
    assert torch.autograd.gradgradcheck(function, points)


@pytest.mark.parametrize("point", [-1e15, -1e12, 1e12])
@pytest.mark.parametrize("function", [f for f, _ in REFERENCES.values()], ids=REFERENCES)
def test_nothing_overflows_far_out_in_float32(function, point):
    value = torch.tensor(point, requires_grad=True)
    result = function(value)
    (grad,) = torch.autograd.grad(result, value)
    assert result.isfinite()
    assert grad.isfinite()


def test_draws_get_the_same_numbers(dtype):
    points = torch.tensor(POINTS, dtype=dtype)
    found = torch.stack(hazard_and_mean(points))
    tail = normal_tail(points)
    torch.testing.assert_close(found, torch.stack([tail.hazard, tail.mean]))


def test_the_functions_batch_under_vmap():
    points = torch.linspace(-5, 5, 7)
    batched = torch.vmap(torch.func.grad(lambda a: log_tail(a) + log_ndtr(a)))(points)
    torch.testing.assert_close(batched, moment_ratio(points) + hazard(points))
