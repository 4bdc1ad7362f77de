"""Log moment generating functions of laws of codes, registered by distribution type."""

from __future__ import annotations

import functools
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_sparse.distributions.mixed import Mixed


@functools.singledispatch
def log_mgf(law: Any, value: Tensor) -> Tensor:
    r"""Log moment generating function: :math:`\log M(t) = \log E[e^{t z}]`, for each element.

    A law of one's own states it as a method ``log_mgf(value)``, or registers a function with
    ``@log_mgf.register(type)``. Wrappers (``to_event``, ``expand``, ``mask``) are looked through.

    Args:
        law: The law of ``z``.
        value: :math:`t`, in one over code units; broadcasts with the law's batch and event shape.

    Returns:
        In the broadcast shape; ``inf`` where the expectation is infinite (a Laplace law from
        ``abs(t) = 1 / scale`` on).

    Raises:
        NotImplementedError: If none is known for the law's type.

    References:
        Kotz, Kozubowski & Podgorski (2001), The Laplace Distribution and Generalizations, sec. 2.1.

    Example:
        >>> log_mgf(dist.Normal(0.0, 1.0), torch.tensor(2.0))
        tensor(2.)
    """
    if hasattr(law, "log_mgf"):
        return law.log_mgf(value)
    raise NotImplementedError(
        f"No moment generating function is known for {type(law).__name__}. State it as a method "
        "log_mgf(value), or register one with @pyro_sparse.distributions.log_mgf.register"
        f"({type(law).__name__})."
    )


@log_mgf.register(dist.Normal)
def _(law: dist.Normal, value: Tensor) -> Tensor:
    return value * (law.loc + value * law.scale.square() / 2)


@log_mgf.register(dist.Laplace)
def _(law: dist.Laplace, value: Tensor) -> Tensor:
    return law.loc * value + _minus_log1m((law.scale * value).square())


@log_mgf.register(dist.Exponential)
def _(law: dist.Exponential, value: Tensor) -> Tensor:
    return _minus_log1m(value / law.rate)


@log_mgf.register(Mixed)
def _(law: Mixed, value: Tensor) -> Tensor:
    slab = log_mgf(law.slab, value)
    # An infinite branch has no gradient in logaddexp (inf - inf); a finite number stands in for it.
    finite = slab < torch.inf
    inner = torch.where(finite, slab, torch.zeros_like(slab))
    mixture = torch.logaddexp(logsigmoid(-law.logits), logsigmoid(law.logits) + inner)
    return torch.where(finite, mixture, torch.full_like(mixture, torch.inf))


@log_mgf.register(torch.distributions.Independent)
@log_mgf.register(ExpandedDistribution)
@log_mgf.register(MaskedDistribution)
def _(law: Any, value: Tensor) -> Tensor:
    return log_mgf(law.base_dist, value)


def _minus_log1m(value: Tensor) -> Tensor:
    """``-log(1 - value)``, and infinity from one on, with finite gradients below."""
    inside = value < 1
    inner = torch.where(inside, value, torch.zeros_like(value))
    return torch.where(inside, -(-inner).log1p(), torch.full_like(inner, torch.inf))
