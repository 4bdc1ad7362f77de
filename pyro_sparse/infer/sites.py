"""Do a model and a guide speak of the same latent sites?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor


def check_sites(
    model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
) -> None:
    """Run both once and compare their latent sites: names, shapes and plates.

    Auxiliary and enumerated sites are left to Pyro.

    Raises:
        ValueError: If they differ; lists the sites of both side by side.
    """
    with torch.no_grad(), torch.random.fork_rng():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
    of_model, of_guide = _latent(model_trace), _latent(guide_trace)
    if of_model is None or of_guide is None or of_model == of_guide:
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
