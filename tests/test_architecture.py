"""The directions of docs/design.md, section 2, asserted on every import statement."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "pyro_sparse": ROOT / "pyro_sparse",
    "pyro_sparse.models": ROOT / "models",
    "pyro_sparse.guides": ROOT / "guides",
}
# Each part imports only parts to its left.
GROUND_FLOOR = (
    "ops",
    "dictionaries",
    "distributions",
    "likelihoods",
    "solvers",
    "infer",
    "diagnostics",
    "testing",
)
MAY_IMPORT = {
    # The package's own __init__.py.
    "": set(GROUND_FLOOR),
    **{part: set(GROUND_FLOOR[: i + 1]) for i, part in enumerate(GROUND_FLOOR)},
    "models": {*GROUND_FLOOR, "models"},
    "guides": {*GROUND_FLOOR, "guides"},
}


def library_files() -> Iterator[tuple[str, Path]]:
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            yield module_name(package, path.relative_to(folder)), path


def module_name(package: str, path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))


LIBRARY_FILES = list(library_files())


def imports(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Absolute dotted names that the import statements of a module ask for, nested ones included.

    ``from a import b`` yields ``a.b``: whether ``b`` is a module or a name in ``a`` does not matter
    to the rules, which look at the first two components.
    """
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            ancestors = package.split(".")[: package.count(".") + 2 - node.level]
            base = [*(ancestors if node.level else []), *filter(None, [node.module])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Imports in a module of the library that go against the plan, as sentences."""
    part = module.partition(".")[2].partition(".")[0]
    found = []
    for target in imports(source, module, is_package):
        top, _, rest = target.partition(".")
        target_part = rest.partition(".")[0]
        if top in ("models", "guides"):
            found.append(f"{module} imports {target}: say pyro_sparse.{target}")
        elif top == "ignite" and module != "pyro_sparse.infer.fit":
            found.append(f"{module} imports {target}: only pyro_sparse.infer.fit may")
        elif top == "pyro" and part == "ops":
            found.append(f"{module} imports {target}: ops is pure torch")
        elif top == "pyro_sparse" and target_part not in MAY_IMPORT.get(part, set()):
            found.append(f"{module} imports {target}: not to its left")
    return found


@pytest.mark.parametrize(
    ("module", "path"), LIBRARY_FILES, ids=[module for module, _ in LIBRARY_FILES]
)
def test_imports_follow_the_plan(module: str, path: Path) -> None:
    assert violations(path.read_text(), module, path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pyro_sparse.ops", "import pyro"),
        ("pyro_sparse.ops", "from pyro.nn import PyroModule"),
        ("pyro_sparse.ops", "from pyro_sparse.dictionaries import Dense"),
        ("pyro_sparse.dictionaries.dense", "import pyro_sparse"),
        ("pyro_sparse.dictionaries.dense", "from pyro_sparse import Dense"),
        ("pyro_sparse.dictionaries.dense", "from .. import solvers"),
        ("pyro_sparse.dictionaries.dense", "from ..likelihoods.gaussian import Gaussian"),
        ("pyro_sparse.likelihoods.gaussian", "def f():\n    from pyro_sparse.infer import fit"),
        ("pyro_sparse.solvers.ista", "import pyro_sparse.models"),
        ("pyro_sparse.solvers.ista", "from pyro_sparse import guides as g"),
        ("pyro_sparse.solvers.ista", "from models import SparseCoding"),
        ("pyro_sparse.solvers.ista", "import ignite"),
        ("pyro_sparse.infer.elbo", "from ignite.engine import Engine"),
        ("pyro_sparse.infer.fit", "from ..models import SparseCoding"),
        ("pyro_sparse.diagnostics.plots", "from pyro_sparse.testing import check_model"),
        ("pyro_sparse.models.sparse_coding", "from ..guides import UnrolledFISTA"),
        ("pyro_sparse.models.sparse_coding", "from pyro_sparse import guides"),
        ("pyro_sparse.guides.unrolled", "import pyro_sparse.models.sparse_coding as sc"),
        ("pyro_sparse.unplanned", "from pyro_sparse.ops import soft_threshold"),
    ],
)
def test_a_planted_violation_is_found(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pyro_sparse", "from . import models"),
        ("pyro_sparse", "from .guides import UnrolledFISTA"),
        ("pyro_sparse.dictionaries", "from ..solvers import solve"),
        ("pyro_sparse.models", "from ..guides import UnrolledFISTA"),
    ],
)
def test_a_planted_violation_in_a_package_is_found(module: str, source: str) -> None:
    assert len(violations(source, module, is_package=True)) == 1


@pytest.mark.parametrize(
    ("module", "source", "is_package"),
    [
        ("pyro_sparse", "from . import ops, infer", True),
        ("pyro_sparse.dictionaries", "from .dense import Dense", True),
        ("pyro_sparse.dictionaries.conv", "from .dense import Dense", False),
        ("pyro_sparse.dictionaries.conv", "from . import dense", False),
        ("pyro_sparse.solvers.ista", "import torch\nfrom pyro_sparse import ops", False),
        ("pyro_sparse.infer.fit", "from ignite.engine import Engine", False),
        ("pyro_sparse.models.sparse_coding", "from ..dictionaries import Dense", False),
        ("pyro_sparse.guides.unrolled", "from pyro_sparse.solvers.ista import step", False),
        ("pyro_sparse.guides.unrolled", "from .base import Encoder", False),
    ],
)
def test_a_permitted_import_is_not_reported(module: str, source: str, is_package: bool) -> None:
    assert violations(source, module, is_package) == []


@pytest.mark.parametrize("folder", ["tests", "tutorials", "benchmarks"])
def test_nothing_imports_a_plain_models_or_guides(folder: str) -> None:
    targets = {
        (path.name, target.partition(".")[0])
        for path in (ROOT / folder).rglob("*.py")
        for target in imports(path.read_text(), folder, is_package=True)
    }
    assert [pair for pair in targets if pair[1] in ("models", "guides")] == []


def test_every_package_is_listed_for_the_wheel() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    present = {module for module, path in LIBRARY_FILES if path.name == "__init__.py"}
    assert set(table["packages"]) == present
