"""What the units of a trained DrSAE do: measures and figures, on validation digits.

Run by ``python -m benchmarks.drsae analyse``. Measures are those of Rolfe & LeCun (2013), secs. 4
and 5: a unit is a part below an angle of 0.5 between encoder and decoder, categorical above 0.7.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from benchmarks.drsae_net import DrSAE

PART, CATEGORICAL = 0.5, 0.7
KEPT = (1, 2, 3, 5, 8, 12, 20, 40)
"""Numbers of units of which a partial reconstruction is made."""


class Units:
    """A net's units, and what they do on given digits; computed once.

    Attributes:
        path: Codes after every layer, shape ``(layers, n, units)``.
        angle: Of encoder and decoder, shape ``(units,)``.
        start: Layer from 1 at which a unit is first active, shape ``(n, units)``; 0 for never.
    """

    @torch.no_grad()
    def __init__(self, net: DrSAE, x: Tensor, label: Tensor) -> None:
        self.net, self.x, self.label = net, x, label
        self.encoder, self.decoder = net.encoder.detach(), net.decoder.detach()
        self.weights = net.model.class_weights.detach()
        self.inner = net.recurrence.detach() - torch.eye(net.units)
        self.path = layers(net, x)
        self.codes = self.path[-1]
        self.active = self.codes > 0
        self.angle = net.angles()
        self.part, self.categorical = self.angle < PART, self.angle > CATEGORICAL
        on = self.path > 0
        self.start = torch.where(on.any(0), on.int().argmax(0) + 1, 0)
        self.means = torch.stack([x[label == k].mean(0) for k in range(10)])

    @property
    def prefers(self) -> Tensor:
        """Class that each unit speaks for most, shape ``(units,)``."""
        return self.weights.argmax(0)


@torch.no_grad()
def layers(net: DrSAE, x: Tensor) -> Tensor:
    """Codes after every layer, ``(layers, n, units)``; the last are those of the guide."""
    drive, z = x @ net.encoder.T - net.bias, torch.zeros(len(x), net.units)
    path = []
    for _ in range(net.layers):
        z = (drive + z @ net.recurrence.T).relu()
        path.append(z)
    return torch.stack(path)


def mean(values: Tensor) -> float | None:
    return round(float(values.float().mean()), 4) if values.numel() else None


def correlation(first: Tensor, second: Tensor) -> float | None:
    if first.numel() < 3 or first.std() == 0 or second.std() == 0:
        return None
    return round(float(torch.corrcoef(torch.stack([first, second]))[0, 1]), 4)


@torch.no_grad()
def measure(units: Units) -> dict[str, Any]:
    """Every number of the analysis."""
    kinds = {"part": units.part, "categorical": units.categorical}
    kinds["between"] = ~(units.part | units.categorical)
    used = units.active.float().mean(0)
    activity = units.codes.sum(0) / units.active.sum(0).clamp(min=1)
    late = ((units.path[0] == 0) & (units.path[min(1, len(units.path) - 1)] > 0)).float().mean(0)
    per_kind = {
        name: {
            "units": int(chosen.sum()),
            "used": mean(used[chosen]),
            "activity_when_active": mean(activity[chosen & (used > 0)]),
            "class_weight_norm": mean(units.weights.norm(dim=0)[chosen]),
            "decoder_mean": mean(units.decoder.mean(1)[chosen]),
            "off_at_first_on_at_second_layer": mean(late[chosen]),
            "self_connection": mean(units.inner.diagonal()[chosen]),
            "first_active_layer": mean(units.start[:, chosen][units.start[:, chosen] > 0]),
        }
        for name, chosen in kinds.items()
    }
    return {
        "angles": [round(float(angle), 3) for angle in units.angle],
        "never_active": int((used == 0).sum()),
        "active_codes": round(float(units.active.float().sum(1).mean()), 1),
        "kinds": per_kind,
        "recurrence_against_ista": ista(units, kinds),
        "inhibition": inhibition(units),
        "prototypes": prototypes(units),
        "by_layer": by_layer(units),
        "progressive": progressive(units),
    }


def ista(units: Units, kinds: dict[str, Tensor]) -> dict[str, Any]:
    """Correlation of off-diagonal weights with minus the products of decoders, by kinds."""
    gram = -units.decoder @ units.decoder.T
    apart = ~torch.eye(len(gram), dtype=torch.bool)
    found = {}
    for onto in ("part", "categorical"):
        for source in ("part", "categorical"):
            pairs = kinds[onto][:, None] & kinds[source][None] & apart
            found[f"{onto} from {source}"] = correlation(units.inner[pairs], gram[pairs])
    return found


def inhibition(units: Units) -> dict[str, Any]:
    """Mean weight between categorical units of one class, and of different ones."""
    chosen = units.categorical
    inner, prefers = units.inner[chosen][:, chosen], units.prefers[chosen]
    apart = ~torch.eye(len(inner), dtype=torch.bool)
    same = prefers[:, None] == prefers[None]
    return {
        "same class": mean(inner[same & apart]),
        "other class": mean(inner[~same]),
        "share negative, other class": mean(inner[~same] < 0),
    }


def prototypes(units: Units) -> dict[str, Any]:
    """Cosine of a unit's decoder with the mean digit of the class that it speaks for."""
    cosine = torch.nn.functional.cosine_similarity(
        units.decoder[:, None], units.means[None], dim=-1
    )  # (units, 10)
    own = cosine.gather(1, units.prefers[:, None])[:, 0]
    nearest = cosine.argmax(1) == units.prefers
    kinds = {"categorical": units.categorical, "part": units.part}
    return {
        "cosine_with_own_class_mean": {name: mean(own[k]) for name, k in kinds.items()},
        "own_class_mean_is_nearest": {name: mean(nearest[k]) for name, k in kinds.items()},
    }


def _error(units: Units, codes: Tensor) -> float:
    guess = units.net.model.logits(codes).argmax(-1)
    return round(100 * float((guess != units.label).double().mean()), 2)


def by_layer(units: Units) -> dict[str, list[float]]:
    """Error of the class and of the reconstruction from the codes after every layer.

    The best decoder of a layer is that of least squares.
    """
    found: dict[str, list[float]] = {"class_error": [], "decoder": [], "best_decoder": []}
    energy = units.x.square().sum()
    for codes in units.path:
        found["class_error"].append(_error(units, codes))
        left = (units.x - codes @ units.decoder).square().sum() / energy
        best = torch.linalg.lstsq(codes.double(), units.x.double(), driver="gelsd").solution
        least = (units.x - codes @ best.float()).square().sum() / energy
        found["decoder"].append(round(float(left), 4))
        found["best_decoder"].append(round(float(least), 4))
    return found


def kept(units: Units, count: int, *, categorical_first: bool = False) -> Tensor:
    """Codes of the ``count`` units of a datum that draw most; categorical ones may come first."""
    drawn = units.codes * units.decoder.norm(dim=1)
    if categorical_first:
        drawn = drawn + units.categorical * (drawn > 0) * 1e3
    rank = drawn.argsort(1, descending=True).argsort(1)
    return torch.where(rank < count, units.codes, torch.zeros(()))


def progressive(units: Units) -> dict[str, Any]:
    """Does the class survive in a reconstruction of few units?

    Read from the units that are kept, and from the picture that they draw, encoded anew by the
    whole net.
    """
    found: dict[str, Any] = {"units_kept": list(KEPT)}
    for order, first in (("largest first", False), ("categorical first", True)):
        rows: dict[str, list[float]] = {"energy_left": [], "codes": [], "encoded_anew": []}
        for count in KEPT:
            codes = kept(units, count, categorical_first=first)
            picture = codes @ units.decoder
            left = (units.x - picture).square().sum() / units.x.square().sum()
            rows["energy_left"].append(round(float(left), 4))
            rows["codes"].append(_error(units, codes))
            again = layers(units.net, torch.nn.functional.normalize(picture))[-1]
            rows["encoded_anew"].append(_error(units, again))
        found[order] = rows
    return found


# Figures ------------------------------------------------------------------------------------------


def figures(units: Units, found: dict[str, Any], stem: Path, before: list[float]) -> list[Path]:
    """Four pictures beside each other in name."""
    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    made = []
    for name, draw in (("units", _units), ("recurrence", _recurrence), ("prototypes", _prototypes)):
        made.append(stem.with_name(f"{stem.name}_{name}.png"))
        _save(draw(units, before), made[-1])
    made.append(stem.with_name(f"{stem.name}_progressive.png"))
    _save(_progressive(units, found), made[-1])
    return made


def _save(figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _units(units: Units, before: list[float]) -> Any:
    figure, axes = plt.subplots(2, 3, figsize=(9, 5.2), layout="constrained")
    bins = np.linspace(0, np.pi / 2, 41).tolist()
    axes[0, 0].hist(units.angle.numpy(), bins, color="tab:blue", label="after both phases")
    if before:
        axes[0, 0].hist(before, bins, histtype="step", color="k", label="after the first")
    axes[0, 0].set(xlabel="angle of encoder and decoder (rad)", ylabel="units")
    axes[0, 0].legend(frameon=False)
    on = units.active.sum(0)
    late = ((units.path[0] == 0) & (units.path[min(1, len(units.path) - 1)] > 0)).float().mean(0)
    panels = (
        (axes[0, 1], units.weights.norm(dim=0), "length of class weights"),
        (axes[0, 2], units.codes.sum(0) / on.clamp(min=1), "mean activity when active"),
        (axes[1, 0], units.decoder.mean(1), "mean of the decoder"),
        (axes[1, 1], late, "share off at layer 1, on at layer 2"),
    )
    for axis, values, name in panels:
        axis.scatter(units.angle, values, s=6, color="tab:blue")
        for bound in (PART, CATEGORICAL):
            axis.axvline(bound, color="0.7", lw=0.7)
        axis.set(xlabel="angle of encoder and decoder (rad)", ylabel=name)
    steps = np.arange(0.5, len(units.path) + 1.5).tolist()
    for chosen, name in ((units.part, "part units"), (units.categorical, "categorical units")):
        starts = units.start[:, chosen]
        starts = starts[starts > 0]
        if len(starts):
            axes[1, 2].hist(starts.numpy(), steps, density=True, histtype="step", label=name)
    axes[1, 2].set(xlabel="first active at layer", ylabel="share of activations")
    axes[1, 2].legend(frameon=False)
    return figure


def _recurrence(units: Units, before: list[float]) -> Any:
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.2), layout="constrained")
    gram = -units.decoder @ units.decoder.T
    apart = ~torch.eye(len(gram), dtype=torch.bool)
    kinds = ((units.part, "part"), (units.categorical, "categorical"))
    for axis, (onto, name) in zip(axes, kinds):
        for source, other in kinds:
            pairs = onto[:, None] & source[None] & apart
            axis.scatter(
                gram[pairs], units.inner[pairs], s=2, alpha=0.4, lw=0, label=f"from {other}"
            )
        axis.set(
            xlabel="minus product of decoders (ISTA)", ylabel="weight", title=f"onto {name} units"
        )
        axis.legend(frameon=False, markerscale=4)
    index = units.categorical.nonzero()[:, 0]
    index = index[units.prefers[index].argsort(stable=True)]
    inner = units.inner[index][:, index]
    bound = float(inner.abs().max()) if inner.numel() else 1.0
    image = axes[2].imshow(inner.numpy(), cmap="RdBu", vmin=-bound, vmax=bound, aspect="equal")
    axes[2].set(title="among categorical units, by class")
    borders = [int((units.prefers[index] < k).sum()) for k in range(11)]
    places = [(low + high - 1) / 2 for low, high in zip(borders, borders[1:])]
    shown = [k for k in range(10) if borders[k + 1] > borders[k]]
    for set_ticks in (axes[2].set_xticks, axes[2].set_yticks):
        set_ticks([places[k] for k in shown], [str(k) for k in shown])
    axes[2].tick_params(length=0)
    figure.colorbar(image, ax=axes[2], shrink=0.8, label="weight")
    return figure


def _show(axis: Any, picture: Tensor, *, signed: bool = True) -> None:
    bound = float(picture.abs().max()) or 1.0
    low, colours = (-bound, "RdBu_r") if signed else (0.0, "gray_r")
    axis.imshow(picture.reshape(28, 28).numpy(), cmap=colours, vmin=low, vmax=bound)


def _prototypes(units: Units, before: list[float]) -> Any:
    figure, axes = plt.subplots(7, 10, figsize=(8, 6.2), layout="constrained")
    strength = units.weights.max(0).values
    for k in range(10):
        _show(axes[0, k], units.means[k])
        own = (units.categorical & (units.prefers == k)).nonzero()[:, 0]
        own = own[strength[own].argsort(descending=True)][:2]
        for row, unit in enumerate(own.tolist()):
            _show(axes[1 + 2 * row, k], units.decoder[unit])
            _show(axes[2 + 2 * row, k], units.encoder[unit])
    parts = units.part.nonzero()[:, 0]
    parts = parts[units.active.float().mean(0)[parts].argsort(descending=True)][:10]
    for column, unit in enumerate(parts.tolist()):
        _show(axes[5, column], units.decoder[unit])
        _show(axes[6, column], units.encoder[unit])
    names = ("class\nmean", "categorical\ndecoder", "its\nencoder") + (
        "second\ndecoder",
        "its\nencoder",
    )
    names += ("part\ndecoder", "its\nencoder")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_frame_on(False)
    for axis, name in zip(axes[:, 0], names):
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def _progressive(units: Units, found: dict[str, Any]) -> Any:
    figure = plt.figure(figsize=(9.5, 5.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.5, 1))
    counts = [1, 2, 3, 5, 8, 12, 40]
    axes = left.subplots(10, len(counts))
    partial = {c: kept(units, c, categorical_first=True) @ units.decoder for c in counts}
    for k in range(10):
        first = int((units.label == k).nonzero()[0])
        for column, count in enumerate(counts):
            axis = axes[k, column]
            _show(axis, partial[count][first].clamp(min=0), signed=False)
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(False)
            if k == 0:
                axis.set_title("1 unit" if count == 1 else f"{count}")
    top, bottom = right.subplots(2, 1)
    rows = found["progressive"]
    for order, style in (("largest first", "--"), ("categorical first", "-")):
        for source, colour in (("codes", "tab:blue"), ("encoded_anew", "tab:orange")):
            name = f"{source.replace('_', ' ')}, {order}"
            top.plot(KEPT, rows[order][source], style, color=colour, marker=".", label=name)
    top.set(xscale="log", xlabel="units kept", ylabel="class error (%)")
    _percent(top)
    top.legend(frameon=False, fontsize=7)
    steps = range(1, len(units.path) + 1)
    layer = found["by_layer"]
    bottom.plot(steps, layer["decoder"], marker=".", label="the decoder")
    bottom.plot(steps, layer["best_decoder"], marker=".", label="best decoder of the layer")
    bottom.set(xlabel="layer", ylabel="share of energy left", ylim=(0, None))
    bottom.legend(frameon=False, fontsize=7, loc="upper center")
    other = bottom.twinx()
    other.plot(steps, layer["class_error"], color="k", marker=".", lw=0.8)
    other.set(ylabel="class error (%, black)")
    _percent(other)
    other.spines["right"].set_visible(True)
    return figure


def _percent(axis: Any) -> None:
    """Logarithmic above one percent."""
    axis.set_yscale("symlog", linthresh=1)
    axis.set_yticks([0, 1, 2, 5, 10, 20, 50], ["0", "1", "2", "5", "10", "20", "50"])
    axis.minorticks_off()
