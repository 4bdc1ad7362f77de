"""Sparse laws of codes, and what solvers ask of a prior."""

import pyro_sparse.distributions.constrained_kl
import pyro_sparse.distributions.expected_natural
import pyro_sparse.distributions.tails_kl  # noqa: F401  registers KLs
from pyro_sparse.distributions.cumulants import log_mgf
from pyro_sparse.distributions.expected import (
    expected_log_prob,
    mean_exp,
    register_expected_log_prob,
)
from pyro_sparse.distributions.gamma import GammaThresholded
from pyro_sparse.distributions.groups import GroupLaplace
from pyro_sparse.distributions.kl import kl_gates
from pyro_sparse.distributions.known_support import KnownSupport
from pyro_sparse.distributions.mixed import Mixed, SpikeAndSlab
from pyro_sparse.distributions.moments import Moments, NotAffine
from pyro_sparse.distributions.natural import (
    NaturalBinomial,
    NaturalGamma,
    NaturalNegativeBinomial,
    NaturalPoisson,
)
from pyro_sparse.distributions.overshoots import (
    LaplaceOvershoot,
    NormalOvershoot,
    Overshoot,
    overshoot,
)
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
    register_penalty,
    register_prox,
    restrict,
)
from pyro_sparse.distributions.rates import (
    Rate,
    RateStatistic,
    rate_statistic,
    register_rate_statistic,
)
from pyro_sparse.distributions.relaxed import RelaxedSpikeAndSlab
from pyro_sparse.distributions.signed import SignedLaplace
from pyro_sparse.distributions.structured import Marginals, StructuredSpikeAndSlab
from pyro_sparse.distributions.tails import Tails
from pyro_sparse.distributions.thresholded import (
    HardThresholded,
    ShiftedThresholded,
    SoftThresholded,
    ThresholdedLaw,
)

__all__ = [
    "Conjugate",
    "GammaThresholded",
    "GroupLaplace",
    "HardThresholded",
    "KnownSupport",
    "LaplaceOvershoot",
    "Law",
    "Marginals",
    "Mixed",
    "Moments",
    "NaturalBinomial",
    "NaturalGamma",
    "NaturalNegativeBinomial",
    "NaturalPoisson",
    "NormalOvershoot",
    "NotAffine",
    "Overshoot",
    "Prior",
    "Rate",
    "RateStatistic",
    "RelaxedSpikeAndSlab",
    "ShiftedThresholded",
    "SignedLaplace",
    "SoftThresholded",
    "SpikeAndSlab",
    "StructuredSpikeAndSlab",
    "Tails",
    "ThresholdedLaw",
    "check_prior",
    "check_rate",
    "codes_prior",
    "conjugate",
    "expected_log_prob",
    "kl_gates",
    "log_mgf",
    "match",
    "mean_exp",
    "overshoot",
    "penalty",
    "prox",
    "rate_statistic",
    "register_conjugate",
    "register_expected_log_prob",
    "register_penalty",
    "register_prox",
    "register_rate_statistic",
    "restrict",
    "spread",
]
