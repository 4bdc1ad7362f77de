"""Unrolled FISTA with the library's convolutional map beside torch's transposed convolutions.

    python -m benchmarks.conv_maps [--json FILE]

The same loop (non-negative codes, fixed depth, safe step) takes either map; that both make the same
codes is asserted. Forward without a graph, and forward with the gradient of the reconstruction loss
to the atoms. The two maps take turns; medians are over the rounds, ratios are taken round by round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_sparse.dictionaries import ConvMap, Interior
from pyro_sparse.dictionaries.base import LinearMap
from pyro_sparse.solvers import FISTA


class Setting(NamedTuple):
    atoms: tuple[int, ...]
    stride: int
    batch: int
    length: int
    depth: int


SETTINGS = {
    "1-D, 8 atoms of 45, 300k samples": Setting((8, 1, 45), 1, 1, 300_000, 30),
    "1-D, 8 atoms of 45, 4 channels, 300k samples": Setting((8, 4, 45), 1, 1, 300_000, 30),
    "1-D, 3 atoms of 41, 1.49M samples": Setting((3, 1, 41), 1, 1, 1_490_000, 30),
    "2-D, 64 atoms of 7x7, 128x128": Setting((64, 1, 7, 7), 1, 1, 128, 30),
    "2-D, 64 atoms of 7x7, 3 channels, 128x128": Setting((64, 3, 7, 7), 1, 1, 128, 30),
    "2-D, 169 atoms of 11x11, stride 7, 49 x 137x137": Setting((169, 1, 11, 11), 7, 49, 137, 15),
}


class TransposedConvolution(LinearMap):
    """What unrolled convolutional autoencoders usually do."""

    def __init__(self, atoms: Tensor, stride: tuple[int, ...]) -> None:
        self.atoms, self.stride = atoms, stride
        dims = len(stride)
        self.down = (F.conv1d, F.conv2d)[dims - 1]
        self.up = (F.conv_transpose1d, F.conv_transpose2d)[dims - 1]

    def forward(self, codes: Tensor) -> Tensor:
        return self.up(codes, self.atoms, stride=self.stride)

    def adjoint(self, signal: Tensor) -> Tensor:
        return self.down(signal, self.atoms, stride=self.stride)


def encode(y: Tensor, bound_map: LinearMap, depth: int, step: float, threshold: float) -> Tensor:
    method = FISTA()
    state = method.start()
    codes = y
    for _ in range(depth):
        point = state.point
        if point is None:
            ahead = step * bound_map.adjoint(y)
        else:
            ahead = point + step * bound_map.adjoint(y - bound_map.forward(point))
        codes = (ahead - threshold).relu()
        state = method.advance(state, codes, y.dim() - 1)
    return codes


def data(setting: Setting) -> tuple[Tensor, Tensor, float, float]:
    """Sparse codes through unit-norm atoms with noise; step and threshold that leave few codes."""
    torch.manual_seed(0)
    dims = len(setting.atoms) - 2
    atoms = torch.randn(setting.atoms)
    atoms = atoms / atoms.flatten(1).norm(dim=1).reshape(-1, *[1] * (1 + dims))
    bound_map = ConvMap(atoms, (setting.stride,) * dims, Interior())
    noise = torch.randn(setting.batch, setting.atoms[1], *[setting.length] * dims)
    like = bound_map.adjoint(noise)
    codes = like.relu() * (torch.rand(like.shape) < 0.01)
    y = bound_map.forward(codes) + 0.1 * noise
    step = 1 / bound_map.squared_norm().item()
    return y, atoms, step, 0.1 * step * bound_map.adjoint(y).max().item()


def compare(setting: Setting, rounds: int) -> dict[str, object]:
    y, atoms, step, threshold = data(setting)
    stride = (setting.stride,) * (len(setting.atoms) - 2)
    builders: dict[str, Callable[[Tensor], LinearMap]] = {
        "transposed": lambda atoms: TransposedConvolution(atoms, stride),
        "library": lambda atoms: ConvMap(atoms, stride, Interior()),
    }

    def forward(build: Callable[[Tensor], LinearMap]) -> Tensor:
        with torch.no_grad():
            return encode(y, build(atoms), setting.depth, step, threshold)

    def gradient(build: Callable[[Tensor], LinearMap]) -> Tensor:
        leaf = atoms.clone().requires_grad_()
        bound_map = build(leaf)
        codes = encode(y, bound_map, setting.depth, step, threshold)
        (y - bound_map.forward(codes)).square().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    row: dict[str, object] = {}
    for name, run in (("forward", forward), ("gradient", gradient)):
        times: dict[str, list[float]] = {key: [] for key in builders}
        expected, result = (run(build) for build in builders.values())
        error = ((result - expected).norm() / expected.norm()).item()
        for _ in range(rounds):
            for key, build in builders.items():
                start = time.perf_counter()
                run(build)
                times[key].append(time.perf_counter() - start)
        ratios = [a / b for a, b in zip(times["transposed"], times["library"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        row[name] = {
            **{f"{key} ms": round(1e3 * statistics.median(t), 1) for key, t in times.items()},
            "ratio": round(median, 2),
            "ratio_quartiles": [round(low, 2), round(high, 2)],
            "relative_difference": float(f"{error:.1e}"),
        }
        if name == "forward":
            assert error < 1e-5, error
            row["active"] = round((result > 0).double().mean().item(), 4)
            assert 0 < (result > 0).sum() < result.numel() / 2
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    rows = {}
    for name, setting in SETTINGS.items():
        rows[name] = compare(setting, options.rounds)
        print(name, rows[name], flush=True)
    if options.json:
        record = {
            "command": f"python -m benchmarks.conv_maps --rounds {options.rounds} "
            f"--threads {options.threads}",
            "seed": 0,
            "depth": {name: setting.depth for name, setting in SETTINGS.items()},
            "settings": rows,
            "seconds": round(time.perf_counter() - start, 1),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
