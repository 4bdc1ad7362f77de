"""Summaries of the codes of more data than fit in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from pyro_sparse.infer.batches import Batch, Rows, open_source
from pyro_sparse.infer.numbers import check_real, check_whole
from pyro_sparse.infer.programs import kept
from pyro_sparse.infer.weighable import PLATE_OF_DRAWS

_Array = np.ndarray[Any, Any]
_INDEX = "summary.json"
_VALUES = 2**24  # draws of codes of a batch, unless the caller says otherwise


@dataclass(frozen=True)
class CodeSummary:
    """Posterior of each code of each datum, in a few numbers; in memory or on disk.

    Attributes:
        mean: Zeros counted, shape ``(n, *code_shape)``.
        sd: Standard deviation, zeros counted.
        prob_active: Probability that the code is not zero.
        quantiles: By level. An exact zero is one: none lies between it and the active codes.

    Example:
        >>> zero = np.zeros((2, 3))
        >>> CodeSummary(zero, zero, zero, {0.5: zero}).usage
        array([0., 0., 0.])
    """

    mean: _Array
    sd: _Array
    prob_active: _Array
    quantiles: dict[float, _Array]

    @classmethod
    def open(cls, folder: str | Path) -> CodeSummary:
        """What ``summarise_codes`` wrote, as read-only memory maps: nothing is read yet.

        Raises:
            FileNotFoundError: If there is none, or it was not finished.
        """
        folder = Path(folder)
        if not (folder / _INDEX).is_file():
            raise FileNotFoundError(
                f"Expected a finished summary in {folder}, got no {_INDEX} there. Run "
                "summarise_codes(..., folder=...) again."
            )
        levels = json.loads((folder / _INDEX).read_text())["quantiles"]
        found = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in _names(levels)]
        return cls(found[0], found[1], found[2], dict(zip(levels, found[3:])))

    @property
    def usage(self) -> _Array:
        """Mean probability of each atom to be active, float64, shape ``(atoms,)``; reads all."""
        axes = (0, *range(2, self.prob_active.ndim))
        total = sum(
            self.prob_active[begin : begin + 1024].sum(axes, dtype=np.float64)
            for begin in range(0, len(self.prob_active), 1024)
        )
        count = self.prob_active.size // self.prob_active.shape[1]
        return np.asarray(total) / count


def summarise_codes(
    guide: Callable[..., Any],
    data: Any,
    *,
    mask: Any = None,
    quantiles: Sequence[float] = (0.05, 0.5, 0.95),
    num_samples: int | None = None,
    site: str = "codes",
    batch_size: int | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    vectorize: bool = True,
    progress: bool = True,
) -> CodeSummary:
    """Mean, sd, P(active) and quantiles of every code of every datum, batch by batch.

    With a folder the results go to one ``.npy`` file each, which grows as batches are done, and
    memory holds one batch, however many data there are. The numbers are the same either way.

    Args:
        guide: A guide with ``posterior(y, mask)``, whose closed forms are taken; or with
            ``num_samples`` any variational program, called as ``guide(y, num_data)``.
        data: Tensor, array, memory map or map-style data set, first dimension the data.
        mask: True where a sample was observed, in the shape of ``data``.
        quantiles: Levels in (0, 1).
        num_samples: Draws of which the summary is made, in place of closed forms, ``>= 2``: for
            guides without them, such as a ``StructuredThresholded``.
        site: Name of the codes.
        batch_size: Data taken at once; default 256, or fewer where their draws would fill some
            hundreds of megabytes.
        folder: Where to write, made if there is none. What is there by the same names is
            overwritten.
        seed: Seed of the draws, which also depend on ``batch_size``.
        vectorize: Make all draws in one run, in a plate left of all others.
        progress: Show a bar.

    Returns:
        The summary: in memory, or memory maps of the files.

    Raises:
        TypeError: If the guide has no closed forms and no number of draws was given, the data are
            a loader, or an argument is of the wrong kind.
        ValueError: If a number is out of range, data are not finite, or the codes are not of shape
            ``(n, *code_shape)``.

    Example:
        >>> from pyro_sparse.distributions import SpikeAndSlab
        >>> import pyro.distributions as dist
        >>> def guide(y, num_data):
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("codes", SpikeAndSlab(dist.Normal(y, 0.1), 0.5).to_event(1))
        >>> found = summarise_codes(guide, torch.ones(9, 4), num_samples=1000, progress=False)
        >>> found.mean.shape, bool(abs(found.prob_active - 0.5).max() < 0.1)
        ((9, 4), True)
    """
    levels = [float(level) for level in quantiles]
    for level in levels:
        check_real("quantiles", level, 0.0, 1 - 1e-9, open_low=True)
    check_whole("seed", seed, 0)
    if num_samples is not None:
        check_whole("num_samples", num_samples, 2)
    elif not hasattr(guide, "posterior"):
        raise TypeError(
            "Expected a guide with a method posterior, such as guides.Thresholded, got "
            f"{type(guide).__name__}. Pass num_samples= to summarise its draws."
        )
    if isinstance(data, DataLoader):
        raise TypeError("Expected data that have rows, got a DataLoader. Pass its dataset.")
    if batch_size is not None:
        check_whole("batch_size", batch_size, 1)
    source = open_source(data, mask, 1, seed)
    if not isinstance(source, Rows):
        raise TypeError(f"Expected data that have rows, got {type(data).__name__}.")
    summarise = _Summarise(guide, levels, num_samples, site, seed, vectorize, source.num_data)
    size = batch_size or summarise.batch_size(source)
    parts = _batches(source, size, summarise, progress)
    if folder is not None:
        _write(Path(folder), parts, levels, source.num_data)
        return CodeSummary.open(folder)
    columns = [np.concatenate(column) for column in zip(*parts)]
    return CodeSummary(columns[0], columns[1], columns[2], dict(zip(levels, columns[3:])))


def _batches(
    source: Rows, size: int, summarise: _Summarise, progress: bool
) -> Iterator[list[_Array]]:
    starts = range(0, source.num_data, size)
    for number, start in enumerate(tqdm(starts, desc="codes", disable=not progress)):
        rows = np.arange(start, min(start + size, source.num_data))
        batch = source.read(rows, number, summarise.like)
        if not source.searched:
            _check(batch)
        yield [part.cpu().numpy() for part in summarise(batch)]


def _check(batch: Batch) -> None:
    bad = ~batch.y.isfinite()
    if batch.mask is not None:
        bad &= batch.mask
    if bool(bad.any()):
        raise ValueError(
            f"Expected finite data, got {int(bad.sum())} values that are not in {batch.where()}. "
            "Leave them out with mask= (True = observed)."
        )


class _Summarise:
    """From a batch to mean, sd, P(active) and quantiles, each ``(n, *code_shape)``."""

    def __init__(
        self,
        guide: Any,
        levels: list[float],
        num_samples: int | None,
        site: str,
        seed: int,
        vectorize: bool,
        num_data: int,
    ) -> None:
        self.guide, self.levels, self.num_samples, self.site = guide, levels, num_samples, site
        self.seed, self.vectorize, self.num_data = seed, vectorize, num_data
        self.module = guide if isinstance(guide, nn.Module) else nn.Module()
        weights = (p for p in self.module.parameters() if p.is_floating_point())
        self.like = next(weights, torch.empty(())).detach()

    def batch_size(self, source: Rows) -> int:
        """As many data as keep the draws of a batch in bounds."""
        size = min(256, source.num_data)
        if self.num_samples is None:
            return size
        first = self(source.read(np.arange(size), 0, self.like), 2)[0]
        return max(1, min(size, _VALUES // (self.num_samples * max(1, first[0].numel()))))

    def __call__(self, batch: Batch, num_samples: int | None = None) -> list[Tensor]:
        number = num_samples or self.num_samples
        store = pyro.get_param_store()
        with torch.no_grad(), torch.random.fork_rng(), store.scope(store.get_state()):
            torch.manual_seed((self.seed + (2 * batch.number + 1) * 0x9E3779B97F4A7C15) % 2**63)
            with kept(self.module):
                if number is None:
                    return self._of_law(self.guide.posterior(batch.y, batch.mask), len(batch.y))
                return self._of_draws(self._draws(batch, number))

    def _of_law(self, law: Any, size: int) -> list[Tensor]:
        try:
            mean = law.mean
            found = [mean, law.variance.sqrt(), getattr(law, "prob_active", torch.ones_like(mean))]
            found += [law.icdf(torch.full_like(mean, level)) for level in self.levels]
        except (AttributeError, NotImplementedError) as error:
            raise TypeError(
                f"Expected a posterior with mean, variance and icdf in closed form, got "
                f"{type(law).__name__}. Pass num_samples= to summarise draws."
            ) from error
        return self._checked(found, size)

    def _of_draws(self, draws: Tensor) -> list[Tensor]:
        number, size = draws.shape[:2]
        ordered = draws.sort(0).values
        found = [draws.mean(0), draws.std(0), (draws != 0).to(draws).mean(0)]
        # The inverse of the empirical distribution function: a draw, never a value between two.
        found += [ordered[max(0, math.ceil(level * number) - 1)] for level in self.levels]
        return self._checked(found, size)

    def _checked(self, found: list[Tensor], size: int) -> list[Tensor]:
        for part in found:
            if part.dim() < 2 or len(part) != size:
                raise ValueError(
                    f"Expected codes of shape (n, *code_shape) with n = {size}, got "
                    f"{tuple(part.shape)}."
                )
        return found

    def _draws(self, batch: Batch, number: int) -> Tensor:
        """Shape ``(num_samples, n, *code_shape)``."""
        kwargs = {} if batch.mask is None else {"mask": batch.mask}

        def run() -> poutine.Trace:
            return poutine.trace(self.guide).get_trace(batch.y, self.num_data, **kwargs)

        def value(trace: poutine.Trace) -> Any:
            nodes: dict[str, Any] = trace.nodes
            if self.site not in nodes:
                raise ValueError(f"Expected a guide with a site {self.site!r}, got {list(nodes)}.")
            return nodes[self.site]

        single = run()
        shape = value(single)["value"].shape
        if not self.vectorize:
            return torch.stack([value(run())["value"] for _ in range(number)])
        sites: Any = single.nodes.values()
        frames = (frame for site in sites for frame in site.get("cond_indep_stack", ()))
        dims = [-frame.dim for frame in frames if frame.vectorized]
        with pyro.plate(PLATE_OF_DRAWS, number, dim=-1 - max(dims, default=0)):
            drawn: Tensor = value(run())["value"]
        if len(drawn) != number or drawn.numel() != number * shape.numel():
            raise ValueError(
                f"Expected draws of shape {(number, *shape)}, got {tuple(drawn.shape)}: the guide "
                "does not take leading dimensions. Pass vectorize=False."
            )
        return drawn.reshape(number, *shape)  # plates that the codes do not stand in left ones


def _names(levels: Sequence[float]) -> list[str]:
    return ["mean", "sd", "prob_active", *(f"quantile_{level:g}" for level in levels)]


def _write(folder: Path, parts: Iterator[list[_Array]], levels: list[float], size: int) -> None:
    """One file for each statistic, written from front to back; the index comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _INDEX).unlink(missing_ok=True)
    files: list[BinaryIO] = []
    try:
        for part in parts:
            if not files:
                files = [(folder / f"{name}.npy").open("wb") for name in _names(levels)]
                for file, array in zip(files, part):
                    header = np.lib.format.header_data_from_array_1_0(array)
                    header["shape"] = (size, *array.shape[1:])
                    header["fortran_order"] = False
                    np.lib.format.write_array_header_1_0(file, header)
            for file, array in zip(files, part):
                file.write(np.ascontiguousarray(array).data)
    finally:
        for file in files:
            file.close()
    (folder / _INDEX).write_text(json.dumps({"quantiles": levels}))
