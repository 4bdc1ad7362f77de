"""What came out of a training: recovered atoms, weights of a posterior, groups for ArviZ."""

from pyro_sparse.diagnostics.datatree import GROUPS, to_datatree
from pyro_sparse.diagnostics.khat import LOO, khat, loo, psis
from pyro_sparse.diagnostics.recovery import Recovery, match_atoms

__all__ = ["GROUPS", "LOO", "Recovery", "khat", "loo", "match_atoms", "psis", "to_datatree"]
