"""Every example in a docstring runs.

pytest's own ``--doctest-modules`` would import models/ and guides/ twice, under two names.
"""

import doctest
import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import pytest


def modules_of(package: str) -> Iterator[str]:
    yield package
    path = importlib.import_module(package).__path__
    yield from (info.name for info in pkgutil.walk_packages(path, f"{package}."))


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


def test_a_wrong_example_fails(capsys: pytest.CaptureFixture[str]) -> None:
    module = ModuleType("planted", ">>> 1 + 1\n3\n")
    assert doctest.testmod(module).failed == 1
    assert "Expected:\n    3" in capsys.readouterr().out
