"""What a report is made of: findings, and the thresholds that they are held against."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pyro_sparse.diagnostics.dictionary import ALIKE
from pyro_sparse.infer.numbers import check_real

Verdict = Literal["problem", "attention", "fine", "not asked"]


@dataclass(frozen=True)
class Finding:
    """One topic of a report.

    Attributes:
        topic: What was asked about.
        verdict: ``"fine"``, ``"attention"`` (to be kept in mind or looked into), ``"problem"``, or
            ``"not asked"``.
        seen: What was measured, in words; where nothing was asked, what that needs.
        value: The number that was judged, None if there is none.
        threshold: What it was held against.
        source: Where the threshold comes from.
        advice: What follows and what to try; empty where all is fine.

    Example:
        >>> Finding("atoms", "not asked", "needs atoms=").verdict
        'not asked'
    """

    topic: str
    verdict: Verdict
    seen: str
    value: float | None = None
    threshold: float | None = None
    source: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Thresholds:
    """What a report holds its numbers against, each with the source of its default.

    Attributes:
        khat: Pareto shape from which weights are not to be relied on; None for
            ``min(1 - 1 / log10(num_samples), 0.7)`` (Vehtari et al. 2024, J. Mach. Learn. Res.
            25(72)).
        nats: Loss of evidence per datum that is a problem; a tenth of it asks for attention.
            Default 1: less is "not worth more than a bare mention" (Kass & Raftery 1995, J. Am.
            Stat. Assoc. 90(430), sec. 3.2).
        p_value: Tail probability of a predictive check from which data are unlike the model
            (Gelman et al. 2013, Bayesian Data Analysis, sec. 6.3).
        effect: Difference between data and replicates, in standard deviations over the data, from
            which an unlikeness is large enough to be a problem. Default 0.2, a "small" effect
            (Cohen 1988, Statistical Power Analysis, sec. 2.2).
        calibration: By how much probabilities may be off: coverage of 90 % intervals, and expected
            calibration error of P(active), which has to be below a quarter of the share of active
            codes as well, or saying "never" would pass for rare ones. A choice of this library.
        few: Share of data or atoms with a fault up to which attention is enough. A choice of this
            library.
        usage: Share of the codes, or of their energy, below which an atom is dead; as in
            ``dictionary_summary``.
        alike: Correlation from which two atoms are duplicates; as in ``dictionary_summary``.
        found: Correlation from which a true atom counts as found (Aharon, Elad & Bruckstein 2006,
            IEEE Trans. Signal Process. 54(11), sec. V).

    Raises:
        TypeError: If one is no number.
        ValueError: If one is out of range.

    Example:
        >>> Thresholds(nats=0.5).nats
        0.5
    """

    khat: float | None = None
    nats: float = 1.0
    p_value: float = 0.01
    effect: float = 0.2
    calibration: float = 0.05
    few: float = 0.05
    usage: float = 1e-4
    alike: float = ALIKE
    found: float = 0.99

    def __post_init__(self) -> None:
        if self.khat is not None:
            check_real("khat", self.khat, -math.inf, 1.0)
        for name in ("nats", "effect"):
            check_real(name, getattr(self, name), 0.0, math.inf, open_low=True)
        check_real("p_value", self.p_value, 0.0, 0.5, open_low=True)
        for name in ("calibration", "few", "usage", "alike", "found"):
            check_real(name, getattr(self, name), 0.0, 1.0)

    def good_khat(self, num_samples: int) -> float:
        """Of so many draws."""
        return min(1 - 1 / math.log10(num_samples), 0.7) if self.khat is None else self.khat
