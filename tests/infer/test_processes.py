"""Several processes train as one would, and stop together."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_sparse.infer import Callback
from pyro_sparse.infer.checkpoints import Checkpoints
from tests.trained_by_several import BROKEN, EQUAL, SEEDED, train
from tests.training import draw, same

SIZE = 2
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], Path]:
    """What each of the processes found; they meet in a file, so no port is taken."""
    folder = tmp_path_factory.mktemp("several")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = []
    for rank in range(SIZE):
        with open(folder / f"output-{rank}", "wb") as output:
            command = ["-m", "tests.trained_by_several", str(rank), str(SIZE), str(folder)]
            processes.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    cwd=ROOT,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = "\n".join((folder / f"output-{rank}").read_text()[-3000:] for rank in range(SIZE))
    assert codes == [0] * SIZE, said
    return [torch.load(folder / f"results-{r}", weights_only=True) for r in range(SIZE)], folder


@pytest.mark.parametrize("name", EQUAL)
def test_losses_and_weights_are_those_of_one_process(several, name: str) -> None:
    losses, weights, _ = EQUAL[name]()
    tolerance = 1e-5 if weights[0].dtype == torch.float32 else 1e-10
    for results in several[0]:
        found, parameters, _ = results[f"equal {name}"]
        np.testing.assert_allclose(found, losses, rtol=tolerance)
        for one, other in zip(parameters, weights, strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert same(several[0][0][f"equal {name}"][1], several[0][1][f"equal {name}"][1])


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_in_one_process_is_answered_in_all(several, name: str) -> None:
    first, second = (results[f"broken {name}"] for results in several[0])
    assert same(first[1], second[1])
    assert repr(first[0]) == repr(second[0])
    expected = {
        "stop at a loss": "FloatingPointError: Expected finite numbers: objective not finite",
        "stop at a gradient": "FloatingPointError: Expected finite numbers: gradient not finite",
        "loss": "objective not finite",
        "gradient": "gradient not finite (model.scale_unconstrained) at step 4, epoch 2, batch 0",
        "second update": "gradient not finite (model.scale_unconstrained) at step 4",
        "data": "ValueError: Expected finite data, got",
    }[name]
    assert first[2].startswith(expected)
    assert second[2].startswith(expected)
    assert all(value.isfinite().all() for value in first[1])


def test_the_site_is_named_where_it_broke(several) -> None:
    assert "(obs) at step 4, epoch 2, batch 0" in several[0][1]["broken loss"][2]


@pytest.mark.parametrize("name", ["from 2", "from 4"])
def test_draws_go_on_in_each_process_as_if_nothing_had_been(several, name: str) -> None:
    for results in several[0]:
        whole, resumed = results["seeded whole"], results[f"seeded {name}"]
        assert whole[0] == resumed[0]
        assert same(whole[1], resumed[1])


@pytest.mark.parametrize("name", SEEDED)
def test_all_processes_have_the_same_weights_though_their_draws_differ(several, name: str) -> None:
    first, second = (results[f"seeded {name}"] for results in several[0])
    assert first[0] == second[0]
    assert same(first[1], second[1])


def test_a_checkpoint_by_two_resumes_in_one(several) -> None:
    folder = several[1] / "one"
    assert Checkpoints(folder, every=1).steps() == [2, 3, 4]
    losses, weights, _ = train(draw(20), batch_size=7)
    found, parameters, _ = train(
        draw(20),
        batch_size=7,
        checkpoints=Checkpoints(folder, every=1),
        arrange=lambda model, guide: [Callback()],
    )
    np.testing.assert_allclose(found, losses, rtol=1e-10)
    for one, other in zip(parameters, weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_only_the_first_process_writes(several) -> None:
    """A second writer would leave its copies under other names: step-000000002-2."""
    names = several[0][0]["files"]
    again = [name for name in names if name.count("-") > 1]
    assert names
    # The end of a phase is written once more where it was due as well.
    assert all(name.endswith("-000000009-2") or "000000009" in name for name in again)
