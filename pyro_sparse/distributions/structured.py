"""A law of dependent codes with exact zeros: each code given the values of those before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import (
    ExpandedDistribution,
    MaskedDistribution,
    TorchDistribution,
)
from torch import Tensor
from torch.distributions import Independent, constraints, kl_divergence
from torch.nn.functional import softplus

from pyro_sparse.distributions.mixed import SpikeAndSlab, WithAtom


class Marginals(NamedTuple):
    """Marginal moments of dependent codes, each of shape ``batch_shape + (atoms,)``.

    Attributes:
        prob_active: Probability that a code is not zero.
        mean: Mean of a code, zeros counted.
        variance: Variance of a code, zeros counted.

    Example:
        >>> law = StructuredSpikeAndSlab(
        ...     torch.zeros(2), torch.ones(2), torch.ones(2), couplings=torch.zeros(2, 2)
        ... )
        >>> law.marginals(num_samples=10).prob_active  # nothing couples them: no Monte Carlo error
        tensor([0.6225, 0.6225])
    """

    prob_active: Tensor
    mean: Tensor
    variance: Tensor


class StructuredSpikeAndSlab(TorchDistribution):
    r"""Spike-and-slab codes, each dependent on the values of those before it.

    .. math::
        q(z) &= \prod_k \big[(1 - g_k)\, \delta_0(z_k) + g_k\, \mathcal N(z_k; m_k, s_k^2)\big] \\
        m_k(z_{<k}) &= \mu_k - \sum_{j<k} C_{kj} z_j \\
        \operatorname{logit} g_k(z_{<k}) &= \ell_k + \frac{m_k(z_{<k})^2}{2 s_k^2}

    This is explaining away. Where two atoms are alike, either may be active for the same datum, but
    seldom both: given that the first is, little is left for the second to explain. A law of
    independent gates has to choose one of them, or keep both. Here the value of a code moves what
    is left for the later ones (through ``couplings``), and that moves their odds.

    The odds follow from the slab by the Savage-Dickey ratio: if :math:`\mathcal N(m_k, s_k^2)` is
    the posterior of code :math:`k` given that it is active, its posterior odds are the prior odds
    times the prior density of the slab at zero over :math:`\mathcal N(0; m_k, s_k^2)`, for any
    likelihood. For Gaussian data of variance :math:`\sigma^2`, atoms :math:`a_k` and a slab
    :math:`\mathcal N(0, s_0^2)` the posterior of a code given *all* others is of this form with

    .. math::
        s_k^2 = (\|a_k\|^2 / \sigma^2 + 1 / s_0^2)^{-1}, \qquad
        C_{kj} = s_k^2\, a_k^T a_j / \sigma^2, \qquad
        \ell_k = \operatorname{logit} \pi + \log (s_k / s_0),

    so the last code is exact there; for earlier ones, of which the later are integrated out, the
    form is an approximation whose numbers are learned. With ``couplings`` zero the codes are
    independent, ``SpikeAndSlab(Normal(loc, scale), logits=logits + loc**2 / (2 * scale**2))``.

    Drawing takes K steps in turn; ``log_prob``, ``given`` and ``kl_given`` are parallel.
    ``has_rsample`` is false for the reason given at ``Mixed``. Marginals have no closed form:
    ``marginals`` estimates them.

    Args:
        logits: Log-odds :math:`\ell` of being active where nothing is left to explain
            (:math:`m_k = 0`), shape ``(..., atoms)``; mostly far below zero.
        loc: Location :math:`\mu` of an active code when the codes before are zero, in code units,
            shape ``(..., atoms)``.
        scale: Standard deviation :math:`s > 0` of an active code, shape ``(..., atoms)``.
        couplings: :math:`C`, shape ``(atoms, atoms)``, shared by the batch, or ``(..., atoms,
            atoms)``; only what stands below the diagonal is read.

    Raises:
        TypeError: If an argument is no tensor.
        ValueError: If shapes do not fit, or a scale is not positive.

    References:
        Dickey (1971), Ann. Math. Stat. 42(1) (the ratio); Titsias & Lazaro-Gredilla (2011), NeurIPS
        24 (the independent law, whose gates cannot explain away).

    Example:
        >>> couplings = torch.tensor([[0.0, 0.0], [0.9, 0.0]])  # two atoms with cosine 0.9
        >>> law = StructuredSpikeAndSlab(
        ...     torch.tensor([-5.6, -2.3]), torch.ones(2), torch.full((2,), 0.3), couplings
        ... )
        >>> law.given(torch.tensor([0.0, 0.0])).prob_active  # nothing explained yet
        tensor([0.4889, 0.9629])
        >>> law.given(torch.tensor([1.0, 0.0])).prob_active  # explained away
        tensor([0.4889, 0.0958])
    """

    arg_constraints = {
        "logits": constraints.real_vector,
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
        "couplings": constraints.independent(constraints.real, 2),
    }
    support = constraints.independent(WithAtom(constraints.real), 1)
    has_rsample = False

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        scale: Tensor,
        couplings: Tensor,
        *,
        validate_args: bool | None = None,
    ) -> None:
        vectors = {"logits": logits, "loc": loc, "scale": scale}
        for name, value in (vectors | {"couplings": couplings}).items():
            if not isinstance(value, Tensor):
                raise TypeError(f"Expected {name} to be a tensor, got {type(value).__name__}.")
        shapes = {name: tuple(value.shape) for name, value in vectors.items()}
        try:
            shape = torch.broadcast_shapes(*shapes.values(), couplings.shape[:-1])
        except RuntimeError:
            shape = torch.Size()
        atoms = shape[-1] if shape else 0
        if not all(shapes.values()) or couplings.shape[-2:] != (atoms, atoms):
            raise ValueError(
                "Expected logits, loc and scale of shape (..., atoms) and couplings of shape "
                f"(..., atoms, atoms), got {shapes} and {tuple(couplings.shape)}."
            )
        self.logits, self.loc, self.scale = (value.expand(shape) for value in vectors.values())
        self.couplings = couplings  # not expanded: one matrix product serves the whole batch
        super().__init__(shape[:-1], shape[-1:], validate_args=validate_args)

    @property
    def prob_active(self) -> Tensor:
        """No closed form: ``marginals(num_samples).prob_active`` estimates it."""
        raise _no_closed_form("prob_active")

    @property
    def mean(self) -> Tensor:
        """No closed form: ``marginals(num_samples).mean`` estimates it."""
        raise _no_closed_form("mean")

    @property
    def variance(self) -> Tensor:
        """No closed form: ``marginals(num_samples).variance`` estimates it."""
        raise _no_closed_form("variance")

    def given(self, value: Tensor) -> SpikeAndSlab:
        """Law of every code given the values of those before it, elementwise.

        Args:
            value: Codes, shape ``(..., atoms)``.

        Returns:
            A law of batch shape ``(..., atoms)``: its ``prob_active`` is the probability that each
            code is active given those before it.
        """
        shift = _matvec(self.couplings.tril(-1), value)
        return _conditional(self.logits, self.loc, self.scale, shift)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density relative to Lebesgue measure plus unit mass at zero for each code."""
        if self._validate_args:
            self._validate_sample(value)
        return self.given(value).log_prob(value).sum(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw codes, detached, with exact zeros; ``sample_shape + batch_shape + (atoms,)``."""
        with torch.no_grad():
            return self._draw(sample_shape, lambda law: law.sample())

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw codes with a pathwise gradient, through the mixed quantile of each code in turn.

        As for ``Mixed.rsample``, it must not meet a log-density of this law; ``kl_given`` is made
        for it, being continuous in the codes.

        Returns:
            Shape ``sample_shape + batch_shape + (atoms,)``, with exact zeros.
        """
        return self._draw(sample_shape, lambda law: law.rsample())

    def rsample_given_gates(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        r"""Draw gates as constants and active codes pathwise, for a score function of the gates.

        .. math:: \nabla\, \mathbb E_q f(z) = \mathbb E_q \big[\nabla f(z)
            + f(z)\, \nabla \log q(\mathrm{gates})\big]

        with both gradients also through the values of the codes before.

        Returns:
            Codes, shape ``sample_shape + batch_shape + (atoms,)``; and the log-probability of their
            gates, :math:`\sum_k \log q(\mathbb 1[z_k \neq 0] \mid z_{<k})`, shape
            ``sample_shape + batch_shape``.
        """
        log_gates: list[Tensor] = []

        def draw(law: SpikeAndSlab) -> Tensor:
            active, codes = law.sample_active(), law.rsample_slab()
            log_gates.append(-softplus(torch.where(active, -law.logits, law.logits)))
            return torch.where(active, codes, torch.zeros_like(codes))

        value = self._draw(sample_shape, draw)
        return value, torch.stack(log_gates, -1).sum(-1)

    def kl_given(self, value: Tensor, prior: Any) -> Tensor:
        r"""Divergence from a prior of independent codes, along the codes of a draw.

        .. math:: \sum_k \mathrm{KL}\big(q(z_k \mid z_{<k}) \,\|\, p(z_k)\big)

        Each term is closed form; the mean over draws of this law is :math:`\mathrm{KL}(q \| p)`. It
        is continuous in the codes, so unlike a sampled log-ratio it may be differentiated pathwise.

        Args:
            value: Codes, shape ``(..., atoms)``.
            prior: Law of event shape ``(atoms,)`` with independent codes, such as
                ``SpikeAndSlab(...).to_event(1)``.

        Returns:
            In nats, shape ``(...)``.

        Raises:
            ValueError: If the prior has another event shape, no atom at zero, or a one-sided slab.
            NotImplementedError: If its codes are not independent, or no divergence is registered.
        """
        if prior.event_shape != self.event_shape:
            raise ValueError(
                f"Expected a prior of event shape {tuple(self.event_shape)}, got "
                f"{tuple(prior.event_shape)}. Use .to_event(1) on a law of every code."
            )
        while isinstance(prior, Independent | ExpandedDistribution | MaskedDistribution):
            prior = prior.base_dist
        if prior.event_shape:
            raise NotImplementedError(
                f"Expected a prior of independent codes, got {type(prior).__name__}."
            )
        return kl_divergence(self.given(value), prior).sum(-1)

    def marginals(self, num_samples: int = 256) -> Marginals:
        """Marginal moments of the codes, by Monte Carlo; detached.

        Averages the conditional moments of each code over draws of those before it, which has a
        smaller variance than counting zeros: the standard error of ``prob_active`` is at most
        ``0.5 / sqrt(num_samples)``.

        Args:
            num_samples: Draws, ``>= 1``, all in memory at once.
        """
        with torch.no_grad():
            law = self.given(self.sample((num_samples,)))
            mean = law.mean.mean(0)
            spread = (law.mean - mean).square().mean(0)
            return Marginals(law.prob_active.mean(0), mean, law.variance.mean(0) + spread)

    def expand(self, batch_shape: Any, _instance: Any = None) -> StructuredSpikeAndSlab:
        """The same law with another batch shape."""
        new = self._get_checked_instance(StructuredSpikeAndSlab, _instance)
        batch_shape = torch.Size(batch_shape)
        for name in ("logits", "loc", "scale"):
            setattr(new, name, getattr(self, name).expand(batch_shape + self.event_shape))
        new.couplings = self.couplings
        super(StructuredSpikeAndSlab, new).__init__(
            batch_shape, self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def _draw(self, sample_shape: Any, draw: Callable[[SpikeAndSlab], Tensor]) -> Tensor:
        """Codes in turn, each drawn from its law given those before."""
        shape = self._extended_shape(sample_shape)
        parts = (self.logits, self.loc, self.scale)
        # What is drawn so far is taken off all later codes at once: for a gradient each step then
        # keeps one code, not all those before it.
        shift = self.loc.new_zeros(shape)
        values = []
        for k in range(shape[-1]):
            logits, loc, scale = (part[..., k].expand(shape[:-1]) for part in parts)
            value = draw(_conditional(logits, loc, scale, shift[..., 0]))
            values.append(value)
            column = self.couplings[..., k + 1 :, k]
            shift = shift[..., 1:] + value.unsqueeze(-1) * column
        return torch.stack(values, -1)


def _no_closed_form(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"The {name} of dependent codes has no closed form: marginals(num_samples).{name} "
        "estimates it, and given(codes) is the law of each code given those before it."
    )


def _conditional(logits: Tensor, loc: Tensor, scale: Tensor, shift: Tensor) -> SpikeAndSlab:
    loc = loc - shift
    scale = scale.expand_as(loc)
    slab = dist.Normal(loc, scale, validate_args=False)
    logits = logits + (loc / scale).square() / 2
    return SpikeAndSlab(slab, logits=logits, validate_args=False)


def _matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    if matrix.dim() == 2:
        return vector @ matrix.mT
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
