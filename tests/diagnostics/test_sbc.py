"""Calibration against posteriors that are exact, and against ones wrong by a known amount."""

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from sklearn.calibration import calibration_curve
from torch import Tensor

from pyro_sparse.diagnostics import Calibration, reliability, sbc, uniform_p_value
from pyro_sparse.dictionaries import Dense
from pyro_sparse.distributions import SpikeAndSlab
from pyro_sparse.infer import enumerate_posterior, gibbs
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding

LONG = os.environ.get("PYRO_SPARSE_LONG") == "1"
F64 = torch.float64
NOISE = Gaussian(0.2)


def slab(scale: float = 1.0, probs: float = 0.3) -> SpikeAndSlab:
    return SpikeAndSlab(dist.Normal(torch.zeros((), dtype=F64), scale), probs=probs)


def dense(num_atoms: int = 3, num_features: int = 4) -> Dense:
    """Atoms that are alike, so that codes depend on one another given the data."""
    atoms = torch.randn(num_atoms, num_features, generator=torch.Generator().manual_seed(5))
    return Dense(num_atoms, num_features, atoms=atoms.to(F64) + 0.4)


class Narrow(TorchDistribution):
    """An exact posterior with the spread of each support's codes multiplied."""

    has_rsample = False
    arg_constraints = {}

    def __init__(self, exact: Any, factor: float) -> None:
        self.exact, self.factor = exact, factor
        super().__init__(exact.batch_shape, exact.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.exact.support

    def stretched(self, codes: Tensor, factor: float) -> Tensor:
        active = codes != 0
        mean = self.exact._tables.slab(active)[1] * self.exact._tables.scale
        return torch.where(active, mean + factor * (codes - mean), 0.0)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.stretched(self.exact.sample(sample_shape), self.factor)

    def log_prob(self, value: Tensor) -> Tensor:
        unscaled = self.stretched(value, 1 / self.factor)
        return self.exact.log_prob(unscaled) - (value != 0).sum(-1) * math.log(self.factor)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Narrow":
        return Narrow(self.exact.expand(batch_shape), self.factor)


def guide_of(
    dictionary: Dense, prior: SpikeAndSlab, factor: float = 1.0, *, look_at_mask: bool = True
) -> Callable[..., None]:
    last: list[Any] = [None, None]

    def guide(y: Tensor, num_data: int, mask: Tensor | None = None) -> None:
        if last[0] is not y:
            seen = mask if look_at_mask else None
            last[:] = y, enumerate_posterior(y, dictionary, prior, NOISE, mask=seen)
        with pyro.plate("data", len(y)):
            pyro.sample("codes", last[1] if factor == 1 else Narrow(last[1], factor))

    return guide


def share_of_alarms(prior: SpikeAndSlab, factor: float, repeats: int) -> float:
    dictionary = dense(8, 8)
    model = SparseCoding(dictionary, NOISE, slab())
    guide = guide_of(dictionary, prior, factor)
    y = torch.zeros(1000, 8, dtype=F64)
    options: dict[str, Any] = {"num_simulations": 1000, "num_samples": 50, "progress": False}
    return float(np.mean([sbc(model, guide, y, seed=s, **options).alarm for s in range(repeats)]))


@pytest.mark.slow
def test_an_exact_posterior_raises_no_alarm(record_property: Any) -> None:
    found = share_of_alarms(slab(), 1.0, 300 if LONG else 2)
    record_property("false_alarms", found)
    assert found <= 0.01


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "factor"), [(1.0, 0.7), (1.5, 1.0)], ids=["sd", "prior"])
def test_a_wrong_posterior_is_found_out(scale: float, factor: float, record_property: Any) -> None:
    found = share_of_alarms(slab(scale), factor, 100 if LONG else 1)
    record_property("power", found)
    assert found >= 0.99


def test_strict_ranks_would_reject_an_exact_posterior() -> None:
    dictionary, prior = dense(), slab()
    truth = prior.sample((1000, 3))
    y = NOISE(truth @ dictionary.atoms.detach()).sample()
    draws = enumerate_posterior(y, dictionary, prior, NOISE).sample((100,))
    strict = (draws < truth).double().mean(0)
    assert max(map(uniform_p_value, strict.T)) < 1e-12
    assert Calibration.from_draws(truth, draws).p_value > 1e-3


def test_gibbs_draws_are_calibrated_where_supports_are_too_many_to_count() -> None:
    dictionary = dense(20, 12)
    prior = slab(probs=0.1)
    truth = prior.sample((200, 20))
    noise = Gaussian(0.4)
    y = noise(truth @ dictionary.atoms.detach()).sample()
    found = gibbs(y, dictionary, prior, noise, num_samples=10, num_warm_up=40, num_chains=5, thin=8)
    draws = found.codes.flatten(0, 1)
    right = Calibration.from_draws(truth, draws)
    assert right.p_value > 1e-3
    coverage = right.coverage(0.9)
    assert abs(coverage.share - 0.9) < 4 * coverage.se
    curve = right.reliability()
    assert curve.ece < curve.ece_of_noise + 4 * curve.ece_se
    shrunk = Calibration.from_draws(truth, 0.7 * draws).coverage(0.9, active=True)
    assert shrunk.share < 0.9 - 6 * shrunk.se


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9, 0.95])
def test_coverage_of_too_narrow_intervals_is_what_it_should_be(level: float) -> None:
    y = torch.randn(4000, 1, dtype=F64)
    truth = y + torch.randn(y.shape, dtype=F64)
    draws = y + 0.7 * torch.randn(400, *y.shape, dtype=F64)
    found = Calibration.from_draws(truth, draws).coverage(level)
    half = dist.Normal(0.0, 1.0).icdf(torch.tensor((1 + level) / 2))
    expected = float(torch.special.erf(0.7 * half / 2**0.5))
    assert found.share == pytest.approx(expected, abs=4 * found.se + 0.01)
    assert found.se == pytest.approx((expected * (1 - expected) / 4000) ** 0.5, rel=0.1)


def test_active_codes_have_intervals_of_their_own() -> None:
    """Codes that are sure to be active or not: only the intervals of active ones are wrong."""
    active = torch.rand(3000, 2) < 0.3
    truth = torch.where(active, 3 + torch.randn(3000, 2), 0.0)
    draws = torch.where(active, 3 + 0.7 * torch.randn(200, 3000, 2), 0.0)
    found = Calibration.from_draws(truth, draws)
    assert found.coverage(0.9).share > 0.85  # zeros are right
    assert found.coverage(0.9, active=True).share == pytest.approx(0.75, abs=0.03)
    assert found.coverage(0.9, active=True).number == int(active.sum())


def test_a_guide_that_has_not_looked_at_the_data_is_found_by_the_joint_density() -> None:
    dictionary, prior = dense(), slab()

    def blind(y: Tensor, num_data: int) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("codes", prior.expand([3]).to_event(1))

    model, y = SparseCoding(dictionary, NOISE, prior), torch.zeros(500, 4, dtype=F64)
    found = sbc(model, blind, y, num_simulations=500, num_samples=50, progress=False)
    assert found.sites["codes"].p_value > 1e-3
    assert found.sites["log_joint"].p_value < 1e-12
    assert found.alarm
    assert "NOT CALIBRATED" in str(found)


def test_a_guide_that_looks_at_what_is_masked_is_found_out() -> None:
    dictionary, prior = dense(), slab()
    mask = torch.rand(500, 4, generator=torch.Generator().manual_seed(1)) < 0.7
    model, y = SparseCoding(dictionary, NOISE, prior), torch.zeros(500, 4, dtype=F64)
    options: dict[str, Any] = {"num_simulations": 500, "num_samples": 50, "progress": False}
    alarms = [
        sbc(model, guide_of(dictionary, prior, look_at_mask=look), y, mask=mask, **options).alarm
        for look in (True, False)
    ]
    assert alarms == [False, True]


def normal_mean(y: Tensor, num_data: int) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        offset = pyro.sample("offset", dist.Normal(loc, 1.0))
        pyro.sample("obs", dist.Normal(offset, 1.0), obs=y)


def exact_normal_mean(scale: float) -> Callable[..., None]:
    def guide(y: Tensor, num_data: int) -> None:
        precision = 1 + len(y) / 2
        law = dist.Normal(y.sum() / 2 / precision, scale * precision**-0.5)
        loc = pyro.sample("loc", law)
        with pyro.plate("data", len(y)):
            pyro.sample("offset", dist.Normal((loc + y) / 2, 0.5**0.5))

    return guide


def test_latents_that_all_data_share_are_ranked_once_a_data_set() -> None:
    options: dict[str, Any] = {"num_simulations": 100, "num_samples": 40, "progress": False}
    right, wrong = (
        sbc(normal_mean, exact_normal_mean(scale), torch.zeros(4), **options)
        for scale in (1.0, 0.3)
    )
    assert right.num_simulations == 100
    assert {name: tuple(site.pit.shape) for name, site in right.sites.items()} == {
        "loc": (100, 1),
        "offset": (100, 1),
        "log_joint": (100, 1),
    }
    assert not right.alarm
    assert wrong.alarm


def test_a_guide_can_be_made_for_each_data_set() -> None:
    seen = []

    def refit(y: Tensor) -> Callable[..., None]:
        seen.append(y)
        assert torch.is_grad_enabled()
        return exact_normal_mean(1.0)

    found = sbc(
        normal_mean,
        exact_normal_mean(0.1),
        torch.zeros(4),
        refit=refit,
        num_simulations=50,
        num_samples=20,
        progress=False,
    )
    assert len(seen) == 50
    assert not found.alarm


def test_results_depend_on_the_seed_alone_and_leave_the_random_state() -> None:
    options: dict[str, Any] = {"num_simulations": 20, "num_samples": 10, "progress": False}
    before = torch.random.get_rng_state()
    first = sbc(normal_mean, exact_normal_mean(1.0), torch.zeros(4), **options)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(3)
    again = sbc(normal_mean, exact_normal_mean(1.0), torch.ones(4), **options)
    other = sbc(normal_mean, exact_normal_mean(1.0), torch.zeros(4), seed=1, **options)
    assert torch.equal(first.sites["loc"].pit, again.sites["loc"].pit)
    assert not torch.equal(first.sites["loc"].pit, other.sites["loc"].pit)


def test_few_of_many_elements_are_ranked() -> None:
    dictionary, prior = dense(), slab()
    found = sbc(
        SparseCoding(dictionary, NOISE, prior),
        guide_of(dictionary, prior),
        torch.zeros(50, 4, dtype=F64),
        num_simulations=100,
        num_samples=20,
        max_elements=2,
        progress=False,
    )
    assert found.elements["codes"].tolist() == [0, 1]
    assert found.sites["codes"].pit.shape == (100, 2)
    assert int(found.sites["codes"].ranks.max()) <= 20


def test_reliability_is_that_of_sklearn() -> None:
    prob = torch.rand(500, 3, dtype=F64) ** 2
    active = torch.rand(500, 3) < prob**1.5
    curve = reliability(prob, active)
    frequency, mean = calibration_curve(active.flatten().numpy(), prob.flatten().numpy(), n_bins=10)
    np.testing.assert_allclose(curve.frequency, frequency, atol=1e-12)
    np.testing.assert_allclose(curve.prob, mean, atol=1e-12)
    weight = curve.count.numpy() / 1500
    assert curve.ece == pytest.approx(float(weight @ np.abs(frequency - mean)))
    equal = reliability(prob, active, equal_counts=True)
    assert equal.count.tolist() == [150] * 10


def test_standard_errors_of_reliability_are_the_spread_over_repeats() -> None:
    """Codes of one row are alike, as parts of one picture are."""
    found = []
    for _ in range(300):
        prob = 0.1 + 0.8 * torch.rand(300, 1).expand(300, 4)
        active = (torch.rand(300, 1) < prob).expand(300, 4)
        tilted = reliability(0.3 * prob, active)
        found.append((tilted.ece, tilted.ece_se, reliability(prob[:, :1], active[:, :1])))
    ece, se, right = zip(*found)
    assert np.mean(se) == pytest.approx(np.std(ece), rel=0.15)
    noise = np.mean([curve.ece_of_noise for curve in right])
    assert np.mean([curve.ece for curve in right]) == pytest.approx(noise, rel=0.1)


def bare(y: Tensor, num_data: int) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("codes", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(z, 1.0), obs=y)


def bare_guide(y: Tensor, num_data: int) -> None:
    with pyro.plate("data", len(y)):
        pyro.sample("codes", dist.Normal(y / 2, 0.5**0.5))


def two_sites(y: Tensor, num_data: int) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("codes", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(z, 1.0), obs=y)
        pyro.sample("again", dist.Normal(z, 1.0), obs=y)


def factor(y: Tensor, num_data: int) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("codes", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(z, 1.0), obs=y)
        pyro.factor("more", -z.abs())


def twice(y: Tensor, num_data: int) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("codes", dist.Normal(0.0, 1.0))
        law = dist.Normal(z.unsqueeze(-1), torch.ones(2)).to_event(1)
        pyro.sample("obs", law, obs=torch.stack([y, y], -1))


@pytest.mark.parametrize(
    ("model", "options", "error", "match"),
    [
        (two_sites, {}, NotImplementedError, "one observed site"),
        (factor, {}, NotImplementedError, "factor 'more'"),
        (twice, {}, ValueError, "of the shape of y"),
        (bare, {"num_simulations": 1}, ValueError, "num_simulations >= 2"),
        (bare, {"num_samples": 0}, ValueError, "num_samples >= 1"),
        (bare, {"max_elements": 0}, ValueError, "max_elements >= 1"),
        (bare, {"level": 0}, ValueError, "Expected level"),
        (bare, {"refit": 3}, TypeError, "refit"),
    ],
)
def test_bad_arguments(model: Any, options: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        sbc(model, bare_guide, torch.zeros(3), progress=False, **options)


def test_bad_draws() -> None:
    truth, draws = torch.zeros(5), torch.zeros(9, 5)
    with pytest.raises(ValueError, match="num_samples, simulations"):
        Calibration.from_draws(truth, draws.T)
    with pytest.raises(ValueError, match="finite"):
        Calibration.from_draws(truth, draws / 0)
    with pytest.raises(TypeError, match="truth"):
        Calibration.from_draws(truth.tolist(), draws)  # type: ignore[arg-type]
    smooth = Calibration.from_draws(torch.randn(5), torch.randn(9, 5))
    with pytest.raises(ValueError, match="atom"):
        smooth.coverage(active=True)
    with pytest.raises(ValueError, match="atom"):
        smooth.reliability()
    with pytest.raises(ValueError, match="level"):
        smooth.coverage(1.5)
    with pytest.raises(ValueError, match="one shape"):
        reliability(torch.rand(3), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="log-odds"):
        reliability(torch.randn(9) * 5, torch.ones(9, dtype=torch.bool))
    with pytest.raises(TypeError, match="boolean"):
        reliability(torch.rand(3), torch.ones(3))
    with pytest.raises(ValueError, match="num_bins"):
        reliability(torch.rand(3), torch.ones(3, dtype=torch.bool), num_bins=0)
