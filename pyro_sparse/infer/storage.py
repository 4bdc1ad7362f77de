"""Folders of tensors and JSON: written whole or not at all, read as if a stranger had made them.

A folder holds::

    manifest.json           schema version; size and sha256 of every other file; which names of
                            tensors are aliases (tied weights are stored once)
    record.json             anything JSON can say, tuples and non-finite floats included
    <group>.safetensors     one file for each group of tensors

Reading opens these names alone and runs nothing: there is no pickle, no import, no path taken from
a file. What else lies in the folder is ignored. Links are refused, sizes are checked before memory
is taken, and every checksum before a value is returned. Checksums find damage; they do not prove
who wrote a file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pyro_sparse.infer.strict_json import MAX_RANK, decode, dumps, encode, loads, refuse, short

Tensors = Mapping[str, Mapping[str, Tensor]]

FORMAT = "pyro_sparse.folder"
SCHEMA = 1
TEMPORARY = ".tmp-"  # what a write begins as; a killed one leaves it behind
MAX_RECORD = 2**26  # bytes of record.json
MAX_TABLE = 2**22  # bytes of manifest.json, and of the header of a file of tensors
MAX_TENSORS = 20_000
MAX_GROUPS = 64
MAX_NAME = 512
GROUP = re.compile(r"[a-z][a-z0-9_]{0,63}")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def write_folder(
    path: str | os.PathLike[str],
    tensors: Tensors,
    record: Any,
    *,
    finite: bool = True,
    max_record: int = MAX_RECORD,
) -> None:
    """Write a folder that appears whole, on disk, or not at all.

    The files are written beside ``path`` under a temporary name and synced, and the folder is then
    renamed. A killed process leaves at most a folder ``.tmp-*``, which may be deleted.

    Args:
        path: The folder to make. It must not exist, or be empty.
        tensors: Groups of named tensors, on any device, of any dtype in ``DTYPES``, contiguous or
            not. Names of one and the same memory are stored once, also across groups; views that
            overlap otherwise are stored apart. Group names are lower-case words.
        record: None, bool, int, float, str, and lists, tuples and dicts (of str keys that do not
            begin with ``$``) of these.
        finite: Refuse values that are not finite. They are refused by default in reading too.
        max_record: Largest size of the record in bytes.

    Raises:
        FileExistsError: If there is something at ``path`` already.
        TypeError: If a value is of a kind that cannot be stored; names it.
        ValueError: If a tensor is not finite, or a name or a size is out of bounds; names it.
        OSError: If the disk is full or the place cannot be written to. Nothing is left behind.

    Example:
        >>> import tempfile
        >>> weight = torch.ones(2)
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     write_folder(parent + "/run", {"model": {"a": weight, "b": weight}}, {"step": 3})
        ...     tensors, record = read_folder(parent + "/run")
        >>> tensors["model"]["a"] is tensors["model"]["b"], record
        (True, {'step': 3})
    """
    path = Path(path)
    stored, aliases = _unique(tensors, finite=finite)
    text = dumps(encode(record, "record"), "record", max_record)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    temporary.mkdir()
    try:
        files = {"record.json": _write_file(temporary / "record.json", text)}
        for group, own in stored.items():
            file = temporary / f"{group}.safetensors"
            safetensors.torch.save_file(own, file)
            shutil.copymode(temporary / "record.json", file)  # it ignores the umask
            files[file.name] = _seal(file)
        manifest = {"format": FORMAT, "schema": SCHEMA, "files": files, "aliases": aliases}
        manifest["digest"] = _digest(files, aliases)
        _write_file(temporary / "manifest.json", dumps(manifest, "the manifest", MAX_TABLE))
        sync_folder(temporary)
        _refuse_existing(path)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def read_folder(
    path: str | os.PathLike[str],
    *,
    finite: bool = True,
    max_bytes: int | None = None,
    max_record: int = MAX_RECORD,
) -> tuple[dict[str, dict[str, Tensor]], Any]:
    """Read a folder that ``write_folder`` made, or refuse it.

    Args:
        path: The folder.
        finite: Refuse tensors with values that are not finite.
        max_bytes: Largest size of all tensors together; None for no bound but the files'.
        max_record: Largest size of the record in bytes.

    Returns:
        The groups of tensors, on the CPU, where names that were tied map to the same tensor; and
        the record. The order of names is not kept.

    Raises:
        FileNotFoundError: If there is no folder at ``path``.
        ValueError: If anything in it is not as it must be: names the file, what was expected and
            what came.
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise FileNotFoundError(f"Expected a folder at {path}, got nothing there.")
    if not path.is_dir():
        refuse(path, "a folder", "something else")
    file = path / "manifest.json"
    files, aliases = _check_manifest(loads(read_file(file, MAX_TABLE), file), file)
    groups = [name.removesuffix(".safetensors") for name in files if name != "record.json"]
    total = sum(size for name, (size, _) in files.items() if name != "record.json")
    if max_bytes is not None and total > max_bytes:
        refuse(file, f"at most {max_bytes} bytes of tensors (max_bytes)", str(total))
    file = path / "record.json"
    if files[file.name][0] > max_record:
        refuse(file, f"at most {max_record} bytes", str(files[file.name][0]))
    record = decode(loads(_verified(file, *files[file.name]), file), str(file))
    tensors = {}
    for group in groups:
        file = path / f"{group}.safetensors"
        tensors[group] = _tensors(_verified(file, *files[file.name]), file, finite=finite)
    for alias in aliases:
        _resolve(alias, tensors, path / "manifest.json")
    return tensors, record


def read_file(path: Path, max_bytes: int) -> bytes:
    """Contents of a regular file.

    Raises:
        ValueError: If it is missing, a link (symbolic or hard), no regular file, or larger than
            ``max_bytes``.
    """
    flags = os.O_RDONLY
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):  # a pipe must not block
        flags |= getattr(os, name, 0)
    try:
        file = open(path, "rb", opener=lambda name, _: os.open(name, flags))
    except OSError as error:
        got = "a symbolic link" if path.is_symlink() else error.strerror or str(error)
        raise ValueError(f"{path}: expected a regular file, got: {got}.") from None
    with file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            refuse(path, "a regular file", "a device, pipe or folder")
        if status.st_nlink > 1:
            refuse(path, "a file of its own", "a hard link; copy the folder (cp -r) to read it")
        if status.st_size > max_bytes:
            refuse(path, f"at most {max_bytes} bytes", str(status.st_size))
        data = file.read(status.st_size)
    if len(data) != status.st_size:
        refuse(path, f"{status.st_size} bytes", f"{len(data)}; it changed meanwhile")
    return data


def write_pointer(path: Path, name: str) -> None:
    """Make a small file that names something, or make it name something else, in one move."""
    temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    _write_file(temporary, f"{name}\n".encode())
    os.replace(temporary, path)
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a folder; it loses its name first, so that it is never seen with a part missing."""
    temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    path.rename(temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def sync_folder(path: Path) -> None:
    """Have the names in a folder on disk."""
    if os.name == "nt":  # has no such thing
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Writing ------------------------------------------------------------------------------------------


def _unique(
    tensors: Tensors, *, finite: bool
) -> tuple[dict[str, dict[str, Tensor]], list[list[str]]]:
    """Each memory once, as safetensors takes it; and the other names ``[group, name, of, of]``."""
    if len(tensors) > MAX_GROUPS:
        raise ValueError(f"Expected at most {MAX_GROUPS} groups of tensors, got {len(tensors)}.")
    stored: dict[str, dict[str, Tensor]] = {}
    aliases: list[list[str]] = []
    seen: dict[Any, list[str]] = {}
    storages: set[int] = set()
    for group, named in tensors.items():
        if not isinstance(group, str) or not GROUP.fullmatch(group):
            raise ValueError(f"Expected a group named like {GROUP.pattern!r}, got {group!r}.")
        if len(named) > MAX_TENSORS:
            raise ValueError(f"Expected at most {MAX_TENSORS} tensors in {group}, got more.")
        stored[group] = {}
        for name, tensor in named.items():
            where = f"tensors[{group!r}][{name!r}]"
            _check_name(name, where)
            _check_kind(tensor, where)
            place = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
            key = (*place, tensor.is_conj(), tensor.is_neg()) if tensor.numel() else id(tensor)
            if key in seen:
                aliases.append([group, name, *seen[key]])
                continue
            seen[key] = [group, name]
            own = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
            storage = own.untyped_storage()
            if storage.nbytes() != own.nbytes or storage.data_ptr() in storages:
                own = own.clone()
            storages.add(own.untyped_storage().data_ptr())
            if finite:
                _check_finite(own, where)
            stored[group][name] = own
    return stored, aliases


def _check_kind(tensor: Any, where: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"Expected {where} to be a tensor, got {type(tensor).__name__}.")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPES.values():
        raise TypeError(
            f"Expected {where} to be a dense tensor of one of {', '.join(DTYPES)}, got "
            f"{tensor.layout}, {tensor.dtype} on {tensor.device}."
        )


def _check_name(name: Any, where: str) -> None:
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise ValueError(f"{where}: expected a name of 1 to {MAX_NAME} printable characters.")
    if name == "__metadata__":
        raise ValueError(f"{where}: expected another name, __metadata__ is safetensors' own.")


def _check_finite(tensor: Tensor, where: str) -> None:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    for part in tensor.flatten().split(2**20):  # the answer takes memory too
        bad = ~torch.isfinite(part.float() if part.dtype.itemsize == 1 else part)
        if bool(bad.any()):
            raise ValueError(
                f"{where}: expected finite values, got {part[bad][0].item()}. Nothing that "
                "follows from such weights means anything; finite=False lets them pass."
            )


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(
            f"Expected no folder at {path} yet, got one. Choose another name, or remove it."
        )


def _write_file(path: Path, data: bytes) -> list[Any]:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return [len(data), hashlib.sha256(data).hexdigest()]


def _seal(path: Path) -> list[Any]:
    """Size and checksum of a file of tensors that was just written, synced."""
    with open(path, "rb+") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_TABLE:
            raise ValueError(f"Expected names of tensors of {MAX_TABLE} bytes, got {length}.")
        return [os.fstat(file.fileno()).st_size, digest]


# Reading ------------------------------------------------------------------------------------------


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _check_manifest(manifest: Any, file: Path) -> tuple[dict[str, tuple[int, str]], list[Any]]:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        refuse(file, f"a manifest of format {FORMAT!r}", "something else")
    schema = manifest.get("schema")
    if type(schema) is not int or schema != SCHEMA:
        refuse(file, f"schema {SCHEMA}", f"{short(schema)}; another pyro_sparse may read it")
    if set(manifest) != {"format", "schema", "files", "aliases", "digest"}:
        refuse(file, "format, schema, files, aliases and digest", short(sorted(manifest)))
    files, aliases = manifest["files"], manifest["aliases"]
    if not isinstance(files, dict) or not isinstance(aliases, list):
        refuse(file, "a table of files and a list of aliases", "something else")
    if "record.json" not in files or len(files) > MAX_GROUPS + 1:
        refuse(file, f"record.json and at most {MAX_GROUPS} others", short(sorted(files)))
    checked = {}
    for name, entry in files.items():
        group, dot, _ = name.rpartition(".safetensors")
        if name != "record.json" and (f"{group}{dot}" != name or not GROUP.fullmatch(group)):
            refuse(file, "files named record.json or <group>.safetensors", short(name))
        if not isinstance(entry, list) or len(entry) != 2 or not _is_size(entry[0]):
            refuse(file, f"[size, sha256] for {name}", short(entry))
        checked[name] = (entry[0], entry[1])
    for alias in aliases:
        if not isinstance(alias, list) or len(alias) != 4 or {type(x) for x in alias} != {str}:
            refuse(file, "aliases [group, name, group, name]", short(alias))
    if manifest["digest"] != _digest(files, aliases):
        refuse(file, "a digest of its own contents", "another; it was changed or damaged")
    return checked, aliases


def _digest(files: Any, aliases: Any) -> str:
    text = json.dumps([files, aliases], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _verified(file: Path, size: int, digest: str) -> bytes:
    data = read_file(file, size)
    if len(data) != size:
        refuse(file, f"{size} bytes, as in the manifest", str(len(data)))
    if hashlib.sha256(data).hexdigest() != digest:
        refuse(file, "the sha256 in the manifest", "another; it was changed or damaged")
    return data


def _tensors(data: bytes, file: Path, *, finite: bool) -> dict[str, Tensor]:
    names = _check_header(data, file)
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # its Rust part has error types of its own
        raise ValueError(f"{file}: safetensors refuses it: {error}") from None
    if set(tensors) != names:
        refuse(file, "the tensors of its header", "others")
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bool and tensor.numel() and tensor.view(torch.uint8).max() > 1:
            refuse(f"{file}: {name}", "bytes 0 and 1 in a BOOL tensor", "others")
        if finite:
            _check_finite(tensor, f"{file}: {name}")
    return tensors


def _check_header(data: bytes, file: Path) -> set[str]:
    """Hold a header against the file, before memory is taken for a tensor."""
    length = int.from_bytes(data[:8], "little")
    room = len(data) - 8 - length
    if len(data) < 8 or length > MAX_TABLE or room < 0:
        refuse(file, f"a header that fits its {len(data)} bytes and {MAX_TABLE}", str(length))
    header = loads(data[8 : 8 + length], file)
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        refuse(file, f"a header with a table of at most {MAX_TENSORS} tensors", "something else")
    spans = []
    for name, entry in header.items():
        where = f"{file}: {short(name)}"
        _check_name(name, where)
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            refuse(where, "dtype, shape and data_offsets", short(entry))
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            refuse(where, f"a dtype of {', '.join(DTYPES)}", short(dtype))
        if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_is_size, shape)):
            refuse(where, f"a shape of at most {MAX_RANK} whole numbers", short(shape))
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
            refuse(where, "offsets [begin, end]", short(offsets))
        if math.prod(max(1, size) for size in shape) > 2**48:
            refuse(where, "at most 2**48 entries", short(shape))
        size = math.prod(shape) * DTYPES[dtype].itemsize
        if offsets[1] - offsets[0] != size:
            refuse(where, f"offsets {size} bytes apart, for its shape and dtype", short(offsets))
        spans.append((offsets[0], offsets[1]))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            refuse(file, f"the next tensor at byte {position}", f"one at {short(begin)}")
        position = end
    if position != room:
        refuse(file, f"tensors that fill {room} bytes", short(position))
    return set(header)


def _resolve(alias: list[str], tensors: dict[str, dict[str, Tensor]], file: Path) -> None:
    group, name, of_group, of_name = alias
    _check_name(name, str(file))
    if group not in tensors or name in tensors[group] or of_name not in tensors.get(of_group, {}):
        refuse(file, "aliases of tensors that are stored, by new names", short(alias))
    tensors[group][name] = tensors[of_group][of_name]
