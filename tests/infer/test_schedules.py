"""Warm-ups follow their formulas, travel with the modules that hold them, and resume exactly."""

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro import poutine
from torch import Tensor, nn

from pyro_sparse.infer import Callback, Phase, Progress, RollBack, Update, load, save
from pyro_sparse.infer.bundle import register_savable
from pyro_sparse.infer.checkpoints import Checkpoints
from pyro_sparse.infer.schedules import (
    Constant,
    Cyclic,
    ExponentialDecay,
    LinearRamp,
    Scheduled,
    Warmup,
    check_scheduled,
    current,
)
from tests.training import Encoder, adam, draw, pair, quick, same, values

pytestmark = pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")
finite = st.floats(-1e6, 1e6)

# Schedules


def test_the_published_noise_ramp_is_its_loop() -> None:
    """Of the authors' training script: a constant is added at every step and the sum cut at 1."""
    ramp, factor = LinearRamp(0.1, 1.0, num_steps=4500, delay=1500), 0.1
    for step in range(7000):
        # 4500 roundings of 1e-16 each.
        assert ramp(step) == pytest.approx(factor, rel=0, abs=1e-12)
        if step >= 1500:
            factor = min(1.0, factor + 2e-4)
    assert (ramp(1500), ramp(6000)) == (0.1, 1.0)
    assert ramp(1501) > 0.1 and ramp(5999) < 1.0


def test_the_published_temperature_is_its_loop() -> None:
    for floor, reached in ((0.5, 1386), (0.005, 10594)):
        decay, temperature = ExponentialDecay(1.0, factor=0.9995, floor=floor), 1.0
        for step in range(reached + 5):
            assert decay(step) == pytest.approx(max(floor, temperature), rel=1e-11)
            assert (decay(step) == floor) == (step >= reached)
            temperature *= 0.9995


@pytest.mark.parametrize(
    ("num_steps", "cycles", "ratio"), [(80, 4, 0.5), (120, 4, 0.5), (60, 3, 0.25), (40, 1, 1.0)]
)
def test_cycles_are_those_of_the_published_loop(num_steps: int, cycles: int, ratio: float) -> None:
    """Fu et al. (2019), their code: an array of ones that linear ramps are written into."""
    expected = [1.0] * num_steps
    period = num_steps // cycles
    for cycle in range(cycles):
        value, index = 0.0, 0
        while value <= 1 + 1e-12 and index < period:
            expected[index + cycle * period] = value
            value += 1 / (period * ratio)
            index += 1
    schedule = Cyclic(0.0, 1.0, num_steps, cycles=cycles, ratio=ratio)
    assert [schedule(step) for step in range(num_steps)] == pytest.approx(expected, abs=1e-12)
    assert schedule(num_steps) == schedule(10 * num_steps) == 1.0


@given(finite, finite, st.integers(1, 500), st.integers(0, 300), st.integers(0, 2000))
def test_a_ramp_stays_between_its_ends_and_has_equal_steps(
    start: float, end: float, num_steps: int, delay: int, step: int
) -> None:
    ramp = LinearRamp(start, end, num_steps, delay)
    slack = 1e-15 * (abs(start) + abs(end))
    assert min(start, end) - slack <= ramp(step) <= max(start, end) + slack
    assert ramp(delay) == start and ramp(delay + num_steps) == end
    inside = delay <= step < delay + num_steps
    expected = (end - start) / num_steps if inside else 0.0
    rounding = 1e-15 * (abs(start) + abs(end))
    assert ramp(step + 1) - ramp(step) == pytest.approx(expected, rel=1e-12, abs=4 * rounding)


@given(st.integers(1, 7), st.integers(0, 100), st.floats(0.05, 1.0))
def test_every_cycle_starts_low_and_ends_high(cycles: int, more: int, ratio: float) -> None:
    num_steps = 10 * cycles + more  # also where a cycle is no whole number of steps
    schedule = Cyclic(-1.0, 3.0, num_steps, cycles=cycles, ratio=ratio)
    series = [schedule(step) for step in range(num_steps + 5)]
    drops = sum(later < earlier for earlier, later in zip(series, series[1:]))
    assert series[0] == -1.0 and series[-1] == 3.0
    assert drops == cycles - 1
    assert all(-1.0 <= value <= 3.0 for value in series)


def test_a_decay_is_safe_after_a_week_of_steps() -> None:
    assert ExponentialDecay(2.0, factor=0.5)(10**9) == 0.0
    assert ExponentialDecay(2.0, factor=1.0)(10**9) == 2.0
    assert Constant(3)(10**9) == 3.0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Constant("0.5"), TypeError, "value to be a real number, got '0.5'"),
        (lambda: Constant(math.nan), ValueError, "value"),
        (lambda: LinearRamp(math.inf, 1.0, 10), ValueError, "start to be finite, got inf"),
        (lambda: LinearRamp(0.0, 1.0, 0), ValueError, "num_steps >= 1, got 0"),
        (lambda: LinearRamp(0.0, 1.0, 2.5), TypeError, "num_steps to be a whole number"),
        (lambda: LinearRamp(0.0, 1.0, 5, delay=-1), ValueError, "delay >= 0, got -1"),
        (lambda: ExponentialDecay(0.0, 0.5), ValueError, r"start in \(0, inf\]"),
        (lambda: ExponentialDecay(1.0, 1.5), ValueError, r"factor in \(0, 1\]"),
        (lambda: ExponentialDecay(1.0, 0.5, floor=2.0), ValueError, r"floor in \[0, 1\]"),
        (lambda: Cyclic(0.0, 1.0, 3, cycles=4), ValueError, "num_steps >= 4, got 3"),
        (lambda: Cyclic(0.0, 1.0, 9, cycles=0), ValueError, "cycles >= 1"),
        (lambda: Cyclic(0.0, 1.0, 9, ratio=0.0), ValueError, r"ratio in \(0, 1\]"),
        (lambda: Scheduled(0.5), TypeError, "function of the step.*got float"),
        (lambda: Scheduled(lambda step: "a"), TypeError, "real numbers, got str at step 0"),
        (lambda: Scheduled(lambda step: math.nan), ValueError, "finite numbers, got nan at step 0"),
        (lambda: Scheduled(Constant(1.0)).set_step_(-1), ValueError, "step >= 0"),
        (lambda: Warmup(), ValueError, "got 0"),
        (lambda: Warmup(LinearRamp(0.0, 1.0, 5)), TypeError, "got LinearRamp.*remembers no step"),
        (lambda: Warmup(*[Scheduled(Constant(1.0))] * 2), ValueError, "each once"),
        (lambda: Warmup(Scheduled(Constant(1.0))).load_state_dict({}), ValueError, "got 0"),
        (lambda: check_scheduled("weight", "1", 0.0), TypeError, "weight.*Scheduled one, got str"),
        (lambda: check_scheduled("weight", Constant(1.0), 0.0), TypeError, r"Write Scheduled\("),
        (lambda: check_scheduled("weight", math.inf, 0.0), ValueError, "weight to be finite"),
        (lambda: check_scheduled("weight", True, 0.0), TypeError, "got bool"),
        (
            lambda: check_scheduled("t", Scheduled(Constant(0.0)), 0.0, open_low=True),
            ValueError,
            r"t in \(0",
        ),
    ],
)
def test_bad_arguments_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# The number that follows one


def squares(step: int) -> float:
    return 0.1 * (step + 1) ** 2


def test_a_scheduled_number_takes_every_value_of_its_schedule() -> None:
    number = Scheduled(squares)
    for step in range(5):
        assert int(number.step) == step
        assert float(number) == squares(step)  # in double precision, also of a float32 module
        torch.testing.assert_close(number(), torch.tensor(squares(step)), rtol=1e-7, atol=0)
        assert current(number) is number.value
        number.advance_()
    number.set_step_(0)
    assert float(number) == squares(0)


def test_a_plain_number_serves_as_well() -> None:
    assert current(0.25) == float(current(0.25)) == 0.25
    check_scheduled("weight", 0.25, 0.0)
    check_scheduled("weight", Scheduled(squares), 0.0)


def test_the_value_has_the_dtype_of_the_module_at_full_precision(
    dtype: torch.dtype, device: torch.device
) -> None:
    number = Scheduled(squares)
    holder = nn.ModuleDict({"inner": number}).to(dtype).to(device)
    assert (number.value.dtype, number.value.device.type) == (dtype, device.type)
    assert number.step.dtype == torch.int64
    for step in range(3):
        expected = torch.tensor(squares(step), dtype=dtype, device=device)
        assert torch.equal(number.value, expected)  # not 0.1 as float32 has it
        number.advance_()
    holder.to(torch.float64 if dtype == torch.float32 else torch.float32)
    assert float(number) == squares(3)


def test_only_the_step_is_stored_and_the_value_follows() -> None:
    number, other = nn.ModuleList([Scheduled(squares)]), nn.ModuleList([Scheduled(squares)])
    number[0].set_step_(7)
    assert set(number.state_dict()) == {"0.step"}
    other.load_state_dict(number.state_dict())
    assert torch.equal(other[0].value, number[0].value)
    twin = copy.deepcopy(number)
    twin[0].advance_()
    assert (int(twin[0].step), int(number[0].step)) == (8, 7)


@register_savable(name="tests.Noisy")
class Noisy(Encoder):
    """A guide whose spread is multiplied by a warm-up."""

    def __init__(self, noise: Scheduled) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, y: Tensor, num_data: int, mask: Tensor | None = None) -> None:
        law = pyro.distributions.Normal(self.linear(y), self.spread * current(self.noise))
        with pyro.plate("data", num_data, subsample_size=len(y)):
            pyro.sample("codes", law.to_event(1))


SCHEDULES = [
    Constant(0.5),
    LinearRamp(0.1, 1.0, 4500, delay=1500),
    ExponentialDecay(1.0, 0.9995, 0.5),
    Cyclic(0.0, 1.0, 80, cycles=3, ratio=0.25),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_a_saved_guide_goes_on_where_it_was(schedule: Any, tmp_path: Path) -> None:
    guide = Noisy(Scheduled(schedule))
    guide.noise.set_step_(1234)
    save(tmp_path / "bundle", guide=guide, noise=guide.noise)
    loaded = load(tmp_path / "bundle")
    assert loaded["noise"] is loaded["guide"].noise
    assert loaded["noise"].schedule == schedule
    assert float(loaded["noise"]) == schedule(1234)
    assert torch.equal(loaded["noise"].value, guide.noise.value)


# In a training


class Weighted(nn.Module):
    """An objective with a weight on the KL that belongs to neither program."""

    def __init__(self, model: nn.Module, guide: nn.Module, weight: Scheduled) -> None:
        super().__init__()
        self.model = model
        self.guide = guide
        self.weight = weight

    def forward(self, *args: Any) -> Tensor:
        of_guide = poutine.trace(self.guide).get_trace(*args)
        of_model = poutine.trace(poutine.replay(self.model, of_guide)).get_trace(*args)
        of_guide.compute_log_prob()
        of_model.compute_log_prob()
        latent = of_guide.nodes["codes"]["log_prob_sum"] - of_model.nodes["codes"]["log_prob_sum"]
        return float(self.weight) * latent - of_model.nodes["obs"]["log_prob_sum"]


class Watch(Callback):
    """Values that each step ran with; ends the process, as it were, in step ``until``."""

    def __init__(self, *scheduled: Scheduled, until: int | None = None) -> None:
        self.scheduled = scheduled
        self.until = until
        self.seen: list[tuple[float, ...]] = []

    def after_step(self, progress: Progress) -> None:
        if progress.step == self.until:
            raise InterruptedError
        self.seen.append(tuple(float(entry) for entry in self.scheduled))


def train(
    folder: Path | None = None, *, until: int | None = None, faulty: bool = False, every: int = 1
) -> tuple[list[Tensor], Watch, list[int], Any]:
    """Three steps an epoch; two phases; a warm-up in the guide and one in the objective."""
    noise = Scheduled(LinearRamp(0.1, 1.0, num_steps=7, delay=2))
    weight = Scheduled(Cyclic(0.0, 1.0, num_steps=11, cycles=3))
    model, guide = pair()[0], Noisy(noise)
    if faulty:
        model.atoms.register_hook(
            lambda g: torch.where(model.atoms[0, 0].abs() * 1e4 % 3 < 1, torch.nan, g)
        )
    watch = Watch(noise, weight, until=until)
    updates = [Update(lambda model, guide: Weighted(model, guide, weight), optimizer=adam)]
    history = quick(
        model,
        guide,
        draw(20),
        phases=[Phase(2, updates), Phase(2, updates)],
        batch_size=8,
        seed=3,
        callbacks=[watch, Warmup(noise, weight)],
        guard=RollBack(limit=100, factor=0.9) if faulty else None,
        checkpoints=None if folder is None else Checkpoints(folder, every=every),
    )
    return values(model, guide), watch, [int(noise.step), int(weight.step)], history


uninterrupted = functools.cache(lambda faulty: train(faulty=faulty))


@pytest.mark.parametrize("faulty", [False, True], ids=["sound", "faults"])
def test_steps_run_with_the_values_of_their_number(faulty: bool) -> None:
    """Undone steps count, as for learning-rate schedules."""
    _, watch, steps, history = uninterrupted(faulty)
    ramp, cycles = LinearRamp(0.1, 1.0, 7, 2), Cyclic(0.0, 1.0, 11, 3)
    assert watch.seen == [(ramp(step), cycles(step)) for step in range(12)]
    assert steps == [12, 12]
    assert bool(history.faults) == faulty


@pytest.mark.parametrize("faulty", [False, True], ids=["sound", "faults"])
@pytest.mark.parametrize(
    ("until", "every"), [(2, 1), (3, 1), (5, 2), (6, 1), (7, 2), (8, 1), (12, 2)]
)
def test_a_resumed_warm_up_is_the_uninterrupted_one(
    until: int, every: int, faulty: bool, tmp_path: Path
) -> None:
    """Also inside an epoch, and where the last checkpoint is some steps back."""
    expected, _, steps, history = uninterrupted(faulty)
    with pytest.raises(InterruptedError):
        train(tmp_path, until=until, faulty=faulty, every=every)
    found, _, again, resumed = train(tmp_path, faulty=faulty, every=every)
    assert same(found, expected)
    assert again == steps
    assert repr(resumed.step_loss) == repr(history.step_loss)


def test_the_warm_ups_matter_to_the_training() -> None:
    """Else the test of resuming would not see one that was lost."""
    one, *_ = uninterrupted(False)
    model, guide = pair()[0], Noisy(Scheduled(Constant(1.0)))
    weight = Scheduled(Constant(1.0))
    updates = [Update(lambda model, guide: Weighted(model, guide, weight), optimizer=adam)]
    quick(model, guide, draw(20), phases=[Phase(4, updates)], batch_size=8, seed=3)
    different = [a for a, b in zip(one, values(model, guide)) if not torch.equal(a, b)]
    assert len(different) >= 5


def test_it_counts_on_from_one_training_to_the_next() -> None:
    model, guide = pair()[0], Noisy(Scheduled(LinearRamp(0.1, 1.0, 100)))
    warmup = Warmup(guide.noise)
    for number in (1, 2):
        quick(model, guide, draw(20), epochs=2, batch_size=8, callbacks=[warmup])
        assert int(guide.noise.step) == 6 * number
