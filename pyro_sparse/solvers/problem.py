"""The convex problem behind MAP codes, its proximal step and its duality gap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_sparse.dictionaries import LinearMap
from pyro_sparse.distributions import Law, conjugate, match, penalty, prox
from pyro_sparse.likelihoods import Likelihood


@dataclass(frozen=True)
class Problem:
    r"""MAP codes of given data: :math:`\min_z \; \ell(D z; y) - \log p(z)`, for each datum apart.

    Attributes:
        y: Data, shape ``(..., *signal_shape)``.
        synthesis: :math:`D`, from codes to the predictor.
        analysis: Where :math:`D^T` is taken from; the same map unless weights are untied.
        likelihood: Gives the loss :math:`\ell` and its derivative.
        law: Prior of one datum's codes; event shape is the codes' shape.
        signal_dims: Trailing dimensions of one datum.
        mask: True where a sample was observed, broadcastable to ``y``; None for all.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_sparse.dictionaries import Dense
        >>> from pyro_sparse.likelihoods import Gaussian
        >>> identity = Dense(2, 2, atoms=torch.eye(2)).bind()
        >>> law = dist.Laplace(0.0, 1.0).expand([2]).to_event(1)
        >>> y = torch.tensor([3.0, 0.5])
        >>> problem = Problem(y, identity, identity, Gaussian(1.0), law, signal_dims=1)
        >>> with torch.no_grad():
        ...     codes = problem.proximal_step(None, torch.tensor(1.0))
        ...     codes, problem.objective(codes) - problem.dual_objective(codes)
        (tensor([2., 0.]), tensor(0.))
    """

    y: Tensor
    synthesis: LinearMap
    analysis: LinearMap
    likelihood: Likelihood
    law: Law
    signal_dims: int
    mask: Tensor | None = None

    @property
    def code_dims(self) -> int:
        """Trailing dimensions of one datum's codes."""
        return len(self.law.event_shape)

    def squared_norm(self) -> Tensor:
        """Bound of the squared norm of the maps; their geometric mean where they differ."""
        bound = self.synthesis.squared_norm()
        if self.analysis is self.synthesis:
            return bound
        return (bound * self.analysis.squared_norm()).sqrt()

    def step_size(self, lipschitz: Tensor | float) -> Tensor:
        """One over curvature times squared norm, shaped to multiply codes.

        Args:
            lipschitz: Squared norm of the maps; a number, or one per leading index.
        """
        step = torch.as_tensor(1 / (self._curvature() * lipschitz)).to(self.y)
        return step.reshape(*step.shape, *[1] * self.code_dims)

    def _curvature(self) -> Tensor:
        """Largest curvature of what was observed: of each datum, or of all where it is shared."""
        curvature = self.likelihood.curvature(self.y)
        if curvature.dim() <= self.signal_dims:
            return curvature.max()
        curvature = curvature.expand_as(self.y)
        if self.mask is not None:
            curvature = torch.where(self.mask, curvature, torch.zeros_like(curvature))
        largest = curvature.flatten(-self.signal_dims).amax(-1)
        # A datum without a sample has no curvature: any step will do.
        return torch.where(largest > 0, largest, torch.ones_like(largest))

    def score(self, predictor: Tensor) -> Tensor:
        """Derivative of the log-likelihood by the predictor, zero where masked."""
        if self.mask is None:
            return self.likelihood.residual(predictor, self.y)
        # Masked before and after: an inverse link may overflow where no datum holds the predictor
        # down, and zero times infinity is nan, in the gradient as well.
        zero = torch.zeros_like(predictor)
        residual = self.likelihood.residual(torch.where(self.mask, predictor, zero), self.y)
        return torch.where(self.mask, residual, zero)

    def ascend(self, point: Tensor | None, step: Tensor) -> Tensor:
        """Codes after one gradient step on the log-likelihood.

        Args:
            point: Codes to step from; None for zero, which saves a synthesis.
            step: Step size, broadcastable to codes.
        """
        predictor = torch.zeros_like(self.y) if point is None else self.synthesis.forward(point)
        ascent = step * self.analysis.adjoint(self.score(predictor))
        return ascent if point is None else point + ascent

    def bend(self, point: Tensor) -> Callable[[Tensor], Tensor]:
        """Minus the derivative of the score by the predictor, along a direction of the latter.

        Args:
            point: The codes whose predictor it is taken at.
        """
        predictor = self.synthesis.forward(point).detach().requires_grad_()
        with torch.enable_grad():
            score = self.score(predictor)

        def along(direction: Tensor) -> Tensor:
            (change,) = torch.autograd.grad(score, predictor, direction, retain_graph=True)
            return -change

        return along

    def proximal_step(self, point: Tensor | None, step: Tensor) -> Tensor:
        """One proximal-gradient step, from ``point`` (None for zero)."""
        return prox(self.law, self.ascend(point, step), step)

    def objective(self, codes: Tensor) -> Tensor:
        """Loss plus penalty of each datum, in nats above the best conceivable; leading shape."""
        return self.data_term(codes) + penalty(self.law, codes)

    def data_term(self, codes: Tensor) -> Tensor:
        """Loss of each datum, in nats above its best predictor; leading shape."""
        return self._sum(self.likelihood.loss(self.synthesis.forward(codes), self.y))

    def dual_objective(self, codes: Tensor) -> Tensor:
        """Lower bound of every datum's objective, from the scaled score at ``codes``.

        The score is shrunk until its correlation with each atom is a possible slope of the
        prior's penalty; it is then feasible for the Fenchel dual.
        """
        score = self.score(self.synthesis.forward(codes))
        slope = self.synthesis.adjoint(score)
        bounds = conjugate(self.law)
        shrink = bounds.feasible(slope).flatten(-self.code_dims).amin(-1)  # one for each datum
        in_codes = shrink.reshape(*shrink.shape, *[1] * self.code_dims)
        in_signal = shrink.reshape(*shrink.shape, *[1] * (self.y.dim() - shrink.dim()))
        penalties = bounds.value(in_codes * slope).flatten(-self.code_dims).sum(-1)
        return self._sum(self.likelihood.dual(in_signal * score, self.y)) - penalties

    def select(self, index: Tensor) -> Problem:
        """The data at ``index`` of a problem with one leading dimension."""
        mask = None if self.mask is None else self.mask.expand_as(self.y)[index]
        return replace(self, y=self.y[index], mask=mask)

    def double(self) -> Problem:
        """The same problem in float64: a gap of 1e-5 is lost in the rounding of float32."""
        y = self.y.double()
        maps = {"synthesis": self.synthesis.double(), "analysis": self.analysis.double()}
        return replace(self, y=y, law=match(self.law, y), **maps)  # type: ignore[arg-type]

    def _sum(self, values: Tensor) -> Tensor:
        if self.mask is not None:
            values = torch.where(self.mask, values, torch.zeros_like(values))
        return values.flatten(-self.signal_dims).sum(-1)
