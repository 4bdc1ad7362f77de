"""Families of data given a predictor: one small class each."""

from pyro_sparse.likelihoods.base import Likelihood
from pyro_sparse.likelihoods.binomial import Bernoulli, Binomial
from pyro_sparse.likelihoods.data import check_data, check_mask
from pyro_sparse.likelihoods.gamma import Exponential, Gamma
from pyro_sparse.likelihoods.gaussian import Gaussian
from pyro_sparse.likelihoods.negative_binomial import NegativeBinomial
from pyro_sparse.likelihoods.poisson import Poisson
from pyro_sparse.likelihoods.wrappers import Offset, Stabilised

__all__ = [
    "Bernoulli",
    "Binomial",
    "Exponential",
    "Gamma",
    "Gaussian",
    "Likelihood",
    "NegativeBinomial",
    "Offset",
    "Poisson",
    "Stabilised",
    "check_data",
    "check_mask",
]
