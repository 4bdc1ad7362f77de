"""Kullback-Leibler divergences of laws with known signs, groups or a known support.

Registered with ``torch.distributions.kl_divergence``, which finds them by type. As in ``kl``, one
that is infinite because of what the laws are (other signs, another support) raises a
``ValueError``.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, kl_divergence, register_kl

from pyro_sparse.distributions.groups import GroupLaplace
from pyro_sparse.distributions.kl import WITHOUT_ATOM
from pyro_sparse.distributions.known_support import KnownSupport
from pyro_sparse.distributions.mixed import Mixed
from pyro_sparse.distributions.signed import SignedLaplace


@register_kl(SignedLaplace, SignedLaplace)
def _kl_signed_signed(q: SignedLaplace, p: SignedLaplace) -> Tensor:
    outside = (p.signs != 0) & (q.signs != p.signs)
    if bool(outside.any()):
        raise ValueError(
            f"Expected a {type(q).__name__} with the signs of the prior, got others for "
            f"{int(outside.sum())} of {outside.numel()} codes: the divergence is infinite. Use "
            "SignedLaplace(rate, signs) in the guide, with the prior's signs."
        )
    ratio = p.rate / q.rate
    return ratio - 1 - ratio.log() + math.log(2) * (q.signs.abs() - p.signs.abs())


@register_kl(dist.Exponential, SignedLaplace)
def _kl_exponential_signed(q: Any, p: SignedLaplace) -> Tensor:
    return _kl_signed_signed(SignedLaplace(q.rate, 1.0), p)


@register_kl(SignedLaplace, dist.Exponential)
def _kl_signed_exponential(q: SignedLaplace, p: Any) -> Tensor:
    return _kl_signed_signed(q, SignedLaplace(p.rate, 1.0))


def _kl_two_sided_signed(q: Any, p: SignedLaplace) -> Tensor:
    if bool((p.signs != 0).any()):
        raise ValueError(
            "Expected a guide's law with the signs of the prior, got a two-sided "
            f"{type(q).__name__}: the divergence is infinite. Use SignedLaplace(rate, signs) in "
            "the guide, with the prior's signs."
        )
    return kl_divergence(q, dist.Laplace(torch.zeros_like(p.rate), 1 / p.rate))


register_kl(dist.Laplace, SignedLaplace)(_kl_two_sided_signed)
register_kl(dist.Normal, SignedLaplace)(_kl_two_sided_signed)


@register_kl(SignedLaplace, dist.Laplace)
def _kl_signed_laplace(q: SignedLaplace, p: Any) -> Tensor:
    # Seen from the side that q is on, p has its location there.
    side = torch.where(q.signs == 0, 1.0, q.signs)
    seen = dist.Laplace(side * p.loc, p.scale)
    one_sided = kl_divergence(dist.Exponential(q.rate), seen)
    two_sided = kl_divergence(dist.Laplace(torch.zeros_like(q.rate), 1 / q.rate), p)
    return torch.where(q.signs == 0, two_sided, one_sided)


@register_kl(SignedLaplace, dist.Normal)
def _kl_signed_normal(q: SignedLaplace, p: Any) -> Tensor:
    distance = q.variance + (q.mean - p.loc).square()
    scale = p.scale.log() + math.log(2 * math.pi) / 2
    return scale + distance / (2 * p.scale.square()) - q.entropy()


@register_kl(GroupLaplace, GroupLaplace)
def _kl_group_group(q: GroupLaplace, p: GroupLaplace) -> Tensor:
    if q.event_shape != p.event_shape or q.group != p.group:
        raise NotImplementedError  # as torch says for pairs without a closed form
    if p.one_sided and not q.one_sided:
        raise ValueError(
            "Expected a one-sided GroupLaplace in the guide, as the prior is, got a two-sided one: "
            "the divergence is infinite."
        )
    d, ratio = q.size, p.rate / q.rate
    sides = d * math.log(2) * (q.one_sided - p.one_sided)
    return q._sum(d * (ratio - 1 - ratio.log()) + sides)


@register_kl(KnownSupport, KnownSupport)
def _kl_known_known(q: KnownSupport, p: KnownSupport) -> Tensor:
    differ = q.active != p.active
    if bool(differ.any()):
        raise ValueError(
            f"Expected a guide with the support of the prior, got another for {int(differ.sum())} "
            f"of {differ.numel()} codes: the divergence is infinite. Hand the same active to both."
        )
    terms = kl_divergence(q.base_law, p.base_law)
    return torch.where(q.active, terms, torch.zeros_like(terms))


def _kl_anywhere_known(q: Distribution, p: KnownSupport) -> Tensor:
    raise ValueError(
        f"Expected a guide with the support of the prior, got {type(q).__name__}, which is not "
        "zero outside of it: the divergence is infinite. Use KnownSupport(..., active) in the "
        "guide, with the prior's active (guides.SupportedPosterior); for codes with an atom at "
        "zero use SpikeAndSlab in both, with probs=torch.where(active, probs, 0.0)."
    )


def _kl_known_anywhere(q: KnownSupport, p: Distribution) -> Tensor:
    raise ValueError(
        f"Expected a prior with the guide's known support, got {type(p).__name__}: codes that are "
        "always zero have no density under it. Use KnownSupport(..., active) in the model too."
    )


for _law in (*WITHOUT_ATOM, GroupLaplace, Mixed):
    register_kl(_law, KnownSupport)(_kl_anywhere_known)
    register_kl(KnownSupport, _law)(_kl_known_anywhere)
