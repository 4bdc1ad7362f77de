"""Objectives and training."""

import pyro_sparse.infer.savable  # noqa: F401  registers what a bundle may hold
from pyro_sparse.infer.bounds import BestOf, Bound, Importance, Mean, Renyi
from pyro_sparse.infer.bundle import load, register_savable, save
from pyro_sparse.infer.callbacks import Callback, Progress
from pyro_sparse.infer.checkpoints import Checkpoints
from pyro_sparse.infer.differentiated import Differentiated, Reconstruction
from pyro_sparse.infer.elbo import SparseELBO
from pyro_sparse.infer.em import RateEM, RateLoss
from pyro_sparse.infer.estimators import (
    ControlVariate,
    DisARM,
    Estimator,
    Exact,
    ImplicitMixed,
    LeaveOneOut,
    LocalExpectation,
)
from pyro_sparse.infer.exact import ExactPosterior, enumerate_posterior
from pyro_sparse.infer.fit import fit
from pyro_sparse.infer.gibbs import GibbsDraws, gibbs
from pyro_sparse.infer.guard import Fault, Guard, RollBack, Stop
from pyro_sparse.infer.history import EarlyStopping, History
from pyro_sparse.infer.log_weights import LogWeights, log_weights
from pyro_sparse.infer.noise import NoiseEM
from pyro_sparse.infer.perceptual import PerceptualLoss, ms_ssim
from pyro_sparse.infer.phases import Phase, Update
from pyro_sparse.infer.projections import Project
from pyro_sparse.infer.published import Concrete, StraightThrough, SubGradient
from pyro_sparse.infer.schedules import (
    Constant,
    Cyclic,
    ExponentialDecay,
    LinearRamp,
    Scheduled,
    Warmup,
)
from pyro_sparse.infer.supervised import Reconstruct, Supervised
from pyro_sparse.infer.without import Without

__all__ = [
    "BestOf",
    "Bound",
    "Callback",
    "Checkpoints",
    "Concrete",
    "Constant",
    "ControlVariate",
    "Cyclic",
    "Differentiated",
    "DisARM",
    "EarlyStopping",
    "Estimator",
    "Exact",
    "ExactPosterior",
    "ExponentialDecay",
    "Fault",
    "GibbsDraws",
    "Guard",
    "History",
    "ImplicitMixed",
    "Importance",
    "LeaveOneOut",
    "LinearRamp",
    "LocalExpectation",
    "LogWeights",
    "Mean",
    "NoiseEM",
    "PerceptualLoss",
    "Phase",
    "Progress",
    "Project",
    "RateEM",
    "RateLoss",
    "Reconstruct",
    "Reconstruction",
    "Renyi",
    "RollBack",
    "Scheduled",
    "SparseELBO",
    "Stop",
    "StraightThrough",
    "SubGradient",
    "Supervised",
    "Update",
    "Warmup",
    "Without",
    "enumerate_posterior",
    "fit",
    "gibbs",
    "load",
    "log_weights",
    "ms_ssim",
    "register_savable",
    "save",
]
