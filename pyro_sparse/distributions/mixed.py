"""Laws with an atom at zero: a code is exactly zero, or is drawn from a continuous slab."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid, softplus

from pyro_sparse.distributions.arguments import as_numbers, common_shape
from pyro_sparse.distributions.slabs import (
    cdf,
    check_slab,
    has_gap,
    inner_value,
    log_mills_ratio,
    probability,
    quantile,
    reaches_zero,
    sidedness,
)


class WithAtom(constraints.Constraint):
    """Values of a law with an atom at zero: those of its slab, and zero.

    No bijection from the reals is registered for it, since none exists that keeps the atom:
    autoguides and NUTS refuse such a site.
    """

    is_discrete = False
    event_dim = 0

    def __init__(self, slab: constraints.Constraint) -> None:
        self.slab = slab

    def check(self, value: Tensor) -> Tensor:
        """True where the value is zero or one of the slab's."""
        return (value == 0) | self.slab.check(value)

    def __repr__(self) -> str:
        return f"WithAtom({self.slab})"


class Mixed(TorchDistribution):
    r"""Declares a law with an atom at zero, for each element apart.

    .. math:: p(z) = (1 - g)\, \delta_0(z) + g\, s(z)

    Densities are relative to Lebesgue measure plus unit mass at zero, so ``log_prob(0)`` is the
    log-probability of an inactive code. A value counts as inactive if it is exactly zero; test that
    before any arithmetic.

    ``has_rsample`` is false, so Pyro's own objectives take the unbiased score-function route: an
    almost-everywhere pathwise draw in a sampled KL would be biased without a word. ``rsample`` is
    there for objectives with an analytic KL.

    A law of one's own subclasses this and sets the two attributes.

    Attributes:
        logits: Log-odds of being active, :math:`\log g / (1 - g)`, shape ``batch_shape``.
        slab: Law :math:`s` of an active code, batch shape ``batch_shape``: a distribution with
            ``log_prob``, ``sample``, ``cdf``, ``icdf``, ``entropy``, ``mean`` and ``variance``.
        continuous_map: Whether ``rsample`` is a continuous map of noise and parameters, as that of
            a soft threshold is, so that its gradient cannot explode.

    Example:
        >>> import pyro.distributions as dist
        >>> class Halved(Mixed):
        ...     arg_constraints = {}
        ...     def __init__(self, slab):
        ...         self.slab, self.logits = slab, torch.zeros(slab.batch_shape)
        ...         super().__init__(slab.batch_shape)
        >>> law = Halved(dist.Normal(torch.zeros(3), 1.0))
        >>> law.prob_active, law.variance
        (tensor([0.5000, 0.5000, 0.5000]), tensor([0.5000, 0.5000, 0.5000]))
    """

    has_rsample = False
    continuous_map: bool = False
    logits: Tensor
    slab: Any

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        """The slab's support and zero; a constraint without a bijection."""
        return WithAtom(self.slab.support)

    @property
    def prob_active(self) -> Tensor:
        """Probability that a code is not zero, shape ``batch_shape``."""
        return probability(self.logits)

    @property
    def mean(self) -> Tensor:
        """Mean, zeros counted; of the active codes alone it is ``slab.mean``."""
        return self.prob_active * self.slab.mean

    @property
    def variance(self) -> Tensor:
        """Variance, zeros counted."""
        active = self.prob_active
        return active * (self.slab.variance + probability(-self.logits) * self.slab.mean.square())

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of zero, log-density elsewhere; shape of ``value`` and batch shape."""
        if self._validate_args:
            self._validate_sample(value)
        inactive = value == 0
        active = torch.where(inactive, inner_value(self.slab), value)
        slab = self.slab.log_prob(active)
        return torch.where(inactive, logsigmoid(-self.logits), logsigmoid(self.logits) + slab)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw codes, detached, with exact zeros; shape ``sample_shape + batch_shape``."""
        with torch.no_grad():
            codes = self.slab.sample(torch.Size(sample_shape))
            active = self.sample_active(sample_shape)
            return torch.where(active, codes, torch.zeros_like(codes))

    def sample_active(self, sample_shape: Any = ()) -> Tensor:
        """Draw which codes are active: boolean, shape ``sample_shape + batch_shape``."""
        with torch.no_grad():
            # In float64: the 24 bits of float32 make no event rarer than 6e-8, save the impossible.
            probs = self.logits.double().sigmoid()
            shape = self._extended_shape(sample_shape)
            return torch.rand(shape, dtype=probs.dtype, device=probs.device) < probs

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        r"""Draw codes with a pathwise gradient through the quantile of the mixed law.

        At a fixed quantile, with :math:`F_s` the slab's distribution function,

        .. math:: \frac{dz}{dg} = \frac{\mathbb 1[z > 0] - F_s(z)}{g\, s(z)} \text{ for } z \neq 0,

        which counts how codes enter and leave the atom. Its expectation is the exact gradient of
        any expected continuous function of the codes, but it must not meet a log-density of this
        law, which jumps at zero. The variance grows with the mass that has to cross a region of low
        density: as :math:`e^{|\mu| / b}` for a Laplace slab.

        Returns:
            Shape ``sample_shape + batch_shape``, with exact zeros.

        Raises:
            NotImplementedError: If the slab has no pathwise draw, or does not reach down to zero.
        """
        codes, active = self.rsample_slab(sample_shape), self.sample_active(sample_shape)
        value = torch.where(active, codes, torch.zeros_like(codes))
        if not self.logits.requires_grad:
            return value
        rate = self.gate_velocity(codes.detach())
        rate = torch.where(active, rate, torch.zeros_like(rate))
        logits = torch.where(self.logits.isinf(), torch.zeros_like(self.logits), self.logits)
        return value + rate * (logits - logits.detach())

    def rsample_slab(self, sample_shape: Any = ()) -> Tensor:
        """Draw codes from the slab, with its own pathwise gradient.

        Raises:
            NotImplementedError: If the slab has none, or does not reach down to zero.
        """
        if not self.slab.has_rsample:
            raise NotImplementedError(
                f"Expected a slab with a pathwise draw, got {type(self.slab).__name__}."
            )
        if not reaches_zero(self.slab):
            raise NotImplementedError(
                f"Expected a slab that reaches down to zero, got {type(self.slab).__name__}, "
                f"which is {sidedness(self.slab)} and stays away from it: codes that leave the "
                "atom would have to jump, so a pathwise gradient would be biased."
            )
        return self.slab.rsample(torch.Size(sample_shape))

    def gate_velocity(self, codes: Tensor) -> Tensor:
        """Derivative of active codes by ``logits`` at a fixed quantile of the mixed law; detached.

        Args:
            codes: Values of active codes, ``sample_shape + batch_shape``.
        """
        with torch.no_grad():
            rate = (log_mills_ratio(self.slab, codes) + logsigmoid(-self.logits)).exp()
            return torch.where(codes > 0, rate, -rate)

    def log_prob_gates(self, active: Tensor, codes: Tensor) -> Tensor:
        """Log-probability of all that was drawn discretely, whose gradient is a score.

        Of the gates; and of the side that an active code is on, where the slab has a gap that no
        pathwise draw crosses. With a draw of ``rsample_slab`` it makes an unbiased gradient.

        Args:
            active: Gates, as ``sample_active`` draws them.
            codes: The codes, or the draws of the slab; taken as constants, read where active.

        Returns:
            Nats; shape of ``active``.

        Example:
            >>> import pyro.distributions as dist
            >>> law = SpikeAndSlab(dist.Laplace(0.0, 1.0), probs=0.25)
            >>> law.log_prob_gates(torch.tensor([True, False]), torch.tensor([0.3, 0.0])).exp()
            tensor([0.2500, 0.7500])
        """
        value = -softplus(torch.where(active, -self.logits, self.logits))
        if not has_gap(self.slab):
            return value
        side = self.slab.log_prob_side(codes.detach())
        return value + torch.where(active, side, torch.zeros_like(side))

    def cdf(self, value: Tensor) -> Tensor:
        """Probability of a code of at most ``value``; jumps at zero by the atom.

        Raises:
            NotImplementedError: If the slab has no ``cdf``.
        """
        atom = probability(-self.logits)
        return self.prob_active * cdf(self.slab, value) + torch.where(value >= 0, atom, 0.0)

    def icdf(self, value: Tensor) -> Tensor:
        """Smallest code whose ``cdf`` reaches ``value``; exactly zero on the atom's interval.

        Args:
            value: Probabilities in (0, 1).

        Raises:
            NotImplementedError: If the slab has no ``cdf`` or no ``icdf``.
        """
        active, atom = self.prob_active, probability(-self.logits)
        below = active * cdf(self.slab, torch.zeros_like(active))
        lower, upper = value < below, value > below + atom
        # Levels of the slab from either end: one alone loses the digits of the other tail.
        outside = lower | upper
        part = torch.where(outside, active, torch.ones_like(active))
        level = torch.where(lower, value / part, 1 - (1 - value) / part)
        rest = torch.where(lower, 1 - value / part, (1 - value) / part)
        half = torch.full_like(level, 0.5)
        codes = quantile(
            self.slab,
            torch.where(outside, level, half).clamp(0, 1),
            torch.where(outside, rest, half).clamp(0, 1),
        )
        return torch.where(outside, codes, torch.zeros_like(codes))

    def entropy(self) -> Tensor:
        """Entropy in nats, relative to Lebesgue measure plus unit mass at zero."""
        return self._gate_entropy() + self.prob_active * self.slab.entropy()

    def _gate_entropy(self) -> Tensor:
        # |l| g(|l|) + log(1 + e^-|l|) written so that an infinite logit gives zero, not nan.
        size = self.logits.abs()
        inner = torch.where(size.isinf(), torch.zeros_like(size), size)
        return torch.where(
            size.isinf(), torch.zeros_like(size), softplus(-inner) + inner * (-inner).sigmoid()
        )


class SpikeAndSlab(Mixed):
    r"""Exact zeros mixed with a slab.

    .. math:: p(z) = (1 - \pi)\, \delta_0(z) + \pi\, s(z)

    Args:
        slab: Law of an active code, elementwise: ``Laplace``, ``Normal``, ``Exponential``, or any
            distribution with ``log_prob``, ``sample``, ``cdf``, ``icdf``, ``entropy``, ``mean`` and
            ``variance``, of event shape ``()``.
        probs: Probability :math:`\pi` of being active, in [0, 1]; broadcasts with the slab. Exactly
            0 and 1 get no gradient.
        logits: In its place: log-odds of being active, exact also where they are large. An encoder
            returns these: a probability in float32 rounds to 1 from log-odds of 17 on.

    Raises:
        TypeError: If ``slab`` is no distribution, or ``probs`` or ``logits`` no number.
        ValueError: If not exactly one of ``probs`` and ``logits`` is given, ``probs`` is out of
            range, the shapes do not broadcast, or the slab has an event shape or an atom of its
            own.

    References:
        Mitchell & Beauchamp (1988), J. Am. Stat. Assoc. 83(404); Titsias & Lazaro-Gredilla (2011),
        NeurIPS 24.

    Example:
        >>> import pyro.distributions as dist
        >>> prior = SpikeAndSlab(dist.Laplace(0.0, 1.0), probs=torch.tensor(0.25))
        >>> prior.log_prob(torch.tensor(0.0)).exp()
        tensor(0.7500)
    """

    arg_constraints = {"logits": constraints.real}

    def __init__(
        self,
        slab: Any,
        probs: Tensor | float | None = None,
        *,
        logits: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        check_slab(slab)
        if isinstance(slab, Mixed):
            raise ValueError(f"Expected a slab without an atom, got {type(slab).__name__}.")
        if (probs is None) == (logits is None):
            raise ValueError("Expected exactly one of probs and logits.")
        like = slab.mean
        if probs is not None:
            probs = as_numbers("probs", probs, like)
            if not bool(((probs >= 0) & (probs <= 1)).all()):
                raise ValueError(f"Expected probs in [0, 1], got {probs}.")
            logits = _log_odds(probs)
        name = "logits" if probs is None else "probs"
        logits = as_numbers(name, logits, like)
        shape = common_shape(slab=slab.batch_shape, **{name: logits.shape})
        self.logits = logits.expand(shape)
        self.slab = slab if slab.batch_shape == shape else slab.expand(shape)
        super().__init__(shape, validate_args=validate_args)

    @property
    def probs(self) -> Tensor:
        """Probability of being active."""
        return self.prob_active

    def expand(self, batch_shape: Any, _instance: Any = None) -> SpikeAndSlab:
        """The same law with another batch shape."""
        new = self._get_checked_instance(SpikeAndSlab, _instance)
        batch_shape = torch.Size(batch_shape)
        new.logits = self.logits.expand(batch_shape)
        new.slab = self.slab.expand(batch_shape)
        super(SpikeAndSlab, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new


def _log_odds(probs: Tensor) -> Tensor:
    # At 0 and 1 the slope is infinite, and times a slope of zero downstream it would be nan.
    sure = (probs == 0) | (probs == 1)
    inner = torch.where(sure, torch.full_like(probs, 0.5), probs)
    ends = torch.where(probs == 0, -math.inf, math.inf).to(probs.dtype)
    return torch.where(sure, ends, inner.log() - (-inner).log1p())
