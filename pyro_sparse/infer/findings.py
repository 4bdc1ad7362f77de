"""What checks and reports have in common: questions that may not apply, and a table of answers."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable


class NotAsked(Exception):
    """Raised by a question that does not apply; its message says why, or what it needs."""


def table(rows: Iterable[tuple[str, str, str]], *, width: int | None = None) -> list[str]:
    r"""Lines of a table: a verdict, a name, and what was found.

    Args:
        rows: Verdict, name and text of each row.
        width: Columns at which texts are wrapped; default as they are, with their own line breaks.

    Returns:
        Lines without trailing blanks; further ones of a text stand below its first.

    Example:
        >>> print("\n".join(table([("ok", "a", "one two"), ("FAILED", "bc", "three")], width=19)))
          ok      a   one
                      two
          FAILED  bc  three
    """
    rows = list(rows)
    first = max((len(verdict) for verdict, _, _ in rows), default=0)
    second = max((len(name) for _, name, _ in rows), default=0)
    indent = " " * (first + second + 6)
    found = []
    for verdict, name, text in rows:
        if width is not None:
            text = "\n".join(textwrap.wrap(text, width - len(indent)))
        head = f"  {verdict:{first}}  {name:{second}}  "
        found += (head + text.replace("\n", f"\n{indent}")).split("\n")
    return [line.rstrip() for line in found]
