"""An encoder whose layers are proximal-gradient steps."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from pyro_sparse.dictionaries import Dictionary
from pyro_sparse.distributions import Law
from pyro_sparse.likelihoods import Likelihood, check_mask
from pyro_sparse.ops import check_tensor
from pyro_sparse.solvers.gradients import Curvature, current_gradient
from pyro_sparse.solvers.methods import FISTA, Method, State
from pyro_sparse.solvers.problem import Problem
from pyro_sparse.solvers.shrinkage import Proximal, Shrinkage


class Unrolled(nn.Module):
    r"""Fixed number of proximal-gradient steps, differentiable in everything.

    From zero, with step :math:`s`, layer :math:`t` is

    .. math:: z_{t+1} = \mathrm{shrink}_t\big(w_t + s\, D^T \partial_\eta
        \log p(y \mid D w_t)\big)

    where the method makes the next :math:`w`, and the shrinkage is the prior's proximal step unless
    another is given. With that, tied weights and enough steps it converges to the MAP codes. How
    much of it is differentiated an objective may choose: ``infer.Differentiated``.

    LISTA and CSCNet are ``analysis`` and ``synthesis`` of their own, ``ISTA()`` and a ``Bias``.

    Args:
        dictionary: Gives :math:`D`; tied to the model's when it is the same object.
        likelihood: Gives the residual and the curvature.
        num_steps: Number of layers, ``>= 1``.
        method: ``FISTA()`` or ``ISTA()``; default FISTA.
        shrinkage: ``Proximal(...)``, ``HardThreshold(...)``, ``Bias(...)``, ``TopK(...)``,
            ``NonMaximumSuppression(...)``; by default ``Proximal(num_atoms)``, which learns a
            factor on the threshold of each atom.
        step_size: The step :math:`s` as a fixed number, as in published nets whose dictionaries
            have absorbed it. In place of ``lipschitz`` and of the likelihood's curvature.
        lipschitz: Fixed value in place of the dictionary's squared norm, as in published nets
            (which often lies below the true one). None: the safe bound, refreshed at every call.
        analysis: Where :math:`D^T` is taken from; the dictionary if not given. Any dictionary with
            the same shapes, such as a copy, which then has weights of its own.
        synthesis: Where :math:`D` in the layers is taken from, likewise.
        recurrence: A linear map :math:`S` from codes to codes, such as ``nn.Linear(atoms, atoms,
            bias=False)``. Layers then are :math:`z_{t+1} = \mathrm{shrink}_t(E y + S w_t)` with
            :math:`E` the adjoint of ``analysis``, and neither the likelihood nor ``synthesis`` has
            a say; samples that were not observed are taken as zero.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If a number is out of its range.

    References:
        Gregor & LeCun (2010), ICML; Tolooshams, Dey & Ba (2021), IEEE TNNLS 32(6) (CRsAE); with a
        recurrence: Rolfe & LeCun (2013), ICLR, eq. (2).

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_sparse.dictionaries import Dense
        >>> from pyro_sparse.likelihoods import Gaussian
        >>> encoder = Unrolled(Dense(8, 5), Gaussian(0.1), num_steps=10)
        >>> law = dist.Laplace(0.0, 1.0).expand([8]).to_event(1)
        >>> encoder(torch.randn(3, 5), law).shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        dictionary: Dictionary,
        likelihood: Likelihood,
        *,
        num_steps: int = 15,
        method: Method | None = None,
        shrinkage: Shrinkage | None = None,
        step_size: float | None = None,
        lipschitz: float | None = None,
        analysis: Dictionary | None = None,
        synthesis: Dictionary | None = None,
        recurrence: nn.Module | None = None,
    ) -> None:
        super().__init__()
        for name, part in (("dictionary", dictionary), ("analysis", analysis)):
            _check_kind(name, part, Dictionary, optional=name == "analysis")
        _check_kind("synthesis", synthesis, Dictionary, optional=True)
        _check_kind("recurrence", recurrence, nn.Module, optional=True)
        _check_kind("likelihood", likelihood, Likelihood)
        _check_kind("method", method, Method, optional=True)
        _check_kind("num_steps", num_steps, Integral)
        _check_kind("shrinkage", shrinkage, Shrinkage, optional=True)
        _check_kind("step_size", step_size, Real, optional=True)
        _check_kind("lipschitz", lipschitz, Real, optional=True)
        if num_steps < 1:
            raise ValueError(f"Expected num_steps >= 1, got {num_steps}.")
        for name, number in (("step_size", step_size), ("lipschitz", lipschitz)):
            if number is not None and not 0 < number < math.inf:
                raise ValueError(f"Expected a finite {name} > 0, got {number}.")
        if step_size is not None and lipschitz is not None:
            raise ValueError(
                f"Expected step_size or lipschitz, got both: {step_size}, {lipschitz}. The first "
                "is the whole step, the second leaves the likelihood's curvature to be divided by."
            )
        self.dictionary = dictionary
        self.likelihood = likelihood
        self.analysis = analysis
        self.synthesis = synthesis
        self.recurrence = recurrence
        self.num_steps = num_steps
        self.method = FISTA() if method is None else method
        self.step_size = step_size
        self.lipschitz = lipschitz
        if shrinkage is None:
            shrinkage = Proximal(dictionary.num_atoms).to(dictionary.like)
        shrinkage.check(dictionary)
        self.shrinkage = shrinkage

    def forward(
        self,
        y: Tensor,
        law: Law,
        *,
        mask: Tensor | None = None,
        atoms: Tensor | None = None,
    ) -> Tensor:
        """Codes of a batch of data.

        Args:
            y: Shape ``(..., *signal_shape)``.
            law: Prior of one datum's codes, as ``distributions.codes_prior`` makes it.
            mask: True where a sample was observed, broadcastable to ``y``.
            atoms: In place of the dictionary's, where they are sampled.

        Returns:
            Shape ``(..., *code_shape)``, with exact zeros.

        Raises:
            TypeError: If ``y`` is not a floating tensor of the dictionary's dtype, ``mask`` not
                boolean, or ``law`` not a Pyro distribution.
            RuntimeError: If ``y`` is on another device than the dictionary.
            ValueError: If shapes do not fit.
        """
        self._check(y, law, mask, atoms)
        tied = self.dictionary.bind(atoms)
        synthesis = tied if self.synthesis is None else self.synthesis.bind()
        analysis = tied if self.analysis is None else self.analysis.bind()
        problem = Problem(
            y, synthesis, analysis, self.likelihood, law, self.dictionary.signal_dims, mask
        )
        return current_gradient().codes(_Layers(self, problem, self._step(problem)))

    def _step(self, problem: Problem) -> Tensor:
        if self.step_size is not None:
            return torch.as_tensor(self.step_size, dtype=problem.y.dtype, device=problem.y.device)
        lipschitz = self.lipschitz
        return problem.step_size(problem.squared_norm() if lipschitz is None else lipschitz)

    def _check(self, y: Tensor, law: Law, mask: Tensor | None, atoms: Tensor | None) -> None:
        """Once for all layers, which check nothing."""
        check_tensor("y", y, self.dictionary.like)
        if atoms is not None:
            check_tensor("atoms", atoms, y)
            own = atoms.dim() - self.dictionary.atoms.dim()
            _check_leading(y.shape[: y.dim() - self.dictionary.signal_dims], atoms.shape[:own])
        if mask is not None:
            check_mask(y, mask)
        shape = self.dictionary.code_shape(y.shape)
        for name, part in (("analysis", self.analysis), ("synthesis", self.synthesis)):
            if part is not None and part.code_shape(y.shape) != shape:
                raise ValueError(
                    f"Expected {name} to make codes of the dictionary's shape {tuple(shape)}, got "
                    f"{tuple(part.code_shape(y.shape))}."
                )
        _check_kind("law", law, Law)
        one = shape[len(shape) - self.dictionary.code_dims :]
        if law.event_shape != one:
            raise ValueError(
                f"Expected a law of one datum's codes, event shape {tuple(one)}, got "
                f"{tuple(law.event_shape)}. Try distributions.codes_prior."
            )
        self.likelihood.check(y, mask)


class _Layers:
    """The layers of an encoder for given data."""

    def __init__(self, encoder: Unrolled, problem: Problem, step: Tensor) -> None:
        self.num_steps = encoder.num_steps
        self.method, self.shrinkage = encoder.method, encoder.shrinkage
        self.problem, self.step = problem, step
        self.code_dims = problem.code_dims
        self.recurrence = encoder.recurrence
        self.symmetric = problem.analysis is problem.synthesis and self.recurrence is None
        self.drive: Tensor | None = None
        if self.recurrence is not None:
            self.drive = problem.analysis.adjoint(_observed(problem))

    def start(self) -> State:
        return self.method.start()

    def layer(self, state: State, index: int) -> State:
        value = self.ascend(state.point)
        return self.method.advance(state, self._shrunk(value, index), self.code_dims)

    def ascend(self, point: Tensor | None) -> Tensor:
        if self.recurrence is None or self.drive is None:
            return self.problem.ascend(point, self.step)
        return self.drive if point is None else self.drive + self.recurrence(point)

    def curvature(self, point: Tensor, index: Tensor) -> Curvature:
        synthesis, bend = self.problem.synthesis, self.problem.bend(point)
        few = synthesis.at(index, point.shape)
        step = self.step.expand(point.shape).take(index)

        def image(values: Tensor) -> Tensor:
            return bend(few.forward(step * values))

        return Curvature(
            at_active=lambda values: few.adjoint(image(values)),
            at_all=lambda values: synthesis.adjoint(image(values)),
        )

    def shrink(self, value: Tensor) -> Tensor:
        return self._shrunk(value, self.num_steps - 1)

    def _shrunk(self, value: Tensor, index: int) -> Tensor:
        return self.shrinkage.allowed(self.problem.law, value, self.step, index, self.num_steps)


def _observed(problem: Problem) -> Tensor:
    y, mask = problem.y, problem.mask
    return y if mask is None else torch.where(mask, y, torch.zeros_like(y))


def _check_leading(of_data: torch.Size, of_atoms: torch.Size) -> None:
    try:
        torch.broadcast_shapes(of_data, of_atoms)
    except RuntimeError:
        raise ValueError(
            f"Expected leading dimensions of sampled atoms that broadcast with those of the data, "
            f"{tuple(of_data)}, got {tuple(of_atoms)}. Particles stand in front: (particles, 1)."
        ) from None


def _check_kind(name: str, value: object, kind: type, *, optional: bool = False) -> None:
    if not isinstance(value, kind) and not (optional and value is None):
        raise TypeError(f"Expected {name} to be a {kind.__name__}, got {value!r}.")
