"""Minibatches from whatever holds the data, in an order that a seed and an epoch determine.

A source reads the rows of a minibatch and nothing more, so a memory map or a data set on disk is
never loaded whole. Several processes each read their share of the same minibatches.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyro_sparse.likelihoods import check_mask

CHECK_ROWS = 4096
"""Rows that are searched for values that are not finite at a time."""


@dataclass
class Batch:
    """One minibatch, or the share of it that this process reads.

    Attributes:
        y: Data, shape ``(n, *signal_shape)``.
        mask: True where a sample was observed, or None.
        rows: Indices of the data in their source, or None if the source does not tell.
        number: Position in its epoch, from 0.
        size: Number of data in the whole minibatch, over all processes.
        own: Number of them that this process counts.
        given: What else is known of the data, by name, first dimension ``n``.
    """

    y: Tensor
    mask: Tensor | None
    rows: np.ndarray[Any, Any] | None
    number: int
    size: int
    own: int
    given: dict[str, Tensor] = field(default_factory=dict)

    def where(self) -> str:
        """Words for a message: which batch, and which data."""
        if self.rows is None:
            return f"batch {self.number}"
        shown = ", ".join(str(row) for row in self.rows[:5])
        return f"batch {self.number} (rows {shown}{', ...' if len(self.rows) > 5 else ''})"


class Source:
    """Declares where minibatches come from.

    Attributes:
        num_data: Size of the data set.
        batch_size: Rows in a minibatch, None if the source does not tell.
        searched: Whether all data are known to be finite; otherwise each minibatch is searched.
    """

    num_data: int
    batch_size: int | None
    searched: bool = False

    def __len__(self) -> int:
        """Minibatches in an epoch."""
        raise NotImplementedError

    def epoch(self, epoch: int, like: Tensor, skip: int = 0) -> Iterator[Batch]:
        """Minibatches of an epoch but the first ``skip``, with dtype and device of ``like``."""
        raise NotImplementedError


class Rows(Source):
    """Rows of a tensor, an array, a memory map, or a map-style data set.

    Args:
        data: Indexed by row; a data set gives one datum, or a pair of datum and mask, for an index.
        mask: In the shape of ``data``, or None.
        batch_size: Rows in a minibatch; the last one of an epoch may have fewer.
        seed: Seed of the order.
        rank: This process.
        world_size: Number of processes; each reads every ``world_size``-th row of a minibatch.
        given: What else is known of each datum, by name.
    """

    batch_size: int

    def __init__(
        self,
        data: Any,
        mask: Tensor | None,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        given: dict[str, Tensor] | None = None,
    ) -> None:
        self.data = data
        self.given = {} if given is None else given
        self.mask = mask
        self.num_data = len(data)
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return -(-self.num_data // self.batch_size)

    def epoch(self, epoch: int, like: Tensor, skip: int = 0) -> Iterator[Batch]:  # noqa: D102
        # numpy's seed sequence mixes both numbers: neighbouring seeds and epochs share no order.
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_data)
        for number in range(skip, len(self)):
            rows = order[number * self.batch_size : (number + 1) * self.batch_size]
            yield self.read(rows, number, like)

    def read(self, rows: np.ndarray[Any, Any], number: int, like: Tensor) -> Batch:
        """One minibatch of the given rows."""
        size = len(rows)
        share = rows[self.rank :: self.world_size]
        own = len(share)
        share = share if len(share) else rows[:1]  # a process without rows still takes part
        y, mask = _take(self.data, share)
        if self.mask is not None:
            mask = self.mask[torch.from_numpy(share)]
        index = torch.from_numpy(share)
        given = {name: known[index].to(like.device) for name, known in self.given.items()}
        return Batch(*_place(y, mask, like), share, number, size, own, given)


class Loader(Source):
    """A user's ``DataLoader``: order, workers and batch size are its own.

    Args:
        loader: Gives a tensor ``(n, *signal_shape)``, or a pair of that and a mask. Where there are
            several processes, each has one of its own over its share, in batches of equal sizes:
            see ``torch.utils.data.DistributedSampler``.
        world_size: Number of processes.
    """

    def __init__(self, loader: DataLoader[Any], world_size: int = 1) -> None:
        self.loader = loader
        self.world_size = world_size
        self.batch_size = loader.batch_size
        self.num_data = len(loader.dataset)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, like: Tensor, skip: int = 0) -> Iterator[Batch]:  # noqa: D102
        for number, item in enumerate(self.loader):
            if number >= skip:
                y, mask = (
                    item if isinstance(item, list | tuple) and len(item) == 2 else (item, None)
                )
                y = y[0] if isinstance(y, list | tuple) else y
                size = len(y) * self.world_size
                yield Batch(*_place(y, mask, like), None, number, size, len(y))


def open_source(
    data: Any,
    mask: Any,
    batch_size: int | None,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    given: Mapping[str, Any] | None = None,
) -> Source:
    """A source for what a user hands to ``fit``, checked as far as it can be without reading it.

    Tensors and arrays in memory are searched for values that are not finite; what lies on disk is
    searched batch by batch.

    Raises:
        TypeError: If the data are not real numbers.
        ValueError: If there are none, some are not finite where they were observed, or the batch
            size does not fit.
    """
    if isinstance(data, DataLoader):
        if mask is not None or batch_size is not None:
            raise ValueError(
                "Expected no mask= and no batch_size= with a DataLoader: it makes its own batches, "
                "and gives pairs (y, mask) where samples are missing."
            )
        if given:
            raise ValueError("Expected no given= with a DataLoader, whose order is its own.")
        if len(data) == 0:
            raise ValueError("Expected data with at least one datum, got a loader of no batches.")
        return Loader(data, world_size)
    if isinstance(data, Dataset):
        if mask is not None:
            raise ValueError("Expected no mask= with a Dataset: let it give pairs (y, mask).")
        size = len(data)  # type: ignore[arg-type]
    else:
        data = as_rows(data)
        size = len(data)
    if size == 0:
        raise ValueError("Expected data with at least one datum, got none.")
    if batch_size is None:
        batch_size = min(100, size)
    if not 1 <= batch_size <= size:
        raise ValueError(
            f"Expected batch_size between 1 and {size} (the number of data), got {batch_size}."
        )
    if not isinstance(data, Dataset):
        mask = None if mask is None else _as_mask(data, mask)
    known = {} if given is None else _as_given(given, size)
    source = Rows(data, mask, batch_size, seed, rank, world_size, known)
    if not isinstance(data, Dataset | np.memmap):
        check_finite(data, mask)
        source.searched = True
    return source


def as_rows(data: Any) -> Any:
    """A tensor or an array of real numbers, first dimension the data; nothing is copied or cast.

    Lists and data frames become arrays.

    Raises:
        TypeError: If they are complex, text, objects, sparse, or part of an autograd graph.
    """
    if isinstance(data, Tensor):
        if data.is_complex() or data.layout != torch.strided or data.requires_grad:
            kind = "that requires a gradient" if data.requires_grad else f"of {data.dtype}"
            kind = f"in {data.layout} layout" if data.layout != torch.strided else kind
            raise TypeError(
                f"Expected data to be a real, dense tensor without gradient, got one {kind}. "
                "Try data.detach() or data.to_dense()."
            )
        rows: Any = data
    else:
        # A memory map stays one: asanyarray gives it back as it is.
        rows = np.asanyarray(data)
        if rows.dtype.kind not in "fiub":
            raise TypeError(
                "Expected data to be real numbers in a tensor or an array of shape "
                f"(num_data, *signal_shape), got {type(data).__name__} of dtype {rows.dtype}."
            )
    if len(rows.shape) == 0 or 0 in rows.shape:
        raise ValueError(f"Expected data with at least one datum, got shape {tuple(rows.shape)}.")
    if "float" not in str(rows.dtype):
        warnings.warn(
            f"Data of dtype {rows.dtype} are cast to the model's dtype, batch by batch.",
            stacklevel=4,
        )
    return rows


def check_finite(rows: Any, mask: Tensor | None, where: str = "") -> None:
    """Refuse data with values that are not finite where they were observed.

    Raises:
        ValueError: How many there are, and where the first one is.
    """
    count, first = 0, None
    for begin in range(0, len(rows), CHECK_ROWS):
        part = torch.as_tensor(_array(rows[begin : begin + CHECK_ROWS]))
        bad = ~torch.isfinite(part)
        if mask is not None:
            bad &= mask[begin : begin + CHECK_ROWS].to(bad.device)
        found = int(bad.sum())
        if found and first is None:
            index = bad.nonzero()[0].tolist()
            first = (begin + index[0], *index[1:])
        count += found
    if first is not None:
        raise ValueError(
            f"Expected finite data, got {count} values that are not, the first at index "
            f"{first}{where}. Leave them out with mask=torch.isfinite(data) (True = observed)."
        )


def _take(data: Any, rows: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor | None]:
    if isinstance(data, Tensor):
        return data[torch.from_numpy(rows).to(data.device)], None
    if not isinstance(data, Dataset):
        return torch.from_numpy(np.ascontiguousarray(data[rows])), None
    items = [data[int(row)] for row in rows]
    pairs = [item if isinstance(item, tuple) else (item, None) for item in items]
    y = torch.stack([torch.as_tensor(_array(value)) for value, *_ in pairs])
    given = [pair[1] if len(pair) > 1 else None for pair in pairs]
    if all(m is None for m in given):
        return y, None
    whole = torch.ones((), dtype=torch.bool)
    masks = [whole if m is None else torch.as_tensor(m) for m in given]
    return y, torch.stack([check_mask(value, m) for value, m in zip(y, masks)])


def _array(values: Any) -> Any:
    return values if isinstance(values, Tensor) else np.array(values)


def _as_mask(data: Any, mask: Any) -> Tensor:
    like = torch.empty(()).expand(tuple(data.shape))
    return check_mask(like, mask if isinstance(mask, Tensor) else torch.from_numpy(np.array(mask)))


def _as_given(given: Mapping[str, Any], size: int) -> dict[str, Tensor]:
    known = {
        name: value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        for name, value in given.items()
    }
    for name, value in known.items():
        if value.dim() == 0 or len(value) != size:
            raise ValueError(
                f"Expected given[{name!r}] to have one entry for each of the {size} data, got "
                f"shape {tuple(value.shape)}."
            )
    return known


def _place(y: Tensor, mask: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor | None]:
    y = y.to(dtype=like.dtype, device=like.device)
    return y, None if mask is None else check_mask(y, mask).to(like.device)
