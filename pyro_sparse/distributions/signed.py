"""Laplace laws whose values have a known sign."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints, transform_to

from pyro_sparse.distributions.arguments import as_numbers, common_shape
from pyro_sparse.distributions.prox import (
    Conjugate,
    penalty,
    register_conjugate,
    register_penalty,
    register_prox,
    restrict,
)
from pyro_sparse.distributions.rates import RateStatistic, register_rate_statistic
from pyro_sparse.ops import soft_threshold, soft_threshold_nonnegative


class _OneOfThree(constraints.Constraint):
    def check(self, value: Tensor) -> Tensor:
        return (value == -1) | (value == 0) | (value == 1)

    def __repr__(self) -> str:
        return "OneOf(-1, 0, 1)"


class Signed(constraints.Constraint):
    """Numbers of given signs: non-negative (+1), non-positive (-1), or any (0).

    Args:
        signs: One of -1, 0, 1 for each element.
    """

    is_discrete = False
    event_dim = 0

    def __init__(self, signs: Tensor) -> None:
        self.signs = signs

    @property
    def lower_bound(self) -> Tensor:
        """Zero where values are non-negative, else minus infinity."""
        return torch.where(self.signs > 0, 0.0, -math.inf)

    @property
    def upper_bound(self) -> Tensor:
        """Zero where values are non-positive, else infinity."""
        return torch.where(self.signs < 0, 0.0, math.inf)

    def check(self, value: Tensor) -> Tensor:
        """True where a value has its sign, or is zero."""
        return value * self.signs >= 0

    def __repr__(self) -> str:
        return "Signed()"


class _ToSigned(Transform):
    """The exponential with the sign asked for; the identity where none is."""

    domain = constraints.real
    bijective = True

    def __init__(self, signs: Tensor) -> None:
        super().__init__()
        self.signs = signs

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return Signed(self.signs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ToSigned) and torch.equal(self.signs, other.signs)

    def _call(self, x: Tensor) -> Tensor:
        free = self.signs == 0
        return torch.where(free, x, self.signs * torch.where(free, 0.0, x).exp())

    def _inverse(self, y: Tensor) -> Tensor:
        free = self.signs == 0
        return torch.where(free, y, torch.where(free, 1.0, y.abs()).log())

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.where(self.signs == 0, torch.zeros_like(x), x)


@biject_to.register(Signed)
@transform_to.register(Signed)
def _(constraint: Signed) -> Transform:
    return _ToSigned(constraint.signs)


class SignedLaplace(TorchDistribution):
    r"""Laplace law of each code, restricted to the sign that the code is known to have.

    .. math:: p(z) = \lambda e^{-\lambda |z|} \text{ for } s z \ge 0,\ s = \pm 1; \qquad
        p(z) = \tfrac{\lambda}{2} e^{-\lambda |z|} \text{ for } s = 0

    With :math:`s = 1` it is the ``Exponential``, with :math:`s = 0` the ``Laplace`` of scale
    :math:`1 / \lambda`.

    Args:
        rate: :math:`\lambda > 0`, in one over code units; broadcasts with ``signs``.
        signs: :math:`s`: 1 for non-negative codes, -1 for non-positive ones, 0 for both. Of codes
            ``(atoms, *positions)``, one for each atom is of shape ``(atoms, 1, ...)``.

    Raises:
        TypeError: If an argument is no number.
        ValueError: If the shapes do not broadcast; under ``validate_args``, if a rate is not
            positive or a sign none of the three.

    References:
        Of exponential codes: Lee & Seung (1999), Nature 401; Hoyer (2002), NNSP.

    Example:
        >>> law = SignedLaplace(2.0, torch.tensor([1, 0, -1]))
        >>> law.log_prob(torch.tensor([0.5, 0.5, -0.5])).exp()
        tensor([0.7358, 0.3679, 0.7358])
    """

    arg_constraints = {"rate": constraints.positive, "signs": _OneOfThree()}
    has_rsample = True

    def __init__(
        self,
        rate: Tensor | float,
        signs: Tensor | float,
        *,
        validate_args: bool | None = None,
    ) -> None:
        kept = isinstance(rate, Tensor) and rate.is_floating_point()
        rate = as_numbers("rate", rate, like=rate if kept else torch.empty(()))  # type: ignore[arg-type]
        signs = as_numbers("signs", signs, like=rate)
        shape = common_shape(rate=rate.shape, signs=signs.shape)
        self.rate, self.signs = rate.expand(shape), signs.expand(shape)
        super().__init__(shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        """Numbers of the signs."""
        return Signed(self.signs)

    @property
    def mode(self) -> Tensor:
        """Zero."""
        return torch.zeros_like(self.rate)

    @property
    def mean(self) -> Tensor:
        """Mean: the sign over the rate."""
        return self.signs / self.rate

    @property
    def variance(self) -> Tensor:
        """Variance: twice as large where both signs are allowed."""
        return (2 - self.signs.abs()) / self.rate.square()

    def expand(self, batch_shape: Any, _instance: Any = None) -> SignedLaplace:
        """The same law with another batch shape."""
        new = self._get_checked_instance(SignedLaplace, _instance)
        batch_shape = torch.Size(batch_shape)
        new.rate, new.signs = self.rate.expand(batch_shape), self.signs.expand(batch_shape)
        super(SignedLaplace, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density; minus infinity at the wrong sign."""
        if self._validate_args:
            self._validate_sample(value)
        return self._peak() - penalty(self, value)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws with a pathwise gradient by the rate, shape ``sample_shape + batch_shape``."""
        shape = self._extended_shape(sample_shape)
        size = torch.empty(shape, dtype=self.rate.dtype, device=self.rate.device).exponential_()
        side = torch.where(torch.rand_like(size) < 0.5, -1.0, 1.0).to(size)
        return torch.where(self.signs == 0, side, self.signs) * size / self.rate

    def cdf(self, value: Tensor) -> Tensor:
        """Probability of at most ``value``, of the support."""
        tail = (-self.rate * value.abs()).exp()
        below = torch.where(self.signs == 0, tail / 2, torch.where(self.signs < 0, tail, 0.0))
        above = 1 - torch.where(self.signs == 0, tail / 2, torch.where(self.signs > 0, tail, 0.0))
        return torch.where(value < 0, below, above)

    def icdf(self, value: Tensor) -> Tensor:
        """Code that has probability ``value`` below it; ``value`` in (0, 1)."""
        upper = torch.where(self.signs == 0, value >= 0.5, self.signs > 0)
        factor = torch.where(self.signs == 0, 2.0, 1.0)
        left = torch.where(upper, 1 - value, value)
        size = -(factor * left).log() / self.rate
        return torch.where(upper, size, -size)

    def entropy(self) -> Tensor:
        """Entropy in nats."""
        return 1 - self._peak()

    def _peak(self) -> Tensor:
        """Log-density at zero."""
        return self.rate.log() - math.log(2) * (1 - self.signs.abs())


@register_penalty(SignedLaplace)
def _(prior: SignedLaplace, value: Tensor) -> Tensor:
    return torch.where(value * prior.signs < 0, torch.inf, prior.rate * value.abs())


@register_prox(SignedLaplace)
def _(prior: SignedLaplace, value: Tensor, step: Tensor | float) -> Tensor:
    threshold = step * prior.rate
    one_sided = prior.signs * soft_threshold_nonnegative(prior.signs * value, threshold)
    return torch.where(prior.signs == 0, soft_threshold(value, threshold), one_sided)


@restrict.register(SignedLaplace)
def _(prior: SignedLaplace, codes: Tensor) -> Tensor:
    return torch.where(codes * prior.signs < 0, torch.zeros_like(codes), codes)


@register_conjugate(SignedLaplace)
def _(prior: SignedLaplace) -> Conjugate:
    lower = torch.where(prior.signs > 0, -torch.inf, -prior.rate)
    upper = torch.where(prior.signs < 0, torch.inf, prior.rate)
    return Conjugate(lower, upper, torch.zeros_like)


@register_rate_statistic(SignedLaplace)
def _(prior: SignedLaplace, codes: Tensor) -> RateStatistic:
    return RateStatistic(prior.rate, 1.0, codes.abs())
