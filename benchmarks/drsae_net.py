"""The published net of DrSAE as a model and a guide of the library, and its files of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from benchmarks import common
from pyro_sparse.dictionaries import Dense
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.infer import Project
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import DiscriminativeSparseCoding

PRECISION, RATE = 5.0, 0.09
"""Published weights of half the squared error and of the sum of codes; that of the label is 1."""
CLASS_NORM = 5.0
CLASSES, PIXELS = 10, 784


class DrSAE(nn.Module):
    """Model and guide of the published net."""

    def __init__(self, units: int, layers: int, atoms: Tensor | None = None) -> None:
        super().__init__()
        self.units, self.layers = units, layers
        self.temperature = 1.0
        dictionary = Dense(units, PIXELS, atoms=atoms, unit_norm=False)
        likelihood, prior = Gaussian(PRECISION**-0.5), dist.Exponential(RATE)
        self.model = DiscriminativeSparseCoding(dictionary, likelihood, prior, num_classes=CLASSES)
        self.guide = UnrolledFISTA.recurrent(
            dictionary, likelihood, prior, num_steps=layers, step_size=1.25 / layers / PRECISION
        )

    @classmethod
    def start(cls, units: int, layers: int, x: Tensor, *, as_published: bool = False) -> DrSAE:
        """Atoms are noise and a quarter of a training digit, biases near zero, as published.

        Noise is in proportion to each pixel's standard deviation; published, it is equal, and what
        an encoder then holds for pixels that are always dark takes very long to go away.
        """
        spread = torch.ones(PIXELS) if as_published else x.std(0)
        spread = spread / spread.square().mean().sqrt()
        noise = spread * torch.empty(units, PIXELS).uniform_(-1, 1) / units**0.5
        net = cls(units, layers, nn.functional.normalize(noise + 0.25 * x[:units]))
        with torch.no_grad():
            net.bias.fill_(1e-5)
        return net

    @property
    def decoder(self) -> nn.Parameter:
        """Atoms, one a row."""
        return self.model.dictionary.atoms  # type: ignore[return-value]

    @property
    def encoder(self) -> nn.Parameter:
        return self.guide.encoder.analysis.atoms  # type: ignore[union-attr,return-value]

    @property
    def recurrence(self) -> nn.Parameter:
        return self.guide.encoder.recurrence.weight  # type: ignore[union-attr,return-value]

    @property
    def bias(self) -> nn.Parameter:
        return self.guide.encoder.shrinkage.bias  # type: ignore[return-value]

    def constraints(self, every: int) -> list[Project]:
        bounds = (
            (self.decoder, 1.0),
            (self.encoder, max(0.1, 1.25 / self.layers)),
            (self.model.class_weights, CLASS_NORM),
        )
        return [Project(rows, max_norm=bound, every=every) for rows, bound in bounds]

    def rates(self, lr: float, *, classifier: float = 5.0) -> dict[int, float]:
        """Learning rates by parameter: divided by how often it is used, as published."""
        uses: dict[Tensor, float] = {
            self.encoder: self.layers,
            self.bias: self.layers,
            self.decoder: 1,
        }
        uses |= {self.recurrence: max(self.layers - 1, 1)}
        uses |= {self.model.class_weights: classifier, self.model.class_bias: classifier}
        return {id(parameter): lr / times for parameter, times in uses.items()}

    @torch.no_grad()
    def angles(self) -> Tensor:
        """Between what a unit looks for and what it draws, in radians."""
        return nn.functional.cosine_similarity(self.encoder, self.decoder).clamp(-1, 1).acos()

    @torch.no_grad()
    def probabilities(self, x: Tensor) -> Tensor:
        """Of the classes, shape ``(n, 10)``."""
        return (self.logits(x) / self.temperature).softmax(-1)

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Of the classes, at the temperature one, shape ``(n, 10)``."""
        return torch.cat([self.model.logits(self.guide.encode(part)) for part in x.split(1000)])

    def save(self, file: Path, settings: dict[str, Any]) -> None:
        tensors = {}
        for name, rows in (("encoder", self.encoder), ("decoder", self.decoder)):
            scale = rows.detach().abs().amax(1, keepdim=True) / 127
            tensors[name] = (rows.detach() / scale).round().to(torch.int8)
            tensors[name + "_scale"] = scale
        rest = {"recurrence": self.recurrence, "bias": self.bias}
        rest |= {"class_weights": self.model.class_weights, "class_bias": self.model.class_bias}
        tensors |= {name: tensor.detach().half() for name, tensor in rest.items()}
        settings = {"units": self.units, "layers": self.layers, **settings}
        common.save_weights(file, tensors, settings)

    @classmethod
    def load(cls, file: Path) -> tuple[DrSAE, dict[str, Any]]:
        tensors, settings = common.load_weights(file)
        net = cls(settings["units"], settings["layers"])
        net.temperature = settings.get("temperature", 1.0)
        rows = {n: tensors[n].float() * tensors[n + "_scale"] for n in ("encoder", "decoder")}
        with torch.no_grad():
            net.encoder.copy_(rows["encoder"])
            net.decoder.copy_(rows["decoder"])
            net.recurrence.copy_(tensors["recurrence"])
            net.bias.copy_(tensors["bias"])
            net.model.class_weights.copy_(tensors["class_weights"])
            net.model.class_bias.copy_(tensors["class_bias"])
        return net, settings
