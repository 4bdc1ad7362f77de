"""What the trained decoders of `benchmarks.vsc` make of codes: draws from the prior, traversals.

    python -m benchmarks.vsc_samples fashion|faces|celeba --out FOLDER [--data FOLDER]

Upper rows: means of the pictures of codes drawn from each method's own prior. Lower rows: one code
of the reference method alone, all others zero, from -3 to 3 standard deviations of the prior's
active codes; the codes whose posterior means vary most over held-out pictures. No picture of the
data is shown.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from torch import Tensor

from benchmarks import common
from benchmarks.vsc import REFERENCE
from benchmarks.vsc_labels import means
from benchmarks.vsc_methods import METHODS, SCALES, Method
from benchmarks.vsc_settings import SETTINGS, Setting
from benchmarks.vsc_store import data_of, held, restore

DRAWS, COLUMNS, TRAVERSED, REACH = 22, 11, 5, 3.0


def drawn(setting: Setting, method: Method, model: Any, count: int, seed: int = 0) -> Tensor:
    """Means of pictures of codes from the prior, ``(count, features)``."""
    torch.manual_seed(seed)
    codes = method.prior()["prior"].sample((1, count, setting.atoms))
    with torch.no_grad():
        return setting.decode(model, codes)[0]


def traversed(
    setting: Setting, model: Any, codes: list[int], reach: float, columns: int = COLUMNS
) -> Tensor:
    """Means of pictures of one code alone from ``-reach`` to ``reach``.

    Returns:
        Shape ``(codes, columns, features)``.
    """
    values = torch.linspace(-reach, reach, columns)
    alone = torch.zeros(len(codes), columns, setting.atoms)
    for row, code in enumerate(codes):
        alone[row, :, code] = values
    with torch.no_grad():
        return setting.decode(model, alone)


def most_varying(guide: Any, y: Tensor, count: int) -> list[int]:
    """The codes whose posterior means vary most over the data."""
    found: list[int] = means(guide, y).var(0).argsort(descending=True)[:count].tolist()
    return found


def shown(flat: Tensor, shape: tuple[int, ...]) -> Any:
    """A picture for ``imshow``: colours last."""
    picture = flat.reshape(shape)
    return (picture.movedim(0, -1) if len(shape) == 3 else picture).numpy()


def draw(
    shape: tuple[int, ...], priors: dict[str, Tensor], walks: Tensor, codes: list[int], name: str,
    file: Path,
) -> None:  # fmt: skip
    """Two rows of draws for each method, then a row for each code."""
    heights = [2.0] * len(priors) + [float(len(codes))]
    figure = plt.figure(figsize=(8.6, 0.79 * sum(heights) + 0.45 * len(heights)))
    parts = figure.subfigures(len(heights), 1, height_ratios=[h + 0.57 for h in heights])
    for part, (method, pictures) in zip(parts, priors.items(), strict=False):
        part.suptitle(f"drawn from the prior, {method}", fontsize=9)
        axes = part.subplots(2, COLUMNS)
        for axis, flat in zip(axes.flat, pictures, strict=True):
            _show(axis, flat, shape)
        part.subplots_adjust(0.07, 0.01, 0.99, 0.86, 0.04, 0.04)
    part = parts[-1]
    part.suptitle(
        f"one code alone, others zero, {name}: from -{REACH:g} to {REACH:g} standard deviations "
        "of the prior's active codes",
        fontsize=9,
    )
    axes = part.subplots(len(codes), COLUMNS, squeeze=False)
    for row, walk, code in zip(axes, walks, codes, strict=True):
        for axis, flat in zip(row, walk, strict=True):
            _show(axis, flat, shape)
        row[0].set_axis_on()
        row[0].set_ylabel(f"code {code}", fontsize=8)
        row[0].set(xticks=[], yticks=[])
    part.subplots_adjust(0.07, 0.01, 0.99, 0.93, 0.04, 0.04)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _show(axis: Any, flat: Tensor, shape: tuple[int, ...]) -> None:
    axis.imshow(shown(flat, shape), cmap="gray", vmin=0, vmax=1)
    axis.set_axis_off()


def run(options: argparse.Namespace) -> Path:
    setting = Setting.of(options.kind)
    reference = REFERENCE[options.kind]
    priors, walk = {}, None
    for name in setting.methods:
        file = options.out / f"{options.kind}-{name}-0.safetensors"
        if not file.exists():
            continue
        _, _, model, guide, _ = restore(file)
        method = METHODS[name]
        priors[name] = drawn(setting, method, model, DRAWS)
        if name == reference:
            y = held(data_of(options.kind, "validation", None, options.data)[0], 1000)
            codes = most_varying(guide, y, TRAVERSED)
            walk = traversed(setting, model, codes, REACH * SCALES[method.base])
    if walk is None:
        raise FileNotFoundError(f"Expected {options.kind}-{reference}-0.safetensors in the folder.")
    file = common.RESULTS / f"vsc_{options.kind}_samples.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    draw(setting.shape, priors, walk, codes, reference, file)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=[kind for kind in SETTINGS if kind != "linear"])
    parser.add_argument("--out", type=Path, default=Path("vsc"), help="folder of trained methods")
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(run(options))


if __name__ == "__main__":
    main()
