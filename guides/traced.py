"""Any Pyro program as a function of its codes: what a proximal-gradient step asks of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine import runtime
from pyro.poutine.messenger import Messenger
from pyro.poutine.plate_messenger import PlateMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_sparse.distributions import prox
from pyro_sparse.guides.packing import CodeSite, Packing
from pyro_sparse.infer.integrand import check_plates, is_gated, leaf
from pyro_sparse.infer.sites import leaves

Program = Callable[..., Any]


class Recorded(Messenger):
    """Keeps the subsamples of plates by name."""

    def __init__(self) -> None:
        super().__init__()
        self.subsamples: dict[str, Any] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self.subsamples[msg["name"]] = msg["value"]


class _Run(Messenger):
    """One run of a program at given values: nothing of it is seen outside, but new subsamples.

    A subsample that is drawn for the first time goes out, so that the guide's trace holds it and
    the model replays it; then it is known, and stays.

    Args:
        values: Of latent sites by name.
        subsamples: Of plates by name; those drawn anew are added.
        first: Whether latent sites without a value become codes, at zero.
    """

    def __init__(
        self, values: dict[str, Tensor], subsamples: dict[str, Any], *, first: bool = False
    ) -> None:
        super().__init__()
        self.values = values
        self.subsamples = subsamples
        self.first = first
        self.sites: dict[str, Any] = {}
        self.refused: dict[str, str] = {}
        # Plates around the guide, such as that of particles: their messages stop here.
        self.around = [
            messenger
            for messenger in reversed(runtime._PYRO_STACK)
            if isinstance(messenger, PlateMessenger) and messenger.dim is not None
        ]

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            if name in self.subsamples:
                if msg["value"] is None:
                    msg["value"] = self.subsamples[name]
                msg["done"] = msg["stop"] = True
            return
        msg["stop"] = True
        for plate in self.around:
            plate._process_message(msg)
        if msg["is_observed"] or msg["done"]:
            return
        if name in self.values:
            msg["value"], msg["done"] = self.values[name], True
        elif not self.first:
            raise ValueError(
                f"Expected the same latent sites whatever the codes are, got {name!r} at some of "
                "them alone: an encoder is made of a program whose sites are always the same."
            )
        else:
            self._meet(msg)

    def _meet(self, msg: Any) -> None:
        """A latent site without a value: codes, or one to refuse."""
        law = msg["fn"]
        reason = _reason(law, msg["cond_indep_stack"])
        if reason is not None:
            self.refused[msg["name"]] = reason
            return
        zeros = _tensor_of(law).new_zeros(law.batch_shape + law.event_shape)
        msg["value"], msg["done"] = zeros.requires_grad_(), True
        msg["infer"] = {**msg["infer"], "_code": True}

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self.subsamples[msg["name"]] = msg["value"]
        elif not msg["infer"].get("_deterministic"):
            self.sites[msg["name"]] = msg

    def codes(self) -> list[Any]:
        """Messages of the sites that became codes."""
        return [msg for msg in self.sites.values() if msg["infer"].get("_code")]


class Traced:
    """A program whose codes are free and whose other latent sites are given.

    Args:
        model: The program.
        args: Its arguments.
        kwargs: Its keyword arguments.
        values: Of its other latent sites by name.
        subsamples: Of its plates by name, as far as something drew them before.

    Attributes:
        sites: Its code sites.
        packing: How their values make one vector for each datum.
        start: Zeros, packed.

    Raises:
        ValueError: If a latent site can be no code site, or what tells data apart is not what the
            plates say; names the sites.
    """

    def __init__(
        self,
        model: Program,
        args: Any,
        kwargs: Any,
        values: dict[str, Tensor],
        subsamples: dict[str, Any],
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.values = values
        self.subsamples = subsamples
        with torch.enable_grad():
            run = self._run({}, first=True)
            _check_refused(run.refused)
            found = run.codes()
            _check_codes(found, run.sites)
            self.sites = tuple(_code_site(msg) for msg in found)
            _check_outside(self.sites, {plate.name for plate in run.around})
            starts = {msg["name"]: msg["value"] for msg in found}
            terms = {name: _log_prob(run.sites[name]) for name in run.sites if name not in starts}
            self.anchor, self.terms = self._depending(terms, starts)
            self._check_laws(starts)
            for name in self.terms:
                check_plates(name, terms[name], _plates(run.sites[name]))
            shared = [site.plates for site in self.sites]
            shared += [_plates(run.sites[name]) for name in self.terms]
            dims = [
                dim for dim, name in shared[0].items() if all(p.get(dim) == name for p in shared)
            ]
            self.packing = Packing(self.sites, tuple(dims))
            self.weights: dict[str, Any] = {site.name: 1.0 for site in self.sites}
            self.reference = self._reference()
            self._check_apart({name: terms[name] for name in self.terms}, starts)
        self.start = self.packing.pack({name: value.detach() for name, value in starts.items()})
        self.laws = {site.name: site.law for site in self.sites}

    # What steps ask

    def value(self, codes: Tensor) -> Tensor:
        """Minus the log-density of all that depends on the codes, in units of their own scale.

        Args:
            codes: Packed.

        Returns:
            Shape ``data_shape``.
        """
        run = self._run(self.packing.unpack(codes))
        self.laws = {site.name: run.sites[site.name]["fn"] for site in self.sites}
        total = sum(self.packing.sum(_log_prob(run.sites[name])) for name in self.terms)
        return -total / self.reference

    def gradient(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The value, detached, and its gradient, differentiable where gradients are taken."""
        outer = torch.is_grad_enabled() and (codes.requires_grad or self.anchor is not None)
        with torch.enable_grad():
            if not outer:
                point = codes.detach().requires_grad_()
            else:
                point = codes if codes.requires_grad else _Opened.apply(codes, self.anchor)
            value = self.value(point)
            (gradient,) = torch.autograd.grad(value.sum(), point, create_graph=outer)
        return value.detach(), gradient

    def prox(self, codes: Tensor, step: Tensor) -> Tensor:
        """Proximal step of all priors, each weighted as the program weights it.

        Args:
            codes: Packed.
            step: Shape ``(*data_shape, 1)``.
        """
        moved = {}
        for site, value in zip(self.sites, self.packing.unpack(codes).values()):
            own = self.packing.spread(step.squeeze(-1), site) * self._weight(site)
            moved[site.name] = _masked_prox(site.law, value, own)
        return self.packing.pack(moved)

    # Around them

    def check_laws_at(self, codes: Tensor) -> None:
        """Refuse a code site whose law was another one where the program was run last.

        Raises:
            ValueError: If there is one.
        """
        values = self.packing.unpack(codes.detach() + 1)
        for site in self.sites if len(self.sites) > 1 else ():
            with torch.no_grad():
                before = _masked_prox(site.law, values[site.name], 1.0)
                after = _masked_prox(self.laws[site.name], values[site.name], 1.0)
            if not torch.equal(before, after) and bool(before.isfinite().all()):
                raise ValueError(_DEPENDENT.format(name=site.name))

    def sample(self, codes: dict[str, Tensor]) -> None:
        """State each code site as a point in its plates."""
        known = poutine.block(hide_fn=site_is_subsample)
        plates: dict[str, Any] = {}
        around = {messenger.name for messenger in _Run({}, {}).around}
        for site in self.sites:
            with ExitStack() as stack:
                for frame in site.frames:
                    if frame.name in around:
                        continue
                    if frame.name not in plates:
                        with known:
                            plates[frame.name] = self._plate(frame)
                    stack.enter_context(plates[frame.name])
                pyro.sample(site.name, dist.Delta(codes[site.name], event_dim=site.event_dim))

    def _plate(self, frame: Any) -> Any:
        if frame.size == -1:
            return pyro.plate(frame.name, dim=frame.dim)
        index = self.subsamples[frame.name]
        return pyro.plate(frame.name, frame.full_size, subsample=index, dim=frame.dim)

    def _run(self, values: dict[str, Tensor], *, first: bool = False) -> _Run:
        run = _Run({**self.values, **values}, self.subsamples, first=first)
        with run:
            self.model(*self.args, **self.kwargs)
        return run

    def _weight(self, site: CodeSite) -> Any:
        """Scale and mask of a site, relative to the unit of a datum, times its threshold factor."""
        weight = site.per_cell(site.scale) * self.weights[site.name]
        if isinstance(self.reference, Tensor):
            weight = weight / self.packing.spread(self.reference, site)
        else:
            weight = weight / self.reference
        if site.mask is None:
            return weight
        return weight * site.per_cell(site.mask)

    def _reference(self) -> Any:
        """Scale of the first code site, for each datum where there are several."""
        scale, site = self.sites[0].scale, self.sites[0]
        if not isinstance(scale, Tensor):
            return float(scale)
        cells = scale.expand(site.batch_shape).to(site.like.dtype)
        counted = self.packing.sum(torch.ones_like(cells))
        return self.packing.sum(cells) / counted

    def _depending(
        self, terms: dict[str, Tensor], starts: dict[str, Tensor]
    ) -> tuple[Tensor | None, tuple[str, ...]]:
        """Something other than codes that gets a gradient, and the terms that depend on codes."""
        codes = {id(value) for value in starts.values()}
        anchor, depending = None, []
        for name, term in terms.items():
            found = leaves(term)
            if any(id(value) in codes for value in found):
                depending.append(name)
                others = [value for value in found if id(value) not in codes]
                anchor = others[0] if anchor is None and others else anchor
        if not depending:
            raise ValueError(
                f"Expected data that depend on the codes {sorted(starts)}, got none among "
                f"{sorted(terms)}. Were the data passed, as obs=? Is the path from codes to data "
                "differentiable?"
            )
        return anchor, tuple(depending)

    def _check_laws(self, starts: dict[str, Tensor]) -> None:
        for site in self.sites:
            found = leaves(_masked_prox(site.law, starts[site.name].detach(), 1.0))
            if any(value is start for value in found for start in starts.values()):
                raise ValueError(_DEPENDENT.format(name=site.name))

    def _check_apart(self, terms: dict[str, Tensor], starts: dict[str, Tensor]) -> None:
        """Refuse data of which one's density moves with another's codes."""
        total = sum(self.packing.sum(term) for term in terms.values())
        assert isinstance(total, Tensor)
        if total.numel() < 2:
            return
        names, values = list(starts), list(starts.values())
        slopes = torch.autograd.grad(
            total.flatten()[0], values, retain_graph=True, allow_unused=True
        )
        given = [torch.zeros_like(v) if s is None else s for v, s in zip(values, slopes)]
        others = self.packing.pack(dict(zip(names, given))).flatten(0, -2)[1:]
        if bool((others != 0).any()):
            plates = sorted(self.sites[0].plates[dim] for dim in self.packing.dims)
            raise ValueError(
                f"Expected data that depend on codes of their own alone in the plates {plates}, "
                f"got terms of {sorted(terms)} that depend on those of others too. Take the "
                "coupled dimension into the event by .to_event(n), or switch layers that look at "
                "the whole batch, such as BatchNorm, to eval()."
            )


_DEPENDENT = (
    "Expected code sites whose laws do not depend on other codes, got {name!r}, whose law does: "
    "the proximal step of each prior stands for itself. Give one of the two a guide of its own by "
    "rest=, which is called first."
)


class _Opened(torch.autograd.Function):
    """A constant as a variable whose gradient goes nowhere.

    Derivatives by it can be taken, and it is no leaf that a look at the graph would take for a
    parameter: it hangs on one, to which it sends nothing.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def _log_prob(msg: Any) -> Tensor:
    """Log-density of a site, scaled and masked; shape of its plates."""
    return scale_and_mask(msg["fn"].log_prob(msg["value"]), msg["scale"], msg["mask"])


def _plates(msg: Any) -> dict[int, str]:
    return {frame.dim: frame.name for frame in msg["cond_indep_stack"] if frame.vectorized}


def _code_site(msg: Any) -> CodeSite:
    law = msg["fn"]
    check_plates(msg["name"], torch.empty(law.batch_shape, device="meta"), _plates(msg))
    return CodeSite(
        name=msg["name"],
        law=law,
        shape=tuple(msg["value"].shape),
        event_dim=len(law.event_shape),
        frames=tuple(msg["cond_indep_stack"]),
        scale=msg["scale"],
        mask=msg["mask"],
        like=msg["value"].detach(),
    )


# Exact types: a subclass may have a prox of its own.
_WRAPPERS = (
    torch.distributions.Independent,
    dist.Independent,
    ExpandedDistribution,
    MaskedDistribution,
)


def _unwrapped(law: Any) -> tuple[Any, Any]:
    """A law below its wrappers, and the product of its masks, shaped to multiply a value."""
    mask: Any = 1.0
    while type(law) in _WRAPPERS:
        if isinstance(law, MaskedDistribution):
            own = law._mask
            if isinstance(own, Tensor):
                own = own.reshape(*own.shape, *[1] * len(law.event_shape))
            mask = mask * own
        law = law.base_dist
    return law, mask


def _masked_prox(law: Any, value: Tensor, step: Any) -> Tensor:
    """Proximal step of a law: where it is masked a code has no penalty."""
    law, mask = _unwrapped(law)
    return prox(law, value, step * mask)


def _tensor_of(law: Any) -> Tensor:
    """A tensor of the dtype and device of a law's values."""
    base = leaf(law)
    held = (getattr(base, name, None) for name in base.arg_constraints)
    for value in held:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach()
    with torch.no_grad():
        return base.sample()


def _reason(law: Any, frames: Iterable[Any]) -> str | None:
    """Why a latent site can be no code site; None if it can."""
    base = leaf(law)
    kind = type(base).__name__
    if is_gated(law):
        return f"{kind}, which has an atom at zero"
    if prox.dispatch(type(_unwrapped(law)[0])) is prox.dispatch(object):
        try:
            discrete = bool(base.support.is_discrete)
        except NotImplementedError:
            discrete = False
        return f"{kind}, which is discrete" if discrete else f"{kind}, without a registered prox"
    if any(not frame.vectorized for frame in frames):
        return f"{kind}, in a plate that is a loop"
    return None


def _check_refused(refused: dict[str, str]) -> None:
    if refused:
        listed = ", ".join(f"{name!r} ({reason})" for name, reason in refused.items())
        raise ValueError(
            f"Expected latent sites that a proximal step can be taken on, got {listed}. Give them "
            "a guide of their own, such as rest=AutoNormal(poutine.block(model, "
            f"expose={list(refused)})), or register a prox with "
            "pyro_sparse.distributions.register_prox. Codes with an atom at zero have "
            "guides.Thresholded; loops become `with pyro.plate(...)`."
        )


def _check_codes(found: list[Any], sites: dict[str, Any]) -> None:
    if not found:
        raise ValueError(
            "Expected a program with a latent site that rest does not sample, to encode; got the "
            f"sites {sorted(sites)}."
        )


def _check_outside(sites: tuple[CodeSite, ...], around: set[str]) -> None:
    """Refuse a code site outside all plates beside others inside."""
    outside = [site.name for site in sites if set(site.plates.values()) <= around]
    if outside and len(outside) < len(sites):
        inside = [site.name for site in sites if site.name not in outside]
        raise ValueError(
            f"Expected all code sites inside plates, as {inside} are, got {outside} outside: what "
            "all data share is no code of a datum. Give it a guide of its own, such as "
            f"rest=AutoNormal(poutine.block(model, expose={outside}))."
        )
