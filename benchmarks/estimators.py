"""Noise, bias and cost of the gradient estimators, the published ones among them.

    python -m benchmarks.estimators [--json FILE]

Small: 6 codes of one datum under a thresholded Laplace posterior with a fixed threshold, a tanh
decoder of 10 outputs; the exact gradient by enumerating the 64 supports, with a quasi-random
integral over the slab. Large: 64 codes, a decoder of two layers, a batch of 64; no enumeration, so
only noise and cost. Every estimator takes the draws that it asks for by default, and cost is that
of one step: all of its evaluations of the decoder, and the gradients of posterior and decoder.

``bias`` is the distance of the mean from the exact gradient over the size of the latter; next to it
stands what Monte Carlo alone gives an unbiased estimator. ``sd`` is the root of the summed
variances. ``SNR`` is ``|mean| / sd``, averaged over parameters, as published.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_sparse.distributions import SpikeAndSlab
from pyro_sparse.distributions.thresholded import ShiftedThresholded
from pyro_sparse.infer import (
    ControlVariate,
    DisARM,
    Estimator,
    ImplicitMixed,
    LeaveOneOut,
    LocalExpectation,
    SparseELBO,
    StraightThrough,
    SubGradient,
)

Parameters = dict[str, Tensor]
ESTIMATORS: dict[str, tuple[Estimator, int]] = {
    "straight-through": (StraightThrough(), 1),
    "  as released": (StraightThrough(as_released=True), 1),
    "sub-gradient": (SubGradient(), 1),
    "leave-one-out, J=1": (LeaveOneOut(), 1),
    "leave-one-out, J=2": (LeaveOneOut(), 2),
    "DisARM, J=2": (DisARM(), 2),
    "control variate": (ControlVariate(), 1),
    "local expectation": (LocalExpectation(), 1),
    "implicit mixed": (ImplicitMixed(), 1),
    "  never changing over": (ImplicitMixed(limit=math.inf), 1),
}


@dataclass
class Setting:
    """A decoder and a posterior; every program takes parameters of ``copies`` data."""

    decode: Callable[[Tensor], Tensor]
    y: Tensor
    noise: float
    start: Parameters
    calls: int = 0

    def programs(self, p: Parameters) -> tuple[Callable[[], None], Callable[[], None]]:
        size, atoms = p["loc"].shape
        prior = SpikeAndSlab(dist.Laplace(torch.zeros(atoms).to(p["loc"]), 0.3), 0.1)

        def model() -> None:
            with pyro.plate("data", size):
                codes = pyro.sample("codes", prior.to_event(1))
                self.calls += codes.shape[0] if codes.dim() > 2 else 1
                law = dist.Normal(self.decode(codes), self.noise).to_event(1)
                pyro.sample("obs", law, obs=self.y.expand(size, -1))

        def guide() -> None:
            base = dist.Laplace(p["loc"], p["log_scale"].exp())
            with pyro.plate("data", size):
                pyro.sample("codes", ShiftedThresholded(base, p["threshold"]).to_event(1))

        return model, guide

    def copies(self, count: int) -> Parameters:
        return {name: value.repeat(count, 1).requires_grad_() for name, value in self.start.items()}


def small() -> Setting:
    atoms = torch.randn(6, 10)
    loc = torch.randn(1, 6) * 0.6
    y = torch.randn(10).tanh()
    start = {
        "loc": loc,
        "log_scale": torch.full((1, 6), 0.25).log() + 0.2 * torch.randn(1, 6),
        "threshold": torch.full((1, 6), 0.2),
    }
    return Setting(lambda codes: (codes @ atoms).tanh(), y, 0.3, start)


def large() -> tuple[Setting, nn.Module]:
    decoder = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 100))
    start = {
        "loc": torch.randn(64, 64) * 0.5,
        "log_scale": torch.full((64, 64), 0.25).log(),
        "threshold": torch.full((64, 64), 0.3),
    }
    return Setting(decoder, torch.randn(64, 100), 0.3, start), decoder


def exact(setting: Setting, nodes: int = 2**13) -> Parameters:
    """Gradient of the ELBO of one datum, by enumeration of supports."""
    p = setting.copies(1)
    size = p["loc"].shape[1]
    sobol = torch.quasirandom.SobolEngine(size, scramble=True, seed=0)
    level = sobol.draw(nodes, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    slab = dist.Laplace(p["loc"], p["log_scale"].exp()).icdf(level)
    probs = (-p["threshold"] / p["log_scale"].exp()).exp()
    total = torch.zeros(())
    for support in itertools.product([0.0, 1.0], repeat=size):
        s = torch.tensor(support)
        weight = (s * probs + (1 - s) * (1 - probs)).prod()
        law = dist.Normal(setting.decode(s * slab), setting.noise)
        total = total + weight * law.log_prob(setting.y).sum(-1).mean()
    base = dist.Laplace(p["loc"], p["log_scale"].exp())
    prior = SpikeAndSlab(dist.Laplace(torch.zeros(1, size), 0.3), 0.1)
    total = total - kl_divergence(ShiftedThresholded(base, p["threshold"]), prior).sum()
    slopes = torch.autograd.grad(total, list(p.values()))
    return {name: slope[0] for name, slope in zip(p, slopes, strict=True)}


def gradients(setting: Setting, estimator: Estimator, draws: int, p: Parameters) -> Parameters:
    model, guide = setting.programs(p)
    elbo = SparseELBO(estimator, num_samples=draws, num_plates=1)
    loss = elbo.differentiable_loss(model, guide)
    found = torch.autograd.grad(loss, list(p.values()), allow_unused=True)
    return {
        name: torch.zeros_like(value) if slope is None else -slope
        for (name, value), slope in zip(p.items(), found, strict=True)
    }


def noise_small(copies: int) -> dict[str, dict[str, Any]]:
    setting = small()
    truth = exact(setting)
    rows = {}
    print(f"{'6 codes':24s}" + "".join(f"{n + ' bias (noise)':>24s}{'sd':>8s}" for n in truth))
    for name, (estimator, draws) in ESTIMATORS.items():
        found = gradients(setting, estimator, draws, setting.copies(copies))
        row: dict[str, Any] = {}
        line = f"{name:24s}"
        for key, slopes in found.items():
            size = truth[key].norm()
            sd = slopes.var(0).sum().sqrt()
            bias = (slopes.mean(0) - truth[key]).norm() / size
            floor = sd / math.sqrt(copies) / size
            row[key] = {
                "relative_bias": round(float(bias), 4),
                "of_noise_alone": round(float(floor), 4),
                "sd": round(float(sd), 3),
                "snr": round(float((slopes.mean(0).abs() / (slopes.std(0) + 1e-9)).mean()), 4),
            }
            line += f"{float(bias):16.3f} ({float(floor):.3f}){float(sd):8.2f}"
        rows[name] = row
        print(line)
    return rows


def noise_large(steps: int) -> dict[str, dict[str, Any]]:
    setting, decoder = large()
    weights = list(decoder.parameters())
    p = setting.copies(1)
    rows = {}
    print(
        f"\n{'64 codes, batch 64':24s}{'SNR post.':>10s}{'decoder':>9s}{'sd post.':>10s}"
        f"{'decoder':>9s}{'ms':>8s}{'decodes':>9s}"
    )
    for name, (estimator, draws) in ESTIMATORS.items():
        model, guide = setting.programs(p)
        elbo = SparseELBO(estimator, num_samples=draws, num_plates=1)
        both = [*p.values(), *weights]
        seconds, table = [], []
        for step in range(steps + 2):
            setting.calls = 0
            start = time.perf_counter()
            loss = elbo.differentiable_loss(model, guide) / 64
            found = torch.autograd.grad(loss, both, allow_unused=True)
            if step >= 2:
                seconds.append(time.perf_counter() - start)
                parts = [
                    (torch.zeros_like(value) if slope is None else slope).flatten()
                    for value, slope in zip(both, found, strict=True)
                ]
                table.append(torch.cat(parts))
        slopes = torch.stack(table)
        # Thresholds are left out: straight-through has no gradient for them, of no noise.
        cut, inner = 2 * p["loc"].numel(), 3 * p["loc"].numel()
        groups = {"posterior": slopes[:, :cut], "decoder": slopes[:, inner:]}
        row: dict[str, Any] = {}
        for key, part in groups.items():
            ratio = part.mean(0).abs() / (part.std(0) + 1e-9)
            row[f"snr_{key}"] = round(float(ratio.mean()), 4)
            row[f"sd_{key}"] = round(float(part.var(0).sum().sqrt()), 4)
        row["milliseconds"] = round(1e3 * statistics.median(seconds), 2)
        row["decodes"] = setting.calls
        rows[name] = row
        print(
            f"{name:24s}{row['snr_posterior']:10.3f}{row['snr_decoder']:9.3f}"
            f"{row['sd_posterior']:10.3f}{row['sd_decoder']:9.3f}"
            f"{row['milliseconds']:8.1f}{row['decodes']:9d}"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--copies", type=int, default=50_000)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    of_small = noise_small(options.copies)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    of_large = noise_large(options.steps)
    if options.json:
        record = {
            "command": f"python -m benchmarks.estimators --copies {options.copies} "
            f"--steps {options.steps} --threads {options.threads}",
            "seed": 0,
            "small": {"codes": 6, "outputs": 10, "copies": options.copies, "rows": of_small},
            "large": {"codes": 64, "outputs": 100, "batch": 64, "rows": of_large},
            "seconds": round(time.perf_counter() - began, 1),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "pyro": pyro.__version__,
            },
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
