import numpy as np
import pyro.distributions as dist
import pytest
import torch

from pyro_sparse.dictionaries import Dense
from pyro_sparse.distributions import spread
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.solvers import FISTA, ISTA, Method, Problem, State, solve

RATE = 0.1


def lasso(num_data=4, features=30, atoms=60):
    weights = torch.randn(atoms, features, dtype=torch.float64)
    y = torch.randn(num_data, features, dtype=torch.float64)
    bound = Dense(atoms, features, atoms=weights).bind()
    law = spread(dist.Laplace(0.0, torch.tensor(1 / RATE).double()), (atoms,), like=y)
    return Problem(y, bound, bound, Gaussian(torch.ones((), dtype=torch.float64)), law, 1)


def run(problem, method, num_steps, state=None):
    step = problem.step_size(problem.squared_norm())
    state = method.start() if state is None else state
    iterates = []
    with torch.no_grad():
        for _ in range(num_steps):
            codes = problem.proximal_step(state.point, step)
            state = method.advance(state, codes, problem.code_dims)
            iterates.append(codes)
    return iterates


def lasso_objective(problem, codes):
    """In numpy, from the definition."""
    atoms, y, codes = (t.detach().numpy() for t in (problem.synthesis.atoms, problem.y, codes))
    return ((y - codes @ atoms) ** 2).sum(-1) / 2 + RATE * np.abs(codes).sum(-1)


@pytest.fixture
def solved():
    problem = lasso()
    atoms = problem.synthesis.atoms.detach()
    dictionary = Dense(*atoms.shape, atoms=atoms, unit_norm=False)
    prior = dist.Laplace(0.0, torch.tensor(1 / RATE).double())
    return problem, solve(problem.y, dictionary, prior, tol=1e-12).codes


def test_ista_never_climbs_and_keeps_its_rate(solved):
    problem, optimum = solved
    codes = run(problem, ISTA(), 200)
    values = np.stack([lasso_objective(problem, z) for z in codes])
    assert (np.diff(values, axis=0) <= 1e-12).all()
    # Beck & Teboulle (2009), theorem 3.1: F(z_k) - F* <= L |z_0 - z*|^2 / (2 k).
    count = np.arange(1, 201)[:, None]
    distance = float(problem.squared_norm()) * optimum.square().sum(-1).numpy()
    excess = values - lasso_objective(problem, optimum)
    assert (excess <= distance / (2 * count)).all()


def test_fista_keeps_its_faster_rate(solved):
    problem, optimum = solved
    values = np.stack([lasso_objective(problem, z) for z in run(problem, FISTA(), 200)])
    # Beck & Teboulle (2009), theorem 4.4: F(z_k) - F* <= 2 L |z_0 - z*|^2 / (k + 1)^2.
    count = np.arange(1, 201)[:, None]
    distance = float(problem.squared_norm()) * optimum.square().sum(-1).numpy()
    excess = values - lasso_objective(problem, optimum)
    assert (excess <= 2 * distance / (count + 1) ** 2).all()
    ista = lasso_objective(problem, run(problem, ISTA(), 200)[-1])
    assert (values[-1] - lasso_objective(problem, optimum) < 0.1 * (ista - values[-1])).all()


def test_fista_extrapolates_by_the_published_coefficients():
    # With the identity for a step, advance alone is seen; t_k from the recursion, by hand.
    method, state = FISTA(), FISTA().start(torch.zeros(1))
    moves = [1.0, 3.0, 2.0, 5.0, 4.0]
    t, last = 1.0, 0.0
    for codes in moves:
        state = method.advance(state, torch.tensor([codes]), 1)
        following = (1 + np.sqrt(1 + 4 * t**2)) / 2
        expected = codes + (t - 1) / following * (codes - last)
        assert state.point.item() == pytest.approx(expected, rel=1e-6)
        assert state.codes.item() == codes
        t, last = following, codes


@pytest.mark.parametrize("method", [ISTA(), FISTA(), FISTA(restart=True)])
def test_a_start_at_zero_is_a_start_from_nothing(method):
    problem = lasso()
    zeros = torch.zeros(4, 60, dtype=torch.float64)
    implicit = run(problem, method, 60)[-1]
    explicit = run(problem, method, 60, method.start(zeros))[-1]
    torch.testing.assert_close(implicit, explicit, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", [ISTA(), FISTA(), FISTA(restart=True)])
def test_a_start_at_the_solution_stays_there(method, solved):
    problem, optimum = solved
    last = run(problem, method, 30, method.start(optimum))[-1]
    torch.testing.assert_close(last, optimum, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", [ISTA(), FISTA(), FISTA(restart=True)])
def test_data_of_a_batch_do_not_touch_each_other(method):
    problem = lasso()
    together = run(problem, method, 150)[-1]
    for i in range(4):
        alone = run(problem.select(torch.tensor([i])), method, 150)[-1]
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-10)


def test_restart_reaches_the_solution_where_momentum_still_oscillates(solved):
    problem, optimum = solved
    best = lasso_objective(problem, optimum)
    plain = lasso_objective(problem, run(problem, FISTA(), 400)[-1]) - best
    restarted = lasso_objective(problem, run(problem, FISTA(restart=True), 400)[-1]) - best
    assert (restarted < 1e-2 * plain + 1e-12).all()


def test_restart_forgets_the_momentum_of_the_datum_that_turned_back():
    method = FISTA(restart=True)
    before = torch.tensor([[0.0], [0.0]])
    point, momentum = torch.tensor([[2.0], [0.5]]), torch.full((2, 1), 3.0)
    codes = torch.ones(2, 1)  # the first point overshot the codes, the second did not
    state = method.advance(State(before, point, momentum), codes, 1)
    following = (1 + np.sqrt(1 + 4 * 9)) / 2
    assert state.point[0] == 1.0
    assert state.point[1].item() == pytest.approx(1 + 2 / following)
    assert state.momentum.flatten().tolist() == pytest.approx([(1 + np.sqrt(5)) / 2, following])


def test_state_maps_what_there_is_one_of_for_each_datum():
    codes, momentum = torch.ones(3, 2), torch.ones(3, 1)
    first = State(codes, codes, momentum).map(lambda part: part[:1])
    assert (first.codes.shape, first.momentum.shape) == ((1, 2), (1, 1))
    assert State(None, None, 1.0).map(lambda part: part[:1]) == State(None, None, 1.0)


def test_a_method_declares_what_it_must_do():
    with pytest.raises(NotImplementedError):
        Method().advance(State(None, None, 1.0), torch.zeros(1), 1)
    assert repr(FISTA(restart=True)) == "FISTA(restart=True)"
