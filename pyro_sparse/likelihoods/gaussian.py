"""Gaussian data."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pyro_sparse.likelihoods.base import Likelihood
from pyro_sparse.ops import Positive


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
        _check_scale(value)
        if trainable:
            self.scale = nn.Parameter(value)
            parametrize.register_parametrization(self, "scale", Positive())
        else:
            self.register_buffer("scale", value)

    def assign_(self, scale: float | Tensor) -> None:
        """Overwrite the scale in place, learned or fixed, without a gradient.

        The raw parameter stays the same object. What an optimiser remembers of it (moments) is
        stale afterwards.

        Args:
            scale: Positive and finite; a number, or in a shape that broadcasts to ``scale``.

        Raises:
            ValueError: If it is not positive and finite, or of another shape.
        """
        own = self.scale.detach()
        value = torch.as_tensor(scale, dtype=own.dtype, device=own.device)
        _check_scale(value)
        try:
            value = value.broadcast_to(own.shape)
        except RuntimeError:
            raise ValueError(
                f"Expected a scale of shape {tuple(own.shape)}, got {tuple(value.shape)}."
            ) from None
        with torch.no_grad():
            if parametrize.is_parametrized(self, "scale"):
                self.parametrizations.scale.original.copy_(value.log())  # type: ignore
            else:
                self.scale.copy_(value)

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


def _check_scale(scale: Tensor) -> None:
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"Expected scale > 0 and finite (a standard deviation), got {scale}.")
