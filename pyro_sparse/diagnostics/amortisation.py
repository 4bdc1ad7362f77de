"""What an encoder gives away, and what its family does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_sparse.infer.log_weights import log_weights
from pyro_sparse.infer.numbers import check_whole
from pyro_sparse.infer.runs import Program
from pyro_sparse.ops import check_tensor


@dataclass(frozen=True)
class AmortisationGap:
    r"""Bounds of each datum, and what lies between them; nats, float64, shape ``(n,)``.

    .. math:: \log p(y) - \mathrm{ELBO} = \underbrace{\log p(y) -
        \mathrm{ELBO}_{\text{refined}}}_{\text{approximation}} +
        \underbrace{\mathrm{ELBO}_{\text{refined}} - \mathrm{ELBO}}_{\text{amortisation}}

    Attributes:
        bound: Evidence lower bound of the guide.
        refined: That of the same family with parameters of its own for each datum.
        se: Standard error of their difference, from the draws.
        log_evidence: What both bound, or None if it was not given.

    Example:
        >>> import torch
        >>> gap = AmortisationGap(torch.tensor([-3.0]), torch.tensor([-2.0]), torch.zeros(1), None)
        >>> gap.amortisation
        tensor([1.])
    """

    bound: Tensor
    refined: Tensor
    se: Tensor
    log_evidence: Tensor | None

    @property
    def amortisation(self) -> Tensor:
        """What the encoder gives away; below zero where refining did not help."""
        return self.refined - self.bound

    @property
    def approximation(self) -> Tensor:
        """What the family gives away.

        Raises:
            ValueError: If the log evidence was not given.
        """
        if self.log_evidence is None:
            raise ValueError(
                "Expected a log evidence. Pass log_evidence=, such as "
                "infer.enumerate_posterior(...).log_evidence, to amortisation_gap."
            )
        return self.log_evidence - self.refined

    def __str__(self) -> str:
        size = len(self.bound)
        mean, spread = float(self.amortisation.mean()), float(self.se.square().sum().sqrt()) / size
        lines = [
            f"{size} data, bound {float(self.bound.mean()):.3f} nats a datum",
            f"  amortisation gap {mean:.3f} +- {spread:.3f} nats a datum",
        ]
        if self.log_evidence is not None:
            lines.append(f"  approximation gap {float(self.approximation.mean()):.3f}")
        return "\n".join(lines)


def amortisation_gap(
    model: Program,
    guide: Program,
    y: Tensor,
    *,
    refined: Program | None = None,
    log_evidence: Tensor | None = None,
    num_steps: int = 500,
    num_samples: int = 200,
    mask: Tensor | None = None,
    plate: str = "data",
    seed: int = 0,
    vectorize: bool = True,
) -> AmortisationGap:
    """How much better a guide does with parameters of its own for each datum.

    Both bounds are means of log-weights of draws, so they serve any model and guide and count all
    sites inside the plate of the data.

    Args:
        model: Generative program, called as in ``infer.log_weights``.
        guide: Amortised guide.
        y: Data, shape ``(n, *signal_shape)``.
        refined: The better guide; by default ``guide.refine(model, y)``.
        log_evidence: Exact log evidence of each datum in nats, shape ``(n,)``, such as that of
            ``infer.enumerate_posterior``; with it the gap of the family is known too.
        num_steps: Steps of refining.
        num_samples: Draws at each datum, ``>= 2``.
        mask: True where a sample was observed, broadcastable to ``y``.
        plate: Name of the plate of the data.
        seed: Seed of the draws.
        vectorize: As in ``infer.log_weights``.

    Raises:
        TypeError: If there is no ``refined`` and ``guide`` cannot be refined, or an argument is of
            the wrong kind.
        ValueError: If the shape of ``log_evidence`` does not fit, or ``infer.log_weights`` would
            refuse.
        NotImplementedError: As in ``infer.log_weights``.

    References:
        Cremer, Li & Duvenaud (2018), ICML, PMLR 80:1078-1086.

    Example:
        >>> import pyro
        >>> import torch
        >>> import pyro.distributions as dist
        >>> def model(y, num_data):
        ...     with pyro.plate("data", len(y)):
        ...         codes = pyro.sample("codes", dist.Normal(0.0, 1.0))
        ...         pyro.sample("obs", dist.Normal(codes, 1.0), obs=y)
        >>> def guide(y, num_data, slope=0.4):
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("codes", dist.Normal(slope * y, 0.5**0.5))
        >>> exact = lambda y, num_data: guide(y, num_data, 0.5)
        >>> gap = amortisation_gap(model, guide, torch.tensor([0.0, 3.0]), refined=exact)
        >>> (gap.amortisation - torch.tensor([0.0, 0.09])).abs() < 4 * gap.se + 1e-6
        tensor([True, True])
    """
    check_whole("num_samples", num_samples, 2)
    if log_evidence is not None:
        check_tensor("log_evidence", log_evidence)
        if log_evidence.shape != y.shape[:1]:
            raise ValueError(
                f"Expected log_evidence of shape {tuple(y.shape[:1])}, one for each datum, got "
                f"{tuple(log_evidence.shape)}."
            )
    if refined is None:
        if not hasattr(guide, "refine"):
            raise TypeError(
                "Expected a guide with a method refine, such as guides.Thresholded, got "
                f"{type(guide).__name__}. Pass refined=, a better guide of the same data."
            )
        refined = guide.refine(model, y, mask=mask, num_steps=num_steps)
    options: dict[str, Any] = {
        "num_samples": num_samples,
        "mask": mask,
        "plate": plate,
        "seed": seed,
        "vectorize": vectorize,
        "keep_draws": False,
    }
    weights = [log_weights(model, program, y, **options).local for program in (guide, refined)]
    # Equal seeds: much of the noise of the two is shared.
    variance = (weights[1] - weights[0]).var(0) / num_samples
    return AmortisationGap(
        bound=weights[0].mean(0),
        refined=weights[1].mean(0),
        se=variance.sqrt(),
        log_evidence=None if log_evidence is None else log_evidence.detach().double(),
    )
