"""Pictures show the numbers they are made of."""

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba

from pyro_sparse.diagnostics import (
    Calibration,
    plot_atoms,
    plot_khat,
    plot_loss,
    plot_rank_ecdf,
    plot_reliability,
    reliability,
)
from pyro_sparse.infer.history import History


@pytest.fixture(autouse=True)
def closed() -> Any:
    yield
    plt.close("all")


def calibration(scale: float) -> Calibration:
    z = torch.randn(61, 400, 5) * (torch.rand(61, 400, 5) < 0.5)
    return Calibration.from_draws(z[0], scale * z[1:])


def red(ax: Any) -> int:
    return sum(to_rgba(line.get_color()) == to_rgba("tab:red") for line in ax.lines)


@pytest.mark.parametrize("active", [False, True])
def test_lines_outside_the_band_are_red(active: bool) -> None:
    right = plot_rank_ecdf(calibration(1.0), active=active)
    wrong = plot_rank_ecdf(calibration(0.5), active=active)
    assert len(right.lines) == len(wrong.lines) == 6
    assert red(right) == 0 and red(wrong) == 5


def test_ranks_of_too_narrow_posteriors_lie_above_on_the_left() -> None:
    ax = plot_rank_ecdf(calibration(0.5), active=True)
    x, y = ax.lines[1].get_data()
    assert y[np.searchsorted(x, 0.1)] > 0 > y[np.searchsorted(x, 0.9)]


def test_reliability_shows_the_curve() -> None:
    prob = torch.rand(500, 4)
    curve = reliability(prob, torch.rand(500, 4) < prob)
    _, axes = plt.subplots()
    assert plot_reliability(curve, ax=axes) is axes
    np.testing.assert_allclose(
        axes.lines[1].get_xydata(), torch.stack([curve.prob, curve.frequency], 1)
    )
    assert f"{curve.ece:.3f}" in axes.get_title()


def test_khat_counts_bad_data_and_shows_infinite_ones() -> None:
    shape = torch.tensor([0.1, 0.68, 0.9, torch.inf, -torch.inf])
    ax = plot_khat(shape, num_samples=1000)  # 1 - 1 / 3 is below 0.7
    assert ax.get_title() == "3 of 5 data above 0.67"
    assert sum(len(line.get_xdata()) for line in ax.lines[:2]) == 5
    low, high = ax.get_ylim()
    assert all(
        ((low <= line.get_ydata()) & (line.get_ydata() <= high)).all() for line in ax.lines[:2]
    )
    assert plot_khat(shape).get_title() == "3 of 5 data above 0.70".replace("3", "2", 1)


def test_atoms_are_curves_or_pictures() -> None:
    curves = plot_atoms(torch.randn(5, 2, 9), order=torch.tensor([4, 0]))
    assert curves.shape == (1, 2) and len(curves[0, 0].lines) == 3
    dense = torch.randn(7, 12)
    pictures = plot_atoms(dense, image_shape=(3, 4), columns=4, titles=range(7))
    assert pictures.shape == (2, 4) and not pictures[1, 3].images
    shown = pictures[0, 1].images[0]
    np.testing.assert_allclose(shown.get_array(), dense[1].reshape(3, 4))
    assert shown.norm.vmax == -shown.norm.vmin == dense[1].abs().max()
    assert pictures[0, 1].get_title() == "1"
    colour = torch.randn(4, 3, 5, 5)
    image = plot_atoms(colour)[0, 0].images[0].get_array()
    assert image.shape == (5, 5, 3) and 0 <= image.min() and image.max() <= 1
    back = (torch.as_tensor(np.array(image)) - 0.5) * 2 * colour[0].abs().max()
    torch.testing.assert_close(back.permute(2, 0, 1), colour[0], atol=1e-5, rtol=0)
    assert plot_atoms(torch.zeros(2, 1, 3, 3)).shape == (1, 2)


def test_losses_are_drawn_where_they_belong() -> None:
    steps = [10.0, 4.0, 3.0, 2.0, 1.0, float("nan"), 1.0, 1.0]
    ax = plot_loss(History(step_loss=steps, epoch_loss=[5.0, 1.0], validation_loss=[3.0, 1.5]))
    assert [line.get_label() for line in ax.lines] == ["step", "mean of epoch", "validation"]
    assert ax.lines[1].get_xdata().tolist() == [2, 6]
    assert ax.lines[2].get_xdata().tolist() == [4, 8]
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), steps)


def test_errors() -> None:
    smooth = Calibration.from_draws(torch.randn(9, 1), torch.randn(5, 9, 1))
    with pytest.raises(ValueError, match="atom at zero"):
        plot_rank_ecdf(smooth, active=True)
    with pytest.raises(ValueError, match="two ranks"):
        plot_rank_ecdf(Calibration.from_draws(torch.randn(1, 1), torch.randn(5, 1, 1)))
    with pytest.raises(ValueError, match="one k-hat for each datum"):
        plot_khat(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="image_shape"):
        plot_atoms(torch.eye(6), image_shape=(2, 2))
    with pytest.raises(ValueError, match="one or three channels"):
        plot_atoms(torch.ones(6, 2, 3, 3))
    with pytest.raises(ValueError, match="6 titles"):
        plot_atoms(torch.eye(6), titles=["a"])
    with pytest.raises(ValueError, match="6 axes"):
        plot_atoms(torch.eye(6), axes=plt.subplots()[1])
    with pytest.raises(TypeError, match="history"):
        plot_loss([1.0, 2.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one step"):
        plot_loss(History())
