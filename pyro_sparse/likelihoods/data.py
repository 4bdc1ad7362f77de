"""Data as a likelihood takes them: one boundary check for models, guides and solvers."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor


def check_data(
    y: Tensor,
    mask: Tensor | None,
    num_data: int | None,
    signal_dims: int,
    like: Tensor | None = None,
    *,
    placeholder: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Check a minibatch and blank out what was not observed.

    Values are not searched for ``nan`` here, at every step; ``infer.fit`` and ``solvers.solve`` do
    so once.

    Args:
        y: Shape ``(n, *signal_shape)``.
        mask: True where a sample was observed, broadcastable to ``y``.
        num_data: Size of the whole data set.
        signal_dims: Dimensions of one datum.
        like: A parameter whose dtype and device the data have to share.
        placeholder: What stands where they were not observed, within the family's range.

    Returns:
        Data with the placeholder where they were not observed (``nan`` times zero is ``nan``, also
        in a gradient), and the mask in the shape of the data.

    Raises:
        TypeError: If ``y`` is not a floating tensor of the parameters' dtype, or ``mask`` is not
            boolean.
        RuntimeError: If ``y`` is on another device than the parameters.
        ValueError: If a shape does not fit, or ``num_data`` is smaller than the minibatch.

    Example:
        >>> check_data(torch.tensor([[1.0, torch.nan]]), torch.tensor([True, False]), None, 1)[0]
        tensor([[1., 0.]])
    """
    if not isinstance(y, Tensor) or not y.is_floating_point():
        kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(
            f"Expected y to be a floating tensor, got {kind}. Try torch.as_tensor(y).float()."
        )
    if y.layout != torch.strided:
        raise TypeError(f"Expected y to be dense, got {y.layout}. Try y.to_dense().")
    if like is not None and y.dtype != like.dtype:
        raise TypeError(
            f"Expected y of the parameters' dtype {like.dtype}, got {y.dtype}. "
            f"Try y.to({like.dtype}), or .double() on model and guide."
        )
    if like is not None and y.device != like.device:
        raise RuntimeError(
            f"Expected y on the parameters' device {like.device}, got {y.device}. "
            f"Try y.to({str(like.device)!r}), or .to({str(y.device)!r}) on model and guide."
        )
    if y.dim() != 1 + signal_dims or len(y) == 0:
        names = "features" if signal_dims == 1 else "channels, *lengths"
        hint = "A single datum is a minibatch of one: y[None]."
        if signal_dims > 1:
            hint += " A single channel is a dimension too: y[:, None]."
        raise ValueError(
            f"Expected y of shape (n, {names}) with n >= 1, got {tuple(y.shape)}. {hint}"
        )
    if num_data is not None and not isinstance(num_data, Integral | torch.SymInt):
        raise TypeError(
            "Expected num_data to be a whole number (size of the data set), got "
            f"{type(num_data).__name__}."
        )
    if num_data is not None and num_data < len(y):
        raise ValueError(f"Expected num_data >= {len(y)} (the minibatch), got {num_data}.")
    if mask is None:
        return y, None
    mask = check_mask(y, mask)
    if mask.device != y.device:
        raise RuntimeError(
            f"Expected mask on the data's device {y.device}, got {mask.device}. "
            f"Try mask.to({str(y.device)!r})."
        )
    return torch.where(mask, y, torch.full_like(y, placeholder)), mask


def check_mask(y: Tensor, mask: Tensor) -> Tensor:
    """The mask in the shape of the data.

    Raises:
        TypeError: If it is not a boolean tensor.
        ValueError: If it does not broadcast to ``y``.

    Example:
        >>> check_mask(torch.zeros(2, 3), torch.tensor([True, False, True]))
        tensor([[ True, False,  True],
                [ True, False,  True]])
    """
    if not isinstance(y, Tensor):
        raise TypeError(f"Expected y to be a tensor, got {type(y).__name__}.")
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"Expected mask to be a boolean tensor, True = observed; got {kind}.")
    if mask.layout != torch.strided:
        raise TypeError(f"Expected mask to be dense, got {mask.layout}. Try mask.to_dense().")
    try:
        return mask.broadcast_to(y.shape)
    except RuntimeError:
        raise ValueError(
            f"Expected a mask that broadcasts to the data, {tuple(y.shape)}, got "
            f"{tuple(mask.shape)}."
        ) from None
