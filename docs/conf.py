import sys
from importlib.metadata import version as installed_version
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

project = "pyro_sparse"
author = "pyro_sparse developers"
copyright = f"2026, {author}"
release = installed_version("pyro-sparse")
version = release

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "myst_nb",
]
exclude_patterns = ["_build", "_templates"]
templates_path = ["_templates"]
html_theme = "furo"

# One page a package, with the names in its __all__: what a user imports, not where it is written.
autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # fields of a named tuple are members too: describe them once
myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "off"


def setup(app):
    import results

    records = HERE.parent / "benchmarks" / "results"
    (HERE / "results.md").write_text(results.page(records, HERE / "_results"))
