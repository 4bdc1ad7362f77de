"""Do a model and a guide keep to what objectives, training and diagnostics ask of them?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from pyro_sparse.infer import SparseELBO
from pyro_sparse.infer.findings import NotAsked
from pyro_sparse.infer.programs import Apart, kept
from pyro_sparse.infer.sites import check_sites
from pyro_sparse.likelihoods import Likelihood
from pyro_sparse.testing.advice import Advice, Failed, gather, short
from pyro_sparse.testing.saving import check_saving

Program = Callable[..., Any]
_TOLERANCE = 1e-4


def check_model(model: Program, y: Tensor, *, mask: Tensor | None = None) -> Advice:
    """Check a generative program, called as ``model(y, num_data, mask=)``.

    Checked are: that it runs and its log-density is finite; that data of one datum each stand in a
    plate that scales them by ``num_data``; that a datum's log-density does not depend on the other
    data; that what the mask leaves out does not matter; that parameters get gradients; that it
    draws from its prior; that it can be saved. Nothing is trained, and torch's random state and
    Pyro's parameter store are left as they were.

    Args:
        model: The program: a module or a function.
        y: A few data, ``(n, *signal_shape)``, ``n >= 2``.
        mask: True where a sample was observed. Given one, the model must take ``mask=``.

    Returns:
        The findings; print them, or ``.raise_if_failed()`` in a test.

    Raises:
        TypeError: If ``model`` cannot be called or ``y`` is no floating tensor.
        ValueError: If there are fewer than two data.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_sparse import dictionaries, likelihoods, models
        >>> model = models.SparseCoding(
        ...     dictionaries.Dense(8, 5), likelihoods.Gaussian(0.1), dist.Laplace(0.0, 1.0)
        ... )
        >>> check_model(model, torch.randn(4, 5)).ok
        True
    """
    _check_arguments("model", model, y)
    run = _Run(model, y, mask)
    with torch.random.fork_rng(), run.still():
        return gather(
            _name(model),
            {
                "runs": run.runs,
                "plates": run.plates,
                "subsample scale": run.scale,
                "data apart": run.apart,
                "mask": run.masked,
                "gradients": run.gradients,
                "prior draws": run.draws,
                "save and load": lambda: _saving(model),
            },
        )


def check_guide(guide: Program, model: Program, y: Tensor, *, mask: Tensor | None = None) -> Advice:
    """Check a guide for a model, both called as ``program(y, num_data, mask=)``.

    Checked are: that latent sites agree in names, shapes, plates and atoms at zero; that the ELBO
    is finite; that codes of a datum do not depend on the other data of a minibatch (a batch norm
    in train mode would fail here); that what the mask leaves out does not matter; that no
    likelihood that it holds has a residual of the wrong sign, by which codes climb away from the
    data; that parameters get finite gradients; that it can be saved. Nothing is trained.

    ``against zeros`` says how much more probable the guide's codes are, with the data, than zeros
    in their place. Where they are less probable it is advice and no failure: so are those of an
    encoder that has to be trained first, but not those of an unrolled one.

    Args:
        guide: The variational program.
        model: The generative one.
        y: A few data, ``(n, *signal_shape)``, ``n >= 2``.
        mask: True where a sample was observed.

    Returns:
        The findings; print them, or ``.raise_if_failed()`` in a test.

    Raises:
        TypeError: If a program cannot be called or ``y`` is no floating tensor.
        ValueError: If there are fewer than two data.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_sparse import dictionaries, guides, likelihoods, models
        >>> parts = dictionaries.Dense(8, 5), likelihoods.Gaussian(0.1), dist.Laplace(0.0, 1.0)
        >>> model, guide = models.SparseCoding(*parts), guides.UnrolledFISTA(*parts)
        >>> check_guide(guide, model, torch.randn(4, 5)).ok
        True
    """
    _check_arguments("model", model, y)
    _check_arguments("guide", guide, y)
    run = _GuideRun(guide, model, y, mask)
    with torch.random.fork_rng(), run.still():
        return gather(
            _name(guide),
            {
                "sites": run.sites,
                "objective": run.objective,
                "data apart": run.apart,
                "mask": run.masked,
                "residual": run.residual,
                "against zeros": run.against_zeros,
                "gradients": run.gradients,
                "save and load": lambda: _saving(guide),
            },
        )


class _Run:
    """A program on given data, from one seed each time."""

    def __init__(self, program: Program, y: Tensor, mask: Tensor | None) -> None:
        self.program, self.y, self.mask = Apart(program), y, mask

    def still(self) -> Any:
        return kept(self.program)

    def trace(
        self, y: Tensor, num_data: int | None = None, mask: Tensor | None = None, **codes: Tensor
    ) -> poutine.Trace:
        torch.manual_seed(0)
        arguments = {} if mask is None else {"mask": mask}
        program = poutine.condition(self.program, data=codes) if codes else self.program
        found = poutine.trace(program).get_trace(y, num_data, **arguments)
        found.compute_log_prob()
        return prune_subsample_sites(found)

    def runs(self) -> str:
        trace = self.trace(self.y, None, self.mask)
        observed = [n for n, s in _samples(trace).items() if s["is_observed"]]
        latent = [n for n, s in _samples(trace).items() if not s["is_observed"]]
        if not observed:
            raise Failed("Expected an observed site, got none: pyro.sample('obs', ..., obs=y).")
        for name, site in _samples(trace).items():
            if not bool(torch.isfinite(site["log_prob_sum"])):
                raise Failed(
                    f"Expected a finite log-density at site {name!r}, got "
                    f"{float(site['log_prob_sum'].detach())}. Scale the data?"
                )
        return f"latent {', '.join(latent) or 'none'}; observed {', '.join(observed)}"

    def plates(self) -> str:
        n, seen = len(self.y), []
        for name, site in _samples(self.trace(self.y, None, self.mask)).items():
            frames = [frame.name for frame in site["cond_indep_stack"]]
            if site["is_observed"] and not frames:
                raise Failed(
                    f"Expected the observed site {name!r} in a plate, got none: write "
                    'with pyro.plate("data", num_data or len(y), subsample=torch.arange(len(y))).'
                )
            shape = tuple(site["log_prob"].shape)
            if frames and shape[-1:] != (n,) and n not in shape:
                raise Failed(
                    f"Expected one log-density for each of {n} data at site {name!r}, got shape "
                    f"{shape}: dimensions of one datum belong to the event, .to_event(...)."
                )
            seen.append(f"{name} in [{', '.join(frames)}]")
        return "; ".join(seen)

    def scale(self) -> str:
        n = len(self.y)
        once = _samples(self.trace(self.y, n, self.mask))
        twice = _samples(self.trace(self.y, 2 * n, self.mask))
        for name, site in once.items():
            if not site["cond_indep_stack"]:
                continue
            got = float((twice[name]["log_prob_sum"] / site["log_prob_sum"]).detach())
            if not abs(got - 2) <= _TOLERANCE * 10:
                raise Failed(
                    f"Expected site {name!r} to count twice with num_data = 2 n, got a factor of "
                    f"{got:.4g}: num_data is the plate's size, the minibatch its subsample."
                )
        return "sites in plates count num_data / n times"

    def apart(self) -> str:
        first = self.trace(self.y, None, self.mask)
        codes = {
            name: _all_as_first(site["value"]) if site["cond_indep_stack"] else site["value"]
            for name, site in _samples(first).items()
            if not site["is_observed"]
        }
        second = self.trace(_all_as_first(self.y), None, self.mask, **codes)
        self._same_first_datum(first, second, "log_prob", "log-density")
        return "a datum's log-density is its own"

    def masked(self) -> str:
        if self.mask is None:
            raise NotAsked("Say mask= to ask.")
        seen = self.mask.expand_as(self.y)
        if bool(seen.all()):
            raise NotAsked("The mask leaves out nothing.")
        first = self.trace(self.y.masked_fill(~seen, torch.nan), None, self.mask)
        codes = {n: s["value"] for n, s in _samples(first).items() if not s["is_observed"]}
        second = self.trace(self.y, None, self.mask, **codes)
        for name, site in _samples(first).items():
            if not _equal(site["log_prob"], _samples(second)[name]["log_prob"]):
                raise Failed(
                    f"Expected what the mask leaves out not to matter at site {name!r}, but with "
                    "nan in its place the log-density is another. Mask the distribution, "
                    ".mask(mask).to_event(...), and put a placeholder where y is not observed."
                )
        return f"{int((~seen).sum())} samples left out do not matter"

    def gradients(self) -> str:
        trace = self.trace(self.y, None, self.mask)
        terms = [site["log_prob_sum"] for site in _samples(trace).values()]
        return _gradients(self.program, torch.stack(terms).sum())

    def draws(self) -> str:
        n = len(self.y)
        try:
            torch.manual_seed(0)
            drawn = poutine.trace(self.program).get_trace(None, n)
        except (TypeError, ValueError, AttributeError) as why:
            raise NotAsked(f"model(None, {n}) does not draw data: {short(why)}") from None
        name = next(n for n, s in _samples(self.trace(self.y)).items() if s["is_observed"])
        shape = tuple(_samples(drawn)[name]["value"].shape)
        if shape != tuple(self.y.shape):
            raise Failed(
                f"Expected draws of site {name!r} in the shape of the data {tuple(self.y.shape)}, "
                f"got {shape}."
            )
        return f"{shape}"

    def _same_first_datum(
        self, first: poutine.Trace, second: poutine.Trace, entry: str, what: str
    ) -> None:
        for name, site in _samples(first).items():
            if site["cond_indep_stack"] and not _equal(
                site[entry][0], _samples(second)[name][entry][0]
            ):
                raise Failed(
                    f"Expected the {what} of the first datum at site {name!r} to depend on that "
                    "datum alone; it changed when the others did. Look for sums, means or batch "
                    "norms over the first dimension."
                )


class _GuideRun(_Run):
    def __init__(self, guide: Program, model: Program, y: Tensor, mask: Tensor | None) -> None:
        super().__init__(guide, y, mask)
        self.model = Apart(model)
        self.arguments = {} if mask is None else {"mask": mask}

    def still(self) -> Any:
        return kept(nn.ModuleList([self.program, self.model]))

    def sites(self) -> str:
        check_sites(self.model, self.program, self.y, len(self.y), **self.arguments)
        latent = _samples(self.trace(self.y, None, self.mask))
        return f"{', '.join(latent)}: as in the model"

    def loss(self) -> Tensor:
        torch.manual_seed(0)
        loss: Tensor = SparseELBO()(self.model, self.program)(self.y, len(self.y), **self.arguments)
        return loss

    def objective(self) -> str:
        loss = self.loss()
        if not bool(torch.isfinite(loss)):
            raise Failed(f"Expected a finite loss, got {float(loss.detach())}. Scale the data?")
        return f"{float(loss.detach()) / len(self.y):.4g} nats a datum"

    def apart(self) -> str:
        first, second = (self.trace(y, None, self.mask) for y in (self.y, _all_as_first(self.y)))
        self._same_first_datum(first, second, "value", "draw")
        return "codes of a datum are its own"

    def masked(self) -> str:
        if self.mask is None:
            raise NotAsked("Say mask= to ask.")
        seen = self.mask.expand_as(self.y)
        blank = self.y.masked_fill(~seen, torch.nan)
        first, second = (self.trace(y, None, self.mask) for y in (self.y, blank))
        for name, site in _samples(first).items():
            if not _equal(site["value"], _samples(second)[name]["value"]):
                raise Failed(
                    f"Expected what the mask leaves out not to matter at site {name!r}, but with "
                    "nan in its place the draw is another."
                )
        return f"{int((~seen).sum())} samples left out do not matter"

    def residual(self) -> str:
        held = [m for m in self.program.modules() if isinstance(m, Likelihood)]
        if not held:
            raise NotAsked("It holds no likelihood.")
        for likelihood in held:
            cosine = self._agreement(likelihood)
            if cosine < 0:
                raise Failed(
                    f"Expected the residual of {type(likelihood).__name__} to point as the "
                    "derivative of its log_prob by the predictor, got a cosine of the angle of "
                    f"{cosine:.3g}: codes climb away from the data. See check_likelihood."
                )
        return f"of {', '.join(type(m).__name__ for m in held)} points towards the data"

    def _agreement(self, likelihood: Likelihood) -> float:
        """Cosine of the angle between residual and derivative, at draws of the family."""
        torch.manual_seed(0)
        at = torch.linspace(-2.0, 2.0, self.y.numel()).to(self.y).reshape(self.y.shape)
        at.requires_grad_()
        law = likelihood(at)
        y = law.sample()
        (score,) = torch.autograd.grad(law.log_prob(y).sum(), at)
        residual = likelihood.residual(at, y).detach()
        return float(nn.functional.cosine_similarity(score.flatten(), residual.flatten(), dim=0))

    @torch.no_grad()
    def against_zeros(self) -> str:
        drawn = _samples(self.trace(self.y, None, self.mask))
        values = {name: site["value"] for name, site in drawn.items()}
        own = self._joint(values)
        zeros = {
            name: torch.zeros_like(value)
            for name, value in values.items()
            if drawn[name]["cond_indep_stack"] and value.is_floating_point()
        }
        asked = [n for n in zeros if math.isfinite(self._joint({**values, n: zeros[n]}))]
        if not asked or not math.isfinite(own):
            raise NotAsked("The model gives zero codes, or those of the guide, no density.")
        more = (own - self._joint({**values, **{n: zeros[n] for n in asked}})) / len(self.y)
        if more < 0:
            raise NotAsked(
                f"The guide's {', '.join(asked)}, with the data, {-more:.4g} nats a datum less "
                "probable than zeros. So it may be before an encoder is trained; of one that "
                "needs no training, such as an unrolled one, look for a wrong sign or a step that "
                "is too long."
            )
        return (
            f"{', '.join(asked)}, with the data, {more:.4g} nats a datum more probable than zeros"
        )

    def _joint(self, values: dict[str, Tensor]) -> float:
        """Log-density of data and latent values under the model; minus infinity if refused."""
        try:
            model = poutine.condition(self.model, data=values)
            trace = poutine.trace(model).get_trace(self.y, None, **self.arguments)
            return float(trace.log_prob_sum())
        except ValueError:  # zero is outside of a support
            return -math.inf

    def gradients(self) -> str:
        return _gradients(self.program, self.loss())


def _gradients(program: nn.Module, loss: Tensor) -> str:
    moving = {n: p for n, p in program.named_parameters() if p.requires_grad}
    if not moving:
        raise NotAsked("No parameter requires a gradient.")
    if not loss.requires_grad:
        raise Failed("Expected a gradient, got none: is something detached, or under no_grad?")
    found = torch.autograd.grad(loss, list(moving.values()), allow_unused=True)
    without = [n.removeprefix("program.") for n, g in zip(moving, found) if g is None]
    if without:
        raise Failed(
            f"Expected a gradient of every parameter, got none of {', '.join(without)}: unused, "
            "detached, or to be frozen by requires_grad_(False)."
        )
    bad = [
        n.removeprefix("program.")
        for n, g in zip(moving, found)
        if g is not None and not bool(torch.isfinite(g).all())
    ]
    if bad:
        raise Failed(f"Expected finite gradients, got others of {', '.join(bad)}.")
    return f"reach {len(moving)} parameters"


def _saving(program: Program) -> str:
    if not isinstance(program, nn.Module):
        raise NotAsked("A function has nothing to save.")
    return check_saving(program)


def _samples(trace: poutine.Trace) -> dict[str, Any]:
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}


def _all_as_first(values: Tensor) -> Tensor:
    """The first datum in the place of all."""
    return values[:1].expand_as(values).clone()


def _equal(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first, second, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True)


def _name(program: Program) -> str:
    named = program if hasattr(program, "__name__") else type(program)
    return str(getattr(named, "__name__", named))


def _check_arguments(name: str, program: Any, y: Any) -> None:
    if not callable(program):
        raise TypeError(f"Expected {name} to be a program, got {type(program).__name__}.")
    if not isinstance(y, Tensor) or not y.is_floating_point():
        kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(
            f"Expected y to be a floating tensor of data, got {kind}. "
            "Try torch.as_tensor(y).float()."
        )
    if len(y) < 2:
        raise ValueError(f"Expected at least two data, to tell them apart, got {len(y)}.")
