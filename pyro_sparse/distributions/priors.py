"""A prior as a user hands it over, made into the law of all the codes of a datum.

A prior is a distribution, or a callable ``rate -> distribution``. Model and guide both call
``codes_prior``, so they cannot disagree about shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, TorchDistributionMixin
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import Distribution

from pyro_sparse.dictionaries.base import check_shape
from pyro_sparse.ops import check_tensor

Law = TorchDistributionMixin
Prior = Law | Callable[[Tensor], Law]
D = TypeVar("D", bound=Distribution)


def check_prior(prior: Prior, *, has_rate: bool) -> None:
    """Refuse what cannot be a prior over codes, where the user hands it over.

    Raises:
        TypeError: If it is neither a distribution nor a callable with a rate, or a rate is given
            for a distribution.
        ValueError: If a distribution holds a tensor that requires a gradient.

    Example:
        >>> check_prior(lambda rate: dist.Laplace(0.0, 1 / rate), has_rate=True)
        >>> check_prior(0.1, has_rate=False)
        Traceback (most recent call last):
        ...
        TypeError: Expected prior to be a distribution or a callable rate -> distribution, ...
    """
    if isinstance(prior, Law):
        if has_rate:
            raise TypeError(
                f"Expected prior to be a callable rate -> distribution when rate is given, got a "
                f"{type(prior).__name__}. Write prior=lambda rate: Laplace(0.0, 1 / rate)."
            )
        names = [name for name, tensor in _tensors(prior) if tensor.requires_grad]
        if names:
            raise ValueError(
                f"Expected a {type(prior).__name__} prior of constants, but its {names} require a "
                "gradient: a parameter inside a distribution is registered nowhere, so it would "
                "be lost in a state_dict and left behind by .double() or .to(device). Pass "
                "prior=lambda rate: ... and rate= instead."
            )
    elif isinstance(prior, Distribution):
        raise TypeError(
            f"Expected a Pyro distribution, got torch's own {type(prior).__name__}. "
            f"Write pyro.distributions.{type(prior).__name__}."
        )
    elif not callable(prior):
        raise TypeError(
            "Expected prior to be a distribution or a callable rate -> distribution, got "
            f"{type(prior).__name__}."
        )
    elif not has_rate:
        raise TypeError("Expected rate= for a prior that is a callable rate -> distribution.")


def check_rate(rate: object) -> None:
    """Refuse a rate that would be trained without staying positive, or twice under two names.

    Raises:
        TypeError: If it is neither numbers nor callable nor a distribution.
        ValueError: If it is a parameter.

    Example:
        >>> check_rate(2.0)
        >>> check_rate(torch.ones(3, requires_grad=True))
        Traceback (most recent call last):
        ...
        ValueError: Expected a rate that is a constant or a module, got a parameter. ...
    """
    parameter = isinstance(rate, PyroParam) or (isinstance(rate, Tensor) and rate.requires_grad)
    if parameter:
        raise ValueError(
            "Expected a rate that is a constant or a module, got a parameter. A learned rate is a "
            "module that model and guide share: pyro_sparse.distributions.Rate(...)."
        )
    if rate is not None and not callable(rate) and not isinstance(rate, Distribution):
        _as_rate(rate, torch.empty(0))


def codes_prior(
    prior: Prior, rate: Tensor | None, code_shape: tuple[int, ...], like: Tensor
) -> Law:
    """Law of one datum's codes.

    Args:
        prior: A distribution that expands to ``code_shape``, or a callable that makes one of a
            rate.
        rate: What the callable is given, shape ``(..., atoms)``; each atom's rate is shared by its
            positions, and leading dimensions (particles) stay in front.
        code_shape: Shape of one datum's codes, ``(atoms, *positions)``.
        like: A tensor whose dtype and device the result takes.

    Returns:
        A distribution with event shape ``code_shape``.

    Raises:
        TypeError: If ``rate`` is not real numbers, or missing for a callable, or the callable
            makes no Pyro distribution.
        ValueError: If the prior does not expand to ``code_shape``; names both shapes. If the
            callable refuses the rate.

    Example:
        >>> codes_prior(dist.Laplace(0.0, 1.0), None, (3, 5), like=torch.zeros(1)).event_shape
        torch.Size([3, 5])
    """
    check_tensor("like", like)
    code_shape = check_shape(code_shape)
    batch: tuple[int, ...] = ()
    if rate is not None:
        rate = _as_rate(rate, like)
        batch = tuple(rate.shape[:-1])
        if rate.dim():
            rate = rate.reshape(*rate.shape, *[1] * (len(code_shape) - 1))
    law = prior if isinstance(prior, Law) else _call(prior, rate)
    return spread(law, code_shape, like, batch=batch)


def spread(law: Law, shape: tuple[int, ...], like: Tensor, *, batch: tuple[int, ...] = ()) -> Law:
    """A distribution expanded to event shape ``shape``, its entries independent.

    Args:
        law: Its event shape is the end of ``shape`` (or empty); its batch shape expands to the
            rest.
        shape: Shape of one draw.
        like: A tensor whose dtype and device the result takes.
        batch: Leading dimensions that stay batch dimensions.

    Raises:
        ValueError: If it does not expand.

    Example:
        >>> spread(dist.Normal(0.0, 1.0), (3, 5), like=torch.zeros(1)).event_shape
        torch.Size([3, 5])
    """
    if not isinstance(law, Law):
        raise TypeError(
            f"Expected a Pyro distribution, got {type(law).__name__}. A prior is a distribution of "
            "pyro.distributions, or a callable that returns one."
        )
    shape, batch = check_shape(shape), check_shape(batch)
    law = match(law, like)
    event = len(law.event_shape)
    outer, inner = shape[: len(shape) - event], shape[len(shape) - event :]
    if law.event_shape != torch.Size(inner):
        raise ValueError(_message(law, shape))
    try:
        law = law.expand((*batch, *outer))
    except (RuntimeError, ValueError):  # torch's own laws, and pyro's wrapper of a user's
        raise ValueError(_message(law, shape)) from None
    return dist.Independent(law, len(outer)) if outer else law


def match(law: D, like: Tensor) -> D:
    """A copy of a distribution whose tensors have the device of ``like``, floating ones its dtype.

    The distribution itself is returned where nothing has to change.

    Example:
        >>> match(dist.Laplace(0.0, 1.0), torch.zeros(1, dtype=torch.float64)).scale.dtype
        torch.float64
    """
    if not isinstance(law, Distribution):
        raise TypeError(f"Expected a distribution, got {type(law).__name__}.")
    check_tensor("like", like)
    moved: dict[str, object] = {}
    for name, value in vars(law).items():
        if isinstance(value, Tensor):
            dtype = like.dtype if value.is_floating_point() else value.dtype
            new: object = value.to(dtype=dtype, device=like.device)
        elif isinstance(value, Distribution):
            new = match(value, like)
        else:
            continue
        if new is not value:
            moved[name] = new
    if not moved:
        return law
    law = copy.copy(law)
    vars(law).update(moved)
    return law


def name_of(law: Distribution) -> str:
    """What the law below expansions and event dimensions is called.

    Example:
        >>> name_of(dist.Laplace(0.0, 1.0).expand([3]).to_event(1))
        'Laplace'
    """
    while isinstance(law, torch.distributions.Independent | ExpandedDistribution):
        law = law.base_dist
    return type(law).__name__


def _as_rate(rate: object, like: Tensor) -> Tensor:
    refused = isinstance(rate, Tensor) and (rate.is_complex() or rate.layout != torch.strided)
    try:
        value = None if refused else torch.as_tensor(rate, dtype=like.dtype, device=like.device)
    except (TypeError, ValueError, OverflowError, NotImplementedError):  # the last: meta tensors
        value = None
    if value is None:
        kind = rate.dtype if isinstance(rate, Tensor) else type(rate).__name__
        raise TypeError(
            "Expected rate to be real numbers of shape () or (atoms,), a distribution over them, "
            f"or a module that returns them; got {kind}."
        )
    return value


def _call(prior: Callable[[Tensor], Law], rate: Tensor | None) -> Law:
    if not callable(prior) or rate is None:
        check_prior(prior, has_rate=rate is not None)
    try:
        return prior(rate)  # type: ignore[arg-type]
    except ValueError as error:  # torch's checks of parameters: they know no rate
        raise ValueError(
            f"Expected a rate that the prior accepts (usually rate > 0), got {rate}: {error}"
        ) from error


def _tensors(law: Distribution) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    for name, value in vars(law).items():
        if isinstance(value, Tensor):
            found.append((name, value))
        elif isinstance(value, Distribution):
            found.extend(_tensors(value))
    return found


def _message(law: Distribution, shape: tuple[int, ...]) -> str:
    hint = ""
    if len(shape) > 1:
        ones = ", 1" * (len(shape) - 1)
        hint = f" For one value per atom give it the batch shape ({shape[0]}{ones})."
    return (
        f"Expected a {type(law).__name__} that expands to the shape {tuple(shape)}, got batch "
        f"shape {tuple(law.batch_shape)} and event shape {tuple(law.event_shape)}.{hint}"
    )
