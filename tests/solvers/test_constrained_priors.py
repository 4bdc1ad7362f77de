"""Solvers and encoders under priors of known signs, groups and known support."""

import functools
from typing import NamedTuple

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.optimize
import torch

from pyro_sparse.dictionaries import Conv, Dense, Overhang
from pyro_sparse.distributions import GroupLaplace, KnownSupport, SignedLaplace, codes_prior
from pyro_sparse.likelihoods import Gaussian, Poisson
from pyro_sparse.solvers import (
    FISTA,
    Bias,
    HardThreshold,
    Implicit,
    Proximal,
    TopK,
    Unrolled,
    differentiated,
    solve,
)

double = functools.partial(torch.tensor, dtype=torch.float64)
DICTIONARIES = {
    "dense": (lambda: Dense(20, 12).double(), (12,)),
    "conv": (lambda: Conv(3, 2, 5, boundary=Overhang()).double(), (2, 20)),
    "neurons": (lambda: Conv(3, 1, (5, 1)).double(), (1, 16, 4)),
}


class Case(NamedTuple):
    """A prior, and the same in numbers: which group, rate and sign a code has, and if any."""

    dictionary: str
    prior: object
    group: np.ndarray
    rate: np.ndarray
    sign: np.ndarray
    active: np.ndarray


def case(dictionary, shape, prior, *, group=None, rate=0.3, sign=0, active=True):
    each = np.arange(np.prod(shape)).reshape(shape) if group is None else group
    return Case(
        dictionary, prior, *(np.broadcast_to(x, shape).ravel() for x in (each, rate, sign, active))
    )


SIGNS = np.resize([1.0, 0.0, -1.0], 20)
RATES = np.linspace(0.1, 0.5, 20)
SOME = np.resize([True, True, False], 20)
TIMES = np.resize([True, False, True, True], 24)[None]
EVENTS = np.resize([True, True, False, True, False], (3, 12))
CASES = {
    "signs": lambda: case(
        "dense", (20,), SignedLaplace(double(RATES), double(SIGNS)), rate=RATES, sign=SIGNS
    ),
    "signs of atoms": lambda: case(
        "conv",
        (3, 24),
        SignedLaplace(double(0.3), double([[1.0], [0.0], [-1.0]])),
        sign=np.array([[1], [0], [-1]]),
    ),
    "groups of atoms": lambda: case(
        "dense", (20,), GroupLaplace(double(0.3), (20,), group=(4,)), group=np.arange(20) // 4
    ),
    "one-sided groups": lambda: case(
        "dense",
        (20,),
        GroupLaplace(double(0.3), (20,), group=(4,), one_sided=True),
        group=np.arange(20) // 4,
        sign=1,
    ),
    "groups across atoms": lambda: case(
        "conv", (3, 24), GroupLaplace(double(0.3), (3, 24), group=(3, 1)), group=np.arange(24)[None]
    ),
    "groups across neurons": lambda: case(
        "neurons",
        (3, 12, 4),
        GroupLaplace(double([0.2, 0.3, 0.4]).reshape(3, 1, 1), (4,)),
        group=np.arange(36).reshape(3, 12, 1),
        rate=np.array([0.2, 0.3, 0.4]).reshape(3, 1, 1),
    ),
    "known support": lambda: case(
        "dense",
        (20,),
        KnownSupport(SignedLaplace(double(0.3), double(SIGNS)), torch.from_numpy(SOME)),
        sign=SIGNS,
        active=SOME,
    ),
    "known times": lambda: case(
        "conv",
        (3, 24),
        KnownSupport(dist.Laplace(double(0.0), double(1 / 0.3)), torch.from_numpy(TIMES)),
        active=TIMES,
    ),
    "known events of neurons": lambda: case(
        "neurons",
        (3, 12, 4),
        KnownSupport(GroupLaplace(double(0.3), (4,)), torch.from_numpy(EVENTS)),
        group=np.arange(36).reshape(3, 12, 1),
        active=EVENTS[:, :, None],
    ),
}  # fmt: skip
cases = pytest.mark.parametrize("name", CASES)


def independent(matrix, y, given):
    """Minimum by smooth optimisation: a group is a scalar times a vector, z = a w.

    rate ||z|| is the least rate (a^2 + ||w||^2) / 2 of all such products, so the sum of squares has
    the minimum of the group lasso; signs and support are bounds of w (Hoff 2017, CSDA 115).
    """
    group = np.unique(given.group, return_inverse=True)[1]
    size, rate = group.max() + 1, np.zeros(group.max() + 1)
    rate[group] = given.rate

    def objective(parts):
        a, w = parts[:size], parts[size:]
        residual = (a[group] * w) @ matrix - y
        slope = matrix @ residual
        value = (residual**2).sum() / 2 + (rate * a**2).sum() / 2 + (rate[group] * w**2).sum() / 2
        along = np.bincount(group, slope * w, minlength=size) + rate * a
        return value, np.concatenate([along, slope * a[group] + rate[group] * w])

    lower = np.where(given.active & (given.sign <= 0), -np.inf, 0.0)
    upper = np.where(given.active & (given.sign >= 0), np.inf, 0.0)
    found = scipy.optimize.minimize(
        objective,
        np.clip(np.random.default_rng(0).normal(1.0, 0.3, size + len(group)), 0.1, None)
        * np.concatenate([np.ones(size), np.where(given.sign < 0, -1.0, 1.0) * given.active]),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * size + list(zip(lower, upper)),
        options={"maxiter": 50_000, "maxfun": 100_000, "ftol": 0, "gtol": 1e-11, "maxcor": 30},
    )
    return found.x[:size][group] * found.x[size:], found.fun


def problem(name, size=2):
    given = CASES[name]()
    make, signal = DICTIONARIES[given.dictionary]
    dictionary = make()
    shape = tuple(dictionary.code_shape(signal))
    matrix = dictionary(torch.eye(int(np.prod(shape))).double().reshape(-1, *shape)).flatten(1)
    y = torch.randn(size, *signal, dtype=torch.float64)
    return given, dictionary, matrix.detach().numpy(), y, shape


@cases
def test_codes_and_certificate_are_those_of_an_independent_solver(name):
    given, dictionary, matrix, y, shape = problem(name)
    found = solve(y, dictionary, given.prior, tol=1e-12)
    assert found.converged.all() and (found.gap <= 1e-12).all()
    codes = found.codes.flatten(1).numpy()
    assert 0.05 < (codes != 0).mean() < 0.95
    assert (codes * given.sign >= 0).all() and (codes[:, ~given.active] == 0).all()
    for datum, own in zip(y.flatten(1).numpy(), codes):
        expected, least = independent(matrix, datum, given)
        lengths = np.sqrt(np.bincount(given.group, own**2))
        rate = np.zeros(len(lengths))
        rate[given.group] = given.rate
        value = ((own @ matrix - datum) ** 2).sum() / 2 + (rate * lengths).sum()
        assert value <= least * (1 + 1e-9)
        np.testing.assert_allclose(own, expected, atol=2e-5)


@cases
def test_the_gap_bounds_how_far_unfinished_codes_are_from_the_least(name):
    given, dictionary, matrix, y, shape = problem(name)
    early = solve(y, dictionary, given.prior, tol=1e-12, max_steps=20)
    best = solve(y, dictionary, given.prior, tol=1e-12)
    law = codes_prior(given.prior, None, shape, like=y)

    def objective(codes):
        error = (dictionary(codes) - y).square().flatten(1).sum(1) / 2
        return error + law.log_prob(torch.zeros_like(codes)) - law.log_prob(codes)

    first, least = objective(early.codes), objective(best.codes)
    assert (early.gap > 0).any()
    assert (first - least <= early.gap * first + 1e-12).all()


@pytest.mark.parametrize(
    "name",
    [
        "signs",
        "one-sided groups",
        "known support",
        "groups across atoms",
        "known events of neurons",
    ],
)
def test_many_tied_steps_equal_solve(name):
    given, dictionary, _, y, shape = problem(name)
    law = codes_prior(given.prior, None, shape, like=y)
    net = Unrolled(
        dictionary,
        Gaussian(double(1.0)),
        num_steps=500,
        method=FISTA(restart=True),
        shrinkage=Proximal(),
    )
    mask = torch.rand(y.shape) < 0.8
    mask[0] = True  # one datum whole, the other with samples missing
    with torch.no_grad():
        codes = net(y, law, mask=mask)
    expected = solve(y, dictionary, given.prior, mask=mask, tol=1e-14)
    torch.testing.assert_close(codes, expected.codes, rtol=0, atol=1e-6)


def test_counts_are_certified_too():
    dictionary = Dense(20, 12).double()
    prior = GroupLaplace(double(1.0), (20,), group=(4,))
    prior = KnownSupport(prior, torch.tensor(True))
    y = torch.poisson(2 * torch.ones(3, 12, dtype=torch.float64))
    found = solve(y, dictionary, prior, likelihood=Poisson(), tol=1e-9)
    assert found.converged.all()


SHRINKAGES = {
    "hard": lambda: HardThreshold(0.2),
    "bias": lambda: Bias(double(-0.1)),  # makes codes of nothing
    "two-sided bias": lambda: Bias(double(0.1), two_sided=True),
    "top": lambda: TopK(Bias(double(-0.1)), 4),
    "proximal": Proximal,
}


@pytest.mark.parametrize("shrinkage", SHRINKAGES)
@pytest.mark.parametrize(
    "name", ["signs", "known support", "known times", "known events of neurons"]
)
def test_every_shrinkage_keeps_to_signs_and_support(name, shrinkage):
    given, dictionary, _, y, shape = problem(name)
    net = Unrolled(
        dictionary, Gaussian(double(1.0)), num_steps=5, shrinkage=SHRINKAGES[shrinkage]().double()
    )
    codes = net(y, codes_prior(given.prior, None, shape, like=y)).detach().flatten(1).numpy()
    assert (codes != 0).any()
    assert (codes * given.sign >= 0).all()
    assert (codes[:, ~given.active] == 0).all()


def test_top_k_chooses_among_codes_that_may_be_active():
    law = KnownSupport(dist.Laplace(0.0, 100.0), torch.tensor([False, True, True])).to_event(1)
    net = Unrolled(
        Dense(3, 3, atoms=torch.eye(3)),
        Gaussian(1.0),
        num_steps=20,
        shrinkage=TopK(HardThreshold(0.0), 1),
    )
    codes = net(torch.tensor([9.0, 1.0, 2.0]), law)
    torch.testing.assert_close(codes, torch.tensor([0.0, 0.0, 2.0]))


@pytest.mark.parametrize("name", ["signs", "known support", "known times"])
def test_an_implicit_gradient_is_that_of_a_deep_net(name):
    given, dictionary, _, y, shape = problem(name)
    law = codes_prior(given.prior, None, shape, like=y)
    net = Unrolled(
        dictionary,
        Gaussian(double(1.0)),
        num_steps=250,
        method=FISTA(restart=True),
        shrinkage=Proximal(),
    )
    parameter = next(dictionary.parameters())
    weight = torch.randn(shape, dtype=torch.float64)
    (deep,) = torch.autograd.grad((net(y, law) * weight).sum(), parameter)
    with differentiated(Implicit(tol=1e-10, max_steps=500)):
        (short,) = torch.autograd.grad((net(y, law) * weight).sum(), parameter)
    torch.testing.assert_close(short, deep, rtol=1e-4, atol=1e-6)


def test_an_implicit_gradient_refuses_groups_by_name():
    given, dictionary, _, y, shape = problem("groups of atoms")
    net = Unrolled(dictionary, Gaussian(double(1.0)), num_steps=50, shrinkage=Proximal())
    with differentiated(Implicit()):
        codes = net(y, codes_prior(given.prior, None, shape, like=y))
        with pytest.raises(NotImplementedError, match="acts on each code by itself"):
            codes.square().sum().backward()


def test_learned_thresholds_of_atoms_within_a_group_are_refused_by_name():
    given, dictionary, _, y, shape = problem("groups of atoms")
    law = codes_prior(given.prior, None, shape, like=y)
    with pytest.raises(
        ValueError, match=r"one step for all codes of a group.*shrinkage=Proximal\(\)"
    ):
        Unrolled(dictionary, Gaussian(double(1.0)))(y, law)
    given, dictionary, _, y, shape = problem("groups across neurons")
    law = codes_prior(given.prior, None, shape, like=y)
    net = Unrolled(dictionary, Gaussian(double(1.0)))
    net(y, law).square().sum().backward()
    assert (net.shrinkage.log_factor.grad != 0).all()
