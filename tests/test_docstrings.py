"""Every example in a docstring runs.

pytest's own ``--doctest-modules`` would import models/ and guides/ twice, under two names.
"""

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import pyro_sparse


def modules_of(package: str) -> Iterator[str]:
    yield package
    path = importlib.import_module(package).__path__
    yield from (info.name for info in pkgutil.walk_packages(path, f"{package}."))


def public_names(module: ModuleType) -> set[str]:
    """What a part exports; ``ops``, one module, all that it defines without an underscore."""
    own = {name for name, found in vars(module).items() if inspect.getmodule(found) is module}
    return set(getattr(module, "__all__", {name for name in own if not name.startswith("_")}))


def example_of(found: Any) -> bool:
    """Whether a function, or a class or a method of its own, has an example in its docstring."""
    places = [found, *vars(found).values()] if inspect.isclass(found) else [found]
    return any(">>>" in (getattr(place, "__doc__", None) or "") for place in places)


# A set: from a wheel, the walk over pyro_sparse meets the other two as well.
MODULES = sorted(
    {
        name
        for package in ("pyro_sparse", "pyro_sparse.models", "pyro_sparse.guides")
        for name in modules_of(package)
    }
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0, f"{results.failed} of {results.attempted} failed, printed above"


PUBLIC = sorted(
    (part, name)
    for part in pyro_sparse._PARTS
    for name, found in vars(importlib.import_module(f"pyro_sparse.{part}")).items()
    if (inspect.isclass(found) or inspect.isroutine(found))
    and name in public_names(importlib.import_module(f"pyro_sparse.{part}"))
)


@pytest.mark.parametrize(("part", "name"), PUBLIC, ids=".".join)
def test_what_is_public_shows_how_it_is_used(part: str, name: str) -> None:
    assert example_of(getattr(importlib.import_module(f"pyro_sparse.{part}"), name))


def test_what_shows_nothing_is_found_out() -> None:
    class Silent:
        """Says nothing."""

        def method(self) -> None:
            """Nor does this."""

    class Shown(Silent):
        def method(self) -> None:
            """>>> 1 + 1
            2
            """

    assert not example_of(Silent) and not example_of(Silent.method)
    assert example_of(Shown) and example_of(Shown.method)


def test_a_wrong_example_fails(capsys: pytest.CaptureFixture[str]) -> None:
    module = ModuleType("planted", ">>> 1 + 1\n3\n")
    assert doctest.testmod(module).failed == 1
    assert "Expected:\n    3" in capsys.readouterr().out
