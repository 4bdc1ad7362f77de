"""Proximal-gradient steps, unrolled into an encoder or run to a certificate; coordinate ascent."""

from pyro_sparse.solvers.coordinate_ascent import MeanField, coordinate_ascent
from pyro_sparse.solvers.methods import FISTA, ISTA, Method, State
from pyro_sparse.solvers.problem import Problem
from pyro_sparse.solvers.solve import Solution, solve
from pyro_sparse.solvers.unrolled import Unrolled

__all__ = [
    "FISTA",
    "ISTA",
    "MeanField",
    "Method",
    "Problem",
    "Solution",
    "State",
    "Unrolled",
    "coordinate_ascent",
    "solve",
]
