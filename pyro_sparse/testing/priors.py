"""Is a prior what models, guides and solvers take it for?"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_sparse import distributions
from pyro_sparse.distributions import Law, Prior, codes_prior, conjugate, match, penalty, prox
from pyro_sparse.distributions.priors import name_of
from pyro_sparse.infer.findings import NotAsked
from pyro_sparse.testing.advice import Advice, Failed, gather, short
from pyro_sparse.testing.densities import (
    Integral,
    Weighed,
    integrate,
    log_density,
    share_of_zeros,
    uniformity,
    weigh,
)
from pyro_sparse.testing.saving import check_saving_law

_LARGEST = 64
_NUM_DRAWS = 50_000
_TOLERANCE = 2e-3
"""Of integrals: a density that jumps where nobody expects it is integrated less well than this."""
_LEVEL = 1e-7
"""Probability, for each element, that draws of the right law are taken for those of another."""
_SIGMAS = 6.0
"""The same in standard errors, where draws are compared by means."""


def check_prior(
    prior: Prior,
    *,
    rate: Tensor | float | None = None,
    code_shape: tuple[int, ...] | None = None,
) -> Advice:
    """Check a prior: its density against its draws, and what a solver asks against its density.

    Checked are shapes; that it expands, as a model expands it to its codes; that its own draws are
    accepted; that the density integrates to one, with an atom at zero counted; that draws, ``cdf``,
    ``mean`` and ``variance`` are those of the density; that ``mode`` is one; that ``penalty``,
    ``prox`` and ``conjugate`` are what their definitions say, by brute force; that gradients are
    those of ``log_prob``; that it can be saved. Numbers are compared in float64, where ``solve``
    compares them too. Torch's random state is left as it was; draws are from one seed, so that
    the answer is always the same, and right draws are refused for less than one seed in 10,000.

    Args:
        prior: A distribution, or a callable of ``rate``, as for a model. Of at most 64 numbers a
            draw: check a law of few codes, and it is right for many.
        rate: What the callable is given, shape ``()`` or ``(atoms,)``.
        code_shape: Shape of one datum's codes. Default for a callable ``(atoms,)``, of three atoms
            if the rate is one number; a distribution is taken as it is.

    Returns:
        The findings; print them, or ``.raise_if_failed()`` in a test. What a prior does not have
        is not asked, and said to be missing where somebody needs it.

    Raises:
        TypeError: If it is no prior, as ``distributions.check_prior`` tells.
        ValueError: If it holds a tensor that requires a gradient, does not expand to
            ``code_shape``, or is of more than 64 numbers.

    Example:
        >>> import pyro.distributions as dist
        >>> advice = check_prior(dist.Laplace(0.0, 0.5))
        >>> advice.ok
        True
        >>> next(found for found in advice.findings if found.check == "prox").advice
        'the minimiser, at 13 values and 3 steps'
    """
    distributions.check_prior(prior, has_rate=rate is not None)
    given = None if rate is None else torch.as_tensor(rate).detach()
    if given is not None and not given.is_floating_point():
        given = given.to(torch.get_default_dtype())
    law = _law_of(prior, given, code_shape)
    size = law.batch_shape.numel() * law.event_shape.numel()
    if size > _LARGEST:
        raise ValueError(
            f"Expected a prior of at most {_LARGEST} numbers a draw, got {size}. Check one of "
            "fewer codes: batch shape () or (3,)."
        )
    with torch.random.fork_rng():
        battery = _Battery(prior, law, given, code_shape)
        return gather(
            name_of(law),
            {
                "shapes": battery.shapes,
                "expand": battery.expand,
                "own draws": battery.own_draws,
                "integral": battery.integral,
                "draws": battery.draws_agree,
                "cdf": battery.cdf,
                "moments": battery.moments,
                "mode": battery.mode,
                "penalty": battery.penalty,
                "prox": battery.prox,
                "conjugate": battery.conjugate,
                "gradient": battery.gradient,
                "save and load": lambda: check_saving_law(prior, law),
            },
        )


def _law_of(prior: Prior, rate: Tensor | None, code_shape: tuple[int, ...] | None) -> Law:
    if rate is None:
        if code_shape is None:
            return prior  # type: ignore[return-value]
        held = (tensor for _, tensor in _tensors(prior) if tensor.is_floating_point())
        return codes_prior(prior, None, code_shape, like=next(held, torch.empty(0)))
    return codes_prior(prior, rate, code_shape or tuple(rate.shape) or (3,), like=rate)


class _Battery:
    """A prior as it is, and as a law of independent entries in float64, with draws of it."""

    def __init__(
        self, prior: Prior, law: Law, rate: Tensor | None, code_shape: tuple[int, ...] | None
    ) -> None:
        self.given, self.whole, self.rate, self.code_shape = prior, law, rate, code_shape
        like = law.sample().new_empty(0, dtype=torch.float64)
        self.law = _entries(match(law, like))
        self.ones = [1] * len(self.law.event_shape)

    @functools.cached_property
    def draws(self) -> Tensor:
        """Shape ``(draws, *batch_shape, *event_shape)``."""
        torch.manual_seed(0)
        return self.law.sample((_NUM_DRAWS,)).detach()

    @functools.cached_property
    def is_zero(self) -> Tensor:
        """Which draws are exactly zero, all codes of an event; ``(draws, *batch_shape)``."""
        zero = self.draws == 0
        return zero.flatten(zero.dim() - len(self.ones)).all(-1) if self.ones else zero

    @functools.cached_property
    def centre(self) -> Tensor:
        """Median of the draws that are not zero; shape of one draw."""
        return self._of_active(self.draws, 0.5)

    @functools.cached_property
    def scale(self) -> Tensor:
        """Their median distance from it, one where all are zero."""
        scale = self._of_active((self.draws - self.centre).abs(), 0.5)
        return torch.where(scale > 0, scale, 1.0)

    def _of_active(self, values: Tensor, level: float) -> Tensor:
        return values.masked_fill(self.draws == 0, torch.nan).nanquantile(level, 0).nan_to_num(0.0)

    @functools.cached_property
    def unit(self) -> Tensor:
        """One scale for all codes of an event, shape ``(*batch_shape, 1, ...)``."""
        if not self.ones:
            return self.scale
        mean = self.scale.flatten(-len(self.ones)).mean(-1)
        return mean.reshape((*mean.shape, *self.ones))

    @functools.cached_property
    def peak(self) -> Tensor | None:
        """Where the density is highest, as the law says; None where it does not."""
        try:
            peak: Tensor = self.law.mode
        except (NotImplementedError, AttributeError):
            return None
        if not bool(peak.isfinite().all()) or not bool(self.log_prob(peak).isfinite().all()):
            return None  # no density is highest, or everywhere the same
        return peak

    @functools.cached_property
    def integrated(self) -> Integral:
        if self.ones:
            raise NotAsked("Codes of an event are not independent.")
        at = self.centre if self.peak is None else self.peak.expand_as(self.centre)
        at = torch.where(at.isfinite() & (at != 0), at, self.centre)
        return integrate(self.law, at, self.scale, self.is_zero.any(0))

    @functools.cached_property
    def weighed(self) -> Weighed:
        if bool(self.is_zero.any()):
            raise NotAsked("Events have a mass at zero, and no density to integrate.")
        torch.manual_seed(1)
        found = weigh(self.law, self.draws)
        if not found.enough:
            raise NotAsked(
                f"Events of {self.law.event_shape.numel()} codes: too many to integrate over. "
                "Check a law of smaller events."
            )
        return found

    @property
    def has_penalty(self) -> bool:
        """Whether the type has a penalty of its own, for which no ``mode`` is needed."""
        return penalty.dispatch(type(self.law)) is not penalty.dispatch(object)

    def shapes(self) -> str:
        law = self.whole
        draws = law.sample((5, 2))
        expected = (5, 2, *law.batch_shape, *law.event_shape)
        if tuple(draws.shape) != expected:
            raise Failed(
                "Expected sample((5, 2)) of shape sample_shape + batch_shape + event_shape = "
                f"{expected}, got {tuple(draws.shape)}. self._extended_shape(sample_shape) is that."
            )
        found = tuple(law.log_prob(draws).shape)
        if found != expected[: 2 + len(law.batch_shape)]:
            raise Failed(
                "Expected log_prob of shape sample_shape + batch_shape = "
                f"{expected[: 2 + len(law.batch_shape)]}, got {found}: one number for each event."
            )
        if draws.requires_grad:
            raise Failed("Expected sample() to be detached; rsample() is what has a gradient.")
        return f"batch shape {tuple(law.batch_shape)}, event shape {tuple(law.event_shape)}"

    def expand(self) -> str:
        batch = (2, 3, *self.law.batch_shape)
        wide = self.law.expand(batch)
        torch.manual_seed(0)
        draws = wide.sample((100,))
        if tuple(draws.shape) != (100, *batch, *self.law.event_shape):
            raise Failed(
                f"Expected draws of shape {(100, *batch, *self.law.event_shape)} of the law "
                f"expanded to {batch}, got {tuple(draws.shape)}."
            )
        _compare(
            wide.log_prob(draws), self.law.log_prob(draws),
            "log_prob of the expanded law is that of the law",
        )  # fmt: skip
        active = draws[:, 0, 0] != 0
        others = (draws[:, 0, 1], draws[:, 1, 0], draws[:, 1, 1])
        same = [(draws[:, 0, 0] == other)[active].double().mean() for other in others]
        if any(float(share) > 0.5 for share in same):
            raise Failed(
                "Expected draws of the expanded law to be independent, got equal ones: draw with "
                "the extended shape, and do not copy."
            )
        return f"to {batch}"

    def own_draws(self) -> str:
        for draws, law in (
            (self.draws[:10_000], self.law),
            (self.whole.sample((1000,)), self.whole),
        ):
            if not bool(torch.isfinite(law.log_prob(draws)).all()):
                raise Failed(
                    "Expected a finite log_prob of the prior's own draws, got some that are not."
                )
            if not bool(law.support.check(draws).all()):
                raise Failed("Expected draws in the prior's own support, got some outside.")
        share = float(self.is_zero.double().mean())
        return f"accepted; {share:.3g} of them exactly zero" if share else "accepted"

    def integral(self) -> str:
        if self.ones:
            total, error = self.weighed.total, self.weighed.error
            allowed = _TOLERANCE + _SIGMAS * error
        else:
            total = self.integrated.total
            allowed = torch.full_like(total, _TOLERANCE)
        wrong = ~((total - 1).abs() <= allowed)  # nan is wrong too
        if bool(wrong.any()):
            atom = " with the mass at zero" if bool(self.is_zero.any()) else ""
            raise Failed(
                f"Expected a density that integrates to 1{atom}, got {_first(total, wrong):.6g}. "
                "What depends on a parameter of the prior must be there: rates are learned by it."
            )
        return f"1 within {float((total - 1).abs().max()):.1g}"

    def draws_agree(self) -> str:
        if self.ones:
            return self._draws_of_vectors()
        law = self.integrated
        rare = share_of_zeros(law, self.is_zero)
        wrong = ~(rare >= _LEVEL)
        if bool(wrong.any()):
            raise Failed(
                f"Expected a share of {_first(law.atom / law.total, wrong):.4g} zeros among draws, "
                f"by the density, got {_first(self.is_zero.double().mean(0), wrong):.4g} of "
                f"{_NUM_DRAWS} (p = {_first(rare, wrong):.1g})."
            )
        torch.manual_seed(1)
        found = uniformity(law, self.draws)
        if not bool((found >= _LEVEL).all()):
            mean = self.draws.mean(0)
            at = found.nan_to_num(-1.0).flatten().argmin()
            raise Failed(
                f"Expected draws of the density, got others (Kolmogorov-Smirnov, {_NUM_DRAWS} "
                f"draws, p = {float(found.flatten()[at]):.1g}): mean "
                f"{float(mean.flatten()[at]):.4g} and standard deviation "
                f"{float(self.draws.std(0).flatten()[at]):.4g}, by the density "
                f"{float(law.mean.flatten()[at]):.4g} and "
                f"{float(law.variance.sqrt().flatten()[at]):.4g}."
            )
        return f"those of the density, p = {float(found.min()):.2g}"

    def _draws_of_vectors(self) -> str:
        events, first = self.weighed.events, len(self.ones)
        asked: dict[str, Callable[[Tensor], Tensor]] = {
            "the log-density": lambda z: log_density(self.law, z)
        }
        for k in range(self.law.event_shape.numel()):
            asked[f"code {k}"] = functools.partial(_code, k, first)
            asked[f"the size of code {k}"] = functools.partial(_size, k, first)
        for name, function in asked.items():
            expected, error = self.weighed.expectation(function(events))
            got = function(self.draws)
            spread = (error.square() + got.var(0) / len(got)).sqrt()
            wrong = ~((got.mean(0) - expected).abs() <= _SIGMAS * spread)
            if bool(wrong.any()):
                raise Failed(
                    f"Expected draws of the density, got others: their mean of {name} is "
                    f"{_first(got.mean(0), wrong):.4g}, by the density "
                    f"{_first(expected, wrong):.4g} +- {_first(spread, wrong):.1g}."
                )
        return "means of codes, their sizes and the log-density are those of the density"

    def cdf(self) -> str:
        if self.ones:
            raise NotAsked("A law of events has none.")
        draws = self.draws[:1000]
        try:
            got = self.law.cdf(draws)
        except NotImplementedError:
            raise NotAsked("None: a slab of SpikeAndSlab needs it, nothing else does.") from None
        _compare(
            got, self.integrated.cdf(draws)[1], "cdf() is the integral of the density",
            tolerance=_TOLERANCE,
        )  # fmt: skip
        return "the integral of the density"

    def moments(self) -> str:
        if self.ones:
            raise NotAsked("Of a law of numbers only.")
        seen = []
        for name, expected in (
            ("mean", self.integrated.mean), ("variance", self.integrated.variance),
        ):  # fmt: skip
            try:
                got = getattr(self.law, name)
            except (NotImplementedError, AttributeError):
                continue
            unit = self.integrated.variance.sqrt() ** (1 if name == "mean" else 2)
            known = torch.isfinite(got) & (unit > 0)
            off = torch.where(known, (got - expected) / unit, 0.0)
            wrong = ~(off.abs() <= 5 * _TOLERANCE)
            if bool(wrong.any()):
                raise Failed(
                    f"Expected {name} {_first(expected, wrong):.6g}, by the density, got "
                    f"{_first(got, wrong):.6g}."
                )
            seen.append(name)
        if not seen:
            raise NotAsked("It states none: a slab of SpikeAndSlab needs them, nothing else does.")
        return f"{' and '.join(seen)} of the density"

    def mode(self) -> str:
        if self.peak is None:
            if not self.has_penalty and _answers(lambda: conjugate(self.law)):
                raise Failed(
                    "Expected a property `mode`: the penalty is measured from it, and a registered "
                    "conjugate belongs to that penalty."
                )
            raise NotAsked("None: a registered conjugate would need it.")
        _check_shape("mode", self.peak, self.centre)
        top = self.log_prob(self.peak)
        others = self.log_prob(self._around(self.peak.expand_as(self.centre)))
        highest = torch.maximum(others.amax(0), self.log_prob(self.draws).amax(0))
        wrong = ~(highest <= top + 1e-6 * (1 + top.abs().nan_to_num(posinf=0.0)))
        if bool(wrong.any()):
            raise Failed(
                f"Expected the highest density at the mode, got a log-density of "
                f"{_first(top, wrong):.6g} there and {_first(highest, wrong):.6g} elsewhere."
            )
        return "where the density is highest"

    def penalty(self) -> str:
        draws = self.draws[:1000]
        if self.peak is None and not self.has_penalty:
            raise NotAsked("None without `mode`, from which it is measured.")
        got = self._asked(lambda: penalty(self.law, draws), "penalty")
        constant = got + self.log_prob(draws)
        _compare(
            constant, constant[:1].expand_as(constant),
            "penalty() is -log_prob up to a constant",
        )  # fmt: skip
        if self.peak is None:
            raise NotAsked("-log_prob up to a constant; which one is not known without `mode`.")
        _compare(penalty(self.law, self.peak), torch.zeros_like(constant[0]), "it is 0 at the mode")
        return "-log_prob, from 0 at the mode"

    @torch.no_grad()
    def prox(self) -> str:
        torch.manual_seed(2)
        spread = torch.linspace(-6.0, 6.0, 13, dtype=torch.float64, device=self.centre.device) + 0.1
        if self.ones:
            spread = 4 * torch.randn(13, *self.centre.shape).to(self.centre)
        else:
            spread = spread.reshape(-1, *_ones(self.centre))
        v = self.centre + self.scale * spread  # (13, *batch_shape, *event_shape)
        steps = [factor * self.unit.square() for factor in (0.1, 1.0, 3.0)]
        self._asked(lambda: prox(self.law, v, steps[0]), "prox")
        for step in steps:
            self._check_prox(v, step)
        number = float(steps[1].mean())
        _compare(
            prox(self.law, v, number), prox(self.law, v, torch.full_like(steps[1], number)),
            "a step is a number, or a tensor that broadcasts",
        )  # fmt: skip
        narrow = v.to(self.whole.sample().dtype)
        found = prox(_entries(self.whole), narrow, steps[1].to(narrow.dtype))
        if found.dtype != narrow.dtype:
            raise Failed(f"Expected the dtype of the codes, {narrow.dtype}, got {found.dtype}.")
        return f"the minimiser, at {len(v)} values and {len(steps)} steps"

    def _check_prox(self, v: Tensor, step: Tensor) -> None:
        got = prox(self.law, v, step)
        _check_shape("prox", got, v)
        extra = [v, got - self.scale * (got - v).sign()]
        others = torch.cat([self._around(got, *extra), self._grid(v)])

        def objective(z: Tensor) -> Tensor:  # in units of the scale; (..., *batch_shape)
            distance = ((z - v).square() / (2 * self.unit.square())).expand(z.shape)
            distance = distance.flatten(-len(self.ones)).sum(-1) if self.ones else distance
            density = (step / self.unit.square()).reshape(self.law.batch_shape)
            return distance - density * self.log_prob(z)

        # Tensors of all candidates at all values at once would be large.
        own, (best, at) = objective(got), objective(others).min(0)
        wrong = ~(own <= best + 1e-7 * (1 + best.abs()))
        if not bool(wrong.any()):
            return
        where = tuple(wrong.nonzero()[0].tolist())
        better = others.expand(len(others), *v.shape)[(int(at[where]), *where)]
        same = torch.allclose(got, prox(self.law, v, 2 * step))
        raise Failed(
            f"Expected the minimiser of -step log p(z) + (z - v)^2 / 2: at v = {_say(v[where])} "
            f"and step = {float(step.expand_as(self.centre)[where[1:]].flatten()[0]):.4g}, "
            f"z = {_say(better)} makes it smaller than the prox's {_say(got[where])}."
            + (" The step does not change it: the penalty counts step times." if same else "")
        )

    @torch.no_grad()
    def conjugate(self) -> str:
        found = self._asked(lambda: conjugate(self.law), "conjugate")
        if self.peak is None:
            raise NotAsked("Asked together with `mode`, from which the penalty is measured.")
        return (self._of_vectors if self.ones else self._of_numbers)(found, self.peak)

    def _of_numbers(self, found: distributions.Conjugate, peak: Tensor) -> str:
        spread = torch.linspace(-6.0, 6.0, 25, dtype=torch.float64, device=self.centre.device)
        slope = spread.reshape(-1, *_ones(self.centre)) / self.scale
        slope = 0.999 * slope * found.feasible(slope)  # (25, *batch_shape)
        expected, at = self._supremum(slope, peak)
        got = found.value(slope)
        wrong = ~((got - expected).abs() <= 1e-6 * (1 + expected.abs()))
        if bool(wrong.any()):
            where = tuple(wrong.nonzero()[0].tolist())
            raise Failed(
                f"Expected g*(u) = sup of u z - g(z) = {float(expected[where]):.6g} at the slope "
                f"u = {float(slope[where]):.4g} (z = {float(at[where]):.4g} gives it), got "
                f"{float(got.expand_as(expected)[where]):.6g}; g is the penalty. Certificates of "
                "solve would be wrong."
            )
        for name, bound in (("lower", found.lower), ("upper", found.upper)):
            bound = bound.expand_as(self.centre)
            beyond = bound + 0.02 * (bound.abs() + 0.01 / self.scale) * (
                -1 if name == "lower" else 1
            )
            ends = bound.isfinite()
            reached, at = self._supremum(torch.where(ends, beyond, 0.0)[None], peak)
            far = (at - self.centre).abs() > 1e5 * self.scale
            if bool((ends & ~far[0] & reached[0].isfinite()).any()):
                raise Failed(
                    f"Expected g*(u) to be infinite beyond the {name} slope "
                    f"{_first(bound, ends & ~far[0]):.4g}, and it is "
                    f"{_first(reached[0], ends & ~far[0]):.4g}: with bounds too narrow the gap "
                    "never closes."
                )
        return f"the supremum, at {len(slope)} slopes"

    def _supremum(self, slope: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
        """Of ``slope * z - g(z)`` on grids that get finer, and where."""
        top = self.log_prob(peak)
        size = torch.logspace(-4, 6, 2001, dtype=torch.float64, device=slope.device)
        size = torch.cat([-size.flip(0), size.new_zeros(1), size])
        z = peak + self.scale * size.reshape(-1, 1, *_ones(self.centre))
        z = torch.cat([z, torch.zeros_like(z[:1])]).sort(0).values  # (grid, 1, *batch_shape)
        z = z.expand(-1, *slope.shape)
        best = at = slope
        for _ in range(4):
            values = slope * z + self.log_prob(z) - top
            best, index = values.max(0, keepdim=True)
            at, best = z.gather(0, index)[0], best[0]
            low = z.gather(0, (index - 1).clamp(min=0))
            high = z.gather(0, (index + 1).clamp(max=len(z) - 1))
            part = torch.linspace(0, 1, 201, dtype=torch.float64, device=slope.device)
            inner = low + (high - low) * part.reshape(-1, *_ones(slope))
            z = torch.cat([inner, at[None]]).sort(0).values
        return best, at

    def _of_vectors(self, found: distributions.Conjugate, peak: Tensor) -> str:
        torch.manual_seed(3)
        far = self.centre + 3 * self.scale * torch.randn(100, *self.centre.shape).to(self.centre)
        try:
            z = prox(self.law, far, self.unit.square())
        except NotImplementedError:
            raise NotAsked("Of events it is asked together with a prox.") from None
        slope = (far - z) / self.unit.square()  # a subgradient at z: there u z = g(z) + g*(u)
        total = found.value(slope).flatten(-len(self.ones)).sum(-1)
        inner = (slope * z).flatten(-len(self.ones)).sum(-1)
        top = self.log_prob(peak)
        if not bool((found.feasible(slope) >= 1 - 1e-6).all()):
            raise Failed(
                "Expected slopes of the penalty (value - prox) / step to be feasible, got some "
                "that are not: with bounds or a gauge too narrow the gap never closes."
            )
        _compare(
            total, inner - top + self.log_prob(z),
            "g*(u) = u z - g(z) at the slope u = (value - prox) / step of z = prox",
        )  # fmt: skip
        slope = 5 * slope
        slope = slope * found.feasible(slope)
        total = found.value(slope).flatten(-len(self.ones)).sum(-1)
        others = torch.cat([self.draws[:100], 1e3 * slope * self.unit.square(), 1e3 * far])
        for z in others:
            over = (slope * z).flatten(-len(self.ones)).sum(-1) + self.log_prob(z) - top - total
            if bool((over > 1e-6 * (1 + total.abs())).any()):
                raise Failed(
                    f"Expected g*(u) >= u z - g(z) for every z, exceeded by {float(over.max()):.4g}"
                    " at a slope that is said to be feasible. Certificates of solve would be wrong."
                )
        return f"attained, at {len(far)} slopes"

    def gradient(self) -> str:
        z = self.draws[:20]
        x = z.clone().requires_grad_()
        density = self.law.log_prob(x).sum()
        if density.requires_grad:  # not of a uniform law
            self._finite(torch.autograd.grad(density, x)[0], "draws")
        zero = torch.zeros_like(self.centre).requires_grad_()
        at_zero = log_density(self.law, zero)
        if bool(at_zero.isfinite().all()) and at_zero.requires_grad:
            self._finite(torch.autograd.grad(at_zero.sum(), zero)[0], "zero, where codes will be")
        if self.rate is None:
            named = [(n, t) for n, t in _tensors(self.law) if t.is_floating_point()]
            reached = [n for n, t in named if self._follows(n, t, functools.partial(self._with, n))]
        else:
            rate = self.rate.to(torch.float64)
            made = lambda t: _entries(_law_of(self.given, t, self.code_shape))  # noqa: E731
            reached = ["rate"] if self._follows("rate", rate, made) else []
        if not reached:
            raise NotAsked("No parameter changes the density.")
        return f"of {', '.join(reached)}, as by differences"

    def _follows(self, name: str, value: Tensor, made: Callable[[Tensor], Any]) -> bool:
        """Compare autograd by a parameter with differences; whether the density depends on it."""
        z = self.draws[:20]
        direction = torch.ones_like(value)

        def along(size: Tensor) -> Tensor:
            return made(value + size * direction).log_prob(z).sum()

        zero = torch.zeros((), dtype=torch.float64, device=value.device)

        def difference(size: float) -> float:
            return float(along(zero + size) - along(zero - size)) / (2 * size)

        try:
            with torch.no_grad():
                first, second = difference(1e-5), difference(5e-6)
        except ValueError:  # a probability of one has no neighbour above
            return False
        if not abs(first - second) <= 1e-4 * (1 + abs(first)):
            return False  # it jumps: signs, masks
        size = zero.clone().requires_grad_()
        total = along(size)
        got = torch.autograd.grad(total, size)[0] if total.requires_grad else zero
        if not abs(float(got) - first) <= 1e-4 * (1 + abs(first)):
            raise Failed(
                f"Expected a derivative of log_prob by {name} of {first:.6g}, by differences, got "
                f"{float(got):.6g} by autograd: is something detached, or made a number? It would "
                "not be learned."
            )
        return first != 0

    def _with(self, name: str, value: Tensor) -> Any:
        return _replaced(self.law, name.split("."), value)

    def _finite(self, gradient: Tensor, where: str) -> None:
        if not bool(torch.isfinite(gradient).all()):
            raise Failed(
                f"Expected a finite gradient of log_prob by the codes, got another at {where}: "
                "a root, a length or a logarithm has none at zero; torch.where before it."
            )

    def log_prob(self, value: Tensor) -> Tensor:
        return log_density(self.law, value)

    def _around(self, z: Tensor, *towards: Tensor) -> Tensor:
        """Events near ``z``, at distances of many sizes, shape ``(n, *z.shape)``."""
        size = torch.logspace(-5, 1, 25, dtype=z.dtype, device=z.device)
        if self.ones:
            directions = self.unit * torch.randn(30, *z.shape).to(z)
        else:
            directions = torch.stack([self.scale.expand_as(z), -self.scale.expand_as(z)])
        towards = (torch.zeros_like(z), *towards)
        directions = torch.cat([directions, torch.stack([t.expand_as(z) - z for t in towards])])
        near = z + size.reshape(-1, 1, *_ones(z)) * directions
        return torch.cat([near.flatten(0, 1), torch.stack([t.expand_as(z) for t in towards])])

    def _grid(self, v: Tensor) -> Tensor:
        """Numbers all over, shape ``(n, *v.shape)``; of events a few draws."""
        if self.ones:
            return self.draws[:50].unsqueeze(1).expand(50, *v.shape)
        grid = torch.linspace(-12.0, 12.0, 481, dtype=v.dtype, device=v.device)
        grid = self.centre + self.scale * grid.reshape(-1, 1, *_ones(self.centre))
        return grid.expand(len(grid), *v.shape)

    def _asked(self, question: Callable[[], Any], what: str) -> Any:
        try:
            return question()
        except NotImplementedError as why:
            if what != "prox" and not _answers(lambda: prox(self.law, self.centre, 1.0)):
                raise NotAsked("None: see prox.") from None
            raise NotAsked(short(why)) from None


def _answers(question: Callable[[], Any]) -> bool:
    try:
        question()
    except NotImplementedError:
        return False
    return True


def _entries(law: Any) -> Any:
    """The law of independent entries, where an event is made of them."""
    while isinstance(law, torch.distributions.Independent):
        law = law.base_dist
    return law


def _tensors(law: Any, prefix: str = "") -> list[tuple[str, Tensor]]:
    found = []
    for name, value in vars(law).items():
        if isinstance(value, Tensor):
            found.append((prefix + name, value))
        elif isinstance(value, torch.distributions.Distribution):
            found.extend(_tensors(value, f"{prefix}{name}."))
    return found


def _replaced(law: Any, path: list[str], value: Tensor) -> Any:
    law = copy.copy(law)
    inner = _replaced(getattr(law, path[0]), path[1:], value) if path[1:] else value
    vars(law)[path[0]] = inner
    return law


def _check_shape(name: str, got: Tensor, expected: Tensor) -> None:
    if got.shape != expected.shape:
        raise Failed(
            f"Expected {name} in the shape {tuple(expected.shape)}, got {tuple(got.shape)}."
        )


def _compare(got: Tensor, expected: Tensor, meaning: str, tolerance: float = 1e-6) -> None:
    got, expected = got.detach().expand_as(expected), expected.detach()
    wrong = ~(((got - expected).abs() <= tolerance * (1 + expected.abs())) | (got == expected))
    if bool(wrong.any()):
        raise Failed(
            f"Expected {_first(expected, wrong):.6g}, got {_first(got, wrong):.6g}: {meaning}."
        )


def _code(k: int, dims: int, events: Tensor) -> Tensor:
    return events.flatten(-dims)[..., k]


def _size(k: int, dims: int, events: Tensor) -> Tensor:
    return events.flatten(-dims)[..., k].abs()


def _ones(like: Tensor) -> tuple[int, ...]:
    return (1,) * like.dim()


def _first(values: Tensor, where: Tensor) -> float:
    return float(values.detach().expand_as(where)[where].flatten()[0])


def _say(value: Tensor) -> str:
    numbers = [f"{number:.4g}" for number in value.flatten()[:4].tolist()]
    return numbers[0] if value.dim() == 0 else f"({', '.join(numbers)})"
