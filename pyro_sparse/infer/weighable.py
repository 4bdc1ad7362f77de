"""Which models and guides have importance weights; the others are refused by name."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_sparse.infer.integrand import has_atom, leaf
from pyro_sparse.infer.numbers import check_whole

PLATE_OF_DRAWS = "_pyro_sparse_draws"


class PointEstimate(ValueError):
    """Raised where a guide has no density at a latent site, and so no weights."""


def plates_of(site: Any) -> list[Any]:
    """Plates of a site from left to right, but for that of the draws."""
    frames = (f for f in site["cond_indep_stack"] if f.vectorized and f.name != PLATE_OF_DRAWS)
    return sorted(frames, key=lambda frame: frame.dim)


def check_arguments(model: Any, guide: Any, y: Any, num_data: Any, mask: Any, plate: Any) -> None:
    """Refuse arguments of a wrong kind, before anything runs."""
    for name, program in (("model", model), ("guide", guide)):
        if not callable(program):
            raise TypeError(
                f"Expected {name} to be a program, a module or a function, got "
                f"{type(program).__name__}."
            )
    if not isinstance(y, Tensor):
        raise TypeError(
            f"Expected y to be a tensor, got {type(y).__name__}. Try torch.as_tensor(y)."
        )
    if y.dim() == 0 or len(y) == 0:
        raise ValueError(f"Expected y of shape (n, *signal_shape), n >= 1, got {tuple(y.shape)}.")
    if num_data is not None:
        check_whole("num_data", num_data, len(y))
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"Expected mask to be a boolean tensor, got {kind}.")
    if not isinstance(plate, str):
        raise TypeError(f"Expected plate to be a name, got {type(plate).__name__}.")


def check_plates(name: str, site: Any, plate: str, size: int) -> None:
    """Refuse a sequential plate of the data, and subsampling inside a program."""
    for frame in site["cond_indep_stack"]:
        if frame.name != plate:
            if frame.vectorized and frame.size != frame.full_size:
                raise NotImplementedError(
                    f"Expected only plate {plate!r} to be subsampled, got {frame.size} of "
                    f"{frame.full_size} in plate {frame.name!r} at site {name!r}."
                )
        elif not frame.vectorized:
            raise NotImplementedError(
                f"Expected plate {plate!r} to be vectorised, got the sequential one at site "
                f"{name!r}. Write `with pyro.plate(...)` in place of `for`."
            )
        elif frame.size != size:
            raise NotImplementedError(
                f"Expected plate {plate!r} to hold the {size} data that the programs are handed, "
                f"got {frame.size} of {frame.full_size} at site {name!r}. Hand over the minibatch "
                "alone and write subsample_size=len(y)."
            )


def check_pair(of_guide: dict[str, Any], of_model: dict[str, Any]) -> None:
    """Refuse sites that only one program has, and an atom against none."""
    for name, site in of_guide.items():
        if site["is_observed"]:
            raise NotImplementedError(
                f"Expected a guide without observed sites, got {name!r}: it has no weight."
            )
        if name not in of_model and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"Expected every site of the guide in the model too, got {name!r} in the guide "
                "alone. Mark it infer={'is_auxiliary': True} if it only helps to draw others."
            )
    for name, site in of_model.items():
        if site["is_observed"]:
            continue
        if name not in of_guide:
            raise NotImplementedError(
                f"Expected the guide to sample every latent site of the model, got none for "
                f"{name!r}. If it is enumerated, sum it out in the model, or sample it in the "
                "guide too."
            )
        pair = [(s["fn"], has_atom(s["fn"])) for s in (of_model[name], of_guide[name])]
        (prior, in_model), (law, in_guide) = pair
        if in_model != in_guide:
            with_atom = "model" if in_model else "guide"
            raise ValueError(
                f"Expected model and guide to agree on an atom at zero at site {name!r}, got "
                f"{type(leaf(prior)).__name__} in the model and {type(leaf(law)).__name__} in the "
                f"guide: only the {with_atom} has one, so weights would compare a probability "
                "with a density. Use a law with an atom in both, such as SpikeAndSlab, or in none."
            )


def check_points(of_guide: dict[str, Any], of_model: dict[str, Any], plate: str) -> None:
    """A point estimate has no density; an autoguide's Delta is a transformed auxiliary site."""
    points, sources = {}, {}
    for name, site in of_guide.items():
        if not isinstance(leaf(site["fn"]), dist.Delta):
            if site["infer"].get("is_auxiliary"):
                sources[name] = site
        elif name not in of_model or not isinstance(leaf(of_model[name]["fn"]), dist.Delta):
            points[name] = site
    for name in list(points):
        for source in (f"{name}_unconstrained", f"{name}_aux"):  # as Pyro's autoguides name them
            if source in sources:
                del points[name], sources[source]
                break
    if not points:
        return
    size = {name: _free_size(site, of_model.get(name)) for name, site in points.items()}
    if sum(size.values()) > sum(site["value"].numel() for site in sources.values()):
        raise PointEstimate(
            f"Expected a guide with a density at every latent site, got the point estimate of a "
            f"Delta at {sorted(points)}: it has no weights, and no k-hat. Read point estimates "
            "with solvers.solve, or train a guide with spread, such as guides.Thresholded or an "
            "AutoNormal."
        )
    inside = [name for name in points if any(f.name == plate for f in plates_of(points[name]))]
    if inside:
        raise NotImplementedError(
            f"Expected a guide that draws each datum's sites in plate {plate!r}, got {inside} as "
            f"parts of {sorted(sources)}, which ties all data together: no datum has a weight of "
            "its own. Use an AutoNormal, or an amortised guide."
        )


def _free_size(site: Any, of_model: Any) -> int:
    """Real numbers that it takes to state a value: one fewer than elements on a simplex."""
    shape = site["value"].shape
    if of_model is not None:
        try:
            return math.prod(biject_to(of_model["fn"].support).inverse_shape(shape))
        except NotImplementedError:
            pass
    return math.prod(shape)
