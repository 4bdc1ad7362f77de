"""check_prior: it passes what is right and names what is planted."""

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import TorchDistribution, constraints
from scipy import stats
from torch import Tensor

from pyro_sparse import distributions as d
from pyro_sparse.testing import Advice, check_prior
from pyro_sparse.testing.densities import integrate, uniformity

THREE = torch.tensor([1.0, 0.02, 30.0])
PRIORS: dict[str, Any] = {
    "Laplace": dist.Laplace(torch.tensor([0.0, 0.3, -20.0]), THREE),
    "Exponential": dist.Exponential(THREE),
    "Normal far from zero": dist.Normal(100.0, 0.01),
    "Laplace of an event": dist.Laplace(0.0, 1.0).expand([2, 2]).to_event(2),
    "SignedLaplace": d.SignedLaplace(2.0, torch.tensor([1, 0, -1])),
    "GroupLaplace": d.GroupLaplace(THREE[:, None], (6,), group=(3,)),
    "GroupLaplace, one-sided": d.GroupLaplace(2.0, (3,), one_sided=True),
    "KnownSupport": d.KnownSupport(dist.Laplace(0.0, 1.0), torch.tensor([True, False])),
    "KnownSupport of groups": d.KnownSupport(d.GroupLaplace(1.0, (2,)), torch.tensor([1, 0])),
    "SpikeAndSlab": d.SpikeAndSlab(dist.Laplace(0.0, 1.0), probs=torch.tensor([0.2, 0.9])),
    "SpikeAndSlab, one-sided": d.SpikeAndSlab(dist.Exponential(1.0), probs=0.3),
    "SoftThresholded": d.SoftThresholded(dist.Laplace(0.3, 1.0), 0.5),
    "ShiftedThresholded": d.ShiftedThresholded(dist.Normal(0.3, 1.0), 0.5),
    "HardThresholded": d.HardThresholded(dist.Normal(0.3, 1.0), 0.5),
    "GammaThresholded": d.GammaThresholded(0.3, 1.0, 2.0, 3.0),
    "StudentT": dist.StudentT(3.0),
    "Gamma, without a mode": dist.Gamma(0.5, 1.0),
    "Uniform": dist.Uniform(-0.3, 1.0),
}


def found(advice: Advice, check: str) -> Any:
    return next(one for one in advice.findings if one.check == check)


@pytest.mark.parametrize("name", PRIORS)
def test_the_librarys_and_pyros_priors_pass(name: str) -> None:
    check_prior(PRIORS[name]).raise_if_failed()


def test_what_a_spike_and_slab_has_not_is_not_asked() -> None:
    advice = check_prior(PRIORS["SpikeAndSlab"])
    asked = {one.check for one in advice.findings if one.ok is not None}
    assert not asked & {"mode", "penalty", "prox", "conjugate"}
    assert {"integral", "draws", "cdf", "moments", "gradient", "save and load"} <= asked


def test_a_callable_is_asked_with_its_rate() -> None:
    rate = torch.tensor([1.0, 3.0])
    advice = check_prior(lambda rate: dist.Laplace(0.0, 1 / rate), rate=rate)
    advice.raise_if_failed()
    assert found(advice, "gradient").advice == "of rate, as by differences"
    wide = check_prior(lambda r: d.GroupLaplace(r, (2,)), rate=rate, code_shape=(2, 3, 2))
    wide.raise_if_failed()


def test_a_rate_that_is_made_a_number_is_named() -> None:
    advice = check_prior(lambda rate: dist.Laplace(0.0, 1 / rate.detach()), rate=2.0)
    assert advice.failed == ("gradient",), str(advice)


def test_state_is_left_alone_and_the_answer_the_same() -> None:
    before = torch.get_rng_state()
    first, second = (str(check_prior(dist.Laplace(0.0, 1.0))) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before) and first == second


def test_p_values_of_right_draws_are_uniform() -> None:
    """So a level of 1e-7 is one: p-values of 400 seeds, of laws with and without an atom."""
    law = d.SpikeAndSlab(dist.Laplace(0.3, 1.0), probs=torch.tensor([0.4, 1.0]))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = law.sample((400, 500)).double()  # (seeds, draws, 2)
        integral = integrate(
            law, torch.full((2,), 0.3).double(), torch.ones(2), (draws == 0).flatten(0, 1).any(0)
        )
        found = torch.stack([uniformity(integral, one) for one in draws])
    assert [stats.kstest(column, "uniform").pvalue > 1e-4 for column in found.T] == [True, True]


class Own(TorchDistribution):
    """The Laplace law around ``loc``, with a fault."""

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}
    support = constraints.real

    def __init__(self, scale: float | Tensor = 0.8, fault: str = "none") -> None:
        self.loc, self.scale, self.fault = torch.tensor([0.0, 0.4]), torch.as_tensor(scale), fault
        super().__init__(self.loc.shape, validate_args=False)

    @property
    def mode(self) -> Tensor:
        if self.fault == "no mode":
            raise NotImplementedError
        return self.loc + 0.1 if self.fault == "mode" else self.loc

    @property
    def mean(self) -> Tensor:
        return 2 * self.loc if self.fault == "mean" else self.loc

    @property
    def variance(self) -> Tensor:
        return (1 if self.fault == "variance" else 2) * self.scale.square().expand(2)

    def log_prob(self, value: Tensor) -> Tensor:
        scale = self.scale.detach() if self.fault == "detached" else self.scale
        size = (value - self.loc).abs()
        if self.fault == "nan gradient":
            size = (value - self.loc).square().sqrt()
        normaliser = 0.0 if self.fault == "normaliser" else (2 * scale).log()
        density = -size / scale - normaliser
        return density.sum(-1) if self.fault == "shapes" else density

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        scale = 1.1 * self.scale if self.fault == "scale of draws" else self.scale
        draws = dist.Laplace(self.loc, scale).expand(shape).sample().detach()
        if self.fault == "one draw":
            draws = draws[..., :1, :].expand(draws.shape) if draws.dim() > 2 else draws
        return draws.abs() if self.fault == "sign of draws" else draws

    def cdf(self, value: Tensor) -> Tensor:
        below = dist.Laplace(self.loc, self.scale).cdf(value)
        return 1 - below if self.fault == "cdf" else below


@d.register_penalty(Own)
def _(prior: Own, value: Tensor) -> Tensor:
    factor = 0.5 if prior.fault == "penalty" else 1.0
    start = 1.0 if prior.fault == "start of penalty" else 0.0
    return factor * (value - prior.loc).abs() / prior.scale + start


@d.register_prox(Own)
def _(prior: Own, value: Tensor, step: Any) -> Tensor:
    threshold = step / prior.scale
    if prior.fault == "step":
        threshold = 1 / prior.scale
    if prior.fault == "rate":
        threshold = step * prior.scale
    centre = 0.0 if prior.fault == "centre" else prior.loc
    away = value - centre
    size = (away.abs() - threshold).relu()
    if prior.fault == "sides":
        size = torch.where(away < 0, 0.0, size)
    result = centre + away.sign() * size
    return result.double() if prior.fault == "dtype" else result


@d.register_conjugate(Own)
def _(prior: Own) -> d.Conjugate:
    rate = (1 / prior.scale).expand(2)
    factor = {"too wide": 1.5, "too narrow": 0.5}.get(prior.fault, 1.0)
    sign = -1 if prior.fault == "sign of conjugate" else 1
    return d.Conjugate(-factor * rate, factor * rate, lambda slope: sign * slope * prior.loc)


FAULTS = {
    "normaliser": ("integral",),
    "shapes": ("shapes",),
    "scale of draws": ("draws",),
    "sign of draws": ("draws",),
    "one draw": ("expand",),
    "cdf": ("cdf",),
    "mean": ("moments",),
    "variance": ("moments",),
    "mode": ("mode",),
    "penalty": ("penalty",),
    "start of penalty": ("penalty",),
    "step": ("prox",),
    "rate": ("prox",),
    "centre": ("prox",),
    "sides": ("prox",),
    "dtype": ("prox",),
    "sign of conjugate": ("conjugate",),
    "too wide": ("conjugate",),
    "too narrow": ("conjugate",),
    "detached": ("gradient",),
    "nan gradient": ("gradient",),
}


def test_without_a_fault_nothing_is_named() -> None:
    check_prior(Own()).raise_if_failed()
    check_prior(Own(torch.tensor([0.01, 40.0]))).raise_if_failed()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named_by_its_check(fault: str) -> None:
    advice = check_prior(Own(fault=fault))
    assert set(FAULTS[fault]) <= set(advice.failed), str(advice)
    if fault not in ("shapes", "mode"):  # on these much else stands
        assert advice.failed == FAULTS[fault], str(advice)


@pytest.mark.parametrize(
    ("fault", "check", "says"),
    [
        ("step", "prox", "The step does not change it"),
        ("scale of draws", "draws", "Kolmogorov-Smirnov"),
        ("too narrow", "conjugate", "bounds too narrow"),
        ("nan gradient", "gradient", "at zero, where codes will be"),
        ("detached", "gradient", "by scale"),
    ],
)
def test_the_advice_says_what_to_do(fault: str, check: str, says: str) -> None:
    assert says in found(check_prior(Own(fault=fault)), check).advice


def test_a_mode_is_needed_with_a_conjugate_and_not_with_a_penalty_of_its_own() -> None:
    class Peakless(dist.Logistic):
        pass

    def advice() -> Advice:
        return check_prior(Peakless(torch.tensor(0.0), torch.tensor(1.0)))

    assert "mode" not in advice().failed
    d.register_conjugate(Peakless)(lambda prior: d.Conjugate(-prior.loc, prior.loc, abs))
    assert "Expected a property `mode`" in found(advice(), "mode").advice
    d.register_penalty(Peakless)(lambda prior, z: prior.log_prob(prior.loc) - prior.log_prob(z))
    assert "mode" not in advice().failed


class Group(d.GroupLaplace):
    """Groups, with a fault."""

    fault = "none"

    def expand(self, batch_shape: Any, _instance: Any = None) -> d.GroupLaplace:
        new = super().expand(batch_shape, _instance or type(self).__new__(type(self)))
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) + (0.1 if self.fault == "integral" else 0.0)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return super().sample(sample_shape) * (1.1 if self.fault == "draws" else 1.0)


@d.register_prox(Group)
def _(prior: Group, value: Tensor, step: Any) -> Tensor:
    return prior.shrunk(value, step / 2 if prior.fault == "prox" else step)


@d.register_conjugate(Group)
def _(prior: Group) -> d.Conjugate:
    right = d.conjugate.dispatch(d.GroupLaplace)(prior)
    factor = {"too wide": 0.5, "too narrow": 2.0}.get(prior.fault, 1.0)
    sign = 1.0 if prior.fault == "value" else 0.0
    return d.Conjugate(
        right.lower, right.upper, lambda u: sign * u, lambda u: factor * right.gauge(u)
    )


@pytest.mark.parametrize(
    "fault", ["none", "integral", "draws", "prox", "value", "too wide", "too narrow"]
)
def test_a_planted_fault_of_groups_is_named(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Group, "fault", fault)
    failed = check_prior(Group(2.0, (4,), group=(2,))).failed
    check = "conjugate" if fault in ("value", "too wide", "too narrow") else fault
    assert failed == () if fault == "none" else check in failed


class Spiked(d.SpikeAndSlab):
    """A slab with a spike of another size than it says."""

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.where(value == 0, math.log(0.5), super().log_prob(value))


def test_the_atom_counts_in_the_integral() -> None:
    advice = check_prior(Spiked(dist.Normal(0.0, 1.0), probs=0.3))
    assert "integral" in advice.failed
    assert "integrates to 1 with the mass at zero, got 0.8" in found(advice, "integral").advice


def test_another_share_of_zeros_is_named() -> None:
    class Frequent(d.SpikeAndSlab):
        def sample(self, sample_shape: Any = ()) -> Tensor:
            return (
                d.SpikeAndSlab(self.slab, probs=0.32).expand(self.batch_shape).sample(sample_shape)
            )

    advice = check_prior(Frequent(dist.Normal(0.0, 1.0), probs=0.3))
    assert "a share of 0.7 zeros" in found(advice, "draws").advice


def test_groups_too_large_to_integrate_are_not_asked() -> None:
    advice = check_prior(d.GroupLaplace(1.0, (20,), one_sided=True))
    advice.raise_if_failed()
    assert "too many to integrate" in found(advice, "integral").advice


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: check_prior(0.1), TypeError, "Expected prior to be a distribution"),  # type: ignore[arg-type]
        (lambda: check_prior(dist.Laplace), TypeError, "Expected rate="),  # type: ignore[arg-type]
        (lambda: check_prior(dist.Laplace(torch.zeros(65), 1.0)), ValueError, "at most 64 numbers"),
        (
            lambda: check_prior(dist.Laplace(0.0, torch.ones((), requires_grad=True))),
            ValueError,
            "prior of constants",
        ),
    ],
)
def test_bad_arguments(call: Callable[[], object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()
