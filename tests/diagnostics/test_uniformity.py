"""Bands and p-values against simulation, scipy and ArviZ."""

import numpy as np
import pytest
import torch
from arviz.stats.ecdf_utils import ecdf_confidence_band
from scipy import stats
from torch import Tensor

from pyro_sparse.diagnostics.uniformity import count_p_value, uniform_band, uniform_p_value


@pytest.mark.parametrize("size", [7, 60, 200])
def test_uniform_numbers_stay_in_the_band_as_often_as_it_says(size: int) -> None:
    band = uniform_band(size, 0.9)
    numbers = torch.rand(4000, size)
    share = (numbers[:, :, None] <= band.points).double().mean(1)
    kept = ((share >= band.lower) & (share <= band.upper)).all(1).double().mean()
    assert kept > 0.9 - 4 * (0.09 / 4000) ** 0.5
    # Counts are whole numbers, of few of which no band is exact.
    assert kept < {7: 0.99, 60: 0.93, 200: 0.925}[size]


def test_the_band_is_that_of_arviz_up_to_one_count() -> None:
    band = uniform_band(500, 0.95)
    points = np.append(band.points.numpy(), 1.0)
    lower, upper = ecdf_confidence_band(500, points, points, prob=0.95)
    np.testing.assert_allclose(band.lower, lower[:-1], atol=1.01 / 500)
    np.testing.assert_allclose(band.upper, upper[:-1], atol=1.01 / 500)


@pytest.mark.parametrize("size", [20, 150])
def test_p_values_of_uniform_numbers_are_uniform(size: int) -> None:
    found = np.array([uniform_p_value(numbers) for numbers in torch.rand(300, size)])
    for level in (0.01, 0.1, 0.5):  # steps of a discrete statistic make them larger, never smaller
        assert stats.binomtest(int((found <= level).sum()), 300, level, "greater").pvalue > 1e-4
    assert (found <= 0.5).mean() > 0.35


def test_what_falls_outside_the_band_has_a_p_value_below_one_minus_its_probability() -> None:
    band = uniform_band(200, 0.9)
    outside, small = [], []
    for numbers in torch.rand(150, 200, dtype=torch.float64) ** 1.1:
        share = (numbers[:, None] <= band.points).double().mean(0)
        outside.append(bool(((share < band.lower) | (share > band.upper)).any()))
        small.append(uniform_p_value(numbers) <= 0.1)
    assert outside == small
    assert 0.1 < np.mean(small) < 0.9


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_numbers_that_are_not_uniform_are_found_out(power: float) -> None:
    assert uniform_p_value(torch.rand(1000) ** power) < 1e-12


def test_too_narrow_posteriors_pile_ranks_at_the_ends() -> None:
    ranks = torch.special.ndtr(torch.randn(500) / 0.7)
    assert uniform_p_value(ranks) < 1e-5


@pytest.mark.parametrize("prob", [torch.rand(1), torch.rand(7) ** 3, torch.full((30,), 0.5)])
def test_count_p_values_are_those_of_all_outcomes(prob: Tensor) -> None:
    law = np.ones(1)
    for p in prob.double().tolist():
        law = np.convolve(law, [1 - p, p])
    for count in range(len(prob) + 1):
        expected = min(1.0, 2 * min(law[: count + 1].sum(), law[count:].sum()))
        assert count_p_value(prob.double(), count) == pytest.approx(expected, abs=1e-12)


def test_errors() -> None:
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        uniform_p_value(torch.tensor([0.1, 1.1]))
    with pytest.raises(ValueError, match="at least two"):
        uniform_p_value(torch.tensor([0.1]))
    with pytest.raises(ValueError, match="at least two"):
        uniform_p_value(torch.tensor([0.1, torch.nan]))
    with pytest.raises(ValueError, match="size >= 2"):
        uniform_band(1)
    with pytest.raises(ValueError, match="Expected prob"):
        uniform_band(10, 1.0)
    with pytest.raises(ValueError, match="trials"):
        count_p_value(torch.rand(3), 4)
