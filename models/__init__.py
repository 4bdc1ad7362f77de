"""Generative programs."""

from pyro_sparse.models.sparse_coding import SparseCoding

__all__ = ["SparseCoding"]
