import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "tutorials").glob("[0-9]*.py"))


def test_there_are_tutorials() -> None:
    assert len(SCRIPTS) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_tutorial_runs_without_a_warning(script: Path, tmp_path: Path) -> None:
    # One thread: two processes of two threads each on two cores wait for each other.
    environment = {
        **os.environ,
        "SMOKE": "1",
        "FIGURES": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stderr.replace("ArviZ is undergoing", "")
    assert len(list(tmp_path.glob("*.png"))) >= 2
