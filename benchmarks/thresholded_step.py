"""Time of one step of the thresholded guide beside the same arithmetic in raw torch.

    python -m benchmarks.thresholded_step [--json FILE]

Spike-and-slab codes with a Laplace slab, 256 atoms, 256 features, batch 256, an MLP encoder
256-512-1024-512-256 with three heads, one Adam step on encoder and dictionary; J = 20 draws with
the pathwise gradient through the mixed quantile, or none with the exact expectation. The raw
version holds the same parameters and computes the same loss (asserted; the sampled one with the
same noise) without Pyro, modules or distributions. All versions take turns; medians are over the
rounds, and the ratio is taken round by round.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, logsigmoid

from pyro_sparse.dictionaries import Dense
from pyro_sparse.distributions import SpikeAndSlab
from pyro_sparse.guides import Heads, SpikeAndSlabPosterior, Thresholded
from pyro_sparse.infer import Exact, ImplicitMixed, SparseELBO
from pyro_sparse.infer.estimators import Estimator
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding

BATCH, FEATURES, ATOMS, DRAWS = 256, 256, 256, 20
NOISE, SLAB, PROBS, RATE = 0.5, 0.5, 0.1, 1e-4
WIDTHS = [256, 512, 1024, 512, 256]


def programs() -> tuple[SparseCoding, Thresholded]:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in zip(WIDTHS, WIDTHS[1:], strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    family = SpikeAndSlabPosterior(dist.Laplace)
    guide = Thresholded(Heads(nn.Sequential(*layers), WIDTHS[-1], ATOMS, family.names), family)
    prior = SpikeAndSlab(dist.Laplace(0.0, SLAB), PROBS)
    return SparseCoding(Dense(ATOMS, FEATURES), Gaussian(NOISE), prior), guide


def library_step(y: Tensor, estimator: Estimator, draws: int) -> Callable[[], float]:
    model, guide = programs()
    objective = SparseELBO(estimator, num_samples=draws)(model, guide)
    optimizer = torch.optim.Adam(objective.parameters(), lr=RATE)

    def step() -> float:
        optimizer.zero_grad()
        loss = objective(y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def raw_step(y: Tensor, *, exact: bool) -> Callable[[], float]:
    """The same step written out by hand."""
    model, guide = programs()
    parameters = [p.detach().clone().requires_grad_() for p in guide.parameters()]
    raw = model.dictionary.atoms.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([*parameters, raw], lr=RATE)
    layers = list(zip(parameters[::2], parameters[1::2], strict=True))
    prior_logit = math.log(PROBS / (1 - PROBS))
    constant = math.log(NOISE * math.sqrt(2 * math.pi))
    log_on, log_off = -math.log1p(math.exp(-prior_logit)), -math.log1p(math.exp(prior_logit))

    def step() -> float:
        optimizer.zero_grad()
        atoms = raw / raw.norm(dim=1, keepdim=True)
        hidden = y
        for weight, bias in layers[:-3]:
            hidden = linear(hidden, weight, bias).relu()
        loc, log_scale, logits = (linear(hidden, *layer) for layer in layers[-3:])
        scale, g, off = log_scale.exp(), logits.sigmoid(), (-logits).sigmoid()
        size = loc.abs()
        slab = (SLAB / scale).log() + size / SLAB + scale / SLAB * (-size / scale).exp() - 1
        gates = g * (logsigmoid(logits) - log_on) + off * (logsigmoid(-logits) - log_off)
        kl = (gates + g * slab).sum()
        if exact:
            mean = g * loc
            variance = g * (2 * scale.square() + off * loc.square())
            error = (y - mean @ atoms).square() + variance @ atoms.square()
            fit = error.sum() / (2 * NOISE**2)
        else:
            shape = (DRAWS, *loc.shape)
            noise = torch.rand(shape) * (2 - torch.finfo(y.dtype).eps) + (
                torch.finfo(y.dtype).eps - 1
            )
            codes = loc - scale * noise.sign() * (-noise.abs()).log1p()
            active = torch.rand(shape) < g
            with torch.no_grad():
                distance = codes - loc
                below, above = distance < 0, codes > 0
                far = 2 * (distance.abs() / scale).expm1() * scale + scale
                velocity = torch.where(above == below, far, scale)
                velocity = torch.where(above, velocity, -velocity) * off
                velocity = torch.where(active, velocity, torch.zeros_like(velocity))
            value = torch.where(active, codes, torch.zeros_like(codes))
            value = value + velocity * (logits - logits.detach())
            fit = (y - value @ atoms).square().sum() / (2 * NOISE**2 * DRAWS)
        loss = fit + y.numel() * constant + kl
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    codes = torch.randn(BATCH, ATOMS) * (torch.rand(BATCH, ATOMS) < PROBS)
    y = codes @ nn.functional.normalize(torch.randn(ATOMS, FEATURES), dim=1)
    y = y + NOISE * torch.randn(BATCH, FEATURES)

    rows = {}
    for name, exact in ((f"sampled, J = {DRAWS}", False), ("exact", True)):
        estimator: Estimator = Exact() if exact else ImplicitMixed(math.inf)
        raw = raw_step(y, exact=exact)
        library = library_step(y, estimator, 1 if exact else DRAWS)
        first = []
        for step in (raw, library):
            torch.manual_seed(2)
            first.append(step())
        assert math.isclose(*first, rel_tol=1e-2), first
        for _ in range(2):
            raw(), library()
        times: dict[str, list[float]] = {"raw torch": [], "pyro_sparse": []}
        for _ in range(options.rounds):
            for key, step in (("raw torch", raw), ("pyro_sparse", library)):
                start = time.perf_counter()
                step()
                times[key].append(time.perf_counter() - start)
        ratios = [a / b for a, b in zip(times["pyro_sparse"], times["raw torch"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        rows[name] = {
            **{f"{key} ms": round(1e3 * statistics.median(t), 2) for key, t in times.items()},
            "ratio": round(median, 3),
            "ratio_quartiles": [round(low, 3), round(high, 3)],
        }
        print(name, rows[name])
    if options.json:
        record = {
            "command": f"python -m benchmarks.thresholded_step --rounds {options.rounds} "
            f"--threads {options.threads}",
            "sizes": {"batch": BATCH, "features": FEATURES, "atoms": ATOMS, "draws": DRAWS},
            "seed": 0,
            "steps": rows,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "pyro": pyro.__version__,
            },
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
