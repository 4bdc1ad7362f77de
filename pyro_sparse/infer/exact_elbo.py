"""The expected log-likelihood of a program in closed form, over the laws of its codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from pyro_sparse.distributions.expected import expected_log_prob, holds_moments
from pyro_sparse.distributions.moments import INSTEAD, Moments, NotAffine


class Expectation(NamedTuple):
    """What a run on moment-carrying codes gives.

    Attributes:
        terms: Expected log-likelihood of each observed site, in nats, shape ``batch_shape``;
            scaled by its plates and masked. Their sum over all entries is the expected
            log-likelihood.
        trace: Trace of the program. At a code site its ``"fn"`` is the prior law of the codes, with
            ``"scale"`` and ``"mask"``, for the KL; the value there has no numbers. Subsample sites
            are left out.
    """

    terms: dict[str, Tensor]
    trace: Trace


def expected_log_likelihood(
    model: Callable[..., Any],
    laws: Mapping[str, Any],
    values: Mapping[str, Tensor] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Expectation:
    r"""Run a program once, on moments: :math:`E_{q(z)}[\log p(y \mid z, w)]`, without sampling.

    Nothing is drawn, so the result has no sampling variance, and its gradient is exact. Whatever in
    the program is not affine in the codes is refused by name.

    Args:
        model: Any Pyro program.
        laws: Law :math:`q` of each code site, by name: what the guide would draw it from.
        values: Values :math:`w` of every other latent site, and of subsample sites.
        args: Of the program.
        kwargs: Of the program.

    Returns:
        Terms and trace; see ``Expectation``.

    Raises:
        NotAffine: If the program is not affine in the codes, or a prior of a latent site depends on
            them; a ``NotImplementedError``.
        NotImplementedError: If a law of the data or of the codes has no closed form here.
        ValueError: If a latent site has neither a law nor a value, a code site is none of the
            program's, or a law is of another shape than the prior.

    References:
        Titsias & Lazaro-Gredilla (2011), NeurIPS 24, eq. (9), for a Gaussian.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     with pyro.plate("data", len(y)):
        ...         z = pyro.sample("codes", dist.Laplace(torch.zeros(3), 1.0).to_event(1))
        ...         pyro.sample("obs", dist.Normal(z @ torch.eye(3), 1.0).to_event(1), obs=y)
        >>> law = dist.Laplace(torch.zeros(2, 3), 0.5).to_event(1)
        >>> expected_log_likelihood(model, {"codes": law}, args=(torch.zeros(2, 3),)).terms
        {'obs': tensor([-3.5068, -3.5068])}
    """
    substitute = _Substitute(laws, values or {})
    try:
        with poutine.trace() as tracer, substitute:
            model(*args, **(kwargs or {}))
    except RuntimeError as error:
        if "TorchScript interpreter" not in str(error):
            raise
        # It drops what Python raised. A fault of the program itself comes up again without moments.
        raise NotAffine(f"Exact met compiled code, which it cannot follow. {INSTEAD}") from error
    trace = prune_subsample_sites(tracer.trace)
    missing = sorted(set(laws) - substitute.met)
    if missing:
        raise ValueError(
            f"Expected {', '.join(map(repr, missing))} to be a latent site of the model, which has "
            f"{_names(trace)}."
        )
    terms = {}
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or (site["infer"] or {}).get("_deterministic"):
            continue
        if site["is_observed"]:
            terms[name] = _term(name, site)
        elif holds_moments(site["fn"]):
            raise NotAffine(
                f"Exact needs priors that do not depend on codes, but that of site {name!r} does: "
                f"its KL has no closed form here. {INSTEAD}"
            )
    return Expectation(terms, trace)


def refusal(
    model: Callable[..., Any],
    laws: Mapping[str, Any],
    values: Mapping[str, Tensor] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> str | None:
    """Why ``expected_log_likelihood`` has no closed form of a program; None if it has one.

    Args:
        model: Any Pyro program.
        laws: As there.
        values: As there.
        args: Of the program.
        kwargs: Of the program.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     z = pyro.sample("codes", dist.Normal(0.0, 1.0))
        ...     pyro.sample("obs", dist.Normal(z.tanh(), 1.0), obs=torch.tensor(1.0))
        >>> refusal(model, {"codes": dist.Normal(0.0, 1.0)})
        'Exact needs a predictor that is affine in the codes; it met torch.Tensor.tanh. Use ...'
    """
    try:
        expected_log_likelihood(model, laws, values, args, kwargs)
    except NotImplementedError as error:
        return str(error)
    return None


class _Substitute(Messenger):
    """Gives a program moments at code sites and known values at the other latent ones."""

    def __init__(self, laws: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.laws = laws
        self.values = values
        self.met: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if msg["is_observed"] or msg["done"]:
            return
        if name in self.laws:
            msg["value"] = _codes(name, self.laws[name], msg["fn"])
            self.met.add(name)
        elif name in self.values:
            msg["value"] = self.values[name]
        elif site_is_subsample(msg):
            return
        else:
            raise ValueError(
                f"Expected a law or a value for each latent site, got neither for {name!r}. Does "
                "the guide have this site?"
            )
        msg["done"] = True


def _codes(name: str, law: Any, prior: Any) -> Moments:
    try:
        fits = torch.broadcast_shapes(law.shape(), prior.shape()) == law.shape()
    except RuntimeError:
        fits = False
    if not fits or law.event_shape != prior.event_shape:
        raise ValueError(
            f"Expected a law of site {name!r} with the batch shape {tuple(prior.batch_shape)} "
            f"and event shape {tuple(prior.event_shape)} of its prior, got "
            f"{tuple(law.batch_shape)} and {tuple(law.event_shape)}."
        )
    return Moments.of(law, name)


def _term(name: str, site: Any) -> Tensor:
    if isinstance(site["value"], Moments):
        raise NotAffine(f"Exact met codes as the data of site {name!r}. {INSTEAD}")
    term = expected_log_prob(site["fn"], site["value"])
    if isinstance(term, Moments):
        raise NotAffine(
            f"Exact cannot see what the law of site {name!r} does with the codes. {INSTEAD}"
        )
    return scale_and_mask(term, site["scale"], site["mask"])


def _names(trace: Trace) -> str:
    names = [n for n, s in trace.nodes.items() if s["type"] == "sample" and not s["is_observed"]]
    return ", ".join(map(repr, names)) or "none"
