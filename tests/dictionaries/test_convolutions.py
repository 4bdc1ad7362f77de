"""Correlation and overlap-add against scipy, on both sides of each rule for how to compute them."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import scipy.signal
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from pyro_sparse.dictionaries import convolutions
from pyro_sparse.dictionaries.convolutions import correlate, overlap_add
from tests.linear_maps import ADJOINT_TOLERANCE, adjoint_error

# Atoms, channels, kernel, stride, positions.
WAYS = {
    "blocks, many": (3, 2, (7,), (1,), (1000,)),
    "blocks, the last one not full": (3, 2, (45,), (1,), (997,)),
    "blocks, one position": (3, 1, (45,), (1,), (1,)),
    "blocks, fewer positions than a block": (3, 1, (45,), (1,), (20,)),
    "blocks, a long kernel": (2, 1, (301,), (1,), (500,)),
    "blocks, phases": (3, 2, (46,), (5,), (203,)),
    "blocks, stride as long as the kernel": (3, 2, (6,), (6,), (50,)),
    "blocks, most pairs": (64, 2, (4,), (1,), (50,)),
    "convolution, fewest pairs": (43, 3, (4,), (1,), (50,)),
    "convolution, strided": (129, 1, (5,), (3,), (20,)),
    "convolution to many channels": (33, 4, (5,), (2,), (20,)),
    "two dimensions, most to fold": (5, 3, (4, 3), (2, 1), (6, 7)),
    "two dimensions, fewest not to fold": (5, 4, (4, 3), (2, 1), (6, 7)),
    "three dimensions": (3, 2, (2, 3, 2), (1, 2, 1), (3, 4, 2)),
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
Way = tuple[int, int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def draw(way: Way, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Canvas, codes and atoms; the codes in memory as the user may have them, contiguous."""
    num_atoms, channels, kernel, stride, positions = way
    lengths = [(p - 1) * s + k for p, s, k in zip(positions, stride, kernel)]
    canvas = torch.randn(2, channels, *lengths, dtype=dtype, device=device)
    codes = torch.randn(2, num_atoms, *positions, dtype=dtype, device=device)
    atoms = torch.randn(num_atoms, channels, *kernel, dtype=dtype, device=device)
    return canvas, codes, atoms


@ways
def test_correlation_is_scipys(way: Way, device: torch.device) -> None:
    canvas, codes, atoms = draw(way, torch.float64, device)
    step = tuple(slice(None, None, s) for s in way[3])
    expected = [
        [
            sum(scipy.signal.correlate(c, a, "valid", "direct") for c, a in zip(one, atom))[step]
            for atom in atoms.cpu().numpy()
        ]
        for one in canvas.cpu().numpy()
    ]
    result = correlate(canvas, atoms, way[3])
    assert result.shape == codes.shape
    np.testing.assert_allclose(result.cpu(), np.array(expected), rtol=0, atol=1e-11)


@ways
def test_overlap_add_is_the_adjoint(way: Way, dtype: torch.dtype, device: torch.device) -> None:
    canvas, codes, atoms = draw(way, dtype, device)
    # As in memory with the atoms first, and with the atoms last.
    for laid in (codes, codes.movedim(1, -1).contiguous().movedim(-1, 1)):
        error = adjoint_error(
            lambda z: overlap_add(z, atoms, way[3]),
            lambda y: correlate(y, atoms, way[3]),
            laid,
            canvas,
        )
        assert error <= ADJOINT_TOLERANCE[dtype]


@ways
def test_without_convolutions_the_maps_are_the_same(
    way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    canvas, codes, atoms = draw(way, torch.float64, torch.device("cpu"))
    expected = correlate(canvas, atoms, way[3]), overlap_add(codes, atoms, way[3])
    # As on a device whose convolutions may round to TF32.
    monkeypatch.setattr(convolutions, "_convolves_exactly", lambda tensor: False)
    result = correlate(canvas, atoms, way[3]), overlap_add(codes, atoms, way[3])
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-11)


SMALL = {
    "blocks": (2, 1, (3,), (2,), (4,)),
    "convolution": (43, 3, (2,), (1,), (2,)),
    "fold": (2, 1, (2, 3), (1, 2), (2, 2)),
    "two dimensions, many channels": (2, 4, (2, 2), (1, 2), (2, 2)),
}


@pytest.mark.parametrize("way", SMALL.values(), ids=SMALL)
def test_derivatives_of_every_order_and_mode(way: Way) -> None:
    canvas, codes, atoms = draw(way, torch.float64, torch.device("cpu"))
    for function, value in ((correlate, canvas), (overlap_add, codes)):
        inputs = (value.requires_grad_(), atoms.requires_grad_())
        run = partial(function, stride=way[3])
        torch.autograd.gradcheck(run, inputs, check_forward_ad=True, fast_mode=True)
        torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("way", SMALL.values(), ids=SMALL)
def test_vmap_is_one_at_a_time(way: Way) -> None:
    canvas, codes, atoms = draw(way, torch.float64, torch.device("cpu"))
    for function, value in ((correlate, canvas), (overlap_add, codes)):
        stacked = torch.stack([atoms, -2 * atoms])
        result = torch.func.vmap(partial(function, value, stride=way[3]))(stacked)
        expected = function(value, atoms, way[3])
        torch.testing.assert_close(result, torch.stack([expected, -2 * expected]))


def test_no_copy_for_each_sample_of_the_kernel_is_kept_for_the_reverse_pass() -> None:
    canvas, codes, atoms = draw((4, 1, (45,), (1,), (10_000,)), torch.float32, torch.device("cpu"))
    sizes: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        correlate(canvas.requires_grad_(), atoms.requires_grad_(), (1,))
        overlap_add(codes.requires_grad_(), atoms, (1,))
    # Patches of 32 + 44 samples for each 32, and the codes: not 45 copies of the signal.
    assert 0 < max(sizes) < 1.1 * codes.numel()
