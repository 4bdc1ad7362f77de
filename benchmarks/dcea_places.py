"""Sparse codes of hippocampal populations: how well some neurons tell what the others do.

    python -m benchmarks.dcea_places --data FOLDER/placecells/animal1.npz [--out FOLDER]

Counts of all neurons of a rat in thirds of a second are Poisson; their log-rates are a baseline of
each neuron plus non-negative codes times atoms of the population. An unrolled encoder and its
atoms are learned on the first 70 % of the recording, with a random fifth of the neurons hidden at
every step and predicted (``Supervised`` with a mask). The rate of the prior is chosen on the next
10 %; the last 20 % are tested once: codes come from four fifths of the neurons, and what they
expect of the others is scored in bits per spike above a constant rate. Beside it: Poisson
regression of each neuron on those that it may see, and the map of its rate over the place of the
rat, which the others do not get to know.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pyro.distributions as dist
import torch
from matplotlib import pyplot as plt
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import PoissonRegressor
from torch import Tensor

from benchmarks import common
from pyro_sparse import infer
from pyro_sparse.dictionaries import Dense
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.likelihoods import Offset, Poisson, Stabilised
from pyro_sparse.models import SparseCoding

Array = np.ndarray[Any, Any]

FRAMES, ATOMS, DEPTH, EPOCHS, FOLDS = 10, 40, 10, 20, 5
RATES = (0.2, 0.5)
"""Of the exponential prior, to choose from, in one over log-rates of an atom of unit norm."""
STEP = 0.1
"""Of a layer: the safe one is that of the neuron with the most spikes, hundreds of times less."""
GRID, BLUR = 24, 1.5
"""Squares of the arena along a side, and width of the blur of maps, in squares."""


def windows(file: Path) -> tuple[Tensor, Array]:
    """Counts ``(windows, neurons)`` and mean places ``(windows, 2)`` in -1 ... 1."""
    stored = np.load(file)
    end = stored["counts"].shape[1] // FRAMES * FRAMES
    counts = stored["counts"][:, :end].astype(np.float32)
    counts = counts.reshape(len(counts), -1, FRAMES).sum(-1).T
    place = np.stack([stored[axis][:end].reshape(-1, FRAMES).mean(1) for axis in "xy"], 1)
    return torch.from_numpy(counts.copy()), place


def learn(y: Tensor, rate: float, seed: int) -> UnrolledFISTA:
    """Atoms of a population, baselines of its neurons and thresholds, in the guide."""
    torch.manual_seed(seed)
    dictionary = Dense(ATOMS, y.shape[1])
    likelihood = Offset(Poisson(), (y.mean(0) + 1e-3).log(), trainable=True)
    prior = dist.Exponential(rate)
    guide = UnrolledFISTA(
        dictionary, Stabilised(likelihood, 2.0), prior, num_steps=DEPTH,
        step_size=STEP,
    )  # fmt: skip
    infer.fit(
        SparseCoding(dictionary, likelihood, prior),
        guide,
        y,
        loss=infer.Supervised(
            lambda expected, seen: (expected - torch.xlogy(seen, expected)).mean(),
            corrupt=lambda seen: (seen, torch.rand_like(seen) > 1 / FOLDS),
        ),
        optimizer=functools.partial(torch.optim.Adam, lr=1e-2),
        schedule=functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=EPOCHS),
        epochs=EPOCHS,
        batch_size=64,
        seed=seed,
        progress=False,
    )
    return guide


def left_out(neurons: int) -> list[Tensor]:
    """Neurons that are not seen, a mask for each fold."""
    number = torch.arange(neurons)
    return [number % FOLDS == fold for fold in range(FOLDS)]


def told_by_others(guide: UnrolledFISTA, y: Tensor) -> Tensor:
    """Expected counts of every neuron by codes of those of the other folds, shape of ``y``."""
    encoder = guide.encoder
    expected = torch.empty_like(y)
    with torch.no_grad():
        for hidden in left_out(y.shape[1]):
            codes = guide.encode(y, ~hidden.expand_as(y))
            expected[:, hidden] = encoder.likelihood.mean(encoder.dictionary(codes))[:, hidden]
    return expected


def regressed(train: Array, test: Array) -> Array:
    """Expected counts of every neuron by Poisson regression on those of the other folds."""
    expected = np.empty_like(test)
    for hidden in (mask.numpy() for mask in left_out(train.shape[1])):
        for neuron in np.flatnonzero(hidden):
            model = PoissonRegressor(alpha=1e-2, max_iter=200)
            model.fit(np.sqrt(train[:, ~hidden]), train[:, neuron])
            expected[:, neuron] = model.predict(np.sqrt(test[:, ~hidden]))
    return expected


def cells(place: Array) -> Array:
    return ((place + 1) / 2 * GRID).astype(int).clip(0, GRID - 1)


def maps(values: Array, place: Array) -> Array:
    """Mean of ``values (windows, n)`` by place, blurred, ``(n, GRID, GRID)``."""
    where = cells(place)
    sums = np.zeros((values.shape[1], GRID, GRID))
    times = np.zeros((GRID, GRID))
    np.add.at(times, (where[:, 0], where[:, 1]), 1)
    np.add.at(sums, (slice(None), where[:, 0], where[:, 1]), values.T)
    blurred = gaussian_filter(times, BLUR)
    found: Array = np.stack([gaussian_filter(s, BLUR) for s in sums]) / (blurred + 1e-3)
    return found


def bits(y: Array, expected: Array, constant: Array) -> float:
    """Bits per spike above a constant rate of each neuron."""
    expected = np.maximum(expected, 1e-3)
    gain = y * np.log2(expected / constant) - (expected - constant) / np.log(2)
    return round(float(gain.sum() / y.sum()), 4)


def draw(shown: Array, scores: dict[str, float], file: Path) -> None:
    figure, axes = plt.subplots(2, 6, figsize=(12, 4.2), layout="constrained")
    for axis, picture in zip(axes.flat, shown):
        axis.imshow(picture, cmap="magma")
        axis.set_axis_off()
    figure.suptitle(
        "mean codes by place, of the twelve atoms that say most about it; bits per spike: "
        + ", ".join(f"{name} {value:.3f}" for name, value in scores.items()),
        fontsize=10,
    )
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="animal1.npz or animal2.npz")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    y, place = windows(options.data)
    first, second = int(0.7 * len(y)), int(0.8 * len(y))
    constant = y[:first].mean(0).numpy() + 1e-3
    learned = {rate: learn(y[:first], rate, options.seed) for rate in RATES}
    chosen_by = {
        rate: bits(
            y[first:second].numpy(), told_by_others(guide, y[first:second]).numpy(), constant
        )
        for rate, guide in learned.items()
    }
    rate = max(chosen_by, key=chosen_by.__getitem__)
    test = y[second:].numpy()
    where = cells(place[second:])
    by_place = maps(y[:first].numpy(), place[:first])[:, where[:, 0], where[:, 1]].T
    scores = {
        "sparse codes": bits(test, told_by_others(learned[rate], y[second:]).numpy(), constant),
        "regression": bits(test, regressed(y[:first].numpy(), test), constant),
        "place itself": bits(test, by_place, constant),
    }
    with torch.no_grad():
        codes = learned[rate].encode(y[:first])
    fields = maps(codes.numpy(), place[:first])
    sharp = fields.max((1, 2)) / (fields.mean((1, 2)) + 1e-6) * (fields.mean((1, 2)) > 1e-3)
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"dcea_places_{options.data.stem}"
    draw(fields[np.argsort(-sharp)[:12]], scores, options.out / f"{name}.png")
    content = common.record(
        f"python -m benchmarks.dcea_places --data {options.data.name} --seed {options.seed}",
        options.seed,
        began,
        bits_per_spike=scores,
        validation_bits=chosen_by,
        rate=rate,
        neurons=y.shape[1],
        windows=[first, second - first, len(y) - second],
        active_share=round(float((codes > 0).float().mean()), 4),
    )
    common.write(options.out / f"{name}.json", content)
    print(scores, chosen_by)


if __name__ == "__main__":
    main()
