r"""How far a base law passes an edge, given that it does: one side of a thresholded law.

A thresholded law is two of these glued together, so all that it asks of its base is here: a new
base is one subclass of ``Overshoot`` and one registration of ``overshoot``.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_sparse.distributions.gaussian_interval import log_interval
from pyro_sparse.distributions.gaussian_tail import (
    NormalTail,
    hazard_and_mean,
    log_ndtr,
    log_tail,
    normal_tail,
)
from pyro_sparse.distributions.memory import remembered


class Overshoot(TorchDistribution):
    r"""Declares the law of :math:`x = y - \text{edge}` given that it is positive.

    The base law of :math:`y` is symmetric about its location. Beyond a distance :math:`c` the law
    is again of this kind, with ``loc - c``.

    Args:
        loc: Location of the base less the edge, in code units; far below zero in a far tail.
        scale: Scale of the base, positive, in code units.

    Example:
        >>> import pyro.distributions as dist
        >>> side = overshoot(dist.Laplace(0.0, 0.5), torch.tensor(-2.0))  # beyond an edge at 2
        >>> isinstance(side, Overshoot), side.log_mass.exp(), side.mean
        (True, tensor(0.0092), tensor(0.5000))
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}
    support = constraints.nonnegative

    def __init__(self, loc: Tensor, scale: Tensor, *, validate_args: bool | None = None) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    @abstractmethod
    def log_mass(self) -> Tensor:
        """Log-probability that the base passes the edge."""

    @staticmethod
    @abstractmethod
    def log_interval(centre: Tensor, half_width: Tensor, scale: Tensor) -> Tensor:
        """Log-probability of the base within ``half_width`` of a point.

        Args:
            centre: Distance of that point from the base's location.
            half_width: Positive.
            scale: The base's.
        """

    @abstractmethod
    def log_survival(self, value: Tensor) -> Tensor:
        """Log-probability of more than ``value >= 0``."""

    @abstractmethod
    def quantile(self, survival: Tensor, cdf: Tensor) -> Tensor:
        """Value that is passed with probability ``survival = 1 - cdf``; detached.

        Args:
            survival: In (0, 1).
            cdf: Its complement, so that neither end loses digits.
        """

    @abstractmethod
    def log_mgf(self, argument: Tensor) -> Tensor:
        r""":math:`\log E\, e^{t x}`; ``inf`` where it does not exist."""

    @abstractmethod
    def entropy(self) -> Tensor:
        """Entropy in nats."""

    def log_odds(self, other: Overshoot) -> Tensor:
        """Log of the ratio of the masses of two sides of one base, with one scale."""
        return self.log_mass - other.log_mass

    def log_mills(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of more than ``value >= 0``, and that less the log-density there."""
        outer = self.log_survival(value)
        return outer, outer - self.log_prob(value)

    def drift(self, value: Tensor) -> Tensor:
        """Zero, with the gradient of a draw at a fixed probability of more.

        Args:
            value: Draws, detached.
        """
        outer = self.log_survival(value)
        if not outer.requires_grad:
            return torch.zeros_like(outer)
        return self.log_mills(value)[1].exp().detach() * still(outer)

    def beyond(self, distance: Tensor | float) -> Overshoot:
        """Law of ``x - distance`` given that it is positive, for ``distance >= 0``."""
        return type(self)(self.loc - distance, self.scale, validate_args=False)

    def where(self, mask: Tensor, other: Overshoot) -> Overshoot:
        """This law where a mask is true, and another of its kind elsewhere."""
        if other is self:
            return self
        loc = torch.where(mask, self.loc, other.loc)
        same = other.scale is self.scale
        scale = self.scale if same else torch.where(mask, self.scale, other.scale)
        return type(self)(loc, scale, validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw values, detached."""
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            level = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
            # The generator gives zero but never one.
            return self.quantile(level.clamp(min=torch.finfo(level.dtype).tiny), 1 - level)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Overshoot:
        """The same law with another batch shape."""
        batch_shape = torch.Size(batch_shape)
        if batch_shape == self.batch_shape:
            return self
        new = type(self)(
            self.loc.expand(batch_shape), self.scale.expand(batch_shape), validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def _split(self) -> tuple[Tensor, Tensor, Tensor]:
        # Location in units of the scale: its positive and its negative part, each of which keeps
        # a formula finite where the other one's is selected, and which is selected.
        centre = self.loc / self.scale
        return centre.clamp(min=0), centre.clamp(max=0), centre > 0


class NormalOvershoot(Overshoot):
    r"""Overshoot of a Normal base: a truncated normal law.

    Below the edge every formula is in :math:`\log \Phi(a) + a^2 / 2` and in ratios of moments, in
    which the large squares have cancelled beforehand.

    Example:
        >>> NormalOvershoot(torch.tensor(-1e4), torch.tensor(1.0)).mean
        tensor(1.0000e-04)
    """

    @property
    def _tail(self) -> NormalTail:
        parts = (self.loc, self.scale)
        return remembered(self, "_tail_of", parts, lambda: normal_tail(self.loc / self.scale))

    @property
    def log_mass(self) -> Tensor:
        """Log-probability that the base passes the edge."""
        return self._tail.log_ndtr

    @staticmethod
    def log_interval(centre: Tensor, half_width: Tensor, scale: Tensor) -> Tensor:
        """Log-probability of the base within ``half_width`` of a point."""
        return log_interval(centre, half_width, scale)

    def log_odds(self, other: Overshoot) -> Tensor:
        """Log of the ratio of the masses of two sides of one base."""
        if not isinstance(other, NormalOvershoot):
            return super().log_odds(other)
        _, below, passed = self._split()
        _, below_, passed_ = other._split()
        tail, tail_ = self._tail, other._tail
        tails = torch.where(passed, tail.log_ndtr, tail.log_tail) - torch.where(
            passed_, tail_.log_ndtr, tail_.log_tail
        )
        apart = (self.loc.clamp(max=0) - other.loc.clamp(max=0)) / self.scale
        return tails - apart * (below + below_) / 2

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density at ``value >= 0``."""
        above, below, passed = self._split()
        x, tail = value / self.scale, self._tail
        density = torch.where(
            passed,
            -(x - above).square() / 2 - tail.log_ndtr,
            (below - x / 2) * x - tail.log_tail,
        )
        return density - self.scale.log() - math.log(2 * math.pi) / 2

    def log_survival(self, value: Tensor) -> Tensor:
        """Log-probability of more than ``value >= 0``."""
        return self.log_mills(value)[0]

    def log_mills(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of more than ``value >= 0``, and that less the log-density there."""
        below = (self.loc / self.scale).clamp(max=0)
        x, tail = value / self.scale, self._tail
        rest = normal_tail(self.loc / self.scale - x)
        outer = torch.where(
            self.loc > 0,
            rest.log_ndtr - tail.log_ndtr,
            rest.log_tail - tail.log_tail + (below - x / 2) * x,
        )
        return outer, rest.log_tail + self.scale.log() + math.log(2 * math.pi) / 2

    def drift(self, value: Tensor) -> Tensor:
        """Zero, with the gradient of a draw at a fixed probability of more."""
        loc, scale = still(self.loc), still(self.scale)
        with torch.no_grad():
            centre, x = self.loc / self.scale, value / self.scale
            first, mean = hazard_and_mean(centre)
            last, mean_ = hazard_and_mean(centre - x)
            # How far the hazard has grown, which is the draw itself less little far out.
            growth = (x - (mean - mean_)).lerp(last - first, (centre > 0).to(last.dtype))
            slope = growth / last.clamp_(min=torch.finfo(last.dtype).tiny)
        return slope * loc + (x - centre * slope) * scale

    def quantile(self, survival: Tensor, cdf: Tensor) -> Tensor:
        """Value that is passed with probability ``survival``; detached."""
        with torch.no_grad():
            # Blends with weights zero and one: much faster than torch.where on a CPU.
            centre, mass = self.loc / self.scale, self._tail.log_ndtr.exp()
            upper, lower = survival * mass, cdf * mass + torch.erfc(centre / math.sqrt(2)) / 2
            least = torch.finfo(upper.dtype).tiny
            nearer = torch.special.ndtri(torch.minimum(upper, lower).clamp_(min=least))
            near = centre + nearer.copysign_(lower - upper)
            # Both logarithms keep their digits at their end; the other one is -log 2.
            target = survival.clamp(max=0.5).log_().add_(math.log(2))
            target = target.add_(cdf.clamp(max=0.5).neg_().log1p_())
            # The start takes the hazard to grow at slope one, as it does far out.
            below = centre.clamp(max=0)
            rate, _ = hazard_and_mean(below)
            far = -2 * target / (rate + (rate.square() - 2 * target).sqrt_())
            value = far.lerp(near, (centre > _INVERTIBLE).to(far.dtype)).clamp_(min=0)
            # Halley's method on the log-survival; beyond the location the inverse has the digits.
            correct = (centre <= 0).to(far.dtype)
            for _ in range(1 if value.dtype == torch.float32 else 2):
                slope, curve = hazard_and_mean(below - value)
                error = (rate / slope).log_() + (below - value / 2) * value - target
                value = value + correct * error / (slope + error * curve / 2)
            value = value * self.scale
            return value.clamp_(min=torch.finfo(value.dtype).tiny)

    def log_mgf(self, argument: Tensor) -> Tensor:
        r""":math:`\log E\, e^{t x}`."""
        above, below, passed = self._split()
        t, tail = argument * self.scale, self._tail
        tilted = above + t
        near = torch.where(
            tilted > 0,
            (above + t / 2) * t + log_ndtr(tilted.clamp(min=0)),
            log_tail(tilted.clamp(max=0)) - above.square() / 2,
        )
        return torch.where(passed, near - tail.log_ndtr, log_tail(below + t) - tail.log_tail)

    @property
    def mean(self) -> Tensor:
        """Mean."""
        return self.scale * self._tail.mean

    @property
    def variance(self) -> Tensor:
        """Variance."""
        return self.scale.square() * self._tail.variance

    def entropy(self) -> Tensor:
        """Entropy in nats."""
        above, below, passed = self._split()
        tail = self._tail
        # 1 - a r above the edge, 1 - a K_1 below it: the mean square about the location, or edge.
        near = tail.log_ndtr + (1 - above * tail.hazard) / 2
        far = tail.log_tail + (1 - below * tail.mean) / 2
        return torch.where(passed, near, far) + self.scale.log() + math.log(2 * math.pi) / 2


class LaplaceOvershoot(Overshoot):
    r"""Overshoot of a Laplace base: exponential where its location lies below the edge.

    Example:
        >>> LaplaceOvershoot(torch.tensor(-1e4), torch.tensor(0.5)).mean
        tensor(0.5000)
    """

    @property
    def log_mass(self) -> Tensor:
        """Log-probability that the base passes the edge."""
        return _log_cdf(self.loc / self.scale)

    @staticmethod
    def log_interval(centre: Tensor, half_width: Tensor, scale: Tensor) -> Tensor:
        """Log-probability of the base within ``half_width`` of a point."""
        c, d = centre.abs() / scale, half_width / scale
        near = (centre.abs() - half_width) / scale
        outside = near > 0
        d_ = torch.where(outside, d, 1.0)
        tail = -near.clamp(min=0) - math.log(2) + (-torch.expm1(-2 * d_)).log()
        near = torch.where(outside, -1.0, near)
        c_, d_ = torch.where(outside, 0.0, c), torch.where(outside, 1.0, d)
        wide = (-(near.expm1() + torch.expm1(-c_ - d_)) / 2).log()
        return torch.where(outside, tail, wide)

    def log_odds(self, other: Overshoot) -> Tensor:
        """Log of the ratio of the masses of two sides of one base."""
        below, below_ = self.loc.clamp(max=0), other.loc.clamp(max=0)
        # What is left, not clamp(min=0): at zero either clamp would pass the whole gradient.
        above, above_ = (self.loc - below) / self.scale, (other.loc - below_) / self.scale
        return _log_cdf(above) - _log_cdf(above_) + (below - below_) / self.scale

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density at ``value >= 0``."""
        above, _, passed = self._split()
        x = value / self.scale
        near = -(x - above).abs() - math.log(2) - _log_cdf(above)
        return torch.where(passed, near, -x) - self.scale.log()

    def log_survival(self, value: Tensor) -> Tensor:
        """Log-probability of more than ``value >= 0``."""
        above, _, passed = self._split()
        x = value / self.scale
        return torch.where(passed, _log_cdf(above - x) - _log_cdf(above), -x)

    def quantile(self, survival: Tensor, cdf: Tensor) -> Tensor:
        """Value that is passed with probability ``survival``; detached."""
        with torch.no_grad():
            above, _, passed = self._split()
            mass = _log_cdf(above).exp()
            upper, lower = survival * mass, cdf * mass
            body = above + (2 * lower + (-above).exp()).log()
            near = torch.where(upper < 0.5, above - (2 * upper).log(), body)
            far = -torch.where(survival < 0.5, survival.log(), (-cdf).log1p())
            value = torch.where(passed, near, far) * self.scale
            return value.clamp(min=torch.finfo(value.dtype).tiny)

    def log_mgf(self, argument: Tensor) -> Tensor:
        r""":math:`\log E\, e^{t x}`; ``inf`` for ``argument >= 1 / scale``."""
        above, _, passed = self._split()
        t = argument * self.scale
        exists = t < 1
        t = torch.where(exists, t, 0.0)
        far = -(-t).log1p()
        # Up to the location the integrand is e^{(1 + t) x - a}; expm1(q) / q has no pole at q = 0.
        q = (1 + t) * above
        small = q.abs() < 1e-3
        size = torch.where(small, 1.0, q.abs())
        ratio = torch.where(
            small, q / 2 + q.square() / 24, q.clamp(min=0) + (-torch.expm1(-size) / size).log()
        )
        safe = torch.where(passed, above, 1.0)
        body = safe.log() - above + ratio
        near = torch.logaddexp(t * above + far, body) - math.log(2) - _log_cdf(above)
        value = torch.where(passed, near, far)
        return torch.where(exists, value, torch.full_like(value, math.inf))

    @property
    def mean(self) -> Tensor:
        """Mean."""
        above, _, passed = self._split()
        half = (-above).exp() / 2
        return self.scale * torch.where(passed, above + half * (1 + above) / (1 - half), 1.0)

    @property
    def variance(self) -> Tensor:
        """Variance."""
        above, _, passed = self._split()
        half = (-above).exp() / 2
        shift = half * (1 + above) / (1 - half)
        square = (2 - half * (2 + 2 * above + above.square())) / (1 - half)
        return self.scale.square() * torch.where(passed, square - shift.square(), 1.0)

    def entropy(self) -> Tensor:
        """Entropy in nats."""
        above, _, passed = self._split()
        half = (-above).exp() / 2
        near = math.log(2) + _log_cdf(above) + (1 - half * (1 + above)) / (1 - half)
        return self.scale.log() + torch.where(passed, near, 1.0)


@functools.singledispatch
def overshoot(base: Any, loc: Tensor) -> Overshoot:
    """Law of the overshoot of a base whose location is moved to ``loc`` from the edge.

    Args:
        base: A law symmetric about its location.
        loc: Location less edge, in code units.

    Raises:
        NotImplementedError: If nothing is registered for the base's type.

    Example:
        >>> import pyro.distributions as dist
        >>> overshoot(dist.Laplace(0.0, 1.0), torch.tensor(-2.0)).log_mass.exp()
        tensor(0.0677)
    """
    name = type(base).__name__
    raise NotImplementedError(
        f"Expected a base that is Normal or Laplace, got {name}. Register an Overshoot for it with "
        f"@pyro_sparse.distributions.overshoot.register({name})."
    )


@overshoot.register(torch.distributions.Normal)
def _(base: Any, loc: Tensor) -> Overshoot:
    return NormalOvershoot(loc, base.scale, validate_args=False)


@overshoot.register(torch.distributions.Laplace)
def _(base: Any, loc: Tensor) -> Overshoot:
    return LaplaceOvershoot(loc, base.scale, validate_args=False)


# Above it, ndtri inverts the distribution function of the base.
_INVERTIBLE = -5.0


def still(value: Tensor) -> Tensor:
    """Zero, with the gradient of a value.

    Example:
        >>> still(torch.tensor(3.0))
        tensor(0.)
    """
    return value - value.detach()


def _log_cdf(value: Tensor) -> Tensor:
    below = value.clamp(max=0) - math.log(2)
    above = (-(-value.clamp(min=0)).exp() / 2).log1p()
    return torch.where(value < 0, below, above)
