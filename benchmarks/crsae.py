"""CRsAE: pictures freed of noise, and spikes found, by convolutional sparse coding unrolled.

    PYRO_SPARSE_DATA=FOLDER python -m benchmarks.crsae train {images-tied,images-untied,spikes}
    python -m benchmarks.crsae evaluate --weights F --images DIR --sigma 20 --seed 0 --json OUT
    python -m benchmarks.crsae evaluate-spikes --weights F --recording X.npz --json OUT
    PYRO_SPARSE_DATA=FOLDER python -m benchmarks.crsae_report {images,spikes} [--out FOLDER]

Pictures: 64 atoms of 7 x 7 pixels at stride 5, 30 layers, averaged over all 25 shifts of the grid,
trained on random crops of ``cbsd432`` with fresh noise against the clean crop. The short protocol
takes two shifts at a step in place of 25, and still estimates the error of the average of all
without bias (``AveragedError``). Rates of the prior: ``fixed``; ``backprop`` by the same error; or
``em``, CRsAE's second loss. Settings were chosen by crops of pictures held out of ``cbsd432``.
Spikes: see ``benchmarks.crsae_spikes``.

References:
    Tolooshams, Dey & Ba (2021), IEEE TNNLS 32(6) (CRsAE); Simon & Elad (2019), NeurIPS 32 (shifts).
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks import common, crsae_spikes
from benchmarks.objectives import AveragedError, Noisy
from pyro_sparse import infer
from pyro_sparse.dictionaries import Conv
from pyro_sparse.distributions import Rate
from pyro_sparse.guides import ShiftAveraged, UnrolledFISTA
from pyro_sparse.infer import Phase, RateLoss, Update
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import Proximal

ATOMS, KERNEL, STRIDE, DEPTH = 64, 7, 5, 30
SIGMA = 20 / 255
RATE = 20.0
"""Of the Laplace prior at the start, as published, in one over gray levels of 0 to 1."""
STRENGTH = 100.0
"""Published rate of the Gamma hyperprior, whose mean is ``RATE``; counted once a crop."""
WEIGHTS = Path("benchmarks/weights")
NINE = {
    name: Path(file)
    for name, file in {
        "barbara": "set12/09.png",
        "boat": "set12/10.png",
        "couple": "set12/12.png",
        "fingerprint": "classic/fingerprint.png",
        "hill": "classic/hill.png",
        "house": "set12/02.png",
        "lena": "set12/08.png",
        "man": "set12/11.png",
        "peppers": "set12/03.png",
    }.items()
}
EXCLUDED = "12003"
"""Of ``cbsd432``: holds a picture of Set12."""


@dataclass(frozen=True)
class Protocol:
    """How one net is trained.

    ``crop`` is a kernel plus a multiple of the stride. Every net starts from one of ``first_depth``
    layers with tied weights that was trained for ``first_steps``: its steps cost a third.
    """

    tied: bool
    rates: str = "backprop"
    unit_norm: bool = True
    steps: int = 1300
    depth: int = DEPTH
    batch: int = 2
    crop: int = 62
    shifts: int = 2
    learning_rate: float = 1e-2
    rate_learning_rate: float = 1e-2
    first_steps: int = 600
    first_depth: int = 10
    first_learning_rate: float = 1e-2


@dataclass
class Net:
    """Model and guide of the same dictionary, likelihood, prior and rates."""

    dictionary: Conv
    rate: Rate
    model: SparseCoding
    guide: ShiftAveraged

    @property
    def encoder(self) -> Any:
        return self.guide.guide.encoder

    def tensors(self) -> dict[str, Tensor]:
        found = {"atoms": self.dictionary.atoms, "rate": self.rate()}
        if self.encoder.analysis is not None:
            found["analysis"] = self.encoder.analysis.atoms
            found["synthesis"] = self.encoder.synthesis.atoms
        return found


def laplace(rate: Tensor) -> dist.Laplace:
    return dist.Laplace(0.0, 1 / rate)


def build(tensors: dict[str, Tensor], sigma: float, *, depth: int, unit_norm: bool = True) -> Net:
    """A net of these atoms and rates, untied where there is an ``analysis`` and a ``synthesis``."""

    def conv(atoms: Tensor) -> Conv:
        shape = atoms.shape
        return Conv(shape[0], shape[1], tuple(shape[2:]), STRIDE, atoms=atoms, unit_norm=unit_norm)

    dictionary, rate = conv(tensors["atoms"]), Rate(tensors["rate"])
    likelihood = Gaussian(sigma)
    own = {name: conv(tensors[name]) for name in ("analysis", "synthesis") if name in tensors}
    guide = UnrolledFISTA(
        dictionary, likelihood, laplace, rate=rate, num_steps=depth, shrinkage=Proximal(), **own
    )
    model = SparseCoding(dictionary, likelihood, laplace, rate=rate)
    return Net(dictionary, rate, model, ShiftAveraged(guide, dictionary, likelihood))


def start(protocol: Protocol, seed: int) -> Net:
    """Random atoms of about unit norm, tied, few layers."""
    draw = torch.Generator().manual_seed(seed)
    atoms = torch.randn(ATOMS, 1, KERNEL, KERNEL, generator=draw) / KERNEL
    tensors = {"atoms": atoms, "rate": torch.full((ATOMS,), RATE)}
    return build(tensors, SIGMA, depth=protocol.first_depth, unit_norm=protocol.unit_norm)


def deepened(net: Net, protocol: Protocol) -> Net:
    """The same atoms in all layers, with copies for analysis and synthesis where untied."""
    found = {name: tensor.detach() for name, tensor in net.tensors().items()}
    if not protocol.tied:
        found |= {"analysis": found["atoms"], "synthesis": found["atoms"]}
    return build(found, SIGMA, depth=protocol.depth, unit_norm=protocol.unit_norm)


class Crops(torch.utils.data.Dataset[Tensor]):
    """Random crops, flipped at random: number ``i`` is a function of ``i`` and the seed.

    Args:
        pictures: Gray levels from 0 to 1.
        count: How many crops there are.
        size: Side of a crop in pixels.
        seed: Seed.
    """

    def __init__(self, pictures: list[Tensor], count: int, size: int, seed: int) -> None:
        self.pictures, self.count, self.size, self.seed = pictures, count, size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        draw = np.random.default_rng([self.seed, int(index)])
        picture = self.pictures[draw.integers(len(self.pictures))]
        top, left = (draw.integers(n - self.size + 1) for n in picture.shape)
        crop = picture[None, top : top + self.size, left : left + self.size]
        dims = [dim for dim in (-2, -1) if draw.integers(2)]
        return crop.flip(dims) if dims else crop


def recipe(net: Net, protocol: Protocol, steps: int, learning_rate: float) -> Phase:
    """Atoms by the error of the picture; rates by it as well, by their own loss, or not at all."""
    cosine = functools.partial(CosineAnnealingLR, T_max=steps)
    error = AveragedError(net.guide, SIGMA, protocol.shifts)
    rates = [net.rate.parametrizations.value.original]  # type: ignore[union-attr,operator]
    fixed = {id(rate) for rate in rates}
    guide = net.guide
    atoms = [p for p in guide.parameters() if id(p) not in fixed]

    def groups(parameters: Any) -> torch.optim.Optimizer:
        fast = [p for p in parameters if id(p) in fixed]
        slow = [p for p in parameters if id(p) not in fixed]
        kept = [{"params": slow}, {"params": fast, "lr": protocol.rate_learning_rate}]
        kept = [group for group in kept if group["params"]]
        return torch.optim.Adam(kept, lr=learning_rate)

    def update(loss: Any, train: list[Any]) -> Update:
        return Update(loss, groups, train, cosine, schedule_per_step=True)

    if protocol.rates == "fixed":
        return Phase(1, [update(error, atoms)])
    if protocol.rates == "backprop":
        return Phase(1, [update(error, atoms + rates)])
    if protocol.rates != "em":
        raise ValueError(f"Expected rates to be fixed, backprop or em, got {protocol.rates!r}.")
    hyperprior = dist.Gamma(STRENGTH * RATE, STRENGTH)
    second = Noisy(RateLoss(net.rate, laplace, hyperprior, per_datum=True), SIGMA)
    return Phase(1, [update(error, atoms), update(second, rates)])


class Watch(infer.Callback):
    """Prints how well pictures held out are doing."""

    def __init__(self, net: Net, held_out: Tensor, every: int) -> None:
        self.net, self.held_out, self.every = net, held_out, every
        self.begun = time.perf_counter()

    def after_step(self, progress: infer.Progress) -> None:
        if progress.step % self.every == 0:
            value = validate(self.net, self.held_out)
            seconds = time.perf_counter() - self.begun
            print(f"step {progress.step}  held out {value:.3f} dB  {seconds:.0f} s", flush=True)


def validate(net: Net, held_out: Tensor) -> float:
    """Mean PSNR in dB, peak 1, of crops with the same noise at every call."""
    noise = torch.randn(held_out.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        away = net.guide.reconstruct(held_out + SIGMA * noise) - held_out
    return float(-10 * torch.log10(away.square().mean((1, 2, 3))).mean())


def photographs(folder: Path) -> tuple[list[Tensor], Tensor]:
    """Pictures to train on, and crops ``(8, 1, 92, 92)`` of eight others."""
    every = common.pictures(folder / "cbsd432")
    names = [name for name in every if name != EXCLUDED]
    held = names[:: -(-len(names) // 8)]
    crops = [every[name][None, 100:192, 100:192] for name in held]
    return [every[name] for name in names if name not in held], torch.stack(crops)


def train(protocol: Protocol, folder: Path, seed: int, checkpoints: Path | None = None) -> Any:
    """The net, and what is to be said of its training."""
    begun = time.perf_counter(), time.process_time()
    pictures, held_out = photographs(folder)

    def run(net: Net, steps: int, rate: float, name: str) -> int:
        crops = Crops(pictures, steps * protocol.batch, protocol.crop, seed)
        kept = None if checkpoints is None else infer.Checkpoints(checkpoints / name, every=200)
        history = infer.fit(
            net.model, net.guide, crops, phases=[recipe(net, protocol, steps, rate)],
            batch_size=protocol.batch, seed=seed, checkpoints=kept, progress=False,
            callbacks=[Watch(net, held_out, max(steps // 3, 1))],
        )  # fmt: skip
        return len(history.faults)

    net, faults = start(protocol, seed), 0
    if protocol.first_steps:
        faults += run(net, protocol.first_steps, protocol.first_learning_rate, "first")
    net = deepened(net, protocol)
    faults += run(net, protocol.steps, protocol.learning_rate, "last")
    return net, {
        **asdict(protocol),
        "seed": seed,
        "held_out_psnr": round(validate(net, held_out), 3),
        "faults": faults,
        "training_seconds": round(time.perf_counter() - begun[0], 1),
        "training_processor_seconds": round(time.process_time() - begun[1], 1),
    }


def restore(file: Path, sigma: float) -> Net:
    """The net of a file of weights, for noise of another level too."""
    tensors, settings = common.load_weights(file)
    if "atoms" not in tensors or tensors["atoms"].dim() != 4:
        raise ValueError(f"Expected weights by train images-tied or images-untied, got {file}.")
    return build(tensors, sigma, unit_norm=settings["unit_norm"], depth=settings["depth"])


def denoise(net: Net, pictures: dict[str, Tensor], sigma: float, seed: int) -> dict[str, Any]:
    """PSNR of every picture under one draw of noise, and their means."""
    found = {}
    draw = torch.Generator().manual_seed(seed)
    for name, clean in pictures.items():
        noisy = clean + sigma * torch.randn(clean.shape, generator=draw)
        with torch.no_grad():
            estimate = net.guide.reconstruct(noisy[None, None])[0, 0]
        found[name] = {kind: round(v, 3) for kind, v in common.psnr(clean, estimate).items()}
        print(f"{name:15s} {found[name]['published']:.2f} dB", flush=True)
    kinds = ("published", "standard")
    mean = {k: round(float(np.mean([row[k] for row in found.values()])), 3) for k in kinds}
    return {"psnr_mean": mean, "psnr": found}


def data_folder() -> Path:
    folder = os.environ.get("PYRO_SPARSE_DATA")
    if not folder:
        raise SystemExit("PYRO_SPARSE_DATA is not set: it names the folder of the data sets")
    return Path(folder)


def protocol_of(options: argparse.Namespace) -> Protocol:
    """The short protocol, or the published one, with what the command line changes."""
    given = {
        name: getattr(options, name)
        for name in (
            "rates",
            "steps",
            "depth",
            "first_steps",
            "batch",
            "crop",
            "learning_rate",
            "rate_learning_rate",
        )
        if getattr(options, name) is not None
    }
    if options.full:
        full = {
            "steps": 250 * 431,
            "batch": 1,
            "crop": 127,
            "shifts": 25,
            "learning_rate": 1e-3,
            "first_steps": 0,
        }
        given = full | given
    return Protocol(options.what == "images-tied", unit_norm=not options.free_norm, **given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("what", choices=["images-tied", "images-untied", "spikes"])
    training.add_argument("--full", action="store_true", help="the published length, for a GPU")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--out", type=Path, help="default: benchmarks/weights/crsae-WHAT")
    training.add_argument("--checkpoints", type=Path, help="folder, to resume from")
    training.add_argument("--rates", choices=["fixed", "backprop", "em"])
    training.add_argument("--free-norm", action="store_true")
    for name in ("steps", "depth", "first-steps", "batch", "crop"):
        training.add_argument(f"--{name}", type=int)
    for name in ("learning-rate", "rate-learning-rate"):
        training.add_argument(f"--{name}", type=float)
    evaluating = commands.add_parser("evaluate")
    evaluating.add_argument("--weights", type=Path, required=True)
    evaluating.add_argument("--images", type=Path, required=True)
    evaluating.add_argument("--sigma", type=float, default=20.0, help="in gray levels of 0 to 255")
    evaluating.add_argument("--seed", type=int, default=0)
    evaluating.add_argument("--json", type=Path)
    crsae_spikes.add_commands(commands)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    begun = time.perf_counter()
    if options.command == "train" and options.what != "spikes":
        out = options.out or WEIGHTS / f"crsae-{options.what}.safetensors"
        protocol = protocol_of(options)
        net, said = train(protocol, data_folder(), options.seed, options.checkpoints)
        print(said)
        common.save_weights(out, net.tensors(), said)
    elif options.command == "train":
        out = options.out or WEIGHTS / "crsae-spikes.safetensors"
        recording = dict(np.load(data_folder() / crsae_spikes.RECORDING))
        tensors, said = crsae_spikes.train(recording, options.seed)
        print(said)
        common.save_weights(out, tensors, said)
    elif options.command == "evaluate":
        sigma = options.sigma / 255
        pictures = common.pictures(options.images)
        found = denoise(restore(options.weights, sigma), pictures, sigma, options.seed)
        print(found["psnr_mean"])
        if options.json:
            command = (
                f"python -m benchmarks.crsae evaluate --weights {options.weights} --images DIR "
                f"--sigma {options.sigma:g} --seed {options.seed}"
            )
            common.write(options.json, common.record(command, options.seed, begun, **found))
    else:
        crsae_spikes.run(options, begun)


if __name__ == "__main__":
    main()
