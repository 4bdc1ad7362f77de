"""Moment-carrying codes: run a program once and know what its predictor is expected to be.

In place of drawn codes a program is handed a tensor without values that knows the mean, the
variance and the law of its entries. What the program does with it is followed through
``__torch_function__``: whatever is affine propagates, anything else is refused by name, so a run
without refusal proves the predictor affine in the codes. As a second net, an operator that reaches
the tensor past that protocol (compiled code, a C++ extension) finds no values and is refused too.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor

from pyro_sparse.dictionaries import LinearMap
from pyro_sparse.distributions.cumulants import log_mgf

INSTEAD = "Use SparseELBO(estimator=ImplicitMixed()), which draws the codes."


class NotAffine(NotImplementedError):
    """Raised where a program leaves what closed-form moments can follow; names the operation.

    Example:
        >>> import pyro.distributions as dist
        >>> codes = Moments.of(dist.Laplace(torch.zeros(3), 1.0).to_event(1), "codes")
        >>> try:
        ...     codes.tanh()
        ... except NotAffine:
        ...     print("no closed form: take a sampled estimator")
        no closed form: take a sampled estimator
    """


class Carrier(Tensor):
    """A tensor without values; what is known of them stands in Python attributes.

    Attributes:
        rules: What is done in place of each function of torch that is followed.
    """

    rules: dict[Any, Callable[..., Any]]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Follow one function of torch, or refuse it."""
        kwargs = kwargs or {}
        if func in _DESCRIPTIVE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        carriers = list(carriers_in((args, kwargs)))
        if not all(_is_leaf(carrier) for carrier in carriers):
            raise NotAffine(
                "Exact found codes that came out of a torch.autograd.Function, whose derivative it "
                f"does not know. {INSTEAD}"
            )
        rules = type(carriers[0]).rules
        rule = rules.get(func)
        if hasattr(func, "arithmetic") and LinearMap in rules:  # the primitive of dictionaries
            rule = functools.partial(rules[LinearMap], func)
        if rule is None or len({type(carrier) for carrier in carriers}) > 1:
            raise NotAffine(
                f"Exact needs a predictor that is affine in the codes; it met {_name(func)}. "
                f"{INSTEAD}"
            )
        try:
            inspect.signature(rule).bind(*args, **kwargs)
        except TypeError:
            raise NotAffine(
                f"Exact does not follow {_name(func)} with these arguments "
                f"({', '.join(map(_kind, args))}{''.join(f', {key}=' for key in kwargs)}). "
                f"{INSTEAD}"
            ) from None
        return rule(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Refuse every operator that comes past ``__torch_function__``: there are no values."""
        raise NotAffine(
            f"Exact holds no values of the codes; they were asked for by {func}. {INSTEAD}"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __format__(self, spec: str) -> str:
        return repr(self)


class Untouched(Carrier):
    """Codes of a guide that are known by their law alone: whatever is done with them is refused.

    A guide that has run with these in place of its draws has made nothing else of them.

    Args:
        law: Their law, with its wrappers.
    """

    rules: dict[Any, Callable[..., Any]] = {}

    @staticmethod
    def __new__(cls: type, law: Any) -> Any:  # noqa: D102
        return _empty(cls, law.mean.expand(law.shape()), False)

    def __init__(self, law: Any) -> None:
        pass


class Moments(Carrier):
    r"""An array of random numbers, known by its moments: codes, or what is affine in them.

    Made by ``Moments.of(law, name)``, and from there by torch: matrix products, ``nn.Linear``,
    (transposed) convolutions, ``einsum``, dictionaries, sums with and multiples by constants,
    reshaping and indexing.

    Args:
        expectation: Mean of each entry.
        variance: Variance of each entry, in its shape.
        sources: Names of the sites whose codes are in it.
        independent: Whether its entries are independent of each other; needed by a linear map.
        cumulant: ``t -> log E[exp(t x)]`` of each entry ``x``, for ``t`` of shape
            ``(..., *expectation.shape)``; it may raise ``NotImplementedError``.

    Attributes:
        expectation: As given.
        variance: As given.
        sources: As given.
        independent: As given.

    Example:
        >>> import pyro.distributions as dist
        >>> codes = Moments.of(dist.Laplace(torch.zeros(3), 1.0).to_event(1), "codes")
        >>> predictor = codes @ torch.ones(3, 2) + 5.0
        >>> predictor.expectation, predictor.variance
        (tensor([5., 5.]), tensor([6., 6.]))
        >>> predictor.tanh()
        Traceback (most recent call last):
        ...
        pyro_sparse.distributions.moments.NotAffine: Exact needs a predictor that is affine in ...
    """

    rules: dict[Any, Callable[..., Any]] = {}

    @staticmethod
    def __new__(  # noqa: D102
        cls: type, expectation: Tensor, variance: Tensor, **_: Any
    ) -> Any:
        return _empty(cls, expectation, expectation.requires_grad or variance.requires_grad)

    def __init__(
        self,
        expectation: Tensor,
        variance: Tensor,
        *,
        sources: frozenset[str],
        independent: bool,
        cumulant: Callable[[Tensor], Tensor],
    ) -> None:
        self.expectation = expectation
        self.variance = variance
        self.sources = sources
        self.independent = independent
        self._cumulant = cumulant

    @classmethod
    def of(cls, law: Any, name: str) -> Moments:
        """The codes of a site.

        Args:
            law: Their law, with ``mean`` and ``variance``; wrappers (``to_event``, ``expand``,
                ``mask``) are looked through.
            name: Of the site.

        Raises:
            NotImplementedError: If the law states no mean or variance.
        """
        element = law
        while isinstance(
            element, torch.distributions.Independent | ExpandedDistribution | MaskedDistribution
        ):
            element = element.base_dist
        shape = law.shape()
        return cls(
            law.mean.expand(shape),
            law.variance.expand(shape),
            sources=frozenset([name]),
            independent=not element.event_shape,
            cumulant=functools.partial(log_mgf, law),
        )

    def log_mgf(self, value: Tensor | float = 1.0) -> Tensor:
        r"""Log moment generating function of each entry: :math:`\log E[e^{t x}]`.

        Args:
            value: :math:`t`, broadcastable to the entries.

        Returns:
            Shape of the entries; ``inf`` where the expectation is infinite.

        Raises:
            NotImplementedError: If the law of the codes has none, or an operation was met through
                which none is known.
        """
        return self.cumulant(torch.as_tensor(value).to(self.expectation).expand(self.shape))

    def cumulant(self, t: Tensor) -> Tensor:
        """``log_mgf`` at ``t`` of shape ``(..., *expectation.shape)``."""
        if t.shape[t.dim() - self.expectation.dim() :] != self.expectation.shape:
            raise NotAffine(f"Exact knows no cumulants of codes that broadcast in a map. {INSTEAD}")
        return self._cumulant(t)

    def elementwise(
        self,
        expectation: Tensor,
        variance: Tensor,
        cumulant: Callable[[Tensor], Tensor],
        *,
        independent: bool | None = None,
        sources: frozenset[str] | None = None,
    ) -> Moments:
        """What an operation on each entry apart makes of them; keeps what is not given."""
        return Moments(
            expectation,
            variance,
            sources=self.sources if sources is None else sources,
            independent=self.independent if independent is None else independent,
            cumulant=cumulant,
        )

    def linear(
        self,
        mean: Tensor,
        variance: Callable[[Tensor], Tensor],
        cumulant: Callable[[Tensor], Tensor],
    ) -> Moments:
        """What a linear map makes of them: its mean, and the map of the squares for variances.

        Raises:
            NotAffine: If the entries are not independent, so that variances do not add up.
        """
        if not self.independent:
            raise NotAffine(
                f"Exact met a second linear map of the codes {_sites(self)}, whose entries are "
                "correlated after the first (or were repeated): variances do not add up any more. "
                f"Multiply the two maps into one before they meet the codes. {INSTEAD}"
            )
        return self.elementwise(mean, variance(self.variance), cumulant, independent=False)

    def scaled(
        self, factor: Tensor | float, multiply: Callable[[Any, Any], Any] = operator.mul
    ) -> Moments:
        """Multiples by a constant (or fractions, with ``operator.truediv``)."""
        shaped = _spread(self, factor)
        return shaped.elementwise(
            multiply(shaped.expectation, factor),
            multiply(shaped.variance, factor * factor),
            lambda t: shaped.cumulant(multiply(t, factor)),
        )

    def shifted(self, offset: Tensor | float) -> Moments:
        """Sums with a constant."""
        shaped = _spread(self, offset)
        mean = shaped.expectation + offset
        return shaped.elementwise(
            mean, shaped.variance.to(mean), lambda t: shaped.cumulant(t) + t * offset
        )

    def rearranged(self, function: Callable[[Tensor], Tensor], *, distinct: bool) -> Moments:
        """Select entries, or order them anew; ``distinct`` if none is repeated."""

        def cumulant(t: Tensor) -> Tensor:
            if not distinct:
                raise NotAffine(f"Exact knows no cumulants of repeated codes. {INSTEAD}")
            place = torch.arange(self.expectation.numel(), device=t.device)
            place = function(place.reshape(self.expectation.shape))
            lead = t.shape[: t.dim() - place.dim()]
            own = t.new_zeros(*lead, self.expectation.numel())
            own = own.index_copy(-1, place.flatten(), t.reshape(*lead, -1))
            values = self.cumulant(own.reshape(*lead, *self.expectation.shape))
            chosen = values.reshape(*lead, -1).index_select(-1, place.flatten())
            return chosen.reshape(*lead, *place.shape)

        mean = function(self.expectation)
        if mean.dtype != self.expectation.dtype:
            raise NotAffine(f"Exact met codes whose bits are read as {mean.dtype}. {INSTEAD}")
        return self.elementwise(
            mean,
            function(self.variance),
            cumulant,
            independent=self.independent and distinct,
        )

    def expanded(self, shape: torch.Size) -> Moments:
        """Entries repeated to a shape that they broadcast to; repeats are not independent."""
        if shape == self.shape:
            return self
        lead = len(shape) - self.expectation.dim()
        own = (1,) * lead + tuple(self.expectation.shape)
        repeated = [dim - len(shape) for dim in range(len(shape)) if shape[dim] != own[dim]]

        def cumulant(t: Tensor) -> Tensor:
            # A repeated dimension goes first: to the entries it is one more leading one.
            for dim in repeated:
                t = t.movedim(dim, 0).unsqueeze(dim)
            extra = t.shape[: t.dim() - len(own)]
            values = self.cumulant(t.reshape(*extra, *self.expectation.shape))
            values = values.reshape(*extra, *own)
            for dim in reversed(repeated):
                values = values.squeeze(dim).movedim(0, dim)
            return values

        return self.elementwise(
            self.expectation.expand(shape),
            self.variance.expand(shape),
            cumulant,
            independent=self.independent and not repeated,
        )


class ExpMoments(Carrier):
    """The exponential of an affine predictor: rates of a Poisson law.

    Attributes:
        exponent: The predictor.
    """

    rules: dict[Any, Callable[..., Any]] = {}

    @staticmethod
    def __new__(cls: type, exponent: Moments) -> Any:  # noqa: D102
        return _empty(cls, exponent.expectation, exponent.requires_grad)

    def __init__(self, exponent: Moments) -> None:
        self.exponent = exponent


# Questions that do not depend on values.
_DESCRIPTIVE = {
    getattr(Tensor, name).__get__
    for name in (
        *("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad_fn"),
        *("is_cuda", "is_sparse", "is_nested", "is_quantized", "is_meta", "is_mkldnn", "is_mps"),
    )
} | {
    getattr(Tensor, name)
    for name in (
        *("dim", "size", "numel", "nelement", "ndimension", "is_floating_point", "is_complex"),
        *("__len__", "__hash__", "element_size", "get_device"),
    )
}
_DESCRIPTIVE |= {torch.is_floating_point, torch.is_complex, torch.numel}


def product_of_two(where: str) -> NotAffine:
    """The refusal of a product of codes with codes."""
    return NotAffine(f"Exact met {where} of two random arrays, which is not affine. {INSTEAD}")


def _spread(codes: Moments, other: Any) -> Moments:
    """Codes in the shape of their sum with ``other``; refuses what is no constant."""
    if isinstance(other, Carrier):
        raise product_of_two("a product")
    shape = other.shape if isinstance(other, Tensor) else ()
    return codes.expanded(torch.broadcast_shapes(codes.shape, shape))


def carriers_in(value: Any) -> Iterator[Carrier]:
    """Carriers among arguments, which may be nested."""
    if isinstance(value, Carrier):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from carriers_in(part)
    elif isinstance(value, dict):
        yield from carriers_in(list(value.values()))


def _empty(cls: type, like: Tensor, requires_grad: bool) -> Any:
    return Tensor._make_wrapper_subclass(
        cls,
        like.shape,
        dtype=like.dtype,
        device=like.device,
        requires_grad=requires_grad and torch.is_grad_enabled(),
    )


def _is_leaf(carrier: Carrier) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        return carrier.is_leaf


def _name(func: Any) -> str:
    return torch.overrides.resolve_name(func) or getattr(func, "__name__", repr(func))


def _sites(codes: Moments) -> str:
    return ", ".join(map(repr, sorted(codes.sources)))


def _kind(value: Any) -> str:
    return type(value).__name__
