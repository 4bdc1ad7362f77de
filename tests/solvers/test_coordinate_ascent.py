"""Bounds are checked through the programs' own densities, posteriors against scipy."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import expit, logit
from scipy.stats import norm

from pyro_sparse.dictionaries import Conv, Dense
from pyro_sparse.distributions.mixed import SpikeAndSlab
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers.coordinate_ascent import coordinate_ascent
from pyro_sparse.solvers.linear_gaussian import linear_gaussian


def random_prior(rng, num_atoms, loc=True):
    return SpikeAndSlab(
        dist.Normal(
            torch.from_numpy(loc * rng.standard_normal(num_atoms)),
            torch.from_numpy(rng.uniform(0.3, 2.0, num_atoms)),
        ),
        probs=torch.from_numpy(rng.uniform(0.05, 0.8, num_atoms)),
    )


def random_problem(seed, num_atoms=12, features=8, size=5, alike=1.0):
    rng = np.random.default_rng(seed)
    atoms = alike * rng.standard_normal(features) + rng.standard_normal((num_atoms, features))
    dictionary = Dense(num_atoms, features, atoms=torch.from_numpy(atoms))
    likelihood = Gaussian(torch.from_numpy(rng.uniform(0.2, 0.8, features)))
    prior = random_prior(rng, num_atoms)
    pyro.set_rng_seed(seed)
    with torch.no_grad(), pyro.poutine.block():
        y = SparseCoding(dictionary, likelihood, prior)(num_data=size)
    return y, dictionary, prior, likelihood


def test_a_lone_code_or_orthogonal_atoms_give_the_exact_posterior():
    """Each code then sees one number, its atom's product with the data: two normal densities."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((6, 6)))[0][:4]
    prior = random_prior(rng, 4)
    y = rng.standard_normal((3, 6)) * 2
    fit = coordinate_ascent(
        torch.from_numpy(y), Dense(4, 6, atoms=torch.from_numpy(basis)), prior, Gaussian(0.4)
    )
    loc, scale, seen = prior.slab.loc.numpy(), prior.slab.scale.numpy(), y @ basis.T
    inactive = norm(0, 0.4).logpdf(seen)
    active = norm(loc, np.hypot(scale, 0.4)).logpdf(seen)
    probs = prior.probs.numpy()
    expected = expit(logit(probs) + active - inactive)
    law = fit.law.base_dist
    np.testing.assert_allclose(law.prob_active, expected, atol=1e-8)
    np.testing.assert_allclose(fit.prob_active, expected, atol=1e-8)
    gain = scale**2 / (scale**2 + 0.4**2)
    np.testing.assert_allclose(law.slab.mean, loc + gain * (seen - loc), atol=1e-8)
    np.testing.assert_allclose(law.slab.variance[0], gain * 0.4**2, atol=1e-8)
    outside = (np.square(y).sum(1) - np.square(seen).sum(1)) / (2 * 0.4**2)
    evidence = np.logaddexp(np.log(probs) + active, np.log1p(-probs) + inactive).sum(1)
    evidence += -outside + 2 * norm(0, 0.4).logpdf(0)
    np.testing.assert_allclose(fit.elbo, evidence, atol=1e-8)
    assert bool(fit.converged.all()) and len(fit.history) <= 3


@pytest.mark.parametrize("masked", [False, True])
def test_the_bound_is_that_of_the_law_in_the_model(masked):
    y, dictionary, prior, likelihood = random_problem(1)
    mask = torch.rand(y.shape) < 0.6 if masked else torch.ones(y.shape, dtype=torch.bool)
    data = y.masked_fill(~mask, torch.nan)
    fit = coordinate_ascent(data, dictionary, prior, likelihood, mask=mask)
    codes = fit.law.sample((50_000,))
    log_likelihood = likelihood(codes @ dictionary.atoms.detach()).log_prob(y)
    joint = prior.log_prob(codes).sum(-1) + (log_likelihood * mask).sum(-1)
    weight = joint - fit.law.log_prob(codes)
    error = weight.std(0) / len(weight) ** 0.5
    assert bool(((weight.mean(0) - fit.elbo).abs() < 4 * error).all())


@pytest.mark.parametrize("seed", range(20))
def test_the_bound_never_falls(seed):
    y, *rest = random_problem(seed, num_atoms=2 + 2 * seed, alike=seed % 4)
    mask = torch.rand(y.shape) < 0.8
    history = coordinate_ascent(y, *rest, mask=mask if seed % 2 else None).history
    # Rounding of sums that start at thousands of nats.
    assert (history.diff(dim=0) / history[1:].abs()).min() > -1e-12
    assert bool((history[-1] > history[0]).all())


def test_no_change_of_a_code_raises_the_bound():
    y, dictionary, prior, likelihood = problem = random_problem(2)
    fit = coordinate_ascent(*problem, tol=1e-12)
    law = fit.law.base_dist
    for k in range(0, 12, 3):
        for size in (0.03, -0.03):
            step = size * torch.eye(12, dtype=torch.float64)[k]
            others = [
                SpikeAndSlab(dist.Normal(law.slab.loc + step, law.slab.scale), logits=law.logits),
                SpikeAndSlab(
                    dist.Normal(law.slab.loc, law.slab.scale * step.exp()), logits=law.logits
                ),
                SpikeAndSlab(law.slab, logits=law.logits + step),
            ]
            for other in others:
                start = coordinate_ascent(*problem, init=other, max_sweeps=1).history[0]
                assert bool((start < fit.elbo + 1e-9).all())
                assert bool((start < fit.elbo - 1e-9).any())


def test_the_last_code_of_a_sweep_is_at_its_optimum_given_the_others():
    problem = random_problem(2)
    fit = coordinate_ascent(*problem, max_sweeps=1)
    law = fit.law.base_dist
    step = torch.zeros(12, dtype=torch.float64)
    step[-1] = 0.01
    for sign in (-1, 1):
        other = SpikeAndSlab(dist.Normal(law.slab.loc + sign * step, law.slab.scale), law.probs)
        start = coordinate_ascent(*problem, init=other, max_sweeps=1).history[0]
        assert bool((start < fit.elbo).all())


def test_a_start_at_the_solution_stays_there():
    problem = random_problem(3)
    fit = coordinate_ascent(*problem, tol=1e-12)
    again = coordinate_ascent(*problem, init=fit.law)
    assert len(again.history) == 2
    np.testing.assert_allclose(again.history, fit.elbo.expand(2, -1), atol=1e-9)


def test_a_start_from_another_slab_takes_its_moments():
    y, *rest = random_problem(4)
    loc = torch.randn(len(y), 12, dtype=torch.float64)
    laplace = SpikeAndSlab(dist.Laplace(loc, 0.5), probs=0.3).to_event(1)
    normal = SpikeAndSlab(dist.Normal(loc, 0.5 * 2**0.5), probs=0.3)
    fits = [coordinate_ascent(y, *rest, init=init) for init in (laplace, normal)]
    np.testing.assert_allclose(fits[0].history[0], fits[1].history[0], rtol=1e-12)


def test_a_masked_sample_counts_as_if_it_had_not_been_measured():
    y, dictionary, prior, likelihood = random_problem(5, size=1)
    mask = torch.arange(8) % 3 != 1
    fit = coordinate_ascent(
        y.masked_fill(~mask, torch.nan), dictionary, prior, likelihood, mask=mask
    )
    atoms = dictionary.atoms.detach()[:, mask]
    reduced = Dense(12, int(mask.sum()), atoms=atoms, unit_norm=False)
    other = coordinate_ascent(y[:, mask], reduced, prior, Gaussian(likelihood.scale[mask]))
    np.testing.assert_allclose(fit.elbo, other.elbo, atol=1e-8)
    np.testing.assert_allclose(fit.law.mean, other.law.mean, atol=1e-5)


def test_data_do_not_see_each_other():
    y, *rest = random_problem(6)
    together = coordinate_ascent(y, *rest, tol=1e-12)
    alone = coordinate_ascent(y[2:3], *rest, tol=1e-12)
    np.testing.assert_allclose(together.elbo[2], alone.elbo[0], atol=1e-10)


def test_codes_that_are_surely_active_give_ridge_regression():
    y, dictionary, prior, likelihood = random_problem(7, num_atoms=4, alike=0.3)
    prior = SpikeAndSlab(prior.slab, probs=1.0)
    fit = coordinate_ascent(y, dictionary, prior, likelihood, tol=1e-13)
    atoms, loc = dictionary.atoms.detach().numpy(), prior.slab.loc.numpy()
    weight, ridge = likelihood.scale.numpy() ** -2.0, np.diag(prior.slab.scale.numpy() ** -2.0)
    right = (y.numpy() * weight) @ atoms.T + ridge @ loc
    expected = np.linalg.solve((atoms * weight) @ atoms.T + ridge, right.T).T
    np.testing.assert_allclose(fit.law.mean, expected, atol=1e-5)
    assert bool((fit.law.base_dist.prob_active == 1).all()) and bool(fit.elbo.isfinite().all())


def test_codes_that_are_surely_inactive_leave_the_noise():
    y, dictionary, prior, likelihood = random_problem(8)
    fit = coordinate_ascent(y, dictionary, SpikeAndSlab(prior.slab, probs=0.0), likelihood)
    expected = norm(0, likelihood.scale.numpy()).logpdf(y.numpy()).sum(1)
    np.testing.assert_allclose(fit.elbo, expected, rtol=1e-12)
    assert bool((fit.law.sample() == 0).all())


def test_float32_data_give_a_float32_law_and_a_float64_bound():
    y, dictionary, _, _ = random_problem(9)
    prior = SpikeAndSlab(dist.Normal(0.0, 1.0), probs=0.2)
    fit = coordinate_ascent(y.float(), dictionary.float(), prior, Gaussian(0.5))
    assert fit.law.sample().dtype == torch.float32 and fit.elbo.dtype == torch.float64
    assert fit.law.batch_shape == (5,) and fit.law.event_shape == (12,)


def test_convolutional_codes_keep_their_shape():
    dictionary = Conv(3, 1, 4).double()
    y = torch.randn(2, 1, 20, dtype=torch.float64)
    prior = SpikeAndSlab(dist.Normal(0.0, 1.0), probs=0.1)
    fit = coordinate_ascent(y, dictionary, prior, Gaussian(0.5))
    assert fit.law.event_shape == dictionary.code_shape((1, 20)) and fit.law.batch_shape == (2,)
    residual = y - dictionary(fit.law.mean).detach()
    assert residual.square().mean() < y.square().mean()


def test_one_prior_for_each_atom_by_its_rate():
    y, dictionary, _, likelihood = random_problem(10)
    rate = torch.linspace(0.5, 2.0, 12).double()

    def prior(rate):
        return SpikeAndSlab(dist.Normal(0.0, 1 / rate), probs=0.2)

    fits = [
        coordinate_ascent(y, dictionary, prior, likelihood, rate=rate),
        coordinate_ascent(y, dictionary, prior(rate), likelihood),
    ]
    np.testing.assert_allclose(fits[0].elbo, fits[1].elbo, rtol=1e-6)


def test_reports_what_has_not_converged():
    problem = random_problem(11, num_atoms=30, alike=3.0)
    fit = coordinate_ascent(*problem, max_sweeps=2)
    assert len(fit.history) == 3 and not bool(fit.converged.all())


def test_conditional_is_stable_for_a_narrow_slab_far_from_zero():
    """mu^2 / tau^2 is 1e16 here; the difference that counts is of size one."""
    prior = SpikeAndSlab(
        dist.Normal(torch.tensor(1.0).double(), torch.tensor(1e-8).double()), probs=0.5
    )
    problem = linear_gaussian(
        torch.zeros(1, 1).double(), Dense(1, 1, atoms=torch.eye(1)).double(), prior, Gaussian(1.0)
    )
    logits, loc, _ = problem.conditional(0, torch.tensor([0.7], dtype=torch.float64))
    # A slab of no width is the point mu: the log-ratio of the densities of 0.7 at 1 and at 0.
    assert logits.item() == pytest.approx(norm(1).logpdf(0.7) - norm(0).logpdf(0.7), abs=1e-12)
    assert loc.item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"prior": dist.Normal(0.0, 1.0)}, TypeError, "atom at zero"),
        (
            {"prior": SpikeAndSlab(dist.Laplace(0.0, 1.0), probs=0.1)},
            NotImplementedError,
            "Normal slab.*Laplace",
        ),
        ({"init": dist.Normal(0.0, 1.0)}, TypeError, "init to be a law with an atom"),
        (
            {"init": SpikeAndSlab(dist.Normal(torch.zeros(4), 1.0), probs=0.1)},
            ValueError,
            "init to expand",
        ),
        ({"tol": 0.0}, ValueError, "tol > 0"),
        ({"tol": "small"}, TypeError, "tol to be a number"),
        ({"max_sweeps": 0}, ValueError, "max_sweeps >= 1"),
        ({"y": torch.full((1, 4), torch.inf)}, ValueError, "finite data"),
        ({"mask": torch.ones(4)}, TypeError, "boolean"),
        ({"rate": torch.ones(3)}, TypeError, "callable"),
    ],
    ids=["prior", "slab", "init", "shape", "tol", "kind", "sweeps", "inf", "mask", "rate"],
)
def test_refuses_what_it_cannot_do(change, error, match):
    arguments = {
        "y": torch.zeros(1, 4),
        "dictionary": Dense(3, 4),
        "prior": SpikeAndSlab(dist.Normal(0.0, 1.0), probs=0.1),
        "likelihood": Gaussian(1.0),
    }
    with pytest.raises(error, match=match):
        coordinate_ascent(**{**arguments, **change})
