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
from pyro_sparse.solvers.methods import FISTA, Method
from pyro_sparse.solvers.problem import Problem


class Unrolled(nn.Module):
    r"""Fixed number of proximal-gradient steps, differentiable in everything.

    From zero, with step :math:`s` and thresholds :math:`\tau_k`, layer :math:`t` is

    .. math:: z_{t+1} = \mathrm{prox}_{\tau \beta^t s}\big(w_t + s\, D^T \partial_\eta
        \log p(y \mid D w_t)\big)

    where the method makes the next :math:`w` and the prox is the prior's. With
    :math:`\tau = \beta = 1`, tied weights and enough steps it converges to the MAP codes.

    Args:
        dictionary: Gives :math:`D`; tied to the model's when it is the same object.
        likelihood: Gives the residual and the curvature.
        num_steps: Number of layers, ``>= 1``.
        method: ``FISTA()`` or ``ISTA()``; default FISTA.
        learn_thresholds: Learn a factor :math:`\tau_k > 0` on the prox of each atom, from 1.
        threshold_decay: :math:`\beta \in (0, 1]`.
        lipschitz: Fixed value in place of the dictionary's squared norm, as in published nets
            (which often lies below the true one). None: the safe bound, refreshed at every call.
        analysis: Where :math:`D^T` is taken from; the dictionary if not given. Any dictionary with
            the same shapes, such as a copy, which then has weights of its own.
        synthesis: Where :math:`D` in the layers is taken from, likewise.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If a number is out of its range.

    References:
        Gregor & LeCun (2010), ICML; Tolooshams, Dey & Ba (2021), IEEE TNNLS 32(6) (CRsAE).
    """

    def __init__(
        self,
        dictionary: Dictionary,
        likelihood: Likelihood,
        *,
        num_steps: int = 15,
        method: Method | None = None,
        learn_thresholds: bool = True,
        threshold_decay: float = 1.0,
        lipschitz: float | None = None,
        analysis: Dictionary | None = None,
        synthesis: Dictionary | None = None,
    ) -> None:
        super().__init__()
        for name, part in (("dictionary", dictionary), ("analysis", analysis)):
            _check_kind(name, part, Dictionary, optional=name == "analysis")
        _check_kind("synthesis", synthesis, Dictionary, optional=True)
        _check_kind("likelihood", likelihood, Likelihood)
        _check_kind("method", method, Method, optional=True)
        _check_kind("num_steps", num_steps, Integral)
        _check_kind("threshold_decay", threshold_decay, Real)
        _check_kind("lipschitz", lipschitz, Real, optional=True)
        if num_steps < 1:
            raise ValueError(f"Expected num_steps >= 1, got {num_steps}.")
        if not 0 < threshold_decay <= 1:
            raise ValueError(f"Expected threshold_decay in (0, 1], got {threshold_decay}.")
        if lipschitz is not None and not 0 < lipschitz < math.inf:
            raise ValueError(f"Expected a finite lipschitz > 0, got {lipschitz}.")
        self.dictionary = dictionary
        self.likelihood = likelihood
        self.analysis = analysis
        self.synthesis = synthesis
        self.num_steps = num_steps
        self.method = FISTA() if method is None else method
        self.threshold_decay = threshold_decay
        self.lipschitz = lipschitz
        self.log_threshold: nn.Parameter | None = None
        if learn_thresholds:
            zeros = dictionary.like.new_zeros(dictionary.num_atoms)
            self.log_threshold = nn.Parameter(zeros)

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
        lipschitz = self.lipschitz
        step = problem.step_size(problem.squared_norm() if lipschitz is None else lipschitz)
        prox_step = step
        if self.log_threshold is not None:
            positions = [1] * (problem.code_dims - 1)
            prox_step = step * self.log_threshold.exp().reshape(-1, *positions)
        state = self.method.start()
        for layer in range(self.num_steps):
            decayed = prox_step * self.threshold_decay**layer
            codes = problem.proximal_step(state.point, step, decayed)
            state = self.method.advance(state, codes, problem.code_dims)
        assert state.codes is not None
        return state.codes

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
        self.likelihood.check(y)


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
