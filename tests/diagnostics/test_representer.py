"""Training data that explain atoms and reconstructions."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from pyro_sparse.diagnostics import Representer, plot_representer
from pyro_sparse.dictionaries import Conv, Dense
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.solvers import solve


def problem(n: int = 40, atoms: int = 12, features: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Data, sparse codes of theirs, and codes of new data."""
    codes = torch.randn(n + 5, atoms).double() * (torch.rand(n + 5, atoms) < 0.4)
    return torch.randn(n, features).double(), codes[:n], codes[n:]


def brute_force(codes: Tensor, new: Tensor, ridge: float) -> np.ndarray:
    """As published, with a matrix of the size of the training set: ``(Z Z^T + rho I)^-1 Z z``."""
    z = codes.numpy()
    return np.linalg.solve(z @ z.T + ridge * np.eye(len(z)), z @ new.numpy().T).T


# Exact algebra, with matrices whose condition is below 1e3 (n < atoms: 1e4): rtol 1e-10.
@pytest.mark.parametrize("ridge", [0.05, 3.0])
@pytest.mark.parametrize("n", [40, 7], ids=["more data", "more atoms"])
@pytest.mark.parametrize("chunk_size", [None, 1, 6])
def test_weights_are_the_published_ones(ridge: float, n: int, chunk_size: int | None) -> None:
    data, codes, new = problem(n)
    found = Representer(data, codes, ridge, chunk_size=chunk_size)
    expected = brute_force(codes, new, ridge)
    np.testing.assert_allclose(found.weights(new), expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.reconstruct(new), expected @ data.numpy(), atol=1e-11)
    np.testing.assert_allclose(found.similarity(new), new.numpy() @ codes.numpy().T, atol=1e-13)


def test_atoms_are_weighted_sums_of_training_data_of_any_shape() -> None:
    data, codes, _ = problem()
    found = Representer(data.reshape(40, 1, 3, 3), codes, 0.1)
    of_atoms = found.weights(torch.eye(12).double())  # (atoms, n)
    torch.testing.assert_close(torch.einsum("kn,nf->kf", of_atoms, data), found.atoms.flatten(1))
    assert found.atoms.shape == (12, 1, 3, 3)
    assert found.reconstruct(codes[:2]).shape == (2, 1, 3, 3)


def test_a_ridge_of_each_atom_minimises_its_objective() -> None:
    """Against a least-squares solver on stacked equations."""
    data, codes, _ = problem()
    ridge = torch.rand(12).double() + 0.1
    stacked = np.vstack([codes.numpy(), np.diag(ridge.sqrt().numpy())])
    right = np.vstack([data.numpy(), np.zeros((12, 9))])
    expected = np.linalg.lstsq(stacked, right, rcond=None)[0]
    np.testing.assert_allclose(Representer(data, codes, ridge).atoms, expected, atol=1e-11)


@pytest.mark.parametrize("chunk_size", [None, 1, 7, 100])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_the_top_ones_are_those_of_all_weights(count: int, chunk_size: int | None) -> None:
    data, codes, new = problem()
    found = Representer(data, codes, 0.2, chunk_size=chunk_size)
    top, weights = found.top(new, count), found.weights(new)
    order = np.argsort(-weights.abs().numpy(), axis=1)[:, :count]
    np.testing.assert_array_equal(top.rows, order)
    torch.testing.assert_close(top.weight, weights.gather(1, top.rows), rtol=1e-12, atol=0)
    assert (top.weight < 0).any() or count == 1


def test_the_ridge_solution_is_stationary_and_others_are_not() -> None:
    data, codes, _ = problem()
    found = Representer(data, codes, 0.3)
    exact = found.stationarity(found.atoms)
    assert max(exact.distance, exact.gradient, exact.reconstruction) < 1e-14
    torch.testing.assert_close(exact.cosine, torch.ones(12).double())
    other = found.atoms.clone()
    other[3] *= 2.0
    away = found.stationarity(other)
    assert away.distance == pytest.approx(float(found.atoms[3].norm() / other.norm()))
    expected = torch.zeros(12).double()
    expected[3] = 0.5
    torch.testing.assert_close(away.of_atom, expected)
    torch.testing.assert_close(away.cosine, torch.ones(12).double())
    slope = codes.T @ (data - codes @ other) - 0.3 * other
    assert away.gradient == pytest.approx(float(slope.norm() / (codes.T @ data).norm()))
    change = codes @ (other - found.atoms)
    assert away.reconstruction == pytest.approx(float(change.norm() / (codes @ other).norm()))


def test_an_atom_that_nothing_uses_is_explained_by_nothing() -> None:
    data, codes, _ = problem()
    codes[:, 2] = 0.0
    found = Representer(data, codes, 0.3)
    assert (found.atoms[2] == 0).all()
    away = found.stationarity(torch.ones(12, 9).double())
    assert away.of_atom[2] == 1
    assert away.cosine.isnan().tolist() == [k == 2 for k in range(12)]


def test_unit_norm_atoms_at_a_minimum_have_their_representer_form() -> None:
    """Alternating minimisation to a fixed point, then no ridge is chosen, and none is left over."""
    data, _, _ = problem(60)
    atoms = torch.nn.functional.normalize(torch.randn(12, 9).double(), dim=1)
    prior, sigma, rate = dist.Laplace(0.0, 0.5), 0.7, 2.0
    for _ in range(400):
        dictionary = Dense(12, 9, atoms=atoms)
        codes = solve(data, dictionary, prior, likelihood=Gaussian(sigma), tol=1e-13).codes
        for k in range(12):  # each atom in turn, exactly
            rest = data - codes @ atoms + codes[:, k : k + 1] * atoms[k]
            atoms[k] = torch.nn.functional.normalize(codes[:, k] @ rest, dim=0)
    found = Representer.of_unit_norm(data, codes, atoms)
    away = found.stationarity(Dense(12, 9, atoms=atoms))
    assert max(away.distance, away.reconstruction) < 1e-4
    # The multipliers are what the prior shrinks.
    expected = rate * sigma**2 * codes.abs().sum(0)
    torch.testing.assert_close(found.ridge, expected, rtol=1e-4, atol=0)
    assert Representer(data, codes, 1e-3).stationarity(atoms).reconstruction > 0.1


def test_unit_norm_with_an_atom_that_nothing_uses() -> None:
    data, codes, _ = problem()
    codes, atoms = 0.1 * codes, torch.nn.functional.normalize(torch.randn(12, 9).double(), dim=1)
    codes[:, 2] = 0.0
    codes, atoms = codes[:, [2]], atoms[[2]]
    found = Representer.of_unit_norm(data, codes, atoms)
    assert (found.atoms == 0).all()
    assert (found.weights(torch.ones(1, 1).double()) == 0).all()


def test_single_precision_loses_no_more_than_its_rounding() -> None:
    data, codes, new = problem()
    wide = Representer(data.float().double(), codes.float().double(), 1e-3)
    narrow = Representer(data.float(), codes.float(), 1e-3)
    found, expected = narrow.weights(new.float()), wide.weights(new.float().double())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-7)


def test_nothing_needs_a_matrix_of_the_size_of_the_training_set() -> None:
    """200,000 data: their weights on each other would take 320 GB."""
    codes = torch.zeros(200_000, 8)
    codes[:, 0] = torch.linspace(0.1, 1.0, 200_000)
    data = codes[:, :2] * 2.0
    found = Representer(data, codes, 1e-3)
    top = found.top(codes[-1:], 3)
    assert top.rows.tolist() == [[199_999, 199_998, 199_997]]
    torch.testing.assert_close(found.reconstruct(codes[-1:]), data[-1:], rtol=1e-6, atol=0)


GOOD = {"data": torch.zeros(4, 3), "codes": torch.ones(4, 2), "ridge": 1.0}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"codes": torch.ones(4, 2, 7)}, NotImplementedError, r"dense.*got \(4, 2, 7\).*patches"),
        ({"codes": torch.ones(4)}, ValueError, r"codes of shape \(n, atoms\), got \(4,\)"),
        ({"codes": [[1.0]]}, TypeError, "codes to be a floating tensor, got list"),
        ({"data": torch.zeros(5, 3)}, ValueError, r"n = 4 as of the codes, got \(5, 3\)"),
        ({"data": torch.zeros(4, 3).double()}, TypeError, "data of dtype torch.float32"),
        ({"data": torch.full((4, 3), torch.nan)}, ValueError, "finite data and codes"),
        ({"ridge": 0.0}, ValueError, r"ridge in \(0"),
        ({"ridge": -1.0}, ValueError, r"ridge in \(0"),
        ({"ridge": torch.ones(3)}, ValueError, r"\(atoms,\) = \(2,\), got \(3,\)"),
        ({"ridge": torch.tensor([1.0, 0.0])}, ValueError, "ridge > 0, got 0.0"),
        ({"ridge": 1e-30}, ValueError, "positive definite, got 1e-30 .*Try"),
        ({"chunk_size": 0}, ValueError, "chunk_size >= 1, got 0"),
    ],
)
def test_arguments_are_refused(change: dict, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        Representer(**{**GOOD, **change})


def test_calls_are_refused() -> None:
    found = Representer(**GOOD)
    with pytest.raises(ValueError, match=r"codes of shape \(m, 2\), got \(2,\).*codes\[None\]"):
        found.weights(torch.ones(2))
    with pytest.raises(ValueError, match="count <= 4 training data, got 5"):
        found.top(torch.ones(1, 2), 5)
    with pytest.raises(NotImplementedError, match="dense dictionary.*have positions"):
        found.stationarity(Conv(2, 1, 3))
    with pytest.raises(ValueError, match=r"\(atoms, \*signal_shape\) = \(2, 3\), got \(3, 2\)"):
        found.stationarity(torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"codes that shrink.*ridge=1e-3"):
        Representer.of_unit_norm(torch.zeros(4, 3), torch.ones(4, 2), torch.eye(3)[:2])


# Picture ------------------------------------------------------------------------------------------


def test_the_picture_shows_the_top_ones_and_their_weights() -> None:
    data, codes, new = problem()
    found = Representer(data, codes, 0.2)
    classes = [n % 7 for n in range(40)]
    axes = plot_representer(
        found, new, y=found.reconstruct(new), count=4, image_shape=(3, 3), names=classes
    )
    top = found.top(new, 4)
    assert axes.shape == (5, 6)
    for row in range(5):
        np.testing.assert_allclose(
            axes[row, 1].images[0].get_array(), found.reconstruct(new)[row].reshape(3, 3)
        )
        for column in range(4):
            n, weight = int(top.rows[row, column]), float(top.weight[row, column])
            axis = axes[row, 2 + column]
            np.testing.assert_array_equal(axis.images[0].get_array(), data[n].reshape(3, 3))
            assert axis.get_title() == f"{weight:+.2g}  ({n % 7})"
    plt.close(axes[0, 0].figure)


def test_the_picture_is_drawn_where_it_is_told() -> None:
    found = Representer(torch.rand(4, 1, 3, 2), torch.rand(4, 2), 1.0)
    figure, given = plt.subplots(1, 3, squeeze=False)
    assert (plot_representer(found, torch.ones(1, 2), count=2, axes=given) == given).all()
    assert given[0, 0].images[0].get_array().shape == (3, 2)
    plt.close(figure)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"image_shape": (2, 2)}, r"image_shape \(height, width\) of 6 numbers, got \(2, 2\)"),
        ({"image_shape": None}, r"images of shape .*got data of \(6,\)"),
        ({"names": [1, 2]}, "4 names, of the training data, got 2"),
        ({"y": torch.ones(1, 5)}, r"y of shape \(1, 6\), got \(1, 5\)"),
        ({"axes": np.empty((2, 2), dtype=object)}, r"axes of shape \(1, 3\), got \(2, 2\)"),
    ],
)
def test_a_picture_is_refused(change: dict, match: str) -> None:
    found = Representer(torch.rand(4, 6), torch.rand(4, 2), 1.0)
    with pytest.raises(ValueError, match=match):
        plot_representer(found, torch.ones(1, 2), **{"count": 2, "image_shape": (3, 2), **change})
