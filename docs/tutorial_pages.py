"""The scripts in ``tutorials/`` as notebooks, which the site executes when it is built."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import jupytext
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell

ROOT = Path(__file__).parent.parent

SETUP = """\
# Hidden: the folder and the settings of a script, and figures that are shown where they are saved.
# library {library}
import os, sys
from pathlib import Path

from IPython.display import Image, display

os.chdir({root!r})
sys.path.insert(0, {tutorials!r})
os.environ.update(SMOKE={smoke!r}, FIGURES={figures!r})

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure


def _save_and_show(figure, file, *args, save=Figure.savefig, **kwargs):
    save(figure, file, *args, **kwargs)
    if isinstance(file, str | Path):
        display(Image(filename=str(file)))


Figure.savefig = _save_and_show
get_ipython().ast_node_interactivity = "none"  # a script shows what it prints, and no last value
"""

NOTE = """\
```{{note}}
This is the script `tutorials/{name}.py`, as it ran when the site was built{how}.
To run it yourself: `.venv/bin/python tutorials/{name}.py`.
```
"""
SHORT = (
    ", **at its smoke setting**: too little data and training, so that figures and numbers show "
    "that the code runs, and not what it finds"
)


def write(folder: Path, *, in_full: tuple[str, ...]) -> list[Path]:
    """Notebooks of all tutorials; those that have not changed are left alone.

    Args:
        folder: Where to.
        in_full: How the names of those begin that do not run at their smoke setting.
    """
    folder.mkdir(exist_ok=True)
    library = fingerprint()
    written = []
    for script in sorted((ROOT / "tutorials").glob("[0-9]*.py")):
        file = folder / f"{script.stem}.ipynb"
        smoke = not script.name.startswith(in_full)
        text = nbformat.writes(notebook(script, folder / "figures", library, smoke=smoke))
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        written.append(file)
    for old in set(folder.glob("*.ipynb")) - set(written):
        old.unlink()
    return written


def notebook(script: Path, figures: Path, library: str, *, smoke: bool) -> nbformat.NotebookNode:
    """A script's cells after a hidden one, and a note below the title of how it was run."""
    content = jupytext.read(script, fmt="py:percent")
    setup = SETUP.format(
        library=library,
        root=str(ROOT),
        tutorials=str(ROOT / "tutorials"),
        smoke="1" if smoke else "0",
        figures=str(figures),
    )
    title, *rest = content.cells
    heading, _, body = title.source.partition("\n")
    note = NOTE.format(name=script.stem, how=SHORT if smoke else "")
    content.cells = [
        new_markdown_cell(f"{heading}\n\n{note}\n{body}"),
        new_code_cell(setup, metadata={"tags": ["remove-cell"]}),
        *rest,
    ]
    content.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    for number, cell in enumerate(content.cells):
        cell["id"] = f"cell-{number}"  # random otherwise, and the file would change at every build
    return content


def fingerprint() -> str:
    """Of what a tutorial imports: where it changes, a page that was executed before is stale."""
    found = hashlib.sha256(str("PYRO_SPARSE_DATA" in os.environ).encode())
    for part in ("pyro_sparse", "models", "guides", "tutorials/demo"):
        for file in sorted((ROOT / part).rglob("*.py")):
            found.update(file.read_bytes())
    return found.hexdigest()[:16]
