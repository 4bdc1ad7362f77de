"""What a bundle may hold out of the parts that stand left of ``infer``, registered on import."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import pyro_sparse.infer.savable_layers  # noqa: F401  registers torch's layers
from pyro_sparse.dictionaries import Composition, Conv, Dense, Interior, Overhang, Periodic
from pyro_sparse.distributions import (
    GammaThresholded,
    GroupLaplace,
    HardThresholded,
    KnownSupport,
    Rate,
    RelaxedSpikeAndSlab,
    ShiftedThresholded,
    SignedLaplace,
    SoftThresholded,
    SpikeAndSlab,
)
from pyro_sparse.infer.bundle import register_savable
from pyro_sparse.likelihoods import (
    Bernoulli,
    Binomial,
    Exponential,
    Gamma,
    Gaussian,
    NegativeBinomial,
    Offset,
    Poisson,
    Stabilised,
)
from pyro_sparse.ops import check_tensor
from pyro_sparse.solvers import (
    FISTA,
    ISTA,
    Backtracking,
    Bias,
    Fixed,
    HardThreshold,
    NonMaximumSuppression,
    PowerIteration,
    Proximal,
    TopK,
    Unrolled,
)


def _atoms(dictionary: nn.Module) -> dict[str, Any]:
    """Its atoms as they are stored: the same tensor as in its state, which costs no space."""
    if parametrize.is_parametrized(dictionary, "atoms"):
        raw = dictionary.parametrizations["atoms"].original  # type: ignore[index,union-attr]
        return {"atoms": raw.detach(), "unit_norm": True}
    return {"atoms": dictionary.atoms.detach(), "unit_norm": False}  # type: ignore[operator]


def _conv(atoms: Tensor, stride: tuple[int, ...], boundary: Any, unit_norm: bool) -> Conv:
    num_atoms, channels, *kernel = atoms.shape
    return Conv(
        num_atoms,
        channels,
        tuple(kernel),
        stride,
        boundary=boundary,
        atoms=atoms,
        unit_norm=unit_norm,
    )


def _composition(input_shape: tuple[int, ...], **arguments: Any) -> Composition:
    if math.prod(input_shape) > 2**26:  # the operator is tried on data of that shape
        raise ValueError(f"Expected input_shape of at most 2**26 entries, got {input_shape}.")
    return Composition(input_shape=input_shape, **arguments)


def _law(cls: type) -> Callable[..., Any]:
    def build(**arguments: Tensor) -> Any:
        shapes = {tuple(value.shape) for value in arguments.values()}
        if len(shapes) != 1:  # different ones could broadcast to any size
            raise ValueError(f"Expected tensors of one shape, got {sorted(shapes)}.")
        cls(**arguments, validate_args=True)
        return cls(**arguments)

    return build


def _gated(cls: type) -> Callable[..., Any]:
    def build(slab: Any, **arguments: Tensor) -> Any:
        batch = tuple(getattr(slab, "batch_shape", ()))
        shapes = {batch, *(tuple(value.shape) for value in arguments.values())}
        if len(shapes) != 1:  # different ones could broadcast to any size
            raise ValueError(f"Expected a slab and tensors of one shape, got {sorted(shapes)}.")
        cls(slab, **arguments, validate_args=True)
        return cls(slab, **arguments)

    return build


def _thresholded(cls: type) -> Callable[..., Any]:
    def build(base: Any, threshold: Tensor, **options: bool) -> Any:
        shapes = {tuple(getattr(base, "batch_shape", ())), tuple(threshold.shape)}
        if len(shapes) != 1:  # different ones could broadcast to any size
            raise ValueError(f"Expected a base and threshold of one shape, got {sorted(shapes)}.")
        if not all(type(value) is bool for value in options.values()):
            raise ValueError(f"Expected options that are true or false, got {options}.")
        cls(base, threshold, **options, validate_args=True)
        return cls(base, threshold, **options)

    return build


def _grouped(rate: Tensor, event_shape: Any, group: Any, one_sided: bool) -> GroupLaplace:
    made = GroupLaplace(rate, event_shape, group=group, one_sided=one_sided, validate_args=True)
    if math.prod(made.event_shape) > 2**26:  # its mean is of that shape
        raise ValueError(f"Expected event_shape of at most 2**26 entries, got {event_shape}.")
    return GroupLaplace(rate, event_shape, group=group, one_sided=one_sided)


def _known_support(base: Any, active: Tensor) -> KnownSupport:
    shapes = {tuple(getattr(base, "batch_shape", ())), tuple(active.shape)}
    if len(shapes) != 1:  # different ones could broadcast to any size
        raise ValueError(f"Expected a base and active of one shape, got {sorted(shapes)}.")
    return KnownSupport(base, active)


def _independent(base: Any, dims: int) -> Any:
    if type(dims) is not int or not 0 <= dims <= len(base.batch_shape):
        raise ValueError(f"Expected 0 to {len(base.batch_shape)} dims, got {dims}.")
    return dist.Independent(base, dims)


def _learned(name: str) -> Callable[[Any], dict[str, Any]]:
    """Arguments of a likelihood with one parameter that may be learned."""

    def arguments(likelihood: Any) -> dict[str, Any]:
        held = {"likelihood": likelihood.likelihood} if name == "offset" else {}
        value = getattr(likelihood, name).detach()
        learned = any(True for _ in likelihood.parameters(recurse=False)) or bool(
            parametrize.is_parametrized(likelihood)
        )
        return {**held, name: value, "trainable": learned}

    return arguments


def _proximal(log_factor: Tensor | None, decay: float) -> Proximal:
    if log_factor is None:
        return Proximal(decay=decay)
    check_tensor("log_factor", log_factor)
    if log_factor.dim() != 1:
        raise ValueError(f"Expected log_factor of shape (atoms,), got {tuple(log_factor.shape)}.")
    made = Proximal(len(log_factor), decay=decay).to(log_factor.dtype)
    with torch.no_grad():
        made.log_factor.copy_(log_factor)  # type: ignore[union-attr]
    return made


def _register_all() -> None:
    def listed(*names: str) -> Callable[[Any], dict[str, Any]]:
        return lambda value: {name: getattr(value, name) for name in names}

    place = "pyro_sparse.dictionaries."
    register_savable(
        Dense,
        name=place + "Dense",
        arguments=_atoms,
        build=lambda atoms, unit_norm: Dense(*atoms.shape, atoms=atoms, unit_norm=unit_norm),
    )
    register_savable(
        Conv,
        name=place + "Conv",
        arguments=lambda conv: {**_atoms(conv), **listed("stride", "boundary")(conv)},
        build=_conv,
    )
    register_savable(
        Composition,
        name=place + "Composition",
        arguments=lambda seen: {
            **listed("operator", "dictionary", "input_shape")(seen),
            "operator_squared_norm": float(seen.operator_squared_norm),
        },
        build=_composition,
    )
    for boundary in (Interior, Overhang, Periodic):
        register_savable(boundary, name=place + boundary.__name__)
    for method in (ISTA, FISTA):
        register_savable(method, name=f"pyro_sparse.solvers.{method.__name__}")
    register_savable(
        Unrolled,
        name="pyro_sparse.solvers.Unrolled",
        arguments=lambda solver: {
            **listed("dictionary", "likelihood", "num_steps", "method", "shrinkage")(solver),
            **listed("step_size", "lipschitz", "analysis", "synthesis", "recurrence")(solver),
        },
    )
    place = "pyro_sparse.solvers."
    register_savable(
        Proximal,
        name=place + "Proximal",
        arguments=lambda shrinkage: {
            "log_factor": None if shrinkage.log_factor is None else shrinkage.log_factor.detach(),
            "decay": shrinkage.decay,
        },
        build=_proximal,
    )
    register_savable(HardThreshold, name=place + "HardThreshold")
    register_savable(
        Backtracking,
        name=place + "Backtracking",
        arguments=lambda step: {
            "first": None if step.initial is None else step.initial.step,
            "shrink": step.shrink,
        },
    )
    register_savable(Fixed, name=place + "Fixed")
    register_savable(PowerIteration, name=place + "PowerIteration")
    register_savable(
        Bias,
        name=place + "Bias",
        arguments=lambda shrinkage: {
            "init": shrinkage.bias.detach(),
            "two_sided": shrinkage.two_sided,
        },
    )
    register_savable(TopK, name=place + "TopK")
    register_savable(NonMaximumSuppression, name=place + "NonMaximumSuppression")
    place = "pyro_sparse.likelihoods."
    for likelihood in (Poisson, Bernoulli, Exponential):
        register_savable(likelihood, name=place + likelihood.__name__, arguments=lambda _: {})
    register_savable(Binomial, name=place + "Binomial")
    register_savable(Stabilised, name=place + "Stabilised")
    for kind, parameter in (
        (NegativeBinomial, "total_count"),
        (Gamma, "concentration"),
        (Offset, "offset"),
    ):
        register_savable(kind, name=place + kind.__name__, arguments=_learned(parameter))
    register_savable(
        Gaussian,
        name="pyro_sparse.likelihoods.Gaussian",
        arguments=lambda likelihood: {
            "scale": likelihood.scale.detach(),
            "trainable": parametrize.is_parametrized(likelihood, "scale"),
        },
    )
    laws: dict[Any, tuple[str, ...]] = {
        dist.Laplace: ("loc", "scale"),
        dist.Normal: ("loc", "scale"),
        dist.LogNormal: ("loc", "scale"),
        dist.HalfNormal: ("scale",),
        dist.Exponential: ("rate",),
        dist.Gamma: ("concentration", "rate"),
    }
    place = "pyro.distributions."
    for law, names in laws.items():
        register_savable(law, name=place + law.__name__, arguments=listed(*names), build=_law(law))
    register_savable(
        dist.Independent,
        name=place + "Independent",
        arguments=lambda law: {"base": law.base_dist, "dims": law.reinterpreted_batch_ndims},
        build=_independent,
    )
    place = "pyro_sparse.distributions."
    register_savable(
        GammaThresholded,
        name=place + "GammaThresholded",
        arguments=listed("loc", "scale", "concentration", "rate"),
        build=_law(GammaThresholded),
    )
    register_savable(
        SignedLaplace,
        name=place + "SignedLaplace",
        arguments=listed("rate", "signs"),
        build=_law(SignedLaplace),
    )
    register_savable(
        GroupLaplace,
        name=place + "GroupLaplace",
        arguments=lambda law: {
            **listed("rate", "group", "one_sided")(law),
            "event_shape": tuple(law.event_shape),
        },
        build=_grouped,
    )
    register_savable(
        KnownSupport,
        name=place + "KnownSupport",
        arguments=lambda law: {"base": law.base_law, "active": law.active},
        build=_known_support,
    )
    for gated, more in ((SpikeAndSlab, ()), (RelaxedSpikeAndSlab, ("temperature",))):
        register_savable(
            gated,
            name=place + gated.__name__,
            arguments=listed("slab", "logits", *more),
            build=_gated(gated),
        )
    for thresholded, more in (
        (SoftThresholded, ("one_sided",)),
        (ShiftedThresholded, ("one_sided",)),
        (HardThresholded, ()),
    ):
        register_savable(
            thresholded,
            name=place + thresholded.__name__,
            arguments=listed("base", "threshold", *more),
            build=_thresholded(thresholded),
        )
    register_savable(
        Rate,
        name="pyro_sparse.distributions.Rate",
        arguments=lambda rate: {"init": rate.value.detach()},
    )


_register_all()
