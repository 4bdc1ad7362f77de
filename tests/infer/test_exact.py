"""Against scipy's multivariate normal, support by support, and against quadrature."""

import itertools
from typing import NamedTuple

import mpmath
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from scipy.integrate import dblquad, quad
from scipy.special import logsumexp
from scipy.stats import multivariate_normal, norm

import pyro_sparse.infer.exact as exact_module
from pyro_sparse.dictionaries import Conv, Dense
from pyro_sparse.distributions.mixed import SpikeAndSlab
from pyro_sparse.infer.exact import enumerate_posterior
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers.coordinate_ascent import coordinate_ascent


class Problem(NamedTuple):
    y: torch.Tensor
    dictionary: Dense
    prior: SpikeAndSlab
    likelihood: Gaussian


def random_problem(seed, num_atoms, features=5, size=3, alike=0.5):
    """Correlated atoms, each with a prior of its own; each feature with its own noise."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(features)
    atoms = alike * common + rng.standard_normal((num_atoms, features))
    dictionary = Dense(num_atoms, features, atoms=torch.from_numpy(atoms))
    prior = SpikeAndSlab(
        dist.Normal(
            torch.from_numpy(rng.standard_normal(num_atoms)),
            torch.from_numpy(rng.uniform(0.3, 2.0, num_atoms)),
        ),
        probs=torch.from_numpy(rng.uniform(0.05, 0.8, num_atoms)),
    )
    likelihood = Gaussian(torch.from_numpy(rng.uniform(0.2, 0.8, features)))
    model = SparseCoding(dictionary, likelihood, prior)
    with torch.no_grad(), pyro.poutine.block():
        pyro.set_rng_seed(seed)
        y = model(num_data=size)
    return Problem(y, dictionary, prior, likelihood)


def brute_force(problem):
    """Log evidence, probabilities of supports, mean, covariance: from joint normals of y and z."""
    atoms = problem.dictionary.atoms.detach().numpy()
    probs = problem.prior.probs.numpy()
    loc, scale = problem.prior.slab.loc.numpy(), problem.prior.slab.scale.numpy()
    noise = np.diag(problem.likelihood.scale.numpy() ** 2)
    supports = [s[::-1] for s in itertools.product([False, True], repeat=len(atoms))]
    results = []
    for y in problem.y.numpy():
        levels, means, squares = [], [], []
        for support in np.array(supports):
            gains = np.diag(np.where(support, scale**2, 0.0))
            centre = np.where(support, loc, 0.0)
            marginal = atoms.T @ gains @ atoms + noise
            level = np.log(np.where(support, probs, 1 - probs)).sum()
            levels.append(level + multivariate_normal(centre @ atoms, marginal).logpdf(y))
            gain = gains @ atoms @ np.linalg.inv(marginal)
            mean = centre + gain @ (y - centre @ atoms)
            means.append(mean)
            squares.append(gains - gain @ atoms.T @ gains + np.outer(mean, mean))
        log_evidence = logsumexp(levels)
        weight = np.exp(np.array(levels) - log_evidence)
        mean = weight @ np.array(means)
        covariance = np.tensordot(weight, squares, 1) - np.outer(mean, mean)
        results.append((log_evidence, weight, mean, covariance))
    return [np.array(part) for part in zip(*results)]


@pytest.mark.parametrize("num_atoms", [1, 2, 4, 6])
def test_agrees_with_joint_normals_on_every_support(num_atoms):
    problem = random_problem(num_atoms, num_atoms)
    log_evidence, weight, mean, covariance = brute_force(problem)
    posterior = enumerate_posterior(*problem)
    np.testing.assert_allclose(posterior.log_evidence, log_evidence, atol=1e-10)
    np.testing.assert_allclose(posterior.log_support_prob.exp(), weight, atol=1e-12)
    active = weight @ posterior.supports.double().numpy()
    np.testing.assert_allclose(posterior.prob_active, active, atol=1e-12)
    np.testing.assert_allclose(posterior.mean, mean, atol=1e-11)
    np.testing.assert_allclose(posterior.covariance(), covariance, atol=1e-11)
    np.testing.assert_allclose(
        posterior.variance, covariance.diagonal(axis1=1, axis2=2), atol=1e-11
    )


def test_one_code_agrees_with_quadrature():
    y, dictionary, prior, likelihood = problem = random_problem(0, 1)
    posterior = enumerate_posterior(*problem)
    atom, scale = dictionary.atoms.detach().numpy()[0], likelihood.scale.numpy()
    law = norm(prior.slab.loc.item(), prior.slab.scale.item())
    probs = prior.probs.item()
    for n, datum in enumerate(y.numpy()):

        def joint(z, datum=datum):
            return probs * law.pdf(z) * np.exp(norm(z * atom, scale).logpdf(datum).sum())

        mass = quad(joint, -12, 12, points=[posterior.mean[n].item()], epsabs=0, epsrel=1e-11)[0]
        zero = (1 - probs) * np.exp(norm(0, scale).logpdf(datum).sum())
        np.testing.assert_allclose(posterior.log_evidence[n], np.log(mass + zero), atol=1e-9)
        np.testing.assert_allclose(posterior.prob_active[n], mass / (mass + zero), atol=1e-9)


def test_density_of_two_codes_integrates_to_one():
    problem = random_problem(1, 2, size=1)
    posterior = enumerate_posterior(*problem)
    spread = posterior.variance[0].sqrt().tolist()
    mean = posterior.mean[0].tolist()

    def density(*codes):
        return posterior.log_prob(torch.tensor([codes], dtype=torch.float64)).exp().item()

    ends = [(m - 12 * s, m + 12 * s) for m, s in zip(mean, spread)]
    both = dblquad(lambda b, a: density(a, b), *ends[0], *ends[1], epsabs=1e-6)[0]
    first = quad(lambda a: density(a, 0.0), *ends[0])[0]
    second = quad(lambda b: density(0.0, b), *ends[1])[0]
    parts = [density(0.0, 0.0), first, second, both]
    np.testing.assert_allclose(parts, posterior.log_support_prob[0].exp(), atol=1e-5)
    assert sum(parts) == pytest.approx(1, abs=1e-5)


def test_twin_atoms_share_their_probability():
    problem = random_problem(3, 4)
    atoms = problem.dictionary.atoms.detach()[[0, 0, 1, 1]]
    prior = SpikeAndSlab(dist.Normal(torch.tensor(0.5).double(), 1.0), probs=0.3)
    problem = problem._replace(dictionary=Dense(4, 5, atoms=atoms), prior=prior.expand((4,)))
    posterior = enumerate_posterior(*problem)
    np.testing.assert_allclose(posterior.log_evidence, brute_force(problem)[0], atol=1e-10)
    np.testing.assert_allclose(posterior.prob_active[:, 0], posterior.prob_active[:, 1], atol=1e-12)
    assert posterior.variance.min() >= 0


@pytest.mark.parametrize("noise", [1e-2, 1e-4])
def test_twin_atoms_beside_hardly_any_noise(noise):
    """scipy gives up on these covariances; mpmath with 50 digits does not."""
    problem = random_problem(4, 3)
    atoms = problem.dictionary.atoms.detach()[[0, 0, 1]]
    problem = problem._replace(
        dictionary=Dense(3, 5, atoms=atoms),
        likelihood=Gaussian(torch.full((5,), noise, dtype=torch.float64)),
        y=atoms[:1],
    )
    with mpmath.workdps(50):
        rows = [mpmath.matrix(row) for row in atoms.tolist()]
        slabs = zip(problem.prior.probs.tolist(), problem.prior.slab.loc, problem.prior.slab.scale)
        slabs = [tuple(map(mpmath.mpf, map(float, slab))) for slab in slabs]
        evidence = mpmath.mpf(0)
        for support in itertools.product([False, True], repeat=3):
            level, centre = mpmath.mpf(1), mpmath.zeros(5, 1)
            covariance = mpmath.eye(5) * mpmath.mpf(noise) ** 2
            for active, row, (probs, loc, scale) in zip(support, rows, slabs):
                level *= probs if active else 1 - probs
                centre += active * loc * row
                covariance += active * scale**2 * row * row.T
            rest = rows[0] - centre
            square = (rest.T * mpmath.lu_solve(covariance, rest))[0]
            evidence += (
                level
                * mpmath.exp(-square / 2)
                / mpmath.sqrt(mpmath.det(2 * mpmath.pi * covariance))
            )
        expected = float(mpmath.log(evidence))
    found = enumerate_posterior(*problem).log_evidence.item()
    # Half the squared length of the data in units of the noise is what cancels.
    assert found == pytest.approx(expected, abs=100 * 2.2e-16 * 0.5 / noise**2)


def test_a_masked_sample_counts_as_if_it_had_not_been_measured():
    y, dictionary, prior, likelihood = random_problem(5, 4, size=2)
    masks = torch.tensor([[True, True, False, True, True], [True, False, True, True, False]])
    posterior = enumerate_posterior(
        y.masked_fill(~masks, torch.nan), dictionary, prior, likelihood, mask=masks
    )
    for n, mask in enumerate(masks):
        atoms = dictionary.atoms.detach()[:, mask]
        reduced = Dense(4, int(mask.sum()), atoms=atoms, unit_norm=False)
        expected = brute_force(
            Problem(y[n : n + 1, mask], reduced, prior, Gaussian(likelihood.scale[mask]))
        )
        np.testing.assert_allclose(posterior.log_evidence[n], expected[0][0], atol=1e-10)
        np.testing.assert_allclose(posterior.mean[n], expected[2][0], atol=1e-11)
        np.testing.assert_allclose(posterior.covariance()[n], expected[3][0], atol=1e-11)


@pytest.mark.parametrize("missing", [[], [1]])
def test_chunks_and_tables_of_their_own_change_nothing(missing):
    problem = random_problem(6, 5, size=7)
    mask = torch.ones(7, 5, dtype=torch.bool)
    mask[:, missing] = False
    one = enumerate_posterior(*problem, mask=mask)
    mask[3, 4] = False  # now every datum has a table of its own
    other = enumerate_posterior(*problem, mask=mask, chunk_size=2)
    same = [0, 1, 2, 4, 5, 6]
    np.testing.assert_allclose(other.log_evidence[same], one.log_evidence[same], atol=1e-11)
    np.testing.assert_allclose(other.variance[same], one.variance[same], atol=1e-11)


@pytest.mark.parametrize("probs", [0.0, 1.0])
def test_certain_codes_stay_certain(probs):
    problem = random_problem(7, 3)
    prior = SpikeAndSlab(problem.prior.slab, probs=torch.tensor([probs, 0.3, 0.3]).double())
    posterior = enumerate_posterior(*problem._replace(prior=prior))
    np.testing.assert_allclose(posterior.prob_active[:, 0], probs, atol=1e-14)
    assert torch.isfinite(posterior.log_evidence).all()
    assert bool(((posterior.sample((50,))[..., 0] != 0) == bool(probs)).all())


def test_draws_match_the_law():
    problem = random_problem(8, 4, size=2, alike=1.0)
    # Mostly active together, so that the draws' correlation counts.
    problem = problem._replace(prior=SpikeAndSlab(problem.prior.slab, probs=0.9))
    posterior = enumerate_posterior(*problem)
    draws = posterior.sample((100_000,))
    assert draws.shape == (100_000, 2, 4)
    count = len(draws)

    def close(samples, expected):
        error = samples.std(0) / count**0.5
        assert bool(((samples.mean(0) - expected).abs() < 4 * error).all())

    close((draws != 0).double(), posterior.prob_active)
    close(draws, posterior.mean)
    close((draws - posterior.mean).square(), posterior.variance)
    centred = draws - posterior.mean
    close(centred[..., :1] * centred[..., 1:], posterior.covariance()[:, 0, 1:])
    powers = 2 ** torch.arange(4)
    support = ((draws != 0) * powers).sum(-1)
    close((support.unsqueeze(-1) == torch.arange(16)).double(), posterior.log_support_prob.exp())


def test_draws_in_pieces_are_draws(monkeypatch):
    posterior = enumerate_posterior(*random_problem(8, 4, size=2))
    monkeypatch.setattr(exact_module, "CHUNK_BYTES", 10_000)
    assert posterior.sample((4, 25)).shape == (4, 25, 2, 4)
    np.testing.assert_allclose(
        posterior.covariance().diagonal(dim1=-2, dim2=-1), posterior.variance, atol=1e-12
    )


def log_weights(problem, particles, mask=None):
    """Of a program's own trace: log p(y, z) of the model less log q(z) of the guide."""
    y, dictionary, prior, likelihood = problem
    posterior = enumerate_posterior(*problem, mask=mask)
    model = SparseCoding(dictionary, likelihood, prior)

    def guide(y):
        with pyro.plate("data", len(y)):
            return pyro.sample("codes", posterior)

    weights = []
    for _ in range(particles):
        drawn = poutine.trace(guide).get_trace(y)
        joint = poutine.trace(poutine.replay(model, drawn)).get_trace(y, mask=mask)
        joint.compute_log_prob()
        drawn.compute_log_prob()
        total = joint.nodes["codes"]["log_prob"] + joint.nodes["obs"]["log_prob"]
        weights.append((total - drawn.nodes["codes"]["log_prob"]).detach())
    return torch.stack(weights), posterior.log_evidence


@pytest.mark.parametrize("num_atoms", [1, 5, 10])
def test_weights_of_exact_draws_are_the_evidence(num_atoms):
    weights, log_evidence = log_weights(random_problem(9, num_atoms), 20)
    np.testing.assert_allclose(weights, log_evidence.expand_as(weights), atol=1e-8)


def test_weights_of_masked_data_are_the_evidence():
    mask = torch.tensor([[True, False, True, True, True]] * 2 + [[False, True] * 2 + [True]])
    weights, log_evidence = log_weights(random_problem(10, 5), 20, mask)
    np.testing.assert_allclose(weights, log_evidence.expand_as(weights), atol=1e-8)


@pytest.mark.parametrize("vectorized", [False, True])
def test_bound_of_the_exact_guide_is_the_log_evidence(vectorized):
    y, dictionary, prior, likelihood = problem = random_problem(11, 6)
    posterior = enumerate_posterior(*problem)
    model = SparseCoding(dictionary, likelihood, prior)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("codes", posterior)

    loss = Trace_ELBO(num_particles=3, vectorize_particles=vectorized, max_plate_nesting=1)
    assert -loss.loss(model, guide, y) == pytest.approx(
        posterior.log_evidence.sum().item(), abs=1e-8
    )


def test_draws_have_the_dtype_of_the_data_and_the_rest_is_float64():
    y, dictionary, _, _ = random_problem(12, 4)
    prior = SpikeAndSlab(dist.Normal(0.0, 1.0), probs=0.3)
    problem = Problem(y.float(), dictionary.float(), prior, Gaussian(0.5))
    posterior = enumerate_posterior(*problem)
    assert posterior.log_evidence.dtype == posterior.mean.dtype == torch.float64
    assert posterior.sample().dtype == torch.float32
    weights, log_evidence = log_weights(problem, 20)
    # Of the model's own float32 log-densities, some 30 nats.
    np.testing.assert_allclose(weights, log_evidence.expand_as(weights), atol=1e-4)


def test_convolutional_codes_keep_their_shape():
    dictionary = Conv(2, 1, 3).double()
    y = torch.randn(2, 1, 7, dtype=torch.float64)
    prior = SpikeAndSlab(dist.Normal(0.0, 1.0), probs=0.3)
    posterior = enumerate_posterior(y, dictionary, prior, Gaussian(0.5))
    shape = tuple(dictionary.code_shape((1, 7)))
    assert posterior.event_shape == shape and posterior.sample((3,)).shape == (3, 2, *shape)
    assert posterior.log_prob(posterior.sample((3,))).shape == (3, 2)
    size = posterior.event_shape.numel()
    unit = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    atoms = dictionary(unit).detach().flatten(1)
    flat = Problem(
        y.flatten(1),
        Dense(size, atoms.shape[1], atoms=atoms, unit_norm=False),
        prior,
        Gaussian(0.5),
    )
    expected = enumerate_posterior(*flat)
    np.testing.assert_allclose(posterior.log_evidence, expected.log_evidence, atol=1e-11)
    np.testing.assert_allclose(posterior.mean.flatten(1), expected.mean, atol=1e-11)


def test_expand_keeps_law_and_values():
    posterior = enumerate_posterior(*random_problem(13, 3))
    wide = posterior.expand((4, 3))
    codes = posterior.sample((4,))
    assert wide.sample((2,)).shape == (2, 4, 3, 3) and wide.mean.shape == (4, 3, 3)
    assert wide.covariance().shape == (4, 3, 3, 3)
    assert torch.equal(wide.log_prob(codes), posterior.log_prob(codes))


def test_bound_of_coordinate_ascent_is_below_the_evidence_in_200_problems():
    gaps = []
    for seed in range(200):
        problem = random_problem(seed, 1 + seed % 8, size=2, alike=seed % 3)
        bound = coordinate_ascent(*problem).elbo
        gaps.append(enumerate_posterior(*problem).log_evidence - bound)
    gap = torch.cat(gaps)
    assert gap.min() >= -1e-9  # rounding of some 100 nats
    assert gap.max() > 0.1  # and it is no copy


def test_refuses_more_codes_than_can_be_counted():
    prior = SpikeAndSlab(dist.Normal(0.0, 1.0), probs=0.1)
    with pytest.raises(ValueError, match=r"at most 14 codes .* 2\*\*15 = .*infer.gibbs"):
        enumerate_posterior(torch.zeros(1, 4), Dense(15, 4), prior, Gaussian(1.0))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"prior": dist.Normal(0.0, 1.0)}, TypeError, "atom at zero"),
        (
            {"prior": SpikeAndSlab(dist.Laplace(0.0, 1.0), probs=0.1)},
            NotImplementedError,
            "Normal slab.*Laplace",
        ),
        ({"dictionary": torch.zeros(3, 4)}, TypeError, "Expected a Dictionary"),
        ({"y": torch.zeros(4)}, ValueError, r"y\[None\]"),
        ({"y": torch.full((1, 4), torch.nan)}, ValueError, "finite data"),
        ({"y": torch.zeros(1, 5)}, ValueError, "signal of shape"),
        ({"y": torch.zeros(1, 4).double()}, TypeError, "dtype"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
    ],
    ids=["no_atom", "laplace", "matrix", "one_datum", "nan", "shape", "dtype", "chunk"],
)
def test_refuses_what_it_cannot_do(change, error, match):
    arguments = {
        "y": torch.zeros(1, 4),
        "dictionary": Dense(3, 4),
        "prior": SpikeAndSlab(dist.Normal(0.0, 1.0), probs=0.1),
        "likelihood": Gaussian(1.0),
    }
    with pytest.raises(error, match=match):
        enumerate_posterior(**{**arguments, **change})


def test_a_value_outside_the_support_is_refused():
    posterior = enumerate_posterior(*random_problem(14, 3))
    with pytest.raises(ValueError, match="support"):
        posterior.log_prob(torch.full((3, 3), torch.nan))
