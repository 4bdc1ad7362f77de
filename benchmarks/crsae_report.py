"""Tables and figures of the trained CRsAE nets.

    PYRO_SPARSE_DATA=FOLDER python -m benchmarks.crsae_report {images,spikes} [--out FOLDER]

Pictures: every net once on the nine classical test pictures; how many of its used atoms look like
Gabor functions. Spikes: scores of learned and of given templates, at the threshold chosen without
the truth and at the best one; likeness of the learned template to the true one; and the time to
find spikes against generic solvers (``benchmarks.crsae_speed``).
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from benchmarks import common, crsae, crsae_speed, crsae_spikes
from benchmarks.gabor import r_squared
from pyro_sparse.diagnostics import match_atoms

TARGETS = {"tied, unit norm": 29.0, "tied, free norm": 29.3, "untied, unit norm": 30.3}
"""Published mean PSNR in dB of the nine pictures at a noise of 20 gray levels."""
USED = 1e-3
"""An atom counts as used where it is active at more than this part of its positions."""
LIKE_A_GABOR = 0.8
SPIKES_TARGETS = {"best_threshold": 21, "without_the_truth": 25, "times_slower": 900}


def label(settings: dict[str, Any]) -> str:
    tied = "tied" if settings["tied"] else "untied"
    norm = "unit" if settings["unit_norm"] else "free"
    rates = "" if settings["rates"] == "backprop" else f", rates {settings['rates']}"
    return f"{tied}, {norm} norm{rates}"


def use(net: crsae.Net, crops: Tensor) -> Tensor:
    """Part of the positions at which each atom is active, on noisy pictures held out."""
    noise = torch.randn(crops.shape, generator=torch.Generator().manual_seed(2))
    noisy = crops + crsae.SIGMA * noise
    with torch.no_grad():
        codes = net.guide.codes(noisy, shifts=[(0, 0), (2, 3)]).values()
    active = torch.stack([(z != 0).float().mean((0, 2, 3)) for z in codes])
    return active.mean(0)


def images(files: list[Path], folder: Path, seed: int) -> tuple[dict[str, Any], list[Any]]:
    """A row for each file of weights, and what the figure shows of it."""
    nine = {name: common.picture(folder / file) for name, file in crsae.NINE.items()}
    _, held_out = crsae.photographs(folder)
    rows: dict[str, Any] = {}
    shown = []
    for file in files:
        net = crsae.restore(file, crsae.SIGMA)
        settings = common.load_weights(file)[1]
        found = crsae.denoise(net, nine, crsae.SIGMA, seed)
        atoms = net.dictionary.atoms.detach()
        active = use(net, held_out)
        fits = r_squared(atoms[:, 0].double().numpy())
        used = (active > USED).numpy()
        name = f"{label(settings)}, seed {settings['seed']}"
        target = TARGETS.get(label(settings))
        rows[name] = {
            **found,
            "published_psnr_mean": target,
            "above_published": target and round(found["psnr_mean"]["published"] - target, 2),
            "used_atoms": int(used.sum()),
            "used_atoms_like_a_gabor": int((fits[used] >= LIKE_A_GABOR).sum()),
            "median_gabor_r_squared": round(float(np.median(fits[used])), 3),
            "active_codes": round(float(active.mean()), 4),
            "training": settings,
        }
        mean = found["psnr_mean"]["published"]
        shown.append((f"{name}: {mean:.2f} dB", atoms[active.argsort(descending=True), 0]))
    return rows, shown


def draw_atoms(shown: list[tuple[str, Tensor]], file: Path) -> None:
    """Atoms of every net, the most used first, each at its own contrast."""
    figure, axes = plt.subplots(
        1, len(shown), figsize=(4.6 * len(shown), 4.9), layout="constrained", squeeze=False
    )
    for axis, (title, atoms) in zip(axes[0], shown, strict=True):
        side = math.ceil(math.sqrt(len(atoms)))
        height, width = atoms.shape[1:]
        sheet = np.full((side * (height + 1) + 1, side * (width + 1) + 1), np.nan)
        for i, atom in enumerate(atoms / atoms.abs().amax((1, 2), keepdim=True)):
            top, left = 1 + i // side * (height + 1), 1 + i % side * (width + 1)
            sheet[top : top + height, left : left + width] = atom
        axis.imshow(sheet, cmap="gray", vmin=-1, vmax=1)
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def spikes(file: Path, folder: Path, sampled: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores, likeness and speed; and what the figure shows."""
    tensors, settings = crsae_spikes.restore(file)
    recording = dict(np.load(folder / crsae_spikes.RECORDING))
    truth, trace = recording["true_spikes"], recording["trace"]
    given = torch.from_numpy(recording["init_templates"]).float()[:, None]
    given = given / given.flatten(1).norm(dim=1)[:, None, None]
    start = {"atoms": given, "rate": torch.full((len(given),), settings["starting_rate"])}
    kernel, cell = given.shape[-1], settings["cell"]
    rows = crsae_spikes.rows_of(trace, kernel)
    found: dict[str, Any] = {"true_spikes": len(truth), "targets": SPIKES_TARGETS}
    curves = {}
    for name, used in (("learned templates", tensors), ("given templates", start)):
        codes = crsae_spikes.codes_of(used, rows)
        at = crsae_spikes.events(codes, rows, used["atoms"], cell)
        # The threshold of the learned templates came with their weights.
        threshold = settings["threshold"] if used is tensors else crsae_spikes.otsu(at.amplitudes)
        points = crsae_spikes.curve(at, truth)
        chosen = crsae_spikes.score(at.above(threshold), truth)
        found[name] = {
            "without_the_truth": _sum({"threshold": threshold, **chosen}),
            "best_threshold": _sum(crsae_spikes.best(points)),
            "without_the_truth_by_window": {
                w: _sum(crsae_spikes.score(at.above(threshold), truth, w)) for w in (3, 5, 10, 20)
            },
            "rates": [round(float(r), 3) for r in used["rate"]],
        }
        curves[name] = (points, chosen)
    likely = crsae_spikes.probable_events(tensors, rows, cell, settings["seed"])
    chosen = crsae_spikes.score(likely.above(0.5), truth)
    found["event probabilities"] = {
        "without_the_truth": _sum({"threshold": 0.5, **chosen}),
        "best_threshold": _sum(crsae_spikes.best(crsae_spikes.curve(likely, truth))),
        "expected_events": round(float(likely.amplitudes.sum()), 1),
        "events_above_one_half": int((likely.amplitudes >= 0.5).sum()),
    }
    curves["event probabilities"] = crsae_spikes.curve(likely, truth), chosen
    average = crsae_spikes.triggered_average(trace, truth, kernel)
    found["correlation_with_triggered_average"] = {
        name: round(float(match_atoms(atoms[cell : cell + 1], average).correlation), 4)
        for name, atoms in (("learned", tensors["atoms"]), ("given", given))
    }
    found["speed"] = [
        crsae_speed.compare(trace, tensors, tol=tol, sampled=sampled) for tol in (1e-3, 1e-5)
    ]
    found["training"] = settings
    return found, {"curves": curves, "learned": tensors["atoms"]}


def _sum(point: dict[str, Any]) -> dict[str, Any]:
    point = {**point, "threshold": round(point["threshold"], 3)} if "threshold" in point else point
    return {**point, "errors": point["misses"] + point["false_alarms"]}


def draw_spikes(shown: dict[str, Any], file: Path) -> None:
    """Misses against false alarms over thresholds, and the learned templates."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    for number, (name, (points, chosen)) in enumerate(shown["curves"].items()):
        color = f"C{number}"
        false_alarms = [p["false_alarms"] for p in points]
        left.plot(false_alarms, [p["misses"] for p in points], color=color, label=name)
        left.plot(chosen["false_alarms"], chosen["misses"], "o", color=color)
    best = SPIKES_TARGETS["best_threshold"]
    left.plot([0, best], [best, 0], ":", color="gray", label=f"{best} errors")
    left.plot([], [], "o", color="gray", label="threshold without the truth")
    left.set(xlim=(0, 50), ylim=(-0.5, 40), xlabel="false alarms", ylabel="misses")
    left.legend(frameon=False)
    for number, atom in enumerate(shown["learned"][:, 0]):
        own = " (recorded cell)" if number == crsae_spikes.CELL else ""
        right.plot(np.arange(len(atom)) / 10, atom, label=f"template {number}{own}")
    right.set(xlabel="time / ms", ylabel="unit norm", title="learned templates")
    right.legend(frameon=False, loc="lower right", fontsize=8)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["images", "spikes"])
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="more weights of pictures")
    parser.add_argument("--sampled", type=int, default=200, help="windows solved one by one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    begun = time.perf_counter()
    folder, name = crsae.data_folder(), f"crsae_{options.what}"
    command = f"python -m benchmarks.crsae_report {options.what} --seed {options.seed}"
    options.out.mkdir(parents=True, exist_ok=True)
    if options.what == "images":
        files = [crsae.WEIGHTS / f"crsae-images-{kind}.safetensors" for kind in ("tied", "untied")]
        rows, shown = images([*files, *options.also], folder, options.seed)
        draw_atoms(shown, options.out / f"{name}.png")
        found: dict[str, Any] = {"rows": rows}
    else:
        file = crsae.WEIGHTS / "crsae-spikes.safetensors"
        command += f" --sampled {options.sampled}"
        found, seen = spikes(file, folder, options.sampled)
        draw_spikes(seen, options.out / f"{name}.png")
    common.write(options.out / f"{name}.json", common.record(command, options.seed, begun, **found))


if __name__ == "__main__":
    main()
