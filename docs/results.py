"""The page of results, made from the records in benchmarks/results: nothing is copied by hand."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

HEAD = """# Results

Every table is made from a record in `benchmarks/results`, every picture lies beside its record, and
each names the command that made it. Long lists (curves) are in the records and the pictures alone.
Seconds are those of one or two shared cores. Where a published figure was missed it stands here as
it came out.

"""
KNOWN = ("command", "seed", "seconds", "versions")


def page(records: Path, pictures: Path) -> str:
    """Markdown of all records; pictures are copied to ``pictures``."""
    parts = [HEAD]
    files = sorted(records.glob("*.json"))
    for file in files:
        parts.append(section(file, json.loads(file.read_text())))
        for picture in sorted(records.glob(f"{file.stem}*.png")):
            if picture != file.with_suffix(".png") and picture.with_suffix(".json") in files:
                continue  # of a record of its own
            pictures.mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, pictures / picture.name)
            parts.append(f"![{picture.stem}]({pictures.name}/{picture.name})\n\n")
    return "".join(parts)


def section(file: Path, content: dict[str, Any]) -> str:
    """Title, what it is by its program's docstring, command, tables."""
    command = str(content.get("command", ""))
    what = {key: value for key, value in content.items() if key not in KNOWN}
    text = [f"## {file.stem.replace('_', ' ')}\n\n"]
    said = docstring(command, file.parent.parent)
    if said:
        text.append(f"{said}\n\n")
    text.append(f"`{command}`, seed {content.get('seed')}, {content.get('seconds', '?')} s\n\n")
    return "".join(text) + tables("", what)


def docstring(command: str, folder: Path) -> str:
    """First line of the docstring of ``python -m benchmarks.NAME``."""
    words = [word for word in command.split() if word.startswith("benchmarks.")]
    file = folder / f"{words[0].partition('.')[2]}.py" if words else None
    if file is None or not file.exists():
        return ""
    return (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n\n")[0]


def tables(name: str, found: dict[str, Any]) -> str:
    """Numbers as a list; dicts with keys in common as one table; others one after another."""
    plain = {key: value for key, value in found.items() if is_cell(value)}
    inner = {key: value for key, value in found.items() if isinstance(value, dict)}
    rows = {key: flat(value) for key, value in inner.items()}
    text = [f"**{name}**\n\n"] if name and (plain or alike(inner)) else []
    text += [f"- {escaped(key)}: {cell(value)}\n" for key, value in plain.items()]
    text.append("\n" if plain else "")
    if alike(inner):
        text.append(table(rows))
    else:
        for key, value in inner.items():
            text.append(tables(f"{name}, {key}" if name else key, value))
    return "".join(text)


def alike(rows: dict[str, dict[str, Any]]) -> bool:
    """Dicts that make a table: not too deep, and with keys in common."""
    shallow = all(flat(row) for row in rows.values())
    return (
        len(rows) > 1 and shallow and bool(set.intersection(*(set(row) for row in rows.values())))
    )


def table(rows: dict[str, dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    if len(columns) > max(8, len(rows)):  # too wide for a page: what is asked of each goes down
        rows = {c: {key: row[c] for key, row in rows.items() if c in row} for c in columns}
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    text = line(["", *columns]) + line(["---"] * (len(columns) + 1))
    for key, row in rows.items():
        text += line([key, *(cell(row.get(column)) for column in columns)])
    return text + "\n"


def flat(found: dict[str, Any]) -> dict[str, Any]:
    """Cells of a row, those one level below as ``key: inner``; none if it is deeper than that."""
    row: dict[str, Any] = {}
    for key, value in found.items():
        if is_cell(value):
            row[key] = value
        elif isinstance(value, dict):
            if any(isinstance(deeper, dict) for deeper in value.values()):
                return {}
            row |= {f"{key}: {k}": v for k, v in value.items() if is_cell(v)}
    return row


def is_cell(value: Any) -> bool:
    """A number, a word, or a few numbers."""
    if isinstance(value, list):
        return len(value) <= 4 and all(isinstance(one, int | float | str) for one in value)
    return not isinstance(value, dict)


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        # Bounds of many nats differ in what four digits leave out.
        return f"{value:.7g}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(cell(one) for one in value)
    return escaped(str(value))


def escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").strip()


def line(cells: list[str]) -> str:
    return "| " + " | ".join(escaped(str(one)) for one in cells) + " |\n"
