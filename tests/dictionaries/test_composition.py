"""A dictionary behind a linear operator: adjoint, a norm that is safe, operators refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_sparse.dictionaries import (
    Composition,
    Conv,
    Dense,
    Dictionary,
    LinearOperator,
    operator_norm_bound,
)
from tests.linear_maps import (
    ADJOINT_TOLERANCE,
    BATCHES,
    BOUNDARIES,
    OPERATORS,
    adjoint_error,
    fitting_lengths,
    materialise,
    squared_spectral_norm,
)


def conv_case(
    name: str, kernel: tuple[int, ...], stride: tuple[int, ...], channels: int
) -> tuple[Callable[[], Dictionary], tuple[int, ...]]:
    def make() -> Dictionary:
        return Conv(3, channels, kernel, stride, boundary=BOUNDARIES[name][0])

    return make, (channels, *fitting_lengths(name, kernel, stride))


# Inner dictionary and the shape of one signal that it makes.
INNER: dict[str, tuple[Callable[[], Dictionary], tuple[int, ...]]] = {
    "dense": (lambda: Dense(7, 12), (12,)),
    **{
        f"{name} {len(kernel)}-D": conv_case(name, kernel, stride, channels)
        for name in BOUNDARIES
        for kernel, stride, channels in [
            ((5,), (2,), 1),
            ((3, 4), (1, 2), 3),
            ((2, 3, 3), (1, 2, 3), 1),
        ]
    },
}

inners = pytest.mark.parametrize("inner", INNER)
operators = pytest.mark.parametrize("operator", OPERATORS)


def compose(inner: str, operator: str, device: torch.device, dtype: torch.dtype) -> Composition:
    make, shape = INNER[inner]
    phi = OPERATORS[operator](shape).to(device, dtype)
    return Composition(phi, make().to(device, dtype), input_shape=shape)


def from_matrix(matrix: Tensor) -> LinearOperator:
    """An operator of two plain functions: no module, no base class."""
    return SimpleNamespace(forward=lambda x: x @ matrix.T, adjoint=lambda y: y @ matrix)


# --- the linear map -------------------------------------------------------------------------------


@inners
@operators
def test_adjoint(inner: str, operator: str, dtype: torch.dtype, device: torch.device) -> None:
    seen = compose(inner, operator, device, dtype)
    for batch in BATCHES:
        signal = torch.randn(*batch, *seen.signal_shape, dtype=dtype, device=device)
        shape = seen.code_shape(signal.shape)
        assert shape[: len(batch)] == batch
        codes = torch.randn(shape, dtype=dtype, device=device)
        assert adjoint_error(seen, seen.adjoint, codes, signal) <= ADJOINT_TOLERANCE[dtype]


@inners
@operators
def test_matrix_is_the_product_of_the_matrices(inner: str, operator: str) -> None:
    seen = compose(inner, operator, torch.device("cpu"), torch.float64)
    codes = seen.code_shape(seen.signal_shape)
    whole = materialise(seen, codes, seen.atoms)
    first = materialise(seen.dictionary, codes, seen.atoms)
    second = materialise(seen.operator.forward, INNER[inner][1], seen.atoms)
    np.testing.assert_allclose(whole, second @ first, rtol=0, atol=1e-12)


@operators
def test_composition_of_a_composition(operator: str, device: torch.device) -> None:
    inner = compose("dense", "sensing", device, torch.float64)
    phi = OPERATORS[operator](inner.signal_shape).to(device, torch.float64)
    seen = Composition(phi, inner, input_shape=inner.signal_shape)
    codes = torch.randn(3, 7, dtype=torch.float64, device=device)
    signal = torch.randn(3, *seen.signal_shape, dtype=torch.float64, device=device)
    assert adjoint_error(seen, seen.adjoint, codes, signal) <= 1e-12
    truth = squared_spectral_norm(materialise(seen, (7,), signal))
    assert seen.squared_norm().item() >= truth


def test_an_operator_needs_no_base_class() -> None:
    matrix = torch.randn(4, 12)
    seen = Composition(from_matrix(matrix), Dense(7, 12), input_shape=(12,))
    codes = torch.randn(2, 7)
    torch.testing.assert_close(seen(codes), codes @ seen.atoms @ matrix.T)
    assert (seen.signal_shape, seen.signal_dims, seen.code_dims) == ((4,), 1, 1)


# --- squared_norm ---------------------------------------------------------------------------------


@inners
@operators
def test_squared_norm_is_never_below_the_truth(
    inner: str, operator: str, dtype: torch.dtype, device: torch.device
) -> None:
    seen = compose(inner, operator, device, dtype)
    truth = squared_spectral_norm(materialise(seen, seen.code_shape(seen.signal_shape), seen.atoms))
    bound = seen.squared_norm(seen.signal_shape)
    assert bound.shape == () and bound.dtype == dtype and not bound.requires_grad
    assert bound.device.type == device.type
    assert bound.item() >= truth * (1 - 100 * torch.finfo(dtype).eps)


def test_squared_norm_follows_the_atoms_and_not_the_operator_again() -> None:
    calls = []
    matrix = torch.randn(6, 12)

    def forward(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return x @ matrix.T

    phi = SimpleNamespace(forward=forward, adjoint=lambda y: y @ matrix)
    seen = Composition(phi, Dense(7, 12), input_shape=(12,))
    before, made = seen.squared_norm(), len(calls)
    seen.init_atoms_(torch.ones(7, 12))  # rank one: the largest norm that unit atoms can have
    assert len(calls) == made
    truth = squared_spectral_norm(materialise(seen, (7,), matrix))
    assert before < seen.squared_norm()
    assert truth <= seen.squared_norm().item()


def random_operators() -> list[Tensor]:
    """Fifty matrices: rectangular, low rank, flat, decaying and clustered spectra, any scale."""
    generator = torch.Generator().manual_seed(1)
    matrices = []
    for index in range(50):
        rows, columns = torch.randint(1, 40, (2,), generator=generator).tolist()
        rank = min(rows, columns)
        draw = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        u, _, v = torch.linalg.svd(draw, full_matrices=False)
        uniform = torch.rand(rank, generator=generator, dtype=torch.float64)
        spectrum = [
            uniform,
            torch.ones(rank),
            torch.arange(rank) == 0,
            torch.logspace(0, -6, rank),
            1 - 1e-3 * uniform,
        ][index % 5].double()
        scale = 10 ** (6 * torch.rand((), generator=generator).item() - 3)
        matrices.append(scale * (u * spectrum) @ v)
    return matrices


def test_operator_norm_bound_of_fifty_random_operators(
    dtype: torch.dtype, device: torch.device
) -> None:
    for matrix in random_operators():
        cast = matrix.to(device, dtype)
        truth = np.linalg.norm(cast.cpu().double().numpy(), 2) ** 2
        size = matrix.shape[1]
        bound = operator_norm_bound(from_matrix(cast), (size,), like=cast)
        assert (bound.dtype, bound.shape, bound.device.type) == (torch.float64, (), "cpu")
        rounding = 100 * torch.finfo(dtype).eps
        assert bound.item() >= truth * (1 - rounding)
        # 10**(12 / 8) * sqrt(2 / pi) = 25.24, the 25 of the docstring.
        documented = (25.3 * math.sqrt(size)) ** (1 / 128)
        assert bound.item() <= truth * documented * (1 + rounding)


def test_one_probe_that_sees_the_leading_direction_is_enough() -> None:
    seen = []
    spy = SimpleNamespace(forward=lambda x: seen.append(x) or x, adjoint=lambda y: y)
    like = torch.zeros((), dtype=torch.float64)
    operator_norm_bound(spy, (20,), like=like)
    first, *others = seen[0]  # the probes are the same in every call
    basis = torch.linalg.qr(torch.stack(others).T).Q
    leading = torch.nn.functional.normalize(first - basis @ (basis.T @ first), dim=0)
    matrix = 1e-3 * torch.eye(20, dtype=torch.float64) + torch.outer(leading, leading)
    bound = operator_norm_bound(from_matrix(matrix), (20,), like=like)
    assert bound.item() >= 1.001**2


def test_operator_norm_bound_of_an_operator_on_images(device: torch.device) -> None:
    shape = (2, 9, 8)
    blur = OPERATORS["blur"](shape).to(device)
    truth = squared_spectral_norm(materialise(blur.forward, shape, blur.weights))
    bound = operator_norm_bound(blur, shape, like=blur.weights).item()
    assert truth <= bound <= truth * (25.3 * 12) ** (1 / 128) * (1 + 1e-4)


def test_more_steps_tighten_the_operator_norm_bound() -> None:
    matrix = torch.randn(20, 20, dtype=torch.float64)
    truth = np.linalg.norm(matrix.numpy(), 2) ** 2
    bounds = [
        operator_norm_bound(from_matrix(matrix), (20,), like=matrix, num_steps=steps).item()
        for steps in (8, 64, 512)
    ]
    assert bounds[0] > bounds[1] > bounds[2] >= truth


def test_operator_norm_bound_is_zero_for_the_zero_operator() -> None:
    zero = torch.zeros(3, 4)
    assert operator_norm_bound(from_matrix(zero), (4,), like=zero) == 0
    nilpotent = torch.tensor([[0.0, 1.0], [0.0, 0.0]])  # not zero, though its square is
    assert operator_norm_bound(from_matrix(nilpotent), (2,), like=nilpotent) >= 1


def test_building_a_composition_draws_nothing_from_the_users_generator() -> None:
    dictionary, phi = Dense(7, 12), from_matrix(torch.randn(4, 12))
    state = torch.get_rng_state()
    one = Composition(phi, dictionary, input_shape=(12,)).operator_squared_norm
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(Composition(phi, dictionary, input_shape=(12,)).operator_squared_norm, one)


def test_a_norm_that_the_user_knows_is_used() -> None:
    dictionary = Dense(7, 12).double()
    phi = OPERATORS["mask"]((12,)).double()
    seen = Composition(phi, dictionary, input_shape=(12,), operator_squared_norm=1)
    torch.testing.assert_close(seen.squared_norm(), dictionary.squared_norm())
    assert seen.squared_norm() < Composition(phi, dictionary, input_shape=(12,)).squared_norm()


# --- a module like every dictionary ---------------------------------------------------------------


def test_atoms_are_those_of_the_inner_dictionary() -> None:
    seen = compose("dense", "mask", torch.device("cpu"), torch.float32)
    assert torch.equal(seen.atoms, seen.dictionary.atoms)
    assert [name for name, _ in seen.named_parameters()] == [
        f"dictionary.{name}" for name, _ in seen.dictionary.named_parameters()
    ]
    atoms = 5 * torch.randn(7, 12)
    seen.init_atoms_(atoms)
    torch.testing.assert_close(
        torch.linalg.vector_norm(seen.dictionary.atoms, dim=1), torch.ones(7)
    )
    seen.atoms = -atoms
    torch.testing.assert_close(seen.dictionary.atoms, torch.nn.functional.normalize(-atoms))
    with pytest.raises(ValueError, match=r"shape \(7, 12\), got \(12, 7\)"):
        seen.init_atoms_(atoms.T)


def test_init_atoms_of_an_inner_dictionary_without_unit_norm() -> None:
    dictionary = Dense(7, 12, unit_norm=False)
    seen = Composition(OPERATORS["mask"]((12,)), dictionary, input_shape=(12,))
    atoms = 5 * torch.randn(7, 12)
    seen.init_atoms_(atoms)
    assert torch.equal(dictionary.atoms, atoms)


def test_gradient_reaches_the_inner_atoms() -> None:
    seen = compose("interior 2-D", "sensing", torch.device("cpu"), torch.float64)
    seen(torch.randn(seen.code_shape(seen.signal_shape)).double()).square().sum().backward()
    (parameter,) = seen.parameters()
    assert (parameter.grad.flatten(1).norm(dim=1) > 0).all()


def test_state_dict_round_trip_and_deepcopy() -> None:
    one, other = (compose("dense", "sensing", torch.device("cpu"), torch.float32) for _ in range(2))
    codes = torch.randn(2, 7)
    twin = copy.deepcopy(one)
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(other(codes), one(codes))
    torch.testing.assert_close(other.squared_norm(), one.squared_norm())
    expected = one(codes).detach().clone()
    one.init_atoms_(torch.randn(7, 12))
    torch.testing.assert_close(twin(codes), expected)
    assert not torch.equal(one(codes), expected)


def test_module_moves_its_operator_along(device: torch.device) -> None:
    seen = compose("periodic 1-D", "sensing", torch.device("cpu"), torch.float32)
    seen = seen.double().to(device)
    codes = torch.randn(seen.code_shape(seen.signal_shape), dtype=torch.float64, device=device)
    predictor = seen(codes)
    assert (predictor.dtype, predictor.device.type) == (torch.float64, device.type)
    assert seen.squared_norm().device.type == device.type


def test_double_of_the_bound_map_takes_an_operator_of_float32() -> None:
    matrix = torch.randn(4, 12)
    seen = Composition(from_matrix(matrix), Dense(7, 12), input_shape=(12,))
    widened = seen.bind().double()
    codes, signal = torch.randn(2, 7), torch.randn(2, 4)
    for result, expected in [
        (widened.forward(codes.double()), seen(codes)),
        (widened.adjoint(signal.double()), seen.adjoint(signal)),
        (widened.double().forward(codes.double()), seen(codes)),
        (widened.squared_norm(), seen.squared_norm()),
    ]:
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, expected.double(), rtol=1e-4, atol=1e-5)


def test_double_of_the_bound_map_still_has_the_rounding_of_its_operator() -> None:
    seen = Composition(from_matrix(torch.randn(4, 12)), Dense(7, 12), input_shape=(12,))
    assert seen.bind().double().rounding() == torch.finfo(torch.float32).eps
    assert seen.double().bind().double().rounding() == torch.finfo(torch.float64).eps


def test_bound_atoms_take_the_place_of_the_modules_own() -> None:
    matrix = torch.randn(4, 12)
    seen = Composition(from_matrix(matrix), Dense(7, 12), input_shape=(12,))
    atoms, codes = torch.randn(7, 12), torch.randn(2, 7)
    torch.testing.assert_close(seen.bind(atoms).forward(codes), codes @ atoms @ matrix.T)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["forward", "adjoint"])
def test_an_operator_without_one_of_the_methods_is_refused(missing: str) -> None:
    methods = {"forward": lambda x: x, "adjoint": lambda y: y}
    del methods[missing]
    with pytest.raises(TypeError, match=r"forward\(signal\) and adjoint\(measurement\), got"):
        Composition(SimpleNamespace(**methods), Dense(7, 12), input_shape=(12,))
    with pytest.raises(TypeError, match="got Tensor"):
        Composition(torch.randn(4, 12), Dense(7, 12), input_shape=(12,))


WRONG_ADJOINTS: dict[str, Callable[[Tensor], Tensor]] = {
    "of another scale": lambda y: 1.01 * y,
    "of another sign": lambda y: -y,
    "shifted by one": lambda y: y.roll(1, -1),
    "reversed": lambda y: y.flip(-1),
    "forgotten": lambda y: torch.zeros_like(y),
    "affine": lambda y: y + 1,
    "not finite": lambda y: y * math.nan,
}


@pytest.mark.parametrize("name", WRONG_ADJOINTS)
def test_an_adjoint_that_is_none_is_refused(name: str, dtype: torch.dtype) -> None:
    matrix = torch.randn(12, 12, dtype=dtype)
    wrong = WRONG_ADJOINTS[name]
    phi = SimpleNamespace(forward=lambda x: x @ matrix.T, adjoint=lambda y: wrong(y @ matrix))
    with pytest.raises(ValueError, match=r"Expected <forward\(x\), y> = <x, adjoint\(y\)>"):
        Composition(phi, Dense(7, 12).to(dtype), input_shape=(12,))


@pytest.mark.parametrize("scale", [0.99, 1.01, 1.2, 2.0])
def test_an_adjoint_of_another_scale_is_refused_for_a_large_picture(scale: float) -> None:
    # <x, y> of a million random samples is small beside |x| |y|: the check must not drown in that.
    shape = (1, 512, 512)
    phi = SimpleNamespace(forward=lambda x: x, adjoint=lambda y: scale * y)
    with pytest.raises(ValueError, match=r"Expected <forward\(x\), y>"):
        Composition(phi, Conv(2, 1, (4, 4)), input_shape=shape, operator_squared_norm=1.0)


def test_an_adjoint_to_another_shape_is_refused() -> None:
    matrix = torch.randn(4, 12)
    phi = SimpleNamespace(forward=lambda x: x @ matrix.T, adjoint=lambda y: y)
    with pytest.raises(ValueError, match=r"adjoint back to the shape \(2, 12\).*\(2, 4\)"):
        Composition(phi, Dense(7, 12), input_shape=(12,))


def test_an_operator_that_loses_the_batch_is_refused() -> None:
    phi = SimpleNamespace(forward=lambda x: x.flatten(), adjoint=lambda y: y.reshape(2, 12))
    with pytest.raises(ValueError, match="with leading dimensions kept"):
        Composition(phi, Dense(7, 12), input_shape=(12,))


@pytest.mark.parametrize("norm", [0.0, -1.0, math.nan, math.inf])
def test_a_norm_that_is_not_positive_is_refused(norm: float) -> None:
    phi = OPERATORS["mask"]((12,))
    with pytest.raises(ValueError, match=r"operator_squared_norm > 0 and finite, got"):
        Composition(phi, Dense(7, 12), input_shape=(12,), operator_squared_norm=norm)


def test_an_input_shape_that_the_dictionary_does_not_make_is_refused() -> None:
    with pytest.raises(ValueError, match=r"features last\), got \(13,\)"):
        Composition(OPERATORS["mask"]((13,)), Dense(7, 12), input_shape=(13,))


@pytest.mark.parametrize("shape", [(12,), (), (3, 5)], ids=str)
def test_measurements_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    seen = compose("dense", "sensing", torch.device("cpu"), torch.float32)
    with pytest.raises(
        ValueError, match=r"\(\.\.\., \*\(6,\)\), the shape that the operator makes"
    ):
        seen.code_shape(shape)


def test_an_operator_is_whatever_has_both_methods() -> None:
    assert isinstance(OPERATORS["mask"]((3,)), LinearOperator)
    assert not isinstance(torch.nn.Linear(2, 2), LinearOperator)


def test_input_shape_must_be_that_of_one_signal() -> None:
    with pytest.raises(ValueError, match="one signal, 1 dimensions"):
        Composition(ScaleOperator(1.0), Dense(3, 4), input_shape=(2, 4))


def test_an_operator_that_maps_everything_to_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="away from zero"):
        Composition(ScaleOperator(0.0), Dense(3, 4), input_shape=(4,))


class ScaleOperator:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def forward(self, signal: torch.Tensor) -> torch.Tensor:
        return self.factor * signal

    adjoint = forward


def test_a_trainable_operator_is_refused() -> None:
    class Blur(torch.nn.Linear):
        def adjoint(self, measurement: torch.Tensor) -> torch.Tensor:
            return measurement @ self.weight

    blur = Blur(4, 4, bias=False)
    with pytest.raises(ValueError, match="fixed operator.*requires_grad_"):
        Composition(blur, Dense(3, 4), input_shape=(4,))
    Composition(blur.requires_grad_(False), Dense(3, 4), input_shape=(4,))
