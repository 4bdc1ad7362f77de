"""The codes of several sites as one vector for each datum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class CodeSite:
    """A latent site of a program that an encoder solves for.

    Attributes:
        name: Of the site.
        law: Its prior, as the plates expanded it.
        shape: Of its value, batch before event.
        event_dim: Number of its event dimensions.
        frames: Its plates, as Pyro describes them.
        scale: What plates and ``poutine.scale`` multiply its log-density with.
        mask: What ``poutine.mask`` puts on it.
        like: A tensor of its dtype and device.
    """

    name: str
    law: Any
    shape: tuple[int, ...]
    event_dim: int
    frames: tuple[Any, ...]
    scale: Any
    mask: Any
    like: Tensor

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of its plates."""
        return self.shape[: len(self.shape) - self.event_dim]

    @property
    def plates(self) -> dict[int, str]:
        """Names of its plates by dimension."""
        return {frame.dim: frame.name for frame in self.frames}

    def per_cell(self, values: Any) -> Any:
        """A number for each cell of its plates, or one for all, shaped to multiply its value."""
        if not isinstance(values, Tensor):
            return float(values)
        return values.expand(self.batch_shape).reshape(*self.batch_shape, *[1] * self.event_dim)


class Packing:
    """Which dimensions tell data apart, and how the rest is laid into one vector.

    Data are the cells of the plates in ``dims``; any further plates of a site, and its event, are
    part of a datum's vector.

    Args:
        sites: Code sites, in the order of the vector.
        dims: Dimensions of the plates that tell data apart, counted from the right.
    """

    def __init__(self, sites: tuple[CodeSite, ...], dims: tuple[int, ...]) -> None:
        self.sites = sites
        self.dims = tuple(sorted(dims))
        self.data_shape = tuple(sites[0].batch_shape[dim] for dim in self.dims)
        num_data = math.prod(self.data_shape)
        self.sizes = [math.prod(site.shape) // num_data for site in sites]

    def pack(self, values: dict[str, Tensor]) -> Tensor:
        """Values of all sites as ``(*data_shape, codes)``."""
        flat = [
            values[site.name].permute(self._order(site)).reshape(*self.data_shape, -1)
            for site in self.sites
        ]
        return torch.cat(flat, -1) if len(flat) > 1 else flat[0]

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """The inverse of ``pack``."""
        parts = packed.split(self.sizes, -1)
        values = {}
        for site, part in zip(self.sites, parts):
            order = self._order(site)
            back = sorted(range(len(order)), key=order.__getitem__)
            shape = [site.shape[index] for index in order]
            values[site.name] = part.reshape(shape).permute(back)
        return values

    def spread(self, per_datum: Tensor, site: CodeSite) -> Tensor:
        """A number for each datum, shaped to multiply the value of a site."""
        batch = len(site.batch_shape)
        sizes = [
            size if index - batch in self.dims else 1 for index, size in enumerate(site.batch_shape)
        ]
        return per_datum.expand(self.data_shape).reshape(*sizes, *[1] * site.event_dim)

    def sum(self, values: Tensor) -> Tensor:
        """Sum of the cells of each datum, shape ``data_shape``."""
        others = [dim for dim in range(-values.dim(), 0) if dim not in self.dims]
        return values.sum(others) if others else values

    def _order(self, site: CodeSite) -> list[int]:
        """Dimensions of a site's value: those of data, other plates, event."""
        batch = len(site.batch_shape)
        data = [batch + dim for dim in self.dims]
        return data + [index for index in range(len(site.shape)) if index not in data]
