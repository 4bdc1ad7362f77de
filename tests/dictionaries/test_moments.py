"""The entries of a linear map: their squares, sums of functions of them, and the dispatch."""

import math

import numpy as np
import pytest
import torch

from pyro_sparse.dictionaries import Boundary, Composition, Conv, Dense, Interior, LinearMap
from tests.linear_maps import (
    BATCHES,
    BOUNDARIES,
    GEOMETRIES,
    Mask,
    fitting_lengths,
    materialise,
)

CASES = [
    (name, kernel, stride)
    for name in BOUNDARIES
    for kernel, stride in GEOMETRIES
    if math.prod(kernel) <= 12
]


def conv_case(name, kernel, stride, channels=2, num_atoms=3):
    boundary = BOUNDARIES[name][0]
    dictionary = Conv(num_atoms, channels, kernel, stride, boundary=boundary).double()
    signal_shape = (channels, *fitting_lengths(name, kernel, stride))
    return dictionary, tuple(dictionary.code_shape(signal_shape)), signal_shape


def smallest_periodic(kernel, stride):
    """A circle just long enough for one atom, where wrapping round is at its most."""
    dictionary = Conv(2, 1, kernel, stride, boundary=BOUNDARIES["periodic"][0]).double()
    signal_shape = (1, *(s * -(-k // s) for k, s in zip(kernel, stride)))
    return dictionary, tuple(dictionary.code_shape(signal_shape)), signal_shape


def reference(matrix, function, weights):
    """``sum_i f(M[d, i] * t[d])`` from the materialised matrix; ``function`` sees all codes."""
    return function(matrix * weights[:, None]).sum(1)


def soft(values):
    """Not even, not linear, zero at zero: stands for a log moment generating function."""
    return values.exp() - 1


@pytest.mark.parametrize(("name", "kernel", "stride"), CASES)
def test_squared_conv_has_the_squares_of_the_matrix(name, kernel, stride):
    dictionary, code_shape, _ = conv_case(name, kernel, stride)
    bound = dictionary.bind()
    matrix = materialise(bound.forward, code_shape, dictionary.like)
    squared = materialise(bound.squared().forward, code_shape, dictionary.like)
    np.testing.assert_allclose(squared, matrix**2, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(("kernel", "stride"), [((5,), (1,)), ((5,), (2,)), ((3, 4), (2, 1))])
def test_squared_conv_on_the_smallest_circle(kernel, stride):
    dictionary, code_shape, _ = smallest_periodic(kernel, stride)
    bound = dictionary.bind()
    matrix = materialise(bound.forward, code_shape, dictionary.like)
    squared = materialise(bound.squared().forward, code_shape, dictionary.like)
    np.testing.assert_allclose(squared, matrix**2, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize(("name", "kernel", "stride"), CASES[::3])
def test_accumulated_conv_is_the_sum_over_the_matrix(name, kernel, stride, batch):
    dictionary, code_shape, signal_shape = conv_case(name, kernel, stride)
    bound = dictionary.bind()
    matrix = torch.from_numpy(materialise(bound.forward, code_shape, dictionary.like))
    # Each code has a function of its own: an exchange of codes would show.
    slope = torch.rand(code_shape, dtype=torch.float64)
    weights = torch.randn(*batch, *signal_shape, dtype=torch.float64)
    got = bound.accumulate(lambda t: soft(slope * t), weights)
    rows = weights.reshape(-1, math.prod(signal_shape))
    want = [reference(matrix, lambda t: soft(slope.flatten() * t), row) for row in rows]
    torch.testing.assert_close(got, torch.stack(want).reshape(got.shape), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_dense_squares_and_sums(batch):
    dictionary = Dense(4, 3).double()
    bound = dictionary.bind()
    matrix = torch.from_numpy(materialise(bound.forward, (4,), dictionary.like))
    squared = torch.from_numpy(materialise(bound.squared().forward, (4,), dictionary.like))
    torch.testing.assert_close(squared, matrix**2)
    slope = torch.rand(4, dtype=torch.float64)
    weights = torch.randn(*batch, 3, dtype=torch.float64)
    got = bound.accumulate(lambda t: soft(slope * t), weights)
    want = [reference(matrix, lambda t: soft(slope * t), row) for row in weights.reshape(-1, 3)]
    torch.testing.assert_close(got, torch.stack(want).reshape(got.shape))


def test_dense_with_an_atom_matrix_per_index():
    atoms = torch.randn(5, 4, 3, dtype=torch.float64)
    bound = Dense(4, 3).double().bind(atoms)
    weights = torch.randn(5, 3, dtype=torch.float64)
    slope = torch.rand(5, 4, dtype=torch.float64)
    got = bound.accumulate(lambda t: soft(slope * t), weights)
    want = soft(slope[:, :, None] * atoms * weights[:, None]).sum(1)
    torch.testing.assert_close(got, want)
    codes = torch.rand(5, 4, dtype=torch.float64)
    torch.testing.assert_close(
        bound.squared().forward(codes), torch.einsum("nk,nkd->nd", codes, atoms**2)
    )


class Mirror(Boundary):
    """Folds what runs over the end back inside: an atom there meets itself."""

    def num_positions(self, length, kernel, stride):
        return length

    def length(self, num_positions, kernel, stride):
        return num_positions

    def to_signal(self, canvas, dim, kernel, stride):
        kept = canvas.shape[dim] - kernel + 1
        over = canvas.narrow(dim, kept, kernel - 1).flip(dim)
        inside = canvas.narrow(dim, kept - kernel + 1, kernel - 1) + over
        return torch.cat([canvas.narrow(dim, 0, kept - kernel + 1), inside], dim)

    def to_canvas(self, signal, dim, kernel, stride):
        raise NotImplementedError


class Tapered(Interior):
    def to_signal(self, canvas, dim, kernel, stride):
        return canvas * 0.5


@pytest.mark.parametrize("boundary", [Mirror(), Tapered()], ids=["mirror", "tapered"])
def test_a_boundary_that_does_not_state_its_entries_is_refused(boundary):
    bound = Conv(2, 1, 3, boundary=boundary).bind()
    with pytest.raises(NotImplementedError, match="one_to_one = True"):
        bound.squared()
    with pytest.raises(NotImplementedError, match="one_to_one = True"):
        bound.accumulate(soft, torch.zeros(1, 8))


def test_a_mirroring_boundary_is_refused_for_a_reason():
    bound = Conv(1, 1, 3, boundary=Mirror(), atoms=torch.ones(1, 1, 3), unit_norm=False).bind()
    matrix = materialise(bound.forward, (1, 6), torch.zeros(1))
    assert matrix.max() == 2  # one code reaches a sample twice: the square of the sum is 4, not 2


def test_a_composition_states_no_squares():
    bound = Composition(Mask((3,)), Dense(4, 3), input_shape=(3,)).bind()
    with pytest.raises(NotImplementedError, match="CompositionMap does not state"):
        bound.squared()
    with pytest.raises(NotImplementedError, match="CompositionMap does not sum"):
        bound.accumulate(soft, torch.zeros(3))


class Doubling(LinearMap):
    def forward(self, codes):
        return 2 * codes


class Reused:
    def forward(self, codes):
        return 3 * codes


class Inherited(Reused, LinearMap):
    """Its arithmetic comes from a class that knows nothing of linear maps."""


class Asked:
    """Not a tensor, but answers for itself."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        linear_map, codes = args
        assert isinstance(codes, cls)
        return func.arithmetic(linear_map, torch.ones(1))


@pytest.mark.parametrize(("linear_map", "factor"), [(Doubling(), 2.0), (Inherited(), 3.0)])
def test_any_linear_map_is_one_primitive(linear_map, factor):
    assert linear_map.forward(torch.ones(1)) == factor
    assert linear_map.forward(torch.nn.Parameter(torch.ones(1))) == factor
    assert linear_map.forward(Asked()) == factor


class Tagged(torch.Tensor):
    """A tensor subclass of a user's, with torch's own protocol."""


def test_a_tensor_subclass_keeps_its_type():
    codes = torch.ones(2, 4).as_subclass(Tagged)
    dictionary = Dense(4, 3)
    assert type(dictionary.bind().forward(codes)) is Tagged
    plain = dictionary(torch.ones(2, 4))
    torch.testing.assert_close(dictionary(codes).as_subclass(torch.Tensor), plain)


def test_a_default_device_context_changes_nothing():
    dictionary, codes = Dense(4, 3), torch.ones(2, 4)
    expected = dictionary(codes)
    with torch.device("cpu"):
        torch.testing.assert_close(dictionary(codes), expected, rtol=0, atol=0)
