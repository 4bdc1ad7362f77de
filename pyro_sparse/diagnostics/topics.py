"""Topics of a report, one function each: from what a diagnostic found to a verdict and advice."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_sparse.diagnostics.amortisation import AmortisationGap
from pyro_sparse.diagnostics.calibration import Calibration, Coverage, Reliability
from pyro_sparse.diagnostics.dictionary import DictionarySummary, Stability
from pyro_sparse.diagnostics.finding import Finding, Thresholds, Verdict
from pyro_sparse.diagnostics.predictive import PredictiveCheck
from pyro_sparse.diagnostics.recovery import Recovery
from pyro_sparse.diagnostics.sbc import SBC
from pyro_sparse.infer.findings import NotAsked
from pyro_sparse.infer.history import History

LEVEL = 0.9
"""Probability of the intervals whose coverage is looked at."""

FEWEST_STEPS = 50
"""Steps of a training from which its end can be judged: a tenth of them are five."""

FEWEST_EPOCHS = 6
"""Epochs from which their means are compared, in place of steps."""

_Array = np.ndarray[Any, Any]


def training(history: History, limits: Thresholds) -> Finding:
    """Has the loss come to rest, and was nothing skipped or undone?"""
    steps = np.asarray(history.step_loss, dtype=float)
    if len(steps) < FEWEST_STEPS:
        raise NotAsked(f"needs a history of at least {FEWEST_STEPS} steps, got {len(steps)}")
    source = "Kass & Raftery (1995): 1 nat; a tenth of it asks for attention"
    if not np.isfinite(steps[-(len(steps) // 10) :]).any():
        return Finding(
            "training", "problem", "the loss at the end is not finite", source=source,
            advice="Lower the learning rate, look at history.faults, and train again.",
        )  # fmt: skip
    fall, se = _fall_at_the_end(steps, np.asarray(history.epoch_loss, dtype=float))
    sure = abs(fall) > 2 * se
    seen = (
        f"over the last tenth of {len(steps)} steps the loss "
        f"{'fell' if fall >= 0 else 'rose'} by {abs(fall):.2g} +- {se:.1g} nats per datum"
    )
    rise = 0.0
    if len(history.validation_loss) > 1:
        rise = history.validation_loss[-1] - min(history.validation_loss)
        seen += f"; validation is {rise:.2g} above its best"
    if history.faults:
        seen += f"; {len(history.faults)} steps were not finite"
    size = max(abs(fall) if sure else 0.0, rise)
    verdict = _graded(size, limits.nats)
    advice = ""
    if verdict != "fine":
        advice = (
            "Overfitted: stop early (EarlyStopping), or learn less of the model or guide."
            if rise >= size
            else "Not at rest: train longer, or let the learning rate fall at the end."
            if fall > 0
            else "The loss rises: lower the learning rate, unless a weight is still warming up."
        )
    elif 2 * se > limits.nats:
        verdict = "attention"
        advice = "Minibatches are too noisy to tell: train more epochs, or validate."
    elif history.faults:
        verdict = "attention"
        advice = "Read history.faults; a lower learning rate often helps."
    value = max(abs(fall), rise)
    return Finding("training", verdict, seen, value, limits.nats, source, advice)


def codes(prob: Tensor, limits: Thresholds) -> Finding:
    """How many codes are active, in doubt, and whether any are at all."""
    flat = prob.double().reshape(len(prob), -1)
    if bool((flat == 1).all()):
        raise NotAsked("the law of the codes has no exact zeros, so all are active")
    active, doubt = float(flat.sum(1).mean()), float(((flat > 0.1) & (flat < 0.9)).sum(1).sum())
    doubt = doubt / len(flat)
    seen = (
        f"{active:.2g} of {flat.shape[1]} codes of a datum are active (sum of P(active)), "
        f"{doubt:.2g} in doubt (P from 0.1 to 0.9)"
    )
    empty = float((flat.amax(1) < 0.5).double().mean())
    if empty > 0.5:
        return Finding(
            "codes", "problem" if empty > 1 - limits.few else "attention",
            f"{seen}; {empty:.0%} of the data have none with P > 0.5", empty, 0.5,
            "half of the data",
            "Codes may have collapsed: look at the noise scale, the prior, warm up the KL.",
        )  # fmt: skip
    return Finding("codes", "fine", seen, empty, 0.5, "half of the data without a code of P > 0.5")


def atoms(summary: DictionarySummary, limits: Thresholds) -> Finding:
    """Dead and duplicate atoms."""
    number = len(summary.usage)
    dead = dead_atoms(summary, limits)
    alike = len(set(summary.duplicates[:, 1].tolist()))
    faulty = (int(dead.sum()) + alike) / number
    seen = (
        f"{int(dead.sum())} of {number} dead, {alike} duplicate another (correlation >= "
        f"{limits.alike:g}); {summary.effective_atoms:.3g} carry the energy"
    )
    verdict: Verdict = "fine" if faulty == 0 else "problem" if faulty > limits.few else "attention"
    advice = []
    if dead.any():
        advice.append(f"Leave out or restart dead atoms {_numbers(dead.nonzero()[:, 0])}.")
    if alike:
        pairs = ", ".join(f"{i}={j}" for i, j in summary.duplicates[:3].tolist())
        more = ", ..." if len(summary.duplicates) > 3 else ""
        advice.append(f"Fewer atoms, or merge {pairs}{more}: which of two is active means nothing.")
    source = f"any asks for attention, more than {limits.few:.0%} are a problem (argument few)"
    return Finding("atoms", verdict, seen, faulty, limits.few, source, " ".join(advice))


def dead_atoms(summary: DictionarySummary, limits: Thresholds) -> Tensor:
    """Hardly ever active, or carrying next to nothing; boolean, shape ``(atoms,)``."""
    return summary.dead | (summary.energy < limits.usage)


def recovery(found: Recovery, limits: Thresholds) -> Finding:
    """Which of the true atoms were found?"""
    share = float((found.correlation >= limits.found).double().mean())
    seen = (
        f"{share:.0%} of {len(found.correlation)} true atoms found (correlation >= "
        f"{limits.found:g}), mean correlation {float(found.correlation.mean()):.3f}"
    )
    missed = 1 - share
    verdict: Verdict = (
        "fine" if missed <= limits.few else "attention" if missed <= 0.5 else "problem"
    )
    advice = "" if verdict == "fine" else "More data or steps, another start, or more atoms."
    source = "Aharon, Elad & Bruckstein (2006): 0.99"
    return Finding("true atoms", verdict, seen, missed, limits.few, source, advice)


def other_seeds(found: Stability, limits: Thresholds) -> Finding:
    """Do trainings from other seeds find the same atoms?"""
    missed = 1 - found.worst
    seen = (
        f"of two of {len(found.found)} trainings {found.worst:.0%} of the atoms agree at worst "
        f"(correlation >= {limits.alike:g})"
    )
    verdict: Verdict = (
        "fine" if missed <= limits.few else "attention" if missed <= 0.5 else "problem"
    )
    advice = "" if verdict == "fine" else "Do not interpret atoms on which trainings differ."
    source = "share few of the atoms (argument); half is a problem"
    return Finding("other seeds", verdict, seen, missed, limits.few, source, advice)


def weights(shape: Tensor, num_samples: int, limits: Thresholds) -> Finding:
    """Could draws of the guide be reweighted to the posterior?"""
    good = limits.good_khat(num_samples)
    share, beyond = (float((shape > level).double().mean()) for level in (good, 1.0))
    seen = f"k-hat is above {good:.2f} for {share:.0%} of {len(shape)} data, above 1 for "
    seen += f"{beyond:.0%}"
    verdict: Verdict = "fine" if share <= limits.few else "attention" if share <= 0.5 else "problem"
    advice = (
        ""
        if verdict == "fine"
        else "The joint posterior is off (single codes: see calibration). Dependent codes "
        "(StructuredThresholded), guide.refine, or more training."
    )
    source = "Vehtari et al. (2024): min(1 - 1 / log10 S, 0.7); of more than half a problem"
    return Finding("weights", verdict, seen, share, limits.few, source, advice)


def predictive(check: PredictiveCheck, limits: Thresholds) -> Finding:
    """Do data look like those that the model makes at its posterior?"""
    effects = {name: predictive_effect(check, name) for name in check.replicated}
    wrong = [
        name for name, p in check.overall.items() if not limits.p_value <= p <= 1 - limits.p_value
    ]
    large = [name for name in wrong if abs(effects[name]) >= limits.effect]
    source = f"Gelman et al. (2013): {limits.p_value:g}; size: Cohen (1988)"
    if not wrong:
        name = max(effects, key=lambda name: abs(effects[name]))
        seen = (
            f"no statistic is unlike the model; furthest {name}, p = {check.overall[name]:.3g}, "
            f"{effects[name]:+.2f} sd"
        )
        return Finding("predictive", "fine", seen, abs(effects[name]), limits.effect, source)
    worst = max(large or wrong, key=lambda name: abs(effects[name]))
    listed = ", ".join(
        f"{name} (p = {check.overall[name]:.3g}, {effects[name]:+.2f} sd)"
        for name in sorted(wrong, key=lambda name: -abs(effects[name]))[:3]
    )
    verdict: Verdict = "problem" if large else "attention"
    advice = (
        "Too small to matter much; more data made it visible."
        if not large
        else "Wrong noise (scale or family), prior, or guide: learn the noise, look at residuals."
    )
    seen = f"data are unlike the model in {listed}"
    return Finding("predictive", verdict, seen, abs(effects[worst]), limits.effect, source, advice)


def predictive_effect(check: PredictiveCheck, name: str) -> float:
    """Mean of the data minus that of replicates, in sd of the replicates over the data."""
    again = check.replicated[name]
    spread = float(again.std(-1).mean()) if again.shape[-1] > 1 else float(again.std(0).mean())
    difference = float(check.observed[name].mean() - again.mean())
    return difference / spread if spread > 0 else math.copysign(math.inf, difference or 1.0)


def calibration(found: SBC, limits: Thresholds) -> Finding:
    """Is the guide the posterior, on data of the model?"""
    covered = {name: _coverage(site) for name, site in found.sites.items()}
    covered = {name: cover for name, cover in covered.items() if cover.number}

    def rank(name: str) -> tuple[bool, float]:  # what is no noise comes first
        far = abs(covered[name].share - LEVEL)
        return far > 3 * _se(covered[name]), far

    name = max(covered, key=rank, default="")
    worst = covered.get(name)
    off = 0.0 if worst is None else abs(worst.share - LEVEL)
    seen = f"{found.num_simulations} simulations, p {_p(found.p_value)} of all tests"
    if worst is not None:
        seen += f"; {LEVEL:.0%} intervals hold {worst.share:.0%} +- {_se(worst):.0%} ({name})"
    large = worst is not None and off > limits.calibration and off > 3 * _se(worst)
    verdict: Verdict = "problem" if large else "attention" if found.alarm else "fine"
    advice = ""
    if verdict != "fine":
        how = "wide" if worst is not None and worst.share > LEVEL else "sure of itself"
        advice = (
            f"The guide is too {how}. Dependent codes, a richer encoder, guide.refine."
            if large
            else "Not exact, but intervals are near what they claim."
        )
    source = (
        f"Talts et al. (2018); level {found.level:g}; coverage within "
        f"{limits.calibration:g} (argument calibration)"
    )
    return Finding("calibration", verdict, seen, off, limits.calibration, source, advice)


def prob_active(curve: Reliability, origin: str, limits: Thresholds) -> Finding:
    """Are codes active as often as they are said to be?"""
    share = float((curve.frequency * curve.count).sum() / curve.count.sum())
    limit = min(limits.calibration, share / 4)
    gap = (curve.frequency - curve.prob).abs()
    far = (gap > limits.calibration) & (gap > 3 * curve.se)
    surely = curve.ece - curve.ece_of_noise > 2 * curve.ece_se
    seen = (
        f"{origin}: expected calibration error {curve.ece:.3f} +- {curve.ece_se:.3f} (noise alone "
        f"{curve.ece_of_noise:.3f}; {share:.1%} are active)"
    )
    verdict: Verdict = (
        "problem" if curve.ece > limit and surely else "attention" if far.any() else "fine"
    )
    advice = ""
    if verdict != "fine":
        at = int(torch.where(far if far.any() else gap >= 0, gap, -1.0).argmax())
        advice = (
            f"Of codes said to be active with P = {curve.prob[at]:.2f}, "
            f"{curve.frequency[at]:.2f} are: read P(active) with that in mind, or a better guide."
        )
    source = "the smaller of argument calibration and a quarter of the share of active codes"
    return Finding("P(active)", verdict, seen, curve.ece, limit, source, advice)


def true_codes(found: Calibration, limits: Thresholds) -> Finding:
    """Do intervals hold the true codes of these very data?"""
    cover = _coverage(found)
    if not cover.number:
        raise NotAsked("needs true codes that are active, with enough active draws")
    off, se = abs(cover.share - LEVEL), _se(cover)
    kind = "of active codes " if found.pit_active is not None else ""
    seen = f"{LEVEL:.0%} intervals {kind}hold {cover.share:.1%} +- {se:.1%} of the true codes"
    verdict, advice = _beyond(off, limits.calibration, se)
    if off > limits.calibration and verdict != "fine":
        how = "narrow" if cover.share < LEVEL else "wide"
        advice = f"Intervals are too {how}: a richer guide, or another noise scale or prior."
    source = "argument calibration"
    return Finding("true codes", verdict, seen, off, limits.calibration, source, advice)


def amortisation(gap: AmortisationGap, limits: Thresholds) -> Finding:
    """What does the encoder give away?"""
    mean = float(gap.amortisation.mean())
    se = float(gap.se.square().sum().sqrt()) / len(gap.se)
    seen = (
        f"refining each of {len(gap.bound)} data gains at least {mean:.2g} +- {se:.1g} nats a "
        f"datum; largest {float(gap.amortisation.max()):.2g}"
    )
    verdict = _graded(mean if mean > 2 * se else 0.0, limits.nats)
    advice = "" if verdict == "fine" else "More layers or training of the encoder, or guide.refine."
    source = "Kass & Raftery (1995): 1 nat; a tenth of it asks for attention"
    return Finding("amortisation", verdict, seen, mean, limits.nats, source, advice)


def optimality(excess: float, certified: float, limits: Thresholds) -> Finding:
    """How far are codes of a point estimate from the MAP codes?"""
    seen = (
        f"codes lie {excess:.2g} nats a datum above the minimum of the objective (known to a "
        f"relative gap of {certified:.0e})"
    )
    verdict = _graded(excess, limits.nats)
    advice = "" if verdict == "fine" else "More layers, or solvers.solve for MAP codes."
    source = "Kass & Raftery (1995): 1 nat; a tenth of it asks for attention"
    return Finding("optimality", verdict, seen, excess, limits.nats, source, advice)


def _graded(size: float, limit: float) -> Verdict:
    return "problem" if size > limit else "attention" if size > limit / 10 else "fine"


def _beyond(size: float, limit: float, se: float) -> tuple[Verdict, str]:
    """Verdict on a number with noise; and what to do where there is too much of that."""
    if size > limit and size > 2 * se:
        return ("problem" if size > 3 * se else "attention"), ""
    if se > limit:
        return "attention", "Too few to tell: more data, or simulations."
    return "fine", ""


def _se(cover: Coverage) -> float:
    """Of a share, no less than it would be if the level held: a share of one has none of itself."""
    return max(cover.se, math.sqrt(LEVEL * (1 - LEVEL) / cover.number))


def _coverage(found: Calibration) -> Coverage:
    return found.coverage(LEVEL, active=found.pit_active is not None)


def _fall_at_the_end(steps: _Array, epochs: _Array) -> tuple[float, float]:
    """By how much a loss fell over the last tenth of a training, and its standard error.

    Epochs see the same data, so their means differ by less than those of minibatches: they are
    compared where there are enough.
    """
    late = epochs[-max(FEWEST_EPOCHS, len(epochs) // 4) :]
    if len(late) >= FEWEST_EPOCHS and np.isfinite(late).all():
        width = max(1, len(epochs) // 10)
        tenth = len(epochs) / 10 / width  # of few epochs one is more than that
        fall = epochs[-2 * width : -width].mean() - epochs[-width:].mean()
        noise = np.square(np.diff(late, 2)).mean() / 6  # what is left of a straight line
        return float(tenth * fall), float(tenth * math.sqrt(2 * noise / width))
    width = len(steps) // 10
    windows = [part[np.isfinite(part)] for part in (steps[-2 * width : -width], steps[-width:])]
    if min(map(len, windows)) < 2:
        return 0.0, math.inf
    variance = 0.0
    for window in windows:  # neighbours depend on each other; means of blocks hardly do
        blocks = [block.mean() for block in np.array_split(window, min(10, len(window)))]
        variance += float(np.var(blocks, ddof=1)) / len(blocks)
    return float(windows[0].mean() - windows[1].mean()), math.sqrt(variance)


def _p(value: float) -> str:
    return f"= {value:.2g}" if value >= 1e-10 else "< 1e-10"


def _numbers(index: Tensor) -> str:
    listed = ", ".join(str(k) for k in index[:6].tolist())
    return f"{listed}, ..." if len(index) > 6 else listed
