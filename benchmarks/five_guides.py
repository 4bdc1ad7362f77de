"""The guides of the five systems on one data set, at an equal number of active codes.

    python -m benchmarks.five_guides [--json FILE] [--out FOLDER] [--quick]

Data come from a spike-and-slab model: 40 atoms in 32 dimensions, each code active with a
probability of 0.1 and then normal, a signal-to-noise ratio of 10 dB. Every guide learns the
dictionary as well, from the same random start, on the same data in the same order, for the same
number of passes:

- CRsAE: tied weights, back-propagation of the reconstruction error through 15 layers;
- DrSAE: the recurrent encoder, 11 layers of free weights, on reconstruction and penalty;
- DCEA: free analysis, synthesis and decoder, a free bias for each atom, 15 layers, the same;
- PUDLE: tied weights, the implicit gradient of the reconstruction error at 100 layers;
- VSC: a spike-and-slab posterior on 15 unrolled layers, the exact objective.

The first four are points. The rate of their penalty is searched for on validation data, by secants,
until as many codes are active as VSC expects; learning rates are the best of three there, by
reconstruction for points and by the bound for VSC. Then, on fresh test data and for three seeds:
active codes; median correlation of true atoms with their matches; squared error of the codes of
matched atoms over that of zero; error of P(active) against the truth, which for a point is 0 or 1;
the bound of the guide itself (a point has none), and the bound that coordinate ascent reaches on
the guide's dictionary with the true prior, which is a yardstick for all; processor seconds to
train, and microseconds to encode a datum in batches of 1000 on one thread.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import pyro.distributions as dist
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from benchmarks import common
from pyro_sparse import infer, solvers
from pyro_sparse.diagnostics import match_atoms, reliability
from pyro_sparse.dictionaries import Dense
from pyro_sparse.distributions import SpikeAndSlab
from pyro_sparse.guides import Thresholded, UnrolledEncoder, UnrolledFISTA
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding

ATOMS, FEATURES, PROBS = 40, 32, 0.1
NOISE = (ATOMS * PROBS / FEATURES / 10) ** 0.5
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
RATE = 20.0
"""Rate of the Laplace prior where the search begins, 1 / code units."""
CLOSE = 0.02
"""Relative difference of active codes at which the search ends."""
TRIALS = 8


@dataclass(frozen=True)
class System:
    """How a guide is made from a dictionary and a rate, and what it is trained on."""

    guide: Callable[[Dense, float], Any]
    objective: Callable[[], Any]
    point: bool = True


def _tied(dictionary: Dense, rate: float, steps: int) -> UnrolledFISTA:
    prior = dist.Laplace(0.0, 1 / rate)
    return UnrolledFISTA(
        dictionary, Gaussian(NOISE), prior, num_steps=steps, method=solvers.FISTA(),
        shrinkage=solvers.Proximal(),
    )  # fmt: skip


def _free(dictionary: Dense, rate: float) -> UnrolledFISTA:
    step = float(NOISE**2 / dictionary.squared_norm())
    return UnrolledFISTA.untied(
        dictionary, Gaussian(NOISE), dist.Laplace(0.0, 1 / rate), num_steps=15,
        method=solvers.FISTA(), step_size=step,
        shrinkage=solvers.Bias(torch.full((ATOMS,), step * rate), two_sided=True),
    )  # fmt: skip


def _recurrent(dictionary: Dense, rate: float) -> UnrolledFISTA:
    return UnrolledFISTA.recurrent(
        dictionary, Gaussian(NOISE), dist.Laplace(0.0, 1 / rate), num_steps=11
    )


def _thresholded(dictionary: Dense, rate: float) -> Thresholded:
    unrolled = solvers.Unrolled(dictionary, Gaussian(NOISE), num_steps=15)
    encoder = UnrolledEncoder(unrolled, dist.Laplace(0.0, 0.3), init_probs=PROBS)
    return Thresholded(encoder)


SYSTEMS = {
    "CRsAE": System(lambda d, r: _tied(d, r, 15), infer.Reconstruction),
    "DrSAE": System(_recurrent, infer.SparseELBO),
    "DCEA": System(_free, infer.SparseELBO),
    "PUDLE": System(
        lambda d, r: _tied(d, r, 100),
        lambda: infer.Differentiated(infer.Reconstruction(), solvers.Implicit()),
    ),
    "VSC": System(_thresholded, infer.SparseELBO, point=False),
}


def truth(seed: int) -> SparseCoding:
    """The model that makes the data."""
    atoms = torch.randn(ATOMS, FEATURES, generator=torch.Generator().manual_seed(1000 + seed))
    dictionary = Dense(ATOMS, FEATURES, atoms=atoms)
    dictionary.freeze_()
    return SparseCoding(dictionary, Gaussian(NOISE), SpikeAndSlab(dist.Normal(0.0, 1.0), PROBS))


def draw(model: SparseCoding, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Data and their codes."""
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(count, ATOMS, generator=generator) < PROBS
    codes = active * torch.randn(count, ATOMS, generator=generator)
    noise = NOISE * torch.randn(count, FEATURES, generator=generator)
    with torch.no_grad():
        return model.dictionary(codes) + noise, codes


def train(
    system: System, y: Tensor, *, rate: float, learning_rate: float, epochs: int, seed: int
) -> tuple[SparseCoding, Any, float]:
    """Model, guide and the processor seconds that training took."""
    torch.manual_seed(seed)
    dictionary = Dense(ATOMS, FEATURES, atoms=torch.randn(ATOMS, FEATURES))
    prior = dist.Laplace(0.0, 1 / rate) if system.point else truth(0).prior
    model = SparseCoding(dictionary, Gaussian(NOISE), prior)
    guide = system.guide(dictionary, rate)
    begun = time.process_time()
    infer.fit(
        model, guide, y, loss=system.objective(), epochs=epochs, batch_size=100, seed=seed,
        optimizer=functools.partial(torch.optim.Adam, lr=learning_rate), progress=False,
        schedule=functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs),
    )  # fmt: skip
    return model, guide, time.process_time() - begun


@torch.no_grad()
def codes_of(system: System, guide: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (posterior means) and probabilities that they are active."""
    if system.point:
        codes = guide.encode(y)
        return codes, (codes != 0).to(y)
    law = guide.posterior(y)
    return law.mean, law.prob_active


def expected_active(system: System, guide: Any, y: Tensor) -> float:
    return float(codes_of(system, guide, y)[1].sum(1).mean())


def equal_rate(
    fit: Callable[[float], Any], active: Callable[[Any], float], target: float
) -> tuple[float, list[list[float]]]:
    """Rate at which so many codes are active, and the trials: secants in the logarithms."""
    tried: list[list[float]] = []
    rate = RATE
    for _ in range(TRIALS):
        found = active(fit(rate))
        tried.append([round(rate, 4), round(found, 4)])
        if abs(found / target - 1) < CLOSE:
            break
        slope = -1.0
        if len(tried) > 1 and tried[-1][1] > 0 and tried[-2][1] > 0:
            (r0, n0), (r1, n1) = tried[-2:]
            if r0 != r1 and n0 != n1:
                slope = min(math.log(n1 / n0) / math.log(r1 / r0), -0.2)
        change = math.log(target / max(found, 1e-2)) / slope
        rate *= math.exp(max(-1.5, min(1.5, change)))
    best = min(tried, key=lambda pair: abs(pair[1] - target))
    return best[0], tried


def validated(system: System, model: SparseCoding, guide: Any, y: Tensor) -> float:
    """Larger is better: the bound, or minus the squared error of the reconstruction."""
    with torch.no_grad():
        if not system.point:
            return -float(infer.SparseELBO()(model, guide)(y, len(y))) / len(y)
        return -float((model.dictionary(guide.encode(y)) - y).square().mean())


def measured(
    system: System, made: SparseCoding, model: SparseCoding, guide: Any, y: Tensor, codes: Tensor
) -> dict[str, Any]:
    mean, probs = codes_of(system, guide, y)
    found = match_atoms(model.dictionary.atoms.detach(), made.dictionary.atoms)
    matched = mean[:, found.match] * found.sign
    curve = reliability(probs[:, found.match], codes != 0)
    # In nats a datum; bounds are compared to a hundredth.
    free = solvers.coordinate_ascent(
        y[:2000], model.dictionary, made.prior, Gaussian(NOISE), tol=1e-4
    )
    encode = guide.encode if system.point else guide.posterior
    with torch.no_grad():
        encode(y[:1000])
        begun = time.perf_counter()
        for _ in range(10):
            encode(y[:1000])
        seconds = (time.perf_counter() - begun) / 10
    return {
        "active_codes": float(probs.sum(1).mean()),
        "atom_correlation": float(found.correlation.median()),
        "atoms_found": int((found.correlation > 0.95).sum()),
        "code_error": float((matched - codes).square().sum() / codes.square().sum()),
        "ece": curve.ece,
        "brier": float((probs[:, found.match] - (codes != 0).to(y)).square().mean()),
        "own_bound": None if system.point else validated(system, model, guide, y),
        "bound_of_dictionary": float(free.elbo.mean()),
        "microseconds_a_datum": 1e3 * seconds,
    }


def spread(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds."""
    found: dict[str, Any] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if values[0] is None:
            found[name] = None
        elif len(values) == 1:
            found[name] = round(values[0], 4)
        else:
            found[name] = [round(statistics.mean(values), 4), round(statistics.stdev(values), 4)]
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    made = truth(0)
    y, _ = draw(made, options.data, 1)
    held, _ = draw(made, options.held, 2)
    results: dict[str, Any] = {}
    target = math.nan
    for name in ("VSC", "CRsAE", "DrSAE", "DCEA", "PUDLE"):
        system = SYSTEMS[name]
        fit = functools.partial(train, system, y, epochs=options.epochs, seed=0)
        # Learning rates at the starting rate first; then the rate at the best of them.
        scores = {
            lr: validated(system, *fit(rate=RATE, learning_rate=lr)[:2], held)
            for lr in LEARNING_RATES
        }
        best = max(scores, key=lambda lr: scores[lr])
        rate, tried = RATE, []
        if system.point:
            rate, tried = equal_rate(
                lambda r, fit=fit, best=best: fit(rate=r, learning_rate=best),
                lambda found, system=system: expected_active(system, found[1], held),
                target,
            )
        rows = []
        for seed in range(options.seeds):
            own = truth(seed)
            data, _ = draw(own, options.data, 10 * seed + 1)
            test, codes = draw(own, options.held, 10 * seed + 3)
            model, guide, seconds = train(
                system, data, rate=rate, learning_rate=best, epochs=options.epochs, seed=seed
            )
            row = measured(system, own, model, guide, test, codes)
            rows.append({**row, "training_seconds": seconds})
            if name == "VSC" and seed == 0:
                target = expected_active(system, guide, held)
        parameters = {id(p): p.numel() for m in (model, guide) for p in m.parameters()}
        results[name] = {
            **spread(rows),
            "parameters": sum(parameters.values()),
            "learning_rate": best,
            "rate": None if not system.point else rate,
            "rates_tried": {str(r): n for r, n in tried},
        }
        print(name, results[name], flush=True)
    return results


def figure(results: dict[str, Any], file: Path) -> None:
    """Code error and error of P(active) of every guide."""
    shown = (
        ("code_error", "squared error of codes / that of zero"),
        ("ece", "calibration error of P(active)"),
        ("bound_of_dictionary", "bound of the dictionary, nats a datum"),
    )
    names = list(results)
    fig, axes = plt.subplots(1, len(shown), figsize=(11, 3.2), layout="constrained")
    for axis, (key, label) in zip(axes, shown, strict=True):
        values = [results[name][key] for name in names]
        pairs = [value if isinstance(value, list) else [value, 0.0] for value in values]
        axis.errorbar([p[0] for p in pairs], range(len(names)), xerr=[p[1] for p in pairs], fmt="o")
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlabel(label, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        if key != "bound_of_dictionary":
            axis.set_xlim(left=0)
    file.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(file, dpi=100)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="little data, one seed")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.data, options.held, options.epochs, options.seeds = (
        (10_000, 5000, 30, 3) if not options.quick else (300, 50, 2, 1)
    )
    torch.set_num_threads(options.threads)
    begun = time.perf_counter()
    results = run(options)
    if options.out:
        figure(results, options.out / "five_guides.png")
    if options.json:
        command = "python -m benchmarks.five_guides" + (" --quick" if options.quick else "")
        settings = {
            "atoms": ATOMS, "features": FEATURES, "probs": PROBS, "noise": round(NOISE, 5),
            "data": options.data, "epochs": options.epochs, "seeds": options.seeds,
        }  # fmt: skip
        common.write(
            options.json, common.record(command, 0, begun, settings=settings, guides=results)
        )


if __name__ == "__main__":
    main()
