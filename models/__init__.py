"""Generative programs."""

from pyro_sparse.models.deep import DeepSparseCoding
from pyro_sparse.models.discriminative import DiscriminativeSparseCoding
from pyro_sparse.models.sparse_coding import SparseCoding

__all__ = ["DeepSparseCoding", "DiscriminativeSparseCoding", "SparseCoding"]
