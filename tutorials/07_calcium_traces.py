# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # 7. Calcium traces
#
# **The question.** A neuron with a calcium indicator lights up when it fires, and fades. Given the
# fluorescence, when did it fire, how sure is that, and how large was each event?
#
# **The model.** After an event the fluorescence decays. With one kernel $h$ for all events, in
# units of the noise and less a baseline,
#
# $$ z_t \sim (1 - \pi)\, \delta_0 + \pi\, \mathrm{Exponential}(\lambda), \qquad
# y_t \sim \mathcal N\big((h * z)_t,\ \sigma^2\big), \qquad h_t \propto e^{-t / \tau}, \ \|h\| =
# 1. $$
#
# Codes are not negative. The kernel is a convolutional dictionary of one atom; the exponential is
# where it starts, and it may be learned.

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
from demo import figures, membrane, neurons  # the folder beside this script
from matplotlib import pyplot as plt
from scipy.ndimage import median_filter
from torch import nn

from pyro_sparse import diagnostics, infer, solvers, testing
from pyro_sparse.dictionaries import Conv, Overhang
from pyro_sparse.distributions import Rate, SpikeAndSlab
from pyro_sparse.guides import (
    SpikeAndSlabPosterior,
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
# Most probabilities of being active are all but zero, and a CPU takes long over such numbers.
torch.set_flush_denormal(True)
SECOND = neurons.FRAMES

# %% [markdown]
# ## The recordings
#
# If `PYRO_SPARSE_DATA` names a folder with `calcium/jgcamp8f.npz`: neurons of mouse visual cortex,
# imaged at 122 Hz with jGCaMP8f, and recorded from with an electrode that tells the spikes.
# Otherwise simulated neurons, with bursts, a baseline that wanders, and a kernel with a fast and a
# slow decay, which is *not* that of the model.
#
# Every third neuron is for choosing: all that is trained or set is trained and set on these. The
# others are the test.

# %%
path = neurons.find("calcium/jgcamp8f.npz")
if path:
    everyone = neurons.load_fluorescence(path, trials=1)
else:
    everyone = neurons.simulate_fluorescence(*((4, 32.0) if SMOKE else (12, 160.0)))
choosing, testing_set = everyone[::3], [n for i, n in enumerate(everyone) if i % 3]
for name, group in (("to choose", choosing), ("to test", testing_set)):
    count = sum(len(s) for n in group for s in n.spikes)
    seconds = sum(n.trace.size for n in group) / SECOND
    print(f"{name}: {len(group)} neurons, {seconds:.0f} s, {count} spikes")

# %% [markdown]
# **Baseline and noise.** The baseline is a running median, over a time to be chosen: events take
# up a small part of it. The noise is estimated from differences of neighbouring frames, which
# slow signals hardly touch. What remains is cut in rows of eight seconds.

# %%
WIDTH, KERNEL = 976, 61  # frames: 8 s and 0.5 s


def prepare(group, seconds):
    """Rows in units of the noise, ``(rows, 1, WIDTH)``."""
    rows = []
    for neuron in group:
        for trace in neuron.trace:
            noise = np.median(np.abs(np.diff(trace))) / (0.6745 * math.sqrt(2))
            baseline = median_filter(trace, round(seconds * SECOND), mode="nearest")
            whole = len(trace) // WIDTH * WIDTH
            rows.append(((trace - baseline) / noise)[:whole].reshape(-1, 1, WIDTH))
    return torch.tensor(np.concatenate(rows), dtype=torch.float32)


# %% [markdown]
# ## Model and guide
#
# The prior's parameters, how often there is an event and how large it is, are learned, and so may
# be the kernel. `Overhang` lets a kernel hang over the edge of a row: the tail of an event before
# it needs a code too.
#
# Two posteriors are tried, both normal laws cut off at zero. In `SpikeAndSlabPosterior` inclusion,
# location and scale of a code are free. `ThresholdPosterior` has one learned threshold $\theta$: a
# code is what exceeds it of a normal draw, so that $P(z \ne 0) = \Phi((\mu - \theta) / s)$.


# %%
PROBS, SIZE, LEVEL = 0.01, 6.0, 2.5  # where learning starts; sizes in units of the noise


class Events(nn.Module):
    """A spike and an exponential slab of which the inclusion is learned."""

    def __init__(self):
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(math.log(PROBS / (1 - PROBS))))

    def forward(self, rate):
        return SpikeAndSlab(dist.Exponential(rate), logits=self.logit.expand(rate.shape))


def program(decay, learn_kernel, threshold=False):
    """A model and a guide that share dictionary and likelihood."""
    torch.manual_seed(0)
    kernel = torch.exp(-torch.arange(KERNEL) / (decay * SECOND))
    dictionary = Conv(1, 1, KERNEL, boundary=Overhang(), atoms=kernel[None, None])
    if not learn_kernel:
        dictionary.freeze_()
    likelihood = Gaussian(1.0, trainable=True)
    model = SparseCoding(
        dictionary, likelihood, Events(), rate=Rate(1 / SIZE, num_atoms=1), signal_shape=(1, WIDTH)
    )
    apart = solvers.NonMaximumSuppression(solvers.Proximal(), gap=2)  # as in tutorial 3
    solver = solvers.Unrolled(dictionary, likelihood, num_steps=8, shrinkage=apart, lipschitz=3.0)
    start = {"init_probs": PROBS / 2, "init_scale": SIZE}  # where it starts
    encoder = UnrolledEncoder(solver, dist.Exponential(LEVEL), one_sided=True, **start)
    free = SpikeAndSlabPosterior(one_sided=True)
    learned = ThresholdPosterior(Rate(3.0, num_atoms=1), dist.Normal, soft=True, one_sided=True)
    return model, Thresholded(encoder, learned if threshold else free)


EPOCHS = 3 if SMOKE else 10
KERNELS = {  # where it starts (s), and whether it is learned
    "exponential, 30 ms": (0.03, False),
    "exponential, 100 ms": (0.1, False),
    "learned": (0.06, True),
}


def train(y, *options, **more):
    """Model and guide after training, and the ELBO of a row in nats."""
    model, guide = program(*options, **more)
    infer.fit(
        model,
        guide,
        y,
        optimizer=functools.partial(torch.optim.Adam, lr=3e-2),
        schedule=functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=EPOCHS),
        epochs=EPOCHS,
        batch_size=min(20, len(y)),
        progress=False,
    )
    return model.eval(), guide.eval(), -infer.SparseELBO().loss(model, guide, y) / len(y)


model, guide = program(*KERNELS["learned"])
few = prepare(choosing[:1], 4.0)[:2]
for advice in (testing.check_model(model, few), testing.check_guide(guide, model, few)):
    print(f"{advice.subject}: all checks passed" if advice.ok else advice)

# %% [markdown]
# ## The score
#
# Spikes at most 3 frames (25 ms) after the one before are one event, a burst; so are codes. An
# event that was found and a true one are a pair if they are at most 5 frames (41 ms) apart, each
# in one pair at most. F1 is the harmonic mean of the shares of the found and of the true events
# that have a partner.
#
# A plain threshold on the same trace is the rival: an event wherever the trace rises through a
# level.

# %%
GAP, WINDOW = 3, 5


def bursts(spikes):
    """Mean frame of each burst, and its number of spikes."""
    label = np.cumsum(np.r_[False, np.diff(spikes) > GAP])[: len(spikes)]
    number = np.bincount(label)
    return np.bincount(label, spikes) / np.maximum(number, 1), number


def true_events(group):
    """Bursts of each trial, in the order of its rows, and their numbers of spikes."""
    found = []
    for neuron in group:
        for trace, spikes in zip(neuron.trace, neuron.spikes, strict=True):
            found.append(bursts(spikes[spikes < len(trace) // WIDTH * WIDTH]))
    return found


def by_trial(values, group):
    """Values of all frames, ``(rows, WIDTH)``, as one array for each trial."""
    sizes = [len(trace) // WIDTH for neuron in group for trace in neuron.trace]
    return [part.ravel() for part in np.split(values, np.cumsum(sizes)[:-1])]


def events_of(guide, y, group):
    """Of each trial the times and probabilities of events, and the law of the codes of all."""
    with torch.no_grad():
        law = guide.posterior(y)
    inside = law.prob_active[:, 0, KERNEL - 1 :].numpy()  # the first ones begin before the row
    frames = by_trial(inside, group)
    return [neurons.clusters(p, np.arange(len(p)), GAP) for p in frames], law


def score(found, truth):
    """Pairs, found and true events over all trials, and F1."""
    pairs = sum(
        int(neurons.matched(times, events, WINDOW)[0].sum())
        for times, (events, _) in zip(found, truth, strict=True)
    )
    claimed, there = sum(map(len, found)), sum(len(events) for events, _ in truth)
    return pairs, claimed, there, 2 * pairs / max(claimed + there, 1)


def crossings(y, group, level):
    """Events of a plain threshold."""
    return [
        membrane.upward_crossings(trace, level, refractory=GAP)
        for trace in by_trial(y[:, 0].numpy(), group)
    ]


# %% [markdown]
# ## Choosing, on the neurons for it
#
# The time of the baseline and the kernel are chosen by F1, then the posterior; an event counts if
# its probability is above one half. The rival gets the baseline and the level that are best for it.
# The ELBO is printed beside. It needs no spikes; but which kernel describes a trace best, with all
# that is in it, is not the same question as which one finds the spikes.

# %%
LEVELS = np.arange(1.5, 8.01, 0.25)
truth = true_events(choosing)
fits, plain = {}, {}


def f1_of(guide, y):
    found, _ = events_of(guide, y, choosing)
    return score([times[prob > 0.5] for times, prob in found], truth)[3]


print("baseline  kernel               F1     ELBO of a row  noise")
for seconds in (4.0,) if SMOKE else (1.0, 4.0):
    y = prepare(choosing, seconds)
    for level in LEVELS:
        plain[seconds, level] = score(crossings(y, choosing, level), truth)[3]
    for kernel, options in KERNELS.items():
        model, guide, elbo = train(y, *options)
        f1, noise = f1_of(guide, y), model.likelihood.scale.item()
        fits[seconds, kernel] = f1, model, guide
        print(f"{seconds:5.1f} s   {kernel:20s} {f1:.3f}  {elbo:9.2f} nats  {noise:.3f}")
baseline, chosen = max(fits, key=lambda setting: fits[setting][0])
plain_baseline, plain_level = max(plain, key=plain.get)
f1 = plain[plain_baseline, plain_level]
print(f"plain threshold: F1 {f1:.3f} at {plain_level} sd, baseline over {plain_baseline} s")

# %%
y = prepare(choosing, baseline)
threshold_model, threshold_guide, _ = train(y, *KERNELS[chosen], threshold=True)
f1, model, guide = fits[baseline, chosen]
other_f1 = f1_of(threshold_guide, y)
print(f"baseline over {baseline} s, kernel {chosen}: free inclusion F1 {f1:.3f}", end=", ")
threshold = threshold_guide.family.threshold().item()
print(f"learned threshold F1 {other_f1:.3f} (it is {threshold:.2f} sd)")
if other_f1 > f1:
    model, guide = threshold_model, threshold_guide
with torch.no_grad():
    often = model.prior.logit.sigmoid() * SECOND
    print(f"{often:.2f} events/s, mean size {1 / model.rate().item():.1f} sd")

# %% [markdown]
# ## The test, on neurons that nothing has seen
#
# The guide is applied as it is: no training, no setting.

# %%
y = prepare(testing_set, baseline)
truth = true_events(testing_set)
found, law = events_of(guide, y, testing_set)
other = prepare(testing_set, plain_baseline)
for name, times in (
    ("P(event) > 0.5", [times[prob > 0.5] for times, prob in found]),
    (f"plain, {plain_level} sd", crossings(other, testing_set, plain_level)),
):
    pairs, claimed, there, f1 = score(times, truth)
    print(
        f"{name:15s} {pairs} of {there} events found, {claimed - pairs} false: "
        f"precision {pairs / max(claimed, 1):.3f}, recall {pairs / there:.3f}, F1 {f1:.3f}"
    )
hits = [
    neurons.matched(times, events, WINDOW)[0]
    for (times, _), (events, _) in zip(found, truth, strict=True)
]
claimed = np.concatenate([prob for _, prob in found])
curve = diagnostics.reliability(
    torch.from_numpy(claimed), torch.from_numpy(np.concatenate(hits)), num_bins=8
)
print(f"calibration error {curve.ece:.3f} +- {curve.ece_se:.3f} (noise: {curve.ece_of_noise:.3f})")
was = np.concatenate(hits)
for name, part in (("below", claimed <= 0.5), ("above", claimed > 0.5)):
    print(
        f"{part.sum()} events with P {name} 0.5: {claimed[part].sum():.1f} true ones expected, "
        f"{was[part].sum()} found"
    )

# %% [markdown]
# **Sizes.** Of a burst the sizes of its codes are added; their means say how many spikes it had.

# %%
size = by_trial(law.mean.detach()[:, 0, KERNEL - 1 :].numpy(), testing_set)
sizes, spread = {1: [], 2: [], 3: []}, []
for values, (times, numbers) in zip(size, truth, strict=True):
    for at, number in zip(times, numbers, strict=True):
        middle, reach = round(at), WINDOW + int(number)
        total = values[max(middle - reach, 0) : middle + reach + 1].sum()
        sizes[min(int(number), 3)].append(total)
for number, values in sizes.items():
    if values:
        name = f"{number} spike{'s' * (number > 1)}" + " or more" * (number == 3)
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
        print(
            f"{name:18s} {len(values):5d} bursts, size {middle:5.1f} sd ({low:.1f} to {high:.1f})"
        )

# %% [markdown]
# **Is the guide the posterior of its model?** As in tutorial 3, k-hat judges all codes of a row
# together, and refining each row by itself says what the encoder gives away.

# %%
some = y[: 6 if SMOKE else 20]
weights = infer.log_weights(model, guide, some, num_samples=100 if SMOKE else 500)
k = diagnostics.khat(weights)
refined = guide.refine(model, some, num_steps=10 if SMOKE else 100)
objective = infer.SparseELBO()
gain = (objective.loss(model, guide, some) - objective.loss(model, refined, some)) / len(some)
print(
    f"k-hat above 0.7 for {(k > 0.7).double().mean():.0%} of {len(k)} rows, median {k.median():.2f}"
)
print(f"refining raises the ELBO of a row by {gain:.2f} nats")

# %% [markdown]
# ## Figures
#
# Eight seconds of the test, the row with the median number of active codes among those with any.
# The bars are 90 % intervals of a code given that it is active, the darker the surer; codes below
# 0.2 are left out. The numbers are P(event).

# %%
shade = plt.get_cmap("YlOrBr")
active = law.prob_active[:, 0, KERNEL - 1 :]
count = (active > 0.5).sum(1)
busy = torch.nonzero(count)[:, 0]
row = busy[count[busy].argsort()[len(busy) // 2]].item() if len(busy) else 0
slab_low, slab_high = (law.slab.icdf(torch.tensor(q)).detach() for q in (0.05, 0.95))
rebuilt = model.dictionary(law.mean)[row, 0].detach()
seconds = np.arange(WIDTH) / SECOND
figure, (above, below) = plt.subplots(2, 1, figsize=(12, 6), layout="constrained", sharex=True)
above.plot(seconds, y[row, 0], color=figures.QUIET, linewidth=0.7, label="trace less baseline")
above.plot(seconds, rebuilt, color=figures.MARK, linewidth=1.3, label="posterior mean")
spikes = np.concatenate(
    [
        np.bincount(s[s < len(t) // WIDTH * WIDTH], minlength=len(t) // WIDTH * WIDTH)
        for n in testing_set
        for t, s in zip(n.trace, n.spikes, strict=True)
    ]
).reshape(-1, WIDTH)[row]
top = float(y[row].max())
above.vlines(
    seconds[spikes > 0], top * 1.05, top * 1.15, color=figures.INK, linewidth=1, label="true spikes"
)
above.plot(seconds, np.full(WIDTH, plain_level), color=BLUE, linestyle="--", linewidth=0.8,
           label="level of the plain threshold")  # fmt: skip
above.set(ylabel="fluorescence (sd of the noise)", ylim=(None, top * 1.45))
above.legend(frameon=False, ncols=4, fontsize=8, loc="upper left")
below.vlines(seconds[spikes > 0], 0, 1, transform=below.get_xaxis_transform(), color=figures.INK,
             linewidth=0.6, alpha=0.4)  # fmt: skip
for frame in np.flatnonzero(active[row] > 0.2):
    code = row, 0, KERNEL - 1 + frame
    colour = shade(0.15 + 0.85 * active[row, frame].item())
    below.vlines(seconds[frame], slab_low[code], slab_high[code], color=colour, linewidth=3)
shown = zip(*neurons.clusters(active[row].numpy(), np.arange(WIDTH), GAP), strict=True)
for i, (at, p) in enumerate((at, p) for at, p in shown if p > 0.1):
    higher = 2 + i % 2 * 9  # points: neighbours apart
    below.annotate(
        f"{p:.2f}", (at / SECOND, 1), (0, higher), below.get_xaxis_transform(), "offset points",
        ha="center", fontsize=7,
    )  # fmt: skip
below.set_ylim(0, None)
below.set(
    xlabel="time (s)", ylabel="size of the event, if there is one,\n90 % interval (sd of the noise)"
)
for axis in (above, below):
    axis.spines[["top", "right"]].set_visible(False)
figure.savefig(FIGURES / "07_trace.png", dpi=110)
plt.close(figure)

# %%
figure, (kernel, reliable, exchange) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
ms = np.arange(KERNEL) / SECOND * 1000
for name, colour in zip(KERNELS, (figures.QUIET, BLUE, figures.MARK), strict=True):
    atom = fits[baseline, name][1].dictionary.atoms.detach()[0, 0]
    label = f"{name} (chosen)" if name == chosen else name
    kernel.plot(ms, atom, color=colour, label=label)
kernel.axhline(0, color=figures.QUIET, linewidth=0.7)
kernel.set(xlabel="time after an event (ms)", ylabel="kernel (unit norm)")
kernel.legend(frameon=False)
diagnostics.plot_reliability(curve, ax=reliable)
reliable.set(xlabel="P(event)", ylabel="share that were true events")
cuts = np.linspace(0.02, 0.98, 33)
lines = {
    "P(event)": (figures.MARK, [score([t[p > c] for t, p in found], truth) for c in cuts], 16),
    "plain threshold": (
        BLUE,
        [score(crossings(other, testing_set, level), truth) for level in LEVELS],
        int(np.flatnonzero(LEVELS == plain_level)[0]),
    ),
}
for name, (colour, points, used) in lines.items():
    precision, recall = np.array([(p / max(c, 1), p / t) for p, c, t, _ in points]).T
    exchange.plot(recall, precision, color=colour, label=name)
    exchange.plot(recall[used], precision[used], "o", color=colour)
exchange.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
exchange.set_title("all cuts; the dot is the one that was set before", fontsize=9)
exchange.legend(frameon=False, loc="lower left")
for axis in (kernel, reliable, exchange):
    axis.spines[["top", "right"]].set_visible(False)
figure.savefig(FIGURES / "07_score.png", dpi=110)
plt.close(figure)

# %% [markdown]
# ## What was learnt
#
# * A calcium trace is a convolutional dictionary of one atom with codes that are zero or positive.
#   Rate and size of events, the noise, and if one likes the kernel, are learned without spikes.
# * The ELBO says which kernel describes the traces best, F1 which one finds the spikes of neurons
#   for which they are known. Both stand in the table above, and need not agree.
# * P(event) needs no level: one half is the cut that a probability asks for. Whether it means what
#   it says on neurons that were not trained on is printed above: compare the calibration error
#   with that of noise alone.
# * Sizes come with intervals, given that there is an event. How they go with the number of spikes
#   in a burst is printed above.
# * One rate serves all neurons: one that fires more than those for choosing gets probabilities
#   that are too low, and a quieter one too high.
# * Noise is taken for white, of one level, and all neurons share one kernel, one rate and one law
#   of sizes. What slow fluctuations and neighbouring cells add looks like events to this model.
