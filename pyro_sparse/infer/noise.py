"""Scale of the noise, by expectation-maximisation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_sparse.dictionaries import Dictionary
from pyro_sparse.infer.averages import RunningAverage, data_size, encoded
from pyro_sparse.infer.callbacks import Callback, Progress
from pyro_sparse.infer.numbers import check_real
from pyro_sparse.likelihoods import Gaussian, check_mask
from pyro_sparse.ops import check_tensor


class NoiseEM(Callback):
    r"""Scale of Gaussian noise in closed form: root mean square of what codes leave unexplained.

    .. math:: \sigma^2 = \frac{1}{|\Omega|} \sum_{i \in \Omega} (y_i - (Dz)_i)^2

    over the observed samples :math:`\Omega` that share the scale: all of them, or those of one
    channel, as the shape of the likelihood's scale says. Minibatches are averaged as in ``RateEM``.
    The scatter of the codes around their point estimate is left out, and with it
    :math:`\mathrm{tr}\, D\, \mathrm{Cov}(z \mid y) D^T`: the more codes are active, the more
    :math:`\sigma` comes out too low.

    As a callback of ``infer.fit`` it updates after every step from ``guide.encode``.

    Args:
        likelihood: Its scale is overwritten, fixed or trainable; the one that model and guide hold.
        dictionary: The model's.
        momentum: None for the closed form; in (0, 1], as published (0.01), the moving average
            :math:`\sigma \leftarrow (1 - m) \sigma + m\, \mathrm{RMS}`.
        decay: :math:`\kappa` of the averages over minibatches; of no effect with ``momentum``.

    Raises:
        TypeError: If the likelihood is not Gaussian.
        ValueError: If a number is out of range.

    References:
        Tolooshams, Dey & Ba (2021), IEEE TNNLS 32(6), and the moving average of its code.

    Example:
        >>> from pyro_sparse.dictionaries import Dense
        >>> likelihood = Gaussian(1.0)
        >>> em = NoiseEM(likelihood, Dense(2, 2, atoms=torch.eye(2)))
        >>> em.update(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 1.5]]))
        tensor(0.5000)
    """

    def __init__(
        self,
        likelihood: Gaussian,
        dictionary: Dictionary,
        *,
        momentum: float | None = None,
        decay: float = 0.6,
    ) -> None:
        if not isinstance(likelihood, Gaussian):
            raise TypeError(
                f"Expected a Gaussian likelihood, got {type(likelihood).__name__}: other families "
                "have no scale with this closed form."
            )
        if momentum is not None:
            check_real("momentum", momentum, 0.0, 1.0, open_low=True)
        self.likelihood = likelihood
        self.dictionary = dictionary
        self.momentum = momentum
        # The moving average is of the scale itself: no sums of earlier steps enter it.
        self._average = RunningAverage(decay if momentum is None else 0.0)

    def update(
        self,
        y: Tensor,
        codes: Tensor,
        num_data: int | None = None,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Take in a minibatch with its codes and overwrite the scale.

        Nothing changes where an error is raised. A scale whose samples are all unobserved stays.

        Args:
            y: Shape ``(n, *signal_shape)``.
            codes: Shape ``(n, *code_shape)``.
            num_data: Size of the whole data set; by default ``n``.
            mask: True where a sample was observed, broadcastable to ``y``; the others may hold
                anything, also ``nan``.

        Returns:
            The new scale, detached.

        Raises:
            ValueError: If a shape does not fit, or nothing is left unexplained: a scale of zero.
        """
        check_tensor("y", y, like=self.dictionary.like)
        size = data_size(codes, num_data)
        scale = self.likelihood.scale.detach()
        with torch.no_grad():
            predictor = self.dictionary(codes)  # (n, *signal_shape)
            if predictor.shape != y.shape:
                raise ValueError(
                    f"Expected y of the predictor's shape {tuple(predictor.shape)}, got "
                    f"{tuple(y.shape)}."
                )
            observed = torch.ones_like(y, dtype=torch.bool) if mask is None else check_mask(y, mask)
            squared = torch.where(observed, y - predictor, torch.zeros_like(y)).square()
            new = {
                "total": squared.sum_to_size(scale.shape),
                "count": observed.to(y).sum_to_size(scale.shape),
                "size": y.new_tensor(float(len(y))),
            }
            sums = self._average.mixed(new, size)
            # Where nothing was observed there is 0 / 0, which is not used.
            rms = (sums["total"] / sums["count"]).sqrt()
            if self.momentum is not None:
                rms = torch.lerp(scale, rms.to(scale), self.momentum)
            self.likelihood.assign_(torch.where(sums["count"] > 0, rms.to(scale), scale))
        self._average.keep(sums)
        return self.likelihood.scale.detach().clone()

    def after_step(self, progress: Progress) -> None:
        """Encode the minibatch anew and update, unless the step was undone."""
        if math.isnan(progress.loss):
            return
        with torch.no_grad():
            codes = encoded(progress)
        self.update(progress.y, codes, progress.num_data, mask=progress.mask)

    def state_dict(self) -> dict[str, Any]:
        """The averaged sums and the number of updates."""
        return self._average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        self._average.load_state_dict(state)
