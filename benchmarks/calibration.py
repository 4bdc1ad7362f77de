"""How well calibrated are amortised posteriors, on data that the model makes itself?

    python -m benchmarks.calibration [--json FILE] [--out FOLDER] [--quick]

Twelve codes of which each is active with a probability of 0.2, 16 features, a signal-to-noise ratio
of 10 dB, the dictionary known. An unrolled, thresholded guide is trained as a factorised law and as
one with dependent codes, on 10 000 data; then simulation-based calibration on fresh ones says how
often nominal 90 % intervals of active codes hold the truth, by how much P(active) is off, and how
far the bound is from the exact log evidence, known by enumeration. The exact posterior goes through
the same mill. Nothing was chosen by these figures.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import pyro
import pyro.distributions as dist
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from benchmarks import common
from pyro_sparse import infer
from pyro_sparse.diagnostics import (
    SBC,
    amortisation_gap,
    khat,
    plot_rank_ecdf,
    plot_reliability,
    sbc,
)
from pyro_sparse.dictionaries import Dense
from pyro_sparse.distributions import SpikeAndSlab
from pyro_sparse.guides import StructuredThresholded, Thresholded, UnrolledEncoder
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import Unrolled

ATOMS, FEATURES, PROBS = 12, 16, 0.2
NOISE = (ATOMS * PROBS / FEATURES / 10) ** 0.5  # 10 dB for unit-norm atoms and slabs of size 1
DEPTH = 15


def problem(seed: int) -> tuple[Dense, SpikeAndSlab, Gaussian, SparseCoding]:
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.randn(ATOMS, FEATURES, generator=generator)
    dictionary = Dense(ATOMS, FEATURES, atoms=atoms)
    dictionary.freeze_()
    prior, noise = SpikeAndSlab(dist.Normal(0.0, 1.0), probs=PROBS), Gaussian(NOISE)
    return dictionary, prior, noise, SparseCoding(dictionary, noise, prior)


def exact_guide(dictionary: Dense, prior: SpikeAndSlab, noise: Gaussian) -> Callable[..., None]:
    last: list[Any] = [None, None]

    def guide(y: Tensor, num_data: int) -> None:
        if last[0] is not y:
            last[:] = y, infer.enumerate_posterior(y, dictionary, prior, noise)
        with pyro.plate("data", len(y)):
            pyro.sample("codes", last[1])

    return guide


def train(kind: str, model: SparseCoding, y: Tensor, epochs: int, seed: int) -> Any:
    dictionary, noise = model.dictionary, model.likelihood
    unrolled = Unrolled(dictionary, noise, num_steps=DEPTH)
    encoder = UnrolledEncoder(unrolled, dist.Laplace(0.0, 0.3), init_probs=PROBS)
    if kind == "factorised":
        guide: Any = Thresholded(encoder)
        objective = infer.SparseELBO()
    else:
        gram = (dictionary.atoms @ dictionary.atoms.T).detach()
        guide = StructuredThresholded(encoder, couplings=gram)
        objective = infer.SparseELBO(infer.LeaveOneOut(), num_samples=4)
    adam = functools.partial(torch.optim.Adam, lr=3e-3)
    options: dict[str, Any] = {"optimizer": adam, "loss": objective, "batch_size": 100}
    infer.fit(model, guide, y, epochs=epochs, seed=seed, progress=False, **options)
    return guide


def figures(found: SBC) -> dict[str, Any]:
    codes = found.sites["codes"]
    coverage = {
        f"{level:g}": [round(value, 4) for value in codes.coverage(level, active=True)[1:3]]
        for level in (0.5, 0.8, 0.9, 0.95)
    }
    curve = codes.reliability()
    return {
        "coverage_of_active": coverage,
        "ece": round(curve.ece, 5),
        "ece_se": round(curve.ece_se, 5),
        "ece_of_noise": round(curve.ece_of_noise, 5),
        "pairs": int(curve.count.sum()),
        "p_value": found.p_value,
    }


def run(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, SBC]]:
    torch.manual_seed(args.seed)
    dictionary, prior, noise, model = problem(args.seed)
    with torch.no_grad():
        y, test = model(num_data=args.data), model(num_data=args.simulations // 5)
    evidence = infer.enumerate_posterior(test, dictionary, prior, noise).log_evidence
    results: dict[str, Any] = {}
    kept = {}
    for kind in ("exact", "factorised", "structured"):
        begun = time.perf_counter()
        if kind == "exact":
            guide: Any = exact_guide(dictionary, prior, noise)
        else:
            guide = train(kind, model, y, args.epochs, args.seed)
        trained = time.perf_counter() - begun
        kept[kind] = sbc(
            model,
            guide,
            test,
            num_simulations=args.simulations,
            num_samples=args.samples,
            seed=args.seed + 1,
            progress=False,
        )
        print(kind, kept[kind], flush=True)
        results[kind] = {"train_seconds": round(trained, 1), **figures(kept[kind])}
        if kind != "exact":
            gap = amortisation_gap(
                model, guide, test, log_evidence=evidence, num_steps=args.steps, num_samples=100
            )
            print(gap, flush=True)
            results[kind]["gap"] = round(float((evidence - gap.bound).mean()), 4)
            results[kind]["amortisation_gap"] = round(float(gap.amortisation.mean()), 4)
            weights = infer.log_weights(model, guide, test, num_samples=1000, keep_draws=False)
            results[kind]["median_khat"] = round(float(khat(weights).median()), 3)
    return results, kept


def draw(kept: dict[str, SBC], folder: Path) -> None:
    figure, axes = plt.subplots(2, len(kept), figsize=(4 * len(kept), 7), layout="constrained")
    for (kind, found), (above, below) in zip(kept.items(), axes.T):
        codes = found.sites["codes"]
        plot_rank_ecdf(codes, active=True, ax=above).set_title(f"{kind}: ranks of active codes")
        plot_reliability(codes.reliability(), ax=below)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "calibration.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tenth of it, in seconds")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.data, args.epochs, args.simulations = (
        (10_000, 20, 1000) if not args.quick else (500, 2, 100)
    )
    args.samples, args.steps = (200, 300) if not args.quick else (50, 20)
    torch.set_num_threads(1)
    begun = time.perf_counter()
    results, kept = run(args)
    if args.out:
        draw(kept, args.out)
    if args.json:
        command = "python -m benchmarks.calibration" + (" --quick" if args.quick else "")
        settings = {"atoms": ATOMS, "features": FEATURES, "probs": PROBS, "noise": round(NOISE, 5)}
        content = common.record(command, args.seed, begun, settings=settings, results=results)
        common.write(args.json, content)


if __name__ == "__main__":
    main()
