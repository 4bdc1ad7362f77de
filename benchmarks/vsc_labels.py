"""What single codes of trained `benchmarks.vsc` methods say of labels that training does not use.

    PYRO_SPARSE_DATA=FOLDER python -m benchmarks.vsc_labels fashion|faces --out FOLDER
    python -m benchmarks.vsc_labels celeba --data FOLDER --out FOLDER

Codes are posterior means of held-out pictures (as published the best of 50 draws). With categories
(class of a garment, person of a face) a code is measured by its correlation ratio, the part
``eta^2`` of its variance that lies between categories, and by the point-biserial correlation with
each class against the rest; with attributes by the latter alone, as published. Chance is that of
the same codes with labels permuted: the mean, and the level that the largest of all codes passes
in one of twenty permutations. With few pictures of a category chance is large: of a face there are
two pictures, one of validation and one of test. Principal components of training pictures, as many
as there are codes, stand beside the methods; they are uncorrelated, codes may all say the same. One
seed; codes that do not vary count as zero.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

from benchmarks import common, vsc_faces, vsc_images
from benchmarks.vsc_settings import SETTINGS, Setting
from benchmarks.vsc_store import folder_of, restore

PERMUTATIONS = 200
LEVEL = 0.95
COUNT = 2000
GARMENTS = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip


def correlation_ratios(codes: Tensor, labels: Tensor) -> Tensor:
    r"""Part of the variance of each code that lies between categories, :math:`\eta^2`.

    Args:
        codes: Shape ``(n, atoms)``.
        labels: Numbers of categories from 0, shape ``(n,)``.

    Returns:
        Shape ``(atoms,)``, from 0 to 1; 0 for a code that does not vary.
    """
    member = nn.functional.one_hot(labels).to(codes)  # (n, categories)
    centred = codes - codes.mean(0)
    sizes = member.sum(0).clamp(min=1)  # of an empty category the sum is zero
    between = ((member.T @ centred).square() / sizes[:, None]).sum(0)
    return _ratio(between, centred.square().sum(0))


def point_biserial(codes: Tensor, attributes: Tensor) -> Tensor:
    """Correlation of each code with each attribute, a number against a yes or no.

    Args:
        codes: Shape ``(n, atoms)``.
        attributes: True or false, shape ``(n, attributes)``.

    Returns:
        Shape ``(atoms, attributes)``; 0 where a code or an attribute does not vary.
    """
    held = attributes.to(codes)
    a, b = codes - codes.mean(0), held - held.mean(0)
    return _ratio(a.T @ b, a.square().sum(0).sqrt()[:, None] * b.square().sum(0).sqrt())


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.where(whole > 0, 1.0), 0.0)


def chance(
    statistic: Callable[[Tensor, Tensor], Tensor], codes: Tensor, labels: Tensor, seed: int = 0
) -> Tensor:
    """Absolute statistic with the labels permuted, ``(PERMUTATIONS, ...)``."""
    generator = torch.Generator().manual_seed(seed)
    orders = (torch.randperm(len(labels), generator=generator) for _ in range(PERMUTATIONS))
    return torch.stack([statistic(codes, labels[order]).abs() for order in orders])


def of_categories(codes: Tensor, labels: Tensor) -> dict[str, Any]:
    """How many codes differ between categories, and by how much, beside chance."""
    own = correlation_ratios(codes, labels)
    permuted = chance(correlation_ratios, codes, labels)
    level = permuted.amax(1).quantile(LEVEL)
    varying = codes.var(0) > 0
    return {
        "categories": int(labels.max()) + 1,
        "mean_eta2": round(float(own[varying].mean()), 4),
        "mean_eta2_of_chance": round(float(permuted[:, varying].mean()), 4),
        "largest_eta2": round(float(own.max()), 4),
        "largest_eta2_of_chance": round(float(level), 4),
        "codes_above_chance": int((own > level).sum()),
        "codes": codes.shape[1],
    }


def of_attributes(codes: Tensor, attributes: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    """Of each attribute the largest correlation with a code, and the largest by chance."""
    own = point_biserial(codes, attributes).abs().amax(0)
    level = chance(point_biserial, codes, attributes).amax(1).quantile(LEVEL, dim=0)
    pairs = zip(own.tolist(), level.tolist(), strict=True)
    return {name: [round(r, 3), round(c, 3)] for name, (r, c) in zip(names, pairs, strict=True)}


class Labelled(NamedTuple):
    """Training pictures, held-out ones with their labels, names of classes or attributes if any."""

    train: Tensor
    y: Tensor
    labels: Tensor
    names: tuple[str, ...]


def labelled(kind: str, count: int, folder: Path) -> Labelled:
    """At most ``count`` pictures of a part."""
    if kind == "fashion":
        train, y = (vsc_images.garments(folder, part)[:count] for part in ("train", "test"))
        return Labelled(train, y, vsc_images.labels_of_garments(folder, "test")[:count], GARMENTS)
    if kind == "faces":
        train = vsc_faces.faces(folder, "train")[0].flatten(1)
        parts = [vsc_faces.faces(folder, part) for part in ("validation", "test")]
        images, labels = (torch.cat(both) for both in zip(*parts, strict=True))
        return Labelled(train, images.flatten(1), labels, ())
    held = vsc_faces.CelebA(folder, "test")
    train = vsc_faces.CelebA(folder, "train").first(count)
    return Labelled(train, held.first(count), held.attributes[:count], tuple(held.attribute_names))


def means(guide: Any, y: Tensor) -> Tensor:
    """Posterior means of the codes, ``(n, atoms)``."""
    with torch.no_grad():
        return torch.cat([guide.posterior(chunk).mean for chunk in y.split(200)])


def components(train: Tensor, y: Tensor, count: int) -> Tensor:
    """The first principal components of training pictures, of other pictures ``(n, count)``."""
    mean = train.double().mean(0)
    axes = torch.linalg.svd(train.double() - mean, full_matrices=False).Vh[:count]
    return (y.double() - mean) @ axes.T


def study(files: list[Path], data: Labelled) -> tuple[dict[str, Any], Any]:
    """The record by method, and what the picture shows; its map is of the last method."""
    found: dict[str, Tensor] = {}
    for file in files:
        setting, name, _, guide, settings = restore(file)
        found[f"{name}, seed {settings['seed']}"] = means(guide, data.y).double()
    last = list(found)[-1]
    found["principal components"] = components(data.train, data.y, setting.atoms)
    categories = data.labels.dim() == 1
    each = nn.functional.one_hot(data.labels).bool() if categories else data.labels
    rows: dict[str, dict[str, Any]] = {}
    for key, codes in found.items():
        rows[key] = of_categories(codes, data.labels) if categories else {}
        pairs = of_attributes(codes, each, data.names) if data.names else {}
        rows[key] |= {f"largest r, and by chance: {name}": pair for name, pair in pairs.items()}
    curves = {
        key: correlation_ratios(codes, data.labels)
        if categories
        else point_biserial(codes, each).abs().amax(1)
        for key, codes in found.items()
    }
    heat = (last, point_biserial(found[last], each), data.names) if data.names else None
    return {"rows": rows}, (curves, rows if categories else {}, heat)


def draw(picture: Any, file: Path) -> None:
    """Codes in order of what they say, against chance; correlations of one method's codes."""
    curves, rows, heat = picture
    figure, axes = plt.subplots(
        1, 2 if heat else 1, figsize=(11 if heat else 6.4, 4.4), layout="constrained", squeeze=False
    )
    axis = axes[0, 0]
    for place, (name, values) in enumerate(curves.items()):
        order = values.sort(descending=True).values.numpy()
        label = name.removesuffix(", seed 0")
        colour = f"C{place}" if place < len(curves) - 1 else "C7"
        axis.plot(range(1, len(order) + 1), order, color=colour, label=label, marker=".")
        if name in rows:
            level = rows[name]["largest_eta2_of_chance"]
            axis.axhline(level, color=colour, linewidth=0.8, linestyle="--")
    if rows:
        axis.plot([], [], "--", color="gray", linewidth=0.8, label="largest by chance, 95 %")
    axis.set_xlabel("codes, in order")
    axis.set_ylabel("part of variance between categories" if rows else "largest |correlation|")
    axis.set_ylim(0, None)
    axis.legend(fontsize=8, frameon=False)
    if heat:
        name, values, names = heat
        axis = axes[0, 1]
        order = values.abs().argmax(1).mul(2).sub(values.abs().amax(1)).argsort()
        kept = order[values[order].abs().amax(1) > 0]
        top = math.ceil(10 * float(values.abs().max())) / 10
        shown = axis.imshow(
            values[kept].T, cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto",
            interpolation="nearest",
        )  # fmt: skip
        axis.set_yticks(range(len(names)), names, fontsize=8 if len(names) < 20 else 5)
        axis.set_xlabel(f"codes of {name.removesuffix(', seed 0')}, by what they go with most")
        figure.colorbar(shown, ax=axis, label="correlation")
    figure.savefig(file, dpi=100)
    plt.close(figure)


def run(options: argparse.Namespace) -> dict[str, Any]:
    begun = time.perf_counter()
    methods = Setting.of(options.kind).methods
    files = [options.out / f"{options.kind}-{name}-0.safetensors" for name in methods]
    files = [file for file in files if file.exists()]
    if not files:
        raise FileNotFoundError(f"Expected {options.kind}-METHOD-0.safetensors in {options.out}.")
    data = labelled(options.kind, options.count, folder_of(options.data))
    found, picture = study(files, data)
    command = f"python -m benchmarks.vsc_labels {options.kind} --out FOLDER"
    content = common.record(command, 0, begun, pictures=len(data.y), **found)
    common.write(common.RESULTS / f"vsc_{options.kind}_labels.json", content)
    draw(picture, common.RESULTS / f"vsc_{options.kind}_labels.png")
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=[kind for kind in SETTINGS if kind != "linear"])
    parser.add_argument("--out", type=Path, default=Path("vsc"), help="folder of trained methods")
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--count", type=int, default=COUNT, help="pictures at most")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, row in run(options)["rows"].items():
        print(name, row)


if __name__ == "__main__":
    main()
