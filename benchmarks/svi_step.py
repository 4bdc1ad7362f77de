"""Time of one SVI step beside the same arithmetic in raw torch.

    python -m benchmarks.svi_step [--json FILE]

Dense dictionary, 256 features, 512 atoms, batch 256, 15 unrolled FISTA steps, tied weights,
learned thresholds, MAP objective, one Adam step. The raw version holds the same parameters and
computes the same loss (asserted) without Pyro, modules or distributions. All versions take turns;
medians are over the rounds, and the ratio is taken round by round.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_sparse.dictionaries import Dense
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding
from pyro_sparse.ops import largest_eigenvalue_bound

BATCH, FEATURES, ATOMS, STEPS = 256, 256, 512, 15
NOISE, CODE_SCALE, RATE = 0.1, 0.1, 1e-3


def raw_step(atoms: Tensor, y: Tensor) -> tuple[Callable[[], float], list[Tensor]]:
    """The same step written out by hand."""
    raw = atoms.clone().requires_grad_()
    log_threshold = torch.zeros(ATOMS, requires_grad=True)
    optimizer = torch.optim.Adam([raw, log_threshold], lr=RATE)
    constant = y.numel() * math.log(NOISE * math.sqrt(2 * math.pi))
    constant += BATCH * ATOMS * math.log(2 * CODE_SCALE)

    def step() -> float:
        optimizer.zero_grad()
        unit = raw / raw.norm(dim=1, keepdim=True)
        size = 1 / largest_eigenvalue_bound(unit.T @ unit)
        threshold = size * NOISE**2 / CODE_SCALE * log_threshold.exp()
        point, codes, momentum = None, None, 1.0
        for _ in range(STEPS):
            residual = y if point is None else y - point @ unit
            value = size * (residual @ unit.T)
            value = value if point is None else point + value
            new = value - torch.clamp(value, -threshold, threshold)
            following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            point = new if codes is None else new + (momentum - 1) / following * (new - codes)
            codes, momentum = new, following
        loss = ((y - codes @ unit) / NOISE).square().sum() / 2 + codes.abs().sum() / CODE_SCALE
        loss.backward()
        optimizer.step()
        return loss.item() + constant

    return step, [raw, log_threshold]


def pair(atoms: Tensor) -> tuple[SparseCoding, UnrolledFISTA]:
    dictionary = Dense(ATOMS, FEATURES, atoms=atoms)
    likelihood, prior = Gaussian(NOISE), dist.Laplace(0.0, CODE_SCALE)
    model = SparseCoding(dictionary, likelihood, prior)
    return model, UnrolledFISTA(dictionary, likelihood, prior, num_steps=STEPS)


def svi_step(atoms: Tensor, y: Tensor) -> Callable[[], float]:
    """``pyro.infer.SVI``."""
    svi = SVI(*pair(atoms), pyro.optim.Adam({"lr": RATE}), Trace_ELBO())
    return lambda: float(svi.step(y))


def module_step(atoms: Tensor, y: Tensor) -> Callable[[], float]:
    """The ELBO as a module under ``torch.optim``: what ``infer.fit`` does."""
    objective = Trace_ELBO()(*pair(atoms))
    optimizer = torch.optim.Adam(objective.parameters(), lr=RATE)

    def step() -> float:
        optimizer.zero_grad()
        loss = objective(y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(ATOMS, FEATURES), dim=1)
    codes = torch.randn(BATCH, ATOMS) * (torch.rand(BATCH, ATOMS) < 0.04)
    y = codes @ atoms + NOISE * torch.randn(BATCH, FEATURES)

    steps = {"raw torch": raw_step(atoms, y)[0]}
    steps["pyro.infer.SVI"] = svi_step(atoms, y)
    steps["ELBO module"] = module_step(atoms, y)
    first = {name: step() for name, step in steps.items()}
    for name, loss in first.items():
        assert math.isclose(loss, first["raw torch"], rel_tol=1e-5), (name, first)
    for _ in range(3):
        for step in steps.values():
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)

    rows = {}
    print(f"{'step':16s} {'median ms':>10s} {'ratio to raw':>13s} {'quartiles':>14s}")
    for name, times in seconds.items():
        ratios = [t / raw for t, raw in zip(times, seconds["raw torch"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "median_ms": round(1e3 * statistics.median(times), 2),
            "ratio": round(median, 3),
            "ratio_quartiles": [round(low, 3), round(high, 3)],
        }
        milliseconds = 1e3 * statistics.median(times)
        print(f"{name:16s} {milliseconds:10.1f} {median:13.2f}  {low:.2f} - {high:.2f}")
    if options.json:
        record = {
            "command": f"python -m benchmarks.svi_step --rounds {options.rounds} "
            f"--threads {options.threads}",
            "sizes": {"batch": BATCH, "features": FEATURES, "atoms": ATOMS, "unrolled": STEPS},
            "seed": 0,
            "steps": rows,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "pyro": pyro.__version__,
            },
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
