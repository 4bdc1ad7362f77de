"""Small programs to train, and callbacks that look on."""

import functools
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_sparse.infer import Callback, Progress, fit

quick = functools.partial(fit, progress=False)
adam = functools.partial(torch.optim.Adam, lr=0.02)
momentum = functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9)


class Factors(PyroModule):
    """Factor analysis of data ``(n, 4)`` with three factors; it has a buffer that every call moves.

    ``breaks`` multiplies the observations' location.
    """

    def __init__(self, features: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.atoms = nn.Parameter(torch.randn(3, features, generator=generator))
        self.scale = PyroParam(torch.tensor(1.0), constraints.positive)
        self.register_buffer("calls", torch.tensor(0.0))
        self.breaks = 1.0

    def forward(self, y: Tensor, num_data: int, mask: Tensor | None = None) -> None:
        self.calls += 1.0
        with pyro.plate("data", num_data, subsample_size=len(y)):
            codes = pyro.sample("codes", dist.Normal(y.new_zeros(3), 1.0).to_event(1))
            noise = dist.Normal(codes @ self.atoms * self.breaks, self.scale)
            if mask is not None:
                y, noise = y.where(mask, 0.0), noise.mask(mask)
            pyro.sample("obs", noise.to_event(1), obs=y)


class Encoder(PyroModule):
    """Its guide: Normal, or a point where ``random`` is False."""

    def __init__(self, features: int = 4, *, random: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.linear = PyroModule[nn.Linear](features, 3)
        self.linear.weight.data = torch.randn(3, features, generator=generator) / 2
        self.linear.bias.data = torch.zeros(3)
        self.spread = PyroParam(torch.full((3,), 0.5), constraints.positive, event_dim=1)
        self.random = random
        self.breaks = 1.0

    def forward(self, y: Tensor, num_data: int, mask: Tensor | None = None) -> None:
        loc = self.linear(y if mask is None else y.where(mask, 0.0)) * self.breaks
        normal, point = dist.Normal(loc, self.spread).to_event(1), dist.Delta(loc, event_dim=1)
        with pyro.plate("data", num_data, subsample_size=len(y)):
            pyro.sample("codes", normal if self.random else point)


def pair(*, random: bool = True, features: int = 4) -> tuple[Factors, Encoder]:
    return Factors(features), Encoder(features, random=random)


def draw(num_data: int = 24, features: int = 4) -> Tensor:
    return torch.randn(num_data, features, generator=torch.Generator().manual_seed(3))


def values(*modules: nn.Module) -> list[Tensor]:
    """Parameters and buffers, copied."""
    return [v.detach().clone() for module in modules for v in module.state_dict().values()]


def parameters(*modules: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for module in modules for p in module.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    assert len(first) == len(second) > 0
    return all(torch.equal(a, b) for a, b in zip(first, second))


class Each(Callback):
    """Calls a function with the progress after every step."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def after_step(self, progress: Progress) -> None:
        self.function(progress)
