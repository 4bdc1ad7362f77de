"""What the trained decoders of `benchmarks.vsc` make of codes: draws from the prior, traversals.

    python -m benchmarks.vsc_samples fashion|faces|celeba --out FOLDER [--data FOLDER]

Upper rows: means of the pictures of codes drawn from each method's own prior. Lower rows: one code
of the reference method alone, all others zero, from -3 to 3 standard deviations of the prior's
active codes; the codes whose posterior means vary most over held-out pictures, and the
difference of the two ends. No picture of the data is shown.
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

DRAWS, COLUMNS, TRAVERSED, REACH = 22, 11, 6, 3.0
HEAD = 0.45
"""Height of a title, in pictures."""


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
    """Two rows of draws for each method, then a row for each code and the difference of its ends.

    Gray levels go from the darkest to the brightest of all that is shown.
    """
    every = torch.cat([walks.flatten(0, 1), *priors.values()])
    ends = float(every.min()), float(every.max())
    steps = walks[:, -1] - walks[:, 0]
    top = float(steps.abs().max())
    wide = COLUMNS + 1
    tall = [2 + HEAD] * len(priors) + [len(codes) + HEAD]
    figure = plt.figure(figsize=(9, 9 / wide * sum(tall)))
    parts = figure.subfigures(len(tall), 1, height_ratios=tall, squeeze=False)[:, 0]
    for part, (method, pictures) in zip(parts, priors.items(), strict=False):
        axes = _grid(part, 2, f"{method}: drawn from the prior")
        for axis, flat in zip(axes[:, :COLUMNS].flat, pictures, strict=True):
            axis.imshow(shown(flat, shape), cmap="gray", vmin=ends[0], vmax=ends[1])
    title = f"{name}: one code alone, from -{REACH:g} to {REACH:g} prior deviations"
    axes = _grid(parts[-1], len(codes), title)
    axes[0, -1].set_title("last - first", fontsize=8)
    for row, walk, step, code in zip(axes, walks, steps, codes, strict=True):
        for axis, flat in zip(row, walk, strict=False):
            axis.imshow(shown(flat, shape), cmap="gray", vmin=ends[0], vmax=ends[1])
        change = shown(step, shape)
        change = change.mean(-1) if change.ndim == 3 else change
        row[-1].imshow(change, cmap="RdBu_r", vmin=-top, vmax=top)
        row[0].text(-0.08, 0.5, code, transform=row[0].transAxes, ha="right", va="center", size=8)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _grid(part: Any, rows: int, title: str) -> Any:
    """Axes without frames under a title on the left."""
    axes = part.subplots(rows, COLUMNS + 1, squeeze=False)
    part.subplots_adjust(0.04, 0.02, 0.995, rows / (rows + HEAD), 0.04, 0.04)
    part.suptitle(title, fontsize=9, x=0.04, ha="left", y=1 - 0.4 * HEAD / (rows + HEAD), va="top")
    for axis in axes.flat:
        axis.set_axis_off()
    return axes


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
