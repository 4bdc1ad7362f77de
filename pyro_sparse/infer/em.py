r"""Rates of the prior, by expectation-maximisation.

The E-step is an encoder's: its codes stand for the posterior. The M-step has a closed form
(``RateEM``), or its objective is a second loss for an optimiser (``RateLoss``).

**Point codes.** A ``Delta`` guide makes this a maximisation over codes and rates together, and that
has no maximum: as :math:`\lambda_k` grows the codes of atom :math:`k` shrink to zero, and what the
prior gains, :math:`N \log \lambda_k`, has no bound. A rate beyond the size at which its atom is
switched off never comes back. Only the hyperprior ends this: an atom without a single active code
gets the rate :math:`(N + r - 1) / \delta` (counts as in ``RateEM``), and without a hyperprior it
is refused by name. Small codes are shrunk most, so high rates come out too high: at known atoms by
about 1 % where noise is a tenth of the codes, without bound where both are alike. Where there are
more codes than samples to tell them apart, a rate may be several times too high at any noise. And
codes that fit the noise make its scale come out too low.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_sparse.dictionaries import Dictionary
from pyro_sparse.distributions import Law, check_prior, codes_prior
from pyro_sparse.distributions.rates import Rate, rate_statistic
from pyro_sparse.infer.averages import RunningAverage, data_size, encoded
from pyro_sparse.infer.callbacks import Callback, Progress
from pyro_sparse.likelihoods import check_mask

RatePrior = Callable[[Tensor], Law]


class RateEM(Callback):
    r"""Rates in closed form: the mode of their posterior given codes.

    With :math:`t` the prior's statistic (:math:`|z|` for Laplace), :math:`\bar t_k` its sum over
    the positions of atom :math:`k` averaged over data, :math:`N_e` the number of those positions,
    :math:`J` the number of data, and :math:`\lambda_k \sim \mathrm{Gamma}(r, \delta)`,

    .. math::
        \lambda_k = \frac{J N_e + w (r - 1)}{J \bar t_k + w \delta}, \qquad
        w = \begin{cases} 1 & \text{the posterior of the data set} \\
        J & \text{per\_datum: as published} \end{cases}

    Per datum the hyperprior is counted once for each example, so its weight does not fade as data
    are added: :math:`\lambda_k = (N_e + r - 1) / (\bar t_k + \delta)`.

    In several processes each takes its part of a minibatch, and all make the same update. Of
    minibatches the sums are averaged over steps with weight :math:`\gamma_m = m^{-\kappa}`
    (``decay``). Every datum counts alike, also in a smaller last minibatch. Where the minibatch is
    the whole data set the average is skipped, and the update is exact.

    As a callback of ``infer.fit`` it updates after every step from ``guide.encode``. An optimiser
    should not move the rate as well: leave it out of the ``train`` of its ``Update``.

    Args:
        rate: What is overwritten; the one that model and guide hold.
        prior: The model's prior, a callable ``rate -> distribution`` whose type has a registered
            rate statistic.
        hyperprior: ``Gamma(concentration, rate)`` of every rate, batch shape ``()`` or
            ``(atoms,)``; None for maximum likelihood, which refuses an atom without active codes.
            A mean of :math:`r / \delta` at the starting rate, as published, leaves
            :math:`\delta` as its strength.
        per_datum: Count the hyperprior once for each datum instead of once.
        decay: :math:`\kappa`: in (0.5, 1] the average over steps settles; 0 keeps the latest
            minibatch alone; 1 weighs all alike, also those from the start of a training.
        dictionary: Where data are masked: leave out codes whose atom meets no observed sample.
            Point codes are zero there, which would read as evidence for a high rate.

    Raises:
        TypeError: If an argument is of a wrong kind.
        ValueError: If a number is out of range or the hyperprior has another shape.

    References:
        Tolooshams, Dey & Ba (2021), IEEE TNNLS 32(6) (CRsAE), who count per datum. Averages over
        minibatches: Cappe & Moulines (2009), J. R. Stat. Soc. B 71(3).

    Example:
        >>> rate = Rate(1.0, num_atoms=2)
        >>> em = RateEM(rate, lambda rate: dist.Laplace(0.0, 1 / rate))
        >>> em.update(torch.tensor([[1.0, -0.5], [3.0, 0.0]]))
        tensor([0.5000, 4.0000])
    """

    def __init__(
        self,
        rate: Rate,
        prior: RatePrior,
        hyperprior: dist.Gamma | None = None,
        *,
        per_datum: bool = False,
        decay: float = 0.6,
        dictionary: Dictionary | None = None,
    ) -> None:
        self.rate = rate
        self._target = _Target(rate, prior, hyperprior, per_datum, dictionary)
        self._average = RunningAverage(decay)

    def update(
        self,
        codes: Tensor,
        num_data: int | None = None,
        *,
        counted: Tensor | None = None,
    ) -> Tensor:
        """Take in the codes of a minibatch and overwrite the rates.

        Nothing changes where an error is raised.

        Args:
            codes: Shape ``(n, atoms, *positions)``.
            num_data: Size of the whole data set; by default ``n``.
            counted: False for codes to leave out, broadcastable to ``codes``.

        Returns:
            The new rates, detached.

        Raises:
            ValueError: If a shape does not fit; an atom has no active code and there is no
                hyperprior (names the atoms); or ``prior(rate)`` is a law of another rate than
                ``rate``, such as its double.
            NotImplementedError: If the prior's type has no registered rate statistic.
        """
        size = data_size(codes, num_data)
        with torch.no_grad():
            sums = self._average.mixed(self._target.sums(codes, counted), size)
            self.rate.assign_(self._target.mode(sums, size))
        self._average.keep(sums)
        return self.rate().detach()

    def after_step(self, progress: Progress) -> None:
        """Encode the minibatch anew and update, unless the step was undone."""
        if math.isnan(progress.loss):
            return
        with torch.no_grad():
            codes = encoded(progress)
            counted = self._target.counted(progress.y, progress.mask)
        self.update(codes, progress.num_data, counted=counted)

    def state_dict(self) -> dict[str, Any]:
        """The averaged sums and the number of updates."""
        return self._average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        self._average.load_state_dict(state)


class RateLoss:
    r"""The M-step of the rates as an objective, for an optimiser: CRsAE's second stage.

    For a data set of :math:`J`, estimated from a minibatch, in nats and up to a constant,

    .. math::
        \sum_k J (\lambda_k \bar t_k - N_e \log \lambda_k)
        + w (\delta \lambda_k - (r - 1) \log \lambda_k)

    with the symbols of ``RateEM``; over :math:`J` and ``per_datum`` it is the published loss. Like
    an ELBO it is called as ``loss(model, guide)``, and the module that this gives as
    ``objective(y, num_data, mask=)``: in ``infer.fit``, the loss of an ``Update`` with
    ``train=[rate]``.

    Codes are the guide's value at ``"codes"``. Where they are held fixed, gradient steps settle
    where ``RateEM`` does. As published the gradient also passes through the encoder, whose codes
    shrink as the rate grows: another fixed point, at a higher rate, and without a hyperprior none
    at all, if only the start is high enough.

    Args:
        rate: The one that model and guide hold.
        prior: The model's prior, a callable ``rate -> distribution``.
        hyperprior: ``Gamma(concentration, rate)`` of every rate; None for none.
        per_datum: Count the hyperprior once for each datum instead of once.
        through_encoder: Let the gradient pass through the codes, as published, to the rate and to
            whatever else of the guide is trained.
        dictionary: Where data are masked: leave out codes whose atom meets no observed sample.

    Raises:
        TypeError: If an argument is of a wrong kind.
        ValueError: If the hyperprior has another shape; and at a call, as in ``RateEM.update``.

    References:
        Tolooshams, Dey & Ba (2021), IEEE TNNLS 32(6). We keep the rate positive by its logarithm;
        theirs moves freely.

    Example:
        >>> from pyro import sample
        >>> rate = Rate(2.0, num_atoms=2)
        >>> loss = RateLoss(rate, lambda rate: dist.Laplace(0.0, 1 / rate))
        >>> def guide(y, num_data):
        ...     return sample("codes", dist.Delta(y, event_dim=1))
        >>> loss(None, guide)(torch.tensor([[1.0, -0.5]])).detach()  # 2 * 1.5 - 2 * log(2)
        tensor(1.6137)
    """

    def __init__(
        self,
        rate: Rate,
        prior: RatePrior,
        hyperprior: dist.Gamma | None = None,
        *,
        per_datum: bool = False,
        through_encoder: bool = False,
        dictionary: Dictionary | None = None,
    ) -> None:
        self.rate = rate
        self.through_encoder = through_encoder
        self._target = _Target(rate, prior, hyperprior, per_datum, dictionary)

    def __call__(self, model: Callable[..., Any], guide: Callable[..., Any]) -> nn.Module:
        """The objective for a model and a guide, a module that holds both and the rate."""
        return _RateObjective(model, guide, self.rate, self._target, self.through_encoder)


class _RateObjective(nn.Module):
    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        rate: Rate,
        target: _Target,
        through_encoder: bool,
    ) -> None:
        super().__init__()
        # The model is not called; it is held as an ELBO does, so that both have its parameters.
        self.model, self.guide, self.rate = model, guide, rate
        self.target = target
        self.through_encoder = through_encoder

    def forward(
        self, y: Tensor, num_data: int | None = None, mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        if mask is not None:  # only where there is one: a guide need not know masks
            kwargs["mask"] = mask
        with torch.set_grad_enabled(self.through_encoder and torch.is_grad_enabled()):
            trace = poutine.trace(self.guide).get_trace(y, num_data, **kwargs)
            if "codes" not in trace.nodes:
                raise ValueError(
                    f'Expected a guide with the site "codes", got {trace.stochastic_nodes}.'
                )
            codes: Any = trace.nodes["codes"]["value"]
            counted = self.target.counted(y, mask)
        return self.target.loss(self.target.sums(codes, counted), data_size(codes, num_data))


class _Target:
    """Log-posterior of rates given codes: its sums, its value and its mode."""

    def __init__(
        self,
        rate: Rate,
        prior: RatePrior,
        hyperprior: dist.Gamma | None,
        per_datum: bool,
        dictionary: Dictionary | None,
    ) -> None:
        if not isinstance(rate, Rate):
            raise TypeError(f"Expected rate to be a distributions.Rate, got {type(rate).__name__}.")
        check_prior(prior, has_rate=True)
        self.rate = rate
        self.prior = prior
        self.per_datum = per_datum
        self.dictionary = dictionary
        self.concentration = self.strength = torch.zeros(())
        if hyperprior is None:
            self.concentration = torch.ones(())  # r = 1, delta = 0: flat
        elif not isinstance(hyperprior, dist.Gamma):
            raise TypeError(
                "Expected hyperprior to be a pyro.distributions.Gamma (or None), got "
                f"{type(hyperprior).__name__}."
            )
        else:
            shape = rate().shape
            if hyperprior.batch_shape not in ((), shape):
                raise ValueError(
                    f"Expected a hyperprior of batch shape () or {tuple(shape)}, as the rates, got "
                    f"{tuple(hyperprior.batch_shape)}."
                )
            self.concentration = hyperprior.concentration.detach()
            self.strength = hyperprior.rate.detach()

    def sums(self, codes: Tensor, counted: Tensor | None = None) -> dict[str, Tensor]:
        """Statistic and power summed over a minibatch, shape of the rates, and its size."""
        rate = self.rate().detach()
        law = codes_prior(self.prior, rate, tuple(codes.shape[1:]), like=codes)
        found = rate_statistic(law, codes)
        own = rate.to(codes)
        if rate.dim():
            own = own.reshape(-1, *[1] * (codes.dim() - 2))
        own, of_law = torch.broadcast_tensors(own, found.rate)
        if not torch.allclose(own, of_law, rtol=1e-4, atol=0.0):
            raise ValueError(
                "Expected prior(rate) to be a law of that rate, got one of the rate "
                f"{of_law.flatten()[0].item():.6g} for {own.flatten()[0].item():.6g}: the closed "
                "form would learn the one and store it as the other."
            )
        value = found.value
        power = torch.as_tensor(found.power, dtype=value.dtype, device=value.device)
        power = power.expand_as(value)
        if counted is not None:
            counted = check_mask(codes, counted)
            value = torch.where(counted, value, torch.zeros_like(value))
            power = torch.where(counted, power, torch.zeros_like(power))
        dims = [d for d in range(codes.dim()) if d != 1 or not rate.dim()]
        size = torch.tensor(float(len(codes)), dtype=value.dtype, device=value.device)
        return {"total": value.sum(dims), "count": power.sum(dims), "size": size}

    def counted(self, y: Tensor, mask: Tensor | None) -> Tensor | None:
        """False for codes whose atom meets no observed sample."""
        if mask is None or self.dictionary is None:
            return None
        reach = self.dictionary.bind(self.dictionary.atoms.detach().abs())
        return reach.adjoint(check_mask(y, mask).to(y)) > 0

    def mode(self, sums: dict[str, Tensor], num_data: int) -> Tensor:
        """Rates of the highest posterior density."""
        count, total = self._of_data_set(sums, num_data)
        self._check(total, num_data)
        return count / total

    def loss(self, sums: dict[str, Tensor], num_data: int) -> Tensor:
        """Minus the log-posterior density, up to a constant."""
        count, total = self._of_data_set(sums, num_data)
        self._check(total.detach(), num_data)
        rate = self.rate()
        return (total * rate - count * rate.log()).sum()

    def _of_data_set(self, sums: dict[str, Tensor], num_data: int) -> tuple[Tensor, Tensor]:
        """Power and statistic of the whole data set, with what the hyperprior adds to both."""
        factor = num_data / sums["size"]
        weight = num_data if self.per_datum else 1
        count = factor * sums["count"] + weight * (self.concentration.to(factor) - 1)
        total = factor * sums["total"] + weight * self.strength.to(factor)
        return count, total

    def _check(self, total: Tensor, num_data: int) -> None:
        idle = total == 0
        if bool(idle.any()):
            atoms = idle.reshape(-1).nonzero().flatten().tolist()
            raise ValueError(
                f"Expected active codes for every atom, got none so far for atoms {atoms}: without "
                "a hyperprior their rate is infinite. Pass hyperprior=Gamma(concentration, rate), "
                "start from a lower rate, or take larger minibatches."
            )
