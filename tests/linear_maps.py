"""Independent references for linear maps: the materialised matrix, atoms placed one by one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_sparse.dictionaries import Boundary, Interior, Overhang, Periodic

BATCHES = [(), (3,), (2, 1)]
# Rounding of sums of a few thousand terms, relative to the norms of both sides.
ADJOINT_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}

# Name, boundary, and a length that fits ``kernel`` and ``stride`` in dimension ``dim``.
BOUNDARIES: dict[str, tuple[Boundary, Callable[[int, int, int], int]]] = {
    "interior": (Interior(), lambda kernel, stride, dim: kernel + (3 + dim) * stride),
    "overhang": (Overhang(), lambda kernel, stride, dim: (3 + dim) * stride),
    "periodic": (Periodic(), lambda kernel, stride, dim: stride * (-(-kernel // stride) + 1 + dim)),
}

# Kernel and stride: odd, even, stride 1 to 3, stride == kernel, a kernel of one sample, and
# dimensions that differ from each other.
GEOMETRIES = [
    ((5,), (1,)),
    ((4,), (1,)),
    ((5,), (2,)),
    ((4,), (2,)),
    ((7,), (3,)),
    ((4,), (3,)),
    ((3,), (3,)),
    ((1,), (1,)),
    ((3, 4), (1, 1)),
    ((3, 4), (2, 1)),
    ((5, 4), (2, 3)),
    ((2, 3), (2, 3)),
    ((1, 3), (1, 2)),
    ((2, 3, 4), (1, 1, 1)),
    ((3, 2, 4), (2, 1, 3)),
    ((2, 2, 3), (2, 2, 3)),
]


def fitting_lengths(name: str, kernel: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    rule = BOUNDARIES[name][1]
    return tuple(rule(k, s, dim) for dim, (k, s) in enumerate(zip(kernel, stride)))


def adjoint_error(
    forward: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], x: Tensor, y: Tensor
) -> float:
    """``|<Hx, y> - <x, H'y>|`` relative to the norms, the sums taken in float64."""
    left, right = forward(x), adjoint(y)
    assert left.shape == y.shape
    assert right.shape == x.shape
    assert left.dtype == right.dtype == x.dtype
    a, y = left.double(), y.double()
    x, b = x.double(), right.double()
    scale = torch.maximum(a.norm() * y.norm(), x.norm() * b.norm())
    return (((a * y).sum() - (x * b).sum()).abs() / scale).item()


def materialise(
    forward: Callable[[Tensor], Tensor], input_shape: tuple[int, ...], like: Tensor
) -> NDArray[np.float64]:
    """Matrix of a linear map, column by column from unit vectors: ``(outputs, inputs)``."""
    size = math.prod(input_shape)
    identity = torch.eye(size, dtype=like.dtype, device=like.device)
    with torch.no_grad():
        columns = forward(identity.reshape(size, *input_shape))
    return columns.reshape(size, -1).double().cpu().numpy().T


def squared_spectral_norm(matrix: NDArray[np.float64]) -> float:
    """Largest eigenvalue of the smaller Gram matrix: several times cheaper than all of an SVD."""
    gram = min(matrix @ matrix.T, matrix.T @ matrix, key=len)
    last = len(gram) - 1
    return float(scipy.linalg.eigvalsh(gram, subset_by_index=[last, last])[0])


def starts(name: str, length: int, kernel: int, stride: int) -> list[int]:
    """First samples of an atom, from the meaning of each boundary: the multiples of the stride."""
    wanted = {
        "interior": lambda t: t >= 0 and t + kernel <= length,
        "overhang": lambda t: t < length and t + kernel > 0,
        "periodic": lambda t: 0 <= t < length,
    }[name]
    return [t for t in range(-length - kernel, length + kernel) if t % stride == 0 and wanted(t)]


def place_atoms(
    name: str,
    codes: NDArray[np.float64],
    atoms: NDArray[np.float64],
    lengths: tuple[int, ...],
    stride: tuple[int, ...],
) -> NDArray[np.float64]:
    """Sum of atoms, each laid down sample by sample: ``(atoms, *positions)`` to a signal."""
    kernel = atoms.shape[2:]
    signal = np.zeros((atoms.shape[1], *lengths))
    firsts = [starts(name, n, k, s) for n, k, s in zip(lengths, kernel, stride)]
    assert codes.shape[1:] == tuple(map(len, firsts))
    for position in itertools.product(*map(range, codes.shape[1:])):
        for offset in itertools.product(*map(range, kernel)):
            at = [first[p] + o for first, p, o in zip(firsts, position, offset)]
            if name == "periodic":
                at = [i % n for i, n in zip(at, lengths)]
            if all(0 <= i < n for i, n in zip(at, lengths)):
                value = codes[(slice(None), *position)] @ atoms[(slice(None), slice(None), *offset)]
                signal[(slice(None), *at)] += value
    return signal


class Mask(nn.Module):
    """Keeps some samples; its own adjoint."""

    kept: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("kept", (torch.rand(shape) < 0.7).to(torch.get_default_dtype()))

    def forward(self, signal: Tensor) -> Tensor:
        return self.kept * signal

    def adjoint(self, measurement: Tensor) -> Tensor:
        return self.kept * measurement


class Blur(nn.Module):
    """Moving average with unequal weights over the last dimension, shortened to valid samples."""

    weights: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor([[[0.2, 0.5, 0.3]]]))

    def forward(self, signal: Tensor) -> Tensor:
        out = F.conv1d(signal.reshape(-1, 1, signal.shape[-1]), self.weights)
        return out.reshape(*signal.shape[:-1], -1)

    def adjoint(self, measurement: Tensor) -> Tensor:
        rows = measurement.reshape(-1, 1, measurement.shape[-1])
        return F.conv_transpose1d(rows, self.weights).reshape(*measurement.shape[:-1], -1)


class Sensing(nn.Module):
    """A matrix with fewer rows than samples: ``(..., *shape)`` to ``(..., rows)``."""

    matrix: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        size = math.prod(shape)
        self.register_buffer("matrix", torch.randn(max(1, size // 2), size))

    def forward(self, signal: Tensor) -> Tensor:
        return signal.flatten(signal.dim() - len(self.shape)) @ self.matrix.T

    def adjoint(self, measurement: Tensor) -> Tensor:
        return (measurement @ self.matrix).reshape(*measurement.shape[:-1], *self.shape)


OPERATORS: dict[str, Callable[[tuple[int, ...]], nn.Module]] = {
    "mask": Mask,
    "blur": Blur,
    "sensing": Sensing,
}
