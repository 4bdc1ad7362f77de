# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # 8. Counts with missing entries
#
# **The question.** Spikes of some forty neurons are counted, second by second, but electrodes lose
# contact: of every neuron, stretches of 20 s are missing. What did those neurons do meanwhile, as
# far as the others tell, and how sure is that?
#
# **The model.** A second $n$ is a sparse combination of patterns of the population, on the scale of
# log-rates, above a baseline $b_d$ of each neuron:
#
# $$ z_{nk} \sim (1 - \pi)\, \delta_0 + \pi\, \mathcal N(0, 2^2), \qquad
# \mu_{nd} = \exp\Big(b_d + \sum_k z_{nk} A_{kd}\Big), $$
#
# $$ y_{nd} \sim \mathrm{Poisson}(\mu_{nd}) \quad\text{or}\quad \mathrm{NegativeBinomial}(\text{mean
# } \mu_{nd},\ \text{variance } \mu_{nd} + \mu_{nd}^2 / r_d). $$
#
# What is missing has no term in the likelihood: with $m_{nd} = 1$ where a count was observed,
#
# $$ \log p(y_n \mid z_n) = \sum_d m_{nd} \log p(y_{nd} \mid \mu_{nd}). $$

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
from demo import figures  # the folder beside this script
from matplotlib import pyplot as plt

warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)

from pyro_sparse import diagnostics, infer, solvers, testing
from pyro_sparse.dictionaries import Dense
from pyro_sparse.distributions import SpikeAndSlab
from pyro_sparse.guides import Thresholded, UnrolledEncoder
from pyro_sparse.likelihoods import Gaussian, NegativeBinomial, Offset, Poisson, Stabilised
from pyro_sparse.models import SparseCoding

SMOKE = os.environ.get("SMOKE") == "1"
FIGURES = Path(os.environ.get("FIGURES", "tutorials/figures"))
FIGURES.mkdir(parents=True, exist_ok=True)
BLUE = "#2563eb"
torch.manual_seed(0)

# %% [markdown]
# ## Data, and holes that we make ourselves
#
# Neurons of a rat's hippocampus (R. Barbieri et al. 2005, by way of the toolbox nSTAT) if
# `PYRO_SPARSE_DATA` names a folder with `placecells/animal1.npz`. Otherwise a simulated rat on a
# round track, whose neurons fire at places of their own, with more variance than Poisson. What the
# text says of results, it says of the recording in full; short runs (`SMOKE=1`) come out otherwise.
#
# The holes are ours, so what they hide is known. Per neuron and stretch of 20 s: one in ten is kept
# for choosing settings (validation), one in five for the test. Both are missing to every method.


# %%
def recorded(file, frames=30):
    """Counts of seconds, shape (seconds, neurons)."""
    counts = np.load(file)["counts"]
    whole = counts.shape[1] // frames * frames
    return counts[:, :whole].reshape(len(counts), -1, frames).sum(-1).T.astype(np.float32)


def simulated(seconds=1200, neurons=40, total_count=2.0):
    """The same of a simulated rat."""
    random = np.random.default_rng(0)
    angle = np.cumsum(random.normal(0.15, 0.25, seconds))
    centre = random.uniform(0, 2 * np.pi, neurons)
    tuning = np.cos(angle[:, None] - centre) - 1
    rate = np.exp(random.normal(-1.5, 0.7, neurons) + 3 * np.exp(4 * tuning))
    gain = random.gamma(total_count, 1 / total_count, rate.shape)
    return random.poisson(rate * gain).astype(np.float32)


folder = os.environ.get("PYRO_SPARSE_DATA")
file = Path(folder, "placecells", "animal1.npz") if folder else None
source = recorded(file) if file is not None and file.exists() else simulated()
STRETCH = 20  # s
counts = torch.from_numpy(source[:240] if SMOKE else source).contiguous()
num_seconds, num_neurons = counts.shape
stretch = torch.arange(num_seconds) // STRETCH
random = np.random.default_rng(1)
kind = random.choice(3, (int(stretch.max()) + 1, num_neurons), p=[0.7, 0.1, 0.2])
seen, validation, test = (torch.from_numpy(kind == k)[stretch] for k in range(3))
y = torch.where(seen, counts, torch.nan)  # no method sees more
print(
    f"{num_seconds} s of {num_neurons} neurons, {counts.mean():.2f} spikes per second and neuron; "
    f"{(counts == 0).float().mean():.0%} of the counts are zero; "
    f"{(~seen).float().mean():.0%} are missing"
)

# %% [markdown]
# ## One model, three likelihoods, three ways to treat a hole
#
# The baseline is an `Offset`: a part of the predictor that the codes do not explain, learned from
# where the mean of the observed counts puts it. `infer.fit(mask=)` hands the mask to model and
# guide. The encoder is unrolled: it follows the score of the *observed* entries, so that a missing
# one pulls neither way. (A network that reads the data would be given a zero.) The gradient of a
# count likelihood may be huge while the codes are still poor; `Stabilised` bounds it in the
# encoder, the model keeps the likelihood as it is.
#
# Beside it, a Gaussian model of square roots of counts (whose variance is then about the same at
# all rates, as Gaussian noise wants it); what it says of a count is the mass between the square
# roots of its neighbours. And the Poisson model with holes filled, by zeros, as a recorder might
# write them, or by the mean count of the neuron, rounded since counts are whole: the model takes
# what was filled in for data.


# %%
def mean_count(values, mask):
    """Of each neuron, over what was observed."""
    return torch.where(mask, values, 0.0).sum(0) / mask.sum(0)


def poisson(values, mask):
    return Offset(Poisson(), (mean_count(values, mask) + 1e-3).log(), trainable=True)


def negative_binomial(values, mask):
    """Started from the negative binomial of a constant rate."""
    dispersed = NegativeBinomial(torch.ones(num_neurons), trainable=True)
    likelihood = Offset(dispersed, (mean_count(values, mask) + 1e-3).log(), trainable=True)
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        law = likelihood(torch.zeros_like(values))
        (-law.log_prob(torch.where(mask, values, 0.0))[mask].mean()).backward()
        optimizer.step()
    return likelihood


def gaussian(values, mask):
    noise = Gaussian(torch.full((num_neurons,), 0.5), trainable=True)
    return Offset(noise, mean_count(values, mask), trainable=True)


def trained(likelihood_of, values, mask, num_atoms, probs, *, stabilised=True):
    """A model and a guide of the entries that the mask keeps."""
    torch.manual_seed(0)
    likelihood, dictionary = likelihood_of(values, mask), Dense(num_atoms, num_neurons)
    model = SparseCoding(dictionary, likelihood, SpikeAndSlab(dist.Normal(0.0, 2.0), probs=probs))
    if stabilised:
        solver = solvers.Unrolled(
            dictionary, Stabilised(likelihood, 2.0), num_steps=10, step_size=0.1
        )
    else:
        solver = solvers.Unrolled(dictionary, likelihood, num_steps=10)
    encoder = UnrolledEncoder(solver, dist.Laplace(0.0, 1.0), init_probs=probs)
    guide = Thresholded(encoder)
    epochs = 5 if SMOKE else 60
    infer.fit(
        model,
        guide,
        values,
        mask=mask,
        optimizer=functools.partial(torch.optim.Adam, lr=1e-2),
        schedule=functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs),
        epochs=epochs,
        batch_size=200,
        progress=False,
    )
    return model.eval(), guide.eval()


def root(values):
    return (values + 0.375).sqrt()


def log_mass(law):
    """Log-probability of the counts under a law of their square roots."""
    above = (root(counts + 0.5) - law.loc) / law.scale
    below = (root((counts - 0.5).clamp(min=0)) - law.loc) / law.scale
    below = torch.where(counts > 0, below, -torch.inf)
    high = below > 0  # subtract where the tails are small
    low, top = torch.where(high, -above, below), torch.where(high, -below, above)
    low, top = torch.special.log_ndtr(low), torch.special.log_ndtr(top)
    return top + torch.log(-torch.expm1(low - top))


@torch.no_grad()
def predicted(model, guide, values, mask, log_prob, num_draws=20 if SMOKE else 200):
    """Log-probability of every count, given the entries that the mask keeps of its second."""
    drawn = guide.posterior(values, mask).sample((num_draws,))
    total = torch.full_like(counts, -torch.inf)
    for z in drawn:
        total = torch.logaddexp(total, log_prob(model.likelihood(model.dictionary(z))))
    return total - math.log(num_draws)


whole = torch.ones_like(seen)
zeros = torch.where(seen, counts, 0.0)
means = torch.where(seen, counts, mean_count(counts, seen).round())
ways = {
    "Poisson, mask": (poisson, y, seen),
    "negative binomial, mask": (negative_binomial, y, seen),
    "Gaussian of roots, mask": (gaussian, root(y), seen),
    "Poisson, filled by zeros": (poisson, zeros, whole),
    "Poisson, filled by means": (poisson, means, whole),
}
settings = [(20, 0.2)] if SMOKE else [(20, 0.2), (20, 0.4)]
pairs, log_prob, chosen = {}, {}, {}
for way, (likelihood_of, values, mask) in ways.items():
    roots = likelihood_of is gaussian
    best = -math.inf
    for setting in settings:
        pair = trained(likelihood_of, values, mask, *setting, stabilised=not roots)
        mass = log_mass if roots else lambda law: law.log_prob(counts)
        found = predicted(*pair, values, mask, mass)
        if found[validation].mean() > best:  # the test entries have no say
            best = found[validation].mean()
            pairs[way], log_prob[way], chosen[way] = pair, found, setting
model, guide = pairs["negative binomial, mask"]
print(testing.check_model(model, counts[:20], mask=seen[:20]))
print(testing.check_guide(guide, model, counts[:20], mask=seen[:20]))

# %% [markdown]
# ## Who predicts the held-out counts?
#
# Two more to compare with know of no other neuron: a constant rate for each, Poisson or negative
# binomial. The difference between these two is what over-dispersion alone is worth.

# %%
constant, flat = negative_binomial(y, seen), torch.zeros_like(counts)
with torch.no_grad():
    log_prob["Poisson, constant rate"] = poisson(y, seen)(flat).log_prob(counts)
    log_prob["negative binomial, constant rate"] = constant(flat).log_prob(counts)


def gain(way, over, where=test):
    """Mean difference per held-out count in nats; its standard error is that over stretches."""
    difference = torch.where(where, log_prob[way] - log_prob[over], 0.0).sum(1)
    number = torch.zeros(len(kind)).index_add(0, stretch, where.sum(1).float())
    total = torch.zeros(len(kind)).index_add(0, stretch, difference)
    mean = total.sum() / number.sum()
    return mean.item(), ((total - mean * number).square().sum().sqrt() / number.sum()).item()


base = "Poisson, constant rate"
order = sorted(log_prob, key=lambda way: log_prob[way][test].mean())
print(f"{'held-out counts':34s} atoms, pi   nats per count   over a constant rate")
for way in reversed(order):
    mean, se = gain(way, base)
    setting = "{}, {}".format(*chosen[way]) if way in chosen else ""
    score = log_prob[way][test].mean()
    print(f"{way:34s} {setting:10s}  {score:7.3f}          {mean:+.3f} +- {se:.3f}")
for way, over in (
    ("Poisson, mask", "Poisson, filled by zeros"),
    ("Poisson, mask", "Poisson, filled by means"),
    ("Poisson, mask", "Gaussian of roots, mask"),
    ("negative binomial, mask", "Poisson, mask"),
    ("negative binomial, mask", "negative binomial, constant rate"),
):
    mean, se = gain(way, over)
    print(f"{way} over {over}: {mean:+.3f} +- {se:.3f} nats per held-out count")

worst = int(0.01 * test.sum()) + 1
for way in ("Gaussian of roots, mask", "Poisson, mask", "negative binomial, mask"):
    rest = log_prob[way][test].sort().values[worst:].mean()
    print(
        f"{way:24s} its worst count {log_prob[way][test].min():.0f} nats; "
        f"without the worst hundredth {rest:.3f} nats per count"
    )
quietest = pairs["Gaussian of roots, mask"][0].likelihood.likelihood.scale.min()
print(f"smallest noise that the Gaussian model learned: {quietest:.3f} square roots of counts")

# %% [markdown]
# Three things to read off.
#
# * With the mask Poisson predicts better than with anything filled in. Zeros do most harm: the
#   model learns that neurons fall silent for no reason.
# * The Gaussian model lives or dies by single counts. A neuron that is almost always silent has
#   square roots almost without variance, so the noise it learns is next to none, and one burst
#   where none was expected costs as much as a thousand other counts. Without its worst hundredth of
#   the counts its figure is another.
# * The constant negative binomial is the baseline to beat. Over a constant *Poisson* rate it gains
#   more than Poisson with codes does: much of what the codes seem to explain there is variance.
#   What the other neurons really tell is the difference between the negative binomial with codes
#   and that without. It is small, and many standard errors from zero.

# %%
figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
for i, way in enumerate(order):
    mean, se = gain(way, base)
    colour = figures.MARK if "negative" in way and "mask" in way else figures.QUIET
    axis.barh(
        i,
        mean,
        0.65,
        xerr=2 * se,
        color=BLUE if way == "Poisson, mask" else colour,
        ecolor=figures.INK,
    )
axis.set_yticks(range(len(order)), order)
axis.axvline(0, color=figures.INK, linewidth=0.8)
axis.set_xlabel(
    "gain over a constant Poisson rate (nats per held-out count); bars: two standard errors"
)
axis.spines[["top", "right"]].set_visible(False)
figure.savefig(FIGURES / "08_scores.png", dpi=110)
plt.close(figure)

# %% [markdown]
# ## A mask is not a zero
#
# To a model, a zero is news: that neuron was silent. A hole is none. Two tests, with the trained
# negative binomial model held as it is. What stands in a hole must not matter under a mask, be it
# `nan`; and told zeros in place of holes, the same posterior lowers its rates. (It does so mildly,
# since a negative binomial expects many zeros. Being *trained* on them is what costs most, above.)

# %%
with torch.no_grad():
    said = guide.posterior(y, seen).prob_active
    other = guide.posterior(counts, seen).prob_active  # the holes hold the true counts
    print(
        f"P(active) with nan or with the truth in the holes: differ by {(said - other).abs().max()}"
    )
    rates = {
        "mask": model.likelihood.mean(model.dictionary(guide.posterior(y, seen).sample((50,)))),
        "zeros": model.likelihood.mean(
            model.dictionary(guide.posterior(zeros, whole).sample((50,)))
        ),
    }
expected = {name: rate.mean(0) for name, rate in rates.items()}
told = predicted(model, guide, zeros, whole, lambda law: law.log_prob(counts))
print(f"mean of the held-out counts: {counts[test].mean():.2f}")
for name, score in (("mask", log_prob["negative binomial, mask"]), ("zeros", told)):
    print(
        f"  {name:5s}: expected {expected[name][test].mean():.2f}, "
        f"log-probability {score[test].mean():.3f} nats per count"
    )

# %%
shown = slice(0, 200)
by_rate = mean_count(counts, seen).argsort(descending=True)
figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", sharey=True)
in_holes = torch.where(seen, torch.nan, expected["mask"])
for axis, values, rest, title in (
    (axes[0], y, "#a9c8f5", "observed counts (blue: missing)"),
    (axes[1], in_holes, "#eaf1fb", "expected counts in the holes"),
):
    shades = plt.get_cmap("Greys").with_extremes(bad=rest)
    picture = axis.imshow(
        torch.log1p(values)[shown][:, by_rate].T, aspect="auto", cmap=shades, vmin=0, vmax=3,
        interpolation="nearest",
    )  # fmt: skip
    axis.set_xlabel("time (s)")
    axis.set_title(title, fontsize=10)
axes[0].set_ylabel("neuron, the most active first")
bar = figure.colorbar(picture, ax=axes, ticks=[math.log1p(v) for v in (0, 1, 3, 7, 19)])
bar.ax.set_yticklabels(["0", "1", "3", "7", "19"])
bar.set_label("spikes per second")
figure.savefig(FIGURES / "08_holes.png", dpi=110)
plt.close(figure)

# %% [markdown]
# ## Is Poisson right? A predictive check
#
# Counts drawn anew at draws of the posterior are compared with the observed ones. A statistic has
# to be chosen that could differ: too much variance makes more zeros *and* more large counts than
# Poisson allows. p is the share of replicates with at least as much of it as the data; near 0 or 1
# the model does not make such data.


# %%
def zeros_of(values):
    """Share of the observed counts of a second that are zero."""
    return (values == 0).double().sum(1) / values.isfinite().sum(1)


def large_of(values):
    """Share that are at least six times the mean of their neuron, and two at least."""
    limit = (6 * mean_count(counts, seen)).clamp(min=2)
    return (values >= limit).double().sum(1) / values.isfinite().sum(1)


checks = {
    way: diagnostics.predictive_check(
        *pairs[way],
        y,
        mask=seen,
        statistics={"zeros": zeros_of, "large counts": large_of},
        num_samples=50 if SMOKE else 200,
    )
    for way in ("Poisson, mask", "negative binomial, mask")
}
for way, check in checks.items():
    for name in ("zeros", "large counts"):
        print(
            f"{way:24s} {name:12s}: {check.observed[name].mean():.4f} of the data, "
            f"{check.replicated[name].mean():.4f} of the replicates, p = {check.overall[name]:.3f}"
        )

# %% [markdown]
# The held-out counts are the harder test, since the posterior has not seen them. Intervals: how
# many of them hold the count? (Counts tie; ties are broken at random, so that a right law covers
# exactly.) And the variance: squared errors of the prediction should be what the law says that they
# are.

# %%
calibration, moments, intervals = {}, {}, {}
with torch.no_grad():
    for way in ("Poisson, mask", "negative binomial, mask"):
        program, posterior = pairs[way]
        codes = posterior.posterior(y, seen).sample((50 if SMOKE else 200,))
        law = program.likelihood(program.dictionary(codes))
        again = law.sample()
        calibration[way] = diagnostics.Calibration.from_draws(counts[test], again[:, test])
        mean = law.mean.mean(0)
        variance = law.variance.mean(0) + law.mean.var(0)
        moments[way] = mean[test], variance[test], (counts - mean).square()[test]
        intervals[way] = again.quantile(0.05, 0), again.quantile(0.95, 0)
        print(
            f"{way:24s} intervals of held-out counts: nominal 50 % hold "
            f"{calibration[way].coverage(0.5).share:.1%}, 90 % hold "
            f"{calibration[way].coverage(0.9).share:.1%}, 99 % hold "
            f"{calibration[way].coverage(0.99).share:.1%}"
        )
spread = model.likelihood.likelihood.total_count.detach()
print(
    f"learned r of the neurons: median {spread.median():.2f}, from {spread.min():.2f} to "
    f"{spread.max():.1f}: at a mean of 5 the variance is {5 + 25 / spread.median():.0f}, not 5"
)

# %%
figure, (first, second, third) = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
colours = {"Poisson, mask": BLUE, "negative binomial, mask": figures.MARK}
for way, colour in colours.items():
    first.hist(
        calibration[way].pit.flatten(), np.linspace(0, 1, 21), density=True, histtype="step",
        linewidth=1.8, color=colour, label=way,
    )  # fmt: skip
    mean, variance, error = moments[way]
    groups = mean.log().argsort().chunk(12)
    x, said, got = ([values[g].mean().item() for g in groups] for values in (mean, variance, error))
    second.plot(x, said, "-", color=colour, linewidth=1.5, label=f"{way}: said")
    second.plot(x, got, "o", color=colour, markersize=5, label=f"{way}: got")
first.axhline(1, color=figures.QUIET, linewidth=0.8)
first.margins(y=0.25)
first.set_xlabel("rank of a held-out count among its draws")
first.set_ylabel("density")
first.set_title("flat if the predictive law is right", fontsize=10)
first.legend(frameon=False, fontsize=9)
second.set_xscale("log")
second.set_yscale("log")
second.set_xlabel("expected count (spikes per second)")
second.set_ylabel("squared error (spikes² per second²)")
second.set_title("variance of held-out counts, said and got", fontsize=10)
second.legend(frameon=False, fontsize=8)
middle = int(by_rate[4])
hole = int(torch.where(test[:, middle])[0][0]) // STRETCH * STRETCH
span = slice(max(0, hole - STRETCH), hole + 2 * STRETCH)
time = torch.arange(num_seconds)[span]
for way, colour in colours.items():
    low, high = (edge[span, middle] for edge in intervals[way])
    inside = test[span, middle]
    third.fill_between(
        time,
        low,
        high,
        where=inside.numpy(),
        step="mid",
        color=colour,
        alpha=0.25,
        label=f"{way}: 90 %",
    )
observed = seen[span, middle]
third.plot(time[observed], counts[span, middle][observed], ".", color=figures.INK, label="observed")
hidden = ~observed
third.plot(
    time[hidden], counts[span, middle][hidden], "o", color="white", markeredgecolor=figures.INK,
    markersize=5, label="held out",
)  # fmt: skip
third.set_ylim(-0.5, 1.6 * third.get_ylim()[1])
third.set_xlabel("time (s)")
third.set_ylabel("spikes per second")
third.set_title("one neuron, and what the others say of it", fontsize=10)
third.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
for axis in (first, second, third):
    axis.spines[["top", "right"]].set_visible(False)
figure.savefig(FIGURES / "08_dispersion.png", dpi=110)
plt.close(figure)

# %% [markdown]
# The negative binomial mends the zeros and the intervals. It does not mend all: the replicates have
# too few large counts still, and it says more variance than there is. The tail of these counts is
# not that of its family.
#
# ## What was learnt
#
# * A mask leaves a term out; whatever stands in the hole, `nan` included, has no part in model,
#   guide or objective. A zero in its place is a datum, and teaches wrong rates.
# * What the other neurons do tells of a missing one, and the posterior of the codes makes a
#   predictive law of it, to be scored by its log-probability: an error of the mean alone would not
#   notice intervals that are too narrow.
# * Poisson intervals of these counts hold too little, and a predictive check says so before
#   anything is held out. One more number for each neuron, $r_d$, mends intervals and zeros, though
#   not the largest counts.
# * Compare with a baseline of the same family. Against a constant Poisson rate the codes look
#   splendid; against a constant negative binomial they gain little, and that little is what they
#   know.
# * Honest limits. Holes were made at random, whatever the counts; where contact is lost *because* a
#   neuron fires, no mask helps. Seconds are taken for independent, so nothing is learned from the
#   seconds around a hole. Atoms, baselines and $r$ are point estimates.
