"""Objectives and training."""

from pyro_sparse.infer.fit import History, fit

__all__ = ["History", "fit"]
