"""The linear-Gaussian problem with spike-and-slab codes, on which all closed forms rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_sparse.dictionaries import Dictionary
from pyro_sparse.distributions import Prior, check_prior, codes_prior
from pyro_sparse.distributions.mixed import Mixed
from pyro_sparse.likelihoods import Gaussian, Likelihood, check_data


@dataclass(frozen=True)
class LinearGaussian:
    r"""Data, atoms, noise and prior of a linear-Gaussian model, flattened and in float64.

    .. math:: y_n \sim \mathcal N(A^T z_n, W_n^{-1}), \qquad
        z_{nk} \sim (1 - \pi_k)\, \delta_0 + \pi_k\, \mathcal N(\mu_k, \tau_k^2)

    Everything that coordinate ascent, enumeration and Gibbs sampling need; a datum's codes and
    features are flattened to one dimension each.

    Attributes:
        y: Data, shape ``(n, features)``; zero where not observed.
        matrix: Atoms, shape ``(codes, features)``.
        weight: Precision of the noise, zero where not observed; shape ``(n, features)``, or
            ``(1, features)`` where all data share it.
        logits: Prior log-odds of being active, shape ``(codes,)``.
        loc: Mean of the prior's slab, shape ``(codes,)``.
        scale: Standard deviation of the prior's slab, shape ``(codes,)``.
        code_shape: Shape of one datum's codes before flattening.
    """

    y: Tensor
    matrix: Tensor
    weight: Tensor
    logits: Tensor
    loc: Tensor
    scale: Tensor
    code_shape: torch.Size

    @property
    def num_codes(self) -> int:
        """Number of codes of one datum."""
        return len(self.matrix)

    @cached_property
    def energy(self) -> Tensor:
        """Squared length of each atom in units of the noise, shape ``(n or 1, codes)``."""
        return self.weight @ self.matrix.square().T

    @cached_property
    def _log_peak(self) -> Tensor:
        observed = self.weight > 0
        level = torch.where(observed, self.weight, torch.ones_like(self.weight)) / (2 * math.pi)
        return torch.where(observed, level.log() / 2, torch.zeros_like(level)).sum(-1)

    def gram(self) -> Tensor:
        """Products of the atoms in units of the noise, shape ``(n or 1, codes, codes)``."""
        return (self.matrix * self.weight.unsqueeze(-2)) @ self.matrix.T

    def weighted_residual(self, codes: Tensor) -> Tensor:
        """Score of the predictor, ``W (y - A' z)``, shape ``(..., n, features)``."""
        return self.weight * (self.y - codes @ self.matrix)

    def log_likelihood(self, codes: Tensor) -> Tensor:
        """Log-density of the data given codes ``(..., n, codes)``, shape ``(..., n)``."""
        misfit = self.weight * (self.y - codes @ self.matrix).square()
        return self._log_peak - misfit.sum(-1) / 2

    def log_prior(self, codes: Tensor) -> Tensor:
        """Mixed log-density of codes ``(..., n, codes)`` under the prior, shape ``(..., n)``."""
        distance = (codes - self.loc) / self.scale
        slab = -distance.square() / 2 - self.scale.log() - math.log(2 * math.pi) / 2
        active = logsigmoid(self.logits) + slab
        return torch.where(codes == 0, logsigmoid(-self.logits), active).sum(-1)

    def conditional(self, index: int, correlation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Law of one code given the others: log-odds of being active, slab's mean and variance.

        With the slab integrated out for the gate; :math:`e_k` is the atom's ``energy``:

        .. math::
            S &= (e_k + \tau_k^{-2})^{-1}, \qquad m = S (c + \mu_k / \tau_k^2) \\
            \mathrm{logit}\, g &= \mathrm{logit}\, \pi_k + \tfrac12 \left(\log \frac{S}{\tau_k^2}
                + \frac{m^2}{S} - \frac{\mu_k^2}{\tau_k^2}\right)

        Args:
            index: Which code.
            correlation: :math:`c`, of the atom with the weighted residual that leaves the atom
                itself out, shape ``(..., n)``.

        Returns:
            Shapes ``(..., n)``, ``(..., n)`` and ``(n or 1,)``.
        """
        loc, scale = self.loc[index], self.scale[index]
        gain = 1 + self.energy[:, index] * scale.square()  # tau^2 / S
        variance = scale.square() / gain
        mean = variance * (correlation + loc / scale.square())
        # m^2 / S - mu^2 / tau^2 without the difference of squares, exact also for a narrow slab.
        surprise = correlation * mean + loc * (correlation - self.energy[:, index] * loc) / gain
        return self.logits[index] + (surprise - gain.log()) / 2, mean, variance


def linear_gaussian(
    y: Tensor,
    dictionary: Dictionary,
    prior: Prior,
    likelihood: Likelihood,
    *,
    rate: Tensor | None = None,
    mask: Tensor | None = None,
) -> LinearGaussian:
    """The problem in float64, checked, from the objects that a user hands over.

    Atoms are read by pushing unit codes through the dictionary, so any dictionary will do; the
    matrix takes ``codes * features`` numbers.

    Args:
        y: Data, shape ``(n, *signal_shape)``.
        dictionary: Used as it is; no gradient is taken.
        prior: A spike-and-slab law with a ``Normal`` slab, or a callable of ``rate``.
        likelihood: A ``Gaussian``.
        rate: Rate for a callable prior, shape ``(atoms,)`` or ``()``.
        mask: True where a sample was observed, broadcastable to ``y``.

    Raises:
        TypeError: If an argument is of another kind or dtype, or the prior has no atom at zero.
        ValueError: If a shape does not fit, or an observed sample is not finite.
        RuntimeError: If ``y`` is on another device than the dictionary.
        NotImplementedError: If the likelihood is not Gaussian or the slab not Normal.

    Example:
        >>> from pyro_sparse.dictionaries import Dense
        >>> from pyro_sparse.distributions.mixed import SpikeAndSlab
        >>> prior = SpikeAndSlab(dist.Normal(0.0, 1.0), probs=0.5)
        >>> eye = Dense(2, 2, atoms=torch.eye(2))
        >>> linear_gaussian(torch.ones(1, 2), eye, prior, Gaussian(0.5)).energy
        tensor([[4., 4.]], dtype=torch.float64)
    """
    if not isinstance(dictionary, Dictionary) or not isinstance(likelihood, Likelihood):
        raise TypeError(
            "Expected a Dictionary, such as Dense(...), and a Likelihood, such as Gaussian(...), "
            f"got {type(dictionary).__name__} and {type(likelihood).__name__}."
        )
    if not isinstance(likelihood, Gaussian):
        raise NotImplementedError(
            "Expected a Gaussian likelihood: for another one the slab does not integrate out in "
            f"closed form, got {type(likelihood).__name__}."
        )
    check_prior(prior, has_rate=rate is not None)
    with torch.no_grad():
        y, mask = check_data(y, mask, None, dictionary.signal_dims, dictionary.like)
        likelihood.check(y, mask)
        _check_finite(y)
        signal_shape, size = y.shape[1:], len(y)
        code_shape = torch.Size(dictionary.code_shape(tuple(signal_shape)))
        y = y.double()
        unit = torch.eye(math.prod(code_shape), dtype=y.dtype, device=y.device)
        atoms = dictionary.bind().double().forward(unit.reshape(-1, *code_shape))
        law = _slab_law(codes_prior(prior, rate, tuple(code_shape), like=y))
        scale = likelihood.scale.detach().to(y).broadcast_to(signal_shape)
        weight = scale.square().reciprocal().reshape(1, -1)
        if mask is not None:
            mask = mask.reshape(size, -1)
            same = bool((mask == mask[:1]).all())
            weight = weight * (mask[:1] if same else mask)
        return LinearGaussian(
            y=y.reshape(size, -1),
            matrix=atoms.to(y).reshape(len(unit), -1),
            weight=weight,
            logits=law.logits.reshape(-1),
            loc=law.slab.loc.reshape(-1),
            scale=law.slab.scale.reshape(-1),
            code_shape=code_shape,
        )


def elementwise(law: Any) -> Any:
    """A law without the dimensions that ``to_event`` or ``expand`` declared events."""
    while isinstance(law, torch.distributions.Independent):
        law = law.base_dist
    return law


def _slab_law(law: Any) -> Mixed:
    if law.batch_shape:
        raise ValueError(
            "Expected one prior for all data, that is a rate of shape (atoms,) or (), got one that "
            f"makes the batch shape {tuple(law.batch_shape)}."
        )
    law = elementwise(law)
    if not isinstance(law, Mixed):
        raise TypeError(
            "Expected a prior with an atom at zero, such as SpikeAndSlab(Normal(0.0, 1.0), "
            f"probs=0.1), got {type(law).__name__}. One without zeros is SpikeAndSlab with probs=1."
        )
    if not isinstance(law.slab, dist.Normal | torch.distributions.Normal):
        raise NotImplementedError(
            "Expected a prior with a Normal slab: another one is not conjugate to Gaussian noise "
            f"and does not integrate out in closed form, got {type(law.slab).__name__}."
        )
    return law


def _check_finite(y: Tensor) -> None:
    finite = torch.isfinite(y)
    if not bool(finite.all()):
        first = tuple(int(i) for i in (~finite).nonzero()[0])
        raise ValueError(
            f"Expected finite data, got {int((~finite).sum())} values that are not, the first at "
            f"{first}. Pass mask= (True = observed)."
        )
