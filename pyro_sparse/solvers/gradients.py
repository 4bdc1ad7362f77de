"""How the codes of an unrolled encoder depend on its parameters, as far as a gradient goes.

The codes are the same whichever is chosen; what differs is how much of the way that led to them is
differentiated, and so the gradient of a dictionary that training follows. The choice is that of an
objective (``infer.Differentiated``), which makes it for all encoders that run within it:

    with differentiated(Detached()):
        codes = encoder(y, law)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_sparse.dictionaries.base import check_sizes
from pyro_sparse.solvers.methods import State


class Curvature(NamedTuple):
    """Curvature of the data term times the step, on a vector of the values of the active codes.

    Attributes:
        at_active: The product at the active codes.
        at_all: The product at all codes, in their shape.
    """

    at_active: Callable[[Tensor], Tensor]
    at_all: Callable[[Tensor], Tensor]


class Layers(Protocol):
    """What a choice of gradient asks of the layers of an encoder."""

    num_steps: int
    code_dims: int
    symmetric: bool

    def start(self) -> State:
        """State before the first layer."""
        ...

    def layer(self, state: State, index: int) -> State:
        """State after a layer, differentiable in the state and in all parameters."""
        ...

    def ascend(self, point: Tensor) -> Tensor:
        """The gradient step of the last layer, from any codes."""
        ...

    def curvature(self, point: Tensor, index: Tensor) -> Curvature:
        """What ``ascend`` takes from a change of the codes at ``index``, of the flattened ones."""
        ...

    def shrink(self, value: Tensor) -> Tensor:
        """What the last layer makes of the value of a gradient step."""
        ...


class Gradient:
    """Declares how much of an encoder is differentiated.

    Example:
        >>> class AtMostTen(Gradient):
        ...     def codes(self, layers):
        ...         return Truncated(10).codes(layers)
        >>> from pyro_sparse import infer
        >>> loss = infer.Differentiated(infer.SparseELBO(), AtMostTen())  # for infer.fit
    """

    def codes(self, layers: Layers) -> Tensor:
        """Run the layers; the codes depend on the parameters as far as this says."""
        raise NotImplementedError

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"


class BackPropagation(Gradient):
    """Through all layers: the exact gradient of the network. Memory grows with its depth.

    Example:
        >>> with differentiated(BackPropagation()):
        ...     current_gradient()
        BackPropagation()
    """

    def codes(self, layers: Layers) -> Tensor:  # noqa: D102
        return _run(layers, layers.start(), 0, layers.num_steps)


class Detached(Gradient):
    """Not at all: codes are constants, and a dictionary learns as a decoder alone.

    This is alternating minimisation. At converged MAP codes, and with their penalty in the
    objective, it is the exact gradient (Danskin's theorem).

    Example:
        >>> from pyro_sparse import infer
        >>> loss = infer.Differentiated(infer.SparseELBO(), Detached())  # for infer.fit
    """

    def codes(self, layers: Layers) -> Tensor:  # noqa: D102
        with torch.no_grad():
            return _run(layers, layers.start(), 0, layers.num_steps)


class Truncated(Gradient):
    """Through the last layers alone; memory grows with their number.

    Through one of them it is the one-step gradient: cheap, and pointing elsewhere than the true one
    (cosines of 0.6 to 0.8 are usual for convolutional dictionaries).

    Args:
        num_steps: How many layers, ``>= 1``; with the whole depth it is ``BackPropagation``.

    Raises:
        ValueError: If it is not a whole number of at least one.

    References:
        Williams & Peng (1990), Neural Comput. 2(4); one step: Bolte, Pauwels & Vaiter (2023),
        NeurIPS 36.

    Example:
        >>> from pyro_sparse import infer
        >>> loss = infer.Differentiated(infer.SparseELBO(), Truncated(3))  # for infer.fit
    """

    def __init__(self, num_steps: int) -> None:
        check_sizes(num_steps=num_steps)
        self.num_steps = num_steps

    def codes(self, layers: Layers) -> Tensor:  # noqa: D102
        first = max(0, layers.num_steps - self.num_steps)
        with torch.no_grad():
            state = _advance(layers, layers.start(), 0, first)
        return _run(layers, state, first, layers.num_steps)


class Implicit(Gradient):
    r"""At the fixed point, by the implicit function theorem; memory of one layer at any depth.

    Converged codes solve :math:`z = F(z, \theta)`, :math:`F` the last layer without momentum, so
    that :math:`\partial z / \partial \theta = (I - \partial_z F)^{-1} \partial_\theta F`. Where the
    shrinkage acts by element, with slopes :math:`p`, and :math:`H` is the curvature of the data
    term, the solve is

    .. math:: (\mathrm{diag}(1 / p) - I + s H)\, u = g

    on the active codes, symmetric and positive: conjugate gradients on their values alone, for each
    datum until its residual is small. Where few codes are active, a step takes a fraction of a
    layer's time (``LinearMap.at``). How near this comes to the gradient of a deep network is a
    matter of how converged the codes are; of a shallow one it is no gradient at all.

    Args:
        tol: Residual to reach, relative to the right-hand side, of every datum. The gradient's own
            error is some ten times as large where codes compete for the same samples.
        max_steps: Bound on the number of conjugate-gradient steps.

    Raises:
        ValueError: If a number is not positive; and at a call, if the encoder's weights are untied.
        NotImplementedError: At the backward pass, if the shrinkage does not act by element, such as
            on groups.

    References:
        Agrawal, Amos, Barratt, Boyd, Diamond & Kolter (2019), NeurIPS 32; for sparse codes:
        Bertrand, Klopfenstein, Massias et al. (2022), JMLR 23(149).

    Example:
        >>> from pyro_sparse import infer
        >>> loss = infer.Differentiated(infer.Reconstruction(), Implicit(tol=1e-3))
    """

    def __init__(self, *, tol: float = 1e-4, max_steps: int = 100) -> None:
        check_sizes(max_steps=max_steps)
        if not tol > 0:
            raise ValueError(f"Expected tol > 0, got {tol}.")
        self.tol = tol
        self.max_steps = max_steps

    def codes(self, layers: Layers) -> Tensor:  # noqa: D102
        if not layers.symmetric:
            raise ValueError(
                "Expected tied weights for an implicit gradient: with an analysis of its own the "
                "layers are the gradient of nothing. Use BackPropagation() or Truncated(...)."
            )
        with torch.no_grad():
            fixed = _run(layers, layers.start(), 0, layers.num_steps)
        if not torch.is_grad_enabled():
            return fixed
        value = layers.ascend(fixed)
        codes = layers.shrink(value)
        if codes.requires_grad:
            codes.register_hook(lambda given: self._solved(layers, fixed, value.detach(), given))
        return codes

    @torch.no_grad()
    def _solved(self, layers: Layers, fixed: Tensor, value: Tensor, given: Tensor) -> Tensor:
        """What to pull back through one layer, for a gradient by the codes."""
        slope = _slope(layers.shrink, value).flatten()
        index = (slope > 0).nonzero()[:, 0]
        curvature = layers.curvature(fixed, index)
        extra = 1 / slope.index_select(0, index) - 1

        def system(u: Tensor) -> Tensor:
            return extra * u + curvature.at_active(u)

        code_shape = fixed.shape[fixed.dim() - layers.code_dims :]
        datum = index // code_shape.numel()
        rhs = given.flatten().index_select(0, index)
        num_data = fixed.numel() // code_shape.numel()
        solution = self._conjugate_gradients(system, rhs, datum, num_data)
        pulled = (given - curvature.at_all(solution)).flatten().index_add(0, index, solution)
        return pulled.reshape(given.shape)

    def _conjugate_gradients(
        self, system: Callable[[Tensor], Tensor], rhs: Tensor, datum: Tensor, num_data: int
    ) -> Tensor:
        """Solve for every datum; one that is done, or whose curvature vanishes, stays."""

        def dot(left: Tensor, right: Tensor) -> Tensor:
            return rhs.new_zeros(num_data).index_add(0, datum, left * right)

        solution, residual, direction = torch.zeros_like(rhs), rhs, rhs
        now = dot(residual, residual)
        enough = self.tol**2 * now
        for _ in range(self.max_steps):
            going = now > enough
            if not bool(going.any()):
                break
            image = system(direction)
            bend = dot(direction, image)
            going = going & (bend > 0)
            length = torch.where(going, now / torch.where(going, bend, 1), 0)[datum]
            solution = solution + length * direction
            residual = residual - length * image
            following = dot(residual, residual)
            turn = torch.where(going, following / torch.where(going, now, 1), 0)
            direction = residual + turn[datum] * direction
            now = torch.where(going, following, torch.zeros_like(now))
        return solution


_CURRENT: ContextVar[Gradient | None] = ContextVar("gradient", default=None)


@contextmanager
def differentiated(gradient: Gradient) -> Iterator[None]:
    """Let all unrolled encoders that run within be differentiated so.

    Raises:
        TypeError: If ``gradient`` is no ``Gradient``.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_sparse.dictionaries import Dense
        >>> from pyro_sparse.likelihoods import Gaussian
        >>> from pyro_sparse.solvers import Unrolled
        >>> encoder = Unrolled(Dense(8, 5), Gaussian(1.0), num_steps=3)
        >>> law = dist.Laplace(0.0, 1.0).expand([8]).to_event(1)
        >>> with differentiated(Detached()):
        ...     encoder(torch.randn(2, 5), law).requires_grad
        False
    """
    check_gradient(gradient)
    token = _CURRENT.set(gradient)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_gradient() -> Gradient:
    """How encoders are differentiated here; ``BackPropagation()`` unless something else is said."""
    return _CURRENT.get() or BackPropagation()


def check_gradient(gradient: object) -> None:
    """Refuse what is no ``Gradient``.

    Raises:
        TypeError: Names what came.
    """
    if not isinstance(gradient, Gradient):
        raise TypeError(
            "Expected gradient to be BackPropagation(), Detached(), Truncated(...) or Implicit(), "
            f"got {gradient!r}."
        )


def _advance(layers: Layers, state: State, first: int, until: int) -> State:
    for index in range(first, until):
        state = layers.layer(state, index)
    return state


def _run(layers: Layers, state: State, first: int, until: int) -> Tensor:
    codes = _advance(layers, state, first, until).codes
    assert codes is not None  # there is at least one layer
    return codes


# Random numbers of the vector below before they repeat: a prime, so that none of them falls on the
# same place in two rows, positions or groups.
_PERIOD = 1021


def _slope(shrink: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """Derivative of a shrinkage that acts by element; a random vector proves that it does."""
    value = value.detach().requires_grad_()
    with torch.enable_grad():
        codes = shrink(value)
    (slope,) = torch.autograd.grad(codes, value, torch.ones_like(codes), retain_graph=True)
    generator = torch.Generator().manual_seed(0)
    period = torch.rand(_PERIOD, generator=generator, dtype=torch.float64).to(codes) + 0.5
    probe = period.repeat(-(-codes.numel() // _PERIOD))[: codes.numel()].reshape(codes.shape)
    (pulled,) = torch.autograd.grad(codes, value, probe)
    largest = (slope * probe).abs().max()
    if not bool((pulled - slope * probe).abs().max() <= 1e-3 * largest):
        raise NotImplementedError(
            "Expected a shrinkage that acts on each code by itself, for an implicit gradient. Use "
            "BackPropagation() or Truncated(...)."
        )
    return slope
