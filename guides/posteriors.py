"""Families of posteriors over codes: from an encoder's unconstrained numbers to a law."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, Protocol

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_sparse.distributions import SpikeAndSlab, Tails, overshoot
from pyro_sparse.distributions.gamma import GammaThresholded
from pyro_sparse.distributions.thresholded import ShiftedThresholded, SoftThresholded
from pyro_sparse.infer.bundle import register_savable

_SMALLEST, _LARGEST = -30.0, 30.0  # logarithms of scales: beyond them float32 divides by zero
_WIDEST = math.log(1e6)  # the published clip of Gamma parameters


class Posterior(Protocol):
    """What a guide asks of a family: any module with these two.

    Attributes:
        names: Names of the parameters that an encoder has to emit.

    Example:
        >>> class HalfNormal(nn.Module):  # a family of one's own
        ...     names = ("log_scale", "logits")
        ...     def forward(self, parameters):
        ...         slab = dist.HalfNormal(parameters["log_scale"].exp())
        ...         return SpikeAndSlab(slab, logits=parameters["logits"])
        >>> from pyro_sparse.guides import Heads, Thresholded
        >>> family = HalfNormal()
        >>> encoder = Heads(nn.Linear(5, 16), 16, code_shape=8, names=family.names)
        >>> Thresholded(encoder, family).posterior(torch.randn(3, 5)).prob_active.shape
        torch.Size([3, 8])
    """

    names: tuple[str, ...]

    def __call__(self, parameters: dict[str, Tensor]) -> Any:
        """Law of every code, elementwise, of unconstrained parameters of shape ``(n, *codes)``.

        May sample further sites of the guide, such as a threshold.
        """
        ...


class SpikeAndSlabPosterior(nn.Module):
    r"""Free inclusion, location and scale: :math:`(1 - g)\, \delta_0 + g\, s(\mu, b)`.

    A thresholded Laplace posterior with a learned threshold is of this family; here nothing ties
    inclusion to the scale. An encoder emits ``loc``, ``log_scale`` and ``logits``; of an
    exponential slab the mean is ``exp(log_scale)`` and ``loc`` is not asked for.

    One-sided, for a prior of non-negative codes, :math:`s` is the law given that it is positive: of
    a normal one :math:`\mathcal N_+(\mu, b^2)`, with its mode at zero where :math:`\mu < 0`. Of one
    code with inclusion :math:`\pi` and slab :math:`\mathrm{Exponential}(\lambda)`, seen in
    :math:`y \sim \mathcal N(a z, \sigma^2)`, that is the posterior, with

    .. math:: b = \sigma / \|a\|, \qquad
        \mu = b^2 (a^T y / \sigma^2 - \lambda), \qquad
        \operatorname{logit} g = \operatorname{logit} \pi + \log \lambda b \sqrt{2 \pi}
        + \frac{\mu^2}{2 b^2} + \log \Phi(\mu / b).

    An encoder whose log-odds count codes of either sign lacks the last term; ``UnrolledEncoder``
    has it with ``one_sided=True``.

    Args:
        slab: ``dist.Normal`` (default), ``dist.Laplace`` or ``dist.Exponential``.
        one_sided: Keep positive codes alone. An exponential slab does so anyway.

    Raises:
        ValueError: If ``slab`` is another class.

    References:
        Titsias & Lazaro-Gredilla (2011), NeurIPS 24; Tonolini, Jensen & Murray-Smith (2019), UAI.
        One-sided: Schmidt, Winther & Hansen (2009), ICA (the normal law cut off at zero).

    Example:
        >>> emitted = {name: torch.zeros(3, 8) for name in ("loc", "log_scale", "logits")}
        >>> SpikeAndSlabPosterior(dist.Laplace)(emitted).prob_active[0, 0]
        tensor(0.5000)
        >>> SpikeAndSlabPosterior(one_sided=True)(emitted).slab.mean[0, 0]  # sqrt(2 / pi)
        tensor(0.7979)
    """

    def __init__(self, slab: type = dist.Normal, *, one_sided: bool = False) -> None:
        super().__init__()
        if slab not in (dist.Normal, dist.Laplace, dist.Exponential):
            raise ValueError(
                "Expected slab to be dist.Normal, dist.Laplace or dist.Exponential, got "
                f"{slab!r}. For another one write a module with names and a call of your own."
            )
        self.slab = slab
        self.one_sided = one_sided
        has_loc = slab is not dist.Exponential
        self.names = ("loc", "log_scale", "logits") if has_loc else ("log_scale", "logits")

    def forward(self, parameters: dict[str, Tensor]) -> SpikeAndSlab:
        """Law of the codes."""
        logits = parameters["logits"]
        if self.slab is dist.Exponential:
            return SpikeAndSlab(dist.Exponential(_scale(parameters).reciprocal()), logits=logits)
        slab = self.slab(parameters["loc"], _scale(parameters))
        if self.one_sided:
            slab = Tails(overshoot(slab, slab.loc))
        return SpikeAndSlab(slab, logits=logits)


class ThresholdPosterior(nn.Module):
    r"""A threshold on the draws of a base law, fixed or learned.

    Shifted (as published) the threshold acts on the noise: of a Laplace base :math:`P(z \neq 0) =
    e^{-\lambda / b}`, whatever the location, and a code that is surely active must have a wide
    posterior. Soft, it acts on the draw itself, so a location beyond the threshold makes a code
    active. An encoder emits ``loc`` and ``log_scale``.

    Args:
        threshold: :math:`\lambda \ge 0`, in code units: a number, a tensor of shape ``(atoms,)`` or
            one that broadcasts with a datum's codes, or, to learn it, a module without arguments
            that returns one, such as ``Rate(0.25, num_atoms=K)``.
        base: ``dist.Laplace`` (default) or ``dist.Normal``.
        soft: Soft instead of shifted.
        one_sided: Keep positive codes alone (soft only), for a prior that does.

    Raises:
        TypeError: If ``threshold`` is none of these.
        ValueError: If it is negative, not finite or a parameter, ``base`` is another class, or
            ``one_sided`` comes without ``soft``.

    References:
        Fallah & Rozell (2022), ICML, PMLR 162:6034-6058, sec. 3.

    Example:
        >>> emitted = {"loc": torch.zeros(3, 8), "log_scale": torch.zeros(3, 8)}
        >>> ThresholdPosterior(0.5)(emitted).prob_active[0, 0]  # exp(-0.5)
        tensor(0.6065)
    """

    names = ("loc", "log_scale")

    def __init__(
        self,
        threshold: float | Tensor | nn.Module,
        base: type = dist.Laplace,
        *,
        soft: bool = False,
        one_sided: bool = False,
    ) -> None:
        super().__init__()
        _check_base(base)
        if one_sided and not soft:
            raise ValueError("Expected soft=True with one_sided=True, got a shifted threshold.")
        if isinstance(threshold, nn.Module):
            self.threshold: Any = threshold
        else:
            self.register_buffer("threshold", _fixed(threshold))
        self.base = base
        self.soft = soft
        self.one_sided = one_sided

    def forward(self, parameters: dict[str, Tensor]) -> ShiftedThresholded | SoftThresholded:
        """Law of the codes.

        Raises:
            TypeError: If the threshold's module returns no tensor.
            ValueError: If the threshold's shape does not fit the codes.
        """
        loc = parameters["loc"]
        base = self.base(loc, _scale(parameters))
        threshold = self.threshold
        if isinstance(threshold, nn.Module):
            threshold = threshold()
        if not isinstance(threshold, Tensor):
            raise TypeError(
                "Expected the threshold's module to return a tensor, got "
                f"{type(threshold).__name__}. Try Rate(0.25, num_atoms={loc.shape[1]})."
            )
        shape = tuple(threshold.shape)
        if threshold.dim() == 1:  # one per atom, shared by its positions
            threshold = threshold.reshape(-1, *[1] * (loc.dim() - 2))
        if not _broadcasts(threshold.shape, loc.shape):
            raise ValueError(
                f"Expected a threshold of shape () or (atoms,) = ({loc.shape[1]},), or one that "
                f"broadcasts to a datum's codes {tuple(loc.shape[1:])}, got {shape}."
            )
        threshold = threshold.to(loc)
        if self.soft:
            return SoftThresholded(base, threshold, one_sided=self.one_sided)
        return ShiftedThresholded(base, threshold)


class GammaThresholdPosterior(nn.Module):
    r"""A threshold for every code, :math:`\lambda \sim \mathrm{Gamma}(\alpha, \beta)`, shifted.

    Integrated out (default), the law is a spike and slab with inclusion :math:`(1 + 1 / (\beta
    b))^{-\alpha}`: no draw of the threshold, no KL of it, and a tighter bound; the model's prior is
    any ``SpikeAndSlab``, or ``GammaThresholded`` as the published prior integrated out. Sampled, as
    published, the guide has a site ``"threshold"`` in the plate of the codes, which the model must
    have too: ``SparseCoding(..., threshold=dist.Gamma(3.0, 3.0 / mean))``. Such a model in turn is
    served with ``sampled=True`` alone; with the threshold integrated out it would lack the site in
    the guide, so give it the prior ``GammaThresholded`` in place of ``threshold``. An encoder emits
    ``loc``, ``log_scale``, ``log_concentration`` and ``log_rate``; the last two are clipped to
    (1e-6, 1e6) as published.

    Args:
        sampled: Draw the threshold.
        base: ``dist.Laplace``, or with ``sampled`` also ``dist.Normal``.

    Raises:
        ValueError: If ``base`` is another class.
        NotImplementedError: If the threshold of a normal base is to be integrated out: there is no
            elementary form.

    References:
        Fallah & Rozell (2022), ICML, PMLR 162:6034-6058, sec. 3.

    Example:
        >>> family = GammaThresholdPosterior()
        >>> emitted = {name: torch.zeros(3, 8) for name in family.names}
        >>> family(emitted).prob_active[0, 0]  # 1 / (1 + 1)
        tensor(0.5000)
    """

    names = ("loc", "log_scale", "log_concentration", "log_rate")

    def __init__(self, *, sampled: bool = False, base: type = dist.Laplace) -> None:
        super().__init__()
        _check_base(base)
        if base is not dist.Laplace and not sampled:
            raise NotImplementedError(
                "Expected base=dist.Laplace to integrate the threshold out: for a normal base the "
                "inclusion has no elementary form. Use sampled=True, or "
                "SpikeAndSlabPosterior(dist.Normal), whose inclusion is free."
            )
        self.sampled = sampled
        self.base = base

    def forward(self, parameters: dict[str, Tensor]) -> Any:
        """Law of the codes, after a draw of their thresholds if these are sampled."""
        loc, scale = parameters["loc"], _scale(parameters)
        concentration = parameters["log_concentration"].clamp(-_WIDEST, _WIDEST).exp()
        rate = parameters["log_rate"].clamp(-_WIDEST, _WIDEST).exp()
        if not self.sampled:
            return GammaThresholded(loc, scale, concentration, rate)
        law = dist.Gamma(concentration, rate).to_event(loc.dim() - 1)
        return ShiftedThresholded(self.base(loc, scale), pyro.sample("threshold", law))


class DensePosterior(nn.Module):
    """No atom: the baseline of a dense variational autoencoder.

    For a model with a prior without an atom, or with one (the codes then are never zero, and the
    KL counts every code as active). An encoder emits ``loc`` and ``log_scale``.

    Args:
        base: ``dist.Normal`` (default) or ``dist.Laplace``.

    Raises:
        ValueError: If ``base`` is another class.

    References:
        Kingma & Welling (2014), ICLR.

    Example:
        >>> DensePosterior()({"loc": torch.zeros(3, 8), "log_scale": torch.zeros(3, 8)})
        Normal(loc: torch.Size([3, 8]), scale: torch.Size([3, 8]))
    """

    names = ("loc", "log_scale")

    def __init__(self, base: type = dist.Normal) -> None:
        super().__init__()
        _check_base(base)
        self.base = base

    def forward(self, parameters: dict[str, Tensor]) -> Any:
        """Law of the codes."""
        return self.base(parameters["loc"], _scale(parameters))


def _fixed(threshold: Any) -> Tensor:
    """A threshold that is not learned, as a tensor of its own."""
    is_tensor = isinstance(threshold, Tensor)
    if not is_tensor and (isinstance(threshold, bool) or not isinstance(threshold, Real)):
        raise TypeError(
            "Expected threshold to be a number, a tensor or a module that returns one, got "
            f"{threshold!r}."
        )
    if is_tensor and threshold.requires_grad:
        raise ValueError(
            "Expected a threshold that is a constant or a module, got a parameter. A learned one "
            "is a module that stays positive: pyro_sparse.distributions.Rate(...)."
        )
    kept = is_tensor and threshold.is_floating_point()
    value = torch.as_tensor(threshold, dtype=None if kept else torch.get_default_dtype())
    if not bool(((value >= 0) & value.isfinite()).all()):
        raise ValueError(f"Expected threshold >= 0 and finite (code units), got {threshold}.")
    return value.detach().clone()


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(
        size in (1, wanted) for size, wanted in zip(reversed(shape), reversed(to))
    )


def _scale(parameters: dict[str, Tensor]) -> Tensor:
    return parameters["log_scale"].clamp(_SMALLEST, _LARGEST).exp()


def _check_base(base: Any) -> None:
    if base not in (dist.Laplace, dist.Normal):
        raise ValueError(f"Expected base to be dist.Laplace or dist.Normal, got {base!r}.")


def _register() -> None:
    laws = {law.__name__: law for law in (dist.Laplace, dist.Normal, dist.Exponential)}

    def named(attribute: str, *others: str) -> Callable[[Any], dict[str, Any]]:
        def arguments(posterior: Any) -> dict[str, Any]:
            found = {name: getattr(posterior, name) for name in others}
            return {attribute: getattr(posterior, attribute).__name__, **found}

        return arguments

    def build(cls: type, attribute: str) -> Callable[..., Any]:
        def of_name(**arguments: Any) -> Any:
            law = laws.get(arguments[attribute])
            if law is None:
                raise ValueError(f"Expected one of {sorted(laws)}, got {arguments[attribute]!r}.")
            return cls(**{**arguments, attribute: law})

        return of_name

    for cls, attribute, others in (
        (SpikeAndSlabPosterior, "slab", ("one_sided",)),
        (ThresholdPosterior, "base", ("threshold", "soft", "one_sided")),
        (GammaThresholdPosterior, "base", ("sampled",)),
        (DensePosterior, "base", ()),
    ):
        register_savable(
            cls,
            name=f"pyro_sparse.guides.{cls.__name__}",
            arguments=named(attribute, *others),
            build=build(cls, attribute),
        )


_register()
