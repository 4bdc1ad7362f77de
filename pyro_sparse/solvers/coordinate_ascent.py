"""Factorised spike-and-slab posteriors by coordinate ascent, every update in closed form."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_sparse.dictionaries import Dictionary
from pyro_sparse.distributions import Prior
from pyro_sparse.distributions.mixed import Mixed, SpikeAndSlab
from pyro_sparse.likelihoods import Likelihood
from pyro_sparse.solvers.linear_gaussian import LinearGaussian, elementwise, linear_gaussian


class MeanField(NamedTuple):
    """What ``coordinate_ascent`` found.

    Attributes:
        law: Factorised posterior, ``SpikeAndSlab`` with a ``Normal`` slab; batch shape ``(n,)``,
            event shape ``code_shape``, dtype of the data.
        elbo: Evidence lower bound of each datum in nats, float64, shape ``(n,)``.
        history: The bound at the start and after each sweep, float64, shape ``(sweeps + 1, n)``.
        converged: Whether the last sweep changed a datum's bound by less than ``tol``, ``(n,)``.

    Example:
        >>> from pyro_sparse.dictionaries import Dense
        >>> from pyro_sparse.likelihoods import Gaussian
        >>> prior = SpikeAndSlab(dist.Normal(0.0, 1.0), probs=0.1)
        >>> fit = coordinate_ascent(torch.zeros(5, 8), Dense(20, 8), prior, Gaussian(0.5))
        >>> isinstance(fit, MeanField), fit.prob_active.shape
        (True, torch.Size([5, 20]))
    """

    law: Any
    elbo: Tensor
    history: Tensor
    converged: Tensor

    @property
    def prob_active(self) -> Tensor:
        """Probability that a code is not zero, shape ``(n, *code_shape)``."""
        active: Tensor = elementwise(self.law).prob_active
        return active


class _Factors(NamedTuple):
    """Log-odds, slab's mean and slab's variance, each ``(n, codes)``; written in place."""

    logits: Tensor
    loc: Tensor
    variance: Tensor

    def mean(self) -> Tensor:
        return self.logits.sigmoid() * self.loc


def coordinate_ascent(
    y: Tensor,
    dictionary: Dictionary,
    prior: Prior,
    likelihood: Likelihood,
    *,
    rate: Tensor | None = None,
    mask: Tensor | None = None,
    init: Any = None,
    tol: float = 1e-8,
    max_sweeps: int = 1000,
) -> MeanField:
    r"""Factorised posterior of spike-and-slab codes under Gaussian noise, for each datum apart.

    Raises the evidence lower bound over :math:`q(z) = \prod_k (1 - g_k)\, \delta_0 + g_k\,
    \mathcal N(m_k, S_k)` by one code after the other, each to its optimum given the others: with
    noise :math:`\sigma`, slab :math:`\mathcal N(\mu_k, \tau_k^2)` and :math:`r_{-k} = y -
    \sum_{j \neq k} g_j m_j a_j`,

    .. math::
        S_k &= (\|a_k\|^2 / \sigma^2 + \tau_k^{-2})^{-1}, \qquad
        m_k = S_k (a_k^T r_{-k} / \sigma^2 + \mu_k / \tau_k^2) \\
        \mathrm{logit}\, g_k &= \mathrm{logit}\, \pi_k + \tfrac12 \left(
            \log \frac{S_k}{\tau_k^2} + \frac{m_k^2}{S_k} - \frac{\mu_k^2}{\tau_k^2}\right)

    The bound never falls. It is what the best encoder of a factorised guide could reach from this
    start, so the amortisation gap is measured against it; with correlated atoms it has local
    optima, and the one found depends on the start. Works in float64; a sweep costs about
    ``4 * n * codes * features`` operations.

    Args:
        y: Data, shape ``(n, *signal_shape)``.
        dictionary: Atoms; used as they are, no gradient is taken.
        prior: ``SpikeAndSlab`` with a ``Normal`` slab, or a callable of ``rate`` that makes one.
        likelihood: ``Gaussian``, one scale or several.
        rate: Rate for a callable prior, shape ``(atoms,)`` or ``()``.
        mask: True where a sample was observed, broadcastable to ``y``; the others may hold
            anything, also ``nan``.
        init: A law with an atom at zero to start from, such as an encoder's output, whose shape
            expands to ``(n, *code_shape)``; the prior by default. Of another slab than ``Normal``
            mean and variance are taken.
        tol: Change of the bound by one sweep, in nats per datum, below which it has converged.
            Rounding counts: no change below ``1e-13`` times the bound is asked for.
        max_sweeps: Bound on the sweeps.

    Returns:
        The law, its bound, the history of the bound, and which data have converged.

    Raises:
        ValueError: If a shape does not fit, an observed sample is not finite, or ``tol`` or
            ``max_sweeps`` is not positive.
        TypeError: If an argument is of another kind or dtype, or the prior has no atom at zero.
        RuntimeError: If ``y`` is on another device than the dictionary.
        NotImplementedError: If the likelihood is not Gaussian or the prior's slab not Normal.

    References:
        Titsias & Lazaro-Gredilla (2011), NeurIPS 24, sec. 3; Carbonetto & Stephens (2012), Bayesian
        Anal. 7(1), eqs. (8)-(11). Means of the slab and weights of the noise are added here.

    Example:
        >>> from pyro_sparse.dictionaries import Dense
        >>> from pyro_sparse.likelihoods import Gaussian
        >>> dictionary = Dense(2, 2, atoms=torch.eye(2))
        >>> prior = SpikeAndSlab(dist.Normal(0.0, 1.0), probs=0.5)
        >>> y = torch.tensor([[2.0, 0.0]])
        >>> fit = coordinate_ascent(y, dictionary, prior, Gaussian(0.5))
        >>> fit.prob_active
        tensor([[0.9963, 0.3090]])
    """
    _check_numbers(tol, max_sweeps)
    problem = linear_gaussian(y, dictionary, prior, likelihood, rate=rate, mask=mask)
    with torch.no_grad():
        factors = _start(problem, init)
        history = [_elbo(problem, factors)]
        converged = torch.zeros_like(history[0], dtype=torch.bool)
        for _ in range(max_sweeps):
            _sweep(problem, factors)
            history.append(_elbo(problem, factors))
            change = (history[-1] - history[-2]).abs()
            converged = change <= torch.clamp(1e-13 * history[-1].abs(), min=tol)
            if bool(converged.all()):
                break
    shape = (len(y), *problem.code_shape)
    logits, loc, variance = (part.reshape(shape).to(y.dtype) for part in factors)
    law = SpikeAndSlab(dist.Normal(loc, variance.sqrt()), logits=logits)
    return MeanField(
        law.to_event(len(problem.code_shape)), history[-1], torch.stack(history), converged
    )


def _sweep(problem: LinearGaussian, factors: _Factors) -> None:
    """Update every code once, in place."""
    mean = factors.mean()
    weighted = problem.weighted_residual(mean)  # (n, features)
    for k, atom in enumerate(problem.matrix):
        correlation = weighted @ atom + problem.energy[:, k] * mean[:, k]
        logits, loc, variance = problem.conditional(k, correlation)
        factors.logits[:, k], factors.loc[:, k], factors.variance[:, k] = logits, loc, variance
        change = logits.sigmoid() * loc - mean[:, k]
        weighted.addcmul_(problem.weight * atom, change.unsqueeze(-1), value=-1)


def _elbo(problem: LinearGaussian, factors: _Factors) -> Tensor:
    """Expected log-likelihood minus the divergence from the prior, shape ``(n,)``."""
    logits, loc, variance = factors
    active, inactive = logits.sigmoid(), (-logits).sigmoid()
    mean = active * loc
    spread = active * (variance + inactive * loc.square())  # variance, zeros counted
    ratio = variance / problem.scale.square()
    slab = (ratio + ((loc - problem.loc) / problem.scale).square() - 1 - ratio.log()) / 2
    gate = _times(active, logsigmoid(logits) - logsigmoid(problem.logits))
    gate = gate + _times(inactive, logsigmoid(-logits) - logsigmoid(-problem.logits))
    divergence = gate + active * slab
    return problem.log_likelihood(mean) - (problem.energy * spread / 2 + divergence).sum(-1)


def _times(probs: Tensor, logs: Tensor) -> Tensor:
    """Product in which a probability of zero counts for nothing, also beside an infinite log."""
    return torch.where(probs == 0, torch.zeros_like(probs), probs * logs)


def _start(problem: LinearGaussian, init: Any) -> _Factors:
    shape = (len(problem.y), *problem.code_shape)
    if init is None:
        own = (problem.logits, problem.loc, problem.scale.square())
        return _Factors(*(part.expand(len(problem.y), -1).clone() for part in own))
    law = elementwise(init)
    if not isinstance(law, Mixed):
        raise TypeError(
            "Expected init to be a law with an atom at zero, such as SpikeAndSlab, got "
            f"{type(law).__name__}."
        )
    try:
        parts = tuple(
            part.detach().to(problem.y).broadcast_to(shape).reshape(len(problem.y), -1).clone()
            for part in (law.logits, law.slab.mean, law.slab.variance)
        )
    except RuntimeError:
        raise ValueError(
            f"Expected init to expand to the shape {shape}, got {tuple(law.batch_shape)}."
        ) from None
    if any(bool(part.isnan().any()) for part in parts):
        raise ValueError("Expected init without nan. Leave it out to start from the prior.")
    return _Factors(*parts)


def _check_numbers(tol: float, max_sweeps: int) -> None:
    if not isinstance(tol, Real) or not isinstance(max_sweeps, Integral):
        raise TypeError(
            f"Expected tol to be a number and max_sweeps a whole one, got {tol!r}, {max_sweeps!r}."
        )
    if not tol > 0 or max_sweeps < 1:
        raise ValueError(f"Expected tol > 0 and max_sweeps >= 1, got {tol}, {max_sweeps}.")
