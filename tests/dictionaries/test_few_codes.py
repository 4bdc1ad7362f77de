"""A map on some of its codes is what it is on all of them, the others being zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_sparse.dictionaries import Composition, Conv, ConvMap, Dense, Dictionary, conv
from tests.linear_maps import (
    BATCHES,
    BOUNDARIES,
    GEOMETRIES,
    Blur,
    Mask,
    fitting_lengths,
)

batches = pytest.mark.parametrize("batch", BATCHES, ids=str)


def drawn(shape: torch.Size, count: int) -> Tensor:
    """So many places among codes, ascending."""
    return torch.randperm(shape.numel())[:count].sort().values


def check(
    dictionary: Dictionary, signal_shape: tuple[int, ...], count: int, dtype: torch.dtype
) -> None:
    shape = dictionary.code_shape(signal_shape)
    index = drawn(shape, count)
    few = dictionary.bind().at(index, shape)
    codes = torch.randn(count, dtype=dtype)
    signal = torch.randn(signal_shape, dtype=dtype)
    placed = torch.zeros(shape, dtype=dtype)
    placed.view(-1)[index] = codes
    tolerance = {"rtol": 0, "atol": 1e3 * torch.finfo(dtype).eps}
    with torch.no_grad():
        torch.testing.assert_close(few.forward(codes), dictionary(placed), **tolerance)
        expected = dictionary.adjoint(signal).flatten()[index]
        torch.testing.assert_close(few.adjoint(signal), expected, **tolerance)


@pytest.mark.parametrize(("kernel", "stride"), GEOMETRIES, ids=lambda n: "x".join(map(str, n)))
@pytest.mark.parametrize("name", BOUNDARIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_on_some_codes_of_a_convolution(name, channels, kernel, stride, dtype):
    dictionary = Conv(7, channels, kernel, stride, boundary=BOUNDARIES[name][0]).to(dtype)
    for batch in BATCHES:
        signal_shape = (*batch, channels, *fitting_lengths(name, kernel, stride))
        size = dictionary.code_shape(signal_shape).numel()
        # None, one, as many as atoms are laid for, and all of them.
        for count in (0, 1, size // dictionary.atoms[0].numel(), size):
            check(dictionary, signal_shape, count, dtype)


@batches
def test_on_some_codes_of_a_dense_dictionary(batch, dtype):
    for count in (0, 1, 3, 7):
        check(Dense(7, 5).to(dtype), (*batch, 5), count, dtype)


@batches
@pytest.mark.parametrize("operator", [Mask, Blur])
def test_on_some_codes_before_an_operator(operator, batch, dtype):
    shape = (2, 12, 10)
    dictionary = Conv(7, 2, (3, 4)).to(dtype)
    phi = operator(shape).to(dtype)
    composed = Composition(phi, dictionary, input_shape=shape)
    for count in (0, 5, 40):
        check(composed, (*batch, *composed.signal_shape), count, dtype)


def test_few_codes_take_no_convolution(monkeypatch):
    def refuse(*_):
        raise AssertionError("a convolution of all codes")

    linear_map = Conv(4, 1, (3, 3)).bind()
    shape = torch.Size([4, 8, 8])
    many, few = (linear_map.at(drawn(shape, count), shape) for count in (40, 20))
    monkeypatch.setattr(conv, "overlap_add", refuse)
    monkeypatch.setattr(conv, "correlate", refuse)
    assert few.adjoint(few.forward(torch.ones(20))).shape == (20,)
    with pytest.raises(AssertionError, match="all codes"):
        many.forward(torch.ones(40))
    with pytest.raises(AssertionError, match="all codes"):
        many.adjoint(torch.ones(1, 10, 10))


class Doubled(ConvMap):
    """A user's, of which the parent's shortcut would be wrong."""

    def forward(self, codes: Tensor) -> Tensor:
        return 2 * super().forward(codes)


class Halved:
    """The same from beside."""

    def adjoint(self, signal: Tensor) -> Tensor:
        return super().adjoint(signal) / 2  # type: ignore[misc]


class HalvedConv(Halved, ConvMap):
    pass


@pytest.mark.parametrize(("kind", "ahead", "back"), [(Doubled, 2.0, 1.0), (HalvedConv, 1.0, 0.5)])
def test_a_subclass_is_not_held_to_what_it_has_changed(kind, ahead, back):
    plain = Conv(4, 1, 5).bind()
    changed = kind(plain.atoms, plain.stride, plain.boundary)
    shape = torch.Size([4, 20])
    index = torch.tensor([3, 50])
    codes, signal = torch.tensor([1.0, -2.0]), torch.randn(1, 24)
    few, same = changed.at(index, shape), plain.at(index, shape)
    torch.testing.assert_close(few.forward(codes), ahead * same.forward(codes))
    torch.testing.assert_close(few.adjoint(signal), back * same.adjoint(signal))
