"""Stochastic variational inference over minibatches."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from pyro.infer import ELBO, Trace_ELBO
from pyro.params.param_store import StateDict
from torch import Tensor, nn

from pyro_sparse.likelihoods import check_mask

Optimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


@dataclass
class History:
    """What a training did.

    Attributes:
        step_loss: Objective of each step in nats per datum (negative ELBO over ``num_data``).
        epoch_loss: Its mean over each epoch, weighted by the sizes of the minibatches.
        seconds: Wall-clock of the training.
    """

    step_loss: list[float] = field(default_factory=list)
    epoch_loss: list[float] = field(default_factory=list)
    seconds: float = 0.0


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Tensor | np.ndarray[Any, Any],
    *,
    mask: Tensor | None = None,
    loss: ELBO | None = None,
    optimizer: Optimizer = torch.optim.Adam,
    epochs: int = 10,
    batch_size: int = 100,
    seed: int = 0,
    progress: bool = True,
) -> History:
    """Train a model and a guide by stochastic variational inference.

    Both are called as ``program(y, num_data)``, with ``mask=`` where one is given. The objective is
    Pyro's ELBO as a module, divided by the number of data, so a learning rate means the same for
    every size of data set. The order of the data is a function of ``seed`` and the epoch alone.

    Nothing global is left behind: Pyro's parameter store and torch's random state are those of
    before the call. Parameters are those of the two modules; they are trained in place.

    Args:
        model: Generative program, a module or a function.
        guide: Variational program with the same latent sites.
        data: Shape ``(num_data, *signal_shape)``; moved to the parameters' dtype and device one
            minibatch at a time, and never written to.
        mask: True where a sample was observed, broadcastable to ``data``.
        loss: An ELBO; default ``pyro.infer.Trace_ELBO()``.
        optimizer: Makes an optimiser of the parameters: a class, or
            ``functools.partial(torch.optim.Adam, lr=1e-2)``.
        epochs: Passes over the data.
        batch_size: Size of a minibatch; the last one of an epoch may be smaller.
        seed: Seed of the order of the data and of all sampling.
        progress: Show a progress bar.

    Returns:
        The losses. Parameters of ``model`` and ``guide`` have been trained.

    Raises:
        TypeError: If ``data`` is not a real tensor or array, or ``mask`` not boolean.
        ValueError: If a number is out of range, the data are empty or hold values that are not
            finite where they were observed, neither program has a parameter, or one of them
            makes parameters by ``pyro.param``, which live in no module.
        FloatingPointError: If the objective stops being finite; parameters are those of before
            the step.

    Example:
        >>> import pyro.distributions as dist
        >>> from torch import nn
        >>> scale = nn.Parameter(torch.tensor(0.0))
        >>> class Guide(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.loc = nn.Parameter(torch.tensor(0.0))
        ...     def forward(self, y, num_data):
        ...         pyro.sample("mean", dist.Delta(self.loc))
        >>> def model(y, num_data):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", num_data, subsample_size=len(y)):
        ...         pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)
        >>> history = fit(model, Guide(), torch.full((20,), 3.0), epochs=2, progress=False)
        >>> history.epoch_loss[1] < history.epoch_loss[0]
        True
    """
    for name, number in (("epochs", epochs), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"Expected {name} >= 1, got {number}.")
    rows = _as_rows(data)
    observed = None if mask is None else check_mask(rows, mask)
    _check_finite(rows, observed)
    history = History()
    start = time.perf_counter()
    with _isolated(seed):
        elbo: Callable[..., nn.Module] = Trace_ELBO() if loss is None else loss
        objective = elbo(_Apart(model), _Apart(guide))
        batches = _Batches(rows, observed, batch_size, seed)
        like = _like(objective)
        _initialise(objective, batches.first(like))
        parameters = [p for p in objective.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("Expected a model or a guide with parameters to train, got none.")
        stepper = optimizer(parameters)

        def step(engine: Engine, batch: dict[str, Any]) -> tuple[float, int]:
            stepper.zero_grad(set_to_none=True)
            value = objective(*batch["args"], **batch["kwargs"]) / len(rows)
            if not bool(torch.isfinite(value)):
                raise FloatingPointError(
                    f"Expected a finite objective, got {value.item()} at step "
                    f"{engine.state.iteration}. Parameters are as before this step; try a "
                    "smaller learning rate, and check the scale of the data."
                )
            value.backward()
            stepper.step()
            return value.item(), batch["size"]

        engine = Engine(step)
        batches.start(engine, like)
        epoch: list[tuple[float, int]] = []

        @engine.on(Events.ITERATION_COMPLETED)
        def _record(engine: Engine) -> None:
            output: Any = engine.state.output
            epoch.append(output)
            history.step_loss.append(output[0])

        @engine.on(Events.EPOCH_COMPLETED)
        def _summarise(engine: Engine) -> None:
            history.epoch_loss.append(
                sum(value * size for value, size in epoch) / sum(size for _, size in epoch)
            )
            epoch.clear()

        if progress:
            _show_progress(engine, by_step=len(batches) >= epochs)
        engine.run(batches, max_epochs=epochs)
    history.seconds = time.perf_counter() - start
    return history


def _show_progress(engine: Engine, *, by_step: bool) -> None:
    """A bar for each epoch, or one bar over many short epochs."""
    events = (
        (Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED)
        if by_step
        else (Events.EPOCH_COMPLETED, Events.COMPLETED)
    )
    ProgressBar(desc="fit", ncols=80, persist=not by_step).attach(
        engine,
        output_transform=lambda output: {"nats per datum": output[0]},
        event_name=events[0],
        closing_event_name=events[1],
    )


class _Batches:
    """Minibatches of an epoch, in an order that depends on the seed and the epoch alone."""

    def __init__(self, rows: Tensor, mask: Tensor | None, batch_size: int, seed: int) -> None:
        self.rows = rows
        self.mask = mask
        self.batch_size = batch_size
        self.seed = seed
        self.engine: Engine | None = None
        self.like = rows

    def start(self, engine: Engine, like: Tensor) -> None:
        self.engine, self.like = engine, like

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        assert self.engine is not None
        # numpy's seed sequence mixes both numbers: neighbouring seeds and epochs share no order.
        epoch = self.engine.state.epoch
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        for begin in range(0, len(order), self.batch_size):
            index = torch.from_numpy(order[begin : begin + self.batch_size])
            yield self._make(index, self.like)

    def first(self, like: Tensor) -> dict[str, Any]:
        return self._make(torch.arange(min(self.batch_size, len(self.rows))), like)

    def _make(self, index: Tensor, like: Tensor) -> dict[str, Any]:
        y = self.rows[index].to(dtype=like.dtype, device=like.device)
        kwargs = {}
        if self.mask is not None:
            kwargs["mask"] = self.mask[index].to(like.device)
        return {"args": (y, len(self.rows)), "kwargs": kwargs, "size": len(index)}


@contextmanager
def _isolated(seed: int) -> Iterator[None]:
    """A random state of our own, put back at the end."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class _Apart(nn.Module):
    """A program with a parameter store of its own; Pyro's global one is left as it was.

    The store goes by attribute path, so the parameter of one program would silently replace that
    of the other where both have the same name. (Pyro's ``module_local_params`` does the same, but
    only for modules that were made while it was on.)
    """

    def __init__(self, program: Callable[..., Any]) -> None:
        super().__init__()
        self.program = program
        self.state: StateDict = {"params": {}, "constraints": {}}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with pyro.get_param_store().scope(self.state):
            return self.program(*args, **kwargs)


def _initialise(objective: nn.Module, batch: dict[str, Any]) -> None:
    """Run once, so that parts that set themselves up at the first call have their parameters."""
    with torch.no_grad():
        objective(*batch["args"], **batch["kwargs"])
    own = {id(p) for p in objective.parameters()}
    stores = [part.state["params"] for part in objective.children() if isinstance(part, _Apart)]
    strangers = [name for store in stores for name, leaf in store.items() if id(leaf) not in own]
    if strangers:
        raise ValueError(
            f"Expected all parameters to belong to a module, got pyro.param sites {strangers}: "
            "they would be trained by pyro.infer.SVI, but not here. Make the program a "
            "pyro.nn.PyroModule and these its PyroParam attributes."
        )


def _like(objective: nn.Module) -> Tensor:
    floating = (p for p in objective.parameters() if p.is_floating_point())
    return next(floating, torch.empty(0))


def _as_rows(data: Any) -> Tensor:
    rows = data
    if isinstance(data, np.ndarray) and data.dtype.kind in "fiub":
        with warnings.catch_warnings():
            # Nothing writes to the rows, so a read-only array (a memmap) need not be copied.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            rows = torch.from_numpy(np.ascontiguousarray(data))
    if not isinstance(rows, Tensor) or rows.is_complex():
        raise TypeError(
            "Expected data to be a real tensor or numpy array of shape (num_data, *signal_shape), "
            f"got {getattr(data, 'dtype', type(data).__name__)}."
        )
    if rows.dim() == 0 or rows.numel() == 0:
        raise ValueError(f"Expected data with at least one datum, got shape {tuple(rows.shape)}.")
    return rows.detach()


def _check_finite(rows: Tensor, mask: Tensor | None) -> None:
    bad = ~torch.isfinite(rows)
    if mask is not None:
        bad &= mask
    if bool(bad.any()):
        first = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"Expected finite data, got {int(bad.sum())} values that are not, the first at index "
            f"{first}. Pass mask= (True = observed) to leave them out."
        )
