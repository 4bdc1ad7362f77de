"""Spikes of thalamic neurons while a whisker is moved: templates of the response, by binomial DCEA.

    python -m benchmarks.dcea_counts whisker --data FOLDER/whisker/whisker.npz [--out FOLDER]

Spikes of a unit at a millisecond, over trials of the same stimulus, are binomial; their log-odds
are a baseline plus a sum of templates, convolved with sparse non-negative codes. Templates move by
the likelihood through an unrolled encoder, the rates of the codes' prior by its M-step. The first
30 of 40 trials are fitted; the hyperprior of the rates is chosen on the last 10 of these.

Beside it a generalised linear model (logistic regression) of displacement and velocity of the
whisker at lags up to 100 ms and of the unit's own spikes in the last 100 ms, and each half of the
two combined. How good a fit is, in the fitted trials and in the last 10: the Kolmogorov-Smirnov
distance of rescaled intervals between spikes from the uniform law, corrected for the width of the
bins, with the distance that a true model stays below in 95 of 100 cases, and bits per spike above
a constant rate.

References: Tolooshams, Song, Temereanca & Ba (2020), ICML, PMLR 119:9493-9503; time rescaling:
Brown, Barbieri, Ventura, Kass & Frank (2002), Neural Comput. 14(2); in bins: Haslinger, Pipa &
Brown (2010), Neural Comput. 22(10).
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pyro.distributions as dist
import torch
from matplotlib import pyplot as plt
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from benchmarks import common
from pyro_sparse import infer
from pyro_sparse.dictionaries import Conv
from pyro_sparse.distributions import Rate
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.likelihoods import Binomial, Offset
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import Proximal, solve

Array = np.ndarray[Any, Any]

FITTED, VALIDATED = 30, 10
"""Trials that are fitted; those of them that choose the hyperprior, the last."""
TEMPLATES, LENGTH, DEPTH = 3, 80, 30
"""One template for each stimulus to start from; its length in ms; layers of the encoder."""
RATES, STRENGTH = (0.3, 1.0, 3.0), 5000.0
"""Means of the hyperprior to choose from, in one over log-odds, and what divides its variance.
It has to outweigh the thousands of codes that are zero: see ``pyro_sparse.infer.em``."""
STEPS, FEWER, STEP = 60, 25, 3e-2
"""Steps of Adam; where a hyperprior is tried; and their rate."""
ONSET, PERIOD, DEFLECTIONS = 500, 125, 16
HISTORY = 100


class Templates:
    """Templates, baseline and rates of one unit; ``spikes`` is ``(stimuli, trials, time)``."""

    def __init__(self, spikes: Array, mean_rate: float, steps: int = STEPS, seed: int = 0) -> None:
        torch.manual_seed(seed)
        trials = spikes.shape[1]
        counts = torch.from_numpy(spikes.sum(1)).float()[:, None]  # (stimuli, 1, time)
        baseline = torch.logit(counts[..., :ONSET].mean() / trials).item()
        self.dictionary = Conv(TEMPLATES, 1, LENGTH, atoms=responses(counts, trials)[:, None])
        self.likelihood = Offset(Binomial(trials), baseline, trainable=True)
        self.rate = Rate(mean_rate, num_atoms=TEMPLATES)
        options = {"rate": self.rate}
        self.guide = UnrolledFISTA(
            self.dictionary, self.likelihood, exponential, num_steps=DEPTH,
            shrinkage=Proximal(), **options,
        )  # fmt: skip
        model = SparseCoding(self.dictionary, self.likelihood, exponential, **options)
        hyperprior = dist.Gamma(STRENGTH * mean_rate, STRENGTH)
        self.history = infer.fit(
            model,
            self.guide,
            counts,
            phases=[
                infer.Phase(
                    steps,
                    [
                        infer.Update(
                            loss=infer.Reconstruction(),
                            optimizer=functools.partial(torch.optim.Adam, lr=STEP),
                            train=[self.dictionary, self.likelihood],
                        )
                    ],
                )
            ],
            callbacks=[infer.RateEM(self.rate, exponential, hyperprior)],
            progress=False,
        )
        with torch.no_grad():
            solution = solve(
                counts, self.dictionary, exponential, rate=self.rate(), likelihood=self.likelihood,
                tol=1e-3, max_steps=2000,
            )  # fmt: skip
            self.codes = solution.codes
            self.log_odds = (self.dictionary(self.codes) + self.likelihood.offset)[:, 0].numpy()


def exponential(rate: Tensor) -> dist.Exponential:
    return dist.Exponential(rate)


def responses(counts: Tensor, trials: int) -> Tensor:
    """Mean log-odds after a deflection, above their median; a row for each stimulus."""
    end = ONSET + PERIOD * DEFLECTIONS
    folded = counts[:, 0, ONSET:end].unflatten(1, (DEFLECTIONS, PERIOD)).sum(1)
    smooth = torch.nn.functional.avg_pool1d(folded[:, None], 5, 1, 2)[:, 0, :LENGTH]
    log_odds = torch.logit((smooth + 0.5) / (trials * DEFLECTIONS + 1))
    return log_odds - log_odds.median(1, keepdim=True).values


def bumps(count: int, longest: int) -> Array:
    """Raised cosines over the logarithm of the lag, ``(count, longest)``; lags from 1."""
    place = np.log(np.arange(1, longest + 1) + 2.0)
    centres = np.linspace(place[0], place[-1], count)
    near = np.clip((place - centres[:, None]) / (centres[1] - centres[0]), -2, 2)
    shapes: Array = (1 + np.cos(near * np.pi / 2)) / 2
    return shapes


def lagged(signal: Array, shapes: Array) -> Array:
    """Signal ``(..., time)`` filtered by what came before it: ``(..., time, count)``."""
    spectrum = 2 ** int(np.ceil(np.log2(signal.shape[-1] + shapes.shape[1])))
    shifted = np.concatenate([np.zeros((len(shapes), 1)), shapes], 1)
    product = np.fft.rfft(signal, spectrum)[..., None, :] * np.fft.rfft(shifted, spectrum)
    filtered = np.fft.irfft(product, spectrum)[..., : signal.shape[-1]]
    return np.moveaxis(filtered, -2, -1).astype(np.float32)


def past(spikes: Array) -> Array:
    """What the unit did before, ``(stimuli, trials, time, features)``."""
    return lagged(spikes.astype(float), np.concatenate([np.eye(3, HISTORY), bumps(8, HISTORY)]))


def moved(stimulus: Array) -> Array:
    """Displacement and velocity before, ``(stimuli, 1, time, features)``."""
    velocity = np.gradient(stimulus, axis=-1)
    both = np.stack([stimulus / stimulus.std(), velocity / velocity.std()], 1)
    features = lagged(both, bumps(10, LENGTH))  # (stimuli, 2, time, count)
    return np.moveaxis(features, 1, -1).reshape(len(stimulus), 1, stimulus.shape[1], -1)


def logistic(features: list[Array], spikes: Array, fitted: slice) -> Array:
    """Probabilities of a spike, shape of ``spikes``, by logistic regression on some trials."""
    shape = spikes.shape
    wide = [np.broadcast_to(f, (*shape, f.shape[-1])) for f in features]
    rows = np.concatenate([f[:, fitted].reshape(-1, f.shape[-1]) for f in wide], 1)
    scale = rows.std(0) + 1e-6
    regression = LogisticRegression(C=10.0, max_iter=200, tol=1e-3)
    regression.fit(rows / scale, spikes[:, fitted].reshape(-1))
    weights = (regression.coef_[0] / scale).astype(np.float32)
    parts = np.split(weights, np.cumsum([f.shape[-1] for f in features])[:-1])
    log_odds = sum(f @ part for f, part in zip(features, parts)) + regression.intercept_[0]
    probabilities: Array = 1 / (1 + np.exp(-np.broadcast_to(log_odds, shape)))
    return probabilities


def rescaled(spikes: Array, probabilities: Array, seed: int) -> Array:
    """Intervals between spikes of a trial, uniform on [0, 1] under the true probabilities.

    Within the bin of a spike its time is drawn from the law that the probability implies.
    """
    random = np.random.default_rng(seed)
    found = []
    hazard = -np.log1p(-np.clip(probabilities, 1e-12, 1 - 1e-9))
    for train, q in zip(spikes.reshape(-1, spikes.shape[-1]), hazard.reshape(-1, spikes.shape[-1])):
        places = np.flatnonzero(train)
        before = np.concatenate([[0.0], np.cumsum(q)])
        inside = -np.log1p(-random.random(len(places)) * -np.expm1(-q[places]))
        # From the end of the bin of one spike to the time inside the bin of the next.
        intervals = before[places[1:]] - before[places[:-1] + 1] + inside[1:]
        found.append(-np.expm1(-intervals))
    return np.concatenate(found)


def fit_of(spikes: Array, probabilities: Array, constant: float, seed: int) -> dict[str, float]:
    """KS distance, its 95 % bound, and bits per spike above a constant rate."""
    uniform = np.sort(rescaled(spikes, probabilities, seed))
    steps = np.arange(len(uniform) + 1) / len(uniform)
    distance = max(np.abs(steps[1:] - uniform).max(), np.abs(steps[:-1] - uniform).max())
    p = np.clip(probabilities, 1e-9, 1 - 1e-9)
    gain = np.where(spikes > 0, np.log2(p / constant), np.log2((1 - p) / (1 - constant))).sum()
    return {
        "ks": round(float(distance), 4),
        "ks_bound": round(1.36 / len(uniform) ** 0.5, 4),
        "bits_per_spike": round(float(gain / spikes.sum()), 4),
    }


def unit(spikes: Array, stimulus: Array, seed: int) -> tuple[dict[str, Any], Templates]:
    """All models of one unit; ``spikes`` is ``(stimuli, trials, time)``."""
    fitted, last = slice(0, FITTED), slice(FITTED, None)
    inner = spikes[:, : FITTED - VALIDATED]
    held = spikes[:, FITTED - VALIDATED : FITTED].mean(1)
    chosen, trials = {}, {}
    for rate in RATES:
        p = 1 / (1 + np.exp(-Templates(inner, rate, FEWER, seed).log_odds))
        chosen[rate] = float((held * np.log(p) + (1 - held) * np.log1p(-p)).sum())
    began = time.perf_counter()
    templates = Templates(spikes[:, fitted], max(chosen, key=chosen.__getitem__), seed=seed)
    trials["seconds_templates"] = round(time.perf_counter() - began, 1)
    log_odds = templates.log_odds[:, None, :, None]
    own, whisker = past(spikes), moved(stimulus)
    alone = np.broadcast_to(1 / (1 + np.exp(-log_odds[..., 0])), spikes.shape)
    began = time.perf_counter()
    glm = logistic([whisker, own], spikes, fitted)
    trials["seconds_glm"] = round(time.perf_counter() - began, 1)
    models = {
        "templates": alone,
        "templates and history": logistic([log_odds, own], spikes, fitted),
        "GLM, whisker alone": logistic([whisker], spikes, fitted),
        "GLM, whisker and history": glm,
    }
    constant = float(spikes[:, fitted].mean())
    rows = {
        name: {
            "fitted": fit_of(spikes[:, fitted], p[:, fitted], constant, seed),
            "new_trials": fit_of(spikes[:, last], p[:, last], constant, seed),
        }
        for name, p in models.items()
    }
    active = (templates.codes > 0).float().mean((0, 2))
    return {
        "models": rows,
        "hyperprior_mean": max(chosen, key=chosen.__getitem__),
        "rates": [round(float(r), 3) for r in templates.rate().detach()],
        "active_share": [round(float(a), 5) for a in active],
        "spikes": int(spikes.sum()),
        **trials,
    }, templates


def draw(spikes: Array, units: dict[str, Templates], rows: dict[str, Any], file: Path) -> None:
    """Templates, mean response and fit, and intervals of every unit."""
    figure, axes = plt.subplots(
        len(units), 3, figsize=(12, 2.3 * len(units)), layout="constrained", squeeze=False
    )
    for line, (name, found), data in zip(axes, units.items(), spikes):
        atoms = found.dictionary.atoms.detach()[:, 0]
        used = found.codes.amax((0, 2))[:, None]
        line[0].plot((atoms * used).T, label=[f"from stimulus {k + 1}" for k in range(TEMPLATES)])
        line[0].set_ylabel(f"{name}\nlog-odds")
        rate = data[1, :FITTED].mean(0).reshape(-1, 5).mean(1) * 1000
        model = 1000 / (1 + np.exp(-found.log_odds[1]))
        times = np.arange(len(rate)) * 5 / 1000
        line[1].plot(times, rate, color="0.7", label="spikes, fitted trials, in 5 ms")
        line[1].plot(times, model.reshape(-1, 5).mean(1), linewidth=0.9, label="templates")
        line[1].set(xlim=(0.4, 1.4), ylim=(-5, 1.4 * rate.max()), ylabel="spikes / s")
        models = rows[name]["models"]
        kinds = list(models)
        for offset, part in ((-0.2, "fitted"), (0.2, "new_trials")):
            values = [models[kind][part]["ks"] for kind in kinds]
            line[2].barh(np.arange(len(kinds)) + offset, values, 0.38, label=part.replace("_", " "))
            bound = models[kinds[0]][part]["ks_bound"]
            line[2].axvline(bound, color="0.3", linestyle="-" if offset < 0 else ":", linewidth=0.8)
        line[2].set_yticks(np.arange(len(kinds)), kinds, fontsize=7)
        line[2].invert_yaxis()
    axes[0, 0].set_title("templates, at their largest code")
    axes[0, 1].set_title("second stimulus")
    axes[0, 2].set_title("KS distance (lines: 95 % bounds)")
    axes[-1, 0].set_xlabel("ms")
    axes[-1, 1].set_xlabel("s")
    axes[0, 0].legend(fontsize=6)
    axes[0, 1].legend(fontsize=6, ncols=2, loc="upper center")
    axes[0, 2].legend(fontsize=6)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def whisker(options: argparse.Namespace) -> None:
    began = time.perf_counter()
    stored = np.load(options.data)
    spikes = stored["spikes"].reshape(-1, *stored["spikes"].shape[2:])[: options.units]
    rows, units = {}, {}
    for number, data in enumerate(spikes):
        name = f"unit {number + 1}"
        rows[name], units[name] = unit(data, stored["stimulus"], options.seed)
        print(name, rows[name], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    command = f"python -m benchmarks.dcea_counts whisker --data FILE --seed {options.seed}"
    common.write(
        options.out / "dcea_whisker.json", common.record(command, options.seed, began, units=rows)
    )
    draw(spikes, units, rows, options.out / "dcea_whisker.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("whisker")
    command.set_defaults(run=whisker)
    command.add_argument("--data", type=Path, required=True, help="whisker.npz")
    command.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the results")
    command.add_argument("--units", type=int, default=4, help="how many of the four")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.run(options)


if __name__ == "__main__":
    main()
