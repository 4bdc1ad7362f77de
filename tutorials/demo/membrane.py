"""Spikes of a neuron, found in a noisy recording of its membrane potential."""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass
from typing import Any

import matplotlib.cbook
import numpy as np
import pyro.distributions as dist
import torch
from scipy.ndimage import gaussian_filter1d
from scipy.optimize import linear_sum_assignment

from pyro_sparse import infer
from pyro_sparse.dictionaries import Conv
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import Proximal, solve

SAMPLE_INTERVAL = 0.0005
"""Seconds. The file carries no time axis; matplotlib's own example of this trace states it."""
NOISE = 0.25
"""Standard deviation of the added noise, as a fraction of the trace's."""
CROSSING = -0.1
"""Level whose upward crossings in the clean trace are the true spikes."""
WINDOW = 0.002
"""Seconds between a detection and the spike that it counts for, at most."""


@dataclass
class Result:
    """What the demo shows of the trace."""

    clean: np.ndarray[Any, Any]
    noisy: np.ndarray[Any, Any]
    high_passed: np.ndarray[Any, Any]
    atom: np.ndarray[Any, Any]
    event_times: np.ndarray[Any, Any]
    event_sizes: np.ndarray[Any, Any]
    threshold: float
    true_spikes: np.ndarray[Any, Any]
    summary: dict[str, Any]


def run(seed: int = 0, progress: bool = True) -> Result:
    """Learn the spike's waveform from the noisy trace and detect its events."""
    start = time.perf_counter()
    path = matplotlib.cbook.get_sample_data("membrane.dat", asfileobj=False)
    clean = np.fromfile(path, np.float32).astype(np.float64)
    random = np.random.default_rng(seed)
    noisy = clean + NOISE * clean.std() * random.standard_normal(len(clean))

    # What the detector knows: the noisy trace. A smooth trend of 10 ms is not a spike.
    high_passed = noisy - gaussian_filter1d(noisy, 0.010 / SAMPLE_INTERVAL)
    sigma = float(np.median(np.abs(np.diff(noisy)))) / (0.6745 * math.sqrt(2))
    # The universal rate: noise alone then hardly ever makes a code active.
    rate = math.sqrt(2 * math.log(len(noisy))) / sigma

    length = round(0.016 / SAMPLE_INTERVAL)
    bump = torch.exp(-0.5 * ((torch.arange(length) - length // 3) / 2.0) ** 2)
    dictionary = Conv(num_atoms=1, channels=1, kernel_size=length, atoms=bump[None, None])
    likelihood = Gaussian(sigma)
    prior = dist.Exponential(torch.tensor(rate))
    model = SparseCoding(dictionary, likelihood, prior)
    # Thresholds stay those of the model, so that what is detected follows from noise and rate.
    guide = UnrolledFISTA(dictionary, likelihood, prior, num_steps=30, shrinkage=Proximal())
    y = torch.tensor(high_passed, dtype=torch.float32)[None, None]  # (n=1, channels=1, time)
    adam = functools.partial(torch.optim.Adam, lr=0.02)
    infer.fit(model, guide, y, optimizer=adam, epochs=60, seed=seed, progress=progress)
    solution = solve(y, dictionary, prior, likelihood=likelihood, tol=1e-4)

    codes = solution.codes[0, 0].double().numpy()
    atom = dictionary.atoms.detach()[0, 0].numpy()
    position, size = merge_events(codes, gap=round(WINDOW / SAMPLE_INTERVAL))
    level = rate * sigma**2  # the proximal level of a unit-norm atom
    threshold = split_level(size, floor=level)
    kept = size > threshold
    times = position[kept] + half_rise(atom)

    spikes = upward_crossings(clean, CROSSING)
    window = WINDOW / SAMPLE_INTERVAL
    hits = count_matches(times, spikes, window)
    plain = upward_crossings(high_passed, level, refractory=0.005 / SAMPLE_INTERVAL)
    plain_hits = count_matches(plain, spikes, window)
    summary = {
        "spike_f1": 2 * hits / (len(times) + len(spikes)),
        "spike_f1_plain_threshold": 2 * plain_hits / (len(plain) + len(spikes)),
        "true_spikes": len(spikes),
        "detected": len(times),
        "matched": hits,
        "noise_sd": NOISE * float(clean.std()),
        "noise_sd_estimated": sigma,
        "rate": rate,
        "threshold": threshold,
        "threshold_rule": "half the mean size of the events above it, at least the proximal level",
        "relative_duality_gap": solution.gap.item(),
        "sample_interval_s": SAMPLE_INTERVAL,
        "seconds": time.perf_counter() - start,
    }
    return Result(clean, noisy, high_passed, atom, times, size[kept], threshold, spikes, summary)


def merge_events(
    codes: np.ndarray[Any, Any], gap: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Neighbouring active codes as one event: centre of mass and sum."""
    active = np.flatnonzero(codes > 0)
    if len(active) == 0:
        return np.empty(0), np.empty(0)
    groups = np.split(active, np.flatnonzero(np.diff(active) > gap) + 1)
    size = np.array([codes[group].sum() for group in groups])
    position = np.array([(codes[group] * group).sum() for group in groups]) / size
    return position, size


def split_level(size: np.ndarray[Any, Any], floor: float) -> float:
    """Midway between no event and the mean event: two means of which one is held at zero."""
    level, last = floor, -1.0
    while level != last and (size > level).any():
        level, last = max(floor, float(size[size > level].mean()) / 2), level
    return level


def upward_crossings(
    trace: np.ndarray[Any, Any], level: float, refractory: float = 0.0
) -> np.ndarray[Any, Any]:
    """First samples above a level, those within ``refractory`` samples of the last one left out."""
    above = trace > level
    kept: list[int] = []
    for crossing in np.flatnonzero(above[1:] & ~above[:-1]) + 1:
        if not kept or crossing - kept[-1] > refractory:
            kept.append(int(crossing))
    return np.array(kept)


def half_rise(atom: np.ndarray[Any, Any]) -> int:
    """Sample at which the atom first reaches half its peak on the way up to it."""
    peak = int(atom.argmax())
    below = np.flatnonzero(atom[:peak] < atom[peak] / 2)
    return int(below[-1]) + 1 if len(below) else 0


def count_matches(times: np.ndarray[Any, Any], spikes: np.ndarray[Any, Any], window: float) -> int:
    """Largest number of one-to-one pairs within the window."""
    near = np.abs(np.subtract.outer(times, spikes)) <= window
    rows, columns = linear_sum_assignment(near, maximize=True)
    return int(near[rows, columns].sum())
