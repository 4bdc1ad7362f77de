# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # 5. Is my posterior right?
#
# **The question.** A guide says "this code is active with probability 0.8, and then it lies between
# 1.1 and 1.9". May that be believed? Three things can be wrong, and each is mended differently:
#
# * the **encoder**: the family of laws holds a good posterior, the network does not find it;
# * the **family**: no member of it is close to the posterior;
# * the **model**: the posterior is right, and belongs to a model that did not make the data.
#
# Five diagnostics are put to guides and models of which we know what is wrong with them: k-hat, the
# amortisation gap, simulation-based calibration (SBC), predictive checks, and leaving data out.
# What counts is which of them notices what, and which stays silent.
#
# **The model.** A spike and slab, linear, with Gaussian noise:
#
# $$ z_{nk} \sim (1 - \pi)\, \delta_0 + \pi\, \mathcal N(0, 1), \qquad
# y_n \sim \mathcal N(A^\top z_n,\ \sigma^2 I). $$
#
# Nine atoms in three groups of three that look alike (cosine 0.8), so that it is hard to say which
# of three made a datum. With nine codes there are $2^9$ supports, and the exact posterior is a sum
# over all of them: `infer.enumerate_posterior`. It is what everything below is held against.

# %%
import functools
import math
import os
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from demo import figures  # the folder beside this script
from matplotlib import pyplot as plt

warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)

from pyro_sparse import diagnostics, infer, solvers, testing
from pyro_sparse.dictionaries import Dense
from pyro_sparse.distributions import SpikeAndSlab
from pyro_sparse.guides import StructuredThresholded, Thresholded, UnrolledEncoder
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding

SMOKE = os.environ.get("SMOKE") == "1"
FIGURES = Path(os.environ.get("FIGURES", "tutorials/figures"))
FIGURES.mkdir(parents=True, exist_ok=True)
BLUE = "#2563eb"
torch.manual_seed(0)

ATOMS, PROBS = 9, 0.2
SIGMA = math.sqrt(PROBS / 10)  # 10 dB: each feature has a variance of about PROBS without noise
num_train, num_test, passes = (1000, 100, 3) if SMOKE else (10_000, 500, 10)
num_simulations, num_draws, num_steps = (100, 100, 30) if SMOKE else (1000, 200, 200)

group = torch.arange(ATOMS) // 3
gram = 0.8 * (group[:, None] == group) + 0.2 * torch.eye(ATOMS)
rotation = torch.linalg.qr(torch.randn(ATOMS, ATOMS))[0]
dictionary = Dense(ATOMS, ATOMS, atoms=torch.linalg.cholesky(gram) @ rotation)
dictionary.freeze_()  # atoms are known: posteriors alone are compared
prior = SpikeAndSlab(dist.Normal(0.0, 1.0), probs=PROBS)
truth = SparseCoding(dictionary, Gaussian(SIGMA), prior)
with torch.no_grad():
    train = truth(num_data=num_train)
    codes = prior.sample((num_test, ATOMS))
    test = dictionary(codes) + SIGMA * torch.randn(num_test, ATOMS)
print(testing.check_model(truth, test[:5]))

# %% [markdown]
# ## The reference, and a mill that all go through
#
# A guide is any Pyro program with the model's sites. So the exact posterior is a guide as well, and
# goes through the same diagnostics as the others: what a figure looks like when all is well is then
# seen, not guessed.


# %%
class Exact:
    """The exact posterior of a model, as a guide."""

    def __init__(self, model):
        self.model, self.y = model, None

    def __call__(self, y, num_data=None):
        if self.y is not y:
            self.y = y
            parts = self.model.dictionary, self.model.prior, self.model.likelihood
            self.law = infer.enumerate_posterior(y, *parts)
        with pyro.plate("data", num_data or len(y), subsample=torch.arange(len(y))):
            pyro.sample("codes", self.law)


def amortised(structured, model=truth):
    """A guide with an encoder, trained on the data; so is the model, where it can learn."""
    torch.manual_seed(1)
    solver = solvers.Unrolled(dictionary, model.likelihood, num_steps=10)
    encoder = UnrolledEncoder(solver, dist.Laplace(0.0, 0.3), init_probs=PROBS)
    guide = StructuredThresholded(encoder, gram) if structured else Thresholded(encoder)
    loss = infer.SparseELBO(infer.LeaveOneOut(), num_samples=2) if structured else None
    infer.fit(
        model,
        guide,
        train,
        loss=loss,
        optimizer=functools.partial(torch.optim.Adam, lr=1e-2),
        schedule=functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=passes),
        epochs=passes,
        batch_size=200,
        progress=False,
    )
    return guide


def judged(name, model, guide, refine=False, seen=test):
    """What the diagnostics say of a guide, or of one that is refined on whatever data it gets."""
    refit = functools.partial(guide.refine, model, num_steps=num_steps) if refine else None
    evidence = infer.enumerate_posterior(seen, dictionary, prior, model.likelihood).log_evidence
    own = refit(seen) if refine else guide
    weights = infer.log_weights(model, own, seen, num_samples=1000)
    simulated = diagnostics.sbc(
        model,
        guide,
        torch.zeros(num_simulations, ATOMS),  # its shape counts alone
        refit=refit,
        num_simulations=num_simulations,
        num_samples=num_draws,
        progress=False,
    )
    found = {
        "weights": weights,
        "khat": diagnostics.khat(weights),
        "gap": (evidence - weights.local.mean(0)).mean().item(),  # log evidence minus ELBO
        "sbc": simulated,
        "coverage": simulated.sites["codes"].coverage(0.9, active=True),
        "reliability": simulated.sites["codes"].reliability(),
    }
    print(
        f"{name:22s} k-hat > 0.7: {(found['khat'] > 0.7).double().mean():4.0%}   "
        f"gap {found['gap']:5.2f} nats   SBC p {simulated.p_value:7.1e}   "
        f"90 % intervals hold {found['coverage'].share:.1%} +- {found['coverage'].se:.1%}   "
        f"error of P(active) {found['reliability'].ece:.3f} "
        f"(noise {found['reliability'].ece_of_noise:.3f})"
    )
    return found


# %% [markdown]
# ## A guide that fails
#
# `Thresholded` takes the codes for independent given the data. Of three atoms that look alike often
# one alone is active, this or that, and a law of independent codes cannot say so.

# %%
few = 50 if SMOKE else 100  # the exact posterior draws slowly
independent = amortised(structured=False)
print(testing.check_guide(independent, truth, test[:5]))
results = {
    "exact": judged("exact", truth, Exact(truth), seen=test[:few]),
    "independent": judged("independent", truth, independent),
}

# %% [markdown]
# What to read off, in the order of what it costs:
#
# 1. **k-hat** needs no simulation and no truth, and speaks of the data at hand, one by one. Draws
#    of the guide are weighted by $w = p(y, z) / q(z \mid y)$; k-hat is the shape of the tail of
#    $w$. Below 0.7 the draws could be reweighted to the posterior, above they could not.
# 2. **The gap** between log evidence and ELBO is $\mathrm{KL}(q \,\|\, p(z \mid y))$, here known by
#    enumeration.
# 3. **SBC** draws codes and data from the model, and asks whether the truth looks like one more
#    draw of the guide. Codes that are zero tie with draws that are zero; ties are broken at random,
#    so that zeros are no reproach. Its p-value says *whether* the guide is wrong, and with enough
#    simulations every approximation is. Coverage of intervals of active codes, and the error of
#    P(active), say *by how much*.
#
# The exact posterior passes: its intervals hold about nine in ten, and its error of P(active) is
# close to what noise alone makes. (Its weights are all equal, up to rounding; they have no tail,
# and the k-hat printed is that of rounding errors.) Independent codes fail everywhere.
#
# ## Encoder or family?
#
# k-hat and SBC do not say what to mend. The amortisation gap does: the same family, with parameters
# of its own for each datum (`guide.refine`), started from the encoder. What that gains is the fault
# of the encoder; what is then left to the log evidence is that of the family.

# %%
structured = amortised(structured=True)
log_evidence = infer.enumerate_posterior(test, dictionary, prior, truth.likelihood).log_evidence
gaps = {
    name: diagnostics.amortisation_gap(
        truth, guide, test, log_evidence=log_evidence, num_steps=num_steps
    )
    for name, guide in (("independent", independent), ("structured", structured))
}
for name, gap in gaps.items():
    print(f"{name}: {gap}")

# %% [markdown]
# Refining independent codes closes a good part of the gap, since it is hard for an encoder to
# choose one of three; what is left no training can close. So the family has to change.
# `StructuredThresholded` draws the codes one after the other, each given those before, and starts
# from the overlaps of the atoms. Both mends, each alone and together, are judged again. (SBC of
# refined guides refines on the simulated data: `refit=`.)

# %%
results["independent, refined"] = judged("independent, refined", truth, independent, refine=True)
results["structured"] = judged("structured", truth, structured)
results["structured, refined"] = judged("structured, refined", truth, structured, refine=True)

# %% [markdown]
# Changing the family betters every figure, if not to the exact one. Refining is another matter: it
# does what it is made for, the gap falls, and yet the error of P(active) *grows*, and of
# independent codes k-hat grows too. The gap is $\mathrm{KL}(q \,\|\, p)$, which is cheap to lower
# by settling for one of several explanations and forgetting the others. An encoder serves all data
# with few parameters, and cannot settle so freely. A better bound is not a better calibration: look
# at both.

# %% [markdown]
# ## What k-hat is good for, and what it cannot see
#
# Where k-hat is low, `psis` mends without any training: the smoothed weights turn draws of the
# guide into those of the posterior. P(active) of each code, by plain and by weighted draws, against
# enumeration:

# %%
exact = infer.enumerate_posterior(test, dictionary, prior, truth.likelihood).prob_active
psis_error = {}
for name in ("independent, refined", "structured, refined"):
    weights, khat = results[name]["weights"], results[name]["khat"]
    share = diagnostics.psis(weights)[0].exp()  # (draws, data), sums to 1 over draws
    active = (weights.draws["codes"] != 0).double()  # (draws, data, atoms)
    plain = (active.mean(0) - exact).abs().mean(1)
    weighted = (torch.einsum("sn,snk->nk", share, active) - exact).abs().mean(1)
    low = khat <= 0.7
    psis_error[name] = plain, weighted, low
    for words, part in (("k-hat <= 0.7", low), ("k-hat > 0.7", ~low)):
        print(
            f"{name:21s} {words:12s} ({int(part.sum()):3d} data): mean error of P(active) "
            f"{plain[part].mean():.4f}, reweighted {weighted[part].mean():.4f}"
        )

# %% [markdown]
# A low k-hat is no proof. It is computed from draws of the guide, and a code that the guide never
# draws leaves no weight: a guide that has settled for one of three look-alikes may look fine to it.
# The data of low k-hat whose P(active) is furthest off:

# %%
for name, (plain, _, low) in psis_error.items():
    worst = int(torch.where(low, plain, -1.0).argmax())
    drawn = (results[name]["weights"].draws["codes"][:, worst] != 0).double().mean(0)
    trio = (drawn - exact[worst]).abs().argmax() // 3 * 3
    said, known = (
        ", ".join(f"{p:.2f}" for p in values[trio : trio + 3].tolist())
        for values in (drawn, exact[worst])
    )
    print(
        f"{name}: k-hat {results[name]['khat'][worst]:.2f}, P(active) of three look-alikes "
        f"{said}; by enumeration {known}"
    )

# %%
figure, (first, second, third) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
shown = {"independent": BLUE, "structured": figures.MARK, "structured, refined": figures.INK}
for name, colour in shown.items():
    k = results[name]["khat"]
    first.hist(
        k.clamp(-0.25, 1.75), np.linspace(-0.3, 1.8, 22), histtype="step", linewidth=1.8,
        weights=np.full(len(k), 1 / len(k)), color=colour,
        label=f"{name}: {(k > 0.7).double().mean():.0%} above 0.7",
    )  # fmt: skip
first.axvline(0.7, 0, 0.75, color=figures.QUIET, linestyle="--", linewidth=1)
first.margins(y=0.4)
first.set_xlabel("k-hat of a datum (outer bins: and beyond)")
first.set_ylabel("share of the data")
first.set_title("can draws be reweighted?", fontsize=10)
first.legend(frameon=False, fontsize=9, loc="upper left")
for i, gap in enumerate(gaps.values()):
    family, encoder = gap.approximation.mean().item(), gap.amortisation.mean().item()
    second.bar(i, family, 0.6, color=figures.QUIET)
    second.bar(i, encoder, 0.6, bottom=family, color=BLUE)
    second.text(i, family / 2, f"family {family:.2f}", ha="center", va="center", fontsize=9)
    second.text(
        i, family + encoder, f"encoder {encoder:.2f}\n", ha="center", va="center", fontsize=9
    )
second.set_xticks(range(2), list(gaps))
second.margins(y=0.15)
second.set_ylabel("log evidence minus ELBO (nats per datum)")
second.set_title("what is to blame?", fontsize=10)
for (name, (plain, weighted, low)), colour in zip(
    psis_error.items(), (BLUE, figures.INK), strict=True
):
    for part, marker, words in ((low, "o", "k-hat <= 0.7"), (~low, "x", "k-hat > 0.7")):
        third.plot(
            plain[part], weighted[part], marker, color=colour, markersize=3.5, alpha=0.5,
            label=f"{name}, {words}",
        )  # fmt: skip
limit = max(
    float(errors.max())
    for plain, weighted, _ in psis_error.values()
    for errors in (plain, weighted)
)
third.plot([0, limit], [0, limit], color=figures.QUIET, linewidth=0.8)
third.set_xlabel("error of P(active) of a datum, plain draws")
third.set_ylabel("the same, draws reweighted")
third.set_title("what reweighting does (below the line: better)", fontsize=10)
third.legend(frameon=False, fontsize=8, loc="upper left")
for axis in (first, second, third):
    axis.spines[["top", "right"]].set_visible(False)
figure.savefig(FIGURES / "05_guides.png", dpi=110)
plt.close(figure)

# %% [markdown]
# ## How to read calibration
#
# Above: where among its draws does the truth of an active code stand? The curve is the distribution
# function of its rank minus that of a uniform one, for each of the nine codes; grey is where all of
# them stay with 95 % probability if the posterior is right. Up on the left and down on the right is
# a posterior that is too narrow. Below: of the codes called active with probability 0.8, were eight
# in ten?

# %%
figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
for (above, below), name in zip(axes.T, ("exact", "independent", "structured"), strict=True):
    found = results[name]["sbc"].sites["codes"]
    diagnostics.plot_rank_ecdf(found, active=True, ax=above)
    covered = results[name]["coverage"].share
    above.set_title(f"{name}: 90 % intervals hold {covered:.0%}", fontsize=10)
    above.set_ylim(-0.27, 0.27)
    diagnostics.plot_reliability(results[name]["reliability"], ax=below)
figure.savefig(FIGURES / "05_calibration.png", dpi=110)
plt.close(figure)

# %% [markdown]
# ## A model that fails
#
# Now the guide is beyond reproach, and the model is wrong: it believes in half of the noise. We
# give it its own exact posterior.

# %%
wrong = SparseCoding(dictionary, Gaussian(SIGMA / 2), prior)
results["wrong noise"] = judged("exact, wrong noise", wrong, Exact(wrong), seen=test[:few])

# %% [markdown]
# k-hat, gap and SBC are as good as they can be: they ask whether the guide is the posterior *of the
# model*, and it is. Only data can tell that the model is wrong:
#
# * `predictive_check` draws data anew at draws of the posterior, and compares them with what was
#   observed, by statistics of one's choice and by the log-likelihood.
# * `loo` says what the model predicts of a datum that it has not seen: here its log evidence, since
#   all latents belong to one datum each. It compares models, of which one may still be bad.
# * Here the codes of the data are known, and so is how many of them the intervals hold. In life
#   they are not.
#
# The mend: learn the noise, starting from the wrong one, with the structured guide.

# %%
learned = SparseCoding(dictionary, Gaussian(SIGMA / 2, trainable=True), prior)
learned_guide = amortised(structured=True, model=learned)
print(f"noise: true {SIGMA:.3f}, believed {SIGMA / 2:.3f}, learned {learned.likelihood.scale:.3f}")


def left_out(model, guide, number):
    """What the model predicts of data left out, from draws of a guide."""
    groups = ("log_likelihood", "sample_stats")
    tree = diagnostics.to_datatree(model, guide, test[:number], num_samples=500, groups=groups)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of high k, which is counted below
        return diagnostics.loo(tree)


data_checks, held = {}, {}
for name, model in (("wrong noise", wrong), ("learned noise", learned), ("true noise", truth)):
    guide = Exact(model)
    check = diagnostics.predictive_check(model, guide, test[:few], num_samples=num_draws)
    held[name] = left_out(model, guide, few).elpd_i.values
    law = infer.enumerate_posterior(test, dictionary, prior, model.likelihood)
    of_codes = diagnostics.Calibration.from_draws(codes, law.sample((num_draws,)))
    curve = diagnostics.reliability(law.prob_active.clamp(0, 1), codes != 0)
    data_checks[name] = check, of_codes
    covered = of_codes.coverage(0.9, active=True)
    print(
        f"{name:14s} predictive p of the log-likelihood {check.overall['log_likelihood']:.3f}   "
        f"loo {held[name].mean():6.2f} nats per datum   90 % intervals hold {covered.share:.1%} +- "
        f"{covered.se:.1%}   error of P(active) {curve.ece:.3f} (noise {curve.ece_of_noise:.3f})"
    )
for name in ("wrong noise", "true noise"):
    difference = held["learned noise"] - held[name]
    se = difference.std(ddof=1) / math.sqrt(few)
    print(f"learned over {name} by loo: {difference.mean():.3f} +- {se:.3f} nats per datum")

# %% [markdown]
# The more likely the model finds the data, given their codes, the better? No: the wrong model gives
# them the higher log-likelihood, and expects still more of data of its own. What has to agree is
# data and replicates.
#
# These figures came from exact posteriors. In life `loo` has the draws of a trained guide, and the
# k-hat of each datum says where its figure can be relied on.

# %%
for name, model, guide in (
    ("wrong noise", wrong, amortised(structured=True, model=wrong)),
    ("learned noise", learned, learned_guide),
):
    found = left_out(model, guide, num_test)
    law = infer.enumerate_posterior(test, dictionary, prior, model.likelihood)
    wide = int((found.pareto_k > found.good_k).sum())
    print(
        f"{name}, trained guide: loo {found.elpd_i.values.mean():.2f} nats per datum, enumeration "
        f"{law.log_evidence.mean():.2f}; k-hat above {found.good_k:.2f} for {wide} of {num_test}"
    )

# %%
figure, (first, second, third) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
diagnostics.plot_rank_ecdf(results["wrong noise"]["sbc"].sites["codes"], active=True, ax=first)
first.set_title("wrong noise, data of the wrong model (SBC)", fontsize=10)
diagnostics.plot_rank_ecdf(data_checks["wrong noise"][1], active=True, ax=second)
second.set_title("wrong noise, codes behind the data", fontsize=10)
for axis in (first, second):
    axis.set_ylim(-0.4, 0.4)
for i, (check, _) in enumerate(data_checks.values()):
    for values, colour, words, height in (
        (check.replicated["log_likelihood"], figures.QUIET, "data drawn anew", 0.12),
        (check.observed["log_likelihood"], figures.MARK, "data", -0.12),
    ):
        each = values.mean(1)  # of a draw, over the data
        third.plot(
            each, np.full(len(each), i + height), "|", color=colour, markersize=11, alpha=0.5,
            label=words if i == 0 else None,
        )  # fmt: skip
third.set_yticks(range(3), list(data_checks))
third.set_ylim(-0.5, 2.9)
third.set_xlabel("log-likelihood at a draw (nats per datum)")
third.set_title("predictive check: one mark is one draw", fontsize=10)
third.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)
third.spines[["top", "right"]].set_visible(False)
figure.savefig(FIGURES / "05_model.png", dpi=110)
plt.close(figure)

# %% [markdown]
# ## What was learnt
#
# * **k-hat**, to look at first: it costs seconds, and says of which data the draws could be
#   reweighted. It cannot see what the guide never draws, nor a wrong model; and a high one may go
#   with good P(active) of single codes.
# * **Amortisation gap**: it costs a refining, and says whether to train the encoder or to change
#   the family. How far the family is off it says only where the evidence is known.
# * **SBC**: it costs simulations, and says by how much intervals and P(active) are off, on average.
#   It cannot see a wrong model, nor a single datum.
# * **Predictive check**: it costs draws, and says whether the data look like those of the model. It
#   cannot see what the statistic does not ask.
# * **loo**: it costs what k-hat does, and says which of two models predicts better. It cannot see
#   whether either is good, and where k-hat is high it says nothing.
#
# In short:
#
# * A posterior is judged in two steps that do not replace each other: is the guide the posterior of
#   the model (k-hat, gap, SBC), and is the model one of the data (predictive check, loo)?
# * A p-value says that a guide is not exact, which is known of every guide beforehand. Coverage
#   says what it costs.
# * Where atoms look alike, dependent codes mend what independent ones cannot. Refining raises the
#   bound, and may still make P(active) worse; `psis` then mends P(active) where k-hat is low.
# * Honest limits: with more than 14 codes nobody enumerates. `infer.gibbs` then is the reference,
#   and where atoms look alike it mixes slowly.
