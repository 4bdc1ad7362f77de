"""What a law works out of its parameters once, and keeps for as long as they are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def remembered(law: Any, name: str, parts: tuple[Any, ...], make: Callable[[], T]) -> T:
    """A value made of some parts of a law: once, and anew where a part is another object.

    A copy of the law with other parts (``match``) so works it out anew. What was made without a
    graph only serves where none is recorded.

    Args:
        law: Where the value is kept.
        name: Its attribute there; a tuple, so that nothing takes it for a parameter.
        parts: What the value depends on.
        make: Works it out.

    Example:
        >>> law = torch.distributions.Normal(1.0, 2.0)
        >>> remembered(law, "_twice", (law.loc,), lambda: 2 * law.loc)
        tensor(2.)
    """
    graph = torch.is_grad_enabled()
    stored = vars(law).get(name)
    if stored is not None:
        old, made, value = stored
        if graph <= made and all(a is b for a, b in zip(old, parts, strict=True)):
            return value
    value = make()
    vars(law)[name] = (parts, graph, value)
    return value
