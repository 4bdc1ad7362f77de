import numpy as np
import pyro.distributions as dist
import pytest
import torch

from pyro_sparse.dictionaries import Conv, Dense
from pyro_sparse.distributions import prox, spread
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.solvers import Problem

SIGMA = 0.5


def double(value):
    return torch.tensor(value, dtype=torch.float64)


PRIORS = {
    "laplace": dist.Laplace(double(0.0), double(2.0)),
    "laplace_loc": dist.Laplace(double(0.4), double(2.0)),
    "exponential": dist.Exponential(double(0.7)),
    "normal": dist.Normal(double(0.3), double(1.5)),
}
priors = pytest.mark.parametrize("name", PRIORS)


def dense(name="laplace", mask=None, num_data=5, atoms=12, features=8):
    bound = Dense(atoms, features, atoms=torch.randn(atoms, features).double()).bind()
    y = torch.randn(num_data, features, dtype=torch.float64)
    law = spread(PRIORS[name], (atoms,), like=y)
    return Problem(y, bound, bound, Gaussian(double(SIGMA)), law, 1, mask)


def conv(name="laplace"):
    dictionary = Conv(3, 2, 5).double()
    y = torch.randn(4, 2, 20, dtype=torch.float64)
    law = spread(PRIORS[name], (3, 16), like=y)
    bound = dictionary.bind()
    return Problem(y, bound, bound, Gaussian(double(SIGMA)), law, 2)


def feasible(problem, codes):
    """Codes inside the prior's support, which is half the line for one of them."""
    return prox(problem.law, codes, 0.5)


@priors
@pytest.mark.parametrize("make", [dense, conv])
def test_objective_is_minus_the_log_joint_up_to_a_constant(name, make):
    problem = make(name)
    draws = [feasible(problem, problem.law.sample((len(problem.y),))) for _ in range(2)]
    joint = []
    for codes in draws:
        likelihood = problem.likelihood(problem.synthesis.forward(codes)).log_prob(problem.y)
        joint.append(likelihood.flatten(1).sum(1) + problem.law.log_prob(codes))
    first, second = (problem.objective(codes) for codes in draws)
    assert first.shape == (len(problem.y),)
    torch.testing.assert_close(first - second, joint[1] - joint[0], rtol=1e-10, atol=1e-10)


@priors
@pytest.mark.parametrize("make", [dense, conv])
def test_the_dual_objective_bounds_every_objective(name, make):
    problem = make(name)
    shape = (len(problem.y), *problem.law.event_shape)
    codes = [
        feasible(problem, size * torch.randn(shape, dtype=torch.float64))
        for size in (0.0, 0.1, 0.5, 1.0, 3.0)
    ]
    lowest = torch.stack([problem.objective(z) for z in codes]).amin(0)
    highest = torch.stack([problem.dual_objective(z) for z in codes]).amax(0)
    assert (highest <= lowest + 1e-12).all()
    assert torch.isfinite(highest).all()


@priors
def test_primal_and_dual_meet_at_the_solution(name):
    problem = dense(name)
    step = problem.step_size(problem.squared_norm())
    codes = feasible(problem, torch.zeros(5, 12, dtype=torch.float64))
    for _ in range(5_000):
        codes = problem.proximal_step(codes, step)
    torch.testing.assert_close(
        problem.objective(codes), problem.dual_objective(codes), rtol=1e-8, atol=1e-10
    )


def test_ridge_regression_has_its_closed_form_and_no_gap():
    problem = dense("normal")
    atoms, y = problem.synthesis.atoms.detach().numpy(), problem.y.numpy()
    precision = atoms @ atoms.T / SIGMA**2 + np.eye(12) / 1.5**2
    codes = np.linalg.solve(precision, (y @ atoms.T / SIGMA**2 + 0.3 / 1.5**2).T).T
    solution = torch.from_numpy(codes)
    step = problem.step_size(problem.squared_norm())
    torch.testing.assert_close(problem.proximal_step(solution, step), solution)
    torch.testing.assert_close(problem.objective(solution), problem.dual_objective(solution))


@pytest.mark.parametrize("make", [dense, conv])
def test_a_step_lowers_the_objective(make):
    problem = make()
    codes = torch.randn(len(problem.y), *problem.law.event_shape, dtype=torch.float64)
    moved = problem.proximal_step(codes, problem.step_size(problem.squared_norm()))
    assert (problem.objective(moved) < problem.objective(codes)).all()


def test_a_step_from_nothing_is_a_step_from_zero():
    problem = dense()
    step = problem.step_size(problem.squared_norm())
    zeros = torch.zeros(5, 12, dtype=torch.float64)
    torch.testing.assert_close(
        problem.proximal_step(None, step), problem.proximal_step(zeros, step), rtol=0, atol=1e-15
    )


def test_step_size_is_the_inverse_of_the_hessians_norm():
    problem = conv()
    step = problem.step_size(problem.squared_norm())
    assert step.shape == (1, 1)
    assert problem.step_size(4.0).item() == pytest.approx(SIGMA**2 / 4)
    assert problem.step_size(torch.full((7,), 4.0)).shape == (7, 1, 1)
    eye = torch.eye(48, dtype=torch.float64).reshape(48, 3, 16)
    matrix = problem.synthesis.forward(eye).detach().reshape(48, -1).numpy()
    hessian = np.linalg.norm(matrix, 2) ** 2 / SIGMA**2
    assert 0.8 / hessian <= step.item() <= 1 / hessian


def test_the_norm_of_untied_maps_is_their_geometric_mean():
    problem = dense()
    doubled = Dense(12, 8, atoms=3 * problem.synthesis.atoms.detach(), unit_norm=False).bind()
    untied = Problem(problem.y, problem.synthesis, doubled, problem.likelihood, problem.law, 1)
    torch.testing.assert_close(untied.squared_norm(), 3 * problem.squared_norm())


def test_what_is_masked_has_no_score_and_no_loss():
    mask = torch.rand(5, 8) < 0.6
    problem = dense(mask=mask)
    codes = torch.randn(5, 12, dtype=torch.float64)
    predictor = problem.synthesis.forward(codes)
    assert (problem.score(predictor)[~mask] == 0).all()
    assert (problem.score(predictor)[mask] != 0).all()
    other = Problem(
        torch.where(mask, problem.y, 9.0), *list(vars(problem).values())[1:]
    )  # whatever stands where nothing was observed
    torch.testing.assert_close(problem.objective(codes), other.objective(codes))
    torch.testing.assert_close(problem.dual_objective(codes), other.dual_objective(codes))


@pytest.mark.parametrize("mask", [None, torch.arange(8) < 5, torch.rand(5, 8) < 0.6])
def test_select_keeps_the_data_it_is_told(mask):
    problem = dense(mask=mask)
    codes = torch.randn(5, 12, dtype=torch.float64)
    index = torch.tensor([3, 1])
    part = problem.select(index)
    torch.testing.assert_close(part.objective(codes[index]), problem.objective(codes)[index])
    torch.testing.assert_close(
        part.dual_objective(codes[index]), problem.dual_objective(codes)[index]
    )


def test_double_is_the_same_problem_in_float64():
    bound = Dense(12, 8).bind()
    y = torch.randn(5, 8)
    law = spread(dist.Laplace(0.0, 2.0), (12,), like=y)
    problem = Problem(y, bound, bound, Gaussian(SIGMA), law, 1)
    codes = torch.randn(5, 12)
    exact = problem.double()
    found = exact.objective(codes.double())
    assert found.dtype == exact.dual_objective(codes.double()).dtype == torch.float64
    torch.testing.assert_close(found.float(), problem.objective(codes), rtol=1e-5, atol=0)
    atoms, wide = bound.atoms.detach().double().numpy(), codes.double().numpy()
    reference = ((y.double().numpy() - wide @ atoms) ** 2).sum(1) / 2 / SIGMA**2
    np.testing.assert_allclose(found.detach(), reference + np.abs(wide).sum(1) / 2, rtol=1e-13)
