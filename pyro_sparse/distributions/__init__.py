"""Sparse laws of codes, and what solvers ask of a prior."""

from pyro_sparse.distributions.priors import (
    Law,
    Prior,
    check_prior,
    check_rate,
    codes_prior,
    match,
    spread,
)
from pyro_sparse.distributions.prox import (
    Conjugate,
    conjugate,
    penalty,
    prox,
    register_conjugate,
    register_prox,
)

__all__ = [
    "Conjugate",
    "Law",
    "Prior",
    "check_prior",
    "check_rate",
    "codes_prior",
    "conjugate",
    "match",
    "penalty",
    "prox",
    "register_conjugate",
    "register_prox",
    "spread",
]
