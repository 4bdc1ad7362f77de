"""The implicit gradient of an unrolled encoder beside back-propagation through its layers.

    python -m benchmarks.implicit [--rounds N] [--levels L ...] [--depths T ...] [--json FILE]

A convolutional dictionary of 64 atoms of 7x7, stride 1, and one crop of 128x128 of matplotlib's
photograph with noise of standard deviation 20/255, less what a Gaussian blur keeps of it. The loss
is half the squared error of the reconstruction, its gradient that by the atoms. The prior's level,
in units of the noise's standard deviation, says how many codes are active: 2 denoises best, with
0.7 % of them; 2 % would be more than the crop has pixels, and no fixed point would be isolated.

The implicit gradient's tolerance is 1e-3, which costs 1e-4 of the cosine with the exact solve.

* ``ratio``: forward pass, loss and gradient together, over the forward pass under ``no_grad``: the
  former includes one more layer and the decoder. Seconds are processor time of one thread, medians
  of rounds in which the three take turns; ratios are taken round by round.
* ``held MB``: distinct memory that autograd keeps for the backward pass of the codes.
* ``cosine``: of gradients with respect to the atoms: with back-propagation through the same layers
  (``same_depth``), and with the gradient at codes of 1000 layers with restarts (``converged``),
  which a deep net's comes near, as the tests of the library show to 1e-4.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks import common
from pyro_sparse.dictionaries import Conv
from pyro_sparse.distributions import Law, spread
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.solvers import (
    FISTA,
    BackPropagation,
    Gradient,
    Implicit,
    Proximal,
    Unrolled,
    differentiated,
)
from tutorials.demo.photograph import SIGMA, high_pass, load

ATOMS, SIZE, CROP, CORNER = 64, 7, 128, (100, 200)
DEPTHS = (15, 30, 100)
LEVELS = (2.0, 4.0)
GRADIENTS: dict[str, Gradient] = {"unrolled": BackPropagation(), "implicit": Implicit(tol=1e-3)}


def problem(level: float) -> tuple[Conv, Tensor, Law]:
    """Random atoms of mean zero, noisy data, and the prior."""
    random = np.random.default_rng(0)
    clean = load()
    noisy = high_pass(clean + SIGMA * random.standard_normal(clean.shape))
    top, left = CORNER
    y = torch.from_numpy(noisy[top : top + CROP, left : left + CROP]).float()[None, None]
    atoms = torch.from_numpy(random.standard_normal((ATOMS, 1, SIZE, SIZE))).float()
    dictionary = Conv(ATOMS, 1, (SIZE, SIZE), atoms=atoms - atoms.mean((2, 3), keepdim=True))
    law = spread(dist.Laplace(0.0, SIGMA / level), dictionary.code_shape(y.shape)[1:], y)
    return dictionary, y, law


def encoder(dictionary: Conv, depth: int, *, restart: bool = False) -> Unrolled:
    method = FISTA(restart=restart)
    return Unrolled(
        dictionary, Gaussian(SIGMA), num_steps=depth, method=method, shrinkage=Proximal()
    )


def forward(net: Unrolled, y: Tensor, law: Law) -> Tensor:
    with torch.no_grad():
        return net(y, law)


def by_atoms(net: Unrolled, y: Tensor, law: Law, gradient: Gradient) -> Tensor:
    net.zero_grad()
    with differentiated(gradient):
        codes = net(y, law)
    ((y - net.dictionary(codes)).square().sum() / 2).backward()
    (found,) = (p.grad for p in net.parameters() if p.grad is not None)
    return found.flatten().clone()


def held(net: Unrolled, y: Tensor, law: Law, gradient: Gradient) -> float:
    """MB of distinct storages that are kept for the backward pass of the codes."""
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), differentiated(gradient):
        codes = net(y, law)
    assert codes.requires_grad
    return sum(size for size, _ in kept.values()) / 1e6


def cosine(left: Tensor, right: Tensor) -> float:
    left, right = left.double(), right.double()
    return float(left @ right / (left.norm() * right.norm()))


def compare(depth: int, level: float, rounds: int, converged: Tensor) -> dict[str, Any]:
    dictionary, y, law = problem(level)
    net = encoder(dictionary, depth)
    codes = forward(net, y, law)
    found: dict[str, Tensor] = {}
    times: dict[str, list[float]] = {"forward": [], **{name: [] for name in GRADIENTS}}
    for _ in range(rounds):
        for name, seconds in times.items():
            start = time.process_time()
            if name == "forward":
                forward(net, y, law)
            else:
                found[name] = by_atoms(net, y, law, GRADIENTS[name])
            seconds.append(time.process_time() - start)
    memory = {name: held(net, y, law, gradient) for name, gradient in GRADIENTS.items()}
    row: dict[str, Any] = {
        "active": round((codes != 0).double().mean().item(), 5),
        "forward_seconds": round(statistics.median(times["forward"]), 3),
    }
    for name, gradient in found.items():
        ratios = [a / b for a, b in zip(times[name], times["forward"], strict=True)]
        row[name] = {
            "seconds": round(statistics.median(times[name]), 3),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
            "held MB": round(memory[name], 1),
            "cosine": {
                "same_depth": round(cosine(gradient, found["unrolled"]), 5),
                "converged": round(cosine(gradient, converged), 5),
            },
        }
    row["held_share"] = round(memory["implicit"] / memory["unrolled"], 4)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--levels", type=float, nargs="+", default=LEVELS)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    rows: dict[str, Any] = {}
    for level in options.levels:
        dictionary, y, law = problem(level)
        deep = encoder(dictionary, 1000, restart=True)
        converged = by_atoms(deep, y, law, Implicit(tol=1e-6, max_steps=300))
        for depth in options.depths:
            name = f"level {level:g}, {depth} layers"
            rows[name] = compare(depth, level, options.rounds, converged)
            print(name, rows[name], flush=True)
    if options.json:
        levels, depths = (" ".join(f"{n:g}" for n in v) for v in (options.levels, options.depths))
        command = f"python -m benchmarks.implicit --rounds {options.rounds} --levels {levels}"
        command += f" --depths {depths} --json FILE"
        common.write(options.json, common.record(command, 0, start, settings=rows))


if __name__ == "__main__":
    main()
