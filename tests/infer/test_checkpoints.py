"""Rolling checkpoints: what survives a killed process, a second reader, a full disk."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pyro_sparse.infer import checkpoints as checkpoints_module
from pyro_sparse.infer import storage
from pyro_sparse.infer.checkpoints import Checkpoints

KILLS = 200 if os.environ.get("PYRO_SPARSE_LONG") == "1" else 20


def state(step: int) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    weight = torch.full((1000,), float(step))
    tensors = {"model": {"a": weight, "b": weight}, "optimizer": {"m": torch.full((500,), step)}}
    return tensors, {"step": step, "loss": [step / 7] * 50}


def step_of(checkpoint: Any) -> int:
    """Step of a checkpoint of which every number must agree."""
    tensors, record = checkpoint
    step = record["step"]
    assert record == state(step)[1]
    for group, named in state(step)[0].items():
        assert set(tensors[group]) == set(named)
        assert all(torch.equal(tensors[group][name], tensor) for name, tensor in named.items())
    assert tensors["model"]["a"] is tensors["model"]["b"]
    return step


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name != ".lock")


# Rolling ------------------------------------------------------------------------------------------


def test_nothing_was_written_yet(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, every=1).read() is None
    assert Checkpoints(tmp_path / "none", every=1).read() is None
    assert not (tmp_path / "none").exists()
    assert Checkpoints(tmp_path / "none", every=1).steps() == []


def test_the_latest_is_read_also_by_another_object(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "a" / "b", every=10)
    for step in (10, 20):
        checkpoints.write(step, *state(step))
        assert step_of(checkpoints.read()) == step
        assert step_of(Checkpoints(tmp_path / "a" / "b", every=1).read()) == step
    assert names(tmp_path / "a" / "b") == ["latest", "step-000000010", "step-000000020"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_few_are_kept_and_can_be_read(tmp_path: Path, keep: int) -> None:
    checkpoints = Checkpoints(tmp_path, every=1, keep=keep)
    for step in range(6):
        checkpoints.write(step, *state(step))
    assert checkpoints.steps() == [0, 1, 2, 3, 4, 5][-keep:]
    assert [step_of(checkpoints.read(step)) for step in checkpoints.steps()] == checkpoints.steps()


def test_a_step_that_is_written_again_replaces_the_first_in_one_move(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, every=1, keep=2)
    for loss in range(4):
        checkpoints.write(7, {"model": {}}, {"loss": loss})
        assert checkpoints.read() == ({"model": {}}, {"loss": loss})
        assert checkpoints.read(7) == ({"model": {}}, {"loss": loss})
    assert names(tmp_path) == ["latest", "step-000000007-3", "step-000000007-4"]


def test_a_training_that_starts_anew_takes_the_folder_over(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, every=1, keep=2)
    for step in (100, 200, 1, 2):
        checkpoints.write(step, *state(step))
        assert step_of(checkpoints.read()) == step
    assert checkpoints.steps() == [1, 2]


def test_steps_of_more_than_nine_digits(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, every=1)
    for step in (123456789, 1234567890):
        checkpoints.write(step, {}, {})
    assert checkpoints.steps() == [123456789, 1234567890]
    assert names(tmp_path) == ["latest", "step-123456789", "step-1234567890"]


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "3"])
@pytest.mark.parametrize("argument", ["every", "keep"])
def test_settings_out_of_range_are_refused(tmp_path: Path, argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"Expected {argument} to be a whole number >= 1"):
        Checkpoints(tmp_path, **{"every": 1, argument: value})


@pytest.mark.parametrize("step", [-1, 1.0, True, 10**18])
def test_a_step_out_of_range_is_refused(tmp_path: Path, step: Any) -> None:
    with pytest.raises(ValueError, match="Expected step to be a whole number >= 0"):
        Checkpoints(tmp_path, every=1).write(step, {}, {})


# Order of what reaches the disk -------------------------------------------------------------------


def test_everything_is_synced_before_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path.resolve()
    checkpoints = Checkpoints(folder, every=1, keep=1)
    checkpoints.write(1, *state(1))
    log: list[str] = []

    def shown(path: Any) -> str:
        text = str(Path(path).relative_to(folder))
        return re.sub(r"\.tmp-\w+", "tmp", text)

    fsync, rename, replace, rmtree = os.fsync, os.rename, os.replace, shutil.rmtree

    def log_fsync(handle: int) -> None:
        log.append(f"sync {shown(os.readlink(f'/proc/self/fd/{handle}'))}")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", log_fsync)
    for module, name, real in [(os, "rename", rename), (os, "replace", replace)]:

        def log_move(source: Any, target: Any, *, name: str = name, real: Any = real) -> None:
            log.append(f"{name} {shown(source)} {shown(target)}")
            real(source, target)

        monkeypatch.setattr(module, name, log_move)

    def log_rmtree(path: Any, *args: Any, **kwargs: Any) -> None:
        log.append(f"remove {shown(path)}")
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", log_rmtree)
    checkpoints.write(2, *state(2))
    assert log == [
        "sync tmp/record.json",
        "sync tmp/model.safetensors",
        "sync tmp/optimizer.safetensors",
        "sync tmp/manifest.json",
        "sync tmp",
        "rename tmp step-000000002",
        "sync .",
        "sync tmp",
        "replace tmp latest",
        "sync .",
        "rename step-000000001 tmp",
        "remove tmp",
    ]


# Killed -------------------------------------------------------------------------------------------

# Forks a writer on each line it reads, from one process that has imported torch.
NURSERY = """
import os, sys, runpy
test = runpy.run_path(sys.argv[1])
import torch
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    folder, exit_at = line.split()
    pid = os.fork()
    if pid == 0:
        try:
            checkpoints = test["Checkpoints"](folder, every=1, keep=2)
            found = checkpoints.read()
            step = 0 if found is None else test["step_of"](found)
            if int(exit_at):
                events = iter(range(int(exit_at) - 1))
                moments = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
                def count(event, _):
                    if event in moments and next(events, None) is None:
                        os._exit(9)
                sys.addaudithook(count)
                checkpoints.write(step + 1, *test["state"](step + 1))
                os._exit(0)
            while True:
                step += 1
                checkpoints.write(step, *test["state"](step))
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(1)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Nursery:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, folder: Path, exit_at: int = 0) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{folder} {exit_at}\n")
        self.process.stdin.flush()
        return int(self.line())

    def exit_code(self) -> int:
        return int(self.line())

    def close(self) -> None:
        self.process.communicate()  # closes its stdin, at which it ends


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


def test_a_writer_killed_at_random_moments_leaves_a_whole_checkpoint(
    nursery: Nursery, tmp_path: Path
) -> None:
    draw = random.Random(0)
    last, halfway = 0, 0
    for _ in range(KILLS):
        pid = nursery.start(tmp_path)
        time.sleep(draw.uniform(0.0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert nursery.exit_code() == -signal.SIGKILL
        halfway += any(name.startswith(".tmp-") for name in names(tmp_path))
        checkpoints = Checkpoints(tmp_path, every=1)
        found = checkpoints.read()
        assert not any(name.startswith(".tmp-") for name in names(tmp_path))
        step = 0 if found is None else step_of(found)
        assert step >= last
        assert all(step_of(checkpoints.read(step)) == step for step in checkpoints.steps())
        last = step
    print(f"{KILLS} kills, {halfway} of them within a write; {last} checkpoints written")
    assert last > 0 and halfway > 0  # else it shows nothing


def test_a_writer_that_ends_at_any_system_call_leaves_a_whole_checkpoint(
    nursery: Nursery, tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path, every=1, keep=1)
    assert checkpoints.read() is None
    codes, steps = [], []
    for exit_at in range(1, 100):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        for step in (1, 2):
            checkpoints.write(step, *state(step))
        nursery.start(tmp_path, exit_at)
        codes.append(nursery.exit_code())
        fresh = Checkpoints(tmp_path, every=1, keep=1)
        steps.append(step_of(fresh.read()))
        fresh.write(3, *state(3))
        assert step_of(fresh.read()) == 3
        if codes[-1] == 0:
            break
    assert set(codes[:-1]) == {9} and codes[-1] == 0 and len(codes) > 10
    assert steps == sorted(steps) and set(steps) == {2, 3}


def test_what_a_killed_writer_left_is_swept_once(tmp_path: Path) -> None:
    Checkpoints(tmp_path, every=1).write(1, *state(1))
    elsewhere = tmp_path.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    (tmp_path / ".tmp-a").mkdir()
    (tmp_path / ".tmp-a" / "record.json").write_text("{")
    (tmp_path / ".tmp-b").write_text("step-0000")
    (tmp_path / ".tmp-c").symlink_to(elsewhere)
    (tmp_path / "notes").write_text("of a user")
    for use in (lambda c: c.read(), lambda c: c.write(2, *state(2))):
        checkpoints = Checkpoints(tmp_path, every=1)
        use(checkpoints)
        assert names(tmp_path)[:2] == ["latest", "notes"]
        (tmp_path / ".tmp-d").mkdir()
        use(checkpoints)
        assert (tmp_path / ".tmp-d").exists()
    assert (elsewhere / "mine").exists()


def test_a_reader_leaves_a_running_write_alone(tmp_path: Path) -> None:
    writer = Checkpoints(tmp_path, every=1)
    writer.write(1, *state(1))
    with writer._locked(wait=True):
        (tmp_path / ".tmp-running").mkdir()
        assert step_of(Checkpoints(tmp_path, every=1).read()) == 1
        assert (tmp_path / ".tmp-running").exists()
    Checkpoints(tmp_path, every=1).read()
    assert not (tmp_path / ".tmp-running").exists()


def test_readers_see_whole_checkpoints_while_one_writes(nursery: Nursery, tmp_path: Path) -> None:
    Checkpoints(tmp_path, every=1).write(1, *state(1))
    pid = nursery.start(tmp_path)
    seen = []
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        seen.append(step_of(Checkpoints(tmp_path, every=1).read()))
    os.kill(pid, signal.SIGKILL)
    nursery.exit_code()
    assert seen == sorted(seen) and len(set(seen)) > 5


def test_a_checkpoint_that_goes_while_it_is_read_gives_way_to_its_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Checkpoints(tmp_path, every=1, keep=1)
    writer.write(1, *state(1))
    steps = iter((2, 3))

    def slow_read(path: Path) -> Any:
        for step in steps:
            writer.write(step, *state(step))
            break
        return storage.read_folder(path)

    monkeypatch.setattr(checkpoints_module, "read_folder", slow_read)
    assert step_of(Checkpoints(tmp_path, every=1).read()) == 3


def test_two_writers_do_not_hurt_each_other(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def run(first: int) -> None:
        try:
            checkpoints = Checkpoints(tmp_path, every=1, keep=2)
            for step in range(first, first + 20, 2):
                checkpoints.write(step, *state(step))
                step_of(checkpoints.read())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


# Damage -------------------------------------------------------------------------------------------


def test_an_error_while_writing_leaves_the_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, every=1, keep=1)
    checkpoints.write(1, *state(1))
    with pytest.raises(ValueError, match="finite"):
        checkpoints.write(2, {"model": {"a": torch.tensor(float("nan"))}}, {})
    with pytest.raises(TypeError, match="got set"):
        checkpoints.write(2, {}, {"a": set()})

    def full(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.write(2, *state(2))
    assert step_of(checkpoints.read()) == 1
    checkpoints.write(2, *state(2))
    assert step_of(checkpoints.read()) == 2


def test_a_folder_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Checkpoints(tmp_path / "file" / "run", every=1).write(1, {}, {})


@contextmanager
def without_rights() -> Iterator[None]:
    """As a user whom file modes bind; the superuser is not."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_that_may_only_be_read_is_read_and_not_written_to() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own lie in a folder of one user
        folder = Path(name)
        Checkpoints(folder, every=1).write(1, *state(1))
        (folder / ".lock").unlink()
        (folder / ".tmp-left").mkdir()
        folder.chmod(0o555)
        with without_rights():
            assert step_of(Checkpoints(folder, every=1).read()) == 1
            with pytest.raises(PermissionError, match=str(folder)):
                Checkpoints(folder, every=1).write(2, *state(2))
        folder.chmod(0o755)
        assert names(folder) == [".tmp-left", "latest", "step-000000001"]


def test_a_damaged_latest_is_refused_and_an_earlier_one_offered(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, every=1)
    for step in (1, 2):
        checkpoints.write(step, *state(step))
    file = tmp_path / "step-000000002" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(ValueError, match=r"model\.safetensors.*sha256.*Checkpoints here: \[1, 2\]"):
        checkpoints.read()
    assert step_of(checkpoints.read(1)) == 1
    with pytest.raises(ValueError, match=r"Expected a step out of \[1, 2\], got 3"):
        checkpoints.read(3)


@pytest.mark.parametrize(
    "pointer",
    [
        b"",
        b"step-1",
        b"../step-000000001",
        b"/etc",
        b"step-000000001/../..",
        b"step-000000001\0",
        b"step-000000001\n\n",
        b"\xff",
        "step-٠٠٠٠٠٠٠٠١".encode(),
        b"step-000000001" + b" " * 100,
        b"step-000000099",
    ],
)
def test_a_pointer_to_something_else_is_refused(tmp_path: Path, pointer: bytes) -> None:
    checkpoints = Checkpoints(tmp_path, every=1)
    checkpoints.write(1, *state(1))
    (tmp_path / "latest").write_bytes(pointer)
    with pytest.raises(ValueError, match=str(tmp_path)):
        checkpoints.read()


def test_links_are_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run", every=1)
    checkpoints.write(1, *state(1))
    (tmp_path / "run" / "step-000000001").rename(tmp_path / "moved")
    (tmp_path / "run" / "step-000000001").symlink_to(tmp_path / "moved")
    with pytest.raises(ValueError, match="expected a folder, got a symbolic link"):
        checkpoints.read()
    (tmp_path / "run" / "latest").unlink()
    (tmp_path / "run" / "latest").symlink_to(tmp_path / "run" / "step-000000001" / "record.json")
    with pytest.raises(ValueError, match="latest: expected a regular file, got: a symbolic link"):
        checkpoints.read()


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, every=1)
    checkpoints.write(1, *state(1))
    (tmp_path / "step-000000001").rename(tmp_path / "step-000000005")
    (tmp_path / "latest").write_text("step-000000005\n")
    with pytest.raises(ValueError, match="expected step 5, got 1"):
        checkpoints.read()
    storage.write_folder(tmp_path / "step-000000006", {}, [1])
    with pytest.raises(ValueError, match="expected a step and a record"):
        checkpoints.read(6)
