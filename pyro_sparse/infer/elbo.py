"""Evidence lower bounds for codes with an atom at zero."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_sparse.distributions.mixed import Mixed
from pyro_sparse.distributions.moments import NotAffine
from pyro_sparse.infer.bounds import Bound, Mean
from pyro_sparse.infer.estimators import (
    Estimator,
    Exact,
    ImplicitMixed,
    LeaveOneOut,
    Parts,
    Sampled,
)
from pyro_sparse.infer.exact_elbo import expected_log_likelihood
from pyro_sparse.infer.guard import random_state, set_random_state
from pyro_sparse.infer.integrand import (
    Draw,
    GuideSite,
    Integrand,
    Layout,
    ModelSite,
    Part,
    Terms,
    check_plates,
    guess_num_plates,
    is_gated,
    is_scored,
    leaf,
    plates_of,
    run_guide,
)
from pyro_sparse.infer.numbers import check_whole
from pyro_sparse.infer.programs import Apart
from pyro_sparse.infer.schedules import Scheduled, check_scheduled
from pyro_sparse.infer.sites import check_measures

_LOG = logging.getLogger(__name__)
Program = Callable[..., Any]
_Pairs = weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, "_Known"]]


class SparseELBO(ELBO):
    r"""Evidence lower bound with exact KLs and a choice of gradient estimator.

    .. math:: \mathcal L = \mathbb E_{q(z)} \log p(y \mid z) - \mathrm{KL}(q \,\|\, p)

    for any Pyro model and guide. The KL of every site with a registered ``kl_divergence`` is
    analytic, and of laws with an atom at zero always; sites without an atom fall back on a sampled
    one. What remains is the expected log-likelihood, which the estimator takes.

    Used as every objective of Pyro: ``SparseELBO()(model, guide)`` is a module whose call gives the
    loss, and ``pyro.infer.SVI(model, guide, optim, loss=SparseELBO())`` and ``infer.fit(...,
    loss=SparseELBO())`` work. Draws stand in a leading dimension, left of all plates, and are made
    for the sites inside plates; a latent outside all of them, such as a rate, is drawn once a step.
    The KL is evaluated once, not once a draw. Scales and masks are the model's: those that a guide
    puts on its own sites are not looked at, but for auxiliary ones.

    Args:
        estimator: How the expectation and its gradient are taken. None: ``Exact()`` where the
            model's predictor is affine in the codes, ``ImplicitMixed()`` elsewhere;
            ``choice(model)`` says which, and why, after the first call.
        bound: What several draws are made into: ``Mean()`` (the ELBO, default), ``BestOf()``,
            ``Importance()``, ``Renyi(order)``.
        num_samples: Draws a step, ``J``; by default as many as the estimator needs, and 10 for
            bounds other than ``Mean()``, which of one draw are the ELBO. Not used where the exact
            expectation is taken unasked.
        kl_weight: Factor on the KL of all latent sites, a number or a ``Scheduled`` warm-up. Other
            than 1 it is no lower bound of the evidence; while it is far below 1 keep the noise
            scale fixed, or codes will fit the noise and the scale run to zero.
        base_kl: As published: the KL of the laws before thresholding in place of the exact one of
            the thresholded laws. With equal thresholds a looser bound, never a tighter one.
        num_plates: Dimensions that plates take; where there are several draws they are counted in a
            first run if not given.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``num_samples`` does not suit the estimator, or a pathwise draw would meet a
            sampled KL.

    References:
        Fallah & Rozell (2022), ICML, PMLR 162:6034-6058, for the thresholded posteriors; the exact
        KL replaces theirs.

    Example:
        >>> import pyro
        >>> from pyro_sparse.distributions import SpikeAndSlab
        >>> y, atoms = torch.ones(4, 3), torch.eye(3)
        >>> def model(y):
        ...     with pyro.plate("data", len(y)):
        ...         prior = SpikeAndSlab(dist.Normal(torch.zeros(3), 1.0), 0.1)
        ...         codes = pyro.sample("codes", prior.to_event(1))
        ...         pyro.sample("obs", dist.Normal(codes @ atoms, 0.5).to_event(1), obs=y)
        >>> def guide(y):
        ...     with pyro.plate("data", len(y)):
        ...         law = SpikeAndSlab(dist.Normal(torch.full((3,), 0.8), 0.4), 0.9)
        ...         pyro.sample("codes", law.to_event(1))
        >>> elbo = SparseELBO()
        >>> elbo.loss(model, guide, y) == elbo.loss(model, guide, y)
        True
        >>> elbo.choice(model)
        'Exact()'
    """

    def __init__(
        self,
        estimator: Estimator | None = None,
        *,
        bound: Bound | None = None,
        num_samples: int | None = None,
        kl_weight: float | Scheduled = 1.0,
        base_kl: bool = False,
        num_plates: int | None = None,
    ) -> None:
        bound = Mean() if bound is None else bound
        for name, value, kind in (("estimator", estimator, Estimator), ("bound", bound, Bound)):
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"Expected {name} to be a {kind.__name__}, got {value!r}.")
        if num_samples is not None:
            check_whole("num_samples", num_samples, 1)
        if num_plates is not None:
            check_whole("num_plates", num_plates, 0)
        check_scheduled("kl_weight", kl_weight, 0.0)
        if estimator is None and bound.weighted:
            estimator = LeaveOneOut()
        if estimator is None and not isinstance(bound, Mean):
            estimator = ImplicitMixed()
        if estimator is not None:
            _check_pair(estimator, bound)
            estimator.check(num_samples or estimator.num_draws)
        if base_kl and bound.weighted:
            raise ValueError(
                "Expected base_kl with a bound of analytic KLs: Mean() or BestOf("
                "as_published=True)."
            )
        super().__init__()
        self.estimator = estimator
        self.bound = bound
        self.num_samples = num_samples
        self.kl_weight = kl_weight
        self.base_kl = base_kl
        self.num_plates = num_plates
        self._known: _Pairs = weakref.WeakKeyDictionary()
        self._last: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        # What is known of programs belongs to this process; it is found out again.
        return {**vars(self), "_known": None, "_last": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        empty: dict[str, Any] = {n: weakref.WeakKeyDictionary() for n in ("_known", "_last")}
        vars(self).update({**state, **empty})

    def choice(self, model: Program, guide: Program | None = None) -> str:
        """Which estimator a model is trained with, and why if it was not asked for.

        Args:
            model: A model that this objective has been evaluated for, also by ``fit``.
            guide: With which guide; by default the latest one.

        Raises:
            ValueError: If the objective has not been evaluated for them yet.
        """
        if self.estimator is not None:
            return repr(self.estimator)
        pairs: Any = self._known.get(_user_program(model), {})
        if guide is None:
            known = self._last.get(_user_program(model))
        else:
            known = pairs.get(_user_program(guide))
        if known is None:
            raise ValueError(
                "Expected a model and a guide that this objective has been evaluated for."
            )
        return repr(known.estimator) + (f", since {known.reason}" if known.reason else "")

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Minus the bound, in nats, without a gradient."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Minus the bound, in nats; adds its gradient to that of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Minus the bound, in nats: its value is an estimate, and so is its gradient.

        Raises:
            ValueError: If model and guide cannot be compared: a latent site is missing, or one has
                an atom at zero where the other has none.
            NotImplementedError: If the estimator does not serve the guide's laws, or ``Exact`` not
                the model.
        """
        known = self._remembered(model, guide)
        if isinstance(self.estimator, Exact):
            return -self._exact(known, model, guide, args, kwargs)
        if self.estimator is not None:
            return -self._sampled(known, self.estimator, model, guide, args, kwargs)
        reason = known.reason
        if not isinstance(known.estimator, ImplicitMixed):
            # Tried once: the draws are then those of the estimator asked for by name.
            state = random_state() if known.estimator is None else None
            try:
                loss = -self._exact(known, model, guide, args, kwargs)
            except (NotImplementedError, TypeError, AttributeError) as error:
                # The last two: a program that looks at its codes closely. Were it a fault of the
                # program's own, the run with draws would raise it again.
                reason = str(error) or type(error).__name__
                if state is not None:
                    set_random_state(state)
            else:
                if known.estimator is None:
                    _LOG.info("SparseELBO uses Exact().")
                known.estimator = Exact()
                return loss
        loss = -self._sampled(known, ImplicitMixed(), model, guide, args, kwargs)
        if not isinstance(known.estimator, ImplicitMixed):
            known.estimator, known.reason = ImplicitMixed(), reason
            _LOG.info("SparseELBO uses %r: %s", known.estimator, reason)
        return loss

    def _remembered(self, model: Program, guide: Program) -> _Known:
        """What is known of two programs; nothing where they cannot be remembered."""
        model, guide = _user_program(model), _user_program(guide)
        try:
            pairs = self._known.setdefault(model, weakref.WeakKeyDictionary())
            known = pairs.get(guide)
            if known is None:
                known = pairs[guide] = _Known(self.num_plates, self.estimator)
            self._last[model] = known
        except TypeError:  # not hashable, or without weak references
            known = _Known(self.num_plates, self.estimator)
        return known

    def _get_trace(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("SparseELBO runs guide and model by handlers of its own.")

    # With draws

    def _sampled(
        self,
        known: _Known,
        estimator: Estimator,
        model: Program,
        guide: Program,
        args: Any,
        kwargs: Any,
    ) -> Tensor:
        num_draws = self.num_samples or self._default_draws(estimator)
        if known.num_plates is None:
            known.num_plates = guess_num_plates(model, guide, args, kwargs)
        layout = Layout(num_draws, known.num_plates, num_draws > 1 or estimator.leading)
        subsamples: dict[str, Any] = {}
        sites = run_guide(guide, args, kwargs, layout, estimator.draw, subsamples)
        for index, (name, site) in enumerate(sites.items()):
            layout.check(name, site.law, site.plates, first=index == 0)
        integrand = Integrand(model, args, kwargs, layout, subsamples)
        if self.bound.weighted:
            _check_points(self.bound, sites)
        values = {name: site.draw.value for name, site in sites.items()}
        terms = integrand.run(values)
        scale = 1.0 if isinstance(self.bound, Mean) else _scale(sites, terms)
        parts = self._parts(sites, terms, values, layout, scale, check=True)
        gated = {name: site for name, site in sites.items() if is_scored(site.law)}

        def cost(anew: dict[str, Tensor]) -> Parts:
            other = _repeated(values, anew, sites, layout)
            return self._parts(sites, integrand.run(other), other, layout, scale)

        def again() -> Parts:
            with torch.no_grad():
                own = [name for name, site in sites.items() if not site.shared]
                if own == list(gated) and len(own) == 1:  # spares a run of the guide
                    law, lead = sites[own[0]].law, sites[own[0]].lead
                    return cost({own[0]: law.sample(torch.Size(lead))})
                anew = run_guide(guide, args, kwargs, layout, estimator.draw, subsamples)
                other = {name: site.draw.value for name, site in anew.items()}
                return self._parts(anew, integrand.run(other), other, layout, scale)

        total = self._bound(parts, sites, layout)
        if gated and torch.is_grad_enabled():
            sampled = Sampled(
                gated,
                parts,
                num_draws,
                self.bound,
                cost,
                again,
                observed=len(terms.observed),
                followers=tuple(name for name, site in sites.items() if site.follows),
            )
            total = total + estimator.correction(sampled)
        return scale * total + self._shared(sites, terms)

    def _default_draws(self, estimator: Estimator) -> int:
        return estimator.num_draws if isinstance(self.bound, Mean) else 10

    def _bound(self, parts: Parts, sites: dict[str, GuideSite], layout: Layout) -> Tensor:
        if isinstance(self.bound, Mean):
            means = [part.value.mean(0).sum() for part in parts]
            return torch.stack(means).sum() if means else torch.zeros(())
        own = [site for site in sites.values() if not site.shared]
        shapes = {site.cells(layout.num_plates + 1) for site in own}
        if len(shapes) != 1 or any(site.plates != own[0].plates for site in own):
            raise NotImplementedError(
                f"{self.bound!r} needs all latent sites in the same plates, got batch shapes "
                f"{sorted(shape[1:] for shape in shapes)}. Use Mean()."
            )
        shape = shapes.pop()
        reduced = [part.within(own[0].plates) for part in parts]
        if any(part.shape[1:] != torch.Size(shape[1:]) for part in reduced):
            raise NotImplementedError(
                f"{self.bound!r} needs observed sites in the plates of the latent ones, "
                f"{shape[1:]}, got {sorted({tuple(p.shape[1:]) for p in reduced})}. Use Mean()."
            )
        terms = torch.broadcast_tensors(*reduced)
        total = torch.stack(list(terms)).sum(0) if len(terms) > 1 else terms[0]
        return self.bound(total.expand(layout.num_draws, *total.shape[1:])).sum()

    def _parts(
        self,
        sites: dict[str, GuideSite],
        terms: Terms,
        values: dict[str, Tensor],
        layout: Layout,
        scale: Any,
        *,
        check: bool = False,
    ) -> Parts:
        """Everything that stands inside plates, divided by the scale of the codes."""
        parts = []

        def add(name: str, value: Tensor, plates: dict[int, str], factor: Any) -> None:
            if check:
                draws = (-layout.num_plates - 1, layout.num_draws) if layout.leading else None
                check_plates(name, value, plates, draws)
            parts.append(Part(layout.cells(value) * factor, plates))

        for name, observed in terms.observed.items():
            if check:
                _check_data(name, observed)
            add(name, observed.log_prob(), observed.plates, observed.scale / scale)
        for name, site in sites.items():
            if not site.shared:
                of_model = terms.latent.get(name)
                relative = (site if of_model is None else of_model).scale / scale
                value = self._latent(name, site, of_model, values[name])
                add(name, value, site.plates, relative * float(self.kl_weight))
        return parts

    def _shared(self, sites: dict[str, GuideSite], terms: Terms) -> Tensor | float:
        """Latent sites outside all plates."""
        total: Tensor | float = 0.0
        for name, site in sites.items():
            if site.shared:
                of_model = terms.latent.get(name)
                relative = (site if of_model is None else of_model).scale
                value = self._latent(name, site, of_model, site.draw.value)
                total = total + value.sum() * (relative * float(self.kl_weight))
        return total

    def _latent(self, name: str, site: GuideSite, prior: ModelSite | None, value: Tensor) -> Tensor:
        """Minus the KL of a site, or its log-ratio at the draws; shape of draws and plates."""
        law = site.law
        if prior is None:
            if not site.auxiliary:
                raise ValueError(
                    f"Expected every latent site of the guide in the model, got {name!r} in the "
                    "guide alone."
                )
            return -scale_and_mask(law.log_prob(value), 1.0, site.mask)
        check_measures(name, law, prior.law)
        if site.plates != prior.plates:
            raise ValueError(
                f"Expected site {name!r} in the same plates in guide and model, got "
                f"{sorted(site.plates.values())} and {sorted(prior.plates.values())}."
            )
        ratio = isinstance(leaf(law), dist.Delta) or (self.bound.weighted and not site.shared)
        if not ratio:
            try:
                return -scale_and_mask(self._kl(law, prior.law, value), 1.0, prior.mask)
            except NotImplementedError:
                if is_gated(law):
                    raise ValueError(
                        f"Expected a KL in closed form at site {name!r}, between "
                        f"{type(leaf(law)).__name__} and {type(leaf(prior.law)).__name__}: a "
                        "pathwise draw of a law with an atom may not meet a sampled KL, whose "
                        "gradient would be biased. Register one with torch.distributions."
                        "register_kl, or use SparseELBO(LeaveOneOut(), bound=Mean("
                        "sampled_kl=True))."
                    ) from None
        return scale_and_mask(prior.law.log_prob(value) - law.log_prob(value), 1.0, prior.mask)

    def _kl(self, law: Any, prior: Any, value: Tensor) -> Tensor:
        base = leaf(law)
        if hasattr(base, "kl_given"):
            return base.kl_given(value, prior)
        if self.base_kl and hasattr(base, "base") and hasattr(leaf(prior), "base"):
            divergence = kl_divergence(base.base, leaf(prior).base)
            event = len(law.event_shape)
            return divergence.flatten(-event).sum(-1) if event else divergence
        return kl_divergence(law, prior)

    # Without draws

    def _exact(
        self, known: _Known, model: Program, guide: Program, args: Any, kwargs: Any
    ) -> Tensor:
        subsamples: dict[str, Any] = {}
        layout = Layout(1, 0, leading=False)
        sites = None
        if known.carried is None:
            sites = run_guide(guide, args, kwargs, layout, _sample, subsamples)
            known.carried = _carried(sites)
        if known.carried:
            try:
                sites = run_guide(guide, args, kwargs, layout, _sample, subsamples, known.carried)
            except NotAffine:
                raise NotImplementedError(
                    "Exact needs a guide whose laws do not depend on codes drawn before. Use "
                    "SparseELBO(estimator=ImplicitMixed())."
                ) from None
        elif sites is None:
            sites = run_guide(guide, args, kwargs, layout, _sample, subsamples)
        carried = {name: sites[name].law for name in known.carried}
        scored = [n for n, site in sites.items() if n not in carried and is_scored(site.law)]
        if scored:
            kind = type(leaf(sites[scored[0]].law)).__name__
            raise NotImplementedError(
                "Exact carries codes that are independent given the data, and draws others "
                f"pathwise; site {scored[0]!r} of the guide, a {kind}, is of neither kind. Use "
                "SparseELBO(estimator=LeaveOneOut())."
            )
        values: dict[str, Any] = {
            name: site.draw.value for name, site in sites.items() if name not in carried
        }
        expectation = expected_log_likelihood(model, carried, values | subsamples, args, kwargs)
        total = torch.zeros(())
        found: Any
        for name, term in expectation.terms.items():
            found = expectation.trace.nodes[name]
            check_plates(name, term, plates_of(found["cond_indep_stack"]))
            total = total + term.sum()
        for name, site in sites.items():
            prior = None
            found = expectation.trace.nodes.get(name, {"is_observed": True})
            if not found["is_observed"]:
                plates = plates_of(found["cond_indep_stack"])
                prior = ModelSite(found["fn"], None, found["scale"], found["mask"], plates)
            value = self._latent(name, site, prior, site.draw.value)
            check_plates(name, value, site.plates)
            scale = (site if prior is None else prior).scale
            total = total + value.sum() * (scale * float(self.kl_weight))
        return total


@dataclass
class _Known:
    """What a first evaluation found out about a model and a guide."""

    num_plates: int | None
    estimator: Estimator | None
    reason: str = ""
    carried: tuple[str, ...] | None = None


def _user_program(program: Program) -> Program:
    """The program as the user knows it: ``fit`` wraps each in a scope of its own."""
    return program.program if isinstance(program, Apart) else program


def _sample(law: Any, lead: tuple[int, ...]) -> Draw:
    """A draw that a guide goes on with, where expectations need none."""
    return Draw(law.sample(torch.Size(lead)))


def _carried(sites: dict[str, GuideSite]) -> tuple[str, ...]:
    """Sites that can be carried by their moments: all with independent gates, or one dense.

    Raises:
        NotImplementedError: If there are several dense ones, an autoguide's, or one without a
            finite variance.
    """
    gated = tuple(name for name, site in sites.items() if isinstance(leaf(site.law), Mixed))
    if gated or any(is_scored(site.law) for site in sites.values()):
        return gated
    in_plates = any(site.plates for site in sites.values())
    drawn = {
        name: site
        for name, site in sites.items()
        if bool(site.plates) == in_plates and not isinstance(leaf(site.law), dist.Delta)
    }
    refused = len(drawn) > 1 or any(site.auxiliary for site in drawn.values())
    if refused or not all(bool(s.law.variance.isfinite().all()) for s in drawn.values()):
        raise NotImplementedError(
            "Exact carries one dense latent with a finite variance, or any number with an atom at "
            f"zero, got {sorted(drawn)}. Use SparseELBO(estimator=ImplicitMixed())."
        )
    return tuple(drawn)


def _check_data(name: str, site: ModelSite) -> None:
    """Refuse data with dimensions of their own: in a law of draws they would pass for draws."""
    shape = tuple(site.value.shape) if isinstance(site.value, Tensor) else ()
    event = len(site.law.event_shape)
    check_plates(name, torch.empty(shape[: len(shape) - event], device="meta"), site.plates)


def _check_points(bound: Bound, sites: dict[str, GuideSite]) -> None:
    """Refuse points where log-weights are asked for; an autoguide's are its auxiliary draws."""
    points = [name for name, site in sites.items() if isinstance(leaf(site.law), dist.Delta)]
    if points and not any(site.auxiliary for site in sites.values()):
        raise ValueError(
            f"Expected a guide with a law at site {points[0]!r}, got Delta: {bound!r} is made of "
            "log-weights, and a point has none. Use Mean(), which then is the MAP loss."
        )


def _check_pair(estimator: Estimator, bound: Bound) -> None:
    if isinstance(bound, Mean) and not bound.weighted:
        return
    if bound.weighted and not isinstance(estimator, LeaveOneOut):
        raise ValueError(
            f"Expected LeaveOneOut() with {bound!r}, got {estimator!r}: its terms hold sampled "
            "log-densities, which jump at the atom, and a pathwise draw through the gates would "
            "bias their gradient without a word. Leave estimator= out, or take a bound with an "
            "analytic KL: Mean() or BestOf(as_published=True)."
        )
    if not estimator.bounds:
        raise ValueError(f"Expected {estimator!r} with bound=Mean(), got {bound!r}.")


def _scale(sites: dict[str, GuideSite], terms: Terms) -> Any:
    """Scale of the plates of the codes: gated sites, else any inside plates, else one."""
    for wanted in (lambda site: is_scored(site.law), lambda site: not site.shared):
        for name, site in sites.items():
            if name in terms.latent and wanted(site):
                scale = terms.latent[name].scale
                if isinstance(scale, Tensor) and scale.numel() > 1:
                    raise NotImplementedError(
                        f"Expected one scale of site {name!r} with a bound other than Mean(), got "
                        f"weights of shape {tuple(scale.shape)}."
                    )
                return scale
    return 1.0


def _repeated(
    values: dict[str, Tensor],
    anew: dict[str, Tensor],
    sites: dict[str, GuideSite],
    layout: Layout,
) -> dict[str, Tensor]:
    """Values with some replaced by others of more draws; the rest is repeated to match."""
    leading = {name: layout.num_plates + 1 + len(sites[name].law.event_shape) for name in values}
    count = max(
        (len(value) for name, value in anew.items() if value.dim() == leading[name]), default=1
    )
    repeated = {}
    for name, value in values.items():
        times = count // len(value) if value.dim() == leading[name] else 1
        repeated[name] = value.repeat(times, *[1] * (value.dim() - 1)) if times > 1 else value
    return {**repeated, **anew}
