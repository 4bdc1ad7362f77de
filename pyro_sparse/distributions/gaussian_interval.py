"""Normal probability of a short or far interval, without cancellation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_sparse.distributions.gaussian_tail import hazard_and_mean

# Positive nodes of the eight-point rule on [-1, 1]; weights of a mean.
_LEGENDRE = (
    (0.18343464249564980, 0.36268378337836198),
    (0.52553240991632899, 0.31370664587788729),
    (0.79666647741362674, 0.22238103445337447),
    (0.96028985649753623, 0.10122853629037626),
)


def log_interval(centre: Tensor, half_width: Tensor, scale: Tensor) -> Tensor:
    """Log-probability that a normal variable is within ``half_width`` of a point.

    Args:
        centre: Distance of that point from the location.
        half_width: Positive.
        scale: Positive; all three in one unit.

    Example:
        >>> log_interval(torch.tensor(0.0), torch.tensor(1.0), torch.tensor(1.0)).exp()
        tensor(0.6827)
    """
    return _LogInterval.apply(*torch.broadcast_tensors(centre.abs(), half_width, scale))[0]


class _LogInterval(torch.autograd.Function):
    r"""Log-probability P of a normal interval, and the density at its nearer end over P."""

    generate_vmap_rule = True

    @staticmethod
    def forward(centre: Tensor, half_width: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        c, d = centre / scale, half_width / scale
        near, both = (centre - half_width) / scale, c * d
        constant = math.log(2 * math.pi) / 2
        # Around the location: a sum of two positive terms.
        inside = near <= 0
        size = near.clamp(max=0)
        mass = (torch.erf(size / -math.sqrt(2)) + torch.erf((c + d) / math.sqrt(2))) / 2
        wide = mass.log()
        wide_rate = (-size.square() / 2 - constant).exp() / mass
        # Gauss-Legendre, exact to rounding on an interval this short: d < c and c d <= 1.
        narrow = (both <= 1) & ~inside
        d_ = torch.where(narrow, d, 0.0)
        both_ = torch.where(narrow, both, 0.0)
        short = sum(w * ((d_ * x).square() * -0.5).exp() * (both_ * x).cosh() for x, w in _LEGENDRE)
        short_rate = (both_ - d_.square() / 2).exp() / (2 * d * short)
        # On one side of the location, the difference of two tails from the nearer end.
        first, _ = hazard_and_mean(-near)
        last, _ = hazard_and_mean(-c - d)
        tail_rate = first / (1 - (-2 * both).exp() * first / last)
        rate = torch.where(inside, wide_rate, torch.where(narrow, short_rate, tail_rate))
        value = torch.where(inside, wide, -near.square() / 2 - constant - rate.log())
        return value, rate

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        centre, half_width, scale, rate = ctx.saved_tensors
        c, d = centre / scale, half_width / scale
        drop = -2 * c * d
        by_centre, by_width = rate * drop.expm1(), rate * (1 + drop.exp())
        first, second = 0.0, 0.0
        if grads[0] is not None:
            first, second = grads[0] * by_centre, grads[0] * by_width
        if grads[1] is not None:
            slope = (centre - half_width) / scale
            first = first - grads[1] * rate * (slope + by_centre)
            second = second + grads[1] * rate * (slope - by_width)
        return first / scale, second / scale, -(first * c + second * d) / scale
