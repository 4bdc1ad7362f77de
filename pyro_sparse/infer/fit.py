"""Stochastic variational inference over minibatches."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ignite.handlers
import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from pyro_sparse.infer.arguments import check_kinds
from pyro_sparse.infer.batches import Batch, Source, check_finite, open_source
from pyro_sparse.infer.callbacks import Callback, Progress
from pyro_sparse.infer.checkpoints import Checkpoints
from pyro_sparse.infer.guard import (
    Fault,
    Guard,
    Snapshot,
    Stop,
    all_finite,
    names_not_finite,
    random_state,
    set_random_state,
    sites_not_finite,
    state_tensors,
    step_schedule,
)
from pyro_sparse.infer.history import EarlyStopping, History
from pyro_sparse.infer.numbers import check_whole
from pyro_sparse.infer.phases import Objective, Optimizer, Phase, Schedule, Update, build
from pyro_sparse.infer.processes import all_of, gathered, mean_over, parallel, rank_and_size, share
from pyro_sparse.infer.programs import Apart, held, kept, readable
from pyro_sparse.infer.resume import (
    Position,
    Stored,
    check_setting,
    collect,
    restore_history,
    restore_optimizers,
    restore_programs,
    restore_random,
)
from pyro_sparse.infer.sites import check_sites, leaves


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any,
    *,
    mask: Any = None,
    given: Mapping[str, Any] | None = None,
    loss: Objective | None = None,
    optimizer: Optimizer = torch.optim.Adam,
    schedule: Schedule | None = None,
    epochs: int = 10,
    phases: Sequence[Phase] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    early_stopping: EarlyStopping | None = None,
    callbacks: Sequence[Callback] = (),
    guard: Guard | None = None,
    checkpoints: Checkpoints | None = None,
    progress: bool = True,
) -> History:
    """Train a model and a guide by stochastic variational inference.

    Both are called as ``program(y, num_data)``, with ``mask=`` where one is given. The objective is
    an ELBO as a module, divided by the number of data, so a learning rate means the same for
    every size of data set. The order of the data is a function of ``seed`` and the epoch alone.

    Nothing global is left behind: Pyro's parameter store and torch's random state are those of
    before the call. Parameters are those of the two modules; they are trained in place. Under
    ``torchrun`` every process calls this with the same arguments and reads its share of each
    minibatch; losses and gradients are those of one process, up to rounding.

    Args:
        model: Generative program, a module or a function.
        guide: Variational program with the same latent sites.
        data: Shape ``(num_data, *signal_shape)``: a tensor, an array, a memory map (read a
            minibatch at a time), a list or data frame, a map-style ``Dataset`` of data or of pairs
            ``(datum, mask)``, or a ``DataLoader`` of batches. Cast to the parameters' dtype and
            moved to their device one minibatch at a time, never written to.
        mask: True where a sample was observed, broadcastable to ``data``.
        given: What else is known of each datum, such as ``{"label": classes}``, first dimension
            ``num_data``. Both programs are called with the minibatch's part, ``label=...``.
        loss: Objective; default ``SparseELBO()``. Any of Pyro's ELBOs works too.
        optimizer: Makes an optimiser of the parameters: a class, or
            ``functools.partial(torch.optim.Adam, lr=1e-2)``.
        schedule: Makes a learning-rate schedule of the optimiser, stepped after every epoch.
        epochs: Passes over the data.
        phases: A recipe in place of ``loss``, ``optimizer``, ``schedule`` and ``epochs``.
        batch_size: Size of a minibatch over all processes; default 100, or all data if fewer. The
            last one of an epoch may be smaller.
        seed: Seed of the order of the data and of all sampling.
        device: Where to move both modules first; they stay there.
        early_stopping: When to end a phase before its time.
        callbacks: Called after every step and every epoch, such as closed-form updates of rates.
        guard: What to do about numbers that are not finite; default ``Stop()``.
        checkpoints: Where to write checkpoints, and to resume from if there is one: the training
            then continues as if it had not been interrupted, bit for bit on the CPU (not with a
            ``DataLoader``, whose order is its own).
        progress: Show a progress bar.

    Returns:
        The losses. Parameters of ``model`` and ``guide`` have been trained.

    Raises:
        TypeError: If ``data`` are not real numbers, or ``mask`` not boolean.
        ValueError: If a number is out of range, the data are empty or hold values that are not
            finite where they were observed, sites of model and guide differ, neither has a
            parameter, one of them makes parameters by ``pyro.param``, which live in no module, or
            a checkpoint is of another training.
        FloatingPointError: If something stops being finite and the guard ends the training;
            parameters are those of before the step.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
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
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"Expected given to be a dict by name, got {type(given).__name__}.")
    check_kinds(
        programs={"model": model, "guide": guide},
        makers={"loss": loss, "optimizer": optimizer, "schedule": schedule},
        device=device,
        phases=phases,
        early_stopping=early_stopping,
        callbacks=callbacks,
        guard=guard,
        checkpoints=checkpoints,
    )
    check_whole("epochs", epochs, 1)
    check_whole("seed", seed, 0)
    if batch_size is not None:
        check_whole("batch_size", batch_size)
    if phases is None:
        update = Update(optimizer=optimizer, schedule=schedule)
        update = update if loss is None else replace(update, loss=loss)
        phases = [Phase(epochs, [update])]
    elif loss is not None or schedule is not None:
        raise ValueError("Expected loss and schedule inside the phases, got them beside phases=.")
    if not phases:
        raise ValueError("Expected at least one phase, got none.")
    rank, world_size = rank_and_size()
    source = open_source(data, mask, batch_size, seed, rank, world_size, given)
    for program in (model, guide):
        if device is not None and isinstance(program, nn.Module):
            program.to(device)
    training = _Training(Apart(model), Apart(guide), source, phases)
    training.seed = seed
    training.early_stopping = early_stopping
    training.callbacks = callbacks
    training.guard = Stop() if guard is None else guard
    training.checkpoints = checkpoints
    training.progress = progress and rank == 0
    training.held_out = (
        None
        if early_stopping is None or early_stopping.data is None
        else open_source(
            early_stopping.data, early_stopping.mask, None, 0, given=early_stopping.given
        )
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        # Parts that stand still in a phase are meant to.
        warnings.filterwarnings("ignore", ".* was not registered in the param store", UserWarning)
        # Where first minibatches hold no observed sample, a schedule steps before its optimiser.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        torch.manual_seed(seed + rank)
        return training.run()


class _Found(Exception):
    """Carries a fault out of an optimiser's closure."""

    def __init__(self, kind: str, names: tuple[str, ...]) -> None:
        super().__init__(kind)
        self.kind = kind
        self.names = names


class _Training:
    """One call of ``fit``: what it was given, and where it stands."""

    seed: int
    early_stopping: EarlyStopping | None
    callbacks: Sequence[Callback]
    guard: Guard
    checkpoints: Checkpoints | None
    progress: bool
    held_out: Source | None

    def __init__(self, model: Apart, guide: Apart, source: Source, phases: Sequence[Phase]) -> None:
        self.model = model
        self.guide = guide
        self.programs = nn.ModuleDict({"model": model, "guide": guide})
        self.source = source
        self.phases = phases
        self.history = History()
        self.position = Position()
        self.objectives: list[nn.Module] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        self.schedules: list[LRScheduler | None] = []
        self.snapshot = Snapshot(self.programs, [])
        self.named: list[tuple[str, Tensor]] = []
        self.last_batch: Batch | None = None
        self.start = time.perf_counter()

    def run(self) -> History:
        """All phases, from where a checkpoint left them if there is one."""
        self._initialise()
        stored = None if self.checkpoints is None else self.checkpoints.read()
        if stored is not None:
            check_setting(stored, self._setting())
            restore_programs(stored, self.programs, self.callbacks)
            self.history = restore_history(stored)
            self.position = Position(**stored[1]["position"])
            self.start -= self.history.seconds
        self.guard.count = self.position.faults
        while self.position.phase < len(self.phases):
            if not self.position.done:
                self._run_phase(self.phases[self.position.phase], stored)
            elif stored is not None:
                restore_random(stored)
            stored = None
            self.position = Position(
                phase=self.position.phase + 1, step=self.position.step, faults=self.position.faults
            )
        self.history.seconds = time.perf_counter() - self.start
        return self.history

    def _initialise(self) -> None:
        """Run both programs once, before anything changes; refuse what cannot be trained."""
        with torch.random.fork_rng(), kept(self.programs):
            with kept(self.programs):
                batch = next(self.source.epoch(0, self._like()))
                self._check(batch)
                args, kwargs = self._arguments(batch)
                with torch.no_grad():  # parts that set themselves up at the first call do so now
                    self.guide(*args, **kwargs)
                args, kwargs = self._arguments(next(self.source.epoch(0, self._like())))
                check_sites(self.model, self.guide, *args, **kwargs)
            own = {id(p) for p in self.programs.parameters()}
            stores = [program.state["params"] for program in (self.model, self.guide)]
            strangers = [name for store in stores for name, p in store.items() if id(p) not in own]
            if strangers:
                raise ValueError(
                    "Expected all parameters to belong to a module, got pyro.param sites "
                    f"{strangers}: they would be trained by pyro.infer.SVI, but not here. Make the "
                    "program a pyro.nn.PyroModule and these its PyroParam attributes."
                )
            for phase in self.phases:
                for update in phase.updates:
                    objective = update.loss(self.model, self.guide)
                    build(update, objective)
                    unseen = [p for p in leaves(objective(*args, **kwargs)) if id(p) not in own]
                    if unseen:
                        shapes = [tuple(p.shape) for p in unseen]
                        raise ValueError(
                            "Expected every parameter to belong to the model or the guide, got "
                            f"some of shape {shapes} that a function only refers to: they "
                            "would not be trained. Make it a pyro.nn.PyroModule that holds them."
                        )

    def _run_phase(self, phase: Phase, stored: Stored | None) -> None:
        self.objectives = [update.loss(self.model, self.guide) for update in phase.updates]
        built = [build(u, o) for u, o in zip(phase.updates, self.objectives)]
        self.optimizers = [optimizer for optimizer, _ in built]
        self.schedules = [schedule for _, schedule in built]
        if stored is not None:
            restore_optimizers(stored, self.optimizers, self.schedules)
        self.snapshot = Snapshot(self.programs, self.optimizers)
        self.named = [(readable(n), p) for n, p in self.programs.named_parameters()]
        moving = {id(p) for o in self.optimizers for g in o.param_groups for p in g["params"]}
        engine = Engine(lambda engine, batch: self._step(batch))
        engine.logger = _QUIET
        stopper = self._stopper(engine)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._after_step, phase)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._after_epoch, phase, stopper)
        if self.progress:
            _show_progress(engine, by_step=len(self.source) >= phase.epochs)
        length = len(self.source)
        position = {"iteration": self.position.iteration, "epoch_length": length}
        engine.load_state_dict({**position, "max_epochs": phase.epochs})
        with held([p for p in self.programs.parameters() if id(p) not in moving]):
            self.objectives = [parallel(objective) for objective in self.objectives]
            if self.position.iteration < phase.epochs * length:
                engine.run(_Epochs(self), max_epochs=phase.epochs, epoch_length=length)
        self.position.done = True
        self._write()

    # One step

    def _step(self, batch: Batch) -> dict[str, float]:
        """All updates of the phase on one minibatch."""
        self._check(batch)
        if all_of(batch.mask is not None and not bool(batch.mask.any())):
            self.history.skipped += 1
            return {"loss": math.nan}
        losses = []
        self.snapshot.take()
        try:
            for objective, optimizer in zip(self.objectives, self.optimizers):
                losses.append(self._update(objective, optimizer, batch))
        except _Found as found:
            self.snapshot.restore()
            step, epoch = self.position.step + 1, self._epoch()
            fault = Fault(found.kind, found.names, step, epoch, batch.where())
            self.position.faults += 1
            self.guard.count = self.position.faults
            self.guard.answer(fault, self.optimizers)
            self.history.faults.append(str(fault))
            losses = [math.nan] * len(self.objectives)
        self.history.step_loss.append(losses[0])
        self.history.update_loss.append(losses)
        self.position.epoch_so_far.append((losses[0], batch.size))
        self.last_batch = batch
        self._call_back("after_step", self.position.step + 1, self._epoch(), losses[0])
        return {"loss": losses[0]}

    def _update(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch
    ) -> float:
        """One optimiser step; raises ``_Found`` at the first thing that is not finite."""
        args, kwargs = self._arguments(batch)
        weight = share(batch.own, batch.size) / self.source.num_data
        latest = torch.zeros(())

        def closure() -> Tensor:
            nonlocal latest
            self.programs.zero_grad(set_to_none=True)
            names: tuple[str, ...] = ()
            try:
                value = objective(*args, **kwargs) * weight
                finite = bool(torch.isfinite(value))
            except ValueError:  # Pyro's validation may see it before the objective does
                names = self._sites_not_finite(batch)
                if not names:
                    raise
                finite = False
            if not all_of(finite):
                raise _Found("objective", names or self._sites_not_finite(batch))
            value.backward()
            gradients = [(name, p.grad) for name, p in self.named if p.grad is not None]
            if not all_finite(gradient for _, gradient in gradients):
                raise _Found("gradient", names_not_finite(gradients))
            latest = value.detach()
            return value

        optimizer.step(closure)  # type: ignore[arg-type]  # optimisers take a tensor
        state = [
            (name, tensor)
            for name, p in self.named
            for tensor in state_tensors(optimizer.state.get(p, {}))
        ]
        if not all_finite(tensor for _, tensor in (*self.named, *state)):
            names = names_not_finite(self.named)
            kind = "parameter" if names else "optimiser state"
            raise _Found(kind, names or tuple(dict.fromkeys(names_not_finite(state))))
        return mean_over(latest)

    def _sites_not_finite(self, batch: Batch) -> tuple[str, ...]:
        set_random_state(self.snapshot.random)  # the same draws again; the step is undone anyway
        args, kwargs = self._arguments(batch)
        return sites_not_finite(self.model, self.guide, *args, **kwargs)

    def _check(self, batch: Batch) -> None:
        """What lies on disk could not be searched before the training."""
        if self.source.searched:
            return
        error = None
        try:
            check_finite(batch.y, batch.mask, f" of {batch.where()}")
        except ValueError as found:
            error = found
        if not all_of(error is None):  # all processes stop, or the others would wait for this one
            raise error or ValueError(
                f"Expected finite data, got others in batch {batch.number} in another process."
            )

    # Around the steps

    def _after_step(self, engine: Engine, phase: Phase) -> None:
        self.position.iteration = engine.state.iteration
        self.position.step += 1
        self._advance_schedules(phase, per_step=True)
        if self.position.iteration % len(self.source):  # the last of an epoch is not over yet
            self._write_if_due()

    def _after_epoch(self, engine: Engine, phase: Phase, stopper: Any) -> None:
        kept = [(loss, n) for loss, n in self.position.epoch_so_far if not math.isnan(loss)]
        total = sum(size for _, size in kept)
        self.history.epoch_loss.append(
            sum(loss * size for loss, size in kept) / total if total else math.nan
        )
        self.position.epoch_so_far = []
        self._advance_schedules(phase, per_step=False)
        # The iteration already counts as one of the next epoch.
        self._call_back(
            "after_epoch", self.position.step, self._epoch() - 1, self.history.epoch_loss[-1]
        )
        if stopper is not None:
            stopper(engine)
            self.position.stopper = dict(stopper.state_dict())
        ended = self.position.iteration >= phase.epochs * len(self.source)
        self.position.done = ended or bool(engine.should_terminate)
        self._write_if_due()

    def _advance_schedules(self, phase: Phase, *, per_step: bool) -> None:
        for update, schedule in zip(phase.updates, self.schedules):
            if schedule is not None and update.schedule_per_step == per_step:
                step_schedule(schedule)

    def _stopper(self, engine: Engine) -> ignite.handlers.EarlyStopping | None:
        asked = self.early_stopping
        if asked is None:
            return None
        stopper = ignite.handlers.EarlyStopping(
            asked.patience, lambda engine: self._score(), engine, asked.min_delta
        )
        stopper.logger = _QUIET
        if self.position.stopper is not None:
            stopper.load_state_dict(self.position.stopper)
        return stopper

    def _score(self) -> float:
        """What early stopping looks at, after an epoch; the more, the better."""
        if self.held_out is None:
            loss = self.history.epoch_loss[-1]
        else:
            total = torch.zeros((), dtype=torch.float64)
            with torch.no_grad(), torch.random.fork_rng():
                for batch in self.held_out.epoch(0, self._like()):
                    args, kwargs = self._arguments(batch, num_data=len(batch.y))
                    total += float(self.objectives[0](*args, **kwargs))
            # Of all processes: their draws differ, and they have to stop together.
            loss = mean_over(total) / self.held_out.num_data
            self.history.validation_loss.append(loss)
        return -math.inf if math.isnan(loss) else -loss

    def _call_back(self, moment: str, step: int, epoch: int, loss: float) -> None:
        batch = self.last_batch
        if not self.callbacks or batch is None:
            return
        progress = Progress(
            model=self.model.program,
            guide=self.guide.program,
            y=batch.y,
            mask=batch.mask,
            num_data=self.source.num_data,
            step=step,
            epoch=epoch,
            phase=self.position.phase,
            loss=loss,
        )
        for callback in self.callbacks:
            getattr(callback, moment)(progress)

    def _write_if_due(self) -> None:
        if self.checkpoints is not None and self.position.step % self.checkpoints.every == 0:
            self._write()

    def _write(self) -> None:
        if self.checkpoints is None:
            return
        random = gathered(random_state())
        if rank_and_size()[0] == 0:
            self._write_alone(self.checkpoints, random)
        all_of(True)  # the others wait: they may read it next

    def _write_alone(self, checkpoints: Checkpoints, random: list[list[Tensor]]) -> None:
        self.history.seconds = time.perf_counter() - self.start
        tensors, record = collect(
            self.position,
            self.history,
            self._setting(),
            self.programs,
            self.optimizers,
            self.schedules,
            self.callbacks,
            random,
        )
        checkpoints.write(self.position.step, tensors, record)

    def _setting(self) -> dict[str, Any]:
        """What has to be equal for a checkpoint to be one of this training."""
        return {
            "num_data": self.source.num_data,
            "batches": len(self.source),
            "batch_size": self.source.batch_size,
            "seed": self.seed,
            "epochs": [phase.epochs for phase in self.phases],
            "updates": [len(phase.updates) for phase in self.phases],
            "callbacks": len(self.callbacks),
        }

    # Small things

    def _epoch(self) -> int:
        """Number of the epoch over all phases, from 1."""
        return self._epochs_before() + self.position.iteration // len(self.source) + 1

    def _epochs_before(self) -> int:
        return sum(phase.epochs for phase in self.phases[: self.position.phase])

    def _like(self) -> Tensor:
        floating = (p for p in self.programs.parameters() if p.is_floating_point())
        return next(floating, torch.empty(0))

    def _arguments(
        self, batch: Batch, num_data: int | None = None
    ) -> tuple[tuple[Tensor, int], dict[str, Tensor]]:
        kwargs = dict(batch.given) if batch.mask is None else {**batch.given, "mask": batch.mask}
        return (batch.y, self.source.num_data if num_data is None else num_data), kwargs


class _Epochs:
    """The data of one epoch after the other, for the engine; resumes inside an epoch."""

    def __init__(self, training: _Training) -> None:
        self.training = training

    def __len__(self) -> int:
        return len(self.training.source)

    def __iter__(self) -> Iterator[Batch]:
        training = self.training
        done = training.position.iteration % len(self)
        return training.source.epoch(training._epoch(), training._like(), skip=done)


_QUIET = logging.getLogger("pyro_sparse.infer.fit")
"""For ignite, which would report an exception that is raised anyway on a channel of its own."""
_QUIET.addHandler(logging.NullHandler())
_QUIET.propagate = False


def _show_progress(engine: Engine, *, by_step: bool) -> None:
    """A bar for each epoch, or one bar over many short epochs."""
    events = (
        (Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED)
        if by_step
        else (Events.EPOCH_COMPLETED, Events.COMPLETED)
    )
    ignite.handlers.ProgressBar(desc="fit", ncols=80, persist=not by_step).attach(
        engine,
        output_transform=lambda output: {"nats per datum": output["loss"]},
        event_name=events[0],
        closing_event_name=events[1],
    )
