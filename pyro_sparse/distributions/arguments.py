"""Parameters of a law as a user hands them over, refused in words where they are none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def as_numbers(name: str, value: Any, like: Tensor) -> Tensor:
    """A parameter as a tensor.

    Args:
        name: Of the parameter, for the message.
        value: A number or a tensor.
        like: A tensor whose dtype and device the result takes.

    Raises:
        TypeError: If it is neither.

    Example:
        >>> as_numbers("probs", 0.5, like=torch.zeros(()))
        tensor(0.5000)
    """
    if isinstance(value, Tensor):
        return torch.as_tensor(value, dtype=like.dtype, device=like.device)
    try:
        return torch.as_tensor(value, dtype=like.dtype, device=like.device)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(
            f"Expected {name} to be a number or a tensor, got {value!r}. Try torch.as_tensor(...)."
        ) from None


def common_shape(**shapes: torch.Size) -> torch.Size:
    """Shape to which all parameters of a law expand.

    Args:
        shapes: Of each parameter.

    Raises:
        ValueError: If there is none; names all shapes.

    Example:
        >>> common_shape(slab=torch.Size([4, 3]), probs=torch.Size([3]))
        torch.Size([4, 3])
    """
    try:
        return torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        found = ", ".join(f"{name} of {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(
            f"Expected shapes that broadcast, got {found}. Align dimensions from the right, and "
            "give size 1 to what is shared."
        ) from None
