"""Numbers that stop being finite are noticed in the step that made them.

A step leaves its traces in four places: the objective, the gradients, the parameters and the
optimiser's state. (The last is the treacherous one: a gradient of 1e30 is finite, its square in
Adam's second moment is not, and from then on the parameter stands still without a word.) All four
are looked at in every step, and what was there before the step is kept, so that nothing is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from pyro_sparse.infer.numbers import check_real, check_whole


@dataclass(frozen=True)
class Fault:
    """Something that was not finite.

    Attributes:
        kind: ``"objective"``, ``"gradient"``, ``"parameter"`` or ``"optimiser state"``.
        names: What it was: sites of the programs, or parameters.
        step: Number of the step, from 1.
        epoch: Number of the epoch, from 1.
        where: Which minibatch.

    Example:
        >>> print(Fault("gradient", ("dictionary.atoms",), step=12, epoch=1, where="minibatch 12"))
        gradient not finite (dictionary.atoms) at step 12, epoch 1, minibatch 12
    """

    kind: str
    names: tuple[str, ...]
    step: int
    epoch: int
    where: str

    def __str__(self) -> str:
        names = f" ({', '.join(self.names)})" if self.names else ""
        return (
            f"{self.kind} not finite{names} at step {self.step}, epoch {self.epoch}, {self.where}"
        )


class Guard:
    """Declares what to do about a fault; the step that made it has already been undone.

    Attributes:
        count: Faults in this training so far, this one included; ``fit`` keeps it.
    """

    count: int = 0

    def answer(self, fault: Fault, optimizers: list[torch.optim.Optimizer]) -> None:
        """Change something and return to go on with the next minibatch, or raise.

        Raises:
            FloatingPointError: To end the training.
        """
        raise NotImplementedError


class Stop(Guard):
    """End the training with an error that names the fault.

    Example:
        >>> fault = Fault("gradient", ("dictionary.atoms",), step=12, epoch=1, where="minibatch 12")
        >>> Stop().answer(fault, [])
        Traceback (most recent call last):
        ...
        FloatingPointError: Expected finite numbers: gradient not finite (dictionary.atoms) ...
    """

    def answer(self, fault: Fault, optimizers: list[torch.optim.Optimizer]) -> None:  # noqa: D102
        raise FloatingPointError(
            f"Expected finite numbers: {fault}. Parameters, optimiser and random state are those "
            "before the step. Look at this minibatch, lower the learning rate, or pass "
            "guard=RollBack() to go on with smaller steps."
        )


class RollBack(Guard):
    """Leave the minibatch out and go on with a smaller learning rate.

    Args:
        factor: What every learning rate is multiplied by, in (0, 1].
        limit: Number of faults after which the training ends all the same.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> fault = Fault("gradient", ("dictionary.atoms",), step=12, epoch=1, where="minibatch 12")
        >>> optimizer = torch.optim.SGD([torch.ones(1)], lr=0.1)
        >>> RollBack(factor=0.5).answer(fault, [optimizer])
        >>> optimizer.param_groups[0]["lr"]
        0.05
    """

    def __init__(self, *, factor: float = 0.5, limit: int = 10) -> None:
        check_real("factor", factor, 0.0, 1.0, open_low=True)
        check_whole("limit", limit, 1)
        self.factor = factor
        self.limit = limit

    def answer(self, fault: Fault, optimizers: list[torch.optim.Optimizer]) -> None:  # noqa: D102
        if self.count > self.limit:
            raise FloatingPointError(
                f"Expected at most {self.limit} faults, got one more: {fault}. Parameters, "
                "optimiser and random state are those before the step."
            )
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * self.factor
                group[SMALLER] = group.get(SMALLER, 1.0) * self.factor


SMALLER = "rolled_back"
"""What a guard has multiplied a learning rate by so far, in the optimiser's parameter group."""


def step_schedule(schedule: LRScheduler) -> None:
    """Step a schedule below a guard, which a schedule that starts from its base would undo."""
    groups = [group for group in schedule.optimizer.param_groups if SMALLER in group]
    for group in groups:
        group["lr"] = group["lr"] / group[SMALLER]
    schedule.step()
    for group in groups:
        group["lr"] = group["lr"] * group[SMALLER]


class Snapshot:
    """Everything a step changes, as it was before the step.

    Args:
        module: Its parameters and buffers are kept.
        optimizers: Their state is kept.
    """

    def __init__(self, module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        self.module = module
        self.optimizers = optimizers
        self.tensors: list[Tensor] = []
        self.copies: list[Tensor] = []
        self.states: list[dict[Any, dict[str, Any]]] = []
        self.random: list[Tensor] = []

    @torch.no_grad()
    def take(self) -> None:
        """Keep what is there now. Memory is that of the parameters and the optimisers' state."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        self.states = []
        for optimizer in self.optimizers:
            kept = {}
            for parameter, state in optimizer.state.items():
                kept[parameter] = {
                    name: list(value) if isinstance(value, list) else value
                    for name, value in state.items()
                }
                tensors += state_tensors(state)
            self.states.append(kept)
        same = len(tensors) == len(self.tensors)
        if same and all(a is b for a, b in zip(tensors, self.tensors)):
            torch._foreach_copy_(self.copies, tensors)
        else:
            self.tensors, self.copies = tensors, [t.detach().clone() for t in tensors]
        self.random = random_state()

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what was kept, bit for bit."""
        torch._foreach_copy_(self.tensors, self.copies)
        for optimizer, kept in zip(self.optimizers, self.states):
            optimizer.state.clear()
            for parameter, state in kept.items():
                optimizer.state[parameter] = state
        set_random_state(self.random)


def state_tensors(state: dict[str, Any]) -> list[Tensor]:
    """Tensors in an optimiser's state of one parameter; LBFGS keeps lists of them."""
    entries = list(state.values())
    for value in state.values():
        entries += value if isinstance(value, list) else []
    return [value for value in entries if isinstance(value, Tensor)]


def random_state() -> list[Tensor]:
    """State of torch's generators: the CPU's, then each GPU's that is in use."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return states


def set_random_state(states: list[Tensor]) -> None:
    """Undo of ``random_state``."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every value is finite, in one pass over the tensors and one synchronisation if so."""
    floating = [t.detach() for t in tensors if t.is_floating_point() and t.numel()]
    if not floating:
        return True
    # The length is finite only if all values are, and 20 times as fast on the CPU as the largest
    # magnitude; but its squares may overflow where the values do not.
    return _finite_norms(floating, 2) or _finite_norms(floating, torch.inf)


def _finite_norms(tensors: list[Tensor], order: float) -> bool:
    norms = torch._foreach_norm(tensors, order)
    device = norms[0].device
    return bool(torch.stack([norm.to(device, torch.float64) for norm in norms]).isfinite().all())


def names_not_finite(named: Iterable[tuple[str, Tensor]]) -> tuple[str, ...]:
    """Names of the tensors that hold a value which is not finite."""
    return tuple(name for name, tensor in named if not bool(torch.isfinite(tensor).all()))


def sites_not_finite(
    model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
) -> tuple[str, ...]:
    """Sites whose value or log-probability is not finite when the programs run once more."""
    names: list[str] = []
    with torch.no_grad(), torch.random.fork_rng(), pyro.validation_enabled(False):
        before = random_state()
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.trace(poutine.replay(model, trace=guide_trace))
        names += _not_finite(guide_trace)
        names += _not_finite(replayed.get_trace(*args, **kwargs))
        if not names:  # an exact objective draws no codes: the model is the first to draw
            set_random_state(before)
            names += _not_finite(replayed.get_trace(*args, **kwargs))
    return tuple(dict.fromkeys(names))


def _not_finite(trace: poutine.Trace) -> list[str]:
    trace.compute_log_prob()
    names = []
    for name, site in trace.nodes.items():
        if site["type"] == "sample":
            values = (site["value"], site["log_prob"])
            if not all(bool(torch.isfinite(torch.as_tensor(v)).all()) for v in values):
                names.append(name)
    return names
