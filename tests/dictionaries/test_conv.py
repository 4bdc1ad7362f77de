"""Convolutional dictionaries against atoms placed one by one, for each boundary."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pyro_sparse.dictionaries import Boundary, Conv, ConvMap, Interior, Overhang, Periodic
from tests.linear_maps import (
    ADJOINT_TOLERANCE,
    BATCHES,
    BOUNDARIES,
    GEOMETRIES,
    adjoint_error,
    fitting_lengths,
    materialise,
    place_atoms,
    squared_spectral_norm,
    starts,
)

boundaries = pytest.mark.parametrize("name", BOUNDARIES)
channels_1_3 = pytest.mark.parametrize("channels", [1, 3])
geometries = pytest.mark.parametrize(
    ("kernel", "stride"), GEOMETRIES, ids=lambda size: "x".join(map(str, size))
)

# Trigonometric oversampling in one, two and three dimensions: 1 / cos(pi / 16), 1 / cos(pi / 8)**d.
STATED = {1: 1.02, 2: 1.18, 3: 1.27}


def build(
    name: str,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    *,
    num_atoms: int = 4,
    channels: int = 1,
) -> Conv:
    boundary = BOUNDARIES[name][0]
    return Conv(num_atoms, channels, kernel, stride, boundary=boundary)


# --- the linear map -------------------------------------------------------------------------------


@geometries
@boundaries
@channels_1_3
def test_adjoint(
    name: str,
    channels: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    dictionary = build(name, kernel, stride, channels=channels).to(device, dtype)
    lengths = fitting_lengths(name, kernel, stride)
    for batch in BATCHES:
        signal = torch.randn(*batch, channels, *lengths, dtype=dtype, device=device)
        shape = dictionary.code_shape(signal.shape)
        assert shape[: len(batch)] == batch
        codes = torch.randn(shape, dtype=dtype, device=device)
        error = adjoint_error(dictionary, dictionary.adjoint, codes, signal)
        assert error <= ADJOINT_TOLERANCE[dtype]


@geometries
@boundaries
@channels_1_3
def test_predictor_equals_atoms_placed_one_by_one(
    name: str,
    channels: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    device: torch.device,
) -> None:
    dictionary = build(name, kernel, stride, channels=channels).to(device, torch.float64)
    lengths = fitting_lengths(name, kernel, stride)
    shape = dictionary.code_shape((channels, *lengths))
    codes = torch.randn(shape, dtype=torch.float64, device=device)
    atoms = dictionary.atoms.detach().cpu().numpy()
    expected = place_atoms(name, codes.cpu().numpy(), atoms, lengths, stride)
    predictor = dictionary(codes).detach().cpu()
    assert predictor.shape == (channels, *lengths)
    np.testing.assert_allclose(predictor, expected, rtol=0, atol=1e-12)


@boundaries
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_batch_is_datum_by_datum(name: str, batch: tuple[int, ...]) -> None:
    dictionary = build(name, (3, 4), (2, 1), channels=2).double()
    lengths = fitting_lengths(name, (3, 4), (2, 1))
    codes = torch.randn(dictionary.code_shape((*batch, 2, *lengths)), dtype=torch.float64)
    predictor = dictionary(codes)
    single = [dictionary(c) for c in codes.reshape(-1, *codes.shape[len(batch) :])]
    assert predictor.shape == (*batch, 2, *lengths)
    torch.testing.assert_close(predictor.reshape(len(single), 2, *lengths), torch.stack(single))


@pytest.mark.parametrize(
    ("kernel", "stride", "lengths"),
    [
        ((5,), (1,), (12,)),
        ((5,), (1,), (5,)),
        ((4,), (3,), (12,)),
        ((3, 4), (1, 1), (6, 9)),
        ((3, 4), (3, 2), (6, 8)),
        ((2, 3, 2), (1, 2, 1), (4, 6, 5)),
    ],
    ids=str,
)
def test_periodic_is_a_circular_convolution_by_fft(
    kernel: tuple[int, ...], stride: tuple[int, ...], lengths: tuple[int, ...]
) -> None:
    dictionary = Conv(3, 2, kernel, stride, boundary=Periodic()).double()
    codes = torch.randn(dictionary.code_shape((2, *lengths)), dtype=torch.float64)
    spread = np.zeros((3, *lengths))
    spread[(slice(None), *[slice(None, None, s) for s in stride])] = codes.numpy()
    axes = list(range(-len(kernel), 0))
    atoms = dictionary.atoms.detach().numpy()
    spectrum = np.einsum(
        "k...,kc...->c...",
        np.fft.fftn(spread, axes=axes),
        np.fft.fftn(atoms, s=lengths, axes=axes),
    )
    expected = np.fft.ifftn(spectrum, axes=axes).real
    np.testing.assert_allclose(dictionary(codes).detach(), expected, rtol=0, atol=1e-12)


@geometries
@channels_1_3
def test_interior_is_torchs_transposed_convolution(
    kernel: tuple[int, ...], stride: tuple[int, ...], channels: int
) -> None:
    dictionary = build("interior", kernel, stride, channels=channels).double()
    lengths = fitting_lengths("interior", kernel, stride)
    codes = torch.randn(dictionary.code_shape((2, channels, *lengths)), dtype=torch.float64)
    transposed = [F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d][len(kernel) - 1]
    expected = transposed(codes, dictionary.atoms, stride=stride)
    torch.testing.assert_close(dictionary(codes), expected, rtol=1e-12, atol=1e-12)


@geometries
@boundaries
def test_gradient_of_atoms_and_codes(
    name: str, kernel: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    # The map is bilinear: its derivative along a direction is the map of that direction.
    atoms, moved = torch.randn(2, 3, 2, *kernel, dtype=torch.float64).unbind(0)
    atoms.requires_grad_()
    lengths = fitting_lengths(name, kernel, stride)
    dictionary = Conv(3, 2, kernel, stride, boundary=BOUNDARIES[name][0])
    codes = torch.randn(dictionary.code_shape((2, *lengths)), dtype=torch.float64)
    codes.requires_grad_()
    weight = torch.randn(2, *lengths, dtype=torch.float64)
    (dictionary.bind(atoms).forward(codes) * weight).sum().backward()
    along = (dictionary.bind(moved).forward(codes.detach()) * weight).sum()
    torch.testing.assert_close((atoms.grad * moved).sum(), along)
    back = dictionary.bind(atoms.detach()).adjoint(weight)
    torch.testing.assert_close(codes.grad, back)


def test_second_derivative_of_an_unrolled_step() -> None:
    dictionary = Conv(2, 1, (2, 2), (1, 2), boundary=Overhang()).double()
    signal = torch.randn(1, 2, 4, dtype=torch.float64)

    def step(atoms: torch.Tensor) -> torch.Tensor:
        bound_map = dictionary.bind(atoms)
        codes = bound_map.adjoint(signal)
        return codes - bound_map.adjoint(bound_map.forward(codes) - signal)

    atoms = torch.randn(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(step, (atoms,))


def test_double_is_the_same_map_in_float64() -> None:
    bound_map = build("periodic", (4, 3), (2, 1)).bind()
    codes = torch.randn(4, 3, 5)
    widened = bound_map.double().forward(codes.double())
    assert widened.dtype == torch.float64
    torch.testing.assert_close(widened, bound_map.forward(codes).double(), rtol=1e-5, atol=1e-5)


# --- shapes ---------------------------------------------------------------------------------------


@boundaries
def test_positions_and_lengths_undo_each_other(name: str) -> None:
    boundary = BOUNDARIES[name][0]
    tried = 0
    for kernel in range(1, 8):
        for stride in range(1, kernel + 1):
            shortest = {
                "interior": kernel,
                "overhang": stride,
                "periodic": -(-kernel // stride) * stride,
            }[name]
            for length in range(shortest, 25, stride):
                positions = boundary.num_positions(length, kernel, stride)
                assert positions == len(starts(name, length, kernel, stride))
                assert boundary.length(positions, kernel, stride) == length
                tried += 1
    assert tried > 200


@geometries
@boundaries
def test_code_shape_is_that_of_the_adjoint(
    name: str, kernel: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    dictionary = build(name, kernel, stride, channels=3)
    signal = torch.randn(2, 3, *fitting_lengths(name, kernel, stride))
    assert dictionary.code_shape(signal.shape) == dictionary.adjoint(signal).shape
    assert dictionary.code_dims == dictionary.signal_dims == 1 + len(kernel)
    assert dictionary.signal_shape is None


def test_overhang_explains_a_signal_shorter_than_the_atom() -> None:
    dictionary = Conv(2, 1, 7, boundary=Overhang()).double()
    codes = torch.randn(2, 9, dtype=torch.float64)
    assert dictionary.code_shape((1, 3)) == codes.shape
    atoms = dictionary.atoms.detach().numpy()
    expected = place_atoms("overhang", codes.numpy(), atoms, (3,), (1,))
    np.testing.assert_allclose(dictionary(codes).detach(), expected, atol=1e-13)


def test_interior_is_the_default_and_boundaries_compare_by_kind() -> None:
    assert Conv(2, 1, 3).boundary == Interior()
    assert Interior() != Overhang() and Overhang() != Periodic()
    assert len({Interior(), Interior(), Periodic()}) == 2
    assert "boundary=Periodic()" in repr(Conv(2, 1, 3, boundary=Periodic()))


# --- squared_norm ---------------------------------------------------------------------------------


@geometries
@boundaries
@channels_1_3
def test_squared_norm_is_never_below_the_truth(
    name: str,
    channels: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    dictionary = build(name, kernel, stride, channels=channels).to(device, dtype)
    shape = (channels, *fitting_lengths(name, kernel, stride))
    matrix = materialise(dictionary, dictionary.code_shape(shape), dictionary.atoms)
    truth = squared_spectral_norm(matrix)
    bound = dictionary.squared_norm(shape)
    assert bound.shape == () and bound.dtype == dtype and not bound.requires_grad
    # Whatever the signal's length, so also without it.
    torch.testing.assert_close(dictionary.squared_norm(), bound)
    assert bound.item() >= truth * (1 - 100 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("kernel", "stride", "lengths"),
    [
        ((9,), (1,), (256,)),
        ((9,), (2,), (256,)),
        ((8,), (8,), (64,)),
        ((6,), (4,), (128,)),
        ((1,), (1,), (16,)),
        ((3, 4), (1, 1), (24, 24)),
        ((4, 4), (2, 3), (20, 24)),
        ((2, 2, 2), (1, 1, 1), (8, 8, 8)),
        ((2, 3, 2), (1, 2, 2), (8, 8, 8)),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_atoms", [1, 2])
def test_squared_norm_is_near_the_truth_for_a_long_periodic_signal(
    kernel: tuple[int, ...], stride: tuple[int, ...], lengths: tuple[int, ...], num_atoms: int
) -> None:
    dictionary = Conv(num_atoms, 2, kernel, stride, boundary=Periodic()).double()
    shape = dictionary.code_shape((2, *lengths))
    truth = squared_spectral_norm(materialise(dictionary, shape, dictionary.atoms))
    # A periodic signal of p positions samples the symbol at p frequencies: by Ehlich & Zeller its
    # norm is within 1 / cos(pi * degree / p) of the supremum in each dimension.
    degrees = [-(-k // s) - 1 for k, s in zip(kernel, stride)]
    gap = math.prod(1 / math.cos(math.pi * m / p) for m, p in zip(degrees, shape[1:]))
    eigenvalue_slack = 1.1
    bound = dictionary.squared_norm().item()
    assert truth * (1 - 1e-12) <= bound <= STATED[len(kernel)] * gap * eigenvalue_slack * truth


@pytest.mark.parametrize("name", ["interior", "overhang"])
def test_squared_norm_is_near_the_truth_for_a_long_open_signal(name: str) -> None:
    dictionary = build(name, (6,), (2,), num_atoms=3).double()
    codes = dictionary.code_shape((1, 400))
    truth = squared_spectral_norm(materialise(dictionary, codes, dictionary.atoms))
    # An open signal of p positions loses O(degree**2 / p**2) to the infinite one.
    assert truth <= dictionary.squared_norm().item() <= 1.02 * 1.1 * 1.01 * truth


def test_squared_norm_of_random_kernels_and_scales() -> None:
    for _ in range(60):
        kernel, channels = int(torch.randint(1, 9, ())), int(torch.randint(1, 3, ()))
        stride = int(torch.randint(1, kernel + 1, ()))
        atoms = torch.randn(3, channels, kernel, dtype=torch.float64) * 10 ** torch.randn(()).item()
        # The wraps touch at the shortest periodic signal: the hardest case for a bound.
        length = -(-kernel // stride) * stride
        bound_map = ConvMap(atoms, (stride,), Periodic())
        shape = (3, length // stride)
        truth = squared_spectral_norm(materialise(bound_map.forward, shape, atoms))
        assert bound_map.squared_norm().item() >= truth * (1 - 1e-12)


@pytest.mark.parametrize(("size", "dims", "length"), [(9, 1, 512), (4, 2, 96)])
def test_squared_norm_holds_between_the_frequencies_it_looks_at(
    size: int, dims: int, length: int
) -> None:
    # Waves of every frequency, each the peak of its atom's symbol: wherever a bound samples, some
    # peak lies half way between two samples, and the long periodic signal holds that frequency.
    for cycle in range(1, 40):
        wave = torch.cos(2 * math.pi * cycle / length * torch.arange(size).double())
        atom = {1: wave, 2: torch.outer(wave, wave)}[dims]
        bound = ConvMap(atom[None, None], (1,) * dims, Periodic()).squared_norm().item()
        symbol = np.abs(np.fft.fftn(atom.numpy(), s=(length,) * dims, axes=range(dims))) ** 2
        assert bound >= symbol.max() * (1 - 1e-12)


def test_squared_norm_of_a_constant_atom_is_its_length_at_frequency_zero() -> None:
    # The symbol of a constant unit atom of k samples peaks at k, at frequency zero exactly.
    dictionary = Conv(1, 1, 10, atoms=torch.ones(1, 1, 10))
    assert 10 * (1 - 1e-6) <= dictionary.squared_norm().item() <= 10.2


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_atoms", 0),
        ("num_atoms", 2.0),
        ("channels", -1),
        ("kernel_size", 0),
        ("kernel_size", 5.0),
        ("kernel_size", ()),
        ("kernel_size", (3, 0)),
        ("kernel_size", (3, 2.5)),
        ("stride", 0),
        ("stride", 1.0),
        ("stride", (1, -1)),
    ],
    ids=str,
)
def test_sizes_must_be_positive_whole_numbers(name: str, value: object) -> None:
    sizes = {"num_atoms": 3, "channels": 1, "kernel_size": (3, 3), name: value}
    with pytest.raises(ValueError, match=rf"Expected {name} to be a whole number >= 1"):
        Conv(**sizes)


@pytest.mark.parametrize(
    ("kernel", "stride"), [((3, 3), (1,)), (3, (1, 1)), ((2, 2, 2, 2), 1)], ids=str
)
def test_one_to_three_dimensions_with_a_stride_for_each(
    kernel: int | tuple[int, ...], stride: int | tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="one to three dimensions and a stride for each"):
        Conv(3, 1, kernel, stride)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 4), ((3, 5), (1, 6)), ((5, 2), 3)], ids=str)
def test_a_stride_beyond_the_kernel_leaves_gaps(
    kernel: int | tuple[int, ...], stride: int | tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="stride of at most the kernel size.*out of reach"):
        Conv(3, 1, kernel, stride)


@pytest.mark.parametrize("shape", [(4, 5), (1, 4, 5), (4, 5, 1), (4, 2, 5)], ids=str)
def test_atoms_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(atoms, channels, \*kernel\) = \(4, 1, 5\), got"):
        Conv(4, 1, 5, atoms=torch.randn(shape))


@pytest.mark.parametrize(
    ("boundary", "kernel", "stride", "length", "fits"),
    [
        (Interior(), 5, 1, 4, 5),
        (Interior(), 5, 2, 10, 11),
        (Interior(), 6, 3, 1, 6),
        (Interior(), 4, 3, 8, 10),
        (Overhang(), 5, 3, 10, 12),
        (Overhang(), 5, 3, 1, 3),
        (Overhang(), 5, 2, 0, 2),
        (Periodic(), 5, 3, 10, 12),
        (Periodic(), 5, 1, 4, 5),
        (Periodic(), 5, 2, 4, 6),
    ],
    ids=str,
)
def test_a_length_that_does_not_fit_is_refused_with_one_that_does(
    boundary: Boundary, kernel: int, stride: int, length: int, fits: int
) -> None:
    dictionary = Conv(2, 1, kernel, stride, boundary=boundary)
    with pytest.raises(ValueError, match=rf"got {length}\b.* {fits} samples"):
        dictionary.code_shape((1, length))
    positions = dictionary.code_shape((1, fits))[-1]  # what the message says does fit
    assert boundary.length(positions, kernel, stride) == fits


@pytest.mark.parametrize(
    ("kernel", "shape", "names"),
    [
        (5, (20,), "length"),
        (5, (7, 20), "length"),
        ((3, 3), (20, 20), "height, width"),
        ((3, 3), (20, 20, 1), "height, width"),
        ((2, 2, 2), (9, 9, 9), "height, width, depth"),
        ((2, 2, 2), (4, 2, 9, 9, 9), "height, width, depth"),
    ],
    ids=str,
)
def test_a_missing_channel_dimension_is_named(
    kernel: int | tuple[int, ...], shape: tuple[int, ...], names: str
) -> None:
    match = rf"\(\.\.\., channels=1, {names}\), got .*A single channel is a dimension too"
    with pytest.raises(ValueError, match=match):
        Conv(2, 1, kernel).code_shape(shape)


def test_sampled_atoms_with_a_batch_are_refused_by_name() -> None:
    dictionary = Conv(2, 1, 5)
    with pytest.raises(NotImplementedError, match="vectorize_particles=False"):
        dictionary.bind(torch.randn(3, 2, 1, 5))


@pytest.mark.parametrize("boundary", [Boundary()])
def test_base_boundary_declares_and_does_nothing(boundary: Boundary) -> None:
    with pytest.raises(NotImplementedError):
        boundary.num_positions(5, 3, 1)
    with pytest.raises(NotImplementedError):
        boundary.length(5, 3, 1)
    with pytest.raises(NotImplementedError):
        boundary.to_signal(torch.zeros(5), -1, 3, 1)
    with pytest.raises(NotImplementedError):
        boundary.to_canvas(torch.zeros(5), -1, 3, 1)


def test_periodic_codes_with_too_few_positions_are_refused() -> None:
    dictionary = Conv(2, 1, 5, boundary=Periodic())
    with pytest.raises(ValueError, match="at least 5 samples"):
        dictionary(torch.ones(1, 2, 3))
