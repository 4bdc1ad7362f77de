"""JSON that a stranger may have made: bounded, without duplicates, and with tuples and nan."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

MAX_DEPTH = 64  # of JSON
MAX_DIGITS = 100  # of a whole number: numpy's generators have states of 39
MAX_RANK = 16


def refuse(where: Any, expected: str, got: str) -> NoReturn:
    """Raise the one kind of error that a damaged or hostile file gives."""
    raise ValueError(f"{where}: expected {expected}, got {got}.")


def short(value: Any) -> str:
    """A stranger's value for a message: of bounded length, printable, and not deep."""
    if isinstance(value, list) and len(value) <= MAX_RANK:
        return f"[{', '.join(map(short, value))}]" if not _nested(value) else "a nested list"
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of length {len(value)}"
    return ascii(value[:80] if isinstance(value, str) else value)


def _nested(value: list[Any]) -> bool:
    return any(isinstance(entry, list | dict) for entry in value)


def dumps(value: Any, where: str, max_bytes: int) -> bytes:
    """Bytes of an encoded value, of a bounded number."""
    data = json.dumps(value, allow_nan=False, indent=None, ensure_ascii=True).encode()
    if len(data) > max_bytes:
        raise ValueError(f"Expected {where} of at most {max_bytes} bytes, got {len(data)}.")
    return data


def loads(data: bytes, file: Path) -> Any:
    """Value of bytes that somebody else wrote, before ``decode``."""
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_table,
            parse_int=_whole,
            parse_float=_real,
            parse_constant=_constant,
        )
    except UnicodeDecodeError as error:
        refuse(file, "UTF-8", f"another byte at {error.start}")
    except RecursionError:
        refuse(file, f"JSON of a depth of at most {MAX_DEPTH}", "a deeper one")
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON: {error}") from None


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key occurs twice")
    return table


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a whole number has more than {MAX_DIGITS} digits")
    return int(text)


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is out of the range of float64")
    return value


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def encode(value: Any, where: str, depth: int = 0) -> Any:
    """A record as plain JSON: ``{"$float": "nan"}`` and ``{"$tuple": [...]}`` for what it lacks."""
    if depth > MAX_DEPTH:
        raise ValueError(f"Expected {where} of a depth of at most {MAX_DEPTH}, got more.")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if value.bit_length() > 3 * MAX_DIGITS:
            raise ValueError(f"Expected {where} below 2**{3 * MAX_DIGITS}, got a larger number.")
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, str):
        check_text(value, where)
        return value
    if isinstance(value, list | tuple):
        entries = [encode(entry, where, depth + 1) for entry in value]
        return {"$tuple": entries} if isinstance(value, tuple) else entries
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"Expected keys of {where} to be str, got {type(key).__name__}.")
            if key.startswith("$"):
                raise ValueError(f"Expected keys of {where} without a leading $, got {key!r}.")
            check_text(key, where)
        return {key: encode(entry, f"{where}[{key!r}]", depth + 1) for key, entry in value.items()}
    raise TypeError(
        f"Expected {where} to be None, bool, int, float, str, list, tuple or dict, got "
        f"{type(value).__name__}. Tensors go into tensors=, other objects to a registered class."
    )


def decode(value: Any, where: str, depth: int = 0) -> Any:
    """Undo of ``encode``."""
    if depth > MAX_DEPTH:
        refuse(where, f"JSON of a depth of at most {MAX_DEPTH}", "a deeper one")
    if isinstance(value, str):
        check_text(value, where)
    if isinstance(value, list):
        return [decode(entry, where, depth + 1) for entry in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"$float"} and value["$float"] in ("nan", "inf", "-inf"):
        return float(value["$float"])
    if set(value) == {"$tuple"} and isinstance(value["$tuple"], list):
        return tuple(decode(entry, where, depth + 1) for entry in value["$tuple"])
    for key in value:
        check_text(key, where)
        if key.startswith("$"):
            refuse(where, "$float or $tuple", short(key))
    return {key: decode(entry, where, depth + 1) for key, entry in value.items()}


def check_text(text: str, where: str) -> None:
    """Refuse text that has no bytes, such as half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: expected text without lone surrogates.") from None
