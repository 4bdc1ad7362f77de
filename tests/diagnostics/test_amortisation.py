"""Gaps against exact evidence and closed-form posteriors."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_sparse.diagnostics import amortisation_gap
from pyro_sparse.dictionaries import Dense
from pyro_sparse.distributions import SpikeAndSlab
from pyro_sparse.guides import Thresholded, UnrolledEncoder
from pyro_sparse.infer import enumerate_posterior
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import Unrolled, coordinate_ascent

PRIOR = SpikeAndSlab(dist.Normal(0.0, 1.0), probs=0.3)
NOISE = Gaussian(0.3)


def problem() -> tuple[Dense, SparseCoding, Tensor]:
    dictionary = Dense(5, 6, atoms=torch.randn(5, 6) + 0.3)
    model = SparseCoding(dictionary, NOISE, PRIOR)
    with torch.no_grad():
        return dictionary, model, model(num_data=40)


def test_gaps_are_those_of_the_exact_and_the_best_factorised_posterior() -> None:
    dictionary, model, y = problem()
    evidence = enumerate_posterior(y, dictionary, PRIOR, NOISE).log_evidence
    best = coordinate_ascent(y, dictionary, PRIOR, NOISE)
    unrolled = Unrolled(dictionary, NOISE, num_steps=5)
    guide = Thresholded(UnrolledEncoder(unrolled, dist.Laplace(0.0, 0.3)))
    gap = amortisation_gap(model, guide, y, log_evidence=evidence, num_steps=300, num_samples=400)
    assert gap.amortisation.mean() > 0.1
    assert bool((gap.refined <= evidence + 5 * gap.se + 1e-3).all())
    # Both are local optima of the same bound; refining starts from the encoder's.
    found, expected = gap.refined.mean(), best.elbo.mean()
    assert float(found) == pytest.approx(float(expected), abs=0.1)
    total = gap.approximation + gap.amortisation
    torch.testing.assert_close(total, evidence - gap.bound)
    assert "amortisation gap" in str(gap) and "approximation gap" in str(gap)


def normal(y: Tensor, num_data: int) -> None:
    with pyro.plate("data", len(y)):
        codes = pyro.sample("codes", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(codes, 1.0), obs=y)


def posterior(offset: float) -> Any:
    def guide(y: Tensor, num_data: int) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("codes", dist.Normal(y / 2 + offset, 0.5**0.5))

    return guide


def test_the_gap_of_a_shifted_normal_is_its_kl() -> None:
    y = torch.randn(300)
    gap = amortisation_gap(normal, posterior(0.5), y, refined=posterior(0.0), num_samples=100)
    score = (gap.amortisation - 0.25) / gap.se
    assert abs(float(score.mean()) * 300**0.5) < 4
    assert 0.8 < float(score.std()) < 1.2
    with pytest.raises(ValueError, match="log evidence"):
        gap.approximation  # noqa: B018


def test_errors() -> None:
    y = torch.randn(3)
    with pytest.raises(TypeError, match="refined="):
        amortisation_gap(normal, posterior(0.0), y)
    with pytest.raises(ValueError, match="one for each datum"):
        amortisation_gap(
            normal, posterior(0.0), y, refined=posterior(0.0), log_evidence=torch.zeros(4)
        )
    with pytest.raises(ValueError, match="num_samples >= 2"):
        amortisation_gap(normal, posterior(0.0), y, refined=posterior(0.0), num_samples=1)
