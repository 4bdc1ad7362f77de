"""From a model and a guide to the groups that ArviZ reads."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from torch import Tensor

from pyro_sparse.infer.numbers import check_whole
from pyro_sparse.infer.runs import Program, Run, Runs

_LOG = logging.getLogger(__name__)
_DRAWN = ("chain", "draw")
GROUPS = (
    "posterior",
    "posterior_predictive",
    "log_likelihood",
    "sample_stats",
    "prior",
    "prior_predictive",
    "observed_data",
)


def to_datatree(
    model: Program,
    guide: Program,
    y: Tensor,
    *,
    num_samples: int = 1000,
    num_prior_samples: int | None = None,
    num_data: int | None = None,
    mask: Tensor | None = None,
    groups: Sequence[str] = GROUPS,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    per_observation: bool = False,
    max_bytes: int = 4 * 2**30,
    plate: str = "data",
    seed: int = 0,
    vectorize: bool = True,
    chunk_size: int | None = None,
) -> xr.DataTree:
    r"""Draw from a guide and from the prior, into the groups that ArviZ reads.

    The draws are those of the guide: they are *not* reweighted to the posterior. How far they are
    from it stands in ``sample_stats``, and ``khat`` and ``loo`` read it there.

    ==========================  ================================================================
    group                       variables, dims ``(chain=1, draw, *plates, *event)``
    ==========================  ================================================================
    ``posterior``               each latent site, and where a law has an atom at zero which
                                draws are not exactly zero, as 1 and 0 in int8 (plots of ArviZ
                                fail on booleans): ``active``, or ``<site>_active`` if several
                                sites have one
    ``posterior_predictive``    each observed site, drawn anew at each draw, masked parts too
    ``log_likelihood``          each observed site: nats of each datum, masked parts left out
    ``sample_stats``            ``log_p``, ``log_q``, ``log_weight`` of each datum, and
                                ``shared_log_p`` ... of the sites outside the plate of the data,
                                as ``infer.log_weights`` has them
    ``prior``                   as ``posterior``, from the model alone
    ``prior_predictive``        as ``posterior_predictive``, at the draws of ``prior``
    ``observed_data``           each observed site, without ``chain`` and ``draw``; ``nan`` where
                                masked, if its values are real numbers
    ==========================  ================================================================

    ArviZ 1 takes the tree as it is. ArviZ 0.23 takes ``arviz.InferenceData.from_datatree(tree)``
    for ``arviz.summary``, ``arviz.loo`` (without the guide's correction; ``diagnostics.loo`` has
    it) and plots; ``arviz.plot_loo_pit`` needs ``per_observation=True``. ``tree.to_netcdf(path)``
    writes a file.

    The memory of all groups is logged at level ``INFO``, and compared with ``max_bytes``, before
    any of it is taken; runs need some hundred megabytes besides, or what ``chunk_size`` makes
    them.

    Args:
        model: Generative program, called as in ``infer.log_weights``.
        guide: Variational program with the same latent sites.
        y: Data, shape ``(n, *signal_shape)``.
        num_samples: Draws.
        num_prior_samples: Draws from the prior; default ``num_samples``.
        num_data: Size of the whole data set; by default ``n``.
        mask: True where a sample was observed, broadcastable to ``y``.
        groups: Which groups to make.
        dims: Names of dims of a site, as in ArviZ: those of its event, such as
            ``{"codes": ["atom"]}``, or those of its plates before them. By default plates give
            their own names, and events ``<site>_dim_0`` and so on.
        coords: Values along a dim, such as ``{"atom": names}``; default 0, 1, ...
        per_observation: ``log_likelihood`` of each element of a datum, in place of their sum.
        max_bytes: Most memory that the tree may take.
        plate: Name of the plate of the data.
        seed: Seed of all draws. Those of ``posterior`` are those of ``infer.log_weights``.
        vectorize: As in ``infer.log_weights``.
        chunk_size: As in ``infer.log_weights``.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If it needs more than ``max_bytes``, a group, site or dim is unknown, names do
            not fit a shape, or ``infer.log_weights`` would refuse.
        NotImplementedError: As in ``infer.log_weights``.

    References:
        The InferenceData schema of ArviZ: Kumar et al. (2019), J. Open Source Softw. 4(33).

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_sparse.distributions import SpikeAndSlab
        >>> def model(y, num_data):
        ...     with pyro.plate("data", len(y)):
        ...         codes = pyro.sample("codes", SpikeAndSlab(dist.Laplace(0.0, 1.0), 0.2))
        ...         pyro.sample("obs", dist.Normal(codes, 0.1), obs=y)
        >>> def guide(y, num_data):
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("codes", SpikeAndSlab(dist.Laplace(y, 0.1), (y != 0).float()))
        >>> tree = to_datatree(model, guide, torch.tensor([0.0, 2.0]), num_samples=100)
        >>> tree["posterior"]["active"].mean(("chain", "draw")).values
        array([0., 1.])
    """
    for name, value in (("num_samples", num_samples), ("max_bytes", max_bytes)):
        check_whole(name, value, 1)
    num_prior_samples = num_samples if num_prior_samples is None else num_prior_samples
    check_whole("num_prior_samples", num_prior_samples, 1)
    unknown = [groups] if isinstance(groups, str) else [g for g in groups if g not in GROUPS]
    if unknown:
        raise ValueError(f"Expected groups of {list(GROUPS)}, got {unknown}.")
    runs = Runs(model, guide, y, num_data, mask=mask, plate=plate, seed=seed, vectorize=vectorize)
    layout = _Layout(runs, dims or {}, coords or {}, per_observation)
    variables = layout.variables(groups, num_samples, num_prior_samples)
    _check_bytes(variables, max_bytes)
    arrays = {
        group: {name: np.empty(shape, dtype) for name, (_, shape, dtype) in found.items()}
        for group, found in variables.items()
    }
    filling = _Filling(runs, layout, arrays)
    if {"posterior", "posterior_predictive", "log_likelihood", "sample_stats"} & {*groups}:
        runs.each(num_samples, chunk_size, filling.posterior)
    if {"prior", "prior_predictive"} & {*groups}:
        runs.each_prior(num_prior_samples, chunk_size, filling.prior)
    filling.data()
    attrs = _attributes(runs, num_samples)
    tree = xr.DataTree.from_dict(
        {
            group: layout.dataset(variables[group], arrays[group], attrs)
            for group in GROUPS
            if group in variables
        }
    )
    tree.attrs = dict(attrs)
    return tree


_Entry = tuple[tuple[str, ...], tuple[int, ...], Any]  # dims, shape, dtype
_Variables = dict[str, _Entry]


class _Layout:
    """Names, dims, shapes and dtypes of all variables."""

    def __init__(
        self,
        runs: Runs,
        dims: Mapping[str, Sequence[str]],
        coords: Mapping[str, Any],
        per_observation: bool,
    ) -> None:
        self.runs = runs
        self.coords = {name: np.asarray(values) for name, values in coords.items()}
        self.per_observation = per_observation
        sites = [*runs.latent, *runs.observed]
        unknown = [name for name in dims if name not in sites]
        if unknown:
            raise ValueError(f"Expected dims of the sites {sites}, got {unknown}.")
        self.dims = {name: self._dims(name, dims.get(name)) for name in sites}
        used = {dim for found in self.dims.values() for dim in found} | {runs.plate}
        unknown = [name for name in self.coords if name not in used]
        if unknown:
            raise ValueError(f"Expected coords of the dims {sorted(used)}, got {unknown}.")
        sizes: dict[str, int] = {runs.plate: len(runs.y)}
        for name in sites:
            for dim, size in zip(self.dims[name], runs.places[name].shape):
                length = len(self.coords[dim]) if dim in self.coords else size
                if sizes.setdefault(dim, size) != size or length != size:
                    raise ValueError(
                        f"Expected dim {dim!r} of one size, got {size} at site {name!r} and "
                        f"{sizes[dim] if sizes[dim] != size else length} "
                        f"{'elsewhere' if sizes[dim] != size else 'in coords'}."
                    )
        gated = [name for name in runs.latent if runs.places[name].gated]
        self.active = {name: "active" if len(gated) == 1 else f"{name}_active" for name in gated}
        taken = [name for name in self.active.values() if name in sites]
        if taken:
            raise ValueError(
                f"Expected no site named {taken[0]!r}: it says which codes are active."
            )

    def _dims(self, name: str, given: Sequence[str] | None) -> tuple[str, ...]:
        place = self.runs.places[name]
        plates = tuple(place.plates)
        events = len(place.shape) - len(plates)
        if given is None:
            return (*plates, *(f"{name}_dim_{i}" for i in range(events)))
        if isinstance(given, str) or not all(isinstance(dim, str) for dim in given):
            raise TypeError(f"Expected dims of {name!r} as a list of names, got {given!r}.")
        found = tuple(given) if len(given) == len(place.shape) else (*plates, *given)
        if len(found) != len(place.shape) or found[: len(plates)] != plates:
            raise ValueError(
                f"Expected {events} names for the event of site {name!r}, of shape {place.shape} "
                f"in plates {list(plates)}, got {list(given)}."
            )
        if len({*found, *_DRAWN}) != len(found) + 2:
            raise ValueError(f"Expected different names of the dims of {name!r}, got {found}.")
        return found

    def variables(
        self, groups: Sequence[str], num_samples: int, num_prior_samples: int
    ) -> dict[str, _Variables]:
        """Of each group: dims, shape and dtype of each variable."""
        runs, number = self.runs, np.dtype("float64")
        of_latent = [(name, self._entry(name)) for name in runs.latent]
        of_latent += [
            (active, (*self._entry(name)[:2], np.dtype("int8")))
            for name, active in self.active.items()
        ]
        of_observed = [(name, self._entry(name)) for name in runs.observed]
        datum: _Entry = (runs.plate,), (len(runs.y),), number
        once: _Entry = (), (), number
        likelihood = []
        for name in runs.observed:
            if self.per_observation:
                likelihood.append((name, self._elements(name)))
            else:
                likelihood.append((name, datum if runs.is_local(name) else once))
        stats = [(name, datum) for name in ("log_p", "log_q", "log_weight")]
        if any(not runs.is_local(name) for name in runs.latent):
            stats += [(f"shared_{name}", once) for name, _ in stats]
        contents: dict[str, tuple[int, Any]] = {
            "posterior": (num_samples, of_latent),
            "posterior_predictive": (num_samples, of_observed),
            "log_likelihood": (num_samples, likelihood),
            "sample_stats": (num_samples, stats),
            "prior": (num_prior_samples, of_latent),
            "prior_predictive": (num_prior_samples, of_observed),
            "observed_data": (0, of_observed),
        }
        found: dict[str, _Variables] = {}
        for group in groups:
            draws, entries = contents[group]
            lead = ((*_DRAWN,), (1, draws)) if draws else ((), ())
            found[group] = {
                name: ((*lead[0], *dims), (*lead[1], *shape), dtype)
                for name, (dims, shape, dtype) in entries
            }
        return found

    def _entry(self, name: str) -> _Entry:
        place = self.runs.places[name]
        return self.dims[name], place.shape, torch.empty(0, dtype=place.dtype).numpy().dtype

    def _elements(self, name: str) -> _Entry:
        place = self.runs.places[name]
        kept = len(place.shape) - place.tied_dims
        return self.dims[name][:kept], place.shape[:kept], np.dtype("float64")

    def dataset(
        self, variables: _Variables, arrays: dict[str, np.ndarray[Any, Any]], attrs: Any
    ) -> xr.Dataset:
        """A group."""
        sizes = {
            dim: size for dims, shape, _ in variables.values() for dim, size in zip(dims, shape)
        }
        coords = {dim: self.coords.get(dim, np.arange(size)) for dim, size in sizes.items()}
        data = {name: (variables[name][0], array) for name, array in arrays.items()}
        return xr.Dataset(data, coords=coords, attrs=attrs)


class _Filling:
    """Writes runs into the arrays of the groups."""

    def __init__(
        self, runs: Runs, layout: _Layout, arrays: dict[str, dict[str, np.ndarray[Any, Any]]]
    ) -> None:
        self.runs, self.layout, self.arrays = runs, layout, arrays

    def posterior(self, run: Run) -> None:
        """Draws of the guide."""
        runs, span = self.runs, slice(run.start, run.start + run.size)
        self._latent("posterior", span, run)
        if "posterior_predictive" in self.arrays:
            self._observed("posterior_predictive", span, run.predictive())
        for name, array in self.arrays.get("log_likelihood", {}).items():
            values = run.log_elements(name) if self.layout.per_observation else run.log_p[name]
            array[0, span] = _numpy(values)
        if "sample_stats" in self.arrays:
            stats = self.arrays["sample_stats"]
            both = runs.totals(run.log_p, run.size), runs.totals(run.log_q, run.size)
            for prefix, p, q in zip(("", "shared_"), *both):
                for name, value in (("log_p", p), ("log_q", q), ("log_weight", p - q)):
                    if prefix + name in stats:
                        stats[prefix + name][0, span] = _numpy(value)

    def prior(self, run: Run) -> None:
        """Draws of the model."""
        span = slice(run.start, run.start + run.size)
        self._latent("prior", span, run)
        self._observed("prior_predictive", span, run)

    def data(self) -> None:
        """What was observed."""
        for name, array in self.arrays.get("observed_data", {}).items():
            array[...] = _numpy(self.runs.observed[name])

    def _latent(self, group: str, span: slice, run: Run) -> None:
        if group in self.arrays:
            for name in self.runs.latent:
                value = _numpy(run.value(name))
                self.arrays[group][name][0, span] = value
                if name in self.layout.active:
                    self.arrays[group][self.layout.active[name]][0, span] = value != 0

    def _observed(self, group: str, span: slice, run: Run) -> None:
        if group in self.arrays:
            for name in self.runs.observed:
                self.arrays[group][name][0, span] = _numpy(run.value(name))


def _numpy(value: Tensor) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = value.detach().cpu().numpy()
    return found


def _check_bytes(variables: dict[str, _Variables], max_bytes: int) -> None:
    sizes = {
        group: sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in found.values())
        for group, found in variables.items()
    }
    total = sum(sizes.values())
    table = ", ".join(f"{group} {_megabytes(size)}" for group, size in sizes.items())
    _LOG.info("to_datatree needs %s: %s", _megabytes(total), table)
    if total > max_bytes:
        raise ValueError(
            f"Expected a tree of at most max_bytes = {_megabytes(max_bytes)}, got one of "
            f"{_megabytes(total)}: {table}. Nothing was allocated. Lower num_samples or "
            "num_prior_samples, pass fewer data, leave out groups by groups=, or raise max_bytes."
        )


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _attributes(runs: Runs, num_samples: int) -> dict[str, Any]:
    try:
        own = version("pyro-sparse")
    except PackageNotFoundError:  # run from a folder
        own = "unknown"
    return {
        "inference": "variational",
        "inference_library": "pyro_sparse",
        "inference_library_version": own,
        "pyro_version": pyro.__version__,
        "torch_version": str(torch.__version__),
        "num_samples": num_samples,
        "num_data": runs.num_data,
        "seed": runs.seed,
        "reweighted": "no: draws of the guide",
    }
