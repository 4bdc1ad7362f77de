"""From what an encoder emits to the posterior of each datum for itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from pyro_sparse.guides.encoders import PerDatum
from pyro_sparse.infer.numbers import check_whole
from pyro_sparse.infer.phases import Optimizer
from pyro_sparse.infer.programs import kept

Guide = TypeVar("Guide", bound=nn.Module)


def refine(
    guide: Guide,
    start: Callable[[], dict[str, Tensor]],
    model: Callable[..., Any],
    y: Tensor,
    *,
    mask: Tensor | None,
    num_steps: int,
    loss: ELBO,
    optimizer: Optimizer | None,
    learning_rate: float,
) -> Guide:
    """A copy of a guide whose encoder is a ``PerDatum``, trained on these data alone.

    Everything else of the copy is held, and the guide, the model and Pyro's parameter store stay as
    they are.

    Args:
        guide: Any with a submodule ``encoder``.
        start: What the table starts from: parameters that the guide accepts from its encoder.
        model: Generative program.
        y: Data, shape ``(n, *signal_shape)``.
        mask: True where a sample was observed.
        num_steps: Steps of the optimiser, ``>= 1``.
        loss: Objective.
        optimizer: Makes an optimiser of the parameters; default Adam.
        learning_rate: That of Adam, which in the last quarter falls to zero.

    Raises:
        TypeError: If ``model`` is no program, or ``loss`` is none of Pyro's ELBOs.
        ValueError: If ``num_steps`` is below 1.
    """
    check_whole("num_steps", num_steps, 1)
    if not callable(model):
        raise TypeError(
            "Expected model to be a generative program, such as SparseCoding(...), got "
            f"{type(model).__name__}."
        )
    if not hasattr(loss, "differentiable_loss"):
        raise TypeError(
            "Expected loss to be an ELBO, such as SparseELBO(LeaveOneOut()), got "
            f"{type(loss).__name__}."
        )
    given = {} if mask is None else {"mask": mask}
    store = pyro.get_param_store()
    programs = [part for part in (guide, model) if isinstance(part, nn.Module)]
    with kept(nn.ModuleList(programs)), store.scope(store.get_state()):
        with torch.no_grad():
            table = PerDatum(start())
        # A copy of the whole, since Pyro lets no part that has run stand in another guide; an
        # autoguide in it still knows the model itself.
        refined = copy.deepcopy(guide, {id(guide.encoder): table, id(model): model})
        moved = list(table.parameters())

        def closure() -> Any:  # torch says float
            chosen.zero_grad()
            value = loss.differentiable_loss(model, refined, y, **given)
            value.backward(inputs=moved)
            return value

        chosen = optimizer(moved) if optimizer else torch.optim.Adam(moved, lr=learning_rate)
        schedule = LambdaLR(
            chosen, lambda step: 1.0 if optimizer else min(1.0, 4 - 4 * step / num_steps)
        )
        for _ in range(num_steps):
            chosen.step(closure)
            schedule.step()
        chosen.zero_grad()
    return refined
