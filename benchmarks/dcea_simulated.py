"""DCEA on simulated data: contraction of a shallow autoencoder, and templates from binomial spikes.

    python -m benchmarks.dcea_simulated shallow
    python -m benchmarks.dcea_simulated binomial

``shallow``: one layer, one-sided codes, Gaussian, binomial and Poisson data of equal information;
the dictionary goes down the gradient of fresh minibatches from starts at given distances, and the
figure shows its error: whether it contracts, and from where.

``binomial``: spike counts of repeated trials made by three templates. Learned by the tied
autoencoder of the binomial model, by the same net with untied weights, and by the tied one of a
Gaussian model of the counts. Each runs at several multiples of one universal threshold, and the
table keeps all: the comparison does not hang on a rate chosen for one of them.

Each writes ``benchmarks/results/dcea_<part>.json`` and a figure.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks import common
from pyro_sparse import infer
from pyro_sparse.diagnostics import match_atoms
from pyro_sparse.dictionaries import Conv, Dense
from pyro_sparse.distributions import codes_prior
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.likelihoods import Binomial, Gaussian, Likelihood, Offset, Poisson
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import HardThreshold, Proximal, Unrolled

INFORMATION = 256.0
"""Curvature of every family at a predictor of zero: noise of 1/16 a sample."""
FAMILIES: dict[str, Callable[[], Likelihood]] = {
    "Gaussian": lambda: Gaussian(1 / math.sqrt(INFORMATION)),
    "binomial": lambda: Binomial(int(4 * INFORMATION)),
    "Poisson": lambda: Offset(Poisson(), math.log(INFORMATION)),
}
DISTANCES = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.3)


def start_at(distance: float, truth: Tensor) -> Tensor:
    """Unit atoms, each at the given Euclidean distance of its true one, in a random direction."""
    noise = torch.randn_like(truth)
    away = noise - (noise * truth).sum(-1, keepdim=True) * truth
    cosine = 1 - distance**2 / 2
    across = math.sqrt(1 - cosine**2) * torch.nn.functional.normalize(away, dim=-1)
    return cosine * truth + across


def contraction(family: str, distance: float, steps: int, seed: int) -> list[float]:
    """Mean distance of the atoms from the true ones, before each step."""
    torch.manual_seed(seed)
    num_atoms, features, active = 64, 128, 3
    truth = torch.nn.functional.normalize(torch.randn(num_atoms, features), dim=1)
    likelihood = FAMILIES[family]()
    dictionary = Dense(num_atoms, features, atoms=start_at(distance, truth))
    law = codes_prior(dist.Exponential(1.0), None, (num_atoms,), truth)
    encoder = Unrolled(
        dictionary, likelihood, num_steps=1, step_size=1 / INFORMATION,
        shrinkage=HardThreshold(0.5),
    )  # fmt: skip
    descent = torch.optim.SGD(encoder.parameters(), lr=0.1 / INFORMATION)
    errors = []
    for _ in range(steps):
        places = torch.rand(1000, num_atoms).topk(active, dim=1).indices
        codes = torch.zeros(1000, num_atoms).scatter(1, places, 1 + torch.rand(1000, active))
        y = likelihood(codes @ truth).sample()
        errors.append(float((dictionary.atoms.detach() - truth).norm(dim=1).mean()))
        loss = -likelihood(dictionary(encoder(y, law))).log_prob(y).sum() / len(y)
        descent.zero_grad()
        loss.backward()
        descent.step()
    return errors


def shallow(steps: int, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True, layout="constrained")
    colors = plt.get_cmap("viridis")
    for axis, family in zip(axes, FAMILIES):
        found[family] = {}
        for distance in DISTANCES:
            errors = contraction(family, distance, steps, seed)
            found[family][str(distance)] = {
                "error_every_100_steps": [round(error, 4) for error in errors[::100]],
                "final": round(errors[-1], 4),
                "factor_over_the_first_100": round(errors[100] / errors[0], 3),
            }
            axis.semilogy(errors, color=colors(distance / 1.5), label=f"{distance:g}")
            print(family, distance, found[family][str(distance)], flush=True)
        axis.set(title=family, xlabel="step")
    axes[0].set_ylabel("mean distance of atoms from the true ones")
    figure.legend(*axes[0].get_legend_handles_labels(), title="start", loc="outside right center")
    save(figure, "shallow")
    return {"mean_distance_by_start": found}


TAPS, SAMPLES, TRIALS, GROUPS, EVENTS = 50, 500, 30, 300, 2
BASELINE, AMPLITUDE, START, DEPTH = -1.0, 16.0, 0.4, 100
METHODS = ("tied", "untied", "Gaussian")
"""``tied``, ``untied``: the binomial model; ``Gaussian``: tied, of the counts less their mean."""


def templates() -> Tensor:
    """Three unit templates in 1 ms bins: an onset, a slow inhibition, an oscillation."""
    t = torch.arange(TAPS, dtype=torch.get_default_dtype())
    shapes = [
        t / 3 * (-t / 5).exp(),
        -(t - 25) / 6 * (-(((t - 25) / 6) ** 2) / 2).exp(),
        (2 * math.pi * (t - 25) / 9).cos() * (-(((t - 25) / 9) ** 2) / 2).exp(),
    ]
    return torch.nn.functional.normalize(torch.stack(shapes), dim=1)[:, None]


def counts(truth: Tensor, likelihood: Likelihood, groups: int) -> Tensor:
    """Spike counts over the trials of each group, ``(groups, 1, samples)``."""
    positions = SAMPLES - TAPS + 1
    places = torch.rand(groups, len(truth), positions).topk(EVENTS, dim=2).indices
    codes = torch.zeros(groups, len(truth), positions).scatter(2, places, AMPLITUDE)
    return likelihood(Conv(len(truth), 1, TAPS, atoms=truth)(codes)).sample()


def learn(
    method: str, multiple: float, y: Tensor, start: Tensor, epochs: int, seed: int
) -> tuple[Tensor, float]:
    """Templates learned from ``y``, and the mean number of events found in a group."""
    mean = TRIALS / (1 + math.exp(-BASELINE))
    noise = math.sqrt(mean * (1 - mean / TRIALS))
    # The largest score that noise alone gives among all codes, in spikes.
    universal = math.sqrt(2 * math.log(len(start) * (SAMPLES - TAPS + 1))) * noise
    if method == "Gaussian":
        likelihood: Likelihood = Offset(Gaussian(noise), mean)
        rate = multiple * universal / noise**2
    else:
        likelihood = Offset(Binomial(TRIALS), BASELINE)
        rate = multiple * universal
    prior = dist.Exponential(rate)
    dictionary = Conv(len(start), 1, TAPS, atoms=start)
    make = UnrolledFISTA.untied if method == "untied" else UnrolledFISTA
    guide = make(dictionary, likelihood, prior, num_steps=DEPTH, shrinkage=Proximal())
    infer.fit(
        SparseCoding(dictionary, likelihood, prior), guide, y, batch_size=30, epochs=epochs,
        loss=infer.Reconstruction(), optimizer=functools.partial(torch.optim.Adam, lr=1e-2),
        schedule=functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.7),
        seed=seed, progress=False,
    )  # fmt: skip
    with torch.no_grad():
        events = float((guide.encode(y) > 0).float().sum(dim=(1, 2)).mean())
    return dictionary.atoms.detach(), events


def binomial(epochs: int, seed: int, multiples: tuple[float, ...]) -> dict[str, Any]:
    torch.manual_seed(seed)
    truth = templates()
    y = counts(truth, Offset(Binomial(TRIALS), BASELINE), GROUPS)
    start = start_at(START, truth)
    rows: dict[str, Any] = {"start": {"errors": template_errors(start, truth)}}
    atoms: dict[tuple[str, float], Tensor] = {}
    for method in METHODS:
        for multiple in multiples:
            begun = time.perf_counter()
            atoms[method, multiple], events = learn(method, multiple, y, start, epochs, seed)
            name = f"{method}, {multiple:g} universal thresholds"
            rows[name] = {
                "errors": template_errors(atoms[method, multiple], truth),
                "events_a_group": round(events, 1),
                "seconds": round(time.perf_counter() - begun, 1),
            }
            print(name, rows[name], flush=True)
    best = {
        method: min(
            multiples,
            key=lambda m: sum(rows[f"{method}, {m:g} universal thresholds"]["errors"]),
        )
        for method in METHODS
    }
    draw_templates(truth, start, {method: atoms[method, best[method]] for method in METHODS})
    return {"true_events_a_group": EVENTS * len(truth), "rows": rows, "multiple_shown": best}


def template_errors(atoms: Tensor, truth: Tensor) -> list[float]:
    """sqrt(1 - correlation^2) of each template, at the best shift."""
    correlation = match_atoms(atoms, truth).correlation
    return [round(float(error), 4) for error in (1 - correlation**2).clamp(min=0).sqrt()]


def draw_templates(truth: Tensor, start: Tensor, learned: dict[str, Tensor]) -> None:
    figure, axes = plt.subplots(
        3, len(learned), figsize=(9.5, 6), sharex=True, sharey="row", layout="constrained"
    )
    for column, (method, atoms) in enumerate(learned.items()):
        found = match_atoms(atoms, truth)
        unit = torch.nn.functional.normalize(atoms, dim=2)
        for row in range(len(truth)):
            axis, place = axes[row, column], int(found.match[row])
            shift = int(found.shift[row, 0])
            axis.plot(start[row, 0], color="0.8", label="start")
            axis.plot(truth[row, 0], color="black", label="true")
            axis.plot(
                torch.arange(TAPS) - shift, found.sign[row] * unit[place, 0],
                color="tab:red", label="learned",
            )  # fmt: skip
            error = math.sqrt(max(0.0, 1 - float(found.correlation[row]) ** 2))
            axis.set_title(f"{method}: error {error:.3f}", fontsize=9)
        axes[-1, column].set_xlabel("ms")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    save(figure, "binomial")


def save(figure: Any, part: str) -> None:
    common.RESULTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(common.RESULTS / f"dcea_{part}.png", dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("shallow", "binomial"))
    parser.add_argument("--steps", type=int, default=600, help="of gradient descent (shallow)")
    parser.add_argument("--epochs", type=int, default=6, help="(binomial)")
    parser.add_argument("--multiples", type=float, nargs="+", default=(1.0, 2.0, 4.0))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.perf_counter()
    if options.part == "shallow":
        extra = f"--steps {options.steps}"
        found = shallow(options.steps, options.seed)
    else:
        multiples = tuple(options.multiples)
        extra = f"--epochs {options.epochs} --multiples {' '.join(f'{m:g}' for m in multiples)}"
        found = binomial(options.epochs, options.seed, multiples)
    command = f"python -m benchmarks.dcea_simulated {options.part} {extra} --seed {options.seed}"
    content = common.record(command, options.seed, begun, **found)
    common.write(common.RESULTS / f"dcea_{options.part}.json", content)


if __name__ == "__main__":
    main()
