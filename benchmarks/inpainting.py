"""A photograph with missing pixels, filled in by a dictionary learned from what is left of it.

    python -m benchmarks.inpainting [--out FOLDER]

Half of the pixels, four fifths, or those under lines of a text and scratches are taken away. A
dictionary is learned from the incomplete picture alone, by ``infer.fit(mask=)``, and the picture
filled in by the mean of its reconstructions at all shifts. Beside it: the same with a fixed cosine
dictionary, linear interpolation between the observed pixels (Delaunay), and a local mean. What is
coded is the picture less a smoothed linear interpolation; its width, the level of the prior and the
width of the local mean are chosen by a tenth of the *observed* pixels, held out: scattered ones,
also where whole strokes are missing. Missing pixels enter the PSNR alone, which is of them alone.
"""

from __future__ import annotations

import argparse
import functools
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
from scipy.interpolate import griddata
from scipy.ndimage import gaussian_filter
from torch import Tensor

from benchmarks import common
from pyro_sparse import infer
from pyro_sparse.dictionaries import Conv
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import Proximal
from tutorials.demo.photograph import dct_atoms, load

Picture = np.ndarray[Any, Any]

SIZE, STRIDE, DEPTH = 8, 4, 30
NOISE = 0.02
"""Standard deviation allowed between observed pixels and reconstruction."""
LEVELS = (0.06, 0.25, 1.0)
"""Proximal levels to choose from, in units of the noise."""
WIDTHS = (0.7, 1.0, 1.5, 2.0, 3.0)
"""Widths of the local mean to choose from, in pixels."""
TRAINING_LEVEL = 0.25
BASE_WIDTHS = (1.0, 3.0)
"""Widths to choose from, in pixels: what a Gaussian of it keeps of the linear interpolation is not
coded."""
WIDE = 12.0
"""Width of the local mean where the chosen one meets no observed pixel."""
CROP, BATCH = 48, 8


def masks(shape: tuple[int, int], random: np.random.Generator) -> dict[str, Picture]:
    """True where a pixel was observed."""
    return {
        "50 % missing": random.random(shape) >= 0.5,
        "80 % missing": random.random(shape) >= 0.8,
        "text and scratches": ~overlay(shape, random),
    }


def overlay(shape: tuple[int, int], random: np.random.Generator) -> Picture:
    """Lines of a text and thin scratches, drawn by matplotlib."""
    height, width = shape
    figure = plt.figure(figsize=(width / 100, height / 100), dpi=100)
    for row in range(14):
        text = "sparse codes of what was observed alone "
        figure.text(-0.02 * (row % 3), 0.04 + row / 14, text, fontsize=15, weight="bold")
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, 1), ylim=(0, 1), frameon=False)
    for _ in range(12):
        axis.plot(random.random(2), random.random(2), color="black", linewidth=1.5)
    axis.set_axis_off()
    figure.canvas.draw()
    drawn: Picture = np.asarray(figure.canvas.buffer_rgba())[..., 0] < 200  # type: ignore[attr-defined]
    plt.close(figure)
    return drawn


def local_mean(picture: Picture, seen: Picture, width: float) -> Picture:
    """Mean of the observed pixels with Gaussian weights."""
    known = np.where(seen, picture, 0.0)
    weight = gaussian_filter(seen.astype(float), width)
    far = gaussian_filter(seen.astype(float), WIDE)
    share = 1e-3  # of the wide mean: matters where the narrow one meets (almost) no pixel
    total = gaussian_filter(known, width) + share * gaussian_filter(known, WIDE)
    filled: Picture = total / (weight + share * far)
    return filled


def interpolated(picture: Picture, seen: Picture) -> Picture:
    """Linear on the triangles of the observed pixels, nearest outside of them."""
    known, missing = np.argwhere(seen), np.argwhere(~seen)
    filled = picture.copy()
    values = griddata(known, picture[seen], missing, method="linear")
    nearest = griddata(known, picture[seen], missing, method="nearest")
    filled[~seen] = np.where(np.isnan(values), nearest, values)
    return filled


def guide_of(dictionary: Conv, level: float) -> UnrolledFISTA:
    prior = dist.Laplace(0.0, NOISE / level)
    return UnrolledFISTA(dictionary, Gaussian(NOISE), prior, num_steps=DEPTH, shrinkage=Proximal())


def fill(
    dictionary: Conv,
    picture: Picture,
    seen: Picture,
    base: Picture,
    level: float,
    shifts: int = STRIDE,
) -> Picture:
    """The base plus the reconstruction of the rest, averaged over shifts."""
    y = torch.from_numpy(np.where(seen, picture - base, 0.0)).float()[None, None]
    observed = torch.from_numpy(seen)[None, None]
    guide, total = guide_of(dictionary, level), torch.zeros_like(y)
    height, width = y.shape[-2:]
    with torch.no_grad():
        for down in range(shifts):
            for right in range(shifts):
                top, left = SIZE - down, SIZE - right
                edges = (left, SIZE + -(width + left) % STRIDE)
                edges += (top, SIZE + -(height + top) % STRIDE)
                # Outside of the picture nothing was observed either.
                codes = guide.encode(
                    torch.nn.functional.pad(y, edges), torch.nn.functional.pad(observed, edges)
                )
                total += dictionary(codes)[..., top : top + height, left : left + width]
    return base + (total / shifts**2)[0, 0].double().numpy()


def learn(picture: Picture, seen: Picture, base: Picture, crops: int, seed: int) -> Conv:
    """A dictionary of the observed pixels."""
    random = np.random.default_rng([seed, 1])
    torch.manual_seed(seed)
    dictionary = Conv(SIZE**2, 1, (SIZE, SIZE), STRIDE)
    guide = guide_of(dictionary, TRAINING_LEVEL)
    model = SparseCoding(dictionary, Gaussian(NOISE), guide.encoder_prior)
    rows, columns = (random.integers(0, n - CROP + 1, crops) for n in picture.shape)

    def cut(values: Picture) -> Tensor:
        windows = np.lib.stride_tricks.sliding_window_view(values, (CROP, CROP))
        return torch.from_numpy(windows[rows, columns][:, None].copy())

    # What is missing is nan: nothing of it can have a part.
    y, mask = cut(np.where(seen, picture - base, np.nan)).float(), cut(seen)
    for part, rate in ((slice(0, crops // 2), 1e-2), (slice(crops // 2, None), 2e-3)):
        adam = functools.partial(torch.optim.Adam, lr=rate)
        infer.fit(
            model, guide, y[part], mask=mask[part], optimizer=adam, epochs=1, batch_size=BATCH,
            seed=seed, progress=False,
        )  # fmt: skip
    return dictionary


def psnr(filled: Picture, truth: Picture, where: Picture) -> float:
    """In dB, data range 1, clipped, of some of the pixels."""
    return float(-10 * np.log10(np.mean((np.clip(filled, 0, 1) - truth)[where] ** 2)))


def best(options: tuple[float, ...], score: Callable[[float], float]) -> float:
    return max(options, key=score)


def one(
    truth: Picture, seen: Picture, crops: int, seed: int
) -> tuple[dict[str, Picture], dict[str, Any]]:
    """Fill in one mask by every method."""
    picture = np.where(seen, truth, 0.5)  # no method sees more
    held = seen & (np.random.default_rng([seed, 2]).random(seen.shape) < 0.1)
    part = seen & ~held

    width = best(WIDTHS, lambda width: psnr(local_mean(picture, part, width), picture, held))
    cosines = Conv(SIZE**2, 1, (SIZE, SIZE), STRIDE, atoms=dct_atoms(SIZE)[:, None])
    scores: dict[str, dict[tuple[float, float], float]] = {"cosine": {}, "learned": {}}
    linear = interpolated(picture, part)
    for smooth in BASE_WIDTHS:
        base = gaussian_filter(linear, smooth)
        # A dictionary that has not seen the pixels held out.
        trial = learn(picture, part, base, crops // 4, seed)
        for name, dictionary in (("cosine", cosines), ("learned", trial)):
            for level in LEVELS:
                value = psnr(fill(dictionary, picture, part, base, level, 1), picture, held)
                scores[name][smooth, level] = value
    chosen = {name: max(found, key=found.__getitem__) for name, found in scores.items()}
    linear = interpolated(picture, seen)
    bases = {name: gaussian_filter(linear, smooth) for name, (smooth, _) in chosen.items()}
    began = time.perf_counter()
    learned = learn(picture, seen, bases["learned"], crops, seed)
    seconds = time.perf_counter() - began
    filled = {
        "local mean": local_mean(picture, seen, width),
        "linear": linear,
        "cosine": fill(cosines, picture, seen, bases["cosine"], chosen["cosine"][1]),
        "learned": fill(learned, picture, seen, bases["learned"], chosen["learned"][1]),
    }
    row = {
        "missing": round(float((~seen).mean()), 4),
        "psnr_missing": {n: round(psnr(p, truth, ~seen), 2) for n, p in filled.items()},
        "chosen_on_held_out": {
            "local_mean_width": width,
            **{name: {"base_width": w, "level": level} for name, (w, level) in chosen.items()},
        },
        "psnr_held_out": {name: round(max(found.values()), 2) for name, found in scores.items()},
        "learning_seconds": round(seconds, 1),
    }
    return filled, row


def draw(truth: Picture, found: dict[str, tuple[Picture, dict[str, Picture]]], file: Path) -> None:
    """A detail of each mask and method."""
    window = np.s_[150:310, 130:310]
    figure, axes = plt.subplots(len(found), 6, figsize=(13, 6.4), layout="constrained")
    for line, (name, (seen, filled)) in zip(axes, found.items(), strict=True):
        shown = {"observed": np.where(seen, truth, 1.0), **filled, "original": truth}
        for axis, (title, picture) in zip(line, shown.items(), strict=True):
            axis.imshow(np.clip(picture[window], 0, 1), cmap="gray", vmin=0, vmax=1)
            value = f"\n{psnr(picture, truth, ~seen):.2f} dB" if title in filled else f"\n{name}"
            axis.set_title(title + (value if title != "original" else "\n"), fontsize=9)
            axis.set_axis_off()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of inpainting.json and inpainting.png")
    parser.add_argument("--crops", type=int, default=1200, help="windows to learn from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    truth = load()
    random = np.random.default_rng(options.seed)
    found, rows = {}, {}
    for name, seen in masks((truth.shape[0], truth.shape[1]), random).items():
        filled, rows[name] = one(truth, seen, options.crops, options.seed)
        found[name] = seen, filled
        print(f"{name:20s}", rows[name]["psnr_missing"], rows[name]["chosen_on_held_out"])
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        draw(truth, found, options.out / "inpainting.png")
        command = (
            f"python -m benchmarks.inpainting --crops {options.crops} --seed {options.seed} "
            f"--threads {options.threads}"
        )
        content = common.record(command, options.seed, began, rows=rows)
        common.write(options.out / "inpainting.json", content)


if __name__ == "__main__":
    main()
