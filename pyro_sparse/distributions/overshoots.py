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

from pyro_sparse.distributions.gaussian_tail import (
    log_ndtr,
    log_tail,
    moment_ratio,
    tail_variance,
)


class Overshoot(TorchDistribution):
    r"""Declares the law of :math:`x = y - \text{edge}` given that it is positive.

    The base law of :math:`y` is symmetric about its location. Beyond a distance :math:`c` the law
    is again of this kind, with ``loc - c``.

    Args:
        loc: Location of the base less the edge, in code units; far below zero in a far tail.
        scale: Scale of the base, positive, in code units.
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
        """Log of the ratio of the masses of two sides of one base."""
        return self.log_mass - other.log_mass

    def beyond(self, distance: Tensor | float) -> Overshoot:
        """Law of ``x - distance`` given that it is positive, for ``distance >= 0``."""
        return type(self)(self.loc - distance, self.scale, validate_args=False)

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
    def log_mass(self) -> Tensor:
        """Log-probability that the base passes the edge."""
        return log_ndtr(self.loc / self.scale)

    @staticmethod
    def log_interval(centre: Tensor, half_width: Tensor, scale: Tensor) -> Tensor:
        """Log-probability of the base within ``half_width`` of a point."""
        c, d = centre.abs() / scale, half_width / scale
        narrow = (d <= 1) & (c * d <= 1)
        outside = ~narrow & (c > d)
        inside = ~narrow & ~outside
        # Gauss-Legendre, exact to rounding on an interval this short.
        c_, d_ = torch.where(narrow, c, 0.0), torch.where(narrow, d, 1.0)
        total = sum(w * (-(d_ * x).square() / 2).exp() * (c_ * d_ * x).cosh() for x, w in _LEGENDRE)
        short = torch.log(2 * d_ * total / math.sqrt(2 * math.pi)) - c_.square() / 2
        # On one side of the location, the difference of two tails from the nearer edge.
        c_, d_ = torch.where(outside, c, 2.0), torch.where(outside, d, 1.0)
        near = torch.where(outside, (half_width - centre.abs()) / scale, -1.0)
        drop = 2 * c_ * d_ + log_tail(near) - log_tail(-c_ - d_)
        tail = log_ndtr(near) + (-(-drop).exp()).log1p()
        c_, d_ = torch.where(inside, c, 0.0), torch.where(inside, d, 1.0)
        near = torch.where(inside, (centre.abs() - half_width) / scale, -1.0)
        wide = (-log_ndtr(near).exp() - log_ndtr(-c_ - d_).exp()).log1p()
        return torch.where(narrow, short, torch.where(outside, tail, wide))

    def log_odds(self, other: Overshoot) -> Tensor:
        """Log of the ratio of the masses of two sides of one base."""
        above, below, passed = self._split()
        above_, below_, passed_ = other._split()
        tails = torch.where(passed, log_ndtr(above), log_tail(below)) - torch.where(
            passed_, log_ndtr(above_), log_tail(below_)
        )
        return tails - (below - below_) * (below + below_) / 2

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density at ``value >= 0``."""
        above, below, passed = self._split()
        x = value / self.scale
        density = torch.where(
            passed,
            -(x - above).square() / 2 - log_ndtr(above),
            (below - x / 2) * x - log_tail(below),
        )
        return density - self.scale.log() - math.log(2 * math.pi) / 2

    def log_survival(self, value: Tensor) -> Tensor:
        """Log-probability of more than ``value >= 0``."""
        above, below, passed = self._split()
        x = value / self.scale
        return torch.where(
            passed,
            log_ndtr(above - x) - log_ndtr(above),
            log_tail(below - x) - log_tail(below) + (below - x / 2) * x,
        )

    def quantile(self, survival: Tensor, cdf: Tensor) -> Tensor:
        """Value that is passed with probability ``survival``; detached."""
        with torch.no_grad():
            above, below, passed = self._split()
            mass = log_ndtr(above).exp()
            upper, lower = survival * mass, cdf * mass + log_ndtr(-above).exp()
            near = above - torch.where(
                upper < lower, torch.special.ndtri(upper), -torch.special.ndtri(lower)
            )
            # Newton on the log-survival, which is concave: from the second step on from above. The
            # start takes the hazard to grow at slope one, as it does far out.
            target = torch.where(survival < 0.5, survival.log(), (-cdf).log1p())
            rate = moment_ratio(below) - below
            far = -2 * target / (rate + (rate.square() - 2 * target).sqrt())
            for _ in range(_NEWTON):
                inner = below - far
                level = log_tail(inner) - log_tail(below) + (below - far / 2) * far
                far = (far + (level - target) / (moment_ratio(inner) - inner)).clamp(min=0)
            value = torch.where(passed, near, far) * self.scale
            return value.clamp(min=torch.finfo(value.dtype).tiny)

    def log_mgf(self, argument: Tensor) -> Tensor:
        r""":math:`\log E\, e^{t x}`."""
        above, below, passed = self._split()
        t = argument * self.scale
        tilted = above + t
        near = torch.where(
            tilted > 0,
            (above + t / 2) * t + log_ndtr(tilted.clamp(min=0)),
            log_tail(tilted.clamp(max=0)) - above.square() / 2,
        )
        return torch.where(passed, near - log_ndtr(above), log_tail(below + t) - log_tail(below))

    @property
    def mean(self) -> Tensor:
        """Mean."""
        return self.scale * moment_ratio(self.loc / self.scale)

    @property
    def variance(self) -> Tensor:
        """Variance."""
        return self.scale.square() * tail_variance(self.loc / self.scale)

    def entropy(self) -> Tensor:
        """Entropy in nats."""
        above, below, passed = self._split()
        # 1 - a r above the edge, 1 - a K_1 below it: the mean square about the location, or edge.
        near = log_ndtr(above) + (1 - above * (moment_ratio(above) - above)) / 2
        far = log_tail(below) + (1 - below * moment_ratio(below)) / 2
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


# Positive nodes of the eight-point rule on [-1, 1]; weights of a mean.
_LEGENDRE = (
    (0.18343464249564980, 0.36268378337836198),
    (0.52553240991632899, 0.31370664587788729),
    (0.79666647741362674, 0.22238103445337447),
    (0.96028985649753623, 0.10122853629037626),
)
_NEWTON = 5


def _log_cdf(value: Tensor) -> Tensor:
    below = value.clamp(max=0) - math.log(2)
    above = (-(-value.clamp(min=0)).exp() / 2).log1p()
    return torch.where(value < 0, below, above)
