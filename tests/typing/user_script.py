"""A user's script: ``make types`` runs it, and mypy --strict reads it, against the built wheel."""

import pyro.distributions as dist
import torch

from pyro_sparse import infer
from pyro_sparse.dictionaries import Dense
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding


def main() -> None:
    data = torch.randn(20, 8)
    dictionary = Dense(16, 8)
    likelihood = Gaussian(0.1)
    prior = dist.Laplace(0.0, 0.1)
    model = SparseCoding(dictionary, likelihood, prior)
    guide = UnrolledFISTA(dictionary, likelihood, prior, num_steps=15)
    infer.fit(model, guide, data, epochs=1, batch_size=10, seed=0)
    atoms: torch.Tensor = dictionary.atoms
    print(f"trained {tuple(atoms.shape)} atoms")


if __name__ == "__main__":
    main()
