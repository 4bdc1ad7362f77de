"""DCEA on simulated data, at a size for tests."""

import pytest
import torch

from benchmarks import dcea_simulated as simulated
from pyro_sparse.likelihoods import Binomial, Offset


@pytest.mark.parametrize("distance", [0.1, 0.8, 1.3])
def test_starts_are_at_their_distance(distance: float) -> None:
    truth = torch.nn.functional.normalize(torch.randn(7, 1, 30), dim=-1)
    start = simulated.start_at(distance, truth)
    torch.testing.assert_close((start - truth).norm(dim=-1), torch.full((7, 1), distance))
    torch.testing.assert_close(start.norm(dim=-1), torch.ones(7, 1))


def test_families_carry_equal_information() -> None:
    for make in simulated.FAMILIES.values():
        likelihood = make()
        predictor = torch.zeros((), requires_grad=True)
        score = likelihood.residual(predictor, torch.tensor(3.0))
        (slope,) = torch.autograd.grad(score, predictor)
        assert float(-slope) == pytest.approx(simulated.INFORMATION, rel=1e-5)


def test_a_near_start_contracts_and_a_far_one_does_not() -> None:
    near = simulated.contraction("Gaussian", 0.8, 60, 0)
    far = simulated.contraction("Gaussian", 1.3, 60, 0)
    assert near[-1] < 0.75 * near[0]
    assert far[-1] > 0.97 * far[0]


def test_the_tied_binomial_net_learns_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated, "DEPTH", 30)
    monkeypatch.setattr(simulated, "SAMPLES", 200)
    truth = simulated.templates()
    y = simulated.counts(truth, Offset(Binomial(30), simulated.BASELINE), 40)
    start = simulated.start_at(0.4, truth)
    atoms, events = simulated.learn("tied", 2.0, y, start, 2, 0)
    before, after = (sum(simulated.template_errors(a, truth)) for a in (start, atoms))
    assert after < 0.95 * before
    assert 2 < events < 40
