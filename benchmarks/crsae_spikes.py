"""CRsAE on a recording with known spikes: templates, events, and the time it takes to find them.

    PYRO_SPARSE_DATA=FOLDER python -m benchmarks.crsae train spikes
    python -m benchmarks.crsae evaluate-spikes --weights F --recording X.npz --json OUT

The recording keeps stretches around threshold crossings. They are laid one after the other in rows,
each with ``kernel - 1`` samples that were not observed on both sides, so that atoms may hang over
its ends. Codes are non-negative; templates and codes alternate, with the rate of each template by
EM. An event is a cluster of active codes of the cell's template, at the trough and with their sum
for an amplitude. Its threshold is Otsu's, which knows no truth.

Every method is scored alike: one event for one true spike, at most ``WINDOW`` samples apart.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks import common
from pyro_sparse import infer
from pyro_sparse.dictionaries import Conv
from pyro_sparse.distributions import Rate, SpikeAndSlab
from pyro_sparse.guides import Thresholded, UnrolledEncoder, UnrolledFISTA
from pyro_sparse.infer import Differentiated, Phase, RateEM, SparseELBO, Update
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import Detached, Proximal, Unrolled, solve

Array = np.ndarray[Any, Any]

RECORDING = Path("spikes_hc1/d533101.npz")
CELL = 1
"""Template of the cell that was also recorded from inside."""
NOISE = 1.0
"""Standard deviation of the noise in units of the recording, which its source has whitened."""
WIDTH = 640
"""Least length of a row in samples."""
WINDOW = 20
"""Samples between an event and its true spike, at most: half a template, as in earlier scores."""
MERGE = 3
"""Samples between codes of one event, at most."""
STRENGTH = 10.0
"""How many times more the hyperprior of a rate counts than all positions of a row. With point codes
a weaker one ends at rates that switch templates off (see ``infer.em``)."""
DEPTH, EPOCHS, BATCH, LEARNING_RATE = 60, 6, 64, 3e-3
TOLERANCE = 1e-3
"""Relative duality gap of the codes that events are read from."""


class Rows(NamedTuple):
    """Stretches of a recording, laid out for a batch.

    Attributes:
        y: Shape ``(rows, 1, width)``, zero where nothing was observed.
        mask: True where a sample was observed, shape of ``y``.
        samples: Sample number of the recording, also in the pads, or -1; ``(rows, width)``.
    """

    y: Tensor
    mask: Tensor
    samples: Array


def stretches(trace: Array, kernel: int) -> list[tuple[int, int]]:
    """Begin and end of observed stretches; those that an atom could join are one."""
    edges = np.flatnonzero(np.diff(np.r_[0, np.isfinite(trace).astype(int), 0]))
    joined: list[tuple[int, int]] = []
    for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        if joined and begin - joined[-1][1] < kernel - 1:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    if not joined:
        raise ValueError("Expected a trace with samples that are not nan, got none.")
    return joined


def rows_of(trace: Array, kernel: int, width: int = WIDTH) -> Rows:
    """All stretches of a recording in rows, with ``kernel - 1`` unobserved samples between."""
    pad = kernel - 1
    found = stretches(trace, kernel)
    width = max(width, max(end - begin for begin, end in found) + 2 * pad)
    rows: list[list[tuple[int, int, int]]] = [[]]
    at = pad
    for begin, end in found:
        if at + end - begin + pad > width:
            rows.append([])
            at = pad
        rows[-1].append((at, begin, end))
        at += end - begin + pad
    y = np.full((len(rows), width), np.nan, dtype=np.float32)
    samples = np.full((len(rows), width), -1)
    for row, places in enumerate(rows):
        for at, begin, end in places:
            low, high = max(at - pad // 2, 0), min(at + end - begin + pad // 2, width)
            samples[row, low:high] = np.arange(low, high) + begin - at
            y[row, at : at + end - begin] = trace[begin:end]
    observed = np.isfinite(y)
    signal = torch.from_numpy(np.where(observed, y, 0.0).astype(np.float32))
    return Rows(signal[:, None], torch.from_numpy(observed)[:, None], samples)


def exponential(rate: Tensor) -> dist.Exponential:
    return dist.Exponential(rate)


def templates(atoms: Tensor) -> Conv:
    """A dictionary of atoms ``(templates, 1, kernel)``."""
    return Conv(atoms.shape[0], 1, atoms.shape[-1], atoms=atoms)


def train(
    recording: dict[str, Array], seed: int, *, epochs: int = EPOCHS, width: int = WIDTH
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Templates and rates, and the settings that events are read with."""
    begun = time.perf_counter()
    atoms = torch.from_numpy(recording["init_templates"]).float()[:, None]
    count, kernel = atoms.shape[0], atoms.shape[-1]
    atoms = atoms / atoms.flatten(1).norm(dim=1)[:, None, None]
    rows = rows_of(recording["trace"], kernel, width)
    positions = rows.y.shape[-1] - kernel + 1
    # The universal threshold of as many codes as a row has, as published.
    start = math.sqrt(2 * math.log(count * positions)) / NOISE
    dictionary, likelihood = templates(atoms), Gaussian(NOISE)
    rate = Rate(start, num_atoms=count)
    guide = UnrolledFISTA(
        dictionary, likelihood, exponential, rate=rate, num_steps=DEPTH, shrinkage=Proximal()
    )
    model = SparseCoding(dictionary, likelihood, exponential, rate=rate)
    weight = STRENGTH * positions
    em = RateEM(
        rate, exponential, dist.Gamma(weight, weight / start), per_datum=True, dictionary=dictionary
    )
    batches = -(-len(rows.y) // BATCH)
    alternate = Update(
        Differentiated(SparseELBO(), Detached()),
        functools.partial(torch.optim.Adam, lr=LEARNING_RATE),
        [dictionary],
        functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs * batches),
        schedule_per_step=True,
    )
    history = infer.fit(
        model, guide, rows.y, mask=rows.mask, phases=[Phase(epochs, [alternate])],
        batch_size=min(BATCH, len(rows.y)), seed=seed, callbacks=[em], progress=False,
    )  # fmt: skip
    tensors = {"atoms": dictionary.atoms.detach(), "rate": rate().detach()}
    found = events(codes_of(tensors, rows), rows, tensors["atoms"], CELL)
    return tensors, {
        "cell": CELL,
        "noise": NOISE,
        "threshold": otsu(found.amplitudes),
        "seed": seed,
        "epochs": epochs,
        "starting_rate": start,
        "loss_by_epoch": [round(loss, 2) for loss in history.epoch_loss],
        "training_seconds": round(time.perf_counter() - begun, 1),
    }


def codes_of(tensors: dict[str, Tensor], rows: Rows, tol: float = TOLERANCE) -> Tensor:
    """MAP codes to a certificate, shape ``(rows, templates, positions)``."""
    return solve(
        rows.y, templates(tensors["atoms"]), exponential, rate=tensors["rate"],
        likelihood=Gaussian(NOISE), mask=rows.mask, tol=tol,
    ).codes  # fmt: skip


class Events(NamedTuple):
    """Events of one template: sample numbers of the trough, in order, and amplitudes."""

    times: Array
    amplitudes: Array

    def above(self, threshold: float) -> Array:
        return self.times[self.amplitudes >= threshold]


def events(codes: Tensor, rows: Rows, atoms: Tensor, cell: int) -> Events:
    """Clusters of active codes of a template: their mean place and their sum."""
    label, at, value = clusters(codes[:, cell], rows, atoms[cell], 0.0)
    total = np.bincount(label, value)
    return Events(np.bincount(label, value * at) / total, total)


def clusters(values: Tensor, rows: Rows, atom: Tensor, floor: float) -> tuple[Array, Array, Array]:
    """Cluster, sample number of the trough and value, of values ``(rows, positions)`` above."""
    trough = int(atom.abs().flatten().argmax())
    row, position = np.nonzero(values.numpy() > floor)
    at, value = rows.samples[row, position + trough], values.numpy()[row, position]
    order = np.argsort(at, kind="stable")
    order = order[at[order] >= 0]  # elsewhere no sample is near
    at, value = at[order], value[order]
    label = np.r_[np.zeros(min(len(at), 1), int), np.cumsum(np.diff(at) > MERGE)]
    return label, at, value


def probable_events(
    tensors: dict[str, Tensor], rows: Rows, cell: int, seed: int, *, epochs: int = 2
) -> Events:
    """Events with their posterior probabilities for amplitudes, by a thresholded guide.

    The prior is a spike and a slab, with share, mean and spread of every template's amplitudes
    above Otsu's threshold; the guide is trained on the recording, with the templates held. Codes
    of a cluster count as independent.
    """
    atoms, rate = tensors["atoms"], tensors["rate"]
    codes = codes_of(tensors, rows)
    found = []
    for k in range(len(atoms)):
        amplitudes = events(codes, rows, atoms, k).amplitudes
        large = amplitudes[amplitudes >= otsu(amplitudes)] + float(rate[k])  # less shrinkage
        found.append((len(large) / int(rows.mask.sum()), large.mean(), max(large.std(), 0.1)))
    probs, loc, scale = torch.tensor(np.array(found), dtype=atoms.dtype).T[..., None]
    dictionary, likelihood = templates(atoms), Gaussian(NOISE)
    dictionary.requires_grad_(False)
    prior = SpikeAndSlab(dist.Normal(loc, scale), probs=probs)
    model = SparseCoding(dictionary, likelihood, prior)
    solver = Unrolled(dictionary, likelihood, num_steps=DEPTH, shrinkage=Proximal())
    guide = Thresholded(
        UnrolledEncoder(
            solver, exponential(rate.mean()), init_probs=float(probs.mean()),
            init_scale=float(loc.mean()),
        )
    )  # fmt: skip
    infer.fit(
        model, guide, rows.y, mask=rows.mask, epochs=epochs, batch_size=min(BATCH, len(rows.y)),
        optimizer=functools.partial(torch.optim.Adam, lr=3e-2), seed=seed, progress=False,
    )  # fmt: skip
    with torch.no_grad():
        parts = zip(rows.y.split(BATCH), rows.mask.split(BATCH), strict=True)
        active = torch.cat([guide.posterior(y, mask).prob_active[:, cell] for y, mask in parts])
    label, at, value = clusters(active, rows, atoms[cell], 1e-3)
    none = np.bincount(label, np.log1p(-np.minimum(value, 1 - 1e-7)))
    return Events(np.bincount(label, value * at) / np.bincount(label, value), -np.expm1(none))


def otsu(amplitudes: Array) -> float:
    """Threshold between two classes, of least variance within them, without the truth.

    Places without an event count as amplitudes of zero, as many as there are events: where no small
    event was found either, the lower class is theirs.

    References:
        Otsu (1979), IEEE Trans. Syst. Man Cybern. 9(1).
    """
    if not len(amplitudes):
        raise ValueError("Expected events to set a threshold by, got none: try lower rates.")
    ordered = np.sort(np.r_[np.zeros(len(amplitudes)), amplitudes])
    below = np.arange(1, len(ordered))
    sums = np.cumsum(ordered)
    low, high = sums[:-1] / below, (sums[-1] - sums[:-1]) / (len(ordered) - below)
    between = below * (len(ordered) - below) * (high - low) ** 2
    best = int(between.argmax())
    return float((ordered[best] + ordered[best + 1]) / 2)


def score(times: Array, truth: Array, window: int = WINDOW) -> dict[str, int]:
    """Misses and false alarms of the largest one-to-one matching within ``window`` samples.

    Both in ascending order: windows of equal width on a line are matched best from left to right.
    """
    event = spike = hits = 0
    while event < len(times) and spike < len(truth):
        away = truth[spike] - times[event]
        if abs(away) <= window:
            hits += 1
        event += away >= -window
        spike += away <= window
    return {"misses": len(truth) - hits, "false_alarms": len(times) - hits}


def curve(found: Events, truth: Array) -> list[dict[str, float]]:
    """Scores at every threshold that leaves at most twice as many events as spikes."""
    order = np.sort(found.amplitudes)[::-1][: 2 * len(truth)]
    return [{"threshold": float(t), **score(found.above(t), truth)} for t in order]


def best(points: list[dict[str, float]]) -> dict[str, float]:
    """The threshold of fewest errors, chosen by the truth."""
    return min(points, key=lambda point: point["misses"] + point["false_alarms"])


def triggered_average(trace: Array, truth: Array, kernel: int) -> Tensor:
    """Mean of the recording around the true spikes, shape ``(1, 1, kernel)``."""
    inside = truth[(truth >= kernel) & (truth < len(trace) - kernel)]
    around = trace[inside[:, None] + np.arange(kernel) - kernel // 2]
    return torch.from_numpy(np.nanmean(around, axis=0)).float()[None, None]


def restore(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, settings = common.load_weights(file)
    if "threshold" not in settings:
        raise ValueError(f"Expected weights by train spikes, got {file}.")
    return tensors, settings


def evaluate(file: Path, recording: dict[str, Array], window: int) -> dict[str, Any]:
    """Scores of a recording at the threshold that came with the weights."""
    tensors, settings = restore(file)
    rows = rows_of(recording["trace"], tensors["atoms"].shape[-1])
    found = events(codes_of(tensors, rows), rows, tensors["atoms"], settings["cell"])
    truth = recording["true_spikes"]
    return {
        **score(found.above(settings["threshold"]), truth, window),
        "true_spikes": len(truth),
        "threshold": round(settings["threshold"], 4),
        "window_samples": window,
    }


def add_commands(commands: Any) -> None:
    """The spikes' part of the command line."""
    evaluating = commands.add_parser("evaluate-spikes")
    evaluating.add_argument("--weights", type=Path, required=True)
    evaluating.add_argument("--recording", type=Path, required=True)
    evaluating.add_argument("--window", type=int, default=WINDOW, help="in samples")
    evaluating.add_argument("--json", type=Path)


def run(options: argparse.Namespace, begun: float) -> None:
    """What ``benchmarks.crsae`` hands on."""
    recording = dict(np.load(options.recording))
    found = evaluate(options.weights, recording, options.window)
    print(found)
    if options.json:
        command = (
            f"python -m benchmarks.crsae evaluate-spikes --weights {options.weights} "
            f"--recording X.npz --window {options.window}"
        )
        common.write(options.json, common.record(command, 0, begun, **found))
