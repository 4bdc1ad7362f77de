"""Sparse coding of data with a class."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_sparse.dictionaries import Dictionary
from pyro_sparse.dictionaries.base import check_sizes
from pyro_sparse.distributions import Law, Prior
from pyro_sparse.infer.bundle import register_savable
from pyro_sparse.likelihoods import Likelihood
from pyro_sparse.models.program import CodesProgram, Decode
from pyro_sparse.ops import kind_of

SMALL = 1e-8
"""Added to the squared norm of codes, as published: what is all zero has a direction too."""


class DiscriminativeSparseCoding(CodesProgram):
    r"""Sparse codes that explain a datum and tell its class.

    .. math::
        z_n &\sim \mathrm{prior} && \texttt{"codes"} \\
        c_n &\sim \mathrm{Categorical}\big(\mathrm{softmax}(C z_n / \lVert z_n \rVert + c)\big)
            && \texttt{"label"} \\
        y_n &\sim \mathrm{likelihood}(D z_n) && \texttt{"obs"}

    Sites, for a minibatch of ``n`` out of ``num_data``: ``"codes"`` of event shape ``(atoms,
    *positions)``, ``"label"`` without event dimensions and ``"obs"`` of one datum's, all in the
    plate ``"data"`` of dim -1.

    A label is *observed* where it is given, *missing* where a given one is -1: it then counts
    nothing, which is what summing over it gives. Without any, the site is latent: drawn, as when
    predicting, or *enumerated* by ``TraceEnum_ELBO(max_plate_nesting=1)``, for which it is marked;
    ``SparseELBO`` refuses it.
    ``fit(..., given={"label": labels})`` hands labels over; a first phase without them is
    ``infer.Without(objective, "label")``.

    Args:
        dictionary: Its atoms are parameters.
        likelihood: Family of the data; published: ``Gaussian(5 ** -0.5)``, for data of unit norm.
        prior: As in ``SparseCoding``; published: ``Exponential(0.09)``. Non-negative codes come
            from it and from the guide, such as ``UnrolledFISTA.recurrent``.
        num_classes: Number of classes, ``>= 2``.
        rate: For a callable prior, as in ``SparseCoding``.
        normalise: Divide codes by their norm for the logits, as published. Of a convolutional
            dictionary the logits see the sum of each atom's codes over all positions.
        signal_shape: Shape of one datum; needed only to draw from the prior with a dictionary that
            serves signals of any length.

    Attributes:
        class_weights: :math:`C`, shape ``(classes, atoms)``.
        class_bias: :math:`c`, shape ``(classes,)``, from zero.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If a number is out of range.

    References:
        Rolfe & LeCun (2013), Discriminative recurrent sparse auto-encoders, ICLR. The class bias is
        in their code alone.

    Example:
        >>> from pyro_sparse.dictionaries import Dense
        >>> from pyro_sparse.likelihoods import Gaussian
        >>> model = DiscriminativeSparseCoding(
        ...     Dense(8, 5), Gaussian(0.1), dist.Exponential(1.0), num_classes=3
        ... )
        >>> model(torch.randn(2, 5), label=torch.tensor([2, -1])).shape
        torch.Size([2, 5])
        >>> model.logits(torch.rand(2, 8)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        dictionary: Dictionary,
        likelihood: Likelihood,
        prior: Prior,
        *,
        num_classes: int,
        rate: Tensor | float | Law | Callable[[], Tensor] | None = None,
        normalise: bool = True,
        signal_shape: tuple[int, ...] | None = None,
    ) -> None:
        if not isinstance(dictionary, Dictionary):
            raise TypeError(
                f"Expected a Dictionary, such as Dense(...), got {kind_of(dictionary)}."
            )
        check_sizes(num_classes=num_classes)
        if num_classes < 2:
            raise ValueError(f"Expected num_classes >= 2, got {num_classes}.")
        super().__init__(
            likelihood,
            prior,
            rate=rate,
            threshold=None,
            signal_shape=dictionary.signal_shape if signal_shape is None else signal_shape,
        )
        self.dictionary = dictionary
        self.num_classes = num_classes
        self.normalise = normalise
        like = dictionary.like
        bound = dictionary.num_atoms**-0.5
        weights = torch.empty(num_classes, dictionary.num_atoms).uniform_(-bound, bound)
        self.class_weights = nn.Parameter(weights.to(like))
        self.class_bias = nn.Parameter(torch.zeros(num_classes).to(like))

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
        return self.dictionary.bind().forward

    def logits(self, codes: Tensor) -> Tensor:
        """Log-odds of the classes, up to a constant.

        Args:
            codes: Shape ``(..., atoms, *positions)``.

        Returns:
            Shape ``(..., classes)``.
        """
        positions = self.dictionary.code_dims - 1
        if positions:
            codes = codes.flatten(-positions).sum(-1)  # (..., atoms)
        if self.normalise:
            codes = codes / (codes.square().sum(-1, keepdim=True) + SMALL).sqrt()
        return codes @ self.class_weights.T + self.class_bias

    def forward(
        self,
        y: Tensor | None = None,
        num_data: int | None = None,
        mask: Tensor | None = None,
        label: Tensor | None = None,
    ) -> Tensor:
        """Run the program.

        Args:
            y: Minibatch of data, shape ``(n, *signal_shape)``; None draws ``num_data`` data.
            num_data: Size of the whole data set, ``>= n``; by default ``n``.
            mask: True where a sample was observed, broadcastable to ``y``.
            label: Classes from 0, -1 where one is missing; whole numbers, shape ``(n,)``. None
                makes them latent.

        Returns:
            The data: ``y``, or what was drawn.

        Raises:
            TypeError: If ``label`` does not hold whole numbers.
            ValueError: If a shape does not fit, or a label is none of the classes.
        """
        if label is not None:
            self._check_label(label, None if y is None else len(y))
        return self.run(y, num_data, mask, lambda codes: self._sample_label(codes, label))

    def _sample_label(self, codes: Tensor, label: Tensor | None) -> None:
        law = dist.Categorical(logits=self.logits(codes))
        if label is None:
            pyro.sample("label", law, infer={"enumerate": "parallel"})
        else:
            pyro.sample("label", law.mask(label >= 0), obs=label.clamp(min=0))

    def _check_label(self, label: Tensor, size: int | None) -> None:
        if not isinstance(label, Tensor) or label.is_floating_point() or label.is_complex():
            kind = label.dtype if isinstance(label, Tensor) else type(label).__name__
            raise TypeError(f"Expected label to be a tensor of whole numbers, got {kind}.")
        if size is None or label.shape != (size,):
            raise ValueError(
                f"Expected one label for each datum, shape ({'n' if size is None else size},), got "
                f"{tuple(label.shape)}{' without data' if size is None else ''}."
            )
        if bool(((label < -1) | (label >= self.num_classes)).any()):
            raise ValueError(
                f"Expected labels from 0 to {self.num_classes - 1}, or -1 for a missing one, got "
                f"{int(label.min())} to {int(label.max())}."
            )


register_savable(DiscriminativeSparseCoding, name="pyro_sparse.models.DiscriminativeSparseCoding")
