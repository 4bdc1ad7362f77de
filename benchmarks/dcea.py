"""Poisson denoising of photographs by a net unrolled from sparse coding of counts (DCEA).

    python -m benchmarks.dcea train --peak 4 --variant constrained --images FOLDER
    python -m benchmarks.dcea evaluate --weights FILE --images FOLDER --peak 4 --seed 0 --json OUT

A picture whose brightest pixel is expected to give ``peak`` counts is seen through Poisson noise,
and coded by 169 atoms of 11x11 pixels on a grid of stride 7: 15 layers of ISTA on the logarithm of
the rate, with a residual bent by an ELU and a free bias for each atom. ``constrained``: one
dictionary everywhere (20,618 numbers); ``unconstrained``: analysis, synthesis and decoder have one
each (61,516). The denoised picture is the mean over all 49 shifts of the grid, of the predictor.

Training sees two random shifts at a step. Its loss is the error of the mean over all of them as two
tell it (``AcrossShifts``). The pictures are those of ``cbsd432`` but ``12003.jpg``, which holds one
of Set12; the last ones by name are kept for validation, and every setting was chosen there. Short
protocol: some 12 minutes of one core. ``--full``: the published number of crops, 400 epochs of
5,717, in batches, resumable.

Published: Tolooshams, Song, Temereanca & Ba (2020), ICML, PMLR 119:9493-9503, and its code.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import Dataset

from benchmarks import common
from pyro_sparse import infer
from pyro_sparse.dictionaries import Conv
from pyro_sparse.guides import ShiftAveraged, UnrolledFISTA
from pyro_sparse.likelihoods import Poisson, Stabilised
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import ISTA, Bias

ATOMS, SIZE, STRIDE, DEPTH = 169, 11, 7, 15
WHITE = 255
"""Clean pictures are whole gray levels, with the brightest pixel of each at this one."""
CROP, BATCH, STEPS, RATE = 81, 6, 4000, 2e-3
FULL_STEPS = 400 * 5717 // BATCH
BIAS, NORM = 0.01, 0.5
"""Start: bias in code units, and squared norm of the dictionary (published: far smaller)."""
HELD_OUT, LEFT_OUT = 12, ("12003",)
WEIGHTS = Path("benchmarks/weights")

Picture = np.ndarray[Any, Any]


class Crops(Dataset[Tensor]):
    """Random crops in random orientations, each a function of seed and index."""

    def __init__(self, pictures: list[Tensor], count: int, size: int, seed: int) -> None:
        self.pictures = [(whitened(picture) * WHITE).round().byte().numpy() for picture in pictures]
        self.count, self.size, self.seed = count, size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        random = np.random.default_rng([self.seed, int(index)])
        picture = self.pictures[random.integers(len(self.pictures))]
        top, left = (random.integers(n - self.size + 1) for n in picture.shape)
        crop = picture[top : top + self.size, left : left + self.size]
        crop = np.rot90(crop, random.integers(4))
        crop = crop[:, ::-1] if random.integers(2) else crop
        return torch.from_numpy(crop.astype(np.float32))[None]


def whitened(picture: Tensor) -> Tensor:
    """A picture whose brightest pixel is 1."""
    return picture / picture.max()


class AcrossShifts:
    """Error of the mean over all shifts of a grid, without bias from two of them at a step.

    The squared error of a mean of ``n`` reconstructions is the mean of all ``n**2`` products of two
    errors, and two shifts drawn at random give one product of different ones and two squares. The
    squared error of the mean of two would count their spread at half instead of at one ``n``-th.
    Data are whole gray levels.
    """

    def __init__(self, net: ShiftAveraged, peak: float) -> None:
        self.net, self.peak = net, peak

    def __call__(self, model: nn.Module, guide: nn.Module) -> nn.Module:
        return _AcrossShifts(nn.ModuleDict({"model": model, "guide": guide}), self.error)

    def error(self, y: Tensor) -> Tensor:
        """Mean over data and pixels, in units of a clean picture from 0 to 1."""
        clean = y / WHITE
        counts = torch.poisson(self.peak * clean)
        shifts = self.net.shifts
        pair = [shifts[i] for i in torch.randperm(len(shifts))[:2].tolist()]
        one, two = (
            self.net.reconstruct(counts, shifts=[shift]) / self.peak - clean for shift in pair
        )
        same = 1 / len(shifts)
        error = (1 - same) * one * two + same * (one.square() + two.square()) / 2
        return error.mean()


class _AcrossShifts(nn.Module):
    def __init__(self, programs: nn.ModuleDict, error: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.programs = programs  # whose parameters move
        self.error = error

    def forward(self, y: Tensor, num_data: int | None = None, mask: Tensor | None = None) -> Tensor:
        return (num_data or len(y)) * self.error(y)


def net(peak: float, variant: str, atoms: Tensor | None = None) -> ShiftAveraged:
    """The guide with random weights, or with a start of its atoms."""
    atoms = torch.randn(ATOMS, 1, SIZE, SIZE) if atoms is None else atoms
    dictionary = Conv(ATOMS, 1, (SIZE, SIZE), STRIDE, atoms=atoms, unit_norm=False)
    with torch.no_grad():
        dictionary.atoms.mul_((NORM / dictionary.squared_norm()).sqrt())
    make = {"constrained": UnrolledFISTA, "unconstrained": UnrolledFISTA.untied}[variant]
    guide = make(
        dictionary,
        Stabilised(Poisson(), peak),
        dist.Exponential(1.0),
        num_steps=DEPTH,
        method=ISTA(),
        shrinkage=Bias(BIAS, num_atoms=ATOMS),
        step_size=1.0,
    )
    return ShiftAveraged(guide, dictionary, Poisson())


def train(
    net: ShiftAveraged,
    peak: float,
    pictures: list[Tensor],
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    crop: int = CROP,
    rate: float = RATE,
    seed: int = 0,
    checkpoints: infer.Checkpoints | None = None,
    loss: Any = None,
) -> infer.History:
    """Train in place on pictures from 0 to 1."""
    model = SparseCoding(net.dictionary, Poisson(), dist.Exponential(1.0))
    update = infer.Update(
        loss=AcrossShifts(net, peak) if loss is None else loss,
        optimizer=functools.partial(torch.optim.Adam, lr=rate),
        schedule=functools.partial(
            OneCycleLR, max_lr=rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
        ),
        schedule_per_step=True,
    )
    return infer.fit(
        model,
        net,
        Crops(pictures, steps * batch, crop, seed),
        phases=[infer.Phase(1, [update])],
        batch_size=batch,
        seed=seed,
        guard=infer.RollBack(),
        checkpoints=checkpoints,
        progress=False,
    )


def denoise(net: ShiftAveraged, counts: Tensor, brightest: float, peak: float) -> Tensor:
    """Estimate of a clean picture ``(height, width)`` from its counts."""
    with torch.no_grad():
        rates: Tensor = net.reconstruct(counts[None, None])[0, 0]
    return rates * brightest / peak


def draws(clean: Tensor, peak: float, count: int, seed: int) -> list[Tensor]:
    """Counts of a picture from 0 to 1; every picture has draws of its own seed alone."""
    random = torch.Generator().manual_seed(seed)
    return [torch.poisson(peak * whitened(clean), generator=random) for _ in range(count)]


def scores(
    net: ShiftAveraged, clean: Tensor, peak: float, count: int, seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """PSNR in dB, means over draws, of a net and of the counts themselves; and its spread."""
    brightest = float(clean.max())
    found, noisy = [], []
    for counts in draws(clean, peak, count, seed):
        found.append(common.psnr(clean, denoise(net, counts, brightest, peak)))
        noisy.append(common.psnr(clean, counts * brightest / peak))
    mean = {kind: float(np.mean([one[kind] for one in found])) for kind in found[0]}
    spread = float(np.std([one["published"] for one in found], ddof=1)) if count > 1 else None
    return mean, {"noisy_published": noisy_mean(noisy), "spread_of_draws": spread}


def split(folder: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Pictures to train on, and to choose settings by."""
    kept = [p for name, p in common.pictures(folder).items() if name not in LEFT_OUT]
    return kept[:-HELD_OUT], kept[-HELD_OUT:]
