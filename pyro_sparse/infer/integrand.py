"""A guide run once for many draws of the codes, and the model run at given values of them.

Draws stand in one leading dimension, left of all plates: shape ``(J, *plates, *event)``. Nothing
but the shapes of values says so, so any program works that takes leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints

from pyro_sparse.distributions.mixed import Mixed, SpikeAndSlab, WithAtom
from pyro_sparse.distributions.moments import Untouched

Program = Callable[..., Any]


def leaf(law: Any) -> Any:
    """The elementwise law below ``to_event``, ``expand`` and ``mask``."""
    shape = None
    while isinstance(
        law, torch.distributions.Independent | ExpandedDistribution | MaskedDistribution
    ):
        if isinstance(law, ExpandedDistribution) and shape is None:
            shape = law.batch_shape
        law = law.base_dist
        if shape is not None and isinstance(law, torch.distributions.Independent):
            shape = shape + law.event_shape[: law.reinterpreted_batch_ndims]
    if shape is not None and isinstance(law, Mixed) and law.batch_shape != shape:
        # A mixed law without an expand of its own.
        return SpikeAndSlab(law.slab.expand(shape), logits=law.logits.expand(shape))
    return law


def is_gated(law: Any) -> bool:
    """Whether a law has an atom at zero: a mixed one, or one with dependent gates."""
    law = leaf(law)
    return isinstance(law, Mixed) or hasattr(law, "rsample_given_gates")


def has_atom(law: Any) -> bool:
    """Whether zero has a probability: a law with gates, or any whose support says so."""
    if is_gated(law):
        return True
    try:
        support = leaf(law).support
    except NotImplementedError:
        return False
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return isinstance(support, WithAtom)


def is_scored(law: Any) -> bool:
    """Whether an estimator has to draw a law: one with an atom, or without a pathwise draw."""
    return is_gated(law) or not law.has_rsample


@dataclass
class Draw:
    """Draws of one site, and what an estimator has to remember of them.

    Attributes:
        value: Shape ``(J, *batch, *event)``, or without ``J`` where one draw serves all.
        log_gates: Log-probability of the gates that are not differentiated pathwise, shape
            ``(J, *batch)``; None where there are none.
        active: Which codes are active, shape of ``value``.
        slab: Draws of the slab, also of inactive codes, shape of ``value``.
    """

    value: Tensor
    log_gates: Tensor | None = None
    active: Tensor | None = None
    slab: Tensor | None = None


@dataclass
class GuideSite:
    """A latent site as the guide states it.

    Attributes:
        law: Distribution, as in the guide: not expanded over draws.
        draw: Its draws.
        auxiliary: Whether the model does not know it.
        lead: Leading shape of the draws: ``(J, 1, ..., 1)``, or empty.
        shared: Whether it stands outside all plates of a program that has some: drawn once.
        follows: Whether its law may depend on gates that were drawn before it.
        plates: Names of its plates by dimension.
        scale: Scale that the guide puts on it.
        mask: Mask that the guide puts on it.
    """

    law: Any
    draw: Draw
    auxiliary: bool
    lead: tuple[int, ...]
    shared: bool = False
    follows: bool = False
    plates: dict[int, str] = field(default_factory=dict)
    scale: Any = 1.0
    mask: Any = None

    def cells(self, dims: int) -> tuple[int, ...]:
        """Plates that it stands in, after one of draws: ``(1, *plates)``, ``dims`` in all."""
        batch = tuple(self.law.batch_shape)[-(dims - 1) :] if dims > 1 else ()
        return (1,) * (dims - len(batch)) + batch


@dataclass
class ModelSite:
    """A site of the model: its law, value, plates, and the scale and mask that they put on it."""

    law: Any
    value: Any
    scale: Any
    mask: Any
    plates: dict[int, str] = field(default_factory=dict)

    def log_prob(self) -> Tensor:
        """Log-density of the value, masked and not scaled; shape of draws and plates."""
        return scale_and_mask(self.law.log_prob(self.value), 1.0, self.mask)


@dataclass
class Layout:
    """Where draws stand.

    Attributes:
        num_draws: ``J``.
        num_plates: Dimensions that plates may take; draws stand left of them.
        leading: Whether there is a dimension of draws: not for a single one, so that programs that
            know no leading dimension work.
    """

    num_draws: int
    num_plates: int
    leading: bool

    def lead(self, batch_dims: int) -> tuple[int, ...]:
        """Shape in front of a site's batch dimensions that makes room for draws."""
        if not self.leading or batch_dims > self.num_plates:
            return ()
        return (self.num_draws, *[1] * (self.num_plates - batch_dims))

    def cells(self, values: Tensor) -> Tensor:
        """Reshape per-plate values to ``(J or 1, *plates)``."""
        missing = self.num_plates + 1 - values.dim()
        return values.reshape(*[1] * missing, *values.shape) if missing > 0 else values

    def check(self, name: str, law: Any, plates: dict[int, str], *, first: bool = False) -> None:
        """Refuse batch dimensions of a site that are neither plates nor draws.

        Args:
            name: Site.
            law: Its distribution.
            plates: Names of its plates by dimension.
            first: Whether there is no draw yet that its law could carry.

        Raises:
            ValueError: If there are any, or plates outside of those counted.
        """
        shape = tuple(law.batch_shape)
        draws = -self.num_plates - 1 if self.leading and not first else 0
        unknown = [
            dim
            for dim in range(-len(shape), 0)
            if shape[dim] != 1 and dim not in plates and dim != draws
        ]
        if unknown or any(-dim > self.num_plates for dim in plates):
            raise ValueError(
                f"Expected no batch dimensions of site {name!r} but those of its plates, "
                f"{sorted(plates.values())}, got batch shape {shape} with {self.num_plates} "
                "dimensions for plates. Use .to_event(n) for dimensions that belong together, "
                "pyro.plate for independent ones, and num_plates= if a later run has more plates."
            )


@dataclass
class Part:
    """One term of the objective: of draws and plates.

    Attributes:
        value: Nats, shape ``(J or 1, *plates)``, with size one for plates that it stands not in.
        plates: Names of its plates by dimension: two plates may share one.
    """

    value: Tensor
    plates: dict[int, str]

    def within(self, plates: dict[int, str]) -> Tensor:
        """Sum over the plates that are not among ``plates``; the dimension of draws stays."""
        dims = [
            dim
            for dim in range(1 - self.value.dim(), 0)
            if self.value.shape[dim] > 1 and self.plates.get(dim) != plates.get(dim)
        ]
        return self.value.sum(dims, keepdim=True) if dims else self.value


def check_plates(
    name: str, values: Tensor, plates: dict[int, str], draws: tuple[int, int] | None = None
) -> None:
    """Refuse log-densities with dimensions that are neither plates nor draws.

    Args:
        name: Site.
        values: Its log-density.
        plates: Names of its plates by dimension.
        draws: Dimension and number of draws; None where there are none.

    Raises:
        ValueError: If there are any: data wider than their law, or a plate that is missing.
    """
    shape = tuple(values.shape)
    unknown = [
        dim
        for dim in range(-len(shape), 0)
        if shape[dim] != 1 and dim not in plates and (dim, shape[dim]) != draws
    ]
    if unknown:
        raise ValueError(
            f"Expected a log-density of site {name!r} with the dimensions of its plates, "
            f"{sorted(plates.values())}, got the shape {shape}. Are the data wider than their "
            "law? Use .to_event(n) for dimensions that belong together, pyro.plate for "
            "independent ones."
        )


def plates_of(frames: Any) -> dict[int, str]:
    """Names of the plates around a site by dimension."""
    return {frame.dim: frame.name for frame in frames if frame.vectorized}


class _Subsamples(Messenger):
    """Gives every plate the subsample that it had in the first program that drew one."""

    def __init__(self, known: dict[str, Any]) -> None:
        super().__init__()
        self.known = known

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["name"] in self.known:
            msg["value"] = self.known[msg["name"]]
            msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self.known[msg["name"]] = msg["value"]


class _Drawing(Messenger):
    """Draws every latent site of a guide ``J`` times; the estimator draws those with gates."""

    def __init__(
        self,
        layout: Layout,
        draw: Callable[[Any, tuple[int, ...]], Draw],
        carried: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.layout = layout
        self.draw = draw
        self.carried = carried
        self.sites: dict[str, GuideSite] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or site_is_subsample(msg):
            return
        law, name, layout = msg["fn"], msg["name"], self.layout
        if msg["is_observed"]:
            if msg["infer"].get("_deterministic"):
                return
            raise NotImplementedError(
                f"Expected a guide of latent sites, got the observed or factor site {name!r}. Give "
                "it to the model, or use Trace_ELBO. (Or is the guide the first argument, and the "
                "model the second?)"
            )
        plates = plates_of(msg["cond_indep_stack"])
        # What stands outside all plates is shared by all data: drawn once a step.
        shared = not plates and layout.num_plates > 0 and not is_scored(law)
        lead = () if shared else layout.lead(len(law.batch_shape))
        if name in self.carried:
            draw = Draw(Untouched(law))
        elif is_scored(law):
            draw = self.draw(law, lead)
        elif isinstance(leaf(law), dist.Delta):
            draw, lead = Draw(law.rsample()), ()  # a point: its gradient goes on
        else:
            draw = Draw(law.rsample(torch.Size(lead)))
        carries_draws = len(law.batch_shape) > layout.num_plates
        self.sites[name] = GuideSite(
            law,
            draw,
            auxiliary=bool(msg["infer"].get("is_auxiliary")),
            lead=lead,
            shared=shared,
            follows=carries_draws and any(is_scored(site.law) for site in self.sites.values()),
            plates=plates,
            scale=msg["scale"],
            mask=msg["mask"],
        )
        msg["value"] = draw.value
        msg["done"] = True


class _Given(Messenger):
    """Gives every latent site of a model its value."""

    def __init__(self, values: dict[str, Any], layout: Layout) -> None:
        super().__init__()
        self.values = values
        self.layout = layout

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or msg["infer"].get("_deterministic"):
            return
        name = msg["name"]
        self.layout.check(name, msg["fn"], plates_of(msg["cond_indep_stack"]))
        if msg["is_observed"] or msg["done"]:
            return
        if name not in self.values:
            raise ValueError(
                f"Expected the guide to sample every latent site of the model, got none for "
                f"{name!r}; it samples {sorted(self.values)}."
            )
        msg["value"] = self.values[name]
        msg["done"] = True


def run_guide(
    guide: Program,
    args: Any,
    kwargs: Any,
    layout: Layout,
    draw: Callable[[Any, tuple[int, ...]], Draw],
    subsamples: dict[str, Any] | None = None,
    carried: Collection[str] = (),
) -> dict[str, GuideSite]:
    """Latent sites of a guide, drawn.

    Args:
        guide: The program.
        args: Its arguments.
        kwargs: Its keyword arguments.
        layout: Where draws stand.
        draw: Draws a gated law, given the leading shape.
        subsamples: Subsamples of plates by name: those known are taken, others are added.
        carried: Sites that are not drawn: their value may not be looked at.
    """
    drawing = _Drawing(layout, draw, carried)
    known = _Subsamples({} if subsamples is None else subsamples)
    with poutine.block(hide_types=["sample"]), known, drawing:
        guide(*args, **kwargs)
    return drawing.sites


@dataclass
class Terms:
    """A model at given values: its observed and its latent sites."""

    observed: dict[str, ModelSite] = field(default_factory=dict)
    latent: dict[str, ModelSite] = field(default_factory=dict)


class Integrand:
    """The model as a function of its latent values.

    Args:
        model: Generative program.
        args: Its arguments.
        kwargs: Its keyword arguments.
        layout: Where draws stand.
        subsamples: Subsamples of plates by name, as the guide drew them.
    """

    def __init__(
        self,
        model: Program,
        args: Any,
        kwargs: Any,
        layout: Layout,
        subsamples: dict[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.args = args
        self.kwargs = kwargs
        self.layout = layout
        self.subsamples: dict[str, Any] = {} if subsamples is None else subsamples

    def run(self, values: dict[str, Any]) -> Terms:
        """Sites of the model with its latent values given.

        Raises:
            ValueError: If a latent site of the model has no value.
        """
        given, known = _Given(values, self.layout), _Subsamples(self.subsamples)
        with poutine.block(hide_types=["sample"]), poutine.trace() as tracer, known, given:
            self.model(*self.args, **self.kwargs)
        terms = Terms()
        for name, site in tracer.trace.nodes.items():
            if site["type"] != "sample" or site_is_subsample(site):
                continue
            if (site["infer"] or {}).get("_deterministic"):
                continue
            plates = plates_of(site["cond_indep_stack"])
            found = ModelSite(site["fn"], site["value"], site["scale"], site["mask"], plates)
            (terms.observed if site["is_observed"] else terms.latent)[name] = found
        return terms


def guess_num_plates(model: Program, guide: Program, args: Any, kwargs: Any) -> int:
    """Dimensions that the plates of two programs take, from one run of each."""
    with torch.no_grad(), torch.random.fork_rng(), poutine.block():
        of_guide = poutine.trace(guide).get_trace(*args, **kwargs)
        of_model = poutine.trace(poutine.replay(model, trace=of_guide)).get_trace(*args, **kwargs)
    dims = [
        -dim
        for trace in (of_guide, of_model)
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for dim in plates_of(site["cond_indep_stack"])
    ]
    return max(dims, default=0)
