"""Are ranks uniform? Bands around an empirical distribution function, and p-values."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from scipy.signal import fftconvolve
from torch import Tensor

from pyro_sparse.infer.numbers import check_real, check_whole
from pyro_sparse.ops import check_tensor

_Array = np.ndarray[Any, Any]
_POINTS = 100  # at which a distribution function is looked at
_SMALL = 1e-10  # below it one minus a probability has too few digits; Bonferroni's bound is taken


class Band(NamedTuple):
    """Where an empirical distribution function of uniform numbers lies, all points at once.

    Attributes:
        points: Where it is looked at, in (0, 1); float64, shape ``(points,)``.
        lower: Smallest value there, in [0, 1].
        upper: Largest.

    Example:
        >>> band = uniform_band(1000)
        >>> bool((band.lower < band.points).all() and (band.points < band.upper).all())
        True
    """

    points: Tensor
    lower: Tensor
    upper: Tensor


def uniform_band(size: int, prob: float = 0.95) -> Band:
    r"""Simultaneous band for the empirical distribution function of uniform numbers.

    At each of up to 100 points the central interval of a binomial law is taken, all of the same
    level; the level is such that the whole function lies within with the probability asked for.

    Args:
        size: How many numbers, ``>= 2``.
        prob: Probability that they stay within, in (0, 1); no less is kept.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If it is out of range.

    References:
        Saeilynoja, Buerkner & Vehtari (2022), Stat. Comput. 32(32), sec. 2.2; the probability is
        that of a Poisson process conditioned on its total: Moscovich & Nadler (2017), Stat. Probab.
        Lett. 123.

    Example:
        >>> band = uniform_band(100, 0.9)
        >>> numbers = torch.rand(100, generator=torch.Generator().manual_seed(0))
        >>> share = (numbers[:, None] <= band.points).double().mean(0)
        >>> bool(((band.lower <= share) & (share <= band.upper)).all())
        True
    """
    check_whole("size", size, 2)
    check_real("prob", prob, 0.0, 1 - 1e-9, open_low=True)
    points = _points(size)
    small, large = np.log((1 - prob) / (2 * len(points))), np.log(1 - prob)
    for _ in range(40):  # a step function of the level: ends on the side that keeps more
        middle = (small + large) / 2
        if _inside(size, *_limits(size, points, np.exp(middle))) >= prob:
            small = middle
        else:
            large = middle
    low, high = _limits(size, points, np.exp(small))
    return Band(*(torch.from_numpy(part) for part in (points, low / size, high / size)))


def uniform_p_value(values: Tensor) -> float:
    """Probability that uniform numbers look no more uniform than these.

    The statistic is the smallest tail probability of the empirical distribution function over up to
    100 points, the same as that of ``uniform_band``; its law is exact for independent numbers from
    (0, 1), however few.

    Args:
        values: In [0, 1], any shape, at least two, taken for independent.

    Raises:
        TypeError: If they are no real tensor.
        ValueError: If there are fewer than two, or one is outside [0, 1].

    References:
        As ``uniform_band``.

    Example:
        >>> numbers = torch.rand(1000, generator=torch.Generator().manual_seed(0))
        >>> uniform_p_value(numbers) > 0.01, uniform_p_value(numbers**1.5) < 1e-6
        (True, True)
    """
    check_tensor("values", values)
    numbers = values.detach().double().flatten().sort().values.cpu().numpy()
    if len(numbers) < 2 or not (numbers[0] >= 0 and numbers[-1] <= 1):
        raise ValueError(
            f"Expected at least two numbers in [0, 1], got shape {tuple(values.shape)}. Pass "
            "randomised ranks divided by their number, such as Calibration.pit."
        )
    size = len(numbers)
    points = _points(size)
    count = np.searchsorted(numbers, points, side="right")
    below = stats.binom.cdf(count, size, points)
    above = stats.binom.sf(count - 1, size, points)
    level = min(1 - 1e-6, 2 * min(below.min(), above.min()))
    if level * len(points) < _SMALL:
        return float(level * len(points))
    # Equal tails count as more extreme, whichever way they were rounded.
    return float(1 - _inside(size, *_limits(size, points, level * (1 + 1e-9))))


def count_p_value(prob: Tensor, count: int) -> float:
    """Two-sided p-value of a number of successes in independent trials of given probabilities.

    Args:
        prob: Probability of each trial, shape ``(trials,)``.
        count: Successes.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a probability is outside [0, 1], or the count above the number of trials.

    References:
        The Poisson-binomial law by multiplying its generating polynomials: Biscarri, Zhao &
        Brunner (2018), Comput. Stat. Data Anal. 122, algorithm 2.

    Example:
        >>> round(count_p_value(torch.full((10,), 0.5), 0), 6)  # 2 / 2**10
        0.001953
    """
    check_tensor("prob", prob)
    check_whole("count", count, 0)
    if prob.dim() != 1 or not bool(((prob >= 0) & (prob <= 1)).all()) or count > len(prob):
        raise ValueError(
            "Expected probabilities in [0, 1] of shape (trials,) and a count of at most that many, "
            f"got shape {tuple(prob.shape)} and {count}."
        )
    success = prob.detach().double().cpu().numpy()
    factors = np.stack([1 - success, success], 1)
    while len(factors) > 1:
        if len(factors) % 2:
            one = np.eye(1, factors.shape[1])
            factors = np.concatenate([factors, one])
        factors = np.maximum(fftconvolve(factors[::2], factors[1::2], axes=1), 0)
    law = factors[0, : len(prob) + 1] if len(prob) else np.ones(1)
    return float(min(1.0, 2 * min(law[: count + 1].sum(), law[count:].sum())))


def _points(size: int) -> _Array:
    number = min(size, _POINTS)
    return np.arange(1, number) / number


def _limits(size: int, points: _Array, level: float) -> tuple[_Array, _Array]:
    """Smallest and largest counts whose tails are above half a level, at each point."""
    low = stats.binom.ppf(level / 2, size, points)
    return low.astype(int), stats.binom.isf(level / 2, size, points).astype(int)


def _inside(size: int, low: _Array, high: _Array) -> float:
    """Probability that the counts of uniform numbers below equidistant points stay in limits."""
    if (low > high).any():
        return 0.0
    rate = size / (len(low) + 1)
    jump = stats.poisson.pmf(np.arange(size + 1), rate)
    state, start = np.ones(1), 0
    for least, most in zip(low, high):
        reached = np.convolve(state, jump[: most - start + 1])
        state, start = reached[least - start : most - start + 1], least
    last = jump[size - start - np.arange(len(state))]
    return min(1.0, float(state @ last / stats.poisson.pmf(size, size)))
