"""Is the dictionary right? Use, dead and duplicate atoms, stability over seeds, its posterior."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_sparse.diagnostics.recovery import check_atoms, correlations, match_atoms
from pyro_sparse.infer.numbers import check_real
from pyro_sparse.ops import check_tensor

ALIKE = 0.95
"""Absolute correlation from which two atoms count as one."""


@dataclass(frozen=True)
class DictionarySummary:
    r"""How the atoms of a dictionary are used.

    Attributes:
        usage: Share of the codes of each atom that are active, over all data and positions, in
            [0, 1]; float64, shape ``(atoms,)``.
        energy: Share of each atom in the sum of squares of all codes, shape ``(atoms,)``.
        dead: Atoms used in fewer than ``least_usage`` of the codes, boolean, shape ``(atoms,)``.
        duplicates: Pairs of atoms that are alike, the first the one with more energy; whole
            numbers, shape ``(pairs, 2)``.
        similarity: Of each atom to the one most like it: the largest absolute correlation at any
            shift, shape ``(atoms,)``; zero if it is the only one.
        num_active: Active codes of each datum, expected number, shape ``(n,)``.
        effective_codes: Codes that carry each datum, :math:`(\sum z^2)^2 / \sum z^4`: equal codes
            count one each; zero for a datum without any. Shape ``(n,)``.
        effective_atoms: Atoms that carry all data, the exponential of the entropy of ``energy``.

    Example:
        >>> codes = torch.tensor([[1.0, 1.0, 0.0], [2.0, 0.0, 0.0]])
        >>> found = dictionary_summary(torch.eye(3), codes)
        >>> found.dead, found.effective_codes.tolist()
        (tensor([False, False,  True]), [2.0, 1.0])
    """

    usage: Tensor
    energy: Tensor
    dead: Tensor
    duplicates: Tensor
    similarity: Tensor
    num_active: Tensor
    effective_codes: Tensor
    effective_atoms: float

    def __str__(self) -> str:
        active, effective = float(self.num_active.mean()), float(self.effective_codes.mean())
        return (
            f"{len(self.usage)} atoms, {int(self.dead.sum())} dead, {len(self.duplicates)} pairs "
            f"alike, {self.effective_atoms:.1f} effective; a datum has {active:.1f} active codes, "
            f"{effective:.1f} effective"
        )


def dictionary_summary(
    atoms: Tensor,
    codes: Tensor,
    prob_active: Tensor | None = None,
    *,
    least_usage: float = 1e-4,
    alike: float = ALIKE,
) -> DictionarySummary:
    """Dead and duplicate atoms, usage, and how many codes do the work.

    Args:
        atoms: Shape ``(atoms, features)`` or ``(atoms, channels, *kernel)``.
        codes: Codes or their posterior means, shape ``(n, atoms, *positions)``. Those of a law
            without an atom at zero are never zero: pass ``prob_active`` or hard zeros of MAP codes.
        prob_active: Probability that a code is active, shape of ``codes``; default whether it is
            not zero.
        least_usage: Usage below which an atom is dead, in [0, 1].
        alike: Absolute correlation, at the best shift, from which two atoms are duplicates.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the shapes do not fit, or a value is not finite.

    References:
        Participation ratio as an effective number: Bell & Dean (1970), Discuss. Faraday Soc. 50.

    Example:
        >>> atoms = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -2.0]])
        >>> found = dictionary_summary(atoms, torch.tensor([[1.0, 0.0, 3.0], [1.0, 2.0, 0.0]]))
        >>> found.duplicates, found.usage.tolist()
        (tensor([[2, 1]]), [1.0, 0.5, 0.5])
    """
    check_atoms(atoms, "atoms")
    check_tensor("codes", codes)
    check_real("least_usage", least_usage, 0.0, 1.0)
    check_real("alike", alike, 0.0, 1.0)
    if codes.dim() < 2 or codes.shape[1] != len(atoms) or codes.numel() == 0:
        raise ValueError(
            f"Expected codes of shape (n, atoms, *positions) with {len(atoms)} atoms, got "
            f"{tuple(codes.shape)}."
        )
    if prob_active is not None:
        check_tensor("prob_active", prob_active)
        if prob_active.shape != codes.shape:
            raise ValueError(
                f"Expected prob_active of the shape of codes, {tuple(codes.shape)}, got "
                f"{tuple(prob_active.shape)}."
            )
    active = codes != 0 if prob_active is None else prob_active
    active = active.detach().double().reshape(len(codes), len(atoms), -1)
    square = codes.detach().double().reshape(len(codes), len(atoms), -1).square()
    if not bool(square.isfinite().all() and active.isfinite().all()):
        raise ValueError("Expected finite codes. Leave out the data whose codes diverged.")
    usage, energy = active.mean((0, 2)), square.sum((0, 2))
    energy = energy / energy.sum().clamp(min=torch.finfo(energy.dtype).tiny)
    found, _ = correlations(atoms.detach().double().cpu(), atoms.detach().double().cpu())
    likeness = found.abs().amax(-1).fill_diagonal_(0).clamp(max=1)
    pairs = (likeness.triu(1) >= alike).nonzero()
    order = energy.cpu()[pairs].argsort(dim=1, descending=True, stable=True)
    fourth = square.square().sum((1, 2))
    sums = square.sum((1, 2)).square()
    return DictionarySummary(
        usage=usage,
        energy=energy,
        dead=usage < least_usage,
        duplicates=pairs.gather(1, order),
        similarity=likeness.amax(1),
        num_active=active.sum((1, 2)),
        effective_codes=torch.where(fourth > 0, sums / fourth, 0.0),
        effective_atoms=float(torch.special.entr(energy).sum().exp()),
    )


@dataclass(frozen=True)
class Stability:
    """How alike dictionaries of several trainings are.

    Attributes:
        correlation: Mean absolute correlation of matched atoms, for each pair of trainings, one
            with itself; float64, shape ``(seeds, seeds)``.
        found: Share of matched atoms that are alike, for each pair, shape ``(seeds, seeds)``.
        atom: Of each atom of the first dictionary, the mean correlation with its matches in the
            others, shape ``(atoms,)``.

    Example:
        >>> stability([torch.eye(3), -torch.eye(3)]).found
        tensor([[1., 1.],
                [1., 1.]], dtype=torch.float64)
    """

    correlation: Tensor
    found: Tensor
    atom: Tensor

    @property
    def worst(self) -> float:
        """Smallest share of atoms that two trainings have in common."""
        return float(self.found.min())


def stability(dictionaries: Sequence[Tensor], *, alike: float = ALIKE) -> Stability:
    """Do trainings from several seeds find the same atoms?

    Atoms are matched up to sign, order, scale and shift. What no two trainings agree on is not to
    be interpreted.

    Args:
        dictionaries: At least two sets of as many atoms each, as ``match_atoms`` takes them.
        alike: Absolute correlation from which two atoms count as one.

    Raises:
        TypeError: If they are no tensors.
        ValueError: If there are fewer than two, or shapes do not fit.

    References:
        Wu et al. (2016), PNAS 113(16), for stability as a criterion of dictionaries.

    Example:
        >>> atoms = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0))
        >>> stability([atoms[0], atoms[1], atoms[1].flip(0)]).worst < 0.2
        True
    """
    check_real("alike", alike, 0.0, 1.0)
    if isinstance(dictionaries, Tensor) or len(dictionaries) < 2:
        raise ValueError("Expected a list of at least two sets of atoms, one for each training.")
    sizes = {len(atoms) for atoms in dictionaries}
    if len(sizes) > 1:
        raise ValueError(f"Expected as many atoms in each training, got {sorted(sizes)}.")
    number = len(dictionaries)
    correlation = torch.ones(number, number, dtype=torch.float64)
    found = torch.ones(number, number, dtype=torch.float64)
    atom = torch.zeros(sizes.pop(), dtype=torch.float64)
    for i in range(number):
        for j in range(i + 1, number):
            matched = match_atoms(dictionaries[j], dictionaries[i]).correlation.double()
            correlation[i, j] = correlation[j, i] = matched.mean()
            found[i, j] = found[j, i] = (matched >= alike).double().mean()
            if i == 0:
                atom += matched / (number - 1)
    return Stability(correlation, found, atom)


@dataclass(frozen=True)
class AtomPosterior:
    """Draws of a dictionary, each aligned to a reference.

    Attributes:
        draws: Shape ``(num_samples, atoms, ...)``, in the order, sign and place of the reference.
        correlation: Of each draw's atom with the reference, shape ``(num_samples, atoms)``.

    Example:
        >>> AtomPosterior(torch.zeros(5, 3, 2), torch.ones(5, 3)).sd.shape
        torch.Size([3, 2])
    """

    draws: Tensor
    correlation: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean atoms, shape ``(atoms, ...)``."""
        return self.draws.mean(0)

    @property
    def sd(self) -> Tensor:
        """Standard deviation of each number, shape ``(atoms, ...)``."""
        return self.draws.std(0)


def align_atoms(draws: Tensor, reference: Tensor) -> AtomPosterior:
    """Posterior of the atoms where the dictionary is a sampled site.

    Its draws come in any order, sign and shift, so a plain mean may be of different atoms. Each is
    matched to the reference first; scales stay as drawn.

    Args:
        draws: Shape ``(num_samples, atoms, ...)``, such as ``draws["dictionary"]`` of what
            ``infer.log_weights`` returns.
        reference: Atoms to align to, shape ``(atoms, ...)``, such as true ones, or ``draws[0]``.

    Returns:
        Draws in place; what a shift moves in from outside an atom is zero.

    Raises:
        TypeError: If an argument is no tensor.
        ValueError: If the shapes do not fit.

    Example:
        >>> truth = torch.eye(3)
        >>> draws = torch.stack([truth, -truth.flip(0)])
        >>> align_atoms(draws, truth).sd.max()
        tensor(0.)
    """
    check_atoms(draws, "draws")
    check_atoms(reference, "reference")
    if draws.shape[1:] != reference.shape:
        raise ValueError(
            f"Expected draws of shape (num_samples, *{tuple(reference.shape)}), got "
            f"{tuple(draws.shape)}."
        )
    aligned, correlation = torch.empty_like(draws), []
    for draw, place in zip(draws, aligned):
        found = match_atoms(draw, reference)
        correlation.append(found.correlation)
        for k, (j, sign, shift) in enumerate(zip(found.match, found.sign, found.shift)):
            place[k] = _moved(draw[j], (-shift).tolist()) * sign.to(draw)
    return AtomPosterior(aligned, torch.stack(correlation))


def _moved(atom: Tensor, shift: list[int]) -> Tensor:
    """An atom ``(channels, *kernel)`` some samples later, with zeros moved in."""
    moved = atom
    for dim, by in enumerate(shift, start=1):
        moved = moved.roll(by, dim)
        if by > 0:
            moved.narrow(dim, 0, by).zero_()
        elif by < 0:
            moved.narrow(dim, moved.shape[dim] + by, -by).zero_()
    return moved
