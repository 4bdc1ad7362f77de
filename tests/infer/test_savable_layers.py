"""Torch's layers in a bundle: what comes back, and sizes that a file cannot invent."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pyro_sparse.infer import load, save

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), (4,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 3, (3, 2), padding="same", padding_mode="circular"), (2, 6, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, output_padding=1, groups=2), (4, 9)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(2, 3, 4, 2, 1, bias=False), (2, 6, 5)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(4, eps=0.1, momentum=None), (4,)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(2, affine=False), (2, 6, 5)),
    "batch norm without statistics": (
        lambda: nn.BatchNorm1d(4, track_running_stats=False),
        (4,),
    ),
    "batch norm without anything": (
        lambda: nn.BatchNorm1d(4, affine=False, track_running_stats=False),
        (4,),
    ),
    "group norm": (lambda: nn.GroupNorm(2, 4, eps=0.1), (4, 5)),
    "group norm without bias": (lambda: nn.GroupNorm(2, 4, bias=False), (4,)),
    "group norm without anything": (lambda: nn.GroupNorm(2, 4, eps=0.1, affine=False), (4, 3, 2)),
    "layer norm": (lambda: nn.LayerNorm((4, 5), eps=0.1), (4, 5)),
    "layer norm without bias": (lambda: nn.LayerNorm(4, bias=False), (4,)),
    "layer norm without anything": (lambda: nn.LayerNorm(4, elementwise_affine=False), (2, 4)),
    "elu": (lambda: nn.ELU(0.3), (4,)),
    "gelu": (lambda: nn.GELU("tanh"), (4,)),
    "identity": (nn.Identity, (4,)),
    "leaky": (lambda: nn.LeakyReLU(0.3), (4,)),
    "relu": (nn.ReLU, (4,)),
    "sigmoid": (nn.Sigmoid, (4,)),
    "silu": (nn.SiLU, (4,)),
    "softplus": (lambda: nn.Softplus(2.0, 3.0), (4,)),
    "tanh": (nn.Tanh, (4,)),
    "flatten": (lambda: nn.Flatten(2), (2, 6, 5)),
    "unflatten": (lambda: nn.Unflatten(1, (2, 2)), (4,)),
    "dropout": (lambda: nn.Dropout(0.3), (4,)),
    "sequence": (lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 4)), (4,)),
    "nested": (lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Tanh()), (4,)),
}


def shake(module: nn.Module) -> None:
    with torch.no_grad():
        for value in (*module.parameters(), *module.buffers()):
            if value.is_floating_point():
                value.add_(torch.rand_like(value))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_comes_back(tmp_path: Path, layer: str, dtype: torch.dtype) -> None:
    build, shape = LAYERS[layer]
    made = build().to(dtype)
    shake(made)
    save(tmp_path / "run", layer=made)
    back = load(tmp_path / "run")["layer"]
    assert type(back) is type(made) and repr(back) == repr(made)
    state, other = made.state_dict(), back.state_dict()
    assert list(state) == list(other)
    assert all(torch.equal(state[k], other[k]) and state[k].dtype == other[k].dtype for k in state)
    value = torch.randn(5, *shape, dtype=dtype)
    for mode in (True, False):
        torch.manual_seed(0)
        expected = made.train(mode)(value)
        torch.manual_seed(0)
        assert torch.equal(back.train(mode)(value), expected)


def test_a_layer_used_twice_comes_back_shared_and_names_are_kept(tmp_path: Path) -> None:
    layer = nn.Linear(4, 4)
    network = nn.Sequential(layer, nn.ReLU(), layer)
    network.add_module("last", nn.Tanh())
    save(tmp_path / "run", network=network)
    back = load(tmp_path / "run")["network"]
    assert back[0] is back[2] and list(back._modules) == ["0", "1", "2", "last"]
    size = (tmp_path / "run" / "weights.safetensors").stat().st_size
    assert size < 4 * 20 + 1000  # stored once


def test_parts_that_are_not_registered_are_named(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Softsign())
    with pytest.raises(TypeError, match=r"network.layers\['1'\].*class Softsign"):
        save(tmp_path / "run", network=network)


def tampered(folder: Path, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a reader find another record, as a stranger with the right checksums would write it."""
    from pyro_sparse.infer import bundle

    real = bundle.read_folder

    def read(*args: Any, **kwargs: Any) -> Any:
        groups, record = real(*args, **kwargs)
        record = json.loads(json.dumps(record))
        change(record["objects"][0]["arguments"])
        return groups, record

    monkeypatch.setattr(bundle, "read_folder", read)


@pytest.mark.parametrize("groups", [0, -1, 10**9, 2.0, "2", True], ids=repr)
def test_groups_that_do_not_divide_are_refused(
    tmp_path: Path, groups: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "run", layer=nn.Conv1d(4, 6, 3))
    tampered(tmp_path, lambda arguments: arguments.update(groups=groups), monkeypatch)
    with pytest.raises(ValueError, match="torch.nn.Conv1d refuses its arguments"):
        load(tmp_path / "run")


@pytest.mark.parametrize("groups", [0, -1, 3, 2.0, "2", True], ids=repr)
def test_groups_of_a_norm_that_do_not_divide_are_refused(
    tmp_path: Path, groups: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "run", layer=nn.GroupNorm(2, 4))
    tampered(tmp_path, lambda arguments: arguments.update(num_groups=groups), monkeypatch)
    with pytest.raises(ValueError, match="torch.nn.GroupNorm refuses its arguments"):
        load(tmp_path / "run")


def test_no_number_in_a_file_makes_a_norm_within_a_datum_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for made, size in ((nn.GroupNorm(2, 4), "num_channels"), (nn.LayerNorm(4), "normalized_shape")):
        with monkeypatch.context() as patch:
            save(tmp_path / size, layer=made)
            tampered(tmp_path, lambda record, size=size: record.update({size: 10**12}), patch)
            assert load(tmp_path / size)["layer"].weight.shape == (4,)


def test_no_number_in_a_file_makes_a_norm_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "run", layer=nn.BatchNorm1d(4))
    tampered(tmp_path, lambda arguments: arguments.update(num_features=10**12), monkeypatch)
    assert load(tmp_path / "run")["layer"].num_features == 4
