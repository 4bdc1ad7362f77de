"""What came out of a training: recovered atoms, weights of a posterior, groups for ArviZ."""

from pyro_sparse.diagnostics.datatree import GROUPS, to_datatree
from pyro_sparse.diagnostics.khat import LOO, khat, loo, psis
from pyro_sparse.diagnostics.recovery import Recovery, match_atoms
from pyro_sparse.diagnostics.representer import Contributors, Representer, Stationarity
from pyro_sparse.diagnostics.representer_plot import plot_representer

__all__ = [
    "GROUPS",
    "LOO",
    "Contributors",
    "Recovery",
    "Representer",
    "Stationarity",
    "khat",
    "loo",
    "match_atoms",
    "plot_representer",
    "psis",
    "to_datatree",
]
