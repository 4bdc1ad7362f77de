"""Sparse coding as a Pyro program."""

from __future__ import annotations

from collections.abc import Callable

import pyro
from torch import Tensor

from pyro_sparse.dictionaries import Dictionary
from pyro_sparse.distributions import Law, Prior, spread
from pyro_sparse.infer.bundle import register_savable
from pyro_sparse.likelihoods import Likelihood
from pyro_sparse.models.program import CodesProgram, Decode
from pyro_sparse.ops import kind_of


class SparseCoding(CodesProgram):
    r"""Sparse coding with a linear dictionary, dense or convolutional.

    .. math::
        \lambda &\sim p(\lambda) && \texttt{"rate"}\text{, if rate is a distribution} \\
        D &\sim p(D) && \texttt{"dictionary"}\text{, if dictionary\_prior is given} \\
        t_n &\sim p(t) && \texttt{"threshold"}\text{, if threshold is given} \\
        z_n &\sim \mathrm{prior}(\lambda \text{ or } t_n) && \texttt{"codes"} \\
        y_n &\sim \mathrm{likelihood}(D z_n) && \texttt{"obs"}

    Sites, for a minibatch of ``n`` out of ``num_data``: ``"codes"`` and ``"threshold"`` have event
    shape ``(atoms, *positions)`` and ``"obs"`` the event shape of one datum, all in the plate
    ``"data"`` of dim -1, which scales them by ``num_data / n``; ``"rate"`` and ``"dictionary"``
    stand outside.

    A prior with an atom at zero, such as ``SpikeAndSlab``, draws exact zeros, and needs a guide
    whose codes have such an atom too. A prior without one takes a point, such as
    ``UnrolledFISTA``, which is MAP.

    Args:
        dictionary: Its atoms are parameters, unless ``dictionary_prior`` makes them a site.
        likelihood: Family of the data.
        prior: A distribution that expands to one datum's codes (of shape ``()``, or
            ``(atoms, 1, 1)`` for one value per atom of a picture), or a callable
            ``rate -> distribution`` or ``threshold -> distribution``. Point guides need a
            registered ``prox`` for its type.
        rate: For a callable prior: a tensor of shape ``()`` or ``(atoms,)`` (fixed), a module
            without arguments that returns one (learned), or a distribution over one (sampled at
            ``"rate"``).
        threshold: For a callable prior, in place of a rate: law of one threshold for every code of
            every datum, in code units; expands to one datum's codes. As published,
            ``Gamma(3, 3 / mean)``. Its guide samples ``"threshold"`` as well, or integrates it out:
            ``GammaThresholded`` is the law of codes that such thresholds leave, and as a prior it
            needs no such site.
        dictionary_prior: Distribution of the atoms; expands to their shape, and is used as drawn
            (not normalised). The dictionary's own atoms are frozen then.
        signal_shape: Shape of one datum; needed only to draw from the prior with a dictionary that
            serves signals of any length.

    Raises:
        TypeError: If ``prior`` is neither a distribution nor a callable with a rate or threshold,
            or another argument is of the wrong kind.
        ValueError: If ``prior``, ``rate`` or ``threshold`` is or holds a tensor that requires a
            gradient, draws of ``threshold`` may be negative, or ``signal_shape`` does not fit the
            dictionary.
        NotImplementedError: If both ``rate`` and ``threshold`` are given.

    References:
        Fallah & Rozell (2022), ICML, PMLR 162:6034-6058, for thresholds with a Gamma law.

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
        threshold: Law | None = None,
        dictionary_prior: Law | None = None,
        signal_shape: tuple[int, ...] | None = None,
    ) -> None:
        if not isinstance(dictionary, Dictionary):
            raise TypeError(
                f"Expected a Dictionary, such as Dense(...), got {kind_of(dictionary)}."
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
        super().__init__(
            likelihood,
            prior,
            rate=rate,
            threshold=threshold,
            signal_shape=dictionary.signal_shape if signal_shape is None else signal_shape,
        )
        if dictionary_prior is not None:
            dictionary.freeze_()  # the module's own atoms would never get a gradient
        self.dictionary = dictionary
        self.dictionary_prior = dictionary_prior

    @property
    def signal_dims(self) -> int:  # type: ignore[override]
        """Number of dimensions of one datum."""
        return self.dictionary.signal_dims

    @property
    def like(self) -> Tensor:
        """A tensor of the dictionary's dtype and device."""
        return self.dictionary.like

    def codes_of(self, signal_shape: tuple[int, ...]) -> tuple[int, ...]:  # noqa: D102
        return tuple(self.dictionary.code_shape(signal_shape))

    def decoder_sites(self, like: Tensor) -> Decode:  # noqa: D102
        atoms = None
        if self.dictionary_prior is not None:
            shape = tuple(self.dictionary.atoms.shape)
            atoms = pyro.sample("dictionary", spread(self.dictionary_prior, shape, like))
        return self.dictionary.bind(atoms).forward


register_savable(SparseCoding, name="pyro_sparse.models.SparseCoding")
