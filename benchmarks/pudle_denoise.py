"""Denoising pictures with each gradient of a convolutional dictionary.

A tied net of 15 ISTA layers, 64 atoms of 9 x 9 at stride 4, is trained to bring windows of
photographs with noise of 25 gray levels near the clean ones. The published setting (windows of
129 x 129, step 0.1, rate 0.16) but for its length, 400 epochs of one window a step, and the
learning rate that goes with it: of two the one that is best *for the decoder's gradient* on
photographs kept from training, after a third of the steps. All gradients take it, and start from
the same atoms. The test photographs are met once by each final net; ``--evaluate`` reads the
weights instead of training.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks import common
from benchmarks.pudle_setting import OBJECTIVES
from pyro_sparse import infer
from pyro_sparse.dictionaries import Conv
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import ISTA, Proximal

SIGMA, STEP, LAYERS, WINDOW = 25 / 255, 0.1, 15, 129
HELD_OUT = 24
"""Photographs kept from training, to choose the learning rate by."""
LEARNING_RATES = (1e-3, 3e-3)
PUBLISHED = {"decoder": 25.24, "least squares": 25.67}
"""At rate 0.16 after 400 epochs: all 68 photographs of BSD68, windows drawn anew."""


def programs(atoms: Tensor, rate: float) -> tuple[SparseCoding, UnrolledFISTA]:
    dictionary = Conv(len(atoms), 1, tuple(atoms.shape[2:]), 4, atoms=atoms)
    prior, likelihood = dist.Laplace(0.0, 1 / rate), Gaussian(1.0)
    guide = UnrolledFISTA(
        dictionary, likelihood, prior, num_steps=LAYERS, method=ISTA(), step_size=STEP,
        shrinkage=Proximal(),
    )  # fmt: skip
    return SparseCoding(dictionary, likelihood, prior), guide


def noisy(clean: Tensor) -> Tensor:
    return clean + SIGMA * torch.randn_like(clean)


class SeesNoise(nn.Module):
    """A guide of clean pictures that is shown noisy ones: the model scores what is clean."""

    def __init__(self, guide: UnrolledFISTA) -> None:
        super().__init__()
        self.guide = guide

    def forward(self, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        codes: Tensor = self.guide(noisy(y), *args, **kwargs)
        return codes


class Windows(Dataset[Tensor]):
    """A window of each picture at random, turned over at random; drawn anew at every access."""

    def __init__(self, pictures: list[Tensor]) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        cut = window(self.pictures[index])
        for dim in (-1, -2):
            cut = cut.flip(dim) if torch.rand(()) < 0.5 else cut
        return cut


def window(picture: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Shape ``(1, 129, 129)``."""
    top, left = (
        int(torch.randint(0, size - WINDOW + 1, (), generator=generator)) for size in picture.shape
    )
    return picture[None, top : top + WINDOW, left : left + WINDOW]


def fixed_windows(pictures: list[Tensor], seed: int) -> tuple[Tensor, Tensor]:
    """One window of each picture, and the same with noise; shape ``(n, 1, 129, 129)``."""
    random = torch.Generator().manual_seed(seed)
    clean = torch.stack([window(picture, random) for picture in pictures])
    return clean, clean + SIGMA * torch.randn(clean.shape, generator=random)


def scores(
    model: SparseCoding, guide: UnrolledFISTA, clean: Tensor, given: Tensor
) -> list[dict[str, float]]:
    """PSNR of each window, the estimate clipped to [0, 1] as in the published code."""
    with torch.no_grad():
        estimates = [infer.Reconstruct(model, guide)(part) for part in given.split(8)]
    return [
        common.psnr(one, estimate.clamp(0, 1))
        for one, estimate in zip(clean, torch.cat(estimates), strict=True)
    ]


def mean(values: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(sum(v[key] for v in values) / len(values), 3) for key in values[0]}


class Watch(infer.Callback):
    """PSNR on photographs kept from training, along the way."""

    def __init__(self, score: Callable[[], dict[str, float]], every: int) -> None:
        self.score, self.every = score, every
        self.psnr: dict[int, float] = {}

    def after_epoch(self, progress: infer.Progress) -> None:
        if progress.epoch % self.every == 0:
            self.psnr[progress.step] = self.score()["published"]


def train(
    gradient: str,
    start: Tensor,
    pictures: list[Tensor],
    kept: tuple[Tensor, Tensor],
    options: argparse.Namespace,
    epochs: int,
    learning_rate: float,
) -> tuple[SparseCoding, UnrolledFISTA, dict[str, Any]]:
    model, guide = programs(start, options.rate)
    watch = Watch(lambda: mean(scores(model, guide, *kept)), max(1, epochs // 8))
    began = time.perf_counter()
    infer.fit(
        model, SeesNoise(guide), Windows(pictures), loss=OBJECTIVES[gradient](), epochs=epochs,
        seed=options.seed,
        optimizer=functools.partial(torch.optim.Adam, lr=learning_rate), batch_size=options.batch,
        schedule=functools.partial(
            torch.optim.lr_scheduler.ExponentialLR, gamma=0.1 ** (1 / epochs)
        ),
        callbacks=[watch], progress=False,
    )  # fmt: skip
    seconds = round(time.perf_counter() - began, 1)
    return model, guide, {"psnr held out by step": watch.psnr, "training seconds": seconds}


def denoise(options: argparse.Namespace) -> dict[str, Any]:
    """Train with each gradient, or read what was trained, and test."""
    folder = os.environ.get("PYRO_SPARSE_DATA")
    if not folder:
        raise SystemExit("PYRO_SPARSE_DATA is not set: it names the folder of the data sets")
    photographs = list(common.pictures(Path(folder) / "cbsd432").values())[: options.pictures]
    test = list(common.pictures(Path(folder) / "bsd68").values())[: options.tested]
    order = torch.randperm(len(photographs), generator=torch.Generator().manual_seed(0)).tolist()
    held = [photographs[i] for i in order[:HELD_OUT]]
    pictures = [photographs[i] for i in order[HELD_OUT:]]
    kept = fixed_windows(held, 1)
    torch.manual_seed(options.seed)
    start = torch.randn(64, 1, 9, 9)
    rows: dict[str, Any] = {}
    found: dict[str, list[dict[str, float]]] = {}
    chosen: dict[str, float] = {}
    if not options.evaluate:
        for learning_rate in LEARNING_RATES:
            model, guide, _ = train(
                "decoder", start, pictures, kept, options,
                max(1, options.epochs // 3), learning_rate,
            )  # fmt: skip
            chosen[str(learning_rate)] = mean(scores(model, guide, *kept))["published"]
            print("learning rate", learning_rate, chosen[str(learning_rate)], flush=True)
        best = float(max(chosen, key=chosen.__getitem__))
    for name in OBJECTIVES:
        file = options.weights / f"pudle-denoise-{name.replace(' ', '-')}.safetensors"
        if options.evaluate:
            stored, settings = common.load_weights(file)
            model, guide = programs(stored["atoms"], settings["rate"])
            rows[name] = {}
        else:
            model, guide, rows[name] = train(
                name, start, pictures, kept, options, options.epochs, best
            )
            tensors = {"atoms": model.dictionary.atoms}
            common.save_weights(file, tensors, {"rate": options.rate, "gradient": name})
        found[name] = scores(model, guide, *fixed_windows(test, 2 + options.seed))
        rows[name]["psnr"] = mean(found[name])
        rows[name]["atoms"] = str(file.name)
        print(name, rows[name], flush=True)
    clean, given = fixed_windows(test, 2 + options.seed)
    gain = torch.tensor(
        [a["published"] - b["published"]
         for a, b in zip(found["least squares"], found["decoder"], strict=True)]
    )  # fmt: skip
    noise = [common.psnr(a, b.clamp(0, 1)) for a, b in zip(clean, given, strict=True)]
    return {
        "test windows": len(test),
        "noisy": mean(noise),
        "rows": rows,
        "least squares less decoder": {
            "mean": round(float(gain.mean()), 3),
            "standard error": round(float(gain.std() / len(gain) ** 0.5), 3),
            "windows with a gain": int((gain > 0).sum()),
        },
        "held out by learning rate (decoder)": chosen,
        "published": PUBLISHED,
        "weights": str(options.weights),
    }


def draw(found: dict[str, Any], axes: list[Axes]) -> None:
    """PSNR along the training, and the atoms."""
    for number, (name, row) in enumerate(found["rows"].items()):
        curve = row.get("psnr held out by step", {})
        axes[0].plot([int(step) for step in curve], list(curve.values()), ".-", label=name)
        stored, _ = common.load_weights(Path(found["weights"]) / row["atoms"])
        atoms = stored["atoms"][:, 0] / stored["atoms"].abs().amax((1, 2, 3))[:, None, None]
        tiles = nn.functional.pad(atoms, (1, 1, 1, 1), value=-1.0).reshape(8, 8, 11, 11)
        axis = axes[1 + number]
        axis.imshow(tiles.permute(0, 2, 1, 3).reshape(88, 88).numpy(), cmap="gray", vmin=-1, vmax=1)
        axis.set_title(f"{name}: {row['psnr']['published']:.2f} dB on the test windows")
        axis.set_axis_off()
    axes[0].set_xlabel("step")
    axes[0].set_ylabel("PSNR on photographs kept from training, dB")
    axes[0].grid(alpha=0.3)
    axes[0].legend()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rate", type=float, default=0.16)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pictures", type=int, help="so many photographs alone")
    parser.add_argument("--tested", type=int, help="so many test photographs alone")
    parser.add_argument("--evaluate", action="store_true", help="read the weights, train nothing")
    parser.add_argument("--weights", type=Path, default=Path("benchmarks/weights"))
