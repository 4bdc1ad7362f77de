"""Posteriors whose codes keep to a known support."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sparse.distributions import KnownSupport, Mixed, SpikeAndSlab
from pyro_sparse.infer.bundle import register_savable


class SupportedPosterior(nn.Module):
    r"""Another family, with codes that are exactly zero outside of a known support.

    A family without an atom becomes a ``KnownSupport`` of it, for a model whose prior is one of the
    same ``active``. In one with an atom the probability of being active becomes zero outside; the
    prior then is ``SpikeAndSlab(slab, probs=torch.where(active, probs, 0.0))``.

    Args:
        family: Such as ``DensePosterior()`` or ``SpikeAndSlabPosterior()``.
        active: True where a code may be active; broadcasts with a datum's codes.

    Raises:
        TypeError: If ``family`` is no posterior, or ``active`` no tensor of booleans.

    Example:
        >>> from pyro_sparse.guides import DensePosterior
        >>> family = SupportedPosterior(DensePosterior(), torch.tensor([True, False]))
        >>> family({"loc": torch.ones(3, 2), "log_scale": torch.zeros(3, 2)}).mean[0]
        tensor([1., 0.])
    """

    active: Tensor

    def __init__(self, family: Callable[[dict[str, Tensor]], Any], active: Tensor) -> None:
        super().__init__()
        if not callable(family) or not hasattr(family, "names") or isinstance(family, type):
            raise TypeError(
                "Expected family to be a posterior with names and a call, such as "
                f"DensePosterior(), got {family!r}."
            )
        if not isinstance(active, Tensor) or active.dtype != torch.bool:
            raise TypeError(f"Expected active to be a tensor of booleans, got {active!r}.")
        self.family = family
        self.names = family.names
        self.register_buffer("active", active.clone())

    def forward(self, parameters: dict[str, Tensor]) -> Any:
        """Law of the codes."""
        law = self.family(parameters)
        if not isinstance(law, Mixed):
            return KnownSupport(law, self.active)
        never = torch.full_like(law.logits, -torch.inf)
        return SpikeAndSlab(law.slab, logits=torch.where(self.active, law.logits, never))


register_savable(SupportedPosterior, name="pyro_sparse.guides.SupportedPosterior")
