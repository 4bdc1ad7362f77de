"""A training that was interrupted and resumed is the one that was not: S1."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, StepLR

from pyro_sparse.infer import Callback, EarlyStopping, History, Phase, Progress, RollBack, Update
from pyro_sparse.infer.checkpoints import Checkpoints
from tests.training import adam, draw, momentum, pair, parameters, quick, same, values

pytestmark = pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")


class Interrupted(Exception):
    """As by a scheduler of jobs."""


class Mean(Callback):
    """Has a state, and an influence: draws the atoms to their running mean.

    In the step ``until`` it ends the process, as it were.
    """

    def __init__(self, until: int | None = None) -> None:
        self.until = until
        self.mean: Tensor | None = None
        self.count = 0

    def after_step(self, progress: Progress) -> None:
        if progress.step == self.until:
            raise Interrupted
        atoms = progress.model.atoms
        with torch.no_grad():
            mean = torch.zeros_like(atoms) if self.mean is None else self.mean
            self.mean = 0.9 * mean + 0.1 * atoms
            self.count += 1
            atoms += 0.01 / self.count * self.mean

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.count = state["mean"], state["count"]


class Recipe:
    """Arguments of one training, made anew for every run of it."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def run(
        self, folder: Path | None, *, until: int | None = None, every: int = 1
    ) -> tuple[History, list[Tensor], list[nn.Module]]:
        model, guide = pair()
        options = {name: make(model, guide) for name, make in self.options.items()}
        checkpoints = None if folder is None else Checkpoints(folder, every=every)
        call = {"batch_size": 8, "seed": 3, "checkpoints": checkpoints, **options}
        history = quick(model, guide, draw(20), callbacks=[Mean(until)], **call)
        return history, values(model, guide), [model, guide]


def numbers(history: History) -> str:
    """Everything but the time it took; ``repr`` is exact and knows nan."""
    return repr({name: v for name, v in vars(history).items() if name != "seconds"})


def constant(**options: Any) -> Recipe:
    return Recipe(**{name: (lambda m, g, v=v: v) for name, v in options.items()})


def faulty(model: nn.Module, guide: nn.Module) -> RollBack:
    """Goes on after faults, which come by the value of a weight."""
    model.atoms.register_hook(
        lambda gradient: torch.where(model.atoms[0, 0].abs() * 1e4 % 3 < 1, torch.nan, gradient)
    )
    return RollBack(limit=100, factor=0.9)


def two_phases(model: nn.Module, guide: nn.Module) -> list[Phase]:
    schedule = functools.partial(StepLR, step_size=1, gamma=0.7)
    return [
        Phase(2, [Update(optimizer=adam, train=[guide], schedule=schedule)]),
        Phase(1, [Update(optimizer=momentum), Update(optimizer=adam, train=[model])]),
        Phase(1, [Update(optimizer=adam, schedule=schedule, schedule_per_step=True)]),
    ]


def by_step(make: Any) -> Any:
    return lambda model, guide: [
        Phase(4, [Update(optimizer=momentum, schedule=make, schedule_per_step=True)])
    ]


RECIPES = {
    "adam": constant(optimizer=adam, epochs=4),
    "momentum": constant(optimizer=momentum, epochs=4),
    "lbfgs": constant(optimizer=functools.partial(torch.optim.LBFGS, lr=0.1, max_iter=3), epochs=4),
    "cosine": constant(
        optimizer=adam, epochs=4, schedule=functools.partial(CosineAnnealingLR, T_max=4)
    ),
    "one cycle": Recipe(
        phases=by_step(functools.partial(OneCycleLR, max_lr=0.1, total_steps=20))
    ),
    "phases": Recipe(phases=two_phases),
    "faults": Recipe(
        guard=faulty, optimizer=lambda m, g: adam, epochs=lambda m, g: 4,
        schedule=lambda m, g: functools.partial(StepLR, step_size=1, gamma=0.9),
    ),
    "stopping": constant(
        optimizer=functools.partial(torch.optim.Adam, lr=0.5), epochs=4,
        early_stopping=EarlyStopping(1, min_delta=0.2, data=draw(9)),
    ),
}  # fmt: skip


@functools.cache
def uninterrupted(name: str) -> tuple[History, list[Tensor]]:
    return RECIPES[name].run(None)[:2]


@pytest.mark.parametrize("until", range(1, 13))
@pytest.mark.parametrize("name", RECIPES)
def test_a_resumed_training_is_the_uninterrupted_one(name: str, until: int, tmp_path: Path) -> None:
    """Three steps an epoch: at its end, inside it, at a phase's end, before anything is written."""
    history, expected = uninterrupted(name)
    with pytest.raises(Interrupted):
        RECIPES[name].run(tmp_path, until=min(until, len(history.step_loss)))
    torch.manual_seed(until)  # of no account
    again, found, _ = RECIPES[name].run(tmp_path)
    assert numbers(again) == numbers(history)
    assert same(found, expected)


def test_the_recipes_do_what_they_are_there_for() -> None:
    assert 2 <= len(uninterrupted("faults")[0].faults) <= 10
    assert 2 <= len(uninterrupted("stopping")[0].validation_loss) < 4
    assert all(len(uninterrupted(name)[0].step_loss) >= 6 for name in RECIPES)


@pytest.mark.parametrize("every", [2, 4, 5, 100])
@pytest.mark.parametrize("name", ["phases", "faults"])
def test_a_training_may_be_interrupted_again_and_again(
    name: str, every: int, tmp_path: Path
) -> None:
    history, expected = uninterrupted(name)
    for until in (3, 6, 7, 11):
        with pytest.raises(Interrupted):
            RECIPES[name].run(tmp_path, until=until, every=every)
    again, found, _ = RECIPES[name].run(tmp_path, every=every)
    assert numbers(again) == numbers(history)
    assert same(found, expected)


@pytest.mark.parametrize("name", RECIPES)
def test_a_finished_training_resumes_to_itself_without_a_step(name: str, tmp_path: Path) -> None:
    history, expected, _ = RECIPES[name].run(tmp_path, every=5)
    again, found, _ = RECIPES[name].run(tmp_path, until=1, every=5)
    assert numbers(again) == numbers(history)
    assert same(found, expected)


def test_time_counts_on(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        RECIPES["adam"].run(tmp_path, until=6)
    record = Checkpoints(tmp_path, every=1).read()[1]
    history, *_ = RECIPES["adam"].run(tmp_path)
    assert history.seconds > record["history"]["seconds"] > 0


def test_checkpoints_change_nothing(tmp_path: Path) -> None:
    history, expected = uninterrupted("phases")
    written, found, _ = RECIPES["phases"].run(tmp_path)
    assert numbers(written) == numbers(history)
    assert same(found, expected)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 4}, "seed 3 there, 4 here"),
        ({"batch_size": 9}, "batch_size 8 there, 9 here"),  # as many batches as before
        ({"batch_size": 4}, "batch_size 8 there, 4 here"),
        ({"epochs": 5}, r"epochs \[4\] there, \[5\] here"),
        ({"callbacks": []}, "callbacks 1 there, 0 here"),
        ({"phases": [Phase(4, [Update(), Update()])]}, r"updates \[1\] there, \[2\] here"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    other: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        RECIPES["adam"].run(tmp_path, until=4)
    model, guide = pair()
    before = parameters(model, guide)
    options = {"seed": 3, "batch_size": 8, "epochs": 4, "callbacks": [Mean()], **other}
    with pytest.raises(ValueError, match=message):
        quick(model, guide, draw(20), checkpoints=Checkpoints(tmp_path, every=1), **options)
    assert same(parameters(model, guide), before)


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        RECIPES["adam"].run(tmp_path, until=4)
    options = {"seed": 3, "batch_size": 8, "epochs": 4, "callbacks": [Mean()]}
    with pytest.raises(ValueError, match="num_data 20 there, 21 here"):
        quick(*pair(), draw(21), checkpoints=Checkpoints(tmp_path, every=1), **options)
