"""Do data that the model makes at its posterior look like those that were observed?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_sparse.infer.runs import Program, Run, Runs

Statistic = Callable[[Tensor], Tensor]


def _mean(y: Tensor) -> Tensor:
    return y.reshape(len(y), -1).nanmean(1)


def _sd(y: Tensor) -> Tensor:
    flat = y.reshape(len(y), -1)
    return (flat - flat.nanmean(1, keepdim=True)).square().nanmean(1).sqrt()


def _smallest(y: Tensor) -> Tensor:
    return y.reshape(len(y), -1).nan_to_num(nan=torch.inf).amin(1)


def _largest(y: Tensor) -> Tensor:
    return y.reshape(len(y), -1).nan_to_num(nan=-torch.inf).amax(1)


STATISTICS: Mapping[str, Statistic] = {
    "mean": _mean,
    "sd": _sd,
    "min": _smallest,
    "max": _largest,
}
"""What data are compared by unless one says otherwise, each from ``(n, *signal_shape)``, with
``nan`` where nothing was observed, to ``(n,)``."""


@dataclass(frozen=True)
class PredictiveCheck:
    """Statistics of the data, and of data drawn anew at the posterior.

    Attributes:
        observed: Of each statistic, shape ``(n,)``.
        replicated: Of the draws, shape ``(num_samples, n)``. ``"log_likelihood"`` compares data and
            replicates at the same draw of the latents; of it both have that shape.

    Example:
        >>> check = PredictiveCheck({"max": torch.tensor([3.0])}, {"max": torch.zeros(99, 1)})
        >>> check.p_values["max"]
        tensor([0.0100], dtype=torch.float64)
    """

    observed: dict[str, Tensor]
    replicated: dict[str, Tensor]

    @property
    def p_values(self) -> dict[str, Tensor]:
        """Share of replicates at least as large as the data, of each datum, shape ``(n,)``.

        Ties count half. Never zero: the data count as one more replicate. Close to 0 or 1, data are
        unlike what the model makes. Of a model that is right they gather around 0.5, since the
        posterior has seen the data.
        """
        return {name: self._share(name, self.observed[name]) for name in self.replicated}

    @property
    def overall(self) -> dict[str, float]:
        """The same of the mean of a statistic over all data."""
        return {
            name: float(_tail(self.replicated[name].mean(1), self.observed[name].mean(-1)))
            for name in self.replicated
        }

    def _share(self, name: str, observed: Tensor) -> Tensor:
        return _tail(self.replicated[name], observed)

    def __str__(self) -> str:
        lines = ["statistic: p of the mean over all data, share of data with p < 0.01 or > 0.99"]
        for name, p in self.p_values.items():
            unlike = float(((p < 0.01) | (p > 0.99)).double().mean())
            lines.append(f"  {name}: {self.overall[name]:.3f}, {unlike:.1%}")
        return "\n".join(lines)


def predictive_check(
    model: Program,
    guide: Program,
    y: Tensor,
    *,
    statistics: Mapping[str, Statistic] | None = None,
    num_samples: int = 500,
    num_data: int | None = None,
    mask: Tensor | None = None,
    plate: str = "data",
    seed: int = 0,
    vectorize: bool = True,
    chunk_size: int | None = None,
) -> PredictiveCheck:
    r"""Compare data with draws from the posterior predictive distribution.

    At each draw of the guide, data are drawn anew from the model, and a statistic of them is
    compared with that of the observed ones. ``"log_likelihood"`` is always among them, a
    discrepancy :math:`T(y, z_s)` against :math:`T(y^{\mathrm{rep}}_s, z_s)`.

    Calibration (``sbc``) asks whether the posterior is that of the model; this asks whether the
    model is one of the data.

    Args:
        model: Generative program with one observed site of the shape of ``y``, called as in
            ``infer.log_weights``.
        guide: Variational program with the same latent sites.
        y: Data, shape ``(n, *signal_shape)``.
        statistics: Functions from data ``(n, *signal_shape)``, ``nan`` where nothing was observed,
            to numbers ``(n,)``, by name; default ``STATISTICS``: mean, sd, min and max of a datum.
        num_samples: Draws.
        num_data: Size of the whole data set; by default ``n``.
        mask: True where a sample was observed, broadcastable to ``y``.
        plate: Name of the plate of the data.
        seed: Seed of all draws.
        vectorize: As in ``infer.log_weights``.
        chunk_size: As in ``infer.log_weights``.

    Raises:
        TypeError: If a statistic is no function, or another argument is of the wrong kind.
        ValueError: If a statistic does not give one finite number for each datum, a name is taken,
            or ``infer.log_weights`` would refuse.
        NotImplementedError: If the model has several observed sites, or as in
            ``infer.log_weights``.

    References:
        Gelman, Meng & Stern (1996), Stat. Sinica 6; Gelman et al. (2013), Bayesian Data Analysis,
        sec. 6.3.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def model(y, num_data):
        ...     with pyro.plate("data", len(y)):
        ...         codes = pyro.sample("codes", dist.Normal(0.0, 1.0))
        ...         law = dist.Normal(codes.unsqueeze(-1), torch.ones(8)).to_event(1)
        ...         pyro.sample("obs", law, obs=y)
        >>> def guide(y, num_data):
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("codes", dist.Normal(y.sum(-1) / 9, 1 / 3))
        >>> y = torch.tensor([[-1.0, 1.0] * 4, [-1.0, 9.0] * 4])  # noise of size 1, and of size 5
        >>> predictive_check(model, guide, y).p_values["sd"] < 0.01
        tensor([False,  True])
    """
    chosen = STATISTICS if statistics is None else statistics
    wrong = [name for name, function in chosen.items() if not callable(function)]
    if wrong:
        raise TypeError(f"Expected statistics to be functions, got {wrong} that are not.")
    if "log_likelihood" in chosen:
        raise ValueError("Expected other names than 'log_likelihood', which is always compared.")
    runs = Runs(model, guide, y, num_data, mask=mask, plate=plate, seed=seed, vectorize=vectorize)
    if len(runs.observed) != 1:
        raise NotImplementedError(
            f"Expected a model with one observed site, got {list(runs.observed)}."
        )
    ((site, data),) = runs.observed.items()
    hidden = data.isnan()
    observed = {name: _value(name, function, data) for name, function in chosen.items()}
    replicated: dict[str, list[Tensor]] = {name: [] for name in chosen}
    likelihood: dict[str, list[Tensor]] = {"data": [], "replicates": []}

    def collect(run: Run) -> None:
        again = run.predictive()
        values = again.value(site)
        values = torch.where(hidden, torch.nan, values) if bool(hidden.any()) else values
        for name, function in chosen.items():
            replicated[name].append(torch.stack([_value(name, function, one) for one in values]))
        likelihood["data"].append(run.log_p[site])
        densities = runs.log_densities(again.model_trace, run.size)
        likelihood["replicates"].append(densities[site])

    runs.each(num_samples, chunk_size, collect)
    of_draws: dict[str, Any] = {name: torch.cat(parts) for name, parts in likelihood.items()}
    return PredictiveCheck(
        observed={**observed, "log_likelihood": of_draws["data"]},
        replicated={
            **{name: torch.cat(parts) for name, parts in replicated.items()},
            "log_likelihood": of_draws["replicates"],
        },
    )


def _value(name: str, function: Statistic, data: Tensor) -> Tensor:
    value = function(data)
    if not isinstance(value, Tensor) or value.shape != (len(data),) or not value.isfinite().all():
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"Expected statistic {name!r} to give a finite number for each datum, shape "
            f"({len(data)},), got {found}. Masked samples are nan: use nanmean and the like."
        )
    return value.detach().double()


def _tail(replicated: Tensor, observed: Tensor) -> Tensor:
    larger = (replicated > observed).double() + (replicated == observed).double() / 2
    return (larger.sum(0) + 1) / (len(replicated) + 1)
