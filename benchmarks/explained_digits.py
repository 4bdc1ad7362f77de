"""Which training digits explain a test digit, by the codes of a small dictionary.

    PYRO_SPARSE_DATA=FOLDER python -m benchmarks.explained_digits [--json FILE] [--out FOLDER]

A non-negative dictionary is learned on MNIST training digits; every test digit is reconstructed as
a weighted sum of them (``diagnostics.Representer``), and the table says how many of the ten with
the largest weights are of the test digit's class. Beside it chance, the ten with the most similar
codes, and the ten nearest images by cosine: labels have no part in any of them. Settings are those
published, or fixed beforehand; nothing was chosen by the test digits. With ``--out``, a picture
(of MNIST: not for committing).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks import common
from pyro_sparse import infer
from pyro_sparse.diagnostics import Representer, plot_representer
from pyro_sparse.dictionaries import Dense
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import Proximal

RATE = 0.7
"""Of the exponential prior at noise 1, as published: digits have a norm of about 9."""
DEPTH, DEPTH_AFTER = 15, 200
"""Layers in training, and for the codes that are explained, which are to be at their minimum."""
TOP = 10


def digits(folder: Path, part: str, count: int) -> tuple[Tensor, Tensor]:
    """Images in [0, 1], shape ``(count, 784)``, and classes."""
    stored = np.load(folder / "mnist" / f"mnist_{part}.npz")
    images = torch.from_numpy(stored["images"][:count]).flatten(1).float() / 255
    return images, torch.from_numpy(stored["labels"][:count].astype(np.int64))


def train(
    y: Tensor, atoms: int, epochs: int, seed: int
) -> tuple[Dense, Gaussian, dist.Exponential, list[float]]:
    """A dictionary that starts from training digits drawn at random."""
    torch.manual_seed(seed)
    start = y[torch.randperm(len(y))[:atoms]] + 0.01 * torch.randn(atoms, y.shape[1])
    dictionary, likelihood = Dense(atoms, y.shape[1], atoms=start), Gaussian(1.0)
    prior = dist.Exponential(RATE)
    model = SparseCoding(dictionary, likelihood, prior)
    guide = UnrolledFISTA(dictionary, likelihood, prior, num_steps=DEPTH, shrinkage=Proximal())
    adam = functools.partial(torch.optim.Adam, lr=3e-3)
    history = infer.fit(
        model, guide, y, optimizer=adam, epochs=epochs, batch_size=100, seed=seed, progress=False,
        schedule=functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.7),
    )  # fmt: skip
    return dictionary, likelihood, prior, history.epoch_loss


def share(index: Tensor, classes: Tensor, truth: Tensor) -> float:
    """Part of the training digits at ``index`` (m, count) that are of the datum's class."""
    return round(float((classes[index] == truth[:, None]).float().mean()), 4)


def explain(
    found: Representer, codes: Tensor, images: Tensor, y: Tensor, classes: Tensor, truth: Tensor
) -> dict[str, Any]:
    """Shares of the class among the first ten, by each measure."""
    top = found.top(codes, TOP)
    positive = found.weights(codes).topk(TOP).indices
    cosine = torch.nn.functional.normalize(y) @ torch.nn.functional.normalize(images).T
    counts = torch.bincount(classes, minlength=10).float() / len(classes)
    energy = (y - found.reconstruct(codes)).square().sum() / y.square().sum()
    return {
        "share_of_class_in_top_10": {
            "largest weights in magnitude": share(top.rows, classes, truth),
            "largest positive weights": share(positive, classes, truth),
            "most similar codes": share(found.similarity(codes).topk(TOP).indices, classes, truth),
            "nearest images (cosine)": share(cosine.topk(TOP).indices, classes, truth),
            "chance": round(float(counts[truth].mean()), 4),
        },
        "negative_among_top_10": round(float((top.weight < 0).float().mean()), 4),
        "energy_left_by_the_explanation": round(float(energy), 4),
    }


def stationarity(found: Representer, dictionary: Dense) -> dict[str, float]:
    away = found.stationarity(dictionary)
    return {
        "distance": round(away.distance, 4),
        "median_cosine": round(float(away.cosine.nanmedian()), 4),
        "gradient": round(away.gradient, 4),
        "reconstruction": round(away.reconstruction, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--atoms", type=int, default=300)
    parser.add_argument("--digits", type=int, default=5000)
    parser.add_argument("--tested", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path, help="folder of a picture, outside of version control")
    options = parser.parse_args()
    folder = os.environ.get("PYRO_SPARSE_DATA")
    if not folder:
        parser.error("PYRO_SPARSE_DATA is not set: it names the folder of the data sets")
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    images, classes = digits(Path(folder), "train", options.digits)
    y, truth = digits(Path(folder), "test", options.tested)
    dictionary, likelihood, prior, losses = train(
        images, options.atoms, options.epochs, options.seed
    )
    trained = time.perf_counter() - began
    deep = UnrolledFISTA(dictionary, likelihood, prior, num_steps=DEPTH_AFTER, shrinkage=Proximal())
    with torch.no_grad():
        codes, new = deep.encode(images), deep.encode(y)
    rows = {}
    forms = {
        "ridge 1e-3": Representer(images, codes, 1e-3),
        "multipliers of the unit norm": Representer.of_unit_norm(images, codes, dictionary),
    }
    for name, found in forms.items():
        rows[name] = {
            "stationarity": stationarity(found, dictionary),
            **explain(found, new, images, y, classes, truth),
        }
        print(name, json.dumps(rows[name], indent=2))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        first = [int((truth == digit).nonzero()[0]) for digit in range(10)]
        axes = plot_representer(
            forms["multipliers of the unit norm"], new[first], y=y[first], count=8,
            image_shape=(28, 28), names=classes.tolist(),
        )  # fmt: skip
        axes[0, 0].figure.savefig(options.out / "explained_digits.png", dpi=90)
    if options.json:
        command = (
            f"python -m benchmarks.explained_digits --atoms {options.atoms} --digits "
            f"{options.digits} --tested {options.tested} --epochs {options.epochs} --seed "
            f"{options.seed} --threads {options.threads}"
        )
        content = common.record(
            command,
            options.seed,
            began,
            loss_by_epoch=[round(loss, 3) for loss in losses],
            active_codes=round(float((codes > 0).float().sum(1).mean()), 1),
            rows=rows,
            training_seconds=round(trained, 1),
        )
        common.write(options.json, content)


if __name__ == "__main__":
    main()
