"""MAP codes of count data and positive data, to a certificate, against an independent solver."""

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.optimize
import torch

from pyro_sparse.dictionaries import Conv, Dense
from pyro_sparse.likelihoods import (
    Bernoulli,
    Binomial,
    Gamma,
    NegativeBinomial,
    Offset,
    Poisson,
)
from pyro_sparse.solvers import solve


def double(value):
    return torch.tensor(value, dtype=torch.float64)


LIKELIHOODS = {
    "poisson": Poisson,
    "poisson with a baseline": lambda: Offset(Poisson(), torch.linspace(0, 1.5, 12).double()),
    "binomial": lambda: Binomial(5),
    "bernoulli": Bernoulli,
    "negative binomial": lambda: NegativeBinomial(double(2.0)),
    "gamma": lambda: Gamma(double(3.0)),
}
each = pytest.mark.parametrize("name", LIKELIHOODS)


def problem(name):
    torch.manual_seed(0)
    likelihood, dictionary = LIKELIHOODS[name]().double(), Dense(20, 12).double()
    codes = 2 * torch.randn(6, 20, dtype=torch.float64) * (torch.rand(6, 20) < 0.15)
    return likelihood, dictionary, likelihood(dictionary(codes)).sample()


def independent(likelihood, dictionary, y, rate, signed=True):
    """L-BFGS-B on positive and negative parts: smooth, with bounds."""
    atoms = dictionary.atoms.detach()
    signs = [1.0, -1.0] if signed else [1.0]

    def objective(parts):
        free = torch.tensor(parts, requires_grad=True)
        codes = sum(s * p for s, p in zip(signs, free.reshape(len(signs), -1)))
        value = -likelihood(codes @ atoms).log_prob(y).sum() + rate * free.sum()
        (gradient,) = torch.autograd.grad(value, free)
        return value.item(), gradient.numpy()

    size = len(signs) * len(atoms)
    found = scipy.optimize.minimize(
        objective,
        np.zeros(size),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * size,
        options={"maxiter": 20_000, "maxfun": 40_000, "ftol": 0, "gtol": 1e-9},
    )
    parts = torch.from_numpy(found.x).reshape(len(signs), -1)
    return sum(s * p for s, p in zip(signs, parts)), found.fun


@each
@pytest.mark.parametrize("signed", [True, False])
def test_codes_and_objective_are_those_of_an_independent_solver(name, signed):
    likelihood, dictionary, y = problem(name)
    rate = 0.3
    prior = dist.Laplace(0.0, double(1 / rate)) if signed else dist.Exponential(double(rate))
    solution = solve(y, dictionary, prior, likelihood=likelihood, tol=1e-10, max_steps=50_000)
    assert solution.converged.all(), solution.gap
    for datum, codes in zip(y, solution.codes):
        expected, value = independent(likelihood, dictionary, datum, rate, signed)
        found = -likelihood(dictionary(codes)).log_prob(datum).sum() + rate * codes.abs().sum()
        assert found <= value + 1e-8 * abs(value)
        torch.testing.assert_close(codes, expected, rtol=0, atol=1e-4)
    assert (solution.codes == 0).any()


@each
def test_single_precision_is_finished_in_double(name):
    likelihood, dictionary, y = problem(name)
    single = solve(
        y.float(),
        dictionary.float(),
        dist.Laplace(0.0, 3.0),
        likelihood=likelihood.float(),
        tol=1e-5,
        max_steps=20_000,
    )
    assert single.converged.all()
    assert single.codes.dtype == torch.float32


def test_masked_data_of_a_family_without_zero_are_left_out():
    torch.manual_seed(0)
    likelihood, dictionary, y = problem("gamma")
    mask = torch.rand(y.shape) < 0.7
    holes = torch.where(mask, y, torch.full_like(y, torch.nan))
    prior = dist.Laplace(0.0, double(3.0))
    masked = solve(holes, dictionary, prior, likelihood=likelihood, mask=mask, tol=1e-9)
    for datum, keep, codes in zip(y, mask, masked.codes):
        less = Dense(20, int(keep.sum()), atoms=dictionary.atoms.detach()[:, keep], unit_norm=False)
        alone = solve(datum[keep], less, prior, likelihood=likelihood, tol=1e-9)
        torch.testing.assert_close(codes, alone.codes, rtol=0, atol=1e-4)


def test_each_datum_has_a_step_of_its_own():
    # A datum of large counts must not slow the others down.
    torch.manual_seed(0)
    dictionary, likelihood = Dense(20, 12).double(), NegativeBinomial(double(2.0))
    y = torch.poisson(torch.full((5, 12), 2.0, dtype=torch.float64))
    prior = dist.Laplace(0.0, double(3.0))
    alone = solve(y, dictionary, prior, likelihood=likelihood, tol=1e-8)
    beside = torch.cat([y, torch.full((1, 12), 1e4, dtype=torch.float64)])
    together = solve(beside, dictionary, prior, likelihood=likelihood, tol=1e-8, max_steps=200)
    torch.testing.assert_close(together.codes[:5], alone.codes)
    assert torch.equal(together.num_steps[:5], alone.num_steps)


def test_convolutional_counts_reach_a_certificate():
    torch.manual_seed(0)
    dictionary = Conv(2, 1, 7).double()
    events = 3 * torch.rand(2, 2, 44, dtype=torch.float64) * (torch.rand(2, 2, 44) < 0.05)
    likelihood = Offset(Poisson(), double(0.5))
    y = likelihood(dictionary(events)).sample()
    solution = solve(y, dictionary, dist.Exponential(double(0.5)), likelihood=likelihood, tol=1e-6)
    assert solution.converged.all()
    assert (solution.codes >= 0).all()


def test_data_out_of_range_are_refused_at_the_door():
    with pytest.raises(ValueError, match="Expected whole counts >= 0, as Poisson has them"):
        solve(torch.full((2, 3), -1.0), Dense(4, 3), dist.Laplace(0.0, 1.0), likelihood=Poisson())
