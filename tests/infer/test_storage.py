"""Folders of tensors and JSON: what comes back, what is refused, and at what cost in memory."""

import copy
import hashlib
import json
import math
import os
import pickle
import resource
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyro_sparse.infer import storage
from pyro_sparse.infer.storage import read_folder, write_folder

SAMPLE = {
    "model": {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1.0, -2.0])},
    "flags": {"active": torch.tensor([True, False, True])},
}
RECORD = {"step": 3, "loss": 0.5, "name": "run"}


def round_trip(tmp_path: Path, tensors: Any, record: Any = None) -> tuple[Any, Any]:
    write_folder(tmp_path / "run", tensors, record)
    return read_folder(tmp_path / "run")


# What comes back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(storage.DTYPES.values()), ids=list(storage.DTYPES))
@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 4), (0, 5)], ids=str)
def test_tensors_of_every_dtype_and_shape_come_back(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    tensors, _ = round_trip(tmp_path, {"a": {"x": tensor}})
    back = tensors["a"]["x"]
    assert (back.dtype, back.shape) == (dtype, tensor.shape)
    assert back.flatten().tolist() == tensor.flatten().tolist()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T,
        lambda x: x[:, 1],
        lambda x: x[1:],
        lambda x: x[:1].expand(5, 4),
        lambda x: torch.view_as_complex(x.reshape(-1, 2)).conj(),
        lambda x: torch.nn.Parameter(x),
        lambda x: 2 * x.clone().requires_grad_(),
    ],
    ids=["transposed", "column", "slice", "expanded", "conjugate", "parameter", "graph"],
)
def test_views_come_back_by_value(tmp_path: Path, view: Callable[[Tensor], Tensor]) -> None:
    tensor = view(torch.randn(3, 4))
    tensors, _ = round_trip(tmp_path, {"a": {"x": tensor, "y": torch.ones(1)}})
    back = tensors["a"]["x"]
    assert torch.equal(back, tensor) and not back.requires_grad


def test_a_slice_takes_the_space_of_a_slice(tmp_path: Path) -> None:
    round_trip(tmp_path, {"a": {"x": torch.zeros(100_000)[:10]}})
    assert (tmp_path / "run" / "a.safetensors").stat().st_size < 1000


def test_tied_names_are_stored_once_and_come_back_tied_across_groups(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(1000))
    groups = {
        "model": {"a": weight, "b": weight.detach(), "other": weight.detach().clone()},
        "guide": {"c": weight},
    }
    tensors, _ = round_trip(tmp_path, groups)
    model, guide = tensors["model"], tensors["guide"]
    assert model["a"] is model["b"] is guide["c"]
    assert model["other"] is not model["a"] and torch.equal(model["other"], weight)
    sizes = [file.stat().st_size for file in (tmp_path / "run").glob("*.safetensors")]
    assert sum(sizes) < 8000 + 500


def test_views_that_overlap_otherwise_come_back_apart(tmp_path: Path) -> None:
    weight = torch.arange(6.0)
    views = {"all": weight, "head": weight[:3], "matrix": weight.view(2, 3), "again": weight[:4]}
    tensors, _ = round_trip(tmp_path, {"a": views})
    back = tensors["a"]
    assert all(torch.equal(back[name], view) for name, view in views.items())
    assert len({tensor.data_ptr() for tensor in back.values()}) == 4


def test_empty_tensors_are_not_tied(tmp_path: Path) -> None:
    tensors, _ = round_trip(tmp_path, {"a": {"x": torch.zeros(0), "y": torch.zeros(0)}, "b": {}})
    assert tensors["a"]["x"] is not tensors["a"]["y"]
    assert tensors["b"] == {}


def test_what_is_written_is_not_changed(tmp_path: Path) -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    before = weight.detach().clone()
    tensors, _ = round_trip(tmp_path, {"a": {"x": weight.T}})
    tensors["a"]["x"].zero_()
    assert torch.equal(weight, before)


keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
    lambda key: not key.startswith("$")
)
records = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**256), 2**256)
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=20,
)


@given(record=records)
def test_records_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, record: Any
) -> None:
    folder = tmp_path_factory.mktemp("record") / "run"
    write_folder(folder, {}, record)
    assert repr(read_folder(folder)[1]) == repr(record)  # types, nan and signs of zero included


def test_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    round_trip(tmp_path, SAMPLE)
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "run").iterdir()}
    assert len(modes) == 1 and modes != {0o600}


# What cannot be written ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "record", "error", "match"),
    [
        ({"a": {"x": torch.tensor([1.0, math.nan])}}, None, ValueError, r"'x'.*finite.*nan"),
        ({"a": {"x": torch.tensor(math.inf).to(torch.float8_e5m2)}}, None, ValueError, "finite"),
        ({"a": {"x": 1.0}}, None, TypeError, "'x'.*got float"),
        ({"a": {"x": torch.zeros(2, device="meta")}}, None, TypeError, "on meta"),
        ({"a": {"x": torch.eye(2).to_sparse()}}, None, TypeError, "sparse"),
        ({"a": {"x": torch.zeros(1, dtype=torch.complex128)}}, None, TypeError, "complex128"),
        ({"a": {"": torch.zeros(1)}}, None, ValueError, "name of 1 to"),
        ({"a": {"x\n": torch.zeros(1)}}, None, ValueError, "printable"),
        ({"a": {"__metadata__": torch.zeros(1)}}, None, ValueError, "another name"),
        ({"../a": {}}, None, ValueError, "group named like"),
        ({"A": {}}, None, ValueError, "group named like"),
        ({f"g{i}": {} for i in range(65)}, None, ValueError, "at most 64 groups"),
        ({}, {"a": {"b": {1}}}, TypeError, r"record\['a'\]\['b'\].*got set"),
        ({}, {"a": torch.ones(1)}, TypeError, r"record\['a'\].*got Tensor"),
        ({}, {1: 2}, TypeError, "keys of record to be str, got int"),
        ({}, {"$float": 2}, ValueError, r"without a leading \$"),
        ({}, 10**100, ValueError, r"record below 2\*\*300"),
        ({}, "\ud800", ValueError, "surrogates"),
    ],
)
def test_what_cannot_be_stored_is_named_and_leaves_nothing(
    tmp_path: Path, tensors: Any, record: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        write_folder(tmp_path / "run", tensors, record)
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_holds_itself_is_refused(tmp_path: Path) -> None:
    record: list[Any] = []
    record.append(record)
    with pytest.raises(ValueError, match="depth of at most 64"):
        write_folder(tmp_path / "run", {}, record)


def test_too_large_a_record_is_refused_at_both_ends(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="record of at most 10 bytes"):
        write_folder(tmp_path / "run", {}, "a" * 20, max_record=10)
    write_folder(tmp_path / "run", {}, "a" * 20)
    with pytest.raises(ValueError, match=r"record.json: expected at most 10 bytes, got 22"):
        read_folder(tmp_path / "run", max_record=10)


def test_too_many_names_are_refused_before_anything_stays(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most 20000 tensors"):
        write_folder(tmp_path / "run", {"a": {str(i): torch.ones(1) for i in range(20_001)}}, None)
    names = {f"{i:0510d}": torch.ones(0) for i in range(10_000)}
    with pytest.raises(ValueError, match="names of tensors"):
        write_folder(tmp_path / "run", {"a": names}, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_what_exists_is_not_overwritten(tmp_path: Path, there: str) -> None:
    path = tmp_path / "run"
    make = {
        "file": lambda: path.write_text("mine"),
        "folder": lambda: (path.mkdir(), (path / "mine").write_text("mine")),
        "link": lambda: path.symlink_to(tmp_path / "nowhere"),
    }
    make[there]()
    with pytest.raises(FileExistsError, match="Expected no folder at"):
        write_folder(path, SAMPLE, RECORD)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    write_folder(tmp_path, SAMPLE, RECORD)
    assert read_folder(tmp_path)[1] == RECORD


@pytest.mark.parametrize("fails_at", range(6))
def test_a_full_disk_raises_and_leaves_nothing(
    tmp_path: Path, fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(100))

    def fsync(handle: int) -> None:
        if next(calls) == fails_at:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    # The calls: record, two files of tensors, manifest, folder; then, after the rename, its parent.
    with pytest.raises(OSError, match="No space left"):
        write_folder(tmp_path / "run", SAMPLE, RECORD)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"] * (fails_at == 5)


def test_a_place_that_cannot_be_written_to_says_so() -> None:
    with pytest.raises(OSError, match="/proc"):
        write_folder("/proc/pyro_sparse_test/run", SAMPLE, RECORD)


# What is refused ----------------------------------------------------------------------------------


def reseal(folder: Path, **changes: Any) -> None:
    """Make the manifest agree with the files, as somebody with bad intentions would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        file = folder / name
        if file.is_file():
            data = file.read_bytes()
            manifest["files"][name] = [len(data), hashlib.sha256(data).hexdigest()]
    manifest.update(changes)
    manifest["digest"] = storage._digest(manifest["files"], manifest["aliases"])
    (folder / "manifest.json").write_text(json.dumps(manifest))


def tensor_file(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> Any:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.canary),))


EIGHT = bytes(8)
HUGE = 2**63 - 8
# Contents of model.safetensors with a checksum that agrees.
TENSOR_FILES: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"1234567",
    "no header": struct.pack("<Q", 0),
    "header longer than the file": tensor_file({}, length=100),
    "header of 2**63": tensor_file({}, length=2**63),
    "header of 2**64-1": tensor_file({}, length=2**64 - 1),
    "header of 2 GiB in a short file": tensor_file({}, length=2**31),
    "header shorter than it is": tensor_file({"x": entry()}, EIGHT, length=10),
    "header is a list": tensor_file([], b""),
    "header is a number": tensor_file(b"1"),
    "header is no JSON": tensor_file(b"{'x': 1}"),
    "header is not UTF-8": tensor_file(b'{"\xff": 1}'),
    "header is UTF-16": tensor_file(json.dumps({}).encode("utf-16")),
    "header with a deep list": tensor_file(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "header with a key twice": tensor_file(
        b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"x":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
        bytes(16),
    ),
    "entry is a list": tensor_file({"x": []}, EIGHT),
    "entry without dtype": tensor_file({"x": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT),
    "entry with more": tensor_file({"x": entry(pickle="...")}, EIGHT),
    "metadata": tensor_file({"__metadata__": {"a": "b"}, "x": entry()}, EIGHT),
    "metadata as an entry": tensor_file({"__metadata__": entry()}, EIGHT),
    "unknown dtype": tensor_file({"x": entry("F33")}, EIGHT),
    "object dtype": tensor_file({"x": entry("O")}, EIGHT),
    "dtype is a list": tensor_file({"x": entry(["F32"])}, EIGHT),
    "dtype of another width": tensor_file({"x": entry("F64")}, EIGHT),
    "half-byte dtype": tensor_file({"x": entry("F4", [16])}, EIGHT),
    "shape too large": tensor_file({"x": entry(shape=[3])}, EIGHT),
    "shape too small": tensor_file({"x": entry(shape=[1])}, EIGHT),
    "shape is a number": tensor_file({"x": entry(shape=2)}, EIGHT),
    "negative shape": tensor_file({"x": entry(shape=[-1, -2])}, EIGHT),
    "fractional shape": tensor_file({"x": entry(shape=[2.0])}, EIGHT),
    "boolean shape": tensor_file({"x": entry(shape=[True, 2])}, EIGHT),
    "shape of text": tensor_file({"x": entry(shape=["2"])}, EIGHT),
    "shape of 2**62": tensor_file({"x": entry(shape=[2**62])}, EIGHT),
    "shape that overflows to 2": tensor_file({"x": entry(shape=[2**32, 2**32, 2])}, EIGHT),
    "shape that overflows with a zero": tensor_file({"x": entry(shape=[0, 2**62, 8])}, EIGHT),
    "empty but of 2**60 rows": tensor_file({"x": entry(shape=[2**60, 0], offsets=[0, 0])}),
    "shape of a googol": tensor_file({"x": entry(shape=[10**99])}, EIGHT),
    "huge shape and offsets that agree": tensor_file({"x": entry("U8", [HUGE], [0, HUGE])}, EIGHT),
    "100 GB and offsets that agree": tensor_file({"x": entry("U8", [10**11], [0, 10**11])}, EIGHT),
    "rank 17": tensor_file({"x": entry(shape=[1] * 16 + [2])}, EIGHT),
    "rank 100000": tensor_file({"x": entry(shape=[1] * 100_000 + [2])}, EIGHT),
    "giant number": tensor_file(b'{"x":' + b"9" * 100_000 + b"}", EIGHT),
    "offsets beyond the end": tensor_file({"x": entry(offsets=[8, 16])}, EIGHT),
    "offsets reversed": tensor_file({"x": entry(offsets=[8, 0])}, EIGHT),
    "offsets negative": tensor_file({"x": entry(offsets=[-8, 0])}, EIGHT),
    "offsets of three": tensor_file({"x": entry(offsets=[0, 8, 8])}, EIGHT),
    "offsets of text": tensor_file({"x": entry(offsets="ab")}, EIGHT),
    "tensors overlap": tensor_file({"x": entry(), "y": entry(offsets=[4, 12])}, bytes(12)),
    "tensors share bytes": tensor_file({"x": entry(), "y": entry()}, EIGHT),
    "a gap between tensors": tensor_file({"x": entry(), "y": entry(offsets=[12, 20])}, bytes(20)),
    "bytes at the end": tensor_file({"x": entry()}, bytes(9)),
    "a byte missing": tensor_file({"x": entry()}, bytes(7)),
    "20001 tensors": tensor_file({str(i): entry(shape=[0], offsets=[0, 0]) for i in range(20_001)}),
    "name is empty": tensor_file({"": entry()}, EIGHT),
    "name with a line break": tensor_file({"a\nb": entry()}, EIGHT),
    "name with a lone surrogate": tensor_file({"\ud800": entry()}, EIGHT),
    "name of a kilobyte": tensor_file({"x" * 1024: entry()}, EIGHT),
    "nan": tensor_file({"x": entry()}, struct.pack("<2f", 1.0, math.nan)),
    "infinite": tensor_file({"x": entry()}, struct.pack("<2f", -math.inf, 1.0)),
    "infinite complex": tensor_file({"x": entry("C64", [1])}, struct.pack("<2f", 0, math.inf)),
    "nan in float8": tensor_file({"x": entry("F8_E4M3", [8])}, EIGHT[1:] + b"\x7f"),
    "boolean of 2": tensor_file({"x": entry("BOOL", [8])}, EIGHT[1:] + b"\x02"),
}
JSON_FILES: dict[str, bytes] = {
    "empty": b"",
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": json.dumps({}).encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "half": b'{"a": ',
    "deep lists": b"[" * 200_000 + b"]" * 200_000,
    "deep tables": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep enough to parse": b"[" * 500 + b"]" * 500,
    "key twice": b'{"a": 1, "a": 2}',
    "giant number": b"9" * 1_000_000,
    "number beyond float64": b"1e999",
    "bare NaN": b"[NaN]",
    "bare infinity": b"[-Infinity]",
    "unknown tag": b'{"$object": "os.system"}',
    "tag of the wrong kind": b'{"$float": "1"}',
    "tag with more": b'{"$tuple": [], "b": 1}',
    "lone surrogate": b'["\\ud800"]',
    "code": b"__import__('os').mkdir('canary')",
}


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    write_folder(tmp_path / "run", SAMPLE, RECORD)
    return tmp_path / "run"


def refused(folder: Path, match: str = "expected") -> None:
    """It raises a ValueError of ours that names the folder, and takes little memory."""
    tracemalloc.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with pytest.raises(ValueError, match=match) as caught:
            read_folder(folder)
        grown = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert str(folder) in message and len(message) < 1000 and message.isprintable()
    assert grown < 2**25
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # in kB


@pytest.mark.parametrize("data", TENSOR_FILES.values(), ids=TENSOR_FILES)
def test_a_hostile_file_of_tensors_is_refused(victim: Path, data: bytes) -> None:
    (victim / "model.safetensors").write_bytes(data)
    reseal(victim)
    refused(victim, r"model\.safetensors")


@pytest.mark.parametrize("data", JSON_FILES.values(), ids=JSON_FILES)
def test_a_hostile_record_is_refused(victim: Path, data: bytes) -> None:
    (victim / "record.json").write_bytes(data)
    reseal(victim)
    refused(victim, r"record\.json")


@pytest.mark.parametrize("data", JSON_FILES.values(), ids=JSON_FILES)
def test_a_hostile_manifest_is_refused(victim: Path, data: bytes) -> None:
    (victim / "manifest.json").write_bytes(data)
    refused(victim, r"manifest\.json")


def hostile_manifests() -> dict[str, dict[str, Any]]:
    sealed = [0, hashlib.sha256(b"").hexdigest()]
    return {
        "another format": {"format": "tar"},
        "a newer schema": {"schema": 2},
        "schema is true": {"schema": True},
        "schema is text": {"schema": "1"},
        "more than it should hold": {"import": "os"},
        "files is a list": {"files": []},
        "no record": {"files": {}},
        "aliases is a table": {"aliases": {}},
        "a file above": {"files": {"record.json": sealed, "../model.safetensors": sealed}},
        "a file at the root": {"files": {"record.json": sealed, "/etc/passwd": sealed}},
        "a file in a subfolder": {"files": {"record.json": sealed, "a/b.safetensors": sealed}},
        "a hidden file": {"files": {"record.json": sealed, ".safetensors": sealed}},
        "a pickle": {"files": {"record.json": sealed, "weights.pkl": sealed}},
        "a name with a null": {"files": {"record.json": sealed, "a\0.safetensors": sealed}},
        "a name with dots": {"files": {"record.json": sealed, "...safetensors": sealed}},
        "many files": {"files": {f"g{i}.safetensors": sealed for i in range(1000)}},
        "size is negative": {"files": {"record.json": [-1, ""]}},
        "size is a float": {"files": {"record.json": [1.0, ""]}},
        "size is huge": {"files": {"record.json": [2**60, ""]}},
        "no sum": {"files": {"record.json": [1]}},
        "sum is a number": {"files": {"record.json": [1, 1]}},
        "alias of nothing": {"aliases": [["model", "a", "model", "b"]]},
        "alias of an alias": {
            "aliases": [["model", "a", "model", "b"], ["model", "b", "model", "a"]]
        },
        "alias over a tensor": {"aliases": [["model", "bias", "model", "weight"]]},
        "alias in no group": {"aliases": [["other", "a", "model", "bias"]]},
        "alias of three": {"aliases": [["model", "a", "model"]]},
        "alias of numbers": {"aliases": [[1, 2, 3, 4]]},
        "alias of lists": {"aliases": [[["model"], "a", "model", "bias"]]},
        "alias by a bad name": {"aliases": [["model", "a\n", "model", "bias"]]},
        "deep aliases": {"aliases": json.loads("[" * 400 + "]" * 400)},
    }


@pytest.mark.parametrize("changes", hostile_manifests().values(), ids=hostile_manifests())
def test_a_manifest_that_lies_is_refused(victim: Path, changes: dict[str, Any]) -> None:
    manifest = json.loads((victim / "manifest.json").read_text())
    manifest.update(changes)
    manifest["digest"] = storage._digest(manifest["files"], manifest["aliases"])
    (victim / "manifest.json").write_text(json.dumps(manifest))
    refused(victim)


@pytest.mark.parametrize("name", ["manifest.json", "record.json", "model.safetensors"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_under_an_expected_name_does_not_run(
    victim: Path, name: str, protocol: int, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    (victim / name).write_bytes(pickle.dumps(Bomb(canary), protocol=protocol))
    if name != "manifest.json":
        reseal(victim)
    refused(victim, name)
    assert not canary.exists()
    with pytest.raises(FileExistsError):  # the bomb is a live one
        canary.mkdir()
        pickle.loads((victim / name).read_bytes())


def test_a_torch_file_under_an_expected_name_does_not_run(victim: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    torch.save(Bomb(canary), victim / "model.safetensors")
    reseal(victim)
    refused(victim, r"model\.safetensors")
    assert not canary.exists()


def test_other_files_in_the_folder_are_not_looked_at(victim: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for name in ("weights.pkl", "pytorch_model.bin", "__init__.py", "README.md"):
        (victim / name).write_bytes(pickle.dumps(Bomb(canary)))
    os.mkfifo(victim / "pipe")
    (victim / "link").symlink_to("/dev/zero")
    assert read_folder(victim)[1] == RECORD
    assert not canary.exists()


@pytest.mark.parametrize("name", ["manifest.json", "record.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder", "device", "missing"])
def test_a_file_that_is_not_a_file_of_its_own_is_refused(
    victim: Path, name: str, kind: str
) -> None:
    elsewhere = victim.parent / "elsewhere"
    (victim / name).rename(elsewhere)
    make: dict[str, Callable[[], object]] = {
        "link": lambda: (victim / name).symlink_to(elsewhere),
        "hard link": lambda: (victim / name).hardlink_to(elsewhere),
        "pipe": lambda: os.mkfifo(victim / name),
        "folder": lambda: (victim / name).mkdir(),
        "device": lambda: (victim / name).symlink_to("/dev/zero"),
        "missing": lambda: None,
    }
    make[kind]()
    refused(victim, name)


@pytest.mark.parametrize("name", ["manifest.json", "record.json", "model.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, -1])
def test_a_truncated_file_is_refused(victim: Path, name: str, share: float) -> None:
    data = (victim / name).read_bytes()
    (victim / name).write_bytes(data[: int(share * len(data)) if share >= 0 else -1])
    refused(victim, name)


@pytest.mark.parametrize("name", ["manifest.json", "record.json", "model.safetensors"])
def test_every_single_flipped_byte_is_refused(victim: Path, name: str) -> None:
    data = (victim / name).read_bytes()
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 0x20 if data[position] != 0x20 else 0x01
        (victim / name).write_bytes(flipped)
        with pytest.raises(ValueError, match=str(victim)):
            read_folder(victim)


def test_files_of_two_folders_do_not_mix(victim: Path) -> None:
    other = victim.parent / "other"
    tensors = copy.deepcopy(SAMPLE)
    tensors["model"]["bias"] += 1
    write_folder(other, tensors, RECORD)
    (victim / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    refused(victim, "sha256")


def test_an_absent_folder_and_a_file_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Expected a folder"):
        read_folder(tmp_path / "run")
    (tmp_path / "run").write_text("{}")
    with pytest.raises(ValueError, match="expected a folder"):
        read_folder(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"manifest\.json: expected a regular file"):
        read_folder(tmp_path / "empty")


def test_a_sparse_file_of_a_terabyte_takes_no_memory(victim: Path) -> None:
    with open(victim / "model.safetensors", "r+b") as file:
        file.truncate(2**40)
    refused(victim, r"model\.safetensors: expected at most")
    manifest = json.loads((victim / "manifest.json").read_text())
    files = {**manifest["files"], "model.safetensors": [2**40, ""]}
    reseal_to = {**manifest, "files": files, "digest": storage._digest(files, [])}
    (victim / "manifest.json").write_text(json.dumps(reseal_to))
    with pytest.raises(ValueError, match=r"at most 4294967296 bytes of tensors \(max_bytes\)"):
        read_folder(victim, max_bytes=2**32)


def test_reading_takes_no_more_than_twice_the_size_of_the_file(tmp_path: Path) -> None:
    size = 2**24
    write_folder(tmp_path / "run", {"a": {"x": torch.zeros(size, dtype=torch.uint8)}}, None)
    tracemalloc.start()  # sees the file and what safetensors makes of it
    read_folder(tmp_path / "run")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * size + 2**20


def test_values_that_are_not_finite_pass_on_request(tmp_path: Path) -> None:
    write_folder(tmp_path / "run", {"a": {"x": torch.tensor(math.inf)}}, None, finite=False)
    with pytest.raises(ValueError, match=r"a\.safetensors: x: expected finite values, got inf"):
        read_folder(tmp_path / "run")
    assert read_folder(tmp_path / "run", finite=False)[0]["a"]["x"] == math.inf
