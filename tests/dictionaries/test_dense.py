"""Dense dictionaries: adjoint, spectral bound, unit norm; and what every dictionary shares."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyro_sparse.dictionaries import Conv, Dense, DenseMap, Dictionary
from tests.linear_maps import (
    ADJOINT_TOLERANCE,
    BATCHES,
    adjoint_error,
    materialise,
    squared_spectral_norm,
)

batches = pytest.mark.parametrize("batch", BATCHES, ids=str)

# Both kinds of dictionary share the handling of atoms: six atoms of 3 * 5 = 15 values.
MAKERS: dict[str, Callable[..., Dictionary]] = {
    "dense": lambda **kwargs: Dense(6, 15, **kwargs),
    "conv": lambda **kwargs: Conv(6, 3, 5, **kwargs),
}
SHAPES = {"dense": (6, 15), "conv": (6, 3, 5)}
kinds = pytest.mark.parametrize("kind", MAKERS)


def lengths(dictionary: Dictionary) -> Tensor:
    return torch.linalg.vector_norm(dictionary.atoms.detach().flatten(1), dim=1)


# --- the linear map -------------------------------------------------------------------------------


@batches
@pytest.mark.parametrize("sizes", [(7, 5), (4, 9), (1, 3), (3, 1)], ids=str)
def test_adjoint(
    sizes: tuple[int, int], batch: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    atoms, features = sizes
    dictionary = Dense(atoms, features).to(device, dtype)
    codes = torch.randn(*batch, atoms, dtype=dtype, device=device)
    signal = torch.randn(*batch, features, dtype=dtype, device=device)
    error = adjoint_error(dictionary, dictionary.adjoint, codes, signal)
    assert error <= ADJOINT_TOLERANCE[dtype]


@batches
def test_predictor_is_the_weighted_sum_of_atoms(
    batch: tuple[int, ...], device: torch.device
) -> None:
    dictionary = Dense(4, 3).to(device, torch.float64)
    codes = torch.randn(*batch, 4, dtype=torch.float64, device=device)
    expected = np.einsum("...k,kf->...f", codes.cpu(), dictionary.atoms.detach().cpu())
    np.testing.assert_allclose(dictionary(codes).detach().cpu(), expected, rtol=1e-13, atol=1e-14)


@batches
def test_code_shape_is_that_of_the_adjoint(batch: tuple[int, ...]) -> None:
    dictionary = Dense(4, 3)
    signal = torch.randn(*batch, 3)
    assert dictionary.code_shape(signal.shape) == dictionary.adjoint(signal).shape == (*batch, 4)
    assert (dictionary.signal_shape, dictionary.code_dims, dictionary.signal_dims) == ((3,), 1, 1)


@pytest.mark.parametrize("atoms_batch", [(2,), (3, 1), (3, 2)], ids=str)
def test_atoms_with_a_batch_are_one_dictionary_for_each_index(
    atoms_batch: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    atoms = torch.randn(*atoms_batch, 4, 5, dtype=dtype, device=device)
    codes = torch.randn(3, 2, 4, dtype=dtype, device=device)
    signal = torch.randn(3, 2, 5, dtype=dtype, device=device)
    bound_map = DenseMap(atoms)
    error = adjoint_error(bound_map.forward, bound_map.adjoint, codes, signal)
    assert error <= ADJOINT_TOLERANCE[dtype]
    each = atoms.expand(3, 2, 4, 5)
    singly = torch.stack([codes[i, j] @ each[i, j] for i in range(3) for j in range(2)])
    torch.testing.assert_close(bound_map.forward(codes).reshape(6, 5), singly)


def test_bound_atoms_take_the_place_of_the_modules_own() -> None:
    dictionary = Dense(4, 5)
    atoms = 3 * torch.randn(4, 5)
    codes = torch.randn(2, 4)
    torch.testing.assert_close(dictionary.bind(atoms).forward(codes), codes @ atoms)
    assert not torch.equal(dictionary(codes), codes @ atoms)


def test_double_is_the_same_map_in_float64() -> None:
    bound_map = Dense(4, 5).bind()
    codes = torch.randn(3, 4)
    widened = bound_map.double().forward(codes.double())
    assert widened.dtype == torch.float64
    torch.testing.assert_close(widened, bound_map.forward(codes).double(), rtol=1e-5, atol=1e-6)


# --- squared_norm ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(30, 10), (10, 30), (20, 20), (1, 6), (6, 1)], ids=str)
def test_squared_norm_is_above_and_near_the_truth(
    sizes: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    rounding = 8 * max(sizes) * torch.finfo(dtype).eps
    for unit_norm in (True, False):
        dictionary = Dense(*sizes, unit_norm=unit_norm).to(device, dtype)
        truth = squared_spectral_norm(materialise(dictionary, (sizes[0],), dictionary.atoms))
        bound = dictionary.squared_norm()
        assert bound.shape == () and not bound.requires_grad
        assert truth * (1 - rounding) <= bound.item() <= 1.1 * truth * (1 + rounding)


def test_squared_norm_of_equal_atoms() -> None:
    # Rank one: all atoms together, squared norm K.
    dictionary = Dense(8, 5, atoms=torch.ones(8, 5))
    assert 8 * (1 - 1e-5) <= dictionary.squared_norm().item() <= 8.8


@pytest.mark.parametrize("sizes", [(4, 7), (7, 4)], ids=str)
def test_squared_norm_of_a_batch_is_one_for_each(sizes: tuple[int, int]) -> None:
    atoms = torch.randn(3, 2, *sizes, dtype=torch.float64) * torch.logspace(-2, 2, 2)[:, None, None]
    truth = np.linalg.svd(atoms.numpy(), compute_uv=False)[..., 0] ** 2
    bound = DenseMap(atoms).squared_norm().numpy()
    assert bound.shape == (3, 2)
    assert (bound >= truth * (1 - 1e-12)).all()
    assert (bound <= truth * 1.1 * (1 + 1e-12)).all()


@kinds
def test_squared_norm_follows_atoms_that_an_optimiser_moves(kind: str) -> None:
    dictionary = MAKERS[kind]()
    shape = {"dense": (15,), "conv": (3, 20)}[kind]
    codes = torch.rand(dictionary.code_shape(shape))
    optimiser = torch.optim.Adam(dictionary.parameters(), lr=0.1)
    before = dictionary.squared_norm(shape).item()
    for _ in range(30):  # aligns the atoms: their joint norm rises towards K
        optimiser.zero_grad()
        (-dictionary(codes).square().sum()).backward()
        optimiser.step()
        truth = squared_spectral_norm(materialise(dictionary, codes.shape, codes))
        assert dictionary.squared_norm(shape).item() >= truth * (1 - 1e-5)
    assert dictionary.squared_norm(shape).item() > 1.3 * before


# --- atoms ----------------------------------------------------------------------------------------


@kinds
def test_optimiser_steps_leave_unit_norms_and_move_directions(
    kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    dictionary = MAKERS[kind]().to(device, dtype)
    start = dictionary.atoms.detach().clone()
    target = torch.randn_like(start)
    optimiser = torch.optim.Adam(dictionary.parameters(), lr=1.0)
    for _ in range(100):
        optimiser.zero_grad()
        (dictionary.atoms - target).pow(4).sum().backward()
        optimiser.step()
        torch.testing.assert_close(
            lengths(dictionary).double().cpu(), torch.ones(6).double(), rtol=0, atol=1e-6
        )
    assert (dictionary.atoms - start).norm() > 0.5


@kinds
def test_gradient_is_tangent_to_the_sphere(kind: str) -> None:
    dictionary = MAKERS[kind]().double()
    (dictionary.atoms * torch.randn_like(dictionary.atoms)).sum().backward()
    (parameter,) = dictionary.parameters()
    radial = (parameter.grad * dictionary.atoms).flatten(1).sum(1)
    assert (radial.abs() <= 1e-14 * parameter.grad.flatten(1).norm(dim=1)).all()
    assert (parameter.grad.flatten(1).norm(dim=1) > 1e-3).all()


@kinds
def test_gradient_through_the_normalisation(kind: str) -> None:
    dictionary = MAKERS[kind]().double()
    parametrisation = dictionary.parametrizations.atoms[0]
    raw = torch.randn(SHAPES[kind], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(parametrisation, (raw,))


@kinds
def test_atoms_given_to_the_constructor_are_normalised(kind: str) -> None:
    atoms = 7 * torch.randn(SHAPES[kind])
    kept = atoms.clone()
    dictionary = MAKERS[kind](atoms=atoms)
    expected = atoms.flatten(1).numpy() / np.linalg.norm(atoms.flatten(1).numpy(), axis=1)[:, None]
    np.testing.assert_allclose(dictionary.atoms.detach().flatten(1), expected, rtol=1e-6)
    dictionary.init_atoms_(-atoms)
    assert torch.equal(atoms, kept)  # the caller's tensor is not touched


@kinds
@pytest.mark.parametrize("how", ["init_atoms_", "assignment"])
def test_atoms_set_later_are_normalised(kind: str, how: str) -> None:
    dictionary = MAKERS[kind]()
    atoms = 7 * torch.randn(SHAPES[kind])
    {
        "init_atoms_": lambda: dictionary.init_atoms_(atoms),
        "assignment": lambda: setattr(dictionary, "atoms", atoms),
    }[how]()
    torch.testing.assert_close(lengths(dictionary), torch.ones(6))
    cosine = nn.functional.cosine_similarity(dictionary.atoms.flatten(1), atoms.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(6))
    (parameter,) = dictionary.parameters()
    assert parameter.requires_grad
    # Stored at unit length too: the effective step of an optimiser does not depend on the scale.
    torch.testing.assert_close(parameter, dictionary.atoms)


@kinds
def test_init_atoms_keeps_the_dictionarys_dtype_and_parameter(kind: str) -> None:
    dictionary = MAKERS[kind]()
    (before,) = dictionary.parameters()
    dictionary.init_atoms_(torch.randn(SHAPES[kind], dtype=torch.float64))
    (after,) = dictionary.parameters()
    assert after is before  # an optimiser that holds it goes on
    assert dictionary.atoms.dtype == torch.float32


@kinds
def test_without_unit_norm_the_scale_is_left(kind: str) -> None:
    atoms = 7 * torch.randn(SHAPES[kind])
    dictionary = MAKERS[kind](atoms=atoms, unit_norm=False)
    assert torch.equal(dictionary.atoms, atoms)
    (before,) = dictionary.parameters()
    dictionary.init_atoms_(0.5 * atoms)
    assert torch.equal(dictionary.atoms, 0.5 * atoms)
    (after,) = dictionary.parameters()
    assert after is before and after.requires_grad


@kinds
@pytest.mark.parametrize("unit_norm", [True, False])
def test_state_dict_round_trip(kind: str, unit_norm: bool) -> None:
    one, other = MAKERS[kind](unit_norm=unit_norm), MAKERS[kind](unit_norm=unit_norm)
    assert not torch.equal(one.atoms, other.atoms)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.atoms, other.atoms)


@kinds
def test_deepcopy_is_independent(kind: str) -> None:
    dictionary = MAKERS[kind]()
    before = dictionary.atoms.detach().clone()
    twin = copy.deepcopy(dictionary)
    assert torch.equal(twin.atoms, before)
    twin.init_atoms_(torch.randn(SHAPES[kind]))
    assert torch.equal(dictionary.atoms, before)
    assert not torch.equal(twin.atoms, before)
    torch.testing.assert_close(lengths(twin), torch.ones(6))


@kinds
def test_dtype_and_device_follow_the_module(kind: str, device: torch.device) -> None:
    dictionary = MAKERS[kind]()
    single = dictionary.atoms.detach().clone()
    dictionary = dictionary.double().to(device)
    atoms = dictionary.atoms
    assert (atoms.dtype, atoms.device.type) == (torch.float64, device.type)
    np.testing.assert_allclose(atoms.detach().cpu(), single, atol=1e-7)
    torch.testing.assert_close(lengths(dictionary).cpu(), torch.ones(6).double())
    bound = dictionary.squared_norm()
    assert (bound.dtype, bound.device.type) == (torch.float64, device.type)


@kinds
def test_atoms_are_the_only_parameter_and_get_a_gradient(kind: str) -> None:
    dictionary = MAKERS[kind]()
    shape = {"dense": (2, 15), "conv": (2, 3, 9)}[kind]
    dictionary(torch.randn(dictionary.code_shape(shape))).square().sum().backward()
    (parameter,) = dictionary.parameters()
    assert (parameter.grad.flatten(1).norm(dim=1) > 0).all()


@kinds
def test_random_atoms_follow_the_seed(kind: str) -> None:
    torch.manual_seed(3)
    one = MAKERS[kind]().atoms
    torch.manual_seed(3)
    assert torch.equal(one, MAKERS[kind]().atoms)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -3, 2.0, "4", None], ids=repr)
@pytest.mark.parametrize("name", ["num_atoms", "num_features"])
def test_sizes_must_be_positive_whole_numbers(name: str, value: object) -> None:
    sizes = {"num_atoms": 3, "num_features": 4, name: value}
    with pytest.raises(
        ValueError, match=rf"Expected {name} to be a whole number >= 1.*got {value}"
    ):
        Dense(**sizes)


def test_transposed_atoms_are_named() -> None:
    expected = r"\(atoms, features\) = \(6, 15\), got \(15, 6\)\. Atoms come first: transpose"
    with pytest.raises(ValueError, match=expected):
        Dense(6, 15, atoms=torch.randn(15, 6))


@kinds
def test_init_atoms_refuses_another_shape(kind: str) -> None:
    dictionary = MAKERS[kind]()
    before = dictionary.atoms.detach().clone()
    with pytest.raises(ValueError, match=r"Expected atoms of shape \(6, .*got \(5, 15\)"):
        dictionary.init_atoms_(torch.randn(5, 15))
    assert torch.equal(dictionary.atoms, before)


@kinds
@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_atoms_that_are_zero_or_not_finite_are_refused(
    kind: str, unit_norm: bool, value: float
) -> None:
    atoms = torch.randn(SHAPES[kind])
    atoms[2] = value
    atoms[4] = value
    match = r"finite, non-zero length, got length .* for atom 2 \(2 in all\)"
    with pytest.raises(ValueError, match=match):
        MAKERS[kind](atoms=atoms, unit_norm=unit_norm)
    dictionary = MAKERS[kind](unit_norm=unit_norm)
    before = dictionary.atoms.detach().clone()
    with pytest.raises(ValueError, match=match):
        dictionary.init_atoms_(atoms)
    assert torch.equal(dictionary.atoms, before)


@pytest.mark.parametrize("shape", [(), (4,), (15, 2)], ids=str)
def test_signal_of_another_width_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(\.\.\., 15\) \(features last\), got \("):
        Dense(6, 15).code_shape(shape)


def test_base_declares_and_does_nothing() -> None:
    with pytest.raises(NotImplementedError):
        Dictionary().bind()
    with pytest.raises(NotImplementedError):
        Dictionary().code_shape((3,))


def test_repr_names_the_sizes() -> None:
    assert "num_atoms=6, num_features=15" in repr(Dense(6, 15))


def test_assigning_a_zero_atom_is_refused() -> None:
    dictionary = Dense(3, 4)
    before = dictionary.atoms.detach().clone()
    with pytest.raises(ValueError, match="non-zero length.*atom 1"):
        dictionary.atoms = torch.tensor([[1.0] * 4, [0.0] * 4, [1.0] * 4])
    torch.testing.assert_close(dictionary.atoms.detach(), before, rtol=0, atol=0)


def test_sizes_may_be_numpy_integers_but_not_booleans() -> None:
    assert Dense(np.int64(3), np.int32(4)).atoms.shape == (3, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_atoms to be a whole number"):
        Dense(True, 4)


def test_sampled_atoms_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"atoms of shape \(\.\.\., 3, 4\), got \(4, 3\)"):
        Dense(3, 4).bind(torch.randn(4, 3))


def test_a_frozen_dictionary_has_no_parameters_and_keeps_its_state() -> None:
    dictionary = Dense(3, 4)
    atoms, names = dictionary.atoms.detach().clone(), set(dictionary.state_dict())
    dictionary.freeze_()
    assert list(dictionary.parameters()) == []
    assert set(dictionary.state_dict()) == names
    torch.testing.assert_close(dictionary.atoms, atoms, rtol=0, atol=0)
    assert dictionary.double().like.dtype == torch.float64
