"""Pyro's parameter store, where a program of another training may have left its parameters."""

from __future__ import annotations

import pyro
from torch import nn


def claim_names(program: nn.Module) -> None:
    """Put this program's parameters into the store where another's stand under their names.

    The store goes by attribute path. Where it holds another object under the path of a parameter,
    Pyro runs the program with its own parameter while ``pyro.infer.SVI`` moves the one in the
    store: a second training in one session would go without effect and without a word. A module's
    parameters are those that it holds; nothing is lost, since the other program holds its own too.

    Args:
        program: A model or guide whose parameters all belong to plain submodules.
    """
    store = pyro.get_param_store()
    held = dict(store.named_parameters())
    if not held:
        return
    for child, module in program.named_children():
        for path, parameter in module.named_parameters():
            name = f"{child}$$${path}"  # as pyro.module writes it
            if name in held and held[name] is not parameter and parameter.requires_grad:
                store[name] = parameter
