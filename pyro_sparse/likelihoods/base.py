"""The interface that every family shares."""

from __future__ import annotations

from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn


class Likelihood(nn.Module):
    r"""Declares a family :math:`p(y \mid \eta)`, elementwise in the predictor :math:`\eta`.

    A model asks for the distribution, an unrolled encoder for ``residual`` and ``curvature``, a
    certificate for ``loss`` and ``dual``. Nothing asks which family it is.
    """

    def forward(self, predictor: Tensor) -> TorchDistributionMixin:
        """Distribution of the data, batch shape that of the predictor, event shape ``()``."""
        raise NotImplementedError

    def check(self, y: Tensor) -> None:
        """Refuse data that the parameters do not fit; called once per call of a guide or solver.

        Nothing is checked unless a family says so; shapes, dtype and device, not values.

        Raises:
            TypeError: If a parameter is of another dtype than the data.
            RuntimeError: If it is on another device.
            ValueError: If it does not broadcast with the data.
        """

    def mean(self, predictor: Tensor) -> Tensor:
        """Expected data given the predictor (the inverse link), in units of the data."""
        raise NotImplementedError

    def residual(self, predictor: Tensor, y: Tensor) -> Tensor:
        r"""Score :math:`\partial \log p(y \mid \eta) / \partial \eta`, shape of the predictor."""
        raise NotImplementedError

    def curvature(self) -> Tensor:
        r"""Upper bound of :math:`-\partial^2 \log p / \partial \eta^2` over predictors and data.

        The step size of a proximal-gradient step is one over this times the dictionary's squared
        norm.

        Raises:
            NotImplementedError: If the family has no such bound.
        """
        raise NotImplementedError

    def loss(self, predictor: Tensor, y: Tensor) -> Tensor:
        r"""Half the deviance: :math:`\max_\eta \log p(y \mid \eta) - \log p(y \mid \eta)`."""
        raise NotImplementedError

    def dual(self, score: Tensor, y: Tensor) -> Tensor:
        r"""Lower bound that a score :math:`\nu` gives: :math:`\inf_\eta \ell(\eta) + \nu \eta`.

        Minus the conjugate of ``loss`` at :math:`-\nu`, elementwise; ``-inf`` where infeasible.
        """
        raise NotImplementedError
