import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import pyro
import pytest
import torch

# Derandomised, so that a run depends on the code alone; no deadline, since machines differ.
hypothesis.settings.register_profile("pyro_sparse", deadline=None, derandomize=True)
hypothesis.settings.load_profile("pyro_sparse")


def pytest_configure(config: pytest.Config) -> None:
    # Each xdist worker would otherwise start as many threads as there are cores.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Every test starts from one seed (torch, numpy, random) and an empty parameter store."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(os.environ.get("PYRO_SPARSE_DEVICE", "cpu"))


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the larger data sets; a test that asks for it skips where there is none."""
    folder = os.environ.get("PYRO_SPARSE_DATA")
    if not folder:
        pytest.skip("PYRO_SPARSE_DATA is not set: it names the folder of the larger data sets")
    if not Path(folder).is_dir():
        pytest.skip(f"PYRO_SPARSE_DATA names no folder: {folder}")
    return Path(folder)
