"""A photograph denoised by a dictionary that was learned from the noisy picture alone."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

import matplotlib.cbook
import matplotlib.image
import numpy as np
import pyro.distributions as dist
import torch
from scipy.fft import idct
from scipy.ndimage import gaussian_filter
from torch import Tensor
from tqdm import tqdm

from pyro_sparse import infer
from pyro_sparse.dictionaries import Conv
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import Proximal

SIGMA = 20 / 255
"""Standard deviation of the noise; the one thing about it that is taken as known."""
SIZE, STRIDE, DEPTH = 8, 4, 20
"""Atoms of 8 x 8, one position every 4 pixels, 20 unrolled steps: for both dictionaries."""
LOW_PASS = 3.0
"""Pixels: what a Gaussian of this width keeps is not coded but passed on."""
LEVELS = (1.4, 1.6, 1.8, 2.0, 2.2)
"""Proximal levels of the prior to choose from, in units of the noise's standard deviation."""
CROP, NUM_CROPS, BATCH = 48, 3200, 8


@dataclass
class Result:
    """What the demo shows of the photograph."""

    clean: np.ndarray[Any, Any]
    noisy: np.ndarray[Any, Any]
    denoised_dct: np.ndarray[Any, Any]
    denoised_learned: np.ndarray[Any, Any]
    atoms_dct: np.ndarray[Any, Any]
    atoms_learned: np.ndarray[Any, Any]
    summary: dict[str, Any]


def run(seed: int = 0, progress: bool = True) -> Result:
    """Learn a dictionary from the noisy picture; denoise with it and with a fixed DCT."""
    start = time.perf_counter()
    clean = load()
    random = np.random.default_rng(seed)
    noisy = clean + SIGMA * random.standard_normal(clean.shape)
    torch.manual_seed(seed)

    # The DCT at each level. Its level for the result is the best by the clean picture, which
    # favours it; the level at which a dictionary is learned is the best by the risk estimate.
    dct = Conv(SIZE**2, 1, (SIZE, SIZE), STRIDE, atoms=dct_atoms(SIZE)[:, None])
    fixed = sweep(dct, noisy, seed, "DCT dictionary", progress)
    best = max(fixed, key=lambda level: psnr(fixed[level][0], clean))
    level = min(fixed, key=lambda level: fixed[level][1])

    learned = Conv(SIZE**2, 1, (SIZE, SIZE), STRIDE)
    likelihood, prior = Gaussian(SIGMA), dist.Laplace(0.0, SIGMA / level)
    model = SparseCoding(learned, likelihood, prior)
    guide = UnrolledFISTA(learned, likelihood, prior, num_steps=DEPTH, shrinkage=Proximal())
    crops = random_crops(high_pass(noisy), random)
    for rate in (1e-2, 2e-3):
        adam = functools.partial(torch.optim.Adam, lr=rate)
        half, crops = crops[: NUM_CROPS // 2], crops[NUM_CROPS // 2 :]
        infer.fit(
            model,
            guide,
            half,
            optimizer=adam,
            epochs=1,
            batch_size=BATCH,
            seed=seed,
            progress=progress,
        )
    adapted = sweep(learned, noisy, seed, "learned dictionary", progress)
    chosen = min(adapted, key=lambda level: adapted[level][1])
    denoised, risk = adapted[chosen]

    summary = {
        "psnr_noisy": psnr(noisy, clean),
        "psnr_noisy_unclipped": float(-10 * np.log10(np.mean((noisy - clean) ** 2))),
        "psnr_dct": psnr(fixed[best][0], clean),
        "psnr_learned": psnr(denoised, clean),
        "psnr_learned_by_risk_estimate": float(-10 * np.log10(risk)),
        "dct_level": best,
        "learned_level": chosen,
        "training_level": level,
        "level_rule": "smallest Stein risk estimate (noisy picture and noise sd only); the DCT's "
        "own level is its best by the clean picture",
        "noise_sd": SIGMA,
        "atoms": SIZE**2,
        "kernel": [SIZE, SIZE],
        "stride": STRIDE,
        "unrolled_steps": DEPTH,
        "seconds": time.perf_counter() - start,
    }
    with torch.no_grad():
        usage = guide.encode(torch.from_numpy(high_pass(noisy)).float()[None, None])
    order = usage.abs().sum((0, 2, 3)).argsort(descending=True)
    return Result(
        clean,
        noisy,
        fixed[best][0],
        denoised,
        dct.atoms.detach()[:, 0].numpy(),
        learned.atoms.detach()[order, 0].numpy(),
        summary,
    )


def load() -> np.ndarray[Any, Any]:
    """Luminance of matplotlib's sample photograph, in [0, 1]."""
    path = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    picture = matplotlib.image.imread(path) / 255.0
    return np.asarray(picture @ np.array([0.299, 0.587, 0.114]))


def psnr(picture: np.ndarray[Any, Any], clean: np.ndarray[Any, Any]) -> float:
    """Peak signal-to-noise ratio in dB: data range 1, clipped, whole picture."""
    return float(-10 * np.log10(np.mean((np.clip(picture, 0, 1) - clean) ** 2)))


def high_pass(picture: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return picture - gaussian_filter(picture, LOW_PASS)


def dct_atoms(size: int) -> Tensor:
    """Two-dimensional cosine basis, shape ``(size**2, size, size)``."""
    basis = idct(np.eye(size), norm="ortho", axis=1)
    return torch.from_numpy(np.einsum("ia,jb->ijab", basis, basis)).reshape(-1, size, size).float()


def random_crops(picture: np.ndarray[Any, Any], random: np.random.Generator) -> Tensor:
    """Windows at random places, shape ``(NUM_CROPS, 1, CROP, CROP)``."""
    windows = np.lib.stride_tricks.sliding_window_view(picture, (CROP, CROP))
    rows, columns = (random.integers(0, n, NUM_CROPS) for n in windows.shape[:2])
    return torch.from_numpy(windows[rows, columns][:, None]).float()


def sweep(
    dictionary: Conv, noisy: np.ndarray[Any, Any], seed: int, name: str, progress: bool
) -> dict[float, tuple[np.ndarray[Any, Any], float]]:
    """Denoised picture and estimated risk at each level."""
    probe = np.random.default_rng([seed, 1]).choice([-1.0, 1.0], noisy.shape)
    bar = tqdm(LEVELS, desc=f"denoise, {name}", disable=not progress)
    return {level: risk_estimate(dictionary, noisy, level, probe) for level in bar}


def risk_estimate(
    dictionary: Conv, noisy: np.ndarray[Any, Any], level: float, probe: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], float]:
    """Denoised picture, and Stein's unbiased estimate of its mean squared error.

    The divergence is a finite difference along one random direction; the clean picture has no part
    in it (Ramani, Blu & Unser 2008, IEEE Trans. Image Process. 17(9)).
    """
    step = 0.1 * SIGMA
    denoised = denoise(dictionary, noisy, level)
    moved = denoise(dictionary, noisy + step * probe, level)
    divergence = np.mean(probe * (moved - denoised)) / step
    fit = np.mean((denoised - noisy) ** 2)
    return denoised, float(fit - SIGMA**2 + 2 * SIGMA**2 * divergence)


def denoise(dictionary: Conv, noisy: np.ndarray[Any, Any], level: float) -> np.ndarray[Any, Any]:
    """Low-passed picture plus the reconstruction of the rest, averaged over all shifts."""
    prior = dist.Laplace(0.0, SIGMA / level)
    guide = UnrolledFISTA(dictionary, Gaussian(SIGMA), prior, num_steps=DEPTH, shrinkage=Proximal())
    rest = high_pass(noisy)
    y = torch.from_numpy(rest).float()[None, None]  # (n=1, channels=1, height, width)
    total = torch.zeros_like(y)
    height, width = y.shape[-2:]
    with torch.no_grad():
        for down in range(STRIDE):
            for right in range(STRIDE):
                top, left = SIZE - down, SIZE - right
                bottom = SIZE + (-(height + top)) % STRIDE
                edge = SIZE + (-(width + left)) % STRIDE
                shifted = torch.nn.functional.pad(y, (left, edge, top, bottom), mode="reflect")
                picture = dictionary(guide.encode(shifted))
                total += picture[..., top : top + height, left : left + width]
    return noisy - rest + (total / STRIDE**2)[0, 0].double().numpy()
