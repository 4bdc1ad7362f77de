r"""Divergences in which one slab, or both, are tails of a base law.

Every slab is written as tails: ``Laplace`` and ``Normal`` are two that meet at the location,
``Exponential`` is one. Then, with weights :math:`w_i` and the overshoots of the sides of q,

.. math:: \mathrm{KL} = \sum_i w_i \left( \log w_i - H_i - E_i \log p \right),

where the density of p is a square or an absolute value on each side of its own edge. A side of q
that crosses that edge is split there: what lies beyond is an overshoot again, so all that is needed
of q is the probability, mean and variance of an overshoot, which lose no digits far out.

Nothing here is called by name: ``torch.distributions.kl_divergence`` finds it by type.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Exponential, Laplace, Normal, register_kl

from pyro_sparse.distributions.gaussian_tail import log_ndtr, log_tail
from pyro_sparse.distributions.overshoots import LaplaceOvershoot, NormalOvershoot, Overshoot
from pyro_sparse.distributions.tails import Tails, as_tails


@register_kl(Tails, Tails)
def _kl_tails(q: Tails, p: Tails) -> Tensor:
    _check_supports(q, p)
    above, below = q.log_weights
    value = above.exp() * (above - q.above.entropy() - _expected_above(q, p))
    if q.below is None:
        return value
    other = below - q.below.entropy() - _expected_above(_mirrored(q), _mirrored(p))
    return value + below.exp() * other


def _kl_as_tails(q: Any, p: Any) -> Tensor:
    return _kl_tails(as_tails(q), as_tails(p))


@register_kl(Tails, Normal)
def _kl_tails_normal(q: Tails, p: Normal) -> Tensor:
    # The square of p has no kink at an edge: mean and variance of q are all that it takes.
    square = (q.variance + (q.mean - p.loc).square()) / (2 * p.scale.square())
    return square + p.scale.log() + math.log(2 * math.pi) / 2 - q.entropy()


register_kl(Tails, Laplace)(_kl_as_tails)
register_kl(Tails, Exponential)(_kl_as_tails)
for _law in (Normal, Laplace, Exponential):
    register_kl(_law, Tails)(_kl_as_tails)


def _check_supports(q: Tails, p: Tails) -> None:
    if p.below is None and q.below is not None:
        raise ValueError(
            "Expected slabs of one support, got a two-sided one against a one-sided one: the "
            "divergence is infinite. Use a one-sided slab in the guide (one_sided=True)."
        )
    if p.has_gap and not (
        bool((q.upper >= p.upper).all()) and (q.below is None or bool((q.lower <= p.lower).all()))
    ):
        raise ValueError(
            "Expected a slab with a gap around zero at least as wide as the prior's, since the "
            "prior (HardThresholded) has no density there: the divergence is infinite. Use "
            "HardThresholded with a threshold no smaller, or a prior without a gap."
        )
    if p.below is None and bool((q.upper < p.upper).any()):
        raise ValueError(
            f"Expected a slab that starts no lower than the prior's, got {q.upper} against "
            f"{p.upper}: the divergence is infinite."
        )


def _mirrored(law: Tails) -> Tails:
    if law.below is None:
        raise AssertionError  # _check_supports
    lower = -law.upper if law.has_gap else None
    return Tails(law.below, law.above, upper=-law.lower, lower=lower, validate_args=False)


def _expected_above(q: Tails, p: Tails) -> Tensor:
    # E log p over the upper tail of q, in u = z less the edge of p; it starts at u = -start.
    side, start = q.above, p.upper - q.upper
    above, below = p.log_weights
    rest = start.clamp(min=0)
    log_reach = side.log_survival(rest)
    reach, short = log_reach.exp(), -log_reach.expm1()
    value = reach * above + expected_near(p.above, side, start)
    if p.below is None or p.has_gap:
        return value
    # Where nothing falls short, log_weights may be -inf on the other side of p.
    below = torch.where(short > 0, below, torch.zeros_like(below))
    return value + short * below + expected_far(p.below, side, start)


@functools.singledispatch
def expected_near(p: Overshoot, q: Overshoot, start: Tensor) -> Tensor:
    r"""Expected log-density of one side of p over the part of a side of q that lies on it.

    Args:
        p: Law of :math:`u` for :math:`u > 0`.
        q: Law of :math:`x`, where :math:`u = x - \text{start}`.
        start: Where the edge of p lies, seen from the edge of q.

    Returns:
        :math:`E\, 1[u > 0] \log p(u)`, in nats.
    """
    raise _unknown(p)


@functools.singledispatch
def expected_far(p: Overshoot, q: Overshoot, start: Tensor) -> Tensor:
    r"""As ``expected_near`` for the other side of p: :math:`E\, 1[u < 0] \log p(-u)`."""
    raise _unknown(p)


@expected_near.register
def _(p: NormalOvershoot, q: Overshoot, start: Tensor) -> Tensor:
    reach, mean, variance = _part(q, start)
    inner, outer, constant = _normal(p)
    square = variance + (mean - inner).square() + 2 * outer * mean
    return -reach * (square / (2 * p.scale.square()) + constant)


@expected_far.register
def _(p: NormalOvershoot, q: Overshoot, start: Tensor) -> Tensor:
    reach, mean, variance = _part(q, start)
    inner, outer, constant = _normal(p)
    # The whole of q less what is near: with a sum of squares of u = -|u| the centre is -inner.
    whole = q.mean - start
    square = q.variance + (whole + inner).square() - 2 * outer * whole
    near = variance + (mean + inner).square() - 2 * outer * mean
    short = -q.log_survival(start.clamp(min=0)).expm1()
    return -(square - reach * near) / (2 * p.scale.square()) - short * constant


@expected_near.register
def _(p: LaplaceOvershoot, q: Overshoot, start: Tensor) -> Tensor:
    reach, mean, _ = _part(q, start)
    peak = p.loc.clamp(min=0)
    length = reach * (peak - mean) + 2 * _excess(q, start + peak)
    return -length / p.scale - reach * _laplace(p)


@expected_far.register
def _(p: LaplaceOvershoot, q: Overshoot, start: Tensor) -> Tensor:
    # E max(d - x, 0) = E max(x - d, 0) + d - E x.
    peak = p.loc.clamp(min=0)
    short = -q.log_survival(start.clamp(min=0)).expm1()
    missing = _excess(q, start) + start - q.mean
    beyond = _excess(q, start - peak) + start - peak - q.mean
    return -(peak * short - missing + 2 * beyond) / p.scale - short * _laplace(p)


def _part(q: Overshoot, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Probability of u = x - start > 0, and mean and variance of u there.
    rest = start.clamp(min=0)
    beyond = q.beyond(rest)
    mean = beyond.mean + (-start).clamp(min=0)
    return q.log_survival(rest).exp(), mean, beyond.variance


def _excess(q: Overshoot, start: Tensor) -> Tensor:
    # E max(x - start, 0).
    reach, mean, _ = _part(q, start)
    return reach * mean


def _normal(p: Overshoot) -> tuple[Tensor, Tensor, Tensor]:
    # -log p(u) = [(u - inner)^2 + 2 outer u] / (2 s^2) + constant, one of the two being zero: far
    # out the square of the location has cancelled against the mass.
    above, below = (p.loc / p.scale).clamp(min=0), (p.loc / p.scale).clamp(max=0)
    mass = torch.where(p.loc > 0, log_ndtr(above), log_tail(below))
    constant = mass + p.scale.log() + math.log(2 * math.pi) / 2
    return p.loc.clamp(min=0), -p.loc.clamp(max=0), constant


def _laplace(p: Overshoot) -> Tensor:
    # -log p(u) = |u - peak| / b + constant.
    mass = LaplaceOvershoot(p.loc.clamp(min=0), p.scale, validate_args=False).log_mass
    return torch.where(p.loc > 0, mass + math.log(2), 0.0) + p.scale.log()


def _unknown(p: Overshoot) -> NotImplementedError:
    name = type(p).__name__
    return NotImplementedError(
        f"No expected log-density is known for {name}. Register expected_near and expected_far of "
        f"pyro_sparse.distributions.tails_kl for {name}."
    )
