"""The exact ELBO against the log-evidence, by enumeration of every support."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_sparse.dictionaries import Dense
from pyro_sparse.distributions import SpikeAndSlab
from pyro_sparse.infer import BestOf, Importance, Mean, Renyi, SparseELBO, enumerate_posterior
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import coordinate_ascent

SIZES = [(1, 1, 3), (3, 2, 2), (5, 4, 1), (8, 6, 2)]  # atoms, features, data


def problem(seed: int) -> tuple[SparseCoding, Tensor]:
    torch.manual_seed(seed)
    atoms, features, count = SIZES[seed % len(SIZES)]
    slab = dist.Normal(torch.zeros(atoms).double(), torch.rand(atoms).double() + 0.3)
    prior = SpikeAndSlab(slab, torch.rand(atoms).double() * 0.8 + 0.1)
    scale = float(torch.rand(()) + 0.1)
    dictionary = Dense(atoms, features, atoms=torch.randn(atoms, features).double())
    model = SparseCoding(dictionary, Gaussian(torch.tensor(scale).double()), prior)
    with torch.no_grad():
        return model, model(num_data=count)


class Fixed:
    """A guide with a given law."""

    def __init__(self, law: pyro.distributions.TorchDistribution) -> None:
        self.law = law

    def __call__(self, y: Tensor, num_data: int | None = None, mask: Tensor | None = None) -> None:
        with pyro.plate("data", num_data or len(y), subsample=torch.arange(len(y))):
            pyro.sample("codes", self.law)


def evidence(model: SparseCoding, y: Tensor, mask: Tensor | None = None) -> Tensor:
    exact = enumerate_posterior(y, model.dictionary, model.prior, model.likelihood, mask=mask)
    return exact.log_evidence


def random_law(y: Tensor, atoms: int) -> pyro.distributions.TorchDistribution:
    shape = (len(y), atoms)
    slab = dist.Normal(torch.randn(shape).double(), torch.rand(shape).double() + 0.05)
    return SpikeAndSlab(slab, logits=2 * torch.randn(shape).double()).to_event(1)


def elbo(model: SparseCoding, law: pyro.distributions.TorchDistribution, y: Tensor, **kw) -> float:
    objective = SparseELBO()
    value = -objective.loss(model, Fixed(law), y, **kw)
    assert objective.choice(model) == "Exact()"
    return value


def test_the_elbo_is_below_the_log_evidence_in_200_random_problems() -> None:
    gaps = []
    for seed in range(200):
        model, y = problem(seed)
        law = random_law(y, model.dictionary.num_atoms)
        gaps.append(float(evidence(model, y).sum()) - elbo(model, law, y))
    assert min(gaps) > 0  # a random law is never the posterior


@pytest.mark.parametrize("masked", [False, True])
def test_the_elbo_of_coordinate_ascent_is_below_the_log_evidence_and_its_own(masked: bool) -> None:
    for seed in range(40):
        model, y = problem(seed)
        mask = torch.rand(y.shape) < 0.7 if masked else None
        found = coordinate_ascent(
            y, model.dictionary, model.prior, model.likelihood, mask=mask, tol=1e-12
        )
        value = elbo(model, found.law, y, mask=mask)
        assert value == pytest.approx(float(found.elbo.sum()), abs=1e-8)
        assert value <= float(evidence(model, y, mask).sum()) + 1e-9


@pytest.mark.parametrize("seed", range(10))
def test_the_elbo_of_the_exact_posterior_is_the_log_evidence(seed: int) -> None:
    # With orthonormal atoms the posterior factorises, so the best factorised law is the posterior.
    torch.manual_seed(seed)
    atoms = torch.linalg.qr(torch.randn(6, 6).double())[0]
    prior = SpikeAndSlab(dist.Normal(torch.zeros(6).double(), 1.0), 0.3)
    model = SparseCoding(Dense(6, 6, atoms=atoms), Gaussian(torch.tensor(0.4).double()), prior)
    with torch.no_grad():
        y = model(num_data=4)
    law = coordinate_ascent(y, model.dictionary, prior, model.likelihood, tol=1e-14).law
    assert elbo(model, law, y) == pytest.approx(float(evidence(model, y).sum()), abs=1e-8)


@pytest.mark.parametrize(
    "bound",
    [Mean(sampled_kl=True), BestOf(), Importance(), Renyi(0.5), Renyi(-1.0)],
    ids=["mean", "best", "importance", "renyi", "renyi below zero"],
)
@pytest.mark.parametrize("seed", range(3))
def test_every_bound_of_the_exact_posterior_is_the_log_evidence(seed: int, bound: object) -> None:
    # All log-weights are equal, whatever is drawn, so no bound has a variance.
    model, y = problem(seed)
    exact = enumerate_posterior(y, model.dictionary, model.prior, model.likelihood)
    objective = SparseELBO(bound=bound, num_samples=5)  # type: ignore[arg-type]
    value = -objective.loss(model, Fixed(exact), y)
    shift = len(y) * math.log(5) if isinstance(bound, BestOf) else 0.0
    assert value + shift == pytest.approx(float(exact.log_evidence.sum()), abs=1e-8)


def test_the_exact_estimator_has_no_variance_and_is_the_mean_of_draws() -> None:
    model, y = problem(3)
    law = random_law(y, model.dictionary.num_atoms)
    values = {elbo(model, law, y) for _ in range(5)}
    assert len(values) == 1
    draws = []
    for _ in range(200):
        objective = SparseELBO(num_samples=50, bound=Mean(sampled_kl=True))
        draws.append(-objective.loss(model, Fixed(law), y))
    spread = torch.tensor(draws)
    error = spread.std() / len(draws) ** 0.5
    assert abs(spread.mean() - values.pop()) < 4 * error
