"""Pictures for `benchmarks.vsc`: whitened patches of photographs, garments, and Gabor functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor

from benchmarks import common

Array = np.ndarray[Any, Any]

SIDE = 16
MARGIN = 8
"""Pixels at the border of a picture that no patch reaches: the filter wraps around there."""
CUTOFF = 0.39
"""Cycles per pixel: 200 cycles per picture of 512 pixels."""


def whiten(picture: Tensor) -> Tensor:
    r"""A picture ``(height, width)`` less its mean, filtered by :math:`|f| e^{-(f / f_0)^4}`.

    Olshausen & Field (1996), Nature 381; :math:`f_0` is ``CUTOFF``. Not scaled.
    """
    height, width = picture.shape
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
    gain = frequency * torch.exp(-((frequency / CUTOFF) ** 4))
    return torch.fft.irfft2(torch.fft.rfft2(picture - picture.mean()) * gain, s=(height, width))


def cut(pictures: list[Tensor], count: int, seed: int) -> Tensor:
    """``count`` patches of each picture at random places, ``(pictures * count, SIDE**2)``."""
    random = np.random.default_rng(seed)
    found = []
    for picture in pictures:
        ends = [n - SIDE - MARGIN + 1 for n in picture.shape]
        if min(ends) <= MARGIN:
            raise ValueError(
                f"Expected pictures of at least {SIDE + 2 * MARGIN} pixels a side, got "
                f"{tuple(picture.shape)}."
            )
        rows, columns = (random.integers(MARGIN, end, count) for end in ends)
        windows = picture.unfold(0, SIDE, 1).unfold(1, SIDE, 1)
        found.append(windows[rows, columns].flatten(1))
    return torch.cat(found)


def split(folder: Path, part: str, count: int, seed: int) -> Tensor:
    """Whitened patches of ``cbsd432``, not scaled; the parts share no photograph.

    Of every ten photographs, by name, the ninth is for validation and the tenth for the test.
    """
    files = sorted((folder / "cbsd432").glob("*.jpg"))
    if not files:
        raise FileNotFoundError(f"Expected cbsd432/*.jpg in {folder}, got none.")
    place = {"train": range(8), "validation": (8,), "test": (9,)}[part]
    chosen = [file for index, file in enumerate(files) if index % 10 in place]
    return cut([whiten(common.picture(file)) for file in chosen], count, seed)


def garments(folder: Path, part: str) -> Tensor:
    """Fashion-MNIST, ``(n, 784)``, from 0 to 1: 55,000 to train, 5,000 validation, 8,000 test."""
    file, rows = _garments(folder, part)
    return images_of(file)[rows].flatten(1)


def labels_of_garments(folder: Path, part: str) -> Tensor:
    """Their classes, ``(n,)``."""
    file, rows = _garments(folder, part)
    return torch.from_numpy(np.load(file)["labels"].astype(np.int64))[rows]


def _garments(folder: Path, part: str) -> tuple[Path, slice]:
    file = folder / "fashion_mnist" / f"fashion_{'test' if part == 'test' else 'train'}.npz"
    ends = {"train": (0, 55_000), "validation": (55_000, 60_000), "test": (0, None)}[part]
    return file, slice(*ends)


def images_of(file: Path) -> Tensor:
    """Array ``images`` of a .npz file, ``(n, height, width)``, as numbers from 0 to 1."""
    stored = np.load(file)
    if "images" not in stored or stored["images"].ndim != 3:
        raise ValueError(f"Expected an array 'images' of shape (n, height, width) in {file}.")
    images = torch.from_numpy(stored["images"].astype(np.float32))
    return images / 255 if stored["images"].dtype == np.uint8 else images


def gabor_fit(atom: Array) -> tuple[Array, float]:
    """The Gabor function nearest to an atom ``(side, side)``, and the part R2 of energy it takes.

    Centre, two widths, and two frequencies by least squares, from the peak of the spectrum and
    two widths; amplitudes of sine and cosine in closed form at every step.
    """
    side = len(atom)
    rows, columns = np.mgrid[:side, :side].astype(float)
    target = atom / np.linalg.norm(atom)

    def waves(p: Array) -> Array:
        top, left, log_a, log_b, down, right = p
        angle = np.arctan2(down, right)
        u, v = columns - left, rows - top
        along = u * np.cos(angle) + v * np.sin(angle)
        across = -u * np.sin(angle) + v * np.cos(angle)
        envelope = np.exp(-((along / np.exp(log_a)) ** 2 + (across / np.exp(log_b)) ** 2) / 2)
        phase = 2 * np.pi * (right * u + down * v)
        pair = np.stack([(envelope * np.cos(phase)).ravel(), (envelope * np.sin(phase)).ravel()], 1)
        return pair

    def fitted(p: Array) -> Array:
        pair = waves(p)
        # The ridge is for one of the two waves vanishing on the grid.
        gram = pair.T @ pair + 1e-9 * np.eye(2)
        product: Array = pair @ np.linalg.solve(gram, pair.T @ target.ravel())
        return product

    padded = np.abs(np.fft.fft2(target, (4 * side, 4 * side)))
    row, column = np.unravel_index(np.argmax(padded), padded.shape)
    frequency = np.fft.fftfreq(4 * side)
    energy = target**2
    centre = [(energy * grid).sum() for grid in (rows, columns)]
    # Narrower than a pixel, wider than the patch or faster than the grid is no Gabor function.
    low = [-2.0, -2.0, np.log(0.5), np.log(0.5), -0.5, -0.5]
    high = [side + 1.0, side + 1.0, np.log(side), np.log(side), 0.5, 0.5]
    best = None
    for width in (1.5, 4.0):
        start = [*centre, np.log(width), np.log(width), frequency[row], frequency[column]]
        start = np.clip(start, np.add(low, 1e-6), np.subtract(high, 1e-6))
        found = least_squares(
            lambda p: fitted(p) - target.ravel(), start, bounds=(low, high), max_nfev=40
        )
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    return fitted(best.x).reshape(side, side), float(1 - 2 * best.cost)
