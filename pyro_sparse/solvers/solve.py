"""MAP codes to a certificate."""

from __future__ import annotations

import functools
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sparse.dictionaries import Dictionary
from pyro_sparse.distributions import Prior, check_prior, codes_prior, conjugate, prox
from pyro_sparse.distributions.priors import name_of
from pyro_sparse.likelihoods import Gaussian, Likelihood, check_mask
from pyro_sparse.ops import check_tensor, kind_of
from pyro_sparse.solvers.methods import FISTA, Method
from pyro_sparse.solvers.problem import Problem
from pyro_sparse.solvers.steps import Backtracking, StepSize

CHECK_EVERY = 20
"""Steps between two evaluations of the gap; one costs about as much as two or three steps."""

COARSE_GAP, COARSE_STEPS = 1e-3, 500
"""Single precision serves until every gap left is this small, or for this many steps: rounding of
the residual stalls it near 1e-5. What is left is finished in double precision."""


class Solution(NamedTuple):
    """What ``solve`` found.

    Attributes:
        codes: Shape ``(..., *code_shape)``, with exact zeros.
        gap: Relative duality gap of these codes, float64, shape ``(...)``: the objective lies at
            most this fraction above the minimum. ``nan`` if none was asked for.
        num_steps: Steps taken for each datum, shape ``(...)``.
        converged: Whether ``gap <= tol``, shape ``(...)``.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_sparse.dictionaries import Dense
        >>> solution = solve(torch.randn(4, 3), Dense(6, 3), dist.Laplace(0.0, 1.0))
        >>> solution.codes.shape, solution.converged
        (torch.Size([4, 6]), tensor([True, True, True, True]))
    """

    codes: Tensor
    gap: Tensor
    num_steps: Tensor
    converged: Tensor


def solve(
    y: Tensor,
    dictionary: Dictionary,
    prior: Prior,
    *,
    rate: Tensor | None = None,
    likelihood: Likelihood | None = None,
    tol: float | None = 1e-5,
    max_steps: int = 10_000,
    mask: Tensor | None = None,
    init: Tensor | None = None,
    method: Method | None = None,
) -> Solution:
    r"""MAP codes by proximal-gradient steps, each datum until its duality gap certifies it.

    Minimises :math:`\ell(D z; y) - \log p(z)`; with the defaults and a Laplace prior of scale
    :math:`1/\lambda` this is the Lasso, :math:`\tfrac12\|y - Dz\|^2 + \lambda\|z\|_1`. Data that
    are done leave the batch. The step follows from a bound of the likelihood's curvature; with one
    that has none (Poisson, Gamma) each datum searches for its own, by backtracking. The gap is
    evaluated in float64 whatever the dtype of the codes.

    Args:
        y: Data, shape ``(..., *signal_shape)``, any leading dimensions.
        dictionary: Atoms; used as they are, no gradient is taken.
        prior: A distribution that expands to the codes' shape, with a registered ``prox`` and
            ``conjugate``; or a callable of ``rate``.
        rate: Rate for a callable prior, shape ``(atoms,)`` or ``()``.
        likelihood: Default ``Gaussian(1.0)``.
        tol: Relative duality gap to reach; a float32 run can go to about 1e-6. None runs
            ``max_steps`` steps without a certificate, which needs no ``conjugate``.
        max_steps: Bound on the steps of each datum.
        mask: True where a sample was observed, broadcastable to ``y``; the others may hold
            anything, also ``nan``.
        init: Codes to start from, shape ``(..., *code_shape)``; zero by default.
        method: Default ``FISTA(restart=True)``.

    Returns:
        Codes, gaps, steps and whether each gap is within ``tol``: a datum that ran out of steps is
        reported as not converged, with the gap it has.

    Raises:
        ValueError: If a shape does not fit, an observed sample is not finite, ``tol`` or
            ``max_steps`` is not positive, or ``tol`` is below the rounding of an operator in a
            ``Composition`` that works in float32.
        TypeError: If ``y`` is not a floating tensor of the dictionary's dtype, or an argument is of
            another kind.
        RuntimeError: If ``y`` is on another device than the dictionary.
        NotImplementedError: If the prior has no registered ``prox``, or no ``conjugate`` and
            ``tol`` is given.

    References:
        Beck & Teboulle (2009), SIAM J. Imaging Sci. 2(1); the gap: Fercoq, Gramfort & Salmon
        (2015), ICML, sec. 2.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_sparse.dictionaries import Dense
        >>> dictionary = Dense(3, 3, atoms=torch.eye(3))
        >>> solve(torch.tensor([3.0, -0.5, 1.5]), dictionary, dist.Laplace(0.0, 1.0)).codes
        tensor([2.0000, 0.0000, 0.5000])
    """
    check_prior(prior, has_rate=rate is not None)
    _check_kinds(dictionary, likelihood, method, tol, max_steps)
    if tol is not None and not tol > 0 or max_steps < 1:
        raise ValueError(f"Expected tol > 0 (or None), max_steps >= 1; got {tol}, {max_steps}.")
    if not isinstance(y, Tensor) or not y.is_floating_point():
        kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(
            f"Expected y to be a floating tensor, got {kind}. Try torch.as_tensor(y).float()."
        )
    check_tensor("y", y)
    expected = dictionary.like.dtype
    if expected != y.dtype:
        raise TypeError(
            f"Expected y of the dictionary's dtype {expected}, got {y.dtype}. "
            "Convert one of them, for example with dictionary.double()."
        )
    check_tensor("y", y, dictionary.like)  # the device
    with torch.no_grad():
        bound = dictionary.bind()
        shape = dictionary.code_shape(y.shape)
        code_shape = tuple(shape[len(shape) - dictionary.code_dims :])
        signal_shape = y.shape[y.dim() - dictionary.signal_dims :]
        batch = y.shape[: y.dim() - dictionary.signal_dims]
        likelihood = Gaussian(1.0).to(y) if likelihood is None else likelihood
        rows, observed = _observed(y, mask, signal_shape, likelihood.placeholder)
        likelihood.check(rows, observed)
        law = codes_prior(prior, rate, code_shape, like=y)
        if law.batch_shape:
            raise ValueError(
                f"Expected one law for all data, that is a rate of shape ({dictionary.num_atoms},) "
                f"or (), got one that makes the batch shape {tuple(law.batch_shape)}."
            )
        problem = Problem(rows, bound, bound, likelihood, law, dictionary.signal_dims, observed)
        search, step = _steps(problem)
        start = None if init is None else _start(init, shape, y).reshape(-1, *code_shape)
        method = FISTA(restart=True) if method is None else method
        if tol is not None:
            _check_certifiable(problem, tol)
        codes, gap, steps = _iterate(problem, method, search, step, start, tol, max_steps)
    converged = gap <= (-1.0 if tol is None else tol)
    return Solution(
        codes.reshape(*batch, *code_shape),
        gap.reshape(batch),
        steps.reshape(batch),
        converged.reshape(batch),
    )


def _check_kinds(
    dictionary: object, likelihood: object, method: object, tol: object, max_steps: object
) -> None:
    if not isinstance(dictionary, Dictionary):
        raise TypeError(f"Expected a Dictionary, such as Dense(...), got {kind_of(dictionary)}.")
    if not isinstance(likelihood, Likelihood | None):
        raise TypeError(f"Expected a Likelihood, such as Gaussian(...), got {kind_of(likelihood)}.")
    if not isinstance(method, Method | None):
        raise TypeError(f"Expected method to be FISTA() or ISTA(), got {method!r}.")
    if not isinstance(tol, Real | None) or not isinstance(max_steps, Integral):
        raise TypeError(
            "Expected tol to be a number (or None) and max_steps a whole number, got "
            f"{tol!r}, {max_steps!r}."
        )


def _check_certifiable(problem: Problem, tol: float) -> None:
    """Refuse, before the first step, a certificate that could not be had or not be trusted."""
    conjugate(problem.law)
    rounding = problem.synthesis.rounding()
    finest = 64 * rounding
    if rounding > torch.finfo(torch.float64).eps and tol < finest:
        raise ValueError(
            f"Expected tol >= {finest:.1e}, got {tol}: the operator of this composition works in "
            "single precision, and the gap cannot be known better. Use float64 for both."
        )


def _check_order(primal: Tensor, dual: Tensor, problem: Problem) -> None:
    """Refuse a lower bound above what it bounds, beyond rounding."""
    slack = 1e3 * problem.synthesis.rounding() * (primal.abs() + dual.abs())
    above = dual - primal - slack
    if bool((above > 0).any()):
        worst = int(above.argmax())
        raise ValueError(
            "Expected the dual objective to lie below the primal one, got "
            f"{dual[worst].item():.6g} above {primal[worst].item():.6g} for a datum: the "
            f"registered conjugate of {name_of(problem.law)} does not belong to its penalty, or "
            f"the dual of {type(problem.likelihood).__name__} to its loss, which "
            "testing.check_likelihood can tell."
        )


def _iterate(
    problem: Problem,
    method: Method,
    search: StepSize | None,
    step: Tensor,
    start: Tensor | None,
    tol: float | None,
    max_steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Step all data together; those whose gap is small enough are written down and dropped."""
    y = problem.y
    size = len(y)
    codes = y.new_zeros((size, *problem.law.event_shape)) if start is None else start
    gap = torch.full((size,), torch.nan, dtype=torch.float64, device=y.device)
    best_dual = torch.full_like(gap, -torch.inf)
    num_steps = torch.zeros(size, dtype=torch.long, device=y.device)
    left = torch.arange(size, device=y.device)
    state = method.start(start)
    exact = problem if tol is None else problem.double()  # not asked for without a certificate
    count = 0
    while count < max_steps and len(left):
        until = min(max_steps, count + (max_steps if tol is None else CHECK_EVERY))
        for _ in range(count, until):
            moved, step = _advanced(problem, search, state.point, step)
            state = method.advance(state, moved, problem.code_dims)
        count = until
        assert state.codes is not None
        codes[left] = state.codes.to(codes.dtype)
        num_steps[left] = count
        if tol is None:
            break
        rounded = codes[left].double()  # the gap is that of the codes that are returned
        primal = exact.objective(rounded)
        # Every feasible point bounds the minimum from below, so the best one so far counts.
        dual = torch.maximum(best_dual[left], exact.dual_objective(rounded))
        best_dual[left] = dual
        _check_order(primal, dual, problem)
        relative = (primal - dual) / primal.clamp_min(torch.finfo(torch.float64).tiny)
        gap[left] = relative.clamp_min(0)
        keep = ~(relative <= tol)
        if not bool(keep.all()):
            index = keep.nonzero().squeeze(-1)
            problem, exact = problem.select(index), exact.select(index)
            state = state.map(functools.partial(_take, index=index))
            step = step if step.dim() == 0 or len(step) == 1 else step[index]
            left = left[index]
        coarse = problem.y.dtype != torch.float64
        if coarse and len(left) and (count >= COARSE_STEPS or gap[left].max() <= COARSE_GAP):
            problem, step = exact, step.double()
            state = state.map(Tensor.double)
    return codes, gap, num_steps


class _Flat:
    """A problem as a search for steps sees it: codes of each datum as one vector."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.shape = problem.law.event_shape

    @property
    def start(self) -> Tensor:
        return self.problem.y.new_zeros(len(self.problem.y), self.shape.numel())

    def value(self, codes: Tensor) -> Tensor:
        return self.problem.data_term(self.codes(codes))

    def gradient(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        predictor = self.problem.synthesis.forward(self.codes(codes))
        slope = -self.problem.analysis.adjoint(self.problem.score(predictor))
        return self.value(codes), slope.flatten(1)

    def prox(self, codes: Tensor, step: Tensor) -> Tensor:
        step = step.reshape(-1, *[1] * len(self.shape))
        return prox(self.problem.law, self.codes(codes), step).flatten(1)

    def codes(self, flat: Tensor) -> Tensor:
        return flat.reshape(-1, *self.shape)


def _steps(problem: Problem) -> tuple[StepSize | None, Tensor]:
    """The step of a bounded curvature; where there is no bound, a search and where it begins."""
    try:
        return None, problem.step_size(problem.squared_norm())
    except NotImplementedError:
        search = Backtracking()
        with torch.enable_grad():
            return search, search.first(_Flat(problem))


def _advanced(
    problem: Problem, search: StepSize | None, point: Tensor | None, step: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes after one step, and the step size that it took."""
    if search is None:
        return problem.proximal_step(point, step), step
    smooth = _Flat(problem)
    start = smooth.start if point is None else point.flatten(1)
    codes, step = search.advance(smooth, start, step)
    return smooth.codes(codes), step


def _take(part: Tensor, index: Tensor) -> Tensor:
    return part[index]


def _start(init: Tensor, shape: torch.Size, y: Tensor) -> Tensor:
    check_tensor("init", init)
    if init.shape != shape:
        raise ValueError(f"Expected init of shape {tuple(shape)}, got {tuple(init.shape)}.")
    if not bool(torch.isfinite(init).all()):
        raise ValueError("Expected init to be finite. Leave it out to start from zero.")
    return init.detach().to(y, copy=True)


def _observed(
    y: Tensor, mask: Tensor | None, signal_shape: tuple[int, ...], placeholder: float
) -> tuple[Tensor, Tensor | None]:
    """Data and mask with one leading dimension; a placeholder stands for what was not observed."""
    y = y.detach()
    if mask is not None:
        mask = check_mask(y, mask)
        if mask.device != y.device:
            raise RuntimeError(
                f"Expected mask on the data's device {y.device}, got {mask.device}. "
                f"Try mask.to({str(y.device)!r})."
            )
        y = torch.where(mask, y, torch.full_like(y, placeholder))
        mask = mask.reshape(-1, *signal_shape)
    rows = y.reshape(-1, *signal_shape)
    finite = torch.isfinite(rows)
    if not bool(finite.all()):
        first = tuple(int(i) for i in (~finite).nonzero()[0])
        raise ValueError(
            f"Expected finite data, got {int((~finite).sum())} values that are not, the first at "
            f"{first} (leading dimensions flattened). Pass mask= (True = observed)."
        )
    return rows, mask
