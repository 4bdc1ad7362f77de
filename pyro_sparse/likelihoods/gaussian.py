"""Gaussian data."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pyro_sparse.likelihoods.base import Likelihood


class Gaussian(Likelihood):
    r"""Data with additive Gaussian noise: :math:`y \sim \mathcal N(\eta, \sigma^2)`.

    Args:
        scale: Noise standard deviation :math:`\sigma > 0`, in units of the data: a number, or a
            tensor that broadcasts with one datum (``(channels, 1, 1)`` for one per channel of a
            picture).
        trainable: Learn ``scale``, starting from the given value; it stays positive.

    Attributes:
        scale: As given, or as learned.

    Raises:
        ValueError: If ``scale`` is not positive and finite.

    Example:
        >>> likelihood = Gaussian(0.5)
        >>> likelihood.residual(torch.tensor(1.0), torch.tensor(2.0))
        tensor(4.)
    """

    scale: Tensor

    def __init__(self, scale: float | Tensor, *, trainable: bool = False) -> None:
        super().__init__()
        if not isinstance(scale, Tensor):  # also a numpy scalar, whose float64 must not spread
            scale = torch.as_tensor(scale, dtype=torch.get_default_dtype())
        value = scale.detach().clone() if scale.is_floating_point() else scale.float()
        if not bool((torch.isfinite(value) & (value > 0)).all()):
            raise ValueError(f"Expected scale > 0 and finite (a standard deviation), got {scale}.")
        if trainable:
            self.scale = nn.Parameter(value)
            parametrize.register_parametrization(self, "scale", _Positive())
        else:
            self.register_buffer("scale", value)

    def forward(self, predictor: Tensor) -> dist.Normal:  # noqa: D102
        return dist.Normal(predictor, self.scale)

    def mean(self, predictor: Tensor) -> Tensor:  # noqa: D102
        return predictor

    def residual(self, predictor: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return (y - predictor) / self.scale.square()

    def curvature(self) -> Tensor:  # noqa: D102
        return self.scale.detach().min().square().reciprocal()

    def loss(self, predictor: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return ((y - predictor) / self.scale).square() / 2

    def dual(self, score: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return score * y - (self.scale * score).square() / 2


class _Positive(nn.Module):
    """Parametrisation of a positive tensor by its logarithm."""

    def forward(self, log_value: Tensor) -> Tensor:
        return log_value.exp()

    def right_inverse(self, value: Tensor) -> Tensor:
        return value.log()
