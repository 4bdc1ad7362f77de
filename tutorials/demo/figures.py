"""Figures of the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import Normalize
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

from . import membrane, photograph

INK, MARK, QUIET = "#1f2933", "#c2410c", "#9aa5b1"
GRID_COLOURS = matplotlib.colormaps["gray"].with_extremes(bad="#c9d6e3")
"""Grey for atoms, and a colour that no atom has between them."""


def atom_grid(atoms: np.ndarray[Any, Any], columns: int) -> np.ndarray[Any, Any]:
    """Atoms ``(atoms, height, width)`` as one picture, each scaled to its largest magnitude."""
    count, height, width = atoms.shape
    rows = -(-count // columns)
    grid = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1), np.nan)
    for k, atom in enumerate(atoms):
        top, left = (height + 1) * (k // columns) + 1, (width + 1) * (k % columns) + 1
        grid[top : top + height, left : left + width] = atom / np.abs(atom).max()
    return grid


def put_below(axis: Any, atoms: np.ndarray[Any, Any]) -> None:
    """Atoms ``(n, height, width)`` as small pictures below the values 0, 1, ... of the x axis."""
    for i, atom in enumerate(atoms):
        limit = np.abs(atom).max()
        picture = OffsetImage(atom, zoom=3.5, cmap="gray", norm=Normalize(-limit, limit))
        axis.add_artist(
            AnnotationBbox(
                picture, (i, 0), xycoords=axis.get_xaxis_transform(), box_alignment=(0.5, 1.1),
                pad=0.1, bboxprops={"edgecolor": QUIET, "linewidth": 0.6},
            )
        )  # fmt: skip


def save_atoms(result: photograph.Result, folder: Path) -> None:
    """Learned atoms, most used first, beside the fixed ones."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.9), layout="constrained")
    for axis, atoms, title in (
        (axes[0], result.atoms_dct, "DCT (fixed)"),
        (axes[1], result.atoms_learned, "learned from the noisy picture, most used first"),
    ):
        columns = round(len(atoms) ** 0.5)
        axis.imshow(atom_grid(atoms, columns), cmap=GRID_COLOURS, vmin=-1, vmax=1)
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    figure.savefig(folder / "atoms.png", dpi=110)
    plt.close(figure)


def save_photograph(result: photograph.Result, folder: Path) -> None:
    """Noisy and denoised pictures, with a detail of each below."""
    summary = result.summary
    pictures = (
        ("noisy", result.noisy, summary["psnr_noisy"]),
        ("DCT", result.denoised_dct, summary["psnr_dct"]),
        ("learned", result.denoised_learned, summary["psnr_learned"]),
        ("clean", result.clean, None),
    )
    figure, axes = plt.subplots(2, 4, figsize=(12, 7.2), layout="constrained", height_ratios=[6, 5])
    top, left, size = 170, 150, 130
    for column, (title, picture, psnr) in enumerate(pictures):
        label = title if psnr is None else f"{title}, {psnr:.2f} dB"
        whole, detail = axes[:, column]
        whole.imshow(np.clip(picture, 0, 1), cmap="gray", vmin=0, vmax=1)
        whole.set_title(label, fontsize=11)
        box = plt.Rectangle((left, top), size, size, fill=False, edgecolor=MARK, linewidth=1.2)
        whole.add_patch(box)
        crop = picture[top : top + size, left : left + size]
        detail.imshow(np.clip(crop, 0, 1), cmap="gray", vmin=0, vmax=1)
        whole.set_axis_off()
        detail.set_axis_off()
    figure.savefig(folder / "photograph.png", dpi=110)
    plt.close(figure)


def save_membrane(result: membrane.Result, folder: Path) -> None:
    """Detected events beside the true spikes, two seconds in detail, and the learned atom."""
    step = membrane.SAMPLE_INTERVAL
    seconds = np.arange(len(result.noisy)) * step
    figure = plt.figure(figsize=(11, 6), layout="constrained")
    whole, detail, atom = figure.subplot_mosaic(
        [["whole", "whole"], ["detail", "atom"]], width_ratios=[3, 1]
    ).values()
    summary = result.summary
    for axis in (whole, detail):
        axis.plot(seconds, result.noisy, color=QUIET, linewidth=0.5, label="noisy trace")
        axis.set_xlabel("time (s)")
        axis.set_ylabel("potential (file units)")
        high = result.noisy.max()
        axis.vlines(
            result.true_spikes * step, high + 0.02, high + 0.06, color=INK, label="true spikes"
        )
        axis.vlines(
            result.event_times * step, high + 0.08, high + 0.12, color=MARK, label="detected"
        )
    detail.plot(seconds, result.clean, color=INK, linewidth=0.9, label="clean trace (not seen)")
    start = result.true_spikes[len(result.true_spikes) // 2] * step - 0.1
    detail.set_xlim(start, start + 0.6)
    detail.set_ylim(-0.95, None)
    whole.legend(loc="lower right", ncols=3, fontsize=8)
    detail.legend(loc="lower right", ncols=4, fontsize=8)
    whole.set_title(
        f"{summary['detected']} events detected, {summary['matched']} of "
        f"{summary['true_spikes']} spikes matched within 2 ms (F1 {summary['spike_f1']:.3f})",
        fontsize=11,
    )
    atom.plot(np.arange(len(result.atom)) * step * 1e3, result.atom, color=MARK)
    atom.axhline(0, color=QUIET, linewidth=0.7)
    atom.set_title("learned atom (unit norm)", fontsize=10)
    atom.set_xlabel("time (ms)")
    for axis in (whole, detail, atom):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "membrane.png", dpi=110)
    plt.close(figure)
