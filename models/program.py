"""What all programs share: latent codes in a plate, decoded into the natural parameter of data."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral

import pyro
import torch
from pyro.distributions import Delta, ExpandedDistribution, Independent, MaskedDistribution
from pyro.nn import PyroModule
from torch import Tensor

from pyro_sparse.distributions import Law, Prior, check_prior, check_rate, codes_prior, spread
from pyro_sparse.infer.store import claim_names
from pyro_sparse.likelihoods import Likelihood, check_data
from pyro_sparse.ops import kind_of

Decode = Callable[[Tensor], Tensor]
"""From codes ``(..., *code_shape)`` to the predictor ``(..., *signal_shape)``."""


class CodesProgram(PyroModule):
    """Declares a program of codes and data: concrete ones say how codes are decoded.

    Args:
        likelihood: Family of the data.
        prior: A distribution, or a callable ``rate -> distribution`` or
            ``threshold -> distribution``.
        rate: What a callable prior is given, shared by all data.
        threshold: Law of what a callable prior is given, drawn for every code of every datum.
        signal_shape: Shape of one datum where the program fixes it.

    Attributes:
        signal_dims: Number of dimensions of one datum.
        signal_shape: Its shape, where the program fixes it.
    """

    signal_dims: int
    signal_shape: tuple[int, ...] | None

    def __init__(
        self,
        likelihood: Likelihood,
        prior: Prior,
        *,
        rate: Tensor | float | Law | Callable[[], Tensor] | None,
        threshold: Law | None,
        signal_shape: tuple[int, ...] | None,
    ) -> None:
        super().__init__()
        if not isinstance(likelihood, Likelihood):
            raise TypeError(
                f"Expected a Likelihood, such as Gaussian(...), got {kind_of(likelihood)}."
            )
        _check_threshold(threshold, prior, rate)
        check_prior(prior, has_rate=rate is not None or threshold is not None)
        check_rate(rate)
        self.likelihood = likelihood
        self.prior = prior
        self.rate = torch.as_tensor(rate) if isinstance(rate, int | float) else rate
        self.threshold = threshold
        self.signal_shape = signal_shape

    @property
    def like(self) -> Tensor:
        """A tensor of the decoder's dtype and device."""
        raise NotImplementedError

    def codes_of(self, signal_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the codes of one datum, ``(atoms, *positions)``.

        Raises:
            ValueError: If the shape of the datum does not fit.
        """
        raise NotImplementedError

    def decoder_sites(self, like: Tensor) -> Decode:
        """The decoder, with its own latent sites sampled, outside the plate."""
        raise NotImplementedError

    def forward(
        self, y: Tensor | None = None, num_data: int | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Run the program.

        Args:
            y: Minibatch of data, shape ``(n, *signal_shape)``; None draws ``num_data`` data.
            num_data: Size of the whole data set, ``>= n``; by default ``n``.
            mask: True where a sample was observed, broadcastable to ``y``; the others may hold
                anything, also ``nan``.

        Returns:
            The data: ``y``, or what was drawn.

        Raises:
            ValueError: If a shape does not fit, or there is nothing to say how much to draw.
        """
        return self.run(y, num_data, mask)

    def run(
        self,
        y: Tensor | None,
        num_data: int | None,
        mask: Tensor | None,
        also: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """What ``forward`` does; ``also`` is called with the codes, inside the plate."""
        claim_names(self)
        like = self.like if y is None else y
        if y is None:
            size, signal_shape = self._size_of_draw(num_data)
        else:
            y, mask = check_data(
                y,
                mask,
                num_data,
                self.signal_dims,
                self.like,
                placeholder=self.likelihood.placeholder,
            )
            self.likelihood.check(y, mask)
            size, signal_shape = len(y), tuple(y.shape[1:])
        code_shape = self.codes_of(signal_shape)

        decode = self.decoder_sites(like)
        rate = self._rate(code_shape[:1], like)
        index = torch.arange(size, device=like.device)
        with pyro.plate("data", num_data or size, subsample=index):
            codes = pyro.sample("codes", self._law(rate, code_shape, like))
            if also is not None:
                also(codes)
            predictor = decode(codes)  # (n, *signal_shape)
            data_law = self.likelihood(predictor)
            if mask is not None:
                data_law = data_law.mask(mask)
            return pyro.sample("obs", data_law.to_event(self.signal_dims), obs=y)

    def _rate(self, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
        rate = self.rate
        if isinstance(rate, Law):
            return pyro.sample("rate", spread(rate, shape, like))
        return rate() if callable(rate) else rate

    def _law(self, rate: Tensor | None, code_shape: tuple[int, ...], like: Tensor) -> Law:
        """Law of the codes, event shape ``code_shape``."""
        if self.threshold is None:
            return codes_prior(self.prior, rate, code_shape, like)
        threshold = pyro.sample("threshold", spread(self.threshold, code_shape, like))
        batch = tuple(threshold.shape[: threshold.dim() - len(code_shape)])  # (n,)
        assert not isinstance(self.prior, Law)  # refused when the program was made
        return spread(self.prior(threshold), code_shape, like, batch=batch)

    def _size_of_draw(self, num_data: int | None) -> tuple[int, tuple[int, ...]]:
        if num_data is None:
            raise ValueError("Expected num_data, the number of data to draw, when y is None.")
        if not isinstance(num_data, Integral) or num_data < 1:
            raise ValueError(f"Expected num_data to be a whole number >= 1, got {num_data!r}.")
        if self.signal_shape is None:
            raise ValueError(
                "Expected signal_shape, to draw from the prior: this dictionary serves signals of "
                "any length. Pass signal_shape=(channels, *lengths) to the model."
            )
        return num_data, self.signal_shape


def _check_threshold(threshold: Law | None, prior: Prior, rate: object) -> None:
    if threshold is None:
        return
    if not isinstance(threshold, Law):
        raise TypeError(
            "Expected threshold to be a Pyro distribution, such as Gamma(3.0, 12.0), got "
            f"{type(threshold).__name__}. A fixed threshold belongs into the prior."
        )
    if rate is not None:
        raise NotImplementedError(
            "Expected rate or threshold, got both: a prior is called with one of them. Fix the "
            "other inside the callable."
        )
    if isinstance(prior, Law):
        raise TypeError(
            "Expected prior to be a callable threshold -> distribution when threshold is given, "
            f"got a {type(prior).__name__}. Write prior=lambda threshold: "
            "ShiftedThresholded(Laplace(0.0, 1.0), threshold)."
        )
    check_prior(threshold, has_rate=False)  # a law of constants
    if _may_be_negative(threshold):
        raise ValueError(
            "Expected threshold to be a law of positive thresholds, such as Gamma(3.0, 12.0), got "
            f"a {type(threshold).__name__}, whose draws may be negative."
        )


def _may_be_negative(law: Law) -> bool:
    while isinstance(law, Independent | ExpandedDistribution | MaskedDistribution):
        law = law.base_dist
    if isinstance(law, Delta):  # its support is stated as all numbers
        return bool((law.v < 0).any())
    try:  # a number that is barely negative: an interval may begin anywhere
        return bool(law.support.check(torch.tensor(-1e-6)).any())
    except NotImplementedError:
        return False  # no support is stated
