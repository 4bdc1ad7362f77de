r"""Kullback-Leibler divergences of laws with an atom at zero, registered with torch.

For two mixed laws the chain rule over "active or not" gives

.. math::
    \mathrm{KL}(q \,\|\, p) = \mathrm{KL}(\mathrm{Bernoulli}(g_q) \,\|\, \mathrm{Bernoulli}(g_p))
    + g_q\, \mathrm{KL}(s_q \,\|\, s_p),

whatever the slabs, so a new slab only registers its own pairs. Nothing here is called by name:
``torch.distributions.kl_divergence`` finds it by the types of its arguments.

A divergence that is infinite because of the types alone raises a ``ValueError``: as a loss it would
be ``inf`` at every step. One that is infinite because of a value (a gate at zero) is ``inf``.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, kl_divergence, register_kl
from torch.nn.functional import logsigmoid

from pyro_sparse.distributions.known_support import KnownSupport
from pyro_sparse.distributions.mixed import Mixed
from pyro_sparse.distributions.relaxed import RelaxedSpikeAndSlab
from pyro_sparse.distributions.signed import SignedLaplace
from pyro_sparse.distributions.slabs import probability, sidedness

# Elementwise laws known to have no atom. Of any other type nothing is known, and torch says that no
# divergence is registered.
WITHOUT_ATOM = (
    dist.Laplace,
    dist.Normal,
    dist.Exponential,
    dist.Gamma,
    dist.HalfNormal,
    dist.HalfCauchy,
    dist.LogNormal,
    dist.StudentT,
    dist.Cauchy,
    dist.Uniform,
    dist.Weibull,
    dist.SoftLaplace,
    dist.AsymmetricLaplace,
    dist.SoftAsymmetricLaplace,
    RelaxedSpikeAndSlab,
    SignedLaplace,
)


def kl_gates(q: Tensor, p: Tensor) -> Tensor:
    r"""Divergence of two Bernoulli laws from their log-odds, in nats.

    Relative precision is kept where both gates are nearly closed or nearly open, and for close
    gates the error is far below the divergence in float32 too.

    Args:
        q: Log-odds of being active, infinite ones included.
        p: The other law's; they broadcast.

    Returns:
        Broadcast shape; zero where both are the same infinity, ``inf`` where only ``p`` is
        infinite, or both and not the same.

    Example:
        >>> kl_gates(torch.tensor(0.0), torch.tensor(1.0))
        tensor(0.1201)
    """
    q, p = torch.broadcast_tensors(q, p)
    impossible = p.isinf() & (q != p)
    finite = q.isfinite() & p.isfinite()
    far = _one_side(q, p) + _one_side(-q, -p)
    # Close gates: log(1 + g (e^d - 1)) - g d with the smaller of g and 1 - g cancels least.
    close = finite & ((q - p).abs() < 1)
    sign = torch.where(q > 0, -1.0, 1.0).to(q)
    odds = sign * torch.where(close, q, torch.zeros_like(q))
    shift = sign * torch.where(close, p - q, torch.zeros_like(q))
    active = odds.sigmoid()
    near = (active * shift.expm1()).log1p() - active * shift
    value = torch.where(close, near, far)
    return torch.where(impossible, torch.full_like(value, math.inf), value)


def _one_side(q: Tensor, p: Tensor) -> Tensor:
    # g_q log(g_q / g_p), with zero where g_q is zero; a stand-in keeps nan out of the gradient.
    never = q == -math.inf
    q = torch.where(never, torch.zeros_like(q), q)
    p = torch.where(p == -math.inf, torch.zeros_like(p), p)
    return torch.where(never, torch.zeros_like(q), probability(q) * (logsigmoid(q) - logsigmoid(p)))


def kl_slabs(q: Any, p: Any) -> Tensor:
    """Divergence of two slabs, in nats.

    Raises:
        ValueError: If ``q`` is two-sided and ``p`` one-sided.
        NotImplementedError: If none is registered for their types.
    """
    if sidedness(q) == "two-sided" and sidedness(p) != "two-sided":
        raise ValueError(
            f"Expected slabs of one support, got a two-sided {type(q).__name__} against a "
            f"{sidedness(p)} {type(p).__name__}: the divergence is infinite. Use a one-sided slab "
            "in the guide, such as Exponential."
        )
    return kl_divergence(q, p)


@register_kl(Mixed, Mixed)
def _kl_mixed_mixed(q: Mixed, p: Mixed) -> Tensor:
    slab = kl_slabs(q.slab, p.slab)
    active = q.prob_active
    slab = torch.where(q.logits == -math.inf, torch.zeros_like(slab), active * slab)
    return kl_gates(q.logits, p.logits) + slab


def _kl_mixed_without_atom(q: Mixed, p: Distribution) -> Tensor:
    raise ValueError(
        f"Expected a prior with an atom at zero for a {type(q).__name__}, got {type(p).__name__}: "
        "exact zeros have no density under it, so the divergence is infinite. Use "
        f"{with_atom(p)} as the prior."
    )


def with_atom(prior: Distribution) -> str:
    """The prior with an atom that is closest to one without, in words for a message.

    Example:
        >>> with_atom(dist.Laplace(0.0, 1.0))
        'SpikeAndSlab(Laplace(...), probs=...)'
    """
    if isinstance(prior, KnownSupport):
        name = type(prior.base_law).__name__
        return f"SpikeAndSlab({name}(...), probs=torch.where(active, ..., 0.0))"
    slab = prior.slab if isinstance(prior, RelaxedSpikeAndSlab) else prior
    return f"SpikeAndSlab({type(slab).__name__}(...), probs=...)"


def _kl_without_atom_mixed(q: Distribution, p: Mixed) -> Tensor:
    return kl_slabs(q, p.slab) - logsigmoid(p.logits)


for _law in WITHOUT_ATOM:
    register_kl(Mixed, _law)(_kl_mixed_without_atom)
    register_kl(_law, Mixed)(_kl_without_atom_mixed)


@register_kl(dist.Delta, Mixed)
def _kl_delta_mixed(q: Any, p: Mixed) -> Tensor:
    raise ValueError(
        f"Expected a guide with a density against a {type(p).__name__}, got Delta: a point at zero "
        "is weighed by a probability and one elsewhere by a density, so which is better depends on "
        "the unit of the codes. Use a guide with an atom, such as SpikeAndSlab."
    )


@register_kl(Mixed, Independent)
def _kl_mixed_independent(q: Mixed, p: Any) -> Tensor:
    raise _event_shapes(q, p)


@register_kl(Independent, Mixed)
def _kl_independent_mixed(q: Any, p: Mixed) -> Tensor:
    raise _event_shapes(q, p)


def _event_shapes(q: Distribution, p: Distribution) -> ValueError:
    return ValueError(
        f"Expected two laws with one event shape, got {tuple(q.event_shape)} and "
        f"{tuple(p.event_shape)} ({type(q).__name__} and {type(p).__name__}). Use .to_event with "
        "the same number of dimensions on both."
    )


@register_kl(dist.Exponential, dist.Laplace)
def _kl_exponential_laplace(q: Any, p: Any) -> Tensor:
    # E|z - loc| = 1 / rate - loc for loc < 0, else loc - 1 / rate + 2 exp(-rate loc) / rate.
    loc = q.rate * p.loc
    above = loc.clamp(min=0)
    length = torch.where(loc < 0, 1 - loc, 1 + above + 2 * torch.expm1(-above))
    return (2 * q.rate * p.scale).log() - 1 + length / (q.rate * p.scale)


@register_kl(dist.Laplace, dist.Normal)
def _kl_laplace_normal(q: Any, p: Any) -> Tensor:
    # As torch's own, which cancels where both locations are large.
    ratio = q.scale / p.scale
    shift = (q.loc - p.loc) / p.scale
    return ratio.square() + shift.square() / 2 - ratio.log() - 1 + math.log(math.pi / 2) / 2
