"""Convolutional dictionaries: atoms shifted over a signal of one, two or three dimensions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_sparse.dictionaries.base import (
    Dictionary,
    LinearMap,
    check_shape,
    check_sizes,
    register_atoms,
)
from pyro_sparse.dictionaries.boundaries import Boundary, Interior
from pyro_sparse.dictionaries.convolutions import correlate, overlap_add
from pyro_sparse.ops import check_tensor, largest_eigenvalue_bound


class ConvMap(LinearMap):
    """Sum of shifted atoms, and correlation with each atom at each position.

    How it is computed is chosen by shape: see ``pyro_sparse.dictionaries.convolutions``.

    Args:
        atoms: Shape ``(atoms, channels, *kernel)``, one to three kernel dimensions.
        stride: One per kernel dimension.
        boundary: What happens at the edges.

    Example:
        >>> echo = ConvMap(torch.tensor([[[1.0, 0.5]]]), stride=(1,), boundary=Interior())
        >>> echo.forward(torch.tensor([[2.0, 0.0, 0.0]]))
        tensor([[2., 1., 0., 0.]])
    """

    def __init__(self, atoms: Tensor, stride: tuple[int, ...], boundary: Boundary) -> None:
        if atoms.dim() != 2 + len(stride):
            raise NotImplementedError(
                f"Expected atoms of shape (atoms, channels, *kernel) with {len(stride)} kernel "
                f"dimensions, got {tuple(atoms.shape)}. A convolutional dictionary that is sampled "
                "has no vectorised particles: use num_particles with vectorize_particles=False."
            )
        self.atoms = atoms
        self.stride = stride
        self.boundary = boundary
        self.kernel = tuple(atoms.shape[2:])

    def forward(self, codes: Tensor) -> Tensor:
        """``(..., atoms, *positions)`` to ``(..., channels, *lengths)``."""
        dims = len(self.kernel)
        batch = codes.shape[: -dims - 1]
        canvas = overlap_add(codes.reshape(-1, *codes.shape[-dims - 1 :]), self.atoms, self.stride)
        return self.to_signal(canvas, batch)

    def adjoint(self, signal: Tensor) -> Tensor:
        """``(..., channels, *lengths)`` to ``(..., atoms, *positions)``."""
        batch = signal.shape[: -len(self.kernel) - 1]
        codes = correlate(self.to_canvas(signal), self.atoms, self.stride)
        return codes.reshape(*batch, *codes.shape[1:])  # (..., atoms, *positions)

    def to_signal(self, canvas: Tensor, batch: torch.Size) -> Tensor:
        """``(n, channels, *canvas_lengths)`` to ``(*batch, channels, *lengths)``."""
        for dim, kernel, stride in self._axes():
            canvas = self.boundary.to_signal(canvas, dim, kernel, stride)
        return canvas.reshape(*batch, *canvas.shape[1:])

    def to_canvas(self, signal: Tensor) -> Tensor:
        """``(..., channels, *lengths)`` to ``(n, channels, *canvas_lengths)``: its adjoint."""
        canvas = signal.reshape(-1, *signal.shape[-len(self.kernel) - 1 :])
        for dim, kernel, stride in self._axes():
            canvas = self.boundary.to_canvas(canvas, dim, kernel, stride)
        return canvas

    def at(self, index: Tensor, shape: torch.Size) -> LinearMap:
        """The map on some codes: where they are few, one atom is laid for each."""
        # To lay a sample costs about as much as a code, active or not, does in `forward`: some
        # nanoseconds. Within this bound no more memory is taken than by a few codes either.
        few = len(index) * self.atoms[0].numel() <= shape.numel()
        return _LaidAtoms(self, index, shape) if few else super().at(index, shape)

    def squared_norm(self, signal_shape: tuple[int, ...] | None = None) -> Tensor:
        r"""Supremum of the symbol over all frequencies, from above, for a signal of any length.

        In the polyphase form (a stride makes ``prod(stride)`` phases) the squared norm is at most
        :math:`\sup_\omega \|\hat A(\omega)\|_2^2`, and a trigonometric polynomial of degree
        :math:`m` exceeds its largest value on :math:`N > 2m` equidistant points at most by the
        factor :math:`1 / \cos(\pi m / N)` (here 1.02 in one dimension, 1.17 in two).

        References:
            Ehlich & Zeller (1964), Math. Z. 86, 41-44.
        """
        dims = len(self.kernel)
        atoms = self.atoms.detach()
        blocks = [-(-k // s) for k, s in zip(self.kernel, self.stride)]
        for dim, (block, kernel, stride) in enumerate(zip(blocks, self.kernel, self.stride)):
            atoms = F.pad(atoms, (0, 0) * (dims - 1 - dim) + (0, block * stride - kernel))
        split = [size for pair in zip(blocks, self.stride) for size in pair]
        atoms = atoms.reshape(*self.atoms.shape[:2], *split)
        phase_dims = [3 + 2 * d for d in range(dims)]
        block_dims = [2 + 2 * d for d in range(dims)]
        phases = atoms.permute(0, 1, *phase_dims, *block_dims).flatten(1, 1 + dims)
        oversampling = 16 if dims == 1 else 8  # the number of frequencies grows with its power
        grid = [max(1, oversampling * (block - 1)) for block in blocks]
        symbol = torch.fft.rfftn(phases, s=grid, dim=list(range(2, 2 + dims))).flatten(2)
        symbol = symbol.permute(2, 0, 1)  # (frequencies, atoms, phases)
        if symbol.shape[2] == 1:
            bound = symbol.abs().square().sum((1, 2)).max()
        else:
            wide = symbol.shape[1] < symbol.shape[2]
            gram = symbol @ symbol.mH if wide else symbol.mH @ symbol
            bound = largest_eigenvalue_bound(gram, joint=True)
        for block, size in zip(blocks, grid):
            bound = bound / math.cos(math.pi * (block - 1) / size)
        return bound

    def double(self) -> ConvMap:
        """The same map in float64."""
        return ConvMap(self.atoms.double(), self.stride, self.boundary)

    def squared(self) -> ConvMap:
        """The map with squared atoms, where no code reaches a sample twice."""
        self._check_entries()
        return ConvMap(self.atoms.square(), self.stride, self.boundary)

    def accumulate(self, function: Callable[[Tensor], Tensor], signal: Tensor) -> Tensor:
        """``sum_kp f_kp(atoms[k, c, t - p] * signal[..., c, t])``, one kernel offset at a time."""
        self._check_entries()
        dims = len(self.kernel)
        canvas = signal
        for dim, kernel, stride in self._axes():
            canvas = self.boundary.to_canvas(canvas, dim, kernel, stride)
        # Channels first: to the function they are one more leading dimension of the codes.
        canvas = canvas.movedim(-dims - 1, 0)  # (channels, ..., *lengths)
        lead = [1] * (canvas.dim() - 1 - dims)
        total = torch.zeros_like(canvas)
        for offset in itertools.product(*map(range, self.kernel)):
            # The samples that this offset of an atom meets, one per position.
            met: tuple[Any, ...] = (
                ...,
                *(
                    slice(first, length - kernel + first + 1, stride)
                    for first, length, kernel, stride in zip(
                        offset, canvas.shape[-dims:], self.kernel, self.stride
                    )
                ),
            )
            samples: tuple[Any, ...] = (slice(None), slice(None), *offset)
            entries = self.atoms[samples].T  # (channels, atoms)
            entries = entries.reshape(entries.shape[0], *lead, entries.shape[1], *[1] * dims)
            values = function(canvas[met].unsqueeze(-dims - 1) * entries)
            total[met] += values.sum(-dims - 1)
        total = total.movedim(0, -dims - 1)
        for dim, kernel, stride in self._axes():
            total = self.boundary.to_signal(total, dim, kernel, stride)
        return total

    def _check_entries(self) -> None:
        # Stated by the class itself: what a subclass changes may make it untrue.
        if not vars(type(self.boundary)).get("one_to_one", False):
            raise NotImplementedError(
                f"Expected a boundary of which no code reaches a sample twice, got "
                f"{self.boundary!r}: the entries of its map are not those of its atoms. If they "
                "are, state it with the class attribute one_to_one = True."
            )

    def _axes(self) -> list[tuple[int, int, int]]:
        dims = len(self.kernel)
        return [(d - dims, self.kernel[d], self.stride[d]) for d in range(dims)]


class _LaidAtoms(LinearMap):
    """A convolutional map on few codes, which knows the samples of a canvas that each one meets."""

    def __init__(self, inner: ConvMap, index: Tensor, shape: torch.Size) -> None:
        self.inner = inner
        dims = len(inner.kernel)
        self.batch = shape[: -dims - 1]
        lengths = [
            (positions - 1) * stride + kernel
            for positions, stride, kernel in zip(shape[-dims:], inner.stride, inner.kernel)
        ]
        self.canvas = torch.Size([self.batch.numel(), inner.atoms.shape[1], *lengths])
        met = torch.zeros_like(index)
        apart = 1  # samples between neighbours along a dimension of the canvas
        within = torch.zeros(1, dtype=index.dtype, device=index.device)
        for d in reversed(range(dims)):
            met += index % shape[d - dims] * inner.stride[d] * apart
            index = index // shape[d - dims]
            along = torch.arange(inner.kernel[d], device=index.device) * apart
            within = (along[:, None] + within).flatten()
            apart *= lengths[d]
        met += index // shape[-dims - 1] * self.canvas[1] * apart
        offset = torch.arange(self.canvas[1], device=index.device) * apart
        within = (offset[:, None] + within).flatten()  # (samples of an atom,)
        self.met = (met[:, None] + within).flatten()  # (codes * samples of an atom,)
        self.atoms = inner.atoms.flatten(1).index_select(0, index % shape[-dims - 1])

    def forward(self, codes: Tensor) -> Tensor:
        laid = (codes[:, None] * self.atoms).flatten()
        canvas = laid.new_zeros(self.canvas.numel()).scatter_add(0, self.met, laid)
        return self.inner.to_signal(canvas.reshape(self.canvas), self.batch)

    def adjoint(self, signal: Tensor) -> Tensor:
        # `index_select` takes a quarter of the time of an index in brackets.
        met = self.inner.to_canvas(signal).flatten().index_select(0, self.met)
        return torch.einsum("ij,ij->i", met.reshape(self.atoms.shape), self.atoms)


class Conv(Dictionary):
    r"""Convolutional dictionary: each atom occurs at regular positions of a signal.

    .. math:: \eta = \sum_k a_k * z_k, \qquad \|a_k\|_2 = 1

    with the norm over channels and kernel together.

    Args:
        num_atoms: Number of atoms, ``K >= 1``.
        channels: Channels of the signal (1 for a grey picture or a single electrode).
        kernel_size: Size of an atom in samples; one whole number for a 1-D signal, a tuple of
            one to three for 1-D, 2-D and 3-D.
        stride: Distance between positions in samples, ``<=`` the kernel size; one for all
            dimensions or a tuple.
        boundary: ``Interior()``, ``Overhang()`` or ``Periodic()``: what happens at the edges.
        atoms: Initial atoms, shape ``(atoms, channels, *kernel_size)``, none of them zero; drawn
            from a standard normal by torch's generator if not given.
        unit_norm: Keep every atom at unit Euclidean length, by parametrisation.

    Attributes:
        atoms: Shape ``(atoms, channels, *kernel_size)``.

    Raises:
        TypeError: If ``atoms`` is not a floating tensor, or ``boundary`` not a boundary.
        ValueError: If a size is not a positive whole number, the stride exceeds the kernel (gaps
            would be left), or ``atoms`` has another shape or a zero atom.

    Example:
        >>> dictionary = Conv(num_atoms=8, channels=1, kernel_size=(5, 5))
        >>> dictionary.code_shape((3, 1, 20, 30))
        torch.Size([3, 8, 16, 26])
    """

    def __init__(
        self,
        num_atoms: int,
        channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        *,
        boundary: Boundary | None = None,
        atoms: Tensor | None = None,
        unit_norm: bool = True,
    ) -> None:
        super().__init__()
        kernel = tuple(kernel_size) if isinstance(kernel_size, Sequence) else (kernel_size,)
        strides = tuple(stride) if isinstance(stride, Sequence) else (stride,) * len(kernel)
        check_sizes(num_atoms=num_atoms, channels=channels, kernel_size=kernel, stride=strides)
        if len(kernel) > 3 or len(strides) != len(kernel):
            raise ValueError(
                "Expected kernel_size with one to three dimensions and a stride for each, got "
                f"kernel_size {kernel} and stride {strides}."
            )
        if any(s > k for s, k in zip(strides, kernel)):
            raise ValueError(
                f"Expected a stride of at most the kernel size {kernel}, got {strides}: samples "
                "between atoms would be out of reach."
            )
        if boundary is not None and not isinstance(boundary, Boundary):
            raise TypeError(
                "Expected boundary to be Interior(), Overhang() or Periodic(), got "
                f"{boundary!r}. These are objects of pyro_sparse.dictionaries."
            )
        shape = (num_atoms, channels, *kernel)
        if atoms is None:
            atoms = torch.randn(shape)
        check_tensor("atoms", atoms)
        if atoms.shape != shape:
            raise ValueError(
                f"Expected atoms of shape (atoms, channels, *kernel) = {shape}, "
                f"got {tuple(atoms.shape)}."
            )
        self.num_atoms = num_atoms
        self.channels = channels
        self.kernel_size = kernel
        self.stride = strides
        self.boundary = Interior() if boundary is None else boundary
        self.code_dims = self.signal_dims = 1 + len(kernel)
        register_atoms(self, atoms, unit_norm=unit_norm)

    def bind(self, atoms: Tensor | None = None) -> ConvMap:  # noqa: D102
        return ConvMap(self.bound_atoms(atoms), self.stride, self.boundary)

    def code_shape(self, signal_shape: tuple[int, ...]) -> torch.Size:  # noqa: D102
        signal_shape = check_shape(signal_shape)
        dims = self.signal_dims
        if len(signal_shape) < dims or signal_shape[-dims] != self.channels:
            sizes = ("length",) if dims == 2 else ("height", "width", "depth")[: dims - 1]
            added = "y[None]" if len(signal_shape) < dims else "y[:, None]"
            raise ValueError(
                f"Expected a signal of shape (..., channels={self.channels}, {', '.join(sizes)}), "
                f"got {tuple(signal_shape)}. A single channel is a dimension too: {added}."
            )
        positions: list[Any] = [
            self.boundary.num_positions(n, k, s)
            for n, k, s in zip(signal_shape[1 - dims :], self.kernel_size, self.stride)
        ]
        return torch.Size([*signal_shape[:-dims], self.num_atoms, *positions])

    def extra_repr(self) -> str:  # noqa: D102
        return (
            f"num_atoms={self.num_atoms}, channels={self.channels}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, boundary={self.boundary}"
        )
