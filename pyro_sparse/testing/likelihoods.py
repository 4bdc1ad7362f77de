"""Is a likelihood what models, guides and solvers take it for?"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_sparse.infer.findings import NotAsked
from pyro_sparse.likelihoods import Likelihood
from pyro_sparse.testing.advice import Advice, Failed, gather
from pyro_sparse.testing.saving import check_saving

_TOLERANCE = 1e-4


def check_likelihood(
    likelihood: Likelihood, predictor: Tensor | None = None, *, largest: float = 30.0
) -> Advice:
    """Check a family: the methods against its own distribution, and against each other.

    Data are drawn from the family at the predictor. Checked are shapes; ``mean`` and ``residual``
    against the distribution's mean and the derivative of its log-density; that ``curvature`` is a
    bound; that ``loss`` and ``dual`` belong to the density; that nothing stops being finite for
    predictors up to ``largest``; that it can be saved. Torch's random state is left as it was.

    Args:
        likelihood: The family.
        predictor: Where to check, shape ``(n, *signal_shape)``; needed only where a parameter has a
            shape of its own. Default 64 values from -2 to 2, which suits most.
        largest: Magnitude up to which the predictor must be safe, ``> 0``.

    Returns:
        The findings; print them, or ``.raise_if_failed()`` in a test.

    Raises:
        TypeError: If ``likelihood`` is no ``Likelihood`` or ``predictor`` no floating tensor.

    Example:
        >>> from pyro_sparse.likelihoods import Poisson
        >>> check_likelihood(Poisson()).ok
        True
    """
    if not isinstance(likelihood, Likelihood):
        raise TypeError(f"Expected a Likelihood, got {type(likelihood).__name__}.")
    if predictor is None:
        predictor = torch.linspace(-2.0, 2.0, 64)
    if not isinstance(predictor, Tensor) or not predictor.is_floating_point():
        raise TypeError(f"Expected predictor to be a floating tensor, got {predictor!r}.")
    at = predictor.detach()
    with torch.random.fork_rng():
        return gather(
            type(likelihood).__name__,
            {
                "shapes": lambda: _shapes(likelihood, at),
                "own draws": lambda: _own_draws(likelihood, at),
                "mean": lambda: _mean(likelihood, at),
                "residual": lambda: _residual(likelihood, at),
                "curvature": lambda: _curvature(likelihood, at),
                "loss": lambda: _loss(likelihood, at),
                "dual": lambda: _dual(likelihood, at),
                "finite": lambda: _finite(likelihood, at, largest),
                "placeholder": lambda: _placeholder(likelihood, at),
                "save and load": lambda: check_saving(likelihood),
            },
        )


def _draw(likelihood: Likelihood, at: Tensor) -> Tensor:
    return likelihood(at).sample()


def _shapes(likelihood: Likelihood, at: Tensor) -> str:
    law = likelihood(at)
    if tuple(law.batch_shape) != tuple(at.shape) or law.event_shape:
        raise Failed(
            f"Expected a distribution of batch shape {tuple(at.shape)} and event shape (), one "
            f"number for each of the predictor, got {tuple(law.batch_shape)} and "
            f"{tuple(law.event_shape)}. The model adds to_event itself."
        )
    return f"batch shape {tuple(law.batch_shape)}"


def _own_draws(likelihood: Likelihood, at: Tensor) -> str:
    y = _draw(likelihood, at)
    likelihood.check(y)
    values = likelihood(at).log_prob(y)
    if not bool(torch.isfinite(values).all()):
        raise Failed("Expected a finite log_prob of the family's own draws, got some that are not.")
    return "accepted, with a finite log_prob"


def _mean(likelihood: Likelihood, at: Tensor) -> str:
    mean = likelihood.mean(at)
    if mean.shape != at.shape:
        raise Failed(f"Expected the shape of the predictor {tuple(at.shape)}, got {mean.shape}.")
    try:
        expected = likelihood(at).mean
    except NotImplementedError:
        raise NotAsked("The distribution states no mean.") from None
    if bool(torch.isnan(expected).all()):
        raise NotAsked("The distribution has no mean.")
    _compare("mean", mean, expected, "mean() is the inverse link, in units of the data")
    return "that of the distribution"


def _residual(likelihood: Likelihood, at: Tensor) -> str:
    y = _draw(likelihood, at)
    x = at.clone().requires_grad_()
    (score,) = torch.autograd.grad(likelihood(x).log_prob(y).sum(), x)
    residual = likelihood.residual(at, y)
    meaning = "residual() is the derivative of log_prob by the predictor; "
    if torch.allclose(residual.detach(), -score, rtol=_TOLERANCE, atol=_TOLERANCE):
        meaning += "this is minus that, and codes would climb away from the data"
    else:
        meaning += "with a stabilised one, check the likelihood that it wraps"
    _compare("residual", residual, score, meaning)
    return "the derivative of log_prob"


def _curvature(likelihood: Likelihood, at: Tensor) -> str:
    y = _draw(likelihood, at)
    try:
        bound = likelihood.curvature(y)
    except NotImplementedError:
        raise NotAsked(
            "No bound: unrolled guides need step_size= or Stabilised(...), solve searches."
        ) from None
    if bound.requires_grad:
        raise Failed("Expected a detached bound: a step size is not differentiated.")
    points = torch.linspace(-20, 20, 161, dtype=at.dtype, device=at.device)
    for value in points:
        x = torch.full_like(at, float(value)).requires_grad_()
        (second,) = torch.autograd.grad(likelihood.residual(x, y).sum(), x)
        over = (-second.detach() - bound * (1 + _TOLERANCE)).max()
        if float(over) > _TOLERANCE:
            raise Failed(
                f"Expected a bound of -d2 log p / d eta2 at every predictor; at {float(value):g} "
                f"it is exceeded by {float(over):.3g}. Steps would be too long, and codes diverge."
            )
    return "a bound from -20 to 20"


def _loss(likelihood: Likelihood, at: Tensor) -> str:
    y = _draw(likelihood, at)
    other = at.flip(0) / 2
    try:
        loss = likelihood.loss(at, y), likelihood.loss(other, y)
    except NotImplementedError:
        raise NotAsked("None: solvers.solve needs it, nothing else does.") from None
    least = float(torch.stack(loss).detach().min())
    if least < -_TOLERANCE:
        raise Failed(
            f"Expected half the deviance, which is never negative, got {least:.3g}: subtract its "
            "smallest value over the predictor."
        )
    density = likelihood(other).log_prob(y) - likelihood(at).log_prob(y)
    _compare("loss", loss[0] - loss[1], density, "loss() differs from -log_prob by a constant")
    return "half the deviance"


def _dual(likelihood: Likelihood, at: Tensor) -> str:
    y = _draw(likelihood, at)
    score = likelihood.residual(at, y)
    try:
        bound, loss = likelihood.dual(score, y), likelihood.loss
        values = [loss(x, y) + score * x for x in (at, at.flip(0), torch.zeros_like(at))]
    except NotImplementedError:
        raise NotAsked("None: solvers.solve needs it for its certificate.") from None
    seen = torch.stack(values).detach()
    over = float((bound.detach() - seen.amin(0)).nan_to_num(neginf=0.0).max())
    if over > _TOLERANCE * (1 + float(seen.abs().max())):
        raise Failed(
            f"Expected dual(score, y) <= loss(eta, y) + score * eta for every eta, exceeded by "
            f"{over:.3g}. Certificates of solve would be wrong."
        )
    _compare(
        "dual", bound, values[0],
        "at the score of a predictor the bound is attained there, up to signs",
    )  # fmt: skip
    return "attained at the predictor of the score"


def _finite(likelihood: Likelihood, at: Tensor, largest: float) -> str:
    y = _draw(likelihood, at)
    for sign in (-1, 1):
        x = torch.full_like(at, sign * largest).requires_grad_()
        value = likelihood(x).log_prob(y)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        score = likelihood.residual(x.detach(), y)
        seen = [("log_prob", value), ("gradient of log_prob", gradient), ("residual", score)]
        try:
            seen.append(("loss", likelihood.loss(x.detach(), y)))
            bound = likelihood.dual(score, y)
            # At the end of its range a score may round to one that is infeasible, where it is -inf.
            seen.append(("dual", torch.where(bound == -torch.inf, 0.0, bound)))
        except NotImplementedError:
            pass
        for name, numbers in seen:
            if not bool(torch.isfinite(numbers).all()):
                raise Failed(
                    f"Expected finite numbers at a predictor of {sign * largest:g}, got a {name} "
                    "that is not. Compute in the natural parameter (logits=, softplus, "
                    "log1p, xlogy), or say a smaller largest=."
                )
    return f"up to +-{largest:g}"


def _placeholder(likelihood: Likelihood, at: Tensor) -> str:
    y = torch.full_like(at, likelihood.placeholder)
    if not bool(torch.isfinite(likelihood(at).log_prob(y)).all()):
        raise Failed(
            f"Expected a placeholder that the family allows, got {likelihood.placeholder}: it "
            "stands where data are missing. Set the class attribute."
        )
    return f"{likelihood.placeholder:g}"


def _compare(name: str, got: Tensor, expected: Tensor, meaning: str) -> None:
    got, expected = got.detach(), expected.detach()
    error = (got - expected).abs() / (1 + expected.abs())
    worst = int(error.argmax())
    if not float(error.max()) <= _TOLERANCE:  # nan fails too
        raise Failed(
            f"Expected {float(expected.flatten()[worst]):.6g}, got "
            f"{float(got.expand_as(expected).flatten()[worst]):.6g}: {meaning}."
        )
