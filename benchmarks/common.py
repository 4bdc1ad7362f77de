"""What the benchmarks share: records of a run, pictures and their PSNR, files of weights."""

from __future__ import annotations

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

RESULTS = Path("benchmarks/results")


def record(command: str, seed: int, begun: float, **found: Any) -> dict[str, Any]:
    """What was found, with all that is needed to find it again; ``begun`` is of perf_counter."""
    packages = ("torch", "pyro-ppl", "numpy", "matplotlib")
    return {
        "command": command,
        "seed": seed,
        **found,
        "seconds": round(time.perf_counter() - begun, 1),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
    }


def write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def pictures(folder: Path) -> dict[str, Tensor]:
    """Gray pictures by file name without its suffix, ``(height, width)``, from 0 to 1."""
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in {".png", ".jpg", ".jpeg"})
    if not files:
        raise FileNotFoundError(f"Expected .png or .jpg pictures in {folder}, got none.")
    return {file.stem: picture(file) for file in files}


def picture(file: Path) -> Tensor:
    """One gray picture, ``(height, width)``, from 0 to 1."""
    with Image.open(file) as opened:
        return torch.from_numpy(np.asarray(opened.convert("L"), dtype=np.float32) / 255)


def psnr(clean: Tensor, estimate: Tensor) -> dict[str, float]:
    """Peak signal-to-noise ratios in dB of pictures from 0 to 1.

    ``published``: the peak is the clean picture's own maximum and the estimate is taken as it is,
    as in the code of CRsAE and DCEA. ``standard``: the peak is 1, the estimate clipped to [0, 1].
    """

    def ratio(peak: Tensor, error: Tensor) -> float:
        return float(10 * torch.log10(peak**2 / error.double().square().mean()))

    return {
        "published": ratio(clean.max().double(), clean - estimate),
        "standard": ratio(torch.ones(()).double(), clean - estimate.clamp(0, 1)),
    }


def save_weights(file: Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """One safetensors file; the settings lie in its metadata as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(kept, file, metadata={"settings": json.dumps(settings)})


def load_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and settings of a file by `save_weights`."""
    with safetensors.safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
    if "settings" not in metadata:
        raise ValueError(f"Expected weights that a benchmark trained, got {file} without settings.")
    return safetensors.torch.load_file(file), json.loads(metadata["settings"])
