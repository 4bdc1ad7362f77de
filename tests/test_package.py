import subprocess
import sys


def test_parts_are_reached_without_an_import_of_their_own() -> None:
    code = "import pyro_sparse as p; print(p.models.SparseCoding.__name__, p.ops.__name__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["SparseCoding", "pyro_sparse.ops"], run.stderr


def test_an_unknown_part_is_an_attribute_error() -> None:
    code = "import pyro_sparse; pyro_sparse.nothing"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "module 'pyro_sparse' has no attribute 'nothing'" in run.stderr
