import os
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
html_title = "pyro_sparse"
html_static_path = ["_static"]
html_css_files = ["site.css"]

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

# Tutorials are executed here: those that begin with one of these numbers in full, which takes two
# to three minutes of one core, the others at their smoke setting, as their pages say. SMOKE=1 runs
# all of them so, SMOKE=0 all in full. What was executed is kept until a script or the library
# changes.
IN_FULL = {"1": (), "0": ("",)}.get(os.environ.get("SMOKE", ""), ("01", "02", "04"))
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / ".jupyter_cache")
nb_execution_raise_on_error = True
nb_execution_timeout = 1800  # seconds, of one cell
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars


def setup(app):
    import results
    import tutorial_pages

    tutorial_pages.write(HERE / "_tutorials", in_full=IN_FULL)
    records = HERE.parent / "benchmarks" / "results"
    (HERE / "results.md").write_text(results.page(records, HERE / "_results"))
