"""Integrals of a law's density, and how its draws compare with it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

_NODES = 6_001
_NUM_PROPOSED = 200_000
_EFFECTIVE = 1_000
"""Smallest effective number of proposed events from which an integral is told."""


def log_density(law: Any, value: Tensor) -> Tensor:
    """``log_prob``, and minus infinity outside of the support, where a law may refuse to answer."""
    try:
        inside = law.support.check(value)
    except NotImplementedError:
        return law.log_prob(value)
    each = inside.reshape(inside.shape + (1,) * (value.dim() - inside.dim()))
    return torch.where(inside, law.log_prob(torch.where(each, value, law.sample())), -torch.inf)


class Integral(NamedTuple):
    """Total mass and moments of a law, and its distribution function at nodes.

    Attributes:
        total: Mass, the atom at zero counted; shape ``batch_shape``.
        atom: Mass of exact zeros.
        mean: First moment over the total.
        variance: Second central moment over the total.
        nodes: Ascending, shape ``(nodes, *batch_shape)``.
        below: Mass below each node over the total, without the atom.
    """

    total: Tensor
    atom: Tensor
    mean: Tensor
    variance: Tensor
    nodes: Tensor
    below: Tensor

    def cdf(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Probability of less than a value, and of at most that; shape of ``value``."""
        batch = self.total.numel()
        columns = (part.reshape(len(part), batch) for part in (value, self.nodes, self.below))
        found = [
            np.interp(v, z, f, left=0.0, right=float(f[-1]))
            for v, z, f in zip(*(part.T.cpu().numpy() for part in columns))
        ]
        less = torch.from_numpy(np.stack(found, -1)).to(value.device).reshape(value.shape)
        share = self.atom / self.total
        less = less + torch.where(value > 0, share, 0.0)
        return less, less + torch.where(value == 0, share, 0.0)


def integrate(law: Any, centre: Tensor, scale: Tensor, atom: Tensor) -> Integral:
    """Integrate the density of a law of numbers, in float64.

    The double exponential rule on either side of zero and of ``centre``, and between them: exact to
    rounding where the density is smooth in between, whatever it does at the ends; to about one in a
    thousand where it jumps.

    Args:
        law: Event shape ``()``.
        centre: Where most of the mass is, shape ``batch_shape``.
        scale: Its width.
        atom: Where zero has a mass of its own, so that ``log_prob`` is its logarithm there.

    References:
        Takahasi & Mori (1974), Publ. RIMS 9.
    """
    t = torch.linspace(-4.0, 3.2, _NODES, dtype=torch.float64, device=centre.device)
    t = t.reshape((-1, *(1,) * centre.dim()))
    step, warped = 7.2 / (_NODES - 1), math.pi / 2 * torch.sinh(t)
    slope = math.pi / 2 * torch.cosh(t) * step
    low, high = centre.clamp(max=0), centre.clamp(min=0)
    far, inner = scale * warped.exp(), (high - low) * warped.sigmoid()
    between = (high - low) * warped.sigmoid() * (-warped).sigmoid() * slope
    z = torch.cat([(low - far).flip(0), low + inner, high + far])
    weight = torch.cat([(far * slope).flip(0), between, far * slope])
    mass = torch.where(z == 0, 0.0, weight * log_density(law, z).exp())
    spike = torch.where(atom, log_density(law, torch.zeros_like(centre)).exp(), 0.0)
    total = mass.sum(0) + spike
    mean = (mass * z).sum(0) / total
    variance = ((mass * (z - mean).square()).sum(0) + spike * mean.square()) / total
    return Integral(total, spike, mean, variance, z, (mass.cumsum(0) - mass / 2) / total)


def uniformity(integral: Integral, draws: Tensor) -> Tensor:
    """P-value of the Kolmogorov-Smirnov test that draws have the law; shape ``batch_shape``.

    Zeros with a mass of their own are spread at random over its interval.
    """
    less, most = integral.cdf(draws)
    levels = less + torch.rand_like(draws) * (most - less)
    columns = levels.reshape(len(levels), -1).T.cpu().numpy()
    found = [stats.kstest(column.clip(0, 1), "uniform").pvalue for column in columns]
    return integral.total.new_tensor(found).reshape(integral.total.shape)


def share_of_zeros(integral: Integral, is_zero: Tensor) -> Tensor:
    """P-value of the exact binomial test of the number of zeros; shape ``batch_shape``.

    Args:
        integral: Of the law.
        is_zero: Which draws are zero, shape ``(n, *batch_shape)``.
    """
    count, size = is_zero.sum(0).cpu().numpy(), len(is_zero)
    probs = (integral.atom / integral.total).clamp(0, 1).cpu().numpy()
    tails = stats.binom.cdf(count, size, probs), stats.binom.sf(count - 1, size, probs)
    return torch.as_tensor(np.minimum(1.0, 2 * np.minimum(*tails))).to(is_zero.device)


class Weighed(NamedTuple):
    """Proposed events with weights that make them a sample of a law of vectors.

    Attributes:
        total: Mass of the law, shape ``batch_shape``.
        error: Its standard error.
        effective: Effective number of events.
        events: Shape ``(n, *batch_shape, *event_shape)``.
        weights: Shape ``(n, *batch_shape)``, of mean one.
    """

    total: Tensor
    error: Tensor
    effective: Tensor
    events: Tensor
    weights: Tensor

    @property
    def enough(self) -> bool:
        """Whether an integral by these says something."""
        return bool((self.effective >= _EFFECTIVE).all())

    def expectation(self, function: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of a function under the law, and its standard error.

        Args:
            function: At the events, shape ``(n, *batch_shape)``.
        """
        function = torch.where(self.weights > 0, function, 0.0)
        mean = (self.weights * function).mean(0)
        error = (self.weights * (function - mean)).square().mean(0).sqrt()
        return mean, error / len(function) ** 0.5


def weigh(law: Any, draws: Tensor) -> Weighed:
    """Integrate the density of a law of vectors by importance sampling.

    Events are proposed from a Student t law of three degrees of freedom, with the mean and the
    covariance matrix of the draws: heavier tails than most priors have.

    Args:
        law: Any event shape.
        draws: Shape ``(n, *batch_shape, *event_shape)``.
    """
    shape, size = law.event_shape, law.event_shape.numel()
    flat = draws.flatten(-len(shape)).movedim(0, -2)  # (*batch_shape, n, size)
    mean = flat.mean(-2)
    deviation = flat - mean.unsqueeze(-2)
    covariance = deviation.mT @ deviation / flat.shape[-2]
    root = torch.linalg.cholesky(covariance)
    count = max(2_000, _NUM_PROPOSED // law.batch_shape.numel())
    normal = torch.randn(count, *mean.shape, dtype=mean.dtype, device=mean.device)
    three = torch.full((count, *law.batch_shape), 1.5, dtype=mean.dtype, device=mean.device)
    chi = 2 * torch._standard_gamma(three)
    standard = normal * (3 / chi).sqrt().unsqueeze(-1)
    events = (mean + (root @ standard.unsqueeze(-1)).squeeze(-1)).reshape(count, *draws.shape[1:])
    proposal = (
        math.lgamma((3 + size) / 2)
        - math.lgamma(1.5)
        - size / 2 * math.log(3 * math.pi)
        - root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        - (3 + size) / 2 * (standard.square().sum(-1) / 3).log1p()
    )
    weights = (log_density(law, events) - proposal).exp()
    total = weights.mean(0)
    error = weights.std(0) / count**0.5
    effective = weights.sum(0).square() / weights.square().sum(0)
    return Weighed(total, error, effective, events, weights / total)
