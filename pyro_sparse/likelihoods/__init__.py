"""Families of data given a predictor: one small class each."""

from pyro_sparse.likelihoods.base import Likelihood
from pyro_sparse.likelihoods.data import check_data, check_mask
from pyro_sparse.likelihoods.gaussian import Gaussian

__all__ = ["Gaussian", "Likelihood", "check_data", "check_mask"]
