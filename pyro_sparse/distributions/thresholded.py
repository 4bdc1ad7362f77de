r"""Laws that put a base law through a threshold: exact zeros below it, its tails above.

Each is a ``Mixed`` law whose slab is the base given that it passes the threshold, and whose gate is
the probability that it does.
"""

from __future__ import annotations

import copy
import functools
import math
from abc import abstractmethod
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyro_sparse.distributions.arguments import as_numbers, common_shape
from pyro_sparse.distributions.memory import remembered
from pyro_sparse.distributions.mixed import Mixed
from pyro_sparse.distributions.overshoots import Overshoot, overshoot
from pyro_sparse.distributions.slabs import reaches_zero
from pyro_sparse.distributions.tails import Tails
from pyro_sparse.ops import soft_threshold, soft_threshold_nonnegative


class ThresholdedLaw(Mixed):
    """Declares a base law under a threshold; the concrete laws say what passes and where it goes.

    Attributes:
        base: Law before the threshold, batch shape ``batch_shape``.
        threshold: Non-negative, in code units, shape ``batch_shape``.
        one_sided: Whether only the upper tail passes.

    Example:
        >>> law = SoftThresholded(dist.Laplace(0.3, 0.1), 0.2, one_sided=True)
        >>> isinstance(law, ThresholdedLaw), law.apply_threshold(torch.tensor([0.1, 0.5]))
        (True, tensor([0.0000, 0.3000]))
    """

    arg_constraints = {"threshold": constraints.nonnegative}
    base: Any
    threshold: Tensor
    one_sided: bool
    _narrow: tuple[Any, ...]

    def __init__(
        self,
        base: Any,
        threshold: Tensor | float,
        *,
        one_sided: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(base, Distribution):
            raise TypeError(
                f"Expected base to be a distribution, such as Normal(0.0, 1.0), got {base!r}."
            )
        like = overshoot(base, torch.zeros(())).scale  # refuses a base that is not registered
        threshold = as_numbers("threshold", threshold, like)
        shape = common_shape(base=base.batch_shape, threshold=threshold.shape)
        self.base = base if base.batch_shape == shape else base.expand(shape)
        self.threshold = threshold.expand(shape)
        self.one_sided = one_sided
        super().__init__(shape, validate_args=validate_args)

    @property
    def slab(self) -> Any:
        """Law of an active code."""
        return self._derive()[0]

    @property
    def logits(self) -> Tensor:  # type: ignore[override]
        """Log-odds that the base passes the threshold."""
        return self._derive()[1]

    def _derive(self) -> tuple[Any, Tensor]:
        return remembered(self, "_derived", (self.base, self.threshold), self._make)

    def _make(self) -> tuple[Any, Tensor]:
        narrow, *parts = vars(self).get("_narrow", (None,))
        if narrow is not None and parts[0] is self.base and parts[1] is self.threshold:
            return narrow.slab.expand(self.batch_shape), narrow.logits.expand(self.batch_shape)
        centre = self._centre()
        if centre is None:
            above = below = overshoot(self.base, -self.threshold)
        else:
            above = overshoot(self.base, centre - self.threshold)
            below = overshoot(self.base, -centre - self.threshold)
        sides = (above, None if self.one_sided else below)
        return self._make_slab(*sides), self._log_odds(*sides, centre)

    @abstractmethod
    def apply_threshold(self, value: Tensor) -> Tensor:
        """The map from draws of the base to codes, with its almost-everywhere derivative.

        Args:
            value: Shape that broadcasts with ``batch_shape``.
        """

    @abstractmethod
    def _centre(self) -> Tensor | None:
        """Location of what meets the threshold; ``None`` for zero, with two sides alike."""

    @abstractmethod
    def _make_slab(self, above: Overshoot, below: Overshoot | None) -> Any:
        """Law of an active code from the overshoots of the two tails."""

    def _log_odds(self, above: Overshoot, below: Overshoot | None, centre: Tensor | None) -> Tensor:
        if below is None:
            inner = self.threshold if centre is None else self.threshold - centre
            return above.log_mass - overshoot(self.base, inner).log_mass
        if centre is None:
            active, centre = above.log_mass + math.log(2), torch.zeros_like(self.threshold)
        else:
            active = torch.logaddexp(above.log_mass, below.log_mass)
        # At threshold zero nothing is missed; the stand-in keeps log 0 out of the gradient.
        some = self.threshold > 0
        width = torch.where(some, self.threshold, 1.0)
        inactive = above.log_interval(centre, width, above.scale)
        return torch.where(some, active - inactive, math.inf)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ThresholdedLaw:
        """The same law with another batch shape."""
        new = self._get_checked_instance(type(self), _instance)
        batch_shape = torch.Size(batch_shape)
        new.base = self.base.expand(batch_shape)
        new.threshold = self.threshold.expand(batch_shape)
        new.one_sided = self.one_sided
        # Who only draws by the map, or compares the bases, never asks what is derived: not yet.
        new._narrow = (copy.copy(self), new.base, new.threshold)
        super(ThresholdedLaw, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new


class SoftThresholded(ThresholdedLaw):
    r"""A base law shrunk towards zero.

    .. math:: z = \mathrm{sign}(y) \max(|y| - \lambda, 0), \qquad y \sim \text{base}

    One-sided: :math:`z = \max(y - \lambda, 0)`. The location drives inclusion, and the map is
    continuous in noise and parameters. ``mean`` shrinks with it; ``slab.mean`` is the mean of a
    code given that it is active, which is still moved by the threshold but not by the zeros.

    ``rsample`` puts a pathwise draw of the base through the map. That is unbiased for the expected
    value of any Lipschitz function of the codes. It is the draw of ``Mixed.rsample``, of which the
    gradient at a given code is the same: the map is monotone, so it takes quantiles to quantiles.
    It only costs less.

    Args:
        base: ``Normal`` or ``Laplace``, or a law registered with ``overshoot``.
        threshold: :math:`\lambda \ge 0`, in code units; broadcasts with the base.
        one_sided: Whether the lower tail gives zero as well, as in a ReLU.

    Raises:
        TypeError: If ``base`` is no distribution or ``threshold`` no number.
        NotImplementedError: If nothing is registered for its type.
        ValueError: If the threshold is negative or does not broadcast with the base.

    Example:
        >>> law = SoftThresholded(dist.Normal(0.35, 0.3), 0.25)
        >>> law.prob_active, law.mean
        (tensor(0.6533), tensor(0.1737))
    """

    continuous_map = True

    def __init__(
        self,
        base: Any,
        threshold: Tensor | float,
        one_sided: bool = False,
        *,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(base, threshold, one_sided=one_sided, validate_args=validate_args)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw codes by a pathwise draw of the base, with exact zeros.

        Returns:
            Shape ``sample_shape + batch_shape``.
        """
        return self.apply_threshold(self.base.rsample(torch.Size(sample_shape)))

    def apply_threshold(self, value: Tensor) -> Tensor:  # noqa: D102
        shrink = soft_threshold_nonnegative if self.one_sided else soft_threshold
        return shrink(value, self.threshold)

    def _centre(self) -> Tensor:
        return self.base.loc

    def _make_slab(self, above: Overshoot, below: Overshoot | None) -> Tails:
        return Tails(above, below, upper=torch.zeros_like(self.threshold), validate_args=False)


class ShiftedThresholded(ThresholdedLaw):
    r"""A location whose noise has to pass a threshold, or the code is zero.

    .. math::
        z = \begin{cases} 0 & |e| \le \lambda \\
        \mathrm{loc} + \mathrm{sign}(e) (|e| - \lambda) & \text{else} \end{cases},
        \qquad \mathrm{loc} + e \sim \text{base}

    One-sided, only positive noise passes: :math:`z = \mathrm{loc} + e - \lambda` where
    :math:`e > \lambda`, which may be negative. The location has no influence on inclusion:
    :math:`P(z \ne 0) = P(|e| > \lambda)`. Over a Laplace base of scale :math:`b` this is
    spike-and-slab with the same Laplace law as its slab, and inclusion :math:`e^{-\lambda / b}`.

    Args:
        base: ``Normal`` or ``Laplace``, or a law registered with ``overshoot``.
        threshold: :math:`\lambda \ge 0`, in code units; broadcasts with the base.
        one_sided: Whether only noise above the threshold passes.

    Raises:
        TypeError: If ``base`` is no distribution or ``threshold`` no number.
        NotImplementedError: If nothing is registered for its type.
        ValueError: If the threshold is negative or does not broadcast with the base.

    References:
        Fallah & Rozell (2022), ICML, PMLR 162:6034-6058.

    Example:
        >>> law = ShiftedThresholded(dist.Laplace(0.3, 0.12), 0.2)
        >>> law.prob_active, law.mean, law.slab.mean
        (tensor(0.1889), tensor(0.0567), tensor(0.3000))
    """

    def __init__(
        self,
        base: Any,
        threshold: Tensor | float,
        one_sided: bool = False,
        *,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(base, threshold, one_sided=one_sided, validate_args=validate_args)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw codes with a pathwise gradient through the quantile of the mixed law.

        Returns:
            Shape ``sample_shape + batch_shape``, with exact zeros.

        Raises:
            NotImplementedError: If one-sided with a positive location: no code lies between it and
                zero.
        """
        if not reaches_zero(self.slab):
            raise _no_pathwise_draw(self)
        return super().rsample(sample_shape)

    def rsample_slab(self, sample_shape: Any = ()) -> Tensor:
        """Draw active codes with the pathwise gradient of the slab."""
        return self.slab.rsample(torch.Size(sample_shape))

    def apply_threshold(self, value: Tensor) -> Tensor:  # noqa: D102
        shrink = soft_threshold_nonnegative if self.one_sided else soft_threshold
        excess = shrink(value - self.base.loc, self.threshold)
        return torch.where(excess == 0, torch.zeros_like(excess), self.base.loc + excess)

    def _centre(self) -> None:
        return None

    def _make_slab(self, above: Overshoot, below: Overshoot | None) -> Any:
        return shifted_slab(self.base, above, below)


class HardThresholded(ThresholdedLaw):
    r"""A base law, or zero where it does not pass the threshold.

    .. math:: z = y\, \mathbb 1[|y| > \lambda], \qquad y \sim \text{base}

    An active code is not moved, and none lies between zero and the threshold. So the draw jumps,
    and ``rsample`` does not exist. ``rsample_slab`` follows a code within its own tail, positive or
    negative; an unbiased gradient also needs the score of ``log_prob_gates``, which counts the
    gate and the tail.

    Args:
        base: ``Normal`` or ``Laplace``, or a law registered with ``overshoot``.
        threshold: :math:`\lambda \ge 0`, in code units; broadcasts with the base.

    Raises:
        TypeError: If ``base`` is no distribution or ``threshold`` no number.
        NotImplementedError: If nothing is registered for its type.
        ValueError: If the threshold is negative or does not broadcast with the base.

    Example:
        >>> law = HardThresholded(dist.Normal(0.0, 1.0), 2.0)
        >>> law.prob_active, law.variance
        (tensor(0.0455), tensor(0.2615))
    """

    def __init__(
        self, base: Any, threshold: Tensor | float, *, validate_args: bool | None = None
    ) -> None:
        super().__init__(base, threshold, validate_args=validate_args)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """No pathwise draw exists.

        Raises:
            NotImplementedError: Always; names the estimators to use.
        """
        raise _no_pathwise_draw(self)

    def rsample_slab(self, sample_shape: Any = ()) -> Tensor:
        """Draw active codes with a pathwise gradient within their own tail."""
        return self.slab.rsample_given_side(torch.Size(sample_shape))

    def apply_threshold(self, value: Tensor) -> Tensor:  # noqa: D102
        return torch.where(value.abs() > self.threshold, value, torch.zeros_like(value))

    def _centre(self) -> Tensor:
        return self.base.loc

    def _make_slab(self, above: Overshoot, below: Overshoot | None) -> Tails:
        upper = self.threshold
        return Tails(above, below, upper=upper, lower=-upper, validate_args=False)


@functools.singledispatch
def shifted_slab(base: Any, above: Overshoot, below: Overshoot | None) -> Any:
    """Slab of a shifted law: the overshoots of the noise on the two sides of the location.

    Example:
        >>> noise = overshoot(dist.Laplace(0.3, 0.12), torch.tensor(-0.2))
        >>> shifted_slab(dist.Laplace(0.3, 0.12), noise, noise)
        Laplace(loc: 0.30000001192092896, scale: 0.11999999731779099)
    """
    return Tails(above, below, upper=base.loc, validate_args=False)


@shifted_slab.register(torch.distributions.Laplace)
def _(base: Any, above: Overshoot, below: Overshoot | None) -> Any:
    if below is None:
        return Tails(above, upper=base.loc, validate_args=False)
    # Exponential tails have no memory of the threshold.
    return dist.Laplace(base.loc, base.scale, validate_args=False)


def _no_pathwise_draw(law: ThresholdedLaw) -> NotImplementedError:
    return NotImplementedError(
        f"Expected a law whose codes reach down to zero for a pathwise draw, got a "
        f"{type(law).__name__}: mass cannot move over the gap around zero. Use an estimator that "
        "draws the gate apart: LeaveOneOut, LocalExpectation or DisARM."
    )
