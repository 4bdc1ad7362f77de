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
from pyro_sparse.infer import RateEM, SparseELBO, fit, load, save
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
    assert (expected != 0).any() and (expected == 0).any()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@priors
def test_backtracking_ends_at_the_certified_codes(name: str) -> None:
    model, _, y = make(name)
    with torch.no_grad():
        guide = AutoUnrolled(model, num_steps=300, method=FISTA(restart=True))
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


@priors
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, SparseELBO])
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
    dictionary, y = Dense(12, 7).double(), torch.randn(6, 7, dtype=torch.float64)
    active = torch.rand(6, 12) < 0.6
    base = SignedLaplace(double(0.4), SIGNS)

    def model(y: Tensor) -> None:
        with pyro.plate("trials", len(y)):
            z = pyro.sample("z", KnownSupport(base, active).to_event(1))
            pyro.sample("y", dist.Normal(dictionary(z), 1.0).to_event(1), obs=y)

    with torch.no_grad():
        guide = AutoUnrolled(model, num_steps=400, method=FISTA(restart=True))
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
