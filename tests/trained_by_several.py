"""Trainings for several processes; ``python -m tests.trained_by_several RANK SIZE FOLDER``."""

import datetime
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from pyro_sparse.infer import Callback, EarlyStopping, Phase, Progress, RollBack, Update
from pyro_sparse.infer.checkpoints import Checkpoints
from pyro_sparse.infer.processes import rank_and_size
from tests.training import Each, adam, draw, momentum, pair, parameters, quick

Result = tuple[list[float], list[Tensor], str]


class Stopped(Exception):
    pass


def train(
    data: Any,
    *,
    until: int | None = None,
    random: bool = False,
    single: bool = False,
    **options: Any,
) -> Result:
    """Losses, parameters and the error it ended with."""
    model, guide = pair(random=random)
    if not single:
        model.double(), guide.double()
    arrange = options.pop("arrange", None)
    callbacks: list[Callback] = []
    if until is not None:
        callbacks = [Each(lambda progress: stop(progress, until))]
    if arrange is not None:
        callbacks += arrange(model, guide) or []
    make = options.pop("phases", None)
    options = {"optimizer": momentum, "epochs": 3, **options}
    phases = None if make is None else make(model, guide)
    before = parameters(model, guide)
    try:
        history = quick(model, guide, data, phases=phases, callbacks=callbacks, **options)
    except (Stopped, ValueError, FloatingPointError) as error:
        moved = any(
            not torch.equal(a, b) for a, b in zip(before, parameters(model, guide), strict=True)
        )
        return [float(moved)], parameters(model, guide), f"{type(error).__name__}: {error}"
    losses = [*history.step_loss, *history.validation_loss, float(history.skipped)]
    return losses, parameters(model, guide), "; ".join(history.faults)


def stop(progress: Progress, until: int) -> None:
    if progress.step == until:
        raise Stopped


def recipe(model: Any, guide: Any) -> list[Phase]:
    two = [Update(optimizer=momentum, train=[guide.linear]), Update(optimizer=adam, train=[model])]
    return [Phase(2, two), Phase(1, [Update(optimizer=momentum)])]


def gaps() -> Tensor:
    """No sample of most data is observed: whole minibatches, and shares of others, are empty."""
    mask = torch.zeros(24, 4, dtype=torch.bool)
    mask[[1, 5, 6, 13, 20]] = True
    mask[5, 2] = False
    return mask


class Hidden(Dataset):
    """Row 7 is not finite, which nobody can know beforehand."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Tensor:
        return draw()[index] * (torch.nan if index == 7 else 1.0)


def loader() -> DataLoader[Any]:
    rank, size = rank_and_size()
    data = TensorDataset(draw())
    sampler = DistributedSampler(data, size, rank, shuffle=False)
    return DataLoader(data, batch_size=8 // size, sampler=sampler)


def break_loss(model: Any, guide: Any) -> list[Callback]:
    """In the last process, step 4 breaks at a site."""

    def after(progress: Progress) -> None:
        rank, size = rank_and_size()
        model.breaks = torch.nan if progress.step == 3 and rank == size - 1 else 1.0

    return [Each(after)]


def break_gradient(model: Any, guide: Any) -> list[Callback]:
    """In the last process, step 4 breaks in its gradients."""
    now = [1]

    def after(progress: Progress) -> None:
        now[0] = progress.step + 1

    rank, size = rank_and_size()
    model.scale_unconstrained.register_hook(
        lambda g: g * (torch.nan if now[0] == 4 and rank == size - 1 else 1.0)
    )
    return [Each(after)]


def resumed(folder: Path, first: int) -> Result:
    checkpoints = Checkpoints(folder / f"resumed-{first}", every=1)
    options = {"batch_size": 7, "random": True, "checkpoints": checkpoints}
    train(draw(20), until=first, **options)
    return train(draw(20), arrange=lambda m, g: [Callback()], **options)


EQUAL: dict[str, Callable[[], Result]] = {
    "even": lambda: train(draw(), batch_size=8),
    "float32": lambda: train(draw(), batch_size=8, single=True),
    "odd": lambda: train(draw(20), batch_size=7),
    "a last one of one": lambda: train(draw(9), batch_size=4),
    "ones": lambda: train(draw(5), batch_size=1),
    "recipe": lambda: train(draw(20), batch_size=7, phases=recipe),
    "gaps": lambda: train(draw(), mask=gaps(), batch_size=3),
    "loader": lambda: train(loader()),
    "validation": lambda: train(
        draw(), batch_size=8, early_stopping=EarlyStopping(1, min_delta=0.3, data=draw(9)), epochs=9
    ),
}
"""These give with any number of processes what they give with one."""

BROKEN: dict[str, Callable[[], Result]] = {
    "stop at a loss": lambda: train(draw(), batch_size=8, arrange=break_loss),
    "stop at a gradient": lambda: train(draw(), batch_size=8, arrange=break_gradient),
    "loss": lambda: train(draw(), batch_size=8, arrange=break_loss, guard=RollBack()),
    "gradient": lambda: train(draw(), batch_size=8, arrange=break_gradient, guard=RollBack()),
    "second update": lambda: train(
        draw(), batch_size=8, arrange=break_gradient, guard=RollBack(), phases=recipe
    ),
    "data": lambda: train(Hidden(), batch_size=8),
}
"""What breaks in one process ends or is undone in all."""

SEEDED: dict[str, Callable[[Path], Result]] = {
    "whole": lambda folder: train(
        draw(20), batch_size=7, random=True, arrange=lambda m, g: [Callback()]
    ),
    "from 2": lambda folder: resumed(folder, 2),
    "from 4": lambda folder: resumed(folder, 4),
    "validation": lambda folder: train(
        draw(), random=True, batch_size=8, optimizer=adam, epochs=40,
        early_stopping=EarlyStopping(1, data=draw(5)),
    ),
}  # fmt: skip
"""With draws of each process's own."""


def for_one(folder: Path) -> Result:
    """Stops after step 4, having left checkpoints."""
    return train(draw(20), batch_size=7, until=5, checkpoints=Checkpoints(folder / "one", every=1))


def main(rank: int, size: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=40),
    )
    results = {f"equal {name}": run() for name, run in EQUAL.items()}
    results |= {f"broken {name}": run() for name, run in BROKEN.items()}
    results |= {f"seeded {name}": run(folder) for name, run in SEEDED.items()}
    results["for one"] = for_one(folder)
    writers = [p.name for p in folder.glob("*/step-*")]
    torch.save({**results, "files": sorted(writers)}, folder / f"results-{rank}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    np.seterr(all="ignore")
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
