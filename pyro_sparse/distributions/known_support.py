"""Codes of which it is known where they may be active."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyro_sparse.distributions.arguments import common_shape
from pyro_sparse.distributions.mixed import Mixed
from pyro_sparse.distributions.prox import (
    Conjugate,
    conjugate,
    penalty,
    prox,
    register_conjugate,
    register_penalty,
    register_prox,
    restrict,
)
from pyro_sparse.distributions.rates import (
    RateStatistic,
    rate_statistic,
    register_rate_statistic,
)
from pyro_sparse.distributions.slabs import inner_value


class ZeroOutside(constraints.Constraint):
    """Values of a law where it is active, and zero elsewhere.

    No bijection from the reals is registered for it: what is zero has no freedom.
    """

    is_discrete = False

    def __init__(self, base: constraints.Constraint, active: Tensor) -> None:
        self.base, self.active = base, active
        super().__init__()

    @property
    def event_dim(self) -> int:  # type: ignore[override]
        """Event dimensions of the base law's values."""
        return self.base.event_dim

    def check(self, value: Tensor) -> Tensor:
        """True for events that are active and in the base's support, or not and all zero."""
        zero = value == 0
        zero = zero.flatten(-self.event_dim).all(-1) if self.event_dim else zero
        return torch.where(self.active, self.base.check(value), zero)

    def __repr__(self) -> str:
        return f"ZeroOutside({self.base})"


class KnownSupport(TorchDistribution):
    r"""Codes with a known support: those outside of it are exactly zero.

    .. math:: p(z) = \prod_{k \in A} p_0(z_k) \prod_{k \notin A} \delta_0(z_k)

    Densities are relative to Lebesgue measure on the support and unit mass at zero outside: there
    ``log_prob`` is 0 at zero and minus infinity elsewhere. The support is not random, so draws have
    the pathwise gradient of the base law.

    As a prior of trials that are aligned to events it says when a code may follow one. Its proximal
    step is that of the base law on the support and zero outside; an encoder of any shrinkage keeps
    to it. In a guide: the same ``active`` as in the model.

    Args:
        base: Law of active codes, such as ``Laplace`` or ``GroupLaplace``, whose events are active
            as a whole.
        active: True (or 1) where a code may be active; broadcasts with the batch shape of ``base``.
            For dense codes that is ``(atoms,)``, for convolutional ones ``(atoms, *positions)``,
            or ``(1, *positions)`` if all atoms share it.

    Raises:
        TypeError: If ``base`` is no distribution, or ``active`` no tensor of zeros and ones.
        ValueError: If the shapes do not broadcast, or ``base`` has an atom at zero of its own.

    References:
        Known events: Tolooshams, Matias, Wu, Temereanca, Uchida, Murthy, Masset & Ba (2025),
        Neuron (DUNL).

    Example:
        >>> import pyro.distributions as dist
        >>> law = KnownSupport(dist.Laplace(0.0, 1.0), torch.tensor([True, False]))
        >>> law.log_prob(torch.zeros(2))
        tensor([-0.6931,  0.0000])
        >>> prox(law, torch.tensor([3.0, 3.0]), 1.0)
        tensor([2., 0.])
    """

    # Not ``base``: an ELBO may compare the bases of two laws in place of the laws.
    base_law: Any
    active: Tensor
    arg_constraints: dict[str, constraints.Constraint] = {}
    has_fixed_zeros = True

    def __init__(self, base: Any, active: Tensor, *, validate_args: bool | None = None) -> None:
        if not isinstance(base, Distribution):
            raise TypeError(
                f"Expected base to be a distribution, such as Laplace(0.0, 1.0), got {base!r}."
            )
        below = base
        while hasattr(below, "base_dist"):
            below = below.base_dist
        if isinstance(below, Mixed | KnownSupport) or hasattr(below, "rsample_given_gates"):
            raise ValueError(
                f"Expected a base without zeros of its own, got {type(below).__name__}. Of a law "
                "with an atom a known support is a probability of zero: SpikeAndSlab(slab, "
                "probs=torch.where(active, probs, 0.0))."
            )
        active = _as_mask(active)
        shape = common_shape(base=base.batch_shape, active=active.shape)
        self.base_law = base if base.batch_shape == shape else base.expand(shape)
        self.active = active.expand(shape)
        super().__init__(shape, base.event_shape, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether the base law has a pathwise draw."""
        return bool(self.base_law.has_rsample)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        """The base law's on the known support, zero outside; without a bijection."""
        support: Any = self.base_law.support
        return ZeroOutside(support, self.active)

    @property
    def mode(self) -> Tensor:
        """Mode of the base law, zero outside."""
        return self.masked(self.base_law.mode)

    @property
    def mean(self) -> Tensor:
        """Mean of the base law, zero outside."""
        return self.masked(self.base_law.mean)

    @property
    def variance(self) -> Tensor:
        """Variance of the base law, zero outside."""
        return self.masked(self.base_law.variance)

    def masked(self, values: Tensor) -> Tensor:
        """Values with zeros outside of the support."""
        return torch.where(self.each, values, torch.zeros_like(values))

    @property
    def each(self) -> Tensor:
        """Whether an event is active, shaped to multiply values."""
        return self.active.reshape(*self.active.shape, *[1] * len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> KnownSupport:
        """The same law with another batch shape."""
        new = self._get_checked_instance(KnownSupport, _instance)
        batch_shape = torch.Size(batch_shape)
        new.base_law, new.active = (
            self.base_law.expand(batch_shape),
            self.active.expand(batch_shape),
        )
        super(KnownSupport, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density where active, 0 at zero outside, minus infinity elsewhere."""
        if self._validate_args:
            self._validate_sample(value)
        inside = self.base_law.log_prob(torch.where(self.each, value, inner_value(self.base_law)))
        return torch.where(self.active, inside, self._outside(value))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, detached, with exact zeros outside."""
        with torch.no_grad():
            return self.masked(self.base_law.sample(torch.Size(sample_shape)))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws with the pathwise gradient of the base law, and exact zeros outside.

        Raises:
            NotImplementedError: If the base law has no pathwise draw.
        """
        return self.masked(self.base_law.rsample(torch.Size(sample_shape)))

    def entropy(self) -> Tensor:
        """Entropy in nats: of the base law, zero outside."""
        entropy = self.base_law.entropy()
        return torch.where(self.active, entropy, torch.zeros_like(entropy))

    def _outside(self, value: Tensor) -> Tensor:
        """Log-mass of a value as if nothing was active."""
        zero = value == 0
        dims = len(self.event_shape)
        zero = zero.flatten(-dims).all(-1) if dims else zero
        return torch.where(zero, 0.0, -torch.inf).to(value)


def _as_mask(active: object) -> Tensor:
    if isinstance(active, Tensor) and active.dtype == torch.bool:
        return active
    if not isinstance(active, Tensor) or not bool(((active == 0) | (active == 1)).all()):
        raise TypeError(
            "Expected active to be a tensor of booleans, or of zeros and ones, got "
            f"{'other numbers' if isinstance(active, Tensor) else type(active).__name__}."
        )
    return active.bool()


@register_penalty(KnownSupport)
def _(prior: KnownSupport, value: Tensor) -> Tensor:
    inside = penalty(prior.base_law, torch.where(prior.each, value, inner_value(prior.base_law)))
    return torch.where(prior.active, inside, -prior._outside(value))


@register_prox(KnownSupport)
def _(prior: KnownSupport, value: Tensor, step: Tensor | float) -> Tensor:
    return prior.masked(prox(prior.base_law, prior.masked(value), step))


@restrict.register(KnownSupport)
def _(prior: KnownSupport, codes: Tensor) -> Tensor:
    return prior.masked(restrict(prior.base_law, codes))


@register_conjugate(KnownSupport)
def _(prior: KnownSupport) -> Conjugate:
    found, each = conjugate(prior.base_law), prior.each
    gauge = found.gauge
    return Conjugate(
        torch.where(each, found.lower, -torch.inf),
        torch.where(each, found.upper, torch.inf),
        lambda slope: prior.masked(found.value(slope)),
        None if gauge is None else lambda slope: prior.masked(gauge(slope)),
    )


@register_rate_statistic(KnownSupport)
def _(prior: KnownSupport, codes: Tensor) -> RateStatistic:
    found = rate_statistic(prior.base_law, codes)
    power = torch.as_tensor(found.power, dtype=codes.dtype, device=codes.device)
    return RateStatistic(
        found.rate,
        prior.masked(power.expand_as(found.value)),
        prior.masked(found.value),
    )
