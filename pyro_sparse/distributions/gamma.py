"""A thresholded law whose threshold is itself random and has been integrated out."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_sparse.distributions.arguments import as_numbers, common_shape
from pyro_sparse.distributions.mixed import Mixed


class GammaThresholded(Mixed):
    r"""Laplace noise beyond a Gamma-distributed threshold, moved to ``loc``; exact zeros below it.

    .. math::
        t \sim \mathrm{Gamma}(\alpha, \beta), \quad e \sim \mathrm{Laplace}(0, b), \quad
        z = \begin{cases} 0 & |e| \le t \\
        \mathrm{loc} + \mathrm{sign}(e) (|e| - t) & \text{else} \end{cases}

    What exceeds a threshold is again Laplace, whatever the threshold, so this is spike-and-slab:

    .. math::
        p(z) = (1 - g)\, \delta_0(z) + g\, \mathrm{Laplace}(z; \mathrm{loc}, b), \quad
        g = \mathrm E\, e^{-t / b} = \Big(1 + \frac{1}{\beta b}\Big)^{-\alpha}.

    No threshold is ever drawn and none needs a prior of its own: a learned threshold only moves the
    gate. With Normal noise neither holds: the slab depends on the threshold, and
    :math:`\mathrm E\, 2 \Phi(-t / \sigma)` has no elementary form.

    Args:
        loc: Location of the slab, in code units.
        scale: Scale ``b > 0`` of the noise, in code units.
        concentration: Shape :math:`\alpha > 0` of the threshold.
        rate: Rate :math:`\beta > 0` of the threshold, in 1 / code units: its mean is
            ``concentration / rate``.

    Raises:
        TypeError: If a parameter is no number.
        ValueError: If one is out of range, or their shapes do not broadcast.

    References:
        Fallah & Rozell (2022), ICML, PMLR 162:6034-6058, who draw the threshold.

    Example:
        >>> law = GammaThresholded(0.3, 0.12, concentration=2.0, rate=6.0)
        >>> law.prob_active
        tensor(0.1752)
    """

    arg_constraints = {
        "loc": constraints.real,
        "scale": constraints.positive,
        "concentration": constraints.positive,
        "rate": constraints.positive,
    }

    def __init__(
        self,
        loc: Tensor | float,
        scale: Tensor | float,
        concentration: Tensor | float,
        rate: Tensor | float,
        *,
        validate_args: bool | None = None,
    ) -> None:
        given = {"loc": loc, "scale": scale, "concentration": concentration, "rate": rate}
        like = next((x for x in given.values() if isinstance(x, Tensor)), torch.empty(0))
        found = [
            value if isinstance(value, Tensor) else as_numbers(name, value, like)
            for name, value in given.items()
        ]
        shape = common_shape(**{name: value.shape for name, value in zip(given, found)})
        loc, scale, self.concentration, self.rate = (value.expand(shape) for value in found)
        self.slab = dist.Laplace(loc, scale, validate_args=validate_args)
        super().__init__(self.rate.shape, validate_args=validate_args)

    @property
    def loc(self) -> Tensor:
        """Location of the slab."""
        return self.slab.loc

    @property
    def scale(self) -> Tensor:
        """Scale of the noise and of the slab."""
        return self.slab.scale

    @property
    def logits(self) -> Tensor:  # type: ignore[override]
        """Log-odds of being active."""
        # g = e^-cost; log(1 + 1 / x) from log x, which does not overflow where 1 / x would.
        log_ratio = self.rate.log() + self.scale.log()
        cost = self.concentration * torch.logaddexp(torch.zeros_like(log_ratio), -log_ratio)
        return -cost - (-torch.expm1(-cost)).log()

    def expand(self, batch_shape: Any, _instance: Any = None) -> GammaThresholded:
        """The same law with another batch shape."""
        new = self._get_checked_instance(GammaThresholded, _instance)
        batch_shape = torch.Size(batch_shape)
        new.concentration = self.concentration.expand(batch_shape)
        new.rate = self.rate.expand(batch_shape)
        new.slab = self.slab.expand(batch_shape)
        super(GammaThresholded, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new
