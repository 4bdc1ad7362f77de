"""Counts whose variance is their mean."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_sparse.distributions.deviance import exp_deviance, tangent_from
from pyro_sparse.distributions.natural import NaturalPoisson
from pyro_sparse.likelihoods.base import Likelihood
from pyro_sparse.likelihoods.values import check_counts
from pyro_sparse.ops import check_tensor


class Poisson(Likelihood):
    r"""Counts :math:`y \sim \mathrm{Poisson}(e^\eta)`; the predictor is the natural parameter.

    A baseline, and the logarithm of an exposure, are parts of the predictor: see ``Offset``. The
    curvature :math:`e^\eta` has no bound, so ``solvers.solve`` searches for its steps, and a net of
    fixed depth takes ``Stabilised(Poisson(), ...)`` or a fixed ``step_size``.

    Example:
        >>> Poisson().residual(torch.tensor(0.0), torch.tensor(3.0))  # 3 counts, 1 expected
        tensor(2.)
    """

    def forward(self, predictor: Tensor) -> NaturalPoisson:  # noqa: D102
        check_tensor("predictor", predictor)
        return NaturalPoisson(predictor)

    def check(self, y: Tensor, mask: Tensor | None = None) -> None:  # noqa: D102
        check_tensor("y", y)
        check_counts(y, mask, family="Poisson")

    def mean(self, predictor: Tensor) -> Tensor:  # noqa: D102
        return NaturalPoisson(predictor, validate_args=False).mean

    def residual(self, predictor: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        cap = tangent_from(predictor)
        return y - predictor.clamp_max(cap).exp()

    def loss(self, predictor: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return exp_deviance(y, predictor)

    def dual(self, score: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        mean = y - score
        bound = mean - torch.special.xlogy(mean, mean) + torch.special.xlogy(y, y) - y
        return torch.where(mean < 0, -torch.inf, bound)
