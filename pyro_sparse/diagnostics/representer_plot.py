"""A picture of the training images that explain a reconstruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from pyro_sparse.diagnostics.representer import Representer
from pyro_sparse.ops import check_tensor


def plot_representer(
    found: Representer,
    codes: Tensor,
    *,
    y: Tensor | None = None,
    count: int = 6,
    image_shape: tuple[int, int] | None = None,
    names: Sequence[Any] | None = None,
    axes: Any = None,
) -> Any:
    """Draw, a row for each datum, its reconstruction and the training images with most weight.

    Above each training image stands its weight with sign, and its name where there is one. An image
    of negative weight is one that is taken away.

    Args:
        found: Training data and their codes.
        codes: Codes of the data to explain, shape ``(m, atoms)``.
        y: The data themselves, shape ``(m, *signal_shape)``, for a first column.
        count: Training images in a row.
        image_shape: Height and width; default the signal's own shape, with channels of one left
            out.
        names: One for each training datum, such as its class.
        axes: Where to draw, shape ``(m, columns)``; default a new figure.

    Returns:
        Axes, an array ``(m, columns)`` of ``1 + count`` columns, and one more with ``y``.

    Raises:
        ValueError: If the data are no images, or a shape or the number of names does not fit.

    Example:
        >>> import torch
        >>> data = torch.eye(4).reshape(4, 2, 2)
        >>> found = Representer(data, codes=torch.eye(4), ridge=0.1)
        >>> plot_representer(found, torch.ones(1, 4), count=2).shape
        (1, 3)
    """
    shape = _image_shape(found.data, image_shape)
    if names is not None and len(names) != len(found.data):
        raise ValueError(
            f"Expected {len(found.data)} names, of the training data, got {len(names)}."
        )
    pictures = [("reconstruction", found.reconstruct(codes))]
    if y is not None:
        check_tensor("y", y)
        if y.shape != (len(codes), *found.data.shape[1:]):
            raise ValueError(
                f"Expected y of shape {(len(codes), *found.data.shape[1:])}, got {tuple(y.shape)}."
            )
        pictures.insert(0, ("datum", y))
    top = found.top(codes, count)
    axes = _axes(axes, len(codes), len(pictures) + count)
    for row, line in enumerate(axes):
        for axis, (title, images) in zip(line, pictures):
            _draw(axis, images[row], shape, title if row == 0 else "")
        for axis, index, weight in zip(
            line[len(pictures) :], top.rows[row].tolist(), top.weight[row].tolist()
        ):
            name = "" if names is None else f"  ({names[index]})"
            _draw(axis, found.data[index], shape, f"{weight:+.2g}{name}")
    return axes


def _image_shape(data: Tensor, given: tuple[int, int] | None) -> tuple[int, int]:
    size = data[0].numel()
    if given is not None:
        if len(given) != 2 or given[0] * given[1] != size:
            raise ValueError(
                f"Expected image_shape (height, width) of {size} numbers, got {tuple(given)}."
            )
        return given
    shape = tuple(length for length in data.shape[1:] if length != 1)
    if len(shape) != 2:
        raise ValueError(
            f"Expected images of shape (height, width), got data of {tuple(data.shape[1:])}. Pass "
            "image_shape=(height, width)."
        )
    return shape[0], shape[1]


def _axes(given: Any, rows: int, columns: int) -> Any:
    if given is None:
        from matplotlib import pyplot as plt  # chooses a backend, which an import should not

        size = (1.2 * columns, 1.45 * rows)
        return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")[1]
    given = np.asarray(given, dtype=object)
    if given.shape != (rows, columns):
        raise ValueError(f"Expected axes of shape {(rows, columns)}, got {given.shape}.")
    return given


def _draw(axis: Any, image: Tensor, shape: tuple[int, int], title: str) -> None:
    axis.imshow(image.detach().cpu().reshape(shape).numpy(), cmap="gray_r")
    axis.set_title(title, fontsize=8)
    axis.set_axis_off()
