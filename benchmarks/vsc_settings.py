"""Networks, noise and training of the experiments of `benchmarks.vsc`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from benchmarks import vsc_networks
from benchmarks.vsc_methods import ABLATED, GAMMA, LAPLACE_SCALE, METHODS, SCALES, Method, Model
from pyro_sparse.dictionaries import Dense
from pyro_sparse.guides import Thresholded, UnrolledEncoder, UnrolledFISTA
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import DeepSparseCoding, SparseCoding
from pyro_sparse.solvers import Proximal, Unrolled


@dataclass(frozen=True)
class Setting:
    """Networks, noise and training of one of the experiments.

    Attributes:
        networks: Makes encoder and decoder for so many atoms, and says how many numbers the encoder
            gives; None where the decoder is linear.
        shape: Of a picture.
    """

    kind: str
    atoms: int
    noise: float
    batch: int
    methods: tuple[str, ...]
    betas: tuple[float, float]
    default_rates: tuple[float, float]
    special_rates: Mapping[str, tuple[float, float]]
    shape: tuple[int, ...]
    networks: Callable[[int], tuple[nn.Module, nn.Module, int]] | None = None

    @property
    def features(self) -> int:
        return math.prod(self.shape)

    @staticmethod
    def of(kind: str) -> Setting:
        return SETTINGS[kind]

    def rates(self, name: str) -> tuple[float, float]:
        """Peak learning rates of encoder and decoder, chosen on validation data."""
        return self.special_rates.get(name, self.default_rates)

    def decay(self, name: str) -> float:
        """Weight decay: as published, of the atoms of the MAP baseline and of deep networks."""
        return 2e-4 / self.noise if name == "fista" else 1e-5 * (self.networks is not None)

    def around(self, model: Any) -> Model:
        """Makes models of other priors around the decoder of one."""
        likelihood = Gaussian(math.sqrt(self.noise))
        if self.networks is None:
            return functools.partial(SparseCoding, model.dictionary, likelihood)
        return functools.partial(
            DeepSparseCoding, model.decoder, likelihood,
            code_shape=(self.atoms,), signal_shape=(self.features,),
        )  # fmt: skip

    def decode(self, model: Any, codes: Tensor) -> Tensor:
        """Means of the data, ``(..., features)``."""
        if self.networks is None:
            found: Tensor = model.dictionary(codes)
            return found
        flat: Tensor = model.decoder(codes.flatten(0, -2))
        return flat.reshape(*codes.shape[:-1], -1)


WIDTH, DEPTH, ATOM_NORM = 192, 8, 3.0
DEEP = (
    "threshold-gaussian-max", "threshold-gaussian-max-of-5", "threshold-laplace-max-of-5",
    "implicit-gaussian",
)  # fmt: skip
SETTINGS = {
    "linear": Setting(
        "linear", 256, 1.28, 100,
        methods=tuple(
            n for n in METHODS
            if not n.startswith("implicit") and "-of-" not in n and n not in ABLATED
        ),
        betas=(0.9, 0.999), default_rates=(1e-2, 3e-2),
        special_rates={
            "exact-gaussian-mlp": (1e-3, 1e-2),
            "threshold-laplace-max-mlp": (1e-3, 3e-2),
        },
        shape=(16, 16),
    ),
    "fashion": Setting(
        "fashion", 64, 3.92, 32, methods=DEEP, betas=(0.5, 0.999), default_rates=(1e-3, 1e-3),
        special_rates={}, shape=(28, 28), networks=vsc_networks.garments,
    ),
    # The published weight of the KL, 1e-3, in gray: times the pixels over two.
    "faces": Setting(
        "faces", 64, 2.048, 32, methods=DEEP, betas=(0.5, 0.999), default_rates=(1e-3, 1e-3),
        special_rates={}, shape=(64, 64), networks=vsc_networks.faces,
    ),
    "celeba": Setting(
        "celeba", 512, 6.144, 32, methods=DEEP, betas=(0.5, 0.999), default_rates=(3e-4, 3e-4),
        special_rates={}, shape=(3, 64, 64), networks=vsc_networks.celeba,
    ),
}  # fmt: skip


def programs(setting: Setting, method: Method) -> tuple[Any, Any]:
    """Model and guide before training."""
    likelihood = Gaussian(math.sqrt(setting.noise))
    if setting.networks is not None:
        encoder, decoder, width = setting.networks(setting.atoms)
        model: Any = DeepSparseCoding(
            decoder, likelihood, code_shape=(setting.atoms,), signal_shape=(setting.features,),
            **method.prior(),
        )  # fmt: skip
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
            Unrolled(dictionary, likelihood, num_steps=DEPTH), prior, init_probs=method.probs,
            init_scale=SCALES[method.base] * (math.sqrt(2) if method.base is dist.Laplace else 1),
        )  # fmt: skip
        self.start = math.log(method.probs / (1 - method.probs))
        self.shape = nn.Parameter(torch.full((dictionary.num_atoms,), math.log(3.0)))
        self.mean = nn.Parameter(torch.full_like(self.shape, math.log(GAMMA[method.base])))

    def forward(self, y: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        emitted: dict[str, Tensor] = self.encoder(y, mask)
        gain = emitted["logits"] - self.start
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
