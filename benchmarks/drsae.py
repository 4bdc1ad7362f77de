"""Digits by a discriminative recurrent sparse auto-encoder (Rolfe & LeCun, ICLR 2013).

    PYRO_SPARSE_DATA=FOLDER python -m benchmarks.drsae train --units 200 --layers 11 --seed 0
    PYRO_SPARSE_DATA=FOLDER python -m benchmarks.drsae feed-forward --units 200 --seed 0
    PYRO_SPARSE_DATA=FOLDER python -m benchmarks.drsae calibrate --weights F --json OUT
    python -m benchmarks.drsae evaluate --weights F --data X.npz --json OUT
    python -m benchmarks.drsae compare --first OUT --second OUT --json OUT
    PYRO_SPARSE_DATA=FOLDER python -m benchmarks.drsae analyse --weights F --figures STEM --json OUT
    python -m benchmarks.drsae gather --runs FOLDER --json OUT

A point guide that is a recurrent net encodes digits of unit norm; a first phase trains model and
guide on the data alone, a second on data and labels. Training digits are the first 50,000 of MNIST,
the last 10,000 validate; nothing is chosen by test digits, and no epoch is selected: a run ends
with its schedule. ``train`` is a **shortened schedule with larger minibatches**: 100 digits, Adam,
and far fewer epochs. ``--full`` is the published one (minibatches of 10, plain gradient steps, 100
and 400 epochs), resumed from ``--checkpoints`` if it is interrupted. Files of weights hold encoder
and decoder in 8 bits with one scale a row, the rest in 16 bits; what is evaluated is the file.

``X.npz`` holds ``images`` (n, 28, 28), gray levels of any scale, and ``labels`` (n,).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
import scipy.stats
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from benchmarks import common, drsae_analysis
from benchmarks.drsae_net import CLASSES, PIXELS, DrSAE
from pyro_sparse import infer
from pyro_sparse.infer import Phase, SparseELBO, Update, Without

TRAINED = 50_000
ENCODER_EPS = 1e-3
"""Size of gradient (about its median) below which Adam's steps of the encoder are in proportion to
it: as large as the others they would fill the weights of pixels that are nearly always dark."""
PUBLISHED = {(200, 2): 1.49, (200, 11): 1.21, (400, 11): 1.08}
"""Test errors in percent, of all 10,000 test digits."""


def digits(file: Path) -> tuple[Tensor, Tensor]:
    """Images of unit norm ``(n, 784)`` and classes ``(n,)``."""
    with np.load(file) as stored:
        missing = {"images", "labels"} - set(stored.files)
        if missing:
            raise ValueError(f"Expected images and labels in {file}, got {stored.files}.")
        images, labels = stored["images"], stored["labels"]
    x = torch.from_numpy(images.reshape(len(images), -1).astype(np.float32))
    if x.shape[1] != PIXELS or len(labels) != len(x):
        raise ValueError(
            f"Expected images (n, 28, 28) and n labels, got {images.shape}, {labels.shape}."
        )
    return nn.functional.normalize(x), torch.from_numpy(labels.astype(np.int64))


def calibration_error(probabilities: Tensor, label: Tensor, bins: int = 15) -> float:
    """Mean distance of confidence and accuracy over bins of equal numbers of data."""
    confidence, guess = probabilities.max(-1)
    order = confidence.argsort()
    right = (guess == label).float()[order]
    parts = zip(confidence[order].tensor_split(bins), right.tensor_split(bins))
    gaps = [abs(float(c.mean() - r.mean())) * len(c) for c, r in parts if len(c)]
    return sum(gaps) / len(label)


def scores(probabilities: Tensor, label: Tensor) -> dict[str, float]:
    guess = probabilities.argmax(-1)
    chosen = probabilities.gather(1, label[:, None]).clamp(min=1e-12)
    return {
        "error": round(100 * float((guess != label).double().mean()), 4),
        "calibration_error": round(calibration_error(probabilities, label), 5),
        "nats": round(float(-chosen.log().mean()), 5),
    }


class Watch(infer.Callback):
    """Prints the validation error now and then, and keeps it."""

    def __init__(self, net: DrSAE, x: Tensor, label: Tensor, every: int) -> None:
        self.net, self.x, self.label, self.every = net, x, label, every
        self.found: list[list[float]] = []
        self.first_angles: list[float] = []
        self.began = time.process_time()

    def after_epoch(self, progress: infer.Progress) -> None:
        if progress.phase == 0:
            self.first_angles = [round(float(angle), 3) for angle in self.net.angles()]
        if progress.epoch % self.every == 0:
            error = scores(self.net.probabilities(self.x), self.label)["error"]
            self.found.append([progress.epoch, error])
            spent = time.process_time() - self.began
            print(f"epoch {progress.epoch} loss {progress.loss:.3f} error {error} {spent:.0f} s")


def phases(
    net: DrSAE, epochs: tuple[int, int], lr: float, batch_size: int, *, full: bool
) -> list[Phase]:
    """First the data alone, then data and labels."""
    # Published gradients are sums over a minibatch; of Adam's steps the size does not matter.
    rates = net.rates(lr * batch_size) if full else net.rates(lr, classifier=1.0)

    def optimizer(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [{"params": [p], "lr": rates[id(p)]} for p in parameters]
        if full:
            return torch.optim.SGD(groups)
        for group in groups:
            if group["params"][0] is net.encoder:
                group["eps"] = ENCODER_EPS
        return torch.optim.Adam(groups)

    steps = epochs[1] * math.ceil(TRAINED / batch_size)
    decays: list[Callable[[int], float]] = [
        lambda step: 1.0,
        lambda step: 0.505 + 0.495 * math.cos(math.pi * min(step / steps, 1)),
    ]
    if full:
        decays = [lambda step: 1 / (1 + 5e-6 * step)] * 2
    schedules = [functools.partial(LambdaLR, lr_lambda=decay) for decay in decays]
    losses = [Without(SparseELBO(), "label"), SparseELBO()]
    return [
        Phase(count, [Update(loss, optimizer, schedule=schedule, schedule_per_step=True)])
        for count, loss, schedule in zip(epochs, losses, schedules)
        if count
    ]


def train(options: argparse.Namespace) -> None:
    began = time.perf_counter()
    x, label = digits(data_folder() / "mnist_train.npz")
    held, held_label = x[TRAINED:], label[TRAINED:]
    torch.manual_seed(options.seed)
    order = torch.randperm(min(len(x), TRAINED))
    net = DrSAE.start(options.units, options.layers, x[order], as_published=options.full)
    watch = Watch(net, held, held_label, options.watch)
    history = infer.fit(
        net.model,
        net.guide,
        x[:TRAINED],
        given={"label": label[:TRAINED]},
        phases=phases(
            net, tuple(options.epochs), options.lr, options.batch_size, full=options.full
        ),
        batch_size=options.batch_size,
        seed=options.seed,
        callbacks=[*net.constraints(every=5 if options.full else 1), watch],
        checkpoints=options.checkpoints
        and infer.Checkpoints(options.checkpoints, every=5000, keep=2),
        progress=False,
    )
    settings = {
        "schedule": "published" if options.full else "shortened, larger minibatches",
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "lr": options.lr,
        "seed": options.seed,
    }
    before = scores(net.probabilities(held), held_label)
    net.save(options.weights, settings)
    net, _ = DrSAE.load(options.weights)
    content = common.record(
        f"python -m benchmarks.drsae train --units {options.units} --layers {options.layers} "
        f"--epochs {options.epochs[0]} {options.epochs[1]} --batch-size {options.batch_size} "
        f"--lr {options.lr} --seed {options.seed}{' --full' if options.full else ''}",
        options.seed,
        began,
        **{name: value for name, value in settings.items() if name != "seed"},
        validation=scores(net.probabilities(held), held_label),
        validation_before_storage=before,
        validation_by_epoch=watch.found,
        angles_after_first_phase=watch.first_angles,
        loss_by_epoch=[round(loss, 3) for loss in history.epoch_loss],
        cpu_seconds=round(time.process_time() - watch.began, 1),
    )
    print(content["validation"], before)
    common.write(options.weights.with_suffix(".json"), content)


def feed_forward(options: argparse.Namespace) -> None:
    """A net of two hidden layers: as many weights as encoder, recurrence and classifier have."""
    began = time.perf_counter()
    x, label = digits(data_folder() / "mnist_train.npz")
    x, held, label, held_label = x[:TRAINED], x[TRAINED:], label[:TRAINED], label[TRAINED:]
    torch.manual_seed(options.seed)
    units = options.units
    net = nn.Sequential(
        nn.Linear(PIXELS, units), nn.ReLU(), nn.Linear(units, units), nn.ReLU(),
        nn.Linear(units, CLASSES),
    )  # fmt: skip
    scale = 10.0  # of digits of unit norm, whose pixels are small
    optimizer = torch.optim.Adam(net.parameters(), lr=options.lr)
    epochs, steps = sum(options.epochs), math.ceil(len(x) / options.batch_size)
    schedule = CosineAnnealingLR(optimizer, epochs * steps, options.lr / 100)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(options.batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(scale * x[rows]), label[rows]).backward()
            optimizer.step()
            schedule.step()
    test, test_label = digits(data_folder() / "mnist_test.npz")
    with torch.no_grad():
        content = common.record(
            f"python -m benchmarks.drsae feed-forward --units {units} --seed {options.seed} "
            f"--epochs {options.epochs[0]} {options.epochs[1]} --lr {options.lr}",
            options.seed,
            began,
            parameters=sum(p.numel() for p in net.parameters()),
            validation=scores(net(scale * held).softmax(-1), held_label),
            test=scores(net(scale * test).softmax(-1), test_label),
        )
    print(content["validation"], content["test"])
    common.write(options.json, content)


def evaluate(options: argparse.Namespace) -> None:
    began = time.perf_counter()
    net, settings = DrSAE.load(options.weights)
    x, label = digits(options.data)
    probabilities = net.probabilities(x)
    content = common.record(
        f"python -m benchmarks.drsae evaluate --weights {options.weights.name} "
        f"--data {options.data.name}",
        settings["seed"],
        began,
        **scores(probabilities, label),
        digits=len(x),
        published=PUBLISHED.get((net.units, net.layers)),
        settings=settings,
        wrong=(probabilities.argmax(-1) != label).nonzero()[:, 0].tolist(),
    )
    print({key: content[key] for key in ("error", "calibration_error", "nats", "published")})
    common.write(options.json, content)


def calibrate(options: argparse.Namespace) -> None:
    """Set the temperature of the classes on validation digits, in the file of weights.

    Of a trained net the errors stay as they are, and its confidence follows them (Guo et al. 2017,
    On calibration of modern neural networks, ICML, sec. 4.2).
    """
    began = time.perf_counter()
    net, settings = DrSAE.load(options.weights)
    x, label = digits(data_folder() / "mnist_train.npz")
    held, held_label = x[TRAINED:], label[TRAINED:]
    logits = net.logits(held).double()

    def nats(log_temperature: float) -> float:
        return float(nn.functional.cross_entropy(logits / math.exp(log_temperature), held_label))

    before = scores(net.probabilities(held), held_label)
    found = scipy.optimize.minimize_scalar(nats, bounds=(-4, 4), method="bounded")
    net.temperature = round(math.exp(found.x), 4)
    tensors, kept = common.load_weights(options.weights)
    common.save_weights(options.weights, tensors, {**kept, "temperature": net.temperature})
    content = common.record(
        f"python -m benchmarks.drsae calibrate --weights {options.weights.name}",
        settings["seed"],
        began,
        temperature=net.temperature,
        validation_before=before,
        validation=scores(net.probabilities(held), held_label),
    )
    print(content["temperature"], content["validation"])
    common.write(options.json, content)


def compare(options: argparse.Namespace) -> None:
    """McNemar's exact test of two evaluations of the same digits."""
    first, second = (json.loads(file.read_text()) for file in (options.first, options.second))
    if first["digits"] != second["digits"]:
        raise ValueError(f"Expected the same digits, {first['digits']} != {second['digits']}.")
    wrong, other = set(first["wrong"]), set(second["wrong"])
    alone = (len(wrong - other), len(other - wrong))
    p = float(scipy.stats.binomtest(alone[0], sum(alone)).pvalue) if sum(alone) else 1.0
    content = {"wrong_in_first_alone": alone[0], "wrong_in_second_alone": alone[1], "p": p}
    print(content)
    common.write(options.json, content)


def analyse(options: argparse.Namespace) -> None:
    began = time.perf_counter()
    net, settings = DrSAE.load(options.weights)
    x, label = digits(data_folder() / "mnist_train.npz")
    units = drsae_analysis.Units(net, x[TRAINED:], label[TRAINED:])
    found = drsae_analysis.measure(units)
    log = options.weights.with_suffix(".json")
    before = json.loads(log.read_text()).get("angles_after_first_phase", []) if log.exists() else []
    drsae_analysis.figures(units, found, options.figures, before)
    command = f"python -m benchmarks.drsae analyse --weights {options.weights.name}"
    common.write(options.json, common.record(command, settings["seed"], began, **found))


def gather(options: argparse.Namespace) -> None:
    """The records of a folder as one, by the names of their files."""
    found = {
        file.stem: json.loads(file.read_text()) for file in sorted(options.runs.glob("*.json"))
    }
    if not found:
        raise FileNotFoundError(f"Expected records, *.json, in {options.runs}, got none.")
    for record in found.values():
        record.pop("wrong", None)
    common.write(options.json, found)


def data_folder() -> Path:
    folder = os.environ.get("PYRO_SPARSE_DATA")
    if not folder:
        raise SystemExit("PYRO_SPARSE_DATA is not set: it names the folder of the data sets")
    return Path(folder) / "mnist"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("train", "feed-forward"):
        sub = commands.add_parser(name)
        sub.add_argument("--units", type=int, default=200)
        sub.add_argument("--epochs", type=int, nargs=2, help="of the first and second phase")
        sub.add_argument("--batch-size", type=int)
        sub.add_argument("--lr", type=float)
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--threads", type=int, default=1)
        if name == "train":
            sub.add_argument("--layers", type=int, default=11)
            sub.add_argument("--full", action="store_true", help="the published schedule")
            sub.add_argument("--weights", type=Path, default=Path("drsae.safetensors"))
            sub.add_argument("--checkpoints", type=Path, help="folder to resume from")
            sub.add_argument("--watch", type=int, default=5, help="epochs between validations")
        else:
            sub.add_argument("--json", type=Path, required=True)
    files = {
        "evaluate": ("weights", "data", "json"),
        "calibrate": ("weights", "json"),
        "compare": ("first", "second", "json"),
        "analyse": ("weights", "figures", "json"),
        "gather": ("runs", "json"),
    }
    run = {
        "evaluate": evaluate, "calibrate": calibrate, "compare": compare, "analyse": analyse,
        "gather": gather,
    }  # fmt: skip
    for name, needed in files.items():
        sub = commands.add_parser(name)
        for file in needed:
            sub.add_argument(f"--{file}", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.command in files:
        return run[options.command](options)
    torch.set_num_threads(options.threads)
    full = getattr(options, "full", False)
    options.epochs = options.epochs or ([100, 400] if full else [8, 28])
    options.batch_size = options.batch_size or (10 if full else 100)
    published = 1e-2 if getattr(options, "layers", 11) == 2 else 5e-3
    options.lr = options.lr or (published if full else 3e-3)
    return train(options) if options.command == "train" else feed_forward(options)


if __name__ == "__main__":
    main()
