"""Shrinkages minimise what they say; the eigenvalue bound is above and near the truth."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_sparse.ops import (
    group_soft_threshold,
    hard_threshold,
    largest_eigenvalue_bound,
    soft_threshold,
    soft_threshold_nonnegative,
)

Shrinkage = Callable[..., Tensor]
GRID = np.linspace(-6.0, 6.0, 24_001)  # holds zero exactly; spacing 5e-4

# Operator, its penalty times the level, and the lowest code it allows.
PENALTIES = {
    "soft": (soft_threshold, lambda z, t: t * np.abs(z), -np.inf),
    "nonnegative": (soft_threshold_nonnegative, lambda z, t: t * z, 0.0),
    "hard": (hard_threshold, lambda z, t: t**2 / 2 * (z != 0), -np.inf),
}
SHRINKAGES = [soft_threshold, soft_threshold_nonnegative, hard_threshold, group_soft_threshold]
SHAPES = [(), (3,), (2, 1)]

shrinkages = pytest.mark.parametrize("shrink", SHRINKAGES, ids=lambda f: f.__name__)
elementwise = pytest.mark.parametrize("shrink", SHRINKAGES[:3], ids=lambda f: f.__name__)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def numpy64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("name", PENALTIES)
def test_shrinkage_minimises_its_objective(
    name: str, threshold: float, dtype: torch.dtype, device: torch.device
) -> None:
    shrink, penalty, lowest = PENALTIES[name]
    codes = 10 * torch.rand(200, dtype=dtype, device=device) - 5
    result = numpy64(shrink(codes, threshold))
    u = numpy64(codes)
    assert (result >= lowest).all()

    def objective(z: np.ndarray, u: np.ndarray) -> np.ndarray:
        return penalty(z, threshold) + (z - u) ** 2 / 2

    grid = GRID[lowest <= GRID]
    best = objective(grid[None, :], u[:, None])
    # The objective is flat at its minimum: a rounding of the code by eps costs eps * |slope| = 0
    # to first order, and eps * threshold where the code was rounded off an exact zero.
    slack = 8 * torch.finfo(dtype).eps * (1 + threshold)
    assert (objective(result, u) <= best.min(1) + slack).all()
    assert (objective(result, u) >= best.min(1) - 1e-6).all()  # the grid is fine enough to compare


@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0])
def test_group_shrinkage_minimises_its_objective_over_a_plane(
    threshold: float, dtype: torch.dtype, device: torch.device
) -> None:
    codes = torch.randn(12, 2, dtype=dtype, device=device)
    result, u = numpy64(group_soft_threshold(codes, threshold)), numpy64(codes)
    axis = np.linspace(-4, 4, 401)
    plane = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)

    def objective(z: np.ndarray, u: np.ndarray) -> np.ndarray:
        return threshold * np.linalg.norm(z, axis=-1) + ((z - u) ** 2).sum(-1) / 2

    best = objective(plane, u[:, None]).min(1)
    value = objective(result, u)
    assert (value <= best + 8 * torch.finfo(dtype).eps).all()
    assert (value >= best - 0.02**2 * (1 + 10 * threshold)).all()


@pytest.mark.parametrize("dim", [-1, 0, (-1,), (-2, -1), (0, 2), (0, 1, 2)], ids=str)
def test_group_shrinkage_meets_the_optimality_conditions(
    dim: int | tuple[int, ...], device: torch.device
) -> None:
    codes = torch.randn(4, 3, 5, dtype=torch.float64, device=device)
    axes = dim if isinstance(dim, tuple) else (dim,)
    u = numpy64(codes)
    length = np.sqrt((u**2).sum(axes, keepdims=True))
    threshold = float(np.median(length)) * 0.999  # some groups on either side
    z = numpy64(group_soft_threshold(codes, threshold, dim))
    size = np.sqrt((z**2).sum(axes, keepdims=True))
    active = size > 0
    assert (active == (length > threshold)).all()
    direction = z / np.where(active, size, 1.0)
    stationarity = np.where(active, z - u + threshold * direction, 0.0)
    np.testing.assert_allclose(stationarity, 0.0, atol=1e-12)
    assert (z[np.broadcast_to(~active, z.shape)] == 0).all()


@elementwise
@shapes
def test_threshold_broadcasts_to_codes(
    shrink: Shrinkage, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    codes = torch.randn(2, 3, dtype=dtype, device=device)
    threshold = torch.rand(shape, dtype=dtype, device=device)
    result = shrink(codes, threshold)
    assert result.shape == codes.shape
    assert result.dtype == dtype
    levels = threshold.expand(2, 3)
    singly = [
        shrink(u, t.item()) for row, ts in zip(codes, levels) for u, t in zip(row, ts, strict=True)
    ]
    torch.testing.assert_close(result, torch.stack(singly).reshape(2, 3), rtol=1e-6, atol=1e-7)


@elementwise
@shapes
def test_shrinkage_keeps_shape_and_dtype(
    shrink: Shrinkage, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    result = shrink(torch.randn(shape, dtype=dtype, device=device), 0.1)
    assert (result.shape, result.dtype, result.device.type) == (shape, dtype, device.type)


@pytest.mark.parametrize("shape", [(3,), (2, 1), (2, 3, 4)], ids=str)
def test_group_shrinkage_keeps_shape_and_takes_a_level_for_each_group(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    codes = torch.randn(shape, dtype=dtype, device=device)
    levels = torch.rand(*shape[:-1], 1, dtype=dtype, device=device)
    result = group_soft_threshold(codes, levels)
    assert (result.shape, result.dtype) == (shape, dtype)
    groups, rows = result.reshape(-1, shape[-1]), codes.reshape(-1, shape[-1])
    singly = [group_soft_threshold(u, t.item()) for u, t in zip(rows, levels.flatten())]
    torch.testing.assert_close(groups, torch.stack(singly))


@shrinkages
def test_codes_at_or_below_the_threshold_are_exactly_zero(
    shrink: Shrinkage, dtype: torch.dtype, device: torch.device
) -> None:
    threshold = torch.tensor(0.7, dtype=dtype, device=device)
    inside = torch.tensor([0.7, 0.1, 0.0, -0.0, 1e-30], dtype=dtype, device=device)
    above = torch.nextafter(threshold, 2 * threshold)
    both = torch.cat([inside, -inside])[:, None]  # groups of one, for the group shrinkage
    assert (shrink(both, threshold) == 0).all()
    assert (shrink(above[None], threshold) != 0).all()


@shrinkages
def test_threshold_zero_changes_nothing_allowed(shrink: Shrinkage, dtype: torch.dtype) -> None:
    codes = torch.rand(3, 4, dtype=dtype)  # non-negative: allowed everywhere
    assert torch.equal(shrink(codes, 0.0), codes)
    assert torch.equal(shrink(torch.zeros(3, 4, dtype=dtype), 0.0), torch.zeros(3, 4, dtype=dtype))


@shrinkages
def test_huge_threshold_leaves_nothing(shrink: Shrinkage, dtype: torch.dtype) -> None:
    codes = (1e4 * torch.randn(3, 4, dtype=dtype)).requires_grad_()
    result = shrink(codes, torch.finfo(dtype).max / 4)
    assert (result == 0).all()
    result.sum().backward()
    assert (codes.grad == 0).all()


@pytest.mark.parametrize("shrink", [soft_threshold, hard_threshold, group_soft_threshold])
def test_two_sided_shrinkage_is_odd(shrink: Shrinkage, dtype: torch.dtype) -> None:
    codes = torch.randn(5, 7, dtype=dtype)
    assert torch.equal(shrink(-codes, 0.4), -shrink(codes, 0.4))


@pytest.mark.parametrize(
    "shrink", [soft_threshold, soft_threshold_nonnegative, group_soft_threshold]
)
def test_convex_shrinkage_is_firmly_nonexpansive(shrink: Shrinkage) -> None:
    a, b = torch.randn(2, 50, 6, dtype=torch.float64)
    moved = shrink(a, 0.5) - shrink(b, 0.5)
    assert (moved.square().sum(-1) <= (moved * (a - b)).sum(-1) + 1e-12).all()


@shrinkages
def test_gradients_of_codes_and_threshold_off_the_kinks(shrink: Shrinkage) -> None:
    codes = torch.tensor([-3.0, -1.2, -0.4, 0.0, 0.2, 0.9, 1.5, 4.0], dtype=torch.float64)
    codes = torch.stack([codes, 0.1 * codes]).requires_grad_()
    threshold = torch.tensor([[0.61], [0.52]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(shrink, (codes, threshold))


@pytest.mark.parametrize("dim", [-1, (-2, -1), (0, 2)], ids=str)
def test_group_shrinkage_gradient_over_several_dims(dim: int | tuple[int, ...]) -> None:
    codes = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda u, t: group_soft_threshold(u, t, dim), (codes, threshold)
    )


@pytest.mark.parametrize("level", [0.0, 0.5])
def test_group_of_zeros_has_a_finite_gradient(level: float, dtype: torch.dtype) -> None:
    codes = torch.randn(3, 4, dtype=dtype)
    codes[1] = 0
    codes.requires_grad_()
    threshold = torch.tensor(level, dtype=dtype, requires_grad=True)
    group_soft_threshold(codes, threshold).square().sum().backward()
    assert torch.isfinite(codes.grad).all() and torch.isfinite(threshold.grad)
    assert (codes.grad[1] == 0).all()
    assert (codes.grad[0] != 0).any()


# --- largest_eigenvalue_bound -------------------------------------------------------------------

SLACK = 0.02  # the default


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


def with_eigenvalues(values: Tensor) -> Tensor:
    basis = orthogonal(len(values))
    matrix = basis @ torch.diag(values.double()) @ basis.T
    return (matrix + matrix.T) / 2


def wishart(size: int, rank: int) -> Tensor:
    factor = torch.randn(size, rank, dtype=torch.float64)
    return factor @ factor.T


def hidden(second: float) -> Tensor:
    """Leading eigenvector orthogonal to the longest column, where the power iteration starts."""
    matrix = torch.zeros(17, 17, dtype=torch.float64)
    matrix[:16, :16] = 1 / 16  # eigenvalue 1, columns of length 1/4
    matrix[16, 16] = second
    return matrix


MATRICES = {
    "random": lambda: wishart(30, 60),
    "square": lambda: wishart(40, 40),
    "rank 1": lambda: wishart(20, 1),
    "rank 3": lambda: wishart(50, 3),
    "identity": lambda: torch.eye(12, dtype=torch.float64),
    "zero": lambda: torch.zeros(7, 7, dtype=torch.float64),
    "one entry": lambda: torch.tensor([[3.0]], dtype=torch.float64),
    "two equal leading": lambda: with_eigenvalues(torch.tensor([5.0, 5.0, 1.0, 0.5, 0.0])),
    "two near leading": lambda: with_eigenvalues(torch.tensor([5.0, 4.99, 4.98, 0.5, 0.0])),
    "slow spectrum": lambda: with_eigenvalues(torch.linspace(0, 1, 80)),
    "start orthogonal, 0.3": lambda: hidden(0.3),
    "start orthogonal, 0.93": lambda: hidden(0.93),
    "start orthogonal, 0.97": lambda: hidden(0.97),
    "start orthogonal, 0.999": lambda: hidden(0.999),
    "tiny": lambda: 1e-28 * wishart(10, 20),
    "large": lambda: 1e12 * wishart(10, 20),
}


def check_bound(bound: Tensor, matrix: Tensor, slack: float = SLACK) -> None:
    """Between the truth and five times the slack above it, up to the rounding of the dtype."""
    truth = np.linalg.eigvalsh(matrix.cpu().numpy().astype(np.complex128))[..., -1].clip(0)
    rounding = 8 * matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    value = numpy64(bound)
    assert not bound.requires_grad
    assert not bound.is_complex()
    assert value.shape == truth.shape
    assert (value >= truth * (1 - rounding)).all()
    assert (value <= truth * (1 + 5 * slack) * (1 + rounding)).all()


@pytest.mark.parametrize("name", MATRICES)
def test_bound_is_above_and_near_the_largest_eigenvalue(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    matrix = MATRICES[name]().to(dtype=dtype, device=device)
    bound = largest_eigenvalue_bound(matrix)
    assert bound.dtype == dtype
    check_bound(bound, matrix)


def test_bound_of_a_hundred_random_spectra() -> None:
    for _ in range(100):
        size = int(torch.randint(1, 25, ()))
        spectrum = torch.rand(size, dtype=torch.float64) ** float(10 * torch.rand(()))
        matrix = with_eigenvalues(spectrum)
        check_bound(largest_eigenvalue_bound(matrix), matrix)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_bound_of_complex_hermitian_matrices(dtype: torch.dtype, device: torch.device) -> None:
    factor = torch.randn(5, 9, 6, dtype=dtype, device=device)
    matrix = factor @ factor.mH
    check_bound(largest_eigenvalue_bound(matrix), matrix)


@pytest.mark.parametrize("batch", [(4,), (2, 1), (2, 3)], ids=str)
def test_bound_of_a_batch_is_one_for_each(batch: tuple[int, ...], device: torch.device) -> None:
    factor = torch.randn(*batch, 8, 8, dtype=torch.float64, device=device)
    factor = factor * torch.logspace(-6, 6, factor[..., 0, 0].numel(), device=device).reshape(
        *batch, 1, 1
    )
    matrix = factor @ factor.mT
    check_bound(largest_eigenvalue_bound(matrix), matrix)


def test_one_hard_matrix_in_a_batch_does_not_spoil_the_others() -> None:
    matrix = torch.stack([hidden(0.3), torch.eye(17, dtype=torch.float64), 0 * hidden(0.3)])
    check_bound(largest_eigenvalue_bound(matrix), matrix)


def test_joint_bound_is_that_of_the_block_diagonal_matrix(dtype: torch.dtype) -> None:
    factor = torch.randn(2, 3, 6, 4, dtype=dtype)
    blocks = factor @ factor.mT
    bound = largest_eigenvalue_bound(blocks, joint=True)
    whole = torch.block_diag(*blocks.flatten(0, 1))
    check_bound(bound, whole)


def test_joint_bound_with_a_hidden_leading_block() -> None:
    blocks = torch.stack([hidden(0.3), torch.diag(torch.full((17,), 0.9, dtype=torch.float64))])
    check_bound(largest_eigenvalue_bound(blocks, joint=True), torch.block_diag(*blocks))


@pytest.mark.parametrize("slack", [1e-3, 0.02, 0.3])
def test_bound_keeps_to_the_slack_asked_for(slack: float) -> None:
    matrix = wishart(15, 30)
    bound = largest_eigenvalue_bound(matrix, slack=slack)
    check_bound(bound, matrix, slack)


def test_bound_is_the_same_in_every_call_and_draws_nothing() -> None:
    matrix = wishart(30, 40)
    state = torch.get_rng_state()
    first, second = largest_eigenvalue_bound(matrix), largest_eigenvalue_bound(matrix)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_bound_is_detached() -> None:
    assert not largest_eigenvalue_bound(wishart(4, 5).requires_grad_()).requires_grad
