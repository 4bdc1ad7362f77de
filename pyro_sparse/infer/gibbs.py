"""Gibbs sampling of spike-and-slab codes: the reference where supports are too many to count."""

from __future__ import annotations

from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_sparse.dictionaries import Dictionary
from pyro_sparse.dictionaries.base import check_sizes
from pyro_sparse.distributions import Prior
from pyro_sparse.likelihoods import Likelihood
from pyro_sparse.ops import check_tensor
from pyro_sparse.solvers.linear_gaussian import LinearGaussian, linear_gaussian

ALIKE = 0.3
"""Cosine, in size, from which two atoms are updated as a pair by default."""


class GibbsDraws(NamedTuple):
    """What ``gibbs`` drew.

    Attributes:
        codes: Shape ``(chains, draws, n, *code_shape)``, with exact zeros, dtype of the data.
        log_joint: Log-density of data and codes, float64, shape ``(chains, draws, n)``.

    Example:
        >>> codes = torch.tensor([0.0, 1.3, 0.0, 0.7]).reshape(2, 2, 1, 1)
        >>> GibbsDraws(codes, log_joint=torch.zeros(2, 2, 1)).prob_active
        tensor([[0.5000]], dtype=torch.float64)
    """

    codes: Tensor
    log_joint: Tensor

    @property
    def prob_active(self) -> Tensor:
        """Share of the draws whose code is not zero; float64, shape ``(n, *code_shape)``."""
        return (self.codes != 0).double().mean((0, 1))


def gibbs(
    y: Tensor,
    dictionary: Dictionary,
    prior: Prior,
    likelihood: Likelihood,
    *,
    rate: Tensor | None = None,
    mask: Tensor | None = None,
    num_samples: int = 1000,
    num_warm_up: int = 500,
    num_chains: int = 4,
    thin: int = 1,
    pairs: Tensor | None = None,
    init: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> GibbsDraws:
    r"""Draw spike-and-slab codes from their posterior under Gaussian noise, in several chains.

    A sweep draws every code in turn given the others, gate first with its slab integrated out, then
    every pair of atoms that are alike jointly, out of its four supports, likewise integrated out:
    one code can then hand over to another, which single updates hardly ever do. Every update is an
    exact conditional, nothing is rejected, so the posterior is invariant.

    Chains mix slowly where three or more atoms share one another's work, or where the noise is so
    small that supports exclude each other; compare chains (R-hat of ``log_joint``) before use.

    Data and chains are drawn in parallel, in float64. Time per sweep about ``4 * chains * n *
    (codes + 2 * pairs) * features`` operations; memory ``chains * n * (draws * codes + 6 * codes +
    3 * features)`` numbers, of which the draws are in the dtype of the data.

    Args:
        y: Data, shape ``(n, *signal_shape)``.
        dictionary: Atoms; used as they are, no gradient is taken.
        prior: ``SpikeAndSlab`` with a ``Normal`` slab, or a callable of ``rate`` that makes one.
        likelihood: ``Gaussian``, one scale or several.
        rate: Rate for a callable prior, shape ``(atoms,)`` or ``()``.
        mask: True where a sample was observed, broadcastable to ``y``; the others may hold
            anything, also ``nan``.
        num_samples: Draws that each chain keeps.
        num_warm_up: Sweeps before the first of them; may be zero.
        num_chains: Independent chains.
        thin: Sweeps from one draw to the next.
        pairs: Codes to draw jointly, whole numbers of shape ``(pairs, 2)``, each an index into a
            datum's flattened codes; of shape ``(0, 2)`` for none. By default each code with the one
            most like it, where the cosine between the two is at least 0.3.
        init: Codes to start from, shape ``(n, *code_shape)``, or with ``chains`` in front; each
            chain starts from its own draw of the prior by default.
        generator: Of the random numbers, on the device of ``y``; torch's global one by default.

    Returns:
        Draws and their log joint densities.

    Raises:
        ValueError: If a shape or index does not fit, a number is out of range, or an observed
            sample is not finite.
        TypeError: If an argument is of another kind or dtype, or the prior has no atom at zero.
        RuntimeError: If ``y`` is on another device than the dictionary.
        NotImplementedError: If the likelihood is not Gaussian or the prior's slab not Normal.

    References:
        George & McCulloch (1997), Stat. Sinica 7, sec. 4; joint-distribution tests: Geweke (2004),
        J. Am. Stat. Assoc. 99(467).

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_sparse.dictionaries import Dense
        >>> from pyro_sparse.distributions.mixed import SpikeAndSlab
        >>> from pyro_sparse.likelihoods import Gaussian
        >>> prior = SpikeAndSlab(dist.Normal(0.0, 1.0), probs=0.1)
        >>> draws = gibbs(torch.randn(3, 8), Dense(20, 8), prior, Gaussian(0.5), num_samples=10)
        >>> draws.codes.shape
        torch.Size([4, 10, 3, 20])
    """
    check_sizes(num_samples=num_samples, num_chains=num_chains, thin=thin)
    if not isinstance(num_warm_up, Integral) or num_warm_up < 0:
        raise ValueError(f"Expected num_warm_up to be a whole number >= 0, got {num_warm_up!r}.")
    problem = linear_gaussian(y, dictionary, prior, likelihood, rate=rate, mask=mask)
    with torch.no_grad():
        joint = [_prepare(problem, j, k) for j, k in _pairs(problem, pairs)]
        codes = _start(problem, init, num_chains, generator)
        kept = y.new_empty(num_chains, num_samples, len(y), problem.num_codes)
        log_joint = codes.new_empty(num_chains, num_samples, len(y))
        for step in range(1 - num_warm_up, 1 + num_samples * thin):
            _sweep(problem, codes, joint, generator)
            if step > 0 and step % thin == 0:
                kept[:, step // thin - 1] = codes
                density = problem.log_prior(codes) + problem.log_likelihood(codes)
                log_joint[:, step // thin - 1] = density
    return GibbsDraws(kept.reshape(*kept.shape[:-1], *problem.code_shape), log_joint)


def _sweep(
    problem: LinearGaussian,
    codes: Tensor,
    pairs: list[_Pair],
    generator: torch.Generator | None,
) -> None:
    """Draw every code, then every pair, once; ``codes``, ``(chains, n, codes)``, in place."""
    # Anew at each sweep: what rounding adds to it does not pile up.
    weighted = problem.weighted_residual(codes)
    level, noise = _noise(problem.num_codes, 1, codes, generator)
    for k in range(problem.num_codes):
        correlation = weighted @ problem.matrix[k] + problem.energy[:, k] * codes[..., k]
        logits, loc, variance = problem.conditional(k, correlation)
        drawn = loc + variance.sqrt() * noise[k, 0]
        active = level[k] < logits.sigmoid()
        drawn = torch.where(active, drawn, torch.zeros_like(drawn))
        change = (drawn - codes[..., k]).unsqueeze(-1)
        weighted.addcmul_(problem.weight * problem.matrix[k], change, value=-1)
        codes[..., k] = drawn
    if not pairs:
        return
    level, noise = _noise(len(pairs), 2, codes, generator)
    for number, pair in enumerate(pairs):
        old = codes[..., pair.codes]  # (chains, n, 2)
        correlation = weighted @ pair.atoms.T + (old.unsqueeze(-2) @ pair.gram).squeeze(-2)
        new = _draw_pair(pair, correlation.movedim(-1, 0), level[number], noise[number])
        codes[..., pair.codes] = new.movedim(0, -1)
        weighted -= problem.weight * ((codes[..., pair.codes] - old) @ pair.atoms)


class _Pair(NamedTuple):
    r"""Two codes that are drawn jointly: what does not change from sweep to sweep.

    In units of the slab's scale, with :math:`P = I + \tau G \tau` and :math:`h = \tau c + \mu /
    \tau` of the two, a support has the weight

    .. math:: p(s) \exp \tfrac12 \left(
        h_s^T P_{ss}^{-1} h_s - \log |P_{ss}| - \|\mu_s / \tau_s\|^2 \right)

    Attributes:
        codes: Which two, shape ``(2,)``.
        atoms: Shape ``(2, features)``.
        gram: Products of the atoms in units of the noise, shape ``(n or 1, 2, 2)``.
        scale: Of the slabs, shape ``(2, 1, 1)``.
        drift: Mean over scale of the slabs, shape ``(2, 1, 1)``.
        precision: Diagonal of ``P``, shape ``(2, n or 1)``.
        cross: Its other entry, shape ``(n or 1,)``.
        rest: Precision of the first code with an active second one integrated out, ``(n or 1,)``.
        level: What the weights of the supports do not owe to the data, in logarithms: none, the
            first, the second, both; shape ``(4, 1, n or 1)``.
    """

    codes: Tensor
    atoms: Tensor
    gram: Tensor
    scale: Tensor
    drift: Tensor
    precision: Tensor
    cross: Tensor
    rest: Tensor
    level: Tensor


def _prepare(problem: LinearGaussian, j: int, k: int) -> _Pair:
    index = torch.tensor([j, k], device=problem.y.device)
    atoms, scale, loc = problem.matrix[index], problem.scale[index], problem.loc[index]
    gram = (atoms * problem.weight.unsqueeze(-2)) @ atoms.T  # (n or 1, 2, 2)
    precision = 1 + gram.diagonal(dim1=-2, dim2=-1) * scale.square()
    cross = gram[..., 0, 1] * scale.prod()
    rest = precision[..., 0] - cross.square() / precision[..., 1]
    active = logsigmoid(problem.logits[index]) - (loc / scale).square() / 2 - precision.log() / 2
    on, off = active.T, logsigmoid(-problem.logits[index])  # (2, n or 1), (2,)
    # Of both, the first has the precision that is left with the second integrated out.
    both = on.sum(0) + (precision[..., 0].log() - rest.log()) / 2
    none = (off[0] + off[1]).expand_as(both)
    level = torch.stack([none, on[0] + off[1], off[0] + on[1], both]).unsqueeze(1)
    drift = (loc / scale)[:, None, None]
    return _Pair(index, atoms, gram, scale[:, None, None], drift, precision.T, cross, rest, level)


def _draw_pair(pair: _Pair, correlation: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    """Two codes drawn jointly given the others, out of their four supports.

    Args:
        pair: Which.
        correlation: With the weighted residual that leaves both out, shape ``(2, chains, n)``.
        level: Uniform numbers, shape ``(chains, n)``.
        noise: Normal numbers, shape ``(2, chains, n)``.

    Returns:
        Shape ``(2, chains, n)``.
    """
    precision, cross = pair.precision, pair.cross
    shift = pair.scale * correlation + pair.drift  # (2, chains, n)
    rest = shift[0] - cross * shift[1] / precision[1]
    alone = shift.square() / (2 * precision.unsqueeze(1))
    both = alone[1] + rest.square() / (2 * pair.rest)
    gain = torch.stack([torch.zeros_like(both), alone[0], alone[1], both])
    below = (pair.level + gain).softmax(0).cumsum(0)
    chosen = (level > below[:3]).sum(0)
    first, second = chosen % 2 == 1, chosen >= 2

    zero = torch.zeros_like(level)
    inner = torch.where(second, pair.rest, precision[0])
    value = torch.where(second, rest, shift[0]) / inner + noise[0] / inner.sqrt()
    one = torch.where(first, value, zero)
    value = (shift[1] - cross * one) / precision[1] + noise[1] / precision[1].sqrt()
    return torch.stack([one, torch.where(second, value, zero)]) * pair.scale


def _noise(
    size: int, values: int, codes: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Uniform ``(size, chains, n)`` and normal ``(size, values, chains, n)`` numbers."""
    batch = codes.shape[:-1]
    level = codes.new_empty(size, *batch).uniform_(generator=generator)
    noise = codes.new_empty(size, values, *batch).normal_(generator=generator)
    return level, noise


def _start(
    problem: LinearGaussian,
    init: Tensor | None,
    num_chains: int,
    generator: torch.Generator | None,
) -> Tensor:
    shape = (num_chains, len(problem.y), *problem.code_shape)
    codes = problem.y.new_empty(num_chains, len(problem.y), problem.num_codes)
    if init is None:
        level, noise = _noise(problem.num_codes, 1, codes, generator)
        drawn = problem.loc + problem.scale * noise[:, 0].movedim(0, -1)
        active = level.movedim(0, -1) < problem.logits.sigmoid()
        return torch.where(active, drawn, torch.zeros_like(drawn)).contiguous()
    check_tensor("init", init)
    if init.shape not in (shape, shape[1:]):
        raise ValueError(
            f"Expected init of shape {shape[1:]}, or {shape} with one start for each chain, got "
            f"{tuple(init.shape)}."
        )
    if not bool(torch.isfinite(init).all()):
        raise ValueError("Expected init to be finite. Leave it out to start from the prior.")
    return init.detach().to(codes).broadcast_to(shape).reshape(codes.shape).clone()


def _pairs(problem: LinearGaussian, pairs: Tensor | None) -> list[tuple[int, int]]:
    """Pairs of codes to draw jointly, as numbers."""
    size = problem.num_codes
    if pairs is None:
        return _alike(problem) if size > 1 else []
    if not isinstance(pairs, Tensor) or pairs.is_floating_point() or pairs.dtype == torch.bool:
        kind = pairs.dtype if isinstance(pairs, Tensor) else type(pairs).__name__
        raise TypeError(f"Expected pairs to be a tensor of whole numbers, got {kind}.")
    found = [(int(j), int(k)) for j, k in pairs] if pairs.shape[1:] == (2,) else None
    if found is None or any(j == k or min(j, k) < 0 or max(j, k) >= size for j, k in found):
        raise ValueError(
            f"Expected pairs of shape (pairs, 2), two different codes in [0, {size}) each, got "
            f"{pairs.tolist()}."
        )
    return found


def _alike(problem: LinearGaussian) -> list[tuple[int, int]]:
    """Each code with the one whose atom is most like its own; where masks differ, on average."""
    weight = problem.weight.mean(0)
    gram = (problem.matrix * weight) @ problem.matrix.T
    length = gram.diagonal().sqrt()
    cosine = gram.abs() / (length * length.unsqueeze(-1)).clamp_min(torch.finfo(gram.dtype).tiny)
    best, partner = cosine.fill_diagonal_(-1.0).max(-1)
    found = {
        (min(j, k), max(j, k))
        for j, (k, value) in enumerate(zip(partner.tolist(), best.tolist()))
        if value >= ALIKE
    }
    return sorted(found)
