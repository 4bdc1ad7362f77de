"""Batteries of checks for models, guides and parts of your own: one call, readable advice."""

from pyro_sparse.testing.advice import Advice, Finding
from pyro_sparse.testing.dictionaries import check_dictionary
from pyro_sparse.testing.likelihoods import check_likelihood
from pyro_sparse.testing.priors import check_prior
from pyro_sparse.testing.programs import check_guide, check_model

__all__ = [
    "Advice",
    "Finding",
    "check_dictionary",
    "check_guide",
    "check_likelihood",
    "check_model",
    "check_prior",
]
