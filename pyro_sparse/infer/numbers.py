"""Numbers that a user hands over, checked by kind and range."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any


def check_whole(name: str, value: Any, least: int | None = None) -> None:
    """Refuse what is not a whole number of at least ``least`` (any, if that is None).

    Raises:
        TypeError: If it is not a whole number (``True`` is none).
        ValueError: If it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"Expected {name} to be a whole number, got {_shown(value)}.")
    if least is not None and value < least:
        raise ValueError(f"Expected {name} >= {least}, got {value}.")


def check_real(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    """Refuse what is not a real number in ``[low, high]``, or ``(low, high]`` if ``open_low``.

    Raises:
        TypeError: If it is not a real number (``True`` is none).
        ValueError: If it is outside.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"Expected {name} to be a real number, got {_shown(value)}.")
    number = float(value)
    inside = (low < number if open_low else low <= number) and number <= high
    if not inside:  # nan is not
        bracket = "(" if open_low else "["
        raise ValueError(f"Expected {name} in {bracket}{low:g}, {high:g}], got {value}.")


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str | int | float) else type(value).__name__
