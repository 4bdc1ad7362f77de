"""Counts that vary more than their mean says."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_sparse.distributions.natural import (
    NaturalNegativeBinomial,
    negative_binomial_deviance,
)
from pyro_sparse.likelihoods.base import Likelihood
from pyro_sparse.likelihoods.values import (
    as_positive,
    check_counts,
    check_parameter,
    register_positive,
)
from pyro_sparse.ops import check_tensor


class NegativeBinomial(Likelihood):
    r"""Overdispersed counts, of mean :math:`\mu = e^\eta` and variance :math:`\mu + \mu^2 / r`.

    The predictor is the logarithm of the mean, as of ``Poisson``, which is the limit of large
    :math:`r`. (The natural parameter, :math:`\log \mu / (\mu + r)`, is bounded above; a linear
    predictor is not.) The loss is convex in it.

    Args:
        total_count: :math:`r > 0`: a number, or a tensor that broadcasts with one datum.
        trainable: Learn it, starting from the given value; it stays positive.

    Attributes:
        total_count: As given, or as learned.

    Raises:
        TypeError: If ``total_count`` is not a real number or a dense tensor of them.
        ValueError: If it is not positive and finite, or empty.

    Example:
        >>> likelihood = NegativeBinomial(2.0)
        >>> likelihood.residual(torch.tensor(0.0), torch.tensor(4.0))
        tensor(2.)
    """

    total_count: Tensor

    def __init__(self, total_count: float | Tensor, *, trainable: bool = False) -> None:
        super().__init__()
        value = as_positive("total_count", total_count, "small for much overdispersion")
        register_positive(self, "total_count", value, trainable=trainable)

    def forward(self, predictor: Tensor) -> NaturalNegativeBinomial:  # noqa: D102
        check_tensor("predictor", predictor)
        return NaturalNegativeBinomial(predictor, self.total_count)

    def check(self, y: Tensor, mask: Tensor | None = None) -> None:  # noqa: D102
        check_parameter("total_count", "NegativeBinomial", self.total_count, y)
        check_counts(y, mask, family="NegativeBinomial")

    def mean(self, predictor: Tensor) -> Tensor:  # noqa: D102
        return NaturalNegativeBinomial(predictor, self.total_count, validate_args=False).mean

    def residual(self, predictor: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        # (y - mu) / (1 + mu / r), where mu may overflow.
        count = self.total_count
        log_ratio = predictor - count.log()
        return y * torch.sigmoid(-log_ratio) - count * torch.sigmoid(log_ratio)

    def curvature(self, y: Tensor) -> Tensor:  # noqa: D102
        return ((y + self.total_count) / 4).detach()

    def loss(self, predictor: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return negative_binomial_deviance(y, self.total_count, predictor)

    def dual(self, score: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        total = y + self.total_count
        mean = y - score  # total times the chance of a count
        bound = _information(y, total) - _information(mean, total)
        # The best predictor of the data is log y, that of a chance p is log(r p / (1 - p)).
        bound = bound + score * self.total_count.log()
        return torch.where((mean < 0) | (mean > total), -torch.inf, bound)


def _information(hits: Tensor, total: Tensor) -> Tensor:
    misses = total - hits
    return torch.special.xlogy(hits, hits / total) + torch.special.xlogy(misses, misses / total)
