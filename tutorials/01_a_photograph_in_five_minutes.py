# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # 1. A photograph in five minutes
#
# **The question.** A picture is noisy, and there is no clean one to learn from. Which small
# patterns is it made of, and what remains of it when everything else is left out?
#
# **The model.** A picture $y$ is a sum of small atoms $a_k$, each laid down at many places with a
# coefficient, and most coefficients are zero:
#
# $$ z_k \sim \mathrm{Laplace}(0, b), \qquad y \sim \mathcal N\Big(\sum_k a_k * z_k,\ \sigma^2\Big),
# \qquad \|a_k\| = 1. $$
#
# The noise $\sigma$ is known. The scale $b$ of the coefficients sets how much of the picture is
# explained away as noise: the MAP estimate of a coefficient is zero until its atom's correlation
# with the picture exceeds $\sigma^2 / b$. A level of about two $\sigma$ is a good start, and the
# demo (`tutorials/demo/photograph.py`) shows how to choose it without the clean picture.

# %%
import functools
import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import pyro.distributions as dist
import torch
from demo import figures, photograph  # the folder beside this script
from matplotlib import pyplot as plt

from pyro_sparse import infer
from pyro_sparse.dictionaries import Conv
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import Proximal

SMOKE = os.environ.get("SMOKE") == "1"
FIGURES = Path(os.environ.get("FIGURES", "tutorials/figures"))
FIGURES.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)

# %% [markdown]
# ## The data
#
# A photograph that comes with matplotlib, with noise of standard deviation 20/255. Slow changes
# of brightness are nothing that a small atom can say much about: they are passed on, and what is
# coded is the rest.

# %%
clean = photograph.load()
noisy = clean + photograph.SIGMA * np.random.default_rng(0).standard_normal(clean.shape)
crops = photograph.random_crops(photograph.high_pass(noisy), np.random.default_rng(0))
crops = crops[:80] if SMOKE else crops
print(
    f"picture {clean.shape}, noisy at {photograph.psnr(noisy, clean):.2f} dB, crops {crops.shape}"
)

# %% [markdown]
# ## Model and guide
#
# The model is a Pyro program. The guide is an encoder: 20 steps of FISTA, unrolled, each a
# differentiable layer. Both hold the *same* dictionary, so training moves the atoms as a decoder
# and as an encoder at once. They start as noise.

# %%
dictionary = Conv(num_atoms=64, channels=1, kernel_size=(8, 8), stride=4)
likelihood = Gaussian(photograph.SIGMA)
prior = dist.Laplace(0.0, photograph.SIGMA / 1.8)
model = SparseCoding(dictionary, likelihood, prior)
guide = UnrolledFISTA(dictionary, likelihood, prior, num_steps=20, shrinkage=Proximal())

# %% [markdown]
# ## Training
#
# `fit` maximises the evidence lower bound. The guide puts a point mass on the codes, so this is
# maximum a posteriori in the codes and the atoms. Its negative is the loss; before and after, it is
# measured on the same crops.


# %%
def loss():
    with torch.no_grad():
        return infer.SparseELBO()(model, guide)(crops[:80]).item() / 80


before = loss()
history = infer.fit(
    model,
    guide,
    crops,
    optimizer=functools.partial(torch.optim.Adam, lr=5e-3),
    epochs=1,
    batch_size=8,
    seed=0,
    progress=not SMOKE,
)
print(f"loss {before:.0f} -> {loss():.0f} nats per crop in {history.seconds:.0f} s")

# %% [markdown]
# ## What was found
#
# Edges and bars in many orientations: this is what the picture is made of. They are sorted by how
# much they carry, the sum of the sizes of their codes. Those at the end still look like noise:
# nothing in the picture asked for them. Do not sort by how *often* an atom is active: atoms like
# noise answer to noise, so they are active the most often, each time a little.

# %%
with torch.no_grad():
    codes = guide.encode(crops[:200])
carried = codes.abs().mean((0, 2, 3))
order = carried.argsort(descending=True)
atoms = dictionary.atoms.detach()[order, 0].numpy()
figure, axis = plt.subplots(figsize=(4.5, 4.5), layout="constrained")
axis.imshow(figures.atom_grid(atoms, 8), cmap=figures.GRID_COLOURS, vmin=-1, vmax=1)
axis.set_axis_off()
figure.savefig(FIGURES / "01_atoms.png", dpi=110)

often = (codes != 0).float().mean((0, 2, 3))[order]
size = carried[order] / often
print(f"codes are zero {100 * (1 - often.mean()):.1f} % of the time")
for name, part in (("carry most", slice(0, 8)), ("carry least", slice(-8, None))):
    share, mean = 100 * often[part].mean(), size[part].mean() / photograph.SIGMA
    print(f"the 8 atoms that {name}: active {share:.1f} % of the time, mean size {mean:.1f} sigma")

# %% [markdown]
# Denoising is encoding and decoding. With a stride of 4 there are 16 ways to lay the grid of
# positions over the picture; `denoise` averages over all of them.

# %%
denoised = noisy if SMOKE else photograph.denoise(dictionary, noisy, level=1.8)
figure, axes = plt.subplots(1, 3, figsize=(11, 4.6), layout="constrained")
pictures = {"noisy": noisy, "denoised": denoised, "clean": clean}
for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
    psnr = "" if title == "clean" else f", {photograph.psnr(picture, clean):.2f} dB"
    axis.imshow(np.clip(picture, 0, 1), cmap="gray", vmin=0, vmax=1)
    axis.set_title(title + psnr, fontsize=10)
    axis.set_axis_off()
figure.savefig(FIGURES / "01_denoised.png", dpi=110)
print(f"denoised at {photograph.psnr(denoised, clean):.2f} dB")

# %% [markdown]
# ## What was learnt
#
# * A sparse generative model is three objects: a dictionary, a likelihood, a prior. Model and
#   guide are handed the same ones.
# * `UnrolledFISTA` needs no training of its own to be a decent encoder; training adapts the
#   dictionary through it.
# * Everything followed from the noisy picture and its noise level. The clean one served only to
#   print the decibels.
# * A point estimate says nothing about how sure it is: this guide finds codes, not posteriors.
