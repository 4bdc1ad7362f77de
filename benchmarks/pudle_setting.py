"""The planted problem that PUDLE's theory is tested on, and the three gradients of a dictionary.

Data are combinations of ``s`` atoms, without noise, with amplitudes uniform on [1, 2] times a sign;
a net of ISTA layers encodes them from a dictionary near the true one. Gradients are those of the
library's objectives: nothing here differentiates anything by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pyro_sparse import infer
from pyro_sparse.dictionaries import Dense
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import ISTA, BackPropagation, Detached, Gradient, Proximal, Shrinkage

RATE, STEP = 0.2, 0.2
"""Of the Laplace prior at noise 1, and of the layers, as published."""

LASSO, LEAST_SQUARES = infer.SparseELBO, infer.Reconstruction
OBJECTIVES: dict[str, Callable[[], infer.Differentiated]] = {
    "decoder": lambda: infer.Differentiated(LASSO(), Detached()),
    "lasso": lambda: infer.Differentiated(LASSO(), BackPropagation()),
    "least squares": lambda: infer.Differentiated(LEAST_SQUARES(), BackPropagation()),
}
"""PUDLE's g_dec, g_ae-lasso and g_ae-ls."""


class Planted(NamedTuple):
    """True atoms ``(p, m)``, codes ``(n, p)`` and data ``(n, m)``."""

    atoms: Tensor
    codes: Tensor
    y: Tensor


def planted(
    n: int, m: int, p: int, s: int, *, seed: int, common_sign: bool, atoms: Tensor | None = None
) -> Planted:
    """Draw a problem.

    Args:
        n: Number of data.
        m: Features.
        p: Atoms.
        s: Active codes of a datum.
        seed: Of everything.
        common_sign: One sign for all codes of a datum, as the published generator has it, rather
            than one for each, as the theory does.
        atoms: In place of new ones.
    """
    random = torch.Generator().manual_seed(seed)
    drawn = normalize(torch.randn(p, m, generator=random), dim=1)
    atoms = drawn if atoms is None else atoms
    active = torch.rand(n, p, generator=random).topk(s, dim=1).indices
    size = 1 + torch.rand(n, s, generator=random)
    sign = torch.randint(0, 2, (n, 1 if common_sign else s), generator=random) * 2 - 1
    codes = torch.zeros(n, p).scatter(1, active, size * sign)
    return Planted(atoms, codes, codes @ atoms)


def nearby(atoms: Tensor, distance: float, seed: int) -> Tensor:
    """Atoms with normal noise of so large a standard deviation in every entry, at unit length."""
    random = torch.Generator().manual_seed(1000 + seed)
    return normalize(atoms + distance * torch.randn(atoms.shape, generator=random), dim=1)


def pair(
    atoms: Tensor,
    layers: int,
    *,
    rate: float = RATE,
    step: float | None = STEP,
    shrinkage: Shrinkage | None = None,
) -> tuple[SparseCoding, UnrolledFISTA]:
    """Model and guide with one dictionary; ``step`` None is the library's safe one."""
    # Lengths are kept by projection after each step, as published, not by parametrisation.
    dictionary = Dense(*atoms.shape, atoms=atoms, unit_norm=False)
    prior, likelihood = dist.Laplace(0.0, 1 / rate), Gaussian(1.0)
    guide = UnrolledFISTA(
        dictionary, likelihood, prior, num_steps=layers, method=ISTA(), step_size=step,
        shrinkage=Proximal() if shrinkage is None else shrinkage,
    )  # fmt: skip
    return SparseCoding(dictionary, likelihood, prior), guide


def gradient(
    objective: Callable[..., torch.nn.Module],
    model: SparseCoding,
    guide: UnrolledFISTA,
    y: Tensor,
    chunk: int = 500,
) -> Tensor:
    """Of the mean over the data of an objective, by the atoms; shape ``(p, m)``."""
    atoms = model.dictionary.atoms
    loss, total = objective(model, guide), torch.zeros_like(atoms)
    for part in y.split(chunk):
        total += torch.autograd.grad(loss(part), atoms)[0]
    return total / len(y)


def at_codes(atoms: Tensor, codes: Tensor, y: Tensor) -> Tensor:
    """Gradient of the mean squared residual (halved) by the atoms where codes are constants."""
    return codes.T @ (codes @ atoms - y) / len(y)


class Projected(infer.Callback):
    """Atoms back to unit length after each step, and their distance to the true ones.

    Attributes:
        errors: Frobenius norm of the difference to the true atoms, after every step.
    """

    def __init__(self, truth: Tensor, each_step: Callable[[int], None] | None = None) -> None:
        self.truth = truth
        self.errors: list[float] = []
        self.each_step = each_step

    def after_step(self, progress: infer.Progress) -> None:
        assert isinstance(progress.model, SparseCoding)
        atoms = progress.model.dictionary.atoms
        with torch.no_grad():
            atoms.copy_(normalize(atoms, dim=1))
            self.errors.append(float((atoms - self.truth).norm()))
        if self.each_step is not None:
            self.each_step(progress.step)


def least_squares(gradient: Gradient) -> infer.Differentiated:
    """The least-squares gradient, differentiated otherwise than through all layers."""
    return infer.Differentiated(LEAST_SQUARES(), gradient)
