"""Expected log-densities of laws in their predictor, where the predictor is affine in codes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyro_sparse.distributions.expected import (
    mean_exp,
    only_random,
    register_expected_log_prob,
)
from pyro_sparse.distributions.moments import Moments
from pyro_sparse.distributions.natural import NaturalGamma, NaturalPoisson


@register_expected_log_prob(NaturalPoisson)
def _(law: Any, value: Tensor) -> Tensor:
    only_random(law, "log_rate", Moments, "affine in the codes")
    if law._validate_args:
        law._validate_sample(value)
    predictor = law.log_rate
    # At the mean predictor, and what the spread of the predictor adds to the mean rate.
    at_mean = NaturalPoisson(predictor.expectation, validate_args=False)
    return at_mean.log_prob(value) + predictor.expectation.exp() - mean_exp(predictor)


@register_expected_log_prob(NaturalGamma)
def _(law: Any, value: Tensor) -> Tensor:
    only_random(law, "log_mean", Moments, "affine in the codes")
    if law._validate_args:
        law._validate_sample(value)
    predictor, count = law.log_mean, law.concentration
    at_mean = NaturalGamma(predictor.expectation, count, validate_args=False)
    spread = mean_exp(-predictor) - (-predictor.expectation).exp()
    return at_mean.log_prob(value) - count * value * spread
