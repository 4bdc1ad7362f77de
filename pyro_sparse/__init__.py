"""Probabilistic sparse coding on Pyro: sparse codes with honest uncertainty.

The generative programs are in ``pyro_sparse.models`` and the variational ones in
``pyro_sparse.guides``; everything else is a ground floor that knows neither.
"""

__version__ = "0.1.0.dev0"
