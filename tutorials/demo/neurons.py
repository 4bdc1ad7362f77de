"""Recordings of neurons with known spikes: real ones where there is a folder of data, or simulated.

``PYRO_SPARSE_DATA`` names the folder; a recording that is not in it is simulated.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]


def find(name: str) -> Path | None:
    """A file of the folder of data; None where there is none."""
    folder = os.environ.get("PYRO_SPARSE_DATA")
    path = Path(folder) / name if folder else None
    return path if path is not None and path.is_file() else None


class Extracellular(NamedTuple):
    """Stretches of one extracellular channel, in units of the noise.

    Attributes:
        name: Where it comes from.
        y: Shape ``(rows, 1, width)``, zero where nothing was observed.
        mask: True where a sample was observed, shape of ``y``.
        samples: Sample number of the recording at each place of a row, -1 where none is near;
            ``(rows, width)``.
        templates: Where waveforms may start from, ``(cells, 1, kernel)``.
        cell: The one whose spikes are known.
        spikes: Sample numbers of its spikes, ascending.
        waveforms: The true ones where they are known, shape of ``templates``.
    """

    name: str
    y: Tensor
    mask: Tensor
    samples: Array
    templates: Tensor
    cell: int
    spikes: Array
    waveforms: Tensor | None

    @property
    def trough(self) -> int:
        """Sample of a template at which its cell's spike is counted."""
        return int(self.templates[self.cell].abs().argmax())


SAMPLING = 10_000.0
"""Samples of an extracellular recording in a second."""
KERNEL, TROUGH, WIDTH = 41, 12, 640


def simulate_extracellular(rows: int, seed: int = 0) -> Extracellular:
    """Two cells in white noise; sizes of spikes vary, and some drown in the noise."""
    random = np.random.default_rng(seed)
    at = np.arange(KERNEL) - TROUGH

    def shape(narrow: float, later: float, wide: float, height: float) -> Array:
        return height * np.exp(-(((at - later) / wide) ** 2) / 2) - np.exp(
            -((at / narrow) ** 2) / 2
        )

    waveforms = np.stack([shape(2.0, 8.0, 4.0, 0.5), shape(3.5, 14.0, 6.0, 0.35)])
    waveforms /= np.linalg.norm(waveforms, axis=1, keepdims=True)
    active = random.random((rows, 2, WIDTH - KERNEL + 1)) < np.array([[0.0015], [0.002]])
    means, spreads = np.array([[6.0], [5.0]]), np.array([[1.2], [1.5]])
    sizes = np.maximum(means + spreads * random.standard_normal(active.shape), 0.5)
    y = random.standard_normal((rows, WIDTH))
    for row, cell, position in zip(*np.nonzero(active), strict=True):
        y[row, position : position + KERNEL] += sizes[row, cell, position] * waveforms[cell]
    samples = np.arange(rows * WIDTH).reshape(rows, WIDTH)
    row, position = np.nonzero(active[:, 0])
    start = np.stack([shape(1.5, 0.0, 1.0, 0.0), shape(5.0, 0.0, 1.0, 0.0)])  # troughs alone
    return Extracellular(
        "simulated",
        torch.tensor(y, dtype=torch.float32)[:, None],
        torch.ones(rows, 1, WIDTH, dtype=torch.bool),
        samples,
        torch.tensor(start, dtype=torch.float32)[:, None],
        0,
        samples[row, position + TROUGH],
        torch.tensor(waveforms, dtype=torch.float32)[:, None],
    )


def load_extracellular(path: Path, seconds: float) -> Extracellular:
    """The first seconds of a recording that keeps stretches around threshold crossings.

    They are laid in rows, one after the other, with unobserved samples between, so that a waveform
    may hang over the ends of a stretch.
    """
    stored = np.load(path)
    trace = stored["trace"][: round(seconds * SAMPLING)]
    templates = stored["init_templates"]
    pad = templates.shape[1] - 1
    edges = np.flatnonzero(np.diff(np.r_[0, np.isfinite(trace).astype(int), 0]))
    joined: list[list[int]] = []
    for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        if joined and begin - joined[-1][1] < pad:
            joined[-1][1] = end
        else:
            joined.append([begin, end])
    width = max(WIDTH, max(end - begin for begin, end in joined) + 2 * pad)
    rows: list[list[tuple[int, int, int]]] = [[]]
    at = pad
    for begin, end in joined:
        if at + end - begin + pad > width:
            rows.append([])
            at = pad
        rows[-1].append((at, begin, end))
        at += end - begin + pad
    y = np.full((len(rows), 1, width), np.nan, np.float32)
    samples = np.full((len(rows), width), -1)
    for row, places in enumerate(rows):
        for at, begin, end in places:
            y[row, 0, at : at + end - begin] = trace[begin:end]
            low, high = max(at - pad // 2, 0), min(at + end - begin + pad // 2, width)
            samples[row, low:high] = np.arange(low, high) + begin - at
    observed = np.isfinite(y)
    spikes = stored["true_spikes"]
    return Extracellular(
        "recorded",
        torch.from_numpy(np.where(observed, y, 0.0).astype(np.float32)),
        torch.from_numpy(observed),
        samples,
        torch.from_numpy(templates).float()[:, None],
        1,
        spikes[spikes < len(trace)],
        None,
    )


class Trials(NamedTuple):
    """Spikes of one neuron in trials of the same stimuli, in bins of a millisecond.

    Attributes:
        name: Where they come from.
        spikes: 0 or 1, ``(stimuli, trials, time)``.
        onset: Bin of the first deflection.
        period: Bins from one to the next.
        deflections: How many there are.
    """

    name: str
    spikes: Array
    onset: int
    period: int
    deflections: int


def load_trials(path: Path, unit: int) -> Trials:
    """A thalamic neuron while a whisker is moved."""
    spikes = np.load(path)["spikes"]
    return Trials("recorded", spikes.reshape(-1, *spikes.shape[2:])[unit], 500, 125, 16)


def simulate_trials(trials: int, deflections: int, seed: int = 0) -> Trials:
    """Two stimuli, each with a response of its own in the log-odds, which differs in size."""
    random = np.random.default_rng(seed)
    onset, period = 250, 125
    at = np.arange(80)
    shapes = np.stack(
        [
            np.exp(-(((at - 14) / 4) ** 2) / 2) - 0.3 * np.exp(-(((at - 40) / 12) ** 2) / 2),
            0.8 * np.exp(-(((at - 25) / 7) ** 2) / 2),
        ]
    )
    log_odds = np.full((2, onset + period * deflections + 150), -4.6)
    for stimulus in range(2):
        for k in range(deflections):
            begin = onset + k * period
            log_odds[stimulus, begin : begin + 80] += random.uniform(2.0, 4.5) * shapes[stimulus]
    odds = np.exp(log_odds)[:, None]
    drawn = random.random((2, trials, log_odds.shape[1])) < odds / (1 + odds)
    return Trials("simulated", drawn.astype(np.uint8), onset, period, deflections)


class Fluorescence(NamedTuple):
    """Fluorescence of one neuron, one imaging trial after the other.

    Attributes:
        name: Of the neuron.
        trace: Relative change of the fluorescence, ``(trials, frames)``.
        spikes: For each trial the frames at which a spike is first seen, ascending; a frame with
            two spikes stands there twice.
    """

    name: str
    trace: Array
    spikes: list[Array]


FRAMES = 122.0
"""Frames of a fluorescence recording in a second."""


def load_fluorescence(path: Path, trials: int) -> list[Fluorescence]:
    """Neurons that were imaged and recorded from at once, the first trials of each."""
    stored = np.load(path)
    found = []
    for name in sorted({key.split(".")[0] for key in stored.files}):
        trace = stored[f"{name}.dff"][:trials].astype(np.float64)
        steps = stored[f"{name}.frame_us"].astype(np.int64)
        spikes = []
        for trial in range(len(trace)):
            times = np.r_[0, np.cumsum(steps[trial])] / 1e6
            seconds = np.sort(stored[f"{name}.spike_s"][stored[f"{name}.spike_trial"] == trial])
            spikes.append(np.searchsorted(times, seconds))
        found.append(Fluorescence(name, trace, spikes))
    return found


def simulate_fluorescence(neurons: int, seconds: float, seed: int = 0) -> list[Fluorescence]:
    """Spikes in bursts, a fast and a slow decay, a wandering baseline, and noise."""
    random = np.random.default_rng(seed)
    frames = round(seconds * FRAMES)
    at = np.arange(120) / FRAMES
    kernel = 0.6 * np.exp(-at / 0.03) + 0.4 * np.exp(-at / 0.2)
    found = []
    for neuron in range(neurons):
        starts = np.flatnonzero(random.random(frames) < 0.5 / FRAMES)
        numbers = random.geometric(0.6, len(starts))
        spikes = np.concatenate(
            [s + np.r_[0, np.cumsum(random.integers(1, 5, n - 1))] for s, n in zip(starts, numbers)]
        )
        spikes = np.sort(spikes[spikes < frames])
        counts = np.bincount(spikes, minlength=frames) * random.uniform(0.7, 1.3, frames)
        amplitude, noise = random.uniform(0.15, 0.25), random.uniform(0.04, 0.07)
        slow = 0.05 * np.sin(2 * np.pi * (np.arange(frames) / FRAMES / 20 + random.random()))
        trace = amplitude * np.convolve(counts, kernel)[:frames] + slow
        trace += noise * random.standard_normal(frames)
        found.append(Fluorescence(f"simulated {neuron}", trace[None], [spikes]))
    return found


def matched(times: Array, spikes: Array, window: float) -> tuple[Array, Array]:
    """Which events and which spikes have a partner, in the largest one-to-one matching.

    Args:
        times: Of events, ascending.
        spikes: True times, ascending.
        window: Distance of a pair, at most; windows of one width are matched best from left to
            right.

    Returns:
        Booleans, in the shapes of ``times`` and of ``spikes``.
    """
    events, found = np.zeros(len(times), bool), np.zeros(len(spikes), bool)
    event = spike = 0
    while event < len(times) and spike < len(spikes):
        away = spikes[spike] - times[event]
        if abs(away) <= window:
            events[event] = found[spike] = True
        event, spike = event + int(away >= -window), spike + int(away <= window)
    return events, found


def clusters(prob: Array, at: Array, gap: float, floor: float = 0.01) -> tuple[Array, Array]:
    """Neighbouring codes as one event: when, and with which probability there is any.

    Args:
        prob: Probabilities of codes of being active, taken for independent, ``(codes,)``.
        at: Their times, ascending.
        gap: Distance of neighbours, at most.
        floor: Codes less probable than this are passed over.

    Returns:
        The mean time of each event, weighted by the probabilities, and the probability that at
        least one of its codes is active.
    """
    kept = prob > floor
    prob, at = prob[kept].astype(float), at[kept]
    if not len(prob):
        return np.empty(0), np.empty(0)
    label = np.cumsum(np.r_[False, np.diff(at) > gap])
    total = np.bincount(label, prob)
    none = np.bincount(label, np.log1p(-np.minimum(prob, 1 - 1e-7)))
    return np.bincount(label, prob * at) / total, -np.expm1(none)
