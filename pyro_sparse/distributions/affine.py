"""What functions of torch do to moments: the affine ones propagate, each by a rule of its own.

A function without a rule is refused by name. Rules go by the function object, not its name, so a
user's function that is called ``linear`` is none of them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_sparse.dictionaries import DenseMap, LinearMap
from pyro_sparse.distributions.moments import (
    INSTEAD,
    Carrier,
    ExpMoments,
    Moments,
    NotAffine,
    carriers_in,
    product_of_two,
)


def _rule(*names: str, kind: type[Carrier] = Moments) -> Callable[[Callable[..., Any]], Any]:
    """Register what happens to a carrier in the functions of these names."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for owner in (torch, Tensor, F):
            for name in names:
                if hasattr(owner, name):
                    kind.rules[getattr(owner, name)] = function
        return function

    return register


def _apply_map(dispatched: Any, linear_map: LinearMap, codes: Moments) -> Moments:
    try:
        squared = _stated(linear_map, "squared")()
    except NotImplementedError as unknown:
        try:  # perhaps it is made of operations that are followed on their own
            return dispatched.arithmetic(linear_map, codes)
        except NotAffine as refused:
            raise NotAffine(f"{refused} (In {type(linear_map).__name__}: {unknown})") from None
    return codes.linear(
        linear_map.forward(codes.expectation),
        squared.forward,
        lambda t: _stated(linear_map, "accumulate")(codes.cumulant, t),
    )


Moments.rules[LinearMap] = _apply_map


def _stated(linear_map: LinearMap, name: str) -> Callable[..., Any]:
    """A method about a map's entries, unless a subclass has since changed what the map does."""
    for kind in type(linear_map).__mro__:
        if name in vars(kind):
            return getattr(linear_map, name)
        if "forward" in vars(kind) and kind is not LinearMap:
            break
    return functools.partial(getattr(LinearMap, name), linear_map)


@_rule("matmul", "mm", "mv", "bmm", "__matmul__")
def _(left: Any, right: Any) -> Any:
    if _only(left, right, "a matrix product") is left:
        return _dense(left, right) if right.dim() > 1 else _dense(left, right[:, None]).squeeze(-1)
    turned = right if right.dim() == 1 else right.mT
    if left.dim() == 1 or right.dim() == 1:
        return turned @ (left if left.dim() == 1 else left.mT)
    return (turned @ left.mT).mT


@_rule("__rmatmul__")
def _(right: Any, left: Any) -> Any:
    return left @ right


@_rule("linear")
def _(input: Any, weight: Any, bias: Any = None) -> Moments:
    _only(input, weight, "a linear layer")
    if not isinstance(input, Moments) or isinstance(bias, Moments):
        raise NotAffine(f"Exact follows codes as the input of a linear layer only. {INSTEAD}")
    predictor = _dense(input, weight.mT) if weight.dim() == 2 else input @ weight
    return predictor if bias is None else predictor + bias


def _dense(codes: Moments, matrix: Tensor) -> Moments:
    # A batch of matrices pairs with the leading dimensions before the last but one.
    batched = matrix.dim() > 2 and codes.dim() > 1
    linear_map = DenseMap(matrix.unsqueeze(-3) if batched else matrix)
    return codes.linear(
        codes.expectation @ matrix,
        lambda variance: variance @ matrix.square(),
        lambda t: linear_map.accumulate(codes.cumulant, t),
    )


@_rule("einsum")
def _(equation: str, *operands: Any) -> Moments:
    operands = (
        operands[0] if len(operands) == 1 and not isinstance(operands[0], Tensor) else operands
    )
    if not isinstance(equation, str) or "." in equation or len(operands) > 2:
        raise NotAffine(f"Exact follows einsum of codes and one tensor, without '...'. {INSTEAD}")
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    subscripts = inputs.split(",")
    if not arrow:
        letters = sorted(set(inputs) - {","})
        output = "".join(letter for letter in letters if inputs.count(letter) == 1)
    own = next(i for i, operand in enumerate(operands) if isinstance(operand, Moments))
    codes, others = operands[own], [t for i, t in enumerate(operands) if i != own]
    if any(isinstance(other, Moments) for other in others):
        raise product_of_two("an einsum")
    summed_first = set("".join(s for i, s in enumerate(subscripts) if i != own)) - set(
        subscripts[own] + output
    )
    if summed_first or len(set(subscripts[own])) < len(subscripts[own]):
        raise NotAffine(
            f"Exact needs each code to meet one entry of the other tensor in an einsum, got "
            f"{equation!r}. Sum over it first. {INSTEAD}"
        )

    def contract(codes: Tensor, *others: Tensor) -> Tensor:
        rest = list(others)
        return torch.einsum(
            equation, *(codes if i == own else rest.pop() for i in range(len(operands)))
        )

    return codes.linear(
        contract(codes.expectation, *others),
        lambda variance: contract(variance, *(other.square() for other in others)),
        _unknown("einsum"),
    )


def _convolution(name: str) -> None:
    convolve = getattr(F, name)

    @_rule(name)
    def _(input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Moments:
        _only(input, weight, "a convolution")
        if not isinstance(input, Moments) or isinstance(bias, Moments):
            raise NotAffine(f"Exact follows codes as the input of a convolution only. {INSTEAD}")
        return input.linear(
            convolve(input.expectation, weight, bias, *args, **kwargs),
            lambda variance: convolve(variance, weight.square(), None, *args, **kwargs),
            _unknown(name),
        )


for _dims in (1, 2, 3):
    _convolution(f"conv{_dims}d")
    _convolution(f"conv_transpose{_dims}d")


@_rule("sum")
def _(input: Moments, dim: Any = None, keepdim: bool = False) -> Moments:
    def add(values: Tensor) -> Tensor:
        return torch.sum(values, dim=dim, keepdim=keepdim)

    return input.linear(add(input.expectation), add, _unknown("sum"))


@_rule("mean")
def _(input: Moments, dim: Any = None, keepdim: bool = False) -> Any:
    total = torch.sum(input, dim=dim, keepdim=keepdim)
    return total / (input.numel() / total.numel())


@_rule("add", "__add__", "__radd__")
def _(left: Any, right: Any) -> Moments:
    if isinstance(left, Moments) and isinstance(right, Moments):
        twice = left.sources & right.sources
        if twice:
            raise NotAffine(
                f"Exact met the codes of site {', '.join(map(repr, sorted(twice)))} twice in one "
                "predictor, where they are correlated with themselves. Join the two maps into one "
                f"dictionary of the codes. {INSTEAD}"
            )
        shape = torch.broadcast_shapes(left.shape, right.shape)
        one, two = left.expanded(shape), right.expanded(shape)
        return one.elementwise(
            one.expectation + two.expectation,
            one.variance + two.variance,
            lambda t: one.cumulant(t) + two.cumulant(t),
            independent=one.independent and two.independent,
            sources=one.sources | two.sources,
        )
    codes, other = (left, right) if isinstance(left, Moments) else (right, left)
    return codes.shifted(other)


@_rule("sub", "subtract", "__sub__")
def _(left: Any, right: Any) -> Moments:
    return left + (-right)


@_rule("rsub", "__rsub__")
def _(left: Any, right: Any) -> Moments:
    return right + (-left)


@_rule("neg", "negative", "__neg__")
def _(input: Moments) -> Moments:
    return input.scaled(-1.0)


@_rule("mul", "multiply", "__mul__", "__rmul__")
def _(left: Any, right: Any) -> Moments:
    codes = _only(left, right, "a product")
    return codes.scaled(right if codes is left else left)


@_rule("div", "divide", "true_divide", "__truediv__", "__div__")
def _(left: Any, right: Any) -> Moments:
    if isinstance(right, Moments):
        raise NotAffine(f"Exact met a division by codes, which is not affine. {INSTEAD}")
    return left.scaled(right, operator.truediv)


def _rearrangement(name: str, *, distinct: bool = True) -> None:
    method = getattr(Tensor, name)

    @_rule(name)
    def _(input: Moments, *args: Any, **kwargs: Any) -> Moments:
        _only_first(name, args, kwargs)
        return input.rearranged(lambda values: method(values, *args, **kwargs), distinct=distinct)

    @_rule(name, kind=ExpMoments)
    def _(input: ExpMoments, *args: Any, **kwargs: Any) -> ExpMoments:
        exponent: Any = method(input.exponent, *args, **kwargs)
        return ExpMoments(exponent)


for _name_of_method in (
    *("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose"),
    *("swapaxes", "movedim", "moveaxis", "t", "narrow", "select", "flip", "ravel", "adjoint"),
    *("contiguous", "clone", "positive", "__pos__"),
):
    _rearrangement(_name_of_method)
_rearrangement("index_select", distinct=False)


def _property(name: str) -> None:
    getter = getattr(Tensor, name).__get__
    Moments.rules[getter] = lambda codes: codes.rearranged(getter, distinct=True)


for _name_of_property in ("T", "mT"):
    _property(_name_of_property)


@_rule("__getitem__")
def _(input: Moments, index: Any) -> Moments:
    _only_first("indexing", (index,), {})
    parts = index if isinstance(index, tuple) else (index,)
    basic = all(part is None or part is ... or isinstance(part, int | slice) for part in parts)
    distinct = basic
    if not basic:
        place = torch.arange(input.numel(), device=input.device).reshape(input.shape)[index]
        distinct = len(place.unique()) == place.numel()
    return input.rearranged(lambda values: values[index], distinct=distinct)


@_rule("__getitem__", kind=ExpMoments)
def _(input: ExpMoments, index: Any) -> ExpMoments:
    exponent: Any = input.exponent[index]
    return ExpMoments(exponent)


def _conversion(name: str) -> None:
    method = getattr(Tensor, name)

    def convert(input: Moments, *args: Any, **kwargs: Any) -> Moments:
        _only_first(name, args, kwargs)
        mean = method(input.expectation, *args, **kwargs)
        if not mean.is_floating_point():
            raise NotAffine(f"Exact met codes that are rounded to {mean.dtype}. {INSTEAD}")
        variance = method(input.variance, *args, **kwargs)
        return input.elementwise(
            mean, variance, lambda t: input.cumulant(t.to(input.expectation)).to(t)
        )

    Moments.rules[method] = convert


for _name_of_method in ("to", "double", "float", "cpu", "cuda"):
    _conversion(_name_of_method)


@_rule("expand", "broadcast_to")
def _(input: Moments, *sizes: Any, implicit: bool = False, size: Any = None) -> Moments:
    if size is None:
        size = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    return input.expanded(input.expectation.expand(size).shape)


@_rule("expand_as")
def _(input: Moments, other: Tensor) -> Moments:
    return input.expanded(other.shape)


@_rule("expand", "broadcast_to", "expand_as", kind=ExpMoments)
def _(input: ExpMoments, *sizes: Any) -> ExpMoments:
    exponent: Any = input.exponent.expand(*sizes)
    return ExpMoments(exponent)


def _broadcast(*tensors: Any) -> tuple[Tensor, ...]:
    tensors = tensors[0] if len(tensors) == 1 and not isinstance(tensors[0], Tensor) else tensors
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    return tuple(tensor.expand(shape) for tensor in tensors)


for _kind_of_carrier in (Moments, ExpMoments):
    _rule("broadcast_tensors", kind=_kind_of_carrier)(_broadcast)


def _equal_to_itself(left: Any, right: Any) -> Tensor:
    """How a constraint asks whether a parameter is a number; any other comparison is refused."""
    if left is not right:
        raise NotAffine(
            f"Exact met a comparison of codes, whose values it does not know. {INSTEAD}"
        )
    predictor = left.exponent if isinstance(left, ExpMoments) else left
    return ~(torch.isnan(predictor.expectation) | torch.isnan(predictor.variance))


for _kind_of_carrier in (Moments, ExpMoments):
    _rule("eq", "__eq__", kind=_kind_of_carrier)(_equal_to_itself)


@_rule("ge", "__ge__", kind=ExpMoments)
def _(left: ExpMoments, right: Any) -> Tensor:
    if isinstance(right, Tensor) or right != 0:
        raise NotAffine(
            f"Exact met a comparison of codes, whose values it does not know. {INSTEAD}"
        )
    return _equal_to_itself(left, left)


@_rule("exp")
def _(input: Moments) -> ExpMoments:
    return ExpMoments(input)


def _constants(name: str) -> None:
    function = getattr(torch, name, None) or getattr(Tensor, name)

    @_rule(name)
    def _(input: Moments, *args: Any, **kwargs: Any) -> Tensor:
        _only_first(name, args, kwargs)
        return function(input.expectation.detach(), *args, **kwargs)


for _name_of_method in (
    "zeros_like",
    "ones_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
):
    _constants(_name_of_method)


def _only(left: Any, right: Any, where: str) -> Moments:
    if isinstance(left, Moments) and isinstance(right, Moments):
        raise product_of_two(where)
    return left if isinstance(left, Moments) else right


def _only_first(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if any(True for _ in carriers_in((args, kwargs))):
        raise NotAffine(f"Exact met codes as an argument of {name}, which is not affine. {INSTEAD}")


def _unknown(name: str) -> Callable[[Tensor], Tensor]:
    def cumulant(t: Tensor) -> Tensor:
        raise NotAffine(
            f"Exact knows means and variances through {name}, but no cumulants, which a Poisson "
            f"law takes. Write it as a matrix product or with a dictionary. {INSTEAD}"
        )

    return cumulant
