"""Scripts become notebooks that show what the scripts save, and fail where they fail."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """\
# %% [markdown]
# # A title
#
# A question.

# %%
import os
from pathlib import Path
from matplotlib import pyplot as plt

figure, axis = plt.subplots()
figure.savefig(Path(os.environ["FIGURES"]) / "one.png")
print(os.environ["SMOKE"])
3 + 4
"""


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("nbformat", reason="the extra `docs` is not installed")
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs"), *sys.path])
    import tutorial_pages

    return tutorial_pages


def page(pages: ModuleType, folder: Path, text: str) -> Any:
    script = folder / "09_a_script.py"
    script.write_text(text)
    return pages.notebook(script, folder, "library", smoke=True)


def test_a_page_begins_with_its_title_and_says_how_it_was_run(
    pages: ModuleType, tmp_path: Path
) -> None:
    title, setup, code = page(pages, tmp_path, SCRIPT).cells
    assert title.source.startswith("# A title\n")
    assert "smoke setting" in title.source and title.source.endswith("A question.")
    assert setup.metadata["tags"] == ["remove-cell"]
    assert "# %%" not in code.source


def test_every_tutorial_has_a_page_and_a_second_build_changes_none(
    pages: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "00_gone.ipynb").write_text("{}")
    written = pages.write(tmp_path, in_full=("01",))
    scripts = sorted((ROOT / "tutorials").glob("[0-9]*.py"))
    assert [file.stem for file in written] == [script.stem for script in scripts]
    assert sorted(tmp_path.glob("*.ipynb")) == written
    before = [file.stat().st_mtime_ns for file in written]
    assert [file.stat().st_mtime_ns for file in pages.write(tmp_path, in_full=("01",))] == before
    assert ["smoke setting" in file.read_text() for file in written[:2]] == [False, True]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("ipykernel") is None, reason="the extra `docs` is not installed"
)
@pytest.mark.filterwarnings("ignore")  # of a kernel's event loop
def test_a_figure_is_shown_where_it_is_saved_and_an_error_is_raised(
    pages: ModuleType, tmp_path: Path
) -> None:
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    done = NotebookClient(page(pages, tmp_path, SCRIPT)).execute()
    pictures = [out for out in done.cells[2].outputs if "image/png" in out.get("data", {})]
    printed = [out for out in done.cells[2].outputs if out.output_type == "stream"]
    assert len(pictures) == 1 and (tmp_path / "one.png").exists()
    assert [out.text for out in printed] == ["1\n"]  # and no last value
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        NotebookClient(page(pages, tmp_path, SCRIPT + "1 / 0\n")).execute()
