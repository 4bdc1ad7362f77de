"""What a training tells a user's own code, and when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Progress:
    """Where a training stands.

    Attributes:
        model: The generative program, as the user handed it over.
        guide: The variational program, likewise.
        y: The minibatch of this step, shape ``(n, *signal_shape)``.
        mask: True where a sample of it was observed, broadcastable to ``y``; None for all.
        num_data: Size of the whole data set.
        step: Steps done so far, this one included.
        epoch: Epoch of this step, from 1.
        phase: Phase of this step, from 0.
        loss: Objective of this step, in nats per datum.

    Example:
        >>> import torch
        >>> y = torch.zeros(5, 3)
        >>> now = Progress(None, None, y, None, num_data=20, step=8, epoch=2, phase=0, loss=1.25)
        >>> print(f"step {now.step}: {now.loss:.2f} nats per datum")
        step 8: 1.25 nats per datum
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    y: Tensor
    mask: Tensor | None
    num_data: int
    step: int
    epoch: int
    phase: int
    loss: float


class Callback:
    """Code of one's own inside a training; every method may be left out.

    It may change parameters in place. What it remembers from step to step belongs into
    ``state_dict``, or a resumed training would not equal an uninterrupted one.

    Example:
        >>> class Report(Callback):
        ...     def after_epoch(self, progress):
        ...         print(f"epoch {progress.epoch}: {progress.loss:.2f} nats per datum")
        >>> callbacks = [Report()]  # for infer.fit(..., callbacks=callbacks)
    """

    def after_step(self, progress: Progress) -> None:
        """Called after every step of the optimiser; the loss is ``nan`` if it was undone."""

    def after_epoch(self, progress: Progress) -> None:
        """Called after every epoch, with its last minibatch."""

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, by name: tensors and plain numbers or strings, not nested."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
