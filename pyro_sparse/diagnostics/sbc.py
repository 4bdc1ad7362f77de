"""Simulation-based calibration of any model and guide, atoms at zero included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from tqdm import tqdm

from pyro_sparse.diagnostics.calibration import Calibration, Counts
from pyro_sparse.infer.integrand import leaf
from pyro_sparse.infer.numbers import check_real, check_whole
from pyro_sparse.infer.runs import Program, Run, Runs

JOINT = "log_joint"
"""Name under which the log joint density of data and latents is ranked."""


@dataclass(frozen=True)
class SBC:
    """What simulation-based calibration found.

    Attributes:
        sites: Calibration of each latent site, by name; of sums over each, ``"energy of codes"``
            and ``"number of codes"`` that are active; and of ``"log_joint"``.
        elements: Which elements of a site's flattened event were ranked, by name.
        num_simulations: Independent simulations.
        num_samples: Draws of the guide at each.
        level: Probability of a false alarm.

    Example:
        >>> z = torch.randn(51, 400, 1, generator=torch.Generator().manual_seed(0))
        >>> codes = Calibration.from_draws(z[0], z[1:])
        >>> SBC({"codes": codes}, {"codes": torch.arange(1)}, 400, 50, level=1e-3).alarm
        False
    """

    sites: dict[str, Calibration]
    elements: dict[str, Tensor]
    num_simulations: int
    num_samples: int
    level: float

    @property
    def p_value(self) -> float:
        """Of all tests together, corrected for their number."""
        number = sum(len(p) for site in self.sites.values() for p in site.p_values.values())
        least = min(float(p.min()) for site in self.sites.values() for p in site.p_values.values())
        return min(1.0, least * number)

    @property
    def alarm(self) -> bool:
        """Whether the posterior is not that of the model."""
        return self.p_value < self.level

    def __str__(self) -> str:
        lines = [
            f"{self.num_simulations} simulations, {self.num_samples} draws each: "
            + (
                f"NOT CALIBRATED (p = {self.p_value:.2g} of all tests together)"
                if self.alarm
                else f"no sign of a wrong posterior (p = {self.p_value:.2g} of all tests together)"
            )
        ]
        for name, site in self.sites.items():
            for test, values in site.p_values.items():
                worst = int(values.argmin())
                at = f", at element {int(self.elements[name][worst])}" if len(values) > 1 else ""
                lines.append(f"  {name}, {test}: smallest p {float(values[worst]):.2g}{at}")
            if site.pit_active is not None:
                found = site.coverage(0.9, active=True)
                lines.append(
                    f"  {name}, active: 90 % intervals hold {found.share:.1%} +- {found.se:.1%}"
                )
                curve = site.reliability()
                lines.append(
                    f"  {name}, P(active): error {curve.ece:.4f} +- {curve.ece_se:.4f}, of noise "
                    f"alone {curve.ece_of_noise:.4f}"
                )
        return "\n".join(lines)


def sbc(
    model: Program,
    guide: Program,
    y: Tensor,
    *,
    refit: Callable[[Tensor], Program] | None = None,
    num_simulations: int = 1000,
    num_samples: int = 200,
    max_elements: int = 64,
    level: float = 1e-3,
    mask: Tensor | None = None,
    plate: str = "data",
    seed: int = 0,
    vectorize: bool = True,
    progress: bool = True,
) -> SBC:
    r"""Is the guide the posterior of the model, on data that the model makes itself?

    Latents and data are drawn from the model, :math:`z^* \sim p(z)`, :math:`y \sim p(y \mid z^*)`,
    and :math:`z_1, \dots, z_S` from the guide given :math:`y`. If it is the posterior, the truth is
    as likely as any draw to be the smallest, the second smallest and so on. Ties at an atom are
    broken at random; strict ranks would reject every exact posterior with zeros.

    Ranked are single latent numbers, active ones also among active draws alone; of each site the
    sum of squares and the number of active elements; and the log joint density of data and latents,
    which notices a guide that has not looked at the data. As many truths have to be active as the
    draws say. All tests together alarm falsely with a probability
    of at most ``level``, up to how well the programs state their own densities.

    It speaks of data that the model makes: whether real data are such is for ``predictive_check``.
    A variational guide is biased by design and will be found out, given enough simulations; read
    by how much from coverage and P(active). Learned atoms are known up to sign and order: hold the
    dictionary.

    Args:
        model: Generative program, called as in ``infer.log_weights``.
        guide: Variational program with the same latent sites.
        y: Data whose shape, dtype and number a simulated data set has; their values do not count.
        refit: Makes the guide of a simulated data set, such as ``lambda y: guide.refine(model,
            y)``; ``guide`` itself serves all of them by default.
        num_simulations: How many are wanted. Where all latents stand in the plate of the data,
            each datum is one; otherwise each data set is, and of its local latents those of the
            first datum are ranked.
        num_samples: Draws of the guide at each.
        max_elements: Elements of a site's event that are ranked, evenly spaced.
        level: Probability of a false alarm.
        mask: True where a sample was observed, broadcastable to ``y``. What is not observed holds
            values of another simulation, so that a program which looks at them is found out.
        plate: Name of the plate of the data.
        seed: Seed of all draws.
        vectorize: As in ``infer.log_weights``.
        progress: Show a bar.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a number is out of range, the observed site is not of the shape of ``y``, or
            ``infer.log_weights`` would refuse.
        NotImplementedError: If the model observes several sites or has a factor, or as in
            ``infer.log_weights``.

    References:
        Talts, Betancourt, Simpson, Vehtari & Gelman (2018), arXiv:1804.06788; Modrak et al. (2023),
        Bayesian Anal., for ties and for the joint density.

    Example:
        >>> import pyro
        >>> from pyro_sparse.distributions import SpikeAndSlab
        >>> def model(y, num_data):
        ...     with pyro.plate("data", len(y)):
        ...         codes = pyro.sample("codes", SpikeAndSlab(dist.Normal(0.0, 1.0), 0.5))
        ...         pyro.sample("obs", dist.Normal(codes, 1.0), obs=y)
        >>> def exact(y, num_data, scale=0.5**0.5):
        ...     evidence = [dist.Normal(0.0, v**0.5).log_prob(y) for v in (1.0, 2.0)]
        ...     with pyro.plate("data", len(y)):
        ...         law = SpikeAndSlab(dist.Normal(y / 2, scale), logits=evidence[1] - evidence[0])
        ...         pyro.sample("codes", law)
        >>> options = dict(num_simulations=500, num_samples=50, progress=False)
        >>> sbc(model, exact, torch.zeros(250), **options).alarm
        False
        >>> narrow = lambda y, num_data: exact(y, num_data, 0.3)
        >>> sbc(model, narrow, torch.zeros(250), **options).alarm
        True
    """
    for name, value in (("num_simulations", num_simulations), ("max_elements", max_elements)):
        check_whole(name, value, 1 if name == "max_elements" else 2)
    check_whole("num_samples", num_samples, 1)
    check_real("level", level, 0.0, 1.0, open_low=True)
    if refit is not None and not callable(refit):
        raise TypeError(f"Expected refit to be a function of data, got {type(refit).__name__}.")
    options: dict[str, Any] = {"mask": mask, "plate": plate, "vectorize": vectorize}
    runs = Runs(model, guide, y, None, seed=seed, **options)
    place = _Ranked(runs, max_elements)
    size = len(y) if place.independent else 1
    truths = _Truths(runs, place, -(-num_simulations // size), mask)

    generator = torch.Generator(y.device).manual_seed(seed)
    found: dict[str, list[Calibration]] = {name: [] for name in place.names}
    for number in tqdm(range(len(truths.y)), desc="sbc", disable=not progress):
        data = truths.y[number]
        program = guide
        if refit is not None:
            with torch.enable_grad():
                program = refit(data)
        own = int(torch.randint(2**31, (), generator=generator, device=y.device))
        drawn = Runs(model, program, data, None, seed=own, **options)
        counts = {
            name: Counts(truths.values[name][number], place.atom(name), truths.tolerance(name))
            for name in place.names
        }

        def count(run: Run, counts: dict[str, Counts] = counts) -> None:
            for name, values in place.values(run, run.log_p).items():
                counts[name].add(values)

        drawn.each(num_samples, None, count)
        for name, counted in counts.items():
            found[name].append(counted.calibration(generator))
    return SBC(
        sites={name: _joined(parts) for name, parts in found.items()},
        elements=place.elements,
        num_simulations=len(truths.y) * size,
        num_samples=num_samples,
        level=level,
    )


class _Ranked:
    """What is ranked, read off a run.

    Attributes:
        names: Latent sites, and sums over their elements, and the log joint density.
        elements: Indices into the flattened event of each.
        independent: Whether each datum is a simulation of its own.
    """

    def __init__(self, runs: Runs, max_elements: int) -> None:
        self.runs = runs
        if len(runs.observed) != 1:
            raise NotImplementedError(
                f"Expected a model with one observed site, got {list(runs.observed)}: simulated "
                "data are handed over as y alone."
            )
        (self.observed,) = runs.observed
        shape = runs.places[self.observed].shape
        if shape != tuple(runs.y.shape):
            raise ValueError(
                f"Expected site {self.observed!r} of the shape of y, {tuple(runs.y.shape)}, got "
                f"{shape}: what the model observes has to be the data themselves."
            )
        self.independent = all(runs.is_local(name) for name in runs.latent)
        self.elements: dict[str, Tensor] = {}
        for name in runs.latent:
            place = runs.places[name]
            total = torch.Size(place.shape).numel() // (len(runs.y) if runs.is_local(name) else 1)
            number = min(total, max_elements)
            self.elements[name] = torch.arange(number) * total // number
            for sum_of in self._sums(name) if total > 1 else []:
                self.elements[sum_of] = torch.arange(1)
        self.elements[JOINT] = torch.arange(1)
        self.names = [*self.elements]

    def _sums(self, name: str) -> list[str]:
        return [f"energy of {name}", f"number of {name}"][: 2 if self.atom(name) else 1]

    def atom(self, name: str) -> bool:
        return name in self.runs.latent and self.runs.places[name].gated

    def values(self, run: Run, log_p: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is ranked, each ``(draws, simulations, elements)``."""
        local, shared = self.runs.totals(log_p, run.size)
        joint = local if self.independent else (local.sum(1) + shared).unsqueeze(-1)
        found = {JOINT: joint.unsqueeze(-1)}
        for name in self.runs.latent:
            value, place = run.value(name), self.runs.places[name]
            value = value if value.is_floating_point() else value.double()
            if self.runs.is_local(name):
                value = value.movedim(1 + list(place.plates).index(self.runs.plate), 1)
                value = value.reshape(run.size, len(self.runs.y), -1)
                value = value if self.independent else value[:, :1]
            else:
                value = value.reshape(run.size, 1, -1)
            found[name] = value[..., self.elements[name].to(value.device)]
            sums = value.square().sum(-1, keepdim=True), (value != 0).double().sum(-1, keepdim=True)
            found.update(
                {key: one for key, one in zip(self._sums(name), sums) if key in self.elements}
            )
        return found


class _Truths:
    """Latents and data drawn from the model.

    Attributes:
        y: Data, shape ``(sets, n, *signal_shape)``.
        values: What is ranked, each ``(sets, simulations, elements)``.
    """

    def __init__(self, runs: Runs, place: _Ranked, sets: int, mask: Tensor | None) -> None:
        y: list[Tensor] = []
        values: dict[str, list[Tensor]] = {name: [] for name in place.names}

        def collect(run: Run) -> None:
            nodes: dict[str, Any] = run.model_trace.nodes
            factors = [n for n, s in nodes.items() if isinstance(leaf(s.get("fn")), dist.Unit)]
            if factors:
                raise NotImplementedError(
                    f"Expected a model that data can be drawn from, got the factor {factors[0]!r}."
                )
            y.append(run.value(place.observed).to(runs.y))
            log_p = runs.log_densities(run.model_trace, run.size)
            for name, value in place.values(run, log_p).items():
                values[name].append(value)

        runs.each_prior(sets, None, collect)
        self.values = {name: torch.cat(parts) for name, parts in values.items()}
        self.y = torch.cat(y)
        if mask is not None:
            others = self.y.roll(1, 0 if sets > 1 else 1)
            self.y = torch.where(mask, self.y, others)

    def tolerance(self, name: str) -> float | Tensor:
        """Log-densities of equal latents differ by rounding."""
        if name != JOINT:
            return 0.0
        rounding: float = torch.finfo(self.y.dtype).eps if self.y.is_floating_point() else 1e-7
        scale: Tensor = 1 + self.values[JOINT].abs().mean()
        return 256 * rounding * scale


def _joined(parts: list[Calibration]) -> Calibration:
    def cat(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    fields = ("pit", "pit_active", "active", "prob_active")
    joined: dict[str, Any] = {name: cat(name) for name in fields}
    return Calibration(**joined, num_samples=parts[0].num_samples)
