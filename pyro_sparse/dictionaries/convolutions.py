"""Correlation with atoms and overlap-add of atoms, each the adjoint of the other.

On a CPU a transposed convolution to few channels runs at a tenth of the speed of a matrix product,
and the reverse pass of a convolution holds one. What is done instead depends on shapes alone:

* One dimension, few atoms and channels: a block of neighbouring positions at a time, one matrix
  product with the banded Toeplitz matrix of the atoms. That is at most twice the arithmetic and
  copies the signal a few times, where a copy for each sample of a kernel, and a convolution with
  vectors that few atoms do not fill, take several times longer.
* Two dimensions, and one with many atoms or channels: a convolution for the correlation; for its
  adjoint a matrix product and ``fold`` to few channels, a transposed convolution to many.
* Three dimensions: torch's own.

On other devices the second case is a matrix product with ``unfold`` and ``fold``: convolutions may
be rounded to TF32 there, which costs the adjoint its precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

# Positions in a block: below, the matrix products are too narrow to be fast; above, they multiply
# more zeros of the Toeplitz matrix than they gain.
_BLOCK = 32

# Above this many atoms times channels a convolution's vectors are full, and it multiplies no zeros.
_FEW_PAIRS = 128

# The time of `fold` grows with the channels, that of a transposed convolution hardly does up to
# eight or so; they meet between three and four.
_FEW_CHANNELS = 3


def correlate(canvas: Tensor, atoms: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Correlation with each atom at each position.

    Args:
        canvas: Shape ``(batch, channels, *lengths)``, ``(positions - 1) * stride + kernel`` long.
        atoms: Shape ``(atoms, channels, *kernel)``, one to three kernel dimensions.
        stride: One per kernel dimension.

    Returns:
        Shape ``(batch, atoms, *positions)``; not contiguous in general.
    """
    if _in_blocks(atoms):
        return _correlate_blocks(_phases(canvas, stride[0]), _phases(atoms, stride[0]))
    if len(stride) == 1:
        return correlate(canvas.unsqueeze(2), atoms.unsqueeze(2), (1, *stride)).squeeze(2)
    if len(stride) == 3:
        return F.conv3d(canvas, atoms, stride=stride)
    if _convolves_exactly(canvas):
        codes: Tensor = _Correlate.apply(canvas, atoms, stride)
        return codes
    kernel = atoms.shape[2:]
    codes = atoms.flatten(1) @ F.unfold(canvas, kernel, stride=stride)
    positions = [(n - k) // s + 1 for n, k, s in zip(canvas.shape[2:], kernel, stride)]
    return codes.unflatten(2, positions)


def overlap_add(codes: Tensor, atoms: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Sum of the atoms, each laid at its positions: the adjoint of ``correlate``.

    Args:
        codes: Shape ``(batch, atoms, *positions)``.
        atoms: Shape ``(atoms, channels, *kernel)``, one to three kernel dimensions.
        stride: One per kernel dimension.

    Returns:
        Shape ``(batch, channels, *lengths)``, ``(positions - 1) * stride + kernel`` long.
    """
    if _in_blocks(atoms):
        return _overlap_add_line(codes, atoms, stride[0])
    if len(stride) == 1:
        return overlap_add(codes.unsqueeze(2), atoms.unsqueeze(2), (1, *stride)).squeeze(2)
    if len(stride) == 3:
        return F.conv_transpose3d(codes, atoms, stride=stride)
    if _convolves_exactly(codes):
        canvas: Tensor = _OverlapAdd.apply(codes, atoms, stride)
        return canvas
    return _fold(codes, atoms, stride)


def _convolves_exactly(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _in_blocks(atoms: Tensor) -> bool:
    return atoms.dim() == 3 and atoms.shape[0] * atoms.shape[1] <= _FEW_PAIRS


# --- two dimensions -------------------------------------------------------------------------------


class _Correlate(torch.autograd.Function):
    """``conv2d``, of which the reverse pass holds no transposed convolution to few channels."""

    generate_vmap_rule = True

    @staticmethod
    def forward(canvas: Tensor, atoms: Tensor, stride: tuple[int, ...]) -> Tensor:
        return F.conv2d(canvas, atoms, stride=stride)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        canvas, atoms, ctx.stride = inputs
        ctx.save_for_backward(canvas, atoms)
        ctx.save_for_forward(canvas, atoms)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        canvas, atoms = ctx.saved_tensors
        of_canvas, of_atoms, _ = ctx.needs_input_grad
        return (
            overlap_add(grad, atoms, ctx.stride) if of_canvas else None,
            _atoms_met(canvas, grad, atoms, ctx.stride) if of_atoms else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, of_canvas: Tensor | None, of_atoms: Tensor | None, _: None) -> Tensor:
        return _product_rule(correlate, ctx, of_canvas, of_atoms)


class _OverlapAdd(torch.autograd.Function):
    """Overlap-add in two dimensions, of which the reverse pass copies no patches."""

    generate_vmap_rule = True

    @staticmethod
    def forward(codes: Tensor, atoms: Tensor, stride: tuple[int, ...]) -> Tensor:
        if atoms.shape[1] > _FEW_CHANNELS:
            return F.conv_transpose2d(codes, atoms, stride=stride)
        return _fold(codes, atoms, stride)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        codes, atoms, ctx.stride = inputs
        ctx.save_for_backward(codes, atoms)
        ctx.save_for_forward(codes, atoms)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        codes, atoms = ctx.saved_tensors
        of_codes, of_atoms, _ = ctx.needs_input_grad
        return (
            correlate(grad, atoms, ctx.stride) if of_codes else None,
            _atoms_met(grad, codes, atoms, ctx.stride) if of_atoms else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, of_codes: Tensor | None, of_atoms: Tensor | None, _: None) -> Tensor:
        return _product_rule(overlap_add, ctx, of_codes, of_atoms)


def _product_rule(product: Any, ctx: Any, of_value: Tensor | None, of_atoms: Tensor | None) -> Any:
    value, atoms = ctx.saved_tensors
    terms = [] if of_value is None else [product(of_value, atoms, ctx.stride)]
    terms += [] if of_atoms is None else [product(value, of_atoms, ctx.stride)]
    return sum(terms[1:], terms[0])


def _atoms_met(canvas: Tensor, codes: Tensor, atoms: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Derivative of ``<codes, correlate(canvas, atoms)>`` by the atoms."""
    grad: Tensor = conv2d_weight(canvas, atoms.shape, codes, stride=stride)
    return grad


def _fold(codes: Tensor, atoms: Tensor, stride: tuple[int, ...]) -> Tensor:
    kernel = atoms.shape[2:]
    lengths = tuple((p - 1) * s + k for p, s, k in zip(codes.shape[2:], stride, kernel))
    return F.fold(atoms.flatten(1).T @ codes.flatten(2), lengths, kernel, stride=stride)


# --- one dimension --------------------------------------------------------------------------------


def _phases(signal: Tensor, stride: int) -> Tensor:
    """``(.., channels, length)`` to ``(.., channels * stride, length / stride)``, rounded up.

    Convolutions of these have stride one.
    """
    missing = -signal.shape[-1] % stride
    signal = F.pad(signal, (0, missing)) if missing else signal  # a pad of nothing would copy
    return signal.unflatten(-1, (-1, stride)).transpose(-1, -2).flatten(1, 2)


def _overlap_add_line(codes: Tensor, atoms: Tensor, stride: int) -> Tensor:
    length = (codes.shape[-1] - 1) * stride + atoms.shape[-1]
    canvas = _overlap_add_blocks(codes, _phases(atoms, stride))
    return canvas.unflatten(1, (-1, stride)).transpose(-1, -2).flatten(2)[..., :length]


def _correlate_blocks(canvas: Tensor, atoms: Tensor) -> Tensor:
    num_atoms, channels, kernel = atoms.shape
    positions = canvas.shape[-1] - kernel + 1
    block = _block_size(kernel, positions)
    blocks = -(-positions // block)
    width = block + kernel - 1  # samples that the positions of a block meet
    pieces = -(-width // block)
    canvas = F.pad(canvas, (0, (blocks + pieces - 1) * block - canvas.shape[-1]))
    rows = canvas.unflatten(-1, (-1, block)).transpose(1, 2)  # (batch, .., channels, block)
    met = [rows[:, i : i + blocks, :, : width - i * block] for i in range(pieces)]
    patches = torch.cat(met, -1).flatten(2)  # (batch, blocks, channels * width)
    weights = _toeplitz(atoms, block).permute(1, 3, 2, 0).reshape(channels * width, -1)
    codes = (patches.flatten(0, 1) @ weights).reshape(len(canvas), blocks * block, num_atoms)
    return codes[:, :positions].transpose(1, 2)


def _overlap_add_blocks(codes: Tensor, atoms: Tensor) -> Tensor:
    num_atoms, channels, kernel = atoms.shape
    positions = codes.shape[-1]
    block = _block_size(kernel, positions)
    blocks = -(-positions // block)
    width = block + kernel - 1
    pieces = -(-width // block)
    # Atoms last, as `_correlate_blocks` leaves them: then no code is moved but to fill a block.
    missing = blocks * block - positions
    codes = codes.transpose(1, 2)
    codes = F.pad(codes, (0, 0, 0, missing)) if missing else codes
    weights = _toeplitz(atoms, block).permute(2, 0, 1, 3).reshape(block * num_atoms, -1)
    laid = codes.reshape(-1, block * num_atoms) @ weights
    laid = laid.reshape(len(codes), blocks, channels, width)
    parts = [
        F.pad(part, (0, block - part.shape[-1], 0, 0, i, pieces - 1 - i))
        for i, part in enumerate(laid.split(block, -1))
    ]
    canvas = sum(parts[1:], parts[0]).transpose(1, 2).flatten(2)  # (batch, channels, samples)
    return canvas[..., : positions + kernel - 1]


def _block_size(kernel: int, positions: int) -> int:
    # Of a short kernel no more than its length, or most of the matrix would be zeros; of a long one
    # a quarter, or a block would copy more than four neighbours' samples.
    return min(positions, kernel, max(_BLOCK, kernel // 4))


def _toeplitz(atoms: Tensor, block: int) -> Tensor:
    """``t[k, c, p, p + i] = atoms[k, c, i]``, ``(atoms, channels, block, block + kernel - 1)``."""
    kernel = atoms.shape[-1]
    rows = F.pad(atoms, (0, block)).unsqueeze(2).expand(-1, -1, block, -1).flatten(2)
    return rows[..., : block * (block + kernel - 1)].unflatten(2, (block, block + kernel - 1))
