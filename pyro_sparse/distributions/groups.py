"""Laws of groups of codes that are active together."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_sparse.dictionaries.base import check_shape, check_sizes
from pyro_sparse.distributions.arguments import as_numbers
from pyro_sparse.distributions.prox import (
    Conjugate,
    penalty,
    register_conjugate,
    register_penalty,
    register_prox,
    restrict,
)
from pyro_sparse.distributions.rates import RateStatistic, register_rate_statistic
from pyro_sparse.ops import group_soft_threshold


class GroupLaplace(TorchDistribution):
    r"""Groups of codes that vanish together: the prior of the group lasso.

    .. math:: p(z) = \prod_g \frac{\lambda_g^d}{S_d\, \Gamma(d)}\, e^{-\lambda_g \|z_g\|_2},
        \qquad S_d = 2 \pi^{d/2} / \Gamma(d/2)

    for groups of :math:`d` codes each; one-sided, for codes :math:`\ge 0`, times :math:`2^d`. The
    length of a group is ``Gamma(d, rate)``, its direction uniform. With :math:`d = 1` it is the
    Laplace law.

    An event is cut into groups of the shape ``group``. Of the convolutional codes of simultaneously
    recorded neurons, ``(atoms, time, neurons)``, an event ``(neurons,)`` makes one group of what
    all neurons do at one time; ``event_shape=(time, neurons), group=(1, neurons)`` says the same.
    Of dense codes ``(12,)``, ``group=(3,)`` makes four groups of consecutive atoms.

    Args:
        rate: :math:`\lambda > 0`, in one over code units: a number, or one for each group, of a
            shape that broadcasts to ``(*batch_shape, *groups)``, with ``groups`` the number of
            groups along each dimension of the event. A rate for each atom of the codes ``(atoms,
            time, neurons)`` is of shape ``(atoms, 1, 1)``, as a callable prior gets it.
        event_shape: Shape of an event, the last dimensions of the codes.
        group: Shape of a group, which divides it; by default the event is one group.
        one_sided: Non-negative codes alone.

    Raises:
        TypeError: If ``rate`` is no number.
        ValueError: If a shape is empty, groups do not fill the event, or the rate's shape does not
            fit; under ``validate_args``, if a rate is not positive.

    References:
        Yuan & Lin (2006), J. R. Stat. Soc. B 68; as a law: Raman, Fuchs, Wild, Dahl & Roth (2009),
        ICML.

    Example:
        >>> law = GroupLaplace(1.0, (2,))
        >>> law.log_prob(torch.zeros(2)).exp()  # 1 / (2 pi)
        tensor(0.1592)
        >>> GroupLaplace(1.0, (12,), group=(3,)).mean.shape
        torch.Size([12])
    """

    arg_constraints = {"rate": constraints.positive}
    has_rsample = True

    def __init__(
        self,
        rate: Tensor | float,
        event_shape: tuple[int, ...],
        *,
        group: tuple[int, ...] | None = None,
        one_sided: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        event_shape = check_shape(event_shape)
        group = event_shape if group is None else check_shape(group)
        check_sizes(event_shape=event_shape, group=group)
        if len(group) != len(event_shape) or any(e % g for e, g in zip(event_shape, group)):
            raise ValueError(
                f"Expected a group that divides the event, of shape {event_shape}, got {group}. "
                "Write 1 for a dimension that a group does not run over."
            )
        self.group, self.one_sided = group, bool(one_sided)
        groups = tuple(e // g for e, g in zip(event_shape, group))
        kept = isinstance(rate, Tensor) and rate.is_floating_point()
        rate = as_numbers("rate", rate, like=rate if kept else torch.empty(()))  # type: ignore[arg-type]
        batch_shape = rate.shape[: max(0, rate.dim() - len(groups))]
        try:
            self.rate = rate.expand(*batch_shape, *groups)
        except RuntimeError:
            raise ValueError(
                f"Expected one rate for each group, of a shape that broadcasts to (..., "
                f"{', '.join(map(str, groups))}), got {tuple(rate.shape)}. For one rate for each "
                f"batch element give it {len(groups)} more dimensions of size 1."
            ) from None
        super().__init__(batch_shape, torch.Size(event_shape), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        """Vectors, of non-negative numbers if one-sided."""
        each = constraints.nonnegative if self.one_sided else constraints.real
        return constraints.independent(each, len(self.event_shape))

    @property
    def size(self) -> int:
        """Number of codes of a group."""
        return math.prod(self.group)

    @property
    def mode(self) -> Tensor:
        """Zero."""
        return self.rate.new_zeros(self.batch_shape + self.event_shape)

    @property
    def mean(self) -> Tensor:
        """Mean of each code, shape ``batch_shape + event_shape``."""
        return self.spread(self._mean_direction() * self.size / self.rate)

    @property
    def variance(self) -> Tensor:
        """Variance of each code; two-sided, codes of a group are uncorrelated, not independent."""
        square = (self.size + 1) / self.rate.square()
        return self.spread(square) - self.mean.square()

    def expand(self, batch_shape: Any, _instance: Any = None) -> GroupLaplace:
        """The same law with another batch shape."""
        new = self._get_checked_instance(GroupLaplace, _instance)
        batch_shape = torch.Size(batch_shape)
        new.group, new.one_sided = self.group, self.one_sided
        new.rate = self.rate.expand(batch_shape + self.rate.shape[len(self.batch_shape) :])
        super(GroupLaplace, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density; minus infinity where one-sided codes are negative."""
        if self._validate_args:
            self._validate_sample(value)
        return self._sum(self._peak()) - penalty(self, value)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws with a pathwise gradient by the rate."""
        shape = self._extended_shape(sample_shape)
        direction = torch.randn(shape, dtype=self.rate.dtype, device=self.rate.device)
        direction = direction.abs() if self.one_sided else direction
        size = self.rate.new_full((), self.size)
        length = torch._standard_gamma(size.expand(self._lengths(direction).shape)) / self.rate
        return direction * self.spread(length / self._lengths(direction))

    def entropy(self) -> Tensor:
        """Entropy in nats."""
        return self._sum(self.size - self._peak())

    def lengths(self, value: Tensor) -> Tensor:
        """Euclidean length of each group, shape ``(..., *groups)``.

        Args:
            value: Shape ``(..., *event_shape)``.

        Example:
            >>> GroupLaplace(1.0, (4,), group=(2,)).lengths(torch.tensor([3.0, 4.0, 0.0, 0.0]))
            tensor([5., 0.])
        """
        return self._lengths(value)

    def spread(self, values: Tensor) -> Tensor:
        """A value of each group at all of its codes: ``(..., *groups)`` to ``(..., *event)``."""
        lead = values.shape[: values.dim() - len(self.group)]
        pairs = [n for pair in zip(values.shape[len(lead) :], self.group) for n in pair]
        wide = self._with_ones(values).expand(*lead, *pairs)
        return wide.reshape(*lead, *self.event_shape)

    def shrunk(self, value: Tensor, step: Tensor | float) -> Tensor:
        """The prox of the lengths of the groups; see ``distributions.prox``.

        Raises:
            ValueError: If ``step`` is not the same for all codes of a group.
        """
        value = value.relu() if self.one_sided else value
        threshold = self._step(step) * self._with_ones(self.rate)
        dims = tuple(range(-2 * len(self.group) + 1, 0, 2))
        parts = group_soft_threshold(self._parts(value), threshold, dims)
        return parts.reshape(*parts.shape[: parts.dim() - 2 * len(self.group)], *self.event_shape)

    def _parts(self, value: Tensor) -> Tensor:
        """Every event dimension as two: which group, and where in it."""
        lead = value.shape[: value.dim() - len(self.group)]
        pairs = [n for e, g in zip(self.event_shape, self.group) for n in (e // g, g)]
        return value.expand(*lead, *self.event_shape).reshape(*lead, *pairs)

    def _with_ones(self, values: Tensor) -> Tensor:
        lead = values.dim() - len(self.group)
        pairs = [n for size in values.shape[lead:] for n in (size, 1)]
        return values.reshape(*values.shape[:lead], *pairs)

    def _lengths(self, value: Tensor) -> Tensor:
        dims = tuple(range(-2 * len(self.group) + 1, 0, 2))
        return torch.linalg.vector_norm(self._parts(value), dim=dims)

    def _step(self, step: Tensor | float) -> Tensor | float:
        if not isinstance(step, Tensor) or step.dim() == 0:
            return step
        missing = max(0, len(self.group) - step.dim())
        step = step.reshape(*[1] * missing, *step.shape)
        for size, group in zip(step.shape[step.dim() - len(self.group) :], self.group):
            if size != 1 and group != 1:
                raise ValueError(
                    f"Expected one step for all codes of a group, of shape {self.group}, got steps "
                    f"of shape {tuple(step.shape)}. Where a group runs over atoms their thresholds "
                    "cannot be learned apart: pass shrinkage=Proximal() (AutoUnrolled: "
                    "learn_thresholds=False)."
                )
        return self._with_ones(step)

    def _sum(self, values: Tensor) -> Tensor:
        return values.flatten(-len(self.group)).sum(-1)

    def _peak(self) -> Tensor:
        """Log-density of each group at zero."""
        d = self.size
        sphere = math.log(2) + d / 2 * math.log(math.pi) - math.lgamma(d / 2)
        sides = d * math.log(2) if self.one_sided else 0.0
        return d * self.rate.log() - sphere - math.lgamma(d) + sides

    def _mean_direction(self) -> float:
        """Mean of one component of a direction."""
        if not self.one_sided:
            return 0.0
        d = self.size
        return math.exp(math.lgamma(d / 2) - math.lgamma((d + 1) / 2)) / math.sqrt(math.pi)


@register_penalty(GroupLaplace)
def _(prior: GroupLaplace, value: Tensor) -> Tensor:
    total = prior._sum(prior.rate * prior.lengths(value))
    if not prior.one_sided:
        return total
    outside = (value < 0).flatten(-len(prior.group)).any(-1)
    return torch.where(outside, torch.inf, total)


@register_prox(GroupLaplace)
def _(prior: GroupLaplace, value: Tensor, step: Tensor | float) -> Tensor:
    return prior.shrunk(value, step)


@restrict.register(GroupLaplace)
def _(prior: GroupLaplace, codes: Tensor) -> Tensor:
    return codes.relu() if prior.one_sided else codes


@register_conjugate(GroupLaplace)
def _(prior: GroupLaplace) -> Conjugate:
    def gauge(slope: Tensor) -> Tensor:
        slope = slope.relu() if prior.one_sided else slope
        return prior.spread(prior.lengths(slope) / prior.rate)

    unbounded = torch.full_like(prior.mode, torch.inf)
    return Conjugate(-unbounded, unbounded, torch.zeros_like, gauge)


@register_rate_statistic(GroupLaplace)
def _(prior: GroupLaplace, codes: Tensor) -> RateStatistic:
    # log p = d log(rate) - rate * length: each code takes its share of d and of the length.
    lengths = prior.spread(prior.lengths(codes))
    active = lengths > 0
    share = codes.square() / torch.where(active, lengths, torch.ones_like(lengths))
    return RateStatistic(prior.spread(prior.rate), 1.0, torch.where(active, share, 0.0))
