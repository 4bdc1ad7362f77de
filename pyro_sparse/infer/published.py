"""Biased estimators of the literature, as baselines: what they draw is all they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_sparse.distributions.mixed import Mixed
from pyro_sparse.infer.estimators import Estimator
from pyro_sparse.infer.integrand import Draw, leaf
from pyro_sparse.infer.schedules import Scheduled, check_scheduled


@dataclass(frozen=True)
class StraightThrough(Estimator):
    r"""Thresholded forward, not thresholded backward.

    The draw is :math:`z = T_\lambda(\mu + \epsilon)` and the gradient that of :math:`\mu +
    \epsilon`, for active and inactive codes alike. Its mean for the shift is :math:`g\,
    \mathbb E_s f' + (1 - g) f'(0)`: mostly the slope at zero, which revives codes that are never
    active, and no gradient of the ELBO. Thresholds get no gradient.

    Args:
        as_released: The form of the authors' code, in which the thresholded path is added to the
            straight one with only its noise detached: the shift of an active code gets its
            gradient twice, and the threshold gets one.
        noise: Published warm-up: factor on the noise :math:`\epsilon` of the draw, ``>= 0``, a
            number or a ``Scheduled`` one. The KL is of the law with all its noise.

    Raises:
        TypeError: If ``noise`` is neither a number nor ``Scheduled``.
        ValueError: If it is negative.

    References:
        Fallah & Rozell (2022), ICML, PMLR 162:6034-6058, fig. 1; the released form is their
        repository's after January 2022.

    Example:
        >>> from pyro_sparse.infer import BestOf, SparseELBO
        >>> objective = SparseELBO(
        ...     StraightThrough(), num_samples=20, bound=BestOf(as_published=True), base_kl=True
        ... )
    """

    as_released: bool = False
    noise: float | Scheduled = 1.0
    unbiased = False
    bounds = True

    def __post_init__(self) -> None:
        check_scheduled("noise", self.noise, 0.0)

    def draw(self, law: Any, lead: tuple[int, ...]) -> Draw:  # noqa: D102
        base = _thresholded(self, law)
        straight = _base_draw(base, lead, self.noise)
        if self.as_released:
            loc = base.base.loc
            value = base.apply_threshold(loc + (straight - loc).detach())
            return Draw(value + (straight - straight.detach()))
        value = base.apply_threshold(straight)
        return Draw(straight + (value - straight).detach())


@dataclass(frozen=True)
class SubGradient(Estimator):
    r"""Almost-everywhere derivative of the thresholded draw: that of active codes alone.

    It misses how codes enter and leave the atom, :math:`\nabla g\,[f(z_i = \mu_i) - f(z_i = 0)]`,
    and so has no gradient for gates. Exact for a threshold without a jump (``SoftThresholded``).

    Args:
        noise: Published warm-up: factor on the noise of the draw, ``>= 0``, a number or a
            ``Scheduled`` one; for laws made by a threshold. The KL is of the law with all its
            noise.

    Raises:
        TypeError: If ``noise`` is neither a number nor ``Scheduled``.
        ValueError: If it is negative.

    References:
        Fallah & Rozell (2022), ICML, PMLR 162:6034-6058 (their comparison). The released code
        multiplies the noise by its scale twice here; this does not.

    Example:
        >>> from pyro_sparse.infer import SparseELBO
        >>> objective = SparseELBO(SubGradient(), num_samples=20)
    """

    noise: float | Scheduled = 1.0
    unbiased = False
    bounds = True

    def __post_init__(self) -> None:
        check_scheduled("noise", self.noise, 0.0)

    def draw(self, law: Any, lead: tuple[int, ...]) -> Draw:  # noqa: D102
        if float(self.noise) != 1 or hasattr(leaf(law), "apply_threshold"):
            base = _thresholded(self, law)
            return Draw(base.apply_threshold(_base_draw(base, lead, self.noise)))
        return Draw(_mixed(self, leaf(law), lead)[2])


@dataclass(frozen=True, eq=False)
class Concrete(Estimator):
    r"""Relaxed gates.

    .. math:: z = \sigma\big((\operatorname{logit} u + \operatorname{logit} g) / T\big)\, w,
        \qquad u \sim U(0, 1), \quad w \sim s

    With the logit of the gate (the released code has its logarithm there, so that no gate is open
    more than half of the time). Biased for the law with an atom, the less the lower the
    temperature.

    Args:
        temperature: :math:`T > 0`, a number or a ``Scheduled`` one.
        hard: Round the gate forward and keep the relaxed gradient (straight-through).

    Raises:
        TypeError: If the temperature is neither a number nor ``Scheduled``.
        ValueError: If it is not positive.

    References:
        Maddison, Mnih & Teh (2017), ICLR; Tonolini, Jensen & Murray-Smith (2019), UAI.

    Example:
        >>> from pyro_sparse.infer import ExponentialDecay, Scheduled, SparseELBO
        >>> temperature = Scheduled(ExponentialDecay(1.0, 0.9995, floor=0.5))
        >>> objective = SparseELBO(Concrete(temperature))
    """

    temperature: float | Scheduled = 0.5
    hard: bool = True
    unbiased = False
    bounds = True

    def __post_init__(self) -> None:
        check_scheduled("temperature", self.temperature, 0.0, open_low=True)

    def draw(self, law: Any, lead: tuple[int, ...]) -> Draw:  # noqa: D102
        base = leaf(law)
        slab = _mixed(self, base, lead)[0]
        # In float64: in float32 a logistic variate would end at 17.
        noise = torch.rand(slab.shape, dtype=torch.float64, device=slab.device)
        noise = torch.special.logit(noise.clamp(min=torch.finfo(noise.dtype).tiny)).to(slab)
        gate = ((noise + base.logits) / float(self.temperature)).sigmoid()
        if self.hard:
            gate = gate + ((gate > 0.5).to(gate) - gate).detach()
        return Draw(gate * slab)


def _mixed(estimator: Estimator, law: Any, lead: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Pathwise draw of the slab, gates, and codes."""
    if not isinstance(law, Mixed):
        raise NotImplementedError(
            f"{type(estimator).__name__} is defined for laws with independent gates, got "
            f"{type(law).__name__}. Use ImplicitMixed() or LeaveOneOut()."
        )
    slab, active = law.rsample_slab(torch.Size(lead)), law.sample_active(torch.Size(lead))
    return slab, active, torch.where(active, slab, torch.zeros_like(slab))


def _base_draw(law: Any, lead: tuple[int, ...], noise: float | Scheduled) -> Tensor:
    """Pathwise draw of what a threshold is applied to."""
    straight = law.base.rsample(torch.Size(lead))
    if float(noise) == 1:
        return straight
    return law.base.loc + float(noise) * (straight - law.base.loc)


def _thresholded(estimator: Estimator, law: Any) -> Any:
    law = leaf(law)
    if not hasattr(law, "apply_threshold"):
        raise NotImplementedError(
            f"{type(estimator).__name__} needs a law made by a threshold, such as "
            f"ShiftedThresholded(base, threshold), got {type(law).__name__}. For a SpikeAndSlab "
            "use Concrete(hard=True)."
        )
    return law
