"""Pictures of what the diagnostics found; each returns matplotlib axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_sparse.diagnostics.calibration import Calibration, Reliability
from pyro_sparse.diagnostics.recovery import check_atoms
from pyro_sparse.diagnostics.uniformity import uniform_band, uniform_p_value
from pyro_sparse.infer.history import History
from pyro_sparse.infer.numbers import check_real, check_whole
from pyro_sparse.ops import check_tensor

_LINE, _BAND, _ALARM = "tab:blue", "0.85", "tab:red"


def plot_rank_ecdf(
    found: Calibration, *, active: bool = False, prob: float = 0.95, ax: Any = None
) -> Any:
    """Empirical distribution function of ranks minus that of uniform ones, with its band.

    One line for each element; red where it leaves the band, which all elements together do with a
    probability of at most ``1 - prob`` if the posterior is right. A line that is up on the left and
    down on the right tells of posteriors that are too narrow, the reverse of ones too wide, one
    that is up (down) throughout of posteriors that lie too high (low).

    Args:
        found: Calibration of a site, such as ``sbc(...).sites["codes"]``.
        active: Ranks of active codes among active draws. Their numbers differ between elements: the
            band is that of the fewest.
        prob: Probability that all lines stay within.
        ax: Where to draw; default a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: If there are no such ranks, or ``prob`` is out of range.

    References:
        Saeilynoja, Buerkner & Vehtari (2022), Stat. Comput. 32(32), fig. 1.

    Example:
        >>> z = torch.randn(51, 400, 3, generator=torch.Generator().manual_seed(0))
        >>> ax = plot_rank_ecdf(Calibration.from_draws(z[0], z[1:]))
        >>> len(ax.lines)
        4
    """
    check_real("prob", prob, 0.0, 1 - 1e-9, open_low=True)
    pit = found.pit_active if active else found.pit
    if pit is None:
        raise ValueError("Expected values with an atom at zero. Leave out active=True.")
    columns = [column[~column.isnan()] for column in pit.T]
    columns = [column for column in columns if len(column) > 1]
    if not columns:
        raise ValueError("Expected at least two ranks of an element, got fewer. Simulate more.")
    each = (1 - prob) / len(columns)
    band = uniform_band(min(map(len, columns)), 1 - each)
    ax = new_axes(ax)
    grid = np.concatenate([[0.0], band.points.numpy(), [1.0]])
    edges = [np.concatenate([[0.0], e.numpy(), [1.0]]) - grid for e in (band.lower, band.upper)]
    ax.fill_between(grid, *edges, color=_BAND, linewidth=0, label=f"{prob:.0%} band")
    ax.axhline(0.0, color="0.5", linewidth=0.8)
    for column in columns:
        share = np.searchsorted(column.sort().values.numpy(), grid, side="right") / len(column)
        out = uniform_p_value(column) <= each
        style = {"color": _ALARM, "zorder": 3} if out else {"color": _LINE, "alpha": 0.6}
        ax.plot(grid, share - grid, linewidth=1.0, **style)
    ax.set_xlim(0, 1)
    ax.set_xlabel("rank of the truth, over its largest")
    ax.set_ylabel("ECDF - uniform")
    ax.legend(loc="upper right", frameon=False, fontsize=8)
    return ax


def plot_reliability(curve: Reliability, *, ax: Any = None) -> Any:
    """Share of codes that are active against the probability that was said, with two sigmas.

    Args:
        curve: What ``reliability`` returns.
        ax: Where to draw; default a new figure.

    Returns:
        The axes.

    Example:
        >>> prob = torch.rand(500, 4, generator=torch.Generator().manual_seed(0))
        >>> from pyro_sparse.diagnostics.calibration import reliability
        >>> plot_reliability(reliability(prob, prob > 0.5)).get_xlabel()
        'P(active)'
    """
    ax = new_axes(ax, (3.6, 3.6))
    ax.plot([0, 1], [0, 1], color="0.5", linewidth=0.8)
    points = [part.cpu().numpy() for part in (curve.prob, curve.frequency, 2 * curve.se)]
    ax.errorbar(*points, fmt="o-", color=_LINE, capsize=2, markersize=4)
    ax.set_xlabel("P(active)")
    ax.set_ylabel("share that were active")
    ax.set_title(
        f"ECE {curve.ece:.3f} $\\pm$ {curve.ece_se:.3f} (noise alone {curve.ece_of_noise:.3f})",
        fontsize=9,
    )
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylim(-0.02, 1.02)
    ax.set_aspect("equal")
    return ax


def plot_khat(shape: Tensor, num_samples: int | None = None, *, ax: Any = None) -> Any:
    """Pareto shape of each datum, with the thresholds of its reading.

    Args:
        shape: What ``khat`` returns, shape ``(n,)``. Infinite values are drawn at the edge.
        num_samples: Draws, for the threshold ``min(1 - 1 / log10(num_samples), 0.7)``; default 0.7.
        ax: Where to draw; default a new figure.

    Returns:
        The axes.

    Raises:
        TypeError: If ``shape`` is no tensor.
        ValueError: If it has another shape than ``(n,)``.

    Example:
        >>> ax = plot_khat(torch.tensor([0.1, 0.8, 2.0]))
        >>> ax.get_title()
        '2 of 3 data above 0.70'
    """
    check_tensor("shape", shape)
    if shape.dim() != 1 or len(shape) == 0:
        raise ValueError(f"Expected one k-hat for each datum, (n,), got {tuple(shape.shape)}.")
    good = 0.7
    if num_samples is not None:
        check_whole("num_samples", num_samples, 21)
        good = min(1 - 1 / math.log10(num_samples), 0.7)
    k = shape.detach().double().cpu()
    finite = k[k.isfinite()]
    top = max(1.2, float(finite.max()) * 1.05) if len(finite) else 1.2
    low = min(-0.2, float(finite.min()) - 0.05) if len(finite) else -0.2
    bad = k > good
    ax = new_axes(ax, (5.0, 3.0))
    index = torch.arange(len(k))
    for chosen, color in ((~bad, _LINE), (bad, _ALARM)):
        ax.plot(index[chosen], k[chosen].clamp(low, top), "+", color=color, markersize=5)
    for level, style in ((good, "--"), (1.0, ":")):
        ax.axhline(level, color="0.4", linestyle=style, linewidth=0.9)
    ax.set_ylim(low - 0.03 * (top - low), top + 0.03 * (top - low))
    ax.set_xlabel("datum")
    ax.set_ylabel("Pareto $\\hat k$")
    ax.set_title(f"{int(bad.sum())} of {len(k)} data above {good:.2f}", fontsize=9)
    return ax


def plot_atoms(
    atoms: Tensor,
    *,
    image_shape: Sequence[int] | None = None,
    order: Tensor | None = None,
    columns: int | None = None,
    titles: Sequence[Any] | None = None,
    axes: Any = None,
) -> Any:
    """Draw the atoms of a dictionary: curves, pictures in grey, or pictures in colour.

    Atoms with one dimension (dense ones, and convolutional ones of one kernel dimension) are
    curves, one a channel. Atoms with two are pictures: one channel from black to white, grey at
    zero; three channels in colour, likewise. Each has a scale of its own.

    Args:
        atoms: Shape ``(atoms, features)`` or ``(atoms, channels, *kernel)`` of one or two kernel
            dimensions.
        image_shape: Of dense atoms that are pictures: ``(height, width)`` or ``(channels, height,
            width)``.
        order: Which atoms, in which order, whole numbers; default all. Such as
            ``dictionary_summary(...).energy.argsort(descending=True)[:64]``.
        columns: Atoms in a row; default about as many as rows.
        titles: One for each atom drawn.
        axes: Where to draw, an array of at least as many axes; default a new figure.

    Returns:
        Axes, an array ``(rows, columns)`` or that which was given; unused ones are empty.

    Raises:
        TypeError: If ``atoms`` is no tensor.
        ValueError: If atoms have another number of dimensions or channels, or a shape or number
            does not fit.

    Example:
        >>> plot_atoms(torch.eye(6)).shape, plot_atoms(torch.rand(4, 3, 5, 5)).shape
        ((2, 3), (2, 2))
    """
    check_atoms(atoms, "atoms")
    pictures = _shaped(atoms.detach().cpu(), image_shape)
    if order is not None:
        pictures = pictures[torch.as_tensor(order).cpu()]
    count = len(pictures)
    if titles is not None and len(titles) != count:
        raise ValueError(f"Expected {count} titles, one for each atom, got {len(titles)}.")
    axes = _grid(axes, count, columns)
    for axis in axes.flat:
        axis.set_axis_off()
    for number, (axis, picture) in enumerate(zip(axes.flat, pictures)):
        limit = max(float(picture.abs().max()), torch.finfo(picture.dtype).tiny)
        if picture.dim() == 2:
            axis.plot(picture.T.numpy(), linewidth=1.0)
            axis.axhline(0.0, color="0.8", linewidth=0.5, zorder=0)
        elif len(picture) == 1:
            axis.imshow(picture[0].numpy(), cmap="gray", vmin=-limit, vmax=limit)
        else:
            colours = (0.5 + 0.5 * picture / limit).clamp(0, 1)
            axis.imshow(colours.permute(1, 2, 0).numpy())
        if titles is not None:
            axis.set_title(str(titles[number]), fontsize=7)
    return axes


def plot_loss(history: History, *, ax: Any = None) -> Any:
    """Objective of each step, its mean over epochs, and the validation loss where there is one.

    Args:
        history: What ``infer.fit`` returns.
        ax: Where to draw; default a new figure.

    Returns:
        The axes. The vertical range leaves out the first tenth of the steps, which would squeeze
        the rest.

    Raises:
        TypeError: If ``history`` is none.
        ValueError: If nothing was trained.

    Example:
        >>> history = History(step_loss=[3.0, 2.0, 1.5, 1.4], epoch_loss=[2.5, 1.45])
        >>> plot_loss(history).get_ylabel()
        'nats per datum'
    """
    if not isinstance(history, History):
        raise TypeError(
            f"Expected the history that infer.fit returns, got {type(history).__name__}."
        )
    steps = np.asarray(history.step_loss, dtype=float)
    if not len(steps):
        raise ValueError("Expected a training of at least one step, got none.")
    ax = new_axes(ax, (5.0, 3.0))
    ax.plot(np.arange(1, len(steps) + 1), steps, color="0.75", linewidth=0.7, label="step")
    # A mean over an epoch belongs to its middle, the validation to its end.
    epochs = [
        ("mean of epoch", history.epoch_loss, _LINE, 0.5),
        ("validation", history.validation_loss, "tab:orange", 1.0),
    ]
    for name, values, color, at in epochs:
        if values:
            where = (np.arange(len(values)) + at) * len(steps) / len(values)
            style = {"color": color, "linewidth": 1.4, "marker": "o", "markersize": 3}
            ax.plot(where, values, label=name, **style)
    late = np.concatenate(
        [steps[len(steps) // 10 :], history.epoch_loss[1:], history.validation_loss[1:]]
    )
    late = late[np.isfinite(late)]
    if len(late):
        low, high = float(late.min()), float(late.max())
        margin = 0.05 * (high - low) or 0.05 * max(1.0, abs(high))
        ax.set_ylim(low - margin, high + margin)
    ax.set_xlabel("step")
    ax.set_ylabel("nats per datum")
    ax.legend(frameon=False, fontsize=8)
    return ax


def _shaped(atoms: Tensor, image_shape: Sequence[int] | None) -> Tensor:
    """Atoms ``(atoms, channels, length)`` or ``(atoms, channels, height, width)``."""
    if image_shape is not None:
        shape = (1, *image_shape) if len(image_shape) == 2 else tuple(image_shape)
        if atoms.dim() != 2 or len(shape) != 3 or math.prod(shape) != atoms.shape[1]:
            raise ValueError(
                "Expected image_shape (height, width) or (channels, height, width) of dense atoms "
                f"with {tuple(atoms.shape[1:])} features, got {tuple(image_shape)}."
            )
        atoms = atoms.reshape(len(atoms), *shape)
    elif atoms.dim() == 2:
        atoms = atoms.unsqueeze(1)
    if atoms.dim() not in (3, 4) or (atoms.dim() == 4 and atoms.shape[1] not in (1, 3)):
        raise ValueError(
            "Expected atoms with one or two dimensions, pictures of one or three channels, got "
            f"{tuple(atoms.shape[1:])}. Choose a channel or a slice, such as atoms[:, :1]."
        )
    return atoms


def new_axes(ax: Any, size: tuple[float, float] = (4.2, 3.2)) -> Any:
    """Axes as given, or those of a new figure."""
    if ax is not None:
        return ax
    from matplotlib import pyplot as plt  # chooses a backend, which an import should not

    return plt.subplots(figsize=size, layout="constrained")[1]


def _grid(given: Any, count: int, columns: int | None) -> Any:
    if given is not None:
        given = np.atleast_1d(np.asarray(given, dtype=object))
        if given.size < count:
            raise ValueError(f"Expected at least {count} axes, got {given.size}.")
        return given
    from matplotlib import pyplot as plt

    if columns is None:
        columns = math.ceil(count**0.5)
    check_whole("columns", columns, 1)
    rows = math.ceil(count / columns)
    size = (0.9 * columns + 0.1, 0.9 * rows + 0.1)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")[1]
