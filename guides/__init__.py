"""Variational programs."""

from pyro_sparse.guides.auto import AutoUnrolled
from pyro_sparse.guides.encoders import Heads, PerDatum, UnrolledEncoder
from pyro_sparse.guides.posteriors import (
    DensePosterior,
    GammaThresholdPosterior,
    Posterior,
    SpikeAndSlabPosterior,
    ThresholdPosterior,
)
from pyro_sparse.guides.shifts import Mirrored, ShiftAveraged, Unobserved
from pyro_sparse.guides.structured import StructuredThresholded
from pyro_sparse.guides.support import SupportedPosterior
from pyro_sparse.guides.thresholded import Thresholded
from pyro_sparse.guides.unrolled import UnrolledFISTA

__all__ = [
    "AutoUnrolled",
    "DensePosterior",
    "GammaThresholdPosterior",
    "Heads",
    "Mirrored",
    "PerDatum",
    "Posterior",
    "ShiftAveraged",
    "SpikeAndSlabPosterior",
    "StructuredThresholded",
    "SupportedPosterior",
    "ThresholdPosterior",
    "Thresholded",
    "Unobserved",
    "UnrolledEncoder",
    "UnrolledFISTA",
]
