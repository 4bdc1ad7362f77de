"""Structural similarity: against an independent implementation, and where it is not defined."""

import numpy as np
import pytest
import pytorch_msssim
import torch
from scipy.signal.windows import gaussian
from torch import Tensor

from pyro_sparse.infer import PerceptualLoss, ms_ssim


def pair(*shape: int, noise: float = 0.1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Smooth pictures in [0, 1], and the same with noise."""
    clean = torch.rand(*shape[:-2], shape[-2] // 8 + 1, shape[-1] // 8 + 1, dtype=dtype)
    clean = torch.nn.functional.interpolate(clean, shape[-2:], mode="bilinear")
    return clean + noise * torch.randn(shape, dtype=dtype), clean


def window(size: int, channels: int) -> Tensor:
    """For the reference, whose own is computed in float32."""
    values = gaussian(size, std=1.5)
    return torch.from_numpy(values / values.sum()).expand(channels, 1, 1, size)


# Sizes of which four halvings leave whole numbers: for others the reference pads with zeros.
@pytest.mark.parametrize(("size", "window_size"), [((176, 192), 11), ((112, 128), 7)])
@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
def test_ms_ssim_equals_an_independent_implementation(
    size: tuple[int, int], window_size: int, noise: float
) -> None:
    x, y = pair(2, 3, *size, noise=noise)
    ours = ms_ssim(x, y, window_size=window_size)
    theirs = pytorch_msssim.ms_ssim(
        x, y, data_range=1.0, size_average=False, win=window(window_size, 3)
    )
    # Rounding of variances, over the constant 9e-4 that they are compared with.
    torch.testing.assert_close(ours.mean(-1), theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_ms_ssim_with_one_scale_is_the_structural_similarity(data_range: float) -> None:
    x, y = (data_range * t for t in pair(2, 1, 33, 40))
    ours = ms_ssim(x, y, data_range=data_range, weights=[1.0])
    theirs = pytorch_msssim.ssim(x, y, data_range=data_range, size_average=False, win=window(11, 1))
    torch.testing.assert_close(ours[:, 0], theirs, rtol=0, atol=1e-11)


def test_ms_ssim_averages_the_blocks_that_an_odd_edge_cuts() -> None:
    x, y = pair(1, 1, 27, 30)

    def halved(t: Tensor) -> Tensor:
        sums = np.zeros((14, 15))
        counts = np.zeros((14, 15))
        for (i, j), value in np.ndenumerate(t[0, 0].numpy()):
            sums[i // 2, j // 2] += value
            counts[i // 2, j // 2] += 1
        return torch.from_numpy(sums / counts)[None, None]

    # The finer scale has no weight to speak of: 1e-15 of a logarithm of order one.
    coarse = ms_ssim(x, y, weights=[1e-15, 1.0])
    torch.testing.assert_close(coarse, ms_ssim(halved(x), halved(y), weights=[1.0]))


def test_ms_ssim_is_one_for_equal_pictures_and_falls_with_noise(dtype: torch.dtype) -> None:
    _, clean = pair(1, 1, 176, 176, dtype=dtype)
    noise = torch.randn_like(clean)
    values = [float(ms_ssim(clean + scale * noise, clean)) for scale in (0.0, 0.05, 0.2, 0.8)]
    assert values[0] == pytest.approx(1.0, abs=10 * torch.finfo(dtype).eps)
    assert values == sorted(values, reverse=True)
    assert values[0] - values[1] > 1e-3


def test_ms_ssim_has_the_gradient_of_finite_differences() -> None:
    x, y = pair(1, 2, 9, 10)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return ms_ssim(x, y, window_size=3, weights=[0.3, 0.7])

    assert torch.autograd.gradcheck(loss, (x.requires_grad_(), y.requires_grad_()))


def test_ms_ssim_of_opposite_pictures_is_zero_without_a_gradient() -> None:
    _, y = pair(1, 1, 40, 40)
    x = (1 - y).requires_grad_()
    value = ms_ssim(x, y, window_size=7, weights=[0.5, 0.5])
    assert value.item() == 0
    value.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_ms_ssim_has_a_gradient_at_equal_pictures() -> None:
    _, y = pair(1, 1, 40, 40)
    x = y.clone().requires_grad_()
    ms_ssim(x, y, window_size=7, weights=[0.5, 0.5]).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() < 1e-9  # the top: nothing is to be gained


def test_perceptual_loss_mixes_similarity_and_absolute_error() -> None:
    x, y = pair(2, 1, 176, 176)
    similarity = pytorch_msssim.ms_ssim(x, y, data_range=1.0, win=window(11, 1))
    expected = 0.8 * (1 - similarity) + 0.2 * (x - y).abs().mean()
    torch.testing.assert_close(PerceptualLoss()(x, y), expected, rtol=0, atol=1e-11)


def test_the_released_setting_is_the_absolute_error_and_little_else() -> None:
    x, y = pair(4, 1, 128, 128, noise=20 / 255)
    released = PerceptualLoss(data_range=255.0, window_size=4)(x, y)
    absolute = 0.2 * (x - y).abs().mean()
    assert absolute < released < 1.01 * absolute
    assert PerceptualLoss(window_size=4)(x, y) > 2 * absolute


def test_pictures_that_are_too_small_are_told_what_fits() -> None:
    x, y = pair(1, 1, 128, 160)
    message = r"at least 161 x 161 pixels.*got \(128, 160\). Try window_size=8, or fewer weights"
    with pytest.raises(ValueError, match=message):
        ms_ssim(x, y)
    ms_ssim(x, y, window_size=8)
    with pytest.raises(ValueError, match="Try fewer weights"):
        ms_ssim(x[..., :16, :16], y[..., :16, :16])
    smallest = pair(1, 1, 161, 161)
    assert 0 < ms_ssim(*smallest) < 1


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"data_range": 0.0}, ValueError, "data_range in"),
        ({"window_size": 1}, ValueError, "window_size >= 2"),
        ({"window_size": 7.5}, TypeError, "whole number"),
        ({"weights": ()}, TypeError, "one for each scale"),
        ({"weights": 0.5}, TypeError, "one for each scale"),
        ({"weights": (0.5, -0.5)}, ValueError, "weights in"),
        ({"similarity": 1.5}, ValueError, "similarity in"),
    ],
)
def test_options_out_of_range_are_refused(
    options: dict[str, object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        PerceptualLoss(**options)  # type: ignore[arg-type]


def test_pictures_that_do_not_match_are_refused() -> None:
    x, y = pair(1, 1, 176, 176)
    with pytest.raises(ValueError, match="of one shape"):
        ms_ssim(x, y[..., 1:])
    with pytest.raises(TypeError, match="dtype torch.float64"):
        ms_ssim(x.float(), y)
    with pytest.raises(TypeError, match="target to be a floating tensor"):
        ms_ssim(x, y > 0.5)
