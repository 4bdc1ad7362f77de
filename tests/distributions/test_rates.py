"""A learned rate stays positive and whole; its statistic is what the density says."""

import copy

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution

from pyro_sparse.dictionaries import Conv
from pyro_sparse.distributions.rates import (
    Rate,
    RateStatistic,
    rate_statistic,
    register_rate_statistic,
)
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding

RAW = "parametrizations.value.original"


@pytest.mark.parametrize(
    ("init", "num_atoms", "expected"),
    [
        (2.0, 3, [2.0, 2.0, 2.0]),
        (2, 1, [2.0]),
        (np.float64(0.5), 2, [0.5, 0.5]),
        (0.5, None, 0.5),
        (torch.tensor([1.0, 3.0]), None, [1.0, 3.0]),
        (torch.tensor([1.0, 3.0]), 2, [1.0, 3.0]),
        (torch.tensor([1, 3]), None, [1.0, 3.0]),
    ],
)
def test_it_starts_where_it_is_told(init, num_atoms, expected) -> None:
    rate = Rate(init, num_atoms=num_atoms)
    torch.testing.assert_close(rate().detach(), torch.tensor(expected))
    assert [name for name, _ in rate.named_parameters()] == [RAW]


def test_it_keeps_the_dtype_of_a_tensor_and_moves_with_the_module(dtype, device) -> None:
    rate = Rate(torch.tensor([1.0, 3.0], dtype=dtype))
    assert rate().dtype == dtype
    other = copy.deepcopy(rate).to(device=device, dtype=torch.float64)
    other.assign_(torch.tensor([2.0, 5.0]))
    assert (other().dtype, other().device.type) == (torch.float64, device.type)
    assert rate().dtype == dtype
    torch.testing.assert_close(rate().detach(), torch.tensor([1.0, 3.0], dtype=dtype))


def test_gradient_steps_of_any_size_leave_it_positive() -> None:
    rate = Rate(1.0, num_atoms=2)
    optimizer = torch.optim.SGD(rate.parameters(), lr=10.0)
    for _ in range(3):
        optimizer.zero_grad()
        rate().sum().backward()
        optimizer.step()
    assert (rate() > 0).all()


def test_assign_overwrites_in_place_and_a_state_dict_carries_it() -> None:
    rate = Rate(1.0, num_atoms=3)
    parameter = next(rate.parameters())
    value = torch.tensor([0.01, 1.0, 300.0])
    rate.assign_(value)
    assert next(rate.parameters()) is parameter
    assert parameter.requires_grad
    torch.testing.assert_close(rate().detach(), value)
    other = Rate(1.0, num_atoms=3)
    other.load_state_dict(rate.state_dict())
    assert torch.equal(other(), rate())
    rate.assign_(2.0)
    torch.testing.assert_close(rate().detach(), torch.full((3,), 2.0))


@pytest.mark.parametrize("local", [False, True])
def test_model_and_guide_hold_one_rate(local: bool) -> None:
    def prior(rate):
        return dist.Laplace(0.0, 1 / rate)

    with pyro.settings.context(module_local_params=local):
        rate, dictionary = Rate(1.0, num_atoms=2), Conv(2, 1, 3)
        model = SparseCoding(dictionary, Gaussian(0.5), prior, rate=rate)
        guide = UnrolledFISTA(dictionary, Gaussian(0.5), prior, rate=rate, num_steps=3)
        y = torch.randn(4, 1, 9)
        objective = pyro.infer.Trace_ELBO()(model, guide)
        before = objective(y, 8)
        before.backward()
        (raw,) = rate.parameters()
        assert (raw.grad != 0).all()
        rate.assign_(3.0)
        assert sum(p is raw for p in objective.parameters()) == 1
        assert objective(y, 8) != before
        assert model.rate is rate


@pytest.mark.parametrize(
    ("init", "num_atoms", "match"),
    [
        (0.0, 2, r"rates > 0 and finite, got \[0.0, 0.0\] for atoms \[0, 1\]"),
        (torch.tensor([1.0, -1.0, torch.nan]), None, r"for atoms \[1, 2\]"),
        (float("inf"), None, "rates > 0 and finite"),
        (torch.ones(3), 2, r"of shape \(2,\), got \(3,\)"),
        (torch.ones(3, 1), None, r"of shape \(atoms,\) or \(\), got \(3, 1\)"),
        (1.0, 0, "num_atoms to be a whole number"),
        (1.0, 2.5, "num_atoms to be a whole number"),
    ],
)
def test_a_start_that_is_none_is_refused(init, num_atoms, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Rate(init, num_atoms=num_atoms)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.tensor([1.0, 0.0]), r"got \[0.0\] for atoms \[1\]"),
        (torch.tensor([torch.nan, 1.0]), r"for atoms \[0\]"),
        (torch.ones(3), r"of shape \(2,\), got \(3,\)"),
        (torch.ones(1, 2), r"of shape \(2,\), got \(1, 2\)"),
    ],
)
def test_a_value_that_is_none_is_refused_and_changes_nothing(value, match: str) -> None:
    rate = Rate(1.5, num_atoms=2)
    with pytest.raises(ValueError, match=match):
        rate.assign_(value)
    torch.testing.assert_close(rate().detach(), torch.full((2,), 1.5))


PRIORS = {
    "laplace": lambda rate: dist.Laplace(0.3, 1 / rate),
    "exponential": dist.Exponential,
    "event": lambda rate: dist.Laplace(0.0, 1 / rate).expand((3,)).to_event(1),
    "expanded": lambda rate: ExpandedDistribution(dist.Laplace(0.0, 1 / rate), (3,)),
}


@pytest.mark.parametrize("name", PRIORS)
def test_the_statistic_gives_the_density_at_any_rate(name: str) -> None:
    """log p(z | b) - log p(z | a) = power * log(b / a) - (b - a) * t(z), by the definition."""
    prior = PRIORS[name]
    codes = torch.rand(5, 3, dtype=torch.float64) * 4
    a, b = torch.tensor([0.7, 2.5], dtype=torch.float64)
    found = rate_statistic(prior(a), codes)
    torch.testing.assert_close(found.rate, a.expand_as(found.rate))
    terms = found.power * (b / a).log() - (b - a) * found.value
    difference = prior(b).log_prob(codes) - prior(a).log_prob(codes)
    assert found.value.shape == codes.shape
    torch.testing.assert_close(terms.sum(), difference.sum(), rtol=1e-12, atol=0)


def test_a_statistic_of_ones_own_is_used_and_inherited() -> None:
    class Precision(dist.Normal):
        pass

    class Child(Precision):
        pass

    @register_rate_statistic(Precision)
    def _(prior, codes):
        return RateStatistic(prior.scale**-2, 0.5, (codes - prior.loc).square() / 2)

    found = rate_statistic(Child(0.0, 0.5).to_event(0), torch.tensor([2.0]))
    assert (found.rate, found.power, found.value) == (4.0, 0.5, 2.0)


def test_a_prior_without_a_statistic_is_named() -> None:
    with pytest.raises(NotImplementedError, match=r"register_rate_statistic\(StudentT\)"):
        rate_statistic(dist.StudentT(3.0), torch.zeros(2))
