"""What a layer of an unrolled encoder does with the value of its gradient step."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from pyro_sparse.dictionaries import Dictionary
from pyro_sparse.dictionaries.base import check_sizes
from pyro_sparse.distributions import Law, prox, restrict
from pyro_sparse.ops import check_tensor, hard_threshold, soft_threshold


class Shrinkage(nn.Module):
    r"""Declares the last part of a layer: from the value of a gradient step to codes.

    A user's own is a module with this ``forward``. It runs at every layer and checks nothing.

    Attributes:
        keeps_support: Whether codes have by themselves the signs and the support that the prior
            allows. Of others the encoder makes zeros where there may be none.

    Example:
        >>> class Quarter(Shrinkage):
        ...     def forward(self, law, value, step, layer, num_layers):
        ...         return torch.where(value.abs() > 0.25, value, 0.0)
        >>> Quarter()(None, torch.tensor([3.0, -0.1]), torch.tensor(1.0), 0, 1)
        tensor([3., 0.])
    """

    keeps_support: bool = False

    def forward(self, law: Law, value: Tensor, step: Tensor, layer: int, num_layers: int) -> Tensor:
        """Codes of a layer.

        Args:
            law: Prior of one datum's codes, event shape ``(atoms, *positions)``.
            value: Codes after the gradient step, shape ``(..., atoms, *positions)``.
            step: Size of that step, broadcastable to ``value``.
            layer: Which layer this is, from 0.
            num_layers: How many there are.

        Returns:
            Shape of ``value``.
        """
        raise NotImplementedError

    def allowed(self, law: Law, value: Tensor, step: Tensor, layer: int, num_layers: int) -> Tensor:
        """What ``forward`` gives, with zeros where the prior allows no code, or none of that sign.

        Of the codes alone: a value below zero with a bias below it is no code, and stays none.
        """
        codes: Tensor = self(law, value, step, layer, num_layers)
        return codes if self.keeps_support else restrict(law, codes)

    def check(self, dictionary: Dictionary) -> None:
        """Refuse a dictionary whose codes this does not fit; once, when an encoder is made.

        Raises:
            TypeError: If a value is of a wider dtype than the dictionary, and would spread.
            ValueError: If there is not one value for each atom.
        """


class Proximal(Shrinkage):
    r"""The prior's proximal step, with thresholds that may be learned and may decay.

    .. math:: z = \mathrm{prox}_{\tau_k \beta^t s}(u)

    With :math:`\tau = \beta = 1` this is the proximal step itself, and many layers end at the MAP
    codes. A threshold that decays leaves less and less shrinkage in the codes: in the gradient of a
    dictionary the bias of the prior goes with it.

    Args:
        num_atoms: Learn a factor :math:`\tau_k > 0` on the threshold of so many atoms, from 1. None
            learns nothing.
        decay: :math:`\beta \in (0, 1]`, the factor from one layer to the next.

    Raises:
        TypeError: If ``decay`` is no number.
        ValueError: If a number is out of its range.

    References:
        Tolooshams, Dey & Ba (2021), IEEE TNNLS 32(6); decaying: Tolooshams & Ba (2022), TMLR.

    Example:
        >>> import pyro.distributions as dist
        >>> law = dist.Laplace(0.0, 1.0).expand([3]).to_event(1)
        >>> Proximal(decay=0.5)(law, torch.tensor([3.0, 1.0, -2.0]), torch.tensor(1.0), 1, 2)
        tensor([ 2.5000,  0.5000, -1.5000])
    """

    keeps_support = True

    def __init__(self, num_atoms: int | None = None, *, decay: float = 1.0) -> None:
        super().__init__()
        _check_decay(decay)
        self.decay = decay
        self.log_factor: nn.Parameter | None = None
        if num_atoms is not None:
            check_sizes(num_atoms=num_atoms)
            self.log_factor = nn.Parameter(torch.zeros(num_atoms))

    def forward(  # noqa: D102
        self, law: Law, value: Tensor, step: Tensor, layer: int, num_layers: int
    ) -> Tensor:
        if self.log_factor is not None:
            step = step * _by_atom(self.log_factor.exp(), law)
        return prox(law, value, step * self.decay**layer)

    def check(self, dictionary: Dictionary) -> None:  # noqa: D102
        if self.log_factor is not None:
            _check_fits("log_factor", self.log_factor, dictionary)


class HardThreshold(Shrinkage):
    r"""Keep codes above a level as they are, drop the others: :math:`z = u\, 1[|u| > \theta]`.

    The level is in code units; neither the prior nor the step size scales it (the prior's signs and
    support an encoder keeps), and what is kept is not shrunk, so that the bias of a Laplace prior
    is absent from the codes. There is no gradient by the level.

    Args:
        level: :math:`\theta \ge 0`: a number, or shape ``(atoms,)``.
        decay: Factor on the level from one layer to the next, in (0, 1].

    Raises:
        TypeError: If an argument is not a number or a tensor of them.
        ValueError: If a level is negative or not finite, or ``decay`` is out of its range.

    References:
        Blumensath & Davies (2008), J. Fourier Anal. Appl. 14; in a dictionary's gradient:
        Tolooshams & Ba (2022), TMLR.

    Example:
        >>> import pyro.distributions as dist
        >>> law = dist.Laplace(0.0, 1.0).expand([3]).to_event(1)
        >>> HardThreshold(1.5)(law, torch.tensor([3.0, 1.0, -2.0]), torch.tensor(1.0), 0, 1)
        tensor([ 3.,  0., -2.])
    """

    level: Tensor

    def __init__(self, level: float | Tensor, *, decay: float = 1.0) -> None:
        super().__init__()
        _check_decay(decay)
        self.decay = decay
        value = _as_level("level", level)
        if not bool((torch.isfinite(value) & (value >= 0)).all()):
            raise ValueError(f"Expected level >= 0 and finite, in code units, got {level}.")
        self.register_buffer("level", value)

    def forward(  # noqa: D102
        self, law: Law, value: Tensor, step: Tensor, layer: int, num_layers: int
    ) -> Tensor:
        return hard_threshold(value, _by_atom(self.level, law) * self.decay**layer)

    def check(self, dictionary: Dictionary) -> None:  # noqa: D102
        _check_fits("level", self.level, dictionary)


class Bias(Shrinkage):
    r"""A free, learned bias: :math:`z = \mathrm{ReLU}(u - b_k)`, or soft shrinkage by it.

    The prior's rate and the step size have no say, as in the published networks (LISTA, CSCNet,
    DCEA); signs and support that the prior allows an encoder keeps. A negative bias is allowed
    one-sided: it adds to codes, and a reading as inference under a sparse prior is lost.

    Args:
        init: Starting value in code units: a number, or shape ``(atoms,)``.
        num_atoms: Repeat a single number for so many atoms. Without it, a single number is one bias
            that all atoms share.
        two_sided: Shrink both signs, by the absolute value of the bias; otherwise codes are
            non-negative.

    Raises:
        TypeError: If ``init`` is not a number or a tensor of them.
        ValueError: If it is not finite.

    References:
        Gregor & LeCun (2010), ICML; Simon & Elad (2019), NeurIPS 32 (CSCNet); Tolooshams, Song,
        Temereanca & Ba (2020), ICML (DCEA).

    Example:
        >>> import pyro.distributions as dist
        >>> law = dist.Exponential(1.0).expand([3]).to_event(1)
        >>> Bias(1.5)(law, torch.tensor([3.0, 1.0, -2.0]), torch.tensor(1.0), 0, 1).detach()
        tensor([1.5000, 0.0000, 0.0000])
    """

    def __init__(
        self, init: float | Tensor, *, num_atoms: int | None = None, two_sided: bool = False
    ) -> None:
        super().__init__()
        value = _as_level("init", init)
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"Expected a finite bias, got {init}.")
        if num_atoms is not None:
            check_sizes(num_atoms=num_atoms)
            if value.shape not in ((), (num_atoms,)):
                raise ValueError(
                    f"Expected init to be one number or of shape ({num_atoms},), got "
                    f"{tuple(value.shape)}."
                )
            value = value.expand(num_atoms).clone()
        self.bias = nn.Parameter(value)
        self.two_sided = two_sided

    def forward(  # noqa: D102
        self, law: Law, value: Tensor, step: Tensor, layer: int, num_layers: int
    ) -> Tensor:
        bias = _by_atom(self.bias, law)
        return soft_threshold(value, bias.abs()) if self.two_sided else torch.relu(value - bias)

    def check(self, dictionary: Dictionary) -> None:  # noqa: D102
        _check_fits("bias", self.bias, dictionary)


class TopK(Shrinkage):
    r"""Another shrinkage, of which every few layers only the largest codes of a datum are kept.

    Codes that are dropped are zero and get no gradient. The number kept falls linearly over the
    layers, from twice ``num_active`` to ``num_active``, so that the last layers decide between few
    candidates. The last layer always keeps ``num_active``.

    Args:
        inner: What comes first, such as ``Proximal()``.
        num_active: Codes of one datum (all atoms and positions) that may stay at the end, ``>= 1``.
            Equal magnitudes at the border are kept as ``torch.topk`` orders them.
        every: Layers between two selections, ``>= 1``.

    Raises:
        TypeError: If ``inner`` is no shrinkage.
        ValueError: If a number is not a whole one of at least one.

    References:
        Tolooshams, Matias, Wu, Temereanca, Uchida, Murthy, Masset & Ba (2025), Neuron (DUNL).

    Example:
        >>> import pyro.distributions as dist
        >>> law = dist.Laplace(0.0, 1.0).expand([3]).to_event(1)
        >>> values = torch.tensor([3.0, 1.5, -4.0])
        >>> TopK(Proximal(), num_active=1)(law, values, torch.tensor(1.0), 0, 1)
        tensor([ 0.,  0., -3.])
    """

    keeps_support = True

    def __init__(self, inner: Shrinkage, num_active: int, *, every: int = 1) -> None:
        super().__init__()
        if not isinstance(inner, Shrinkage):
            raise TypeError(f"Expected inner to be a Shrinkage, such as Proximal(), got {inner!r}.")
        check_sizes(num_active=num_active, every=every)
        self.inner = inner
        self.num_active = num_active
        self.every = every

    def forward(  # noqa: D102
        self, law: Law, value: Tensor, step: Tensor, layer: int, num_layers: int
    ) -> Tensor:
        # The choice is among codes that may be.
        codes = self.inner.allowed(law, value, step, layer, num_layers)
        last = layer == num_layers - 1
        if not last and (layer + 1) % self.every:
            return codes
        left = 0.0 if last else 1 - (layer + 1) / num_layers
        count = math.ceil(self.num_active * (1 + left))
        flat = codes.flatten(-len(law.event_shape))
        if count >= flat.shape[-1]:
            return codes
        kept = flat.detach().abs().topk(count, dim=-1).indices
        mask = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, kept, value=True)
        return torch.where(mask, flat, torch.zeros_like(flat)).reshape(codes.shape)

    def check(self, dictionary: Dictionary) -> None:  # noqa: D102
        self.inner.check(dictionary)


class NonMaximumSuppression(Shrinkage):
    r"""Another shrinkage, of whose codes only those that are largest around them are kept.

    .. math:: z_{kt} = \begin{cases} v_{kt} & |v_{kt}| \ge |v_{ku}| \text{ for all } u \text{
        with } |u_d - t_d| \le \text{gap}_d \\ 0 & \text{else} \end{cases}

    with :math:`v` the codes of the inner shrinkage and :math:`t` their positions; every atom is
    looked at by itself. Neighbouring positions of a smooth atom explain the same samples, and a
    proximal step lets them share one event. Here an event has one code, and no other code of its
    atom is within ``gap`` of it: the refractory period of a neuron. Codes that are dropped are zero
    and get no gradient.

    It is a device of encoders. No penalty has it as its proximal step, so there is nothing that a
    duality gap could certify, and ``solvers.solve`` does not take it.

    Args:
        inner: What comes first, such as ``Proximal()``.
        gap: Positions on either side, ``>= 0``: a number, or one for each dimension of positions.
            Of equal magnitudes that near each other the first is kept.

    Raises:
        TypeError: If ``inner`` is no shrinkage.
        ValueError: If ``gap`` is not whole numbers of at least zero; and when an encoder is made,
            if its codes have no positions, as those of a dense dictionary, or another number of
            their dimensions.

    References:
        Neubeck & Van Gool (2006), ICPR, Efficient non-maximum suppression: the same maxima, of
        pictures.

    Example:
        >>> import pyro.distributions as dist
        >>> law = dist.Laplace(0.0, 1.0).expand([1, 5]).to_event(2)
        >>> values = torch.tensor([[3.0, -4.0, 0.0, 2.0, 1.5]])
        >>> NonMaximumSuppression(Proximal(), gap=1)(law, values, torch.tensor(1.0), 0, 1)
        tensor([[ 0., -3.,  0.,  1.,  0.]])
    """

    keeps_support = True

    def __init__(self, inner: Shrinkage, gap: int | tuple[int, ...]) -> None:
        super().__init__()
        if not isinstance(inner, Shrinkage):
            raise TypeError(f"Expected inner to be a Shrinkage, such as Proximal(), got {inner!r}.")
        gaps = gap if isinstance(gap, tuple) else (gap,)
        whole = all(isinstance(n, Integral) and not isinstance(n, bool) and n >= 0 for n in gaps)
        if not whole or not gaps:
            raise ValueError(
                "Expected gap to be a whole number >= 0, or a tuple of them, one for each "
                f"dimension of positions, got {gap!r}."
            )
        self.inner = inner
        self.gap = gap

    def forward(  # noqa: D102
        self, law: Law, value: Tensor, step: Tensor, layer: int, num_layers: int
    ) -> Tensor:
        codes = self.inner.allowed(law, value, step, layer, num_layers)
        gaps = self._gaps(len(law.event_shape) - 1)
        size = codes.detach().abs()
        kept = size == _largest(size, gaps)
        # Of neighbours alike the first; in float64 every whole number up to 2^53 is one.
        positions = codes.shape[codes.dim() - len(gaps) :]
        order = torch.arange(positions.numel(), 0, -1, dtype=torch.float64, device=codes.device)
        rank = torch.where(kept, order.reshape(positions), 0.0)
        kept = kept & (rank == _largest(rank, gaps))
        return torch.where(kept, codes, torch.zeros_like(codes))

    def check(self, dictionary: Dictionary) -> None:  # noqa: D102
        self._gaps(dictionary.code_dims - 1)
        self.inner.check(dictionary)

    def _gaps(self, dims: int) -> tuple[int, ...]:
        """One gap for each dimension of positions."""
        if dims == 0:
            raise ValueError(
                "Expected codes with positions, (atoms, *positions), for a gap between them; those "
                "of a dense dictionary have none. Use Conv, or TopK, which has no gap."
            )
        gaps = self.gap if isinstance(self.gap, tuple) else (self.gap,) * dims
        if len(gaps) != dims:
            raise ValueError(
                f"Expected gap for {dims} dimensions of positions, got {self.gap}, {len(gaps)}."
            )
        return gaps


def _largest(size: Tensor, gaps: tuple[int, ...]) -> Tensor:
    """Largest value around each position, in a box: one dimension after the other."""
    for dim, gap in enumerate(gaps, start=-len(gaps)):
        rows = size.movedim(dim, -1)
        flat = rows.reshape(-1, 1, rows.shape[-1])
        flat = nn.functional.max_pool1d(flat, 2 * gap + 1, 1, gap)
        size = flat.reshape(rows.shape).movedim(-1, dim)
    return size


def _by_atom(values: Tensor, law: Law) -> Tensor:
    """Values of the atoms, shaped to multiply codes."""
    return values.reshape(-1, *[1] * (len(law.event_shape) - 1)) if values.dim() else values


def _check_fits(name: str, values: Tensor, dictionary: Dictionary) -> None:
    if values.shape not in ((), (dictionary.num_atoms,)):
        raise ValueError(
            f"Expected {name} of a shrinkage to be one number or one for each atom, shape "
            f"({dictionary.num_atoms},), got {tuple(values.shape)}."
        )
    if torch.promote_types(values.dtype, dictionary.like.dtype) != dictionary.like.dtype:
        raise TypeError(
            f"Expected {name} of a shrinkage of the dictionary's dtype {dictionary.like.dtype}, "
            f"got {values.dtype}. Try .to({dictionary.like.dtype})."
        )


def _check_decay(decay: float) -> None:
    if not isinstance(decay, Real):
        raise TypeError(f"Expected decay to be a number, got {decay!r}.")
    if not 0 < decay <= 1:
        raise ValueError(f"Expected decay in (0, 1], got {decay}.")


def _as_level(name: str, given: float | Tensor) -> Tensor:
    if isinstance(given, Tensor):
        check_tensor(name, given)
        value = given.detach().clone()
    elif isinstance(given, Real):
        value = torch.tensor(float(given))
    else:
        raise TypeError(f"Expected {name} to be a number or a tensor, got {given!r}.")
    if value.dim() > 1 or value.numel() == 0:
        raise ValueError(f"Expected {name} of shape () or (atoms,), got {tuple(value.shape)}.")
    return value
