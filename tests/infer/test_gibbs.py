"""The joint-distribution test of Geweke, and enumeration where supports can be counted."""

import importlib
from typing import NamedTuple

import numpy as np
import pyro.distributions as dist
import pytest
import torch

import pyro_sparse.infer.exact as exact_module
from pyro_sparse.dictionaries import Conv, Dense
from pyro_sparse.distributions.mixed import SpikeAndSlab
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.solvers.linear_gaussian import LinearGaussian

gibbs_module = importlib.import_module("pyro_sparse.infer.gibbs")
gibbs = gibbs_module.gibbs
NO_PAIRS = torch.zeros(0, 2, dtype=torch.long)


class Problem(NamedTuple):
    dictionary: Dense
    prior: SpikeAndSlab
    likelihood: Gaussian

    def data(self, codes):
        return self.likelihood(codes @ self.dictionary.atoms.detach()).sample()


def random_problem(seed, num_atoms, features, alike=0.7, noise=(0.6, 1.2)):
    rng = np.random.default_rng(seed)
    atoms = alike * rng.standard_normal(features) + rng.standard_normal((num_atoms, features))
    prior = SpikeAndSlab(
        dist.Normal(
            torch.from_numpy(0.5 * rng.standard_normal(num_atoms)),
            torch.from_numpy(rng.uniform(0.5, 2.0, num_atoms)),
        ),
        probs=torch.from_numpy(rng.uniform(0.1, 0.7, num_atoms)),
    )
    dictionary = Dense(num_atoms, features, atoms=torch.from_numpy(atoms))
    return Problem(dictionary, prior, Gaussian(torch.from_numpy(rng.uniform(*noise, features))))


def geweke_scores(problem, *, size=50_000, rounds=5, **options):
    """Standard scores of the joint's moments after alternating codes | data and data | codes.

    Started from the joint itself, so the rows stay independent draws of it if the sampler is right.
    """
    dictionary, prior, likelihood = problem
    codes = prior.sample((size,))
    y = problem.data(codes)
    mask = options.get("mask")
    for _ in range(rounds):
        data = y if mask is None else y.masked_fill(~mask, torch.nan)
        draws = gibbs(
            data, *problem, num_samples=1, num_warm_up=0, num_chains=1, init=codes, **options
        )
        codes = draws.codes[0, 0]
        y = problem.data(codes)
    mean, square = prior.mean, prior.variance + prior.mean.square()
    second = torch.outer(mean, mean)
    second.diagonal().copy_(square)
    atoms = dictionary.atoms.detach()
    moments = [
        ((codes != 0).double(), prior.probs),
        (codes, mean),
        (codes.unsqueeze(-1) * codes.unsqueeze(-2), second),
        (y.unsqueeze(-1) * codes.unsqueeze(-2), atoms.T @ second),
        ((y - codes @ atoms).square(), likelihood.scale.square()),
    ]
    scores = [
        (found.mean(0) - expected) / (found.std(0) / size**0.5) for found, expected in moments
    ]
    return torch.cat([score.flatten() for score in scores]).abs()


MASK = torch.tensor([True, True, False, True])


@pytest.mark.parametrize("pairs", [NO_PAIRS, None], ids=["single", "pairs"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "masked"])
def test_codes_and_data_in_turn_keep_their_joint_law(pairs, mask):
    scores = geweke_scores(random_problem(0, 4, 4), pairs=pairs, mask=mask)
    assert scores.max() < 4


def test_masks_of_their_own_keep_the_joint_law():
    mask = torch.rand(50_000, 4) < 0.7
    assert geweke_scores(random_problem(1, 4, 4), mask=mask).max() < 4


def forget_log_determinant(self, index, correlation):
    scale = self.scale[index]
    logits, loc, variance = right_conditional(self, index, correlation)
    return logits - (variance / scale.square()).log() / 2, loc, variance


def variance_for_standard_deviation(self, index, correlation):
    logits, loc, variance = right_conditional(self, index, correlation)
    return logits, loc, variance.square()


def forget_the_slab_mean(self, index, correlation):
    logits, loc, variance = right_conditional(self, index, correlation)
    return logits, loc - variance * self.loc[index] / self.scale[index].square(), variance


right_conditional = LinearGaussian.conditional


@pytest.mark.parametrize(
    "wrong", [forget_log_determinant, variance_for_standard_deviation, forget_the_slab_mean]
)
def test_the_joint_test_sees_a_planted_bug_in_the_single_update(wrong, monkeypatch):
    monkeypatch.setattr(LinearGaussian, "conditional", wrong)
    assert geweke_scores(random_problem(0, 4, 4), pairs=NO_PAIRS).max() > 6


def forget_the_overlap(pair, *rest):
    return right_pair(pair._replace(cross=0 * pair.cross), *rest)


def forget_the_joint_log_determinant(pair, *rest):
    level = pair.level.clone()
    level[3] += (pair.rest.log() + pair.precision[1].log()) / 2
    return right_pair(pair._replace(level=level), *rest)


def slabs_too_wide(pair, correlation, level, noise):
    return right_pair(pair, correlation, level, noise * 1.1)


right_pair = gibbs_module._draw_pair


@pytest.mark.parametrize(
    "wrong", [forget_the_overlap, forget_the_joint_log_determinant, slabs_too_wide]
)
def test_the_joint_test_sees_a_planted_bug_in_the_pair_update(wrong, monkeypatch):
    monkeypatch.setattr(gibbs_module, "_draw_pair", wrong)
    assert geweke_scores(random_problem(0, 4, 4)).max() > 6


@pytest.mark.parametrize("pairs", [NO_PAIRS, None], ids=["single", "pairs"])
def test_agrees_with_enumeration_of_ten_codes(pairs):
    problem = random_problem(2, 10, 8)
    y = problem.data(problem.prior.sample((3,)))
    exact = exact_module.enumerate_posterior(y, *problem)
    draws = gibbs(y, *problem, num_chains=64, num_samples=300, num_warm_up=100, pairs=pairs).codes
    for found, expected in [
        ((draws != 0).double(), exact.prob_active),
        (draws, exact.mean),
        ((draws - exact.mean).square(), exact.variance),
    ]:
        chains = found.mean(1)  # independent of one another, however each of them mixes
        error = chains.std(0) / 8
        assert bool(((chains.mean(0) - expected).abs() < 4 * error).all())


def test_pairs_let_one_of_two_atoms_that_are_alike_hand_over_to_the_other():
    first = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    second = torch.tensor([0.98, 0.2, 0.0], dtype=torch.float64)
    third = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    dictionary = Dense(3, 3, atoms=torch.stack([first, second, third]))
    prior = SpikeAndSlab(dist.Normal(0.0, 1.0), probs=0.01)
    y = 1.5 * (first + second)[None] / 2

    def hand_overs(pairs):
        draws = gibbs(
            y, dictionary, prior, Gaussian(0.2), num_chains=8, num_warm_up=50, pairs=pairs
        ).codes
        return ((draws[:, 1:, :, 0] != 0) != (draws[:, :-1, :, 0] != 0)).double().mean()

    assert hand_overs(None) > 10 * hand_overs(NO_PAIRS)


def test_log_joint_is_that_of_the_model():
    problem = random_problem(3, 6, 5)
    y = problem.data(problem.prior.sample((4,)))
    mask = torch.rand(4, 5) < 0.7
    draws = gibbs(y, *problem, mask=mask, num_samples=5, num_warm_up=0, num_chains=2)
    predictor = draws.codes @ problem.dictionary.atoms.detach()
    data = (problem.likelihood(predictor).log_prob(y) * mask).sum(-1)
    expected = data + problem.prior.log_prob(draws.codes).sum(-1)
    np.testing.assert_allclose(draws.log_joint, expected, rtol=1e-10)


def test_a_generator_repeats_the_draws_and_leaves_the_global_one_alone():
    problem = random_problem(4, 6, 5)
    y = problem.data(problem.prior.sample((2,)))
    state = torch.get_rng_state()
    first, second, other = (
        gibbs(
            y, *problem, num_samples=5, num_warm_up=5, generator=torch.Generator().manual_seed(seed)
        ).codes
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_thinning_and_warm_up_pick_draws_of_the_same_chain():
    problem = random_problem(5, 5, 5)
    y = problem.data(problem.prior.sample((2,)))

    def draw(**options):
        generator = torch.Generator().manual_seed(0)
        return gibbs(y, *problem, num_chains=2, generator=generator, **options).codes

    every = draw(num_samples=12, num_warm_up=0)
    assert torch.equal(draw(num_samples=3, num_warm_up=3, thin=3), every[:, 5::3])


def test_shapes_and_dtypes_follow_the_data():
    dictionary = Conv(3, 1, 4)
    prior = SpikeAndSlab(dist.Normal(0.0, 1.0), probs=0.1)
    y = torch.randn(2, 1, 20)
    draws = gibbs(y, dictionary, prior, Gaussian(0.5), num_samples=6, num_warm_up=4, num_chains=3)
    assert draws.codes.shape == (3, 6, 2, *dictionary.code_shape((1, 20)))
    assert draws.codes.dtype == torch.float32 and draws.log_joint.dtype == torch.float64
    assert 0 < (draws.codes != 0).double().mean() < 0.5
    share = np.mean(draws.codes.numpy() != 0, axis=(0, 1))
    assert draws.prob_active.dtype == torch.float64
    np.testing.assert_array_equal(draws.prob_active, share)


@pytest.mark.parametrize("probs", [0.0, 1.0])
def test_certain_codes_stay_certain(probs):
    problem = random_problem(6, 4, 5)
    prior = SpikeAndSlab(problem.prior.slab, probs=torch.tensor([probs, 0.3, 0.3, 0.3]).double())
    y = problem.data(problem.prior.sample((3,)))
    pairs = torch.tensor([[0, 1], [2, 0]])
    draws = gibbs(y, *problem._replace(prior=prior), pairs=pairs, num_samples=50, init=0 * y[:, :4])
    assert bool(((draws.codes[..., 0] != 0) == bool(probs)).all())
    assert bool(draws.log_joint.isfinite().all())


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"num_samples": 0}, ValueError, "num_samples"),
        ({"thin": 0}, ValueError, "thin"),
        ({"num_warm_up": -1}, ValueError, "num_warm_up"),
        ({"pairs": torch.tensor([[0, 0]])}, ValueError, "two different codes"),
        ({"pairs": torch.tensor([[0, 3]])}, ValueError, r"in \[0, 3\)"),
        ({"pairs": torch.tensor([0, 1])}, ValueError, "shape"),
        ({"pairs": [[0, 1]]}, TypeError, "whole numbers"),
        ({"init": torch.zeros(3)}, ValueError, "init of shape"),
        ({"init": torch.full((1, 3), torch.nan)}, ValueError, "init to be finite"),
        ({"prior": dist.Normal(0.0, 1.0)}, TypeError, "atom at zero"),
    ],
    ids=["draws", "thin", "warm_up", "same", "range", "flat", "list", "init", "nan", "prior"],
)
def test_refuses_what_it_cannot_do(change, error, match):
    arguments = {
        "y": torch.zeros(1, 4),
        "dictionary": Dense(3, 4),
        "prior": SpikeAndSlab(dist.Normal(0.0, 1.0), probs=0.1),
        "likelihood": Gaussian(1.0),
    }
    with pytest.raises(error, match=match):
        gibbs(**{**arguments, **change})
