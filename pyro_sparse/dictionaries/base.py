"""What every dictionary is: a linear map from codes to the predictor, its adjoint, its norm."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import handle_torch_function, has_torch_function_unary

from pyro_sparse.ops import check_tensor


class LinearMap:
    """A linear map with its atoms fixed: what a solver or an unrolled encoder iterates with.

    A dictionary is a module whose atoms may be normalised anew at each access; ``bind`` reads them
    once and gives this. Concrete maps are pure functions of their atoms.

    ``forward`` is one primitive of ``torch``, whatever a concrete map does in it: codes of a type
    with a ``__torch_function__`` of its own, such as ``distributions.Moments``, are asked first.
    They see the function with the arguments ``(map, codes)``, and its attribute ``arithmetic`` is
    what the concrete map does.

    For ``squared_norm`` of a map of one's own there are ``ops.largest_eigenvalue_bound`` of its
    Gram matrix, which is never below the truth (a power iteration ends below it), and
    ``dictionaries.operator_norm_bound`` for a map that is known by what it does alone.

    Example:
        >>> class Doubled(LinearMap):
        ...     def forward(self, codes):
        ...         return 2 * codes
        ...     adjoint = forward
        >>> third = Doubled().at(torch.tensor([2]), torch.Size([4]))  # the map on one code of four
        >>> third.forward(torch.tensor([5.0]))
        tensor([ 0.,  0., 10.,  0.])
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls.forward, "arithmetic"):
            cls.forward = _primitive(cls.forward)  # type: ignore[method-assign,assignment]
        for kind in cls.__mro__:
            if "at" in vars(kind):
                break
            if "forward" in vars(kind) or "adjoint" in vars(kind):
                # What a subclass has changed makes an inherited shortcut untrue.
                cls.at = LinearMap.at  # type: ignore[method-assign]
                break

    def forward(self, codes: Tensor) -> Tensor:
        """Predictor of the codes."""
        raise NotImplementedError

    def squared(self) -> LinearMap:
        """The map with squared matrix entries: takes variances of independent codes to the signal.

        Raises:
            NotImplementedError: If the map does not know its entries, such as a composition.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not state the squares of its entries (`squared`)."
        )

    def accumulate(self, function: Callable[[Tensor], Tensor], signal: Tensor) -> Tensor:
        r"""Sum a function of the weighted entries over the codes: :math:`\sum_k f_k(a_{kd}\, t_d)`.

        With :math:`f_k = \log M_k`, the log moment generating function of code :math:`k`, it is
        that of the predictor at :math:`t_d`.

        Args:
            function: :math:`f`; maps a tensor that broadcasts with the codes, and may have more
                leading dimensions, element by element.
            signal: :math:`t`, shape ``(..., *signal_shape)``.

        Returns:
            Shape of ``signal``. Takes memory for ``function`` at every entry that is not zero by
            construction: ``(..., features, atoms)`` for a dense map, as many for a convolutional
            one as its positions times its kernel.

        Raises:
            NotImplementedError: If the map does not know its entries, such as a composition.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not sum over its entries (`accumulate`)."
        )

    def adjoint(self, signal: Tensor) -> Tensor:
        """Adjoint of ``forward``: correlation of a signal with each atom, in the shape of codes."""
        raise NotImplementedError

    def at(self, index: Tensor, shape: torch.Size) -> LinearMap:
        """The map on some codes alone: from their values to the predictor, and back to them.

        Args:
            index: Which ones, as positions in flattened codes, ascending; shape ``(n,)``.
            shape: Shape ``(..., *code_shape)`` of all codes.

        Returns:
            A map whose codes are the vector ``codes.flatten()[index]``, the others being zero, and
            whose ``adjoint`` gives that of this map there. Of few codes a concrete map may save
            most of the arithmetic.
        """
        return _Placed(self, index, shape)

    def squared_norm(self, signal_shape: tuple[int, ...] | None = None) -> Tensor:
        """Upper bound of the squared spectral norm, detached; see ``Dictionary.squared_norm``."""
        raise NotImplementedError

    def double(self) -> LinearMap:
        """The same map in float64, where a duality gap is evaluated.

        Raises:
            NotImplementedError: If the map does not say.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not state itself in float64 (`double`), where codes are "
            "certified. Call solve with tol=None to run a fixed number of steps without a "
            "certificate."
        )

    def rounding(self) -> float:
        """Rounding unit that ``double()`` still has: float64's, unless a part cannot be widened."""
        return torch.finfo(torch.float64).eps


def _primitive(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A map's arithmetic behind a dispatch on the type of the codes."""

    @functools.wraps(forward)
    def dispatched(self: Any, codes: Tensor) -> Tensor:
        if type(codes) is not Tensor and has_torch_function_unary(codes):
            return handle_torch_function(dispatched, (codes,), self, codes)
        return forward(self, codes)

    dispatched.arithmetic = forward  # type: ignore[attr-defined]
    return dispatched


class _Placed(LinearMap):
    """Any map on some codes: they are placed among zeros."""

    def __init__(self, inner: LinearMap, index: Tensor, shape: torch.Size) -> None:
        self.inner = inner
        self.index = index
        self.shape = shape

    def forward(self, codes: Tensor) -> Tensor:
        placed = codes.new_zeros(self.shape.numel()).index_copy(0, self.index, codes)
        return self.inner.forward(placed.reshape(self.shape))

    def adjoint(self, signal: Tensor) -> Tensor:
        return self.inner.adjoint(signal).flatten().index_select(0, self.index)


class Dictionary(nn.Module):
    """Declares a dictionary: ``predictor = dictionary(codes)``, linear in the codes.

    A user's own dictionary subclasses this, states ``num_atoms``, ``code_dims`` and
    ``signal_dims``, and implements ``bind`` and ``code_shape``. What serves it there:
    ``register_atoms``, ``self.bound_atoms`` and ``check_shape``; and ``testing.check_dictionary``.

    Attributes:
        atoms: The atoms, first dimension ``num_atoms``.
        num_atoms: Number of atoms.
        code_dims: Number of trailing dimensions of one datum's codes: 1 for dense
            ``(atoms,)``, ``1 + d`` for convolutional ``(atoms, *positions)``.
        signal_dims: Number of trailing dimensions of one datum's signal: 1 for dense
            ``(features,)``, ``1 + d`` for convolutional ``(channels, *lengths)``.
        signal_shape: Shape of one datum's signal where the dictionary fixes it, else None.

    Example:
        >>> from pyro_sparse.dictionaries import Dense
        >>> dictionary = Dense(num_atoms=8, num_features=5)
        >>> codes, signal = torch.randn(8), torch.randn(5)
        >>> left, right = dictionary(codes) @ signal, codes @ dictionary.adjoint(signal)
        >>> torch.allclose(left, right, atol=1e-5)
        True
    """

    atoms: Tensor
    num_atoms: int
    code_dims: int
    signal_dims: int
    signal_shape: tuple[int, ...] | None = None

    def bind(self, atoms: Tensor | None = None) -> LinearMap:
        """The linear map with the atoms as they are now, or with ``atoms`` in their place.

        Args:
            atoms: In place of the module's own, in their shape and used as they are (not
                normalised): what a sampled dictionary site hands over.
        """
        raise NotImplementedError

    def bound_atoms(self, atoms: Tensor | None) -> Tensor:
        """The atoms that ``bind`` is to use: the module's own, or those that it was handed.

        Args:
            atoms: As ``bind`` got them; leading dimensions are free.

        Raises:
            TypeError: If they are not a floating tensor.
            ValueError: If they are of another shape than the module's own; names both.

        Example:
            >>> from pyro_sparse.dictionaries import Dense
            >>> Dense(8, 5).bound_atoms(torch.zeros(20, 8, 5)).shape
            torch.Size([20, 8, 5])
        """
        own = self.atoms
        if atoms is None:
            return own
        check_tensor("atoms", atoms)
        if atoms.shape[atoms.dim() - own.dim() :] != own.shape or atoms.dim() < own.dim():
            raise ValueError(
                f"Expected atoms of shape (..., {', '.join(map(str, own.shape))}), got "
                f"{tuple(atoms.shape)}."
            )
        return atoms

    def code_shape(self, signal_shape: tuple[int, ...]) -> torch.Size:
        """Shape of the codes of a signal: leading dimensions kept, ``signal_dims`` replaced.

        Raises:
            ValueError: If the signal's shape does not fit the dictionary.
        """
        raise NotImplementedError

    def forward(self, codes: Tensor) -> Tensor:
        """Predictor of the codes; any leading batch dimensions.

        Args:
            codes: Shape ``(..., *code_shape)``.

        Returns:
            Shape ``(..., *signal_shape)``.

        Raises:
            TypeError: If they are not a floating tensor of the atoms' dtype.
            RuntimeError: If they are on another device.
            ValueError: If their shape does not fit.
        """
        check_tensor("codes", codes, self.like)
        tail = tuple(codes.shape[codes.dim() - self.code_dims :])
        if codes.dim() < self.code_dims or tail[0] != self.num_atoms or 0 in tail:
            positions = "" if self.code_dims == 1 else ", *positions"
            raise ValueError(
                f"Expected codes of shape (..., atoms={self.num_atoms}{positions}), got "
                f"{tuple(codes.shape)}."
            )
        return self.bind().forward(codes)

    def adjoint(self, signal: Tensor) -> Tensor:
        """Adjoint of ``forward``: ``<dictionary(z), y> = <z, dictionary.adjoint(y)>``.

        Args:
            signal: Shape ``(..., *signal_shape)``.

        Returns:
            Shape ``(..., *code_shape)``.

        Raises:
            TypeError: If it is not a floating tensor of the atoms' dtype.
            RuntimeError: If it is on another device.
            ValueError: If its shape does not fit.
        """
        check_tensor("signal", signal, self.like)
        self.code_shape(signal.shape)
        return self.bind().adjoint(signal)

    def squared_norm(self, signal_shape: tuple[int, ...] | None = None) -> Tensor:
        """Upper bound of the squared spectral norm, never below the truth up to rounding.

        The Lipschitz constant of the gradient of ``0.5 * ||y - dictionary(z)||**2``.

        Args:
            signal_shape: Shape of the signal, where a bound can make use of it.

        Returns:
            A scalar, detached from the atoms: a step size is not differentiated.
        """
        return self.bind().squared_norm(signal_shape)

    @property
    def like(self) -> Tensor:
        """A tensor of the dictionary's dtype and device; an empty one if it holds none."""
        held = itertools.chain(self.parameters(), self.buffers(), [torch.empty(0)])
        return next(tensor.detach() for tensor in held if tensor.is_floating_point())

    def freeze_(self) -> None:
        """Make the atoms constants: no gradient and no optimiser sees them any more.

        They stay in the ``state_dict`` and move with the module. For a fixed dictionary, such as a
        cosine basis of which only an encoder's thresholds are learned.
        """
        for module in self.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach())

    def init_atoms_(self, atoms: Tensor) -> None:
        """Set the atoms; they are normalised if the dictionary normalises its atoms.

        Raises:
            ValueError: If the shape differs, or an atom is zero or not finite.
        """
        own = self.atoms
        check_tensor("atoms", atoms)
        if atoms.shape != own.shape:
            raise ValueError(
                f"Expected atoms of shape {tuple(own.shape)}, got {tuple(atoms.shape)}."
            )
        check_atoms(atoms)
        with torch.no_grad():
            if isinstance(own, nn.Parameter):  # not parametrised: a parameter is written in place
                own.copy_(atoms)
            else:
                self.atoms = atoms.to(own)


class UnitNorm(nn.Module):
    """Parametrisation of atoms by their direction: each is divided by its Euclidean length.

    The gradient is then tangent to the sphere and a step never changes an atom's length.
    Assigning to the parametrised tensor normalises what is assigned.

    Example:
        >>> UnitNorm()(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """

    def forward(self, atoms: Tensor) -> Tensor:
        """Divide each atom, ``atoms[k]``, by its length over all other dimensions."""
        length = torch.linalg.vector_norm(atoms.flatten(1), dim=1)
        return atoms / length.reshape(-1, *[1] * (atoms.dim() - 1))

    def right_inverse(self, atoms: Tensor) -> Tensor:
        """What to store for ``atoms``: themselves, at unit length.

        Raises:
            ValueError: If an atom is zero or not finite.
        """
        check_atoms(atoms)
        return self.forward(atoms)


def check_atoms(atoms: Tensor) -> None:
    """Refuse atoms that cannot be normalised or would poison a training.

    Raises:
        ValueError: If an atom is zero or has a value that is not finite; names the first.
    """
    length = torch.linalg.vector_norm(atoms.detach().flatten(1), dim=1)
    bad = ~torch.isfinite(length) | (length == 0)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"Expected atoms of finite, non-zero length, got length {length[first].item()} for "
            f"atom {first} ({int(bad.sum())} in all). Replace it, for example by a data sample."
        )


def register_atoms(module: nn.Module, atoms: Tensor, *, unit_norm: bool = True) -> None:
    """Make ``module.atoms`` a trainable parameter, parametrised to unit norm if asked.

    For the constructor of a dictionary of one's own.

    Args:
        module: The dictionary.
        atoms: Copied, shape ``(atoms, ...)``.
        unit_norm: Keep every atom at unit Euclidean length, whatever an optimiser does.

    Raises:
        TypeError: If they are not a floating tensor.
        ValueError: If an atom is zero or not finite; names the first.

    Example:
        >>> class Sum(Dictionary):
        ...     def __init__(self, atoms):
        ...         super().__init__()
        ...         register_atoms(self, atoms)
        >>> Sum(torch.tensor([[3.0, 4.0]])).atoms.tolist()
        [[0.6000000238418579, 0.800000011920929]]
    """
    check_tensor("atoms", atoms)
    check_atoms(atoms)
    module.atoms = nn.Parameter(atoms.detach().clone())
    if unit_norm:
        parametrize.register_parametrization(module, "atoms", UnitNorm())


def check_shape(shape: Any) -> tuple[int, ...]:
    """A shape, as a tuple: what ``code_shape`` does first with the one that it is handed.

    Raises:
        ValueError: If it is not a tuple or list of whole numbers of at least zero.

    Example:
        >>> check_shape([3, 5])
        (3, 5)
        >>> check_shape(3.5)
        Traceback (most recent call last):
        ...
        ValueError: Expected a shape, a tuple of whole numbers >= 0, got 3.5.
    """
    whole = isinstance(shape, tuple | list) and all(
        isinstance(size, int | torch.SymInt | np.integer) and size >= 0 for size in shape
    )
    if not whole:
        raise ValueError(f"Expected a shape, a tuple of whole numbers >= 0, got {shape!r}.")
    return tuple(shape)


def check_sizes(**sizes: Any) -> None:
    """Refuse sizes that are not whole numbers of at least one.

    Raises:
        ValueError: Names the argument and what came.
    """
    for name, size in sizes.items():
        values = size if isinstance(size, tuple) else (size,)
        whole = all(isinstance(v, Integral) and not isinstance(v, bool) for v in values)
        if not values or not whole or min(values) < 1:
            raise ValueError(f"Expected {name} to be a whole number >= 1 (or several), got {size}.")
