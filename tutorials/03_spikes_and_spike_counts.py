# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # 3. Spikes and spike counts
#
# **The question.** An electrode near some neurons records a voltage. When did a given cell fire,
# what does its spike look like, and how sure is each of its spikes? And where trials of one
# stimulus are repeated and spikes counted: which law do the counts follow, and what goes wrong
# with another?
#
# **The models.** Both are sums of short templates at sparse places,
#
# $$ \eta = \sum_k a_k * z_k, \qquad \|a_k\| = 1. $$
#
# A voltage has Gaussian noise, and a cell is silent at most times:
#
# $$ z_{kt} \sim (1 - \pi_k)\, \delta_0 + \pi_k\, \mathcal N(\mu_k, \tau_k^2), \qquad
# y_t \sim \mathcal N(\eta_t, 1). $$
#
# A count over $n$ trials is binomial, and its log-odds are a baseline and templates:
#
# $$ z_{kt} \sim \mathrm{Exponential}(\lambda), \qquad
# y_t \sim \mathrm{Binomial}\Big(n, \frac{1}{1 + e^{-b - \eta_t}}\Big). $$

# %%
import functools
import math
import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import pyro.distributions as dist
import torch
from demo import figures, neurons  # the folder beside this script
from matplotlib import pyplot as plt
from torch import nn

from pyro_sparse import diagnostics, infer, solvers, testing
from pyro_sparse.dictionaries import Conv
from pyro_sparse.distributions import Rate, SpikeAndSlab
from pyro_sparse.guides import (
    SpikeAndSlabPosterior,
    Thresholded,
    UnrolledEncoder,
    UnrolledFISTA,
)
from pyro_sparse.likelihoods import Binomial, Gaussian, Offset
from pyro_sparse.models import SparseCoding

SMOKE = os.environ.get("SMOKE") == "1"
FIGURES = Path(os.environ.get("FIGURES", "tutorials/figures"))
FIGURES.mkdir(parents=True, exist_ok=True)
BLUE = "#2563eb"
torch.manual_seed(0)
# Most probabilities of being active are all but zero, and a CPU takes long over such numbers.
torch.set_flush_denormal(True)
MS = 1000 / neurons.SAMPLING  # milliseconds of a sample

# %% [markdown]
# ## The recordings
#
# A simulated channel with two cells, of which we know everything. If `PYRO_SPARSE_DATA` names a
# folder with `spikes_hc1/d533101.npz`, a recording from rat hippocampus too: a wire outside of the
# cells, and an electrode inside one of them that tells when this one fired.

# %%
recordings = [neurons.simulate_extracellular(rows=24 if SMOKE else 150)]
path = neurons.find("spikes_hc1/d533101.npz")
if path:
    recordings.append(neurons.load_extracellular(path, seconds=10 if SMOKE else 30))
for r in recordings:
    print(
        f"{r.name}: {len(r.y)} rows, {int(r.mask.sum()):,} samples observed, {len(r.templates)} "
        f"templates, {len(r.spikes)} true spikes of one cell"
    )

# %% [markdown]
# ## Model and guide
#
# How often a cell fires, and how large and how variable its spikes are, are unknown as well:
# parameters of the prior. A prior with parameters is a module that makes a law of a rate; the
# "rate" here is the mean size.


# %%
class Spikes(nn.Module):
    """A spike and a normal slab; inclusion and spread are learned for each cell."""

    def __init__(self, cells, probs, spread):
        super().__init__()
        self.logits = nn.Parameter(torch.full((cells, 1), math.log(probs / (1 - probs))))
        self.log_spread = nn.Parameter(torch.full((cells, 1), math.log(spread)))

    def forward(self, size):
        slab = dist.Normal(size, self.log_spread.exp())
        return SpikeAndSlab(slab, logits=self.logits)


# %% [markdown]
# The guide starts from an unrolled solver. Two things about spikes are not in a plain one:
#
# * Shifts of a waveform by one sample look alike, and soft thresholds let neighbours share a spike.
#   `NonMaximumSuppression` keeps the largest code within 0.8 ms alone: a refractory period.
# * A spike has a sign. With `one_sided=True` the slab is a normal law cut off at zero, and the
#   encoder does not count as evidence for a spike how well a negative one would fit.

# %%
PROBS, SIZE, LEVEL = 0.003, 5.0, 3.0  # where learning starts; level in units of the noise


def program(r, atoms):
    """A model and a guide that share dictionary and likelihood."""
    cells, _, kernel = atoms.shape
    dictionary, likelihood = Conv(cells, 1, kernel, atoms=atoms), Gaussian(1.0)
    prior, size = Spikes(cells, PROBS, spread=1.5), Rate(SIZE, num_atoms=cells)
    model = SparseCoding(
        dictionary, likelihood, prior, rate=size, signal_shape=tuple(r.y.shape[1:])
    )
    # Codes that are far apart do not meet: a step larger than the safe one is fine.
    refractory = solvers.NonMaximumSuppression(solvers.Proximal(), gap=8)
    solver = solvers.Unrolled(
        dictionary, likelihood, num_steps=8, shrinkage=refractory, lipschitz=2.0
    )
    start = {"init_probs": PROBS / 2, "init_scale": SIZE}  # where it starts
    encoder = UnrolledEncoder(solver, dist.Exponential(LEVEL), one_sided=True, **start)
    return model, Thresholded(encoder, SpikeAndSlabPosterior(one_sided=True))


def check(model, guide, y, mask=None):
    """What the batteries of checks say, in a line if there is nothing to say."""
    for advice in (
        testing.check_model(model, y, mask=mask),
        testing.check_guide(guide, model, y, mask=mask),
    ):
        print(f"{advice.subject}: all checks passed" if advice.ok else advice)


for r in recordings:
    model, guide = program(r, r.templates)
    print(r.name, end=", ")
    check(model, guide, r.y[:2], r.mask[:2])

# %% [markdown]
# ## Learning
#
# All at once, by the evidence lower bound: waveforms, rates and sizes of the cells, and the
# encoder's few numbers. No true spike is used.

# %%
EPOCHS = 4 if SMOKE else 10
found = {}
for r in recordings:
    torch.manual_seed(0)
    model, guide = program(r, r.templates)
    history = infer.fit(
        model,
        guide,
        r.y,
        mask=r.mask,
        optimizer=functools.partial(torch.optim.Adam, lr=3e-2),
        schedule=functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=EPOCHS),
        epochs=EPOCHS,
        batch_size=10,
        progress=False,
    )
    model.eval(), guide.eval()
    with torch.no_grad():
        found[r.name] = model, guide, guide.posterior(r.y, r.mask)
        size, spread = model.rate(), model.prior.log_spread.exp().flatten()
        often = model.prior.logits.sigmoid().flatten() * neurons.SAMPLING
    print(f"{r.name}: objective {history.epoch_loss[0]:.1f} -> {history.epoch_loss[-1]:.1f} nats")
    for k in range(len(size)):
        print(f"  cell {k}: {often[k]:5.1f} spikes/s, size {size[k]:.1f} +- {spread[k]:.1f} sd")
    if r.waveforms is not None:
        likeness = diagnostics.match_atoms(model.dictionary.atoms, r.waveforms).correlation
        print("  correlation with the true waveforms:", *(f"{c:.2f}" for c in likeness))

# %% [markdown]
# ## Events and their probabilities
#
# Where a spike is sure, the moment may be off by a sample: codes at most 0.5 ms apart are one
# event, and it happens unless all of its codes are zero. An event and a true spike are a pair if
# they are at most 2 ms apart, each in one pair at most.

# %%
GAP, WINDOW = 5, 20  # samples


def events_of(r, prob):
    """Times (sample numbers) and probabilities of the events of the known cell."""
    shift = r.trough
    at = r.samples[:, shift : shift + prob.shape[-1]]
    there = at >= 0
    order = np.argsort(at[there], kind="stable")
    return neurons.clusters(prob[:, r.cell].numpy()[there][order], at[there][order], GAP)


scored = {}
for r in recordings:
    times, prob = events_of(r, found[r.name][2].prob_active)
    hit, _ = neurons.matched(times, r.spikes, WINDOW)
    curve = diagnostics.reliability(torch.from_numpy(prob), torch.from_numpy(hit), num_bins=8)
    scored[r.name] = times, prob, hit, curve
    claimed = times[prob > 0.5]
    hits = int(neurons.matched(claimed, r.spikes, WINDOW)[1].sum())
    print(
        f"{r.name}: P > 0.5 gives {len(claimed)} events; {hits} of {len(r.spikes)} spikes found, "
        f"{len(claimed) - hits} false; sum of all P {prob.sum():.1f}"
    )
    print(f"  calibration error {curve.ece:.3f}, of noise alone {curve.ece_of_noise:.3f}")
    for name, part in (("below", prob <= 0.5), ("above", prob > 0.5)):
        print(
            f"  {part.sum()} events with P {name} 0.5: {prob[part].sum():.1f} true ones expected, "
            f"{hit[part].sum()} found"
        )

# %% [markdown]
# Each row of the figure is a recording. Left, half a second or so: marks above the trace are true
# spikes of the known cell, marks below it are events, the darker the surer. Middle, the waveform
# that was learned. Right, calibration: of events that are claimed with some probability, how many
# were true spikes of this cell?

# %%
shade = plt.get_cmap("YlOrBr")
figure, axes = plt.subplots(
    len(recordings), 3, figsize=(13, 3.7 * len(recordings)), layout="constrained", squeeze=False,
    width_ratios=[3, 1, 1.1],
)  # fmt: skip
for (raster, wave, reliable), r in zip(axes, recordings, strict=True):
    times, prob, hit, curve = scored[r.name]
    atoms = found[r.name][0].dictionary.atoms.detach()[:, 0]
    begin = r.spikes[len(r.spikes) // 2] - 1000
    row, place = np.nonzero(
        r.mask[:, 0].numpy() & (r.samples >= begin) & (r.samples < begin + 3500)
    )
    at, volts = r.samples[row, place], r.y[row, 0, place].numpy()
    order = np.argsort(at)
    at, volts = (at[order] - begin) * MS, volts[order]
    gaps = np.flatnonzero(np.diff(at) > 1.5 * MS) + 1
    raster.plot(np.insert(at, gaps, np.nan), np.insert(volts, gaps, np.nan), color=figures.QUIET,
                linewidth=0.6)  # fmt: skip
    low, high = np.nanmin(volts), np.nanmax(volts)
    spikes = (r.spikes - begin) * MS
    raster.vlines(spikes, high + 0.5, high + 2.5, color=figures.INK, label="true spikes")
    raster.vlines(
        (times - begin) * MS, low - 2.5, low - 0.5, colors=[shade(0.15 + 0.85 * p) for p in prob],
        linewidth=2, label="events (darker: surer)",
    )  # fmt: skip
    near = (times > begin) & (times < begin + 3500) & (prob > 0.05) & (prob < 0.95)
    for i, (t, p) in enumerate(zip((times[near] - begin) * MS, prob[near], strict=True)):
        raster.annotate(f"{p:.2f}", (t, low - 2.6 - i % 2), ha="center", va="top", fontsize=7)
    raster.set(xlim=(0, 3500 * MS), ylim=(low - 5.2, high + 5.5))
    raster.set(xlabel="time (ms)", ylabel="voltage (sd of the noise)", title=f"{r.name} channel")
    raster.legend(frameon=False, ncols=2, fontsize=8, loc="upper right")
    ms = np.arange(atoms.shape[1]) * MS
    start = nn.functional.normalize(r.templates[:, 0], dim=1)
    wave.plot(ms, start[r.cell], color=figures.QUIET, linestyle=":", label="start")
    if r.waveforms is not None:
        wave.plot(ms, r.waveforms[r.cell, 0], color=figures.INK, label="true")
    wave.plot(ms, atoms[r.cell], color=figures.MARK, label="learned")
    wave.set(xlabel="time (ms)", ylabel="waveform (unit norm)", title="the known cell")
    wave.legend(frameon=False, fontsize=8)
    diagnostics.plot_reliability(curve, ax=reliable)
    reliable.set(xlabel="P(event)", ylabel="share that were true spikes")
    for axis in (raster, wave, reliable):
        axis.spines[["top", "right"]].set_visible(False)
figure.savefig(FIGURES / "03_spikes.png", dpi=110)
plt.close(figure)

# %% [markdown]
# Is the guide the posterior of its model? k-hat asks whether reweighting its draws would get there
# (below 0.7 it would). It is a figure of all codes of a row together: two cells, over a thousand
# times. And refining each row by itself says what the encoder gives away.

# %%
elbo = infer.SparseELBO()
for r in recordings:
    model, guide, _ = found[r.name]
    some, seen = (part[: 6 if SMOKE else 20] for part in (r.y, r.mask))
    weights = infer.log_weights(model, guide, some, mask=seen, num_samples=100 if SMOKE else 500)
    k = diagnostics.khat(weights)
    refined = guide.refine(model, some, mask=seen, num_steps=10 if SMOKE else 100)
    gap = elbo.loss(model, guide, some, mask=seen) - elbo.loss(model, refined, some, mask=seen)
    print(
        f"{r.name}: k-hat above 0.7 for {(k > 0.7).double().mean():.0%} of {len(k)} rows, median "
        f"{k.median():.2f}; refining raises the ELBO of a row by {gap / len(some):.2f} nats"
    )

# %% [markdown]
# ## Counts over trials
#
# A thalamic neuron fires while a whisker is moved again and again, the same in every trial
# (`whisker/whisker.npz` in the folder of data; simulated without). Spikes in a bin of 1 ms are
# summed over trials. Most bins hold no spike in any trial.
#
# Twenty trials are fitted, ten choose the rate $\lambda$ of the codes, and ten that nobody has
# looked at are the test.

# %%
path = neurons.find("whisker/whisker.npz")
if path:
    data = neurons.load_trials(path, unit=0)
else:
    data = neurons.simulate_trials(40, deflections=4 if SMOKE else 12)
LENGTH, FITTED, VALIDATED = 80, 20, 10
parts = np.split(data.spikes.astype(np.float32), [FITTED, FITTED + VALIDATED], axis=1)
fitted, validated, test = (torch.from_numpy(part.sum(1))[:, None] for part in parts)
num_test = parts[2].shape[1]
print(
    f"{data.name}: {data.spikes.shape[0]} stimuli, {data.spikes.shape[1]} trials of "
    f"{data.spikes.shape[2]} ms, {int(data.spikes.sum())} spikes; "
    f"{(test == 0).float().mean():.0%} of the test counts are 0"
)

# %% [markdown]
# The same templates under two laws. Binomial: the predictor is log-odds, the noise follows from
# the mean. Gaussian: the predictor is the count itself, less its mean before the first deflection,
# and the noise is one number.
#
# Templates start from the mean response to a deflection under each stimulus.


# %%
def responses(values):
    """Mean of ``(stimuli, time)`` after a deflection, less its median."""
    end = data.onset + data.period * data.deflections
    folded = values[:, data.onset : end].unflatten(1, (data.deflections, data.period)).mean(1)
    smooth = nn.functional.avg_pool1d(folded[:, None], 5, 1, 2)[:, 0, :LENGTH]
    return (smooth - smooth.median(1, keepdim=True).values)[:, None]


before = fitted[..., : data.onset].mean()
share = (fitted[:, 0] + 0.5) / (FITTED + 1)
FAMILIES = {
    "binomial": (
        lambda: Offset(Binomial(FITTED), torch.logit(before / FITTED).item(), trainable=True),
        responses(torch.logit(share)),
        (0.3, 1.0, 3.0),  # candidates for the rate, in one over log-odds
    ),
    "Gaussian": (
        lambda: Offset(Gaussian(fitted.std().item()), before.item(), trainable=True),
        responses(fitted[:, 0]),
        (1.0, 3.0, 10.0),  # in one over counts
    ),
}
STEPS = 4 if SMOKE else 40


def templates(family, rate, steps=STEPS):
    """Model and guide after training, and the expected counts of the fitted trials."""
    make, atoms, _ = FAMILIES[family]
    torch.manual_seed(0)
    dictionary, likelihood = Conv(len(atoms), 1, LENGTH, atoms=atoms), make()
    prior = dist.Exponential(torch.tensor(rate))
    model = SparseCoding(dictionary, likelihood, prior, signal_shape=tuple(fitted.shape[1:]))
    guide = UnrolledFISTA(dictionary, likelihood, prior, num_steps=20, shrinkage=solvers.Proximal())
    if steps:
        infer.fit(
            model, guide, fitted, epochs=steps, progress=False,
            optimizer=functools.partial(torch.optim.Adam, lr=3e-2),
        )  # fmt: skip
    with torch.no_grad():
        return model, guide, likelihood.mean(dictionary(guide.encode(fitted)))


def predictive(family, mean, trials, spread=None):
    """Law of the counts of other trials: their sum is as many of the same."""
    if family == "binomial":
        return dist.Binomial(trials, probs=(mean / FITTED).clamp(1e-6, 1 - 1e-6))
    return dist.Normal(mean * trials / FITTED, spread * trials**0.5)


def log_score(law, counts):
    """Log-probability of counts; a normal law has that of the interval around them."""
    if isinstance(law, dist.Binomial):
        return law.log_prob(counts)
    upper, lower = ((counts + side - law.loc) / law.scale for side in (0.5, -0.5))
    lower = torch.where(counts == 0, -math.inf, lower)  # what is below zero counts as zero
    right = lower > 0  # of two equal differences the one that keeps its digits
    more = torch.where(right, -lower, upper).double()
    less = torch.where(right, -upper, lower).double()
    more, less = torch.special.log_ndtr(more), torch.special.log_ndtr(less)
    return more + torch.log1p(-(less - more).exp())


# %% [markdown]
# A Gaussian law gets the best that one number can do: its spread is that of the residuals in the
# trials that choose. A count then has the probability of the interval of width 1 around it.

# %%
laws, programs = {}, {}
for family, (_, _, rates) in FAMILIES.items():
    scores, spreads = {}, {}
    for rate in rates[1:2] if SMOKE else rates:
        mean = templates(family, rate)[2]
        spreads[rate] = (
            (validated - mean * VALIDATED / FITTED).square().mean().div(VALIDATED).sqrt()
        )
        law = predictive(family, mean, VALIDATED, spreads[rate])
        scores[rate] = log_score(law, validated).sum().item()
    best = max(scores, key=scores.get)
    model, guide, mean = templates(family, best)
    laws[family] = predictive(family, mean, num_test, spreads[best])
    programs[family] = model, guide, mean
    print(f"{family}: rate {best} by the {VALIDATED} trials that choose", end=", ")
    check(model, guide, fitted)

# %% [markdown]
# ## Which law do the counts follow?
#
# The log score is the log-probability of the counts of the test trials, here above that of a
# binomial law with one rate for all times, in bits per spike. The standard error of the difference
# of the two families is that of blocks of one period.

# %%
constant = dist.Binomial(num_test, probs=fitted.mean() / FITTED).log_prob(test)
score = {family: log_score(law, test) for family, law in laws.items()}
total = test.sum().item()
for family, values in score.items():
    gain = (values - constant).sum().item() / total / math.log(2)
    print(f"{family:9s} log score {gain:+.3f} bits per spike above a constant rate")
ahead = (score["binomial"] - score["Gaussian"])[..., : test.shape[-1] // data.period * data.period]
blocks = ahead.unflatten(-1, (-1, data.period)).sum(-1).flatten() / math.log(2)
se = blocks.std().item() * len(blocks) ** 0.5
print(f"binomial ahead by {blocks.sum().item():.0f} +- {se:.0f} bits on {total:.0f} spikes")

below = dist.Normal(0.0, 1.0).cdf(-laws["Gaussian"].loc / laws["Gaussian"].scale)
print(f"the Gaussian law puts {below.mean():.0%} of its probability below zero")
print(f"bins without a spike: {(test == 0).float().mean():.3f}", end="")
for family, law in laws.items():
    print(f", {family} {log_score(law, torch.zeros_like(test)).exp().mean():.3f}", end="")
print()

# %% [markdown]
# Why: the noise of counts grows with their mean. Bins are sorted by the mean that each model
# expects, and in each group the variance of the test counts around that mean is compared with what
# the model claims.

# %%
EDGES = np.geomspace(0.02, 20, 11)


def spread_by_mean(family):
    """Expected mean, variance of the test counts around it, and claimed variance, by groups."""
    law = laws[family]
    mean, claimed = law.mean.flatten(), law.variance.flatten()
    group = np.digitize(mean.numpy(), EDGES)
    error = (test.flatten() - mean).square()
    parts = [torch.from_numpy(group == g) for g in range(1, len(EDGES))]
    return np.array(
        [[v[part].mean() for v in (mean, error, claimed)] for part in parts if part.sum() >= 20]
    ).T


figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained", width_ratios=[1, 2, 1.2])
atoms = programs["binomial"][0].dictionary.atoms.detach()[:, 0]
axes[0].plot(atoms.T, label=[f"from stimulus {k + 1}" for k in range(len(atoms))])
axes[0].set(xlabel="time (ms)", ylabel="template (unit norm)", title="binomial: log-odds")
axes[0].legend(frameon=False, fontsize=8)
begin = data.onset - 50
shown = slice(begin, begin + 500)
per_second = 1000 / num_test
rate = nn.functional.avg_pool1d(test[:1], 5, 1, 2)[0, 0, shown] * per_second
ms = np.arange(begin, begin + 500)
axes[1].fill_between(
    ms, rate, color=figures.QUIET, alpha=0.5, linewidth=0, label="test trials, 5 ms"
)
for (family, law), colour in zip(laws.items(), (figures.MARK, BLUE), strict=True):
    axes[1].plot(ms, law.mean[0, 0, shown] * per_second, color=colour, linewidth=1, label=family)
    mean, variance, claimed = spread_by_mean(family)
    axes[2].plot(mean, variance, "o", color=colour, markersize=5, label=f"{family}: test counts")
    axes[2].plot(mean, claimed, color=colour, linewidth=1.2, label=f"{family}: claimed")
axes[1].axhline(0, color=figures.INK, linewidth=0.6)
axes[1].set(xlabel="time (ms)", ylabel="rate (spikes/s)", title=f"first stimulus, {data.name}")
axes[1].legend(frameon=False, fontsize=8)
axes[2].set(xlabel=f"expected count of {num_test} trials", ylabel="variance of the count")
axes[2].set(xscale="log", yscale="log", title="claimed and found")
axes[2].legend(frameon=False, fontsize=8)
for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
figure.savefig(FIGURES / "03_counts.png", dpi=110)
plt.close(figure)

# %% [markdown]
# ## What was learnt
#
# * A spike-and-slab prior over a convolutional dictionary says of each event how probable it is,
#   and the sum of these probabilities is the number of spikes that are expected.
# * Neighbouring shifts compete for an event. A shrinkage and a family of one's own, a few lines
#   each, told the encoder what is known about spikes.
# * Calibration and the false events say how far the probabilities can be believed. In a recording
#   the model is wrong in ways of its own: other cells, and noise that is not white.
# * k-hat judges all codes of a row jointly, and is hard on independent codes of shifted copies.
#   What is read off here, the probability of an event, is judged by calibration.
# * Counts ask for their own law. With a Gaussian one the noise is the same at all times, too wide
#   where the neuron is silent and too narrow where it responds, and part of the probability lies on
#   counts below zero.
