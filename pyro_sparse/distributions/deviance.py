"""Deviances and Stirling's error, to a few units in the last place of either precision."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SERIES = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360)


def stirling_error(value: Tensor) -> Tensor:
    r"""What Stirling's formula leaves of the factorial.

    .. math:: \delta(x) = \log \Gamma(x + 1) - \big(x + \tfrac12\big) \log x + x
        - \tfrac12 \log 2 \pi

    Args:
        value: :math:`x > 0`, whole or not. Worked in float64: it is a function of data and of
            hyperparameters, never of a predictor.

    Returns:
        Shape and dtype of ``value``; differentiable.

    References:
        Loader (2000), Fast and accurate computation of binomial probabilities, sec. 3.

    Example:
        >>> stirling_error(torch.tensor([1.0, 100.0]))
        tensor([0.0811, 0.0008])
    """
    wide = value.double()
    near = wide < 10  # where the series would need more terms
    small = torch.where(near, wide, torch.ones_like(wide))
    direct = torch.lgamma(small + 1) - (small + 0.5) * small.log() + small
    inverse = torch.where(near, 0.1, wide.reciprocal())
    series = torch.zeros_like(inverse)
    for coefficient in reversed(_SERIES):
        series = series * inverse.square() + coefficient
    error = torch.where(near, direct - math.log(2 * math.pi) / 2, series * inverse)
    return error.to(value.dtype)


def tangent_from(like: Tensor) -> float:
    """Exponent from which on an exponential is replaced by its tangent, for a dtype."""
    return 700.0 if like.dtype == torch.float64 else 80.0


def exp_excess(value: Tensor) -> Tensor:
    """``exp(x) - 1 - x``, also where it is small beside ``x``.

    Example:
        >>> exp_excess(torch.tensor([1e-4, 1.0]))
        tensor([5.0002e-09, 7.1828e-01])
    """
    near = value.abs() < 0.5
    small = torch.where(near, value, torch.zeros_like(value))
    series = torch.zeros_like(small)
    for order in range(17, 1, -1):  # to 1e-17 at one half
        series = (1 + series) * small / order
    # The loop ends with 1 + s where e^x - 1 - x = x s: of order two divides by two.
    large = torch.where(near, torch.ones_like(value), value)
    return torch.where(near, small * series, torch.expm1(large) - large)


def exp_deviance(y: Tensor, log_rate: Tensor) -> Tensor:
    """Half the deviance of counts, given the logarithm of their mean (Poisson).

    Convex in ``log_rate``; beyond ``tangent_from`` it goes on along its tangent.

    Example:
        >>> exp_deviance(torch.tensor([0.0, 1.0]), torch.zeros(2))
        tensor([1., 0.])
    """
    cap = tangent_from(log_rate)
    below = log_rate.clamp_max(cap)
    beyond = (log_rate - cap).clamp_min(0)
    counted = y > 0
    safe = torch.where(counted, y, torch.ones_like(y))
    ratio = below - safe.log()
    some = y * exp_excess(ratio)
    bent = torch.where(counted, some, below.exp())
    return bent + (math.exp(cap) - y) * beyond


def mixture_deviance(weight: Tensor, other: Tensor, shift: Tensor) -> Tensor:
    r"""Half the deviance of a binary choice whose log-odds are off by ``shift``.

    .. math:: (a + b) \log \frac{b + a e^{s}}{a + b} - a s

    Binomial data have :math:`a` successes and :math:`b` failures, negative binomial ones a count
    and a dispersion. Written from the smaller of the two weights, whose share may be 1e-17.

    Args:
        weight: :math:`a > 0`.
        other: :math:`b > 0`.
        shift: :math:`s`.

    Example:
        >>> mixture_deviance(torch.tensor(1.0), torch.tensor(3.0), torch.tensor([0.0, 1.0]))
        tensor([0.0000, 0.4295])
    """
    swapped = weight > other
    small = torch.where(swapped, other, weight)
    large = torch.where(swapped, weight, other)
    shift = torch.where(swapped, -shift, shift)
    total = small + large
    far = shift > 40  # its exponential may overflow; what is rounded here is small beside it
    near_shift = torch.where(far, torch.zeros_like(shift), shift)
    far_shift = torch.where(far, shift, torch.full_like(shift, 40.0))
    near = torch.log1p(small / total * torch.expm1(near_shift))
    log_ratio = torch.log1p(small / large)
    distant = torch.logaddexp(-log_ratio, small.log() - large.log() - log_ratio + far_shift)
    return total * torch.where(far, distant, near) - small * shift
