"""Variational sparse coding: the published thresholded posteriors beside the exact objective.

    PYRO_SPARSE_DATA=FOLDER python -m benchmarks.vsc train linear|fashion|faces [--out FOLDER]
    python -m benchmarks.vsc train celeba --data FOLDER [--out FOLDER]
    python -m benchmarks.vsc table linear|fashion|faces|celeba --out FOLDER
    python -m benchmarks.vsc evaluate --weights F --images X.npz --json OUT

``linear``: whitened 16x16 patches of photographs, 256 atoms of free norm, noise variance 1.28, an
unrolled encoder on the model's atoms for every method. ``fashion``: garments, the published
convolutional decoder and a smaller encoder, 64 codes, noise variance 3.92. ``celeba``: the
published networks, 512 codes, noise variance 6.144, from a folder of the user's (never run here).
``faces`` stands in for it: 240 gray Olivetti faces, mirrored and shifted, the same layers of half
as many channels (decoder) and a fifth (encoder), the smallest published number of codes, 64, and
noise variance 2.048. That is the published weight of the KL, 1e-3, for a third as many numbers; a
colour picture of three equal channels has the same objective.

Prior inclusion is 10 % throughout. Every method trains for about equal processor time, one thread
(``--seconds``; the number of steps follows from a short calibration and is recorded: ``--steps``
repeats a run), with Adam on a one-cycle schedule; learning rates were chosen on validation patches
(those of the convolutional networks were tried once, not compared). ``--full`` is the published
length, 300 epochs.

Measured on held-out pictures, from 100 draws for each: the importance-weighted bound with true
mixed log-weights, squared error of single draws, of the best of 20, and of the posterior mean,
active codes, used and collapsed codes, and the Jaccard index of the supports of repeated draws.
Standard errors are over photographs, not patches. A trained method is a file of its own in
``--out``; what is there is not trained again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from benchmarks import common, vsc_images, vsc_report
from benchmarks.vsc_measures import measure
from benchmarks.vsc_methods import METHODS
from benchmarks.vsc_settings import SETTINGS, Setting, programs
from benchmarks.vsc_store import data_of, held, restore, store
from pyro_sparse import infer

SECONDS = {"linear": 25.0, "fashion": 40.0, "faces": 60.0, "celeba": 3600.0}
EPOCHS_FULL = 300
REFERENCE = {kind: "implicit-gaussian" for kind in SETTINGS} | {"linear": "exact-gaussian"}
WEIGHTS = {kind: Path(f"benchmarks/weights/vsc-{kind}.safetensors") for kind in SETTINGS} | {
    "linear": Path("benchmarks/weights/vsc-linear-exact.safetensors")
}


class Clock(infer.Callback):
    """Processor seconds at every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def after_step(self, progress: infer.Progress) -> None:
        self.seconds.append(time.process_time())


def fit(
    setting: Setting,
    name: str,
    y: Any,
    *,
    steps: int,
    batch: int,
    seed: int,
    epochs: int | None = None,
    checkpoints: infer.Checkpoints | None = None,
) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Train for so many steps: as few passes as cover them, over as many data as fill them."""
    method = METHODS[name]
    torch.manual_seed(seed)
    model, guide = programs(setting, method)
    passes = epochs or max(1, -(-steps * batch // len(y)))
    count = min(batch * (steps // passes), len(y))
    data = Subset(y, range(count)) if isinstance(y, Dataset) else y[:count]
    elbo, callbacks, wrap = method.objective(steps)
    rates = setting.rates(name)

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        own = {id(p) for p in model.parameters()}
        groups = [
            {"params": [p for p in parameters if (id(p) in own) == generative], "lr": rate}
            for generative, rate in ((True, rates[1]), (False, rates[0]))
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.Adam(groups, betas=setting.betas, weight_decay=setting.decay(name))

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=passes * (len(data) // batch) + 1,
            pct_start=0.05,
            cycle_momentum=False,
        )

    clock = Clock()
    update = infer.Update(loss=elbo, optimizer=optimizer, schedule=schedule, schedule_per_step=True)
    begun = time.process_time(), time.perf_counter()
    history = infer.fit(
        wrap(model), guide, data, phases=[infer.Phase(passes, [update])], batch_size=batch,
        seed=seed, callbacks=[*callbacks, clock], checkpoints=checkpoints, progress=False,
        guard=infer.RollBack(),
    )  # fmt: skip
    found = {
        "steps": len(history.step_loss),
        "passes": passes,
        "training_data": len(data),
        "processor_seconds": round(time.process_time() - begun[0], 1),
        "wall_seconds": round(time.perf_counter() - begun[1], 1),
        "rates": {"encoder": rates[0], "decoder": rates[1]},
        "loss_first_and_last": [round(float(history.epoch_loss[i]), 3) for i in (0, -1)],
        "seconds_of_a_step": _median_step(clock.seconds),
    }
    return model, guide, found


def _median_step(seconds: list[float]) -> float:
    taken = torch.tensor(seconds).diff() if len(seconds) > 1 else torch.zeros(1)
    return float(taken.double().mean() if len(taken) < 20 else taken[5:].double().mean())


def calibrate(setting: Setting, name: str, y: Any, batch: int, seconds: float) -> int:
    """Steps that fit into so many processor seconds."""
    found = fit(setting, name, y, steps=30, batch=batch, seed=0)[2]
    return max(int(seconds / found["seconds_of_a_step"]), 20)


def train(options: argparse.Namespace) -> None:
    setting = Setting.of(options.kind)
    torch.manual_seed(0)
    y, scale, _ = data_of(options.kind, "train", None, options.data)
    names = options.method or setting.methods
    for name in names:
        file = options.out / f"{options.kind}-{name}-{options.seed}.safetensors"
        if file.exists():
            continue
        batch = setting.batch
        steps, epochs, checkpoints = options.steps, None, None
        if options.full:
            epochs, steps = EPOCHS_FULL, EPOCHS_FULL * (len(y) // batch)
            checkpoints = infer.Checkpoints(file.with_suffix(""), every=1000, keep=2)
        elif steps is None:
            seconds = options.seconds or SECONDS[options.kind]
            steps = calibrate(setting, name, y, batch, seconds)
        model, guide, found = fit(
            setting, name, y, steps=steps, batch=batch, seed=options.seed, epochs=epochs,
            checkpoints=checkpoints,
        )  # fmt: skip
        settings = {
            "kind": options.kind, "method": name, "seed": options.seed, "scale": scale,
            "storage": "float16", **found,
        }  # fmt: skip
        store(file, model, guide, settings)
        tested(file, "validation" if options.validate else "test", options.part, options.data)


def tested(file: Path, part: str, count: int | None, folder: Path | None = None) -> dict[str, Any]:
    """Measure a stored method on held-out data and write what was found beside it."""
    setting, name, model, guide, settings = restore(file)
    y, _, together = data_of(settings["kind"], part, settings["scale"], folder)
    y = whole(held(y, count), together)
    begun = time.perf_counter()
    found = measure(setting, METHODS[name], model, guide, y, together)
    seconds = round(time.perf_counter() - begun, 1)
    found = {**settings, "part": part, "data": len(y), "measuring_seconds": seconds, **found}
    common.write(file.with_suffix(f".{part}.json"), found)
    shown = {key: value for key, value in found.items() if key not in ("by_picture", "used")}
    print(json.dumps(shown), flush=True)
    return found


def whole(y: Tensor, together: int) -> Tensor:
    """Data without those at the end that are too few for a group of their own."""
    if len(y) < together:
        raise ValueError(f"Expected at least {together} data to measure, got {len(y)}.")
    return y[: len(y) // together * together]


def evaluate(options: argparse.Namespace) -> None:
    begun = time.perf_counter()
    setting, name, model, guide, settings = restore(options.weights)
    images = vsc_images.images_of(options.images)
    if settings["kind"] == "linear":
        whitened = [vsc_images.whiten(image) for image in images]
        y, together = (
            vsc_images.cut(whitened, options.patches, 2) / settings["scale"],
            options.patches,
        )
    else:
        y, together = images.flatten(1), 1
        if y.shape[1] != setting.features:
            raise ValueError(f"Expected pictures of {setting.shape}, got {tuple(images.shape[1:])}")
    found = measure(setting, METHODS[name], model, guide, y, together)
    command = f"python -m benchmarks.vsc evaluate --weights {options.weights.name}"
    content = common.record(command, 0, begun, training=settings, data=len(y), **found)
    common.write(options.json, content)
    print(json.dumps(content["bound"], indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train")
    training.set_defaults(run=train)
    training.add_argument("kind", choices=tuple(SETTINGS))
    training.add_argument("--method", action="append", choices=tuple(METHODS), help="default: all")
    training.add_argument(
        "--data", type=Path, help="folder of the data sets, of CelebA's files for celeba"
    )
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--seconds", type=float, help="processor seconds of each method")
    training.add_argument("--steps", type=int, help="in place of --seconds")
    training.add_argument("--full", action="store_true", help="300 epochs, with checkpoints")
    training.add_argument("--out", type=Path, default=Path("vsc"), help="folder of trained methods")
    training.add_argument("--validate", action="store_true", help="measure on validation data")
    training.add_argument("--part", type=int, help="measure so many data, not all")
    table = commands.add_parser("table")
    table.set_defaults(
        run=lambda o: vsc_report.table(
            o.out, o.kind, REFERENCE[o.kind], WEIGHTS[o.kind], label=o.label
        )
    )
    table.add_argument("kind", choices=tuple(SETTINGS))
    table.add_argument("--out", type=Path, default=Path("vsc"))
    table.add_argument("--label", default="", help="end of the names of record and picture")
    evaluating = commands.add_parser("evaluate")
    evaluating.set_defaults(run=evaluate)
    evaluating.add_argument("--weights", type=Path, required=True)
    evaluating.add_argument("--images", type=Path, required=True)
    evaluating.add_argument("--json", type=Path, required=True)
    evaluating.add_argument("--patches", type=int, default=40, help="of each picture")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.run(options)


if __name__ == "__main__":
    main()
