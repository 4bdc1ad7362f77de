"""Training recipes: what is minimised, which parameters move, and for how long."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from pyro_sparse.infer.elbo import SparseELBO
from pyro_sparse.infer.numbers import check_whole

Objective = Callable[..., nn.Module]
"""Called as ``objective(model, guide)``; gives a module that is called as ``(y, num_data, mask=)``.

Pyro's ELBO objects are of this kind, and so is any function that returns such a module."""

Optimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
"""Makes an optimiser of parameters: a class, or ``partial(torch.optim.Adam, lr=1e-2)``."""

Schedule = Callable[[torch.optim.Optimizer], LRScheduler]
"""Makes a schedule of an optimiser: ``partial(torch.optim.lr_scheduler.StepLR, step_size=5)``."""


@dataclass(frozen=True)
class Update:
    """One optimiser step on one objective.

    Attributes:
        loss: Objective; default ``SparseELBO()``.
        optimizer: Makes the optimiser.
        train: Modules and parameters that move; None for all of both programs.
        schedule: Makes the learning-rate schedule, stepped after every epoch.
        schedule_per_step: Step the schedule after every minibatch instead.

    Example:
        >>> from functools import partial
        >>> update = Update(optimizer=partial(torch.optim.SGD, lr=0.1))
        >>> len(update.parameters(nn.Linear(3, 2)))  # weight and bias
        2
    """

    loss: Objective = field(default_factory=SparseELBO)
    optimizer: Optimizer = torch.optim.Adam
    train: Sequence[nn.Module | Tensor] | None = None
    schedule: Schedule | None = None
    schedule_per_step: bool = False

    def parameters(self, objective: nn.Module) -> list[Tensor]:
        """Parameters of an objective that this update moves.

        Raises:
            ValueError: If there are none, or ``train`` names one that is not the programs'.
        """
        own: list[Tensor] = [p for p in objective.parameters() if p.requires_grad]
        if self.train is not None:
            chosen: list[Tensor] = []
            for item in self.train:
                chosen += [item] if isinstance(item, Tensor) else list(item.parameters())
            strangers = {id(p) for p in chosen} - {id(p) for p in objective.parameters()}
            if strangers:
                raise ValueError(
                    f"Expected train to hold parts of the model or the guide, but {len(strangers)} "
                    "of its parameters belong to neither."
                )
            wanted = {id(p) for p in chosen}
            own = [p for p in own if id(p) in wanted]
        if not own:
            raise ValueError("Expected parameters to train in the model or the guide, got none.")
        return own


@dataclass(frozen=True)
class Phase:
    """A stretch of training: its updates are made in turn on every minibatch.

    Two phases one after the other make a recipe such as "first without labels, then with"; two
    updates in one phase make one such as "the dictionary by the reconstruction, then the rates by
    their own loss" on each minibatch.

    Attributes:
        epochs: Passes over the data, ``>= 1``.
        updates: At least one.

    Example:
        >>> from functools import partial
        >>> slower = Update(optimizer=partial(torch.optim.Adam, lr=1e-4))
        >>> recipe = [Phase(20), Phase(5, [slower])]  # for fit(..., phases=recipe)
        >>> sum(phase.epochs for phase in recipe)
        25
    """

    epochs: int
    updates: Sequence[Update] = (Update(),)

    def __post_init__(self) -> None:
        check_whole("epochs", self.epochs, 1)
        given = isinstance(self.updates, Sequence) and not isinstance(self.updates, str)
        if not given or not all(isinstance(update, Update) for update in self.updates):
            raise TypeError(f"Expected updates to be a list of Update, got {self.updates!r}.")
        if not self.updates:
            raise ValueError("Expected at least one update in a phase, got none.")


def build(update: Update, objective: nn.Module) -> tuple[torch.optim.Optimizer, LRScheduler | None]:
    """Optimiser and schedule of an update.

    Raises:
        TypeError: If no optimiser of torch was made.
        ValueError: If a learning rate is not positive.
    """
    optimizer = update.optimizer(update.parameters(objective))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"Expected optimizer to make a torch.optim.Optimizer, got {type(optimizer).__name__}. "
            "Write functools.partial(torch.optim.Adam, lr=1e-2); pyro.optim is for pyro.infer.SVI."
        )
    rates: list[Any] = [group.get("lr") for group in optimizer.param_groups]
    if any(rate is not None and not rate > 0 for rate in rates):
        raise ValueError(f"Expected learning rates > 0, got {rates}.")
    return optimizer, None if update.schedule is None else update.schedule(optimizer)
