"""What ``fit`` is handed, checked by kind before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.infer import ELBO

from pyro_sparse.infer.callbacks import Callback
from pyro_sparse.infer.checkpoints import Checkpoints
from pyro_sparse.infer.guard import Guard
from pyro_sparse.infer.history import EarlyStopping
from pyro_sparse.infer.phases import Phase
from pyro_sparse.ops import kind_of


def check_kinds(
    *,
    programs: dict[str, Any],
    makers: dict[str, Any],
    device: Any,
    phases: Any,
    early_stopping: Any,
    callbacks: Any,
    guard: Any,
    checkpoints: Any,
) -> None:
    """Refuse an argument of a wrong kind.

    Args:
        programs: Model and guide by name: to be called.
        makers: Objective, optimiser and schedule by name: to be called, or None.
        device: For ``torch.device``, or None.
        phases: A sequence of ``Phase``, or None.
        early_stopping: An ``EarlyStopping``, or None.
        callbacks: A sequence of ``Callback``.
        guard: A ``Guard``, or None.
        checkpoints: A ``Checkpoints``, or None.

    Raises:
        TypeError: Names the argument, what was expected and what came.
        ValueError: If ``device`` names none.
    """
    for name, value in programs.items():
        if not callable(value):
            _refuse(name, "a program, a module or a function", value)
    for name, value in makers.items():
        if value is not None and not callable(value):
            _refuse(name, "something to call, such as torch.optim.Adam or Trace_ELBO()", value)
    loss = makers["loss"]
    if isinstance(loss, type) and issubclass(loss, ELBO):
        raise TypeError(f"Expected loss to be an objective, got {kind_of(loss)}.")
    if device is not None:
        try:
            torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"Expected a device such as 'cuda', got {device!r}.") from error
    for name, value, kind in (
        ("early_stopping", early_stopping, EarlyStopping),
        ("guard", guard, Guard),
        ("checkpoints", checkpoints, Checkpoints),
    ):
        if value is not None and not isinstance(value, kind):
            _refuse(name, f"an infer.{kind.__name__} object", value)
    if phases is not None:
        _check_list("phases", phases, Phase)
    _check_list("callbacks", callbacks, Callback)


def _check_list(name: str, values: Any, kind: type) -> None:
    expected = f"a list of infer.{kind.__name__} objects"
    if not isinstance(values, Sequence) or isinstance(values, str):
        _refuse(name, expected, values)
    for value in values:
        if not isinstance(value, kind):
            _refuse(name, expected, value)


def _refuse(name: str, expected: str, value: Any) -> None:
    shown = value if isinstance(value, str | int | float) else type(value).__name__
    raise TypeError(f"Expected {name} to be {expected}, got {shown!r}.")
