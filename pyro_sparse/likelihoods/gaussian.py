"""Gaussian data."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pyro_sparse.likelihoods.base import Likelihood
from pyro_sparse.ops import Positive, check_tensor


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
        TypeError: If ``scale`` is not a real number or a dense tensor of them.
        ValueError: If ``scale`` is not positive and finite, or empty.

    Example:
        >>> likelihood = Gaussian(0.5)
        >>> likelihood.residual(torch.tensor(1.0), torch.tensor(2.0))
        tensor(4.)
    """

    scale: Tensor

    def __init__(self, scale: float | Tensor, *, trainable: bool = False) -> None:
        super().__init__()
        floating = isinstance(scale, Tensor) and scale.is_floating_point()
        # Also of a numpy scalar, whose float64 must not spread.
        dtype = scale.dtype if floating else torch.get_default_dtype()  # type: ignore[union-attr]
        value = _as_scale(scale, dtype).detach().clone()
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
            TypeError: If it is not a real number or a dense tensor of them.
            ValueError: If it is not positive and finite, or of another shape.
        """
        own = self.scale.detach()
        value = _as_scale(scale, own.dtype).to(own.device)
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

    def extra_repr(self) -> str:  # noqa: D102
        scale = self.scale.detach()
        return f"scale={scale.item():.4g}" if scale.dim() == 0 else f"scale={tuple(scale.shape)}"

    def forward(self, predictor: Tensor) -> dist.Normal:  # noqa: D102
        check_tensor("predictor", predictor)
        scale = self.scale
        _check_fits(scale, predictor.shape)
        return dist.Normal(predictor, scale)

    def check(self, y: Tensor, mask: Tensor | None = None) -> None:  # noqa: D102
        check_tensor("y", y)
        scale = self.scale
        # A number beside a tensor changes neither its dtype nor, on the CPU, its device.
        if scale.dim() or scale.device.type != "cpu":
            like = scale if scale.dim() else scale.to(y.dtype)
            check_tensor("y, as the scale of Gaussian is,", y, like)
        _check_fits(scale, y.shape)

    def mean(self, predictor: Tensor) -> Tensor:  # noqa: D102
        return predictor

    def residual(self, predictor: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return (y - predictor) / self.scale.square()

    def curvature(self, y: Tensor) -> Tensor:  # noqa: D102
        return self.scale.detach().square().reciprocal()

    def loss(self, predictor: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return ((y - predictor) / self.scale).square() / 2

    def dual(self, score: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return score * y - (self.scale * score).square() / 2


def _as_scale(scale: object, dtype: torch.dtype) -> Tensor:
    """A scale as a tensor; refuses what is none."""
    refused = isinstance(scale, Tensor) and (scale.is_complex() or scale.layout != torch.strided)
    try:
        value = None if refused else torch.as_tensor(scale, dtype=dtype)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        value = None
    if value is None:
        raise TypeError(
            "Expected scale to be a real number or a dense tensor of real numbers, got "
            f"{scale.dtype if isinstance(scale, Tensor) else type(scale).__name__}."
        )
    positive = bool((torch.isfinite(value) & (value > 0)).all())
    if not positive or value.numel() == 0:
        raise ValueError(f"Expected scale > 0 and finite (a standard deviation), got {scale}.")
    return value


def _check_fits(scale: Tensor, shape: torch.Size) -> None:
    sizes = zip(reversed(scale.shape), reversed(shape))
    if scale.dim() > len(shape) or any(own not in (1, size) for own, size in sizes):
        raise ValueError(
            f"Expected a scale of Gaussian that broadcasts to the data, {tuple(shape)}, got "
            f"{tuple(scale.shape)}. One per channel of a picture has the shape (channels, 1, 1)."
        )
