"""ISTA and FISTA as the rule that turns one proximal step into the next starting point.

The proximal step itself is ``Problem.proximal_step``; a method holds no data and no parameters, so
the same object serves an unrolled encoder and a solver that runs to a certificate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """Where an iteration stands.

    Attributes:
        codes: The iterate, after its proximal step; None before the first.
        point: Where the next proximal step starts from; None for zero.
        momentum: FISTA's sequence ``t``; a number, or one for each datum, broadcastable to codes.

    Example:
        >>> State(torch.ones(2), torch.ones(2), momentum=1.0).map(lambda codes: codes[:1])
        State(codes=tensor([1.]), point=tensor([1.]), momentum=1.0)
    """

    codes: Tensor | None
    point: Tensor | None
    momentum: Tensor | float

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        """Apply a function to everything that there is one of for each datum."""
        codes = None if self.codes is None else function(self.codes)
        point = None if self.point is None else function(self.point)
        momentum = self.momentum
        return State(codes, point, function(momentum) if isinstance(momentum, Tensor) else momentum)


class Method:
    """Declares how a sequence of proximal steps is continued.

    Example:
        >>> class Damped(Method):
        ...     def advance(self, state, codes, code_dims):
        ...         before = torch.zeros_like(codes) if state.codes is None else state.codes
        ...         return State(codes, (codes + before) / 2, 1.0)
        >>> Damped().advance(Damped().start(), torch.tensor([2.0]), code_dims=1).point
        tensor([1.])
    """

    def start(self, codes: Tensor | None = None) -> State:
        """State before the first step, at ``codes`` or at zero."""
        return State(codes, codes, 1.0)

    def advance(self, state: State, codes: Tensor, code_dims: int) -> State:
        """State after a proximal step from ``state.point`` gave ``codes``."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class ISTA(Method):
    """Iterative shrinkage: each step starts where the last one ended.

    References:
        Daubechies, Defrise & De Mol (2004), Comm. Pure Appl. Math. 57(11).

    Example:
        >>> method = ISTA()
        >>> method.advance(method.start(), torch.tensor([1.0]), code_dims=1).point
        tensor([1.])
    """

    def advance(self, state: State, codes: Tensor, code_dims: int) -> State:  # noqa: D102
        return State(codes, codes, 1.0)


class FISTA(Method):
    r"""Accelerated iterative shrinkage.

    .. math:: w_{t+1} = z_{t+1} + \frac{s_t - 1}{s_{t+1}} (z_{t+1} - z_t), \qquad
        s_{t+1} = \tfrac12 \big(1 + \sqrt{1 + 4 s_t^2}\big)

    Args:
        restart: Forget the momentum of a datum whose last move points against its gradient step.
            It makes convergence fast near the solution; an unrolled encoder, whose depth is fixed
            and small, does without.

    References:
        Beck & Teboulle (2009), SIAM J. Imaging Sci. 2(1), eqs. (4.1)-(4.3); restart: O'Donoghue &
        Candes (2015), Found. Comput. Math. 15, eq. (13).

    Example:
        >>> method = FISTA()
        >>> state = method.advance(method.start(), torch.tensor([1.0]), code_dims=1)
        >>> method.advance(state, torch.tensor([1.5]), code_dims=1).point  # ahead of the codes
        tensor([1.6409])
    """

    def __init__(self, *, restart: bool = False) -> None:
        self.restart = restart

    def advance(self, state: State, codes: Tensor, code_dims: int) -> State:  # noqa: D102
        if state.codes is None or state.point is None:  # from zero: nothing to extrapolate yet
            return State(codes, codes, _following(1.0))
        move = codes - state.codes
        if not self.restart:
            now = float(state.momentum)
            following = _following(now)
            return State(codes, codes + (now - 1) / following * move, following)
        dims = tuple(range(-code_dims, 0))
        against = ((state.point - codes) * move).sum(dims, keepdim=True) > 0
        one = torch.ones_like(against, dtype=codes.dtype)
        speed = torch.where(against, one, state.momentum * one)
        faster = (1 + torch.sqrt(1 + 4 * speed.square())) / 2
        return State(codes, codes + (speed - 1) / faster * move, faster)

    def __repr__(self) -> str:
        return f"FISTA(restart={self.restart})"


def _following(momentum: float) -> float:
    return (1 + math.sqrt(1 + 4 * momentum * momentum)) / 2
