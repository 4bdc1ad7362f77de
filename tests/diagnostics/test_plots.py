"""Pictures show the numbers they are made of."""

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba

from pyro_sparse.diagnostics import (
    Calibration,
    CodeSummary,
    plot_atoms,
    plot_codes,
    plot_events,
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


def summary(**quantiles: float) -> CodeSummary:
    """Two data, three atoms."""
    mean = np.array([[1.0, -2.0, 0.1], [0.0, 3.0, 0.5]])
    prob = np.array([[1.0, 0.6, 0.02], [0.1, 0.9, 0.3]])
    levels = {float(level[1:]) / 100: mean + shift for level, shift in quantiles.items()}
    return CodeSummary(mean, np.full((2, 3), 0.25), prob, levels)


def bars(ax: Any) -> Any:
    return np.array([path.vertices[:, 1] for path in ax.collections[0].get_paths()])


def test_codes_show_interval_probability_and_truth() -> None:
    truth = torch.tensor([1.1, 0.0, 0.0])
    ax = plot_codes(summary(q5=-0.5, q50=0.0, q95=0.7), truth=truth)
    np.testing.assert_allclose(bars(ax), [[0.5, 1.7], [-2.5, -1.3], [-0.4, 0.8]])
    marks, actual = ax.collections[1], ax.collections[-1]
    np.testing.assert_allclose(marks.get_offsets(), [[0, 1.0], [1, -2.0], [2, 0.1]])
    opacity = marks.get_facecolors()[:, 3]
    assert opacity[0] == 1.0 and opacity[0] > opacity[1] > opacity[2] > 0
    np.testing.assert_allclose(actual.get_offsets(), [[0, 1.1]])  # zeros are not drawn
    assert "5% to 95%" in ax.get_legend().get_texts()[0].get_text()
    # Without quantiles one standard deviation; the most probable of a datum, in their order.
    few = plot_codes(summary(), 1, top=2, names=["a", "b", "c"])
    np.testing.assert_allclose(bars(few), [[2.75, 3.25], [0.25, 0.75]])
    assert [label.get_text() for label in few.get_xticklabels()] == ["b", "c"]
    assert few.get_xlabel() == "atom (2 of 3)"
    # A true code is drawn however improbable.
    both = plot_codes(summary(), 1, top=1, truth=truth)
    assert [label.get_text() for label in both.get_xticklabels()] == ["0", "1"]


def test_events_are_as_high_as_they_are_probable() -> None:
    prob = torch.zeros(3, 50)
    prob[0, 10], prob[2, 40], prob[1, 5] = 1.0, 0.5, 0.001
    truth = prob > 0.4
    axes = [
        plot_events(prob, truth=truth, interval=0.1, start=2.0, unit="s", row="trial"),
        plot_events(prob, truth=[[3.0], [], [6.0]], interval=0.1, start=2.0, unit="s"),
    ]
    for ax in axes:
        marks, actual = ax.collections[0], ax.collections[-1]
        found = np.array([path.vertices for path in marks.get_paths()])
        np.testing.assert_allclose(found[:, 0, 0], [3.0, 6.0])  # the faintest is left out
        np.testing.assert_allclose(found[:, 1, 1] - found[:, 0, 1], [0.8, 0.4])
        assert marks.get_colors()[0, 3] == 1.0 > marks.get_colors()[1, 3]
        np.testing.assert_allclose(actual.get_offsets()[:, 0], [3.0, 6.0])
        low, high = ax.get_ylim()
        assert low > high  # the first row is on top
    assert (axes[0].get_xlabel(), axes[0].get_ylabel()) == ("time (s)", "trial")
    assert len(plot_events(prob, least=0.0).collections[0].get_paths()) == 3
    assert len(plot_events(torch.zeros(40, 9)).get_yticks()) == 14


def test_errors_of_codes_and_events() -> None:
    with pytest.raises(TypeError, match="summarise_codes returns"):
        plot_codes(torch.zeros(3))  # type: ignore[arg-type]
    many = np.zeros((2, 3, 4))
    with pytest.raises(ValueError, match="plot_events"):
        plot_codes(CodeSummary(many, many, many, {}))
    with pytest.raises(ValueError, match="one of 2 data"):
        plot_codes(summary(), 2)
    with pytest.raises(ValueError, match=r"truth\[index\]"):
        plot_codes(summary(), truth=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="3 names"):
        plot_codes(summary(), names=["a"])
    with pytest.raises(ValueError, match="top >= 1"):
        plot_codes(summary(), top=0)
    with pytest.raises(ValueError, match=r"prob\[None\]"):
        plot_events(torch.zeros(9))
    with pytest.raises(ValueError, match="prob_active, not codes"):
        plot_events(torch.full((2, 9), 1.5))
    with pytest.raises(ValueError, match="booleans of shape"):
        plot_events(torch.zeros(2, 9), truth=torch.zeros(2, 9))
    with pytest.raises(TypeError, match="list of the times"):
        plot_events(torch.zeros(2, 9), truth=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="each of 2 rows"):
        plot_events(torch.zeros(2, 9), truth=[[1.0]])
    with pytest.raises(ValueError, match="2 names of rows"):
        plot_events(torch.zeros(2, 9), rows=["a"])
    with pytest.raises(ValueError, match="interval"):
        plot_events(torch.zeros(2, 9), interval=0.0)
