"""The Lasso's objective, dual and gap are written here anew, in numpy's float64."""

import itertools
from typing import NamedTuple

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import TorchDistribution, constraints
from sklearn.linear_model import ElasticNet, Lasso

from pyro_sparse.dictionaries import (
    Composition,
    Conv,
    Dense,
    Interior,
    LinearMap,
    Overhang,
    Periodic,
)
from pyro_sparse.distributions import Conjugate, register_conjugate, register_prox
from pyro_sparse.likelihoods import Gaussian, Likelihood
from pyro_sparse.solvers import FISTA, ISTA, solve


def numpy64(tensor):
    return tensor.detach().cpu().double().numpy()


def relative_gap(atoms, y, codes, rate, *, scale=1.0, nonnegative=False):
    """Of ``|y - z A|^2 / (2 scale^2) + rate |z|_1``; one datum, ``atoms`` first."""
    atoms, y, codes = (np.asarray(a, dtype=np.float64) for a in (atoms, y, codes))
    residual = y - codes @ atoms
    primal = residual @ residual / (2 * scale**2) + rate * np.abs(codes).sum()
    slopes = atoms @ residual / scale**2
    steepest = slopes.max() if nonnegative else np.abs(slopes).max()
    point = residual / scale**2 * min(1.0, rate / max(steepest, 1e-300))
    dual = point @ y - scale**2 * point @ point / 2
    assert codes.min() >= 0 or not nonnegative
    return (primal - dual) / primal


def prior_of(rate, nonnegative, dtype=torch.float64):
    """A prior and the rate that it holds after rounding to ``dtype``."""
    if nonnegative:
        law = dist.Exponential(torch.tensor(rate, dtype=dtype))
        return law, float(law.rate)
    law = dist.Laplace(torch.zeros((), dtype=dtype), torch.tensor(1 / rate, dtype=dtype))
    return law, 1 / float(law.scale)


def sklearn_lasso(atoms, y, rate, nonnegative, tol=1e-12):
    # Its objective is divided by the number of samples.
    model = Lasso(
        alpha=rate / len(y), fit_intercept=False, tol=tol, max_iter=100_000, positive=nonnegative
    )
    return model.fit(np.asfortranarray(atoms.T), y).coef_


class Case(NamedTuple):
    atoms: np.ndarray
    y: np.ndarray
    rate: float


def random_case(seed, nonnegative, features=256, num_atoms=1024):
    """A noisy planted problem; the rate is found so that 3-5 % of the codes are active."""
    rng = np.random.default_rng(seed)
    atoms = rng.standard_normal((num_atoms, features))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    truth = np.zeros(num_atoms)
    planted = rng.choice(num_atoms, 40, replace=False)
    truth[planted] = rng.standard_normal(40)
    truth = np.abs(truth) if nonnegative else truth
    y = truth @ atoms + 0.05 * rng.standard_normal(features)
    target = rng.integers(33, 50)  # of 1024
    slopes = atoms @ y
    low, high = 0.0, float(slopes.max() if nonnegative else np.abs(slopes).max())
    for _ in range(40):
        rate = (low + high) / 2 if low else high / 4
        active = np.count_nonzero(sklearn_lasso(atoms, y, rate, nonnegative, tol=1e-4))
        if abs(active - target) <= 1:
            break
        low, high = (rate, high) if active > target else (low or high / 100, rate)
    return Case(atoms, y, rate)


@pytest.fixture(scope="module", params=[False, True], ids=["laplace", "exponential"])
def fifty(request):
    return request.param, [random_case(seed, request.param) for seed in range(50)]


def solve_case(case, nonnegative, dtype, device, **options):
    atoms = torch.tensor(case.atoms, dtype=dtype, device=device)
    y = torch.tensor(case.y, dtype=dtype, device=device)
    prior, rate = prior_of(case.rate, nonnegative, dtype)
    dictionary = Dense(*atoms.shape, atoms=atoms, unit_norm=False)
    solution = solve(y, dictionary, prior, **options)
    gap = relative_gap(
        numpy64(atoms), numpy64(y), numpy64(solution.codes), rate, nonnegative=nonnegative
    )
    return solution, gap


@pytest.mark.parametrize(("precision", "tol"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
def test_fifty_dense_problems_reach_their_gap(fifty, precision, tol, device):
    nonnegative, cases = fifty
    for case in cases:
        solution, gap = solve_case(case, nonnegative, precision, device, tol=tol)
        assert solution.codes.dtype == precision
        assert bool(solution.converged)
        assert gap <= tol
        # What is reported is a bound for these very codes, up to the rounding of its two terms.
        assert float(solution.gap) <= tol
        assert float(solution.gap) <= gap + 1e-13
        active = np.count_nonzero(numpy64(solution.codes)) / len(case.atoms)
        assert 0.03 <= active <= 0.05


# A gap of 1e-8 bounds the objective, so the codes to some 1e-4, and in principle not the active
# set; on these problems it leaves no code too many or too few.
@pytest.mark.parametrize(("tol", "atol"), [(1e-8, 1e-3), (1e-12, 1e-5)])
def test_fifty_dense_problems_have_scikit_learns_active_set(fifty, tol, atol, device):
    nonnegative, cases = fifty
    for case in cases:
        solution, _ = solve_case(case, nonnegative, torch.float64, device, tol=tol)
        codes = numpy64(solution.codes)
        _, rate = prior_of(case.rate, nonnegative)
        reference = sklearn_lasso(case.atoms, case.y, rate, nonnegative)
        slopes = case.atoms @ (case.y - reference @ case.atoms)
        distance = np.abs((slopes if nonnegative else np.abs(slopes)) / rate - 1)
        inactive = reference == 0
        undecided = inactive & (distance <= 1e-6)  # active atoms lie on the boundary
        np.testing.assert_array_equal((codes != 0) | undecided, ~inactive | undecided)
        assert 0.03 <= np.count_nonzero(reference) / len(reference) <= 0.05
        np.testing.assert_allclose(codes, reference, atol=atol)


def test_the_gap_is_the_same_in_any_unit():
    # Volts or microvolts: objective values down to 1e-16 must not drown in log-densities.
    case = random_case(0, False, features=64, num_atoms=128)
    for size in (1e-8, 1e-4, 1.0, 1e4):
        scaled = Case(case.atoms, size * case.y, size * case.rate)
        solution, gap = solve_case(scaled, False, torch.float64, "cpu", tol=1e-8)
        assert bool(solution.converged)
        assert gap <= 1e-8
        early, gap = solve_case(scaled, False, torch.float64, "cpu", tol=1e-8, max_steps=5)
        assert not bool(early.converged)
        assert float(early.gap) == pytest.approx(gap, rel=1e-9)


# ---- convolutional -----------------------------------------------------------------------------


def conv_matrix(atoms, lengths, stride, boundary):
    """Each atom laid at each position by hand: rows are codes, columns samples."""
    kernel = atoms.shape[2:]
    first, count = [], []
    for n, k, s in zip(lengths, kernel, stride):
        before = (k - 1) // s * s if isinstance(boundary, Overhang) else 0
        starts = range(-before, n if not isinstance(boundary, Interior) else n - k + 1, s)
        first.append(starts)
        count.append(len(starts))
    rows = []
    for atom in atoms:
        for start in itertools.product(*first):
            row = np.zeros((atoms.shape[1], *lengths))
            for offset in itertools.product(*map(range, kernel)):
                place = [a + b for a, b in zip(start, offset)]
                if isinstance(boundary, Periodic):
                    place = [p % n for p, n in zip(place, lengths)]
                if all(0 <= p < n for p, n in zip(place, lengths)):
                    row[(slice(None), *place)] += atom[(slice(None), *offset)]
            rows.append(row.ravel())
    return np.stack(rows), count


CONV = [((31,), (5,), (1,), 1), ((32,), (6,), (2,), 2), ((9, 8), (3, 2), (1, 1), 2)]


@pytest.mark.parametrize("boundary", [Interior(), Overhang(), Periodic()], ids=repr)
@pytest.mark.parametrize(("lengths", "kernel", "stride", "channels"), CONV, ids=["1", "1s", "2"])
@pytest.mark.parametrize("nonnegative", [False, True])
def test_convolutional_problems_reach_their_gap(
    boundary, lengths, kernel, stride, channels, nonnegative, dtype, device
):
    dictionary = Conv(3, channels, kernel, stride, boundary=boundary).to(device, dtype)
    y = torch.randn(2, channels, *lengths, dtype=dtype, device=device)
    prior, rate = prior_of(0.3, nonnegative, dtype)
    solution = solve(y, dictionary, prior, tol=1e-6)
    matrix, positions = conv_matrix(numpy64(dictionary.atoms), lengths, stride, boundary)
    assert solution.codes.shape == (2, 3, *positions)
    assert solution.converged.all()
    for datum, codes in zip(numpy64(y), numpy64(solution.codes)):
        gap = relative_gap(matrix, datum.ravel(), codes.ravel(), rate, nonnegative=nonnegative)
        assert gap <= 1e-6
        assert 0.1 < np.mean(codes != 0) < 0.9  # neither trivial nor dense


# ---- masks, scales, compositions ---------------------------------------------------------------


def small(num_data=(), atoms=40, features=20, dtype=torch.float64):
    dictionary = Dense(atoms, features, atoms=torch.randn(atoms, features, dtype=dtype))
    return dictionary, torch.randn(*num_data, features, dtype=dtype)


LAPLACE = dist.Laplace(torch.zeros((), dtype=torch.float64), torch.tensor(4.0).double())


@pytest.mark.parametrize("fill", [0.0, torch.nan, torch.inf, 100.0])
def test_a_mask_is_the_problem_with_its_rows_removed(fill):
    dictionary, y = small((4,))
    mask = torch.rand(4, 20) < 0.7
    found = solve(torch.where(mask, y, fill), dictionary, LAPLACE, mask=mask, tol=1e-12)
    assert found.converged.all()
    for datum, seen, codes, gap in zip(y, mask, found.codes, found.gap):
        kept = dictionary.atoms.detach()[:, seen]
        part = Dense(40, int(seen.sum()), atoms=kept, unit_norm=False)
        alone = solve(datum[seen], part, LAPLACE, tol=1e-12).codes
        torch.testing.assert_close(codes, alone, rtol=0, atol=1e-5)
        own = relative_gap(numpy64(kept), numpy64(datum[seen]), numpy64(codes), 0.25)
        assert own <= 1e-12
        assert float(gap) <= 1e-12


@pytest.mark.parametrize("shape", [(20,), (1, 20), (4, 1)])
def test_a_mask_broadcasts_over_the_data(shape):
    dictionary, y = small((4,))
    mask = torch.rand(shape) < 0.7
    found = solve(y, dictionary, LAPLACE, mask=mask, tol=1e-10)
    full = solve(y, dictionary, LAPLACE, mask=mask.expand(4, 20).clone(), tol=1e-10)
    torch.testing.assert_close(found.codes, full.codes, rtol=0, atol=0)


@pytest.mark.parametrize("sigma", [0.25, 2.0])
def test_a_noise_scale_multiplies_the_threshold_by_its_square(sigma):
    dictionary, y = small((3,))
    sigma64 = torch.tensor(sigma, dtype=torch.float64)
    found = solve(y, dictionary, LAPLACE, likelihood=Gaussian(sigma64), tol=1e-10)
    atoms = numpy64(dictionary.atoms)
    for datum, codes in zip(numpy64(y), numpy64(found.codes)):
        assert relative_gap(atoms, datum, codes, 0.25, scale=sigma) <= 1e-10
        reference = sklearn_lasso(atoms, datum, 0.25 * sigma**2, False)
        np.testing.assert_allclose(codes, reference, atol=1e-4)


def test_one_scale_for_each_channel_is_weighted_least_squares():
    dictionary = Conv(4, 2, 5, boundary=Overhang()).double()
    y = torch.randn(2, 2, 24, dtype=torch.float64)
    scale = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    found = solve(y, dictionary, LAPLACE, likelihood=Gaussian(scale), tol=1e-9)
    assert found.converged.all()
    matrix, _ = conv_matrix(numpy64(dictionary.atoms), (24,), (1,), Overhang())
    weights = np.repeat([2.0, 0.5], 24)
    for datum, codes in zip(numpy64(y), numpy64(found.codes)):
        weighted = matrix * weights, datum.ravel() * weights
        assert relative_gap(*weighted, codes.ravel(), 0.25) <= 1e-9


class Sensing:
    def __init__(self, matrix):
        self.matrix = matrix

    def forward(self, signal):
        return signal @ self.matrix

    def adjoint(self, measurement):
        return measurement @ self.matrix.T


def test_a_composition_works_in_both_precisions(dtype):
    matrix = torch.randn(20, 12, dtype=dtype) / 12**0.5
    inner, _ = small(dtype=dtype)
    dictionary = Composition(Sensing(matrix), inner, input_shape=(20,))
    y = torch.randn(3, 12, dtype=dtype)
    prior, rate = prior_of(0.25, False, dtype)
    found = solve(y, dictionary, prior)
    assert found.converged.all()
    atoms = numpy64(inner.atoms) @ numpy64(matrix)
    for datum, codes in zip(numpy64(y), numpy64(found.codes)):
        # The user's operator rounds in its own precision, and the gap with it.
        slack = 10 * torch.finfo(dtype).eps
        assert relative_gap(atoms, datum, codes, rate) <= 1e-5 + slack


# ---- priors ------------------------------------------------------------------------------------


def test_a_rate_for_each_atom_rescales_the_atoms():
    dictionary, y = small((3,))
    rates = torch.rand(40, dtype=torch.float64) + 0.2
    found = solve(y, dictionary, lambda rate: dist.Laplace(0.0, 1 / rate), rate=rates, tol=1e-10)
    rescaled = numpy64(dictionary.atoms) / numpy64(rates)[:, None]
    for datum, codes in zip(numpy64(y), numpy64(found.codes)):
        assert relative_gap(rescaled, datum, codes * numpy64(rates), 1.0) <= 1e-10


def test_a_location_other_than_zero_moves_the_problem():
    dictionary, y = small((3,))
    prior = dist.Laplace(torch.tensor(0.5).double(), torch.tensor(4.0).double())
    found = solve(y, dictionary, prior, tol=1e-10)
    assert found.converged.all()
    shift = numpy64(dictionary.atoms).sum(0) / 2
    for datum, codes in zip(numpy64(y), numpy64(found.codes)):
        # The gap's denominator is the same objective, so the two are comparable.
        moved = relative_gap(numpy64(dictionary.atoms), datum - shift, codes - 0.5, 0.25)
        assert moved <= 1e-8
        reference = sklearn_lasso(numpy64(dictionary.atoms), datum - shift, 0.25, False)
        np.testing.assert_allclose(codes - 0.5, reference, atol=1e-4)


def test_a_normal_prior_is_ridge_regression():
    dictionary, y = small((3,))
    prior = dist.Normal(torch.tensor(0.3).double(), torch.tensor(2.0).double())
    found = solve(y, dictionary, prior, tol=1e-12)
    atoms = numpy64(dictionary.atoms)
    right = numpy64(y) @ atoms.T + 0.3 / 4
    reference = np.linalg.solve(atoms @ atoms.T + np.eye(40) / 4, right.T).T
    np.testing.assert_allclose(numpy64(found.codes), reference, atol=1e-5)


class OwnElasticNet(TorchDistribution):
    arg_constraints = {}
    support = constraints.real

    def __init__(self, rate, precision):
        self.rate, self.precision = torch.as_tensor(rate), torch.as_tensor(precision)
        super().__init__(self.rate.shape, validate_args=False)

    @property
    def mode(self):
        return torch.zeros_like(self.rate)

    def log_prob(self, value):
        return -self.rate * value.abs() - self.precision * value.square() / 2


def test_a_users_own_prior_is_solved():
    dictionary, y = small((3,))
    prior = OwnElasticNet(0.25, 0.5)
    with pytest.raises(NotImplementedError, match="No proximal step is known for OwnElasticNet"):
        solve(y, dictionary, prior, tol=None)

    @register_prox(OwnElasticNet)
    def _(prior, value, step):
        kept = (value.abs() - step * prior.rate).relu()
        return value.sign() * kept / (1 + step * prior.precision)

    with pytest.raises(NotImplementedError, match="(?s)known for OwnElasticNet.*tol=None"):
        solve(y, dictionary, prior)
    blind = solve(y, dictionary, prior, tol=None, max_steps=2000)
    assert blind.gap.isnan().all()

    @register_conjugate(OwnElasticNet)
    def _(prior):
        bound = torch.full_like(prior.rate, torch.inf)
        return Conjugate(
            -bound, bound, lambda u: (u.abs() - prior.rate).relu().square() / 2 / prior.precision
        )

    found = solve(y, dictionary, prior, tol=1e-11)
    assert found.converged.all()
    torch.testing.assert_close(found.codes, blind.codes, rtol=0, atol=1e-5)
    for datum, codes in zip(numpy64(y), numpy64(found.codes)):
        model = ElasticNet(
            alpha=0.75 / 20, l1_ratio=1 / 3, fit_intercept=False, tol=1e-12, max_iter=100_000
        )
        reference = model.fit(np.asfortranarray(numpy64(dictionary.atoms).T), datum).coef_
        np.testing.assert_allclose(codes, reference, atol=1e-5)


# ---- honesty and limiting cases ----------------------------------------------------------------


@pytest.mark.parametrize("max_steps", [1, 7, 20])
@pytest.mark.parametrize("nonnegative", [False, True])
def test_what_did_not_converge_is_reported_with_its_true_gap(max_steps, nonnegative, dtype):
    dictionary, y = small((3,), dtype=dtype)
    prior, rate = prior_of(0.05, nonnegative, dtype)
    found = solve(y, dictionary, prior, tol=1e-9, max_steps=max_steps)
    assert not found.converged.any()
    assert (found.num_steps == max_steps).all()
    atoms = numpy64(dictionary.atoms)
    for datum, codes, gap in zip(numpy64(y), numpy64(found.codes), found.gap):
        own = relative_gap(atoms, datum, codes, rate, nonnegative=nonnegative)
        assert float(gap) == pytest.approx(own, rel=1e-9)
        assert own > 1e-9


@pytest.mark.parametrize("tol", [1e-2, 1e-5, 1e-12, 1e-30])
def test_converged_says_no_more_than_the_gap(tol):
    dictionary, y = small((6,))
    found = solve(y, dictionary, LAPLACE, tol=tol, max_steps=400)
    assert (found.converged == (found.gap <= tol)).all()
    for datum, codes, gap in zip(numpy64(y), numpy64(found.codes), found.gap):
        own = relative_gap(numpy64(dictionary.atoms), datum, codes, 0.25)
        # The best lower bound of all checks, so at most the gap of the last; never below the
        # distance to the minimum, which a much later solution shows.
        assert float(gap) <= own + 1e-14
        best = numpy64(solve(torch.from_numpy(datum), dictionary, LAPLACE, tol=1e-14).codes)
        value, least = (
            ((datum - z @ numpy64(dictionary.atoms)) ** 2).sum() / 2 + 0.25 * np.abs(z).sum()
            for z in (codes, best)
        )
        assert float(gap) >= (value - least) / value - 2e-14


def test_without_a_tolerance_nothing_is_certified():
    dictionary, y = small((3,))
    found = solve(y, dictionary, LAPLACE, tol=None, max_steps=50)
    assert found.gap.isnan().all()
    assert not found.converged.any()
    assert (found.num_steps == 50).all()
    certified = solve(y, dictionary, LAPLACE, tol=1e-30, max_steps=50)
    torch.testing.assert_close(found.codes, certified.codes, rtol=0, atol=1e-12)


def test_each_datum_takes_the_steps_that_it_needs():
    dictionary, y = small((3,))
    y[1] = 0
    y[2] = dictionary.atoms.detach()[0]
    found = solve(y, dictionary, LAPLACE, tol=1e-10)
    assert found.num_steps[1] < found.num_steps[0]
    for i in range(3):  # and its codes do not depend on the company
        alone = solve(y[i], dictionary, LAPLACE, tol=1e-10)
        assert alone.num_steps == found.num_steps[i]
        torch.testing.assert_close(alone.codes, found.codes[i], rtol=0, atol=1e-10)


def test_zero_data_have_zero_codes(dtype):
    dictionary, y = small((3,), dtype=dtype)
    found = solve(torch.zeros_like(y), dictionary, dist.Laplace(0.0, 1.0), tol=1e-12)
    assert (found.codes == 0).all()
    assert (found.gap == 0).all()
    assert found.converged.all()


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize(("factor", "zero"), [(1.001, True), (0.999, False)])
def test_codes_vanish_just_above_the_largest_correlation(nonnegative, factor, zero):
    dictionary, y = small()
    slopes = numpy64(dictionary.atoms) @ numpy64(y)
    largest = slopes.max() if nonnegative else np.abs(slopes).max()
    prior, _ = prior_of(factor * float(largest), nonnegative)
    found = solve(y, dictionary, prior, tol=1e-12)
    assert bool(found.converged)
    assert bool((found.codes == 0).all()) is zero
    assert float(found.gap) <= (1e-15 if zero else 1e-12)


@pytest.mark.parametrize("batch", [(), (3,), (2, 1), (0,)])
def test_leading_dimensions_are_kept(batch, dtype, device):
    dense = Dense(10, 6).to(device, dtype)
    conv = Conv(2, 1, (3, 3), boundary=Periodic()).to(device, dtype)
    for dictionary, signal in ((dense, (6,)), (conv, (1, 5, 4))):
        y = torch.randn(*batch, *signal, dtype=dtype, device=device)
        found = solve(y, dictionary, dist.Laplace(0.0, 2.0))
        assert found.codes.shape == dictionary.code_shape(y.shape)
        assert found.codes.dtype == dtype
        assert found.codes.device == y.device
        assert found.gap.shape == found.num_steps.shape == found.converged.shape == batch
        assert found.gap.dtype == torch.float64
        assert found.converged.dtype == torch.bool
        assert not found.codes.requires_grad


def test_a_batch_is_solved_as_each_of_its_data():
    dictionary, y = small((2, 3))
    found = solve(y, dictionary, LAPLACE, tol=1e-10)
    for i, j in itertools.product(range(2), range(3)):
        alone = solve(y[i, j], dictionary, LAPLACE, tol=1e-10)
        torch.testing.assert_close(found.codes[i, j], alone.codes, rtol=0, atol=1e-10)


@pytest.mark.parametrize("batch", [(), (3,), (2, 1)])
def test_a_good_start_saves_steps(batch):
    dictionary, y = small(batch)
    cold = solve(y, dictionary, LAPLACE, tol=1e-10)
    init = cold.codes.clone()
    warm = solve(y, dictionary, LAPLACE, tol=1e-9, init=init)
    assert (warm.num_steps == 20).all()  # the first check
    assert (warm.num_steps < cold.num_steps).all()
    torch.testing.assert_close(init, cold.codes, rtol=0, atol=0)  # not written to
    anywhere = solve(y, dictionary, LAPLACE, tol=1e-10, init=torch.randn_like(init).float())
    assert anywhere.converged.all()
    torch.testing.assert_close(anywhere.codes, cold.codes, rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", [ISTA(), FISTA(), FISTA(restart=True)])
def test_every_method_reaches_the_certificate(method):
    dictionary, y = small((2,), atoms=20, features=20)
    found = solve(y, dictionary, LAPLACE, tol=1e-8, method=method, max_steps=20_000)
    assert found.converged.all()
    for datum, codes in zip(numpy64(y), numpy64(found.codes)):
        assert relative_gap(numpy64(dictionary.atoms), datum, codes, 0.25) <= 1e-8


def test_nothing_is_changed_by_solving():
    dictionary, y = small((3,))
    y.requires_grad_()
    before = {name: value.clone() for name, value in dictionary.state_dict().items()}
    solve(y, dictionary, LAPLACE)
    assert y.grad is None
    assert all(p.requires_grad and p.grad is None for p in dictionary.parameters())
    assert all(bool((before[k] == v).all()) for k, v in dictionary.state_dict().items())


# ---- errors ------------------------------------------------------------------------------------

Y = torch.ones(3, 6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tol": 0.0}, ValueError, "Expected tol > 0"),
        ({"tol": -1e-3}, ValueError, "Expected tol > 0"),
        ({"tol": float("nan")}, ValueError, "Expected tol > 0"),
        ({"max_steps": 0}, ValueError, "max_steps >= 1; got .*, 0"),
        ({"tol": None, "max_steps": 0}, ValueError, "max_steps >= 1"),
        (
            {"y": torch.ones(3, 6, dtype=torch.long)},
            TypeError,
            r"floating tensor, got torch\.int64",
        ),
        ({"y": np.ones((3, 6))}, TypeError, "floating tensor, got ndarray"),
        ({"y": Y.double()}, TypeError, r"dtype torch\.float32, got torch\.float64.*double\(\)"),
        ({"y": torch.ones(3, 5)}, ValueError, r"Expected a signal of shape \(\.\.\., 6\)"),
        ({"y": torch.full((3, 6), torch.nan)}, ValueError, r"18 values.*first at \(0, 0\).*mask="),
        ({"y": Y / 0, "mask": torch.arange(6) > 3}, ValueError, r"6 values.*first at \(0, 4\)"),
        ({"mask": torch.ones(6)}, TypeError, "boolean tensor"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, "mask that broadcasts"),
        ({"init": torch.zeros(10)}, ValueError, r"init of shape \(3, 10\), got \(10,\)"),
        ({"init": torch.zeros(10, 3)}, ValueError, r"init of shape \(3, 10\), got \(10, 3\)"),
        ({"rate": torch.ones(10)}, TypeError, "callable rate -> distribution when rate is given"),
        ({"prior": lambda rate: dist.Exponential(rate)}, TypeError, "Expected rate="),
        ({"prior": torch.distributions.Laplace(0.0, 1.0)}, TypeError, "torch's own Laplace"),
        ({"prior": dist.Laplace(torch.zeros(7), 1.0)}, ValueError, r"expands to the shape \(10,\)"),
        ({"prior": dist.Gamma(2.0, 1.0)}, NotImplementedError, "known for Gamma"),
        (
            {"prior": lambda rate: dist.Exponential(rate), "rate": torch.ones(3, 10)},
            ValueError,
            r"a rate of shape \(10,\) or \(\), got .* batch shape \(3,\)",
        ),
    ],
)
def test_what_cannot_be_solved_is_refused(changes, error, message):
    arguments = {"y": Y, "dictionary": Dense(10, 6), "prior": dist.Laplace(0.0, 1.0), **changes}
    with pytest.raises(error, match=message):
        solve(**arguments)


class HalfOperator:
    """Works in float32 only."""

    def forward(self, signal: torch.Tensor) -> torch.Tensor:
        return 0.5 * signal

    adjoint = forward


def test_solve_refuses_a_tolerance_below_the_rounding_of_an_operator() -> None:
    dictionary = Composition(HalfOperator(), Dense(8, 5), input_shape=(5,))
    y = torch.randn(5)
    with pytest.raises(ValueError, match="single precision"):
        solve(y, dictionary, dist.Laplace(0.0, 1.0), tol=1e-6)
    assert bool(solve(y, dictionary, dist.Laplace(0.0, 1.0), tol=1e-5).converged)
    assert bool(solve(y.double(), dictionary.double(), dist.Laplace(0.0, 1.0), tol=1e-8).converged)


class WronglyConjugate(dist.Laplace):
    pass


def test_a_conjugate_that_is_not_the_penaltys_is_refused_rather_than_certified() -> None:
    @register_conjugate(WronglyConjugate)
    def _(prior):
        rate = 1 / prior.scale
        return Conjugate(-rate, rate, lambda slope: torch.full_like(slope, -5.0))

    with pytest.raises(ValueError, match="conjugate of WronglyConjugate does not belong"):
        solve(torch.randn(2, 5), Dense(8, 5), WronglyConjugate(0.0, 1.0))


class WronglyDual(Gaussian):
    def dual(self, score, y):
        return super().dual(score, y) + 5.0


def test_a_dual_that_is_not_the_losss_is_refused_by_the_name_of_the_family() -> None:
    with pytest.raises(ValueError, match="dual of WronglyDual to its loss"):
        solve(torch.randn(2, 5), Dense(8, 5), dist.Laplace(0.0, 1.0), likelihood=WronglyDual(1.0))


class ThirdOperator:
    def forward(self, signal):
        return signal / 3

    adjoint = forward


@pytest.mark.parametrize("seed", [2, 18])
def test_the_rounding_of_an_operator_is_not_taken_for_a_wrong_conjugate(seed: int) -> None:
    # Both seeds raised: the map in float64 had forgotten that its operator is not.
    torch.manual_seed(seed)
    dictionary = Composition(ThirdOperator(), Dense(8, 5), input_shape=(5,))
    found = solve(torch.randn(200, 5), dictionary, dist.Laplace(0.0, 3.0), tol=8e-6)
    assert bool(found.converged.all())


class OnlyASlope(Likelihood):
    """What a net needs, and no more."""

    def residual(self, predictor, y):
        return y - predictor

    def curvature(self, y):
        return torch.tensor(1.0)


class NoDouble(LinearMap):
    def __init__(self, atoms):
        self.atoms = atoms

    def forward(self, codes):
        return codes @ self.atoms

    def adjoint(self, signal):
        return signal @ self.atoms.T

    def squared_norm(self, signal_shape=None):
        return torch.linalg.matrix_norm(self.atoms, 2).square().detach()


class Narrow(Dense):
    def bind(self, atoms=None):
        return NoDouble(self.atoms if atoms is None else atoms)


def test_without_a_certificate_nothing_is_asked_that_only_a_certificate_needs() -> None:
    y, prior = torch.randn(3, 5), dist.Laplace(0.0, 1.0)
    dictionary = Narrow(8, 5)
    full = Dense(8, 5, atoms=dictionary.atoms.detach())
    blind = solve(y, dictionary, prior, likelihood=OnlyASlope(), tol=None, max_steps=500)
    torch.testing.assert_close(blind.codes, solve(y, full, prior).codes, rtol=0, atol=1e-2)
    with pytest.raises(NotImplementedError, match="NoDouble does not state .*double.*tol=None"):
        solve(y, dictionary, prior)
    with pytest.raises(NotImplementedError, match="OnlyASlope does not state its `loss`"):
        solve(y, full, prior, likelihood=OnlyASlope())
