"""Calibration of posteriors with atoms at zero: ranks, intervals, probabilities of being active."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_sparse.diagnostics.uniformity import count_p_value, uniform_p_value
from pyro_sparse.infer.numbers import check_real, check_whole
from pyro_sparse.ops import check_tensor

FEWEST_ACTIVE = 10
"""Active draws from which a rank among active draws is taken."""


class Coverage(NamedTuple):
    """How often intervals hold the truth.

    Attributes:
        level: Probability that they claim.
        share: Share that do, ``nan`` if there are none.
        se: Its standard error; codes of one simulation are not taken for independent.
        number: Intervals.

    Example:
        >>> abs(Coverage(0.9, share=0.88, se=0.015, number=400).share - 0.9) < 3 * 0.015
        True
    """

    level: float
    share: float
    se: float
    number: int


@dataclass(frozen=True)
class Reliability:
    """How often codes are active, against how probable that was said to be.

    Attributes:
        prob: Mean probability in each bin that is not empty; float64, shape ``(bins,)``.
        frequency: Share that were active.
        se: Standard error of the difference, if the probabilities hold and codes are independent.
        count: Codes in each bin.
        ece: Expected calibration error, the mean of ``|frequency - prob|`` over all codes.
        ece_se: Its standard error; rows are taken for independent, codes of one row are not.
        ece_of_noise: What ``ece`` would be on average if the probabilities held: the noise of
            finite bins does not cancel, so a smaller ``ece`` says nothing against them.

    Example:
        >>> bins = torch.tensor([0.1, 0.9]), torch.tensor([0.2, 0.9])
        >>> curve = Reliability(*bins, torch.full((2,), 0.01), torch.tensor([50, 50]), 0.05, 0.0, 0)
        >>> (curve.frequency - curve.prob).abs() > 3 * curve.se
        tensor([ True, False])
    """

    prob: Tensor
    frequency: Tensor
    se: Tensor
    count: Tensor
    ece: float
    ece_se: float
    ece_of_noise: float


def reliability(
    prob: Tensor, active: Tensor, *, num_bins: int = 10, equal_counts: bool = False
) -> Reliability:
    r"""Calibration curve of the probability that a code is active.

    .. math:: \mathrm{ECE} = \sum_b \frac{n_b}{n}\,
        \Big| \frac1{n_b} \sum_{i \in b} (a_i - p_i) \Big|

    Args:
        prob: Probabilities, shape ``(n, ...)``, such as ``guide.posterior(y).prob_active``; the
            rows are independent.
        active: Whether the codes are active in truth, boolean, of that shape.
        num_bins: Bins of [0, 1].
        equal_counts: Bins that hold equally many codes, in place of bins of equal width.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If shapes differ, there are no codes, or a probability is outside [0, 1].

    References:
        Naeini, Cooper & Hauskrecht (2015), AAAI, sec. 3; bias of the binned error: Nixon et al.
        (2019), CVPR workshops.

    Example:
        >>> prob = torch.rand(5000, 4, generator=torch.Generator().manual_seed(0))
        >>> active = torch.rand(5000, 4, generator=torch.Generator().manual_seed(1)) < prob
        >>> reliability(prob, active).ece < 0.02, reliability(prob**2, active).ece > 0.1
        (True, True)
    """
    check_tensor("prob", prob)
    check_whole("num_bins", num_bins, 1)
    if not isinstance(active, Tensor) or active.dtype != torch.bool:
        raise TypeError("Expected active to be a boolean tensor, such as codes != 0.")
    if prob.shape != active.shape or prob.dim() == 0 or prob.numel() == 0:
        raise ValueError(
            f"Expected prob and active of one shape (n, ...), got {tuple(prob.shape)} and "
            f"{tuple(active.shape)}."
        )
    if not bool(((prob >= 0) & (prob <= 1)).all()):
        raise ValueError("Expected probabilities in [0, 1]. Pass prob_active, not log-odds.")
    said = prob.detach().double().reshape(len(prob), -1)
    error = active.to(said).reshape(len(prob), -1) - said
    if equal_counts:
        rank = said.flatten().argsort().argsort().reshape(said.shape)
        index = rank * num_bins // said.numel()
    else:
        index = (said * num_bins).long().clamp(max=num_bins - 1)

    def total(values: Tensor) -> Tensor:
        zero = said.new_zeros(num_bins)
        return zero.index_add(0, index.flatten(), values.flatten())

    count = total(torch.ones_like(said))
    spread = total(said * (1 - said)).sqrt()
    gap = total(error)
    size = said.numel()
    ece = float(gap.abs().sum() / size)
    each = (gap.sign()[index] * error - ece).sum(1)  # of a row
    kept = count > 0
    count = count[kept]
    mean = total(said)[kept] / count
    return Reliability(
        prob=mean,
        frequency=mean + gap[kept] / count,
        se=spread[kept] / count,
        count=count.long(),
        ece=ece,
        ece_se=float(each.square().sum().sqrt() / size),
        ece_of_noise=float(spread.sum() / size * math.sqrt(2 / math.pi)),
    )


@dataclass(frozen=True)
class Calibration:
    """True values among draws of their posterior.

    Attributes:
        pit: Randomised rank of the truth among its draws, spread over (0, 1): uniform if the
            posterior is right, whatever its atoms. Float64, shape ``(simulations, elements)``.
        pit_active: The same among the draws that are active, of truths that are; ``nan`` for
            others, and where fewer than ten draws are active. None of values without an atom.
        active: Whether the truth is not zero, boolean; or None.
        prob_active: Share of draws that are not zero; or None.
        num_samples: Draws.

    Example:
        >>> z = torch.randn(51, 1000, 2, generator=torch.Generator().manual_seed(0))
        >>> right, narrow = (Calibration.from_draws(z[0], s * z[1:]) for s in (1.0, 0.7))
        >>> right.p_value > 0.01, narrow.p_value < 1e-6
        (True, True)
        >>> narrow.coverage(0.9).share < 0.8
        True
    """

    pit: Tensor
    pit_active: Tensor | None
    active: Tensor | None
    prob_active: Tensor | None
    num_samples: int

    @classmethod
    def from_draws(
        cls,
        truth: Tensor,
        draws: Tensor,
        *,
        atom: bool | None = None,
        tolerance: float | Tensor = 0.0,
        generator: torch.Generator | None = None,
    ) -> Calibration:
        r"""Rank true values among draws, ties broken at random.

        With :math:`L` draws below the truth, :math:`E` equal to it and :math:`S` in all,
        :math:`u = (L + V (E + 1)) / (S + 1)` for :math:`V \sim U(0, 1)`.

        Args:
            truth: Shape ``(simulations, *event)``, drawn from the prior.
            draws: Of their posteriors given the data that were drawn at the truth, shape
                ``(num_samples, simulations, *event)``. Those of a Markov chain have to be thinned
                until they are nearly independent.
            atom: Whether zero has a probability; default whether a truth or draw is zero.
            tolerance: Difference up to which values count as equal; broadcastable to ``truth``.
            generator: Of the random ties; torch's global one by default.

        Raises:
            TypeError: If an argument is of the wrong kind.
            ValueError: If the shapes do not fit, or a value is not finite.

        References:
            Talts et al. (2018), arXiv:1804.06788; ties: Modrak et al. (2023), Bayesian Anal., sec.
            2.2.
        """
        for name, value in (("truth", truth), ("draws", draws)):
            check_tensor(name, value)
            if not bool(value.isfinite().all()):
                raise ValueError(f"Expected {name} to be finite.")
        if truth.dim() == 0 or truth.numel() == 0 or draws.shape[1:] != truth.shape:
            raise ValueError(
                "Expected truth of shape (simulations, *event) and draws of shape (num_samples, "
                f"simulations, *event), got {tuple(truth.shape)} and {tuple(draws.shape)}."
            )
        if atom is None:
            atom = bool((truth == 0).any() or (draws == 0).any())
        counts = Counts(truth.reshape(len(truth), -1), atom, tolerance)
        counts.add(draws.reshape(*draws.shape[:2], -1))
        return counts.calibration(generator)

    @property
    def ranks(self) -> Tensor:
        """Randomised ranks, whole numbers from 0 to ``num_samples``; shape of ``pit``."""
        return (self.pit * (self.num_samples + 1)).long().clamp(max=self.num_samples)

    @cached_property
    def p_values(self) -> dict[str, Tensor]:
        """Of each element, shape ``(elements,)``: what would rarely come of a right posterior.

        ``"ranks"`` asks whether ``pit`` is uniform, ``"ranks of active"`` whether ``pit_active``
        is, and ``"number active"`` whether as many truths are active as were said to be.
        """
        found = {"ranks": _each(self.pit)}
        if self.active is not None and self.prob_active is not None and self.pit_active is not None:
            found["ranks of active"] = _each(self.pit_active)
            share = self._share(self.prob_active, self.active)
            tests = [count_p_value(p, int(a.sum())) for p, a in zip(share.T, self.active.T)]
            found["number active"] = torch.tensor(tests, dtype=torch.float64)
        return found

    @property
    def p_value(self) -> float:
        """Smallest of all, times their number, at most 1."""
        every = torch.cat([*self.p_values.values()])
        return min(1.0, float(every.min()) * len(every))

    def coverage(self, level: float = 0.9, *, active: bool = False) -> Coverage:
        """How often central intervals hold the truth.

        Ends that fall on the atom hold their share of it, so that coverage can be exact.

        Args:
            level: Probability of the interval, in (0, 1).
            active: Of active codes alone: intervals of the posterior given that the code is.

        Raises:
            TypeError: If ``level`` is no number.
            ValueError: If it is out of range, or there is no atom to speak of.
        """
        check_real("level", level, 0.0, 1.0, open_low=True)
        pit = self.pit_active if active else self.pit
        if pit is None:
            raise ValueError("Expected values with an atom at zero. Leave out active=True.")
        there = ~pit.isnan()
        inside = ((pit - 0.5).abs() <= level / 2) & there
        count = int(there.sum())
        if not count:
            return Coverage(level, math.nan, math.nan, 0)
        share = float(inside.sum()) / count
        each = (inside.double() - share * there.double()).sum(1)
        return Coverage(level, share, float(each.square().sum().sqrt()) / count, count)

    def _share(self, prob: Tensor, active: Tensor) -> Tensor:
        """Of truth and draws together: each is as likely as any other to be the truth."""
        total = prob * self.num_samples + active.to(prob)
        return (total / (self.num_samples + 1)).clamp(0, 1)

    def reliability(self, **options: Any) -> Reliability:
        """Calibration of P(active), see ``reliability``, whose options it takes.

        The share of active ones among truth and draws together is what an exact posterior is
        calibrated in, however few the draws: that of the draws alone is noisy, and codes that seem
        active are less often so. Where a probability is known in closed form, hand that to
        ``reliability``.

        Raises:
            ValueError: If values have no atom at zero.
        """
        if self.prob_active is None or self.active is None:
            raise ValueError("Expected values with an atom at zero, got none.")
        share = self._share(self.prob_active, self.active)
        return reliability(share, self.active, **options)


def _each(pit: Tensor) -> Tensor:
    """P-values of columns, without what is missing; 1 where nothing is left."""
    columns = [column[~column.isnan()] for column in pit.T]
    found = [uniform_p_value(column) if len(column) > 1 else 1.0 for column in columns]
    return torch.tensor(found, dtype=torch.float64)


class Counts:
    """Draws below and equal to true values, counted as they come.

    Args:
        truth: Shape ``(simulations, elements)``.
        atom: Whether zero has a probability.
        tolerance: Difference up to which values count as equal; broadcastable to ``truth``.
    """

    def __init__(self, truth: Tensor, atom: bool, tolerance: float | Tensor = 0.0) -> None:
        self.truth, self.atom, self.tolerance = truth, atom, tolerance
        self.num_samples = 0
        zero = torch.zeros(truth.shape, dtype=torch.long, device=truth.device)
        self.below, self.equal, self.active, self.active_below = (zero.clone() for _ in range(4))

    def add(self, draws: Tensor) -> None:
        """Count draws, shape ``(some, simulations, elements)``."""
        self.num_samples += len(draws)
        difference = draws - self.truth
        below = difference < -self.tolerance
        self.below += below.sum(0)
        self.equal += (difference.abs() <= self.tolerance).sum(0)
        if self.atom:
            active = draws != 0
            self.active += active.sum(0)
            self.active_below += (active & below).sum(0)

    def calibration(self, generator: torch.Generator | None = None) -> Calibration:
        """What the counts say."""

        def spread(below: Tensor, equal: Tensor | int, total: Tensor | int) -> Tensor:
            level = torch.rand(
                self.truth.shape,
                dtype=torch.float64,
                generator=generator,
                device=self.truth.device,
            )
            return (below + level * (equal + 1)) / (total + 1)

        pit = spread(self.below, self.equal, self.num_samples)
        if not self.atom:
            return Calibration(pit, None, None, None, self.num_samples)
        truth = self.truth != 0
        known = truth & (self.active >= FEWEST_ACTIVE)
        equal = torch.where(truth, self.equal, 0)  # none but by rounding
        among = spread(self.active_below, equal, self.active)
        among = torch.where(known, among, torch.nan)
        return Calibration(
            pit, among, truth, self.active.double() / self.num_samples, self.num_samples
        )
