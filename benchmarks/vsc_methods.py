"""Programs and objectives that `benchmarks.vsc` compares: the published ones and the exact one.

Priors of all sparse methods make a code active with probability 0.1; of an active code, scales are
the published ones. On patches every method has the same encoder, an unrolled solver on the model's
atoms, so that a short training measures objectives and laws more than encoders; two methods also
train with a network of two hidden layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_sparse.distributions import SpikeAndSlab
from pyro_sparse.distributions.gamma import GammaThresholded
from pyro_sparse.distributions.thresholded import ShiftedThresholded
from pyro_sparse.guides import (
    DensePosterior,
    GammaThresholdPosterior,
    Heads,
    SpikeAndSlabPosterior,
    Thresholded,
    ThresholdPosterior,
)
from pyro_sparse.infer import (
    BestOf,
    Concrete,
    Exact,
    ExponentialDecay,
    ImplicitMixed,
    LinearRamp,
    Mean,
    Scheduled,
    SparseELBO,
    StraightThrough,
    Warmup,
)
from pyro_sparse.infer.estimators import Estimator

PROBS = 0.1
LAPLACE_SCALE, NORMAL_SCALE = 0.1, math.sqrt(0.1)
SHIFTED = {dist.Laplace: 0.230259, dist.Normal: 0.520148}
"""Thresholds of the prior, in code units, that a draw passes with probability 0.1."""
GAMMA = {dist.Laplace: 0.346330, dist.Normal: 0.830604}
"""Means of a Gamma threshold of shape 3, likewise."""
POINT_SCALE = 1.28 / 20
"""Scale of the Laplace prior of MAP codes: the published penalty, 20, in units of the noise."""
GAMMA_WEIGHT = 0.1
"""Published factor on the KL of the threshold."""
DRAWS = 20
KL_START = 0.1
WARM = 0.1
"""Part of the steps in which noise or temperature reach their final values."""
SCALES = {dist.Laplace: LAPLACE_SCALE, dist.Normal: NORMAL_SCALE}

Model = Callable[..., nn.Module]
"""Makes a model of ``prior=`` and, where it is sampled, ``threshold=``."""


class _Scaled(Messenger):
    """Scales one site of the model."""

    def __init__(self, site: str, factor: float) -> None:
        super().__init__()
        self.site, self.factor = site, factor

    def _pyro_sample(self, message: Any) -> None:
        if message["name"] == self.site:
            message["scale"] = message["scale"] * self.factor


class Downweighted(nn.Module):
    """A model whose site ``"threshold"`` counts for less in the KL, as published."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        with _Scaled("threshold", GAMMA_WEIGHT):
            found: Tensor = self.model(*args, **kwargs)
        return found


@dataclass(frozen=True)
class Method:
    """What a method trains, and what its log-weights are taken with.

    Attributes:
        base: ``dist.Normal`` or ``dist.Laplace``: law before the threshold, of the slab, or of
            dense codes.
        kind: Which law: "dense", "gates", "threshold", "gamma", or "point" (MAP, no law).
        estimator: Makes the estimator, of a ``Scheduled`` for what is warmed up.
        best: Train with the best of the draws, "max-ELBO", instead of their mean.
        draws: Of every datum at a step, where they are not the estimator's own.
        published: Whether it is one of the published sparse methods.
        mlp: Whether a network of two hidden layers takes the place of the unrolled encoder.
        warmed: Value of that at the start and after the first tenth of the steps.
        probs: Prior probability of an active code; another than 0.1 for free gates alone.
        integrated: Integrate a Gamma threshold out in training too.
    """

    base: type
    kind: str
    estimator: Callable[[Any], Estimator]
    best: bool = False
    draws: int = DRAWS
    published: bool = False
    warmed: tuple[float, float] | None = None
    mlp: bool = False
    probs: float = PROBS
    integrated: bool = False

    @property
    def prior_variance(self) -> float:
        """Of a code, active or not; of thresholded laws that of the base, scaled by inclusion."""
        variance = SCALES[self.base] ** 2 * (2 if self.base is dist.Laplace else 1)
        return variance * (1 if self.kind == "dense" else self.probs)

    def prior(self, *, integrated: bool = False) -> dict[str, Any]:
        """Arguments of the model."""
        scale = SCALES[self.base]
        base = self.base(0.0, scale)
        if self.kind == "point":
            return {"prior": dist.Laplace(0.0, POINT_SCALE)}
        if self.kind == "dense":
            return {"prior": base}
        if self.kind == "gates":
            return {"prior": SpikeAndSlab(base, self.probs)}
        if self.kind == "threshold":
            return {"prior": ShiftedThresholded(base, SHIFTED[self.base])}
        mean = GAMMA[self.base]
        if integrated or self.integrated:
            return {"prior": GammaThresholded(0.0, scale, 3.0, 3.0 / mean)}
        return {
            "prior": lambda threshold: ShiftedThresholded(base, threshold),
            "threshold": dist.Gamma(3.0, 3.0 / mean),
        }

    def family(self, *, integrated: bool = False) -> nn.Module:
        """Law that the encoder's numbers are made into."""
        if self.kind == "dense":
            return DensePosterior(self.base)
        if self.kind == "gates":
            return SpikeAndSlabPosterior(self.base)
        if self.kind == "threshold":
            return ThresholdPosterior(SHIFTED[self.base], self.base)
        return GammaThresholdPosterior(sampled=not (integrated or self.integrated), base=self.base)

    def guide(self, network: nn.Module, width: int, atoms: int) -> Thresholded:
        """The encoder; its heads start at the prior, but for weights as torch makes them."""
        family: Any = self.family()
        heads = Heads(network, width, atoms, family.names)
        start = {
            "loc": 0.0,
            "log_scale": math.log(SCALES[self.base]),
            "logits": math.log(self.probs / (1 - self.probs)),
            "log_concentration": math.log(3.0),
            "log_rate": math.log(3.0 / GAMMA[self.base]),
        }
        for name, head in heads.heads.items():
            nn.init.constant_(head.bias, start[name])
        return Thresholded(heads, family)

    def objective(self, steps: int) -> tuple[SparseELBO, Sequence[Warmup], Any]:
        """Objective of a training of so many steps, its warm-ups, and a wrapper of the model."""
        moving: Any = 1.0
        callbacks: list[Warmup] = []
        length = max(int(WARM * steps), 1)
        if self.warmed is not None:
            start, end = self.warmed
            ramp = (
                LinearRamp(start, end, num_steps=length)
                if start < end
                else ExponentialDecay(start, (end / start) ** (1 / length), floor=end)
            )
            moving = Scheduled(ramp)
            callbacks = [Warmup(moving)]
        estimator = self.estimator(moving)
        sampled = isinstance(estimator, StraightThrough | Concrete) or self.kind == "dense"
        elbo = SparseELBO(
            estimator,
            num_samples=self.draws if sampled and not isinstance(estimator, Exact) else None,
            bound=BestOf(as_published=True) if self.best else Mean(),
            base_kl=self.published and self.kind in ("threshold", "gamma"),
            num_plates=1,
            kl_weight=self._kl_weight(length, callbacks),
        )
        sampled_threshold = self.kind == "gamma" and not self.integrated
        return elbo, callbacks, Downweighted if sampled_threshold else (lambda model: model)

    def _kl_weight(self, length: int, callbacks: list[Warmup]) -> float | Scheduled:
        """Warmed up for the objectives of this library: published ones do without."""
        if self.published or self.kind in ("dense", "point"):
            return 1.0
        weight = Scheduled(LinearRamp(KL_START, 1.0, num_steps=2 * length))
        callbacks.append(Warmup(weight))
        return weight

    def weighable(self, model: Model, guide: Thresholded) -> tuple[nn.Module, Thresholded]:
        """Model and guide for log-weights: a threshold is integrated out where that is possible."""
        integrated = self.kind == "gamma" and self.base is dist.Laplace
        family = self.family(integrated=integrated) if integrated else guide.family
        return model(**self.prior(integrated=integrated)), Thresholded(guide.encoder, family)


def _released(noise: Any) -> Estimator:
    return StraightThrough(as_released=True, noise=noise)


def _published(base: type, kind: str, *, best: bool, draws: int = DRAWS) -> Method:
    # Published: noise of the Laplace base is warmed up, that of the normal one is not.
    warmed = (0.1, 1.0) if base is dist.Laplace else None
    return Method(base, kind, _released, best=best, draws=draws, published=True, warmed=warmed)


def _concrete(*, best: bool) -> Method:
    return Method(dist.Normal, "gates", Concrete, best=best, published=True, warmed=(1.0, 0.5))


ABLATED: dict[str, Method] = {
    "threshold-laplace-of-1": _published(dist.Laplace, "threshold", best=False, draws=1),
    "threshold-laplace-mean-of-5": _published(dist.Laplace, "threshold", best=False, draws=5),
    "exact-laplace-fixed": Method(dist.Laplace, "threshold", lambda _: Exact()),
    "exact-laplace-gamma": Method(dist.Laplace, "gamma", lambda _: Exact(), integrated=True),
    **{
        f"exact-gaussian-{percent}-percent": Method(
            dist.Normal, "gates", lambda _: Exact(), probs=percent / 100
        )
        for percent in (5, 20, 50)
    },
}
"""Of `benchmarks.vsc_ablations` alone."""

METHODS: dict[str, Method] = {
    "fista": Method(dist.Laplace, "point", lambda _: Exact()),
    "gaussian": Method(dist.Normal, "dense", lambda _: ImplicitMixed()),
    "laplace": Method(dist.Laplace, "dense", lambda _: ImplicitMixed()),
    "concrete-mean": _concrete(best=False),
    "concrete-max": _concrete(best=True),
    **{
        f"threshold-{name}{suffix}-{how}": _published(base, kind, best=how == "max")
        for name, base in (("gaussian", dist.Normal), ("laplace", dist.Laplace))
        for suffix, kind in (("", "threshold"), ("-gamma", "gamma"))
        for how in ("mean", "max")
    },
    "exact-gaussian": Method(dist.Normal, "gates", lambda _: Exact()),
    "exact-laplace": Method(dist.Laplace, "gates", lambda _: Exact()),
    "exact-gaussian-mlp": Method(dist.Normal, "gates", lambda _: Exact(), mlp=True),
    "threshold-laplace-max-mlp": Method(
        dist.Laplace, "threshold", _released, best=True, published=True, warmed=(0.1, 1.0), mlp=True
    ),
    "threshold-gaussian-max-of-5": _published(dist.Normal, "threshold", best=True, draws=5),
    "threshold-laplace-max-of-5": _published(dist.Laplace, "threshold", best=True, draws=5),
    "implicit-gaussian": Method(dist.Normal, "gates", lambda _: ImplicitMixed()),
    "implicit-laplace": Method(dist.Laplace, "gates", lambda _: ImplicitMixed()),
    **ABLATED,
}
