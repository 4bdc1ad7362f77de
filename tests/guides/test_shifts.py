"""Shift averaging: against the published split by hand, its symmetries, and training through it."""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.cbook
import matplotlib.image
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy.fft import idct
from torch import Tensor, nn

from pyro_sparse import infer
from pyro_sparse.dictionaries import Conv, Dense, Overhang, Periodic
from pyro_sparse.guides import (
    Heads,
    Mirrored,
    ShiftAveraged,
    Thresholded,
    Unobserved,
    UnrolledEncoder,
    UnrolledFISTA,
)
from pyro_sparse.infer import Supervised, fit
from pyro_sparse.likelihoods import Gaussian, Likelihood
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import Unrolled

LAPLACE = dist.Laplace(0.0, 0.5)
# kernel, stride, lengths: with and without a rest, unequal strides, one to three dimensions.
GEOMETRIES = {
    "series": ((5,), (3,), (17,)),
    "series, no rest": ((5,), (3,), (20,)),
    "picture": ((4, 5), (3, 2), (13, 16)),
    "picture, kernel is stride": ((3, 3), (3, 3), (10, 12)),
    "picture, one stride of 1": ((4, 3), (2, 1), (9, 8)),
    "volume": ((2, 3, 3), (2, 2, 3), (7, 8, 9)),
}
geometries = pytest.mark.parametrize("geometry", GEOMETRIES)


def make(
    kernel: tuple[int, ...] = (5, 5),
    stride: int | tuple[int, ...] = 3,
    *,
    channels: int = 1,
    num_steps: int = 3,
    scale: float = 0.3,
    **options: Any,
) -> ShiftAveraged:
    """A wrapped guide in float64, so that sums in another order agree to 1e-12."""
    dictionary, likelihood = Conv(4, channels, kernel, stride).double(), Gaussian(scale).double()
    prior = dist.Laplace(torch.tensor(0.0).double(), torch.tensor(0.5).double())
    guide = UnrolledFISTA(dictionary, likelihood, prior, num_steps=num_steps).double()
    return ShiftAveraged(guide, dictionary, likelihood, **options)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


class Rates(Likelihood):
    """Of counts, as far as a prediction goes: the mean is the exponential of the predictor."""

    def mean(self, predictor: Tensor) -> Tensor:
        return predictor.exp()


# Against the published split


def by_hand(averaged: ShiftAveraged, y: Tensor) -> np.ndarray[Any, Any]:
    """The released code's pads and crops, with numpy, one shift after the other."""
    kernel, strides = averaged.dictionary.kernel_size, averaged.dictionary.stride
    lengths = y.shape[2:]
    before, after = [], []
    for length, k, s in zip(lengths, kernel, strides):
        over = (length + s - k) % s
        before.append(s if s > 1 else 0)
        after.append((0 if over == 0 else s - over) + (s if s > 1 else 0))
    total = np.zeros(tuple(y.shape))
    shifts = list(itertools.product(*(range(s) for s in strides)))
    for shift in shifts:
        pad = [(b - i, a + i) for b, a, i in zip(before, after, shift)]
        padded = np.pad(y.numpy(), [(0, 0), (0, 0), *pad], mode="reflect")
        with torch.no_grad():
            codes = averaged.guide.encode(torch.from_numpy(padded))
            decoded = averaged.dictionary(codes).numpy()
        window = tuple(slice(p, p + n) for (p, _), n in zip(pad, lengths))
        total += decoded[(slice(None), slice(None), *window)]
    return total / len(shifts)


@geometries
@pytest.mark.parametrize("shifts_at_once", [1, 4, 100])
def test_the_average_is_that_of_the_published_split(geometry: str, shifts_at_once: int) -> None:
    kernel, stride, lengths = GEOMETRIES[geometry]
    averaged = make(kernel, stride, channels=2, shifts_at_once=shifts_at_once)
    y = draw(3, 2, *lengths)
    expected = by_hand(averaged, y)
    with torch.no_grad():
        np.testing.assert_allclose(averaged.reconstruct(y).numpy(), expected, atol=1e-12)
        assert np.abs(averaged.reconstruct(y, shifts=1).numpy() - expected).max() > 1e-3


def test_without_a_stride_there_is_one_shift_and_no_pad() -> None:
    averaged = make((4, 3), 1)
    y = draw(2, 1, 9, 8)
    assert averaged.shifts == [(0, 0)]
    plain = averaged.dictionary(averaged.guide.encode(y))
    torch.testing.assert_close(averaged.predictor(y), plain, rtol=0, atol=1e-12)


@geometries
def test_codes_are_those_of_the_padded_data(geometry: str) -> None:
    kernel, stride, lengths = GEOMETRIES[geometry]
    averaged = make(kernel, stride)
    codes = averaged.codes(draw(2, 1, *lengths))
    assert list(codes) == averaged.shifts
    pads = [2 * s if s > 1 else 0 for s in stride]
    least = [-(-(n - k + p) // s) + 1 for n, k, s, p in zip(lengths, kernel, stride, pads)]
    assert {tuple(c.shape) for c in codes.values()} == {(2, 4, *least)}


# Symmetries


def test_the_average_moves_along_with_the_picture() -> None:
    averaged = make((4, 4), 3, num_steps=2)
    scene = draw(1, 1, 44, 44)
    # Two steps and the decoder reach 4 * (4 - 1) = 12 samples, so 13 keep the edges out.
    still, moved = scene[..., :40, :40], scene[..., 1:41, 2:42]
    inner = averaged.predictor(still)[..., 13 + 1 : 27, 13 + 2 : 27]
    again = averaged.predictor(moved)[..., 13:26, 13:25]
    torch.testing.assert_close(inner, again, rtol=0, atol=1e-12)
    one = [(0, 0)]
    inner = averaged.predictor(still, shifts=one)[..., 13 + 1 : 27, 13 + 2 : 27]
    again = averaged.predictor(moved, shifts=one)[..., 13:26, 13:25]
    assert (inner - again).abs().max() > 1e-2


def test_a_constant_picture_stays_constant_away_from_its_edges() -> None:
    averaged = make((4, 4), 3, num_steps=2)
    flat = averaged.predictor(torch.full((1, 1, 40, 40), 0.7).double())[..., 13:27, 13:27]
    assert (flat - flat.mean()).abs().max() < 1e-12
    assert flat.mean().abs() > 1e-3


def test_the_predictor_is_averaged_and_not_the_mean() -> None:
    averaged = make()
    averaged = ShiftAveraged(averaged.guide, averaged.dictionary, Rates())
    y = draw(1, 1, 12, 13)
    each = [averaged.predictor(y, shifts=[shift]) for shift in averaged.shifts]
    rate = averaged.reconstruct(y)
    torch.testing.assert_close(rate, torch.stack(each).mean(0).exp(), rtol=1e-12, atol=0)
    assert (rate < torch.stack(each).exp().mean(0)).all()  # Jensen


# Some of the shifts


def test_a_few_shifts_have_the_mean_of_all() -> None:
    averaged = make()
    y = draw(1, 1, 12, 13)
    num_draws = 400
    with torch.no_grad():
        full = averaged.predictor(y)
        draws = torch.stack([averaged.predictor(y, shifts=2) for _ in range(num_draws)])
    error = draws.std(0) / num_draws**0.5
    # 156 samples: 5 standard errors are exceeded with a probability below 1e-4.
    assert ((draws.mean(0) - full).abs() < 5 * error).all()
    assert (error > 0).all()


def test_drawn_shifts_differ_and_come_from_all() -> None:
    averaged = make()
    y = draw(1, 1, 12, 13)
    seen = [tuple(averaged.codes(y, shifts=2)) for _ in range(60)]
    assert all(first != second for first, second in seen)
    assert {shift for pair in seen for shift in pair} == set(averaged.shifts)
    assert set(averaged.codes(y, shifts=9)) == set(averaged.shifts)


# Masks and pads


@pytest.mark.parametrize("padding", [Mirrored(), Unobserved()])
def test_what_was_not_observed_has_no_part(padding: Any) -> None:
    averaged = make(padding=padding)
    y = draw(2, 1, 12, 13)
    mask = torch.rand(2, 1, 12, 13) < 0.7
    first = averaged.predictor(torch.where(mask, y, torch.nan), mask)
    torch.testing.assert_close(first, averaged.predictor(torch.where(mask, y, 9.0), mask))
    assert (first - averaged.predictor(y)).abs().max() > 1e-2


def test_a_mask_is_mirrored_with_its_data() -> None:
    averaged = make((5,), 3)
    y = draw(1, 1, 17)
    mask = torch.rand(1, 1, 17) < 0.6
    codes = averaged.codes(y, mask, shifts=[(1,)])[(1,)]
    pad = [(0, 0), (0, 0), (2, 4)]  # stride 3, shift 1: 17 + 6 = 5 + 6 * 3
    padded = torch.from_numpy(np.pad(y.numpy(), pad, mode="reflect"))
    observed = torch.from_numpy(np.pad(mask.numpy(), pad, mode="reflect"))
    torch.testing.assert_close(codes, averaged.guide.encode(padded, observed))


def test_an_unobserved_pad_may_hold_anything() -> None:
    class Junk:
        def __call__(self, y: Tensor, mask: Tensor | None, pads: Any) -> Any:
            padded, observed = Unobserved()(y, mask, pads)
            return torch.where(observed, padded, 50.0), observed

    averaged = make(padding=Unobserved())
    junk = ShiftAveraged(averaged.guide, averaged.dictionary, averaged.likelihood, padding=Junk())
    y = draw(2, 1, 12, 13)
    torch.testing.assert_close(junk.predictor(y), averaged.predictor(y))
    mirrored = ShiftAveraged(averaged.guide, averaged.dictionary, averaged.likelihood)
    assert (mirrored.predictor(y) - averaged.predictor(y)).abs().max() > 1e-2


# Guides


def test_a_guide_with_a_posterior_is_averaged_at_its_mean() -> None:
    dictionary, likelihood = Conv(4, 1, (4, 4), 2), Gaussian(0.3)
    encoder = UnrolledEncoder(Unrolled(dictionary, likelihood, num_steps=2), LAPLACE)
    guide = Thresholded(encoder)
    averaged = ShiftAveraged(guide, dictionary, likelihood, padding=Unobserved())
    y = torch.randn(2, 1, 11, 10)
    padded = torch.nn.functional.pad(y, (2, 2, 1, 4))
    observed = torch.nn.functional.pad(torch.ones_like(y), (2, 2, 1, 4)) > 0
    expected = dictionary(guide.posterior(padded, observed).mean)[..., 1:12, 2:12]
    torch.testing.assert_close(averaged.predictor(y, shifts=[(1, 0)]), expected)


def test_as_a_program_it_is_the_guide_that_it_wraps() -> None:
    dictionary, likelihood = Conv(4, 1, (5, 5), 3), Gaussian(0.3)
    model = SparseCoding(dictionary, likelihood, LAPLACE)
    guide = UnrolledFISTA(dictionary, likelihood, LAPLACE, num_steps=2)
    averaged = ShiftAveraged(guide, dictionary, likelihood)
    y = torch.randn(6, 1, 11, 14)
    torch.testing.assert_close(averaged(y), guide(y))
    torch.testing.assert_close(averaged.encode(y), guide.encode(y))
    assert {id(p) for p in averaged.parameters()} == {id(p) for p in guide.parameters()}
    losses = [
        fit(model, program, y, epochs=1, progress=False).step_loss for program in (guide, averaged)
    ]
    assert losses[1][0] < losses[0][0]  # the same ELBO, after the step that the first took


@pytest.mark.parametrize("shifts", [None, 2])
def test_fit_trains_through_the_average(shifts: int | None) -> None:
    dictionary, likelihood = Conv(6, 1, (4, 4), 2), Gaussian(0.2)
    model = SparseCoding(dictionary, likelihood, LAPLACE)
    guide = UnrolledFISTA.untied(dictionary, likelihood, LAPLACE, num_steps=2)
    averaged = ShiftAveraged(guide, dictionary, likelihood)
    coarse = torch.randn(12, 1, 5, 5)
    clean = torch.nn.functional.interpolate(coarse, (14, 14), mode="bilinear")
    before = {name: p.detach().clone() for name, p in averaged.named_parameters()}

    def error() -> float:
        with torch.no_grad():
            return float((averaged.reconstruct(noisy) - clean).square().mean())

    noisy = clean + 0.2 * torch.randn_like(clean)
    first = error()
    loss = Supervised(
        corrupt=lambda clean: clean + 0.2 * torch.randn_like(clean),
        predict=functools.partial(averaged.reconstruct, shifts=shifts),
    )
    adam = functools.partial(torch.optim.Adam, lr=0.02)
    history = fit(
        model, averaged, clean, loss=loss, optimizer=adam, epochs=20, batch_size=4, progress=False
    )
    assert error() < 0.8 * first
    assert history.epoch_loss[-1] < history.epoch_loss[0]
    assert all(not torch.equal(p, before[name]) for name, p in averaged.named_parameters())


def test_a_saved_average_is_the_same_again(tmp_path: Path) -> None:
    averaged = make(padding=Unobserved(), shifts_at_once=2)
    y = draw(1, 1, 12, 13)
    infer.save(tmp_path / "run", averaged=averaged)
    loaded = infer.load(tmp_path / "run")["averaged"]
    assert loaded.guide.encoder.dictionary is loaded.dictionary
    assert loaded.shifts_at_once == 2
    torch.testing.assert_close(loaded.reconstruct(y), averaged.reconstruct(y), rtol=0, atol=0)


# What it is for


def test_a_photograph_is_denoised_better_than_at_any_single_shift() -> None:
    """A DCT of 8 x 8 with stride 5: 25 shifts. Single ones show the grid, the average does not."""
    path = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    picture = matplotlib.image.imread(path) @ np.array([0.299, 0.587, 0.114]) / 255
    clean = torch.from_numpy(picture[150:230, 200:280])[None, None]
    sigma = 20 / 255
    noisy = clean + sigma * draw(*clean.shape)
    basis = idct(np.eye(8), norm="ortho", axis=1)
    atoms = torch.from_numpy(np.einsum("ia,jb->ijab", basis, basis)).reshape(64, 1, 8, 8)
    dictionary, likelihood = Conv(64, 1, (8, 8), 5, atoms=atoms), Gaussian(sigma).double()
    prior = dist.Laplace(torch.tensor(0.0).double(), torch.tensor(sigma / 1.5).double())
    guide = UnrolledFISTA(dictionary, likelihood, prior, num_steps=15)
    averaged = ShiftAveraged(guide, dictionary, likelihood)
    level = noisy.mean()

    def psnr(shifts: Any) -> float:
        with torch.no_grad():
            estimate = level + averaged.reconstruct(noisy - level, shifts=shifts)
        return float(-10 * (estimate - clean).square().mean().log10())

    single = max(psnr([shift]) for shift in averaged.shifts[::6])
    assert psnr(None) > single + 1  # dB
    assert single > -20 * np.log10(sigma) + 1  # and one shift denoises at all


# Refused


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda a: (a.guide, Dense(4, 5), a.likelihood), TypeError, "Expected a Conv dictionary"),
        (lambda a: (a.guide, a.dictionary, 0.1), TypeError, "a Likelihood, got float"),
        (lambda a: (nn.Linear(2, 2), a.dictionary, a.likelihood), TypeError, "got Linear"),
        (
            lambda a: (a.guide, Conv(4, 1, 6, 3, boundary=Periodic()), a.likelihood),
            NotImplementedError,
            r"Interior\(\), got Periodic\(\)",
        ),
        (
            lambda a: (a.guide, Conv(4, 1, 6, 3, boundary=Overhang()), a.likelihood),
            NotImplementedError,
            r"Interior\(\), got Overhang\(\)",
        ),
    ],
)
def test_parts_of_the_wrong_kind_are_refused(
    build: Callable[[ShiftAveraged], Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        ShiftAveraged(*build(make()))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"padding": Mirrored}, TypeError, r"padding to be Mirrored\(\) or Unobserved\(\)"),
        ({"padding": "reflect"}, TypeError, "got 'reflect'"),
        ({"shifts_at_once": 0}, ValueError, "shifts_at_once >= 1"),
    ],
)
def test_options_out_of_range_are_refused(
    options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        make(**options)


@pytest.mark.parametrize(
    ("shifts", "error", "match"),
    [
        (10, ValueError, "at most 9 shifts, got 10"),
        (0, ValueError, "shifts >= 1"),
        (1.5, TypeError, "shifts to be a whole number"),
        ([], ValueError, "different shifts below the stride"),
        ([(0, 3)], ValueError, r"below the stride \(3, 3\), got \[\(0, 3\)\]"),
        ([(0, 1), (0, 1)], ValueError, "different shifts"),
    ],
)
def test_shifts_that_there_are_not_are_refused(
    shifts: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        make().predictor(draw(1, 1, 12, 13), shifts=shifts)


def test_data_that_do_not_fit_are_refused() -> None:
    averaged = make()
    with pytest.raises(ValueError, match=r"channels=1, \*lengths\), got \(1, 2, 12, 13\)"):
        averaged.predictor(draw(1, 2, 12, 13))
    with pytest.raises(TypeError, match="dtype torch.float64"):
        averaged.predictor(torch.randn(1, 1, 12, 13))
    with pytest.raises(ValueError, match=r"more than 6 samples.*Try padding=Unobserved\(\)"):
        averaged.predictor(draw(1, 1, 6, 13))
    small = make(padding=Unobserved())
    assert small.predictor(draw(1, 1, 6, 13)).shape == (1, 1, 6, 13)


def test_a_guide_for_one_size_of_data_says_so() -> None:
    dictionary = Conv(4, 1, 4, 2)
    guide = Thresholded(Heads(nn.Sequential(nn.Flatten(), nn.Linear(12, 8)), 8, (4, 5)))
    averaged = ShiftAveraged(guide, dictionary, Gaussian(0.1))
    with pytest.raises(ValueError, match="data that the network takes"):
        averaged.predictor(torch.randn(2, 1, 12))
