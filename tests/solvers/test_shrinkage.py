"""What a layer makes of the value of its gradient step."""

import contextlib

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_sparse.dictionaries import Conv, Dense
from pyro_sparse.distributions import KnownSupport, SignedLaplace, prox, spread
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.solvers import (
    ISTA,
    Bias,
    HardThreshold,
    NonMaximumSuppression,
    Proximal,
    Shrinkage,
    TopK,
    Unrolled,
)

STEP = torch.tensor(0.3, dtype=torch.float64)


def law(*shape: int, prior=None):
    prior = dist.Laplace(0.0, 0.5) if prior is None else prior
    return spread(prior, shape, torch.zeros(1, dtype=torch.float64))


def values(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_a_proximal_shrinkage_is_the_priors_prox_at_a_decaying_step():
    value, prior = values(5, 4), law(4)
    for layer in range(3):
        expected = prox(prior, value, STEP * 0.5**layer)
        codes = Proximal(decay=0.5)(prior, value, STEP, layer, 3)
        torch.testing.assert_close(codes, expected, rtol=0, atol=0)


def test_a_hard_threshold_keeps_values_and_is_scaled_by_nothing_but_its_decay():
    value = values(5, 3, 7)
    level = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    shrinkage = HardThreshold(level, decay=0.5)
    for layer in range(2):
        cut = (level * 0.5**layer)[:, None]
        expected = torch.where(value.abs() > cut, value, torch.zeros_like(value))
        torch.testing.assert_close(shrinkage(law(3, 7), value, STEP, layer, 2), expected)


@pytest.mark.parametrize("two_sided", [False, True])
def test_a_bias_ignores_prior_and_step(two_sided):
    value, bias = values(5, 3), torch.tensor([0.5, -0.2, 0.0], dtype=torch.float64)
    shrinkage = Bias(bias, two_sided=two_sided)
    if two_sided:
        expected = value.sign() * (value.abs() - bias.abs()).relu()
    else:
        expected = (value - bias).relu()
    torch.testing.assert_close(shrinkage(law(3), value, STEP, 0, 1), expected)
    torch.testing.assert_close(shrinkage(law(3), value, 9 * STEP, 3, 5), expected)


def test_top_k_keeps_the_largest_of_each_datum_and_cuts_the_gradient_of_the_others():
    value = values(6, 4, 5).requires_grad_()
    codes = TopK(Proximal(), num_active=3)(law(4, 5), value, STEP, 0, 1)
    full = Proximal()(law(4, 5), value, STEP, 0, 1).flatten(1)
    assert ((codes != 0).flatten(1).sum(1) == 3).all()
    smallest_kept = codes.flatten(1).abs().masked_fill(codes.flatten(1) == 0, torch.inf).amin(1)
    dropped = full.masked_fill(codes.flatten(1) != 0, 0.0).abs().amax(1)
    assert (dropped < smallest_kept).all()
    (gradient,) = torch.autograd.grad(codes.sum(), value)
    assert torch.equal(gradient != 0, codes != 0)


def test_top_k_falls_from_twice_the_number_over_the_layers():
    shrinkage, value = TopK(HardThreshold(0.0), num_active=10, every=5), values(1, 100)
    counts = [int((shrinkage(law(100), value, STEP, layer, 20) != 0).sum()) for layer in range(20)]
    assert [counts[i] for i in (4, 9, 14, 19)] == [18, 15, 13, 10]
    assert all(count == 100 for i, count in enumerate(counts) if (i + 1) % 5)
    assert int((shrinkage(law(100), value, STEP, 6, 7) != 0).sum()) == 10  # the last one decides


def test_top_k_of_more_codes_than_there_are_changes_nothing():
    value = values(3, 4)
    codes = TopK(Proximal(), num_active=4)(law(4), value, STEP, 0, 1)
    assert torch.equal(codes, Proximal()(law(4), value, STEP, 0, 1))


def around(positions, gap):
    """For each position a mask of those at most ``gap`` away in every dimension, itself apart."""
    grid = torch.cartesian_prod(*(torch.arange(n) for n in positions)).reshape(-1, len(positions))
    near = ((grid[:, None] - grid[None]).abs() <= torch.tensor(gap)).all(-1)
    return near & ~torch.eye(len(grid), dtype=torch.bool)


@pytest.mark.parametrize(
    ("positions", "gap"),
    [((40,), 3), ((40,), 0), ((5,), 9), ((9, 7), 2), ((9, 7), (3, 0)), ((5, 4, 6), (1, 2, 1))],
    ids=str,
)
def test_what_is_largest_around_it_stays_and_nothing_else(positions, gap):
    """By brute force: codes of both signs, each against all that are near, atom by atom."""
    value = values(2, 3, *positions).requires_grad_()
    prior = law(3, *positions)
    full = Proximal()(prior, value, STEP, 0, 1)
    codes = NonMaximumSuppression(Proximal(), gap)(prior, value, STEP, 0, 1)
    size = full.detach().abs().flatten(2)
    near = around(positions, gap)
    rival = torch.where(near, size[:, :, None, :], torch.zeros((), dtype=size.dtype)).amax(-1)
    expected = torch.where((size > rival).reshape(full.shape), full, torch.zeros_like(full))
    torch.testing.assert_close(codes, expected, rtol=0, atol=0)
    assert (codes < 0).any() and (codes > 0).any()
    (gradient,) = torch.autograd.grad(codes.sum(), value)
    assert torch.equal(gradient != 0, codes != 0)


@pytest.mark.parametrize("shape", [(1, 30), (2, 6, 5)], ids=str)
def test_of_equal_neighbours_one_stays(shape):
    value = torch.randint(-3, 4, (4, *shape)).double()
    codes = NonMaximumSuppression(HardThreshold(0.0), 1)(law(*shape), value, STEP, 0, 1)
    left, near = (codes != 0).flatten(2), around(shape[1:], 1)
    assert not (left[:, :, :, None] & left[:, :, None, :] & near).any()
    assert torch.equal((codes != 0).flatten(2).any(-1), (value != 0).flatten(2).any(-1))
    row = torch.tensor([[[0.0, 2.0, 2.0, 2.0, 0.0, -2.0, 2.0]]]).double()
    codes = NonMaximumSuppression(HardThreshold(0.0), 1)(law(1, 7), row, STEP, 0, 1)
    assert codes.flatten().tolist() == [0.0, 2.0, 0.0, 0.0, 0.0, -2.0, 0.0]


def test_maxima_are_those_of_codes_that_may_be():
    value = torch.tensor([[[-5.0, 1.0, 0.0, 4.0, 2.0]]], dtype=torch.float64)
    signs = SignedLaplace(torch.ones((), dtype=torch.float64), torch.ones(1, 5)).to_event(2)
    known = torch.tensor([[True, True, True, False, True]])
    support = KnownSupport(dist.Laplace(0.0, torch.ones(1, 5).double()), known).to_event(2)
    for prior, expected in (
        (signs, [0.0, 1.0, 0.0, 4.0, 0.0]),
        (support, [-5.0, 0.0, 0.0, 0.0, 2.0]),
    ):
        shrinkage = NonMaximumSuppression(HardThreshold(0.0), 1)
        assert shrinkage.keeps_support
        assert shrinkage(prior, value, STEP, 0, 1).flatten().tolist() == expected


@pytest.mark.parametrize(("positions", "kernel"), [((40,), 5), ((9, 8), (3, 2))], ids=str)
def test_an_encoder_keeps_one_code_for_each_event(positions, kernel):
    kernel = (kernel,) if isinstance(kernel, int) else kernel
    signal = tuple(n + k - 1 for n, k in zip(positions, kernel, strict=True))
    dictionary = Conv(2, 1, kernel, atoms=torch.ones(2, 1, *kernel)).double()
    net = Unrolled(
        dictionary,
        Gaussian(torch.ones((), dtype=torch.float64)),
        num_steps=10,
        shrinkage=NonMaximumSuppression(Proximal(), 2),
    )
    codes = net(10 * values(3, 1, *signal), law(2, *positions))
    left, near = (codes != 0).flatten(2), around(positions, 2)
    assert left.any() and not (left[:, :, :, None] & left[:, :, None, :] & near).any()


@pytest.mark.parametrize("gap", [1, (1,), (1, 1)], ids=str)
@pytest.mark.parametrize(
    ("dictionary", "dims"), [(Dense(6, 4), 0), (Conv(2, 1, 3), 1), (Conv(2, 1, (3, 3)), 2)], ids=str
)
def test_a_gap_needs_positions_of_its_dimensions(dictionary, dims, gap):
    shrinkage = NonMaximumSuppression(Proximal(), gap)
    prior = law(2, *[5] * dims)
    fits = dims > 0 and (isinstance(gap, int) or len(gap) == dims)
    match = r"\(atoms, \*positions\).*Use Conv" if dims == 0 else f"for {dims} dimensions of pos"
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match=match):
        Unrolled(dictionary, Gaussian(1.0), shrinkage=shrinkage)
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match=match):
        shrinkage(prior, values(*prior.event_shape), STEP, 0, 1)


def test_lista_is_a_configuration():
    # Gregor & LeCun (2010): z = S_b(W_e y + (I - W_e W_d) z), both matrices and the bias free.
    decoder = Dense(8, 5).double()
    analysis, synthesis = Dense(8, 5).double(), Dense(8, 5, unit_norm=False).double()
    bias = torch.rand(8, dtype=torch.float64)
    net = Unrolled(
        decoder,
        Gaussian(torch.ones((), dtype=torch.float64)),
        num_steps=6,
        method=ISTA(),
        step_size=0.7,
        analysis=analysis,
        synthesis=synthesis,
        shrinkage=Bias(bias, two_sided=True),
    )
    y = values(4, 5)
    encode = 0.7 * analysis.atoms.detach().T  # (features, atoms)
    inhibit = torch.eye(8, dtype=torch.float64) - synthesis.atoms.detach() @ encode
    codes = torch.zeros(4, 8, dtype=torch.float64)
    for _ in range(6):
        value = y @ encode + codes @ inhibit
        codes = value.sign() * (value.abs() - bias).relu()
    torch.testing.assert_close(net(y, law(8)), codes, rtol=0, atol=1e-12)
    net(y, law(8)).square().sum().backward()
    assert all(p.grad is not None for n, p in net.named_parameters() if "dictionary" not in n)


def test_a_users_own_shrinkage_is_a_module_with_a_forward():
    class Clipped(Shrinkage):
        def forward(self, law, value, step, layer, num_layers):
            return value.clamp(0, 1)

    dictionary = Conv(2, 1, 3).double()
    likelihood = Gaussian(torch.ones((), dtype=torch.float64))
    net = Unrolled(dictionary, likelihood, num_steps=2, shrinkage=Clipped())
    codes = net(5 * values(2, 1, 9), law(2, 7))
    assert 0 <= codes.min() and codes.max() == 1


def test_maxima_refuse_an_inner_shrinkage_of_other_atoms():
    with pytest.raises(ValueError, match=r"log_factor of a shrinkage.*shape \(2,\), got \(5,\)"):
        Unrolled(Conv(2, 1, 3), Gaussian(1.0), shrinkage=NonMaximumSuppression(Proximal(5), 1))


def test_parameters_of_a_shrinkage_are_the_nets():
    dictionary = Dense(6, 4)
    net = Unrolled(dictionary, Gaussian(1.0), shrinkage=TopK(Bias(0.1, num_atoms=6), 2))
    assert net.shrinkage.inner.bias.shape == (6,)
    assert "shrinkage.inner.bias" in dict(net.named_parameters())


@pytest.mark.parametrize(
    ("shrinkage", "error", "match"),
    [
        (Proximal(5), ValueError, r"log_factor of a shrinkage.*shape \(6,\), got \(5,\)"),
        (HardThreshold(torch.ones(5)), ValueError, r"level of a shrinkage.*got \(5,\)"),
        (TopK(Bias(torch.ones(5)), 2), ValueError, r"bias of a shrinkage.*got \(5,\)"),
        (Bias(torch.ones(6).double()), TypeError, "dtype torch.float32, got torch.float64"),
    ],
)
def test_a_shrinkage_of_other_atoms_is_refused_when_the_encoder_is_made(shrinkage, error, match):
    with pytest.raises(error, match=match):
        Unrolled(Dense(6, 4), Gaussian(1.0), shrinkage=shrinkage)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Proximal(0), ValueError, "num_atoms to be a whole number >= 1"),
        (lambda: Proximal(decay=0.0), ValueError, r"decay in \(0, 1\], got 0.0"),
        (lambda: Proximal(decay="slow"), TypeError, "decay to be a number, got 'slow'"),
        (lambda: HardThreshold(-1.0), ValueError, "level >= 0 and finite, in code units, got -1.0"),
        (lambda: HardThreshold("high"), TypeError, "level to be a number or a tensor, got 'high'"),
        (lambda: HardThreshold(torch.ones(2, 2)), ValueError, r"level of shape \(\) or \(atoms,\)"),
        (lambda: Bias(float("nan")), ValueError, "a finite bias, got nan"),
        (lambda: Bias(torch.ones(3), num_atoms=2), ValueError, r"shape \(2,\), got \(3,\)"),
        (lambda: TopK(nn.Identity(), 2), TypeError, "inner to be a Shrinkage"),
        (lambda: TopK(Proximal(), 0), ValueError, "num_active to be a whole number >= 1"),
        (lambda: TopK(Proximal(), 1, every=0), ValueError, "every to be a whole number >= 1"),
        (lambda: NonMaximumSuppression(nn.Identity(), 2), TypeError, "inner to be a Shrinkage"),
        (lambda: NonMaximumSuppression(Proximal(), -1), ValueError, "number >= 0.*got -1"),
        (lambda: NonMaximumSuppression(Proximal(), 1.5), ValueError, "number >= 0.*got 1.5"),
        (lambda: NonMaximumSuppression(Proximal(), True), ValueError, "number >= 0.*got True"),
        (lambda: NonMaximumSuppression(Proximal(), ()), ValueError, r"number >= 0.*got \(\)"),
        (lambda: NonMaximumSuppression(Proximal(), (1, -1)), ValueError, r"got \(1, -1\)"),
    ],
)
def test_what_cannot_be_a_shrinkage_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_a_bias_below_zero_wakes_no_unit_under_a_one_sided_prior() -> None:
    law = dist.Exponential(1.0).expand([3]).to_event(1)
    value, bias = torch.tensor([-1.0, -0.2, 0.3]), Bias(-0.5, two_sided=False)
    codes = bias.allowed(law, value, torch.tensor(1.0), 0, 1)
    torch.testing.assert_close(codes, torch.tensor([0.0, 0.3, 0.8]))
