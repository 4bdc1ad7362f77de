"""Table and picture of the methods that `benchmarks.vsc` trained."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from benchmarks import common, vsc_images
from benchmarks.vsc_methods import ABLATED, METHODS

GABOR = 0.8
SHOWN = 100


def gabors(atoms: Tensor, used: list[int]) -> dict[str, Any]:
    """How many of the used atoms ``(atoms, pixels)`` look like Gabor functions."""
    side = vsc_images.SIDE
    found = [vsc_images.gabor_fit(atoms[k].reshape(side, side).double().numpy())[1] for k in used]
    ratios = np.asarray(found)
    return {
        "used_atoms": len(used),
        "share_with_r2_of_0.8": round(float((ratios >= GABOR).mean()), 4) if used else 0.0,
        "median_r2": round(float(np.median(ratios)), 4) if used else 0.0,
    }


def paired(own: dict[str, Any], other: dict[str, Any]) -> dict[str, list[float]]:
    """Bound less that of another method, nats for each patch: mean and error over pictures."""
    found = {}
    for count, values in own["by_picture"].items():
        if count in other["by_picture"]:
            gap = np.subtract(values, other["by_picture"][count])
            error = gap.std(ddof=1) / math.sqrt(len(gap))
            found[count] = [round(float(gap.mean()), 3), round(float(error), 3)]
    return found


def rows_of(folder: Path, kind: str) -> dict[str, dict[str, Any]]:
    """What was measured on test data, by method and seed."""
    found = {}
    for name in (name for name in METHODS if name not in ABLATED):
        for file in sorted(folder.glob(f"{kind}-{name}-[0-9].test.json")):
            row = json.loads(file.read_text())
            found[f"{name}, seed {row['seed']}"] = row
    if not found:
        raise FileNotFoundError(f"Expected {kind}-METHOD-SEED.test.json in {folder}: train first.")
    return found


def table(
    folder: Path,
    kind: str,
    reference: str,
    weights: Path,
    begun: float | None = None,
    label: str = "",
) -> dict[str, Any]:
    """Write results and picture, and copy the weights of the reference, seed 0.

    ``label`` ends the names of both, where trainings of another length have theirs already.
    """
    begun = time.perf_counter() if begun is None else begun
    rows = rows_of(folder, kind)
    key = f"{reference}, seed 0"
    best = max(
        (name for name, row in rows.items() if METHODS[row["method"]].published),
        key=lambda name: rows[name]["bound"]["J=100"][0],
        default=None,
    )
    for name, row in rows.items():
        if "bound" in row and name != key:
            other = rows.get(f"{reference}, seed {row['seed']}", rows[key])
            row["bound_less_reference"] = paired(row, other)
    stored = folder / f"{kind}-{reference}-0.safetensors"
    weights.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(stored, weights)
    found: dict[str, Any] = {"reference": reference, "best_published_sparse": best}
    atoms = None
    if kind == "linear":
        for name, row in rows.items():
            tensors, _ = common.load_weights(
                folder / f"{kind}-{row['method']}-{row['seed']}.safetensors"
            )
            own = tensors[next(n for n in tensors if n.startswith("model.dictionary"))].float()
            row["gabor"] = gabors(own, row["used"]) if name == key else None
            row["median_norm_of_used_atoms"] = round(
                float(own[row["used"]].norm(dim=1).median()), 2
            )
            atoms = own if name == key else atoms
    used = rows[key]["used"]
    for row in rows.values():
        for part in ("used", "by_picture", "kind", "storage"):
            row.pop(part, None)
    command = f"python -m benchmarks.vsc table {kind} --out FOLDER"
    command += f" --label {label}" if label else ""
    content = common.record(command, 0, begun, **found, rows=rows)
    common.write(common.RESULTS / f"vsc_{kind}{label}.json", content)
    draw(rows, key, atoms, used, common.RESULTS / f"vsc_{kind}{label}.png")
    for name, row in rows.items():
        print(f"{name:40s}", row.get("bound", {}).get("J=100"), row.get("bound_less_reference"))
    return content


def draw(
    rows: dict[str, dict[str, Any]], key: str, atoms: Tensor | None, used: list[int], file: Path
) -> None:
    """Bounds of all methods, and atoms of the reference."""
    bounded = {name: row for name, row in rows.items() if "bound" in row}
    size = (7, 1.4 + 0.6 * len(bounded)) if atoms is None else (11, 5.6)
    figure = plt.figure(figsize=size, layout="constrained")
    panels = figure.subfigures(
        1, 2 if atoms is not None else 1, width_ratios=(1.1, 1)[: 2 if atoms is not None else 1]
    )
    left = panels[0] if atoms is not None else panels
    axis = left.subplots()
    colours = set()
    order = sorted(bounded, key=lambda name: bounded[name]["bound"]["J=100"][0])
    for line, name in enumerate(order):
        row = bounded[name]
        method = METHODS[row["method"]]
        colour = "C0" if not method.published and method.kind == "gates" else "C7"
        colour = "C1" if method.published else colour
        colours.add(colour)
        values = [row["bound"][count][0] for count in ("J=1", "J=20", "J=100")]
        axis.plot(values, [line] * 3, color=colour, linewidth=1)
        axis.scatter(values, [line] * 3, s=(10, 22, 40), color=colour, zorder=3)
    axis.set_yticks(
        range(len(order)), [name.removesuffix(", seed 0") for name in order], fontsize=8
    )
    axis.set_xlabel("bound, nats a datum (1, 20, 100 draws)", fontsize=9)
    for colour, label in (("C0", "this library"), ("C1", "published, sparse"), ("C7", "dense")):
        if colour in colours:
            axis.scatter([], [], color=colour, label=label)
    axis.legend(fontsize=8, loc="best", frameon=False)
    if atoms is not None:
        right = panels[1]
        norms = atoms[used].norm(dim=1)
        chosen = torch.as_tensor(used)[norms.argsort(descending=True)][:SHOWN]
        right.suptitle(f"{len(chosen)} largest of {len(used)} used atoms ({key})", fontsize=9)
        axes = right.subplots(10, 10)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, k in zip(axes.flat, chosen.tolist(), strict=False):
            atom = atoms[k].reshape(vsc_images.SIDE, -1).numpy()
            top = float(np.abs(atom).max())
            axis.imshow(atom, cmap="gray", vmin=-top, vmax=top)
    figure.savefig(file, dpi=100)
    plt.close(figure)
