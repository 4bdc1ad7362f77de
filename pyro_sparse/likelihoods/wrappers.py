"""Likelihoods that change one thing about another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyro_sparse.likelihoods.base import Likelihood
from pyro_sparse.likelihoods.values import check_parameter
from pyro_sparse.ops import check_tensor, kind_of


class Offset(Likelihood):
    r"""A likelihood whose predictor has a part that the codes do not explain: :math:`\eta + b`.

    A baseline of each neuron, or the logarithm of an exposure (of the seconds, trials or cells that
    a count was taken over). Model, guide and solver agree on it because they are handed the same
    object. The predictor that they speak of is the part of the codes.

    Args:
        likelihood: What sees the sum.
        offset: :math:`b`, in units of the predictor: a number, or a tensor that broadcasts with one
            datum, such as ``(channels, 1)``. Exposures that differ by datum are a matter of a
            program of your own, which gets them as an argument: ``guides.AutoUnrolled``.
        trainable: Learn it, starting from the given value.

    Attributes:
        offset: As given, or as learned.

    Raises:
        TypeError: If ``likelihood`` is none, or ``offset`` is not real numbers.
        ValueError: If ``offset`` is not finite.

    Example:
        >>> from pyro_sparse.likelihoods import Poisson
        >>> baseline = Offset(Poisson(), torch.tensor(2.0).log())
        >>> baseline.mean(torch.tensor(0.0))
        tensor(2.)
    """

    offset: Tensor

    def __init__(
        self, likelihood: Likelihood, offset: float | Tensor, *, trainable: bool = False
    ) -> None:
        super().__init__()
        _check_likelihood(likelihood)
        try:
            value = torch.as_tensor(offset).detach().clone()
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"Expected offset to be a number or a tensor, got {type(offset).__name__}."
            ) from None
        value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
        check_tensor("offset", value)
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"Expected a finite offset, got {offset}.")
        self.likelihood = likelihood
        self.placeholder = likelihood.placeholder
        if trainable:
            self.offset = nn.Parameter(value)
        else:
            self.register_buffer("offset", value)

    def forward(self, predictor: Tensor) -> Any:  # noqa: D102
        check_tensor("predictor", predictor)
        return self.likelihood(predictor + self.offset)

    def check(self, y: Tensor, mask: Tensor | None = None) -> None:  # noqa: D102
        check_parameter("offset", "Offset", self.offset, y)
        self.likelihood.check(y, mask)

    def mean(self, predictor: Tensor) -> Tensor:  # noqa: D102
        return self.likelihood.mean(predictor + self.offset)

    def residual(self, predictor: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return self.likelihood.residual(predictor + self.offset, y)

    def curvature(self, y: Tensor) -> Tensor:  # noqa: D102
        return self.likelihood.curvature(y)

    def loss(self, predictor: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return self.likelihood.loss(predictor + self.offset, y)

    def dual(self, score: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        # inf l(eta + b) + score * eta, with the sum for the variable.
        return self.likelihood.dual(score, y) - score * self.offset


class Stabilised(Likelihood):
    r"""Counts whose residual is bent where the predictor runs away, for nets of fixed depth.

    .. math:: r = \mathrm{ELU}_\alpha(y - \mu(\eta)) =
        \begin{cases} y - \mu & y \ge \mu \\ \alpha (e^{y - \mu} - 1) & y < \mu \end{cases}

    A step against a rate of :math:`e^{20}` would throw the codes away; this one is at most
    :math:`\alpha`. It is no longer the gradient of the likelihood: the encoder that takes it is a
    net, whose depth is a part of the model, and more layers do not make better codes. Hand it to
    the guide; the model keeps the likelihood itself.

    Of a likelihood whose variance is its mean (``Poisson``) the slope of the residual is at most
    :math:`\max(1, \alpha) \max(1, y)`, so that steps are safe where the likelihood's own has no
    bound; another one that has a bound keeps it, times :math:`\max(1, \alpha)`.

    Args:
        likelihood: What has the mean.
        alpha: :math:`\alpha > 0`, in units of the data; published: the peak of the rate, 1 to 4.

    Raises:
        TypeError: If ``likelihood`` is none, or ``alpha`` is no number.
        ValueError: If ``alpha`` is not positive and finite.

    References:
        Tolooshams, Song, Temereanca & Ba (2020), ICML (DCEA); ELU: Clevert, Unterthiner &
        Hochreiter (2016), ICLR.

    Example:
        >>> from pyro_sparse.likelihoods import Poisson
        >>> Stabilised(Poisson(), 2.0).residual(torch.tensor(20.0), torch.tensor(3.0))
        tensor(-2.)
    """

    def __init__(self, likelihood: Likelihood, alpha: float) -> None:
        super().__init__()
        _check_likelihood(likelihood)
        if not isinstance(alpha, int | float) or isinstance(alpha, bool):
            raise TypeError(f"Expected alpha to be a number, got {alpha!r}.")
        if not 0 < alpha < float("inf"):
            raise ValueError(f"Expected a finite alpha > 0, got {alpha}.")
        self.likelihood = likelihood
        self.placeholder = likelihood.placeholder
        self.alpha = alpha

    def forward(self, predictor: Tensor) -> Any:  # noqa: D102
        return self.likelihood(predictor)

    def check(self, y: Tensor, mask: Tensor | None = None) -> None:  # noqa: D102
        self.likelihood.check(y, mask)

    def mean(self, predictor: Tensor) -> Tensor:  # noqa: D102
        return self.likelihood.mean(predictor)

    def residual(self, predictor: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        residual = self.likelihood.residual(predictor, y)
        return nn.functional.elu(residual, alpha=self.alpha)

    def curvature(self, y: Tensor) -> Tensor:  # noqa: D102
        steepest = max(1.0, self.alpha)
        try:
            return steepest * self.likelihood.curvature(y)
        except NotImplementedError:
            # mu e^(y - mu) with mu > y: largest at mu = max(1, y), where it is at most max(1, y).
            return steepest * y.detach().clamp_min(1)

    def loss(self, predictor: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return self.likelihood.loss(predictor, y)

    def dual(self, score: Tensor, y: Tensor) -> Tensor:
        """There is none: the residual is not the derivative of the loss."""
        raise NotImplementedError(
            "Expected the likelihood itself for a certificate, got Stabilised: its residual is not "
            f"the derivative of its loss. Hand {type(self.likelihood).__name__} to the solver."
        )


def _check_likelihood(likelihood: object) -> None:
    if not isinstance(likelihood, Likelihood):
        raise TypeError(f"Expected a Likelihood, such as Poisson(), got {kind_of(likelihood)}.")
