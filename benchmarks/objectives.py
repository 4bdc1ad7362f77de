"""Objectives that benchmarks share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyro_sparse.guides import ShiftAveraged


class AveragedError:
    r"""Squared error of the average over all shifts, estimated from a few, against clean data.

    With errors :math:`e_s` of the :math:`S` shifts,

    .. math:: \Big\|\frac1S \sum_s e_s\Big\|^2 = \frac1S \,\mathbb E\|e_a\|^2
        + \frac{S-1}{S}\, \mathbb E\langle e_a, e_b\rangle, \qquad a \ne b

    so that two shifts give an estimate without bias, where the error of their own average would
    count the noise of a single shift 12 times too much.

    Args:
        averaged: Gives the predictor of a shift; its parameters are those of model and guide.
        sigma: Standard deviation of the noise that is drawn anew at every step.
        shifts: How many shifts to draw, from 2 to all.
    """

    def __init__(self, averaged: ShiftAveraged, sigma: float, shifts: int = 2) -> None:
        self.averaged, self.sigma, self.shifts = averaged, sigma, shifts

    def __call__(self, model: Any, guide: Any) -> nn.Module:
        return _AveragedError(model, guide, self)


class _AveragedError(nn.Module):
    def __init__(self, model: Any, guide: Any, error: AveragedError) -> None:
        super().__init__()
        self.model, self.guide = model, guide
        self.error = (error,)  # no part of it is a part of this: what this holds is trained

    def forward(self, y: Tensor, num_data: int | None = None) -> Tensor:
        (error,) = self.error
        every = error.averaged.shifts
        chosen = [every[i] for i in torch.randperm(len(every))[: error.shifts].tolist()]
        noisy = y + error.sigma * torch.randn_like(y)
        away = torch.stack([error.averaged.predictor(noisy, shifts=[s]) - y for s in chosen])
        alone = away.square().mean()
        count = len(chosen)
        mixed = (count**2 * away.mean(0).square().mean() - count * alone) / (count**2 - count)
        return (num_data or len(y)) * (alone + (len(every) - 1) * mixed) / len(every)


class Noisy:
    """An objective that sees its data with fresh noise."""

    def __init__(self, objective: Any, sigma: float) -> None:
        self.objective, self.sigma = objective, sigma

    def __call__(self, model: Any, guide: Any) -> nn.Module:
        return _Noisy(self.objective(model, guide), self.sigma)


class _Noisy(nn.Module):
    def __init__(self, objective: nn.Module, sigma: float) -> None:
        super().__init__()
        self.objective, self.sigma = objective, sigma

    def forward(self, y: Tensor, num_data: int | None = None) -> Tensor:
        loss: Tensor = self.objective(y + self.sigma * torch.randn_like(y), num_data)
        return loss
