"""Rates and noise by EM: the M-step is the maximiser, and both routes find what was planted."""

import copy
import functools
import subprocess
import sys
import textwrap
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.optimize
import scipy.stats
import torch
from torch import Tensor, nn

from pyro_sparse.dictionaries import Conv, Dense
from pyro_sparse.distributions.rates import Rate, RateStatistic, register_rate_statistic
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.infer import Phase, Update, fit
from pyro_sparse.infer.callbacks import Callback, Progress
from pyro_sparse.infer.em import RateEM, RateLoss
from pyro_sparse.infer.noise import NoiseEM
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import Proximal

WEAK = dist.Gamma(2.0, 1.0)
SHAPES = {"dense": (7, 3), "conv1d": (5, 3, 6), "conv2d": (4, 3, 2, 5)}  # (n, atoms, *positions)
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
weighting = pytest.mark.parametrize("per_datum", [False, True], ids=["bayes", "per_datum"])


def laplace(rate: Tensor) -> dist.Laplace:
    return dist.Laplace(0.0, 1 / rate)


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """Sparse codes, of another size for every atom."""
    sizes = torch.linspace(0.5, 2.0, shape[1], dtype=dtype).reshape(-1, *[1] * (len(shape) - 2))
    return sizes * torch.randn(shape, dtype=dtype) * (torch.rand(shape) < 0.6)


def fresh(num_atoms: int, init: float = 1.0) -> Rate:
    return Rate(init, num_atoms=num_atoms).double()


class World(nn.Module):
    """A dictionary, codes of known rates, data, and a guide that encodes nearly to convergence."""

    def __init__(self, geometry: str, num_data: int, noise: float, init: float = 1.0) -> None:
        super().__init__()
        if geometry == "dense":
            self.truth = torch.tensor([0.5, 1.0, 2.0, 4.0, 1.0, 3.0]).double()
            dictionary, positions = Dense(6, 12), ()
        else:  # four channels: more samples than codes, so that codes can be told from the data
            self.truth = torch.tensor([0.5, 1.0, 3.0]).double()
            dictionary, positions = Conv(3, 4, 5), (30,)
        self.dictionary = dictionary.double()
        self.rate = fresh(len(self.truth), init)
        self.noise = Gaussian(torch.tensor(noise).double())
        options = {"rate": self.rate, "num_steps": 60, "shrinkage": Proximal()}
        self.guide = UnrolledFISTA(self.dictionary, self.noise, laplace, **options)
        self.model = SparseCoding(self.dictionary, self.noise, laplace, rate=self.rate)
        scale = (1 / self.truth).reshape(-1, *[1] * len(positions))
        law = dist.Laplace(0.0, scale.expand(len(self.truth), *positions))
        self.codes = law.sample((num_data,))
        with torch.no_grad():
            clean = self.dictionary(self.codes)
        self.y = clean + noise * torch.randn_like(clean)

    def progress(self, index: slice = slice(None), mask: Tensor | None = None) -> Progress:
        y = self.y[index]
        return Progress(self.model, self.guide, y, mask, len(self.y), 1, 1, 0, 0.0)

    def closed_form(self, em: RateEM, steps: int = 100) -> Tensor:
        for _ in range(steps):
            before = self.rate().detach()
            em.after_step(self.progress())
            if torch.allclose(self.rate(), before, rtol=1e-10, atol=0):
                break
        return self.rate().detach()

    def by_gradient(self, loss: RateLoss, steps: int) -> Tensor:
        """Gradient steps on log rate; per code its curvature is one, hence the learning rate."""
        objective = loss(self.model, self.guide)
        num_codes = self.codes.numel() / len(self.truth)
        optimizer = torch.optim.SGD(self.rate.parameters(), lr=0.7 / num_codes)
        for _ in range(steps):
            optimizer.zero_grad()
            objective(self.y).backward()
            optimizer.step()
        return self.rate().detach()


# The M-step ---------------------------------------------------------------------------------------

SCIPY = {"laplace": scipy.stats.laplace, "exponential": scipy.stats.expon}
PRIORS = {"laplace": laplace, "exponential": dist.Exponential}


def maximiser(codes: np.ndarray, law: str, a: float, b: float, weight: float) -> float:
    """Rate of the highest complete-data log-posterior, found by scipy from its densities."""

    def negative(log_rate: float) -> float:
        rate = np.exp(log_rate)
        prior = SCIPY[law].logpdf(codes, scale=1 / rate).sum()
        return -prior - weight * scipy.stats.gamma.logpdf(rate, a, scale=1 / b)

    found = scipy.optimize.minimize_scalar(negative, bounds=(-7, 7), options={"xatol": 1e-9})
    return float(np.exp(found.x))


@shapes
@weighting
@pytest.mark.parametrize("law", PRIORS)
def test_the_closed_form_maximises_the_log_posterior(shape, per_datum: bool, law: str) -> None:
    codes = draw(shape).abs() if law == "exponential" else draw(shape)
    a, b = torch.tensor([3.0, 1.5, 20.0]).double(), torch.tensor([0.5, 4.0, 1.0]).double()
    rate = fresh(3)
    em = RateEM(rate, PRIORS[law], dist.Gamma(a, b), per_datum=per_datum)
    returned = em.update(codes)
    assert torch.equal(returned, rate())
    assert not returned.requires_grad
    weight = len(codes) if per_datum else 1
    for k in range(3):
        # A parabola fitted near a minimum is blind below the root of machine precision.
        expected = maximiser(codes[:, k].numpy(), law, a[k].item(), b[k].item(), weight)
        assert returned[k].item() == pytest.approx(expected, rel=1e-6)


@shapes
def test_without_a_hyperprior_it_is_the_maximum_likelihood_of_scipy(shape) -> None:
    codes = draw(shape)
    found = RateEM(fresh(3), laplace).update(codes)
    for k in range(3):
        _, scale = scipy.stats.laplace.fit(codes[:, k].numpy().ravel(), floc=0.0)
        assert found[k].item() == pytest.approx(1 / scale, rel=1e-12)


def test_the_published_weighting_is_the_published_formula() -> None:
    codes, r, delta = draw((5, 3, 6)), 40.0, 2.0
    mean = codes.abs().sum(2).mean(0)  # over data, of the l1 norm of each atom's codes
    hyperprior = dist.Gamma(r, delta)
    published = RateEM(fresh(3), laplace, hyperprior, per_datum=True).update(codes)
    torch.testing.assert_close(published, (6 + r - 1) / (mean + delta), rtol=1e-12, atol=0)
    bayes = RateEM(fresh(3), laplace, hyperprior).update(codes)
    torch.testing.assert_close(bayes, (5 * 6 + r - 1) / (5 * mean + delta), rtol=1e-12, atol=0)
    # A hundred times the data: only the published weight of the hyperprior does not fade.
    many, likely = codes.repeat(100, 1, 1), RateEM(fresh(3), laplace).update(codes)
    again = RateEM(fresh(3), laplace, hyperprior, per_datum=True).update(many)
    torch.testing.assert_close(again, published, rtol=1e-12, atol=0)
    faded = RateEM(fresh(3), laplace, hyperprior).update(many)
    assert ((faded - likely).abs() < 0.03 * (bayes - likely).abs()).all()


def test_a_minibatch_stands_for_the_data_set() -> None:
    codes = draw((5, 3, 6))
    found = RateEM(fresh(3), laplace, WEAK).update(codes, 5000)
    expected = RateEM(fresh(3), laplace, WEAK).update(codes.repeat(1000, 1, 1))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_a_shared_rate_pools_the_atoms() -> None:
    codes = draw((5, 3, 6))
    rate = Rate(torch.tensor(1.0, dtype=torch.float64))
    found = RateEM(rate, laplace).update(codes)
    torch.testing.assert_close(found, 1 / codes.abs().mean(), rtol=1e-12, atol=0)


def test_a_prior_of_ones_own_is_served() -> None:
    class Ridge(dist.Normal):
        pass

    @register_rate_statistic(Ridge)
    def _(prior, codes):
        return RateStatistic(prior.scale**-2, 0.5, (codes - prior.loc).square() / 2)

    codes = draw((50, 2))
    found = RateEM(fresh(2), lambda rate: Ridge(0.0, rate**-0.5)).update(codes)
    torch.testing.assert_close(found, 1 / codes.square().mean(0), rtol=1e-12, atol=0)


def test_dtypes_are_those_of_the_rate(dtype: torch.dtype) -> None:
    rate = Rate(1.0, num_atoms=3).to(dtype)
    codes = draw((7, 3, 4), dtype)
    em = RateEM(rate, laplace, dist.Gamma(torch.full((3,), 2.0), 1.0))
    expected = (7 * 4 + 1) / (codes.abs().sum((0, 2)) + 1)
    torch.testing.assert_close(em.update(codes), expected)
    torch.testing.assert_close(em.update(codes.double()), expected)
    assert rate().dtype == dtype


# The same as a loss -------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", ["dense", "conv"])
def test_the_loss_is_the_published_one(geometry: str) -> None:
    world = World(geometry, 6, 0.1)
    r, delta, lam = 30.0, 5.0, world.rate
    loss = RateLoss(lam, laplace, dist.Gamma(r, delta), per_datum=True, through_encoder=True)
    value = loss(world.model, world.guide)(world.y, 600) / 600
    codes = world.guide.encode(world.y)
    codes = codes.reshape(6, len(world.truth), -1)  # (n, atoms, positions)
    norms = codes.abs().sum(2)  # (n, atoms)
    rest = delta * lam() - (codes.shape[2] + r - 1) * lam().log()
    expected = ((lam() * norms).sum(1) + rest.sum()).mean()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    (raw,) = lam.parameters()
    ours, theirs = (torch.autograd.grad(v, raw)[0] for v in (value, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    # Codes held fixed give another gradient, and none to the dictionary.
    fixed = RateLoss(lam, laplace, dist.Gamma(r, delta), per_datum=True)
    fixed(world.model, world.guide)(world.y, 600).backward()
    direct = raw.detach().exp() * (norms.mean(0) + delta) - (codes.shape[2] + r - 1)
    torch.testing.assert_close(raw.grad / 600, direct.detach(), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(raw.grad / 600, ours, rtol=1e-6)
    assert all(p.grad is None for p in world.dictionary.parameters())


@weighting
def test_the_loss_is_least_at_the_closed_form(per_datum: bool) -> None:
    world = World("dense", 20, 0.1)
    hyperprior = dist.Gamma(5.0, 2.0)
    codes = world.guide.encode(world.y).detach()

    def guide(y: Tensor, num_data: int | None) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("codes", dist.Delta(codes, event_dim=1))

    RateEM(world.rate, laplace, hyperprior, per_datum=per_datum).update(codes, 100)
    objective = RateLoss(world.rate, laplace, hyperprior, per_datum=per_datum)(world.model, guide)
    objective(world.y, 100).backward()
    (raw,) = world.rate.parameters()
    # 100 data: the terms that cancel here are each about 100.
    torch.testing.assert_close(raw.grad, torch.zeros_like(raw), rtol=0, atol=1e-10)


def test_the_objective_has_the_parameters_of_an_elbo() -> None:
    world = World("dense", 5, 0.1)
    objective = RateLoss(world.rate, laplace, WEAK, through_encoder=True)(world.model, world.guide)
    assert isinstance(objective, nn.Module)
    of_elbo = pyro.infer.Trace_ELBO()(world.model, world.guide).parameters()
    assert {id(p) for p in objective.parameters()} == {id(p) for p in of_elbo}
    objective(world.y).backward()
    assert all((p.grad != 0).any() for p in objective.parameters())


# Both to convergence, on data with known rates ----------------------------------------------------


@pytest.mark.parametrize(("geometry", "num_data"), [("dense", 2000), ("conv", 60)])
def test_both_find_the_known_rates_and_each_other(geometry: str, num_data: int) -> None:
    world = World(geometry, num_data, 0.02)
    closed = world.closed_form(RateEM(world.rate, laplace, WEAK))
    world.rate.assign_(1.0)
    gradient = world.by_gradient(RateLoss(world.rate, laplace, WEAK), steps=40)
    torch.testing.assert_close(gradient, closed, rtol=1e-6, atol=0)
    known = RateEM(world.rate, laplace, WEAK).update(world.codes)
    # Of n codes the estimate has the relative standard error 1 / sqrt(n).
    error = (world.codes.numel() / len(world.truth)) ** -0.5
    assert ((known / world.truth - 1).abs() < 4 * error).all()
    # MAP codes are shrunk: too high a rate where codes are small, but little at this noise.
    assert (closed > known)[world.truth >= 2].all()
    torch.testing.assert_close(closed, known, rtol=0.02, atol=0)


def test_through_the_encoder_the_rate_settles_higher() -> None:
    world = World("dense", 500, 0.03)
    closed = world.closed_form(RateEM(world.rate, laplace, WEAK))
    loss = RateLoss(world.rate, laplace, WEAK, through_encoder=True)
    published = world.by_gradient(loss, steps=60)
    objective = loss(world.model, world.guide)
    (gradient,) = torch.autograd.grad(objective(world.y) / 500, list(world.rate.parameters()))
    assert gradient.abs().max() < 1e-3  # settled, where a unit step is one on log rate
    assert ((published / closed > 1) & (published / closed < 1.1)).all()


def test_point_codes_let_the_rate_of_a_weak_atom_run_away() -> None:
    """The warning of the module: codes of rate 4 at noise 0.2 are switched off for good."""
    world = World("dense", 500, 0.2)
    num_data, r, delta = 500, 2.0, 1.0
    found = world.closed_form(RateEM(world.rate, laplace, dist.Gamma(r, delta)))
    assert (world.guide.encode(world.y)[:, 3] == 0).all()
    assert found[3].item() == pytest.approx((num_data + r - 1) / delta, rel=1e-9)
    known = RateEM(world.rate, laplace).update(world.codes)
    assert (known[3] - 4).abs() < 1  # the codes themselves would have told
    world.rate.assign_(1.0)
    with pytest.raises(ValueError, match=r"active codes for every atom, got none .* atoms \[3\]"):
        world.closed_form(RateEM(world.rate, laplace))
    assert torch.isfinite(world.rate()).all()


# Minibatches --------------------------------------------------------------------------------------


@weighting
def test_an_epoch_of_equal_weights_is_the_whole_data_set(per_datum: bool) -> None:
    codes = draw((23, 3, 4))
    em = RateEM(fresh(3), laplace, WEAK, per_datum=per_datum, decay=1.0)
    for batch in codes.split(5):  # the last one has 3
        found = em.update(batch, 23)
    whole = RateEM(fresh(3), laplace, WEAK, per_datum=per_datum).update(codes)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=0)


def test_averages_are_those_of_the_definition() -> None:
    codes = draw((12, 3))
    batches, total = codes.split(4), torch.zeros(3).double()
    em = RateEM(fresh(3), laplace, decay=0.7)
    for m, batch in enumerate(batches, 1):
        total += m**-0.7 * (batch.abs().mean(0) - total)
        torch.testing.assert_close(em.update(batch, 12), 1 / total, rtol=1e-12, atol=0)
    latest = RateEM(fresh(3), laplace, decay=0.0)
    for batch in batches:
        torch.testing.assert_close(latest.update(batch, 12), 1 / batch.abs().mean(0))
    # The whole data set is taken as it is, whatever came before.
    torch.testing.assert_close(em.update(codes, 12), 1 / codes.abs().mean(0), rtol=1e-12, atol=0)


def test_stochastic_em_converges_to_the_full_batch() -> None:
    world = World("dense", 1000, 0.05)
    whole = world.closed_form(RateEM(world.rate, laplace, WEAK))
    world.rate.assign_(1.0)
    em = RateEM(world.rate, laplace, WEAK)
    for _ in range(12):
        order = torch.randperm(1000)
        for index in order.split(100):
            em.after_step(world.progress(index))
    torch.testing.assert_close(world.rate().detach(), whole, rtol=0.01, atol=0)


@pytest.mark.parametrize("what", ["rate", "noise"])
def test_a_resumed_run_equals_an_uninterrupted_one(what: str) -> None:
    def make() -> tuple[World, RateEM | NoiseEM]:
        torch.manual_seed(3)
        world = World("conv", 12, 0.1)
        em = RateEM(world.rate, laplace, WEAK)
        return world, em if what == "rate" else NoiseEM(world.noise, world.dictionary)

    straight, em = make()
    broken, first = make()
    for step in range(6):
        em.after_step(straight.progress(slice(2 * step, 2 * step + 2)))
    for step in range(3):
        first.after_step(broken.progress(slice(2 * step, 2 * step + 2)))
    state, weights = copy.deepcopy(first.state_dict()), copy.deepcopy(broken.state_dict())
    resumed, second = make()
    resumed.load_state_dict(weights)
    second.load_state_dict(state)
    for step in range(3, 6):
        second.after_step(resumed.progress(slice(2 * step, 2 * step + 2)))
    assert all(isinstance(v, Tensor | int) for v in state.values())
    assert torch.equal(resumed.rate(), straight.rate())
    assert torch.equal(resumed.noise.scale, straight.noise.scale)


def test_two_processes_make_the_update_of_one(tmp_path) -> None:
    """Each with its share of a minibatch, as under torchrun."""
    script = textwrap.dedent("""
        import sys, torch, pyro.distributions as dist
        from pyro_sparse.distributions.rates import Rate
        from pyro_sparse.infer.em import RateEM
        rank, folder = int(sys.argv[1]), sys.argv[2]
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
        em = RateEM(Rate(1.0, num_atoms=3), lambda rate: dist.Laplace(0.0, 1 / rate))
        for batch in torch.load(f"{folder}/codes", weights_only=True):
            found = em.update(batch[rank * 4 : rank * 4 + 4], 20)
        torch.save(found, f"{folder}/{rank}")
        torch.distributed.destroy_process_group()
    """)
    batches = [draw((size, 3, 5), torch.float32) for size in (8, 7)]
    torch.save(batches, tmp_path / "codes")
    command = [sys.executable, "-c", script]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]
    em = RateEM(Rate(1.0, num_atoms=3), laplace)
    for batch in batches:
        expected = em.update(batch, 20)
    found = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2)]
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], expected)


# Masks --------------------------------------------------------------------------------------------


def test_codes_that_are_left_out_do_not_count() -> None:
    codes = draw((6, 3, 5))
    counted = torch.rand(codes.shape) < 0.5
    found = RateEM(fresh(3), laplace, WEAK).update(codes, counted=counted)
    for k in range(3):
        kept = codes[:, k][counted[:, k]]
        expected = (len(kept) + 1) / (kept.abs().sum() + 1)
        torch.testing.assert_close(found[k], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("route", ["closed form", "loss"])
def test_data_that_were_not_observed_say_nothing_of_the_rates(route: str) -> None:
    """Of the second half of the data only samples 0..19 of 34 are there: atoms at 0..19 of 30."""
    world = World("conv", 40, 0.05)
    mask = torch.ones_like(world.y, dtype=torch.bool)
    mask[20:, :, 20:] = False
    world.y[~mask] = torch.nan
    codes = world.guide.encode(world.y, mask).detach()
    meets = torch.ones(codes.shape, dtype=torch.bool)
    meets[20:, :, 20:] = False
    assert (codes[~meets] == 0).all()
    expected = RateEM(fresh(3), laplace).update(codes, counted=meets)
    if_counted = RateEM(fresh(3), laplace).update(codes)
    assert (if_counted / expected > 1.1).all()
    RateEM(world.rate, laplace, dictionary=world.dictionary).after_step(world.progress(mask=mask))
    torch.testing.assert_close(world.rate().detach(), expected, rtol=1e-12, atol=0)
    world.rate.assign_(1.0)
    loss = RateLoss(world.rate, laplace, dictionary=world.dictionary)
    value = loss(world.model, world.guide)(world.y, 40, mask=mask)
    torch.testing.assert_close(value, codes.abs().sum(), rtol=1e-12, atol=0)  # log 1 = 0


# Noise --------------------------------------------------------------------------------------------

SCALES = {
    "one": torch.tensor(0.5).double(),
    "per_channel": torch.tensor([[0.5], [0.1], [2.0]]).double(),
}


def residual_setting(scale: Tensor, trainable: bool = False) -> tuple:
    dictionary = Conv(2, 3, 4).double()
    codes = draw((8, 2, 9))
    with torch.no_grad():
        clean = dictionary(codes)  # (8, 3, 12)
    y = clean + scale * torch.randn_like(clean)
    return Gaussian(torch.ones_like(scale), trainable=trainable), dictionary, y, codes


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("trainable", [False, True])
def test_the_noise_scale_maximises_the_likelihood(name: str, masked: bool, trainable: bool) -> None:
    likelihood, dictionary, y, codes = residual_setting(SCALES[name], trainable)
    mask = torch.rand(y.shape) < (0.5 if masked else 2.0)
    hidden = torch.where(mask, y, torch.nan)
    found = NoiseEM(likelihood, dictionary).update(hidden, codes, mask=mask if masked else None)
    residual = (y - dictionary(codes)).detach()
    groups = residual.unbind(1) if name == "per_channel" else [residual]
    masks = mask.unbind(1) if name == "per_channel" else [mask]
    for scale, group, seen in zip(found.flatten(), groups, masks):
        _, expected = scipy.stats.norm.fit(group[seen].numpy(), floc=0.0)
        assert scale.item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(likelihood.scale, found)
    assert found.shape == SCALES[name].shape


def test_the_published_moving_average_starts_from_the_scale() -> None:
    likelihood, dictionary, y, codes = residual_setting(SCALES["per_channel"])
    em = NoiseEM(likelihood, dictionary, momentum=0.01)
    rms = (y - dictionary(codes)).detach().square().mean((0, 2)).sqrt()[:, None]
    scale = torch.ones_like(rms)
    for _ in range(3):
        scale = 0.99 * scale + 0.01 * rms
        torch.testing.assert_close(em.update(y, codes), scale, rtol=1e-12, atol=0)


def test_minibatches_of_unequal_masks_weigh_every_sample_alike() -> None:
    likelihood, dictionary, y, codes = residual_setting(SCALES["one"])
    mask = torch.rand(y.shape) < torch.linspace(0.1, 0.9, 8)[:, None, None]
    whole = NoiseEM(copy.deepcopy(likelihood), dictionary).update(y, codes, mask=mask)
    em = NoiseEM(likelihood, dictionary, decay=1.0)
    for index in torch.arange(8).split(3):
        found = em.update(y[index], codes[index], 8, mask=mask[index])
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_a_channel_without_samples_keeps_its_scale(momentum: float | None) -> None:
    likelihood, dictionary, y, codes = residual_setting(SCALES["per_channel"])
    mask = torch.ones_like(y, dtype=torch.bool)
    mask[:, 1] = False
    found = NoiseEM(likelihood, dictionary, momentum=momentum).update(y, codes, mask=mask)
    assert found[1] == 1.0
    assert (found[[0, 2]] != 1.0).all()


def test_rates_and_noise_are_found_together() -> None:
    """Ten times too much noise to begin with. Six codes fit half of twelve samples."""
    world = World("dense", 2000, 0.02)
    world.noise.assign_(0.2)
    rates = RateEM(world.rate, laplace, dist.Gamma(2.0, 0.5))
    noise = NoiseEM(world.noise, world.dictionary)
    for _ in range(40):
        noise.after_step(world.progress())
        rates.after_step(world.progress())
    assert world.noise.scale.item() == pytest.approx(0.02 * 0.5**0.5, rel=0.05)
    torch.testing.assert_close(world.rate().detach(), world.truth, rtol=0.1, atol=0)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_scale_is_assigned_in_place_or_refused(trainable: bool, dtype: torch.dtype) -> None:
    likelihood = Gaussian(torch.tensor([[1.0], [2.0]], dtype=dtype), trainable=trainable)
    held = [*likelihood.parameters(), *likelihood.buffers()]
    likelihood.assign_(torch.tensor([[0.5], [0.25]], dtype=torch.float64))
    expected = torch.tensor([[0.5], [0.25]], dtype=dtype)
    torch.testing.assert_close(likelihood.scale.detach(), expected)
    now = [*likelihood.parameters(), *likelihood.buffers()]
    assert [id(t) for t in now] == [id(t) for t in held]
    with pytest.raises(ValueError, match=r"scale of shape \(2, 1\), got \(3, 1\)"):
        likelihood.assign_(torch.ones(3, 1))
    with pytest.raises(ValueError, match="Expected scale > 0 and finite"):
        likelihood.assign_(torch.tensor([[0.5], [0.0]]))
    torch.testing.assert_close(likelihood.scale.detach(), expected)


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: RateEM(nn.Linear(1, 1), laplace), TypeError, "distributions.Rate, got Linear"),
        (lambda: RateEM(fresh(2), dist.Laplace(0.0, 1.0)), TypeError, "callable rate -> distrib"),
        (
            lambda: RateEM(fresh(2), laplace, dist.Normal(0.0, 1.0)),
            TypeError,
            "got Normal",
        ),
        (
            lambda: RateEM(fresh(2), laplace, dist.Gamma(torch.ones(3), 1.0)),
            ValueError,
            r"batch shape \(\) or \(2,\), as the rates, got \(3,\)",
        ),
        (lambda: RateEM(fresh(2), laplace, decay=1.5), ValueError, r"decay in \[0, 1\], got 1.5"),
        (lambda: NoiseEM(nn.Linear(1, 1), Dense(2, 2)), TypeError, "Gaussian .* got Linear"),
        (
            lambda: NoiseEM(Gaussian(1.0), Dense(2, 2), momentum=0.0),
            ValueError,
            r"momentum in \(0, 1\]",
        ),
    ],
)
def test_wrong_arguments_are_refused(make: Callable, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("prior", "codes", "options", "error", "match"),
    [
        (laplace, torch.zeros(3), {}, ValueError, r"\(n, atoms, \*positions\) .* got \(3,\)"),
        (laplace, torch.ones(4, 3), {}, ValueError, "expands to the shape"),
        (laplace, torch.ones(4, 2), {"num_data": 3}, ValueError, "num_data >= 4"),
        (laplace, torch.tensor([[1.0, 0.0]]), {}, ValueError, r"none so far for atoms \[1\]"),
        (laplace, torch.tensor([[1.0, torch.nan]]), {}, ValueError, r"finite, .* atoms \[1\]"),
        (dist.Exponential, -torch.ones(1, 2), {}, ValueError, "rates > 0"),
        (laplace, torch.ones(4, 2), {"counted": torch.ones(4, 2)}, TypeError, "boolean"),
        (
            lambda rate: dist.Laplace(0.0, 2 / rate),
            torch.ones(4, 2),
            {},
            ValueError,
            r"law of that rate, got one of the rate 0.75 for 1.5",
        ),
        (
            lambda rate: dist.StudentT(rate),
            torch.ones(4, 2),
            {},
            NotImplementedError,
            r"register_rate_statistic\(StudentT\)",
        ),
    ],
)
def test_an_update_that_is_refused_changes_nothing(prior, codes, options, error, match) -> None:
    rate = Rate(1.5, num_atoms=2)
    em = RateEM(rate, prior)
    with pytest.raises(error, match=match):
        em.update(codes, **options)
    assert torch.equal(rate(), Rate(1.5, num_atoms=2)())
    assert em.state_dict() == {"num_updates": 0}


def test_noise_refuses_what_it_cannot_use_and_changes_nothing() -> None:
    likelihood, dictionary, y, codes = residual_setting(SCALES["one"])
    em = NoiseEM(likelihood, dictionary)
    with pytest.raises(ValueError, match="y of the predictor's shape"):
        em.update(y[:, :1], codes)
    with pytest.raises(TypeError, match="boolean"):
        em.update(y, codes, mask=torch.ones_like(y))
    with pytest.raises(ValueError, match="scale > 0"):
        em.update(torch.zeros_like(y), torch.zeros_like(codes))
    assert likelihood.scale == 1.0
    assert em.state_dict() == {"num_updates": 0}


def test_programs_without_codes_are_refused() -> None:
    rate = fresh(2)
    with pytest.raises(ValueError, match='site "codes"'):
        RateLoss(rate, laplace)(None, lambda y, num_data: None)(torch.ones(3, 2))
    progress = Progress(None, print, torch.ones(3, 2), None, 3, 1, 1, 0, 0.0)
    with pytest.raises(TypeError, match="method encode"):
        RateEM(rate, laplace).after_step(progress)


# In a training ------------------------------------------------------------------------------------


# Pyro says so of every parameter that fit holds still.
@pytest.mark.filterwarnings("ignore:.*was not registered in the param store:UserWarning")
def test_fit_learns_rates_and_noise_by_either_route() -> None:
    found = {}
    for route in ("closed form", "loss"):
        torch.manual_seed(5)
        world = World("dense", 600, 0.05)
        world.noise.assign_(0.1)
        step = functools.partial(torch.optim.SGD, lr=1e-4)
        updates = [Update(optimizer=step, train=[world.dictionary])]
        callbacks: list[Callback] = [NoiseEM(world.noise, world.dictionary)]
        if route == "loss":
            loss = RateLoss(world.rate, laplace, WEAK)
            optimizer = functools.partial(torch.optim.SGD, lr=0.1)
            updates.append(Update(loss=loss, optimizer=optimizer, train=[world.rate]))
        else:
            callbacks.append(RateEM(world.rate, laplace, WEAK))
        phases = [Phase(8, updates)]
        options = {"callbacks": callbacks, "batch_size": 60, "progress": False}
        fit(world.model, world.guide, world.y, phases=phases, **options)
        found[route] = world.rate().detach()
        assert world.noise.scale.item() == pytest.approx(0.05 * 0.5**0.5, rel=0.1)
    torch.testing.assert_close(found["loss"], found["closed form"], rtol=0.05, atol=0)
    torch.testing.assert_close(found["loss"], world.truth, rtol=0.15, atol=0)
