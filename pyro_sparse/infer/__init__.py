"""Objectives and training."""

from pyro_sparse.infer.callbacks import Callback, Progress
from pyro_sparse.infer.em import RateEM, RateLoss
from pyro_sparse.infer.fit import fit
from pyro_sparse.infer.guard import Fault, Guard, RollBack, Stop
from pyro_sparse.infer.history import EarlyStopping, History
from pyro_sparse.infer.noise import NoiseEM
from pyro_sparse.infer.phases import Phase, Update

__all__ = [
    "Callback",
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
]
