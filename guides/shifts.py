"""Cycle spinning: a strided dictionary used at every shift of its grid, and the results averaged.

Atoms with a stride lie on a grid, and where the grid lies is arbitrary: the same picture moved by a
pixel is explained differently. Averaged over all places of the grid the explanation moves along
with the picture, and the errors that came from the grid average out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_sparse.dictionaries import Conv, Interior
from pyro_sparse.infer.bundle import register_savable
from pyro_sparse.infer.numbers import check_whole
from pyro_sparse.likelihoods import Likelihood, check_data

Shift = tuple[int, ...]
Pads = list[tuple[int, int]]


class Padding(Protocol):
    """What stands around the data, so that the atoms of every shift find a whole grid."""

    def __call__(self, y: Tensor, mask: Tensor | None, pads: Pads) -> tuple[Tensor, Tensor | None]:
        """Padded data and mask; ``pads`` holds samples before and after, one pair a dimension."""
        ...


class Mirrored:
    """Data continue as their mirror image: samples near an edge count twice, as published.

    Example:
        >>> Mirrored()(torch.arange(4.0)[None, None], None, [(2, 1)])[0]
        tensor([[[2., 1., 0., 1., 2., 3., 2.]]])
    """

    def __call__(  # noqa: D102
        self, y: Tensor, mask: Tensor | None, pads: Pads
    ) -> tuple[Tensor, Tensor | None]:
        longest = max(max(pair) for pair in pads)
        if longest >= min(y.shape[-len(pads) :]):
            raise ValueError(
                f"Expected data of more than {longest} samples along each dimension, which the pad "
                f"mirrors, got {tuple(y.shape)}. Try padding=Unobserved()."
            )
        padded = F.pad(y, _flat(pads), mode="reflect")
        if mask is None:
            return padded, None
        return padded, F.pad(mask.to(y), _flat(pads), mode="reflect") > 0.5


class Unobserved:
    """What lies beyond the data was not observed: every sample counts once.

    Example:
        >>> Unobserved()(torch.ones(1, 1, 2), None, [(1, 0)])
        (tensor([[[0., 1., 1.]]]), tensor([[[False,  True,  True]]]))
    """

    def __call__(  # noqa: D102
        self, y: Tensor, mask: Tensor | None, pads: Pads
    ) -> tuple[Tensor, Tensor | None]:
        observed = torch.ones_like(y, dtype=torch.bool) if mask is None else mask
        return F.pad(y, _flat(pads)), F.pad(observed, _flat(pads))


class ShiftAveraged(nn.Module):
    r"""A guide of a strided convolutional model, averaged over the shifts of the model's grid.

    .. math:: \bar\eta(y) = \frac1{|S|} \sum_{s \in S} T_s^{-1} D\, \hat z(T_s\, y), \qquad
        \hat y = \mathbb E[y \mid \bar\eta]

    where :math:`T_s` pads the data so that the grid begins ``stride - s`` samples before them, and
    :math:`T_s^{-1}` cuts the pad off again. With stride :math:`r` in a picture there are
    :math:`r^2` shifts, each with codes of its own: latent variables of :math:`r^2` models side by
    side, whose predictors are averaged, and not of one model. What is averaged is the predictor,
    not the mean: of Poisson data the logarithm of the rate.

    Called as a program it is the guide that it wraps, on the data as they are, and trains with any
    objective. For the published training through the average, with two shifts drawn at every step,
    ::

        averaged = ShiftAveraged(guide, dictionary, likelihood)
        predict = functools.partial(averaged.reconstruct, shifts=2)
        infer.fit(model, averaged, clean, loss=infer.Supervised(predict=predict, corrupt=...))

    (``fit`` also runs both programs on the data as they are: crop them to a size that fits the
    stride. ``predictor`` and ``reconstruct`` take any size.) Fewer shifts make a step cheaper by
    that factor. Their average has the mean of the full one, and a variance that adds to a squared
    error.

    Args:
        guide: With a method ``encode(y, mask)`` that gives codes, such as ``UnrolledFISTA``, or
            ``posterior(y, mask)`` that gives a law with a mean, such as ``Thresholded``; for data
            of any size. Copies of a datum reach it as one more minibatch.
        dictionary: The model's, with the boundary ``Interior()``.
        likelihood: The model's; its ``mean`` makes data of the predictor.
        padding: ``Mirrored()`` (default), as published, or ``Unobserved()``.
        shifts_at_once: How many shifts the guide is given in one call, ``>= 1``: memory grows with
            it.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``shifts_at_once`` is below one.
        NotImplementedError: If the dictionary has another boundary.

    References:
        Coifman & Donoho (1995), Translation-invariant de-noising, in Wavelets and Statistics;
        Tolooshams, Song, Temereanca & Ba (2020), ICML, PMLR 119:9493-9503, whose released code pads
        and averages like this.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_sparse.guides import UnrolledFISTA
        >>> from pyro_sparse.likelihoods import Gaussian
        >>> dictionary, likelihood = Conv(6, 1, (5, 5), stride=3), Gaussian(0.1)
        >>> guide = UnrolledFISTA(dictionary, likelihood, dist.Laplace(0.0, 1.0), num_steps=3)
        >>> averaged = ShiftAveraged(guide, dictionary, likelihood)
        >>> len(averaged.shifts), averaged.reconstruct(torch.randn(2, 1, 16, 19)).shape
        (9, torch.Size([2, 1, 16, 19]))
    """

    def __init__(
        self,
        guide: Any,
        dictionary: Conv,
        likelihood: Likelihood,
        *,
        padding: Padding | None = None,
        shifts_at_once: int = 8,
    ) -> None:
        super().__init__()
        if not isinstance(dictionary, Conv):
            raise TypeError(f"Expected a Conv dictionary, got {type(dictionary).__name__}.")
        if not isinstance(likelihood, Likelihood):
            raise TypeError(f"Expected a Likelihood, got {type(likelihood).__name__}.")
        if dictionary.boundary != Interior():
            raise NotImplementedError(
                f"Expected a dictionary with the boundary Interior(), got {dictionary.boundary}: "
                "the data are padded, and others would treat the pad's end as theirs."
            )
        if not callable(guide) or _encoder(guide) is None:
            raise TypeError(
                "Expected a guide with a method encode(y, mask) or posterior(y, mask), got "
                f"{type(guide).__name__}."
            )
        if padding is not None and (not callable(padding) or isinstance(padding, type)):
            raise TypeError(f"Expected padding to be Mirrored() or Unobserved(), got {padding!r}.")
        check_whole("shifts_at_once", shifts_at_once, 1)
        self.guide = guide
        self.dictionary = dictionary
        self.likelihood = likelihood
        self.padding = Mirrored() if padding is None else padding
        self.shifts_at_once = shifts_at_once

    @property
    def shifts(self) -> list[Shift]:
        """All shifts, one number in ``0 ... stride - 1`` for each dimension."""
        return list(itertools.product(*map(range, self.dictionary.stride)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the guide that it wraps, as a Pyro program, on the data as they are."""
        return self.guide(*args, **kwargs)

    def encode(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Codes of the data as they are, by the guide that it wraps: means where it has laws."""
        encode = _encoder(self.guide)
        assert encode is not None  # refused when this was made
        return encode(y, mask)

    def codes(
        self,
        y: Tensor,
        mask: Tensor | None = None,
        shifts: int | Sequence[Shift] | None = None,
    ) -> dict[Shift, Tensor]:
        """Codes at every shift, each ``(n, atoms, *positions)`` of the padded data.

        Args:
            y: Data, shape ``(n, channels, *lengths)``, of any lengths.
            mask: True where a sample was observed, broadcastable to ``y``.
            shifts: Some of ``self.shifts``, or how many to draw of them at random, each at most
                once; None for all.

        Raises:
            TypeError: If ``y`` is not a floating tensor of the dictionary's dtype, ``mask`` is not
                boolean, or ``shifts`` are neither a number nor shifts.
            RuntimeError: If ``y`` is on another device than the dictionary.
            ValueError: If a shape does not fit, or ``shifts`` names one that there is not.
        """
        y, mask = self._check(y, mask)
        chosen = self._chosen(shifts)
        return {
            s: codes for batch in self._batches(chosen) for s, codes in self._at(y, mask, batch)
        }

    def predictor(
        self,
        y: Tensor,
        mask: Tensor | None = None,
        shifts: int | Sequence[Shift] | None = None,
    ) -> Tensor:
        """Predictor averaged over shifts, shape of ``y``.

        Arguments and errors are those of ``codes``.
        """
        y, mask = self._check(y, mask)
        chosen = self._chosen(shifts)
        bound = self.dictionary.bind()
        total = torch.zeros_like(y)
        for batch in self._batches(chosen):
            for shift, codes in self._at(y, mask, batch):
                total = total + self._cut(bound.forward(codes), shift, tuple(y.shape))
        return total / len(chosen)

    def reconstruct(
        self,
        y: Tensor,
        mask: Tensor | None = None,
        shifts: int | Sequence[Shift] | None = None,
    ) -> Tensor:
        """Expected data given the averaged predictor, shape of ``y``.

        Arguments and errors are those of ``codes``.
        """
        return self.likelihood.mean(self.predictor(y, mask, shifts))

    def _check(self, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        dictionary = self.dictionary
        y, mask = check_data(y, mask, None, dictionary.signal_dims, dictionary.like)
        if y.shape[1] != dictionary.channels:
            raise ValueError(
                f"Expected y of shape (n, channels={dictionary.channels}, *lengths), got "
                f"{tuple(y.shape)}."
            )
        return y, mask

    def _chosen(self, shifts: int | Sequence[Shift] | None) -> list[Shift]:
        every = self.shifts
        if shifts is None:
            return every
        if not isinstance(shifts, Sequence):
            check_whole("shifts", shifts, 1)
            if shifts > len(every):
                raise ValueError(f"Expected at most {len(every)} shifts, got {shifts}.")
            return [every[i] for i in torch.randperm(len(every))[:shifts].tolist()]
        chosen = [tuple(shift) for shift in shifts]
        if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(every):
            raise ValueError(
                f"Expected different shifts below the stride {self.dictionary.stride}, got "
                f"{shifts}."
            )
        return chosen

    def _batches(self, chosen: list[Shift]) -> list[list[Shift]]:
        size = self.shifts_at_once
        return [chosen[start : start + size] for start in range(0, len(chosen), size)]

    def _at(
        self, y: Tensor, mask: Tensor | None, shifts: list[Shift]
    ) -> list[tuple[Shift, Tensor]]:
        """Codes at some shifts, in one call of the guide."""
        pads = [self._pads(shift, tuple(y.shape)) for shift in shifts]
        padded = [
            (y, mask) if not any(map(any, pad)) else self.padding(y, mask, pad) for pad in pads
        ]
        stack = torch.cat([data for data, _ in padded])  # (shifts * n, channels, *lengths)
        masks = [observed for _, observed in padded if observed is not None]
        codes = self.encode(stack, torch.cat(masks) if masks else None)
        return list(zip(shifts, codes.split(len(y))))

    def _pads(self, shift: Shift, shape: tuple[int, ...]) -> Pads:
        """Samples before and after along each dimension, such that a whole grid of atoms fits."""
        kernel, stride = self.dictionary.kernel_size, self.dictionary.stride
        pads = []
        for length, k, s, offset in zip(shape[-len(kernel) :], kernel, stride, shift):
            before = s if s > 1 else 0  # with a position at every sample there is nothing to shift
            rest = -(length + before - k) % s
            pads.append((before - offset, rest + before + offset))
        return pads

    def _cut(self, predictor: Tensor, shift: Shift, shape: tuple[int, ...]) -> Tensor:
        dims = len(self.dictionary.kernel_size)
        for dim, (before, _) in enumerate(self._pads(shift, shape)):
            predictor = predictor.narrow(dim - dims, before, shape[dim - dims])
        return predictor


def _encoder(guide: Any) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """How a guide gives one code for each place: by itself, or as the mean of a law."""
    if callable(getattr(guide, "encode", None)):
        return guide.encode
    if callable(getattr(guide, "posterior", None)):
        return lambda y, mask: guide.posterior(y, mask).mean
    return None


def _flat(pads: Pads) -> list[int]:
    """In the order of ``torch.nn.functional.pad``: last dimension first."""
    return [size for pair in reversed(pads) for size in pair]


register_savable(Mirrored, name="pyro_sparse.guides.Mirrored")
register_savable(Unobserved, name="pyro_sparse.guides.Unobserved")
register_savable(ShiftAveraged, name="pyro_sparse.guides.ShiftAveraged")
