"""Trained methods of `benchmarks.vsc` as files, and the data they are trained and measured on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common, vsc_faces, vsc_images
from benchmarks.vsc_methods import METHODS
from benchmarks.vsc_settings import Setting, programs

BLOCK = 20
"""Pictures in succession whose means are compared; they are independent."""
STREAMED = 1000
"""Pictures of a data set on disk that are measured."""


def store(file: Path, model: nn.Module, guide: nn.Module, settings: dict[str, Any]) -> None:
    """Weights in float16."""
    both = nn.ModuleDict({"model": model, "guide": guide}).state_dict()
    kept = {n: t.half() if t.is_floating_point() else t for n, t in both.items()}
    common.save_weights(file, kept, settings)


def restore(file: Path) -> tuple[Setting, str, Any, Any, dict[str, Any]]:
    """Setting, method, model and guide of a file by `store`."""
    tensors, settings = common.load_weights(file)
    if settings.get("method") not in METHODS:
        raise ValueError(f"Expected weights by benchmarks.vsc, got {file}.")
    setting = Setting.of(settings["kind"])
    model, guide = programs(setting, METHODS[settings["method"]])
    both = nn.ModuleDict({"model": model, "guide": guide})
    both.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in tensors.items()})
    both.eval()
    return setting, settings["method"], model, guide, settings


def folder_of(folder: Path | None) -> Path:
    """The folder of the data sets, by default ``PYRO_SPARSE_DATA``."""
    found = folder or os.environ.get("PYRO_SPARSE_DATA")
    if not found:
        raise SystemExit("PYRO_SPARSE_DATA is not set: it names the folder of the data sets")
    return Path(found)


def data_of(
    kind: str, part: str, scale: float | None = None, folder: Path | None = None
) -> tuple[Any, float, int]:
    """Data of a part, the scale they were divided by, and how many belong together."""
    folder = folder_of(folder)
    if kind == "fashion":
        return vsc_images.garments(folder, part), 1.0, BLOCK
    if kind == "celeba":
        return vsc_faces.CelebA(folder, part, flip=part == "train"), 1.0, BLOCK
    if kind == "faces":
        images, _ = vsc_faces.faces(folder, part)
        images = vsc_faces.augmented(images) if part == "train" else images
        return images.flatten(1), 1.0, 1
    each, seed = {"train": (232, 0), "validation": (20, 1), "test": (20, 2)}[part]
    found = vsc_images.split(folder, part, each, seed)
    scale = float(found.std()) if scale is None else scale
    return (
        found[torch.randperm(len(found))] / scale if part == "train" else found / scale,
        scale,
        each,
    )


def held(y: Any, count: int | None) -> Tensor:
    """The first data of a part in memory: of a data set on disk ``STREAMED`` if not said."""
    if isinstance(y, Tensor):
        return y if count is None else y[:count]
    found: Tensor = y.first(STREAMED if count is None else count)
    return found
