"""The normal interval against forty digits of mpmath."""

import itertools

import mpmath
import pytest
import torch

from pyro_sparse.distributions.gaussian_interval import log_interval

# Distances and half-widths in units of the scale, on both sides of where the formulas change over.
POINTS = [
    *itertools.product([0.0, 0.3, 0.999, 1.001, 2.5, 9.0, 30.0], [1e-8, 0.1, 0.33, 1.0, 2.0, 20.0]),
    (12.0, 0.083),
    (12.0, 0.084),
    (300.0, 1e-6),
    (300.0, 5.0),
]


def reference(centre, half_width, scale):
    """Log of the integral of the density, from the nearer end out."""
    c, d = mpmath.mpf(centre) / scale, mpmath.mpf(half_width) / scale
    tails = [mpmath.erfc((c + sign * d) / mpmath.sqrt(2)) / 2 for sign in (-1, 1)]
    return mpmath.log(tails[0] - tails[1])


def numbers(dtype, scale):
    """Values and gradients of ours and of the reference, for the same inputs in ``dtype``."""
    columns = torch.tensor(POINTS, dtype=dtype).T * scale
    inputs = [*columns, torch.full_like(columns[0], scale)]
    inputs = [column.clone().requires_grad_() for column in inputs]
    value = log_interval(*inputs)
    found = [value, *torch.autograd.grad(value.sum(), inputs)]
    expected = []
    with mpmath.workdps(500):  # a tail of 1e-200 out of one
        for point in zip(*(column.tolist() for column in inputs), strict=True):
            c, d, s = (mpmath.mpf(number) for number in point)
            mass = mpmath.exp(reference(c, d, s))
            ends = [mpmath.npdf((c + sign * d) / s) / (s * mass) for sign in (-1, 1)]
            slopes = [ends[1] - ends[0], ends[0] + ends[1]]
            slopes.append(-(slopes[0] * c + slopes[1] * d) / s)
            expected.append([float(number) for number in (mpmath.log(mass), *slopes)])
    return torch.stack(found).detach().double().T, torch.tensor(expected, dtype=torch.float64)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_values_and_gradients_keep_their_digits(dtype, scale):
    found, expected = numbers(dtype, scale)
    # Rounding of (centre - half_width)^2 / 2, at most 45000, relative to itself; of the density at
    # the nearer end as much as of its exponent, up to 700 here, where it is not out of the way.
    rtol = {torch.float32: 2e-5, torch.float64: 2e-13}[dtype]
    atol = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=rtol, atol=atol)
    size = 1e-30 + expected[:, 1:].abs()
    # At the location the slope in the centre is zero; the sum of two terms in the scale cancels.
    terms = (expected[:, 1] * torch.tensor(POINTS)[:, 0]).abs() + (
        expected[:, 2] * torch.tensor(POINTS)[:, 1]
    ).abs()
    size[:, 2] = torch.maximum(size[:, 2], terms)
    assert ((found[:, 1:] - expected[:, 1:]).abs() <= rtol * size + 1e-25).all()


def test_first_and_second_derivatives_agree_with_differences():
    points = [(0.3, 0.2), (1.2, 0.7), (4.0, 1.1), (0.0, 1.3), (0.4, 2.2)]
    inputs = [column.clone().requires_grad_() for column in torch.tensor(points).double().T]
    inputs.append(torch.full((len(points),), 1.3, dtype=torch.float64, requires_grad=True))
    # At the location the distance has a kink.
    inputs[0].data[3] = 0.05
    assert torch.autograd.gradcheck(log_interval, inputs)
    assert torch.autograd.gradgradcheck(log_interval, inputs)


def test_it_batches_under_vmap():
    points = torch.rand(7, 3, dtype=torch.float64) + 0.1
    batched = torch.vmap(torch.func.grad(lambda row: log_interval(*row)))(points)
    inputs = points.clone().requires_grad_()
    (expected,) = torch.autograd.grad(log_interval(*inputs.T).sum(), inputs)
    torch.testing.assert_close(batched, expected)
