r"""The normal tail in a form that keeps its digits where the tail itself underflows.

With :math:`t = -a` and :math:`I_n = \int_0^\infty x^n e^{-x^2/2 - t x} dx`, the ratios
:math:`K_n = I_n / I_{n-1}` give every moment of a normal variable given that it passes an edge
(:math:`E x^n = K_1 \cdots K_n`). They obey :math:`K_n (t + K_{n+1}) = n` and
:math:`K_n' = K_n (K_{n+1} - K_n)` in :math:`a`, a continued fraction of positive terms: nothing
cancels, however far out the edge. In float32 torch's own gradient of ``log_ndtr`` is wrong by
a factor of six at -1e4, and zero at -1e12.

References:
    Abramowitz & Stegun (1964), Handbook of Mathematical Functions, 26.2.14.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.special import erfc, erfcx

# Below the edge the continued fraction; above it, the closed form loses few digits. The numbers of
# terms reach the rounding error of the dtype at the edge.
_EDGE = {torch.float32: (-2.0, 16), torch.float64: (-3.0, 40)}


def log_ndtr(value: Tensor) -> Tensor:
    """Logarithm of the standard normal distribution function, with an accurate gradient.

    Example:
        >>> log_ndtr(torch.tensor([0.0, -1e4]))
        tensor([-6.9315e-01, -5.0000e+07])
    """
    return _LogNdtr.apply(value)


def log_tail(value: Tensor) -> Tensor:
    r""":math:`\log \Phi(a) + a^2 / 2`, which falls only as :math:`-\log |a|` for negative a.

    Example:
        >>> log_tail(torch.tensor(-1e4))
        tensor(-10.1293)
    """
    return _LogTail.apply(value)


def hazard(value: Tensor) -> Tensor:
    r"""Derivative of ``log_ndtr``, :math:`\phi(a) / \Phi(a)`.

    Example:
        >>> hazard(torch.tensor(0.0))
        tensor(0.7979)
    """
    return _Hazard.apply(value)


def moment_ratio(value: Tensor, order: int = 1) -> Tensor:
    r"""Ratio :math:`K_n(a)` of consecutive moments of a normal overshoot; the first is its mean.

    Args:
        value: :math:`a`, location less edge in units of the scale; float32 or float64.
        order: :math:`n \ge 1`.

    Example:
        >>> moment_ratio(torch.tensor([-1e6, 0.0, 1e6]))
        tensor([1.0000e-06, 7.9788e-01, 1.0000e+06])
    """
    return _MomentRatio.apply(value, order)


def tail_variance(value: Tensor) -> Tensor:
    r"""Variance :math:`K_1 (K_2 - K_1)` of a normal overshoot, in squared units of the scale.

    Example:
        >>> tail_variance(torch.tensor([-1e6, 0.0, 1e6]))
        tensor([1.0000e-12, 3.6338e-01, 1.0000e+00])
    """
    first = moment_ratio(value)
    return torch.where(
        value < _edge(value)[0],
        first * (moment_ratio(value, 2) - first),
        1 - hazard(value) * first,
    )


class _LogNdtr(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        below = value.clamp(max=-1)
        return torch.where(
            value < -1,
            (erfcx(-below / math.sqrt(2)) / 2).log() - below.square() / 2,
            (-erfc(value / math.sqrt(2)) / 2).log1p(),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * hazard(ctx.saved_tensors[0])


class _Hazard(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return math.sqrt(2 / math.pi) / erfcx(-value / math.sqrt(2))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (value,) = ctx.saved_tensors
        return -grad * hazard(value) * moment_ratio(value)


class _LogTail(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        above = value.clamp(min=0)
        return torch.where(
            value > 0,
            (-erfc(above / math.sqrt(2)) / 2).log1p() + above.square() / 2,
            (erfcx(-value.clamp(max=0) / math.sqrt(2)) / 2).log(),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * moment_ratio(ctx.saved_tensors[0])


class _MomentRatio(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, order: int) -> Tensor:
        edge, terms = _edge(value)
        inner = value.clamp(min=edge)
        near = inner + math.sqrt(2 / math.pi) / erfcx(-inner / math.sqrt(2))
        for n in range(1, order):
            near = n / near + inner
        outer = -value.clamp(max=edge)
        last = order + terms
        far = 2 * last / ((outer.square() + 4 * last).sqrt() + outer)
        for n in range(last - 1, order - 1, -1):
            far = n / (outer + far)
        return torch.where(value < edge, far, near)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.order = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (value,) = ctx.saved_tensors
        n = ctx.order
        if n == 1:
            return grad * tail_variance(value), None
        ratio = moment_ratio(value, n)
        far = ratio * (moment_ratio(value, n + 1) - ratio)
        near = n - ratio * (n - 1) / moment_ratio(value, n - 1)  # the same, by the recursion
        return grad * torch.where(value < _edge(value)[0], far, near), None


def _edge(value: Tensor) -> tuple[float, int]:
    return _EDGE.get(value.dtype, _EDGE[torch.float64])
