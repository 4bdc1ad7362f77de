"""What came out of a training: recovered atoms, weights of a posterior, groups for ArviZ."""

from pyro_sparse.diagnostics.amortisation import AmortisationGap, amortisation_gap
from pyro_sparse.diagnostics.calibration import Calibration, Coverage, Reliability, reliability
from pyro_sparse.diagnostics.code_plots import plot_codes, plot_events
from pyro_sparse.diagnostics.datatree import GROUPS, to_datatree
from pyro_sparse.diagnostics.dictionary import (
    AtomPosterior,
    DictionarySummary,
    Stability,
    align_atoms,
    dictionary_summary,
    stability,
)
from pyro_sparse.diagnostics.finding import Finding, Thresholds
from pyro_sparse.diagnostics.khat import LOO, khat, loo, psis
from pyro_sparse.diagnostics.plots import (
    plot_atoms,
    plot_khat,
    plot_loss,
    plot_rank_ecdf,
    plot_reliability,
)
from pyro_sparse.diagnostics.predictive import STATISTICS, PredictiveCheck, predictive_check
from pyro_sparse.diagnostics.recovery import Recovery, match_atoms
from pyro_sparse.diagnostics.report import Report, report
from pyro_sparse.diagnostics.report_figures import Picture
from pyro_sparse.diagnostics.representer import Contributors, Representer, Stationarity
from pyro_sparse.diagnostics.representer_plot import plot_representer
from pyro_sparse.diagnostics.sbc import SBC, sbc
from pyro_sparse.diagnostics.streaming import CodeSummary, summarise_codes
from pyro_sparse.diagnostics.uniformity import Band, uniform_band, uniform_p_value

__all__ = [
    "GROUPS",
    "LOO",
    "SBC",
    "STATISTICS",
    "AmortisationGap",
    "AtomPosterior",
    "Band",
    "Calibration",
    "CodeSummary",
    "Contributors",
    "Coverage",
    "DictionarySummary",
    "Finding",
    "Picture",
    "PredictiveCheck",
    "Recovery",
    "Reliability",
    "Report",
    "Representer",
    "Stability",
    "Stationarity",
    "Thresholds",
    "align_atoms",
    "amortisation_gap",
    "dictionary_summary",
    "khat",
    "loo",
    "match_atoms",
    "plot_atoms",
    "plot_codes",
    "plot_events",
    "plot_khat",
    "plot_loss",
    "plot_rank_ecdf",
    "plot_reliability",
    "plot_representer",
    "predictive_check",
    "psis",
    "reliability",
    "report",
    "sbc",
    "stability",
    "summarise_codes",
    "to_datatree",
    "uniform_band",
    "uniform_p_value",
]
