"""Positive numbers whose spread grows with their mean."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_sparse.distributions.natural import NaturalGamma, gamma_deviance
from pyro_sparse.likelihoods.base import Likelihood
from pyro_sparse.likelihoods.values import (
    as_positive,
    check_parameter,
    check_values,
    register_positive,
)
from pyro_sparse.ops import check_tensor


class Gamma(Likelihood):
    r"""Positive data of mean :math:`e^\eta` and standard deviation :math:`e^\eta / \sqrt\alpha`.

    The predictor is the logarithm of the mean. (The natural parameter, :math:`-\alpha / \mu`, is
    negative; a linear predictor is not.) The loss is convex in it; its curvature has no bound.

    Args:
        concentration: :math:`\alpha > 0`: a number, or a tensor that broadcasts with one datum. 1
            is the exponential law, half a number of looks or of degrees of freedom that of a power.
        trainable: Learn it, starting from the given value; it stays positive.

    Attributes:
        concentration: As given, or as learned.

    Raises:
        TypeError: If ``concentration`` is not a real number or a dense tensor of them.
        ValueError: If it is not positive and finite, or empty.

    Example:
        >>> Gamma(2.0).residual(torch.tensor(0.0), torch.tensor(3.0))
        tensor(4.)
    """

    placeholder = 1.0
    concentration: Tensor

    def __init__(self, concentration: float | Tensor, *, trainable: bool = False) -> None:
        super().__init__()
        value = as_positive("concentration", concentration, "one over a squared relative spread")
        register_positive(self, "concentration", value, trainable=trainable)

    def forward(self, predictor: Tensor) -> NaturalGamma:  # noqa: D102
        check_tensor("predictor", predictor)
        return NaturalGamma(predictor, self.concentration)

    def check(self, y: Tensor, mask: Tensor | None = None) -> None:  # noqa: D102
        check_parameter("concentration", type(self).__name__, self.concentration, y)
        check_values(
            y,
            mask,
            (y > 0) & torch.isfinite(y),
            expected=f"data > 0 and finite, as {type(self).__name__} has them",
            hint=" A zero below a detection limit was not observed: pass mask= (True = observed).",
        )

    def mean(self, predictor: Tensor) -> Tensor:  # noqa: D102
        return predictor.exp()

    def residual(self, predictor: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return NaturalGamma(predictor, self.concentration, validate_args=False).score(y)

    def loss(self, predictor: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return gamma_deviance(y, self.concentration, predictor)

    def dual(self, score: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        count = self.concentration
        slope = count + score
        bound = score * (y.log() + 1) - torch.special.xlogy(slope, slope / count)
        return torch.where(slope < 0, -torch.inf, bound)


class Exponential(Gamma):
    r"""Positive data of mean :math:`e^\eta`, exponentially distributed: ``Gamma`` of one.

    Example:
        >>> Exponential().residual(torch.tensor(0.0), torch.tensor(3.0))
        tensor(2.)
    """

    def __init__(self) -> None:
        super().__init__(1.0)
