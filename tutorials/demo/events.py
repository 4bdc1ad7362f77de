"""What events of neurons ask of an encoder, a posterior and a score."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyro_sparse.distributions import NormalOvershoot, SpikeAndSlab, Tails, prox
from pyro_sparse.solvers import Shrinkage


class Refractory(Shrinkage):
    """The prior's proximal step, then the largest code within ``gap`` positions alone.

    Neighbouring positions explain the same samples, and a proximal step lets them share an event.
    Here a cell is silent for ``gap`` positions before and after an event.
    """

    keeps_support = True

    def __init__(self, gap: int) -> None:
        super().__init__()
        self.gap = gap

    def forward(self, law: Any, value: Tensor, step: Tensor, layer: int, num_layers: int) -> Tensor:
        codes = prox(law, value, step)
        flat = codes.reshape(-1, 1, codes.shape[-1])
        largest = nn.functional.max_pool1d(flat, 2 * self.gap + 1, 1, self.gap)
        return torch.where(codes == largest.reshape(codes.shape), codes, 0.0)


class OneSided(nn.Module):
    r"""Posterior of positive codes, :math:`(1 - g)\, \delta_0 + g\, \mathcal N_+(\mu, s^2)`.

    The slab is a normal law given that it is positive, and of the evidence that the encoder counts
    for either sign the part of the negative ones, :math:`\log \Phi(\mu / s)`, is taken off.
    """

    names = ("loc", "log_scale", "logits")

    def forward(self, parameters: dict[str, Tensor]) -> SpikeAndSlab:
        """Law of the codes."""
        side = NormalOvershoot(parameters["loc"], parameters["log_scale"].exp())
        return SpikeAndSlab(Tails(side), logits=parameters["logits"] + side.log_mass)
