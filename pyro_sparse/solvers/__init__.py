"""Proximal-gradient steps, unrolled into an encoder or run to a certificate; coordinate ascent."""

from pyro_sparse.solvers.coordinate_ascent import MeanField, coordinate_ascent
from pyro_sparse.solvers.gradients import (
    BackPropagation,
    Detached,
    Gradient,
    Implicit,
    Truncated,
    differentiated,
)
from pyro_sparse.solvers.methods import FISTA, ISTA, Method, State
from pyro_sparse.solvers.problem import Problem
from pyro_sparse.solvers.shrinkage import (
    Bias,
    HardThreshold,
    NonMaximumSuppression,
    Proximal,
    Shrinkage,
    TopK,
)
from pyro_sparse.solvers.solve import Solution, solve
from pyro_sparse.solvers.steps import Backtracking, Fixed, PowerIteration, StepSize
from pyro_sparse.solvers.unrolled import Unrolled

__all__ = [
    "FISTA",
    "ISTA",
    "BackPropagation",
    "Backtracking",
    "Bias",
    "Detached",
    "Fixed",
    "Gradient",
    "HardThreshold",
    "Implicit",
    "MeanField",
    "Method",
    "NonMaximumSuppression",
    "PowerIteration",
    "Problem",
    "Proximal",
    "Shrinkage",
    "Solution",
    "State",
    "StepSize",
    "TopK",
    "Truncated",
    "Unrolled",
    "coordinate_ascent",
    "differentiated",
    "solve",
]
