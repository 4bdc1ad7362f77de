"""Successes among trials."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_sparse.distributions.natural import NaturalBinomial, binomial_deviance
from pyro_sparse.likelihoods.base import Likelihood
from pyro_sparse.likelihoods.values import as_positive, check_parameter, check_values
from pyro_sparse.ops import check_tensor


class Binomial(Likelihood):
    r"""Counts :math:`y \sim \mathrm{Binomial}(n, \sigma(\eta))`; the predictor is the log-odds.

    Data are the numbers of successes, from 0 to :math:`n`, not their shares: spikes of one neuron
    in a bin over :math:`n` trials.

    Args:
        total_count: Number of trials :math:`n \ge 1`, a whole number, or a tensor of them that
            broadcasts with one datum.

    Attributes:
        total_count: As given.

    Raises:
        TypeError: If ``total_count`` is no number.
        ValueError: If it is not whole, or below one.

    Example:
        >>> Binomial(4).residual(torch.tensor(0.0), torch.tensor(3.0))  # 3 of 4, 2 expected
        tensor(1.)
    """

    total_count: Tensor

    def __init__(self, total_count: int | Tensor) -> None:
        super().__init__()
        value = as_positive("total_count", total_count, "a number of trials")
        if not bool((value == value.floor()).all()):
            raise ValueError(f"Expected total_count to be whole numbers >= 1, got {total_count}.")
        self.register_buffer("total_count", value)

    def forward(self, predictor: Tensor) -> NaturalBinomial:  # noqa: D102
        check_tensor("predictor", predictor)
        return NaturalBinomial(predictor, self.total_count)

    def check(self, y: Tensor, mask: Tensor | None = None) -> None:  # noqa: D102
        check_parameter("total_count", type(self).__name__, self.total_count, y)
        largest = self.total_count
        told = f"{int(largest.max())}"
        check_values(
            y,
            mask,
            (y >= 0) & (y <= largest) & (y == y.floor()),
            expected=f"whole counts from 0 to total_count ({told}), as {type(self).__name__} has",
            hint=" A share of successes times total_count is their number.",
        )

    def mean(self, predictor: Tensor) -> Tensor:  # noqa: D102
        return self.total_count * predictor.sigmoid()

    def residual(self, predictor: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return y - self.mean(predictor)

    def curvature(self, y: Tensor) -> Tensor:  # noqa: D102
        return self.total_count / 4

    def loss(self, predictor: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return binomial_deviance(y, self.total_count - y, predictor)

    def dual(self, score: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        mean = y - score
        bound = _information(y, self.total_count) - _information(mean, self.total_count)
        return torch.where((mean < 0) | (mean > self.total_count), -torch.inf, bound)


class Bernoulli(Binomial):
    r"""Yes or no, :math:`y \in \{0, 1\}`; the predictor is the log-odds. One trial of ``Binomial``.

    Example:
        >>> Bernoulli().mean(torch.tensor(0.0))
        tensor(0.5000)
    """

    def __init__(self) -> None:
        super().__init__(1)


def _information(hits: Tensor, total: Tensor) -> Tensor:
    """``sum x log(x / total)`` over hits and misses."""
    misses = total - hits
    return torch.special.xlogy(hits, hits / total) + torch.special.xlogy(misses, misses / total)
