"""What a mixed law asks of its slab beyond the methods of a distribution, by type.

Tails that keep their digits in float32, where the methods of torch have long since rounded to zero,
one or infinity. A slab of one's own works without: the defaults call its ``cdf`` and ``icdf``.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, Exponential, Laplace, Normal, constraints
from torch.special import log_ndtr, ndtri


def check_slab(slab: object) -> None:
    """Refuse what cannot be the law of an active code.

    Raises:
        TypeError: If it is no distribution.
        ValueError: If it has an event shape, is discrete, a wrapper, or has a relaxed gate.
    """
    if not isinstance(slab, Distribution):
        raise TypeError(
            f"Expected slab to be a distribution, such as Laplace(0.0, 1.0), got {slab!r}."
        )
    if getattr(slab, "has_relaxed_gate", False):
        raise ValueError(
            f"Expected a slab without a gate of its own, got {type(slab).__name__}. Use its slab: "
            "SpikeAndSlab(law.slab, probs)."
        )
    if getattr(slab, "has_fixed_zeros", False):
        raise ValueError(
            f"Expected a slab without zeros of its own, got {type(slab).__name__}. Use its base, "
            "and a probability of zero outside: probs=torch.where(active, probs, 0.0)."
        )
    support: Any = slab.support
    refused = support.is_discrete or isinstance(slab, dist.Delta | dist.MaskedDistribution)
    if slab.event_shape or refused:
        raise ValueError(
            "Expected a continuous slab of event shape (), elementwise, got "
            f"{type(slab).__name__} of event shape {tuple(slab.event_shape)}. Use .to_event or "
            ".mask on the law that is made of it."
        )


def probability(logits: Tensor) -> Tensor:
    """Logistic function, with a slope that has all its digits for large log-odds too.

    torch's own slope is ``y * (1 - y)``, which in float32 is zero from log-odds of 17 on.

    Example:
        >>> logits = torch.tensor(20.0, requires_grad=True)
        >>> torch.autograd.grad(probability(logits), logits)
        (tensor(2.0612e-09),)
    """
    return torch.where(logits < 0, logits.sigmoid(), 1 - (-logits).sigmoid())


def is_two_sided(law: Distribution) -> bool:
    """Whether the values of a law are all real numbers, as far as its support says."""
    return law.support is constraints.real


def has_gap(law: Distribution) -> bool:
    """Whether a law says that an interval parts its values into two sides.

    Example:
        >>> has_gap(dist.Laplace(0.0, 1.0))
        False
    """
    return bool(getattr(law, "has_gap", False))


def reaches_zero(law: Distribution) -> bool:
    """Whether the values of a law come arbitrarily close to zero, as far as its support says."""
    lower = getattr(law.support, "lower_bound", -math.inf)
    upper = getattr(law.support, "upper_bound", math.inf)
    return bool(((torch.as_tensor(lower) <= 0) & (torch.as_tensor(upper) >= 0)).all())


def sidedness(law: Distribution) -> str:
    """Which values a law has, in a word for messages: its bounds may be large tensors.

    Example:
        >>> sidedness(dist.Exponential(torch.ones(1000)))
        'one-sided'
    """
    if is_two_sided(law) or has_gap(law):
        return "two-sided"
    bounds = [hasattr(law.support, name) for name in ("lower_bound", "upper_bound")]
    return "bounded" if all(bounds) else "one-sided"


def inner_value(law: Distribution) -> Tensor:
    """A number of the support with a finite log-density, detached, shape ``batch_shape``.

    It stands in where a value has no density, so that the gradient there is zero and not nan.
    """
    mean = law.mean.detach()
    return torch.where(mean.isfinite(), mean, torch.ones_like(mean))


@functools.singledispatch
def cdf(law: Any, value: Tensor) -> Tensor:
    """Probability of at most ``value``, which may lie outside of the support; shape of ``value``.

    Example:
        >>> cdf(dist.Laplace(0.0, 1.0), torch.tensor(-60.0))
        tensor(4.3783e-27)
    """
    inside = law.support.check(value)
    inner = torch.where(inside, value, inner_value(law))
    return torch.where(inside, _call(law, "cdf", inner), (value > inner_value(law)).to(inner.dtype))


@functools.singledispatch
def log_cdf(law: Any, value: Tensor) -> Tensor:
    """Log-probability of at most ``value``, accurate far in the lower tail; shape of ``value``.

    Example:
        >>> log_cdf(dist.Laplace(0.0, 1.0), torch.tensor(-200.0))
        tensor(-200.6931)
    """
    return cdf(law, value).log()


@functools.singledispatch
def log_survival(law: Any, value: Tensor) -> Tensor:
    """Log-probability of more than ``value``, accurate far in the upper tail; shape of ``value``.

    Example:
        >>> log_survival(dist.Normal(0.0, 1.0), torch.tensor(30.0))
        tensor(-454.3213)
    """
    return (-cdf(law, value)).log1p()


@functools.singledispatch
def log_mills_ratio(law: Any, value: Tensor) -> Tensor:
    """Log of the mass beyond a value, on its side of zero, over the density there.

    Above zero ``log_survival - log_prob``, below ``log_cdf - log_prob``, without their difference
    where a closed form is registered.

    Args:
        law: A slab.
        value: Values of its support.

    Example:
        >>> log_mills_ratio(dist.Laplace(0.0, 0.5), torch.tensor([-3.0, 2.0])).exp()
        tensor([0.5000, 0.5000])
    """
    tail = torch.where(value > 0, log_survival(law, value), log_cdf(law, value))
    return tail - law.log_prob(value)


@functools.singledispatch
def quantile(law: Any, lower: Tensor, upper: Tensor) -> Tensor:
    """Value that has probability ``lower`` below it and ``upper`` above it.

    Args:
        law: A slab.
        lower: Probabilities in (0, 1).
        upper: ``1 - lower``, given apart so that the smaller of the two has all its digits.

    Example:
        >>> quantile(dist.Laplace(0.0, 1.0), torch.tensor(1e-20), torch.tensor(1.0))
        tensor(-45.3586)
    """
    return _call(law, "icdf", lower)


def _call(law: Any, method: str, value: Tensor) -> Tensor:
    try:
        found: Tensor = getattr(law, method)(value)
    except NotImplementedError as error:
        if str(error):
            raise
        raise NotImplementedError(
            f"Expected a slab with a method {method}, got {type(law).__name__}, which has none. "
            f"Use a Laplace, Normal or Exponential slab, or write {method} in a subclass."
        ) from None
    return found


def _nearer(lower: Tensor, upper: Tensor) -> Tensor:
    return torch.where(lower < upper, lower, upper)  # a minimum would split the gradient of a tie


@cdf.register(Laplace)
def _(law: Laplace, value: Tensor) -> Tensor:
    value = (value - law.loc) / law.scale
    below, above = value.clamp(max=0).exp() / 2, 1 - (-value.clamp(min=0)).exp() / 2
    return torch.where(value < 0, below, above)


@log_cdf.register(Laplace)
def _(law: Laplace, value: Tensor) -> Tensor:
    return _log_cdf_laplace((value - law.loc) / law.scale)


@log_survival.register(Laplace)
def _(law: Laplace, value: Tensor) -> Tensor:
    return _log_cdf_laplace((law.loc - value) / law.scale)


def _log_cdf_laplace(value: Tensor) -> Tensor:
    below = value.clamp(max=0) - math.log(2)
    above = (-(-value.clamp(min=0)).exp() / 2).log1p()
    return torch.where(value < 0, below, above)


@log_mills_ratio.register(Laplace)
def _(law: Laplace, value: Tensor) -> Tensor:
    # How far the value stands within the bulk, seen from its side of zero.
    inside = (law.loc - value) * value.sign() / law.scale
    bulk = inside.clamp(min=0)
    return law.scale.log() + bulk + (-torch.expm1(-bulk)).log1p()  # tails: the scale itself


@quantile.register(Laplace)
def _(law: Laplace, lower: Tensor, upper: Tensor) -> Tensor:
    size = (2 * _nearer(lower, upper)).log()
    return law.loc + law.scale * torch.where(lower < upper, size, -size)


@cdf.register(Normal)
def _(law: Normal, value: Tensor) -> Tensor:
    return torch.erfc((law.loc - value) / (math.sqrt(2) * law.scale)) / 2


@log_cdf.register(Normal)
def _(law: Normal, value: Tensor) -> Tensor:
    return log_ndtr((value - law.loc) / law.scale)


@log_survival.register(Normal)
def _(law: Normal, value: Tensor) -> Tensor:
    return log_ndtr((law.loc - value) / law.scale)


@quantile.register(Normal)
def _(law: Normal, lower: Tensor, upper: Tensor) -> Tensor:
    size = ndtri(_nearer(lower, upper))
    return law.loc + law.scale * torch.where(lower < upper, size, -size)


@cdf.register(Exponential)
def _(law: Exponential, value: Tensor) -> Tensor:
    return -torch.expm1(-law.rate * value.clamp(min=0))


@log_cdf.register(Exponential)
def _(law: Exponential, value: Tensor) -> Tensor:
    return (-torch.expm1(-law.rate * value.clamp(min=0))).log()


@log_survival.register(Exponential)
def _(law: Exponential, value: Tensor) -> Tensor:
    return -law.rate * value.clamp(min=0)


@quantile.register(Exponential)
def _(law: Exponential, lower: Tensor, upper: Tensor) -> Tensor:
    size = torch.where(lower < upper, (-_nearer(lower, upper)).log1p(), upper.log())
    return -size / law.rate
