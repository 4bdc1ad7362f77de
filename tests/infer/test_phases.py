"""Recipes: what moves when, by which rate, and when it ends."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, OneCycleLR, StepLR

from pyro_sparse.infer import Callback, EarlyStopping, Phase, Progress, RollBack, Update
from tests.training import Each, Factors, adam, draw, pair, parameters, quick, same, values

sgd = functools.partial(torch.optim.SGD, lr=0.01)


class Squares(nn.Module):
    """Another objective of the same two programs: squared error and squared atoms, per datum."""

    def __init__(self, model: nn.Module, guide: nn.Module) -> None:
        super().__init__()
        self.model, self.guide = model, guide

    def forward(self, y: Tensor, num_data: int, mask: Tensor | None = None) -> Tensor:
        model, guide = self.model.program, self.guide.program
        errors = y - guide.linear(y) @ model.atoms
        return (errors.square().sum() / len(y) + model.atoms.square().sum()) * num_data


def test_phases_each_have_their_loss_their_parts_and_their_length() -> None:
    model, guide = pair()
    seen: dict[int, list[list[Tensor]]] = {0: [], 1: []}
    flags = []

    def look(progress: Progress) -> None:
        seen[progress.phase].append(parameters(model, guide))
        flags.append((progress.phase, [p.requires_grad for p in (*_all(model, guide),)]))

    start = parameters(model, guide)
    phases = [
        Phase(2, [Update(loss=Squares, optimizer=sgd, train=[guide.linear, model.atoms])]),
        Phase(3, [Update(loss=TraceMeanField_ELBO(), optimizer=adam, train=[guide])]),
    ]
    history = quick(model, guide, draw(), phases=phases, batch_size=8, callbacks=[Each(look)])
    assert [len(seen[0]), len(seen[1])] == [6, 9]
    assert [len(history.epoch_loss), len(history.step_loss)] == [5, 15]
    names = [name for part in (model, guide) for name, _ in part.named_parameters()]
    expected = {
        0: {"atoms": True, "linear.weight": True, "linear.bias": True},
        1: {"linear.weight": True, "linear.bias": True, "spread_unconstrained": True},
    }
    before = start
    for phase in (0, 1):
        for after in seen[phase]:
            moved = [not torch.equal(a, b) for a, b in zip(before, after)]
            places = [(k < 2, name) for k, name in enumerate(names)]
            wanted = [
                expected[phase].get(name, False) and not (of_model and phase == 1)
                for of_model, name in places
            ]
            assert moved == wanted
            assert (phase, moved) in flags
            before = after
    assert all(p.requires_grad for p in _all(model, guide))


def _all(*modules: nn.Module) -> list[nn.Parameter]:
    return [p for module in modules for p in module.parameters()]


def test_flags_are_as_before_whatever_they_were_and_however_it_ends() -> None:
    model, guide = pair()
    guide.linear.bias.requires_grad_(False)
    flags = [p.requires_grad for p in _all(model, guide)]
    bias = guide.linear.bias.clone()
    phases = [Phase(1, [Update(train=[guide])]), Phase(1, [Update(train=[model])])]
    quick(model, guide, draw(), phases=phases)
    assert [p.requires_grad for p in _all(model, guide)] == flags
    assert torch.equal(guide.linear.bias, bias)

    def stop(progress: Progress) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        quick(model, guide, draw(), phases=phases, callbacks=[Each(stop)])
    assert [p.requires_grad for p in _all(model, guide)] == flags


def test_two_updates_are_made_in_turn_on_every_minibatch() -> None:
    """CRsAE's way: the dictionary by the reconstruction, then the scale by its own loss."""
    y = draw()
    model, guide = pair(random=False)
    phase = Phase(
        2,
        [
            Update(loss=Squares, optimizer=sgd, train=[model.atoms, guide.linear]),
            Update(loss=Trace_ELBO(), optimizer=adam, train=[model.scale_unconstrained]),
        ],
    )
    history = quick(model, guide, y, phases=[phase], batch_size=24)

    twin, encoder = pair(random=False)
    first = sgd([twin.atoms, *encoder.linear.parameters()])
    second = adam([twin.scale_unconstrained])
    elbo = Trace_ELBO()(twin, encoder)
    losses = []
    for _ in range(2):
        first.zero_grad()
        errors = y - encoder.linear(y) @ twin.atoms
        loss = errors.square().sum() / 24 + twin.atoms.square().sum()
        loss.backward()
        first.step()
        second.zero_grad()
        other = elbo(y, 24) / 24
        other.backward()
        second.step()
        losses.append([loss.item(), other.item()])
    # The same sums in another order of the data.
    np.testing.assert_allclose(history.update_loss, losses, rtol=1e-5)
    assert history.step_loss == [step[0] for step in history.update_loss]
    for one, other in zip(parameters(model, guide), parameters(twin, encoder)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


SCHEDULES = {
    "step": functools.partial(StepLR, step_size=2, gamma=0.5),
    "exponential": functools.partial(ExponentialLR, gamma=0.9),
    "lambda": functools.partial(LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
    "cosine": functools.partial(CosineAnnealingLR, T_max=20),
    "one cycle": functools.partial(OneCycleLR, max_lr=0.1, total_steps=20, cycle_momentum=False),
}


@pytest.mark.parametrize("per_step", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_gives_the_rates_it_gives_by_hand(name: str, per_step: bool) -> None:
    made: list[torch.optim.Optimizer] = []
    rates: list[float] = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.SGD(parameters, lr=0.01))
        return made[-1]

    look = Each(lambda progress: rates.append(made[-1].param_groups[0]["lr"]))
    update = Update(optimizer=optimizer, schedule=SCHEDULES[name], schedule_per_step=per_step)
    quick(*pair(), draw(), phases=[Phase(5, [update])], batch_size=8, callbacks=[look])

    by_hand = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    schedule = SCHEDULES[name](by_hand)
    expected = []
    for step in range(15):
        expected.append(by_hand.param_groups[0]["lr"])
        by_hand.step()
        for _ in range(1 if per_step else int(step % 3 == 2)):
            schedule.step()
    assert rates == expected


def test_a_schedule_may_step_before_the_first_observed_minibatch() -> None:
    mask = torch.zeros(24, 4, dtype=torch.bool)
    mask[0] = True
    update = Update(schedule=SCHEDULES["step"], schedule_per_step=True)
    history = quick(*pair(), draw(), mask=mask, phases=[Phase(1, [update])], batch_size=1)
    assert (history.skipped, len(history.step_loss)) == (23, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, g: Phase(0), "epochs >= 1, got 0"),
        (lambda m, g: Phase(1, []), "at least one update in a phase, got none"),
        (lambda m, g: Phase(1, [Update(train=[Factors()])]), "2 of its parameters belong to nei"),
        (lambda m, g: Phase(1, [Update(train=[m.scale])]), "1 of its parameters belong to neither"),
        (lambda m, g: Phase(1, [Update(train=[])]), "parameters to train.*got none"),
        (
            lambda m, g: Phase(1, [Update(optimizer=functools.partial(torch.optim.SGD, lr=0.0))]),
            "learning rates > 0",
        ),
    ],
)
def test_a_bad_recipe_is_refused_before_anything_moves(make: Any, message: str) -> None:
    model, guide = pair()
    before = values(model, guide)
    with pytest.raises(ValueError, match=message):
        quick(model, guide, draw(), phases=[Phase(1), make(model, guide)])
    assert same(values(model, guide), before)


@pytest.mark.parametrize("options", [{"loss": Trace_ELBO()}, {"schedule": SCHEDULES["step"]}])
def test_phases_stand_alone(options: dict) -> None:
    with pytest.raises(ValueError, match="inside the phases, got them beside phases="):
        quick(*pair(), draw(), phases=[Phase(1)], **options)


def test_a_recipe_has_a_phase() -> None:
    with pytest.raises(ValueError, match="at least one phase, got none"):
        quick(*pair(), draw(), phases=[])


# Ending before the time ---------------------------------------------------------------------------


class Given(nn.Module):
    """An objective with the values it is told: one of them for every call that trains."""

    def __init__(self, model: nn.Module, guide: nn.Module, told: list[float], held: list) -> None:
        super().__init__()
        self.model, self.guide = model, guide
        self.told, self.held = iter(told), iter(held)

    def forward(self, y: Tensor, num_data: int, mask: Tensor | None = None) -> Tensor:
        told = next(self.told if torch.is_grad_enabled() else self.held)
        return (self.model.program.atoms.sum() * 0.0 + told) * num_data


@pytest.mark.parametrize(
    ("losses", "options", "epochs"),
    [
        ([5, 4, 3, 2, 1, 0], {"patience": 2}, 6),
        ([5, 4, 4, 4, 3, 2], {"patience": 2}, 4),
        ([5, 4, 4, 3, 3, 3], {"patience": 2}, 6),
        ([5, 4, 6, 7, 3, 2], {"patience": 1}, 3),
        ([5, 4.5, 4.1, 3.9, 3.8, 1], {"patience": 2, "min_delta": 1.0}, 3),
    ],
)
@pytest.mark.parametrize("validation", [True, False])
def test_a_phase_ends_when_its_loss_stops_falling(
    losses: list[float], options: dict, epochs: int, validation: bool
) -> None:
    rest = [1.0 - 0.1 * k for k in range(6)]
    told, held = (rest, losses) if validation else (losses, rest)
    stopping = EarlyStopping(**options, data=draw(7) if validation else None)

    def loss(model: nn.Module, guide: nn.Module) -> nn.Module:
        return Given(model, guide, told, held)

    phases = [Phase(6, [Update(loss=loss, optimizer=sgd)])] * 2
    history = quick(*pair(), draw(), phases=phases, early_stopping=stopping)
    assert history.epoch_loss == pytest.approx(told[:epochs] * 2)
    assert history.validation_loss == pytest.approx((held[:epochs] if validation else []) * 2)


def test_validation_changes_nothing_but_the_end() -> None:
    runs = []
    for stopping in (None, EarlyStopping(100, data=draw(7))):
        model, guide = pair()
        history = quick(model, guide, draw(), epochs=3, early_stopping=stopping)
        runs.append((history.step_loss, parameters(model, guide), len(history.validation_loss)))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])
    assert [run[2] for run in runs] == [0, 3]


def test_an_epoch_without_a_loss_is_no_improvement() -> None:
    def bad_after(progress: Progress) -> None:
        model.breaks = torch.nan

    model, guide = pair()
    history = quick(
        model,
        guide,
        draw(),
        epochs=9,
        early_stopping=EarlyStopping(2),
        guard=RollBack(limit=20),
        callbacks=[Each(bad_after)],
    )
    assert len(history.epoch_loss) == 3
    assert np.isnan(history.epoch_loss).tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": draw(3) / 0}, "got 12 values that are not"),
        ({"data": torch.zeros(0, 4)}, "at least one datum"),
    ],
)
def test_bad_validation_data_are_refused_before_anything_moves(options: dict, message: str) -> None:
    model, guide = pair()
    before = values(model, guide)
    with pytest.raises(ValueError, match=message):
        quick(model, guide, draw(), early_stopping=EarlyStopping(1, **options))
    assert same(values(model, guide), before)


def test_patience_is_at_least_one() -> None:
    with pytest.raises(ValueError, match="patience >= 1, got 0"):
        EarlyStopping(0)


# Callbacks ----------------------------------------------------------------------------------------


class Diary(Callback):
    def __init__(self) -> None:
        self.lines: list[tuple] = []

    def after_step(self, progress: Progress) -> None:
        self.lines.append(("step", progress))

    def after_epoch(self, progress: Progress) -> None:
        self.lines.append(("epoch", progress))


def test_callbacks_are_told_where_the_training_stands() -> None:
    diary, (model, guide) = Diary(), pair()
    history = quick(model, guide, draw(20), phases=[Phase(2), Phase(1)], batch_size=8,
                    callbacks=[diary])  # fmt: skip
    numbers = [(what, p.step, p.epoch, p.phase) for what, p in diary.lines]
    assert numbers == [
        *[("step", 1, 1, 0), ("step", 2, 1, 0), ("step", 3, 1, 0), ("epoch", 3, 1, 0)],
        *[("step", 4, 2, 0), ("step", 5, 2, 0), ("step", 6, 2, 0), ("epoch", 6, 2, 0)],
        *[("step", 7, 3, 1), ("step", 8, 3, 1), ("step", 9, 3, 1), ("epoch", 9, 3, 1)],
    ]
    assert [p.loss for what, p in diary.lines if what == "step"] == history.step_loss
    assert [p.loss for what, p in diary.lines if what == "epoch"] == history.epoch_loss
    assert [len(p.y) for what, p in diary.lines if what == "step"] == [8, 8, 4] * 3
    assert {(p.num_data, p.mask) for _, p in diary.lines} == {(20, None)}
    assert all(p.model is model and p.guide is guide for _, p in diary.lines)


def test_a_callback_may_change_parameters() -> None:
    model, guide = pair()
    lengths = []

    def normalise(progress: Progress) -> None:
        with torch.no_grad():
            progress.model.atoms /= progress.model.atoms.norm(dim=1, keepdim=True)
        lengths.append(progress.model.atoms.norm(dim=1))

    history = quick(model, guide, draw(), optimizer=adam, epochs=3, callbacks=[Each(normalise)])
    assert np.isfinite(history.step_loss).all()
    torch.testing.assert_close(model.atoms.norm(dim=1), torch.ones(3))
    assert len(lengths) == 3
