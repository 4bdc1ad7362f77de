"""Time to find spikes at equal accuracy of the objective: all windows at once, or one by one.

Every window is the same non-negative Lasso. This library solves windows of similar length as one
batch, each to its own certificate. Against it, window by window: L-BFGS-B and trust-constr (scipy),
stopped as soon as the objective is as near to the minimum as asked for, which they could not know
by themselves; and an interior-point solver (Clarabel by cvxpy, if installed). Seconds are those of
the processor, one thread.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.linalg import toeplitz
from scipy.optimize import Bounds, minimize
from torch import Tensor

from benchmarks.crsae_spikes import NOISE, exponential, stretches, templates
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.solvers import Solution, solve

Array = np.ndarray[Any, Any]

BUCKETS = 8


class Window:
    """One stretch as a non-negative Lasso with a dense matrix of what was observed."""

    def __init__(self, signal: Array, atoms: Array, rate: Array) -> None:
        observed = np.isfinite(signal)
        positions = len(signal) + atoms.shape[-1] - 1
        blocks = []
        for atom in atoms[:, 0]:
            # Column p holds the atom that begins kernel - 1 samples before sample p.
            canvas = toeplitz(np.r_[atom, np.zeros(positions - 1)], np.zeros(positions))
            blocks.append(canvas[len(atom) - 1 : len(atom) - 1 + len(signal)])
        self.matrix = np.concatenate(blocks, 1)[observed] / NOISE
        self.y = signal[observed].astype(float) / NOISE
        self.rate = np.repeat(rate, positions)

    def value(self, codes: Array) -> float:
        away = self.matrix @ codes - self.y
        return float(away @ away / 2 + self.rate @ codes)

    def both(self, codes: Array) -> tuple[float, Array]:
        away = self.matrix @ codes - self.y
        return float(away @ away / 2 + self.rate @ codes), self.matrix.T @ away + self.rate


class _Reached(Exception):
    pass


def until(window: Window, goal: float, method: str, limit: float) -> float:
    """Seconds until scipy's objective is at most ``goal``, or infinity."""
    start = np.zeros(window.matrix.shape[1])
    begun = time.process_time()
    if window.value(start) <= goal:
        return time.process_time() - begun

    def look(codes: Array, state: Any = None) -> None:
        if window.value(np.maximum(codes, 0)) <= goal:
            raise _Reached
        if time.process_time() - begun > limit:
            raise TimeoutError

    # A callback by position of its first argument serves both methods.
    callback: Callable[..., None] = look if method == "trust-constr" else lambda x: look(x)
    tight: dict[str, Any] = {"maxiter": 100_000}
    tight |= (
        {"ftol": 0.0, "gtol": 0.0, "maxfun": 10**6} if method == "L-BFGS-B" else {"gtol": 1e-12}
    )
    try:
        minimize(
            window.both, start, jac=True, method=method, bounds=Bounds(0, np.inf),
            callback=callback, options=tight,
        )  # fmt: skip
    except _Reached:
        return time.process_time() - begun
    except TimeoutError:
        pass
    return float("inf")


def interior_point(window: Window, tol: float) -> dict[str, float]:
    """Seconds of cvxpy's default solver for a quadratic programme, and what it reached."""
    import cvxpy

    begun = time.process_time()
    codes = cvxpy.Variable(window.matrix.shape[1], nonneg=True)
    loss = cvxpy.sum_squares(window.matrix @ codes - window.y) / 2 + window.rate @ codes
    problem = cvxpy.Problem(cvxpy.Minimize(loss))
    problem.solve(solver=cvxpy.CLARABEL, tol_gap_rel=tol, tol_gap_abs=tol)
    seconds = time.process_time() - begun
    value = window.value(np.maximum(codes.value, 0))
    return {"seconds": seconds, "value": value}


def batched(
    signals: list[Array], tensors: dict[str, Tensor], tol: float
) -> tuple[list[Solution], float]:
    """Solutions of all windows, in the order given, and the seconds they took."""
    kernel = tensors["atoms"].shape[-1]
    order = np.argsort([len(signal) for signal in signals], kind="stable")
    found, begun = [], time.process_time()
    dictionary, likelihood = templates(tensors["atoms"]), Gaussian(NOISE)
    for part in np.array_split(order, BUCKETS):
        width = max(len(signals[i]) for i in part) + 2 * (kernel - 1)
        y = np.full((len(part), 1, width), np.nan, dtype=np.float32)
        for row, i in enumerate(part):
            y[row, 0, kernel - 1 : kernel - 1 + len(signals[i])] = signals[i]
        data = torch.from_numpy(y)
        mask = torch.isfinite(data)
        found.append(
            solve(
                data, dictionary, exponential, rate=tensors["rate"], likelihood=likelihood,
                mask=mask, tol=tol,
            )
        )  # fmt: skip
    return found, time.process_time() - begun


def compare(
    trace: Array, tensors: dict[str, Tensor], *, tol: float, sampled: int, seed: int = 0
) -> dict[str, Any]:
    """Seconds a window of every method, and their ratios to this library's.

    Args:
        trace: Recording, nan where nothing was observed.
        tensors: Atoms and rates.
        tol: Relative accuracy of the objective.
        sampled: Windows, drawn at random, that are solved one by one.
        seed: Seed of that draw.
    """
    atoms, rate = tensors["atoms"], tensors["rate"]
    signals = [trace[begin:end] for begin, end in stretches(trace, atoms.shape[-1])]
    batched(signals[:64], tensors, tol)  # what is set up at a first call
    solutions, seconds = batched(signals, tensors, tol)
    ours = seconds / len(signals)
    chosen = np.random.default_rng(seed).choice(len(signals), sampled, replace=False)
    exact = {"atoms": atoms.double(), "rate": rate.double()}
    rows: dict[str, list[float]] = {}
    worst = 0.0
    installed = importlib.util.find_spec("cvxpy") is not None
    for i in chosen:
        window = Window(signals[i], exact["atoms"].numpy(), exact["rate"].numpy())
        least = minimum(window, signals[i], exact)
        goal = (1 + tol) * least
        for method in ("L-BFGS-B", "trust-constr"):
            rows.setdefault(f"{method} (scipy)", []).append(until(window, goal, method, 60.0))
        if installed:
            point = interior_point(window, tol)
            rows.setdefault("interior point (cvxpy)", []).append(point["seconds"])
            worst = max(worst, point["value"] / least - 1)
    return {
        "relative_accuracy": tol,
        "windows": len(signals),
        "this_library_seconds": round(seconds, 3),
        "this_library_ms_a_window": round(1e3 * ours, 3),
        "all_certified": bool(all(part.converged.all() for part in solutions)),
        "one_by_one": {name: _row(times, ours) for name, times in rows.items()},
        "interior_point_worst_relative_excess": float(f"{worst:.2g}") if installed else None,
        "cvxpy": importlib.metadata.version("cvxpy") if installed else None,
    }


def minimum(window: Window, signal: Array, tensors: dict[str, Tensor]) -> float:
    """Least objective of a window, to a relative 1e-9."""
    pad = np.full(tensors["atoms"].shape[-1] - 1, np.nan)
    y = torch.from_numpy(np.concatenate([pad, signal.astype(float), pad]))[None, None]
    found = solve(
        y, templates(tensors["atoms"]), exponential, rate=tensors["rate"],
        likelihood=Gaussian(NOISE).double(), mask=torch.isfinite(y), tol=1e-9,
    )  # fmt: skip
    return window.value(found.codes[0].flatten().numpy())


def _row(times: list[float], ours: float) -> dict[str, Any]:
    finite = [t for t in times if np.isfinite(t)]
    if not finite:
        return {"windows": len(times), "not_reached": len(times)}
    mean = float(np.mean(finite))
    return {
        "windows": len(times),
        "not_reached": len(times) - len(finite),
        "ms_a_window": round(1e3 * mean, 2),
        "times_slower": round(mean / ours, 1),
    }
