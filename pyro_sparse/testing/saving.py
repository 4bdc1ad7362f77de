"""Can an object be saved, and does the same one come back?"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyro_sparse.infer import load, save
from pyro_sparse.infer.findings import NotAsked
from pyro_sparse.testing.advice import Failed, short


def check_saving(module: nn.Module) -> str:
    """Save a module, load it, compare all it holds."""
    before, after = module.state_dict(), _again(module=module).state_dict()
    if before.keys() != after.keys():
        raise Failed(
            f"Expected the tensors {sorted(before)} to come back, got {sorted(after)}. See "
            "register_savable(arguments=)."
        )
    for name, tensor in before.items():
        if not torch.equal(tensor.cpu(), after[name]):
            raise Failed(f"Expected {name} to come back as it was saved, got other values.")
    return f"{len(before)} tensors come back equal"


def check_saving_law(prior: Any, law: Any) -> str:
    """Save a prior, load it, compare densities; a function comes back as it was registered.

    Args:
        prior: What is saved: a law, or a function that makes one.
        law: The law whose draws are compared.
    """
    again = _again(prior=prior)
    if prior is not law:
        return "comes back by its name"
    torch.manual_seed(0)
    draws = law.sample((20,))
    shapes = (law.batch_shape, law.event_shape), (again.batch_shape, again.event_shape)
    if shapes[0] != shapes[1]:
        raise Failed(
            f"Expected batch and event shape {shapes[0]} to come back, got {shapes[1]}. See "
            "register_savable(arguments=)."
        )
    if not torch.equal(law.log_prob(draws).cpu(), again.log_prob(draws.cpu())):
        raise Failed(
            "Expected the same density to come back, got another. See register_savable(arguments=)."
        )
    return "the same density comes back"


def _again(**named: Any) -> Any:
    """What loading gives after saving; a message has the name."""
    with tempfile.TemporaryDirectory() as parent:
        try:
            save(Path(parent) / "saved", **named)
        except TypeError as why:
            raise NotAsked(f"Cannot be saved: {short(why)}") from None
        return next(iter(load(Path(parent) / "saved").values()))
