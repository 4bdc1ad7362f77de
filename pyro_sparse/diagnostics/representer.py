"""Which training data an atom, or a reconstruction, is made of."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_sparse.dictionaries import Dictionary
from pyro_sparse.infer.numbers import check_real, check_whole
from pyro_sparse.ops import check_tensor

_VALUES = 2**24
"""Numbers in one block of weights, unless told otherwise: 128 MiB in float64."""


class Contributors(NamedTuple):
    """The training data with the largest weights, for each datum.

    Attributes:
        rows: Of the training data, largest magnitude of the weight first; ``(m, count)``.
        weight: Their weights, with sign; ``(m, count)``.

    Example:
        >>> data = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> explained = Representer(data, codes=torch.tensor([[2.0], [0.0]]), ridge=1e-6)
        >>> explained.top(torch.tensor([[3.0]]), count=1)
        Contributors(rows=tensor([[0]]), weight=tensor([[1.5000]]))
    """

    rows: Tensor
    weight: Tensor


class Stationarity(NamedTuple):
    r"""How far a dictionary :math:`D` is from its representer form :math:`D^*`.

    All are 0, and ``cosine`` 1, where the explanation applies exactly.

    Attributes:
        distance: :math:`\|D - D^*\|_F / \|D\|_F`.
        of_atom: The same of each atom, ``(atoms,)``. 1 for an atom that no training datum uses:
            nothing explains it.
        cosine: Between each atom and its representer form, in [-1, 1], ``(atoms,)``; ``nan`` for an
            atom that no training datum uses. Near 1 with a large ``of_atom``: right up to length.
        gradient: :math:`\|Z^T (X - Z D) - \rho D\|_F / \|Z^T X\|_F`.
        reconstruction: :math:`\|Z D - Z D^*\|_F / \|Z D\|_F`: by how much the reconstructions of
            the training data differ. The number that counts for ``weights``: atoms that are
            seldom used have little part in it.

    Example:
        >>> data = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> explained = Representer(data, codes=torch.tensor([[2.0], [0.0]]), ridge=1e-6)
        >>> explained.stationarity(torch.tensor([[1.0, 0.0]])).cosine
        tensor([1.])
    """

    distance: float
    of_atom: Tensor
    cosine: Tensor
    gradient: float
    reconstruction: float


class Representer:
    r"""A dense dictionary, and what it reconstructs, as weighted sums of training data.

    Where the dictionary minimises :math:`\tfrac12 \|X - Z D\|^2 + \tfrac{\rho}{2} \|D\|^2` at given
    codes, its atoms and any reconstruction :math:`\hat x = D^T z` are

    .. math::
        D^* = (Z^T Z + \rho I)^{-1} Z^T X, \qquad
        \hat x = \sum_n \beta_n(z)\, x_n, \qquad
        \beta(z) = Z (Z^T Z + \rho I)^{-1} z .

    By Woodbury's identity this is :math:`(Z Z^T + \rho I)^{-1} Z z`, with a matrix of the size of
    the dictionary to factor in place of one of the size of the training set. The similarity
    :math:`Z z` of codes alone says which data share atoms; the weights take away what several of
    them say in common.

    ``ridge`` may differ by atom. A dictionary of unit-norm atoms at a minimum of
    :math:`\|X - Z D\|^2` has a representer form as well, whose ridge are the multipliers of the
    constraint: see ``of_unit_norm``. How far a dictionary is from such a minimum says
    ``stationarity``; look at it before the weights.

    Solves are in float64. Of the training data, a block of ``chunk_size`` rows is worked on at a
    time, so 60,000 data of 1,024 codes take little more memory than the codes themselves.

    Args:
        data: Training data :math:`X`, shape ``(n, *signal_shape)``, kept by reference.
        codes: Their codes :math:`Z`, shape ``(n, atoms)``, likewise.
        ridge: :math:`\rho > 0`, in squared code units: one number, or one for each atom. Published:
            1e-3 and 1e-7.
        chunk_size: Training data in one block; None bounds the memory of a block.

    Attributes:
        atoms: :math:`D^*`, shape ``(atoms, *signal_shape)``, of the codes' dtype.
        ridge: Shape ``(atoms,)``, float64.

    Raises:
        TypeError: If ``data`` or ``codes`` are not floating tensors of one dtype.
        RuntimeError: If they are on different devices.
        ValueError: If a shape does not fit, a value is not finite, a ridge is not positive, or the
            matrix cannot be factored.
        NotImplementedError: If the codes are convolutional. There a training datum has one weight
            for each of its patches.

    References:
        Tolooshams & Ba (2022), Stable and interpretable unrolled dictionary learning, TMLR
        (there with a matrix of the size of the training set); Yeh, Kim, Yen &
        Ravikumar (2018), NeurIPS 31, for representer points.

    Example:
        >>> data = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> found = Representer(data, codes=torch.tensor([[2.0], [0.0]]), ridge=1e-6)
        >>> found.atoms
        tensor([[1.0000, 0.0000]])
        >>> found.weights(torch.tensor([[3.0]]))  # 3 times the atom: one and a half first data
        tensor([[1.5000, 0.0000]])
    """

    def __init__(
        self,
        data: Tensor,
        codes: Tensor,
        ridge: float | Tensor,
        *,
        chunk_size: int | None = None,
    ) -> None:
        _check_pair(data, codes)
        self.data, self.codes = data.detach(), codes.detach()
        if chunk_size is not None:
            check_whole("chunk_size", chunk_size, 1)
        self._chunk_size = chunk_size
        self.ridge = _check_ridge(ridge, self.codes)
        gram, moment = _moments(self.data, self.codes, self._chunk(1))
        self._factor = _factored(gram, self.ridge)
        self._moment = moment
        solved = torch.cholesky_solve(moment, self._factor)  # (atoms, features)
        self._gram = gram
        self.atoms = self._shaped(solved)

    @classmethod
    def of_unit_norm(
        cls,
        data: Tensor,
        codes: Tensor,
        dictionary: Dictionary | Tensor,
        *,
        chunk_size: int | None = None,
    ) -> Representer:
        r"""The form of a dictionary whose atoms are kept at unit norm.

        At a minimum on the unit spheres, :math:`Z^T (X - Z D) = \operatorname{diag}(\rho) D`, so
        :math:`\rho_k = \langle (Z^T (X - Z D))_k, d_k \rangle`, and no number is chosen. With MAP
        codes under a Laplace prior of rate :math:`\lambda` and noise :math:`\sigma` this is
        :math:`\lambda \sigma^2 \sum_n |z_{nk}|`: how much the prior shrinks. An atom that no datum
        uses has any ridge, here 1.

        Args:
            data: As above.
            codes: As above.
            dictionary: A dense dictionary, or its atoms, shape ``(atoms, *signal_shape)``.
            chunk_size: As above.

        Raises:
            ValueError: If a multiplier is not positive: the codes do not shrink, so they are not
                those of a penalised fit. Pass a ridge.
        """
        _check_pair(data, codes)
        rows = _rows(dictionary, data, codes)
        gram, moment = _moments(data.detach(), codes.detach(), chunk_size or _block(codes, 1))
        ridge = ((moment - gram @ rows) * rows).sum(1) / rows.square().sum(1)
        ridge = torch.where(gram.diagonal() == 0, 1.0, ridge)
        if not bool((ridge > 0).all()):
            first = int((ridge <= 0).nonzero()[0])
            raise ValueError(
                "Expected codes that shrink, as those of a Laplace prior do, got a multiplier of "
                f"{float(ridge[first]):.3g} for atom {first} ({int((ridge <= 0).sum())} are not "
                "positive). Solve for the codes to a smaller gap, or pass "
                "Representer(data, codes, ridge=1e-3)."
            )
        return cls(data, codes, ridge, chunk_size=chunk_size)

    def weights(self, codes: Tensor) -> Tensor:
        """Weight of every training datum in the reconstruction from each of the codes.

        ``weights(torch.eye(num_atoms))`` are those of the atoms themselves.

        Args:
            codes: Shape ``(m, atoms)``.

        Returns:
            Shape ``(m, n)``; weights sum to anything and may be negative.
        """
        codes = self._checked(codes)
        solved = self._solved(codes)
        found = codes.new_empty(len(codes), len(self.codes))
        for start, block in self._blocks(len(codes)):
            found[:, start : start + len(block)] = (solved @ block.double().T).to(codes)
        return found

    def similarity(self, codes: Tensor) -> Tensor:
        """Inner product of each of the codes ``(m, atoms)`` with those of each training datum."""
        return self._checked(codes) @ self.codes.T

    def top(self, codes: Tensor, count: int = 10) -> Contributors:
        """The training data with the largest weights in magnitude.

        Args:
            codes: Shape ``(m, atoms)``.
            count: How many, at most ``n``.

        Raises:
            ValueError: If there are fewer than ``count`` training data.
        """
        codes = self._checked(codes)
        check_whole("count", count, 1)
        if count > len(self.codes):
            raise ValueError(f"Expected count <= {len(self.codes)} training data, got {count}.")
        solved = self._solved(codes)
        weight = solved.new_empty(len(codes), 0)
        index = torch.empty(len(codes), 0, dtype=torch.long, device=codes.device)
        for start, block in self._blocks(len(codes)):
            more = solved @ block.double().T
            weight = torch.cat([weight, more], 1)
            rows = torch.arange(start, start + len(block), device=codes.device)
            index = torch.cat([index, rows.expand(len(codes), -1)], 1)
            kept = weight.abs().topk(min(count, weight.shape[1])).indices
            weight, index = weight.gather(1, kept), index.gather(1, kept)
        return Contributors(index, weight.to(codes))

    def reconstruct(self, codes: Tensor) -> Tensor:
        """The weighted sums of training data, shape ``(m, *signal_shape)``."""
        return self._shaped(self._checked(codes).double() @ self.atoms.flatten(1).double())

    def stationarity(self, dictionary: Dictionary | Tensor) -> Stationarity:
        """How far a dictionary is from its representer form: whether the weights explain it.

        Args:
            dictionary: A dense dictionary, or its atoms, shape ``(atoms, *signal_shape)``.

        Raises:
            NotImplementedError: If it is convolutional.
            TypeError: If it is neither a dictionary nor a floating tensor.
            ValueError: If the atoms have another shape.
        """
        rows = _rows(dictionary, self.data, self.codes)
        own = self.atoms.flatten(1).double()
        away, lengths = (rows - own).norm(dim=1), rows.norm(dim=1)
        slope = self._moment - self._gram @ rows - self.ridge[:, None] * rows

        def energy(atoms: Tensor) -> float:  # squared norm of Z times the atoms
            return float((atoms * (self._gram @ atoms)).sum().clamp(min=0.0))  # of rounding

        cosine = (rows * own).sum(1) / (lengths * own.norm(dim=1))
        return Stationarity(
            float((rows - own).norm() / rows.norm()),
            (away / lengths).to(self.codes),
            cosine.to(self.codes),
            float(slope.norm() / self._moment.norm()),
            math.sqrt(energy(rows - own) / energy(rows)),
        )

    def _shaped(self, rows: Tensor) -> Tensor:
        return rows.to(self.codes).reshape(len(rows), *self.data.shape[1:])

    def _solved(self, codes: Tensor) -> Tensor:
        return torch.cholesky_solve(codes.double().T, self._factor).T  # (m, atoms)

    def _chunk(self, size: int) -> int:
        return self._chunk_size or _block(self.codes, size)

    def _blocks(self, size: int) -> Any:
        start = 0
        for block in self.codes.split(self._chunk(size)):
            yield start, block
            start += len(block)

    def _checked(self, codes: Tensor) -> Tensor:
        check_tensor("codes", codes, like=self.codes)
        if codes.dim() != 2 or codes.shape[1] != self.codes.shape[1]:
            raise ValueError(
                f"Expected codes of shape (m, {self.codes.shape[1]}), got {tuple(codes.shape)}. "
                "Those of a single datum are a batch of one: codes[None]."
            )
        return codes.detach()


def _block(codes: Tensor, size: int) -> int:
    return max(1, _VALUES // max(codes.shape[1], size))


def _check_pair(data: Tensor, codes: Tensor) -> None:
    check_tensor("codes", codes)
    check_tensor("data", data, like=codes)
    if codes.dim() > 2:
        raise NotImplementedError(
            "Expected codes of a dense dictionary, of shape (n, atoms), got "
            f"{tuple(codes.shape)}. With a convolutional one a training datum has a weight for "
            "each of its patches; cut patches and learn a Dense dictionary of them."
        )
    if codes.dim() < 2 or codes.numel() == 0:
        raise ValueError(f"Expected codes of shape (n, atoms), got {tuple(codes.shape)}.")
    if data.dim() < 2 or len(data) != len(codes):
        raise ValueError(
            f"Expected data of shape (n, *signal_shape) with n = {len(codes)} as of the codes, got "
            f"{tuple(data.shape)}."
        )


def _check_ridge(ridge: float | Tensor, codes: Tensor) -> Tensor:
    size = codes.shape[1]
    if not isinstance(ridge, Tensor):
        check_real("ridge", ridge, 0.0, torch.finfo(torch.float64).max, open_low=True)
        return torch.full((size,), float(ridge), dtype=torch.float64, device=codes.device)
    check_tensor("ridge", ridge)
    if ridge.shape not in ((), (size,)):
        raise ValueError(
            f"Expected ridge of shape () or (atoms,) = ({size},), got {tuple(ridge.shape)}."
        )
    if not bool((ridge > 0).all()):
        raise ValueError(f"Expected ridge > 0, got {float(ridge.min())}.")
    return ridge.detach().to(codes.device, torch.float64).expand(size)


def _moments(data: Tensor, codes: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """``Z^T Z`` and ``Z^T X``, in float64."""
    atoms, features = codes.shape[1], data[0].numel()
    gram = codes.new_zeros(atoms, atoms, dtype=torch.float64)
    moment = codes.new_zeros(atoms, features, dtype=torch.float64)
    for rows, block in zip(data.split(chunk), codes.split(chunk), strict=True):
        wide = block.double()
        gram += wide.T @ wide
        moment += wide.T @ rows.flatten(1).double()
    if not bool(torch.isfinite(gram).all() and torch.isfinite(moment).all()):
        raise ValueError(
            "Expected finite data and codes, got values that are not, or whose squares are not. "
            "Leave those rows out."
        )
    return gram, moment


def _factored(gram: Tensor, ridge: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(gram + ridge.diag())
    if int(info):
        raise ValueError(
            f"Expected a ridge that makes Z'Z + ridge positive definite, got {float(ridge.min())} "
            f"beside a largest entry of Z'Z of {float(gram.max()):.3g}. Try "
            f"ridge={1e-10 * float(gram.max()):.1g} or more."
        )
    return factor


def _rows(dictionary: Dictionary | Tensor, data: Tensor, codes: Tensor) -> Tensor:
    """Atoms as ``(atoms, features)`` in float64."""
    if isinstance(dictionary, Dictionary):
        if dictionary.code_dims != 1:
            raise NotImplementedError(
                "Expected a dense dictionary, got one whose codes have positions: its atoms are "
                "sums of patches, not of whole training data."
            )
        dictionary = dictionary.atoms
    check_tensor("dictionary", dictionary)
    shape = (codes.shape[1], *data.shape[1:])
    if tuple(dictionary.shape) != shape and tuple(dictionary.flatten(1).shape) != (
        shape[0],
        data[0].numel(),
    ):
        raise ValueError(
            f"Expected atoms of shape (atoms, *signal_shape) = {shape}, got "
            f"{tuple(dictionary.shape)}."
        )
    return dictionary.detach().flatten(1).to(codes.device, torch.float64)
