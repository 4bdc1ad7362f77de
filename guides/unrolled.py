"""Encoders unrolled from proximal-gradient steps, as guides."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_sparse.dictionaries import Dense, Dictionary
from pyro_sparse.distributions import (
    Law,
    Prior,
    check_prior,
    check_rate,
    codes_prior,
    conjugate,
)
from pyro_sparse.infer.bundle import register_savable
from pyro_sparse.infer.store import claim_names
from pyro_sparse.likelihoods import Likelihood, check_data
from pyro_sparse.solvers import ISTA, Bias, Method, Shrinkage, Unrolled


class UnrolledFISTA(PyroModule):
    r"""MAP codes by a fixed number of FISTA steps: :math:`q(z \mid y) = \delta(z - \hat z(y))`.

    The layers are differentiable, so training under an ELBO moves the dictionary through the
    encoder as well as through the decoder, and learns thresholds that make up for the finite
    depth. Handed the model's own dictionary the weights are tied; ``untied`` gives the encoder
    copies of its own.

    Site: ``"codes"``, a ``Delta`` of event shape ``(atoms, *positions)`` in the plate ``"data"``.
    As a point estimate it has no spread: read posterior uncertainty from another guide.

    Args:
        dictionary: The model's dictionary, which ties the weights.
        likelihood: The model's likelihood.
        prior: The model's prior: a distribution, or a callable of the rate. Its type needs a
            registered ``prox``.
        rate: For a callable prior: a tensor (fixed), a module without arguments that returns one
            (learned, shared with the model), or None if ``rest`` samples it.
        rest: A guide of the model's other latent sites (``"rate"``, ``"dictionary"``), such as an
            ``AutoNormal`` of them. It is called first, with the same arguments, and returns a dict
            from site name to value, as Pyro's autoguides do.
        num_steps: Number of layers.
        method: ``solvers.FISTA()`` (default) or ``solvers.ISTA()``.
        shrinkage: What a layer does with the value of its gradient step: ``solvers.Proximal(...)``,
            ``HardThreshold(...)``, ``Bias(...)``, ``TopK(...)``, ``NonMaximumSuppression(...)``. By
            default the prior's proximal step with a learned factor on the threshold of each atom;
            ``Proximal()`` learns none.
        step_size: Fixed step, "as published", in place of ``lipschitz`` and the curvature.
        lipschitz: Fixed value in place of the dictionary's squared norm, "as published"; the
            published values often lie below the true one. None: a safe bound at every call.
        analysis: Dictionary whose adjoint the layers use; default ``dictionary``.
        synthesis: Dictionary whose forward map the layers use; default ``dictionary``.
        recurrence: Linear map from codes to codes in place of ``synthesis`` and the residual; see
            ``solvers.Unrolled`` and ``recurrent``.

    Raises:
        TypeError: If ``prior`` is neither a distribution nor a callable, or another argument is of
            the wrong kind.
        ValueError: If a number is out of range, or ``prior`` holds a tensor that requires a
            gradient.

    References:
        Beck & Teboulle (2009), SIAM J. Imaging Sci. 2(1); Gregor & LeCun (2010), ICML;
        Tolooshams, Dey & Ba (2021), IEEE TNNLS 32(6).

    Example:
        >>> from pyro_sparse.dictionaries import Dense
        >>> from pyro_sparse.likelihoods import Gaussian
        >>> guide = UnrolledFISTA(Dense(8, 5), Gaussian(0.1), dist.Laplace(0.0, 1.0), num_steps=5)
        >>> guide(torch.randn(3, 5)).shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        dictionary: Dictionary,
        likelihood: Likelihood,
        prior: Prior,
        *,
        rate: Tensor | float | Callable[[], Tensor] | None = None,
        rest: Callable[..., dict[str, Tensor]] | None = None,
        num_steps: int = 15,
        method: Method | None = None,
        shrinkage: Shrinkage | None = None,
        step_size: float | None = None,
        lipschitz: float | None = None,
        analysis: Dictionary | None = None,
        synthesis: Dictionary | None = None,
        recurrence: nn.Module | None = None,
    ) -> None:
        super().__init__()
        sampled = rest is not None and not isinstance(prior, Law)
        check_prior(prior, has_rate=rate is not None or sampled)
        if isinstance(rate, Law):
            raise TypeError(
                f"Expected a rate, got a {type(rate).__name__}: a rate with a distribution is a "
                "latent site of the model. Give the guide rest=, which samples it, and no rate."
            )
        check_rate(rate)
        if rest is not None and not callable(rest):
            raise TypeError(
                "Expected rest to be a guide of the other sites, such as an AutoNormal, got "
                f"{type(rest).__name__}."
            )
        self.encoder = Unrolled(
            dictionary,
            likelihood,
            num_steps=num_steps,
            method=method,
            shrinkage=shrinkage,
            step_size=step_size,
            lipschitz=lipschitz,
            analysis=analysis,
            synthesis=synthesis,
            recurrence=recurrence,
        )
        # Names of their own: where these modules are not the model's, Pyro's store would take the
        # parameters at equal paths for one.
        self.encoder_prior = prior
        self.encoder_rate = torch.as_tensor(rate) if isinstance(rate, int | float) else rate
        self.rest = rest

    @classmethod
    def untied(
        cls, dictionary: Dictionary, likelihood: Likelihood, prior: Prior, **options: Any
    ) -> UnrolledFISTA:
        """A guide whose layers have weights of their own, starting as copies of ``dictionary``.

        The model's dictionary then is the decoder alone; only the encoder's ``analysis`` and
        ``synthesis`` move the codes.

        Args:
            dictionary: The model's dictionary.
            likelihood: The model's likelihood.
            prior: The model's prior.
            options: Further arguments of ``UnrolledFISTA``.

        Example:
            >>> from pyro_sparse.dictionaries import Dense
            >>> from pyro_sparse.likelihoods import Gaussian
            >>> guide = UnrolledFISTA.untied(Dense(8, 5), Gaussian(0.1), dist.Laplace(0.0, 1.0))
            >>> guide.encoder.analysis is guide.encoder.synthesis
            False
        """
        analysis, synthesis = copy.deepcopy(dictionary), copy.deepcopy(dictionary)
        return cls(dictionary, likelihood, prior, analysis=analysis, synthesis=synthesis, **options)

    @classmethod
    def recurrent(
        cls,
        dictionary: Dictionary,
        likelihood: Likelihood,
        prior: Prior,
        *,
        rate: Tensor | float | None = None,
        num_steps: int = 11,
        step_size: float | None = None,
    ) -> UnrolledFISTA:
        r"""A guide that is a recurrent network of rectified linear units, all weights free.

        .. math:: z_{t+1} = \max(0,\; E y + S z_t - b)

        Starts as ISTA, :math:`E = s D^T / \sigma^2`, :math:`S = I - s D^T D / \sigma^2`,
        :math:`b = s \lambda` for an exponential prior of rate :math:`\lambda`, and codes equal to
        its; a two-sided prior gives soft shrinkage. Training may then move the explaining-away
        matrix :math:`S` away from any dictionary. It holds :math:`E` in ``encoder.analysis.atoms``
        (one row an atom), :math:`S` in ``encoder.recurrence.weight`` and :math:`b` in
        ``encoder.shrinkage.bias``.

        Args:
            dictionary: The model's dictionary; a dense one.
            likelihood: The model's likelihood; with a score that is linear, as ``Gaussian`` has.
            prior: The model's prior; one with a registered ``conjugate``.
            rate: For a callable prior: where the bias starts. The encoder does not follow it.
            num_steps: Number of layers; published: 11.
            step_size: Step :math:`s` of the start; default one over a bound of the curvature.

        Raises:
            ValueError: If a shape or number does not fit, or the likelihood's score is not linear.

        References:
            Rolfe & LeCun (2013), Discriminative recurrent sparse auto-encoders, ICLR, eq. (2).

        Example:
            >>> from pyro_sparse.dictionaries import Dense
            >>> from pyro_sparse.likelihoods import Gaussian
            >>> guide = UnrolledFISTA.recurrent(Dense(8, 5), Gaussian(0.1), dist.Exponential(1.0))
            >>> guide.encoder.recurrence.weight.shape
            torch.Size([8, 8])
        """
        atoms = dictionary.atoms.detach()
        if atoms.dim() != 2 or dictionary.code_dims != 1:
            raise ValueError(
                f"Expected a dense dictionary, atoms (atoms, features), got {tuple(atoms.shape)}."
            )
        num_atoms, num_features = atoms.shape
        precision = _precision(likelihood, atoms[0])
        step = step_size
        if step is None:
            step = 1 / float(dictionary.squared_norm() * precision.max())
        given = torch.as_tensor(rate) if isinstance(rate, int | float) else rate
        slopes = conjugate(codes_prior(prior, given, (num_atoms,), like=atoms))
        bias = (step * slopes.upper).expand(num_atoms).to(atoms)
        recurrence = nn.Linear(num_atoms, num_atoms, bias=False).to(atoms)
        start = step * precision * atoms
        with torch.no_grad():
            recurrence.weight.copy_(torch.eye(num_atoms).to(atoms) - atoms @ start.T)
        return cls(
            dictionary,
            likelihood,
            prior,
            rate=rate,
            num_steps=num_steps,
            method=ISTA(),
            shrinkage=Bias(bias, two_sided=bool(slopes.lower.isfinite().all())),
            step_size=step,
            analysis=Dense(num_atoms, num_features, atoms=start, unit_norm=False),
            recurrence=recurrence,
        )

    def forward(
        self,
        y: Tensor,
        num_data: int | None = None,
        mask: Tensor | None = None,
        label: Tensor | None = None,
    ) -> Tensor:
        """Run the guide.

        Args:
            y: Minibatch of data, shape ``(n, *signal_shape)``.
            num_data: Size of the whole data set; by default ``n``.
            mask: True where a sample was observed, broadcastable to ``y``.
            label: Classes that the model is given; codes do not depend on them.

        Returns:
            Codes, shape ``(n, atoms, *positions)``.
        """
        claim_names(self)
        values = self._rest_values(y, num_data, mask)
        codes = self.encode(y, mask, values, num_data=num_data)
        index = torch.arange(len(y), device=y.device)
        with pyro.plate("data", num_data or len(y), subsample=index):
            event_dim = self.encoder.dictionary.code_dims
            codes = pyro.sample("codes", dist.Delta(codes, event_dim=event_dim))
        return codes

    def encode(
        self,
        y: Tensor,
        mask: Tensor | None = None,
        values: dict[str, Tensor] | None = None,
        *,
        num_data: int | None = None,
    ) -> Tensor:
        """Codes of a batch, without any sample statement.

        Args:
            y: Shape ``(n, *signal_shape)``.
            mask: True where a sample was observed.
            values: Values of other latent sites (``"rate"``, ``"dictionary"``) where the model
                samples them.
            num_data: Size of the whole data set; checked, and otherwise without effect.

        Returns:
            Shape ``(n, atoms, *positions)``, with exact zeros.

        Raises:
            TypeError: If an argument is of the wrong kind or dtype.
            RuntimeError: If the data are on another device than the dictionary.
            ValueError: If a shape does not fit, or a rate is missing.
        """
        if values is not None and not isinstance(values, dict):
            raise TypeError(
                "Expected values to be a dict from site name to value, got "
                f"{type(values).__name__}."
            )
        encoder, values = self.encoder, values or {}
        dictionary = encoder.dictionary
        y, mask = check_data(y, mask, num_data, dictionary.signal_dims, dictionary.like)
        code_dims = encoder.dictionary.code_dims
        code_shape = tuple(encoder.dictionary.code_shape(tuple(y.shape))[-code_dims:])
        rate = values.get("rate")
        if rate is None:
            rate = self.encoder_rate() if callable(self.encoder_rate) else self.encoder_rate
        if rate is None and not isinstance(self.encoder_prior, Law):
            raise ValueError(
                "Expected the rate that rest samples: pass values={'rate': ...}, for example "
                "values=guide.rest.median()."
            )
        law = codes_prior(self.encoder_prior, rate, code_shape, like=y)
        return encoder(y, law, mask=mask, atoms=values.get("dictionary"))

    def _rest_values(
        self, y: Tensor, num_data: int | None, mask: Tensor | None
    ) -> dict[str, Tensor]:
        if self.rest is None:
            return {}
        given = {} if mask is None else {"mask": mask}
        values = self.rest(y, num_data, **given)
        if not isinstance(values, dict):
            raise TypeError(
                "Expected rest to return a dict from site name to value, as Pyro's autoguides do, "
                f"got {type(values).__name__}."
            )
        return values


def _precision(likelihood: Likelihood, like: Tensor) -> Tensor:
    """The score of a likelihood is this times the residual, shape ``(features,)``."""
    one, line = torch.ones_like(like), torch.linspace(-2, 2, len(like)).to(like)
    precision = likelihood.residual(torch.zeros_like(like), one).detach()
    if not torch.allclose(likelihood.residual(line, one), precision * (one - line), rtol=1e-4):
        raise ValueError(
            "Expected a likelihood with a linear score, such as Gaussian(scale), got "
            f"{type(likelihood).__name__}: with others ISTA is no recurrence of codes alone."
        )
    return precision


def _arguments(guide: UnrolledFISTA) -> dict[str, Any]:
    """What a saved guide is built from again."""
    encoder = guide.encoder
    return {
        "dictionary": encoder.dictionary,
        "likelihood": encoder.likelihood,
        "prior": guide.encoder_prior,
        "rate": guide.encoder_rate,
        "rest": guide.rest,
        "num_steps": encoder.num_steps,
        "method": encoder.method,
        "shrinkage": encoder.shrinkage,
        "step_size": encoder.step_size,
        "lipschitz": encoder.lipschitz,
        "analysis": encoder.analysis,
        "synthesis": encoder.synthesis,
        "recurrence": encoder.recurrence,
    }


register_savable(UnrolledFISTA, name="pyro_sparse.guides.UnrolledFISTA", arguments=_arguments)
