"""Guides of models with known signs, groups and known support; DCEA's relaxations as settings."""

import functools
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_sparse.dictionaries import Conv, Dense
from pyro_sparse.distributions import (
    GroupLaplace,
    KnownSupport,
    Rate,
    SignedLaplace,
    SpikeAndSlab,
    codes_prior,
    penalty,
)
from pyro_sparse.guides import (
    AutoUnrolled,
    DensePosterior,
    PerDatum,
    SpikeAndSlabPosterior,
    SupportedPosterior,
    Thresholded,
    UnrolledFISTA,
)
from pyro_sparse.infer import ImplicitMixed, RateEM, SparseELBO, fit, load, save
from pyro_sparse.likelihoods import Binomial, Gaussian, Poisson, Stabilised
from pyro_sparse.models import DeepSparseCoding, SparseCoding
from pyro_sparse.solvers import FISTA, ISTA, Bias, Proximal, TopK, solve

double = functools.partial(torch.tensor, dtype=torch.float64)
SIGNS = double([1.0, 0.0, -1.0]).repeat(4)
ACTIVE = torch.tensor([True, True, False, True]).repeat(3)
TIMES = torch.tensor([True, False, True, True, False, True, True, True])[None]
PRIORS = {
    "signs": ("dense", lambda: SignedLaplace(double(0.7), SIGNS)),
    "groups": ("dense", lambda: GroupLaplace(double(0.7), (12,), group=(3,))),
    "one-sided groups": (
        "dense",
        lambda: GroupLaplace(double(0.7), (12,), group=(3,), one_sided=True),
    ),
    "support": ("dense", lambda: KnownSupport(SignedLaplace(double(0.7), SIGNS), ACTIVE)),
    "signs of atoms": ("conv", lambda: SignedLaplace(double(0.7), double([[1.0], [0.0], [-1.0]]))),
    "groups of atoms": ("conv", lambda: GroupLaplace(double(0.7), (3, 8), group=(3, 1))),
    "times": ("conv", lambda: KnownSupport(dist.Laplace(double(0.0), double(1.4)), TIMES)),
    "neurons": (
        "neurons",
        lambda: KnownSupport(GroupLaplace(double([[[0.7]], [[0.9]], [[1.2]]]), (4,)), TIMES),
    ),
}  # fmt: skip
DICTIONARIES = {
    "dense": (lambda: Dense(12, 7), (7,)),
    "conv": (lambda: Conv(3, 2, 4), (2, 11)),
    "neurons": (lambda: Conv(3, 1, (4, 1)), (1, 11, 4)),
}
priors = pytest.mark.parametrize("name", PRIORS)


def make(name: str, **options: Any) -> tuple[SparseCoding, UnrolledFISTA, Tensor]:
    kind, prior = PRIORS[name]
    build, signal_shape = DICTIONARIES[kind]
    dictionary, likelihood, law = build().double(), Gaussian(0.5).double(), prior()
    model = SparseCoding(dictionary, likelihood, law, signal_shape=signal_shape)
    options = {"num_steps": 15, "shrinkage": Proximal()} | options
    guide = UnrolledFISTA(dictionary, likelihood, law, **options)
    return model, guide, torch.randn(5, *signal_shape, dtype=torch.float64)


@priors
def test_any_programs_encoder_gives_the_codes_of_unrolled_fista(name: str) -> None:
    model, guide, y = make(name)
    expected = guide.encode(y)
    size = model.dictionary.squared_norm(y.shape[1:]) * model.likelihood.curvature(y).max()
    found = AutoUnrolled(model, step=float(1 / size)).encode(y)["codes"]
    assert (expected != 0).any()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["groups", "support"])
def test_backtracking_ends_at_the_certified_codes(name: str) -> None:
    model, _, y = make(name)
    with torch.no_grad():
        guide = AutoUnrolled(model, num_steps=250, method=FISTA(restart=True))
        found = guide.encode(y)["codes"]
    expected = solve(y, model.dictionary, model.prior, likelihood=model.likelihood, tol=1e-13)
    torch.testing.assert_close(found, expected.codes, rtol=0, atol=1e-6)


@priors
def test_what_is_masked_has_no_say(name: str) -> None:
    model, guide, y = make(name)
    mask = torch.rand(y.shape) < 0.7
    other = torch.where(mask, y, torch.nan)
    for encode in (guide.encode, AutoUnrolled(model).encode):
        whole, seen = encode(y, mask=mask), encode(other, mask=mask)
        whole, seen = (c if isinstance(c, Tensor) else c["codes"] for c in (whole, seen))
        assert torch.equal(whole, seen) and seen.isfinite().all()
    loss = Trace_ELBO()(model, guide)(other, None, mask)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(
    ("name", "elbo"),
    [
        *((name, Trace_ELBO) for name in PRIORS),
        ("one-sided groups", TraceMeanField_ELBO),
        ("support", TraceMeanField_ELBO),
        ("one-sided groups", SparseELBO),
        ("neurons", SparseELBO),
    ],
)
def test_the_loss_is_the_penalised_one_and_svi_lowers_it(name: str, elbo: Any) -> None:
    model, guide, y = make(name)
    codes = guide.encode(y).detach()
    law = codes_prior(model.prior, None, tuple(codes.shape[1:]), like=y)
    data = -model.likelihood(model.dictionary(codes)).log_prob(y).sum()
    zero = -law.log_prob(torch.zeros_like(codes)).sum()
    expected = data + penalty(law, codes).sum() + zero
    loss = elbo()
    torch.testing.assert_close(loss(model, guide)(y).detach(), expected.detach())
    history = fit(model, guide, y, loss=loss, epochs=4, progress=False).epoch_loss
    assert history[-1] < history[0]


@priors
def test_draws_of_the_model_keep_to_signs_and_support(name: str) -> None:
    model, _, _ = make(name)
    nodes = pyro.poutine.trace(model).get_trace(num_data=6).nodes
    codes, law = nodes["codes"]["value"], nodes["codes"]["fn"]
    assert law.log_prob(codes).isfinite().all()
    assert nodes["obs"]["value"].isfinite().all()


@priors
def test_a_saved_pair_comes_back_with_its_prior(name: str, tmp_path: Path) -> None:
    model, guide, y = make(name)
    save(tmp_path / "run", model=model, guide=guide)
    back = load(tmp_path / "run")
    assert torch.equal(back["guide"].encode(y), guide.encode(y))
    assert back["guide"].encoder_prior is back["model"].prior
    assert type(back["model"].prior) is type(model.prior)
    pyro.set_rng_seed(3)
    first = model(num_data=4)
    pyro.set_rng_seed(3)
    assert torch.equal(back["model"](num_data=4), first)


def test_a_program_may_know_the_support_of_every_trial() -> None:
    dictionary, y = Dense(12, 7).double(), torch.randn(3, 7, dtype=torch.float64)
    active = torch.rand(3, 12) < 0.6
    base = SignedLaplace(double(0.4), SIGNS)

    def model(y: Tensor) -> None:
        with pyro.plate("trials", len(y)):
            z = pyro.sample("z", KnownSupport(base, active).to_event(1))
            pyro.sample("y", dist.Normal(dictionary(z), 1.0).to_event(1), obs=y)

    with torch.no_grad():
        guide = AutoUnrolled(model, num_steps=250, method=FISTA(restart=True))
        codes = guide.encode(y)["z"]
    assert (codes[~active] == 0).all() and (codes != 0).any()
    for datum, own, code in zip(y, active, codes):
        alone = solve(datum, dictionary, KnownSupport(base, own), tol=1e-13)
        torch.testing.assert_close(code, alone.codes, rtol=0, atol=1e-6)


# Posteriors with a spread -------------------------------------------------------------------------


def spread_guide(y: Tensor, family: Any, num_atoms: int) -> Thresholded:
    init = {"loc": torch.zeros(len(y), num_atoms, dtype=y.dtype)}
    init |= {name: torch.full_like(init["loc"], -1.0) for name in family.names if name != "loc"}
    return Thresholded(PerDatum(init), family)


def test_a_dense_posterior_keeps_to_the_support_and_has_its_divergence() -> None:
    y = torch.randn(5, 7, dtype=torch.float64)
    prior = KnownSupport(dist.Laplace(double(0.0), double(1.0)), ACTIVE)
    model = SparseCoding(Dense(12, 7).double(), Gaussian(0.5).double(), prior)
    guide = spread_guide(y, SupportedPosterior(DensePosterior(dist.Laplace), ACTIVE), 12)
    codes = guide(y)
    assert (codes[:, ~ACTIVE] == 0).all() and (codes[:, ACTIVE] != 0).all()
    # The same model and guide with the atoms that may be active, and no support.
    small = Dense(9, 7, atoms=model.dictionary.atoms[ACTIVE].detach())
    free = SparseCoding(small, model.likelihood, dist.Laplace(double(0.0), double(1.0)))
    other = spread_guide(y, DensePosterior(dist.Laplace), 9)
    loss, expected = SparseELBO()(model, guide)(y), SparseELBO()(free, other)(y)
    torch.testing.assert_close(loss, expected)
    history = fit(model, guide, y, epochs=4, progress=False).epoch_loss
    assert history[-1] < history[0]
    assert torch.equal(guide.encoder.emitted["loc"][:, ~ACTIVE], torch.zeros(5, 3).double())


def test_gates_are_closed_outside_the_support() -> None:
    y = torch.randn(5, 7, dtype=torch.float64)
    probs = torch.where(ACTIVE, double(0.3), 0.0)
    prior = SpikeAndSlab(dist.Normal(double(0.0), double(1.0)), probs=probs)
    model = SparseCoding(Dense(12, 7).double(), Gaussian(0.5).double(), prior)
    guide = spread_guide(y, SupportedPosterior(SpikeAndSlabPosterior(), ACTIVE), 12)
    assert (guide.posterior(y).prob_active[:, ~ACTIVE] == 0).all()
    history = fit(model, guide, y, epochs=4, progress=False).epoch_loss
    assert history[-1] < history[0]
    assert all(p.isfinite().all() for p in guide.parameters())


def test_a_posterior_that_leaves_the_support_is_refused_by_name() -> None:
    y = torch.randn(5, 7, dtype=torch.float64)
    prior = KnownSupport(dist.Laplace(double(0.0), double(1.0)), ACTIVE)
    model = SparseCoding(Dense(12, 7).double(), Gaussian(0.5).double(), prior)
    with pytest.raises(ValueError, match="guide with the support of the prior, got Normal"):
        SparseELBO()(model, spread_guide(y, DensePosterior(), 12))(y)
    with pytest.raises(ValueError, match=r"atom at zero.*probs=torch.where\(active, ..., 0.0\)"):
        SparseELBO()(model, spread_guide(y, SpikeAndSlabPosterior(), 12))(y)


@pytest.mark.parametrize(
    "loss",
    [Trace_ELBO(), SparseELBO(), SparseELBO(estimator=ImplicitMixed())],
    ids=["Trace_ELBO", "SparseELBO", "ImplicitMixed"],
)
def test_a_dense_posterior_of_groups_has_the_gradient_of_its_expectation(loss: Any) -> None:
    """No closed form of the divergence: by pathwise draws, against quadrature in one group."""
    size = 5000
    y = double([[0.8, -0.3]]).expand(size, 2)
    model = SparseCoding(
        Dense(2, 2, atoms=torch.eye(2)).double(),
        Gaussian(0.7).double(),
        GroupLaplace(double(1.5), (2,)),
    )
    guide = spread_guide(y, DensePosterior(), 2)
    with torch.no_grad():
        guide.encoder.emitted["loc"].copy_(double([[0.5, -0.1]]).expand(size, 2))
    parameters = [guide.encoder.emitted[name] for name in ("loc", "log_scale")]
    found = torch.cat(torch.autograd.grad(loss(model, guide)(y), parameters), -1)  # one for a datum
    loc, log_scale = (p[:1].detach().requires_grad_() for p in parameters)
    grid = torch.linspace(-6, 6, 241, dtype=torch.float64)
    noise = torch.cartesian_prod(grid, grid)  # of a standard normal
    weight = (-noise.square().sum(1) / 2).exp()
    codes = loc + log_scale.exp() * noise
    joint = model.likelihood(codes).log_prob(y[:1]).sum(1) + model.prior.log_prob(codes)
    value = -(weight * joint).sum() / weight.sum() - log_scale.sum()
    exact = torch.cat(torch.autograd.grad(value, (loc, log_scale)), -1)[0]
    error = found.std(0) / size**0.5
    assert ((found.mean(0) - exact).abs() <= 5 * error + 1e-3).all()  # 1e-3: the kink on the grid


def test_an_autoguide_knows_the_signs() -> None:
    model, _, y = make("signs")
    guide = AutoNormal(pyro.poutine.block(model, expose=["codes"]))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(y) for _ in range(30)]
    assert all(map(torch.isfinite, map(torch.tensor, losses))) and losses[-1] < losses[0]
    assert (guide(y)["codes"] * SIGNS >= 0).all()


# Rates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["signs", "neurons", "times"])
def test_rates_of_drawn_codes_come_back_in_closed_form(kind: str) -> None:
    def prior(rate: Tensor) -> Any:
        return {
            "signs": lambda: SignedLaplace(rate, torch.tensor([[1.0], [0.0], [-1.0]])),
            "neurons": lambda: GroupLaplace(rate, (4,)),
            "times": lambda: KnownSupport(dist.Laplace(0.0, 1 / rate), TIMES),
        }[kind]()

    truth = torch.tensor([0.5, 1.0, 3.0])
    shape = (3, 8, 4) if kind == "neurons" else (3, 8)
    codes = codes_prior(prior, truth, shape, like=torch.zeros(1)).sample((2000,))
    rate = Rate(1.0, num_atoms=3)
    found = RateEM(rate, prior).update(codes)
    # Each rate from at least 2000 * 5 numbers of coefficient of variation 1.
    torch.testing.assert_close(found, truth, rtol=5 / 100, atol=0)


def test_learned_rates_of_groups_train() -> None:
    rate = Rate(torch.ones(3))
    dictionary, likelihood = Conv(3, 1, (4, 1)), Gaussian(0.5)

    def prior(rate: Tensor) -> GroupLaplace:
        return GroupLaplace(rate, (4,))

    model = SparseCoding(dictionary, likelihood, prior, rate=rate)
    guide = UnrolledFISTA(dictionary, likelihood, prior, rate=rate)
    y = torch.randn(5, 1, 11, 4)
    Trace_ELBO()(model, guide)(y).backward()
    held = nn.ModuleList([model, guide])
    assert all(p.grad is not None and (p.grad != 0).any() for p in held.parameters())


# The relaxations of DCEA --------------------------------------------------------------------------


class Sharpened(nn.Module):
    """A deep decoder of convolutional codes: a dictionary, then what is not linear."""

    def __init__(self) -> None:
        super().__init__()
        self.dictionary = Conv(3, 1, 4)
        self.after = nn.Sequential(nn.Conv1d(1, 5, 3, padding=1), nn.Tanh(), nn.Conv1d(5, 1, 1))

    def forward(self, codes: Tensor) -> Tensor:
        predictor = self.dictionary(codes)
        return predictor + self.after(predictor)


DCEA = {
    "tied": lambda d, f, p, **o: UnrolledFISTA(d, f, p, **o),
    "untied": lambda d, f, p, **o: UnrolledFISTA.untied(d, f, p, **o),
    "output": lambda d, f, p, **o: UnrolledFISTA(Conv(3, 1, 4), f, p, **o),
}
FAMILIES = {
    "poisson": (Poisson(), Stabilised(Poisson(), 5.0)),
    "binomial": (Binomial(5), Binomial(5)),
    "gaussian": (Gaussian(0.5), Gaussian(0.5)),
}


@pytest.mark.parametrize("weights", DCEA)
@pytest.mark.parametrize(
    ("decoder", "family"),
    [("linear", "poisson"), ("linear", "binomial"), ("deep", "poisson"), ("deep", "gaussian")],
)
def test_the_relaxations_of_dcea_train_in_all_their_parameters(
    weights: str, decoder: str, family: str
) -> None:
    """Untied (analysis, synthesis, output), a learned bias, a deep decoder (Tolooshams 2020)."""
    likelihood, stabilised = FAMILIES[family]
    prior, y = dist.Exponential(1.0), torch.randint(0, 4, (6, 1, 11)).float()
    deep = Sharpened()
    if decoder == "deep":
        dictionary = deep.dictionary
        model = DeepSparseCoding(deep, likelihood, prior, code_shape=(3, 8), signal_shape=(1, 11))
    else:
        dictionary = Conv(3, 1, 4)
        model = SparseCoding(dictionary, likelihood, prior)
    options = {
        "method": ISTA(),
        "step_size": 0.1,
        "num_steps": 6,
        "shrinkage": Bias(0.01, num_atoms=3),
    }
    guide = DCEA[weights](dictionary, stabilised, prior, **options)
    before = {
        name: p.detach().clone() for name, p in nn.ModuleList([model, guide]).named_parameters()
    }
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    losses = [svi.step(y) for _ in range(10)]
    assert losses[-1] < losses[0]
    after = dict(nn.ModuleList([model, guide]).named_parameters())
    assert {name for name in after if torch.equal(before[name], after[name])} == set()


def test_group_shrinkage_across_channels_is_a_configuration() -> None:
    """Of simultaneously recorded neurons, one-sided, at known events, the largest kept."""
    active = torch.zeros(1, 8, dtype=torch.bool)
    active[:, [1, 4]] = True
    prior = KnownSupport(GroupLaplace(0.3, (4,), one_sided=True), active)
    dictionary, likelihood = Conv(3, 1, (4, 1)), Binomial(5)
    model = SparseCoding(dictionary, likelihood, prior)
    guide = UnrolledFISTA(
        dictionary, likelihood, prior, num_steps=20, shrinkage=TopK(Proximal(3), 12)
    )
    y = torch.randint(0, 6, (6, 1, 11, 4)).float()
    history = fit(model, guide, y, epochs=6, progress=False).epoch_loss
    assert history[-1] < history[0]
    codes = guide.encode(y)
    assert (codes >= 0).all() and (codes[:, :, ~active[0]] == 0).all() and (codes > 0).any()


def test_thresholds_of_any_program_cannot_be_learned_apart_within_a_group() -> None:
    model, _, y = make("groups of atoms")
    with pytest.raises(
        ValueError, match="one step for all codes of a group.*learn_thresholds=False"
    ):
        AutoUnrolled(model, learn_thresholds=True)(y)
    model, _, y = make("neurons")
    assert AutoUnrolled(model, learn_thresholds=True)(y)["codes"].shape == (5, 3, 8, 4)
