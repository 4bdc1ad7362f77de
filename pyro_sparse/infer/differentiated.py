"""Gradients of a dictionary as a choice of objective: through the encoder, or not, or in part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_sparse.infer.phases import Objective
from pyro_sparse.solvers.gradients import Gradient, check_gradient, differentiated


class Differentiated:
    r"""An objective whose unrolled encoders are differentiated as ``gradient`` says.

    The value of the objective is the same; what its gradient by a dictionary takes along differs.
    With :math:`L` the loss of the data at codes :math:`z_T` and :math:`h` the prior's penalty, the
    published choices are

    ===================  ============================================  ===========================
    gradient             written as                                    estimates
    ===================  ============================================  ===========================
    decoder              ``Differentiated(SparseELBO(), Detached())``  :math:`\partial_2 L`
    encoder, lasso       ``SparseELBO()``                              and through :math:`L + h`
    encoder, least sq.   ``Reconstruction()``                          and through :math:`L` alone
    ===================  ============================================  ===========================

    The last one is nearest to the gradient at the true codes: of a Laplace prior it leaves a bias
    of second order in the rate, the others one of first order. ``Implicit()`` is the gradient of
    the first kind's deep network in the memory of one layer, ``Truncated(n)`` that of the last
    ``n`` layers.

    Args:
        objective: Called as ``objective(model, guide)``, such as ``SparseELBO()``.
        gradient: ``solvers.BackPropagation()``, ``Detached()``, ``Truncated(n)``, ``Implicit()``.

    Raises:
        TypeError: If an argument is of another kind.

    References:
        Tolooshams & Ba (2022), Stable and interpretable unrolled dictionary learning, TMLR.

    Example:
        >>> import pyro, torch
        >>> from pyro_sparse.infer import SparseELBO
        >>> from pyro_sparse.solvers import Detached
        >>> objective = Differentiated(SparseELBO(), Detached())
        >>> isinstance(objective(torch.nn.Identity(), torch.nn.Identity()), torch.nn.Module)
        True
    """

    def __init__(self, objective: Objective, gradient: Gradient) -> None:
        if not callable(objective):
            raise TypeError(
                f"Expected an objective, such as SparseELBO(), got {type(objective).__name__}."
            )
        check_gradient(gradient)
        self.objective = objective
        self.gradient = gradient

    def __call__(self, model: Callable[..., Any], guide: Callable[..., Any]) -> nn.Module:
        """The objective for a model and a guide, a module that holds both."""
        return _Differentiated(self.objective(model, guide), self.gradient)


class _Differentiated(nn.Module):
    def __init__(self, objective: nn.Module, gradient: Gradient) -> None:
        super().__init__()
        self.objective = objective
        self.gradient = gradient

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        with differentiated(self.gradient):
            loss: Tensor = self.objective(*args, **kwargs)
        return loss


class Reconstruction:
    r"""Minus the log-likelihood at one draw of the guide: what autoencoders are trained on.

    .. math:: -\sum_n \log p(y_n \mid z_n), \qquad z \sim q(z \mid y)

    The prior of the codes is left out. It still decides how sparse they are, through the encoder,
    and training cannot make the codes small to please it: the dictionary's bias by the prior is of
    second order. With a point guide this is ``-log p`` at its codes; of other guides it takes a
    draw, whose law must have a pathwise one for its parameters to get a gradient.

    Sites other than ``"obs"`` that are observed, such as a label, count as well; plates scale, and
    masks leave out.

    References:
        Tolooshams & Ba (2022), TMLR (the gradient of the autoencoder, least squares).

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model(y, num_data):
        ...     with pyro.plate("data", num_data):
        ...         codes = pyro.sample("codes", dist.Laplace(0.0, 1.0))
        ...         pyro.sample("obs", dist.Normal(codes, 1.0), obs=y)
        >>> def guide(y, num_data):
        ...     with pyro.plate("data", num_data):
        ...         pyro.sample("codes", dist.Delta(y / 2))
        >>> Reconstruction()(model, guide)(torch.tensor([2.0]), 1)  # (1 + log 2 pi) / 2
        tensor(1.4189)
    """

    def __call__(self, model: Callable[..., Any], guide: Callable[..., Any]) -> nn.Module:
        """The objective for a model and a guide, a module that holds both."""
        return _Reconstruction(model, guide)


class _Reconstruction(nn.Module):
    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.guide = guide

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        drawn = poutine.trace(self.guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(self.model, trace=drawn)
        trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        observed = [
            name
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and site["is_observed"] and not site_is_subsample(site)
        ]
        if not observed:
            raise ValueError(
                f"Expected a model with observed data, got the sites {sorted(trace.nodes)}."
            )
        trace.compute_log_prob(lambda name, _: name in observed)
        terms: list[Tensor] = [trace.nodes[name]["log_prob_sum"] for name in observed]
        return -torch.stack(terms).sum()
