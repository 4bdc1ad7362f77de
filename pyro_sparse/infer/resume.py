"""Everything a training needs to go on as if nothing had happened, as tensors and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from pyro_sparse.infer.callbacks import Callback
from pyro_sparse.infer.guard import set_random_state
from pyro_sparse.infer.history import History
from pyro_sparse.infer.processes import rank_and_size

Stored = tuple[dict[str, dict[str, Tensor]], dict[str, Any]]


@dataclass
class Position:
    """Where a training stands.

    Attributes:
        phase: Number of the phase, from 0.
        iteration: Steps made in it.
        step: Steps made in all phases.
        epoch_so_far: Loss and size of each minibatch of the unfinished epoch.
        stopper: Counter and best score of early stopping, None before the first epoch.
        faults: Faults that the guard has answered.
        done: Whether the phase has ended.
    """

    phase: int = 0
    iteration: int = 0
    step: int = 0
    epoch_so_far: list[tuple[float, int]] = field(default_factory=list)
    stopper: dict[str, Any] | None = None
    faults: int = 0
    done: bool = False


def collect(
    position: Position,
    history: History,
    setting: dict[str, Any],
    programs: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    schedules: Sequence[LRScheduler | None],
    callbacks: Sequence[Callback],
    random: Sequence[Sequence[Tensor]],
) -> Stored:
    """Tensors by group and a record, for ``Checkpoints.write``; random states of each process."""
    tensors: dict[str, dict[str, Tensor]] = {
        "programs": dict(programs.state_dict()),
        "random": {
            f"{rank}.{k}": state for rank, own in enumerate(random) for k, state in enumerate(own)
        },
        "history": _series(history),
        "optimizers": {},
        "callbacks": {},
    }
    plain_optimizers, plain_callbacks = [], []
    for number, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        plain_optimizers.append(
            {
                "groups": state["param_groups"],
                "state": {
                    str(index): _split(entries, tensors["optimizers"], f"{number}.{index}.")
                    for index, entries in state["state"].items()
                },
            }
        )
    for number, callback in enumerate(callbacks):
        plain_callbacks.append(_split(callback.state_dict(), tensors["callbacks"], f"{number}."))
    record = {
        "position": vars(position),
        "history": {**vars(history), "step_loss": [], "update_loss": []},
        "setting": setting,
        "optimizers": plain_optimizers,
        "schedules": [None if s is None else _plain_schedule(s) for s in schedules],
        "callbacks": plain_callbacks,
    }
    return tensors, record


def _series(history: History) -> dict[str, Tensor]:
    """What has an entry for every step: a week of them would not fit a JSON record.

    As the bits of float64: the loss of a step that was undone is not finite, a stored tensor is.
    """
    losses = [loss for row in history.update_loss for loss in row]
    return {
        "step_loss": torch.tensor(history.step_loss, dtype=torch.float64).view(torch.int64),
        "update_loss": torch.tensor(losses, dtype=torch.float64).view(torch.int64),
        "updates": torch.tensor([len(row) for row in history.update_loss], dtype=torch.int64),
    }


def restore_history(stored: Stored) -> History:
    """The losses so far."""
    tensors, record = stored
    history = History(**record["history"])
    series = tensors["history"]
    history.step_loss = series["step_loss"].view(torch.float64).tolist()
    losses = series["update_loss"].view(torch.float64)
    history.update_loss = [row.tolist() for row in losses.split(series["updates"].tolist())]
    return history


def check_setting(stored: Stored, setting: dict[str, Any]) -> None:
    """Refuse to go on from a checkpoint of another training.

    Raises:
        ValueError: Names what differs.
    """
    was = stored[1]["setting"]
    differing = [name for name in setting if was.get(name) != setting[name]]
    if differing:
        listed = ", ".join(f"{n} {was.get(n)!r} there, {setting[n]!r} here" for n in differing)
        raise ValueError(
            f"Expected a checkpoint of this training, got one with {listed}. Choose another "
            "folder, or remove this one to begin anew."
        )


def restore_programs(stored: Stored, programs: nn.Module, callbacks: Sequence[Callback]) -> None:
    """Parameters, buffers and callbacks."""
    tensors, record = stored
    programs.load_state_dict(tensors["programs"])
    for number, callback in enumerate(callbacks):
        callback.load_state_dict(
            _join(record["callbacks"][number], tensors.get("callbacks", {}), f"{number}.")
        )


def restore_optimizers(
    stored: Stored,
    optimizers: Sequence[torch.optim.Optimizer],
    schedules: Sequence[LRScheduler | None],
) -> None:
    """Optimisers, schedules and, last, the random state."""
    tensors, record = stored
    held = tensors.get("optimizers", {})
    for number, optimizer in enumerate(optimizers):
        plain = record["optimizers"][number]
        state = {
            int(index): _join(entries, held, f"{number}.{index}.")
            for index, entries in plain["state"].items()
        }
        groups = [{k: _tupled(v) for k, v in group.items()} for group in plain["groups"]]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    for schedule, state in zip(schedules, record["schedules"]):
        if schedule is not None:
            schedule.load_state_dict(state)
    restore_random(stored)


def restore_random(stored: Stored) -> None:
    """The random state of this process; one that was not there keeps its own."""
    rank, tensors = rank_and_size()[0], stored[0]["random"]
    states = [tensors[f"{rank}.{k}"] for k in range(len(tensors)) if f"{rank}.{k}" in tensors]
    if states:
        set_random_state(states)


def _split(entries: dict[str, Any], tensors: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    """Put the tensors of a dict aside under prefixed names, from its lists too; give the rest."""
    plain = {}
    for name, value in entries.items():
        if isinstance(value, Tensor):
            tensors[prefix + name] = value
        elif isinstance(value, list):
            held = {k: entry for k, entry in enumerate(value) if isinstance(entry, Tensor)}
            tensors.update({f"{prefix}{name}.{k}": entry for k, entry in held.items()})
            plain[name] = [None if k in held else entry for k, entry in enumerate(value)]
        else:
            plain[name] = value
    return plain


def _join(plain: dict[str, Any], tensors: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    joined = {name: list(v) if isinstance(v, list) else v for name, v in plain.items()}
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            name = key[len(prefix) :]
            of, _, place = name.rpartition(".")
            if isinstance(joined.get(of), list):
                joined[of][int(place)] = tensor
            else:
                joined[name] = tensor
    return joined


def _plain_schedule(schedule: LRScheduler) -> dict[str, Any]:
    """State of a schedule without its functions, which come with the schedule."""
    plain = (bool, int, float, str, type(None), list, tuple)
    return {
        name: value for name, value in schedule.state_dict().items() if isinstance(value, plain)
    }


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) and not isinstance(value, tuple) else value
