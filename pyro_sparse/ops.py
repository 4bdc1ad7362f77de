"""Shrinkage operators, spectral bounds and a parametrisation: pure torch.

Each shrinkage is a proximal operator, ``prox_t(u) = argmin_z t * penalty(z) + (z - u)**2 / 2``;
its docstring names the penalty. They run at every unrolled step, so they check nothing: thresholds
are non-negative by construction where they come from a constrained parameter or a checked prior.
"""

from __future__ import annotations

from numbers import Integral, Real

import torch
from torch import Tensor, nn


def kind_of(value: object) -> str:
    """What something is, in the words of an error message.

    Example:
        >>> kind_of(3.0), kind_of(torch.nn.ReLU)
        ('float', 'the class ReLU, not an object: write ReLU(...)')
    """
    if isinstance(value, type):
        return f"the class {value.__name__}, not an object: write {value.__name__}(...)"
    return type(value).__name__


def soft_threshold(codes: Tensor, threshold: Tensor | float) -> Tensor:
    """Shrink codes towards zero: the proximal operator of ``threshold * |codes|``.

    Args:
        codes: Shape ``(..., atoms)``, or any shape.
        threshold: Non-negative, in code units, broadcastable to ``codes``.

    Returns:
        Shape of ``codes``; exactly zero where ``|codes| <= threshold``.

    References:
        Parikh & Boyd (2014), Proximal Algorithms, sec. 6.5.2.

    Example:
        >>> soft_threshold(torch.tensor([-2.0, 0.5, 3.0]), 1.0)
        tensor([-1.,  0.,  2.])
    """
    # u - clip(u, -t, t): one temporary fewer than sign(u) * relu(|u| - t), and the same bits.
    return codes - torch.clamp(codes, -threshold, threshold)  # type: ignore[arg-type]


def soft_threshold_nonnegative(codes: Tensor, threshold: Tensor | float) -> Tensor:
    """Shrink, keep the positive part: the prox of ``threshold * codes`` over ``codes >= 0``.

    Args:
        codes: Any shape.
        threshold: In code units, broadcastable to ``codes``.

    Returns:
        Shape of ``codes``, non-negative; exactly zero where ``codes <= threshold``.

    References:
        Parikh & Boyd (2014), Proximal Algorithms, sec. 6.5.2 (with the constraint added).

    Example:
        >>> soft_threshold_nonnegative(torch.tensor([-2.0, 0.5, 3.0]), 1.0)
        tensor([0., 0., 2.])
    """
    return torch.relu(codes - threshold)


def hard_threshold(codes: Tensor, threshold: Tensor | float) -> Tensor:
    """Keep or drop, without shrinking: the prox of ``threshold**2 / 2 * (codes != 0)``.

    The penalty counts active codes and is not convex; the operator jumps at the threshold.

    Args:
        codes: Any shape.
        threshold: Non-negative, in code units, broadcastable to ``codes``.

    Returns:
        Shape of ``codes``; ``codes`` where ``|codes| > threshold``, exactly zero elsewhere.

    References:
        Blumensath & Davies (2008), J. Fourier Anal. Appl. 14, eq. (2.2).

    Example:
        >>> hard_threshold(torch.tensor([-2.0, 0.5, 3.0]), 1.0)
        tensor([-2.,  0.,  3.])
    """
    return torch.where(codes.abs() > threshold, codes, torch.zeros_like(codes))


def group_soft_threshold(
    codes: Tensor, threshold: Tensor | float, dim: int | tuple[int, ...] = -1
) -> Tensor:
    """Shrink the length of each group: the prox of ``threshold * ||codes||_2`` along ``dim``.

    Args:
        codes: Any shape; a group is a slice along ``dim``.
        threshold: Non-negative, in code units, broadcastable to ``codes`` with ``dim`` of size 1.
        dim: Dimension, or dimensions, that a group runs over.

    Returns:
        Shape of ``codes``; a group is exactly zero where its length is at most ``threshold``.

    References:
        Yuan & Lin (2006), J. R. Stat. Soc. B 68, eq. (2.4); Parikh & Boyd (2014), sec. 6.5.1.

    Example:
        >>> group_soft_threshold(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0)
        tensor([[2.4000, 3.2000],
                [0.0000, 0.0000]])
    """
    length = torch.linalg.vector_norm(codes, dim=dim, keepdim=True)
    # A group of zeros has length 0 and the gradient 0/0: the factor is taken at length 1 there,
    # where it is not used.
    active = length > threshold
    safe = torch.where(active, length, torch.ones_like(length))
    return torch.where(active, codes * (1 - threshold / safe), torch.zeros_like(codes))


def largest_eigenvalue_bound(
    matrix: Tensor, *, joint: bool = False, slack: float = 0.02, num_steps: int = 32
) -> Tensor:
    """Upper bound of the largest eigenvalue of a positive semi-definite matrix.

    A power iteration proposes ``(1 + slack)`` times its estimate, and a Cholesky factorisation of
    ``bound * I - matrix`` certifies it; where that fails, five times the slack is tried, and then
    the eigenvalues are computed. At the sizes of a dictionary the first is several times cheaper.

    Args:
        matrix: Hermitian positive semi-definite, shape ``(..., n, n)``, real or complex.
        joint: One bound for all matrices of the batch (the norm of their block-diagonal matrix)
            instead of one for each.
        slack: How far above its estimate the bound is proposed, as a fraction.
        num_steps: Power iterations before the proposal.

    Raises:
        TypeError: If ``matrix`` is not a dense tensor in single or double precision, or an option
            is not a number.
        ValueError: If its matrices are not square or empty, ``slack`` is not positive or
            ``num_steps`` is below one.

    Returns:
        Shape ``(...)``, or ``()`` if ``joint``; real and detached. At least the largest eigenvalue
        up to the rounding of its dtype, and at most ``1 + 5 * slack`` times it (plus rounding);
        ``nan`` if a value of ``matrix`` is not finite.

    Example:
        >>> bound = largest_eigenvalue_bound(torch.diag(torch.tensor([1.0, 4.0])))
        >>> bool(4.0 <= bound <= 4.1)
        True
    """
    _check_square(matrix)
    if not isinstance(slack, Real) or not isinstance(num_steps, Integral):
        raise TypeError(
            f"Expected slack to be a number and num_steps a whole one, got {slack!r}, "
            f"{num_steps!r}."
        )
    if not slack > 0 or num_steps < 1:
        raise ValueError(f"Expected slack > 0 and num_steps >= 1, got {slack}, {num_steps}.")
    matrix = matrix.detach()
    size = matrix.shape[-1]
    # Start at the longest column: unlike a random start it draws nothing and is the same in every
    # call. Where it is orthogonal to the leading eigenvector, the certificate below says so.
    start = matrix.abs().square().sum(-2).argmax(-1)
    vector = torch.take_along_dim(matrix, start[..., None, None], dim=-1)
    for _ in range(num_steps):
        vector = matrix @ torch.nn.functional.normalize(vector, dim=-2)
    estimate = torch.linalg.vector_norm(vector, dim=(-2, -1))
    if joint:
        estimate = estimate.max()
    identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    for factor in (1 + slack, 1 + 5 * slack):
        bound = estimate * factor
        _, info = torch.linalg.cholesky_ex(bound[..., None, None] * identity - matrix)
        if bool((info == 0).all()):
            return bound
    if not bool(torch.isfinite(matrix).all()):  # nothing bounds it, and eigvalsh may not return
        return torch.full_like(estimate, torch.nan)
    exact = torch.linalg.eigvalsh(matrix)[..., -1].clamp_min(0)
    exact = exact * (1 + 4 * size * torch.finfo(matrix.dtype).eps)
    return exact.max() if joint else exact


def check_tensor(name: str, value: object, like: Tensor | None = None) -> None:
    """Refuse an argument that is not a dense tensor of floating numbers.

    Args:
        name: Of the argument, for the message.
        value: What a user handed over.
        like: A tensor whose dtype and device it has to share.

    Raises:
        TypeError: If it is of another kind or dtype.
        RuntimeError: If it is on another device than ``like``.

    Example:
        >>> check_tensor("codes", torch.zeros(3), like=torch.zeros(1))
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"Expected {name} to be a floating tensor, got {type(value).__name__}. "
            "Try torch.as_tensor(...)."
        )
    if not value.is_floating_point() or value.layout != torch.strided:
        kind = value.dtype if value.layout == torch.strided else value.layout
        raise TypeError(
            f"Expected {name} to be a floating tensor, dense and real, got {kind}. "
            "Try .float() or .to_dense()."
        )
    if like is not None and value.dtype != like.dtype:
        raise TypeError(
            f"Expected {name} of dtype {like.dtype}, got {value.dtype}. Try .to({like.dtype})."
        )
    if like is not None and value.device != like.device:
        raise RuntimeError(
            f"Expected {name} on the device {like.device}, got {value.device}. "
            f"Try .to({str(like.device)!r})."
        )


def _check_square(matrix: Tensor) -> None:
    allowed = (torch.float32, torch.float64, torch.complex64, torch.complex128)
    if not isinstance(matrix, Tensor) or matrix.dtype not in allowed:
        kind = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
        raise TypeError(
            "Expected matrix to be a tensor in single or double precision, got "
            f"{kind}. Try matrix.float()."
        )
    if matrix.layout != torch.strided:
        raise TypeError(f"Expected a dense matrix, got {matrix.layout}. Try matrix.to_dense().")
    if matrix.dim() < 2 or matrix.shape[-2] != matrix.shape[-1] or matrix.numel() == 0:
        raise ValueError(
            f"Expected square matrices of shape (..., n, n) with n >= 1, got {tuple(matrix.shape)}."
        )


class Positive(nn.Module):
    """Parametrisation of a positive tensor by its logarithm: every gradient step keeps the sign.

    Example:
        >>> from torch.nn.utils import parametrize
        >>> module = nn.Module()
        >>> module.scale = nn.Parameter(torch.tensor(1.0))
        >>> _ = parametrize.register_parametrization(module, "scale", Positive())
        >>> module.parametrizations.scale.original
        Parameter containing:
        tensor(0., requires_grad=True)
    """

    def forward(self, log_value: Tensor) -> Tensor:
        """The positive tensor, from its logarithm."""
        return log_value.exp()

    def right_inverse(self, value: Tensor) -> Tensor:
        """What to store for ``value``: its logarithm."""
        return value.log()
