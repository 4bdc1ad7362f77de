"""Support and stability: the parts of ``benchmarks.pudle`` about codes and their layers."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from benchmarks.pudle_setting import (
    OBJECTIVES,
    Planted,
    at_codes,
    gradient,
    least_squares,
    nearby,
    pair,
    planted,
)
from pyro_sparse import infer
from pyro_sparse.solvers import Implicit, Proximal, Truncated

DISTANCES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
RATES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
ACTIVE = (1, 2, 3, 5, 8, 12)
LAYERS = 200
"""Enough for the support to stand still."""


def supports(options: argparse.Namespace) -> dict[str, Any]:
    """F1 score of the active codes, with their signs, and the share of data without any error."""
    common = options.signs == "common"
    usual = planted(options.data, 50, 100, 5, seed=options.seed, common_sign=common)
    by_rate: dict[str, Any] = {"f1": [], "whole": []}
    by_active: dict[str, Any] = {"f1": [], "whole": []}
    sizes: dict[str, Any] = {"f1": [], "whole": []}
    for distance in DISTANCES:
        add_row(by_rate, [support(usual, distance, rate, options.seed) for rate in RATES])
        row, other = [], []
        for s in ACTIVE:
            problem = planted(options.data, 50, 100, s, seed=options.seed, common_sign=common)
            row.append(support(problem, distance, 0.4, options.seed))
            wide = planted(options.data, 200, 400, s, seed=options.seed, common_sign=common)
            # Noise of an equal length in each atom, whatever its number of features.
            other.append(support(wide, distance / 2, 0.4, options.seed))
        add_row(by_active, row)
        add_row(sizes, other)
    return {
        "distances of an atom": [away(usual, distance, options.seed) for distance in DISTANCES],
        "rates": RATES,
        "active": ACTIVE,
        "by rate, s = 5, 50 x 100": by_rate,
        "by active codes, rate 0.4, 50 x 100": by_active,
        "by active codes, rate 0.4, 200 x 400": sizes,
    }


def support(problem: Planted, distance: float, rate: float, seed: int) -> tuple[float, float]:
    """F1 and share of whole supports of the codes from a dictionary at a distance."""
    _, guide = pair(nearby(problem.atoms, distance, seed), LAYERS, rate=rate)
    with torch.no_grad():
        found = torch.cat([guide.encode(part) for part in problem.y.split(500)])
    return scores(found, problem.codes)


def away(problem: Planted, distance: float, seed: int) -> float:
    """Mean length of the difference of an atom to the true one."""
    atoms = nearby(problem.atoms, distance, seed)
    return round(float((atoms - problem.atoms).norm(dim=1).mean()), 3)


def scores(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """F1 of active codes with the right sign, over all data; share of data without an error."""
    hits = ((found.sign() == truth.sign()) & (truth != 0)).sum()
    f1 = 2 * hits / ((found != 0).sum() + (truth != 0).sum())
    whole = (found.sign() == truth.sign()).all(1).double().mean()
    return round(float(f1), 4), round(float(whole), 4)


def add_row(table: dict[str, Any], row: list[tuple[float, float]]) -> None:
    for name, values in zip(("f1", "whole"), zip(*row, strict=True), strict=True):
        table[name].append(list(values))


def draw_supports(found: dict[str, Any], axes: list[Axes]) -> None:
    distances = found["distances of an atom"]
    for axis, (key, across) in zip(
        axes, [(k, "rates" if "rate, s" in k else "active") for k in found if k.startswith("by ")],
        strict=True,
    ):  # fmt: skip
        values = found[key]["f1"]
        axis.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                text = f"{value:.2f}\n({found[key]['whole'][i][j]:.2f})"
                color = "white" if value < 0.6 else "black"
                axis.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
        axis.set_xticks(range(len(found[across])), found[across])
        axis.set_yticks(range(len(distances)), distances)
        axis.set_xlabel("rate" if across == "rates" else "active codes of a datum")
        axis.set_ylabel("distance of an atom to the true one")
        axis.set_title(f"F1 of the support {key}\n(share of data without an error)", fontsize=9)


DEPTHS = (5, 10, 15, 20, 25, 30, 40, 50, 70, 100)
LARGE = 0.44
"""A step above two over the squared norm of the dictionary, which is 0.36."""


def stabilities(options: argparse.Namespace) -> dict[str, Any]:
    """Length of a gradient over that at the true codes, against depth."""
    problem = planted(options.data, 50, 100, 5, seed=options.seed, common_sign=False)
    start = nearby(problem.atoms, 0.05, options.seed)
    usual = OBJECTIVES["least squares"]
    by_step = {
        f"step {step}": lengths(problem, start, usual(), step=step)
        for step in (0.1, 0.2, 0.3, 0.4, 0.42, LARGE, 0.5)
    }
    cases: dict[str, tuple[infer.Differentiated, dict[str, Any]]] = {
        "least squares": (usual(), {}),
        "lasso": (OBJECTIVES["lasso"](), {}),
        "truncated to 5 layers": (least_squares(Truncated(5)), {}),
        "implicit": (least_squares(Implicit()), {}),
        "decoder": (OBJECTIVES["decoder"](), {}),
        "rate 0.4": (usual(), {"rate": 0.4}),
        "rate from 0.8 to 0.2": (usual(), {"rate": 0.8, "fall": 0.25}),
        "safe step": (usual(), {"step": None}),
    }
    cures = {
        name: lengths(problem, start, make, **{"step": LARGE, **settings})
        for name, (make, settings) in cases.items()
    }
    squared = float(torch.linalg.matrix_norm(start, 2) ** 2)
    return {
        "depths": DEPTHS,
        "two over the squared norm": 2 / squared,
        "length by step": by_step,
        f"length at step {LARGE}": cures,
    }


def lengths(
    problem: Planted,
    start: Tensor,
    objective: infer.Differentiated,
    *,
    step: float | None,
    rate: float = 0.2,
    fall: float = 1.0,
) -> list[float | None]:
    """Of the gradient, relative to that at the true codes; None where codes are not finite."""
    truth = at_codes(start, problem.codes, problem.y).norm()
    found: list[float | None] = []
    for layers in DEPTHS:
        shrinkage = Proximal(decay=fall ** (1 / layers))
        model, guide = pair(start, layers, step=step, rate=rate, shrinkage=shrinkage)
        with torch.no_grad():
            largest = guide.encode(problem.y).abs().max()
        if not largest < 1e15:  # squares of what is larger leave the range of float32
            found.append(None)
            continue
        length = float(gradient(objective, model, guide, problem.y).norm() / truth)
        found.append(length if length < 1e30 else None)
    return found


def draw_stabilities(found: dict[str, Any], axes: list[Axes]) -> None:
    titles = {
        "length by step": "least squares, through all layers\n"
        f"(two over the squared norm: {found['two over the squared norm']:.2f})",
        f"length at step {LARGE}": f"step {LARGE} (but for the safe one), by gradient and cure",
    }
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for number, (name, values) in enumerate(found[key].items()):
            line = [float("nan") if v is None else v for v in values]
            axis.semilogy(found["depths"], line, f"C{number}.-", label=name)
        axis.set_ylim(0.1, 1e10)
        axis.set_xlabel("layers")
        axis.set_ylabel("length of the gradient / that at the true codes")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
