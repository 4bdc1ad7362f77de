"""Sparse coding as a Pyro program."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_sparse.dictionaries import Dictionary
from pyro_sparse.distributions import Law, Prior, check_prior, check_rate, codes_prior, spread
from pyro_sparse.infer.bundle import register_savable
from pyro_sparse.infer.store import claim_names
from pyro_sparse.likelihoods import Likelihood, check_data


class SparseCoding(PyroModule):
    r"""Sparse coding with a linear dictionary, dense or convolutional.

    .. math::
        \lambda &\sim p(\lambda) && \texttt{"rate"}\text{, if rate is a distribution} \\
        D &\sim p(D) && \texttt{"dictionary"}\text{, if dictionary\_prior is given} \\
        z_n &\sim \mathrm{prior}(\lambda) && \texttt{"codes"} \\
        y_n &\sim \mathrm{likelihood}(D z_n) && \texttt{"obs"}

    Sites, for a minibatch of ``n`` out of ``num_data``: ``"codes"`` has event shape
    ``(atoms, *positions)`` and ``"obs"`` the event shape of one datum, both in the plate ``"data"``
    of dim -1, which scales them by ``num_data / n``; ``"rate"`` and ``"dictionary"`` stand outside.

    Args:
        dictionary: Its atoms are parameters, unless ``dictionary_prior`` makes them a site.
        likelihood: Family of the data.
        prior: A distribution that expands to one datum's codes (of shape ``()``, or
            ``(atoms, 1, 1)`` for one value per atom of a picture), or a callable
            ``rate -> distribution``. Guides need a registered ``prox`` for its type.
        rate: For a callable prior: a tensor of shape ``()`` or ``(atoms,)`` (fixed), a module
            without arguments that returns one (learned), or a distribution over one (sampled at
            ``"rate"``).
        dictionary_prior: Distribution of the atoms; expands to their shape, and is used as drawn
            (not normalised). The dictionary's own atoms are frozen then.
        signal_shape: Shape of one datum; needed only to draw from the prior with a dictionary that
            serves signals of any length.

    Raises:
        TypeError: If ``prior`` is neither a distribution nor a callable with a rate, or another
            argument is of the wrong kind.
        ValueError: If ``prior`` or ``rate`` is or holds a tensor that requires a gradient, or
            ``signal_shape`` does not fit the dictionary.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_sparse.dictionaries import Dense
        >>> from pyro_sparse.likelihoods import Gaussian
        >>> model = SparseCoding(Dense(8, 5), Gaussian(0.1), dist.Laplace(0.0, 1.0))
        >>> model(num_data=3).shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        dictionary: Dictionary,
        likelihood: Likelihood,
        prior: Prior,
        *,
        rate: Tensor | float | Law | Callable[[], Tensor] | None = None,
        dictionary_prior: Law | None = None,
        signal_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(dictionary, Dictionary) or not isinstance(likelihood, Likelihood):
            raise TypeError(
                "Expected a Dictionary, such as Dense(...), and a Likelihood, such as "
                f"Gaussian(...), got {type(dictionary).__name__} and {type(likelihood).__name__}."
            )
        if not isinstance(dictionary_prior, Law | None):
            raise TypeError(
                "Expected dictionary_prior to be a Pyro distribution, got "
                f"{type(dictionary_prior).__name__}."
            )
        if signal_shape is not None:
            dictionary.code_shape(signal_shape)
            if len(signal_shape) != dictionary.signal_dims:
                raise ValueError(
                    f"Expected signal_shape to be that of one datum, {dictionary.signal_dims} "
                    f"dimensions, got {tuple(signal_shape)}."
                )
        check_prior(prior, has_rate=rate is not None)
        check_rate(rate)
        if dictionary_prior is not None:
            dictionary.freeze_()  # the module's own atoms would never get a gradient
        self.dictionary = dictionary
        self.likelihood = likelihood
        self.prior = prior
        self.rate = torch.as_tensor(rate) if isinstance(rate, int | float) else rate
        self.dictionary_prior = dictionary_prior
        self.signal_shape = dictionary.signal_shape if signal_shape is None else signal_shape

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
        dictionary, likelihood = self.dictionary, self.likelihood
        claim_names(self)
        like = dictionary.like if y is None else y
        if y is None:
            size, signal_shape = self._size_of_draw(num_data)
        else:
            y, mask = check_data(y, mask, num_data, dictionary.signal_dims, dictionary.like)
            likelihood.check(y)
            size, signal_shape = len(y), tuple(y.shape[1:])
        code_shape = tuple(dictionary.code_shape(signal_shape))

        atoms = None
        if self.dictionary_prior is not None:
            shape = tuple(dictionary.atoms.shape)
            atoms = pyro.sample("dictionary", spread(self.dictionary_prior, shape, like))
        rate = self._rate(like)
        law = codes_prior(self.prior, rate, code_shape, like)
        index = torch.arange(size, device=like.device)
        with pyro.plate("data", num_data or size, subsample=index):
            codes = pyro.sample("codes", law)  # (n, atoms, *positions)
            predictor = dictionary.bind(atoms).forward(codes)  # (n, *signal_shape)
            data_law = likelihood(predictor)
            if mask is not None:
                data_law = data_law.mask(mask)
            return pyro.sample("obs", data_law.to_event(dictionary.signal_dims), obs=y)

    def _rate(self, like: Tensor) -> Tensor | None:
        rate = self.rate
        if isinstance(rate, Law):
            return pyro.sample("rate", spread(rate, (self.dictionary.num_atoms,), like))
        return rate() if callable(rate) else rate

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


register_savable(SparseCoding, name="pyro_sparse.models.SparseCoding")
