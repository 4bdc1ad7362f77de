"""Can an object be saved, and does the same one come back?"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from pyro_sparse.infer import load, save
from pyro_sparse.infer.findings import NotAsked
from pyro_sparse.testing.advice import Failed, short


def check_saving(module: nn.Module) -> str:
    """Save a module, load it, compare all it holds."""
    with tempfile.TemporaryDirectory() as parent:
        try:
            save(Path(parent) / "saved", module=module)
        except TypeError as why:
            raise NotAsked(f"Cannot be saved: {short(why)}") from None
        loaded = load(Path(parent) / "saved")["module"]
    before, after = module.state_dict(), loaded.state_dict()
    if before.keys() != after.keys():
        raise Failed(
            f"Expected the tensors {sorted(before)} to come back, got {sorted(after)}. See "
            "register_savable(arguments=)."
        )
    for name, tensor in before.items():
        if not torch.equal(tensor.cpu(), after[name]):
            raise Failed(f"Expected {name} to come back as it was saved, got other values.")
    return f"{len(before)} tensors come back equal"
