"""Dense dictionaries: every atom reaches every feature."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_sparse.dictionaries.base import (
    Dictionary,
    LinearMap,
    check_shape,
    check_sizes,
    register_atoms,
)
from pyro_sparse.ops import check_tensor, largest_eigenvalue_bound


class DenseMap(LinearMap):
    """``codes @ atoms`` and its adjoint.

    Args:
        atoms: Shape ``(atoms, features)``; or ``(*batch, atoms, features)``, one dictionary for
            each leading index, where ``batch`` broadcasts with the codes' leading dimensions.

    Example:
        >>> DenseMap(torch.tensor([[1.0, 1.0], [0.0, 2.0]])).forward(torch.tensor([3.0, 1.0]))
        tensor([3., 5.])
    """

    def __init__(self, atoms: Tensor) -> None:
        self.atoms = atoms

    def forward(self, codes: Tensor) -> Tensor:
        """``(..., atoms)`` to ``(..., features)``."""
        if self.atoms.dim() == 2:
            return codes @ self.atoms
        return (codes.unsqueeze(-2) @ self.atoms).squeeze(-2)

    def adjoint(self, signal: Tensor) -> Tensor:
        """``(..., features)`` to ``(..., atoms)``."""
        return DenseMap(self.atoms.mT).forward(signal)

    def squared_norm(self, signal_shape: tuple[int, ...] | None = None) -> Tensor:
        """Largest eigenvalue of the smaller Gram matrix, from above; shape ``batch``."""
        atoms = self.atoms.detach()
        rows, columns = atoms.shape[-2:]
        return largest_eigenvalue_bound(atoms @ atoms.mT if rows < columns else atoms.mT @ atoms)

    def double(self) -> DenseMap:
        """The same map in float64."""
        return DenseMap(self.atoms.double())

    def squared(self) -> DenseMap:
        """The map with squared atoms."""
        return DenseMap(self.atoms.square())

    def accumulate(self, function: Callable[[Tensor], Tensor], signal: Tensor) -> Tensor:
        """``sum_k f_k(atoms[k, d] * signal[..., d])``; memory ``(..., features, atoms)``."""
        # Features first: to the function they are one more leading dimension of the codes.
        weights = signal.movedim(-1, 0).unsqueeze(-1)  # (features, ..., 1)
        entries = self.atoms.movedim(-1, 0)  # (features, *batch, atoms)
        lead = weights.dim() - entries.dim()
        entries = entries.reshape(entries.shape[0], *[1] * lead, *entries.shape[1:])
        return function(weights * entries).sum(-1).movedim(0, -1)


class Dense(Dictionary):
    r"""Dense dictionary: the predictor is a weighted sum of atoms.

    .. math:: \eta = \sum_k z_k a_k, \qquad \|a_k\|_2 = 1

    Args:
        num_atoms: Number of atoms, ``K >= 1``.
        num_features: Length of an atom, ``>= 1``.
        atoms: Initial atoms, shape ``(atoms, features)``, none of them zero; drawn from a standard
            normal by torch's generator if not given.
        unit_norm: Keep every atom at unit Euclidean length (by parametrisation: whatever an
            optimiser does). Without it, scale moves freely between codes and atoms, and only
            the prior fixes it.

    Attributes:
        atoms: Shape ``(atoms, features)``.

    Raises:
        TypeError: If ``atoms`` is not a floating tensor.
        ValueError: If a size is not a positive whole number, or ``atoms`` has another shape or a
            zero atom.

    Example:
        >>> dictionary = Dense(num_atoms=20, num_features=10)
        >>> dictionary(torch.zeros(5, 20)).shape
        torch.Size([5, 10])
    """

    code_dims = 1
    signal_dims = 1

    def __init__(
        self,
        num_atoms: int,
        num_features: int,
        *,
        atoms: Tensor | None = None,
        unit_norm: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(num_atoms=num_atoms, num_features=num_features)
        self.num_atoms = num_atoms
        self.num_features = num_features
        self.signal_shape = (num_features,)
        if atoms is None:
            atoms = torch.randn(num_atoms, num_features)
        check_tensor("atoms", atoms)
        if atoms.shape != (num_atoms, num_features):
            raise ValueError(
                f"Expected atoms of shape (atoms, features) = {(num_atoms, num_features)}, got "
                f"{tuple(atoms.shape)}. Atoms come first: transpose a (features, atoms) matrix."
            )
        register_atoms(self, atoms, unit_norm=unit_norm)

    def bind(self, atoms: Tensor | None = None) -> DenseMap:  # noqa: D102
        return DenseMap(self.bound_atoms(atoms))

    def code_shape(self, signal_shape: tuple[int, ...]) -> torch.Size:  # noqa: D102
        signal_shape = check_shape(signal_shape)
        if not signal_shape or signal_shape[-1] != self.num_features:
            raise ValueError(
                f"Expected a signal of shape (..., {self.num_features}) (features last), "
                f"got {tuple(signal_shape)}."
            )
        return torch.Size([*signal_shape[:-1], self.num_atoms])

    def extra_repr(self) -> str:  # noqa: D102
        return f"num_atoms={self.num_atoms}, num_features={self.num_features}"
