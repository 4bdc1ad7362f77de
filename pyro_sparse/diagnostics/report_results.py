"""What a report runs: each diagnostic once, at its first use; what cannot be asked says why."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyro
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor, nn

from pyro_sparse.diagnostics.amortisation import AmortisationGap, amortisation_gap
from pyro_sparse.diagnostics.calibration import Calibration, Counts, Reliability, reliability
from pyro_sparse.diagnostics.datatree import to_datatree
from pyro_sparse.diagnostics.dictionary import (
    DictionarySummary,
    Stability,
    align_atoms,
    dictionary_summary,
    stability,
)
from pyro_sparse.diagnostics.finding import Thresholds
from pyro_sparse.diagnostics.khat import LOO, khat, loo
from pyro_sparse.diagnostics.predictive import PredictiveCheck, predictive_check
from pyro_sparse.diagnostics.recovery import Recovery, match_atoms
from pyro_sparse.diagnostics.sbc import SBC, sbc
from pyro_sparse.diagnostics.streaming import CodeSummary, summarise_codes
from pyro_sparse.distributions import Law
from pyro_sparse.infer.findings import NotAsked
from pyro_sparse.infer.programs import Apart, kept
from pyro_sparse.infer.runs import Program, Run, Runs
from pyro_sparse.infer.weighable import PointEstimate
from pyro_sparse.solvers import solve

MOST_REFINED = 64
"""Data whose amortisation gap is taken."""

_POINT = "the guide is a point estimate, which has no spread: train guides.Thresholded or another"


class Results:
    """Results of diagnostics by name, each computed when it is first asked for.

    Args are those of ``report``, ``y`` the data that are looked at.

    Attributes:
        point: Whether the guide is a point estimate.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        y: Tensor,
        *,
        num_data: int,
        mask: Tensor | None,
        site: str,
        plate: str,
        num_samples: int,
        seed: int,
        vectorize: bool,
        refine_steps: int,
        simulations: SBC | int | None,
        given_atoms: Tensor | None,
        true_atoms: Tensor | None,
        true_codes: Tensor | None,
        other_atoms: Sequence[Tensor] | None,
        limits: Thresholds,
    ) -> None:
        self.model, self.guide, self.y, self.mask = model, guide, y, mask
        self.num_data, self.num_samples, self.seed = num_data, num_samples, seed
        self.site, self.refine_steps, self.simulations = site, refine_steps, simulations
        self.given_atoms, self.true_atoms, self.other_atoms = given_atoms, true_atoms, other_atoms
        self.true_codes, self.limits = true_codes, limits
        self.options: dict[str, Any] = {
            "mask": mask,
            "plate": plate,
            "seed": seed,
            "vectorize": vectorize,
        }
        try:
            self._runs: Runs | None = Runs(model, guide, y, num_data, **self.options)
        except PointEstimate:
            self._runs = None
        self.point = self._runs is None

    @property
    def runs(self) -> Runs:
        """Draws of the guide and the model at them."""
        if self._runs is None:
            raise NotAsked(_POINT)
        return self._runs

    # The posterior

    @cached_property
    def tree(self) -> xr.DataTree:
        """Weights and likelihoods of draws."""
        if self._runs is None:
            raise NotAsked(_POINT)
        return to_datatree(
            self.model,
            self.guide,
            self.y,
            num_samples=self.num_samples,
            num_data=self.num_data,
            groups=("log_likelihood", "sample_stats"),
            **self.options,
        )

    @cached_property
    def khat(self) -> Tensor:
        """Of each datum."""
        return khat(self.tree)

    @cached_property
    def loo(self) -> LOO:
        """Each datum left out."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that k-hats are high is a finding
            return loo(self.tree)

    @cached_property
    def predictive(self) -> PredictiveCheck:
        """Data against replicates."""
        if len(self.runs.observed) != 1:
            raise NotAsked(f"needs a model with one observed site, got {[*self.runs.observed]}")
        return predictive_check(
            self.model,
            self.guide,
            self.y,
            num_samples=min(self.num_samples, 500),
            num_data=self.num_data,
            **self.options,
        )

    @cached_property
    def sbc(self) -> SBC:
        """Simulations of the model."""
        if self.simulations is None:
            raise NotAsked("needs sbc=, what diagnostics.sbc found, or a number of simulations")
        if isinstance(self.simulations, SBC):
            return self.simulations
        if len(self.runs.observed) != 1:
            raise NotAsked(f"needs a model with one observed site, got {[*self.runs.observed]}")
        return sbc(
            self.model,
            self.guide,
            self.y,
            num_simulations=self.simulations,
            num_samples=100,
            progress=False,
            **self.options,
        )

    @cached_property
    def ranks_of_truth(self) -> Calibration:
        """Of the true codes of these data."""
        runs = self.runs
        if self.true_codes is None:
            raise NotAsked("needs true_codes=, known for simulated data alone")
        if self.true_atoms is not None:
            match = self.recovery.match, self.recovery.sign
            if match[0].tolist() != [*range(len(match[0]))] or bool((match[1] <= 0).any()):
                raise NotAsked("needs true_codes in the order and sign of the model's own atoms")
        if self.site not in runs.latent or not runs.is_local(self.site):
            raise NotAsked(f"needs site=, the name of the codes, got none at {self.site!r}")
        place = runs.places[self.site]
        if tuple(self.true_codes.shape) != place.shape:
            raise ValueError(
                f"Expected true_codes of shape {place.shape}, that of site {self.site!r}, got "
                f"{tuple(self.true_codes.shape)}."
            )
        counts = Counts(self.true_codes.reshape(len(self.y), -1), place.gated)

        def count(run: Run) -> None:
            counts.add(run.value(self.site).reshape(run.size, len(self.y), -1))

        runs.each(self.num_samples, None, count)
        return counts.calibration(torch.Generator(self.y.device).manual_seed(self.seed))

    @cached_property
    def ranks(self) -> tuple[Calibration, str]:
        """Of codes, and what data they are of."""
        try:
            return self.ranks_of_truth, "true codes of these data"
        except NotAsked:
            if self.site not in self.sbc.sites:
                raise NotAsked(f"needs ranks of site {self.site!r}") from None
            return self.sbc.sites[self.site], "on data of the model"

    @cached_property
    def reliability(self) -> tuple[Reliability, str]:
        """Of P(active), and what data it is of."""
        try:
            found, origin = self.ranks
        except NotAsked:
            raise NotAsked("needs sbc= or true_codes=") from None
        if found.active is None:
            raise NotAsked("the law of the codes has no exact zeros, so all are active")
        if self.true_codes is not None and origin.startswith("true"):
            prob = torch.from_numpy(self.codes.prob_active).to(self.true_codes)
            return reliability(prob.clamp(0, 1), self.true_codes != 0), origin
        return found.reliability(), origin

    @cached_property
    def amortisation(self) -> AmortisationGap:
        """What the encoder gives away."""
        if self._runs is None:
            raise NotAsked(_POINT)
        if not hasattr(self.guide, "refine"):
            raise NotAsked("needs a guide with a method refine, such as guides.Thresholded")
        if self.refine_steps == 0:
            raise NotAsked("needs refine_steps above 0")
        if len(self.runs.latent) > 1 and any(not self.runs.is_local(n) for n in self.runs.latent):
            raise NotAsked("needs a model whose latent sites all stand in the plate of the data")
        few = slice(0, MOST_REFINED)
        options = {**self.options, "mask": None if self.mask is None else self.mask[few]}
        with torch.enable_grad():
            return amortisation_gap(
                self.model,
                self.guide,
                self.y[few],
                num_steps=self.refine_steps,
                num_samples=min(self.num_samples, 500),
                **options,
            )

    # Codes and atoms

    @cached_property
    def codes(self) -> CodeSummary:
        """Mean, sd, P(active) and quantiles of the codes."""
        options: dict[str, Any] = {
            "mask": self.mask,
            "site": self.site,
            "seed": self.seed,
            "progress": False,
        }
        if self.point:
            options.update(num_samples=2, vectorize=False)  # all draws are equal
        else:
            if self.site not in self.runs.latent:
                raise NotAsked(f"needs site=, one of {self.runs.latent}")
            if len(self.runs.places[self.site].shape) < 2 or not self.runs.is_local(self.site):
                shape = self.runs.places[self.site].shape
                raise NotAsked(f"needs codes of shape (n, atoms, *positions), got {shape}")
            if self.site == "codes" and hasattr(self.guide, "posterior"):
                try:
                    return summarise_codes(self.guide, self.y, **options)
                except TypeError:
                    pass  # no closed forms, such as those of dependent codes
            vectorize = self.options["vectorize"]
            options.update(num_samples=self.num_samples, vectorize=vectorize)
        return summarise_codes(self.guide, self.y, **options)

    @cached_property
    def atoms(self) -> Tensor:
        """As given, of the model, or the mean of those that are sampled."""
        if self.given_atoms is not None:
            return self.given_atoms
        if self._runs is not None and "dictionary" in self._runs.latent:
            draws: list[Tensor] = []
            self._runs.each(50, None, lambda run: draws.append(run.value("dictionary")))
            drawn = torch.cat(draws)
            return align_atoms(drawn, drawn[0]).mean
        found = getattr(getattr(self.model, "dictionary", None), "atoms", None)
        if not isinstance(found, Tensor):
            raise NotAsked("needs atoms=, or a model with dictionary.atoms")
        return found.detach()

    @cached_property
    def dictionary(self) -> DictionarySummary:
        """Use of the atoms."""
        mean, prob = (torch.from_numpy(p) for p in (self.codes.mean, self.codes.prob_active))
        if self.given_atoms is None and (mean.dim() < 2 or mean.shape[1] != len(self.atoms)):
            raise NotAsked(f"needs atoms= of the codes of shape {tuple(mean.shape)}")
        return dictionary_summary(
            self.atoms, mean, prob, least_usage=self.limits.usage, alike=self.limits.alike
        )

    @cached_property
    def recovery(self) -> Recovery:
        """Of the true atoms."""
        if self.true_atoms is None:
            raise NotAsked("needs true_atoms=, known for simulated data alone")
        return match_atoms(self.atoms, self.true_atoms)

    @cached_property
    def stability(self) -> Stability:
        """Over trainings."""
        if not self.other_atoms:
            raise NotAsked("needs other_atoms=, those of trainings from other seeds")
        return stability([self.atoms, *self.other_atoms], alike=self.limits.alike)

    # Point estimates

    @cached_property
    def optimality(self) -> tuple[float, float]:
        """Nats a datum above the minimum of the objective, and its largest relative gap."""
        model: Any = self.model
        parts = ("dictionary", "likelihood", "prior")
        if not all(hasattr(model, name) for name in parts) or self.site != "codes":
            raise NotAsked("needs a model with dictionary, likelihood and prior")
        rate = getattr(model, "rate", None)
        if isinstance(rate, Law) or getattr(model, "threshold", None) is not None:
            raise NotAsked("needs a model whose rate is no latent site")
        with torch.no_grad():
            rate = rate() if callable(rate) else rate
            try:
                found = solve(
                    self.y,
                    model.dictionary,
                    model.prior,
                    rate=rate,
                    likelihood=model.likelihood,
                    mask=self.mask,
                    tol=1e-4,
                    max_steps=2000,
                )
            except NotImplementedError as why:
                raise NotAsked(f"solvers.solve: {why}") from why
            codes = torch.from_numpy(self.codes.mean).to(self.y)
            excess = self._log_joint(found.codes) - self._log_joint(codes)
        return float(excess) / len(self.y), float(found.gap.max())

    def _log_joint(self, codes: Tensor) -> Tensor:
        module = self.model if isinstance(self.model, nn.Module) else nn.Module()
        given = {} if self.mask is None else {"mask": self.mask}
        with kept(module):
            program = poutine.condition(Apart(self.model), {self.site: codes})
            trace = poutine.trace(program).get_trace(self.y, len(self.y), **given)
        return torch.as_tensor(trace.log_prob_sum()).double()

    # In words

    def facts(self, size: int) -> dict[str, str]:
        """Numbers without a verdict."""
        looked = len(self.y)
        found = {"data": f"{looked:,}" if looked == size else f"{looked:,} of {size:,}"}
        if self.point:
            return {**found, "posterior": "none: point estimate"}
        stats = self.tree["sample_stats"].to_dataset()
        bound = torch.from_numpy(stats["log_weight"].values).mean((0, 1))
        spread = float(bound.std()) / math.sqrt(looked) if looked > 1 else math.nan
        found["draws"] = f"{self.num_samples:,}"
        found["ELBO"] = f"{float(bound.mean()):.3f} +- {spread:.3f} nats a datum"
        if "shared_log_weight" in stats:
            shared = float(stats["shared_log_weight"].mean())
            found["ELBO"] += f", and {shared:.3f} nats of shared sites"
        if self.runs.observed and all(self.runs.is_local(name) for name in self.runs.observed):
            left = self.loo
            se = left.se / left.n_data_points
            found["left out"] = (
                f"elpd {left.elpd / left.n_data_points:.3f} +- {se:.3f} nats a datum"
            )
        return found

    def computed(self) -> Mapping[str, Any]:
        """What was asked for."""
        return {
            name: value
            for name, value in vars(self).items()
            if isinstance(getattr(type(self), name, None), cached_property) and name != "tree"
        }

    def made(self) -> str:
        """How, for who wants to make it again."""
        try:
            own = version("pyro-sparse")
        except PackageNotFoundError:  # run from a folder
            own = "unknown"
        return (
            f"Made by pyro_sparse {own} (pyro {pyro.__version__}, torch {torch.__version__}): "
            f"{len(self.y)} data, {self.num_samples} draws, seed {self.seed}. "
            "Verdicts hold for these data and draws; fine says that no fault was seen."
        )
