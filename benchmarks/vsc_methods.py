"""Programs and objectives that `benchmarks.vsc` compares: the published ones and the exact one.

Priors of all sparse methods make a code active with probability 0.1; of an active code, scales are
the published ones. On patches every method has the same encoder, an unrolled solver on the model's
atoms, so that a short training measures objectives and laws more than encoders; two methods also
train with a network of two hidden layers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_sparse.dictionaries import Dense
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
    UnrolledEncoder,
    UnrolledFISTA,
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
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import DeepSparseCoding, SparseCoding
from pyro_sparse.solvers import Proximal, Unrolled

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
    """

    base: type
    kind: str
    estimator: Callable[[Any], Estimator]
    best: bool = False
    draws: int = DRAWS
    published: bool = False
    warmed: tuple[float, float] | None = None
    mlp: bool = False

    @property
    def prior_variance(self) -> float:
        """Of a code, active or not; of thresholded laws that of the base, scaled by inclusion."""
        variance = SCALES[self.base] ** 2 * (2 if self.base is dist.Laplace else 1)
        return variance * (1 if self.kind == "dense" else PROBS)

    def prior(self, *, integrated: bool = False) -> dict[str, Any]:
        """Arguments of the model."""
        scale = SCALES[self.base]
        base = self.base(0.0, scale)
        if self.kind == "point":
            return {"prior": dist.Laplace(0.0, POINT_SCALE)}
        if self.kind == "dense":
            return {"prior": base}
        if self.kind == "gates":
            return {"prior": SpikeAndSlab(base, PROBS)}
        if self.kind == "threshold":
            return {"prior": ShiftedThresholded(base, SHIFTED[self.base])}
        mean = GAMMA[self.base]
        if integrated:
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
        return GammaThresholdPosterior(sampled=not integrated, base=self.base)

    def guide(self, network: nn.Module, width: int, atoms: int) -> Thresholded:
        """The encoder; its heads start at the prior, but for weights as torch makes them."""
        family: Any = self.family()
        heads = Heads(network, width, atoms, family.names)
        start = {
            "loc": 0.0,
            "log_scale": math.log(SCALES[self.base]),
            "logits": math.log(PROBS / (1 - PROBS)),
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
            base_kl=self.kind in ("threshold", "gamma"),
            num_plates=1,
            kl_weight=self._kl_weight(length, callbacks),
        )
        return elbo, callbacks, Downweighted if self.kind == "gamma" else (lambda model: model)

    def _kl_weight(self, length: int, callbacks: list[Warmup]) -> float | Scheduled:
        """Warmed up for the objectives of this library: published ones do without."""
        if self.published or self.kind != "gates":
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
}


@dataclass(frozen=True)
class Setting:
    """Networks, noise and training of one of the two experiments."""

    kind: str
    atoms: int
    noise: float
    batch: int
    methods: tuple[str, ...]
    betas: tuple[float, float]
    default_rates: tuple[float, float]
    special_rates: Mapping[str, tuple[float, float]]

    @staticmethod
    def of(kind: str) -> Setting:
        return SETTINGS[kind]

    def rates(self, name: str) -> tuple[float, float]:
        """Peak learning rates of encoder and decoder, chosen on validation data."""
        return self.special_rates.get(name, self.default_rates)

    def decay(self, name: str) -> float:
        """Weight decay: as published, of the atoms of the MAP baseline and of deep networks."""
        return 2e-4 / self.noise if name == "fista" else 1e-5 * (self.kind == "fashion")

    def around(self, model: Any) -> Model:
        """Makes models of other priors around the decoder of one."""
        likelihood = Gaussian(math.sqrt(self.noise))
        if self.kind == "linear":
            return functools.partial(SparseCoding, model.dictionary, likelihood)
        return functools.partial(
            DeepSparseCoding, model.decoder, likelihood,
            code_shape=(self.atoms,), signal_shape=(784,),
        )  # fmt: skip

    def decode(self, model: Any, codes: Tensor) -> Tensor:
        """Means of the data, ``(..., features)``."""
        if self.kind == "linear":
            found: Tensor = model.dictionary(codes)
            return found
        flat: Tensor = model.decoder(codes.flatten(0, -2))
        return flat.reshape(*codes.shape[:-1], -1)


WIDTH, DEPTH, ATOM_NORM = 192, 8, 3.0
SETTINGS = {
    "linear": Setting(
        "linear", 256, 1.28, 100,
        methods=tuple(n for n in METHODS if not n.startswith("implicit") and "-of-" not in n),
        betas=(0.9, 0.999), default_rates=(1e-2, 3e-2),
        special_rates={
            "exact-gaussian-mlp": (1e-3, 1e-2),
            "threshold-laplace-max-mlp": (1e-3, 3e-2),
        },
    ),
    "fashion": Setting(
        "fashion", 64, 3.92, 32,
        methods=(
            "threshold-gaussian-max", "threshold-gaussian-max-of-5", "threshold-laplace-max-of-5",
            "implicit-gaussian",
        ),
        betas=(0.5, 0.999), default_rates=(1e-3, 1e-3), special_rates={},
    ),
}  # fmt: skip


def programs(setting: Setting, method: Method) -> tuple[Any, Any]:
    """Model and guide before training."""
    likelihood = Gaussian(math.sqrt(setting.noise))
    if setting.kind == "fashion":
        encoder, decoder, width = convolutional(setting.atoms)
        model: Any = DeepSparseCoding(
            decoder, likelihood, code_shape=(setting.atoms,), signal_shape=(784,), **method.prior()
        )
        return model, method.guide(encoder, width, setting.atoms)
    atoms = torch.randn(setting.atoms, 256)
    atoms = ATOM_NORM * atoms / atoms.norm(dim=1, keepdim=True)
    dictionary = Dense(setting.atoms, 256, atoms=atoms, unit_norm=False)
    model = SparseCoding(dictionary, likelihood, **method.prior())
    if method.kind == "point":
        return model, UnrolledFISTA(
            dictionary, likelihood, model.prior, num_steps=30, shrinkage=Proximal()
        )
    if not method.mlp:
        return model, Thresholded(Solver(dictionary, likelihood, method), method.family())
    return model, method.guide(Beside(256, WIDTH), 256 + WIDTH, setting.atoms)


class Solver(nn.Module):
    """An unrolled solver on the model's atoms; more evidence of a code lowers its threshold."""

    names = ("loc", "log_scale", "logits", "log_concentration", "log_rate")

    def __init__(self, dictionary: Dense, likelihood: Gaussian, method: Method) -> None:
        super().__init__()
        prior = dist.Laplace(0.0, LAPLACE_SCALE)
        self.encoder = UnrolledEncoder(
            Unrolled(dictionary, likelihood, num_steps=DEPTH), prior, init_probs=PROBS,
            init_scale=SCALES[method.base] * (math.sqrt(2) if method.base is dist.Laplace else 1),
        )  # fmt: skip
        self.shape = nn.Parameter(torch.full((dictionary.num_atoms,), math.log(3.0)))
        self.mean = nn.Parameter(torch.full_like(self.shape, math.log(GAMMA[method.base])))

    def forward(self, y: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        emitted: dict[str, Tensor] = self.encoder(y, mask)
        gain = emitted["logits"] - math.log(PROBS / (1 - PROBS))
        shape = self.shape.expand_as(gain)
        return {**emitted, "log_concentration": shape, "log_rate": shape - self.mean + gain}


class Beside(nn.Module):
    """Hidden layers and the data themselves beside their output: heads have a linear path too."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        layers = [nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, y: Tensor) -> Tensor:
        return torch.cat([y, self.layers(y)], -1)


def convolutional(atoms: int) -> tuple[nn.Module, nn.Module, int]:
    """The published decoder of 28x28 pictures, and the published encoder with fewer channels.

    Both are flat at their ends. The published encoder has 64, 64, 128 and 128 channels; with these
    the weights would not fit into 1 MB.
    """

    def block(before: int, after: int, stride: int, padding: int) -> list[nn.Module]:
        conv = nn.Conv2d(before, after, 4, stride, padding, bias=False)
        return [conv, nn.BatchNorm2d(after), nn.ReLU()]

    def back(before: int, after: int, stride: int, padding: int) -> list[nn.Module]:
        conv = nn.ConvTranspose2d(before, after, 4, stride, padding, bias=False)
        return [nn.ReLU(), conv, nn.BatchNorm2d(after)]

    encoder = nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        *block(1, 12, 2, 1), *block(12, 12, 2, 1), *block(12, 24, 1, 0), *block(24, 24, 2, 0),
        nn.Flatten(),
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.Linear(atoms, 128), nn.Unflatten(1, (128, 1, 1)),
        *back(128, 128, 2, 0), *back(128, 64, 1, 0), *back(64, 64, 2, 1),
        nn.ReLU(), nn.ConvTranspose2d(64, 1, 4, 2, 1), nn.Sigmoid(), nn.Flatten(),
    )  # fmt: skip
    return encoder, decoder, 24
