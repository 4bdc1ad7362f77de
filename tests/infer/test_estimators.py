"""Gradient estimators: unbiased ones against quadrature, biased ones against their own formula."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_sparse.distributions.mixed import Mixed, SpikeAndSlab
from pyro_sparse.distributions.thresholded import HardThresholded, ShiftedThresholded
from pyro_sparse.infer import (
    ControlVariate,
    DisARM,
    Estimator,
    ImplicitMixed,
    LeaveOneOut,
    LocalExpectation,
    Mean,
    SparseELBO,
)
from pyro_sparse.infer.published import Concrete, StraightThrough, SubGradient
from pyro_sparse.infer.schedules import LinearRamp, Scheduled
from tests.infer.expectations import (
    LAWS,
    Copies,
    exact_gradient,
    kl,
    log_likelihood,
    product,
    start,
)

DRAWS, FEWER = 100_000, 20_000


def estimates(
    law: str,
    estimator: Estimator,
    num_samples: int | None = None,
    *,
    draws: int = DRAWS,
    **options: object,
) -> tuple[Tensor, dict[str, Tensor]]:
    """ELBO and gradient, each an independent estimate for every copy."""
    copies = Copies(LAWS[law], draws)
    elbo = SparseELBO(estimator, num_samples=num_samples, **options)
    loss = elbo.differentiable_loss(copies.model, copies.guide)
    found = torch.autograd.grad(loss, list(copies.parameters.values()), allow_unused=True)
    slopes = {
        name: torch.zeros_like(value) if slope is None else -slope
        for (name, value), slope in zip(copies.parameters.items(), found, strict=True)
    }
    return -loss.detach() / draws, slopes


def deviations(slopes: dict[str, Tensor], exact: dict[str, Tensor]) -> Tensor:
    """Standard errors from the exact gradient, of every parameter; 1e-5 is for the quadrature."""
    errors = []
    for name, slope in slopes.items():
        error = slope.std(0) / math.sqrt(len(slope)) + 1e-5
        errors.append(((slope.mean(0) - exact[name]) / error).flatten())
    return torch.cat(errors)


UNBIASED = [
    (ImplicitMixed(), 1),
    (ImplicitMixed(), 3),
    (ImplicitMixed(limit=0), 1),
    (ImplicitMixed(limit=0), 2),
    (ImplicitMixed(limit=math.inf), 1),
    (LeaveOneOut(), 1),
    (LeaveOneOut(), 2),
    (LeaveOneOut(), 3),
    (LocalExpectation(), 1),
    (LocalExpectation(chunk=2), 2),
    (DisARM(), 2),
    (DisARM(), 4),
    (ControlVariate(), 1),
    (ControlVariate(), 3),
]


@pytest.mark.parametrize(
    ("estimator", "num_samples"), UNBIASED, ids=[f"{e!r}-{j}" for e, j in UNBIASED]
)
def test_the_mean_of_an_estimator_is_the_gradient(estimator: Estimator, num_samples: int) -> None:
    value, exact = exact_gradient("spike_laplace")
    mean, slopes = estimates("spike_laplace", estimator, num_samples)
    assert deviations(slopes, exact).abs().max() < 4
    assert abs(float(mean) - value) < 0.02  # four standard errors: f has a deviation of about 1.5


OTHERS = [name for name in LAWS if name != "spike_laplace"]
SMOOTH = [name for name in OTHERS if not name.startswith("hard")]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        (ImplicitMixed(limit=5.0), {}),
        (LeaveOneOut(), {}),
        (LeaveOneOut(), {"bound": Mean(sampled_kl=True)}),
    ],
    ids=["implicit", "leave_one_out", "sampled_kl"],
)
def test_estimators_serve_every_law(
    name: str, estimator: Estimator, options: dict[str, object]
) -> None:
    _, exact = exact_gradient(name)
    _, slopes = estimates(name, estimator, draws=FEWER, **options)
    assert deviations(slopes, exact).abs().max() < 4


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize(
    "estimator", [LocalExpectation(), DisARM(), ControlVariate()], ids=lambda e: type(e).__name__
)
def test_estimators_of_single_gates_serve_every_law_without_a_gap(
    name: str, estimator: Estimator
) -> None:
    _, exact = exact_gradient(name)
    _, slopes = estimates(name, estimator, draws=FEWER)
    assert deviations(slopes, exact).abs().max() < 4


@pytest.mark.parametrize(
    "estimator",
    [LocalExpectation(), DisARM(), ControlVariate()],
    ids=lambda e: type(e).__name__,
)
def test_a_slab_with_a_gap_is_refused_where_it_would_be_biased(estimator: Estimator) -> None:
    with pytest.raises(NotImplementedError, match=r"Use LeaveOneOut\(\)"):
        estimates("hard_normal", estimator, draws=10)


# The published ones


def predicted(name: str, form: str) -> dict[str, Tensor]:
    """Mean of the published gradients by their definition, for a shifted threshold."""
    law, p = LAWS[name], start(LAWS[name])
    grid = law.grid(p)
    codes, weights, _ = product(grid)
    codes, weights = codes.detach().requires_grad_(), weights.detach()
    fit = log_likelihood(codes, p["weight"], p["log_noise"])
    (slope,) = torch.autograd.grad(fit.sum(), codes, retain_graph=True)  # f' at every node
    of_model = torch.autograd.grad((weights * fit).sum(), [p["weight"], p["log_noise"]])
    of_kl = torch.autograd.grad(
        kl(law, grid), [p["loc"], p["log_scale"], p["threshold"]], allow_unused=True
    )
    active = (codes != 0).to(slope)
    excess = codes.detach() - p["loc"].detach()
    noise = excess + excess.sign() * p["threshold"].detach()  # of an active code
    everywhere = torch.ones_like(active)
    passes = {
        "straight": (everywhere, 0 * active),
        "released": (everywhere + active, active),
        "sub": (active, active),
    }
    of_loc, of_threshold = passes[form]
    mean = lambda values: (weights.unsqueeze(-1) * values).sum(0)  # noqa: E731
    fits = {
        "loc": mean(of_loc * slope),
        # Noise of an inactive code has mean zero, so it adds none where f' is that at zero.
        "log_scale": mean(active * noise * slope),
        "threshold": mean(-of_threshold * noise.sign() * slope),
    }
    found = dict(zip(["weight", "log_noise"], of_model, strict=True))
    for (key, fit_slope), kl_slope in zip(fits.items(), of_kl, strict=True):
        found[key] = fit_slope - kl_slope
    return found


PUBLISHED = {
    "straight": StraightThrough(),
    "released": StraightThrough(as_released=True),
    "sub": SubGradient(),
}


@pytest.mark.parametrize("form", PUBLISHED)
def test_published_estimators_have_their_own_mean_and_it_is_not_the_gradient(form: str) -> None:
    value, exact = exact_gradient("shifted_laplace")
    mean, slopes = estimates("shifted_laplace", PUBLISHED[form])
    assert deviations(slopes, predicted("shifted_laplace", form)).abs().max() < 4
    assert abs(float(mean) - value) < 0.02
    # The decoder's gradient is right, that of the posterior is not, by tens of standard errors.
    decoder = {name: slopes[name] for name in ("weight", "log_noise")}
    assert deviations(decoder, exact).abs().max() < 4
    assert deviations({"log_scale": slopes["log_scale"]}, exact).abs().max() > 20


def relative_bias(form: str, name: str) -> float:
    _, exact = exact_gradient("shifted_laplace")
    wrong = predicted("shifted_laplace", form)
    return float((wrong[name] - exact[name]).norm() / exact[name].norm())


def test_how_far_the_published_means_are_off() -> None:
    assert relative_bias("sub", "loc") < 1e-4  # the map jumps, but not with the location
    assert relative_bias("straight", "loc") > 0.3
    assert relative_bias("released", "loc") > 1
    for form in PUBLISHED:
        assert relative_bias(form, "log_scale") > 0.3
        assert relative_bias(form, "threshold") > 0.2


def one_draw(estimator: Estimator) -> tuple[Tensor, ...]:
    """A draw, and its derivatives by location, scale and threshold, code by code."""
    loc = torch.linspace(-1, 1, 400, dtype=torch.float64).requires_grad_()
    scale = torch.full_like(loc, 0.4).requires_grad_()
    threshold = torch.full_like(loc, 0.3).requires_grad_()
    base = dist.Laplace(loc, scale)
    torch.manual_seed(1)
    value = estimator.draw(ShiftedThresholded(base, threshold), ()).value
    torch.manual_seed(1)
    noise = (base.rsample() - loc).detach()
    found = torch.autograd.grad(value.sum(), [loc, scale, threshold], allow_unused=True)
    slopes = [torch.zeros_like(loc) if slope is None else slope for slope in found]
    assert 20 < (value != 0).sum() < 380
    return (value.detach(), noise, *slopes)


def test_derivatives_of_published_draws() -> None:
    value, noise, by_loc, by_scale, by_threshold = one_draw(StraightThrough())
    active = (noise.abs() > 0.3).double()
    shrunk = noise.sign() * (noise.abs() - 0.3)
    loc = torch.linspace(-1, 1, 400, dtype=torch.float64)
    torch.testing.assert_close(value, active * (loc + shrunk))
    assert torch.equal(value == 0, active == 0)
    torch.testing.assert_close(by_loc, torch.ones_like(loc))
    torch.testing.assert_close(by_scale, noise / 0.4)
    torch.testing.assert_close(by_threshold, torch.zeros_like(loc))

    released, _, by_loc, by_scale, by_threshold = one_draw(StraightThrough(as_released=True))
    torch.testing.assert_close(released, value)
    assert torch.equal(released == 0, active == 0)
    torch.testing.assert_close(by_loc, 1 + active)
    torch.testing.assert_close(by_scale, noise / 0.4)
    torch.testing.assert_close(by_threshold, -noise.sign() * active)

    sub, _, by_loc, by_scale, by_threshold = one_draw(SubGradient())
    torch.testing.assert_close(sub, value)
    torch.testing.assert_close(by_loc, active)
    torch.testing.assert_close(by_scale, active * noise / 0.4)
    torch.testing.assert_close(by_threshold, -noise.sign() * active)


@pytest.mark.parametrize("kind", [StraightThrough, SubGradient])
def test_the_noise_of_published_draws_warms_up(kind: type) -> None:
    ramp = Scheduled(LinearRamp(0.0, 1.0, num_steps=2))
    estimator = kind(noise=ramp)
    value, *_ = one_draw_or_none(estimator)
    assert not value.any()  # no noise passes no threshold
    ramp.advance_()
    value, noise = one_draw_or_none(estimator)
    assert torch.equal(value != 0, (noise / 2).abs() > 0.3)
    ramp.advance_()
    value, noise = one_draw_or_none(estimator)
    assert torch.equal(value != 0, noise.abs() > 0.3)


def one_draw_or_none(estimator: Estimator) -> tuple[Tensor, Tensor]:
    base = dist.Laplace(torch.linspace(-1, 1, 400, dtype=torch.float64), 0.4)
    torch.manual_seed(1)
    value = estimator.draw(ShiftedThresholded(base, 0.3), ()).value
    torch.manual_seed(1)
    return value, base.rsample() - base.loc


def test_concrete_gates_open_as_often_as_the_law_says() -> None:
    law = SpikeAndSlab(dist.Laplace(torch.zeros(DRAWS), 1.0), probs=0.9)
    value = Concrete(0.5).draw(law, ()).value
    # The published gate, of log g in place of the log-odds, would open for 47 % of the codes.
    assert abs((value != 0).double().mean() - 0.9) < 4 * math.sqrt(0.09 / DRAWS)


@pytest.mark.parametrize("hard", [True, False])
def test_concrete_is_biased_and_the_less_the_colder(hard: bool) -> None:
    _, exact = exact_gradient("spike_laplace")
    errors = []
    for temperature in (2.0, 0.2):
        estimator = Concrete(temperature, hard=hard)
        _, slopes = estimates("spike_laplace", estimator, draws=FEWER)
        errors.append((slopes["logits"].mean(0) - exact["logits"]).norm())
    noise = slopes["logits"].std(0).norm() / math.sqrt(FEWER)
    assert errors[0] > 10 * noise
    assert errors[1] < errors[0] - 4 * noise


# Refusals, and what estimators say of themselves


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ImplicitMixed(-1), ValueError, r"limit >= 0"),
        (lambda: ImplicitMixed(True), TypeError, r"limit to be a number"),
        (lambda: ImplicitMixed(math.nan), ValueError, r"limit >= 0"),
        (lambda: LocalExpectation(0), ValueError, r"chunk >= 1"),
        (lambda: LocalExpectation(1.5), TypeError, r"chunk to be a whole number"),
        (lambda: Concrete(0.0), ValueError, r"temperature in \(0"),
        (lambda: StraightThrough(noise=-1.0), ValueError, r"noise in \[0"),
        (lambda: SubGradient(noise="1"), TypeError, r"noise to be a real number"),
        (lambda: SparseELBO(DisARM(), num_samples=3), ValueError, r"even number of draws"),
    ],
    ids=range(9),
)
def test_bad_arguments_are_refused(make: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()  # type: ignore[operator]


def test_straight_through_needs_a_threshold() -> None:
    with pytest.raises(NotImplementedError, match=r"made by a threshold.*Concrete\(hard=True\)"):
        estimates("spike_laplace", StraightThrough(), draws=10)


class OwnLaw(Mixed):
    """A mixed law of a user, without an ``expand``."""

    arg_constraints = {}

    def __init__(self, logits: Tensor, slab: dist.Distribution) -> None:
        self.logits, self.slab = logits, slab
        super().__init__(logits.shape, validate_args=False)


@pytest.mark.parametrize("estimator", [ImplicitMixed(), LocalExpectation()], ids=repr)
def test_a_law_without_expand_is_drawn_anew_for_every_datum(estimator: Estimator) -> None:
    law = OwnLaw(torch.zeros(2), dist.Normal(torch.zeros(2), 1.0)).to_event(1).expand([50])
    value = estimator.draw(law, (3, 1)).value
    assert value.shape == (3, 1, 50, 2)
    assert len(value[value != 0].unique()) == (value != 0).sum()


def test_a_slab_that_does_not_reach_zero_takes_a_score_function() -> None:
    logits = torch.zeros(4, requires_grad=True)
    away = SpikeAndSlab(dist.Uniform(torch.ones(4), 2.0), logits=logits)
    for law in (away, HardThresholded(dist.Normal(logits, 1.0), 0.5)):
        draw = ImplicitMixed(limit=math.inf).draw(law, (5,))
        assert draw.log_gates is not None
        assert draw.log_gates.requires_grad


def test_no_baseline_is_evaluated_where_no_gate_needs_one() -> None:
    calls = []

    def model() -> None:
        calls.append(1)
        with pyro.plate("data", 2):
            z = pyro.sample("codes", SpikeAndSlab(dist.Normal(0.0, 1.0), 0.5))
            pyro.sample("obs", dist.Normal(z.tanh(), 1.0), obs=torch.ones(2))

    loc, logits = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)

    def guide() -> None:
        with pyro.plate("data", 2):
            pyro.sample("codes", SpikeAndSlab(dist.Normal(loc, 1.0), logits=logits))

    elbo = SparseELBO(ImplicitMixed(), num_plates=1)
    elbo.differentiable_loss(model, guide)
    assert len(calls) == 1
    loc.data.fill_(9.0)
    elbo.differentiable_loss(model, guide)
    assert len(calls) == 3
    elbo.loss(model, guide)  # without a gradient there is nothing to correct
    assert len(calls) == 4
