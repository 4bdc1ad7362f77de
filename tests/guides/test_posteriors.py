"""Families of posteriors: the published closed forms, what is learned, and what is refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_sparse.diagnostics import sbc
from pyro_sparse.dictionaries import Dense
from pyro_sparse.distributions import GammaThresholded, Rate, SpikeAndSlab
from pyro_sparse.guides import (
    DensePosterior,
    GammaThresholdPosterior,
    PerDatum,
    SpikeAndSlabPosterior,
    Thresholded,
    ThresholdPosterior,
)
from pyro_sparse.infer import SparseELBO, load, log_weights, save
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding

F64 = torch.float64
FAMILIES: dict[str, Callable[[], Any]] = {
    "normal slab": SpikeAndSlabPosterior,
    "laplace slab": lambda: SpikeAndSlabPosterior(dist.Laplace),
    "exponential slab": lambda: SpikeAndSlabPosterior(dist.Exponential),
    "one-sided normal slab": lambda: SpikeAndSlabPosterior(one_sided=True),
    "one-sided laplace slab": lambda: SpikeAndSlabPosterior(dist.Laplace, one_sided=True),
    "shifted": lambda: ThresholdPosterior(0.3),
    "shifted normal": lambda: ThresholdPosterior(0.3, dist.Normal),
    "soft": lambda: ThresholdPosterior(0.3, soft=True),
    "one-sided": lambda: ThresholdPosterior(0.3, dist.Normal, soft=True, one_sided=True),
    "learned": lambda: ThresholdPosterior(Rate(0.3, num_atoms=3)),
    "per atom": lambda: ThresholdPosterior(torch.tensor([0.1, 0.3, 0.5])),
    "gamma": GammaThresholdPosterior,
    "gamma sampled": lambda: GammaThresholdPosterior(sampled=True),
    "gamma normal": lambda: GammaThresholdPosterior(sampled=True, base=dist.Normal),
    "dense": DensePosterior,
    "dense laplace": lambda: DensePosterior(dist.Laplace),
}
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
GATED = {name: make for name, make in FAMILIES.items() if not name.startswith("dense")}


def emit(names: tuple[str, ...], shape: tuple[int, ...] = (4, 3), **options: Any) -> dict:
    """What an encoder might emit: of order one, each another."""
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator, **options) for name in names}


def numbers(emitted: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: values.numpy() for name, values in emitted.items()}


# Laws ---------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 7), (4, 3, 2, 5)], ids=["dense", "1d", "2d"])
def test_the_law_has_the_shape_and_dtype_of_what_is_emitted(
    family: Callable[[], Any], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    family = family().to(dtype)
    law = family(emit(family.names, shape, dtype=dtype))
    assert law.batch_shape == shape and law.event_shape == ()
    assert law.sample().dtype == law.mean.dtype == dtype


@pytest.mark.parametrize("family", GATED.values(), ids=GATED)
def test_draws_are_exactly_zero_as_often_as_stated(family: Callable[[], Any]) -> None:
    """Within 4.5 standard errors for each of 12 codes: once in 12000 runs by chance."""
    family = family()
    law = family(emit(family.names))
    draws = 20_000
    active = (law.sample((draws,)) != 0).double().mean(0)
    stated = law.prob_active.detach().double()
    error = (stated * (1 - stated) / draws).sqrt()
    assert ((active - stated).abs() <= 4.5 * error + 1e-12).all()
    assert active.min() < 1


def test_free_inclusion_is_what_is_emitted() -> None:
    family = SpikeAndSlabPosterior()
    emitted = emit(family.names, dtype=F64)
    law, given = family(emitted), numbers(emitted)
    active = 1 / (1 + np.exp(-given["logits"]))
    np.testing.assert_allclose(law.prob_active, active, rtol=1e-12)
    np.testing.assert_allclose(law.mean, active * given["loc"], rtol=1e-12)
    slab = scipy.stats.norm(given["loc"], np.exp(given["log_scale"]))
    np.testing.assert_allclose(
        law.slab.log_prob(torch.tensor(0.7, dtype=F64)), slab.logpdf(0.7), rtol=1e-12
    )


def test_an_exponential_slab_has_the_emitted_mean_and_asks_for_no_location() -> None:
    family = SpikeAndSlabPosterior(dist.Exponential)
    assert family.names == ("log_scale", "logits")
    emitted = emit(family.names, dtype=F64)
    torch.testing.assert_close(family(emitted).slab.mean, emitted["log_scale"].exp())
    assert (family(emitted).sample((100,)) >= 0).all()


@pytest.mark.parametrize(
    ("slab", "reference"),
    [(dist.Normal, scipy.stats.norm), (dist.Laplace, scipy.stats.laplace)],
    ids=["normal", "laplace"],
)
def test_one_sided_the_slab_is_cut_off_and_inclusion_is_what_is_emitted(
    slab: type, reference: Any
) -> None:
    family = SpikeAndSlabPosterior(slab, one_sided=True)
    emitted = emit(family.names, dtype=F64)
    law, given = family(emitted), numbers(emitted)
    base = reference(given["loc"], np.exp(given["log_scale"]))
    odds = np.exp(given["logits"])
    np.testing.assert_allclose(law.prob_active, odds / (1 + odds), rtol=1e-10)
    np.testing.assert_allclose(
        law.slab.log_prob(torch.tensor(0.7, dtype=F64)),
        base.logpdf(0.7) - base.logsf(0),
        rtol=1e-10,
    )
    assert (law.sample((1000,)) >= 0).all()


@pytest.mark.parametrize("rate", [0.3, 2.0])
def test_the_divergence_of_a_one_sided_normal_slab_is_its_integral(rate: float) -> None:
    """From a spike and exponential; locations from 6 standard deviations below zero to 6 above."""
    family = SpikeAndSlabPosterior(one_sided=True)
    loc, scale = torch.tensor([-6.0, -1.0, 0.0, 1.0, 6.0], dtype=F64) * 0.4, math.log(0.4)
    emitted = {"loc": loc, "log_scale": torch.full((5,), scale, dtype=F64)}
    law = family(emitted | {"logits": torch.linspace(-1, 2, 5, dtype=F64)})
    prior = SpikeAndSlab(dist.Exponential(torch.tensor(rate, dtype=F64)), 0.2)
    found = torch.distributions.kl_divergence(law, prior)
    probs = float(torch.sigmoid(prior.logits))
    for k in range(5):
        below = -float(loc[k]) / 0.4
        slab = scipy.stats.truncnorm(below, np.inf, loc=float(loc[k]), scale=0.4)
        slabs = scipy.integrate.quad(
            lambda z, slab=slab: (
                slab.pdf(z) * (slab.logpdf(z) - scipy.stats.expon.logpdf(z, scale=1 / rate))
            ),
            0,
            8,
            points=[0.05, 0.5, 2.0],
        )[0]
        gate = float(law.prob_active[k])
        expected = gate * (math.log(gate / probs) + slabs)
        expected += (1 - gate) * math.log((1 - gate) / (1 - probs))
        assert math.isclose(found[k], expected, rel_tol=1e-7)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 4.0])
def test_a_shifted_laplace_is_active_with_probability_exp_of_minus_threshold_over_scale(
    threshold: float,
) -> None:
    """Fallah & Rozell (2022), sec. 3; whatever the location."""
    emitted = emit(("loc", "log_scale"), dtype=F64)
    law, given = ThresholdPosterior(threshold).double()(emitted), numbers(emitted)
    expected = np.exp(-np.float32(threshold).astype(float) / np.exp(given["log_scale"]))
    np.testing.assert_allclose(law.prob_active, expected, rtol=1e-12)
    np.testing.assert_allclose(law.slab.mean, given["loc"], rtol=1e-9, atol=1e-12)


def test_a_shifted_normal_is_active_with_the_mass_of_two_tails() -> None:
    emitted = emit(("loc", "log_scale"), dtype=F64)
    law = ThresholdPosterior(torch.tensor(0.3, dtype=F64), dist.Normal)(emitted)
    expected = 2 * scipy.stats.norm.sf(0.3 / np.exp(emitted["log_scale"].numpy()))
    np.testing.assert_allclose(law.prob_active, expected, rtol=1e-10)


@pytest.mark.parametrize("base", [dist.Laplace, dist.Normal])
@pytest.mark.parametrize("one_sided", [False, True])
def test_a_soft_threshold_lets_the_location_decide(base: type, one_sided: bool) -> None:
    emitted = emit(("loc", "log_scale"), dtype=F64)
    threshold = torch.tensor(0.3, dtype=F64)
    law = ThresholdPosterior(threshold, base, soft=True, one_sided=one_sided)(emitted)
    reference = {dist.Laplace: scipy.stats.laplace, dist.Normal: scipy.stats.norm}[base]
    found = reference(emitted["loc"].numpy(), np.exp(emitted["log_scale"].numpy()))
    expected = found.sf(0.3) + (0 if one_sided else found.cdf(-0.3))
    np.testing.assert_allclose(law.prob_active, expected, rtol=1e-10)


def test_a_gamma_threshold_integrates_out() -> None:
    """The inclusion is the mean of exp(-t / b) over the threshold's law, by quadrature."""
    family = GammaThresholdPosterior()
    emitted = emit(family.names, (2, 2), dtype=F64)
    law, given = family(emitted), numbers(emitted)
    for index in np.ndindex(2, 2):
        one = {name: values[index] for name, values in given.items()}
        gamma = scipy.stats.gamma(np.exp(one["log_concentration"]), scale=np.exp(-one["log_rate"]))
        scale = np.exp(one["log_scale"])
        expected = gamma.expect(lambda t, scale=scale: np.exp(-t / scale))
        assert math.isclose(law.prob_active[index], expected, rel_tol=1e-6)
    assert isinstance(law, GammaThresholded)
    torch.testing.assert_close(law.slab.mean, emitted["loc"])


def test_a_sampled_threshold_leaves_the_law_that_is_integrated_out() -> None:
    """Over 20000 draws of the threshold, within 4.5 standard errors for each of 4 codes."""
    sampled, whole = GammaThresholdPosterior(sampled=True), GammaThresholdPosterior()
    emitted = emit(whole.names, (2, 2))
    draws = 20_000
    many = {name: values.expand(draws, 2, 2) for name, values in emitted.items()}
    found = sampled(many).prob_active.double()
    error = found.std(0) / math.sqrt(draws)
    assert ((found.mean(0) - whole(emitted).prob_active).abs() <= 4.5 * error).all()
    assert (error > 0).all()


def test_a_sampled_threshold_is_a_site_with_the_event_shape_of_the_codes() -> None:
    family = GammaThresholdPosterior(sampled=True)
    with pyro.plate("data", 4):
        trace = poutine.trace(family).get_trace(emit(family.names, (4, 3, 7)))
    site = trace.nodes["threshold"]
    assert (site["fn"].batch_shape, site["fn"].event_shape) == ((4,), (3, 7))
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"].threshold, site["value"])


def test_gamma_parameters_are_clipped_as_published() -> None:
    family = GammaThresholdPosterior()
    emitted = emit(family.names) | {"log_concentration": torch.full((4, 3), 50.0)}
    clipped = emitted | {"log_concentration": torch.full((4, 3), math.log(1e6))}
    torch.testing.assert_close(family(emitted).logits, family(clipped).logits)
    assert family(emitted).concentration.max() < 1.01e6


def test_a_dense_law_is_the_base() -> None:
    emitted = emit(("loc", "log_scale"), dtype=F64)
    law, given = DensePosterior(dist.Laplace)(emitted), numbers(emitted)
    expected = scipy.stats.laplace(given["loc"], np.exp(given["log_scale"])).logpdf(0.7)
    np.testing.assert_allclose(law.log_prob(torch.tensor(0.7, dtype=F64)), expected, rtol=1e-12)


# One code of which the posterior is known ---------------------------------------------------------

NOISE, RATE, PROBS = 0.6, 0.8, 0.3


class Conditional(nn.Module):
    """Posterior of one code with an exponential slab, in the numbers of a one-sided normal one."""

    names = ("loc", "log_scale", "logits")

    def __init__(self, atom: Tensor) -> None:
        super().__init__()
        self.register_buffer("atom", atom)

    def forward(self, y: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        scale = NOISE / self.atom.norm()
        loc = scale**2 * (y @ self.atom / NOISE**2 - RATE)[:, None]
        constant = math.log(PROBS / (1 - PROBS)) + torch.log(RATE * scale * math.sqrt(2 * math.pi))
        square = (loc / scale) ** 2 / 2
        mass = torch.special.log_ndtr(loc / scale)
        return {
            "loc": loc,
            "log_scale": scale.log().expand_as(loc),
            "logits": constant + square + mass,
        }


class BothSigns(nn.Module):
    """The log-odds of another, with the evidence of negative codes left in."""

    names = Conditional.names

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, y: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        emitted = self.encoder(y)
        mass = torch.special.log_ndtr(emitted["loc"] / emitted["log_scale"].exp())
        return emitted | {"logits": emitted["logits"] - mass}


def one_code(dtype: torch.dtype) -> tuple[SparseCoding, Thresholded, Tensor]:
    """A model of one code, the guide that is its posterior, and data of both kinds."""
    dictionary = Dense(1, 4, atoms=torch.tensor([[1.0, -2.0, 0.5, 1.0]])).to(dtype)
    dictionary.freeze_()
    likelihood = Gaussian(torch.tensor(NOISE, dtype=dtype))
    prior = SpikeAndSlab(
        dist.Exponential(torch.tensor(RATE, dtype=dtype)), torch.tensor(PROBS, dtype=dtype)
    )
    model = SparseCoding(dictionary, likelihood, prior)
    atom = dictionary.atoms.detach()[0]
    guide = Thresholded(Conditional(atom), SpikeAndSlabPosterior(one_sided=True))
    generator = torch.Generator().manual_seed(2)
    noise = NOISE * torch.randn(6, 4, generator=generator, dtype=F64).to(dtype)
    return model, guide, torch.tensor([0, 0, 0.5, 1, 3, -2]).to(noise)[:, None] * atom + noise


def test_one_sided_it_is_the_posterior_of_one_code() -> None:
    """Inclusion, mean, spread and evidence of each datum, by a fine grid over the code."""
    model, guide, y = one_code(F64)
    law, atom = guide.posterior(y), model.dictionary.atoms.detach().numpy()[0]
    grid = np.linspace(0, 20, 400_001)
    total = 0.0
    for n in range(len(y)):
        silent = scipy.stats.norm.logpdf(y[n], scale=NOISE).sum()
        residual = y[n].numpy()[:, None] - atom[:, None] * grid
        joint = np.exp(scipy.stats.norm.logpdf(residual, scale=NOISE).sum(0) - silent)
        joint *= scipy.stats.expon.pdf(grid, scale=1 / RATE)
        slab = np.trapezoid(joint, grid)  # in units of the density of a silent datum
        odds = PROBS / (1 - PROBS) * slab
        np.testing.assert_allclose(law.prob_active[n, 0], odds / (1 + odds), rtol=1e-7)
        mean = np.trapezoid(grid * joint, grid) / slab
        square = np.trapezoid((grid - mean) ** 2 * joint, grid) / slab
        np.testing.assert_allclose(law.slab.mean[n, 0], mean, rtol=1e-7)
        np.testing.assert_allclose(law.slab.variance[n, 0], square, rtol=1e-6)
        total += silent + np.log(1 - PROBS + PROBS * slab)
    assert abs(-SparseELBO().loss(model, guide, y) - total) < 1e-7
    # float32: six data with evidences of a few nats each
    single = one_code(torch.float32)
    assert abs(-SparseELBO().loss(*single) - total) < 1e-5


def test_log_weights_of_the_posterior_of_one_code_are_the_evidence() -> None:
    model, guide, y = one_code(F64)
    weights = log_weights(model, guide, y, num_samples=50)
    assert weights.local.std(0).max() < 1e-9
    assert abs(weights.local.mean(0).sum() + SparseELBO().loss(model, guide, y)) < 1e-9


def test_simulations_do_not_tell_the_posterior_of_one_code_from_the_truth() -> None:
    model, guide, y = one_code(torch.float32)
    y = y[:1].expand(200, 4)
    options: dict[str, Any] = {"num_simulations": 400, "num_samples": 100, "progress": False}
    assert not sbc(model, guide, y, **options).alarm
    assert sbc(model, Thresholded(BothSigns(guide.encoder), guide.family), y, **options).alarm
    guide.family = SpikeAndSlabPosterior()  # counts negative codes too
    with pytest.raises(ValueError, match="infinite|support"):
        sbc(model, guide, y, **options)


def test_refining_finds_the_posterior_of_one_code() -> None:
    """From parameters that are wrong; to the evidence, within 1e-3 nats a datum."""
    model, guide, y = one_code(F64)
    emitted = guide.encoder(y)
    wrong = {name: values + 0.7 for name, values in emitted.items()}
    start = Thresholded(PerDatum(wrong), guide.family)
    best = SparseELBO().loss(model, guide, y)
    assert SparseELBO().loss(model, start, y) - best > 0.3
    refined = start.refine(model, y, num_steps=300)
    assert 0 <= SparseELBO().loss(model, refined, y) - best < 1e-3 * len(y)


@pytest.mark.parametrize("slab", [dist.Normal, dist.Laplace])
def test_one_sided_gradients_are_finite_far_on_either_side(slab: type) -> None:
    """Locations from 30 scales below zero to 30 above, in float32, of density, KL and draws."""
    family = SpikeAndSlabPosterior(slab, one_sided=True)
    ratio = torch.linspace(-30, 30, 121)
    prior = SpikeAndSlab(dist.Exponential(0.5), 0.1)
    for log_scale in (-5.0, 0.0, 3.0):
        emitted = {
            "loc": ratio * math.exp(log_scale),
            "log_scale": torch.full_like(ratio, log_scale),
            "logits": ratio / 3,
        }
        emitted = {name: values.requires_grad_() for name, values in emitted.items()}
        law = family(emitted)
        pyro.set_rng_seed(0)
        for value in (
            torch.distributions.kl_divergence(law, prior),
            law.log_prob(law.sample()),
            law.mean,
            law.variance,
            law.rsample(),
        ):
            assert value.isfinite().all()
            for gradient in torch.autograd.grad(
                value.sum(), list(emitted.values()), retain_graph=True
            ):
                assert gradient.isfinite().all()


# Thresholds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True], ids=["tensor", "module"])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 7)], ids=["dense", "conv"])
def test_one_threshold_per_atom_is_shared_by_its_positions(
    learned: bool, shape: tuple[int, ...]
) -> None:
    values = torch.tensor([0.1, 0.3, 0.5])
    family = ThresholdPosterior(Rate(values) if learned else values)
    law = family({"loc": torch.zeros(shape), "log_scale": torch.zeros(shape)})
    expected = torch.exp(-values).reshape(3, *[1] * (len(shape) - 2)).expand(shape)
    torch.testing.assert_close(law.prob_active, expected)


def test_a_learned_threshold_gets_the_gradient_of_the_inclusion() -> None:
    family = ThresholdPosterior(Rate(0.3, num_atoms=3))
    family(emit(family.names)).prob_active.sum().backward()
    [parameter] = family.parameters()
    assert parameter.grad is not None and (parameter.grad < 0).all()


def test_a_fixed_threshold_is_a_buffer_of_its_own() -> None:
    value = torch.tensor(0.3)
    family = ThresholdPosterior(value).double()
    value.fill_(9.0)
    assert family.threshold.dtype == F64 and math.isclose(family.threshold, 0.3, rel_tol=1e-6)
    assert not list(family.parameters())


@pytest.mark.parametrize("value", [1, np.float64(1.0), torch.tensor(1)], ids=["int", "np", "whole"])
def test_a_threshold_has_the_default_dtype_unless_it_is_a_tensor(value: Any) -> None:
    assert ThresholdPosterior(value).threshold.dtype == torch.float32


class Returns(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self) -> Any:
        return self.value


@pytest.mark.parametrize("shape", [(3,), (1,), (), (3, 1), (3, 7), (4, 3, 7)], ids=str)
def test_a_threshold_that_broadcasts_with_the_codes_serves(shape: tuple[int, ...]) -> None:
    for threshold in (torch.rand(shape), Returns(torch.rand(shape))):
        law = ThresholdPosterior(threshold)(emit(("loc", "log_scale"), (4, 3, 7)))
        assert law.batch_shape == (4, 3, 7)


@pytest.mark.parametrize("shape", [(7,), (2,), (7, 1), (2, 4, 3, 7)], ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["shifted", "soft"])
def test_a_threshold_of_other_atoms_is_refused(shape: tuple[int, ...], soft: bool) -> None:
    for threshold in (torch.rand(shape), Returns(torch.rand(shape))):
        with pytest.raises(ValueError, match=r"\(atoms,\) = \(3,\), or .* codes \(3, 7\), got"):
            ThresholdPosterior(threshold, soft=soft)(emit(("loc", "log_scale"), (4, 3, 7)))


def test_a_module_that_returns_no_threshold_is_refused() -> None:
    with pytest.raises(TypeError, match=r"return a tensor, got float. Try Rate\(.*num_atoms=3"):
        ThresholdPosterior(Returns(0.3))(emit(("loc", "log_scale")))


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: SpikeAndSlabPosterior(dist.Gamma), ValueError, "Expected slab to be dist.Normal"),
        (lambda: ThresholdPosterior(-0.1), ValueError, "threshold >= 0 and finite"),
        (lambda: ThresholdPosterior(math.nan), ValueError, "threshold >= 0 and finite"),
        (lambda: ThresholdPosterior(math.inf), ValueError, "threshold >= 0 and finite"),
        (lambda: ThresholdPosterior(True), TypeError, "a number, a tensor or a module"),
        (lambda: ThresholdPosterior(lambda: 0.1), TypeError, "a number, a tensor or a module"),
        (lambda: ThresholdPosterior(nn.Parameter(torch.ones(3))), ValueError, "Rate"),
        (lambda: ThresholdPosterior(0.1, dist.Gamma), ValueError, "dist.Laplace or dist.Normal"),
        (lambda: ThresholdPosterior(0.1, one_sided=True), ValueError, "soft=True"),
        (lambda: GammaThresholdPosterior(base=dist.Normal), NotImplementedError, "sampled=True"),
        (lambda: GammaThresholdPosterior(base=dist.Gamma), ValueError, "dist.Laplace or"),
        (lambda: DensePosterior(dist.Gamma), ValueError, "dist.Laplace or dist.Normal"),
    ],
    ids=range(12),
)
def test_what_is_no_family_is_refused(
    build: Callable[[], Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        build()


# Files --------------------------------------------------------------------------------------------


@families
def test_a_family_comes_back(tmp_path: Path, family: Callable[[], Any], dtype: torch.dtype) -> None:
    family = family().to(dtype)
    save(tmp_path / "run", family=family)
    back = load(tmp_path / "run")["family"]
    assert type(back) is type(family) and back.names == family.names
    emitted = emit(family.names, dtype=dtype)
    value = SpikeAndSlab(dist.Exponential(1.0), 0.5).sample((4, 3)).to(dtype)
    pyro.set_rng_seed(1)
    expected = family(emitted).log_prob(value)
    pyro.set_rng_seed(1)
    assert torch.equal(back(emitted).log_prob(value), expected)


def test_a_stranger_cannot_name_another_law(tmp_path: Path) -> None:
    family = DensePosterior()
    family.base = type("Normaal", (), {})
    with pytest.raises(ValueError, match="Expected one of .*Laplace.*got 'Normaal'"):
        save(tmp_path / "run", family=family)
