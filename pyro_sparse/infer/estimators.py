r"""Gradient estimators of :math:`\mathbb E_{q(z)} f(z)` for codes with an atom at zero.

Each is an object: how it draws codes, and what it adds to the pathwise gradient of its draws. The
slab is always differentiated pathwise; they differ in how they treat the gates. A slab with a gap,
as that of a hard threshold, has no pathwise draw across it: there the side that a code is on counts
as part of its gate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from pyro_sparse.distributions.mixed import Mixed
from pyro_sparse.distributions.slabs import inner_value, log_cdf, log_survival, reaches_zero
from pyro_sparse.infer.bounds import Bound, contributions
from pyro_sparse.infer.integrand import Draw, GuideSite, Part, is_gated, leaf
from pyro_sparse.infer.numbers import check_whole

Parts = list[Part]
"""Terms of each draw, in nats, not scaled by plates, to be summed: each ``(J, *plates)``, with size
one for plates that it does not stand in."""


@dataclass
class Sampled:
    """What an estimator may build its correction from.

    Attributes:
        sites: Gated sites of the guide, drawn.
        parts: What was made of the draws.
        num_draws: ``J``.
        bound: What the terms of a datum are made into.
        cost: Evaluates the parts anew at other values of some sites, for any number of draws.
        again: Evaluates the parts of new and independent draws, without a gradient.
        observed: How many parts, of the first, are observed sites.
        followers: Names of sites whose law may depend on gates that were drawn before.
    """

    sites: dict[str, GuideSite]
    parts: Parts
    num_draws: int
    bound: Bound
    cost: Callable[[dict[str, Tensor]], Parts]
    again: Callable[[], Parts]
    observed: int
    followers: tuple[str, ...] = ()

    @property
    def dims(self) -> int:
        """Dimensions of a part: one of draws and those of plates."""
        return self.parts[0].value.dim()

    def terms(self, parts: Parts, site: GuideSite, count: int | None = None) -> Tensor:
        """Sum of all parts, for each plate cell of a site: ``(J, *plates)``, detached.

        Args:
            parts: Terms of draws.
            site: A gated site.
            count: Number of draws; by default ``num_draws``.
        """
        first, *rest = (part.within(site.plates).detach() for part in parts)
        total = sum(rest, first)
        return total.expand(count or self.num_draws, *total.shape[1:])

    def check_order(self, estimator: Estimator) -> None:
        """Refuse guides in which a site follows from gates drawn before it.

        Raises:
            NotImplementedError: If there is one.
        """
        if self.followers:
            raise NotImplementedError(
                f"{type(estimator).__name__} changes gates while all other sites stay as they are: "
                f"expected laws that do not depend on codes drawn before, but that of site "
                f"{self.followers[0]!r} may. Use ImplicitMixed() or LeaveOneOut()."
            )


class Estimator:
    """Declares a gradient estimator.

    Attributes:
        unbiased: Whether its mean is the gradient.
        num_draws: Draws that it takes if not told.
        bounds: Whether it serves bounds other than the mean.
        leading: Whether it evaluates the model with a leading dimension also for a single draw.
    """

    unbiased: bool = True
    num_draws: int = 1
    bounds: bool = False
    leading: bool = False

    def draw(self, law: Any, lead: tuple[int, ...]) -> Draw:
        """Draw codes of a gated law, shape ``lead + batch_shape + event_shape``."""
        raise NotImplementedError

    def correction(self, sampled: Sampled) -> Tensor | float:
        """What to add to the objective: of value zero, with the gradient that draws lack."""
        return 0.0

    def check(self, num_draws: int) -> None:
        """Refuse a number of draws that it cannot work with."""


@dataclass(frozen=True)
class Exact(Estimator):
    """No draws at all: the expectation in closed form, by moments of the codes.

    For predictors that are affine in the codes, and families with a registered
    ``expected_log_prob``: Gaussian, and Poisson with a logarithmic link where the law's moment
    generating function exists. It has no variance. A model that is not affine is refused by name.

    Example:
        >>> from pyro_sparse.infer import SparseELBO
        >>> objective = SparseELBO(Exact())
    """

    num_draws = 1

    def check(self, num_draws: int) -> None:  # noqa: D102
        if num_draws != 1:
            raise ValueError(
                f"Expected no num_samples with Exact(), which draws none, got {num_draws}."
            )


@dataclass(frozen=True)
class ImplicitMixed(Estimator):
    r"""Pathwise through the quantile of the mixed law, changing over where that explodes.

    One draw and one back-propagation give an unbiased gradient, inclusion and all. The mass that
    enters or leaves the atom is carried through the slab's density at zero, so the variance grows
    with one over that density, as :math:`e^{|\mu| / b}` for a Laplace slab. Gates for which

    .. math:: \frac{\max(F_s(0), 1 - F_s(0))}{s(0)\, \mathrm{sd}_s} > \texttt{limit}

    take a score function with a leave-one-out baseline instead (an extra draw without a gradient
    where there is only one). Which gates do is a function of the parameters alone, so the estimate
    stays unbiased.

    Args:
        limit: Changeover, ``> 0``; ``inf`` for never, 0 for always. 50 is :math:`|\mu|` of about
            3.5 scales of a Laplace slab.

    Raises:
        TypeError: If ``limit`` is no number.
        ValueError: If it is negative.

    References:
        Figurnov, Mohamed & Mnih (2018), NeurIPS 31, eq. (5), here for a law with an atom.

    Example:
        >>> from pyro_sparse.infer import SparseELBO
        >>> objective = SparseELBO(ImplicitMixed(limit=20.0))
    """

    limit: float = 50.0
    bounds = True

    def __post_init__(self) -> None:
        if not isinstance(self.limit, Real) or isinstance(self.limit, bool):
            raise TypeError(f"Expected limit to be a number, got {self.limit!r}.")
        if not self.limit >= 0:
            raise ValueError(f"Expected limit >= 0, got {self.limit}.")

    def draw(self, law: Any, lead: tuple[int, ...]) -> Draw:  # noqa: D102
        base = leaf(law)
        if not is_gated(law):
            return _by_gates(law, lead)
        if not isinstance(base, Mixed) or base.continuous_map:
            return Draw(base.rsample(torch.Size(lead)))  # where gates depend: its own quantiles
        if not (base.slab.has_rsample and reaches_zero(base.slab)):
            return _by_gates(law, lead, sides=True)
        slab, active, _ = _slab_and_gates(base, lead)
        value = torch.where(active, slab, torch.zeros_like(slab))
        if not base.logits.requires_grad:
            return Draw(value)
        changed = self._changed(base)
        velocity = base.gate_velocity(slab.detach())
        velocity = torch.where(active & ~changed, velocity, torch.zeros_like(velocity))
        value = value + velocity * (base.logits - base.logits.detach())
        if not bool(changed.any()):
            return Draw(value)
        log_gates = _log_gates(base.logits, active)
        log_gates = torch.where(changed, log_gates, torch.zeros_like(log_gates))
        return Draw(value, _sum_event(log_gates, law))

    def correction(self, sampled: Sampled) -> Tensor | float:  # noqa: D102
        return _score_function(sampled)

    def _changed(self, law: Mixed) -> Tensor:
        """Gates that take a score function, and all at which the slab has no density at zero."""
        with torch.no_grad():
            slab = law.slab
            zero = torch.zeros_like(law.logits)
            mass = torch.maximum(log_cdf(slab, zero), log_survival(slab, zero))
            inside = slab.support.check(zero)
            density = slab.log_prob(torch.where(inside, zero, inner_value(slab)))
            ratio = (mass - density).exp() / slab.variance.sqrt()
            # Not the other way round: what is not a number changes too.
            return ~(inside & (ratio <= self.limit) & ratio.isfinite())


@dataclass(frozen=True)
class LeaveOneOut(Estimator):
    r"""Score function of the gates with the mean of the other draws as baseline.

    .. math:: \frac1J \sum_j \big(f(z_j) - \bar f_{-j}\big) \nabla \log q(\text{gates}_j)

    It makes no assumption about the model or the slab, and serves every bound, and latents without
    any pathwise draw, such as discrete ones. A single draw takes an extra one without a gradient as
    its baseline. Of a slab that is made of two tails, which tail
    a code is in counts as a gate: the density may jump between them.

    References:
        Kool, van Hoof & Welling (2019), ICLR workshop; Salimans & Knowles (2014), sec. 3.

    Example:
        >>> from pyro_sparse.infer import SparseELBO
        >>> objective = SparseELBO(LeaveOneOut(), num_samples=4)
    """

    num_draws = 2
    bounds = True

    def draw(self, law: Any, lead: tuple[int, ...]) -> Draw:  # noqa: D102
        return _by_gates(law, lead, sides=True)

    def correction(self, sampled: Sampled) -> Tensor | float:  # noqa: D102
        return _score_function(sampled)


@dataclass(frozen=True)
class LocalExpectation(Estimator):
    r"""Each gate summed out in turn, given the draws of all others.

    .. math:: \frac{\partial}{\partial g_i} \mathbb E f = \mathbb E\big[f(z_{-i}, w_i)
        - f(z_{-i}, 0)\big], \qquad w_i \sim s_i

    The lowest variance of the estimators that know nothing about :math:`f`, at the price of one
    evaluation of the model per code and draw. Needs codes of a datum in one event (``to_event``),
    not in a plate that the observed site does not stand in.

    Args:
        chunk: Codes of a datum that are flipped in one evaluation; None for all of them. Memory
            grows with it.

    Raises:
        ValueError: If ``chunk`` is no whole number ``>= 1``.

    References:
        Titsias & Lazaro-Gredilla (2015), NeurIPS 28, eq. (4).

    Example:
        >>> from pyro_sparse.infer import SparseELBO
        >>> objective = SparseELBO(LocalExpectation(chunk=64))
    """

    chunk: int | None = None
    leading = True

    def __post_init__(self) -> None:
        if self.chunk is not None:
            check_whole("chunk", self.chunk, 1)

    def draw(self, law: Any, lead: tuple[int, ...]) -> Draw:  # noqa: D102
        return _by_gates(_elementwise(self, law), lead)

    def correction(self, sampled: Sampled) -> Tensor | float:  # noqa: D102
        sampled.check_order(self)
        total: Tensor | float = 0.0
        for name, site in sampled.sites.items():
            prob = leaf(site.law).prob_active
            if prob.requires_grad:
                self._check_cells(name, site, sampled)
                gain = self._gain(name, site, sampled)
                total = total + (gain * (prob - prob.detach())).sum() / sampled.num_draws
        return total

    def _check_cells(self, name: str, site: GuideSite, sampled: Sampled) -> None:
        cells = site.cells(sampled.dims)
        for part in sampled.parts[: sampled.observed]:
            within = part.within(site.plates)
            if any(within.shape[d] == 1 < cells[d] for d in range(1, sampled.dims)):
                raise NotImplementedError(
                    f"LocalExpectation flips one code of each plate cell at a time: expected the "
                    f"observed sites in all plates of site {name!r}, {cells[1:]}, got one of shape "
                    f"{tuple(within.shape[1:])}. Use .to_event(n) for codes that act together, or "
                    "LeaveOneOut()."
                )

    @torch.no_grad()
    def _gain(self, name: str, site: GuideSite, sampled: Sampled) -> Tensor:
        """f(active) - f(inactive) of every code of every draw, in the shape of the draws."""
        draw = site.draw
        assert draw.active is not None and draw.slab is not None
        event = len(site.law.event_shape)
        count = math.prod(site.law.event_shape)
        batch = draw.value.shape[: draw.value.dim() - event]
        batch = torch.Size([1] * (sampled.dims - len(batch))) + batch
        shape = batch + site.law.event_shape
        value, slab, active = (
            part.detach().reshape(*batch, count) for part in (draw.value, draw.slab, draw.active)
        )
        now = sampled.terms(sampled.parts, site)  # (J, *plates)
        gains = []
        for start in range(0, count, self.chunk or count):
            codes = range(start, min(count, start + (self.chunk or count)))
            flipped = []
            for i in codes:
                other = value.clone()
                other[..., i] = torch.where(active[..., i], 0.0, slab[..., i])
                flipped.append(other.reshape(shape))
            parts = sampled.cost({name: torch.cat(flipped)})
            terms = sampled.terms(parts, site, len(codes) * len(now))
            terms = terms.reshape(len(codes), *now.shape)
            sign = 2 * active[..., codes.start : codes.stop].movedim(-1, 0).to(terms) - 1
            gains.append(sign * (now - terms))
        return torch.cat(gains).movedim(0, -1).reshape(draw.value.shape)


@dataclass(frozen=True)
class DisARM(Estimator):
    r"""Antithetic gates: pairs of draws from one noise and its mirror image.

    With logits :math:`\alpha` and gates :math:`b, \tilde b` from :math:`u` and :math:`1 - u`,

    .. math:: \tfrac12 \big(f(b) - f(\tilde b)\big) (-1)^{\tilde b}\, \mathbb 1[b \neq \tilde b]\,
        \sigma(|\alpha|)

    Needs an even number of draws, and the mean as bound.

    References:
        Dong, Mnih & Tucker (2020), NeurIPS 33, eq. (7).

    Example:
        >>> from pyro_sparse.infer import SparseELBO
        >>> objective = SparseELBO(DisARM(), num_samples=2)
    """

    num_draws = 2

    def check(self, num_draws: int) -> None:  # noqa: D102
        if num_draws % 2:
            raise ValueError(f"Expected an even number of draws for DisARM, got {num_draws}.")

    def draw(self, law: Any, lead: tuple[int, ...]) -> Draw:  # noqa: D102
        base = leaf(_elementwise(self, law))
        if not lead:
            raise NotImplementedError(
                "DisARM evaluates both gates of a pair at once: expected codes whose law does not "
                "depend on other draws. Use LeaveOneOut()."
            )
        half = (lead[0] // 2, *lead[1:])
        slab = _slab_and_gates(base, half)[0]
        # In float64, as the gates of a mixed law: the 24 bits of float32 have no rare events.
        noise = torch.rand(slab.shape, dtype=torch.float64, device=slab.device)
        probs = base.logits.detach().double().sigmoid()
        active = torch.cat([1 - noise < probs, noise < probs])
        slab = torch.cat([slab, slab])
        value = torch.where(active, slab, torch.zeros_like(slab))
        return Draw(value, None, active, slab)

    def correction(self, sampled: Sampled) -> Tensor | float:  # noqa: D102
        sampled.check_order(self)
        total: Tensor | float = 0.0
        for site in sampled.sites.values():
            logits = leaf(site.law).logits
            if not logits.requires_grad:
                continue
            active = site.draw.active
            assert active is not None
            terms = sampled.terms(sampled.parts, site)
            first, second = terms.chunk(2)
            gates, mirrored = active.chunk(2)
            difference = (first - second) / 2
            difference = difference.reshape(*difference.shape, *[1] * len(site.law.event_shape))
            sign = torch.where(mirrored, -1.0, 1.0).to(difference) * (gates ^ mirrored)
            weight = difference * sign * logits.abs().sigmoid().detach()
            total = total + (weight * (logits - logits.detach())).sum() / len(first)
        return total


@dataclass(frozen=True)
class ControlVariate(Estimator):
    r"""Score function of what is left of :math:`f` after its linearisation around the mean.

    .. math:: \hat f(z) = f(m) + \nabla f(m)^T (z - m), \qquad m = \mathbb E z

    whose expectation over the gates is known and differentiated exactly. In the manner of REBAR and
    RELAX, with a control variate that needs no relaxation and no training: one more evaluation and
    one more back-propagation, at the mean of the codes.

    References:
        Tucker et al. (2017), NeurIPS 30; Grathwohl et al. (2018), ICLR; Gu et al. (2016), ICLR
        (MuProp), eq. (6), for the linearisation.

    Example:
        >>> from pyro_sparse.infer import SparseELBO
        >>> objective = SparseELBO(ControlVariate())
    """

    leading = True

    def draw(self, law: Any, lead: tuple[int, ...]) -> Draw:  # noqa: D102
        return _by_gates(_elementwise(self, law), lead)

    def correction(self, sampled: Sampled) -> Tensor | float:  # noqa: D102
        sampled.check_order(self)
        total: Tensor | float = 0.0
        if not any(leaf(site.law).logits.requires_grad for site in sampled.sites.values()):
            return total
        means, slopes, at_mean = self._linearise(sampled)
        rest = sampled.parts + [Part(-part.value, part.plates) for part in at_mean]
        for name, site in sampled.sites.items():
            shift = (site.draw.value.detach() - means[name]) * slopes[name]
            shift = _cells(_sum_event(shift, site.law), sampled.dims)
            rest.append(Part(-shift, site.plates))
        draws = sampled.num_draws
        for name, site in sampled.sites.items():
            base, slab = leaf(site.law), site.draw.slab
            if not base.logits.requires_grad:
                continue
            multiplier = sampled.terms(rest, site)
            if draws > 1:
                multiplier = multiplier - (multiplier.sum(0) - multiplier) / (draws - 1)
            log_gates = _cells(site.draw.log_gates, sampled.dims)
            score = multiplier * (log_gates - log_gates.detach())
            assert slab is not None
            prob = base.prob_active
            known = slopes[name] * slab.detach() * (prob - prob.detach())
            total = total + (score.sum() + known.sum()) / draws
        return total

    def _linearise(self, sampled: Sampled) -> tuple[dict[str, Tensor], dict[str, Tensor], Parts]:
        """The mean of the codes, and slope and value of the terms there."""
        means = {}
        for name, site in sampled.sites.items():
            mean = leaf(site.law).mean.detach()
            # One draw of its own, unless the law carries draws.
            means[name] = mean.reshape(*[1] * len(site.lead), *mean.shape).requires_grad_()
        with torch.enable_grad():
            parts = sampled.cost(means)
            total = torch.stack([part.value.sum() for part in parts]).sum()
            found = torch.autograd.grad(total, list(means.values()), allow_unused=True)
        values = {name: mean.detach() for name, mean in means.items()}
        slopes = {
            name: torch.zeros_like(values[name]) if slope is None else slope
            for name, slope in zip(values, found, strict=True)
        }
        return values, slopes, [Part(part.value.detach(), part.plates) for part in parts]


def _elementwise(estimator: Estimator, law: Any) -> Any:
    base = leaf(law)
    name = type(base).__name__
    if not isinstance(base, Mixed):
        raise NotImplementedError(
            f"{type(estimator).__name__} flips one gate at a time and needs independent gates, got "
            f"{name}. Use ImplicitMixed() or LeaveOneOut()."
        )
    if not base.slab.has_rsample:
        raise NotImplementedError(
            f"{type(estimator).__name__} needs a slab with a pathwise draw, got that of a {name}, "
            f"a {type(base.slab).__name__}. Use LeaveOneOut(), which also serves slabs with a gap."
        )
    return law


def _slab_and_gates(
    base: Mixed, lead: tuple[int, ...], *, sides: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Draws of the slab, pathwise; of the gates; and log-probabilities of sides, if asked for."""
    shape, slab = torch.Size(lead), base.slab
    if sides and hasattr(slab, "rsample_given_side"):
        codes = slab.rsample_given_side(shape)
        return codes, base.sample_active(shape), slab.log_prob_side(codes.detach())
    if not slab.has_rsample:
        raise NotImplementedError(
            f"Expected a slab with a pathwise draw, got {type(slab).__name__}."
        )
    return slab.rsample(shape), base.sample_active(shape), None


def _by_gates(law: Any, lead: tuple[int, ...], *, sides: bool = False) -> Draw:
    """Gates as constants, the slab pathwise."""
    base = leaf(law)
    if not is_gated(law):  # nothing pathwise in it: all of it is scored
        value = law.sample(torch.Size(lead))
        return Draw(value, law.log_prob(value))
    if not isinstance(base, Mixed):
        value, log_gates = base.rsample_given_gates(torch.Size(lead))
        return Draw(value, log_gates)
    slab, active, log_side = _slab_and_gates(base, lead, sides=sides)
    value = torch.where(active, slab, torch.zeros_like(slab))
    log_gates = _log_gates(base.logits, active)
    if log_side is not None:
        log_gates = log_gates + torch.where(active, log_side, torch.zeros_like(log_side))
    return Draw(value, _sum_event(log_gates, law), active, slab)


def _log_gates(logits: Tensor, active: Tensor) -> Tensor:
    return -torch.nn.functional.softplus(torch.where(active, -logits, logits))


def _sum_event(values: Tensor, law: Any) -> Tensor:
    event = len(law.event_shape)
    return values.flatten(-event).sum(-1) if event else values


def _cells(values: Tensor | None, dims: int) -> Tensor:
    assert values is not None
    return values.reshape(*[1] * (dims - values.dim()), *values.shape)


def _score_function(sampled: Sampled) -> Tensor | float:
    """Score function of the gates that draws do not differentiate, less a baseline."""
    total: Tensor | float = 0.0
    scored = [
        (site, _cells(site.draw.log_gates, sampled.dims))
        for site in sampled.sites.values()
        if site.draw.log_gates is not None and site.draw.log_gates.requires_grad
    ]
    if not scored:
        return total
    # A single draw: every bound is its one term.
    baseline = sampled.again() if sampled.num_draws == 1 else None
    for site, log_gates in scored:
        terms = sampled.terms(sampled.parts, site)
        if baseline is None:
            multiplier = contributions(sampled.bound, terms)
        else:
            multiplier = terms - sampled.terms(baseline, site)
        total = total + (multiplier * (log_gates - log_gates.detach())).sum()
    return total
