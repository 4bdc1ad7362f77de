"""Laws of data in their predictor, exact in single precision where the stock ones are not.

Each is written as the log-density at its best predictor, which depends on the data alone, minus
half the deviance. Neither is a difference of large numbers, as ``y log(rate) - rate - log(y!)`` is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from pyro_sparse.distributions.arguments import as_numbers, common_shape
from pyro_sparse.distributions.deviance import (
    exp_deviance,
    exp_excess,
    mixture_deviance,
    stirling_error,
    tangent_from,
)

_NO_SHAPE = torch.Size()


class PredictorLaw(TorchDistribution):
    """Declares a law of one number whose parameters are numbers that broadcast.

    Args:
        parameters: By name; the first one is the predictor.
    """

    def __init__(self, validate_args: bool | None, **parameters: Any) -> None:
        like = next(x for x in (*parameters.values(), torch.empty(0)) if isinstance(x, Tensor))
        values = {
            name: value if isinstance(value, Tensor) else as_numbers(name, value, like)
            for name, value in parameters.items()
        }
        shape = common_shape(**{name: value.shape for name, value in values.items()})
        for name, value in values.items():
            setattr(self, name, value.expand(shape))
        super().__init__(shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same law with another batch shape."""
        new = self._get_checked_instance(type(self), _instance)
        batch_shape = torch.Size(batch_shape)
        for name in self.arg_constraints:
            setattr(new, name, getattr(self, name).expand(batch_shape))
        super(PredictorLaw, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of ``value``, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        return self._log_prob(value)

    def _log_prob(self, value: Tensor) -> Tensor:
        raise NotImplementedError


class NaturalPoisson(PredictorLaw):
    r"""Counts of mean :math:`e^\eta`, by the logarithm of the rate.

    .. math:: \log p(y) = -\tfrac12 \log 2 \pi y - \delta(y) - y \big(e^{d} - 1 - d\big), \quad
        d = \eta - \log y

    with :math:`\delta` the error of Stirling's formula, and :math:`-e^\eta` for :math:`y = 0`.
    Where :math:`e^\eta` comes near overflow (:math:`\eta > 80` in float32, 700 in float64) the
    exponential goes on along its tangent: values stay finite and concave, and the derivative is
    :math:`y - e^{80}`, neither infinite nor zero.

    Args:
        log_rate: :math:`\eta`, the natural parameter.

    References:
        Loader (2000), Fast and accurate computation of binomial probabilities, for the form.

    Example:
        >>> NaturalPoisson(torch.tensor(1e9).log()).log_prob(torch.tensor(1e9))
        tensor(-11.2806)
    """

    arg_constraints = {"log_rate": constraints.real}
    support = constraints.nonnegative_integer
    log_rate: Tensor

    def __init__(self, log_rate: Tensor | float, *, validate_args: bool | None = None) -> None:
        super().__init__(validate_args, log_rate=log_rate)

    @property
    def mean(self) -> Tensor:
        """Rate; that at the cap beyond it."""
        return self.log_rate.clamp_max(tangent_from(self.log_rate)).exp()

    @property
    def variance(self) -> Tensor:
        """Likewise."""
        return self.mean

    def sample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        """Counts, in the dtype of the predictor."""
        with torch.no_grad():
            return torch.poisson(self.mean.expand(self._extended_shape(sample_shape)))

    def _log_prob(self, value: Tensor) -> Tensor:
        counted = value > 0
        safe = torch.where(counted, value, torch.ones_like(value))
        best = -stirling_error(safe) - (2 * math.pi * safe).log() / 2
        best = torch.where(counted, best, torch.zeros_like(best))
        return best - exp_deviance(value, self.log_rate)


class NaturalBinomial(PredictorLaw):
    r"""Successes among a number of trials, by the log-odds of one.

    Args:
        logits: :math:`\eta`, the natural parameter.
        total_count: Number of trials :math:`n \ge 1`, a whole number.

    References:
        Loader (2000), Fast and accurate computation of binomial probabilities.

    Example:
        >>> NaturalBinomial(torch.tensor(0.0), 4.0).log_prob(torch.tensor(2.0)).exp()
        tensor(0.3750)
    """

    arg_constraints = {"logits": constraints.real, "total_count": constraints.nonnegative_integer}
    logits: Tensor
    total_count: Tensor

    def __init__(
        self,
        logits: Tensor | float,
        total_count: Tensor | float,
        *,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(validate_args, logits=logits, total_count=total_count)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        """Whole numbers from 0 to ``total_count``."""
        return constraints.integer_interval(0, self.total_count)

    @property
    def mean(self) -> Tensor:
        """Expected number of successes."""
        return self.total_count * self.logits.sigmoid()

    @property
    def variance(self) -> Tensor:
        """Of the number of successes."""
        return self.mean * (-self.logits).sigmoid()

    def sample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        """Counts, in the dtype of the predictor."""
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            probs = self.logits.sigmoid().expand(shape)
            return torch.binomial(self.total_count.to(probs).expand(shape), probs)

    def _log_prob(self, value: Tensor) -> Tensor:
        failures = self.total_count - value
        inner = (value > 0) & (failures > 0)
        hits, misses = (torch.where(inner, x, torch.ones_like(x)) for x in (value, failures))
        best = stirling_error(hits + misses) - stirling_error(hits) - stirling_error(misses)
        best = best + ((hits + misses) / (2 * math.pi * hits) / misses).log() / 2
        return torch.where(inner, best, torch.zeros_like(best)) - binomial_deviance(
            value, failures, self.logits
        )


class NaturalNegativeBinomial(PredictorLaw):
    r"""Counts of mean :math:`e^\eta` and variance :math:`e^\eta + e^{2\eta} / r`.

    The natural parameter is :math:`\eta - \log(r + e^\eta)`, always negative; its logarithm of the
    mean is free. For large :math:`r` the law is ``NaturalPoisson``, without loss of digits.

    Args:
        log_mean: :math:`\eta`.
        total_count: :math:`r > 0`, any real number: small for much overdispersion.

    Example:
        >>> NaturalNegativeBinomial(torch.tensor(-18.0 + 1e8 ** 0), 1e8).mean
        tensor(4.1399e-08)
    """

    arg_constraints = {"log_mean": constraints.real, "total_count": constraints.positive}
    support = constraints.nonnegative_integer
    log_mean: Tensor
    total_count: Tensor

    def __init__(
        self,
        log_mean: Tensor | float,
        total_count: Tensor | float,
        *,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(validate_args, log_mean=log_mean, total_count=total_count)

    @property
    def mean(self) -> Tensor:
        """Expected count."""
        return self.log_mean.exp()

    @property
    def variance(self) -> Tensor:
        """Of the count."""
        return self.mean + self.mean.square() / self.total_count

    def sample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        """Counts, in the dtype of the predictor: Poisson with a Gamma-distributed rate."""
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            noise = torch._standard_gamma(self.total_count.expand(shape)) / self.total_count
            return torch.poisson(self.mean * noise)

    def _log_prob(self, value: Tensor) -> Tensor:
        counted = value > 0
        safe = torch.where(counted, value, torch.ones_like(value)).double()
        count = self.total_count.double()  # sums with the data would round
        best = stirling_error(safe + count) - stirling_error(count) - stirling_error(safe)
        best = best - (torch.log1p(safe / count) + (2 * math.pi * safe).log()) / 2
        best = torch.where(counted, best, torch.zeros_like(best)).to(self.log_mean.dtype)
        return best - negative_binomial_deviance(value, self.total_count, self.log_mean)


class NaturalGamma(PredictorLaw):
    r"""Positive numbers of mean :math:`e^\eta` and standard deviation :math:`e^\eta / \sqrt\alpha`.

    .. math:: \log p(y) = \tfrac12 \log \frac{\alpha}{2 \pi} - \delta(\alpha) - \log y
        - \alpha \big(e^{-d} - 1 + d\big), \quad d = \eta - \log y

    The natural parameter is :math:`-\alpha e^{-\eta}`, always negative; the logarithm of the mean
    is free. Where :math:`e^{-d}` or :math:`\alpha e^{-d}` comes near overflow (:math:`e^{80}` in
    float32, :math:`e^{700}` in float64) the exponential goes on along its tangent, as in
    ``NaturalPoisson``.

    Args:
        log_mean: :math:`\eta`.
        concentration: :math:`\alpha > 0`.

    Example:
        >>> NaturalGamma(torch.tensor(0.0), 1.0).log_prob(torch.tensor(2.0))
        tensor(-2.)
    """

    arg_constraints = {"log_mean": constraints.real, "concentration": constraints.positive}
    support = constraints.positive
    log_mean: Tensor
    concentration: Tensor

    def __init__(
        self,
        log_mean: Tensor | float,
        concentration: Tensor | float,
        *,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(validate_args, log_mean=log_mean, concentration=concentration)

    @property
    def mean(self) -> Tensor:
        """Expected value."""
        return self.log_mean.exp()

    @property
    def variance(self) -> Tensor:
        """Squared mean over concentration."""
        return self.mean.square() / self.concentration

    def sample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        """Positive numbers; the smallest normal one in place of an underflow."""
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            noise = torch._standard_gamma(self.concentration.expand(shape)) / self.concentration
            return (self.mean * noise).clamp_min(torch.finfo(noise.dtype).tiny)

    def score(self, value: Tensor) -> Tensor:
        r"""Derivative of the log-density by ``log_mean``, :math:`\alpha (y e^{-\eta} - 1)`."""
        excess = value.log() - self.log_mean
        capped = torch.minimum(excess, gamma_tangent_from(excess, self.concentration))
        return self.concentration * torch.expm1(capped)

    def _log_prob(self, value: Tensor) -> Tensor:
        concentration = self.concentration
        best = (concentration / (2 * math.pi)).log() / 2 - stirling_error(concentration)
        return best - value.log() - gamma_deviance(value, concentration, self.log_mean)


def binomial_deviance(hits: Tensor, misses: Tensor, logits: Tensor) -> Tensor:
    """Half the deviance of numbers of successes and failures, given the log-odds."""
    inner = (hits > 0) & (misses > 0)
    one = torch.ones_like(logits * hits)
    own, other = torch.where(inner, hits, one), torch.where(inner, misses, one)
    between = mixture_deviance(own, other, logits - (own / other).log())
    # At most one of the two: all are failures, or all successes.
    edge = -hits * logsigmoid(logits) - misses * logsigmoid(-logits)
    return torch.where(inner, between, edge)


def negative_binomial_deviance(y: Tensor, total_count: Tensor, log_mean: Tensor) -> Tensor:
    """Half the deviance of overdispersed counts, given the logarithm of their mean."""
    counted = y > 0
    safe = torch.where(counted, y, torch.ones_like(y))
    some = mixture_deviance(safe, total_count, log_mean - safe.log())
    log_ratio = log_mean - total_count.log()
    # log(1 + mean / r): from the mean itself, since the difference of logarithms has rounded.
    steep = (log_ratio > 40) | (log_mean > 80)
    ratio = torch.where(steep, torch.zeros_like(log_ratio), log_mean).exp() / total_count
    steep_none = torch.where(steep, -logsigmoid(-log_ratio), torch.zeros_like(log_ratio))
    none = total_count * torch.where(steep, steep_none, torch.log1p(ratio))
    return torch.where(counted, some, none)


def gamma_tangent_from(like: Tensor, concentration: Tensor) -> Tensor:
    """Excess of the data from which on the deviance is replaced by its tangent."""
    return tangent_from(like) - concentration.detach().log().clamp_min(0)


def gamma_deviance(y: Tensor, concentration: Tensor, log_mean: Tensor) -> Tensor:
    """Half the deviance of positive data, given the logarithm of their mean."""
    excess = y.log() - log_mean
    cap = gamma_tangent_from(excess, concentration)
    below = torch.minimum(excess, cap)
    rise = torch.where(excess > cap, cap.exp() * (excess - cap), torch.zeros_like(excess))
    return concentration * exp_excess(below) + concentration * (
        rise - torch.where(excess > cap, excess - cap, torch.zeros_like(excess))
    )
