"""The slab of a thresholded law: two tails of a base law, or one, moved to where codes start."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from pyro_sparse.distributions.overshoots import LaplaceOvershoot, NormalOvershoot, Overshoot
from pyro_sparse.distributions.slabs import cdf, log_cdf, log_survival, quantile


class Outside(constraints.Constraint):
    """Values at or above ``upper``, or at or below ``lower``.

    Example:
        >>> Outside(lower=-1.0, upper=1.0).check(torch.tensor([-2.0, 0.5, 1.0]))
        tensor([ True, False,  True])
    """

    is_discrete = False
    event_dim = 0

    def __init__(self, lower: Tensor | float, upper: Tensor | float) -> None:
        self.lower, self.upper = lower, upper

    def check(self, value: Tensor) -> Tensor:
        """True outside the gap."""
        return (value >= self.upper) | (value <= self.lower)

    def __repr__(self) -> str:
        return f"Outside(lower={self.lower}, upper={self.upper})"


class Tails(TorchDistribution):
    r"""Two tails of a base law, each moved to an edge of its own.

    .. math::
        z = \begin{cases} \text{upper} + x_+ & \text{with probability } w \\
        \text{lower} - x_- & \text{else} \end{cases}, \qquad
        \frac{w}{1 - w} = \frac{M_+}{M_-}

    with :math:`x_\pm` the overshoots of the base and :math:`M_\pm` the probabilities that it passes
    the two edges. Everything is in logarithms of those, so the law keeps its digits where the base
    almost never gets there.

    A pathwise draw keeps the quantile fixed (implicit reparameterisation): mass also moves from
    one tail to the other. Where a gap separates the tails no such draw exists, and
    ``rsample_given_side`` is what is left.

    Args:
        above: Overshoot of the upper tail.
        below: Overshoot of the lower one, of the same base; left out for a one-sided law.
        upper: Where the upper tail starts, in code units.
        lower: Where the lower one starts, at most ``upper``; by default they meet.

    Raises:
        ValueError: If ``lower`` is given without ``below``, or exceeds ``upper``.

    References:
        Figurnov, Mohamed & Mnih (2018), Implicit reparameterization gradients, NeurIPS 31.

    Example:
        >>> side = NormalOvershoot(torch.tensor(-4.0), torch.tensor(1.0))
        >>> Tails(side, side, upper=torch.tensor(0.5)).variance
        tensor(0.0976)
    """

    arg_constraints = {"upper": constraints.real, "lower": constraints.dependent}

    def __init__(
        self,
        above: Overshoot,
        below: Overshoot | None = None,
        *,
        upper: Tensor | float = 0.0,
        lower: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if below is None and lower is not None:
            raise ValueError("Expected below= with lower=: a lower tail that starts there.")
        kind = {"dtype": above.loc.dtype, "device": above.loc.device}
        upper = torch.as_tensor(upper, **kind)
        lower = upper if lower is None else torch.as_tensor(lower, **kind)
        shapes = [above.batch_shape, upper.shape, lower.shape]
        shapes += [] if below is None else [below.batch_shape]
        shape = torch.broadcast_shapes(*shapes)
        self.has_gap = lower is not upper
        self.has_rsample = not self.has_gap
        self.above = above.expand(shape)
        self.below = None if below is None else below.expand(shape)
        self.upper = upper.expand(shape)
        self.lower = lower.expand(shape) if self.has_gap else self.upper
        super().__init__(shape, validate_args=validate_args)
        if self._validate_args and self.has_gap and bool((lower > upper).any()):
            raise ValueError(f"Expected lower <= upper, got {lower} and {upper}.")

    @property
    def support(self) -> constraints.Constraint:
        """The real line, less a gap; or what is not below ``upper``."""
        if self.below is None:
            return constraints.greater_than_eq(self.upper)
        return Outside(self.lower, self.upper) if self.has_gap else constraints.real

    def expand(self, batch_shape: Any, _instance: Any = None) -> Tails:
        """The same law with another batch shape."""
        batch_shape = torch.Size(batch_shape)
        new = Tails(
            self.above.expand(batch_shape),
            None if self.below is None else self.below.expand(batch_shape),
            upper=self.upper.expand(batch_shape),
            lower=self.lower.expand(batch_shape) if self.has_gap else None,
            validate_args=False,
        )
        new._validate_args = self._validate_args
        return new

    @property
    def log_weights(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the upper and of the lower tail."""
        if self.below is None:
            zero = torch.zeros_like(self.upper)
            return zero, zero - math.inf
        odds = self.above.log_odds(self.below)
        return logsigmoid(odds), logsigmoid(-odds)

    def log_prob_side(self, value: Tensor) -> Tensor:
        """Log-probability of the tail that a value belongs to.

        Its gradient is the score that has to go with ``rsample_given_side``.
        """
        above, below = self.log_weights
        return torch.where(value >= self.upper, above, below)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density; shape of ``value`` and batch shape."""
        if self._validate_args:
            self._validate_sample(value)
        up, down = value >= self.upper, value <= self.lower
        above, below = self.log_weights
        density = above + self.above.log_prob((value - self.upper).clamp(min=0))
        outside = torch.full_like(density, -math.inf)
        other = outside
        if self.below is not None:
            other = below + self.below.log_prob((self.lower - value).clamp(min=0))
            other = torch.where(down, other, outside)
        return torch.where(up, density, other)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw codes, detached; shape ``sample_shape + batch_shape``."""
        with torch.no_grad():
            value = self.upper + self.above.sample(sample_shape)
            if self.below is None:
                return value
            other = self.lower - self.below.sample(sample_shape)
            # In float64, as the gate of a mixed law: float32 has no event rarer than 6e-8.
            above = self.log_weights[0].double().exp()
            noise = torch.rand(value.shape, dtype=above.dtype, device=value.device)
            return torch.where(noise < above, value, other)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw codes with the gradient at a fixed quantile; shape ``sample_shape + batch_shape``.

        Raises:
            NotImplementedError: If a gap separates the tails.
        """
        if self.has_gap:
            raise NotImplementedError(
                "Expected tails that meet: across a gap no pathwise draw moves mass from one to "
                "the other. Use rsample_given_side with the score of log_prob_side."
            )
        return self._follow(self.sample(sample_shape))

    def rsample_given_side(self, sample_shape: Any = ()) -> Tensor:
        """Draw codes with the gradient at a fixed quantile of their own tail.

        What it leaves out is how the weights of the tails change: the score of ``log_prob_side``.
        """
        return self._follow(self.sample(sample_shape), given_side=True)

    def _follow(self, value: Tensor, given_side: bool = False) -> Tensor:
        # dz / dtheta = +-(dS / dtheta) / density, S the mass further out on the side of z.
        up = value >= self.upper
        above, below = self.log_weights
        outer = self.above.log_survival((value - self.upper).clamp(min=0))
        outer = outer if given_side else outer + above
        if self.below is not None:
            other = self.below.log_survival((self.lower - value).clamp(min=0))
            outer = torch.where(up, outer, other if given_side else other + below)
        if not outer.requires_grad:
            return value
        with torch.no_grad():
            log_density = self.log_prob(value)
            if given_side:
                log_density = log_density - self.log_prob_side(value)
            rate = torch.where(up, 1.0, -1.0).to(outer) * (outer - log_density).exp()
        return value + rate * (outer - outer.detach())

    def cdf(self, value: Tensor) -> Tensor:
        """Probability of at most ``value``."""
        return log_cdf(self, value).exp()

    def icdf(self, value: Tensor) -> Tensor:
        """Quantile; its gradient in the parameters stays on one side of a gap.

        Args:
            value: Probabilities in (0, 1).
        """
        return quantile(self, value, 1 - value)

    def log_mgf(self, argument: Tensor | float) -> Tensor:
        r"""Logarithm of the moment generating function, :math:`\log E\, e^{t z}`.

        Args:
            argument: :math:`t`, in 1 / code units.

        Returns:
            Nats; ``inf`` where the expectation does not exist (a Laplace base, ``|t| >= 1 / b``).
        """
        t = torch.as_tensor(argument, dtype=self.upper.dtype, device=self.upper.device)
        above, below = self.log_weights
        upper = above + t * self.upper + self.above.log_mgf(t)
        if self.below is None:
            return upper
        return torch.logaddexp(upper, below + t * self.lower + self.below.log_mgf(-t))

    @property
    def mean(self) -> Tensor:
        """Mean of a code given that it is active: not shrunk by the inactive ones."""
        upper = self.upper + self.above.mean
        if self.below is None:
            return upper
        above, below = (weight.exp() for weight in self.log_weights)
        return above * upper + below * (self.lower - self.below.mean)

    @property
    def variance(self) -> Tensor:
        """Variance of a code given that it is active."""
        if self.below is None:
            return self.above.variance
        above, below = (weight.exp() for weight in self.log_weights)
        apart = self.upper - self.lower + self.above.mean + self.below.mean
        within = above * self.above.variance + below * self.below.variance
        return within + above * below * apart.square()

    def entropy(self) -> Tensor:
        """Entropy in nats."""
        if self.below is None:
            return self.above.entropy()
        above, below = self.log_weights
        upper = above.exp() * (self.above.entropy() - above)
        return upper + below.exp() * (self.below.entropy() - below)


def _log1mexp(value: Tensor) -> Tensor:
    # log(1 - e^v) for v <= 0, with a zero gradient where it is minus infinity.
    some = value < 0
    return torch.where(some, (-torch.where(some, value, -1.0).expm1()).log(), -math.inf)


@log_survival.register(Tails)
def _(law: Tails, value: Tensor) -> Tensor:
    above, below = law.log_weights
    outer = above + law.above.log_survival((value - law.upper).clamp(min=0))
    if law.below is None:
        return outer
    inner = law.below.log_survival((law.lower - value).clamp(min=0))
    down = torch.logaddexp(above, below + _log1mexp(inner))
    return torch.where(value < law.lower, down, outer)


@log_cdf.register(Tails)
def _(law: Tails, value: Tensor) -> Tensor:
    above, below = law.log_weights
    inner = law.above.log_survival((value - law.upper).clamp(min=0))
    if law.below is None:
        return _log1mexp(inner)
    up = torch.logaddexp(below, above + _log1mexp(inner))
    outer = below + law.below.log_survival((law.lower - value).clamp(min=0))
    return torch.where(value > law.upper, up, outer)


@cdf.register(Tails)
def _(law: Tails, value: Tensor) -> Tensor:
    return law.cdf(value)


@quantile.register(Tails)
def _(law: Tails, lower: Tensor, upper: Tensor) -> Tensor:
    with torch.no_grad():
        above, below = (weight.exp() for weight in law.log_weights)
        up = lower >= below
        tiny = torch.finfo(above.dtype).tiny
        outer = torch.where(up, upper / above, 0.5).clamp(tiny, 1)
        inner = torch.where(up, (lower - below) / above, 0.5).clamp(tiny, 1)
        code = law.upper + law.above.quantile(outer, inner)
        if law.below is not None:
            outer = torch.where(up, 0.5, lower / below).clamp(tiny, 1)
            inner = torch.where(up, 0.5, (below - lower) / below).clamp(tiny, 1)
            code = torch.where(up, code, law.lower - law.below.quantile(outer, inner))
        rate = (-law.log_prob(code)).exp() if lower.requires_grad else 0.0
    return law._follow(code, given_side=law.has_gap) + rate * (lower - lower.detach())


@functools.singledispatch
def as_tails(law: Any) -> Tails:
    """A slab written as tails: any two-sided law is two that meet at its location.

    Raises:
        NotImplementedError: If nothing is registered for its type.

    Example:
        >>> import pyro.distributions as dist
        >>> as_tails(dist.Exponential(torch.tensor(2.0))).mean
        tensor(0.5000)
    """
    raise NotImplementedError(
        f"Expected a slab that is Laplace, Normal, Exponential or Tails, got {type(law).__name__}."
    )


@as_tails.register(Tails)
def _(law: Tails) -> Tails:
    return law


@as_tails.register(torch.distributions.Normal)
def _(law: Any) -> Tails:
    side = NormalOvershoot(torch.zeros_like(law.scale), law.scale, validate_args=False)
    return Tails(side, side, upper=law.loc, validate_args=False)


@as_tails.register(torch.distributions.Laplace)
def _(law: Any) -> Tails:
    side = LaplaceOvershoot(torch.zeros_like(law.scale), law.scale, validate_args=False)
    return Tails(side, side, upper=law.loc, validate_args=False)


@as_tails.register(torch.distributions.Exponential)
def _(law: Any) -> Tails:
    side = LaplaceOvershoot(torch.zeros_like(law.rate), 1 / law.rate, validate_args=False)
    return Tails(side, validate_args=False)
