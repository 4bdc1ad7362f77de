"""Is the dictionary right, and is the posterior?"""

from pyro_sparse.diagnostics.recovery import Recovery, match_atoms

__all__ = ["Recovery", "match_atoms"]
