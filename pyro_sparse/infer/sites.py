"""Do a model and a guide speak of the same latent sites?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_sparse.distributions.kl import with_atom
from pyro_sparse.infer.integrand import has_atom, leaf


def check_sites(
    model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
) -> None:
    """Run both once and compare their latent sites: names, shapes, plates, and atoms at zero.

    Auxiliary and enumerated sites are left to Pyro.

    Raises:
        ValueError: If they differ (lists the sites of both side by side), or a pair of laws cannot
            be compared, as ``check_measures`` says.
    """
    with torch.no_grad(), torch.random.fork_rng():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
    of_model, of_guide = _latent(model_trace), _latent(guide_trace)
    if of_model is None or of_guide is None:
        return
    if of_model == of_guide:
        for name in of_model:
            check_measures(name, guide_trace.nodes[name]["fn"], model_trace.nodes[name]["fn"])
        return
    names = sorted({*of_model, *of_guide})
    rows = [("site", "model", "guide")]
    rows += [(name, of_model.get(name, "-"), of_guide.get(name, "-")) for name in names]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    table = "\n".join(
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        + ("" if index == 0 or row[1] == row[2] else "   <-")
        for index, row in enumerate(rows)
    )
    raise ValueError(
        "Expected the latent sites of model and guide to have equal names, shapes and plates, got\n"
        f"{table}\nThe guide samples every unobserved site of the model, in the same plates."
    )


def check_measures(name: str, law: Any, prior: Any) -> None:
    """Refuse laws of guide and model of which only one has an atom at zero, where that cannot be.

    A guide without an atom serves a model with one: its codes are never exactly zero.

    Args:
        name: Site.
        law: Its distribution in the guide.
        prior: Its distribution in the model.

    Raises:
        ValueError: If the guide's law has an atom that the prior lacks (their KL is infinite), or
            the guide's is a point where the prior has one.
    """
    guide_law, model_law = type(leaf(law)).__name__, type(leaf(prior)).__name__
    if has_atom(law) and not has_atom(prior):
        raise ValueError(
            f"Expected a prior with an atom at zero at site {name!r}, as the guide's {guide_law} "
            f"has one, got {model_law}: their KL is infinite. Use {with_atom(leaf(prior))} in the "
            "model."
        )
    if isinstance(leaf(law), dist.Delta) and has_atom(prior):
        raise ValueError(
            f"Expected a guide with a law at site {name!r}, got Delta against {model_law}: a point "
            "and a density with an atom have no optimum that is independent of units. Use "
            "guides.Thresholded, or a prior without an atom."
        )


def leaves(loss: Tensor) -> list[Tensor]:
    """Tensors that require a gradient and that a loss was computed from, each once."""
    found: dict[int, Tensor] = {}
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            found[id(leaf)] = leaf
        waiting += [following for following, _ in node.next_functions]
    return list(found.values())


def _latent(trace: pyro.poutine.Trace) -> dict[str, str] | None:
    """Latent sites with shape and plates in words; None if some are enumerated."""
    found = {}
    nodes: dict[str, Any] = prune_subsample_sites(trace).nodes
    for name, site in nodes.items():
        if site["type"] != "sample" or site["is_observed"]:
            continue
        if site["infer"].get("enumerate"):
            return None
        if not site["infer"].get("is_auxiliary"):
            plates = ", ".join(sorted(frame.name for frame in site["cond_indep_stack"]))
            found[name] = f"{tuple(site['value'].shape)} in [{plates}]"
    return found
