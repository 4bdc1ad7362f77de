"""Planted dead, duplicate, shuffled and shifted atoms are found."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_sparse.diagnostics import align_atoms, dictionary_summary, stability
from pyro_sparse.infer import log_weights


def atoms_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_dead_and_duplicate_atoms_are_found() -> None:
    atoms = atoms_of(8, 20)
    atoms[5] = -3 * atoms[2]
    codes = atoms_of(500, 8, seed=1) * (torch.rand(500, 8) < 0.3)
    codes[:, 3] = 0
    codes[:, 5] *= 2
    found = dictionary_summary(atoms, codes)
    assert found.dead.nonzero().flatten().tolist() == [3]
    assert found.duplicates.tolist() == [[5, 2]]
    torch.testing.assert_close(found.usage, (codes != 0).double().mean(0))
    torch.testing.assert_close(found.num_active, (codes != 0).double().sum(1))
    assert float(found.energy.sum()) == pytest.approx(1)
    assert found.similarity[[2, 5]].min() > 1 - 1e-6
    assert found.similarity[[0, 1, 3, 4, 6, 7]].max() < 0.95
    assert "8 atoms, 1 dead, 1 pairs alike" in str(found)


@pytest.mark.parametrize("number", [1, 3, 8])
def test_equal_codes_and_atoms_count_one_each(number: int) -> None:
    codes = torch.zeros(16, 8)
    codes[:, :number] = 0.7
    found = dictionary_summary(torch.eye(8), codes)
    torch.testing.assert_close(found.effective_codes, torch.full((16,), number).double())
    assert found.effective_atoms == pytest.approx(number)


def test_probabilities_count_as_expected_numbers() -> None:
    prob = torch.rand(9, 4, 6)
    found = dictionary_summary(torch.randn(4, 1, 5), torch.randn(9, 4, 6), prob)
    torch.testing.assert_close(found.num_active, prob.double().sum((1, 2)))
    torch.testing.assert_close(found.usage, prob.double().mean((0, 2)))


def test_a_shifted_copy_of_a_convolutional_atom_is_a_duplicate() -> None:
    atoms = torch.zeros(3, 2, 9)
    atoms[0, :, :5] = atoms_of(2, 5)
    atoms[1, :, 3:8] = -atoms[0, :, :5]
    atoms[2] = atoms_of(2, 9, seed=3)
    found = dictionary_summary(atoms, torch.ones(2, 3, 4))
    assert sorted(found.duplicates.flatten().tolist()) == [0, 1]


def test_no_code_at_all_and_a_single_atom() -> None:
    found = dictionary_summary(torch.ones(1, 3), torch.zeros(2, 1))
    assert found.dead.all() and found.effective_codes.tolist() == [0, 0]
    assert found.similarity.tolist() == [0] and math.isfinite(found.effective_atoms)


def test_stability_counts_what_trainings_share() -> None:
    first, other = atoms_of(10, 30), atoms_of(10, 30, seed=1)
    second = torch.cat([-first[torch.randperm(8)], other[8:]])[torch.randperm(10)]
    found = stability([first, second, first])
    torch.testing.assert_close(found.found[0], torch.tensor([1.0, 0.8, 1.0], dtype=torch.float64))
    assert found.worst == pytest.approx(0.8)
    assert found.atom[:8].min() > 0.999 and found.atom[8:].max() < 0.9
    assert torch.equal(found.correlation, found.correlation.T)
    assert found.correlation[0, 2] == pytest.approx(1)


def test_draws_are_put_in_place_before_they_are_averaged() -> None:
    reference = torch.zeros(4, 2, 11)
    reference[:, :, 3:8] = atoms_of(4, 2, 5)
    draws = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(4, generator=generator)
        sign = torch.randint(2, (4, 1, 1), generator=generator) * 2 - 1
        shift = int(torch.randint(-3, 4, (), generator=generator))
        noise = 0.05 * torch.randn(reference.shape, generator=generator)
        inner = torch.zeros(11)
        inner[3:8] = 1
        draws.append((sign * (reference + noise * inner))[order].roll(shift, -1))
    found = align_atoms(torch.stack(draws), reference)
    torch.testing.assert_close(found.mean, reference, atol=0.06, rtol=0)
    assert found.correlation.min() > 0.95
    assert float(found.sd[:, :, 3:8].mean()) == pytest.approx(0.05, rel=0.2)


def test_two_kernel_dimensions_are_moved_alike() -> None:
    reference = torch.zeros(2, 1, 7, 8)
    reference[:, :, 2:5, 3:6] = atoms_of(2, 1, 3, 3)
    draw = -reference.roll((1, -2), (-2, -1)).flip(0)
    found = align_atoms(draw.unsqueeze(0), reference)
    torch.testing.assert_close(found.draws[0], reference)


def test_a_sampled_dictionary_has_a_posterior_over_atoms() -> None:
    truth = torch.eye(3) * 2

    def model(y: Tensor, num_data: int) -> None:
        atoms = pyro.sample("dictionary", dist.Normal(torch.zeros(3, 3), 2.0).to_event(2))
        with pyro.plate("data", len(y)):
            codes = pyro.sample("codes", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("obs", dist.Normal(codes @ atoms, 1.0).to_event(1), obs=y)

    def guide(y: Tensor, num_data: int) -> None:
        sign = 2.0 * torch.randint(2, (3, 1)) - 1  # either sign is as good
        pyro.sample("dictionary", dist.Normal(sign * truth, 0.1).to_event(2))
        with pyro.plate("data", len(y)):
            pyro.sample("codes", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    drawn = log_weights(model, guide, torch.zeros(5, 3), num_samples=60, vectorize=False).draws
    plain, aligned = drawn["dictionary"].mean(0), align_atoms(drawn["dictionary"], truth)
    assert float(plain.diagonal().abs().max()) < 1
    torch.testing.assert_close(aligned.mean, truth, atol=0.06, rtol=0)


def test_errors() -> None:
    atoms, codes = torch.eye(3), torch.ones(4, 3)
    with pytest.raises(ValueError, match="with 3 atoms"):
        dictionary_summary(atoms, codes[:, :2])
    with pytest.raises(ValueError, match="prob_active of the shape"):
        dictionary_summary(atoms, codes, codes[:2])
    with pytest.raises(ValueError, match="finite codes"):
        dictionary_summary(atoms, codes / 0)
    with pytest.raises(ValueError, match="alike"):
        dictionary_summary(atoms, codes, alike=1.2)
    with pytest.raises(TypeError, match="codes"):
        dictionary_summary(atoms, codes.tolist())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least two sets"):
        stability([atoms])
    with pytest.raises(ValueError, match="as many atoms"):
        stability([atoms, atoms[:2]])
    with pytest.raises(ValueError, match="num_samples"):
        align_atoms(atoms, atoms)
