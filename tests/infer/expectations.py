"""Expectations over codes with an atom, by quadrature: no draw and no density of the library.

A law is what its definition says: an atom, and one or two tails ``start +- x`` with the density of
the base law where it came from. Every function is differentiable in the parameters.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_sparse.distributions.tails_kl  # noqa: F401  registers the KLs of thresholded laws
from pyro_sparse.distributions.gamma import GammaThresholded
from pyro_sparse.distributions.mixed import SpikeAndSlab
from pyro_sparse.distributions.thresholded import (
    HardThresholded,
    ShiftedThresholded,
    SoftThresholded,
)

PRIOR = {"laplace": 0.3, "normal": 0.3, "exponential": 0.3}  # P(active); slabs of scale one
NOISE = 0.5
DATUM = torch.tensor([0.7, -0.4, 0.2], dtype=torch.float64)
WEIGHT = torch.tensor([[1.1, 0.3, -0.5], [-0.6, 0.9, 0.4], [0.5, -0.7, 0.8]], dtype=torch.float64)
# One gate that is far in the tail of the slab, one near zero, one between.
LOC = torch.tensor([0.15, -0.9, 0.6], dtype=torch.float64)
LOG_SCALE = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
LOGITS = torch.tensor([-0.5, 0.8, 0.1], dtype=torch.float64)
THRESHOLD = torch.tensor([0.2, 0.15, 0.3], dtype=torch.float64)


def density(base: str, value: Tensor, scale: Tensor) -> Tensor:
    if base == "laplace":
        return (-value.abs() / scale).exp() / (2 * scale)
    if base == "exponential":
        return (-value / scale).exp() / scale
    return (-(value / scale).square() / 2).exp() / (scale * math.sqrt(2 * math.pi))


def tail_mass(base: str, value: Tensor, scale: Tensor) -> Tensor:
    """Probability of noise above ``value``."""
    if base == "laplace":
        ratio = value / scale
        below = (-ratio.clamp(min=0)).exp() / 2
        return torch.where(ratio > 0, below, 1 - ratio.clamp(max=0).exp() / 2)
    return torch.special.erfc(value / scale / math.sqrt(2)) / 2


def panels(kink: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on (0, 18), with a break at ``kink``: ``(nodes, atoms)``."""
    fixed = torch.tensor([0.0, 2.0, 6.0, 18.0], dtype=torch.float64)
    kink = kink.detach().clamp(0, 18).unsqueeze(0)
    ends = torch.cat([fixed.unsqueeze(-1).expand(-1, kink.shape[1]), kink]).sort(0).values
    node, weight = (torch.as_tensor(part) for part in np.polynomial.legendre.leggauss(order))
    width = ends.diff(dim=0).unsqueeze(1)  # (panels, 1, atoms)
    x = ends[:-1].unsqueeze(1) + (node.unsqueeze(-1) + 1) / 2 * width
    return x.flatten(0, 1), (weight.unsqueeze(-1) / 2 * width).flatten(0, 1)


@dataclass
class Grid:
    """Codes and their probabilities, ``(nodes, atoms)``; the atom is node 0."""

    codes: Tensor
    weights: Tensor
    log_density: Tensor


@dataclass
class Law:
    """A family of laws, its parameters, and what it is by definition."""

    kind: str
    base: str

    @property
    def names(self) -> tuple[str, ...]:
        last = {"spike": "logits", "gamma": "threshold"}.get(self.kind, "threshold")
        return ("log_scale", last) if self.base == "exponential" else ("loc", "log_scale", last)

    def start(self) -> dict[str, Tensor]:
        values = {"loc": LOC, "log_scale": LOG_SCALE, "logits": LOGITS, "threshold": THRESHOLD}
        return {name: values[name].clone() for name in self.names}

    def distribution(self, p: dict[str, Tensor]) -> dist.Distribution:
        scale = p["log_scale"].exp()
        if self.base == "exponential":
            return SpikeAndSlab(dist.Exponential(1 / scale), logits=p["logits"])
        base = {"laplace": dist.Laplace, "normal": dist.Normal}[self.base](p["loc"], scale)
        if self.kind == "spike":
            return SpikeAndSlab(base, logits=p["logits"])
        if self.kind == "gamma":
            return GammaThresholded(p["loc"], scale, 2.0, 2.0 / p["threshold"])
        kinds = {"soft": SoftThresholded, "shifted": ShiftedThresholded, "hard": HardThresholded}
        return kinds[self.kind](base, p["threshold"])

    def prior(self) -> dist.Distribution:
        slab = {
            "laplace": dist.Laplace(torch.zeros(3).double(), 1.0),
            "normal": dist.Normal(torch.zeros(3).double(), 1.0),
            "exponential": dist.Exponential(torch.ones(3).double()),
        }[self.base]
        return SpikeAndSlab(slab, PRIOR[self.base])

    def grid(self, p: dict[str, Tensor], order: int = 9) -> Grid:
        scale = p["log_scale"].exp()
        loc = p.get("loc", torch.zeros_like(scale))
        level = torch.zeros_like(scale)
        if self.kind in ("soft", "shifted", "hard"):
            level = p["threshold"]
        # Where a tail crosses zero the prior has a kink, or the base where it crosses loc.
        kink = loc.abs() - (level if self.kind in ("soft", "hard") else 0)
        x, w = panels(kink / scale, order)
        x, w = x * scale, w * scale
        # Noise of the base on the two tails, and the code it gives.
        up, down = x + level, -x - level
        upper, lower = loc + x, loc - x
        share = torch.ones_like(scale)
        if self.kind == "spike":
            share = p["logits"].sigmoid()
        if self.kind == "gamma":
            share = (1 + p["threshold"] / (2 * scale)).pow(-2.0)
        if self.kind in ("soft", "hard"):
            up, down = up - loc, down - loc
            upper, lower = (x, -x) if self.kind == "soft" else (x + level, -x - level)
        parts = [(upper, up)] if self.base == "exponential" else [(upper, up), (lower, down)]
        codes = torch.cat([code for code, _ in parts])
        dense = torch.cat([share * density(self.base, noise, scale) for _, noise in parts])
        if self.kind in ("soft", "hard"):
            active = tail_mass(self.base, p["threshold"] - loc, scale)
            active = active + tail_mass(self.base, p["threshold"] + loc, scale)
        elif self.kind == "shifted":
            active = 2 * tail_mass(self.base, p["threshold"], scale)
        else:
            active = share
        w = w.repeat(len(parts), 1)
        inactive = (1 - active).unsqueeze(0)
        return Grid(
            torch.cat([torch.zeros_like(inactive), codes]),
            torch.cat([inactive, dense * w]),
            torch.cat([inactive.log(), dense.log()]),
        )

    def log_prior(self, codes: Tensor) -> Tensor:
        """By nodes; node 0 is the atom."""
        prob, one = PRIOR[self.base], torch.ones_like(codes[1:])
        slab = density(self.base, codes[1:], one).log() + math.log(prob)
        return torch.cat([torch.full_like(codes[:1], math.log(1 - prob)), slab])


LAWS = {
    "spike_laplace": Law("spike", "laplace"),
    "spike_normal": Law("spike", "normal"),
    "spike_exponential": Law("spike", "exponential"),
    "shifted_laplace": Law("shifted", "laplace"),
    "shifted_normal": Law("shifted", "normal"),
    "soft_laplace": Law("soft", "laplace"),
    "soft_normal": Law("soft", "normal"),
    "hard_laplace": Law("hard", "laplace"),
    "hard_normal": Law("hard", "normal"),
    "gamma": Law("gamma", "laplace"),
}


def log_likelihood(codes: Tensor, weight: Tensor, log_noise: Tensor) -> Tensor:
    predictor = (codes @ weight).tanh()
    error = (DATUM - predictor) / log_noise.exp()
    constant = log_noise + math.log(2 * math.pi) / 2
    return (-error.square() / 2 - constant).sum(-1)


def start(law: Law, atoms: int = 3) -> dict[str, Tensor]:
    """Parameters of guide and model, those of the first ``atoms`` codes."""
    found = {name: value[:atoms] for name, value in law.start().items()}
    found["weight"] = WEIGHT[:atoms].clone()
    found["log_noise"] = torch.tensor([math.log(NOISE)], dtype=torch.float64)
    return {name: value.requires_grad_() for name, value in found.items()}


def product(grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """All combinations of nodes: codes ``(M, atoms)``, weights and log-densities ``(M,)``."""
    atoms = grid.codes.shape[1]
    codes = torch.cartesian_prod(*grid.codes.T).reshape(-1, atoms)
    weights = torch.cartesian_prod(*grid.weights.T).reshape(-1, atoms).prod(-1)
    dense = torch.cartesian_prod(*grid.log_density.T).reshape(-1, atoms).sum(-1)
    return codes, weights, dense


def kl(law: Law, grid: Grid) -> Tensor:
    """KL of the guide's law from the prior, summed over codes."""
    ratio = grid.log_density - law.log_prior(grid.codes)
    return (grid.weights * ratio).sum()


def exact_elbo(law: Law, p: dict[str, Tensor]) -> Tensor:
    grid = law.grid(p)
    codes, weights, _ = product(grid)
    return (weights * log_likelihood(codes, p["weight"], p["log_noise"])).sum() - kl(law, grid)


@functools.cache
def exact_gradient(name: str) -> tuple[float, dict[str, Tensor]]:
    p = start(LAWS[name])
    value = exact_elbo(LAWS[name], p)
    slopes = torch.autograd.grad(value, list(p.values()))
    return value.item(), dict(zip(p, slopes, strict=True))


class Copies:
    """Many copies of one datum, each with parameters of its own: a gradient for each draw.

    ``model`` and ``guide`` are ordinary programs with the plate ``"data"`` over the copies.
    """

    def __init__(self, law: Law, copies: int, atoms: int = 3) -> None:
        self.law, self.copies, self.atoms = law, copies, atoms
        self.parameters = {
            name: value.detach().expand(copies, *value.shape).clone().requires_grad_()
            for name, value in start(law, atoms).items()
        }

    def model(self) -> None:
        p = self.parameters
        prior = self.law.prior().expand((3,))
        prior = SpikeAndSlab(prior.slab.expand((3,)), logits=prior.logits)
        prior = prior.expand((3,)) if self.atoms == 3 else first(prior, self.atoms)
        with pyro.plate("data", self.copies):
            codes = pyro.sample("codes", prior.to_event(1))
            predictor = torch.einsum("...nk,nkd->...nd", codes, p["weight"]).tanh()
            law = dist.Normal(predictor, p["log_noise"].exp())
            pyro.sample("obs", law.to_event(1), obs=DATUM.expand(self.copies, -1))

    def guide(self) -> None:
        with pyro.plate("data", self.copies):
            pyro.sample("codes", self.law.distribution(self.parameters).to_event(1))


def first(prior: SpikeAndSlab, atoms: int) -> SpikeAndSlab:
    slab = type(prior.slab)
    names = ["rate"] if slab is dist.Exponential else ["loc", "scale"]
    return SpikeAndSlab(
        slab(*[getattr(prior.slab, name)[:atoms] for name in names]), logits=prior.logits[:atoms]
    )
