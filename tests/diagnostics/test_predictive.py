"""Predictive checks against closed-form predictive laws, and a model that is wrong."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_sparse.diagnostics import predictive_check
from pyro_sparse.dictionaries import Dense
from pyro_sparse.distributions import SpikeAndSlab
from pyro_sparse.infer import enumerate_posterior
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding


def normal(y: Tensor, num_data: int) -> None:
    with pyro.plate("data", len(y)):
        codes = pyro.sample("codes", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(codes, 1.0), obs=y)


def posterior(y: Tensor, num_data: int) -> None:
    with pyro.plate("data", len(y)):
        pyro.sample("codes", dist.Normal(y / 2, 0.5**0.5))


def test_p_values_are_tails_of_the_predictive_law() -> None:
    y = torch.tensor([-2.0, 0.0, 1.0, 4.0])
    statistics = {"value": lambda y: y}
    found = predictive_check(normal, posterior, y, statistics=statistics, num_samples=20_000)
    expected = 1 - torch.special.ndtr((y - y / 2) / 1.5**0.5).double()
    torch.testing.assert_close(found.p_values["value"], expected, atol=0.015, rtol=0)
    # Of the mean of all data: independent given the data.
    tail = 1 - torch.special.ndtr(y.mean() / 2 / (1.5 / 4) ** 0.5)
    assert found.overall["value"] == pytest.approx(float(tail), abs=0.015)


def test_the_log_likelihood_is_compared_at_the_same_draw() -> None:
    y = torch.tensor([0.0, 6.0])
    found = predictive_check(normal, posterior, y, statistics={}, num_samples=4000)
    # log p(y_rep | z) > log p(y | z) where |y_rep - z| < |y - z|.
    residual = y / 2 - 0.5**0.5 * torch.randn(100_000, 2)
    expected = torch.special.erf(residual.abs() / math.sqrt(2)).mean(0).double()
    torch.testing.assert_close(found.p_values["log_likelihood"], expected, atol=0.03, rtol=0)
    assert found.replicated["log_likelihood"].shape == (4000, 2)


def masked_problem() -> tuple[Any, Any, Tensor, Tensor]:
    prior, noise = SpikeAndSlab(dist.Normal(0.0, 1.0), probs=0.3), Gaussian(0.3)
    dictionary = Dense(4, 12)
    model = SparseCoding(dictionary, noise, prior)
    with torch.no_grad():
        y = model(num_data=60)
    mask = torch.rand(60, 12) < 0.8

    def guide(y: Tensor, num_data: int, mask: Tensor | None = None) -> None:
        law: Any = enumerate_posterior(y, dictionary, prior, noise, mask=mask)
        with pyro.plate("data", len(y)):
            pyro.sample("codes", law)

    return model, guide, y, mask


def test_data_of_the_model_look_like_it_and_others_do_not() -> None:
    model, guide, y, mask = masked_problem()
    hidden = torch.where(mask, y, 1e3)  # never looked at
    right = predictive_check(model, guide, hidden, mask=mask, num_samples=200)
    assert all(0.01 < p < 0.99 for p in right.overall.values())
    assert set(right.p_values) == {"mean", "sd", "min", "max", "log_likelihood"}
    spikes = torch.where(torch.rand(60, 12) < 0.1, y + 3, y)  # noise with heavy tails
    wrong = predictive_check(model, guide, spikes, mask=mask, num_samples=200)
    assert wrong.overall["log_likelihood"] > 0.99
    assert wrong.overall["max"] < 0.01
    assert "log_likelihood" in str(wrong)


def two_sites(y: Tensor, num_data: int) -> None:
    with pyro.plate("data", len(y)):
        codes = pyro.sample("codes", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(codes, 1.0), obs=y)
        pyro.sample("again", dist.Normal(codes, 1.0), obs=y)


def test_errors() -> None:
    y = torch.randn(3)
    with pytest.raises(NotImplementedError, match="one observed site"):
        predictive_check(two_sites, posterior, y)
    with pytest.raises(TypeError, match=r"\['sd'\]"):
        predictive_check(normal, posterior, y, statistics={"sd": 3})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="always compared"):
        predictive_check(normal, posterior, y, statistics={"log_likelihood": torch.abs})
    for wrong in (torch.mean, lambda y: y / 0, lambda y: 1.0):
        with pytest.raises(ValueError, match="finite number for each datum"):
            predictive_check(normal, posterior, y, statistics={"mine": wrong})
