"""Constraints by projection after a step, as published systems have them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyro_sparse.infer.callbacks import Callback, Progress
from pyro_sparse.infer.numbers import check_real, check_whole


class Project(Callback):
    """Rows of a parameter are put back where they may be, after every step.

    A row is ``parameter[k]``, such as an atom of ``Dense(..., unit_norm=False)``: entries below
    zero become zero, then rows that are too long are shortened. That is the Euclidean projection.

    Args:
        parameter: Shape ``(rows, ...)``; written to in place.
        max_norm: Largest Euclidean length of a row; None for any.
        nonnegative: Whether entries are kept from falling below zero.
        every: Steps from one projection to the next, ``>= 1``.

    Raises:
        TypeError: If ``parameter`` is none (atoms of unit norm are computed from one).
        ValueError: If a number is out of its range.

    References:
        Rolfe & LeCun (2013), ICLR: columns of the decoder at most 1, rows of the encoder at most
        ``1.25 / num_steps``, of the classifier at most 5; every 5 steps in their code.

    Example:
        >>> rows = nn.Parameter(torch.tensor([[3.0, 4.0], [-0.5, 0.5]]))
        >>> Project(rows, max_norm=1.0, nonnegative=True).apply()
        >>> rows.data
        tensor([[0.6000, 0.8000],
                [0.0000, 0.5000]])
    """

    def __init__(
        self,
        parameter: nn.Parameter,
        *,
        max_norm: float | None = None,
        nonnegative: bool = False,
        every: int = 1,
    ) -> None:
        if not isinstance(parameter, nn.Parameter):
            raise TypeError(
                f"Expected parameter to be a nn.Parameter, got {type(parameter).__name__}. Atoms "
                "have to be made with unit_norm=False."
            )
        if max_norm is not None:
            check_real("max_norm", max_norm, 0.0, math.inf, open_low=True)
        check_whole("every", every, 1)
        self.parameter: Tensor = parameter
        self.max_norm = max_norm
        self.nonnegative = nonnegative
        self.every = every

    @torch.no_grad()
    def apply(self) -> None:
        """Project now, such as before a training."""
        if self.nonnegative:
            self.parameter.clamp_(min=0)
        if self.max_norm is not None:
            rows = self.parameter.flatten(1)
            length = torch.linalg.vector_norm(rows, dim=1)
            factor = torch.where(length > self.max_norm, self.max_norm / length, 1.0)
            self.parameter.mul_(factor.reshape(-1, *[1] * (self.parameter.dim() - 1)))

    def after_step(self, progress: Progress) -> None:  # noqa: D102
        if progress.step % self.every == 0:
            self.apply()
