"""A dictionary seen through a linear operator of the user's: blur, mask, sensing matrix."""

from __future__ import annotations

import math
from numbers import Real
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pyro_sparse.dictionaries.base import Dictionary, LinearMap, check_shape, check_sizes
from pyro_sparse.ops import check_tensor, kind_of


@runtime_checkable
class LinearOperator(Protocol):
    """What a composition asks of an operator: any object with these two methods.

    Example:
        >>> class EveryOther:
        ...     def forward(self, signal):
        ...         return signal[..., ::2]
        ...     def adjoint(self, measurement):
        ...         return torch.stack([measurement, torch.zeros_like(measurement)], -1).flatten(-2)
        >>> operator: LinearOperator = EveryOther()
        >>> operator.adjoint(operator.forward(torch.tensor([1.0, 2.0, 3.0, 4.0])))
        tensor([1., 0., 3., 0.])
    """

    def forward(self, signal: Tensor) -> Tensor:
        """Measurement of a signal, leading dimensions kept."""
        ...

    def adjoint(self, measurement: Tensor) -> Tensor:
        """Adjoint of ``forward``."""
        ...


class CompositionMap(LinearMap):
    """``operator.forward`` after a bound dictionary."""

    def __init__(
        self,
        operator: LinearOperator,
        inner: LinearMap,
        operator_norm: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self.operator = operator
        self.inner = inner
        self.operator_norm = operator_norm
        self.dtype = dtype

    def forward(self, codes: Tensor) -> Tensor:
        """Codes to measurement."""
        return self.operator.forward(self.inner.forward(codes))

    def adjoint(self, signal: Tensor) -> Tensor:
        """Measurement to the shape of codes."""
        return self.inner.adjoint(self.operator.adjoint(signal))

    def at(self, index: Tensor, shape: torch.Size) -> CompositionMap:
        """The operator after the inner map on some codes."""
        inner = self.inner.at(index, shape)
        return CompositionMap(self.operator, inner, self.operator_norm, self.dtype)

    def squared_norm(self, signal_shape: tuple[int, ...] | None = None) -> Tensor:
        """Product of the operator's and the dictionary's bounds."""
        inner = self.inner.squared_norm()
        return self.operator_norm.to(inner) * inner

    def double(self) -> CompositionMap:
        """Takes and gives float64; the user's operator still works in the dtype it had."""
        widened = _Widened(self.operator, self.dtype)
        return CompositionMap(widened, self.inner.double(), self.operator_norm, self.dtype)

    def rounding(self) -> float:
        """That of the dtype which the user's operator works in."""
        return max(torch.finfo(self.dtype).eps, self.inner.rounding())


class _Widened:
    """An operator of any dtype between tensors of float64."""

    def __init__(self, operator: LinearOperator, dtype: torch.dtype) -> None:
        self.operator = operator
        self.dtype = dtype

    def forward(self, signal: Tensor) -> Tensor:
        return self.operator.forward(signal.to(self.dtype)).double()

    def adjoint(self, measurement: Tensor) -> Tensor:
        return self.operator.adjoint(measurement.to(self.dtype)).double()


class Composition(Dictionary):
    r"""A dictionary followed by a fixed linear operator: :math:`\eta = \Phi(D z)`.

    Learning, solving and uncertainty then refer to what was measured: a blurred picture, the
    samples that a mask left, a compressed measurement.

    Args:
        operator: :math:`\Phi`: any object with ``forward(signal)`` and ``adjoint(measurement)``
            that keep leading batch dimensions. Registered as a submodule if it is a module. It is
            taken as fixed: if it changes, build the composition anew.
        dictionary: :math:`D`.
        input_shape: Shape of one signal that the operator takes, such as ``(features,)`` or
            ``(channels, height, width)``.
        operator_squared_norm: An upper bound of :math:`\|\Phi\|_2^2` where one is known (1 for a
            mask or a normalised blur). Otherwise one is computed here; see
            ``operator_norm_bound``.

    Raises:
        TypeError: If ``operator`` lacks one of the two methods or gives no tensors of the
            dictionary's dtype, or ``dictionary`` is none.
        ValueError: If ``adjoint`` is not the adjoint of ``forward``, the given norm is not a
            positive number, or the operator has parameters that require a gradient.

    Example:
        >>> from pyro_sparse.dictionaries import Dense
        >>> class Mask:
        ...     kept = torch.tensor([1.0, 0.0, 1.0])
        ...     def forward(self, signal):
        ...         return self.kept * signal
        ...     adjoint = forward
        >>> seen = Composition(Mask(), Dense(num_atoms=5, num_features=3), input_shape=(3,))
        >>> bool((seen(torch.ones(2, 5))[:, 1] == 0).all())
        True
    """

    def __init__(
        self,
        operator: LinearOperator,
        dictionary: Dictionary,
        *,
        input_shape: tuple[int, ...],
        operator_squared_norm: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(operator, LinearOperator):
            raise TypeError(
                "Expected an operator with methods forward(signal) and adjoint(measurement), got "
                f"{type(operator).__name__}."
            )
        if isinstance(operator, nn.Module) and any(p.requires_grad for p in operator.parameters()):
            raise ValueError(
                "Expected a fixed operator, got one with parameters that require a gradient: the "
                "bound of its norm is computed once. Try operator.requires_grad_(False)."
            )
        if not isinstance(dictionary, Dictionary):
            raise TypeError(
                f"Expected a Dictionary, such as Dense(...), got {kind_of(dictionary)}."
            )
        input_shape = check_shape(input_shape)
        if len(input_shape) != dictionary.signal_dims:
            raise ValueError(
                f"Expected input_shape to be that of one signal, {dictionary.signal_dims} "
                f"dimensions, got {tuple(input_shape)}."
            )
        dictionary.code_shape(input_shape)
        self.dictionary = dictionary
        self.operator = operator
        self.input_shape = tuple(input_shape)
        self.num_atoms = dictionary.num_atoms
        self.code_dims = dictionary.code_dims
        reference = dictionary.like
        measured = _check_adjoint(operator, self.input_shape, reference)
        self.signal_shape = measured
        self.signal_dims = len(measured)
        if operator_squared_norm is None:
            bound = operator_norm_bound(operator, self.input_shape, like=reference)
            if bound == 0:
                raise ValueError("Expected an operator that maps something away from zero.")
        elif not isinstance(operator_squared_norm, Real) and not (
            isinstance(operator_squared_norm, Tensor) and operator_squared_norm.dim() == 0
        ):
            raise TypeError(
                f"Expected operator_squared_norm to be a number, got {operator_squared_norm!r}."
            )
        elif operator_squared_norm > 0 and math.isfinite(operator_squared_norm):
            bound = torch.tensor(float(operator_squared_norm), dtype=torch.float64)
        else:
            raise ValueError(
                f"Expected operator_squared_norm > 0 and finite, got {operator_squared_norm}."
            )
        self.register_buffer("operator_squared_norm", bound)

    @property
    def atoms(self) -> Tensor:
        """Atoms of the inner dictionary, before the operator."""
        return self.dictionary.atoms

    @atoms.setter
    def atoms(self, value: Tensor) -> None:
        self.dictionary.atoms = value

    def bind(self, atoms: Tensor | None = None) -> CompositionMap:  # noqa: D102
        norm: Tensor = self.operator_squared_norm  # type: ignore[assignment]
        dtype = self.dictionary.like.dtype
        return CompositionMap(self.operator, self.dictionary.bind(atoms), norm, dtype)

    def code_shape(self, signal_shape: tuple[int, ...]) -> torch.Size:  # noqa: D102
        signal_shape = check_shape(signal_shape)
        batch = len(signal_shape) - self.signal_dims
        if batch < 0 or tuple(signal_shape[batch:]) != self.signal_shape:
            raise ValueError(
                f"Expected measurements of shape (..., *{self.signal_shape}), the shape that the "
                f"operator makes, got {tuple(signal_shape)}."
            )
        return self.dictionary.code_shape((*signal_shape[:batch], *self.input_shape))


def operator_norm_bound(
    operator: LinearOperator,
    input_shape: tuple[int, ...],
    *,
    like: Tensor,
    num_probes: int = 8,
    num_steps: int = 128,
) -> Tensor:
    r"""Upper bound of :math:`\|\Phi\|_2^2` from products with an operator and its adjoint alone.

    For a random unit vector :math:`x` in :math:`n` dimensions and :math:`A = \Phi^T \Phi`,
    :math:`\|A^q x\| \ge \lambda_{\max}^q |x_1|`, and :math:`|x_1|` is small with small probability:
    with ``num_probes`` vectors the bound fails with a probability of at most 1e-12. The exact norm
    cannot be had so; the bound is too large by about ``(25 * sqrt(n)) ** (1 / num_steps)``: 7 % for
    a picture of 512 x 512.

    Args:
        operator: The operator.
        input_shape: Shape of one signal that the operator takes.
        like: A tensor whose dtype and device the operator works in.
        num_probes: Random vectors; they come from a generator of their own.
        num_steps: Power :math:`q`.

    Returns:
        A float64 scalar on the CPU.

    References:
        Dixon (1983), SIAM J. Numer. Anal. 20(4), 812-814; the tail of one coordinate of a random
        unit vector is that of Halko, Martinsson & Tropp (2011), SIAM Rev. 53(2), lemma 4.1.

    Example:
        >>> class Halved:
        ...     def forward(self, signal):
        ...         return signal / 2
        ...     adjoint = forward
        >>> bound = operator_norm_bound(Halved(), (16,), like=torch.zeros(1))
        >>> 0.25 <= float(bound) < 0.27
        True
    """
    check_sizes(num_probes=num_probes, num_steps=num_steps, input_shape=check_shape(input_shape))
    check_tensor("like", like)
    size = math.prod(input_shape)
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(num_probes, size, generator=generator, dtype=torch.float64)
    vectors = (probes / probes.norm(dim=1, keepdim=True)).to(like)
    log_growth = torch.zeros(num_probes, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(num_steps):
            signal = vectors.reshape(num_probes, *input_shape)
            back = operator.adjoint(operator.forward(signal))
            if not isinstance(back, Tensor) or back.shape != signal.shape:
                raise ValueError(
                    f"Expected an operator that keeps leading dimensions and maps {input_shape} "
                    f"back to itself, got {tuple(getattr(back, 'shape', ()))} from "
                    f"{tuple(signal.shape)}."
                )
            vectors = back.reshape(num_probes, size)
            growth = torch.linalg.vector_norm(vectors, dim=1)
            if bool((growth == 0).all()):
                return torch.zeros((), dtype=torch.float64)
            log_growth += growth.double().cpu().log()
            vectors = vectors / growth.clamp_min(torch.finfo(like.dtype).tiny)[:, None]
    # P(|x_1| <= t) <= sqrt(2 / pi) * t * sqrt(n) for each probe; all of them: 1e-12.
    smallest = 10 ** (-12 / num_probes) * math.sqrt(math.pi / 2) / math.sqrt(size)
    return ((log_growth.max() - math.log(min(smallest, 1.0))) / num_steps).exp()


def _check_adjoint(
    operator: LinearOperator, input_shape: tuple[int, ...], like: Tensor
) -> tuple[int, ...]:
    """Shape of one measurement; refuses an adjoint that is not one."""
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(2, *input_shape, generator=generator).to(like)
    with torch.no_grad():
        measured = operator.forward(signal)
        check_tensor("operator.forward(signal)", measured, like)
        other = torch.randn(measured.shape, generator=generator).to(like)
        # The inner product of independent vectors is small beside their norms, and an adjoint of
        # the wrong scale would pass on a large picture: half of ``other`` is along ``measured``.
        other += measured * (other.norm() / measured.norm().clamp_min(torch.finfo(like.dtype).tiny))
        back = operator.adjoint(other)
        check_tensor("operator.adjoint(measurement)", back, like)
    if back.shape != signal.shape or measured.shape[:1] != (2,):
        raise ValueError(
            f"Expected an adjoint back to the shape {tuple(signal.shape)} with leading dimensions "
            f"kept, got forward to {tuple(measured.shape)} and adjoint to {tuple(back.shape)}."
        )
    left, right = (measured * other).double().sum(), (signal * back).double().sum()
    size = measured.double().norm() * other.double().norm()
    # Written so that NaN is refused too.
    if not bool((left - right).abs() <= 1e3 * torch.finfo(like.dtype).eps * size):
        raise ValueError(
            "Expected <forward(x), y> = <x, adjoint(y)>, got "
            f"{left.item():.6g} and {right.item():.6g} on random x, y: the step size and "
            "every gradient would be wrong."
        )
    return tuple(measured.shape[1:])
