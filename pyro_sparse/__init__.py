"""Probabilistic sparse coding on Pyro: sparse codes with honest uncertainty.

The generative programs are in ``pyro_sparse.models`` and the variational ones in
``pyro_sparse.guides``; everything else is a ground floor that knows neither.
"""

import importlib
from types import ModuleType

__version__ = "0.1.0.dev0"

_PARTS = (
    "diagnostics",
    "dictionaries",
    "distributions",
    "guides",
    "infer",
    "likelihoods",
    "models",
    "ops",
    "solvers",
    "testing",
)


def __getattr__(name: str) -> ModuleType:
    """Import a part at its first use, so that ``pyro_sparse.models`` needs no import of its own."""
    if name in _PARTS:
        return importlib.import_module(f"pyro_sparse.{name}")
    raise AttributeError(f"module 'pyro_sparse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PARTS])
