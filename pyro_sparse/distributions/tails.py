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

from pyro_sparse.distributions.memory import remembered
from pyro_sparse.distributions.overshoots import (
    LaplaceOvershoot,
    NormalOvershoot,
    Overshoot,
    still,
)
from pyro_sparse.distributions.slabs import (
    cdf,
    log_cdf,
    log_mills_ratio,
    log_survival,
    quantile,
)


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
        below: Overshoot of the lower one, of the same base; left out for a one-sided law. The same
            object as ``above`` for a symmetric law, of which only one side is evaluated.
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
        self.below = self.above if below is above else None
        if below is not None and below is not above:
            self.below = below.expand(shape)
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
            above := self.above.expand(batch_shape),
            self._below(above, batch_shape),
            upper=self.upper.expand(batch_shape),
            lower=self.lower.expand(batch_shape) if self.has_gap else None,
            validate_args=False,
        )
        new._validate_args = self._validate_args
        return new

    def _below(self, above: Overshoot, batch_shape: torch.Size) -> Overshoot | None:
        if self.below is None or self.below is self.above:
            return None if self.below is None else above
        return self.below.expand(batch_shape)

    @property
    def log_weights(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the upper and of the lower tail."""
        if self.below is None:
            zero = torch.zeros_like(self.upper)
            return zero, zero - math.inf
        if self.below is self.above:
            half = torch.full_like(self.upper, -math.log(2))
            return half, half
        return remembered(self, "_weights_of", (self.above, self.below), self._weigh)

    def _weigh(self) -> tuple[Tensor, Tensor]:
        assert self.below is not None
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
        up, distance, side, weight = self._side_of(value)
        density = weight + side.log_prob(distance.clamp(min=0))
        if self.below is not None and not self.has_gap:
            return density
        return torch.where(distance < 0, -math.inf, density)

    def _side_of(self, value: Tensor) -> tuple[Tensor, Tensor, Overshoot, Tensor]:
        # Whether a value is of the upper tail; how far it is from the edge, negative where it is
        # of none; the overshoot; and the log-weight of its tail.
        up = value >= self.upper
        above, below = self.log_weights
        if self.below is None:
            return up, value - self.upper, self.above, above
        distance = (value - self.upper).abs()
        if self.has_gap:
            distance = torch.where(up, value - self.upper, self.lower - value)
        if self.below is self.above:
            return up, distance, self.above, above
        return up, distance, self.above.where(up, self.below), torch.where(up, above, below)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw codes, detached; shape ``sample_shape + batch_shape``."""
        with torch.no_grad():
            if self.below is None:
                return self.upper + self.above.sample(sample_shape)
            # In float64, as the gate of a mixed law: float32 has no event rarer than 6e-8.
            above = self.log_weights[0].double().exp()
            shape = self._extended_shape(torch.Size(sample_shape))
            up = torch.rand(shape, dtype=above.dtype, device=above.device) < above
            if self.below is self.above:
                distance = self.above.sample(sample_shape)
            else:
                distance = self.above.where(up, self.below).sample()
            return torch.where(up, self.upper + distance, self.lower - distance)

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
        # The edge moves, the draw moves within its tail, and mass moves from tail to tail.
        up, distance, side, weight = self._side_of(value)
        outwards = side.drift(distance.detach().clamp(min=0))
        if weight.requires_grad and not given_side:
            with torch.no_grad():
                rate = side.log_mills(distance.clamp(min=0))[1].exp()
            outwards = outwards + rate * still(weight)
        edge = still(self.upper)
        if self.has_gap:
            edge = torch.where(up, edge, still(self.lower))
        return value + edge + outwards * (2.0 * up - 1)

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
        if self.below is self.above:
            return (self.upper + self.lower) / 2 if self.has_gap else self.upper
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
        if self.below is self.above:
            return self.above.entropy() + math.log(2)
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


@log_mills_ratio.register(Tails)
def _(law: Tails, value: Tensor) -> Tensor:
    up, distance, side, weight = law._side_of(value)
    distance = distance.clamp(min=0)
    outer, mills = side.log_mills(distance)
    # From zero to the edge of a tail on the other side of it: all but what lies beyond.
    crossed = up != (value > 0)
    rest = (-weight - outer).clamp(min=torch.finfo(outer.dtype).tiny)
    return mills + torch.where(crossed, rest + (-(-rest).expm1()).log(), 0.0)


@cdf.register(Tails)
def _(law: Tails, value: Tensor) -> Tensor:
    return law.cdf(value)


@quantile.register(Tails)
def _(law: Tails, lower: Tensor, upper: Tensor) -> Tensor:
    with torch.no_grad():
        above, below = (weight.exp() for weight in law.log_weights)
        up = lower >= below
        mass = torch.where(up, above, below)
        tiny = torch.finfo(above.dtype).tiny
        outer = (torch.where(up, upper, lower) / mass).clamp(tiny, 1)
        inner = (torch.where(up, lower, upper) - torch.where(up, below, above)) / mass
        side = law.above if law.below is None else law.above.where(up, law.below)
        distance = side.quantile(outer, inner.clamp(tiny, 1))
        code = torch.where(up, law.upper + distance, law.lower - distance)
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
