"""What `benchmarks.vsc` measures of a trained posterior, all from the same draws."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.vsc_methods import Method
from benchmarks.vsc_settings import Setting
from pyro_sparse import infer

SAMPLES, SHOWN, CHUNK = 100, 20, 100
BOUNDS = (1, 20, 100)
COMPARED = 400
"""Groups of data at most whose bounds are kept, for differences of methods."""
USED = 0.01
"""A code is used if its posterior mean varies over the data by this part of the prior variance
(the active units of Burda, Grosse & Salakhutdinov, 2016)."""


def bounds(local: Tensor) -> dict[int, Tensor]:
    """Importance-weighted bounds of every datum from log-weights ``(SAMPLES, n)``, nats."""
    found = {}
    for count in BOUNDS:
        groups = local.reshape(-1, count, local.shape[1])
        found[count] = (groups.logsumexp(1) - math.log(count)).mean(0)
    return found


def jaccard(active: Tensor) -> Tensor:
    """Mean index |A and B| / |A or B| of all pairs of supports, ``(draws, n, atoms)`` to ``(n,)``.

    Two empty supports are alike.
    """
    a = active.float().transpose(0, 1)  # (n, draws, atoms)
    both = a @ a.mT
    size = a.sum(-1)
    either = size[:, :, None] + size[:, None] - both
    index = torch.where(either > 0, both / either.clamp(min=1), 1.0)
    draws = active.shape[0]
    return (index.sum((1, 2)) - draws) / (draws * (draws - 1))


def clustered(values: Tensor, together: int) -> tuple[float, float, Tensor]:
    """Mean, its standard error over groups of ``together`` data, and the groups' means."""
    groups = values.double().reshape(-1, together).mean(1)
    return float(groups.mean()), float(groups.std() / math.sqrt(len(groups))), groups


def measure(
    setting: Setting, method: Method, model: Any, guide: Any, y: Tensor, together: int
) -> dict[str, Any]:
    """All measures of some data, of which each ``together`` in succession are of one picture."""
    if method.kind == "point":
        return _of_points(model, guide, y, together)
    weighed, weighing = method.weighable(setting.around(model), guide)
    parts: dict[str, list[Tensor]] = {}
    totals: dict[str, Tensor] = {}

    def keep(name: str, values: Tensor) -> None:
        parts.setdefault(name, []).append(values)

    def add(name: str, values: Tensor) -> None:
        totals[name] = totals.get(name, torch.zeros(())) + values.double().sum(0)

    for number, chunk in enumerate(y.split(CHUNK)):
        weights = infer.log_weights(
            weighed, weighing, chunk, num_samples=SAMPLES, seed=number, chunk_size=SHOWN
        )
        for count, values in bounds(weights.local).items():
            keep(f"bound {count}", values)
        codes = weights.draws["codes"]  # (SAMPLES, n, atoms)
        with torch.no_grad():
            shown = codes[:SHOWN]
            error = (setting.decode(model, shown) - chunk).square().mean(-1)  # (SHOWN, n)
            keep("single draw", error.mean(0))
            keep("best of 20", error.amin(0))
            mean = codes.mean(0)
            keep("posterior mean", (setting.decode(model, mean) - chunk).square().mean(-1))
            keep("active codes", (shown != 0).float().sum(-1).mean(0))
            keep("jaccard", jaccard(shown != 0))
            add("mean", mean)
            add("square", mean.square() - codes.var(0) / SAMPLES)
            add("small", (codes[0].abs() <= 0.01).float())
    means = {name: clustered(torch.cat(values), together) for name, values in parts.items()}
    varies = totals["square"] / len(y) - (totals["mean"] / len(y)).square()
    used = varies > USED * method.prior_variance
    bound = {f"J={count}": [round(v, 3) for v in means[f"bound {count}"][:2]] for count in BOUNDS}
    return {
        "bound": bound,
        "squared_error_per_pixel": {
            name: [round(v, 5) for v in means[name][:2]]
            for name in ("single draw", "best of 20", "posterior mean")
        },
        "active_codes": round(means["active codes"][0], 2),
        "jaccard": round(means["jaccard"][0], 4),
        "used_codes": int(used.sum()),
        "collapsed_coefficients": int((totals["small"] >= 0.95 * len(y)).sum()),
        "used": used.nonzero().flatten().tolist(),
        "by_picture": {
            f"J={count}": [round(v, 3) for v in means[f"bound {count}"][2].tolist()]
            for count in BOUNDS
        }
        if len(y) // together <= COMPARED
        else {},
    }


def _of_points(model: Any, guide: Any, y: Tensor, together: int) -> dict[str, Any]:
    """Of codes without a posterior: no bound."""
    with torch.no_grad():
        codes = torch.cat([guide.encode(chunk) for chunk in y.split(CHUNK)])
        error = (model.dictionary(codes) - y).square().mean(-1)
    mean = clustered(error, together)
    rare = ((codes.abs() <= 0.01).double().mean(0) >= 0.95).sum()
    used = codes.abs().amax(0) > 0
    return {
        "squared_error_per_pixel": {"single draw": [round(v, 5) for v in mean[:2]]},
        "active_codes": round(float((codes != 0).double().sum(1).mean()), 2),
        "used_codes": int(used.sum()),
        "collapsed_coefficients": int(rare),
        "used": used.nonzero().flatten().tolist(),
    }
