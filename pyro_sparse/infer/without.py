"""Objectives that leave sites of a model out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro import poutine
from torch import nn

from pyro_sparse.infer.phases import Objective


class Without:
    """An objective of the model without some of its sites, such as a label in a first phase.

    What these sites say about the others counts nothing: they are run, unseen by the objective.
    Leave out sites that no other depends on; a latent one would be drawn by the model.

    Args:
        objective: Called as ``objective(model, guide)``, such as ``SparseELBO()``.
        sites: Their names.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If there are no names.

    Example:
        >>> from pyro_sparse.infer import Phase, SparseELBO, Update
        >>> phases = [Phase(2, [Update(Without(SparseELBO(), "label"))]), Phase(5)]
    """

    def __init__(self, objective: Objective, *sites: str) -> None:
        if not callable(objective):
            raise TypeError(
                f"Expected an objective, such as SparseELBO(), got {type(objective).__name__}."
            )
        if not sites:
            raise ValueError("Expected names of sites to leave out, got none.")
        if not all(isinstance(site, str) for site in sites):
            raise TypeError(f"Expected names of sites, got {sites!r}.")
        self.objective = objective
        self.sites = sites

    def __call__(self, model: Callable[..., Any], guide: Callable[..., Any]) -> nn.Module:
        """The objective for a model and a guide, a module that holds both."""
        return self.objective(_Hidden(model, self.sites), guide)


class _Hidden(nn.Module):
    def __init__(self, program: Callable[..., Any], sites: tuple[str, ...]) -> None:
        super().__init__()
        self.program = program
        self.sites = sites

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with poutine.block(hide=list(self.sites)):
            return self.program(*args, **kwargs)
