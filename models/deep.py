"""Sparse coding with any network for a decoder, as a Pyro program."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyro_sparse.dictionaries.base import check_shape, check_sizes
from pyro_sparse.distributions import Law, Prior
from pyro_sparse.infer.bundle import register_savable
from pyro_sparse.likelihoods import Likelihood
from pyro_sparse.models.program import CodesProgram, Decode


class DeepSparseCoding(CodesProgram):
    r"""Sparse codes decoded by a network.

    .. math::
        \lambda &\sim p(\lambda) && \texttt{"rate"}\text{, if rate is a distribution} \\
        t_n &\sim p(t) && \texttt{"threshold"}\text{, if threshold is given} \\
        z_n &\sim \mathrm{prior}(\lambda \text{ or } t_n) && \texttt{"codes"} \\
        y_n &\sim \mathrm{likelihood}(f_\theta(z_n)) && \texttt{"obs"}

    Sites, for a minibatch of ``n`` out of ``num_data``: ``"codes"`` and ``"threshold"`` have event
    shape ``code_shape`` and ``"obs"`` event shape ``signal_shape``, in the plate ``"data"`` of dim
    -1, which scales them by ``num_data / n``; ``"rate"`` stands outside. They are those of
    ``SparseCoding``, so the same guides serve.

    The network sees one batch dimension, whatever stands before the codes: where there are several
    draws of each datum, they are flattened into the batch and the shape is restored. **Batch
    normalisation** in training mode therefore takes its mean and variance over draws and data
    alike, and moves its running averages at every run of the model, also where the model is only
    evaluated. It makes the data of a minibatch depend on each other, so the objective is a bound
    for no model: call ``model.eval()`` before log-weights or an ELBO that is to be compared, or use
    a normalisation within a datum, such as ``GroupNorm``. Dropout likewise.

    Args:
        decoder: Any module from ``(batch, *code_shape)`` to the predictor, the natural parameter of
            the likelihood, ``(batch, *signal_shape)``. (Published decoders end in a sigmoid, which
            is the mean of a ``Gaussian``.)
        likelihood: Family of the data.
        prior: A distribution that expands to ``code_shape``, or a callable
            ``rate -> distribution`` or ``threshold -> distribution``.
        code_shape: Shape of one datum's codes, ``(atoms, *positions)``.
        signal_shape: Shape of one datum.
        rate: For a callable prior: a tensor of shape ``()`` or ``(atoms,)`` (fixed), a module
            without arguments that returns one (learned), or a distribution over one (sampled at
            ``"rate"``).
        threshold: For a callable prior, in place of a rate: law of one threshold for every code of
            every datum; see ``SparseCoding``.

    Raises:
        TypeError: If ``decoder`` is no module, ``prior`` is neither a distribution nor a callable
            with a rate or threshold, or another argument is of the wrong kind.
        ValueError: If a shape has no or empty dimensions, or ``prior``, ``rate`` or ``threshold``
            is or holds a tensor that requires a gradient, or draws of ``threshold`` may be
            negative.
        NotImplementedError: If both ``rate`` and ``threshold`` are given.

    References:
        Fallah & Rozell (2022), ICML, PMLR 162:6034-6058.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_sparse.likelihoods import Gaussian
        >>> network = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 5))
        >>> prior = dist.Laplace(0.0, 1.0)
        >>> model = DeepSparseCoding(
        ...     network, Gaussian(0.1), prior, code_shape=(6,), signal_shape=(5,)
        ... )
        >>> model(num_data=3).shape
        torch.Size([3, 5])
    """

    signal_shape: tuple[int, ...]

    def __init__(
        self,
        decoder: nn.Module,
        likelihood: Likelihood,
        prior: Prior,
        *,
        code_shape: tuple[int, ...],
        signal_shape: tuple[int, ...],
        rate: Tensor | float | Law | Callable[[], Tensor] | None = None,
        threshold: Law | None = None,
    ) -> None:
        if not isinstance(decoder, nn.Module):
            raise TypeError(
                f"Expected decoder to be a torch.nn.Module, got {type(decoder).__name__}."
            )
        code_shape, signal_shape = check_shape(code_shape), check_shape(signal_shape)
        check_sizes(code_shape=code_shape, signal_shape=signal_shape)
        super().__init__(
            likelihood, prior, rate=rate, threshold=threshold, signal_shape=signal_shape
        )
        self.decoder = decoder
        self.code_shape = code_shape
        self.signal_dims = len(signal_shape)

    @property
    def like(self) -> Tensor:
        """A tensor of the decoder's dtype and device; an empty one if it holds none."""
        held = itertools.chain(self.decoder.parameters(), self.decoder.buffers(), [torch.empty(0)])
        return next(tensor.detach() for tensor in held if tensor.is_floating_point())

    def codes_of(self, signal_shape: tuple[int, ...]) -> tuple[int, ...]:  # noqa: D102
        if signal_shape != self.signal_shape:
            raise ValueError(
                f"Expected data of shape (n, {_listed(self.signal_shape)}), got "
                f"(n, {_listed(signal_shape)})."
            )
        return self.code_shape

    def decoder_sites(self, like: Tensor) -> Decode:  # noqa: D102
        return self._decode

    def _decode(self, codes: Tensor) -> Tensor:
        lead = tuple(codes.shape[: codes.dim() - len(self.code_shape)])
        # A single batch dimension goes through as it is: what is no plain tensor may not reshape.
        flat = codes if len(lead) == 1 else codes.reshape(-1, *self.code_shape)
        predictor = self.decoder(flat)  # (batch, *signal_shape)
        expected = (*flat.shape[:1], *self.signal_shape)
        if tuple(predictor.shape) != expected:
            raise ValueError(
                f"Expected a decoder from codes {tuple(flat.shape)} to a predictor {expected}, got "
                f"{tuple(predictor.shape)}. End it with nn.Unflatten, or change signal_shape."
            )
        return predictor if len(lead) == 1 else predictor.reshape(*lead, *self.signal_shape)


def _listed(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))


register_savable(DeepSparseCoding, name="pyro_sparse.models.DeepSparseCoding")
