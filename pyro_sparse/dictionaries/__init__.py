"""Linear maps from codes to the predictor, with an adjoint and a spectral bound."""

from pyro_sparse.dictionaries.base import (
    Dictionary,
    LinearMap,
    UnitNorm,
    check_shape,
    register_atoms,
)
from pyro_sparse.dictionaries.boundaries import Boundary, Interior, Overhang, Periodic
from pyro_sparse.dictionaries.composition import Composition, LinearOperator, operator_norm_bound
from pyro_sparse.dictionaries.conv import Conv, ConvMap
from pyro_sparse.dictionaries.dense import Dense, DenseMap

__all__ = [
    "Boundary",
    "Composition",
    "Conv",
    "ConvMap",
    "Dense",
    "DenseMap",
    "Dictionary",
    "Interior",
    "LinearMap",
    "LinearOperator",
    "Overhang",
    "Periodic",
    "UnitNorm",
    "check_shape",
    "operator_norm_bound",
    "register_atoms",
]
