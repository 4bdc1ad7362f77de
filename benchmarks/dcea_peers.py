"""What the unrolled Poisson denoiser stands beside: learning on the picture itself, and a CNN.

    python -m benchmarks.dcea_peers alternation --images FOLDER --peak 4 --json OUT [--names ...]
    python -m benchmarks.dcea_peers cnn --images FOLDER --peak 4 --json OUT [--names ...]

``alternation``: a dictionary is learned from the noisy picture alone. MAP codes by a proximal
method that searches for its step (``solvers.solve``), then steps of the likelihood on the atoms,
in turn; in the end MAP codes at 8 shifts of the grid, with the relative gap that they reached. The
level of the prior was chosen on validation pictures. ``cnn``: a residual network of 3x3
convolutions on the logarithm of one plus the counts, trained as long as the unrolled nets on the
same crops.

References: Giryes & Elad (2014), IEEE Trans. Image Process. 23(12), for learning on the picture;
Remez, Litany, Giryes & Bronstein (2018), IEEE Trans. Image Process. 27(6), for networks.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from benchmarks import common, dcea
from pyro_sparse.dictionaries import Conv
from pyro_sparse.guides import ShiftAveraged
from pyro_sparse.likelihoods import Offset, Poisson
from pyro_sparse.solvers import solve

ROUNDS, ATOM_STEPS = 5, 8
COARSE, FINE = 40, 50
"""Steps of the solver between two dictionaries, and at the end."""
SHIFTS = 8
"""Shifts of the grid that are averaged, drawn from the 49: MAP codes are what takes the time."""
LEVEL = 2.0
"""Rate of the Laplace prior at one half-wave an atom, of unit norm, in one over log-rates."""
WIDTH, DEPTH = 24, 5
BATCH = 4


class MapCodes(nn.Module):
    """MAP codes as an encoder; codes that were found before are the start of the next search."""

    def __init__(self, dictionary: Conv, likelihood: Offset, prior: Any, steps: int) -> None:
        super().__init__()
        self.dictionary, self.likelihood, self.prior = dictionary, likelihood, prior
        self.steps = steps

    def encode(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        found = solve(
            y, self.dictionary, self.prior, likelihood=self.likelihood, mask=mask,
            tol=1e-3, max_steps=self.steps,
        )  # fmt: skip
        self.gap = float(found.gap.max())
        return found.codes

    def forward(self, y: Tensor) -> Tensor:
        return self.encode(y)


def alternation(counts: Tensor, peak: float, level: float = LEVEL) -> tuple[Tensor, dict[str, Any]]:
    """Expected counts of a picture ``(height, width)`` by a dictionary that it taught."""
    began = time.process_time()
    half = dcea.ATOMS // 2
    cosines, frequencies = (part[:half] for part in dcea.cosines())
    likelihood = Offset(Poisson(), float(counts.mean().log()))
    dictionary = Conv(half, 1, (dcea.SIZE, dcea.SIZE), dcea.STRIDE, atoms=cosines)
    rate = level * frequencies.clamp(min=0.05)
    prior = dist.Laplace(0.0, (1 / rate).reshape(-1, 1, 1))
    encoder = MapCodes(dictionary, likelihood, prior, COARSE)
    averaged = ShiftAveraged(encoder, dictionary, likelihood)
    adam = torch.optim.Adam(dictionary.parameters(), lr=5e-3)
    for _ in range(ROUNDS):
        shift = averaged.shifts[int(torch.randint(len(averaged.shifts), ()))]
        top, left = shift
        y = counts[None, None, top:, left:]
        y = y[..., : (y.shape[2] - 11) // 7 * 7 + 11, : (y.shape[3] - 11) // 7 * 7 + 11]
        codes = encoder.encode(y)
        for _ in range(ATOM_STEPS):
            adam.zero_grad()
            likelihood.loss(dictionary(codes), y).mean().backward()
            adam.step()
    learned = time.process_time() - began
    encoder.steps = FINE
    with torch.no_grad():
        found: Tensor = averaged.reconstruct(counts[None, None], shifts=SHIFTS)[0, 0]
    return found, {
        "gap": round(encoder.gap, 5),
        "learning_seconds": round(learned, 1),
        "seconds": round(time.process_time() - began, 1),
    }


class Network(nn.Module):
    """Logarithm of the rate of counts ``(n, 1, height, width)``."""

    def __init__(self, peak: float, width: int = WIDTH, depth: int = DEPTH) -> None:
        super().__init__()
        self.offset = math.log(peak * 0.4)
        self.first = nn.Conv2d(1, width, 3, padding=1)
        # Every second layer looks twice as far: the whole sees some 40 pixels.
        spread = [2 ** (i % 4) for i in range(depth)]
        self.inner = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=s, dilation=s) for s in spread
        )
        self.last = nn.Conv2d(width, 1, 3, padding=1)
        nn.init.zeros_(self.last.weight)

    def forward(self, counts: Tensor) -> Tensor:
        hidden = self.first(counts.log1p()).relu()
        for layer in self.inner:
            hidden = hidden + layer(hidden).relu()
        return (self.last(hidden) + self.offset).exp()


def trained(peak: float, pictures: list[Tensor], seconds: float, seed: int) -> Network:
    """A network, trained for so many seconds of a core."""
    torch.manual_seed(seed)
    network = Network(peak)
    adam = torch.optim.Adam(network.parameters(), lr=2e-3)
    crops = dcea.Crops(pictures, 10**9, dcea.CROP, seed)
    began, step = time.process_time(), 0
    while (passed := (time.process_time() - began) / seconds) < 1:
        for group in adam.param_groups:
            group["lr"] = 2e-3 * min(1, step / 50 + 0.02) * (1 + math.cos(math.pi * passed)) / 2
        clean = torch.stack([crops[step * BATCH + i] for i in range(BATCH)]) / dcea.WHITE
        rates = network(torch.poisson(peak * clean))
        adam.zero_grad()
        nn.functional.mse_loss(rates / peak, clean).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adam.step()
        step += 1
    return network


def command(options: argparse.Namespace) -> None:
    began, peak = time.perf_counter(), options.peak
    torch.manual_seed(options.seed)
    found: dict[str, Any] = {}
    about: dict[str, Any] = {}
    if options.method == "cnn":
        data = Path(os.environ["PYRO_SPARSE_DATA"]) / "cbsd432"
        network = trained(peak, dcea.split(data)[0], options.seconds, options.seed)
        about["parameters"] = sum(p.numel() for p in network.parameters())
        about["training_core_seconds"] = options.seconds
    else:
        about["level"] = options.level
    pictures = common.pictures(options.images)
    names = options.names or list(pictures)
    for name in names:
        clean = pictures[name]
        ratios, each = [], {}
        for counts in dcea.draws(clean, peak, options.draws, options.seed):
            start = time.process_time()
            if options.method == "cnn":
                with torch.no_grad():
                    rates = network(counts[None, None])[0, 0]
                each = {"seconds": round(time.process_time() - start, 2)}
            else:
                rates, each = alternation(counts, peak, options.level)
            ratios.append(common.psnr(clean, rates * clean.max() / peak))
        found[name] = {k: round(float(np.mean([r[k] for r in ratios])), 3) for k in ratios[0]}
        found[name] |= each
        print(name, found[name], flush=True)
    mean = {k: round(float(np.mean([f[k] for f in found.values()])), 3) for k in ratios[0]}
    line = (
        f"python -m benchmarks.dcea_peers {options.method} --images FOLDER --peak {peak:g} "
        f"--names {' '.join(names)} --seed {options.seed} --draws {options.draws}"
    )
    common.write(
        options.json,
        common.record(
            line, options.seed, began, peak=peak, draws=options.draws, psnr_mean=mean, psnr=found,
            **about,
        ),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("method", choices=["alternation", "cnn"])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--peak", type=float, required=True, help="counts at the brightest")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--names", nargs="+", help="some of the pictures, without suffix")
    parser.add_argument("--draws", type=int, default=1, help="draws of noise for each picture")
    parser.add_argument("--level", type=float, default=LEVEL, help="of the prior (alternation)")
    parser.add_argument("--seconds", type=float, default=300, help="of training, a core's (cnn)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    command(options)


if __name__ == "__main__":
    main()
