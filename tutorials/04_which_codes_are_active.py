# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # 4. Learned thresholds, or which codes are active and how sure we are
#
# **The question.** A point estimate says of every code that it is zero, or that it is not. How sure
# is that? Where two atoms look alike, either may have made the patch.
#
# **The model.** An atom takes part with probability $\pi$, and with a Laplace size if it does:
#
# $$ z_{nk} \sim (1 - \pi)\, \delta_0 + \pi\, \mathrm{Laplace}(0, s), \qquad
# y_n \sim \mathcal N(A^\top z_n,\ \sigma^2 I), \qquad \|a_k\| = 1. $$
#
# Atoms $A$ and noise $\sigma$ are learned. Of the codes we want the posterior, and it must have
# an atom at zero as well: then $P(z_{nk} \ne 0 \mid y_n)$, the probability that a code is
# *active*, is a number that can be read off, and tested.

# %%
import functools
import math
import os
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import pyro.distributions as dist
import torch
from demo import figures, photograph  # the folder beside this script
from matplotlib import pyplot as plt
from torch import nn

warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)
import arviz

from pyro_sparse import diagnostics, infer, solvers
from pyro_sparse.dictionaries import Dense
from pyro_sparse.distributions import (
    GammaThresholded,
    Rate,
    ShiftedThresholded,
    SoftThresholded,
    SpikeAndSlab,
)
from pyro_sparse.guides import (
    Heads,
    SpikeAndSlabPosterior,
    StructuredThresholded,
    Thresholded,
    ThresholdPosterior,
    UnrolledEncoder,
)
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding

SMOKE = os.environ.get("SMOKE") == "1"
FIGURES = Path(os.environ.get("FIGURES", "tutorials/figures"))
FIGURES.mkdir(parents=True, exist_ok=True)
BLUE = "#2563eb"
torch.manual_seed(0)

# %% [markdown]
# ## What a threshold does
#
# Draw noise $e \sim \mathrm{Laplace}(0, b)$. Below a threshold $\lambda$ the code is zero; beyond
# it, it is $\mu$ plus what exceeds the threshold. What exceeds a level is Laplace again, whatever
# the level: so this *is* a spike and slab, with slab $\mathrm{Laplace}(\mu, b)$ and inclusion
# $e^{-\lambda / b}$. A threshold that is itself drawn from a Gamma law can be integrated out: the
# inclusion then is $(1 + 1 / \beta b)^{-\alpha}$, and the slab is the same.

# %%
loc, scale, threshold = torch.tensor(0.5), torch.tensor(0.4), torch.tensor(0.6)
concentration, rate = torch.tensor(3.0), torch.tensor(5.0)  # the same mean, 0.6
num_draws = 200_000
noise = dist.Laplace(0.0, scale).sample((num_draws,))
drawn = {
    "fixed": (threshold, ShiftedThresholded(dist.Laplace(loc, scale), threshold)),
    "Gamma": (
        dist.Gamma(concentration, rate).sample((num_draws,)),
        GammaThresholded(loc, scale, concentration, rate),
    ),
}
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
grid = torch.linspace(-1.9, 2.9, 401)
edges = np.linspace(-1.9, 2.9, 97)
for (name, (level, law)), colour in zip(drawn.items(), (figures.MARK, BLUE), strict=True):
    beyond = noise.abs() > level
    codes = torch.where(beyond, loc + noise.sign() * (noise.abs() - level), 0.0)
    heights = np.histogram(codes[beyond], edges)[0] / num_draws / np.diff(edges)
    left.plot((edges[1:] + edges[:-1]) / 2, heights, ".", color=colour, markersize=5)
    exact = law.prob_active.item()
    left.plot(grid, exact * law.slab.log_prob(grid).exp(), color=colour, linewidth=1.2, label=name)
    print(
        f"{name} threshold: active {beyond.float().mean():.4f} of the draws, {exact:.4f} in closed "
        "form"
    )
left.set_xlabel("code, given that it is not zero (code units)")
left.set_ylabel("density x P(active)  (1 / code units)")
left.set_title(r"draws (dots) and closed form (lines), $\mu = 0.5,\ b = 0.4$", fontsize=10)
left.legend(title="threshold of mean 0.6", frameon=False)
where = torch.linspace(-3, 3, 401)
for name, law, colour in (
    ("on the noise (shifted)", ShiftedThresholded(dist.Laplace(where, scale), threshold), BLUE),
    ("on the draw (soft)", SoftThresholded(dist.Laplace(where, scale), threshold), figures.MARK),
):
    right.plot(where, law.prob_active, color=colour, label=name)
right.set_ylim(0, 1.02)
right.set_xlabel(r"location $\mu$ of the posterior (code units)")
right.set_ylabel("P(active)")
right.set_title(r"what a location says about P(active), $b = 0.4,\ \lambda = 0.6$", fontsize=10)
right.legend(title="threshold", frameon=False, loc="lower left", bbox_to_anchor=(0.0, 0.28))
for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
figure.savefig(FIGURES / "04_law.png", dpi=110)
plt.close(figure)

# %% [markdown]
# The right panel matters. With one threshold for each atom, a shifted code that is surely active
# must have $b \gg \lambda$: it must be badly known. A threshold of its own for every code and
# datum has no such tie: it amounts to a free inclusion $g_{nk}$, with
# $\lambda_{nk} = -b_{nk} \log g_{nk}$. That is the default, `SpikeAndSlabPosterior`.
#
# ## Which posterior for photographs?
#
# Patches of 8 x 8 pixels, their mean removed, in units of their standard deviation. Four posteriors
# are trained, each with a model of its own, and compared by the evidence lower bound (ELBO) on
# validation patches, which also served to choose learning rates and the prior. No draw is needed:
# with a linear dictionary and Gaussian noise the objective is exact. The shifted threshold gets a
# warm-up, as published: the weight of its KL rises from 0.01 to 1 over half of the training. It did
# far worse without one. The others have none: where the noise is learned too, a weight near zero
# lets a quick encoder make all codes active and the noise vanish.

# %%
NUM_ATOMS, SIZE = (25, 8) if SMOKE else (100, 8)
num_train, num_held, epochs = (400, 100, 1) if SMOKE else (10_000, 1000, 20)
picture = photograph.load()
windows = np.lib.stride_tricks.sliding_window_view(picture, (SIZE, SIZE)).reshape(-1, SIZE**2)
rows = np.random.default_rng(0).choice(len(windows), num_train + 2 * num_held, replace=False)
patches = torch.tensor(windows[rows], dtype=torch.float32)
patches = patches - patches.mean(1, keepdim=True)
patches = patches / patches[:num_train].std()
train, validation, test = patches.split([num_train, num_held, num_held])
PROBS, SLAB = 0.1, 2.0


def network(names):
    """Two hidden layers and a linear head for each parameter."""
    first = nn.Linear(SIZE**2, 256)
    # Tanh: unbounded features make scales underflow for patches of much contrast.
    layers = nn.Sequential(first, nn.ReLU(), nn.Linear(256, 256), nn.Tanh())
    return Heads(layers, 256, NUM_ATOMS, names)


def unrolled(model):
    """Eight steps of FISTA on the model's atoms; then location, scale and inclusion."""
    solver = solvers.Unrolled(model.dictionary, model.likelihood, num_steps=8)
    return UnrolledEncoder(solver, dist.Laplace(0.0, 0.3), init_probs=PROBS, init_scale=SLAB)


def per_atom(soft):
    """One learned threshold for each atom."""
    return ThresholdPosterior(Rate(0.3, num_atoms=NUM_ATOMS), soft=soft)


def free():
    return SpikeAndSlabPosterior(dist.Laplace)


shifted, soft = per_atom(soft=False), per_atom(soft=True)
candidates = {  # encoder, family, learning rate, first weight of the KL
    "network, shifted threshold per atom": (lambda _: network(shifted.names), shifted, 1e-3, 0.01),
    "network, free inclusion": (lambda _: network(free().names), free(), 3e-3, 1.0),
    "unrolled, soft threshold per atom": (unrolled, soft, 2e-2, 1.0),
    "unrolled, free inclusion": (unrolled, free(), 2e-2, 1.0),
}
exact_elbo = infer.SparseELBO()
trained, score = {}, {}
print(f"{'posterior':36s} held-out ELBO  noise  active codes")
for name, (encoder, family, lr, start) in candidates.items():
    torch.manual_seed(0)
    prior = SpikeAndSlab(dist.Laplace(0.0, SLAB), probs=PROBS)
    model = SparseCoding(Dense(NUM_ATOMS, SIZE**2), Gaussian(0.3, trainable=True), prior)
    guide = Thresholded(encoder(model), family)
    num_steps = epochs * math.ceil(num_train / 200)
    weight = infer.Scheduled(infer.LinearRamp(start, 1.0, num_steps=num_steps // 2))
    infer.fit(
        model,
        guide,
        train,
        loss=infer.SparseELBO(kl_weight=weight),
        optimizer=functools.partial(torch.optim.Adam, lr=lr),
        schedule=functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs),
        epochs=epochs,
        batch_size=200,
        callbacks=[infer.Warmup(weight)],
        progress=not SMOKE,
    )
    score[name] = -exact_elbo.loss(model, guide, validation) / num_held
    trained[name] = model.eval(), guide.eval()
    with torch.no_grad():
        count = guide.posterior(validation).prob_active.sum(1).mean()
        print(f"{name:36s} {score[name]:8.2f} nats  {model.likelihood.scale:5.3f}  {count:6.2f}")
best = max(score, key=score.get)
model, guide = trained[best]
print(f"best: {best}; on the test patches {-exact_elbo.loss(model, guide, test) / num_held:.2f}")
print(f"estimator: {exact_elbo.choice(model)}")

# %% [markdown]
# An encoder that knows the model (its atoms, and how they overlap) is worth more than a network
# of the same training, and a free inclusion more than a threshold that data must share.
#
# ## Which codes are active
#
# The posterior is a distribution: `prob_active`, and the law of a code given that it is active,
# `slab`, are closed forms.

# %%
with torch.no_grad():
    law = guide.posterior(test)
    active, low, middle, high = (
        law.prob_active,
        law.slab.icdf(torch.tensor(0.05)),
        law.slab.mean,
        law.slab.icdf(torch.tensor(0.95)),
    )
    rebuilt = model.dictionary(law.mean)
unsure = ((active > 0.1) & (active < 0.9)).sum(1).float().mean()
print(
    f"of {NUM_ATOMS} codes of a patch {(active >= 0.9).sum(1).float().mean():.1f} are active with "
    f"probability >= 0.9, {unsure:.1f} are in doubt (0.1 to 0.9)"
)
order = active.mean(0).argsort(descending=True)
atoms = model.dictionary.atoms.detach().reshape(-1, SIZE, SIZE).numpy()
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
columns = round(NUM_ATOMS**0.5)
left.imshow(figures.atom_grid(atoms[order], columns), cmap=figures.GRID_COLOURS, vmin=-1, vmax=1)
left.set_title("learned atoms, most often active first", fontsize=10)
left.set_axis_off()
right.hist(active.flatten(), np.linspace(0, 1, 41), color=figures.QUIET, edgecolor="white")
right.set_yscale("log")
right.set_xlabel("P(active) of a code, given its patch")
right.set_ylabel(f"number of codes (of {active.numel():,})")
right.set_title("most codes are surely zero; some are in doubt", fontsize=10)
right.spines[["top", "right"]].set_visible(False)
figure.savefig(FIGURES / "04_atoms.png", dpi=110)
plt.close(figure)

# %% [markdown]
# Three test patches, the first with as many active codes as the median. Below each code is its
# atom; the darker the mark, the surer we are that it takes part. Bars are 90 % intervals of the
# code given that it is active.

# %%
by_count = active.sum(1).argsort()
shown = by_count[[int(q * (num_held - 1)) for q in (0.5, 0.6, 0.7)]]
shade = plt.get_cmap("YlOrBr")
figure, axes = plt.subplots(3, 3, figsize=(11, 9), layout="constrained", width_ratios=[1.3, 1.3, 6])
for (patch, mean, axis), n in zip(axes, shown.tolist(), strict=True):
    limit = test[n].abs().max()
    for part, values, title in ((patch, test, "patch"), (mean, rebuilt, "posterior mean")):
        part.imshow(values[n].reshape(SIZE, SIZE), cmap="gray", vmin=-limit, vmax=limit)
        part.set_title(title, fontsize=9)
        part.set_axis_off()
    top = active[n].topk(14).indices
    for i, k in enumerate(top.tolist()):
        colour = shade(0.2 + 0.8 * active[n, k].item())
        axis.vlines(i, low[n, k], high[n, k], color=colour, linewidth=3)
        axis.plot(i, middle[n, k], "o", color=colour, markersize=8, markeredgecolor=figures.INK)
        chance = f"{active[n, k]:.2f}"
        axis.annotate(
            chance, (i, 1), (0, -2), axis.get_xaxis_transform(), "offset points",
            ha="center", va="top", fontsize=9,
        )  # fmt: skip
    axis.axhline(0, color=figures.QUIET, linewidth=0.8, zorder=0)
    axis.set_xlim(-0.6, 13.6)
    axis.margins(y=0.18)
    axis.set_ylabel("code (sd of pixels)")
    axis.set_xticks([])
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    figures.put_below(axis, atoms[top])
axes[0, 2].set_title("the 14 codes most likely to be active; numbers: P(active)", fontsize=10)
figure.savefig(FIGURES / "04_codes.png", dpi=110)
plt.close(figure)

# %% [markdown]
# ## Is it right?
#
# For photographs nobody knows. For a small simulated problem the answer can be computed: 12 atoms
# in four groups of three that look alike (cosine 0.9), SNR 10 dB, and all $2^{12}$ supports
# enumerated. The dictionary is held at the truth, so that posteriors alone are compared:
#
# * `Thresholded`: codes independent given the data. Of atoms that look alike often one alone is
#   active, this or that, and a law of independent codes cannot say so.
# * `StructuredThresholded`: each code given those before it, so that they explain each other away.
#   It starts from the overlaps of the atoms, `gram`. Its ELBO has no closed form: it is trained
#   with two draws a step.
# * `coordinate_ascent`: independent codes without an encoder, each datum by itself, to a local
#   optimum of the same bound.

# %%
K = D = 12
INCLUSION = 0.25
SIGMA = math.sqrt(K * INCLUSION / (10 * D))
num_simulated, num_check, passes = (500, 50, 1) if SMOKE else (20_000, 1000, 5)
group = torch.arange(K) // 3
gram = 0.9 * (group[:, None] == group) + 0.1 * torch.eye(K)
rotation = torch.linalg.qr(torch.randn(D, D))[0]
alike = Dense(K, D, atoms=torch.linalg.cholesky(gram) @ rotation)
alike.freeze_()
likelihood = Gaussian(SIGMA)


def simulated(structured, probs=INCLUSION):
    """A model and a guide, trained on data of the true model."""
    torch.manual_seed(1)
    model = SparseCoding(alike, likelihood, SpikeAndSlab(dist.Normal(0.0, 1.0), probs=probs))
    solver = solvers.Unrolled(alike, likelihood, num_steps=15)
    encoder = UnrolledEncoder(solver, dist.Laplace(0.0, 0.3), init_probs=probs)
    guide = StructuredThresholded(encoder, gram) if structured else Thresholded(encoder)
    infer.fit(
        model,
        guide,
        data,
        loss=infer.SparseELBO(infer.LeaveOneOut() if structured else None),
        optimizer=functools.partial(torch.optim.Adam, lr=1e-2),
        schedule=functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=passes),
        epochs=passes,
        batch_size=200,
        progress=not SMOKE,
    )
    return model.eval(), guide.eval()


truth = SparseCoding(alike, likelihood, SpikeAndSlab(dist.Normal(0.0, 1.0), probs=INCLUSION))
with torch.no_grad():
    data = truth(num_data=num_simulated)
    codes = truth.prior.sample((num_check, K))
    check = alike(codes) + SIGMA * torch.randn(num_check, D)
exact = infer.enumerate_posterior(check, alike, truth.prior, likelihood)
independent, structured = simulated(False), simulated(True)
ascent = solvers.coordinate_ascent(check, alike, truth.prior, likelihood)

# %%
with torch.no_grad():
    found = {
        "independent": independent[1].posterior(check).prob_active,
        "structured": structured[1].posterior(check).marginals(1000).prob_active,
        "coordinate ascent": ascent.law.base_dist.prob_active,
        "enumeration": exact.prob_active,
    }
    elbo = {
        "independent": -exact_elbo.loss(*independent, check) / num_check,
        "structured": -infer.SparseELBO(infer.LeaveOneOut(), num_samples=50).loss(
            *structured, check
        )
        / num_check,
        "coordinate ascent": ascent.elbo.mean().item(),
        "enumeration": exact.log_evidence.mean().item(),
    }
error = {name: (p - exact.prob_active).abs() for name, p in found.items()}
print(f"{'posterior':18s}  mean error of P(active)   ELBO (enumeration: log evidence), nats")
for name in found:
    print(f"{name:18s}  {error[name].mean():.4f}                   {elbo[name]:7.3f}")

# %% [markdown]
# Calibration asks the data instead: of the codes that are called active with probability 0.8,
# were eight in ten? Independent codes are too sure at both ends: having picked one of three
# look-alikes, they leave next to nothing for the other two.

# %%
figure, (first, second, third) = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
colours = {"independent": BLUE, "structured": figures.MARK, "enumeration": figures.INK}
for axis, name in ((first, "independent"), (second, "structured")):
    axis.plot([0, 1], [0, 1], color=figures.QUIET, linewidth=0.8)
    some = slice(0, 300)
    axis.plot(
        exact.prob_active[some].flatten(), found[name][some].flatten(), ".", color=colours[name],
        markersize=3, alpha=0.5,
    )  # fmt: skip
    axis.set_aspect("equal")
    axis.set_xlabel("P(active) by enumeration")
    axis.set_ylabel("P(active) by the guide")
    axis.set_title(f"{name}: mean error {error[name].mean():.3f}", fontsize=10)
bins = torch.linspace(0, 1, 11)
for i, (name, colour) in enumerate(colours.items()):
    where = torch.bucketize(found[name].to(bins), bins[1:-1])
    predicted, observed, spread = [], [], []
    for b in range(10):
        members = where == b
        if members.sum() >= 20:
            share = (codes != 0)[members].float().mean()
            predicted.append(found[name][members].mean() + 0.006 * (i - 1))  # side by side
            observed.append(share)
            spread.append((share * (1 - share) / members.sum()).sqrt())
    third.errorbar(
        predicted, observed, spread, fmt="o-", markersize=4, linewidth=1, color=colour, label=name
    )
third.plot([0, 1], [0, 1], color=figures.QUIET, linewidth=0.8)
third.set_aspect("equal")
third.set_xlabel("P(active), mean of ten bins")
third.set_ylabel("share of these codes that were active")
third.set_title("calibration against the simulated codes", fontsize=10)
third.legend(frameon=False, loc="upper left", fontsize=9)
for axis in (first, second, third):
    axis.spines[["top", "right"]].set_visible(False)
figure.savefig(FIGURES / "04_truth.png", dpi=110)
plt.close(figure)

# %% [markdown]
# ## Read with ArviZ
#
# `to_datatree` draws from guide and model into the groups that ArviZ reads. Names of dims come from
# plates, and from `dims`; `active` says which draws of the codes are not exactly zero.

# %%
num_read, num_draws = (20, 100) if SMOKE else (200, 1000)
read = functools.partial(
    diagnostics.to_datatree,
    num_samples=num_draws,
    num_prior_samples=num_draws // 10,
    dims={"codes": ["atom"], "obs": ["pixel"]},
)
tree = read(model, guide, test[shown[1:2]])
idata = arviz.InferenceData.from_datatree(tree)  # ArviZ 1 takes the tree itself
for name, values in tree.children.items():
    print(f"{name:22s} {', '.join(f'{v}{tuple(values[v].dims)}' for v in values.data_vars)}")
likely = active[shown[1]].topk(4).indices.tolist()
print(
    arviz.summary(
        idata, var_names=["active", "codes"], coords={"atom": likely}, kind="stats", round_to=2
    )
)

# %% [markdown]
# The mean of `active` is P(active); mean and interval of `codes` count the zeros.
#
# **k-hat** asks whether draws of the guide could be reweighted to the posterior: above 0.7 they
# could not. It is a figure of the *joint* law of all codes of a datum. With atoms that look alike,
# independent codes miss how codes depend on each other, and k-hat says so. Whether P(active) of
# each code is right is another question, and for the simulated data the answer is known.

# %%
trees = {
    "independent": read(*independent, check[:num_read]),
    "structured": read(*structured, check[:num_read]),
    "encoder": read(model, guide, test[:num_read]),
    "refined": read(model, guide.refine(model, test[:num_read]), test[:num_read]),
}
weights = {
    name: torch.from_numpy(found["sample_stats"]["log_weight"].values[0])
    for name, found in trees.items()
}
khat = {name: diagnostics.khat(log_weight) for name, log_weight in weights.items()}
for name, k in khat.items():
    print(
        f"{name:12s} k-hat: median {k.median():.2f}, above 0.7 for {(k > 0.7).double().mean():.0%}"
    )
for name in ("independent", "structured"):
    high = khat[name] > 0.7
    per_datum = error[name][:num_read].mean(1)
    print(
        f"{name:12s} error of P(active): {per_datum[high].mean():.3f} where k-hat is above 0.7, "
        f"{per_datum[~high].mean():.3f} elsewhere"
    )
gain = (weights["refined"].mean(0) - weights["encoder"].mean(0)).mean()
print(f"refining each patch by itself raises its ELBO by {gain:.2f} nats: the amortisation gap")

# %% [markdown]
# **Is the model good?** Draws from the posterior predictive have seen the patch, and can miss only
# what no codes can say: a patch with less contrast than the noise, of which there is one level for
# all. Draws from the prior know no patch, and are the harder test.


# %%
def contrast(values):
    """Standard deviation over the pixels of each patch."""
    return np.asarray(values).reshape(-1, SIZE**2).std(1)


contrasts = {
    "patches": contrast(test[:num_read]),
    "posterior predictive": contrast(trees["encoder"]["posterior_predictive"]["obs"]),
    "prior predictive": contrast(trees["encoder"]["prior_predictive"]["obs"]),
}
for name, values in contrasts.items():
    print(f"{name:21s} contrast: quartiles {np.quantile(values, [0.25, 0.5, 0.75]).round(2)}")
quiet = (contrasts["patches"] < model.likelihood.scale.item()).mean()
print(f"{quiet:.0%} of the patches have less contrast than the learned noise")

figure, (first, second, third) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
for axis, names, title in (
    (first, ("independent", "structured"), "simulated: 12 atoms, alike in threes"),
    (second, ("encoder", "refined"), f"photograph: {NUM_ATOMS} atoms, independent codes"),
):
    for name, colour in zip(names, (BLUE, figures.MARK), strict=True):
        values = khat[name].clamp(-0.5, 2.05)
        axis.hist(
            values, np.linspace(-0.5, 2.1, 27), histtype="step", linewidth=1.8, color=colour,
            label=f"{name}, median {khat[name].median():.2f}",
        )  # fmt: skip
    axis.axvline(0.7, 0, 0.82, color=figures.QUIET, linestyle="--", linewidth=1)
    axis.set_xlabel("k-hat of a datum (the last bin: 2 and above)")
    axis.set_ylabel(f"number of data (of {num_read})")
    axis.set_title(title, fontsize=10)
    axis.margins(y=0.3)
    axis.legend(frameon=False, fontsize=9, loc="upper right")
styles = (figures.INK, "-"), (figures.MARK, "--"), (BLUE, "-")
for (name, values), (colour, style) in zip(contrasts.items(), styles, strict=True):
    level = np.linspace(0, 1, len(values))
    third.plot(np.sort(values), level, color=colour, linestyle=style, label=name, linewidth=1.8)
third.set_xscale("log")
third.set_xlabel("contrast of a patch (sd of pixels = 1)")
third.set_ylabel("share of patches below")
third.set_title("predictive checks of the photograph model", fontsize=10)
third.legend(frameon=False, fontsize=9, loc="upper left")
for axis in (first, second, third):
    axis.spines[["top", "right"]].set_visible(False)
figure.savefig(FIGURES / "04_arviz.png", dpi=110)
plt.close(figure)

# %% [markdown]
# **Which prior?** Suppose we had guessed an inclusion of 0.1 where it is 0.25. All latent sites
# belong to one datum each, so what a model predicts of a datum that it has not seen is its evidence
# $p(y_n) = \mathrm E_q\, e^{w_n}$, the mean weight. That is what `loo` reports here, with the k-hat
# of each datum's weights beside it. Enumeration knows.

# %%
other = simulated(True, probs=0.1)
trees["inclusion 0.1"] = read(*other, check[:num_read])
pairs = {
    "inclusion 0.25": (truth, trees["structured"]),
    "inclusion 0.1": (other[0], trees["inclusion 0.1"]),
}
known, estimate = {}, {}
for name, (program, found) in pairs.items():
    known[name] = infer.enumerate_posterior(
        check[:num_read], alike, program.prior, likelihood
    ).log_evidence
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it says what is counted below
        left_out = diagnostics.loo(found)
    estimate[name] = torch.from_numpy(left_out.elpd_i.values)
    print(
        f"{name}: log evidence of a datum {known[name].mean():.3f} by enumeration, "
        f"{estimate[name].mean():.3f} by loo (mean error "
        f"{(estimate[name] - known[name]).abs().mean():.3f}), "
        f"k above {left_out.good_k:.2f} for {int((left_out.pareto_k > left_out.good_k).sum())} data"
    )
for name, values in (("loo", estimate), ("enumeration", known)):
    difference = values["inclusion 0.25"] - values["inclusion 0.1"]
    se = difference.std() / math.sqrt(num_read)
    print(f"0.25 over 0.1 by {name}: {difference.mean():.3f} +- {se:.3f} nats per datum")

# %% [markdown]
# ## What was learnt
#
# * A thresholded Laplace law is a spike and slab. One learned threshold for every code and datum is
#   a free inclusion, and trains better than one that the data share.
# * "Which codes are active" has an answer with a number, and the number can be tested: where every
#   support can be enumerated, dependent codes come closer to it than independent ones.
# * k-hat is about the joint law. A high one warns against reweighting draws and against what codes
#   do *together*; how far P(active) of single codes is off, it says roughly at best.
# * Honest limits. Atoms and noise are point estimates, and "noise" holds what the model leaves out.
#   A prior of independent codes makes patches of too even a contrast. And for photographs P(active)
#   is that of independent codes: among atoms that look alike it is to be taken with care.
