"""Planted dictionaries come back: the library's own pair, trained by ``fit`` and nothing else."""

import functools

import pyro.distributions as dist
import pytest
import torch
from torch import Generator, Tensor

from pyro_sparse.diagnostics import match_atoms
from pyro_sparse.dictionaries import Conv, Dense, Dictionary
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.infer import fit
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding

SEEDS = range(5)
NOISE = 0.01


def amplitudes(active: Tensor, generator: Generator) -> Tensor:
    """Codes of size 1 to 2 and random sign where active, else zero."""
    size = 1 + torch.rand(active.shape, generator=generator)
    sign = torch.where(torch.rand(active.shape, generator=generator) < 0.5, -1.0, 1.0)
    return active * size * sign


def train(
    dictionary: Dictionary, y: Tensor, *, scale: float, steps: int, lr: float, **options: int
) -> Tensor:
    """Atoms learned from the data alone."""
    # The likelihood's sd is above that of the noise: it stands for what a few layers leave over.
    likelihood, prior = Gaussian(0.1), dist.Laplace(0.0, scale)
    model = SparseCoding(dictionary, likelihood, prior)
    guide = UnrolledFISTA(dictionary, likelihood, prior, num_steps=steps)
    optimizer = functools.partial(torch.optim.Adam, lr=lr)
    fit(model, guide, y, optimizer=optimizer, progress=False, **options)
    return dictionary.atoms


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_dense_dictionary_comes_back(seed: int) -> None:
    """50 features, 100 atoms, 4 of them active in each of 5000 data; from data rows."""
    generator = Generator().manual_seed(seed)
    truth = torch.nn.functional.normalize(torch.randn(100, 50, generator=generator))
    active = torch.rand(5000, 100, generator=generator).argsort(1) < 4
    y = amplitudes(active, generator) @ truth
    y = y + NOISE * torch.randn(y.shape, generator=generator)
    start = y[torch.randperm(len(y), generator=generator)[:100]]
    assert match_atoms(start, truth).correlation.mean() < 0.7

    dictionary = Dense(100, 50, atoms=start)
    atoms = train(dictionary, y, scale=0.2, steps=30, lr=0.01, epochs=15, batch_size=250, seed=seed)
    assert match_atoms(atoms, truth).correlation.mean() >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_convolutional_dictionary_comes_back(seed: int) -> None:
    """3 atoms of 21 samples, 5 of them in each of 60 signals; from noise in a wider window.

    The window (31) leaves room to slide, and the noise fades towards its ends so that atoms form
    near the middle: one that forms at an end is cut off there.
    """
    generator = Generator().manual_seed(seed)
    taper = torch.hann_window(23, periodic=False)[1:-1]
    truth = torch.randn(3, 1, 21, generator=generator) * taper
    planted = Conv(3, 1, 21, atoms=truth)
    active = torch.rand(60, *planted.code_shape((1, 128)), generator=generator) < 0.015
    with torch.no_grad():
        y = planted(amplitudes(active, generator))
    y = y + NOISE * torch.randn(y.shape, generator=generator)
    taper = torch.hann_window(33, periodic=False)[1:-1].square()
    start = torch.randn(3, 1, 31, generator=generator) * taper
    assert match_atoms(start, truth).correlation.mean() < 0.8

    dictionary = Conv(3, 1, 31, atoms=start)
    atoms = train(dictionary, y, scale=0.1, steps=15, lr=0.03, epochs=40, batch_size=6, seed=seed)
    assert match_atoms(atoms, truth).correlation.mean() >= 0.99
