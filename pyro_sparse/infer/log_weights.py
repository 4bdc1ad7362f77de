"""Importance log-weights of a guide, over all sites, for each datum apart."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_sparse.infer.runs import Program, Run, Runs


@dataclass(frozen=True)
class LogWeights:
    r"""Importance log-weights :math:`\log p - \log q` of draws from a guide, in nats, float64.

    With :math:`\theta` for the sites outside the plate of the data and :math:`z_n` for those
    inside,

    .. math::
        \mathtt{local}_{sn} &= \log p(y_n, z_{sn} \mid \theta_s) - \log q(z_{sn} \mid \theta_s) \\
        \mathtt{shared}_s &= \log p(\theta_s) - \log q(\theta_s)

    Attributes:
        local: Of the sites inside the plate of the data, not scaled; shape ``(num_samples, n)``.
        shared: Of all other sites, shape ``(num_samples,)``; zero if there are none.
        log_p: Log-density of each site of the model, observed ones included: shape
            ``(num_samples, n)``, or ``(num_samples,)`` outside the plate of the data.
        log_q: Likewise of each site of the guide, auxiliary ones included.
        draws: Values of the latent sites of the model, shape ``(num_samples, *plates, *event)``;
            empty if they were not asked for.
        num_data: Size of the whole data set, ``>= n``.

    Example:
        >>> local, shared = torch.zeros(100, 3), torch.full((100,), -0.5)
        >>> weights = LogWeights(local, shared, log_p={}, log_q={}, draws={}, num_data=30)
        >>> weights.joint.mean()  # an estimate of the ELBO
        tensor(-0.5000)
    """

    local: Tensor
    shared: Tensor
    log_p: dict[str, Tensor]
    log_q: dict[str, Tensor]
    draws: dict[str, Tensor] = field(repr=False)
    num_data: int

    @property
    def joint(self) -> Tensor:
        """Log-weight of all data together, ``shared + num_data / n * local.sum``; ``(samples,)``.

        Its mean estimates the ELBO. Its spread grows with the number of data, however good the
        guide is for each: read ``diagnostics.khat`` of the local weights.
        """
        return self.shared + self.local.sum(1) * (self.num_data / self.local.shape[1])


def log_weights(
    model: Program,
    guide: Program,
    y: Tensor,
    *,
    num_samples: int = 1000,
    num_data: int | None = None,
    mask: Tensor | None = None,
    plate: str = "data",
    seed: int = 0,
    vectorize: bool = True,
    chunk_size: int | None = None,
    keep_draws: bool = True,
) -> LogWeights:
    r"""Draw from a guide and weight each draw against the model.

    .. math:: \log p(y, z) - \log q(z), \qquad z \sim q

    over *all* sites, with densities of one measure in both: relative to Lebesgue plus unit mass at
    zero for laws with an atom there. An autoguide's auxiliary sites are counted, and the Jacobians
    of its transformations. The scales of plates and of ``poutine.scale`` are not: the weights of
    one datum do not depend on the size of the data set.

    Both programs are called as ``program(y, num_data)``, with ``mask=`` where one is given. No
    gradient is kept, and Pyro's parameter store, torch's random state and running means are those
    of before. Functions find their ``pyro.param`` in the store; modules bring their own parameters.

    Args:
        model: Generative program, a module or a function.
        guide: Variational program with the same latent sites.
        y: Data, shape ``(n, *signal_shape)``.
        num_samples: Draws for each datum.
        num_data: Size of the whole data set; by default ``n``.
        mask: True where a sample was observed, broadcastable to ``y``.
        plate: Name of the plate of the data.
        seed: Seed of the draws. They also depend on ``chunk_size`` and ``vectorize``.
        vectorize: Make many draws in one run, in a plate left of all others. The first is checked
            against a run of its own. False makes one run a draw, for programs that do not take
            leading dimensions, such as one that samples the atoms of a ``Conv``.
        chunk_size: Draws in one run, which bounds the memory; default as many as keep a run below
            some two million values.
        keep_draws: Return the draws too: ``num_samples`` times the latent sites.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a number is out of range; the latent sites of the two differ; only one of
            them has an atom at zero; a site of the guide is a point estimate; a program does not
            take leading dimensions; or a log-density is not finite.
        NotImplementedError: If the plate of the data is sequential, takes a part of ``y`` itself,
            or the guide ties the data together; if another plate is subsampled; or a site is
            enumerated in the model alone.

    References:
        Vehtari et al. (2024), J. Mach. Learn. Res. 25(72), for what the weights are good for; Yao
        et al. (2018), ICML, for the weights of a variational posterior.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def model(y, num_data):
        ...     with pyro.plate("data", num_data, subsample_size=len(y)):
        ...         codes = pyro.sample("codes", dist.Normal(0.0, 1.0))
        ...         pyro.sample("obs", dist.Normal(codes, 1.0), obs=y)
        >>> def guide(y, num_data):
        ...     with pyro.plate("data", num_data, subsample_size=len(y)):
        ...         pyro.sample("codes", dist.Normal(y / 2, 0.5**0.5))
        >>> weights = log_weights(model, guide, torch.tensor([0.0, 2.0]), num_samples=100)
        >>> weights.local.std(0) < 1e-5  # an exact guide: every weight is the evidence
        tensor([True, True])
    """
    runs = Runs(model, guide, y, num_data, mask=mask, plate=plate, seed=seed, vectorize=vectorize)
    log_p: dict[str, list[Tensor]] = {}
    log_q: dict[str, list[Tensor]] = {}
    draws: dict[str, list[Tensor]] = {}

    def collect(run: Run) -> None:
        values = {name: run.value(name) for name in runs.latent} if keep_draws else {}
        for kept, found in ((log_p, run.log_p), (log_q, run.log_q), (draws, values)):
            for name, value in found.items():
                kept.setdefault(name, []).append(value)

    runs.each(num_samples, chunk_size, collect)
    of_model = {name: torch.cat(parts) for name, parts in log_p.items()}
    of_guide = {name: torch.cat(parts) for name, parts in log_q.items()}
    local_p, shared_p = runs.totals(of_model, num_samples)
    local_q, shared_q = runs.totals(of_guide, num_samples)
    return LogWeights(
        local=local_p - local_q,
        shared=shared_p - shared_q,
        log_p=of_model,
        log_q=of_guide,
        draws={name: torch.cat(parts) for name, parts in draws.items()},
        num_data=runs.num_data,
    )
