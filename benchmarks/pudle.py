"""PUDLE's theory on planted dictionaries, and its denoiser: what each gradient learns.

    python -m benchmarks.pudle gradient     error of the gradient against depth
    python -m benchmarks.pudle dictionary   error of the dictionary along 600 full-batch steps
    python -m benchmarks.pudle support      which codes are active, from a dictionary that is off
    python -m benchmarks.pudle stability    gradients that grow with depth, and what prevents it
    python -m benchmarks.pudle decay        1000 x 1500: fixed rate, decaying rate, hard threshold
    python -m benchmarks.pudle denoise      pictures; needs PYRO_SPARSE_DATA

Each takes ``--out FOLDER`` for ``pudle_PART.json`` and ``.png``. Gradients are called as in
``infer.Differentiated``: decoder (alternating minimisation), lasso and least squares (through the
encoder, with and without the penalty). Digits explained by training digits, the paper's other
part, are in ``benchmarks.explained_digits``.

Tolooshams & Ba (2022), Stable and interpretable unrolled dictionary learning, TMLR. Published
numbers in the records are those of the authors' stored results. The generator there gives all
codes of a datum one sign, the theory one to each: ``--signs``.
"""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pyro.distributions as dist
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks import common, pudle_codes, pudle_denoise
from benchmarks.pudle_setting import (
    OBJECTIVES,
    RATE,
    Projected,
    at_codes,
    gradient,
    least_squares,
    nearby,
    pair,
    planted,
)
from pyro_sparse import infer
from pyro_sparse.dictionaries import Dense
from pyro_sparse.solvers import HardThreshold, Implicit, Proximal, Shrinkage, solve

DEPTHS = (5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90, 100)


def gradients(options: argparse.Namespace) -> dict[str, Any]:
    """Distance of each gradient to the exact lasso's and to that at the true codes."""
    problem = planted(
        options.data, 50, 100, 5, seed=options.seed, common_sign=options.signs == "common"
    )
    start = nearby(problem.atoms, 0.02, options.seed)
    # The reference has to be more exact than the nets: in float64.
    dictionary = Dense(*start.shape, atoms=start.double(), unit_norm=False)
    codes = solve(problem.y.double(), dictionary, dist.Laplace(0.0, 1 / RATE), tol=1e-10).codes
    lasso = at_codes(start.double(), codes, problem.y.double())
    truth = at_codes(start, problem.codes, problem.y)
    rows: dict[str, Any] = {"code": [], "to lasso": {}, "to truth": {}}
    for layers in options.depths:
        model, guide = pair(start, layers)
        with torch.no_grad():
            found = torch.cat([guide.encode(part) for part in problem.y.split(500)])
        rows["code"].append(float((found - codes).norm(dim=1).mean()))
        for name, make in OBJECTIVES.items():
            one = gradient(make(), model, guide, problem.y)
            rows["to lasso"].setdefault(name, []).append(float((one - lasso).norm()))
            rows["to truth"].setdefault(name, []).append(float((one - truth).norm()))
    published = {
        "depths": [5, 20, 50, 100],
        "code": [1.74, 0.692, 0.0822, 0.00344],
        "to lasso": {
            "decoder": [0.1438, 0.0689, 0.00876, 3.71e-4],
            "lasso": [0.1464, 0.0542, 0.00375, 7.47e-5],
            "least squares": [0.1754, 0.108, 0.111, 0.119],
        },
        "to truth": {
            "decoder": [0.283, 0.217, 0.167, 0.1613],
            "lasso": [0.294, 0.209, 0.163, 0.1611],
            "least squares": [0.277, 0.151, 0.081, 0.0724],
        },
    }
    curves = {"code": rows["code"], **{n: rows["to lasso"][n] for n in ("decoder", "lasso")}}
    return {
        "depths": list(options.depths),
        **rows,
        "lasso to truth": float((lasso - truth).norm()),
        "rate per layer from half the depth on": {
            name: rate_per_layer(options.depths, values) for name, values in curves.items()
        },
        "published": published,
    }


def rate_per_layer(depths: tuple[int, ...], values: list[float]) -> float:
    """Factor from layer to layer of a geometric curve fitted to its deeper half."""
    late = [i for i, depth in enumerate(depths) if depth >= max(depths) / 2]
    slope = np.polyfit([depths[i] for i in late], np.log([values[i] for i in late]), 1)[0]
    return float(np.exp(slope))


def draw_gradients(found: dict[str, Any], axes: list[Axes]) -> None:
    published = found["published"]
    for axis, key in zip(axes, ("to lasso", "to truth"), strict=False):
        curves(axis, found["depths"], found[key], "layers", "")
        for number, values in enumerate(published[key].values()):
            axis.plot(published["depths"], values, "o", color=f"C{number}", fillstyle="none")
    axes[0].set_title("distance to the gradient of the exact lasso")
    axes[1].set_title("distance to the gradient at the true codes")
    axes[1].plot([], [], "o", color="gray", fillstyle="none", label="published")
    axes[1].set_ylim(bottom=0.05)
    axes[1].legend()


def dictionaries(options: argparse.Namespace) -> dict[str, Any]:
    """Distance of the dictionary to the true one while each gradient trains it.

    Published with all 10,000 data at each step; here a step sees one batch of them, since a
    gradient through 100 layers of all takes seconds. The published errors are larger. (As
    few data alone would not do: of 500 least squares learns other atoms.)
    """
    problem = planted(
        options.data, 50, 100, 5, seed=options.seed, common_sign=options.signs == "common"
    )
    start = nearby(problem.atoms, 0.1, options.seed)
    runs: dict[str, Any] = {}
    for layers in options.depths:
        for name, make in OBJECTIVES.items():
            model, guide = pair(start, layers)
            follow = Projected(problem.atoms)
            infer.fit(
                model, guide, problem.y, loss=make(), seed=options.seed, callbacks=[follow],
                optimizer=functools.partial(torch.optim.Adam, lr=1e-3), batch_size=options.batch,
                epochs=options.steps * options.batch // options.data, progress=False,
            )  # fmt: skip
            errors = follow.errors
            run = {"last": errors[-1], "least": min(errors), "every 10": errors[::10]}
            runs.setdefault(f"T = {layers}", {})[name] = run
            print(layers, name, round(errors[-1], 4), round(min(errors), 4), flush=True)
    return {
        "start": float((start - problem.atoms).norm()),
        "runs": runs,
        "published last": {
            "T = 25": {"decoder": 2.460, "lasso": 1.712, "least squares": 0.847},
            "T = 50": {"decoder": 1.388, "lasso": 1.302, "least squares": 0.221},
            "T = 100": {"decoder": 1.291, "lasso": 1.289, "least squares": 0.144},
        },
    }


def draw_dictionaries(found: dict[str, Any], axes: list[Axes]) -> None:
    for axis, (depth, runs) in zip(axes, found["runs"].items(), strict=False):
        values = {name: run["every 10"] for name, run in runs.items()}
        steps = range(1, 1 + 10 * len(next(iter(values.values()))), 10)
        curves(axis, steps, values, "step", "distance of the dictionary to the true one")
        for number, value in enumerate(found["published last"].get(depth, {}).values()):
            axis.plot([600], [value], "o", color=f"C{number}", fillstyle="none")
        axis.set_title(f"{depth} (circles: published)")


SHRINKAGES: dict[str, Callable[[], Shrinkage]] = {
    "decaying rate": Proximal,
    "hard threshold": lambda: HardThreshold(0.1),
    "fixed rate": Proximal,
}


def decays(options: argparse.Namespace) -> dict[str, Any]:
    """Relative error of a large dictionary, by the least-squares gradient on minibatches of 50.

    The gradient is taken at the fixed point, ``Implicit``: here, at 100 layers, it differs from
    that through all of them by 2e-5, in a fifth of the time. The fixed rate, which comes to rest
    early, gets half as many steps.
    """
    m, p = options.size
    problem = planted(
        50 * options.steps, m, p, options.active, seed=options.seed,
        common_sign=options.signs == "common",
    )  # fmt: skip
    distance = 0.005 * (1000 / m) ** 0.5  # noise of an equal length in each atom, whatever the size
    start = nearby(problem.atoms, distance, options.seed)
    runs = {}
    for name in options.shrinkages:
        shrinkage = SHRINKAGES[name]()
        model, guide = pair(start, 100, shrinkage=shrinkage)

        def decay(step: int, shrinkage: Shrinkage = shrinkage, name: str = name) -> None:
            if name == "decaying rate":  # 1 at first, then less by 0.005 every 100 steps
                assert isinstance(shrinkage, Proximal)
                shrinkage.decay = 1 - 0.005 * ((step + 1) // 100)

        follow = Projected(problem.atoms, decay)
        y = problem.y[: len(problem.y) // 2] if name == "fixed rate" else problem.y
        began = time.perf_counter()
        infer.fit(
            model, guide, y, loss=least_squares(Implicit(tol=1e-4)), epochs=1,
            optimizer=functools.partial(torch.optim.Adam, lr=1e-3, eps=1e-3), batch_size=50,
            callbacks=[follow], seed=options.seed, progress=False,
        )  # fmt: skip
        errors = (np.array(follow.errors) / float(problem.atoms.norm())).tolist()
        runs[name] = {
            "after half the steps": errors[options.steps // 2 - 1],
            "last": errors[-1],
            "every 10": errors[9::10],
            "seconds": round(time.perf_counter() - began, 1),
        }
        print(name, {key: runs[name][key] for key in ("last", "seconds")}, flush=True)
    return {
        "active": options.active,
        "start": float((start - problem.atoms).norm() / problem.atoms.norm()),
        "runs": runs,
        "published at 500 and 1000 steps": {
            10: {"fixed rate": [8.6e-3, 8.7e-3], "decaying rate": [9.2e-4, 5.2e-6],
                 "hard threshold": [8.2e-4, 2.9e-6], "NOODL": [2.5e-2, 3.9e-3]},
            20: {"fixed rate": [1.4e-2, 1.4e-2], "decaying rate": [5.3e-4, 5.7e-6],
                 "hard threshold": [1.9e-4, 4.8e-7], "NOODL": [5.2e-3, 1.7e-4]},
            40: {"fixed rate": [2.4e-2, 2.6e-2], "decaying rate": [1.3e-3, 4.0e-5],
                 "hard threshold": [5.6e-4, 9.8e-6], "NOODL": [5.7e-4, 2.3e-6]},
        }.get(options.active, {}),
    }  # fmt: skip


def draw_decays(found: dict[str, Any], axes: list[Axes]) -> None:
    published = found["published at 500 and 1000 steps"]
    for number, (name, run) in enumerate(found["runs"].items()):
        steps = range(10, 10 + 10 * len(run["every 10"]), 10)
        axes[0].semilogy(steps, run["every 10"], label=name, color=f"C{number}")
        if name in published:
            axes[0].plot([500, 1000], published[name], "o", color=f"C{number}", fillstyle="none")
    axes[0].set_xlabel("step")
    axes[0].set_title(f"relative error of the dictionary, s = {found['active']}", fontsize=10)
    axes[0].plot([], [], "o", color="gray", fillstyle="none", label="published")
    axes[0].legend()
    axes[0].grid(alpha=0.3)


def curves(axis: Axes, x: Any, values: dict[str, Any], xlabel: str, ylabel: str) -> None:
    for name, line in values.items():
        axis.semilogy(x, line, label=name)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.3)
    axis.legend()


Draw = Callable[[dict[str, Any], list[Axes]], None]
PARTS: dict[str, tuple[Callable[[argparse.Namespace], dict[str, Any]], Draw, int]] = {
    "gradient": (gradients, draw_gradients, 2),
    "dictionary": (dictionaries, draw_dictionaries, 3),
    "support": (pudle_codes.supports, pudle_codes.draw_supports, 3),
    "stability": (pudle_codes.stabilities, pudle_codes.draw_stabilities, 2),
    "decay": (decays, draw_decays, 1),
    "denoise": (pudle_denoise.denoise, pudle_denoise.draw, 4),
}
"""What a part finds, how it is drawn, and in how many axes."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    for name in PARTS:
        part = parts.add_parser(name)
        part.add_argument("--out", type=Path, help="folder of the record and the picture")
        part.add_argument("--label", default="", help="added to the names of the files")
        part.add_argument("--seed", type=int, default=0)
        part.add_argument("--threads", type=int, default=1)
        if name != "denoise":
            part.add_argument("--signs", choices=("common", "independent"), default="common")
        if name in ("gradient", "dictionary"):
            depths = DEPTHS if name == "gradient" else (25, 50, 100)
            part.add_argument("--data", type=int, default=10_000)
            part.add_argument("--depths", type=int, nargs="+", default=depths)
        if name == "dictionary":
            part.add_argument("--batch", type=int, default=250)
        if name in ("dictionary", "decay"):
            part.add_argument("--steps", type=int, default=600 if name == "dictionary" else 1000)
        if name in ("support", "stability"):
            part.add_argument("--data", type=int, default=400 if name == "support" else 300)
        if name == "decay":
            part.add_argument("--active", type=int, default=10)
            part.add_argument("--size", type=int, nargs=2, default=(1000, 1500))
            part.add_argument("--shrinkages", nargs="+", choices=SHRINKAGES, default=[*SHRINKAGES])
        if name == "denoise":
            pudle_denoise.add_arguments(part)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    find, draw, width = PARTS[options.part]
    began = time.perf_counter()
    found = find(options)
    kept = {k: v for k, v in vars(options).items() if k not in ("part", "out", "label", "seed")}
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in kept.items()}
    command = f"python -m benchmarks.pudle {shlex.join(arguments or sys.argv[1:])}"
    content = common.record(command, options.seed, began, settings=settings, **found)
    print(content["seconds"], "seconds")
    if options.out:
        name = f"pudle_{options.part}{options.label}"
        common.write(options.out / f"{name}.json", content)
        figure, axes = plt.subplots(
            1, width, figsize=(5 * width, 4), layout="constrained", squeeze=False
        )
        draw(content, list(axes[0]))
        figure.savefig(options.out / f"{name}.png", dpi=90)
        plt.close(figure)


if __name__ == "__main__":
    main()
