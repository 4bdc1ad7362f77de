"""Pictures of a report, each with what it shows in words."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.style
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from pyro_sparse.diagnostics.amortisation import AmortisationGap
from pyro_sparse.diagnostics.calibration import Calibration, Reliability
from pyro_sparse.diagnostics.code_plots import plot_codes, plot_events
from pyro_sparse.diagnostics.dictionary import DictionarySummary
from pyro_sparse.diagnostics.plots import (
    plot_atoms,
    plot_khat,
    plot_loss,
    plot_rank_ecdf,
    plot_reliability,
)
from pyro_sparse.diagnostics.predictive import PredictiveCheck
from pyro_sparse.diagnostics.streaming import CodeSummary
from pyro_sparse.diagnostics.topics import predictive_effect
from pyro_sparse.infer.history import History

_SIZE = (4.2, 3.0)
_DPI = 150
_MOST_ATOMS = 64
_MOST_ROWS = 24


@dataclass(frozen=True)
class Picture:
    """One figure.

    Attributes:
        name: In one word or two.
        figure: Of matplotlib; no window belongs to it.
        alt: What it shows, for who does not see it.
        caption: How to read it.
        shades: Whether its greys mean something, so that it is not to be inverted on a dark page.

    Example:
        >>> Picture("empty", Figure(), "nothing", "Nothing is drawn.").png()[1:4]
        b'PNG'
    """

    name: str
    figure: Figure
    alt: str
    caption: str
    shades: bool = False

    def png(self) -> bytes:
        """As a file, the same bytes each time."""
        buffer = io.BytesIO()
        with matplotlib.style.context("default"):
            self.figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
        return buffer.getvalue()

    def data_uri(self) -> str:
        """The same, to be written into a page."""
        return "data:image/png;base64," + base64.b64encode(self.png()).decode("ascii")


def loss(history: History) -> Picture:
    """Of the training."""
    figure, ax = _one()
    plot_loss(history, ax=ax)
    first, last = history.step_loss[0], history.step_loss[-1]
    return Picture(
        "training", figure,
        f"Loss of {len(history.step_loss)} steps, from {first:.3g} to {last:.3g} nats per datum.",
        "Objective in the course of training; it should be level at the end.",
    )  # fmt: skip


def khat(shape: Tensor, num_samples: int, seen: str) -> Picture:
    """Of each datum."""
    figure, ax = _one()
    plot_khat(shape, num_samples, ax=ax)
    return Picture(
        "weights", figure, f"Pareto k-hat of each datum: {seen}.",
        "Above the dashed line draws of the guide cannot be reweighted to the posterior.",
    )  # fmt: skip


def predictive(check: PredictiveCheck, level: float) -> Picture:
    """Means of statistics over the data, against those of replicates."""
    figure, ax = _one()
    names = list(check.replicated)
    labels, worst = [], 0.0
    for row, name in enumerate(names):
        means = check.replicated[name].mean(1)
        scale = max(float(means.std()), torch.finfo(means.dtype).tiny)
        low, high = ((means.quantile(q) - means.mean()) / scale for q in (level, 1 - level))
        z = float((check.observed[name].mean() - means.mean()) / scale)
        worst = max(worst, min(abs(z), 10.0))
        p = check.overall[name]
        color = "tab:blue" if level <= p <= 1 - level else "tab:red"
        ax.plot([float(low), float(high)], [row, row], color="0.8", linewidth=9, zorder=1)
        ax.plot([max(-10.0, min(z, 10.0))], [row], "o", color=color, markersize=6, zorder=2)
        effect = predictive_effect(check, name)
        labels.append(f"{name.replace('_', ' ')}\np = {p:.3g}, {effect:+.2f} sd")
    ax.axvline(0.0, color="0.5", linewidth=0.8, zorder=0)
    ax.set_yticks(range(len(names)), labels, fontsize=8)
    ax.set_ylim(len(names) - 0.5, -0.5)
    edge = max(4.0, 1.15 * worst)
    ax.set_xlim(-edge, edge)
    ax.set_xlabel("mean of data, in sd of replicates")
    told = ", ".join(f"{name} p = {p:.2g}" for name, p in check.overall.items())
    return Picture(
        "predictive", figure, f"Data against replicates of the model: {told}.",
        f"Dots: the data. Bars: {1 - 2 * level:.0%} of data sets that the model makes at the "
        "posterior. Red dots lie outside (cut at 10). p: tail probability; sd: the difference, in "
        "sd over the data.",
    )  # fmt: skip


def ranks(found: Calibration, origin: str) -> Picture:
    """Of true codes among draws."""
    figure, ax = _one()
    active = found.pit_active is not None
    plot_rank_ecdf(found, active=active, ax=ax)
    kind = "active codes" if active else "codes"
    out = sum(line.get_color() == "tab:red" for line in ax.lines)
    return Picture(
        "ranks", figure,
        f"Ranks of true {kind} among draws ({origin}): {out} of {len(ax.lines) - 1} atoms leave "
        "the band of a right posterior.",
        f"Ranks of true {kind} among draws, {origin}; a line for each code. Up on the left and "
        "down on the right: too narrow. Red: outside the band.",
    )  # fmt: skip


def active(curve: Reliability, origin: str) -> Picture:
    """How often codes are active."""
    figure, ax = _one()
    plot_reliability(curve, ax=ax)
    return Picture(
        "P(active)", figure,
        f"Share of codes that were active against P(active), {origin}: expected calibration error "
        f"{curve.ece:.3f}.",
        f"Are codes that are called active with probability 0.8 so in eight of ten cases? "
        f"({origin[:1].upper()}{origin[1:]}.)",
    )  # fmt: skip


def gap(found: AmortisationGap) -> Picture:
    """Of each datum."""
    figure, ax = _one()
    values = found.amortisation.cpu().numpy()
    ax.hist(values, bins=min(30, max(5, len(values) // 4)), color="tab:blue", edgecolor="white")
    ax.axvline(0.0, color="0.5", linewidth=0.8)
    ax.set_xlabel("gain of the bound by refining (nats)")
    ax.set_ylabel("data")
    return Picture(
        "amortisation", figure,
        f"Histogram of the amortisation gaps of {len(values)} data, mean {values.mean():.2g} nats.",
        "What each datum gains from parameters of its own, in place of the encoder's.",
    )  # fmt: skip


def usage(found: DictionarySummary, dead: Tensor) -> Picture:
    """Of atoms: how often active, how much energy."""
    figure, ax = _one()
    order = found.energy.argsort(descending=True).cpu()
    where, crossed = np.arange(len(order)), dead.cpu()[order].numpy()
    floor = 1e-6
    for values, color, label in (
        (found.energy, "tab:blue", "share of energy"),
        (found.usage, "0.6", "share of codes active"),
    ):
        shares = values.cpu()[order].clamp(min=floor).numpy()
        ax.plot(where, shares, "o", markersize=3, color=color, label=label)
        if color != "0.6" and crossed.any():
            style = {"marker": "x", "markersize": 6, "color": "tab:red", "linestyle": "none"}
            ax.plot(where[crossed], shares[crossed], label="dead", **style)
    ax.set_yscale("log")
    ax.set_ylim(floor / 2, 1.5)
    ax.set_xlabel("atom, most energy first")
    ax.set_ylabel(f"share (cut at {floor:g})")
    ax.legend(frameon=False, fontsize=8, loc="lower left")
    return Picture(
        "usage", figure,
        f"Share of each of {len(order)} atoms in energy and active codes; {int(dead.sum())} are "
        "dead.",
        "Does each atom take part, and in how much of the data?",
    )  # fmt: skip


def dictionary(
    atoms: Tensor, found: DictionarySummary | None, image_shape: Sequence[int] | None
) -> Picture | None:
    """Atoms, those with most energy first; None of such that cannot be drawn."""
    if atoms.dim() not in (2, 3, 4) or (atoms.dim() == 4 and atoms.shape[1] not in (1, 3)):
        return None
    number = min(len(atoms), _MOST_ATOMS)
    order = torch.arange(len(atoms)) if found is None else found.energy.argsort(descending=True)
    columns = math.ceil((1.4 * number) ** 0.5)
    with matplotlib.style.context("default"):
        figure = Figure(figsize=_SIZE, layout=ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01))
        axes = figure.subplots(-(-number // columns), columns, squeeze=False)
        plot_atoms(atoms, image_shape=image_shape, order=order[:number], axes=axes)
    which = "All" if number == len(atoms) else f"The {number} (of {len(atoms)})"
    most = " with most energy" if number < len(atoms) else ""
    return Picture(
        "atoms", figure, f"{which} atoms{most}, most energy first.",
        f"{which} atoms{most}, most energy first, each in a scale of its own"
        + (": grey is zero." if image_shape or atoms.dim() == 4 else "."),
        shades=bool(image_shape) or atoms.dim() == 4,
    )  # fmt: skip


def some_codes(found: CodeSummary, truth: Tensor | None) -> Picture | None:
    """Of the datum with the median number of active codes; None of pictures."""
    number = found.prob_active.reshape(len(found.mean), -1).sum(1)
    index = int(np.argsort(number, kind="stable")[len(number) // 2])
    chosen = None if truth is None else truth[index]
    figure, ax = _one()
    if found.mean.ndim == 2:
        plot_codes(found, index, truth=chosen, top=24, ax=ax)
        ax.set_title("")
        how = "Bars: intervals, zeros counted. The fainter, the less probably active."
    elif found.mean.ndim == 3:
        prob = torch.from_numpy(np.array(found.prob_active[index, :_MOST_ROWS]))
        marks = None if chosen is None else (chosen[:_MOST_ROWS] != 0)
        plot_events(prob.clamp(0, 1), truth=marks, ax=ax)
        how = "Each mark is as high and as opaque as an event is probable."
    else:
        return None
    return Picture(
        "codes", figure,
        f"Codes of datum {index}, which has {number[index]:.2g} active ones in expectation.",
        f"Datum {index} of those looked at, with the median number of active codes. {how}",
    )  # fmt: skip


def _one() -> tuple[Figure, Any]:
    with matplotlib.style.context("default"):
        figure = Figure(figsize=_SIZE, layout="constrained")
        ax = figure.subplots()
        ax.spines[["top", "right"]].set_visible(False)
    return figure, ax
