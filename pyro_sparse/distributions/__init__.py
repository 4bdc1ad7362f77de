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
from pyro_sparse.distributions.rates import (
    Rate,
    RateStatistic,
    rate_statistic,
    register_rate_statistic,
)

__all__ = [
    "Conjugate",
    "Law",
    "Prior",
    "Rate",
    "RateStatistic",
    "check_prior",
    "check_rate",
    "codes_prior",
    "conjugate",
    "match",
    "penalty",
    "prox",
    "rate_statistic",
    "register_conjugate",
    "register_prox",
    "register_rate_statistic",
    "spread",
]
