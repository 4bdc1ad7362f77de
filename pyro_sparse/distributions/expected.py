"""Expected log-densities of data under random parameters, registered by distribution type.

``expected_log_prob(law, value)`` is ``E[law.log_prob(value)]`` where a parameter of the law is a
``Moments``: what is expected over the codes that it stands for. A user adds a family::

    @register_expected_log_prob(MyLaw)
    def _(law, value):
        return ...  # from law.loc.expectation, law.loc.variance, law.loc.log_mgf(t)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from torch import Tensor

import pyro_sparse.distributions.affine  # noqa: F401  registers what moments follow
from pyro_sparse.distributions.moments import INSTEAD, ExpMoments, Moments, NotAffine


def expected_log_prob(law: Any, value: Tensor) -> Tensor:
    r"""Expected log-density :math:`E_z[\log p(y \mid z)]` of a law with random parameters.

    A law without random parameters gives its ``log_prob``.

    Args:
        law: A distribution whose parameters may be ``Moments``; wrappers (``to_event``, ``expand``,
            ``mask``) are looked through.
        value: The data :math:`y`, in the law's units.

    Returns:
        Shape of ``law.log_prob(value)``, in nats; differentiable.

    Raises:
        NotImplementedError: If nothing is registered for the law's type, or what is registered is
            not known for the parameter that is random.
        ValueError: If the expectation is infinite.

    References:
        Titsias & Lazaro-Gredilla (2011), NeurIPS 24, eq. (9), for a Gaussian.

    Example:
        >>> codes = Moments.of(dist.Normal(torch.zeros(2), 1.0), "codes")
        >>> expected_log_prob(dist.Normal(codes, 1.0), torch.zeros(2))
        tensor([-1.4189, -1.4189])
    """
    return _expected(law, value) if holds_moments(law) else law.log_prob(value)


@functools.singledispatch
def _expected(law: Any, value: Tensor) -> Tensor:
    name = type(law).__name__
    raise NotImplementedError(
        f"No expected log-density is known for {name} with random parameters. Register one with "
        f"@pyro_sparse.distributions.register_expected_log_prob({name}). {INSTEAD}"
    )


def register_expected_log_prob(
    kind: type,
) -> Callable[[Callable[[Any, Tensor], Tensor]], Callable[[Any, Tensor], Tensor]]:
    """Decorator: ``function(law, value)`` is the expected log-density of a distribution type.

    Subclasses inherit it unless they change ``log_prob``. A later registration for the same type
    replaces the earlier one. The function sees at least one random parameter.

    Raises:
        TypeError: If ``kind`` is no type.

    Example:
        >>> class Unscaled(dist.Normal):
        ...     def log_prob(self, value):
        ...         return -(value - self.loc).square() / 2
        >>> @register_expected_log_prob(Unscaled)
        ... def _(law, value):
        ...     return -((value - law.loc.expectation).square() + law.loc.variance) / 2
        >>> codes = Moments.of(dist.Normal(torch.zeros(2), 1.0), "codes")
        >>> expected_log_prob(Unscaled(codes, 1.0), torch.zeros(2))
        tensor([-0.5000, -0.5000])
    """
    if not isinstance(kind, type):
        raise TypeError(
            f"Expected a distribution type, such as pyro.distributions.Normal, got {kind!r}."
        )

    def register(function: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
        @functools.wraps(function)
        def checked(law: Any, value: Tensor) -> Tensor:
            if type(law).log_prob is not kind.log_prob:  # type: ignore[attr-defined]
                return _expected.dispatch(object)(law, value)
            return function(law, value)

        _expected.register(kind, checked)
        return function

    return register


def holds_moments(value: Any) -> bool:
    """Whether a distribution has a random parameter, at any depth."""
    return any(True for _ in _random(value, set()))


def _random(value: Any, seen: set[int]) -> Iterator[Any]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Moments | ExpMoments):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _random(part, seen)
    elif isinstance(value, dict):
        yield from _random(list(value.values()), seen)
    elif hasattr(value, "__dict__") and not isinstance(value, Tensor | type):
        yield from _random(vars(value), seen)


@register_expected_log_prob(torch.distributions.Normal)
def _(law: Any, value: Tensor) -> Tensor:
    only_random(law, "loc", Moments, "affine in the codes, with a scale that is none of them")
    if law._validate_args:
        law._validate_sample(value)
    distance = (value - law.loc.expectation).square() + law.loc.variance
    scale = law.scale
    return -distance / (2 * scale.square()) - scale.log() - math.log(2 * math.pi) / 2


@register_expected_log_prob(dist.Poisson)  # of Pyro, which has a log_prob of its own
@register_expected_log_prob(torch.distributions.Poisson)
def _(law: Any, value: Tensor) -> Tensor:
    only_random(law, "rate", ExpMoments, "torch.exp of a predictor that is affine in the codes")
    if law._validate_args:
        law._validate_sample(value)
    return (
        value * law.rate.exponent.expectation - mean_exp(law.rate.exponent) - (value + 1).lgamma()
    )


def mean_exp(predictor: Moments) -> Tensor:
    r"""Expected exponential :math:`E[e^{\eta}]` of an affine predictor, from the law's cumulants.

    .. math:: \log E[e^{\eta_d}] = b_d + \sum_k \log M_k(A_{kd})

    Args:
        predictor: Such as ``codes @ atoms``; the cumulants of every pair of a code and a feature it
            reaches are held in memory, ``(n, atoms, features)`` for a dense dictionary.

    Raises:
        NotImplementedError: If no cumulants are known for the codes or for a map that they met.
        ValueError: If the expectation is infinite, such as for Laplace codes where an entry of the
            dictionary reaches ``1 / scale``.

    Example:
        >>> codes = Moments.of(dist.Normal(torch.zeros(2), 1.0), "codes")
        >>> mean_exp(codes @ torch.eye(2))
        tensor([1.6487, 1.6487])
    """
    mean = predictor.log_mgf().exp()
    if not bool(torch.isfinite(mean).all()):
        raise ValueError(
            f"Expected a finite mean of exp(predictor), got {mean.max().item()} over the codes of "
            f"{', '.join(map(repr, sorted(predictor.sources)))}: their law has too heavy a tail "
            "for the entries of the dictionary (Laplace and exponential codes need scale * |entry| "
            "< 1), and the objective is minus infinity. Start with smaller scales, or use a Normal "
            "slab."
        )
    return mean


@register_expected_log_prob(dist.Unit)
def _(law: Any, value: Tensor) -> Tensor:
    only_random(law, "log_factor", Moments, "affine in the codes")
    shape = torch.broadcast_shapes(law.batch_shape, value.shape[:-1])
    return law.log_factor.expectation.expand(shape)


@register_expected_log_prob(torch.distributions.Independent)
def _(law: Any, value: Tensor) -> Tensor:
    terms = expected_log_prob(law.base_dist, value)
    dims = law.reinterpreted_batch_ndims
    return terms.flatten(-dims).sum(-1) if dims else terms


@register_expected_log_prob(ExpandedDistribution)
def _(law: Any, value: Tensor) -> Tensor:
    terms = expected_log_prob(law.base_dist, value)
    return terms.expand(torch.broadcast_shapes(terms.shape, law.batch_shape))


@register_expected_log_prob(MaskedDistribution)
def _(law: Any, value: Tensor) -> Tensor:
    if law._mask is False:
        return law.log_prob(value)  # zeros
    return scale_and_mask(expected_log_prob(law.base_dist, value), mask=law._mask)


def only_random(law: Any, name: str, kind: type, expected: str) -> None:
    """Refuse random parameters other than ``name``, or of another form."""
    others = {key: part for key, part in vars(law).items() if key != name}
    if not isinstance(getattr(law, name), kind) or holds_moments(others):
        raise NotAffine(
            f"Exact needs the parameter {name} of {type(law).__name__} to be {expected}. {INSTEAD}"
        )
