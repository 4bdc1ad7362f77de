"""The page of notation names only what exists."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs/notation.md").read_text()
CODE = re.findall(r"`([^`]+)`", PAGE)
NAMES = sorted(set(re.findall(r"(?<![\w.])((?:[a-z_]+\.)[A-Z]\w+(?:\.\w+)?)", " ".join(CODE))))
FUNCTIONS = sorted(
    set(re.findall(r"(?<![\w.])((?:diagnostics|solvers|infer)\.[a-z]\w+)", " ".join(CODE)))
)
PARTS = ("dictionaries", "distributions", "likelihoods", "solvers", "infer", "diagnostics")


@pytest.mark.parametrize(
    "name", [n for n in NAMES + FUNCTIONS if not n.startswith(("dist.", "torch."))]
)
def test_a_dotted_name_is_there(name: str) -> None:
    part, *path = name.split(".")
    found = importlib.import_module(f"pyro_sparse.{part}")
    for step in path:
        found = getattr(found, step)


def test_keywords_are_arguments_of_something_public() -> None:
    keywords = set(re.findall(r"(?<![\w.])(\w+)=", " ".join(CODE)))
    known: set[str] = set()
    for part in (*PARTS, "models", "guides"):
        module = importlib.import_module(f"pyro_sparse.{part}")
        for name in module.__all__:
            public = getattr(module, name)
            if inspect.isroutine(public) or inspect.isclass(public):
                if inspect.isclass(public) and issubclass(public, Exception):
                    continue
                known |= set(inspect.signature(public).parameters)
    assert len(keywords) > 10
    assert keywords <= known
