"""Poisson denoising of photographs by a net unrolled from sparse coding of counts (DCEA).

    python -m benchmarks.dcea train --peak 4 --variant constrained --images FOLDER
    python -m benchmarks.dcea evaluate --weights FILE --images FOLDER --peak 4 --seed 0 --json OUT

A picture whose brightest pixel is expected to give ``peak`` counts is seen through Poisson noise,
and coded by 169 atoms of 11x11 pixels on a grid of stride 7: layers of a proximal method on the
logarithm of the rate, with a residual bent by an ELU and a free bias for each atom.
``constrained``: one dictionary everywhere (20,618 numbers); ``unconstrained``: analysis, synthesis
and decoder have one each (61,516). The denoised picture is made from the mean of the predictor over
all 49 shifts of the grid.

Training sees two random shifts at a step, then six. The pictures are those of ``cbsd432`` but
``12003.jpg``, which holds one of Set12; the last twelve are kept for validation, and every setting
was chosen there. Short protocol: 6 layers of FISTA in place of 15 of ISTA, from cosines and biases
that grow with frequency; a baseline of a quarter of the peak, which is one count at peak 4, as
published; an ELU that leaves residuals without bias in a gray picture. The constrained net of peak
4 took 15 minutes of a core (``--steps 2400 600``, then on from it by ``--start`` with ``6000
1200``); the unconstrained one started from that (``2400 600``, then ``5000 1250``), the other peaks
from those of peak 4 (``600 200``).
``--full``: 15 layers and the published number of crops, 400 epochs of 5,717; give it
``--checkpoints`` to resume.

Published: Tolooshams, Song, Temereanca & Ba (2020), ICML, PMLR 119:9493-9503, and its code.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import Dataset

from benchmarks import common
from pyro_sparse import infer
from pyro_sparse.dictionaries import Conv
from pyro_sparse.guides import ShiftAveraged, UnrolledFISTA
from pyro_sparse.likelihoods import Offset, Poisson, Stabilised
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import FISTA, Bias

ATOMS, SIZE, STRIDE, DEPTH = 169, 11, 7, 6
GRAY = 0.25
"""Where the logarithm of the rate starts from, as a part of the peak."""
WHITE = 255
"""Clean pictures are whole gray levels, with the brightest pixel of each at this one."""
CROP, BATCH, RATE = 81, 4, 2e-3
FIRST, SECOND = 2400, 600
"""Steps with few shifts and with more, at a quarter of the rate."""
FEW, MORE = 2, 6
FULL = 400 * 5717 // BATCH
BIAS, NORM = 0.25, 0.8
"""Start: bias of an atom by its frequency, in half-waves, and squared norm of the dictionary."""
FASTER, CLIP = 5.0, 1.0
"""Factor on the rate of the biases, which are larger than the pixels of an atom; gradient norm."""
HELD_OUT, LEFT_OUT = 12, ("12003",)
WEIGHTS = Path("benchmarks/weights")

Picture = np.ndarray[Any, Any]


class Crops(Dataset[Tensor]):
    """Random crops in random orientations, each a function of seed and index."""

    def __init__(self, pictures: list[Tensor], count: int, size: int, seed: int) -> None:
        self.pictures = [(whitened(picture) * WHITE).round().byte().numpy() for picture in pictures]
        self.count, self.size, self.seed = count, size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        random = np.random.default_rng([self.seed, int(index)])
        picture = self.pictures[random.integers(len(self.pictures))]
        top, left = (random.integers(n - self.size + 1) for n in picture.shape)
        crop = picture[top : top + self.size, left : left + self.size]
        crop = np.rot90(crop, random.integers(4))
        crop = crop[:, ::-1] if random.integers(2) else crop
        return torch.from_numpy(crop.astype(np.float32))[None]


def whitened(picture: Tensor) -> Tensor:
    """A picture whose brightest pixel is 1."""
    return picture / picture.max()


def cosines() -> tuple[Tensor, Tensor]:
    """Both signs of the smoothest cosines, once the constant, with soft edges; frequencies."""
    waves = torch.cos(torch.outer(torch.arange(SIZE) + 0.5, torch.arange(SIZE)) * math.pi / SIZE)
    grid = sorted((math.hypot(i, j), i, j) for i in range(SIZE) for j in range(SIZE))
    edge = torch.hann_window(SIZE + 4, periodic=False)[2:-2].sqrt()
    found = [torch.outer(edge * waves[:, i], edge * waves[:, j]) for _, i, j in grid[: ATOMS // 2]]
    atoms = nn.functional.normalize(torch.stack(found).flatten(1)).reshape(-1, 1, SIZE, SIZE)
    frequencies = torch.tensor([frequency for frequency, _, _ in grid[: ATOMS // 2]])
    return torch.cat([atoms, -atoms, atoms[:1]]), torch.cat([frequencies] * 2 + [torch.zeros(1)])


def net(peak: float, variant: str, depth: int = DEPTH) -> ShiftAveraged:
    """The guide at its start: nearly MAP codes of cosines, with rarer high frequencies."""
    atoms, frequencies = cosines()
    dictionary = Conv(ATOMS, 1, (SIZE, SIZE), STRIDE, atoms=atoms, unit_norm=False)
    with torch.no_grad():
        dictionary.atoms.mul_((NORM / dictionary.squared_norm()).sqrt())
    likelihood = Offset(Poisson(), math.log(peak * GRAY))
    make = {"constrained": UnrolledFISTA, "unconstrained": UnrolledFISTA.untied}[variant]
    guide = make(
        dictionary,
        Stabilised(likelihood, unbent(peak)),
        dist.Exponential(1.0),
        num_steps=depth,
        method=FISTA(),
        shrinkage=Bias(BIAS * frequencies),
        step_size=1.0,
    )
    return ShiftAveraged(guide, dictionary, likelihood)


def unbent(peak: float) -> float:
    """The ELU's parameter with which Poisson residuals have the mean zero in a gray picture."""
    rate = torch.tensor(peak * 0.4, dtype=torch.float64)
    counts = torch.arange(60, dtype=torch.float64)
    weight, residual = dist.Poisson(rate).log_prob(counts).exp(), counts - rate
    above, below = residual.clamp(min=0), 1 - residual.clamp(max=0).exp()
    return float((weight * above).sum() / (weight * below).sum())


def optimizer(parameters: Iterable[Tensor], rate: float) -> torch.optim.Optimizer:
    """Adam with clipped gradients, faster for the biases: they are larger than what atoms hold."""
    parameters = list(parameters)
    adam = torch.optim.Adam(
        [
            {"params": [p for p in parameters if p.dim() > 1], "lr": rate},
            {"params": [p for p in parameters if p.dim() == 1], "lr": FASTER * rate},
        ],
        betas=(0.9, 0.99),
    )

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(parameters, CLIP)

    adam.register_step_pre_hook(clip)
    return adam


def train(
    net: ShiftAveraged,
    peak: float,
    pictures: list[Tensor],
    *,
    steps: tuple[int, int] = (FIRST, SECOND),
    batch: int = BATCH,
    crop: int = CROP,
    rate: float = RATE,
    seed: int = 0,
    checkpoints: infer.Checkpoints | None = None,
) -> infer.History:
    """Train in place on pictures from 0 to 1: first with few shifts of the grid, then with more."""
    model = SparseCoding(net.dictionary, net.likelihood, dist.Exponential(1.0))
    unit = math.gcd(*steps)
    phases = []
    for shifts, count, top in ((FEW, steps[0], rate), (MORE, steps[1], rate / 4)):
        loss = infer.Supervised(
            lambda rates, gray: nn.functional.mse_loss(rates / peak, gray / WHITE),
            corrupt=lambda gray: torch.poisson(peak * gray / WHITE),
            predict=functools.partial(net.reconstruct, shifts=shifts),
        )
        schedule = functools.partial(
            OneCycleLR,
            max_lr=[top, FASTER * top],
            total_steps=count,
            pct_start=0.05,
            div_factor=5,
            final_div_factor=10,
            cycle_momentum=False,
        )
        update = infer.Update(
            loss=loss,
            optimizer=functools.partial(optimizer, rate=top),
            schedule=schedule,
            schedule_per_step=True,
        )
        phases.append(infer.Phase(count // unit, [update]))
    return infer.fit(
        model,
        net,
        Crops(pictures, unit * batch, crop, seed),
        phases=phases,
        batch_size=batch,
        seed=seed,
        guard=infer.RollBack(),
        checkpoints=checkpoints,
        progress=False,
    )


def denoise(net: ShiftAveraged, counts: Tensor, brightest: float, peak: float) -> Tensor:
    """Estimate of a clean picture ``(height, width)`` from its counts."""
    with torch.no_grad():
        rates: Tensor = net.reconstruct(counts[None, None])[0, 0]
    return rates * brightest / peak


def draws(clean: Tensor, peak: float, count: int, seed: int) -> list[Tensor]:
    """Counts of a picture from 0 to 1; every picture has draws of its own seed alone."""
    random = torch.Generator().manual_seed(seed)
    return [torch.poisson(peak * whitened(clean), generator=random) for _ in range(count)]


def scores(net: ShiftAveraged, clean: Tensor, peak: float, count: int, seed: int) -> dict[str, Any]:
    """PSNR in dB of a net and of the counts themselves: means over draws, and their spread."""
    brightest = float(clean.max())
    found, noisy = [], []
    for counts in draws(clean, peak, count, seed):
        found.append(common.psnr(clean, denoise(net, counts, brightest, peak)))
        noisy.append(common.psnr(clean, counts * brightest / peak)["published"])
    spread = np.std([one["published"] for one in found])
    return {
        **{kind: round(float(np.mean([one[kind] for one in found])), 3) for kind in found[0]},
        "spread_of_draws": round(float(spread), 3),
        "noisy_published": round(float(np.mean(noisy)), 3),
    }


def split(folder: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Pictures to train on, and to choose settings by."""
    kept = [p for name, p in common.pictures(folder).items() if name not in LEFT_OUT]
    return kept[:-HELD_OUT], kept[-HELD_OUT:]


def validate(net: ShiftAveraged, peak: float, pictures: list[Tensor], count: int = 12) -> float:
    """Mean PSNR in dB, peak 1, of crops of the pictures."""
    crops = Crops(pictures, count, CROP, seed=7)
    clean = torch.stack([crops[i] for i in range(count)]) / WHITE
    counts = torch.poisson(peak * clean, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        error = net.reconstruct(counts) / peak - clean
    return float(-10 * error.square().mean((1, 2, 3)).log10().mean())


def load(file: Path) -> tuple[ShiftAveraged, dict[str, Any]]:
    """A trained net, and its settings."""
    tensors, settings = common.load_weights(file)
    loaded = net(settings["peak"], settings["variant"], settings["depth"])
    copy_parameters(tensors, loaded)
    return loaded, settings


def copy_parameters(tensors: dict[str, Tensor], to: nn.Module) -> None:
    own = dict(to.named_parameters())
    if own.keys() != tensors.keys():
        raise ValueError(f"Expected weights of the parts {sorted(own)}, got {sorted(tensors)}.")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def train_command(options: argparse.Namespace) -> None:
    began, peak = time.perf_counter(), options.peak
    folder = Path(options.images or Path(os.environ["PYRO_SPARSE_DATA"]) / "cbsd432")
    pictures, held_out = split(folder)
    if options.start:
        tensors, settings = common.load_weights(options.start)
        trained = net(peak, options.variant, options.depth or settings["depth"])
        if options.variant == "unconstrained":  # all three may start from one
            shared = tensors["guide.encoder.dictionary.atoms"]
            for part in ("analysis", "synthesis"):
                tensors.setdefault(f"guide.encoder.{part}.atoms", shared)
        copy_parameters(tensors, trained)
    else:
        trained = net(peak, options.variant, options.depth or (15 if options.full else DEPTH))
    steps = (2 * (FULL // 3), FULL // 3) if options.full else tuple(options.steps)
    store = None
    if options.checkpoints:
        store = infer.Checkpoints(options.checkpoints, every=500)
    history = train(
        trained, peak, pictures, steps=steps, rate=options.rate, seed=options.seed,
        checkpoints=store,
    )  # fmt: skip
    settings = {
        "peak": peak,
        "variant": options.variant,
        "depth": trained.guide.encoder.num_steps,
        "steps": steps,
        "batch": BATCH,
        "crop": CROP,
        "rate": options.rate,
        "start": options.start and options.start.name,
        "seed": options.seed,
        "training_seconds": round(history.seconds, 1),
        "training_core_seconds": round(time.process_time(), 1),
        "validation_psnr": round(validate(trained, peak, held_out), 3),
        "faults": len(history.faults),
        "loss": [
            round(float(np.mean(part)), 6)
            for part in np.array_split(history.step_loss, min(12, sum(steps)))
        ],
    }
    out = options.out or WEIGHTS / f"dcea-{options.variant}-peak{peak:g}.safetensors"
    common.save_weights(out, dict(trained.named_parameters()), settings)
    print(json.dumps({**settings, "seconds": round(time.perf_counter() - began, 1)}, indent=1))


def evaluate_command(options: argparse.Namespace) -> None:
    began = time.perf_counter()
    trained, settings = load(options.weights)
    if settings["peak"] != options.peak:
        raise ValueError(f"Expected --peak {settings['peak']:g}, got {options.peak:g}.")
    found = {}
    for name, clean in common.pictures(options.images).items():
        if options.names and name not in options.names:
            continue
        found[name] = scores(trained, clean, options.peak, options.draws, options.seed)
        print(f"{name:12s} {found[name]}", flush=True)
    if not found:
        raise ValueError(f"Expected names of pictures in {options.images}, got {options.names}.")
    mean = {
        kind: round(float(np.mean([one[kind] for one in found.values()])), 3)
        for kind in ("published", "standard")
    }
    names = f" --names {' '.join(options.names)}" if options.names else ""
    command = (
        f"python -m benchmarks.dcea evaluate --weights {options.weights} --images FOLDER{names} "
        f"--peak {options.peak:g} --seed {options.seed} --draws {options.draws}"
    )
    content = common.record(
        command, options.seed, began, peak=options.peak, draws=options.draws, psnr_mean=mean,
        psnr=found, parameters=sum(p.numel() for p in trained.parameters()), trained=settings,
    )  # fmt: skip
    common.write(options.json, content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("train")
    train.set_defaults(run=train_command)
    train.add_argument("--variant", choices=["constrained", "unconstrained"], required=True)
    train.add_argument("--images", type=Path, help="default: cbsd432 in PYRO_SPARSE_DATA")
    train.add_argument("--start", type=Path, help="weights of any peak or tied ones")
    train.add_argument("--steps", type=int, nargs=2, default=(FIRST, SECOND))
    train.add_argument("--rate", type=float, default=RATE, help="largest rate of Adam")
    train.add_argument("--depth", type=int, help="number of layers, by default those of --start")
    train.add_argument("--full", action="store_true", help="as many crops as published")
    train.add_argument("--checkpoints", type=Path, help="folder to write to and resume from")
    train.add_argument("--out", type=Path, help="file of the weights")
    evaluate = commands.add_parser("evaluate")
    evaluate.set_defaults(run=evaluate_command)
    evaluate.add_argument("--weights", type=Path, required=True)
    evaluate.add_argument("--images", type=Path, required=True)
    evaluate.add_argument("--names", nargs="+", help="some of the pictures, without suffix")
    evaluate.add_argument("--draws", type=int, default=20, help="draws of noise for each picture")
    evaluate.add_argument("--json", type=Path, required=True)
    for command in (train, evaluate):
        command.add_argument("--peak", type=float, required=True, help="counts at the brightest")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.run(options)


if __name__ == "__main__":
    main()
