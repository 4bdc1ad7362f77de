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
from demo.events import OneSided, Refractory
from matplotlib import pyplot as plt
from torch import nn

from pyro_sparse import diagnostics, infer, solvers, testing
from pyro_sparse.dictionaries import Conv
from pyro_sparse.distributions import Rate, SpikeAndSlab
from pyro_sparse.guides import Thresholded, UnrolledEncoder, UnrolledFISTA
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
recordings = [neurons.simulate_extracellular(rows=40 if SMOKE else 300)]
path = neurons.find("spikes_hc1/d533101.npz")
if path:
    recordings.append(neurons.load_extracellular(path, seconds=10 if SMOKE else 60))
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
#   `Refractory` keeps the largest code within 0.8 ms alone: a shrinkage of one's own is a module
#   with one method.
# * A spike has a sign. `OneSided` is a family of one's own: the slab is a normal law cut off at
#   zero.
#
# Both are in `tutorials/demo/events.py`.

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
    solver = solvers.Unrolled(
        dictionary, likelihood, num_steps=8, shrinkage=Refractory(gap=8), lipschitz=2.0
    )
    encoder = UnrolledEncoder(
        solver, dist.Exponential(LEVEL), init_probs=PROBS, init_scale=SIZE
    )
    return model, Thresholded(encoder, OneSided())


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
    check(model, guide, r.y[:3], r.mask[:3])

# %% [markdown]
# ## Learning
#
# All at once, by the evidence lower bound: waveforms, rates and sizes of the cells, and the
# encoder's few numbers. No true spike is used.

# %%
EPOCHS = 4 if SMOKE else 12
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
        progress=not SMOKE,
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
        print(f"  {diagnostics.match_atoms(model.dictionary.atoms, r.waveforms)}")

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
