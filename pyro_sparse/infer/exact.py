"""Exact posteriors of small spike-and-slab problems, by enumeration of all supports."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from pyro_sparse.dictionaries import Dictionary
from pyro_sparse.dictionaries.base import check_sizes
from pyro_sparse.distributions import Prior
from pyro_sparse.distributions.mixed import WithAtom
from pyro_sparse.likelihoods import Likelihood
from pyro_sparse.solvers.linear_gaussian import LinearGaussian, linear_gaussian

MAX_CODES = 14
"""Codes of one datum up to which supports are enumerated: cost and memory double with each."""

CHUNK_BYTES = 2**28
"""What the tables of one chunk of data, or of draws, may take."""


class ExactPosterior(TorchDistribution):
    r"""Exact posterior of spike-and-slab codes under Gaussian noise, from ``enumerate_posterior``.

    .. math:: p(z \mid y) = \sum_{s \in \{0, 1\}^K} p(s \mid y)\,
        \mathcal N(z_s; m_s, \Sigma_s) \prod_{k \notin s} \delta_0(z_k)

    A Pyro distribution of batch shape ``(n,)`` and event shape ``code_shape``, so that a guide can
    sample ``"codes"`` from it: its evidence lower bound then is the log evidence, with no variance.
    Densities are relative to Lebesgue measure plus unit mass at zero for each code. All results are
    float64, whatever the data; draws have the dtype of the data, and ``log_prob`` takes either.

    Attributes:
        log_evidence: :math:`\log p(y)` in nats, shape ``(n,)``.
        log_support_prob: :math:`\log p(s \mid y)`, shape ``(n, 2**K)``.
        prob_active: Probability that a code is not zero, shape ``(n, *code_shape)``.
        mean: Mean of the codes, zeros counted, shape ``(n, *code_shape)``.
        variance: Variance of the codes, zeros counted, shape ``(n, *code_shape)``.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_sparse.dictionaries import Dense
        >>> from pyro_sparse.distributions.mixed import SpikeAndSlab
        >>> from pyro_sparse.likelihoods import Gaussian
        >>> prior = SpikeAndSlab(dist.Normal(0.0, 1.0), probs=0.1)
        >>> posterior = enumerate_posterior(torch.zeros(5, 8), Dense(4, 8), prior, Gaussian(0.5))
        >>> isinstance(posterior, ExactPosterior), posterior.sample().shape
        (True, torch.Size([5, 4]))
        >>> posterior.log_support_prob.shape
        torch.Size([5, 16])
    """

    has_rsample = False
    arg_constraints = {}

    def __init__(self, tables: _Tables, *, validate_args: bool | None = None) -> None:
        self._tables = tables
        super().__init__(tables.log_evidence.shape, tables.code_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Reals with an atom at zero; a constraint without a bijection."""
        return constraints.independent(WithAtom(constraints.real), len(self.event_shape))

    @property
    def log_evidence(self) -> Tensor:
        """Log-density of each datum, in nats, shape ``(n,)``."""
        return self._tables.log_evidence

    @property
    def log_support_prob(self) -> Tensor:
        """Log-probability of each support given the datum, shape ``(n, 2**K)``."""
        return self._tables.log_support_prob

    @property
    def supports(self) -> Tensor:
        """Which codes each support holds: boolean, shape ``(2**K, *code_shape)``; first none."""
        flat = _supports(self.event_shape.numel(), self.log_evidence.device)
        return flat.reshape(-1, *self.event_shape)

    @property
    def prob_active(self) -> Tensor:
        """Probability that a code is not zero, shape ``(n, *code_shape)``."""
        return self._unflatten(self._tables.prob_active)

    @property
    def mean(self) -> Tensor:
        """Mean of the codes, zeros counted, shape ``(n, *code_shape)``."""
        return self._unflatten(self._tables.mean)

    @property
    def variance(self) -> Tensor:
        """Variance of the codes, zeros counted, shape ``(n, *code_shape)``."""
        return self._unflatten(self._tables.variance)

    def covariance(self) -> Tensor:
        """Covariance of the codes, flattened; float64, shape ``(n, K, K)``.

        Factorises every support anew, ``n * 2**K * K**3`` operations.
        """
        tables = self._tables
        size, batch = self.event_shape.numel(), self.batch_shape
        each = 8 * 4 * size**2 * max(batch.numel(), 1)
        total = tables.mean.new_zeros(*batch, size, size)
        weight = tables.log_support_prob.exp().movedim(-1, 0)  # (2**K, n)
        supports = _supports(size, total.device)
        step = max(1, CHUNK_BYTES // each)
        for part, probs in zip(supports.split(step), weight.split(step)):
            active = part.reshape(-1, *[1] * len(batch), size)
            factor, loc = tables.slab(active)  # (supports, n, K, K)
            inner = torch.cholesky_inverse(factor) * (active.unsqueeze(-1) & active.unsqueeze(-2))
            centre = loc * tables.scale - tables.mean
            spread = inner * tables.scale * tables.scale.unsqueeze(-1)
            spread += centre.unsqueeze(-1) * centre.unsqueeze(-2)
            total += (probs[..., None, None] * spread).sum(0)
        return total

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw codes, exact and independent, with exact zeros.

        Returns:
            Shape ``sample_shape + (n, *code_shape)``, detached, dtype of the data.
        """
        tables = self._tables
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            law = torch.distributions.Categorical(
                logits=tables.log_support_prob, validate_args=False
            )
            index = law.sample(torch.Size([math.prod(sample_shape)]))  # (draws, n)
            num_codes = self.event_shape.numel()
            each = 8 * 3 * num_codes**2 * max(index[0:1].numel(), 1)
            parts = index.split(max(1, CHUNK_BYTES // each))
            codes = torch.cat([tables.draw(part) for part in parts])
        return codes.reshape(shape).to(tables.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of codes, float64, shape of ``value`` without ``code_shape``."""
        if self._validate_args:
            self._validate_sample(value)
        flat = value.detach().double().flatten(value.dim() - len(self.event_shape))
        return self._tables.log_prob(flat)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ExactPosterior:
        """The same law with more batch dimensions in front."""
        new = self._get_checked_instance(ExactPosterior, _instance)
        batch_shape = torch.Size(batch_shape)
        new._tables = self._tables.expand(batch_shape)
        super(ExactPosterior, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _unflatten(self, value: Tensor) -> Tensor:
        return value.reshape(*value.shape[:-1], *self.event_shape)


@dataclass(frozen=True)
class _Tables:
    """What an exact posterior rests on; codes flattened, in units of the prior's slab.

    ``u = z / scale`` has, on a support, the precision ``precision`` (its rows and columns) and the
    mean ``precision^-1 shift``. Its eigenvalues are at least one, however alike the atoms.
    """

    log_evidence: Tensor  # (n,)
    log_support_prob: Tensor  # (n, 2**K)
    prob_active: Tensor  # (n, K)
    mean: Tensor  # (n, K)
    variance: Tensor  # (n, K)
    precision: Tensor  # (n, K, K)
    shift: Tensor  # (n, K)
    scale: Tensor  # (K,)
    code_shape: torch.Size
    dtype: torch.dtype

    def expand(self, batch_shape: torch.Size) -> _Tables:
        old = self.log_evidence.dim()
        names = ("log_evidence", "log_support_prob", "prob_active", "mean", "variance")
        parts = {name: getattr(self, name) for name in (*names, "precision", "shift")}
        return replace(
            self, **{name: x.expand(*batch_shape, *x.shape[old:]) for name, x in parts.items()}
        )

    def slab(self, active: Tensor) -> tuple[Tensor, Tensor]:
        """Cholesky factor of the precision, and mean, of ``u`` on the given supports.

        Inactive codes get a unit row and the mean zero.
        """
        both = active.unsqueeze(-1) & active.unsqueeze(-2)
        unit = torch.eye(active.shape[-1], dtype=self.shift.dtype, device=self.shift.device)
        factor = torch.linalg.cholesky(torch.where(both, self.precision, unit))
        shift = torch.where(active, self.shift, torch.zeros_like(self.shift))
        return factor, torch.cholesky_solve(shift.unsqueeze(-1), factor).squeeze(-1)

    def draw(self, index: Tensor) -> Tensor:
        """Codes ``(draws, n, K)`` of the supports ``index``, shape ``(draws, n)``."""
        active = _supports(len(self.scale), index.device)[index]
        factor, loc = self.slab(active)
        noise = torch.randn_like(loc).unsqueeze(-1)
        noise = torch.linalg.solve_triangular(factor.mT, noise, upper=True).squeeze(-1)
        return torch.where(active, (loc + noise) * self.scale, torch.zeros_like(loc))

    def log_prob(self, codes: Tensor) -> Tensor:
        """Mixed log-density of codes ``(..., n, K)``."""
        active = codes != 0
        powers = 2 ** torch.arange(len(self.scale), device=codes.device)
        index = (active * powers).sum(-1)
        shape = torch.broadcast_shapes(index.shape, self.log_evidence.shape)
        table = self.log_support_prob.expand(*shape, -1)
        chosen = table.gather(-1, index.expand(shape).unsqueeze(-1)).squeeze(-1)
        factor, loc = self.slab(active)
        # No noise in the rows of inactive codes: value and mean are zero there.
        distance = (factor.mT @ (codes / self.scale - loc).unsqueeze(-1)).squeeze(-1)
        log_volume = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        unit = torch.where(active, self.scale.log() + math.log(2 * math.pi) / 2, 0.0)
        return chosen + log_volume - unit.sum(-1) - distance.square().sum(-1) / 2


def enumerate_posterior(
    y: Tensor,
    dictionary: Dictionary,
    prior: Prior,
    likelihood: Likelihood,
    *,
    rate: Tensor | None = None,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
) -> ExactPosterior:
    r"""Exact posterior and evidence of spike-and-slab codes, by a sum over all supports.

    On a support :math:`s` the slab integrates out: with noise :math:`W^{-1}`, slab
    :math:`\mathcal N(\mu, \tau^2)`, :math:`P = I + \tau A W A^T \tau` and :math:`h = \tau A W y +
    \mu / \tau`,

    .. math:: \log p(y, s) = \log p(s) + \log \mathcal N(y; 0, W^{-1}) + \tfrac12 \left(
        h_s^T P_{ss}^{-1} h_s - \log |P_{ss}| - \|\mu_s / \tau_s\|^2 \right)

    Supports are built by doubling: each code in turn is swept into a copy of all the supports
    before it, so that a support costs one step of elimination instead of a factorisation, and
    data that share their mask share the matrices. Computed and returned in float64. The
    eigenvalues of :math:`P` are at least one, so atoms may repeat; what cancels is
    :math:`\tfrac12 y^T W y`, and the log evidence is known to about ``1e-15`` times that.

    Time about ``n * 2**K * K`` operations for data without a mask of their own and ``K`` times that
    with; the result holds ``n * 2**K`` numbers.

    Args:
        y: Data, shape ``(n, *signal_shape)``.
        dictionary: Any, with at most 14 codes per datum; used as it is, no gradient is taken.
        prior: ``SpikeAndSlab`` with a ``Normal`` slab, or a callable of ``rate`` that makes one.
        likelihood: ``Gaussian``, one scale or several.
        rate: Rate for a callable prior, shape ``(atoms,)`` or ``()``.
        mask: True where a sample was observed, broadcastable to ``y``; the others may hold
            anything, also ``nan``.
        chunk_size: Data taken at once; by default what fits in 256 MiB.

    Returns:
        The posterior as a distribution, with the log evidence and its moments.

    Raises:
        ValueError: If a datum has more than 14 codes, a shape does not fit, or an observed sample
            is not finite.
        TypeError: If an argument is of another kind or dtype, or the prior has no atom at zero.
        RuntimeError: If ``y`` is on another device than the dictionary.
        NotImplementedError: If the likelihood is not Gaussian or the prior's slab not Normal. A
            Laplace slab leaves an orthant probability on each support and sign, which has no
            closed form above two codes.

    References:
        Mitchell & Beauchamp (1988), J. Am. Stat. Assoc. 83(404); the sweep operator: Goodnight
        (1979), Am. Stat. 33(3).

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_sparse.dictionaries import Dense
        >>> from pyro_sparse.distributions.mixed import SpikeAndSlab
        >>> from pyro_sparse.likelihoods import Gaussian
        >>> twins = Dense(2, 2, atoms=torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        >>> prior = SpikeAndSlab(dist.Normal(0.0, 1.0), probs=0.1)
        >>> y = torch.tensor([[2.0, 0.0]])
        >>> posterior = enumerate_posterior(y, twins, prior, Gaussian(0.5))
        >>> posterior.prob_active.float()
        tensor([[0.5307, 0.5307]])
    """
    if chunk_size is not None:
        check_sizes(chunk_size=chunk_size)
    problem = linear_gaussian(y, dictionary, prior, likelihood, rate=rate, mask=mask)
    num_codes, size = problem.num_codes, len(problem.y)
    if num_codes > MAX_CODES:
        raise ValueError(
            f"Expected at most {MAX_CODES} codes per datum, got {num_codes}: that would be "
            f"2**{num_codes} = {2**num_codes:.3g} supports for each. Draw from the posterior with "
            "pyro_sparse.infer.gibbs instead."
        )
    with torch.no_grad():
        scale = problem.scale
        gram, correlation = problem.gram(), (problem.weight * problem.y) @ problem.matrix.T
        unit = torch.eye(num_codes, dtype=scale.dtype, device=scale.device)
        precision = unit + scale.unsqueeze(-1) * gram * scale
        shift = scale * correlation + problem.loc / scale
        if chunk_size is None:
            chunk_size = _chunk_size(num_codes, shared=len(gram) == 1)
        empty = problem.log_likelihood(torch.zeros_like(shift))
        sweep = _Sweep(problem, precision) if len(precision) == 1 else None
        parts = []
        for rows in torch.arange(size, device=y.device).split(chunk_size):
            here = sweep or _Sweep(problem, precision[rows])
            parts.append(here.posterior(shift[rows], empty[rows]))
        log_evidence, log_support_prob, active, mean, variance = map(torch.cat, zip(*parts))
    tables = _Tables(
        log_evidence=log_evidence,
        log_support_prob=log_support_prob,
        prob_active=active,
        mean=mean,
        variance=variance,
        precision=precision.expand(size, -1, -1),
        shift=shift,
        scale=scale,
        code_shape=problem.code_shape,
        dtype=y.dtype,
    )
    return ExactPosterior(tables)


class _Sweep:
    """Elimination of every support, shared by all data with the same precision.

    ``history[k]`` holds what sweeping in code ``k`` needs for the supports of the codes before it:
    pivots ``(m, 2**k)`` and columns ``(m, 2**k, K)``.
    """

    def __init__(self, problem: LinearGaussian, precision: Tensor) -> None:
        size = problem.num_codes
        self.problem = problem
        self.supports = _supports(size, precision.device)
        self.history: list[tuple[Tensor, Tensor]] = []
        # Sweeping k: the active block becomes its inverse, the rest its Schur complement.
        table = precision.new_empty(len(precision), 2**size, size, size)
        table[:, 0] = precision
        for k in range(size):
            before = table[:, : 2**k]
            pivot, column, row = before[..., k, k], before[..., :, k], before[..., k, :]
            after = table[:, 2**k : 2 ** (k + 1)]
            ratio = row / pivot.unsqueeze(-1)
            torch.sub(before, column.unsqueeze(-1) * ratio.unsqueeze(-2), out=after)
            after[..., :, k] = -column / pivot.unsqueeze(-1)
            after[..., k, :] = ratio
            after[..., k, k] = pivot.reciprocal()
            self.history.append((pivot.clone(), column.clone()))
        diagonal = table.diagonal(dim1=-2, dim2=-1)
        self.variance = torch.where(self.supports, diagonal, torch.zeros_like(diagonal))

    def posterior(
        self, shift: Tensor, empty: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Log evidence, log-probability of each support, P(active), mean and variance."""
        problem = self.problem
        size = problem.num_codes
        offset = (problem.loc / problem.scale).square()
        level = shift.new_empty(len(shift), 2**size)
        means = shift.new_empty(len(shift), 2**size, size)  # where active, else a right-hand side
        level[:, 0], means[:, 0] = empty, shift
        for k, (pivot, column) in enumerate(self.history):
            before, after = slice(0, 2**k), slice(2**k, 2 ** (k + 1))
            own = means[:, before, k] / pivot
            gain = (own * means[:, before, k] - pivot.log() - offset[k]) / 2
            level[:, after] = level[:, before] + gain + logsigmoid(problem.logits[k])
            level[:, before] += logsigmoid(-problem.logits[k])
            torch.addcmul(
                means[:, before], column, own.unsqueeze(-1), value=-1, out=means[:, after]
            )
            means[:, after, k] = own
        log_evidence = level.logsumexp(-1)
        level -= log_evidence.unsqueeze(-1)
        weight = level.exp()
        active = weight @ self.supports.to(weight)
        means.mul_(self.supports)
        mean = torch.einsum("ns,nsk->nk", weight, means)
        variance = torch.einsum("ns,nsk->nk", weight, self.variance.expand_as(means))
        variance += torch.einsum("ns,nsk->nk", weight, (means - mean.unsqueeze(1)).square_())
        scale = problem.scale
        return log_evidence, level, active, mean * scale, variance * scale.square()


def _chunk_size(num_codes: int, *, shared: bool) -> int:
    """Data whose tables stay within ``CHUNK_BYTES``."""
    each = 8 * 2**num_codes * num_codes * (3 if shared else 3 + 2 * num_codes)
    return max(1, CHUNK_BYTES // each)


def _supports(num_codes: int, device: torch.device) -> Tensor:
    """All supports; code ``k`` is bit ``k`` of the row number. Boolean, ``(2**K, K)``."""
    index = torch.arange(2**num_codes, device=device).unsqueeze(-1)
    return (index >> torch.arange(num_codes, device=device)) % 2 == 1
