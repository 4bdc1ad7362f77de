"""Rolling checkpoints of a training, safe against ``kill -9`` at any moment."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_sparse.infer.storage import (
    TEMPORARY,
    Tensors,
    read_file,
    read_folder,
    remove,
    sync_folder,
    write_folder,
    write_pointer,
)

try:
    import fcntl
except ImportError:  # Windows: nothing tells a running writer from a killed one
    fcntl = None  # type: ignore[assignment]

# A step that is written again gets a number behind it: its folder is never replaced in place.
_NAME = re.compile(r"step-([0-9]{9,18})(?:-([0-9]{1,9}))?")


class Checkpoints:
    """A folder with the last few states of a training.

    Each checkpoint is a folder ``step-000000123`` (see ``infer.storage``), written under another
    name, synced and renamed; the file ``latest``, replaced in one move, then names it, and what is
    older than the last ``keep`` goes. A process killed at any moment leaves ``latest`` at a whole
    checkpoint: the new one or the one before. What else it leaves, ``.tmp-*``, is swept at the next
    first use, unless somebody is writing. Many may read while one process writes. A training that
    starts anew in the same folder takes it over: the old checkpoints go first.

    Args:
        folder: Where; made at the first write.
        every: Steps from one checkpoint to the next, ``>= 1``; for who does the training.
        keep: How many to keep, ``>= 1``.

    Raises:
        ValueError: If ``every`` or ``keep`` is not a whole number ``>= 1``.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoints = Checkpoints(folder, every=100)
        ...     print(checkpoints.read())
        ...     checkpoints.write(100, {"model": {"weight": torch.ones(2)}}, {"loss": 0.5})
        ...     tensors, record = checkpoints.read()
        None
        >>> tensors["model"]["weight"], record
        (tensor([1., 1.]), {'loss': 0.5})
    """

    def __init__(self, folder: str | os.PathLike[str], *, every: int, keep: int = 3) -> None:
        for name, value in {"every": every, "keep": keep}.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Expected {name} to be a whole number >= 1, got {value!r}.")
        self.folder = Path(folder)
        self.every = every
        self.keep = keep
        self._swept = False

    def __repr__(self) -> str:
        return f"Checkpoints({str(self.folder)!r}, every={self.every}, keep={self.keep})"

    def write(self, step: int, tensors: Tensors, record: dict[str, Any]) -> None:
        """Write a checkpoint, make it the latest, and remove those beyond ``keep``.

        When it returns, the checkpoint is on disk. If it raises, the latest one before still is.

        Args:
            step: Number of steps done, ``>= 0``.
            tensors: Groups of named tensors, one file each; tied tensors are stored once.
            record: Everything else: see ``infer.storage.write_folder``. At most 64 MiB of JSON, so
                that a long history is better a tensor.

        Raises:
            TypeError: If a value is of a kind that cannot be stored; names it.
            ValueError: If a tensor holds values that are not finite, or a name or size is out of
                bounds.
            OSError: If the disk is full or the folder cannot be written to.
        """
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 10**18:
            raise ValueError(f"Expected step to be a whole number >= 0, got {step!r}.")
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self.folder.parent)
        with self._locked(wait=True):
            self._sweep()
            name = f"step-{step:09d}"
            taken = [number for other, number, _ in self._found() if other == step]
            if taken:
                name = f"{name}-{max(taken) + 1}"
            write_folder(self.folder / name, tensors, {"step": step, "record": record})
            write_pointer(self.folder / "latest", name)
            self._prune(step, name)

    def read(
        self, step: int | None = None
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        """Read the latest checkpoint, every file held against its checksum.

        Args:
            step: An earlier one instead, out of ``steps()``: for when the latest is damaged.

        Returns:
            ``(tensors, record)``, or None if nothing was ever written. Tensors are on the CPU.

        Raises:
            ValueError: If the checkpoint is damaged or not one; names the file, what was expected
                and what came.
        """
        if not self._swept and self.folder.is_dir():
            with self._locked(wait=False) as alone:
                if alone:
                    self._sweep()
        name = self._name(step)
        while name is not None:
            try:
                return self._read(name)
            except (FileNotFoundError, ValueError) as error:
                following = self._name(step)
                if following == name:  # else it was removed meanwhile, to make room for newer ones
                    raise ValueError(f"{error} Checkpoints here: {self.steps()}.") from error
                name = following
        return None

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, in rising order."""
        return sorted({step for step, _, _ in self._found()})

    def _name(self, step: int | None) -> str | None:
        if step is not None:
            names = [(number, name) for other, number, name in self._found() if other == step]
            if not names:
                raise ValueError(f"Expected a step out of {self.steps()}, got {step}.")
            return max(names)[1]
        pointer = self.folder / "latest"
        if not os.path.lexists(pointer):
            return None
        text = read_file(pointer, 64).decode("utf-8", "replace").removesuffix("\n")
        if not _NAME.fullmatch(text):
            raise ValueError(f"{pointer}: expected the name of a checkpoint, got {ascii(text)}.")
        return text

    def _read(self, name: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        path = self.folder / name
        if path.is_symlink():
            raise ValueError(f"{path}: expected a folder, got a symbolic link.")
        tensors, content = read_folder(path)
        step = int(name.split("-")[1])
        if not isinstance(content, dict) or set(content) != {"step", "record"}:
            raise ValueError(f"{path / 'record.json'}: expected a step and a record, got others.")
        if type(content["step"]) is not int or content["step"] != step:
            raise ValueError(
                f"{path / 'record.json'}: expected step {step}, got {ascii(content['step'])[:40]}."
            )
        return tensors, content["record"]

    def _found(self) -> list[tuple[int, int, str]]:
        """Step, number of the attempt and name of each checkpoint in the folder."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        matches = [match for match in map(_NAME.fullmatch, names) if match]
        return [(int(match[1]), int(match[2] or 1), match[0]) for match in matches]

    def _prune(self, step: int, latest: str) -> None:
        # Those of later steps were left behind by a training that went back or started anew.
        others = [found for found in self._found() if found[2] != latest]
        by_age = sorted(others, key=lambda found: (found[0] <= step, *found))
        for _, _, name in by_age[: max(0, len(by_age) - (self.keep - 1))]:
            remove(self.folder / name)

    def _sweep(self) -> None:
        """Remove what killed writers left; called while nobody writes."""
        if self._swept:
            return
        for entry in list(os.scandir(self.folder)):
            if entry.name.startswith(TEMPORARY):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    os.unlink(entry.path)
        self._swept = True

    @contextmanager
    def _locked(self, *, wait: bool) -> Iterator[bool]:
        """Hold the folder against other writers; the system lets go when a process dies.

        Yields whether nobody else can be writing. Where there are no locks, a writer goes on: one
        process writes to a folder, by contract.
        """
        if fcntl is None:
            yield wait
            return
        try:
            handle = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError:  # a folder that may only be read
            yield wait
            return
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                held = True
            except OSError:  # somebody writes, or the file system has no locks
                held = wait
            yield held
        finally:
            os.close(handle)
