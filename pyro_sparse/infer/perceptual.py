"""How alike two pictures look: multi-scale structural similarity, and a loss made of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_sparse.infer.numbers import check_real, check_whole
from pyro_sparse.ops import check_tensor

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weights of five scales, finest first, as Wang et al. fitted them to what people see."""
_WIDTH = 1.5  # pixels: standard deviation of the window
_LUMINANCE, _CONTRAST = 0.01, 0.03  # the constants K1, K2, as fractions of the data range


def ms_ssim(
    prediction: Tensor,
    target: Tensor,
    *,
    data_range: float = 1.0,
    window_size: int = 11,
    weights: Sequence[float] = SCALE_WEIGHTS,
) -> Tensor:
    r"""Multi-scale structural similarity of pictures; differentiable.

    With local means, variances and covariance under a Gaussian window (of standard deviation 1.5)
    at scale :math:`j`, which is the picture averaged over blocks of :math:`2^{j-1}` pixels,

    .. math::
        c_j = \operatorname{mean} \frac{2 \sigma_{xy} + C_2}{\sigma_x^2 + \sigma_y^2 + C_2}, \qquad
        l_J c_J = \operatorname{mean} \frac{2 \mu_x \mu_y + C_1}{\mu_x^2 + \mu_y^2 + C_1}\,
            \frac{2 \sigma_{xy} + C_2}{\sigma_x^2 + \sigma_y^2 + C_2}, \\
        \mathrm{MS\text{-}SSIM} = (l_J c_J)^{w_J} \prod_{j < J} c_j^{w_j}, \qquad
        C_1 = (0.01\, R)^2, \quad C_2 = (0.03\, R)^2

    Where a factor is not positive (pictures that are correlated negatively at a scale) its power is
    not defined: the similarity is 0 there, and so is its gradient.

    Args:
        prediction: Shape ``(..., height, width)``.
        target: Of the same shape.
        data_range: :math:`R > 0`, the span of possible values: 1 for pictures in [0, 1].
        window_size: Pixels, ``>= 2``; the windows lie inside the picture.
        weights: :math:`w_j > 0` of as many scales, finest first. ``(1.0,)`` gives the structural
            similarity of one scale.

    Returns:
        Shape ``(...)``, at most 1; 1 for equal pictures. Channels count as pictures of their own.

    Raises:
        TypeError: If an argument is of the wrong kind or dtype.
        RuntimeError: If the pictures are on different devices.
        ValueError: If shapes differ, a number is out of range, or the pictures are smaller than the
            window at the coarsest scale; says what size they need.

    References:
        Wang, Simoncelli & Bovik (2003), Asilomar Conf. Signals, Systems & Computers 2, 1398-1402;
        Wang et al. (2004), IEEE Trans. Image Process. 13(4), for one scale.

    Example:
        >>> picture = torch.rand(1, 200, 200)
        >>> ms_ssim(picture, picture)
        tensor([1.])
    """
    _check_options(data_range, window_size, weights)
    check_tensor("target", target)
    check_tensor("prediction", prediction, target)
    _check_size(prediction, target, window_size, len(weights))
    window = _window(window_size, target)
    low, high = (_LUMINANCE * data_range) ** 2, (_CONTRAST * data_range) ** 2
    x, y = (t.reshape(-1, 1, *t.shape[-2:]) for t in (prediction, target))
    factors = []
    for scale in range(len(weights)):
        if scale:
            # Blocks that the edge cuts are averages of what they hold: nothing is padded.
            x, y = (F.avg_pool2d(t, 2, ceil_mode=True) for t in (x, y))
        luminance, contrast = _compare(x, y, window, low, high)
        last = scale == len(weights) - 1
        factors.append((luminance * contrast if last else contrast).mean((-3, -2, -1)))
    stacked = torch.stack(factors, -1)  # (pictures, scales)
    positive = (stacked > 0).all(-1)
    # The logarithm of what is not positive would make the gradient nan even where it is not used.
    safe = torch.where(positive[:, None], stacked, torch.ones_like(stacked))
    similarity = (safe.log() * stacked.new_tensor(weights)).sum(-1).exp()
    similarity = torch.where(positive, similarity, torch.zeros_like(similarity))
    return similarity.reshape(target.shape[:-2])


class PerceptualLoss(nn.Module):
    r"""Structural similarity and absolute error, mixed.

    .. math:: a\, (1 - \mathrm{MS\text{-}SSIM}(x, y)) + (1 - a)\, \operatorname{mean} |x - y|

    The alternative to the mean squared error in the released code of CRsAE and DCEA, with
    :math:`a = 0.8`. That code compares pictures in [0, 1] with a data range of 255, under which
    every similarity is almost 1: what it minimised is the absolute error and little else. Its
    setting is ``PerceptualLoss(data_range=255.0, window_size=4)``.

    Args:
        similarity: :math:`a` in [0, 1].
        data_range: Span of possible values of the data, ``> 0``: 1 for pictures in [0, 1], the
            highest rate for counts.
        window_size: Pixels, ``>= 2``. Five scales need pictures of ``16 * window_size - 15``: 161
            with the default, 97 with windows of 7, 49 with windows of 4.
        weights: Of the scales, finest first.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a number is out of range; and at a call, as in ``ms_ssim``.

    References:
        Zhao, Gallo, Frosio & Kautz (2017), IEEE Trans. Comput. Imaging 3(1), for the mixture (with
        a Gaussian weight on the absolute error); Tolooshams, Dey & Ba (2021), IEEE TNNLS 32(6).

    Example:
        >>> loss = PerceptualLoss(window_size=7)
        >>> picture = torch.rand(2, 1, 128, 128)
        >>> bool(loss(picture, picture).abs() < 1e-6 < loss(picture, 0.9 * picture))
        True
    """

    def __init__(
        self,
        *,
        similarity: float = 0.8,
        data_range: float = 1.0,
        window_size: int = 11,
        weights: Sequence[float] = SCALE_WEIGHTS,
    ) -> None:
        super().__init__()
        check_real("similarity", similarity, 0.0, 1.0)
        _check_options(data_range, window_size, weights)
        self.similarity = similarity
        self.data_range = data_range
        self.window_size = window_size
        self.weights = tuple(weights)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean over the pictures, shape ``()``.

        Args:
            prediction: Shape ``(..., height, width)``.
            target: Of the same shape.
        """
        alike = ms_ssim(
            prediction,
            target,
            data_range=self.data_range,
            window_size=self.window_size,
            weights=self.weights,
        )
        error = (prediction - target).abs().mean()
        return self.similarity * (1 - alike.mean()) + (1 - self.similarity) * error


def _window(size: int, like: Tensor) -> Tensor:
    offsets = torch.arange(size, dtype=like.dtype, device=like.device) - (size - 1) / 2
    return (-offsets.square() / (2 * _WIDTH**2)).softmax(0)  # a Gaussian that sums to one


def _compare(
    x: Tensor, y: Tensor, window: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Luminance, and contrast times structure, under every window."""

    def smooth(t: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(t, window[None, None, None]), window[None, None, :, None])

    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = smooth(x * x) - mean_x.square(), smooth(y * y) - mean_y.square()
    covariance = smooth(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + low) / (mean_x.square() + mean_y.square() + low)
    return luminance, (2 * covariance + high) / (var_x + var_y + high)


def _check_options(data_range: float, window_size: int, weights: Sequence[float]) -> None:
    check_real("data_range", data_range, 0.0, math.inf, open_low=True)
    check_whole("window_size", window_size, 2)
    if not isinstance(weights, Sequence) or isinstance(weights, str) or not weights:
        raise TypeError(f"Expected weights to be numbers, one for each scale, got {weights!r}.")
    for weight in weights:
        check_real("weights", weight, 0.0, math.inf, open_low=True)


def _check_size(prediction: Tensor, target: Tensor, window_size: int, num_scales: int) -> None:
    if prediction.shape != target.shape or target.dim() < 2:
        raise ValueError(
            "Expected pictures of one shape (..., height, width), got "
            f"{tuple(prediction.shape)} and {tuple(target.shape)}."
        )
    needed = (window_size - 1) * 2 ** (num_scales - 1) + 1
    smaller = min(target.shape[-2:])
    if smaller < needed:
        fits = (smaller - 1) // 2 ** (num_scales - 1) + 1
        try_window = f"window_size={fits}, or " if fits >= 2 else ""
        raise ValueError(
            f"Expected pictures of at least {needed} x {needed} pixels (windows of {window_size} "
            f"at {num_scales} scales), got {tuple(target.shape[-2:])}. Try {try_window}fewer "
            "weights."
        )
