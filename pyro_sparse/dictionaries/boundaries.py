"""What a convolutional dictionary does at the edges of a signal.

Atoms are laid at regular positions on a *canvas* just long enough to hold them all; a boundary says
how many positions there are and how the canvas becomes the signal. Each is linear and orthogonal to
everything else in the convolution, so one pair of maps serves every number of dimensions.

Along one dimension, with ``n`` samples, atoms of ``k`` samples and stride ``s``:

=============== ====================== ================================================ ==========
boundary        canvas becomes signal  positions                                        needs
=============== ====================== ================================================ ==========
``Interior()``  as it is               ``(n - k) / s + 1``: every atom lies inside      ``s | n-k``
``Overhang()``  its ends are cut off   ``n / s + floor((k - 1) / s)``: atoms that begin ``s | n``
                                       before or end after the signal count too
``Periodic()``  its end is wrapped     ``n / s``: the signal is a circle                ``s | n``
=============== ====================== ================================================ ==========
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


class Boundary:
    """Declares what a boundary does along one dimension; ``Conv`` calls it for each in turn.

    Attributes:
        one_to_one: States that each sample of an atom becomes one sample of the signal, unchanged,
            or is cut, and that no two samples of an atom meet in one. The map then has the atoms'
            samples as its entries, of which closed-form moments take squares. A boundary that
            mirrors or tapers must leave it false.

    Example:
        >>> boundary = Overhang()
        >>> positions = boundary.num_positions(length=100, kernel=11, stride=1)
        >>> boundary.length(positions, kernel=11, stride=1)
        100
    """

    one_to_one = False

    def num_positions(self, length: int, kernel: int, stride: int) -> int:
        """Number of atom positions for a signal of ``length`` samples.

        Raises:
            ValueError: If no whole number of positions fits ``length``.
        """
        raise NotImplementedError

    def length(self, num_positions: int, kernel: int, stride: int) -> int:
        """Length of the signal that ``num_positions`` positions make: undoes ``num_positions``."""
        raise NotImplementedError

    def to_signal(self, canvas: Tensor, dim: int, kernel: int, stride: int) -> Tensor:
        """Turn a canvas, ``(positions - 1) * stride + kernel`` samples long, into a signal."""
        raise NotImplementedError

    def to_canvas(self, signal: Tensor, dim: int, kernel: int, stride: int) -> Tensor:
        """Adjoint of ``to_signal``."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))


class Interior(Boundary):
    """Every atom lies wholly inside the signal: events cut by an edge are not modelled.

    Also called valid codes. Samples near an edge are reached by fewer atoms than those inside.

    Example:
        >>> Interior().num_positions(length=100, kernel=11, stride=1)
        90
    """

    one_to_one = True

    def num_positions(self, length: int, kernel: int, stride: int) -> int:  # noqa: D102
        if length < kernel or (length - kernel) % stride:
            fits = max(kernel, kernel + -(-(length - kernel) // stride) * stride)
            raise ValueError(
                f"Expected a length of {kernel} (the atom's) plus a multiple of {stride} (the "
                f"stride), got {length}. Pad the signal to {fits} samples, or use Overhang()."
            )
        return (length - kernel) // stride + 1

    def length(self, num_positions: int, kernel: int, stride: int) -> int:  # noqa: D102
        return (num_positions - 1) * stride + kernel

    def to_signal(self, canvas: Tensor, dim: int, kernel: int, stride: int) -> Tensor:  # noqa: D102
        return canvas

    def to_canvas(self, signal: Tensor, dim: int, kernel: int, stride: int) -> Tensor:  # noqa: D102
        return signal


class Overhang(Boundary):
    """Atoms may begin before the signal or end after it, and only their part inside counts.

    The right choice for a window cut out of something longer: events at its edges are explained.

    Example:
        >>> Overhang().num_positions(length=100, kernel=11, stride=1)
        110
    """

    one_to_one = True

    def num_positions(self, length: int, kernel: int, stride: int) -> int:  # noqa: D102
        return _num_blocks(length, stride) + (kernel - 1) // stride

    def length(self, num_positions: int, kernel: int, stride: int) -> int:  # noqa: D102
        return (num_positions - (kernel - 1) // stride) * stride

    def to_signal(self, canvas: Tensor, dim: int, kernel: int, stride: int) -> Tensor:  # noqa: D102
        start, length = self._window(canvas.shape[dim], kernel, stride)
        return canvas.narrow(dim, start, length)

    def to_canvas(self, signal: Tensor, dim: int, kernel: int, stride: int) -> Tensor:  # noqa: D102
        length = signal.shape[dim]
        num_positions = self.num_positions(length, kernel, stride)
        size = (num_positions - 1) * stride + kernel
        start, _ = self._window(size, kernel, stride)
        return _pad_dim(signal, dim, start, size - start - length)

    def _window(self, size: int, kernel: int, stride: int) -> tuple[int, int]:
        num_positions = (size - kernel) // stride + 1
        if num_positions <= (kernel - 1) // stride:
            raise ValueError(
                f"Expected more than {(kernel - 1) // stride} positions (those that hang over the "
                f"start), got {num_positions}: no sample lies inside."
            )
        return (kernel - 1) // stride * stride, self.length(num_positions, kernel, stride)


class Periodic(Boundary):
    """The signal is a circle: what runs over its end comes in at its beginning.

    Also called circular. What FFT-based solvers assume; edges of a photograph then touch.

    Example:
        >>> Periodic().num_positions(length=100, kernel=11, stride=1)
        100
    """

    one_to_one = True

    def num_positions(self, length: int, kernel: int, stride: int) -> int:  # noqa: D102
        if length < kernel:
            fits = -(-kernel // stride) * stride
            raise ValueError(
                f"Expected at least {kernel} samples (the atom's length), got {length}: a periodic "
                f"signal holds each atom at most once around. Pad the signal to {fits} samples."
            )
        return _num_blocks(length, stride)

    def length(self, num_positions: int, kernel: int, stride: int) -> int:  # noqa: D102
        return num_positions * stride

    def to_signal(self, canvas: Tensor, dim: int, kernel: int, stride: int) -> Tensor:  # noqa: D102
        over = kernel - stride
        length = canvas.shape[dim] - over
        self.num_positions(length, kernel, stride)
        if over <= 0:
            return _pad_dim(canvas, dim, 0, -over)
        wrapped = _pad_dim(canvas.narrow(dim, length, over), dim, 0, length - over)
        return canvas.narrow(dim, 0, length) + wrapped

    def to_canvas(self, signal: Tensor, dim: int, kernel: int, stride: int) -> Tensor:  # noqa: D102
        over = kernel - stride
        if over <= 0:
            return signal.narrow(dim, 0, signal.shape[dim] + over)
        return torch.cat([signal, signal.narrow(dim, 0, over)], dim)


def _num_blocks(length: int, stride: int) -> int:
    if length < 1 or length % stride:
        fits = max(1, -(-length // stride)) * stride
        raise ValueError(
            f"Expected a length that is a multiple of {stride} (the stride), got {length}. "
            f"Pad the signal to {fits} samples."
        )
    return length // stride


def _pad_dim(tensor: Tensor, dim: int, before: int, after: int) -> Tensor:
    """Zeros before and after along one (negative) dimension."""
    return pad(tensor, (0, 0) * (-dim - 1) + (before, after))
