"""Variational programs."""

from pyro_sparse.guides.unrolled import UnrolledFISTA

__all__ = ["UnrolledFISTA"]
