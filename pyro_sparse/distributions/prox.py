"""What a solver asks of a prior, registered by distribution type.

They dispatch on the type of a distribution, as ``torch.distributions.kl_divergence`` does:

- ``prox(prior, value, step)``: one proximal step on its penalty, ``-log p`` up to a constant. It is
  all that an unrolled encoder needs;
- ``conjugate(prior)``: the convex conjugate of that penalty, from which a duality gap is computed.
  It is needed for a certificate by ``solvers.solve``, and exists for convex penalties only;
- ``penalty(prior, value)``: that penalty itself, with which a gap is computed. Of a type without a
  form of its own it is the difference of two log-densities, and the type then needs ``mode``;
- ``restrict(prior, codes)``: codes with zeros where the prior allows no others, for shrinkages
  that ask the prior for nothing else.

A user adds a prior of their own::

    @register_prox(MyPrior)  # for an encoder
    def _(prior, value, step):
        return ...  # argmin_z  -step * prior.log_prob(z) + (z - value)**2 / 2

    @register_conjugate(MyPrior)  # for a certificate
    def _(prior):
        return Conjugate(...)

For a certificate the distribution also needs the property ``mode``, from which its penalty is
measured, or a penalty of its own by ``register_penalty``. ``testing.check_prior(MyPrior(...))``
compares all of them with the density by brute force.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor

from pyro_sparse.distributions.mixed import Mixed
from pyro_sparse.ops import soft_threshold, soft_threshold_nonnegative


@functools.singledispatch
def prox(prior: Any, value: Tensor, step: Tensor | float) -> Tensor:
    r"""Proximal step of a prior: :math:`\arg\min_z -t \log p(z) + \tfrac12 (z - u)^2`.

    Args:
        prior: A distribution whose type has a registered prox; wrappers (``to_event``, ``expand``)
            are looked through.
        value: :math:`u`, in code units; broadcasts with the prior's batch and event shape.
        step: :math:`t \ge 0`, broadcastable to ``value``. For a Laplace prior of rate ``1 / scale``
            the threshold is ``step / scale``.

    Returns:
        The minimiser, in the broadcast shape; exact zeros where the prior makes them.

    Raises:
        NotImplementedError: If nothing is registered for the prior's type, or it has an atom at
            zero, where the minimiser would depend on the unit of the codes.

    References:
        Parikh & Boyd (2014), Proximal Algorithms, sec. 1.1.

    Example:
        >>> prox(dist.Laplace(0.0, 0.5), torch.tensor([-3.0, 0.1, 2.0]), 1.0)
        tensor([-1.,  0.,  0.])
    """
    raise NotImplementedError(
        f"No proximal step is known for {type(prior).__name__}. Register one with "
        f"@pyro_sparse.distributions.register_prox({type(prior).__name__})."
    )


def register_prox(kind: type) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorator that registers ``function(prior, value, step)`` as the prox of a distribution type.

    Subclasses inherit it. A later registration for the same type replaces the earlier one.

    Example:
        >>> class HeavyLaplace(dist.Laplace):
        ...     pass
        >>> @register_prox(HeavyLaplace)
        ... def _(prior, value, step):
        ...     return soft_threshold(value, 2 * step / prior.scale)
        >>> prox(HeavyLaplace(0.0, 1.0), torch.tensor(3.0), 1.0)
        tensor(1.)
    """
    return prox.register(_checked(kind))


class Conjugate(NamedTuple):
    """Convex conjugate of a penalty, ``g*(u) = sup_z u z - g(z)`` with ``g(mode) = 0``.

    Attributes:
        lower: Smallest slope of each code at which it is finite (``-inf`` if there is none).
        upper: Largest slope at which it is finite.
        value: Its value by element, at slopes where it is finite.
        gauge: Where codes are not penalised each by itself: of given slopes, how large they are
            relative to the largest of their direction at which it is finite, in their shape. For a
            group of codes the Euclidean length over the rate (the dual norm).
    """

    lower: Tensor
    upper: Tensor
    value: Callable[[Tensor], Tensor]
    gauge: Callable[[Tensor], Tensor] | None = None

    def feasible(self, slope: Tensor) -> Tensor:
        """Largest factor up to one that makes each slope one at which the conjugate is finite.

        Args:
            slope: Shape of the codes.

        Example:
            >>> conjugate(dist.Laplace(0.0, 0.5)).feasible(torch.tensor([-1.0, 4.0]))
            tensor([1.0000, 0.5000])
        """
        factor = torch.ones_like(slope)
        factor = torch.where(slope > self.upper, self.upper / slope, factor)
        factor = torch.where(slope < self.lower, self.lower / slope, factor)
        if self.gauge is None:
            return factor
        size = self.gauge(slope)
        return torch.where(size > 1, torch.minimum(factor, 1 / size), factor)


@functools.singledispatch
def conjugate(prior: Any) -> Conjugate:
    """Convex conjugate of a prior's penalty, for duality gaps.

    Raises:
        NotImplementedError: If nothing is registered for the prior's type (or its penalty is not
            convex, so that there is nothing to register).

    Example:
        >>> conjugate(dist.Exponential(2.0)).upper
        tensor(2.)
    """
    raise NotImplementedError(
        f"No conjugate is known for {type(prior).__name__}, so no duality gap can certify its "
        "codes. Register one with @pyro_sparse.distributions.register_conjugate, or call solve "
        "with tol=None to run a fixed number of steps without a certificate."
    )


def register_conjugate(kind: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that registers ``function(prior) -> Conjugate`` for a distribution type.

    The gap compares it with ``penalty``, which for a type of your own is the difference of its
    log-densities at ``mode`` and at the codes; ``register_penalty`` takes a form without that
    rounding, and without a ``mode``.

    Example:
        >>> class SteepLaplace(dist.Laplace):
        ...     pass
        >>> @register_conjugate(SteepLaplace)
        ... def _(prior):
        ...     return Conjugate(-2 / prior.scale, 2 / prior.scale, torch.zeros_like)
        >>> conjugate(SteepLaplace(0.0, 1.0)).upper
        tensor(2.)
    """
    return conjugate.register(_checked(kind))


@functools.singledispatch
def restrict(prior: Any, codes: Tensor) -> Tensor:
    """Codes with zeros where the prior allows no others: the wrong sign, outside a known support.

    Of priors of which nothing is registered codes come back as they are.

    Args:
        prior: A distribution; wrappers (``to_event``, ``expand``) are looked through.
        codes: Broadcast with its batch and event shape.

    Example:
        >>> restrict(dist.Exponential(1.0), torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """
    return codes


@restrict.register(dist.Exponential)
def _(prior: dist.Exponential, codes: Tensor) -> Tensor:
    return codes.relu()


def _checked(kind: type) -> type:
    if not isinstance(kind, type):
        raise TypeError(
            f"Expected a distribution type, such as pyro.distributions.Laplace, got {kind!r}."
        )
    return kind


@functools.singledispatch
def penalty(prior: Any, value: Tensor) -> Tensor:
    """What a prior adds to the objective: ``log p(mode) - log p(value)``, shape of ``log_prob``.

    Of the priors here it is written without that difference, which loses a small penalty (data in
    small units) in the rounding of two large log-densities, and a duality gap with it. A prior of
    your own needs the property ``mode``, or a form of its own by ``register_penalty``.

    Example:
        >>> penalty(dist.Laplace(0.0, 0.5), torch.tensor([0.0, 1.0]))
        tensor([0., 2.])
    """
    if not isinstance(prior, torch.distributions.Distribution):
        raise TypeError(f"Expected a distribution, got {type(prior).__name__}.")
    return prior.log_prob(prior.mode) - prior.log_prob(value)


def register_penalty(kind: type) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorator that registers ``function(prior, value)`` as the penalty of a distribution type.

    It is ``-log p(value)`` up to the constant that makes it zero at the mode, infinite outside of
    the support, in the shape of ``log_prob``.

    Example:
        >>> class Tiny(dist.Laplace):
        ...     pass
        >>> @register_penalty(Tiny)
        ... def _(prior, value):
        ...     return value.abs() / prior.scale
        >>> penalty(Tiny(0.0, 1e-8), torch.tensor(1e-8))
        tensor(1.)
    """
    return penalty.register(_checked(kind))


@register_penalty(dist.Laplace)
def _(prior: dist.Laplace, value: Tensor) -> Tensor:
    return (value - prior.loc).abs() / prior.scale


@register_prox(dist.Laplace)
def _(prior: dist.Laplace, value: Tensor, step: Tensor | float) -> Tensor:
    return prior.loc + soft_threshold(value - prior.loc, step / prior.scale)


@register_conjugate(dist.Laplace)
def _(prior: dist.Laplace) -> Conjugate:
    rate = 1 / prior.scale
    return Conjugate(-rate, rate, lambda slope: slope * prior.loc)


@register_penalty(dist.Exponential)
def _(prior: dist.Exponential, value: Tensor) -> Tensor:
    return torch.where(value < 0, torch.inf, prior.rate * value)


@register_prox(dist.Exponential)
def _(prior: dist.Exponential, value: Tensor, step: Tensor | float) -> Tensor:
    return soft_threshold_nonnegative(value, step * prior.rate)


@register_conjugate(dist.Exponential)
def _(prior: dist.Exponential) -> Conjugate:
    return Conjugate(torch.full_like(prior.rate, -torch.inf), prior.rate, torch.zeros_like)


@register_penalty(dist.Normal)
def _(prior: dist.Normal, value: Tensor) -> Tensor:
    return ((value - prior.loc) / prior.scale).square() / 2


@register_prox(dist.Normal)
def _(prior: dist.Normal, value: Tensor, step: Tensor | float) -> Tensor:
    weight = step / prior.scale.square()
    return (value + weight * prior.loc) / (1 + weight)


@register_conjugate(dist.Normal)
def _(prior: dist.Normal) -> Conjugate:
    unbounded = torch.full_like(prior.scale, torch.inf)
    return Conjugate(
        -unbounded,
        unbounded,
        lambda slope: slope * (prior.loc + prior.scale.square() * slope / 2),
    )


@prox.register(Mixed)
@conjugate.register(Mixed)
@penalty.register(Mixed)
def _(prior: Mixed, *_: Any) -> Any:
    raise NotImplementedError(
        f"Expected a prior with a density, got {type(prior).__name__}, with an atom at zero: a "
        "point has a probability there and a density elsewhere, so which codes are the most "
        "probable depends on their unit, and there is no proximal step. Use a guide with an atom "
        "at zero in place of a point, or a prior without one, such as Laplace."
    )


def _look_through(wrapper: type) -> None:
    @prox.register(wrapper)
    def _(prior: Any, value: Tensor, step: Tensor | float) -> Tensor:
        return prox(prior.base_dist, value, step)

    @conjugate.register(wrapper)
    def _(prior: Any) -> Conjugate:
        return conjugate(prior.base_dist)

    @restrict.register(wrapper)
    def _(prior: Any, codes: Tensor) -> Tensor:
        return restrict(prior.base_dist, codes)


for _wrapper in (torch.distributions.Independent, ExpandedDistribution):
    _look_through(_wrapper)


@register_penalty(ExpandedDistribution)
def _(prior: Any, value: Tensor) -> Tensor:
    return penalty(prior.base_dist, value)


@register_penalty(torch.distributions.Independent)
def _(prior: Any, value: Tensor) -> Tensor:
    terms = penalty(prior.base_dist, value)
    dims = prior.reinterpreted_batch_ndims
    return terms.flatten(-dims).sum(-1) if dims else terms
