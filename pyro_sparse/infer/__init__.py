"""Objectives and training."""

import pyro_sparse.infer.savable  # noqa: F401  registers what a bundle may hold
from pyro_sparse.infer.bundle import load, register_savable, save
from pyro_sparse.infer.callbacks import Callback, Progress
from pyro_sparse.infer.checkpoints import Checkpoints
from pyro_sparse.infer.em import RateEM, RateLoss
from pyro_sparse.infer.fit import fit
from pyro_sparse.infer.guard import Fault, Guard, RollBack, Stop
from pyro_sparse.infer.history import EarlyStopping, History
from pyro_sparse.infer.noise import NoiseEM
from pyro_sparse.infer.phases import Phase, Update

__all__ = [
    "Callback",
    "Checkpoints",
    "EarlyStopping",
    "Fault",
    "Guard",
    "History",
    "NoiseEM",
    "Phase",
    "Progress",
    "RateEM",
    "RateLoss",
    "RollBack",
    "Stop",
    "Update",
    "fit",
    "load",
    "register_savable",
    "save",
]
