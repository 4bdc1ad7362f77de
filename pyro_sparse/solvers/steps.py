"""How long a proximal-gradient step on any objective may be."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Protocol

import torch
from torch import Tensor

from pyro_sparse.dictionaries.base import check_sizes


class Smooth(Protocol):
    """What a step size may ask of a program: codes are packed, ``(*data_shape, codes)``.

    Attributes:
        start: Where the encoder starts.
    """

    @property
    def start(self) -> Tensor:
        """Where the encoder starts."""

    def value(self, codes: Tensor) -> Tensor:
        """Minus the log-density of what depends on the codes, in nats; shape ``data_shape``."""

    def gradient(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The value, detached, and its gradient."""

    def prox(self, codes: Tensor, step: Tensor) -> Tensor:
        """Proximal step of the priors, ``step`` of shape ``(*data_shape, 1)``."""


class StepSize:
    """Declares how long a step is, for each datum apart and for all its codes together.

    A step size is not differentiated.

    Example:
        >>> class Half(StepSize):
        ...     def __init__(self, inner):
        ...         self.inner = inner
        ...     def first(self, smooth):
        ...         return self.inner.first(smooth) / 2
        >>> step = Half(PowerIteration())  # for guides.AutoUnrolled(model, step=step)
    """

    def first(self, smooth: Smooth) -> Tensor:
        """Step size of the first step, shape ``(*data_shape, 1)``."""
        raise NotImplementedError

    def advance(self, smooth: Smooth, point: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """One proximal-gradient step from ``point``: the codes, and the step size that it took."""
        gradient = smooth.gradient(point)[1]
        return smooth.prox(point - step * gradient, step), step


class Fixed(StepSize):
    """The same step for all layers, stated by the user.

    Args:
        step: One over a bound of the curvature of minus the log-likelihood of a datum (whatever
            the size of a subsample): positive, in squared code units per nat. A number, a tensor
            that broadcasts to the plates of the data, or a callable without arguments that returns
            one, called anew at every call of the guide. Not checked against the truth.

    Raises:
        TypeError: If it is of another kind.
        ValueError: If it is not positive and finite, or a tensor that requires a gradient.

    Example:
        >>> Fixed(0.5)
        Fixed(0.5)
    """

    def __init__(self, step: float | Tensor | Callable[[], Tensor]) -> None:
        number = isinstance(step, Real) and not isinstance(step, bool)
        if not number and not isinstance(step, Tensor) and not callable(step):
            raise TypeError(
                "Expected step to be a number, a tensor or a callable that returns one, got "
                f"{type(step).__name__}."
            )
        if isinstance(step, Tensor) and step.requires_grad:
            raise ValueError("Expected a step that requires no gradient. Try step.detach().")
        if not callable(step) or isinstance(step, Tensor):
            values = torch.as_tensor(step)
            if not bool(((values > 0) & (values < math.inf)).all()):
                raise ValueError(f"Expected a finite step > 0, got {step}.")
        self.step = step

    def first(self, smooth: Smooth) -> Tensor:  # noqa: D102
        step = self.step() if callable(self.step) else self.step
        start = smooth.start
        values = torch.as_tensor(step, dtype=start.dtype, device=start.device).detach()
        try:
            return values.expand(start.shape[:-1]).unsqueeze(-1)
        except RuntimeError:
            raise ValueError(
                f"Expected a step that broadcasts to the data, {tuple(start.shape[:-1])}, got "
                f"{tuple(values.shape)}."
            ) from None

    def __repr__(self) -> str:
        return f"Fixed({self.step})"


class PowerIteration(StepSize):
    r"""One over the largest curvature at the start, by products with the Hessian.

    The products build a Krylov space from a random vector (a Lanczos iteration: what a power
    iteration finds, in fewer products), and the largest eigenvalue found, times ``1 + slack``, is
    the bound. Where the log-likelihood is quadratic in the codes, as of a Gaussian with an affine
    predictor, it lies below the true curvature of a datum of ``K`` codes with a probability of at
    most

    .. math:: 1.648 \sqrt K \exp\big(-(2q - 1) \sqrt\varepsilon\big), \qquad
        \varepsilon = \mathrm{slack} / (1 + \mathrm{slack})

    over the random vector (1e-7 for ``K = 100`` and the defaults), and never by more than rounding
    where ``q >= K``. Elsewhere, as for Poisson data, nothing bounds the curvature away from the
    start: use ``Backtracking()``.

    Args:
        num_products: :math:`q`, products with the Hessian, each about two gradients.
        slack: How far above the estimate the bound lies, as a fraction.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If a number is not positive.

    References:
        Kuczynski & Wozniakowski (1992), SIAM J. Matrix Anal. Appl. 13(4), theorem 4.2.

    Example:
        >>> PowerIteration(slack=0.2)
        PowerIteration(num_products=32, slack=0.2)
    """

    num_products: int
    slack: float

    def __init__(self, num_products: int = 32, *, slack: float = 0.1) -> None:
        check_sizes(num_products=num_products)
        if not isinstance(slack, Real):
            raise TypeError(f"Expected slack to be a number, got {slack!r}.")
        if not 0 < slack < math.inf:
            raise ValueError(f"Expected slack > 0, got {slack}.")
        self.num_products = num_products
        self.slack = slack

    def first(self, smooth: Smooth) -> Tensor:  # noqa: D102
        return _inverse(curvature(smooth, self.num_products) * (1 + self.slack))

    def __repr__(self) -> str:
        return f"PowerIteration(num_products={self.num_products}, slack={self.slack})"


class Backtracking(StepSize):
    r"""The first step, shrunk for a datum wherever the majorisation that a step rests on fails.

    A step :math:`s` from :math:`w` to :math:`z` is taken when :math:`f(z) \le f(w) + \nabla f(w)^T
    d + |d|^2 / 2s` with :math:`d = z - w`, or, where that difference is lost in rounding, when
    :math:`d^T (\nabla f(z) - \nabla f(w)) \le |d|^2 / 2s`, which implies it for a convex
    :math:`f`. Steps never grow again, as FISTA needs. It is safe for every differentiable
    log-likelihood and needs no bound of its curvature.

    Args:
        first: First step to try, as in ``Fixed``; by default one over the curvature at the start,
            estimated by eight products with the Hessian.
        shrink: Factor on a step that fails, in (0, 1).

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If a number is out of its range.

    References:
        Beck & Teboulle (2009), SIAM J. Imaging Sci. 2(1), sec. 4, "FISTA with backtracking".

    Example:
        >>> Backtracking()
        Backtracking(shrink=0.5)
    """

    initial: Fixed | None
    shrink: float

    _TRIALS = 100  # of one step: halving as often leaves nothing of a double

    def __init__(self, first: float | None = None, *, shrink: float = 0.5) -> None:
        if not isinstance(shrink, Real):
            raise TypeError(f"Expected shrink to be a number, got {shrink!r}.")
        if not 0 < shrink < 1:
            raise ValueError(f"Expected shrink in (0, 1), got {shrink}.")
        self.initial = None if first is None else Fixed(first)
        self.shrink = shrink

    def first(self, smooth: Smooth) -> Tensor:  # noqa: D102
        if self.initial is not None:
            return self.initial.first(smooth)
        return _inverse(curvature(smooth, 8) * 1.05)

    def advance(  # noqa: D102
        self, smooth: Smooth, point: Tensor, step: Tensor
    ) -> tuple[Tensor, Tensor]:
        value, gradient = smooth.gradient(point)
        with torch.no_grad():
            step = self._search(smooth, point.detach(), value, gradient.detach(), step)
        return smooth.prox(point - step * gradient, step), step

    def _search(
        self, smooth: Smooth, point: Tensor, value: Tensor, gradient: Tensor, step: Tensor
    ) -> Tensor:
        value = value.unsqueeze(-1)
        eps = torch.finfo(point.dtype).eps
        lost = ~value.isfinite()  # a guard is to see it, not to wait for it
        for _ in range(self._TRIALS):
            trial = smooth.prox(point - step * gradient, step)
            move = trial - point
            allowed = move.square().sum(-1, keepdim=True) / (2 * step)
            reached = smooth.value(trial).unsqueeze(-1)
            excess = reached - value - (gradient * move).sum(-1, keepdim=True) - allowed
            fits = lost | (excess <= -16 * eps * (reached.abs() + value.abs()))
            # Moves at the level of rounding tell nothing about curvature.
            size = move.abs().amax(-1, keepdim=True)
            fits = fits | (size <= 8 * eps * point.abs().amax(-1, keepdim=True))
            if not bool(fits.all()):
                change = smooth.gradient(trial)[1] - gradient
                fits = fits | ((change * move).sum(-1, keepdim=True) <= allowed)
            if bool(fits.all()):
                break
            step = torch.where(fits, step, step * self.shrink)
        return step

    def __repr__(self) -> str:
        started = "" if self.initial is None else f"first={self.initial.step}, "
        return f"Backtracking({started}shrink={self.shrink})"


def curvature(smooth: Smooth, num_products: int) -> Tensor:
    """Largest eigenvalue by magnitude of each datum's Hessian at the start, from below.

    Args:
        smooth: The program.
        num_products: Products with the Hessian.

    Returns:
        Shape ``(*data_shape, 1)``, detached.
    """
    with torch.enable_grad():
        point = smooth.start.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(smooth.value(point).sum(), point, create_graph=True)

    def product(vector: Tensor) -> Tensor:
        if not gradient.requires_grad:
            return torch.zeros_like(vector)
        (found,) = torch.autograd.grad(
            gradient, point, vector, retain_graph=True, allow_unused=True
        )
        return torch.zeros_like(vector) if found is None else found

    with torch.no_grad():
        return _lanczos(product, point.detach(), min(num_products, point.shape[-1]))


def _lanczos(product: Callable[[Tensor], Tensor], like: Tensor, num_products: int) -> Tensor:
    """Largest Ritz value by magnitude of a symmetric operator on the last dimension."""
    # The same vector at every call: an encoder draws nothing from the global generator.
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(like.shape[-1], generator=generator, dtype=torch.float64)
    vector = (normal / normal.norm()).to(like).expand_as(like)
    before, off = torch.zeros_like(like), like.new_zeros(*like.shape[:-1], 1)
    diagonal, off_diagonal = [], []
    for _ in range(num_products):
        image = product(vector) - off * before
        along = (image * vector).sum(-1, keepdim=True)
        image = image - along * vector
        before, off = vector, torch.linalg.vector_norm(image, dim=-1, keepdim=True)
        # Nothing left: the space is closed under the operator, and what follows counts as zero.
        vector = torch.where(off > 0, image / off, torch.zeros_like(image))
        diagonal.append(along)
        off_diagonal.append(off)
    matrix = torch.diag_embed(torch.cat(diagonal, -1))
    if num_products > 1:
        sides = torch.cat(off_diagonal[:-1], -1)
        matrix = matrix + torch.diag_embed(sides, 1) + torch.diag_embed(sides, -1)
    return torch.linalg.eigvalsh(matrix).abs().amax(-1, keepdim=True)


def _inverse(bound: Tensor) -> Tensor:
    """One over a curvature; one where it vanishes, as of a datum that is masked altogether."""
    flat = bound <= torch.finfo(bound.dtype).tiny
    return torch.where(flat, torch.ones_like(bound), 1 / bound)
