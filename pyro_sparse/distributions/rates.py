"""Rates of sparse priors: where a learned one is kept, and what the codes say about it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pyro_sparse.dictionaries.base import check_sizes
from pyro_sparse.ops import Positive


class Rate(nn.Module):
    r"""Learned rates :math:`\lambda_k > 0` of a sparse prior, one per atom.

    Hand the same object to model and guide, as ``rate=``. An optimiser moves
    :math:`\log \lambda`, so that a rate stays positive at any step size; ``infer.RateEM``
    overwrites it in closed form.

    Args:
        init: Starting value, positive, in one over code units: a number, or shape ``(atoms,)``.
            The module has its dtype and device (torch's default dtype for a number).
        num_atoms: Repeat a single number for so many atoms. Without it, a single number is one
            rate that all atoms share.

    Attributes:
        value: The rates, shape ``(atoms,)`` or ``()``.

    Raises:
        ValueError: If ``init`` is not positive and finite, or of another shape.

    Example:
        >>> rate = Rate(2.0, num_atoms=3)
        >>> rate().detach()
        tensor([2., 2., 2.])
        >>> prior = lambda rate: dist.Laplace(0.0, 1 / rate)
    """

    value: Tensor

    def __init__(self, init: float | Tensor, *, num_atoms: int | None = None) -> None:
        super().__init__()
        try:
            # A numpy scalar too: its float64 must not spread.
            kept = isinstance(init, Tensor) and init.is_floating_point()
            dtype = None if kept else torch.get_default_dtype()
            value = torch.as_tensor(init, dtype=dtype).detach().to_dense().clone()
            value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
            refused = value.is_meta
        except (TypeError, ValueError, RuntimeError):
            refused = True
        if refused or (isinstance(init, Tensor) and init.is_complex()):
            raise TypeError(f"Expected init to be real numbers, got {type(init).__name__}.")
        if num_atoms is not None:
            check_sizes(num_atoms=num_atoms)
            if value.shape not in ((), (num_atoms,)):
                raise ValueError(
                    f"Expected init to be one number or of shape ({num_atoms},), got "
                    f"{tuple(value.shape)}."
                )
            value = value.expand(num_atoms).clone()
        if value.dim() > 1:
            raise ValueError(f"Expected init of shape (atoms,) or (), got {tuple(value.shape)}.")
        _check_rate(value)
        self.value = nn.Parameter(value)
        parametrize.register_parametrization(self, "value", Positive())

    def forward(self) -> Tensor:
        """The rates, shape ``(atoms,)`` or ``()``; a gradient reaches the parameter."""
        return self.value

    def assign_(self, value: float | Tensor) -> None:
        """Overwrite the rates in place, without a gradient.

        The raw parameter stays the same object, so model, guide and optimiser keep it. What an
        optimiser remembers of it (moments) is stale afterwards: let either an optimiser or a closed
        form move a rate, not both.

        Args:
            value: Positive and finite; a number, or in a shape that broadcasts to the rates.

        Raises:
            ValueError: If it is not positive and finite (names the atoms), or of another shape.
        """
        own = self.value.detach()
        value = torch.as_tensor(value, dtype=own.dtype, device=own.device)
        try:
            value = value.broadcast_to(own.shape)
        except RuntimeError:
            raise ValueError(
                f"Expected rates of shape {tuple(own.shape)}, got {tuple(value.shape)}."
            ) from None
        _check_rate(value)
        with torch.no_grad():
            self.parametrizations.value.original.copy_(value.log())  # type: ignore[operator, union-attr]

    def extra_repr(self) -> str:  # noqa: D102
        return f"shape={tuple(self.value.shape)}"


class RateStatistic(NamedTuple):
    r"""What codes say about the rate of their prior, where that is an exponential family in it.

    .. math:: \log p(z \mid \lambda) = a \log \lambda - \lambda\, t(z) + \text{const}

    Attributes:
        rate: :math:`\lambda` of the law at hand, broadcastable to the codes: lets a caller see
            that the law's rate is the rate it learns, and not its square or its double.
        power: :math:`a`, a number or broadcastable to the codes: 1 for Laplace and exponential.
        value: :math:`t(z) \ge 0` of every code, shape of the codes.

    Example:
        >>> rate_statistic(dist.Laplace(0.0, 0.5), torch.tensor([1.0, -3.0]))
        RateStatistic(rate=tensor(2.), power=1.0, value=tensor([1., 3.]))
    """

    rate: Tensor
    power: Tensor | float
    value: Tensor


@functools.singledispatch
def rate_statistic(prior: Any, codes: Tensor) -> RateStatistic:
    r"""Sufficient statistic of a prior's rate: :math:`|z|` for Laplace, :math:`z` for exponential.

    Args:
        prior: A distribution whose type has a registered statistic; ``to_event`` and ``expand``
            are looked through.
        codes: Shape ``(..., *batch_shape, *event_shape)``.

    Returns:
        Rate, power and statistic, by element; a gradient reaches the codes.

    Raises:
        NotImplementedError: If nothing is registered for the prior's type.

    Example:
        >>> rate_statistic(dist.Laplace(0.0, 0.5), torch.tensor([-3.0, 0.0])).value
        tensor([3., 0.])
    """
    raise NotImplementedError(
        f"No statistic of a rate is known for {type(prior).__name__}. Register one with "
        f"@pyro_sparse.distributions.register_rate_statistic({type(prior).__name__})."
    )


def register_rate_statistic(
    kind: type,
) -> Callable[[Callable[..., RateStatistic]], Callable[..., RateStatistic]]:
    """Decorator that registers ``function(prior, codes) -> RateStatistic`` for a distribution type.

    Subclasses inherit it. A later registration for the same type replaces the earlier one.

    Example:
        >>> class Squared(dist.Normal):
        ...     pass
        >>> @register_rate_statistic(Squared)  # the rate is the precision
        ... def _(prior, codes):
        ...     return RateStatistic(prior.scale**-2, 0.5, (codes - prior.loc) ** 2 / 2)
        >>> rate_statistic(Squared(0.0, 1.0), torch.tensor([2.0])).value
        tensor([2.])
    """
    return rate_statistic.register(kind)


@register_rate_statistic(dist.Laplace)
def _(prior: dist.Laplace, codes: Tensor) -> RateStatistic:
    return RateStatistic(1 / prior.scale, 1.0, (codes - prior.loc).abs())


@register_rate_statistic(dist.Exponential)
def _(prior: dist.Exponential, codes: Tensor) -> RateStatistic:
    return RateStatistic(prior.rate, 1.0, codes)


@register_rate_statistic(torch.distributions.Independent)
@register_rate_statistic(ExpandedDistribution)
def _(prior: Any, codes: Tensor) -> RateStatistic:
    return rate_statistic(prior.base_dist, codes)


def _check_rate(value: Tensor) -> None:
    bad = ~(torch.isfinite(value) & (value > 0))
    if bool(bad.any()):
        atoms = bad.reshape(-1).nonzero().flatten().tolist()
        raise ValueError(
            f"Expected rates > 0 and finite, got {value[bad].tolist()} for atoms {atoms}."
        )
