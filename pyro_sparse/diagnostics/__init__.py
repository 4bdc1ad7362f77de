"""What came out of a training: recovered atoms, weights of a posterior, groups for ArviZ."""

from pyro_sparse.diagnostics.calibration import Calibration, Coverage, Reliability, reliability
from pyro_sparse.diagnostics.datatree import GROUPS, to_datatree
from pyro_sparse.diagnostics.khat import LOO, khat, loo, psis
from pyro_sparse.diagnostics.recovery import Recovery, match_atoms
from pyro_sparse.diagnostics.representer import Contributors, Representer, Stationarity
from pyro_sparse.diagnostics.representer_plot import plot_representer
from pyro_sparse.diagnostics.sbc import SBC, sbc
from pyro_sparse.diagnostics.uniformity import Band, uniform_band, uniform_p_value

__all__ = [
    "GROUPS",
    "LOO",
    "SBC",
    "Band",
    "Calibration",
    "Contributors",
    "Coverage",
    "Recovery",
    "Reliability",
    "Representer",
    "Stationarity",
    "khat",
    "loo",
    "match_atoms",
    "plot_representer",
    "psis",
    "reliability",
    "sbc",
    "to_datatree",
    "uniform_band",
    "uniform_p_value",
]
