"""The programs of a training: kept apart from each other, held still, put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import nn


class Apart(nn.Module):
    """A program with a parameter store of its own.

    The store goes by attribute path, so the parameter of one program would silently replace that
    of the other where both have the same name. (Pyro's ``module_local_params`` does the same, but
    only for modules that were made while it was on.)
    """

    def __init__(self, program: Callable[..., Any]) -> None:
        super().__init__()
        self.program = program
        self.state: dict[str, Any] = {"params": {}, "constraints": {}}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program with its own store in place of the global one."""
        with pyro.get_param_store().scope(self.state):  # type: ignore[arg-type]
            return self.program(*args, **kwargs)


def readable(name: str) -> str:
    """Name of a parameter as the user knows it."""
    return (
        name.replace(".program.", ".").replace(".parametrizations.", ".").removesuffix(".original")
    )


@contextmanager
def held(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Parameters that do not move in this phase get no gradients either."""
    were = [(p, p.requires_grad) for p in parameters]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, required in were:
            p.requires_grad_(required)


@contextmanager
def kept(module: nn.Module) -> Iterator[None]:
    """Calls that only check move no running means, and Pyro's store thaws no parameter."""
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    frozen = [p for p in module.parameters() if not p.requires_grad]
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
