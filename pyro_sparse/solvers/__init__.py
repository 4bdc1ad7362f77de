"""Proximal-gradient steps, unrolled into an encoder or run to a certificate."""

from pyro_sparse.solvers.methods import FISTA, ISTA, Method, State
from pyro_sparse.solvers.problem import Problem
from pyro_sparse.solvers.solve import Solution, solve
from pyro_sparse.solvers.unrolled import Unrolled

__all__ = ["FISTA", "ISTA", "Method", "Problem", "Solution", "State", "Unrolled", "solve"]
