"""Warm-ups: numbers that change from step to step, such as the weight of a KL or a temperature.

A schedule is a function of the step, ``schedule(step) -> float``, steps counted from 0: one of the
small classes here, or any function of one's own. ``Scheduled`` remembers the step and stands where
a number would; ``Warmup`` moves it on in ``infer.fit``::

    weight = Scheduled(LinearRamp(0.0, 1.0, num_steps=1000))
    fit(model, guide, y, loss=SparseELBO(kl_weight=weight), callbacks=[Warmup(weight)])

Without ``fit``, call ``weight.advance_()`` after every step of the optimiser.

Learning rates have schedules of torch's own; ``infer.Update`` takes those.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sparse.infer.bundle import register_savable
from pyro_sparse.infer.callbacks import Callback, Progress
from pyro_sparse.infer.numbers import check_real, check_whole


@dataclass(frozen=True)
class Constant:
    """The same value at every step.

    Args:
        value: Finite.

    Example:
        >>> Constant(0.5)(1000)
        0.5
    """

    value: float

    def __post_init__(self) -> None:
        _check_finite(value=self.value)

    def __call__(self, step: int) -> float:
        """Value at a step."""
        return float(self.value)


@dataclass(frozen=True)
class LinearRamp:
    """From one value to another in equal steps, and constant before and after.

    Published uses: the factor on the noise of a thresholded Laplace posterior, 0.1 until step 1500
    and then 2e-4 more at every step, so that it is 1 from step 6000 on; the weight of the KL, from
    0 to 1 in the first tenth of the steps; the penalty of a FISTA baseline, from 0.1 to 1.

    Args:
        start: Value until step ``delay``.
        end: Value from step ``delay + num_steps`` on, exactly.
        num_steps: Length of the ramp, ``>= 1``.
        delay: Steps before it, ``>= 0``.

    References:
        Fallah & Rozell (2022), ICML, PMLR 162:6034-6058, and the authors' code.

    Example:
        >>> noise = LinearRamp(0.1, 1.0, num_steps=4500, delay=1500)
        >>> noise(1500), round(noise(1501), 4), noise(6000)
        (0.1, 0.1002, 1.0)
    """

    start: float
    end: float
    num_steps: int
    delay: int = 0

    def __post_init__(self) -> None:
        _check_finite(start=self.start, end=self.end)
        check_whole("num_steps", self.num_steps, 1)
        check_whole("delay", self.delay, 0)

    def __call__(self, step: int) -> float:
        """Value at a step."""
        return _between(self.start, self.end, (step - self.delay) / self.num_steps)


@dataclass(frozen=True)
class ExponentialDecay:
    r"""Shrinks by a factor at every step down to a floor: :math:`\max(f, a\, r^t)`.

    Published use: the temperature of a relaxed gate, ``1.0 * 0.9995**step`` down to 0.5 (from step
    1386 on) for a linear decoder and to 0.005 for a deep one.

    Args:
        start: :math:`a > 0`.
        factor: :math:`r`, in (0, 1].
        floor: :math:`f`, in [0, start]. A temperature needs one above 0.

    References:
        Fallah & Rozell (2022), ICML, PMLR 162:6034-6058, and the authors' code.

    Example:
        >>> temperature = ExponentialDecay(1.0, factor=0.9995, floor=0.5)
        >>> temperature(0), temperature(1385) > 0.5, temperature(1386)
        (1.0, True, 0.5)
    """

    start: float
    factor: float
    floor: float = 0.0

    def __post_init__(self) -> None:
        _check_finite(start=self.start, factor=self.factor, floor=self.floor)
        check_real("start", self.start, 0.0, math.inf, open_low=True)
        check_real("factor", self.factor, 0.0, 1.0, open_low=True)
        check_real("floor", self.floor, 0.0, float(self.start))

    def __call__(self, step: int) -> float:
        """Value at a step."""
        return max(float(self.floor), float(self.start) * float(self.factor) ** step)


@dataclass(frozen=True)
class Cyclic:
    """Linear ramps again and again, each with a rest at its end; constant after the last.

    Args:
        start: Value at the start of every cycle.
        end: Value at the end of every ramp, and after the last cycle.
        num_steps: Length of all cycles together, ``>= cycles``.
        cycles: Their number, ``>= 1``.
        ratio: Part of a cycle that its ramp takes, in (0, 1].

    References:
        Fu, Li, Liu, Gao, Celikyilmaz & Carin (2019), NAACL-HLT, sec. 3 (cyclical annealing).

    Example:
        >>> weight = Cyclic(0.0, 1.0, num_steps=80)
        >>> [weight(step) for step in (0, 5, 10, 19, 20, 25, 80)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0]
    """

    start: float
    end: float
    num_steps: int
    cycles: int = 4
    ratio: float = 0.5

    def __post_init__(self) -> None:
        _check_finite(start=self.start, end=self.end)
        check_whole("cycles", self.cycles, 1)
        check_whole("num_steps", self.num_steps, self.cycles)
        check_real("ratio", self.ratio, 0.0, 1.0, open_low=True)

    def __call__(self, step: int) -> float:
        """Value at a step."""
        if step >= self.num_steps:
            return float(self.end)
        # In whole numbers: where a cycle is no whole number of steps, none starts a step late.
        part = step * self.cycles % self.num_steps / self.num_steps
        return _between(self.start, self.end, part / self.ratio)


class Scheduled(nn.Module):
    """A number that follows a schedule; stands where a plain number would.

    A module, so that one inside a guide is saved with it, moves with it and goes on after loading
    where it was. The step is what is stored; the value follows from it.

    Args:
        schedule: Function of the step, such as ``LinearRamp(...)``: called with 0, 1, 2, ..., gives
            a finite number.

    Attributes:
        step: Steps so far, a whole number in a tensor of shape ``()``.
        value: Value at this step, a tensor of shape ``()`` in the module's dtype and on its device,
            which a program can use without waiting for an accelerator.

    Raises:
        TypeError: If ``schedule`` is not callable, or gives no number.
        ValueError: If it gives a number that is not finite.

    Example:
        >>> noise = Scheduled(LinearRamp(0.5, 1.0, num_steps=2))
        >>> noise.advance_()
        >>> noise(), float(noise)
        (tensor(0.7500), 0.75)
    """

    step: Tensor
    value: Tensor

    def __init__(self, schedule: Callable[[int], float]) -> None:
        super().__init__()
        if not callable(schedule):
            raise TypeError(
                "Expected a schedule, a function of the step such as LinearRamp(0.0, 1.0, "
                f"num_steps=1000), got {type(schedule).__name__}."
            )
        self.schedule = schedule
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("value", torch.zeros(()), persistent=False)
        self._refresh()

    def forward(self) -> Tensor:
        """The value at this step, shape ``()``."""
        return self.value

    def __float__(self) -> float:
        """The value at this step in double precision, whatever the module's dtype."""
        return self._at(int(self.step))

    def advance_(self) -> None:
        """Go on to the next step, in place."""
        self.set_step_(int(self.step) + 1)

    def set_step_(self, step: int) -> None:
        """Go to a step, in place; 0 begins anew.

        Raises:
            ValueError: If it is negative.
        """
        check_whole("step", step, 0)
        with torch.no_grad():
            self.step.fill_(step)
        self._refresh()

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.schedule!r}, step={int(self.step)}"

    def _at(self, step: int) -> float:
        value: Any = self.schedule(step)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(
                f"Expected a schedule that gives real numbers, got {type(value).__name__} at step "
                f"{step}."
            )
        if not math.isfinite(value):
            raise ValueError(f"Expected a schedule of finite numbers, got {value} at step {step}.")
        return float(value)

    def _refresh(self) -> None:
        """Make the value follow the step."""
        if self.step.is_meta:
            return
        step = int(self.step)
        check_whole("step", step, 0)  # it may come from a stranger's file
        with torch.no_grad():
            self.value.fill_(self._at(step))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._refresh()

    def _apply(self, fn: Any, recurse: bool = True) -> Scheduled:
        super()._apply(fn, recurse)
        self._refresh()  # or 0.1 in float32, made double, would stay 0.10000000149
        return self


class Warmup(Callback):
    """Moves scheduled numbers on, after every step of ``infer.fit``.

    The step counts on from phase to phase and from one ``fit`` to the next; ``set_step_(0)`` begins
    anew. A step that the guard has undone counts too, as it does for learning-rate schedules, so
    that both keep in time with each other (and a value that made the fault is left behind). A
    minibatch without an observed sample makes no step and does not count.

    A checkpoint holds the steps as this callback's state, also of numbers that stand neither in the
    model nor in the guide, such as an objective's. They resume bit for bit.

    Args:
        scheduled: What to move on, at least one, each once.

    Raises:
        TypeError: If one is not a ``Scheduled``.
        ValueError: If there is none, or one is given twice: it would go at double pace.

    Example:
        >>> weight = Scheduled(LinearRamp(0.0, 1.0, num_steps=1000))
        >>> warmup = Warmup(weight)  # fit(..., callbacks=[warmup])
    """

    def __init__(self, *scheduled: Scheduled) -> None:
        for entry in scheduled:
            if not isinstance(entry, Scheduled):
                raise TypeError(
                    f"Expected Scheduled(...) to warm up, got {type(entry).__name__}. A schedule "
                    "alone remembers no step: hand Scheduled(schedule) here and to its user."
                )
        if len({id(entry) for entry in scheduled}) != len(scheduled) or not scheduled:
            raise ValueError(f"Expected different Scheduled, each once, got {len(scheduled)}.")
        self.scheduled = scheduled

    def after_step(self, progress: Progress) -> None:  # noqa: D102
        for entry in self.scheduled:
            entry.advance_()

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {f"step {number}": int(entry.step) for number, entry in enumerate(self.scheduled)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the steps.

        Raises:
            ValueError: If they are of another number of scheduled numbers.
        """
        if set(state) != set(self.state_dict()):
            raise ValueError(
                f"Expected the state of {len(self.scheduled)} scheduled numbers, got {len(state)}."
            )
        for number, entry in enumerate(self.scheduled):
            entry.set_step_(state[f"step {number}"])


def current(value: float | Scheduled) -> float | Tensor:
    """The value at this step of what may be a plain number or a scheduled one.

    Returns:
        The number, or a tensor of shape ``()``; ``float(value)`` gives a float of either.

    Example:
        >>> current(0.5), current(Scheduled(Constant(0.5)))
        (0.5, tensor(0.5000))
    """
    return value.value if isinstance(value, Scheduled) else value


def check_scheduled(
    name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False
) -> None:
    """Refuse what is neither a number in ``[low, high]`` nor scheduled, in it at this step.

    Raises:
        TypeError: If it is neither a real number nor a ``Scheduled``.
        ValueError: If it is outside (``open_low``: or at ``low``).
    """
    number = float(value) if isinstance(value, Scheduled) else value
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(
            f"Expected {name} to be a real number or a Scheduled one, got {type(value).__name__}."
            + (" Write Scheduled(schedule)." if callable(value) else "")
        )
    check_real(name, number, low, high, open_low=open_low)
    _check_finite(**{name: number})


def _between(start: float, end: float, part: float) -> float:
    """Linear in ``part``, and exactly the ends outside [0, 1]."""
    if part <= 0:
        return float(start)
    return float(end) if part >= 1 else float(start + (end - start) * part)


def _check_finite(**numbers: Any) -> None:
    for name, number in numbers.items():
        check_real(name, number, -math.inf, math.inf)
        if not math.isfinite(number):
            raise ValueError(f"Expected {name} to be finite, got {number}.")


for _kind in (Constant, LinearRamp, ExponentialDecay, Cyclic, Scheduled):
    register_savable(_kind, name=f"pyro_sparse.infer.{_kind.__name__}")
