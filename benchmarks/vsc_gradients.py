"""Bias and signal-to-noise of gradient estimators and objectives on trained garment networks.

    PYRO_SPARSE_DATA=FOLDER python -m benchmarks.vsc_gradients --out FOLDER

Two trained methods of `benchmarks.vsc`, one with the fixed threshold over a normal base and one
with free gates, each on 16 held-out garments, batch normalisation at its running averages. The
estimators are those of `benchmarks.estimators` but for three: local expectation, which decodes once
for every code, and two that stand for others there. ``objective`` is what training follows: the
best of five draws, the KL of the base.

``relative bias`` is the distance of the mean gradient from the reference over the length of the
latter; ``of noise alone`` is what an unbiased estimator would show on average with so many draws,
noise of the reference included. The reference is the ELBO's gradient by implicit mixed draws, an
unbiased estimate, with a seed of its own. ``median snr`` is ``|mean| / sd`` of one step, the median
over parameters, and says nothing about bias; the published average over parameters would be that
of the few whose gradient is of the KL and nearly without noise.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import common, vsc_images
from benchmarks.estimators import ESTIMATORS
from benchmarks.vsc_store import folder_of, restore
from pyro_sparse.infer import BestOf, Concrete, ImplicitMixed, SparseELBO, StraightThrough

GARMENTS, STEPS, REFERENCE_STEPS, REFERENCE_DRAWS = 16, 80, 60, 16
SKIPPED = ("local expectation", "leave-one-out, J=1", "  never changing over")
METHODS_SHOWN = ("threshold-gaussian-max-of-5", "implicit-gaussian")


def objectives(kind: str) -> dict[str, SparseELBO]:
    """By name: the estimators that suit a law, and what was trained, with their own draws."""
    found = {}
    for name, (estimator, draws) in ESTIMATORS.items():
        name = {"  as released": "straight-through as released"}.get(name, name)
        if name not in SKIPPED and (kind == "threshold" or "straight" not in name):
            found[name] = elbo(estimator, draws)
    if kind == "threshold":
        found["straight-through, J=5"] = elbo(StraightThrough(), 5)
        released = StraightThrough(as_released=True)
        found["objective: as released, best of 5"] = elbo(
            released, 5, bound=BestOf(as_published=True), base_kl=True
        )
        found["as released, mean of 5, KL of base"] = elbo(released, 5, base_kl=True)
    else:
        found["Concrete, hard, T=0.5"] = elbo(Concrete(), 1)
        found["Concrete, soft, T=0.5"] = elbo(Concrete(hard=False), 1)
    return found


def elbo(estimator: Any, draws: int, **options: Any) -> SparseELBO:
    return SparseELBO(estimator, num_samples=draws, num_plates=1, **options)


class Moments(NamedTuple):
    """Mean and variance of every parameter's gradient over steps."""

    mean: Tensor
    variance: Tensor
    steps: int


def slopes(
    objective: SparseELBO, model: Any, guide: Any, y: Tensor, steps: int
) -> dict[str, Moments]:
    """Gradients of the objective, nats a datum, of encoder and decoder."""
    parts = {"encoder": list(guide.parameters()), "decoder": list(model.parameters())}
    found = {}
    sums = {name: [torch.zeros((), dtype=torch.float64)] * 2 for name in parts}
    for _ in range(steps):
        loss = objective.differentiable_loss(model, guide, y) / len(y)
        both = [p for part in parts.values() for p in part]
        given = iter(torch.autograd.grad(loss, both, allow_unused=True))
        for name, part in parts.items():
            pairs = [(p, next(given)) for p in part]
            flat = [(torch.zeros_like(p) if g is None else -g).flatten() for p, g in pairs]
            step = torch.cat(flat).double()
            sums[name] = [sums[name][0] + step, sums[name][1] + step.square()]
    for name, (first, second) in sums.items():
        mean = first / steps
        variance = ((second - steps * mean.square()) / (steps - 1)).clamp(min=0)
        found[name] = Moments(mean, variance, steps)
    return found


def judged(own: Moments, reference: Moments) -> dict[str, float]:
    """Bias, noise and their ratio beside a reference."""
    mean, truth = own.mean, reference.mean
    size = truth.norm()
    variance = own.variance
    floor = (variance.sum() / own.steps + reference.variance.sum() / reference.steps).sqrt()
    return {
        "relative_bias": round(float((mean - truth).norm() / size), 3),
        "of_noise_alone": round(float(floor / size), 3),
        "relative_sd": round(float(variance.sum().sqrt() / size), 2),
        "median_snr": round(float((mean.abs() / (variance.sqrt() + 1e-9)).median()), 4),
    }


def study(
    made: dict[str, SparseELBO], model: Any, guide: Any, y: Tensor, *, steps: int,
    reference_steps: int, reference_draws: int,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """A row for each objective."""
    torch.manual_seed(1)
    truth = slopes(elbo(ImplicitMixed(), reference_draws), model, guide, y, reference_steps)
    rows = {}
    for name, objective in made.items():
        torch.manual_seed(0)
        begun = time.process_time()
        own = slopes(objective, model, guide, y, steps)
        taken = (time.process_time() - begun) / steps
        row = {part: judged(own[part], truth[part]) for part in own}
        rows[name] = {**row, "milliseconds_of_a_step": round(1e3 * taken, 1)}
        print(f"{name:40s}", rows[name], flush=True)
    return rows


def run(options: argparse.Namespace) -> dict[str, Any]:
    begun = time.perf_counter()
    y = vsc_images.garments(folder_of(options.data), "test")[:GARMENTS]
    found = {}
    for name in METHODS_SHOWN:
        _, _, model, guide, settings = restore(options.out / f"fashion-{name}-0.safetensors")
        kind = "threshold" if name.startswith("threshold") else "gates"
        print(name)
        found[f"{name}, after {settings['steps']} steps"] = study(
            objectives(kind), model, guide, y, steps=options.steps,
            reference_steps=options.reference_steps, reference_draws=REFERENCE_DRAWS,
        )  # fmt: skip
    content = common.record(
        "python -m benchmarks.vsc_gradients --out FOLDER", 0, begun, garments=len(y),
        steps=options.steps, reference_steps=options.reference_steps,
        reference_draws=REFERENCE_DRAWS, **found,
    )  # fmt: skip
    common.write(common.RESULTS / "vsc_fashion_gradients.json", content)
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("vsc"), help="folder of trained methods")
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--reference-steps", type=int, default=REFERENCE_STEPS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run(options)


if __name__ == "__main__":
    main()
