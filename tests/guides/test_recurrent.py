"""A free recurrence in an unrolled encoder: where it starts, what it may become."""

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_sparse.dictionaries import Conv, Dense
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.infer import Differentiated, SparseELBO, load, save
from pyro_sparse.likelihoods import Gaussian, Poisson
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import ISTA, Detached, Proximal, Truncated, solve

RATE = 0.4
SCALES = {"one scale": torch.tensor(0.5), "one for each feature": torch.tensor([0.3, 0.5, 0.9, 2])}
PRIORS = {"non-negative": dist.Exponential(RATE), "two-sided": dist.Laplace(0.0, 1 / RATE)}


def make(
    scale: Tensor = SCALES["one scale"], prior: object = PRIORS["non-negative"], **options: object
) -> tuple[Dense, Gaussian, UnrolledFISTA, Tensor]:
    torch.manual_seed(3)
    atoms = torch.randn(6, 4, dtype=torch.float64)
    dictionary = Dense(6, 4, atoms=atoms, unit_norm=False)
    likelihood = Gaussian(scale.double())
    guide = UnrolledFISTA.recurrent(dictionary, likelihood, prior, **options)
    return dictionary, likelihood, guide, torch.randn(50, 4, dtype=torch.float64)


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
@pytest.mark.parametrize("num_steps", [1, 2, 11])
def test_it_starts_as_ista(scale: Tensor, prior: object, num_steps: int) -> None:
    dictionary, likelihood, guide, y = make(scale, prior, num_steps=num_steps)
    options = {"num_steps": num_steps, "method": ISTA(), "shrinkage": Proximal()}
    ista = UnrolledFISTA(dictionary, likelihood, prior, **options)
    codes = guide.encode(y)
    torch.testing.assert_close(codes, ista.encode(y), rtol=0, atol=1e-10)
    assert (codes == 0).any() and (codes > 0).any()
    assert bool((codes >= 0).all()) == (prior is PRIORS["non-negative"])


def test_many_layers_reach_the_map_codes() -> None:
    dictionary, likelihood, guide, y = make(num_steps=3000)
    solution = solve(y, dictionary, PRIORS["non-negative"], likelihood=likelihood, tol=1e-10)
    torch.testing.assert_close(guide.encode(y).detach(), solution.codes, rtol=0, atol=1e-4)


def test_it_is_the_published_network_whatever_its_weights() -> None:
    _, _, guide, y = make(num_steps=7)
    encoder = guide.encoder
    parts = (encoder.analysis.atoms, encoder.recurrence.weight, encoder.shrinkage.bias)
    with torch.no_grad():
        for part in parts:
            part.add_(0.1 * torch.randn_like(part))
    drive, recurrence, bias = (part.detach() for part in parts)
    z = torch.zeros(len(y), 6, dtype=torch.float64)
    for _ in range(7):
        value = torch.einsum("kd,nd->nk", drive, y) + torch.einsum("kj,nj->nk", recurrence, z)
        z = torch.relu(value - bias)
    torch.testing.assert_close(guide.encode(y).detach(), z, rtol=0, atol=1e-10)


def test_all_weights_get_gradients_and_none_when_detached() -> None:
    dictionary, likelihood, guide, y = make()
    model = SparseCoding(dictionary, likelihood, PRIORS["non-negative"])
    encoder = guide.encoder
    own = [encoder.analysis.atoms, encoder.recurrence.weight, encoder.shrinkage.bias]
    found = torch.autograd.grad(SparseELBO()(model, guide)(y), own)
    assert all((gradient != 0).any() for gradient in found)
    detached = Differentiated(SparseELBO(), Detached())(model, guide)(y)
    assert torch.autograd.grad(detached, own, allow_unused=True) == (None, None, None)
    whole = Differentiated(SparseELBO(), Truncated(11))(model, guide)(y)
    for gradient, expected in zip(torch.autograd.grad(whole, own), found):
        torch.testing.assert_close(gradient, expected)


def test_what_is_masked_is_taken_as_zero() -> None:
    _, _, guide, y = make()
    mask = torch.rand(y.shape) < 0.5
    hidden = guide.encode(torch.where(mask, y, torch.nan), mask)
    assert torch.equal(hidden, guide.encode(torch.where(mask, y, 0.0)))


def test_a_rate_gives_the_start_of_the_bias() -> None:
    dictionary, likelihood, guide, y = make(step_size=0.01)
    rated = UnrolledFISTA.recurrent(
        dictionary, likelihood, dist.Exponential, rate=RATE, step_size=0.01
    )
    torch.testing.assert_close(rated.encode(y), guide.encode(y), rtol=1e-6, atol=1e-7)


def test_it_comes_back_from_a_file(tmp_path) -> None:
    *_, guide, y = make()
    with torch.no_grad():
        guide.encoder.recurrence.weight.mul_(0.9)
    save(tmp_path / "guide", guide=guide)
    back = load(tmp_path / "guide")["guide"]
    assert torch.equal(back.encode(y), guide.encode(y))


def test_what_cannot_start_is_refused() -> None:
    prior = PRIORS["non-negative"]
    with pytest.raises(ValueError, match="linear score, such as Gaussian"):
        UnrolledFISTA.recurrent(Dense(6, 4), Poisson(), prior, step_size=0.1)
    with pytest.raises(ValueError, match=r"dense dictionary.*got \(3, 2, 4\)"):
        UnrolledFISTA.recurrent(Conv(3, 2, 4), Gaussian(1.0), prior)
    with pytest.raises(TypeError, match="recurrence to be a Module, got 3"):
        UnrolledFISTA(Dense(6, 4), Gaussian(1.0), prior, recurrence=3)
    assert isinstance(make()[2].encoder.recurrence, nn.Linear)
