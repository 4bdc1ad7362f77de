"""One choice at a time on whitened patches: draws, the kind of threshold, prior inclusion.

    PYRO_SPARSE_DATA=FOLDER python -m benchmarks.vsc_ablations [--seconds 10] [--out FOLDER]

The experiment ``linear`` of `benchmarks.vsc`, trained for a short and about equal processor time,
one seed. ``draws``: the published objective of the thresholded Laplace posterior, straight-through
gradients as released, with the mean or the best of J draws; more draws make steps longer and so
fewer. ``threshold``: a Laplace base, the exact objective, and the same prior (all three forms of it
are one law); the posterior has a fixed threshold, a Gamma threshold integrated out, or free
inclusion. ``inclusion``: a normal slab, free inclusion, the exact objective; another prior is
another model, so bounds compare models. Differences are paired over photographs.
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

from benchmarks import common, vsc
from benchmarks.vsc_report import paired

SECONDS = 10.0
GROUPS: dict[str, dict[str, str]] = {
    "draws": {
        "J = 1": "threshold-laplace-of-1",
        "J = 5, mean": "threshold-laplace-mean-of-5",
        "J = 5, best": "threshold-laplace-max-of-5",
        "J = 20, mean": "threshold-laplace-mean",
        "J = 20, best": "threshold-laplace-max",
    },
    "threshold": {
        "fixed": "exact-laplace-fixed",
        "Gamma": "exact-laplace-gamma",
        "free inclusion": "exact-laplace",
    },
    "inclusion": {
        "5 %": "exact-gaussian-5-percent",
        "10 %": "exact-gaussian",
        "20 %": "exact-gaussian-20-percent",
        "50 %": "exact-gaussian-50-percent",
    },
}
REFERENCE = {"draws": "J = 1", "threshold": "fixed", "inclusion": "10 %"}
"""What the others of a group are compared with."""
GAP = "J=100 less reference"


def names() -> list[str]:
    return [name for group in GROUPS.values() for name in group.values()]


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Rows of each group, from what `benchmarks.vsc` measured on test data."""
    found: dict[str, dict[str, Any]] = {}
    for group, methods in GROUPS.items():
        rows = {}
        of = {
            label: json.loads((folder / f"linear-{name}-0.test.json").read_text())
            for label, name in methods.items()
        }
        reference = of[REFERENCE[group]]
        for label, name in methods.items():
            read = of[label]
            gap = {} if read is reference else {GAP: paired(read, reference)["J=100"]}
            rows[label] = {
                "method": name,
                "steps": read["steps"],
                "processor_seconds": read["processor_seconds"],
                "bound, J=1": read["bound"]["J=1"],
                "bound, J=100": read["bound"]["J=100"],
                **gap,
                "error, single draw": read["squared_error_per_pixel"]["single draw"][0],
                "error, posterior mean": read["squared_error_per_pixel"]["posterior mean"][0],
                "active codes": read["active_codes"],
                "used codes": read["used_codes"],
                "jaccard": read["jaccard"],
            }
        found[group] = rows
    return found


def draw(found: dict[str, dict[str, Any]], file: Path) -> None:
    """Bounds of every row less those of the reference of its group, and active codes."""
    figure, axes = plt.subplots(
        2, len(found), figsize=(10.5, 5), layout="constrained", sharex="col", height_ratios=(1.4, 1)
    )
    for column, (group, rows) in enumerate(found.items()):
        places = range(len(rows))
        gaps = [row.get(GAP, [0.0, 0.0]) for row in rows.values()]
        upper, lower = axes[:, column]
        upper.axhline(0, color="lightgray", linewidth=0.8)
        upper.errorbar(places, [g[0] for g in gaps], [g[1] for g in gaps], fmt="o", capsize=3)
        upper.set_title(f"{group}, less that of {REFERENCE[group]}", fontsize=10)
        lower.bar(places, [row["active codes"] for row in rows.values()], width=0.5, color="C7")
        lower.set_xticks(places, [label.replace(", ", ",\n") for label in rows], fontsize=8)
        if not column:
            upper.set_ylabel("difference of bounds, 100 draws,\nnats a patch (standard error)")
            lower.set_ylabel("active codes of 256")
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("vsc_ablations"))
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each training")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    begun = time.perf_counter()
    training = {"kind": "linear", "seed": 0, "steps": None, "full": False, "validate": False}
    vsc.train(argparse.Namespace(**vars(options), **training, method=names(), part=None))
    found = rows_of(options.out)
    content = common.record(
        f"python -m benchmarks.vsc_ablations --seconds {options.seconds:g}", 0, begun, **found
    )
    common.write(common.RESULTS / "vsc_ablations.json", content)
    draw(found, common.RESULTS / "vsc_ablations.png")


if __name__ == "__main__":
    main()
