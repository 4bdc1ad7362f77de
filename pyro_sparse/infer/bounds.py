"""What several draws of the codes of a datum are made into: bounds of its log-evidence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor


class Bound:
    r"""Declares a symmetric function of :math:`J` terms :math:`\ell_1 \dots \ell_J` of a datum.

    Attributes:
        weighted: What a term is. True: the log-weight :math:`\log p(y, z_j) - \log q(z_j)`, by
            true mixed densities. False: :math:`\log p(y \mid z_j)` minus the analytic KL.

    Example:
        >>> class Median(Bound):
        ...     weighted = False
        ...     def __call__(self, terms):
        ...         return terms.median(0).values
        >>> Median()(torch.tensor([[-2.0], [-9.0], [-3.0]]))
        tensor([-3.])
    """

    weighted: bool

    def __call__(self, terms: Tensor) -> Tensor:
        """Bound of each datum.

        Args:
            terms: Nats, shape ``(J, ...)``.

        Returns:
            Nats, shape ``(...)``.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Mean(Bound):
    """The mean over draws: an unbiased estimate of the ELBO.

    Args:
        sampled_kl: Estimate the KL from the draws too, for laws without a closed form.

    Example:
        >>> Mean()(torch.tensor([[-2.0], [-4.0]]))
        tensor([-3.])
    """

    sampled_kl: bool = False

    @property
    def weighted(self) -> bool:  # type: ignore[override]
        """Log-weights if the KL is sampled."""
        return self.sampled_kl

    def __call__(self, terms: Tensor) -> Tensor:  # noqa: D102
        return terms.mean(0)


@dataclass(frozen=True)
class BestOf(Bound):
    r"""The best of :math:`J` draws.

    With log-weights, :math:`\max_j \ell_j - \log J \le \log \frac1J \sum_j e^{\ell_j}`, so its
    expectation is a lower bound of the log-evidence: importance weighting with a hard assignment.

    As published ("max-ELBO") the terms hold the analytic KL and :math:`\log J` is missing. That is
    no bound: it trains a posterior that is good together with the same selection at test time, and
    may be poor by itself.

    Args:
        as_published: The published form.

    References:
        Fallah & Rozell (2022), ICML, PMLR 162:6034-6058.

    Example:
        >>> BestOf(as_published=True)(torch.tensor([[-2.0], [-4.0]]))
        tensor([-2.])
        >>> BestOf()(torch.tensor([[-2.0], [-4.0]]))
        tensor([-2.6931])
    """

    as_published: bool = False

    @property
    def weighted(self) -> bool:  # type: ignore[override]
        """Log-weights, unless as published."""
        return not self.as_published

    def __call__(self, terms: Tensor) -> Tensor:  # noqa: D102
        best = terms.amax(0)
        return best if self.as_published else best - math.log(len(terms))


@dataclass(frozen=True)
class Importance(Bound):
    r"""Importance-weighted bound, :math:`\log \frac1J \sum_j e^{\ell_j}`.

    A lower bound of the log-evidence in expectation, tighter with every draw.

    References:
        Burda, Grosse & Salakhutdinov (2016), ICLR, eq. (8).

    Example:
        >>> Importance()(torch.tensor([[-2.0], [-4.0]]))
        tensor([-2.5662])
    """

    weighted = True

    def __call__(self, terms: Tensor) -> Tensor:  # noqa: D102
        return terms.logsumexp(0) - math.log(len(terms))


@dataclass(frozen=True)
class Renyi(Bound):
    r"""Renyi's alpha-divergence in place of the KL.

    .. math:: \frac{1}{1 - \alpha} \log \frac1J \sum_j e^{(1 - \alpha) \ell_j}

    With :math:`\alpha \to 1` it becomes the ELBO, with 0 the importance-weighted bound. Between
    them it covers more of a posterior with several modes than the KL does. Of finitely many draws
    it is a lower bound in expectation for :math:`0 \le \alpha < 1`.

    Args:
        order: :math:`\alpha`, a number not within 0.001 of 1. Below 0 it estimates the evidence
            from above.

    Raises:
        TypeError: If it is no real number.
        ValueError: If it is close to 1 (use ``Mean``) or not finite.

    References:
        Li & Turner (2016), NeurIPS 29, eq. (8).

    Example:
        >>> Renyi(0.5)(torch.tensor([[-2.0], [-4.0]]))
        tensor([-2.7598])
    """

    order: float
    weighted = True

    def __post_init__(self) -> None:
        if not isinstance(self.order, Real) or isinstance(self.order, bool):
            raise TypeError(f"Expected order to be a real number, got {self.order!r}.")
        if abs(self.order - 1) < 1e-3 or not math.isfinite(self.order):
            raise ValueError(
                f"Expected a finite order at least 0.001 away from 1, got {self.order}. Order 1 is "
                "the KL: use Mean(). Close to it all digits are lost."
            )

    def __call__(self, terms: Tensor) -> Tensor:  # noqa: D102
        power = 1 - self.order
        return ((power * terms).logsumexp(0) - math.log(len(terms))) / power


def contributions(bound: Bound, terms: Tensor) -> Tensor:
    r"""What each draw adds to a bound: :math:`F(\ell) - F(\ell \text{ without } \ell_j)`.

    In place of :math:`\ell_j` stands the mean of the other terms, which does not depend on draw
    :math:`j`: these are multipliers of score functions, with a leave-one-out baseline. For the mean
    they are :math:`(\ell_j - \bar \ell_{-j}) / J`.

    Args:
        bound: :math:`F`.
        terms: Nats, shape ``(J, ...)``; ``J >= 2``.

    Returns:
        Shape of ``terms``, detached.

    References:
        Mnih & Rezende (2016), ICML (VIMCO), eq. (10).
    """
    with torch.no_grad():
        count = len(terms)
        others = (terms.sum(0) - terms) / (count - 1)
        same = torch.eye(count, dtype=torch.bool, device=terms.device)
        same = same.reshape(count, count, *[1] * (terms.dim() - 1))
        # Column j holds all terms with the j-th replaced.
        return bound(terms) - bound(torch.where(same, others, terms.unsqueeze(1)))
