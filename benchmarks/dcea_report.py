"""One table and one picture of what ``benchmarks.dcea evaluate`` and the peers found at a peak.

    python -m benchmarks.dcea_report --peak 4 --picture FILE --found METHOD=FILE.json ... \
        --weights constrained=FILE unconstrained=FILE

Published cells are those of the networks that ship with the code of DCEA, evaluated again from
their files, one draw of noise. Pictures are known by the names of their files in Set12 and among
the other classical ones.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt

from benchmarks import common, dcea

NAMES = {"02": "house", "03": "peppers", "10": "boat", "11": "man", "12": "couple"}
PUBLISHED = {
    4.0: {
        "constrained": {"cameraman": 23.76, "bridge": 21.54, "house": 24.97, "peppers": 23.63},
        "unconstrained": {"house": 26.32},
    },
    2.0: {"constrained": {"cameraman": 22.12, "bridge": 20.49, "house": 23.10, "peppers": 21.76}},
    1.0: {"constrained": {"cameraman": 20.77, "bridge": 19.64, "house": 21.70}},
}


def table(peak: float, files: dict[str, list[Path]]) -> dict[str, Any]:
    """What each method found, with the published cells and the distance to them.

    A method may have found its pictures in several runs; the record is that of the last.
    """
    rows: dict[str, Any] = {}
    for method, parts in files.items():
        cells = {}
        for file in parts:
            found = json.loads(file.read_text())
            if found["peak"] != peak:
                raise ValueError(f"Expected results at peak {peak:g}, got {found['peak']}: {file}.")
            cells |= {NAMES.get(name, name): cell for name, cell in found.pop("psnr").items()}
        found["psnr_mean"] = {
            kind: round(sum(cell[kind] for cell in cells.values()) / len(cells), 3)
            for kind in ("published", "standard")
        }
        published = PUBLISHED.get(peak, {}).get(method, {})
        for name in cells.keys() & published.keys():
            cells[name]["shipped_net"] = published[name]
            cells[name]["ahead"] = round(cells[name]["published"] - published[name], 3)
        rows[method] = {**found, "psnr": cells}
    return rows


def draw(peak: float, picture: Path, weights: dict[str, Path], seed: int, file: Path) -> None:
    """A picture, its counts and what the nets make of them; the atoms of the first net."""
    clean = common.picture(picture)
    counts = dcea.draws(clean, peak, 1, seed)[0]
    shown = {"clean": clean, "counts": counts * clean.max() / peak}
    nets = {name: dcea.load(path)[0] for name, path in weights.items()}
    for name, net in nets.items():
        shown[name] = dcea.denoise(net, counts, float(clean.max()), peak)
    width = len(shown)
    figure, axes = plt.subplots(1, width + 1, figsize=(3 * width + 3, 3.9), layout="constrained")
    for axis, (name, image) in zip(axes, shown.items()):
        axis.imshow(image.clamp(0, 1), cmap="gray", vmin=0, vmax=1)
        told = "" if name == "clean" else f"\n{common.psnr(clean, image)['published']:.2f} dB"
        axis.set_title(name + told)
    first = next(iter(nets))
    atoms = nets[first].dictionary.atoms.detach()[:, 0]
    atoms = atoms[atoms.flatten(1).norm(dim=1).argsort(descending=True)]
    atoms = atoms / atoms.abs().amax((1, 2), keepdim=True)
    rows = torch.nn.functional.pad(atoms, (1, 1, 1, 1), value=1.0).reshape(13, 13, 13, 13)
    axes[-1].imshow(rows.permute(0, 2, 1, 3).reshape(169, 169), cmap="gray", vmin=-1, vmax=1)
    axes[-1].set_title(f"atoms, {first},\nlargest norm first")
    for axis in axes:
        axis.set_axis_off()
    figure.savefig(file, dpi=90)
    plt.close(figure)


def pairs(values: list[str]) -> dict[str, list[Path]]:
    named = (value.split("=", 1) for value in values)
    return {name: [Path(file) for file in files.split(",")] for name, files in named}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peak", type=float, required=True)
    parser.add_argument("--found", nargs="+", required=True, help="method=FILE.json[,FILE.json]")
    parser.add_argument("--weights", nargs="+", required=True, help="variant=FILE, to draw")
    parser.add_argument("--picture", type=Path, required=True, help="the one to draw")
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began, peak = time.perf_counter(), options.peak
    torch.set_num_threads(1)
    rows = table(peak, pairs(options.found))
    options.out.mkdir(parents=True, exist_ok=True)
    weights = {variant: file for variant, (file,) in pairs(options.weights).items()}
    name = f"dcea_peak{peak:g}"
    draw(peak, options.picture, weights, options.seed, options.out / f"{name}.png")
    methods = " ".join(f"{method}=FILE" for method in rows)
    command = f"python -m benchmarks.dcea_report --peak {peak:g} --found {methods} --weights ..."
    common.write(
        options.out / f"{name}.json", common.record(command, options.seed, began, methods=rows)
    )
    for method, row in rows.items():
        for name, cell in row["psnr"].items():
            print(f"{method:15s} {name:10s} {cell['published']:.2f} {cell.get('ahead', '')}")


if __name__ == "__main__":
    main()
