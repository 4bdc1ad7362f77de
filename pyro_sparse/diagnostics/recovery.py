"""How much of a known dictionary was found."""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


class Recovery(NamedTuple):
    """Learned atoms matched to true ones, each at most once.

    Attributes:
        correlation: Absolute normalised correlation of each true atom with its match, at the best
            shift, in [0, 1]; shape ``(true atoms,)``. 1 means equal up to sign, scale and shift.
        match: Learned atom matched to each true one, or -1 if there were too few.
        sign: Sign of the correlation.
        shift: Samples by which the learned atom lies later than the true one, in each kernel
            dimension; shape ``(true atoms, dimensions)``, empty for dense atoms.

    Example:
        >>> found = match_atoms(-torch.eye(3)[[2, 0, 1]], torch.eye(3))
        >>> found.match, found.sign
        (tensor([1, 2, 0]), tensor([-1., -1., -1.], dtype=torch.float64))
    """

    correlation: Tensor
    match: Tensor
    sign: Tensor
    shift: Tensor


def match_atoms(learned: Tensor, truth: Tensor) -> Recovery:
    """Match learned atoms to true ones up to sign, order, scale and shift.

    A dictionary is identified no further than that. The matching maximises the sum of absolute
    correlations (Hungarian algorithm); convolutional atoms are correlated at every lag, so an
    atom that slid within its window counts as found.

    Args:
        learned: Shape ``(atoms, features)`` or ``(atoms, channels, *kernel)``.
        truth: Likewise; the number of atoms and the kernel may differ, the rest not.

    Raises:
        TypeError: If they are not dense tensors of real numbers.
        ValueError: If the shapes cannot be compared, or a value is not finite.

    References:
        Kuhn (1955), Naval Res. Logist. Q. 2; the error measure sqrt(1 - correlation**2) is that of
        Agarwal et al. (2016), SIAM J. Optim. 26(4).

    Example:
        >>> match_atoms(-torch.eye(3)[[2, 0, 1]], torch.eye(3)).correlation
        tensor([1., 1., 1.])
    """
    check_atoms(learned, "learned")
    check_atoms(truth, "truth")
    learned, truth = learned.detach().double().cpu(), truth.detach().double().cpu()
    if learned.dim() != truth.dim() or learned.dim() < 2 or learned.shape[1] != truth.shape[1]:
        raise ValueError(
            "Expected two sets of atoms of shape (atoms, features), or (atoms, channels, *kernel) "
            f"with equal channels, got {tuple(learned.shape)} and {tuple(truth.shape)}."
        )
    flat, lags = correlations(learned, truth)
    best, lag = flat.abs().max(-1)
    rows, columns = linear_sum_assignment(best.nan_to_num().numpy(), maximize=True)
    rows, columns = torch.from_numpy(rows), torch.from_numpy(columns)

    index = torch.full((len(truth),), -1)
    index[rows] = columns
    value = torch.zeros(len(truth), dtype=torch.float64)
    sign = torch.zeros(len(truth), dtype=torch.float64)
    shift = torch.zeros(len(truth), len(lags), dtype=torch.long)
    value[rows] = best[rows, columns].clamp(max=1.0)
    at = lag[rows, columns]
    sign[rows] = flat[rows, columns, at].sign()
    for dim in reversed(range(len(lags))):
        offset = at % lags[dim]
        at = at // lags[dim]
        # Lags beyond the learned atom's length are negative ones, wrapped around.
        shift[rows, dim] = torch.where(offset < learned.shape[2 + dim], offset, offset - lags[dim])
    return Recovery(value.to(torch.get_default_dtype()), index, sign, shift)


def correlations(learned: Tensor, truth: Tensor) -> tuple[Tensor, list[int]]:
    """Normalised correlation of all pairs of atoms, at every lag.

    Args:
        learned: Shape ``(atoms, features)`` or ``(atoms, channels, *kernel)``.
        truth: Likewise, equal but for the number of atoms and the kernel.

    Returns:
        Shape ``(true atoms, learned atoms, lags)``, lags of all kernel dimensions flattened; and
        the number of lags in each, none for dense atoms.
    """
    kernel_dims = learned.dim() - 2
    lags = [n + m - 1 for n, m in zip(learned.shape[2:], truth.shape[2:])]
    if kernel_dims:
        dims = tuple(range(-kernel_dims, 0))
        spectra = torch.fft.rfftn(learned, lags, dims), torch.fft.rfftn(truth, lags, dims)
        product = torch.einsum("jc...,kc...->kj...", spectra[0], spectra[1].conj())
        correlation = torch.fft.irfftn(product, lags, dims)
    else:
        correlation = truth @ learned.T
    lengths = truth.flatten(1).norm(dim=1)[:, None] * learned.flatten(1).norm(dim=1)
    lengths = torch.where(lengths == 0, 1.0, lengths)  # a dead atom correlates with nothing
    return correlation.reshape(len(truth), len(learned), -1) / lengths[:, :, None], lags


def check_atoms(atoms: Tensor, name: str) -> None:
    """Refuse what are no atoms."""
    if not isinstance(atoms, Tensor) or atoms.is_complex() or atoms.layout != torch.strided:
        kind = (
            f"{atoms.dtype} in {atoms.layout}"
            if isinstance(atoms, Tensor)
            else type(atoms).__name__
        )
        raise TypeError(
            f"Expected {name} to be a dense tensor of real numbers, got {kind}. "
            "Try torch.as_tensor(...), or dictionary.atoms."
        )
    if atoms.numel() == 0:
        raise ValueError(
            f"Expected {name} with at least one atom and feature, got {tuple(atoms.shape)}."
        )
    bad = ~torch.isfinite(atoms)
    if bool(bad.any()):
        raise ValueError(
            f"Expected {name} to be finite, got {int(bad.sum())} values that are not, the first at "
            f"{tuple(bad.nonzero()[0].tolist())}. Leave out the atoms that diverged."
        )
