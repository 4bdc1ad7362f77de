"""Data that a family can have, and parameters that stay positive."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pyro_sparse.ops import Positive, check_tensor


def check_values(
    y: Tensor, mask: Tensor | None, good: Tensor, *, expected: str, hint: str = ""
) -> None:
    """Refuse observed data that are out of a family's range.

    Args:
        y: The data.
        mask: True where they were observed.
        good: True where a value is within range; shape of the data.
        expected: What was expected, for the message.
        hint: What to try.

    Raises:
        ValueError: Says how many are not, and which one is the first.

    Example:
        >>> y = torch.tensor([1.0, 2.5])
        >>> check_values(y, None, y == y.floor(), expected="whole counts")
        Traceback (most recent call last):
        ...
        ValueError: Expected whole counts, got 1 value that is not, the first at (1,): 2.5.
    """
    if good.is_meta:
        return
    bad = ~good if mask is None else ~good & mask
    if bool(bad.any()):
        first = tuple(int(i) for i in bad.nonzero()[0])
        count = int(bad.sum())
        said = "1 value that is not" if count == 1 else f"{count} values that are not"
        raise ValueError(
            f"Expected {expected}, got {said}, the first at {first}: {y[first].item():.6g}.{hint}"
        )


def check_counts(y: Tensor, mask: Tensor | None, *, family: str) -> None:
    """Refuse data that are no counts.

    Raises:
        ValueError: If an observed value is negative, or not whole.
    """
    check_values(
        y,
        mask,
        (y >= 0) & (y == y.floor()),
        expected=f"whole counts >= 0, as {family} has them",
        hint=" Round them, or choose another family. Not observed? Pass mask= (True = observed).",
    )


def check_parameter(name: str, family: str, value: Tensor, y: Tensor) -> None:
    """Refuse data that a parameter does not fit.

    Raises:
        TypeError: If they are of another dtype.
        RuntimeError: If they are on another device.
        ValueError: If the parameter does not broadcast with them.
    """
    check_tensor("y", y)
    # A number beside a tensor changes neither its dtype nor, on the CPU, its device.
    if value.dim() or value.device.type != "cpu":
        like = value if value.dim() else value.to(y.dtype)
        check_tensor(f"y, as the {name} of {family} is,", y, like)
    sizes = zip(reversed(value.shape), reversed(y.shape))
    if value.dim() > y.dim() or any(own not in (1, size) for own, size in sizes):
        raise ValueError(
            f"Expected a {name} of {family} that broadcasts to the data, {tuple(y.shape)}, got "
            f"{tuple(value.shape)}. One per channel of a picture has the shape (channels, 1, 1)."
        )


def as_positive(name: str, value: object, unit: str) -> Tensor:
    """A positive parameter as a tensor of its own; refuses what is none.

    Raises:
        TypeError: If it is not a real number or a dense tensor of them.
        ValueError: If it is not positive and finite, or empty.
    """
    floating = isinstance(value, Tensor) and value.is_floating_point()
    # Also of a numpy scalar, whose float64 must not spread.
    dtype = value.dtype if floating else torch.get_default_dtype()  # type: ignore[attr-defined]
    refused = isinstance(value, Tensor) and (value.is_complex() or value.layout != torch.strided)
    try:
        made = None if refused else torch.as_tensor(value, dtype=dtype).detach().clone()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        made = None
    if made is None:
        raise TypeError(
            f"Expected {name} to be a real number or a dense tensor of real numbers, got "
            f"{value.dtype if isinstance(value, Tensor) else type(value).__name__}."
        )
    if made.numel() == 0 or not bool((torch.isfinite(made) & (made > 0)).all()):
        raise ValueError(f"Expected {name} > 0 and finite ({unit}), got {value}.")
    return made


def register_positive(module: nn.Module, name: str, value: Tensor, *, trainable: bool) -> None:
    """Keep a positive parameter: learned by its logarithm, or fixed."""
    if trainable:
        setattr(module, name, nn.Parameter(value))
        parametrize.register_parametrization(module, name, Positive())
    else:
        module.register_buffer(name, value)
