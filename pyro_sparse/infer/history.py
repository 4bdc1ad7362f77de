"""What a training is asked to stop at, and what it did."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pyro_sparse.infer.numbers import check_real, check_whole


@dataclass
class History:
    """What a training did.

    Attributes:
        step_loss: Objective of each step in nats per datum (negative ELBO over ``num_data``); of
            the first update where a phase has several, ``nan`` for a step that was undone.
        update_loss: Of all updates of each step.
        epoch_loss: Mean of ``step_loss`` over each epoch, weighted by the sizes of the minibatches.
        validation_loss: Objective of the validation data after each epoch, if there are any.
        faults: What was not finite, in words, where the training went on.
        skipped: Minibatches without any observed sample.
        seconds: Wall-clock of the training, earlier runs that it resumed from included.
    """

    step_loss: list[float] = field(default_factory=list)
    update_loss: list[list[float]] = field(default_factory=list)
    epoch_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    skipped: int = 0
    seconds: float = 0.0

    def __repr__(self) -> str:
        """A line: thousands of numbers at the end of a notebook's cell tell nobody anything."""
        steps, epochs = len(self.step_loss), len(self.epoch_loss)
        loss = ""
        if epochs:
            loss = f", {self.epoch_loss[0]:.4g} -> {self.epoch_loss[-1]:.4g} nats per datum"
        rest = f", {len(self.faults)} faults" if self.faults else ""
        rest += f", {self.skipped} skipped" if self.skipped else ""
        return f"History({epochs} epochs, {steps} steps{loss}{rest}, {self.seconds:.1f} s)"


@dataclass(frozen=True)
class EarlyStopping:
    """End a phase when its loss has not improved for some epochs.

    Attributes:
        patience: Epochs without improvement, ``>= 1``.
        min_delta: What counts as one, in nats per datum, ``>= 0``.
        data: Validation data, shape ``(n, *signal_shape)``; without them the training loss counts.
        mask: True where a validation sample was observed.
        given: What else is known of the validation data, as in ``fit``.

    Example:
        >>> EarlyStopping(patience=5, min_delta=0.01).patience  # for fit(..., early_stopping=)
        5
    """

    patience: int
    min_delta: float = 0.0
    data: Any = None
    mask: Any = None
    given: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_whole("patience", self.patience, 1)
        check_real("min_delta", self.min_delta, 0.0, math.inf)
