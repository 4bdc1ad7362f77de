"""Matching learned atoms to true ones."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_sparse.diagnostics import match_atoms

SHAPES = {"dense": (7, 12), "conv1d": (5, 2, 9), "conv2d": (4, 1, 5, 6), "conv3d": (3, 2, 3, 4, 3)}


def roll_free(atoms: Tensor, shift: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """Atoms placed in a larger window of zeros, ``shift`` samples from its beginning."""
    window = atoms.new_zeros(*atoms.shape[:2], *size)
    index = tuple(slice(s, s + n) for s, n in zip(shift, atoms.shape[2:]))
    window[(..., *index)] = atoms
    return window


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sign_order_and_scale_do_not_matter(shape: tuple, dtype: torch.dtype) -> None:
    truth = torch.randn(shape, dtype=dtype)
    order = torch.randperm(len(truth))
    sign = torch.where(torch.rand(len(truth)) < 0.5, -1.0, 1.0)
    scale = torch.rand(len(truth)) + 0.1
    learned = torch.empty_like(truth)
    learned[order] = (sign * scale).reshape(-1, *[1] * (truth.dim() - 1)) * truth
    found = match_atoms(learned, truth)
    torch.testing.assert_close(found.correlation, torch.ones(len(truth)), rtol=1e-6, atol=0)
    assert torch.equal(found.match, order)
    assert torch.equal(found.sign.float(), sign)
    assert found.shift.shape == (len(truth), truth.dim() - 2)
    assert (found.shift == 0).all()


@pytest.mark.parametrize(
    "shifts",
    [
        [(0,), (3,), (5,)],
        [(0, 0), (4, 1), (2, 3)],
        [(0, 0, 1), (1, 2, 0), (2, 1, 2)],
    ],
    ids=["1d", "2d", "3d"],
)
def test_known_shifts_are_found(shifts: list[tuple[int, ...]]) -> None:
    dims = len(shifts[0])
    truth = torch.randn(3, 2, *(5, 4, 3)[:dims])
    size = tuple(n + 5 for n in truth.shape[2:])
    learned = torch.cat([-roll_free(truth[i : i + 1], s, size) for i, s in enumerate(shifts)])
    found = match_atoms(learned, truth)
    torch.testing.assert_close(found.correlation, torch.ones(3))
    assert found.match.tolist() == [0, 1, 2]
    assert found.sign.tolist() == [-1, -1, -1]
    assert found.shift.tolist() == [list(s) for s in shifts]
    # And the other way round: the truth then lies later by as much, the learned atom earlier.
    back = match_atoms(truth, learned)
    torch.testing.assert_close(back.correlation, torch.ones(3))
    assert back.shift.tolist() == [[-n for n in s] for s in shifts]


@pytest.mark.parametrize("shift", [-6, -1, 0, 1, 6])
def test_an_atom_that_slid_within_its_window(shift: int) -> None:
    pulse = torch.randn(1, 1, 4)
    truth = roll_free(pulse, (7,), (18,))
    found = match_atoms(roll_free(pulse, (7 + shift,), (18,)), truth)
    assert found.correlation.item() == pytest.approx(1.0)
    assert found.shift.tolist() == [[shift]]


def test_correlation_is_that_of_the_definition_at_the_best_lag() -> None:
    learned = torch.randn(1, 2, 6, dtype=torch.float64)
    truth = torch.randn(1, 2, 8, dtype=torch.float64)
    # Lag k: the learned atom's sample i + k meets the truth's sample i; sum over both channels.
    lags = {
        k: sum(
            learned[0, c, i + k] * truth[0, c, i]
            for c in range(2)
            for i in range(8)
            if 0 <= i + k < 6
        ).item()
        for k in range(-7, 6)
    }
    best = max(lags, key=lambda k: abs(lags[k]))
    found = match_atoms(learned, truth)
    lengths = (learned.norm() * truth.norm()).item()
    assert found.correlation.item() == pytest.approx(abs(lags[best]) / lengths, rel=1e-6)
    assert found.sign.item() == np.sign(lags[best])
    assert found.shift.tolist() == [[best]]


def test_the_matching_is_the_best_of_all() -> None:
    learned, truth = torch.randn(5, 3), torch.randn(5, 3)
    unit = [a / a.norm(dim=1, keepdim=True) for a in (truth, learned)]
    table = (unit[0] @ unit[1].T).abs().numpy()
    best = max(
        sum(table[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(5))
    )
    found = match_atoms(learned, truth)
    assert found.correlation.sum().item() == pytest.approx(best, rel=1e-5)
    assert sorted(found.match.tolist()) == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(found.correlation, table[range(5), found.match], rtol=1e-5)


def test_one_learned_atom_serves_one_true_atom() -> None:
    atom = torch.randn(1, 8)
    near = torch.cat([atom, atom + 1e-3 * torch.randn(1, 8)])
    found = match_atoms(torch.cat([atom, torch.randn(1, 8)]), near)
    assert sorted(found.match.tolist()) == [0, 1]
    assert found.correlation.max() > 0.999
    assert found.correlation.min() < 0.999


@pytest.mark.parametrize("shape", [(6, 12), (6, 1, 12)], ids=["dense", "conv1d"])
def test_spare_learned_atoms_are_left_over(shape: tuple) -> None:
    learned = torch.randn(shape)
    found = match_atoms(learned, learned[[4, 1]])
    assert found.match.tolist() == [4, 1]
    torch.testing.assert_close(found.correlation, torch.ones(2))


@pytest.mark.parametrize("shape", [(6, 12), (6, 1, 12)], ids=["dense", "conv1d"])
def test_true_atoms_without_a_match_say_so(shape: tuple) -> None:
    truth = torch.randn(shape)
    found = match_atoms(truth[[4, 1]], truth)
    assert found.match.tolist() == [-1, 1, -1, -1, 0, -1]
    torch.testing.assert_close(found.correlation, torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 0.0]))
    assert found.sign.tolist() == [0, 1, 0, 0, 1, 0]


def test_unrelated_atoms_do_not_match_well() -> None:
    found = match_atoms(torch.randn(5, 400), torch.randn(5, 400))
    assert found.correlation.max() < 0.25  # five standard deviations of a chance correlation


def test_a_dead_atom_correlates_with_nothing() -> None:
    truth = torch.randn(3, 8)
    learned = truth.clone()
    learned[1] = 0.0
    found = match_atoms(learned, truth)
    torch.testing.assert_close(found.correlation, torch.tensor([1.0, 0.0, 1.0]))


def test_parameters_are_taken_without_their_gradient() -> None:
    atoms = torch.randn(3, 8, requires_grad=True)
    found = match_atoms(atoms, atoms)
    assert not any(tensor.requires_grad for tensor in found)


@pytest.mark.parametrize(
    ("learned", "truth"),
    [
        ((3, 8), (3, 9)),
        ((3, 8), (3, 1, 8)),
        ((3, 2, 8), (3, 1, 8)),
        ((8,), (8,)),
    ],
)
def test_shapes_that_cannot_be_compared_are_refused(learned: tuple, truth: tuple) -> None:
    with pytest.raises(ValueError, match=r"equal channels, got \(") as error:
        match_atoms(torch.randn(learned), torch.randn(truth))
    assert str(learned) in str(error.value) and str(truth) in str(error.value)
