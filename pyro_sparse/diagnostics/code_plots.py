"""Pictures of codes: those of one datum with their uncertainty, and events in time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.colors import to_rgba_array
from torch import Tensor

from pyro_sparse.diagnostics.plots import new_axes
from pyro_sparse.diagnostics.streaming import CodeSummary
from pyro_sparse.infer.numbers import check_real, check_whole
from pyro_sparse.ops import check_tensor

_MARK, _TRUTH = "tab:blue", "tab:red"
_FAINTEST = 0.12  # opacity of what is surely zero: to be seen that it was drawn


def plot_codes(
    found: CodeSummary,
    index: int = 0,
    *,
    truth: Tensor | None = None,
    top: int | None = None,
    names: Sequence[Any] | None = None,
    ax: Any = None,
) -> Any:
    """Codes of one datum: mean, interval, and how sure it is that they are active.

    The more probable a code is to be active, the less transparent its mark. A bar reaches from the
    lowest quantile of the summary to the highest, zeros counted; without quantiles it is the mean
    plus and minus one standard deviation.

    Args:
        found: What ``summarise_codes`` returns, of codes with one dimension, ``(n, atoms)``.
        index: Which datum.
        truth: Its true codes, shape ``(atoms,)``.
        top: Draw this many codes alone, those most probable to be active, and true ones; of
            equally probable ones those of the largest magnitude. Default all.
        names: One for each atom, written below it. Default its number.
        ax: Where to draw; default a new figure.

    Returns:
        The axes: atoms on the x-axis, in their order.

    Raises:
        TypeError: If ``found`` is no summary, or another argument is of the wrong kind.
        ValueError: If the codes have positions (see ``plot_events``), there is no such datum, or a
            shape or number does not fit.

    Example:
        >>> zero = np.zeros((2, 3))
        >>> found = CodeSummary(zero, zero + 0.1, zero + 0.5, {0.05: zero - 1, 0.95: zero + 1})
        >>> plot_codes(found, 1, truth=torch.zeros(3)).get_xlabel()
        'atom'
    """
    if not isinstance(found, CodeSummary):
        raise TypeError(
            f"Expected what summarise_codes returns, got {type(found).__name__}. Try "
            "plot_codes(summarise_codes(guide, y), index)."
        )
    check_whole("index", index)
    if found.mean.ndim != 2:
        raise ValueError(
            f"Expected codes of shape (n, atoms), got {found.mean.shape}. Codes in time or space "
            "are events: plot_events(torch.from_numpy(found.prob_active[index]))."
        )
    size, num_atoms = found.mean.shape
    if not -size <= index < size:
        raise ValueError(f"Expected the index of one of {size} data, got {index}.")
    mean, prob = np.asarray(found.mean[index]), np.asarray(found.prob_active[index])
    if found.quantiles:
        levels = min(found.quantiles), max(found.quantiles)
        low, high = (np.asarray(found.quantiles[level][index]) for level in levels)
        bar = f"{levels[0]:.0%} to {levels[1]:.0%} of the posterior"
    else:
        sd = np.asarray(found.sd[index])
        low, high, bar = mean - sd, mean + sd, "mean $\\pm$ one sd"
    actual = _true_codes(truth, num_atoms)
    if names is not None and len(names) != num_atoms:
        raise ValueError(f"Expected {num_atoms} names, one for each atom, got {len(names)}.")
    shown = _chosen(prob, mean, actual, top)

    ax = new_axes(ax, (6.0, 3.0))
    where = np.arange(len(shown))
    colors = _shades(prob[shown])
    ax.axhline(0.0, color="0.6", linewidth=0.8, zorder=0)
    ax.vlines(where, low[shown], high[shown], colors=colors, linewidth=3)
    ax.scatter(where, mean[shown], s=26, color=colors)
    ax.vlines([], [], [], colors=_MARK, linewidth=3, label=bar)
    ax.scatter([], [], s=26, color=_MARK, label="mean")
    if actual is not None:
        there = actual[shown] != 0
        style = {"marker": "_", "s": 90, "color": _TRUTH, "linewidths": 1.6, "zorder": 3}
        ax.scatter(where[there], actual[shown][there], label="truth, where not zero", **style)
    # Every name where there is room, else the numbers that matplotlib chooses.
    if names is not None or len(shown) <= 25:
        labels = [str(k if names is None else names[k]) for k in shown]
        ax.set_xticks(where, labels, fontsize=8, rotation=0 if len(shown) <= 16 else 90)
    ax.set_xlim(-0.7, len(shown) - 0.3)
    ax.set_xlabel("atom" if len(shown) == num_atoms else f"atom ({len(shown)} of {num_atoms})")
    ax.set_ylabel("code")
    ax.legend(frameon=False, fontsize=8, loc="best")
    ax.set_title("the fainter, the less probably active", fontsize=9)
    return ax


def plot_events(
    prob: Tensor,
    *,
    truth: Tensor | Sequence[Sequence[float]] | None = None,
    interval: float = 1.0,
    start: float = 0.0,
    unit: str = "samples",
    rows: Sequence[Any] | None = None,
    row: str = "atom",
    least: float = 0.02,
    ax: Any = None,
) -> Any:
    """Raster of events in time, each as high and as opaque as it is probable.

    Args:
        prob: Probability of an event at each time, shape ``(rows, times)``: the atoms of one
            datum, such as ``torch.from_numpy(found.prob_active[0])`` of a ``summarise_codes``, or
            one atom in many trials, ``prob_active[:, k]``.
        truth: True events, drawn as triangles below: boolean, shape of ``prob``, or the times of
            each row, in the unit of the axis.
        interval: Time from one sample to the next, ``> 0``.
        start: Time of the first.
        unit: Of time, for the label of the axis.
        rows: Names of the rows, from the top; default 0, 1, ...
        row: What a row is: ``"atom"``, ``"trial"``, ``"channel"``.
        least: Probability below which nothing is drawn, in [0, 1].
        ax: Where to draw; default a new figure, higher the more rows.

    Returns:
        The axes, first row on top.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a probability is outside [0, 1], or a shape or number does not fit.

    Example:
        >>> prob = torch.zeros(2, 100)
        >>> prob[0, 30], prob[1, 60] = 0.9, 0.3
        >>> ax = plot_events(prob, truth=[[0.3], []], interval=0.01, unit="s", row="trial")
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('time (s)', 'trial')
    """
    check_tensor("prob", prob)
    if prob.dim() != 2 or prob.numel() == 0:
        raise ValueError(
            f"Expected probabilities of shape (rows, times), got {tuple(prob.shape)}. Of pictures "
            "take one row or column; of one signal write prob[None]."
        )
    if not bool(((prob >= 0) & (prob <= 1)).all()):
        raise ValueError("Expected probabilities in [0, 1]. Pass prob_active, not codes.")
    check_real("interval", interval, 0.0, np.inf, open_low=True)
    check_real("start", start, -np.inf, np.inf)
    check_real("least", least, 0.0, 1.0)
    number, length = prob.shape
    if rows is not None and len(rows) != number:
        raise ValueError(f"Expected {number} names of rows, got {len(rows)}.")
    events = None if truth is None else _true_times(truth, prob, interval, start)

    ax = new_axes(ax, (6.4, min(8.0, 1.2 + 0.28 * number)))
    values = prob.detach().double().cpu().numpy()
    which, when = np.nonzero(values >= max(least, np.finfo(float).tiny))
    height = values[which, when]
    foot = which + 0.4  # the axis points down
    times = start + interval * when
    ax.vlines(times, foot - 0.8 * height, foot, colors=_shades(height), linewidth=1.4)
    # A whole event beside the raster says what full height means.
    ax.vlines([], [], [], colors=_MARK, linewidth=1.4, label="P(event): full height is 1")
    for y in range(number):
        ax.axhline(y + 0.4, color="0.85", linewidth=0.6, zorder=0)
    if events is not None:
        marks = [(time, y + 0.47) for y, found in enumerate(events) for time in found]
        x, y_of = zip(*marks) if marks else ((), ())
        style = {"marker": "^", "s": 14, "color": _TRUTH, "linewidths": 0, "label": "true event"}
        ax.scatter(x, y_of, clip_on=False, zorder=3, **style)
    ax.set_xlim(start - interval, start + interval * length)
    ax.set_ylim(number - 0.4, -0.6)
    shown = [*range(0, number, 1 if number <= 30 else -(-number // 15))]
    ax.set_yticks(shown, [str(y if rows is None else rows[y]) for y in shown], fontsize=8)
    ax.set_xlabel(f"time ({unit})")
    ax.set_ylabel(row)
    ax.legend(
        frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2,
        borderaxespad=0.2,
    )  # fmt: skip
    return ax


def _shades(prob: Any) -> Any:
    """Colours, the more opaque the more probable, shape ``(n, 4)``."""
    colors = np.repeat(to_rgba_array(_MARK), len(prob), axis=0)
    colors[:, 3] = _FAINTEST + (1 - _FAINTEST) * np.clip(prob, 0, 1)
    return colors


def _true_codes(truth: Tensor | None, num_atoms: int) -> Any:
    if truth is None:
        return None
    check_tensor("truth", truth)
    if tuple(truth.shape) != (num_atoms,):
        raise ValueError(
            f"Expected the true codes of one datum, shape ({num_atoms},), got "
            f"{tuple(truth.shape)}. Try truth[index]."
        )
    return truth.detach().cpu().numpy()


def _chosen(prob: Any, mean: Any, truth: Any, top: int | None) -> Any:
    """Numbers of the codes to draw, ascending."""
    if top is None:
        return np.arange(len(prob))
    check_whole("top", top, 1)
    order = np.lexsort((-np.abs(mean), -prob))[:top]
    if truth is not None:
        order = np.union1d(order, np.nonzero(truth)[0])
    return np.sort(order)


def _true_times(truth: Any, prob: Tensor, interval: float, start: float) -> list[list[float]]:
    """Times of each row, in the unit of the axis."""
    if isinstance(truth, Tensor):
        if truth.dtype != torch.bool or truth.shape != prob.shape:
            raise ValueError(
                f"Expected truth as booleans of shape {tuple(prob.shape)}, such as codes != 0, or "
                f"the times of each row, got {truth.dtype} of shape {tuple(truth.shape)}."
            )
        return [[start + interval * t for t in line.nonzero()[:, 0].tolist()] for line in truth]
    if isinstance(truth, str) or not isinstance(truth, Sequence):
        raise TypeError(
            "Expected truth as a boolean tensor or a list of the times of each row, got "
            f"{type(truth).__name__}."
        )
    if len(truth) != len(prob):
        raise ValueError(f"Expected times of each of {len(prob)} rows, got {len(truth)} lists.")
    return [[float(time) for time in line] for line in truth]
