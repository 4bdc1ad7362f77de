"""check_model and check_guide: they pass what is right and name what is planted."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_sparse import dictionaries, distributions, guides, likelihoods, models
from pyro_sparse.testing import check_guide, check_model

Y = torch.linspace(-1.0, 1.0, 20).reshape(4, 5)
MASK = torch.arange(20).reshape(4, 5) % 3 > 0


def parts() -> tuple[Any, Any, Any]:
    prior = dist.Laplace(0.0, 1.0)
    return dictionaries.Dense(8, 5), likelihoods.Gaussian(0.1), prior


def unrolled() -> tuple[nn.Module, nn.Module]:
    ours = parts()
    return models.SparseCoding(*ours), guides.UnrolledFISTA(*ours)


def thresholded() -> tuple[nn.Module, nn.Module]:
    dictionary, likelihood, _ = parts()
    prior = distributions.SpikeAndSlab(dist.Normal(0.0, 1.0), probs=torch.tensor(0.2))
    encoder = guides.Heads(nn.Linear(5, 16), 16, code_shape=8)
    return models.SparseCoding(dictionary, likelihood, prior), guides.Thresholded(
        encoder, guides.SpikeAndSlabPosterior()
    )


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
@pytest.mark.parametrize("pair", [unrolled, thresholded])
def test_the_librarys_programs_pass(
    pair: Callable[[], tuple[nn.Module, nn.Module]], mask: Tensor | None
) -> None:
    model, guide = pair()
    for advice in (check_model(model, Y, mask=mask), check_guide(guide, model, Y, mask=mask)):
        advice.raise_if_failed()


def test_nothing_is_left_behind() -> None:
    model, guide = unrolled()
    before = torch.get_rng_state(), {n: p.clone() for n, p in model.state_dict().items()}
    check_guide(guide, model, Y)
    check_model(model, Y)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert not list(pyro.get_param_store())
    assert all(torch.equal(p, before[1][n]) for n, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


class Model(nn.Module):
    """A program of Pyro primitives, with a fault."""

    def __init__(self, fault: str = "none") -> None:
        super().__init__()
        self.fault = fault
        self.atoms = nn.Parameter(torch.linspace(-1, 1, 15).reshape(3, 5))
        if fault == "gradients":
            self.unused = nn.Parameter(torch.ones(()))

    def forward(
        self, y: Tensor | None, num_data: int | None = None, mask: Tensor | None = None
    ) -> Tensor:
        size = 4 if y is None else len(y)
        total = size if self.fault == "subsample scale" else num_data or size
        with pyro.plate("data", total, subsample=torch.arange(size)):
            prior = dist.Laplace(0.0, 1.0).expand([3]).to_event(1)
            codes = pyro.sample("codes", prior)
            mean = codes @ self.atoms
            if self.fault == "data apart":
                mean = mean - mean.mean(0)
            scale = -1.0 if self.fault == "runs" else 0.5
            law = dist.Normal(mean, scale)
            if y is not None and mask is not None:
                y = torch.where(mask, y, y if self.fault == "mask" else 0.0)
                law = law.mask(mask)
            if self.fault == "plates":
                return pyro.sample("obs", law.to_event(1), obs=y).sum()
            return pyro.sample("obs", law.to_event(1), obs=y)


class Guide(nn.Module):
    """Its guide, with a fault."""

    def __init__(self, fault: str = "none") -> None:
        super().__init__()
        self.fault = fault
        self.layer = nn.Linear(5, 2 if fault == "sites" else 3)
        if fault == "gradients":
            self.unused = nn.Parameter(torch.ones(()))

    def forward(self, y: Tensor, num_data: int | None = None, mask: Tensor | None = None) -> Tensor:
        if mask is not None and self.fault != "mask":
            y = torch.where(mask, y, 0.0)
        if self.fault == "data apart":
            y = y - y.mean(0)
        with pyro.plate("data", num_data or len(y), subsample=torch.arange(len(y))):
            loc = self.layer(y)
            if self.fault == "objective":
                loc = loc * torch.inf
            return pyro.sample("codes", dist.Normal(loc, 0.1, validate_args=False).to_event(1))


def test_a_plain_program_passes() -> None:
    model, guide = Model(), Guide()
    for advice in (check_model(model, Y, mask=MASK), check_guide(guide, model, Y, mask=MASK)):
        advice.raise_if_failed()


@pytest.mark.parametrize("fault", ["subsample scale", "data apart", "runs", "mask", "gradients"])
def test_a_planted_fault_of_a_model_is_named(fault: str) -> None:
    advice = check_model(Model(fault), Y, mask=MASK)
    assert fault in advice.failed, str(advice)


@pytest.mark.parametrize("fault", ["sites", "data apart", "mask", "objective", "gradients"])
def test_a_planted_fault_of_a_guide_is_named(fault: str) -> None:
    advice = check_guide(Guide(fault), Model(), Y, mask=MASK)
    assert fault in advice.failed, str(advice)


class Climbing(likelihoods.Gaussian):
    """A Gaussian with a residual of the wrong sign."""

    def residual(self, predictor: Tensor, y: Tensor) -> Tensor:
        return -super().residual(predictor, y)


def said(guide: Any, model: Any, check: str, y: Tensor = Y) -> Any:
    return next(f for f in check_guide(guide, model, y).findings if f.check == check)


def test_a_guide_that_climbs_away_from_the_data_is_named() -> None:
    dictionary, likelihood, prior = parts()
    model = models.SparseCoding(dictionary, likelihood, prior)
    wrong = guides.UnrolledFISTA(dictionary, Climbing(0.1), prior)
    assert check_guide(wrong, model, Y).failed == ("residual",)
    assert "less probable than zeros" in said(wrong, model, "against zeros").advice


@pytest.mark.parametrize(
    "likelihood",
    [
        likelihoods.Gaussian(0.1),
        likelihoods.Bernoulli(),
        likelihoods.Binomial(10),
        likelihoods.NegativeBinomial(3.0),
        likelihoods.Stabilised(likelihoods.Poisson(), 2.0),
        likelihoods.Stabilised(likelihoods.Gamma(2.0), 2.0),
    ],
    ids=lambda one: type(one).__name__,
)
def test_no_alarm_at_initialisation_of_an_unrolled_guide(likelihood: Any) -> None:
    dictionary, _, prior = parts()
    model = models.SparseCoding(dictionary, likelihood, prior)
    with torch.no_grad():
        y = model(num_data=6)
    made = guides.UnrolledFISTA(dictionary, likelihood, prior)
    for guide in (made, guides.AutoUnrolled(model, num_steps=5)):
        check_guide(guide, model, y).raise_if_failed()
        assert said(guide, model, "against zeros", y).ok is True


def test_an_encoder_that_is_not_trained_gets_advice_and_no_failure() -> None:
    model, guide = thresholded()
    found = said(guide, model, "against zeros")
    assert found.ok is None and "before an encoder is trained" in found.advice
    assert said(guide, model, "residual").advice == "It holds no likelihood."


def test_codes_that_cannot_be_zero_are_not_compared_with_zeros() -> None:
    def law() -> Any:
        return dist.LogNormal(0.0, 1.0).expand([3]).to_event(1)

    def program(y: Tensor, num_data: int | None = None) -> None:
        with pyro.plate("data", num_data or len(y), subsample=torch.arange(len(y))):
            codes = pyro.sample("codes", law())
            pyro.sample(
                "obs", dist.Normal(codes.sum(-1, True), 1.0).expand([len(y), 5]).to_event(1), obs=y
            )

    def guide(y: Tensor, num_data: int | None = None) -> None:
        with pyro.plate("data", num_data or len(y), subsample=torch.arange(len(y))):
            pyro.sample("codes", law())

    found = said(guide, program, "against zeros")
    assert found.ok is None and "no density" in found.advice


def test_an_observed_site_outside_a_plate_is_named() -> None:
    def model(y: Tensor, num_data: int | None = None) -> None:
        pyro.sample("obs", dist.Normal(torch.zeros(5), 1.0).to_event(1), obs=y)

    assert "plates" in check_model(model, Y).failed


def test_no_observed_site_is_named() -> None:
    def model(y: Tensor, num_data: int | None = None) -> None:
        pyro.sample("codes", dist.Normal(0.0, 1.0))

    assert "runs" in check_model(model, Y).failed


def test_a_dimension_outside_the_event_is_named() -> None:
    def model(y: Tensor, num_data: int | None = None) -> None:
        with pyro.plate("data", num_data or len(y), subsample=torch.arange(len(y)), dim=-2):
            with pyro.plate("samples", 5, dim=-1):
                pyro.sample("obs", dist.Normal(torch.zeros(len(y), 5), 1.0), obs=y)

    assert check_model(model, Y).ok, "a plate of its own for the samples is no fault"


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: check_model(3, Y), TypeError, "Expected model to be a program, got int"),
        (lambda: check_model(Model(), Y.long()), TypeError, "floating tensor of data"),
        (lambda: check_model(Model(), Y[:1]), ValueError, "at least two data, .* got 1"),
        (lambda: check_guide(3, Model(), Y), TypeError, "Expected guide to be a program"),
    ],
)
def test_bad_arguments(call: Callable[[], object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()
