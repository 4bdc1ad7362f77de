# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # 2. Write your own generative model
#
# **The question.** `SparseCoding` gives every atom the same prior. But some patterns are common
# in pictures and others rare. How often is each atom used, and how sure can we be of it?
#
# **The model.** Each atom gets a rate of its own, and the rates a prior:
#
# $$ \lambda_k \sim \mathrm{Gamma}(a, a / \lambda_0), \qquad z_{nk} \sim
# \mathrm{Laplace}(0, 1/\lambda_k), \qquad y_n \sim \mathcal N(A^\top z_n, \sigma^2). $$
#
# The prior says "about $\lambda_0$, as firmly as if $a$ codes had been seen". It has to be firm:
# the guide below gives codes as points, and the density at a point zero grows with the rate
# without end. With a weak prior the best rate of a rare atom is infinite, and the atom dies.
#
# This is written below with Pyro's own primitives: `pyro.sample`, `pyro.plate` and
# distributions. Nothing in it is of this library but the module that holds the atoms.

# %%
import functools
import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from demo import figures, photograph  # the folder beside this script
from matplotlib import pyplot as plt
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoNormal, init_to_mean
from pyro.nn import PyroModule

from pyro_sparse import infer
from pyro_sparse.dictionaries import Dense
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.likelihoods import Gaussian

SMOKE = os.environ.get("SMOKE") == "1"
FIGURES = Path(os.environ.get("FIGURES", "tutorials/figures"))
FIGURES.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)

# %% [markdown]
# ## The data
#
# Patches of 8 x 8 pixels from a photograph, their mean removed, scaled to unit variance.

# %%
picture = photograph.load()
windows = np.lib.stride_tricks.sliding_window_view(picture, (8, 8)).reshape(-1, 64)
num_data = 500 if SMOKE else 10_000
rows = np.random.default_rng(0).choice(len(windows), num_data, replace=False)
patches = torch.tensor(windows[rows], dtype=torch.float32)
patches = patches - patches.mean(1, keepdim=True)
patches = patches / patches.std()
print(f"patches {tuple(patches.shape)}")

# %% [markdown]
# ## The program
#
# Two conventions let a guide of this library serve a program of your own: the sites are called
# `"codes"` and `"rate"`, and the program takes `(y, num_data, mask)`. The plate `"data"` scales a
# minibatch to the whole data set.


# %%
RATE = 2.5  # the prior's guess, per unit of a code: patches have unit variance


class PatchesWithRates(PyroModule):
    def __init__(self, dictionary: Dense, noise: float, strength: float) -> None:
        super().__init__()
        self.dictionary = dictionary
        self.noise = noise
        self.hyperprior = dist.Gamma(strength, strength / RATE).expand([dictionary.num_atoms])

    def forward(self, y=None, num_data=None, mask=None):
        size = num_data if y is None else len(y)
        rate = pyro.sample("rate", self.hyperprior.to_event(1))  # (atoms,)
        with pyro.plate("data", num_data or size, subsample_size=size):
            codes = pyro.sample("codes", dist.Laplace(0.0, 1 / rate).to_event(1))  # (n, atoms)
            mean = codes @ self.dictionary.atoms  # (n, features)
            return pyro.sample("obs", dist.Normal(mean, self.noise).to_event(1), obs=y)


# %% [markdown]
# ## The guide
#
# The codes come from an unrolled encoder. It is handed the prior as a function of the rate,
# because the rate is not a number here but a site. Everything else that is unknown, `rest`, has a
# guide of its own: Pyro's `AutoNormal` on the rates alone. It is called first, and the encoder
# shrinks with the rates that it drew.


# %%
def prior(rate):
    return dist.Laplace(0.0, 1 / rate)


dictionary = Dense(num_atoms=100, num_features=64)
model = PatchesWithRates(dictionary, noise=0.2, strength=num_data / 2)
rest = AutoNormal(poutine.block(model, expose=["rate"]), init_loc_fn=init_to_mean, init_scale=0.02)
guide = UnrolledFISTA(dictionary, Gaussian(0.2), prior, rest=rest, num_steps=15)

# %%
history = infer.fit(
    model,
    guide,
    patches,
    optimizer=functools.partial(torch.optim.Adam, lr=1e-2),
    epochs=2 if SMOKE else 15,
    batch_size=250,
    seed=0,
    progress=not SMOKE,
)
print(f"objective {history.epoch_loss[0]:.1f} -> {history.epoch_loss[-1]:.1f} nats per patch")

# %% [markdown]
# ## Is the posterior of the rates right?
#
# Given the codes, this posterior is known: a Gamma distribution is conjugate to the Laplace rate,
# so $\lambda_k \mid z \sim \mathrm{Gamma}(a + N,\ a/\lambda_0 + \sum_n |z_{nk}|)$. The guide did
# not know this. It found means and spreads by stochastic gradients.

# %%
low, middle, high = torch.stack(
    [quantile.detach() for quantile in rest.quantiles([0.16, 0.5, 0.84])["rate"]]
)
with torch.no_grad():
    codes = guide.encode(patches, values={"rate": middle})
strength = num_data / 2
exact = dist.Gamma(strength + num_data, strength / RATE + codes.abs().sum(0))
order = middle.argsort()
print("atom  rate (guide)       rate (exact)")
for k in order[[0, 1, 2, 50, 99]].tolist():
    guide_sd = (high[k] - low[k]).item() / 2
    print(
        f"{k:4d}  {middle[k].item():6.3f} +- {guide_sd:5.3f}   "
        f"{exact.mean[k].item():6.3f} +- {exact.stddev[k].item():5.3f}"
    )

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
atoms = dictionary.atoms.detach()[order].reshape(-1, 8, 8).numpy()
left.imshow(figures.atom_grid(atoms, 10), cmap=figures.GRID_COLOURS, vmin=-1, vmax=1)
left.set_title("atoms, most used first", fontsize=10)
left.set_axis_off()
error = torch.stack([middle - low, high - middle])
right.errorbar(exact.mean, middle, error, fmt="o", color=figures.MARK, markersize=3, linewidth=0.8)
right.axline((RATE, RATE), slope=1, color=figures.QUIET, linewidth=0.8)
right.set_xlabel("rate by conjugacy, given the codes")
right.set_ylabel("rate by the guide")
right.spines[["top", "right"]].set_visible(False)
figure.savefig(FIGURES / "02_rates.png", dpi=110)

# %% [markdown]
# ## New data from the model
#
# The trained program still is a generative program. `Predictive` draws from it: rates from the
# guide would need data, so these come from the prior; patches drawn with the learned rates are
# had by conditioning on them.

# %%
learned = poutine.condition(model, data={"rate": middle})
with torch.no_grad():
    new = Predictive(learned, num_samples=1)(None, num_data=64)["obs"][0]
figure, axes = plt.subplots(1, 2, figsize=(9, 4.6), layout="constrained")
for axis, draws, title in ((axes[0], patches[:64], "data"), (axes[1], new, "drawn")):
    grid = figures.atom_grid(draws.reshape(-1, 8, 8).numpy(), 8)
    axis.imshow(grid, cmap=figures.GRID_COLOURS, vmin=-1, vmax=1)
    axis.set_title(title, fontsize=10)
    axis.set_axis_off()
figure.savefig(FIGURES / "02_drawn.png", dpi=110)

# %% [markdown]
# ## What was learnt
#
# * A program of your own needs no base class: site names and the plate are the whole contract.
# * `rest=` joins an unrolled encoder for the codes with any Pyro guide for everything else.
# * The rates' means agree with the conjugate answer given the codes to about one per cent. Their
#   spreads are still wider than exact after this short training: a spread of one per cent makes
#   little gradient. Looking at a case whose answer is known is how one finds out.
# * Both condition on point estimates of codes and atoms, so both leave that uncertainty out.
