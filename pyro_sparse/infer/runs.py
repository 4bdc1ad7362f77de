"""Many draws from a guide, and the model run at each: what weights and diagnostics are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from pyro.util import check_site_shape
from torch import Tensor, nn

from pyro_sparse.infer.integrand import has_atom, leaf
from pyro_sparse.infer.numbers import check_whole
from pyro_sparse.infer.programs import Apart, kept
from pyro_sparse.infer.sites import check_sites
from pyro_sparse.infer.weighable import (
    PLATE_OF_DRAWS,
    check_arguments,
    check_pair,
    check_plates,
    check_points,
    plates_of,
)

Program = Callable[..., Any]
_VALUES = 2**21  # of all sites together in one run, unless the caller says otherwise


@dataclass
class Place:
    """Where a site stands, as a single run shows it.

    Attributes:
        plates: Names of its plates and their dims, from left to right.
        shape: Shape of one draw, ``(*plates, *event)``.
        value_shape: The same as the program has it, with ones for plates that it stands not in.
        tied_dims: How many dims at its end its law does not take elementwise.
        gated: Whether its law has an atom at zero.
        dtype: Of its values.
    """

    plates: dict[str, int]
    shape: tuple[int, ...]
    value_shape: tuple[int, ...]
    tied_dims: int
    gated: bool
    dtype: torch.dtype


@dataclass
class Run:
    """Some draws, and both programs at them.

    Attributes:
        runs: What it is one of.
        start: Number of its first draw.
        size: Draws.
        guide_trace: Trace of the guide.
        model_trace: Trace of the model.
        log_p: Log-density of each site of the model, shape ``(size, n)`` or ``(size,)``.
        log_q: Likewise of the guide.
    """

    runs: Runs
    start: int
    size: int
    guide_trace: poutine.Trace
    model_trace: poutine.Trace
    log_p: dict[str, Tensor]
    log_q: dict[str, Tensor]

    def value(self, name: str) -> Tensor:
        """Values of a site of the model, shape ``(size, *plates, *event)``."""
        site: Any = self.model_trace.nodes[name]
        return self.runs.stacked(name, site["value"], self.size)

    def log_elements(self, name: str) -> Tensor:
        """Log-density of each element of a site of the model, as far as its law is elementwise."""
        site: Any = self.model_trace.nodes[name]
        law, place = _elementwise(site["fn"]), self.runs.places[name]
        value = law.log_prob(site["value"]).double()
        if site["mask"] is not None:
            inner = len(law.batch_shape) - len(site["fn"].batch_shape)
            mask = torch.as_tensor(site["mask"])
            value = scale_and_mask(value, 1.0, mask.reshape(*mask.shape, *[1] * inner))
        return value.reshape(self.size, *place.shape[: len(place.shape) - place.tied_dims])

    def predictive(self) -> Run:
        """Observed sites of the model drawn anew at the same latent values."""
        nodes: dict[str, Any] = self.model_trace.nodes
        given = {name: nodes[name]["value"] for name in self.runs.latent}
        return self.runs.drawn(self.start, self.size, _Given(given))


class Runs:
    """A guide to be drawn from and the model at its draws, both looked at once and checked.

    Args:
        model: Generative program.
        guide: Variational program.
        y: Data, batch first.
        num_data: Size of the whole data set, or None.
        mask: Of the data, or None.
        plate: Name of the plate of the data.
        seed: Seed of all draws.
        vectorize: Whether one run makes many draws.

    Attributes:
        places: Every site of both programs.
        latent: Names of the latent sites of the model.
        observed: Names and values of its observed sites, ``(*plates, *event)``; ``nan`` where
            masked, if they have one.
        nesting: Dimensions that plates take.
        data_dim: Dim of the plate of the data.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        y: Tensor,
        num_data: int | None,
        *,
        mask: Tensor | None,
        plate: str,
        seed: int,
        vectorize: bool,
    ) -> None:
        check_arguments(model, guide, y, num_data, mask, plate)
        check_whole("seed", seed, 0)
        self.y, self.num_data, self.plate = y, num_data or len(y), plate
        self.kwargs = {} if mask is None else {"mask": mask}
        self.seed, self.vectorize = seed, vectorize
        self.model, self.guide = Apart(model), Apart(guide)
        for program in (self.model, self.guide):
            program.state = _parameters(program.program)
        self.programs = nn.ModuleDict({"model": self.model, "guide": self.guide})
        with self._undisturbed():
            self._look()

    def is_local(self, name: str) -> bool:
        """Whether a site stands in the plate of the data."""
        return self.plate in self.places[name].plates

    def stacked(self, name: str, value: Tensor, size: int) -> Tensor:
        """Values of a site as ``(size, *plates, *event)``."""
        return value.reshape(size, *self.places[name].shape)

    def totals(self, parts: dict[str, Tensor], num_samples: int) -> tuple[Tensor, Tensor]:
        """Sums over the sites inside the plate of the data, and over all others."""
        zero = self.y.new_zeros((), dtype=torch.float64)
        local, shared = zero.expand(num_samples, len(self.y)), zero.expand(num_samples)
        for name, value in parts.items():
            if self.is_local(name):
                local = local + value
            else:
                shared = shared + value
        return local, shared

    def each(self, num_samples: int, chunk_size: int | None, visit: Callable[[Run], None]) -> None:
        """Make all draws, some in one run, and hand each run over.

        Args:
            num_samples: Draws, ``>= 1``.
            chunk_size: Draws in one run; None bounds the number of values.
            visit: Called with each run, in order; no gradient is kept, and what it draws itself
                moves no draw after it.

        Raises:
            ValueError: If a log-density is not finite, or a program does not take the leading
                dimension of draws.
        """
        with self._undisturbed():
            for start, size in self._chunks(num_samples, chunk_size):
                with self.plate_of_draws(size):
                    run = self._run(start, size)
                _check_finite(run)
                if start == 0 and self.vectorize:
                    self._check_first(run)
                with torch.random.fork_rng():  # not the stream of the next run either
                    torch.manual_seed(self._seed_besides(start + 1))
                    visit(run)

    def each_prior(
        self, num_samples: int, chunk_size: int | None, visit: Callable[[Run], None]
    ) -> None:
        """Draw from the model alone, observed sites too, and hand each run over.

        Args:
            num_samples: Draws, ``>= 1``.
            chunk_size: Draws in one run; None bounds the number of values.
            visit: Called with each run, in order.
        """
        with self._undisturbed():
            torch.manual_seed(self._seed_besides(0))
            for start, size in self._chunks(num_samples, chunk_size):
                visit(self.drawn(start, size, _Given({})))

    def drawn(self, start: int, size: int, given: _Given) -> Run:
        """The model with its observed sites drawn, and so its latent ones that are not given."""
        with self.plate_of_draws(size):
            free = poutine.trace(poutine.uncondition(given(self.model)))
            trace = free.get_trace(self.y, self.num_data, **self.kwargs)
        return Run(self, start, size, poutine.Trace(), trace, {}, {})

    def _chunks(self, num_samples: int, chunk_size: int | None) -> Iterator[tuple[int, int]]:
        check_whole("num_samples", num_samples, 1)
        if chunk_size is not None:
            check_whole("chunk_size", chunk_size, 1)
        if not self.vectorize:
            chunk_size = 1
        elif chunk_size is None:
            values = sum(math.prod(place.shape) for place in self.places.values())
            chunk_size = max(1, _VALUES // max(1, values))
        for start in range(0, num_samples, chunk_size):
            yield start, min(chunk_size, num_samples - start)

    @contextmanager
    def plate_of_draws(self, size: int) -> Iterator[None]:
        """A plate left of all others, in which a program makes many draws at once."""
        if not self.vectorize:
            yield
            return
        try:
            with pyro.plate(PLATE_OF_DRAWS, size, dim=-1 - self.nesting):
                yield
        except Exception as error:
            raise ValueError(_no_leading(f"{type(error).__name__}: {error}")) from error

    def _seed_besides(self, number: int) -> int:
        # torch's CPU generator reads the lower 32 bits alone, which an odd factor spreads.
        return (self.seed + (2 * number + 1) * 0x9E3779B97F4A7C15) % 2**63

    # One run

    def _run(self, start: int, size: int) -> Run:
        guide_trace, model_trace = self._traces(self.guide)
        log_q = self.log_densities(guide_trace, size)
        log_p = self.log_densities(model_trace, size)
        return Run(self, start, size, guide_trace, model_trace, log_p, log_q)

    def _traces(self, guide: Program) -> tuple[poutine.Trace, poutine.Trace]:
        args = (self.y, self.num_data)
        guide_trace = poutine.trace(guide).get_trace(*args, **self.kwargs)
        replayed = poutine.replay(self.model, trace=guide_trace)
        return guide_trace, poutine.trace(replayed).get_trace(*args, **self.kwargs)

    def log_densities(self, trace: poutine.Trace, size: int) -> dict[str, Tensor]:
        """Of each draw and datum: masked, not scaled, summed over all other plates."""
        found = {}
        for name, site in _sites(trace).items():
            law = site["fn"]
            value = scale_and_mask(law.log_prob(site["value"]), 1.0, site["mask"]).double()
            value = value.reshape((1,) * (self.nesting + 1 - value.dim()) + value.shape)
            shape: tuple[int, ...]
            if self.is_local(name):
                others = [d for d in range(1, value.dim()) if d - value.dim() != self.data_dim]
                value, shape = value.sum(others) if others else value, (size, len(self.y))
            else:
                value, shape = value.flatten(1).sum(1), (size,)
            if value.shape != shape:
                raise ValueError(
                    f"expected log-densities of shape {shape} at site {name!r}, got "
                    f"{tuple(value.shape)}"
                )
            found[name] = value
        return found

    def _check_first(self, run: Run) -> None:
        """A program that does not know leading dimensions need not fail at them."""
        values = {
            name: self.stacked(name, site["value"], run.size)[0].reshape(
                self.places[name].value_shape
            )
            for name, site in _sites(run.guide_trace).items()
            if not isinstance(leaf(site["fn"]), dist.Delta)  # made from the others, up to rounding
        }
        with torch.random.fork_rng():
            alone = self._traces(_Given(values)(self.guide))
        for trace, together in zip(alone, (run.log_q, run.log_p)):
            for name, value in self.log_densities(trace, 1).items():
                first = together[name][:1]
                # Far above the rounding of float32, far below what another computation would give.
                close = (first - value).abs() <= 0.05 + 1e-3 * value.abs()
                if not bool((close | (first == value)).all()):
                    raise ValueError(
                        _no_leading(f"other log-densities at site {name!r} than in a single run")
                    )

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """No gradients; random state, buffers and what is frozen stay as they are."""
        with ExitStack() as stack:
            for context in (torch.no_grad(), torch.random.fork_rng(), kept(self.programs)):
                stack.enter_context(context)
            torch.manual_seed(self.seed)
            yield

    # What a single run shows

    def _look(self) -> None:
        # Autoguides set themselves up now.
        poutine.trace(self.guide).get_trace(self.y, self.num_data, **self.kwargs)
        check_sites(self.model, self.guide, self.y, self.num_data, **self.kwargs)
        guide_trace, model_trace = self._traces(self.guide)
        of_guide, of_model = _sites(guide_trace), _sites(model_trace)
        dims = [-f.dim for s in (*of_guide.values(), *of_model.values()) for f in plates_of(s)]
        self.nesting = max(dims, default=0)
        for trace in (guide_trace, model_trace):
            for name, site in _sites(trace).items():
                site["log_prob"] = site["fn"].log_prob(site["value"])
                check_site_shape(site, self.nesting)
                check_plates(name, site, self.plate, len(self.y))
        self.places = {name: _place(site) for name, site in {**of_model, **of_guide}.items()}
        self.latent = [name for name, site in of_model.items() if not site["is_observed"]]
        self.observed = {
            name: _seen(site).reshape(self.places[name].shape)
            for name, site in of_model.items()
            if site["is_observed"] and not isinstance(leaf(site["fn"]), dist.Unit)
        }
        found = {self.places[n].plates[self.plate] for n in self.places if self.is_local(n)}
        if len(found) != 1:
            names = sorted({f.name for s in of_model.values() for f in plates_of(s)})
            raise ValueError(
                f"Expected the data in a plate {self.plate!r} of one dim, got plates {names}"
                f"{' with several dims' if found else ''}. Say plate= if it has another name."
            )
        self.data_dim = found.pop()
        check_pair(of_guide, of_model)
        check_points(of_guide, of_model, self.plate)


class _Given(Messenger):
    """Gives latent sites their values."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True


def _no_leading(found: str) -> str:
    return (
        "Expected programs that take a leading dimension of draws, such as codes of shape (draws, "
        f"n, atoms), got {found}. Write dims from the right (codes.sum(-1)), or pass "
        "vectorize=False for one run a draw. Or it is a program that draws random numbers of its "
        "own, such as dropout: call eval()."
    )


def _sites(trace: poutine.Trace) -> dict[str, Any]:
    """Sites with a density: no subsampling, nothing that only records a value."""
    nodes: dict[str, Any] = trace.nodes
    return {
        name: site
        for name, site in nodes.items()
        if site["type"] == "sample"
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic")
    }


def _elementwise(law: Any) -> Any:
    """A law before ``to_event``."""
    while isinstance(law, torch.distributions.Independent):
        law = law.base_dist
    return law


def _seen(site: Any) -> Tensor:
    """Value of an observed site: a masked sample is no zero, which programs put in its place."""
    law, value = site["fn"], site["value"].expand(site["fn"].shape())
    if not value.is_floating_point():
        return value
    if site["mask"] is not None:
        mask = torch.as_tensor(site["mask"])
        value = _blanked(value, mask.reshape(*mask.shape, *[1] * law.event_dim))
    while isinstance(law, torch.distributions.Independent | dist.MaskedDistribution):
        if isinstance(law, dist.MaskedDistribution):
            mask = torch.as_tensor(law._mask)
            value = _blanked(value, mask.reshape(*mask.shape, *[1] * law.event_dim))
        law = law.base_dist
    return value


def _blanked(value: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.to(value.device), value, torch.nan)


def _place(site: Any) -> Place:
    value, law, plates = site["value"], site["fn"], plates_of(site)
    event = tuple(value.shape[value.dim() - law.event_dim :])
    return Place(
        plates={frame.name: frame.dim for frame in plates},
        shape=tuple(frame.size for frame in plates) + event,
        value_shape=tuple(value.shape),
        tied_dims=len(_elementwise(law).event_shape),
        gated=has_atom(law),
        dtype=value.dtype,
    )


def _parameters(program: Program) -> dict[str, Any]:
    """What a program finds in the parameter store: not what others left under its own names."""
    state: dict[str, Any] = pyro.get_param_store().get_state()  # type: ignore[assignment]
    if not isinstance(program, nn.Module):
        return state
    # Paths as Pyro writes them: "scale" for "scale_unconstrained", "encoder$$$weight" for a child.
    own = {name.removesuffix("_unconstrained") for name, _ in program.named_parameters()}
    strange = [name for name in state["params"] if name.replace("$$$", ".") in own]
    for part in state.values():
        for name in strange:
            part.pop(name, None)
    return state


def _check_finite(run: Run) -> None:
    """A draw may be impossible under the model, not so in the guide that made it."""
    for kind, parts in (("model", run.log_p), ("guide", run.log_q)):
        for name, value in parts.items():
            bad = ~value.isfinite() & ((value != -math.inf) | (kind == "guide"))
            if bool(bad.any()):
                raise ValueError(
                    f"Expected finite log-densities of what the guide draws, got "
                    f"{float(value[bad][0])} at site {name!r} of the {kind}, first at draw and "
                    f"datum {tuple(bad.nonzero()[0].tolist())}. Look at y and at the parameters "
                    "there, or run both in float64."
                )
