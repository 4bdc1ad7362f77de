"""The interface that every family shares."""

from __future__ import annotations

from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn


class Likelihood(nn.Module):
    r"""Declares a family :math:`p(y \mid \eta)`, elementwise in the predictor :math:`\eta`.

    A model asks for the distribution, an unrolled encoder for ``residual`` and ``curvature``, a
    certificate for ``loss`` and ``dual``. Nothing asks which family it is.

    A family of your own is one small class. What an unrolled guide needs is in ``forward``,
    ``mean`` and ``residual``, and ``curvature`` if there is a bound; ``loss`` and ``dual`` are for
    ``solvers.solve``.

    Attributes:
        placeholder: A value within the family's range: it stands where data were not observed.

    Example:
        >>> import pyro.distributions as dist
        >>> import torch
        >>> class Logistic(Likelihood):
        ...     def forward(self, predictor):
        ...         return dist.Logistic(predictor, torch.ones_like(predictor))
        ...     def mean(self, predictor):
        ...         return predictor
        ...     def residual(self, predictor, y):
        ...         return torch.tanh((y - predictor) / 2)
        ...     def curvature(self, y):
        ...         return torch.tensor(0.5)
        >>> Logistic().residual(torch.tensor(0.0), torch.tensor(2.0))
        tensor(0.7616)
    """

    placeholder: float = 0.0

    def forward(self, predictor: Tensor) -> TorchDistributionMixin:
        """Distribution of the data, batch shape that of the predictor, event shape ``()``."""
        raise NotImplementedError

    def check(self, y: Tensor, mask: Tensor | None = None) -> None:
        """Refuse data that the family or its parameters do not fit.

        Called once per call of a model, guide or solver. Nothing is checked unless a family says
        so.

        Args:
            y: Data, with any leading dimensions.
            mask: True where a sample was observed; what the others hold does not matter.

        Raises:
            TypeError: If a parameter is of another dtype than the data.
            RuntimeError: If it is on another device.
            ValueError: If it does not broadcast with the data, or data are out of the family's
                range, such as negative counts.
        """

    def mean(self, predictor: Tensor) -> Tensor:
        """Expected data given the predictor (the inverse link), in units of the data."""
        raise NotImplementedError

    def residual(self, predictor: Tensor, y: Tensor) -> Tensor:
        r"""Score :math:`\partial \log p(y \mid \eta) / \partial \eta`, shape of the predictor."""
        raise NotImplementedError

    def curvature(self, y: Tensor) -> Tensor:
        r"""Upper bound of :math:`-\partial^2 \log p / \partial \eta^2` over all predictors.

        The step size of a proximal-gradient step is one over its largest value in a datum times the
        dictionary's squared norm.

        Args:
            y: Data, shape ``(..., *signal_shape)``.

        Returns:
            By element, broadcastable to ``y``; detached.

        Raises:
            NotImplementedError: If the family has no such bound.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no bound of its curvature. A net of fixed depth takes "
            "likelihoods.Stabilised(...) of it, or step_size=...; MAP codes come from "
            "solvers.solve or guides.AutoUnrolled, which search for their steps."
        )

    def loss(self, predictor: Tensor, y: Tensor) -> Tensor:
        r"""Half the deviance: :math:`\max_\eta \log p(y \mid \eta) - \log p(y \mid \eta)`.

        Raises:
            NotImplementedError: If the family does not say.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not state its `loss`, which solvers.solve certifies codes "
            "and searches for steps with. With a bound of the curvature, tol=None does without."
        )

    def dual(self, score: Tensor, y: Tensor) -> Tensor:
        r"""Lower bound that a score :math:`\nu` gives: :math:`\inf_\eta \ell(\eta) + \nu \eta`.

        Minus the conjugate of ``loss`` at :math:`-\nu`, elementwise; ``-inf`` where infeasible.

        Raises:
            NotImplementedError: If the family does not say.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not state its `dual`, from which solvers.solve certifies "
            "codes. Call it with tol=None to run a fixed number of steps without a certificate."
        )
