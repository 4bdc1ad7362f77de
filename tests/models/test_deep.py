"""Codes decoded by a network: one batch dimension inside, any number outside."""

import math
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_sparse.dictionaries import Conv, Dense
from pyro_sparse.distributions import SpikeAndSlab
from pyro_sparse.infer import fit, load, register_savable, save
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import DeepSparseCoding, SparseCoding

NOISE = 0.3
SPIKE = SpikeAndSlab(dist.Laplace(0.0, 0.5), probs=0.3)


class Dcgan(nn.Module):
    """The published decoder of 28-pixel pictures, with ``width`` in place of 64 channels.

    Transposed convolutions 4x4; ReLU first, batch normalisation and ReLU between, sigmoid last.
    """

    def __init__(self, num_atoms: int, width: int) -> None:
        super().__init__()
        double = 2 * width
        self.layers = nn.Sequential(
            nn.Linear(num_atoms, double),
            nn.Unflatten(1, (double, 1, 1)),
            nn.ReLU(),
            *self._block(double, double, 2, 0),  # 4x4
            *self._block(double, width, 1, 0),  # 7x7
            *self._block(width, width, 2, 1),  # 14x14
            nn.ConvTranspose2d(width, 1, 4, 2, 1),  # 28x28
            nn.Sigmoid(),
        )

    @staticmethod
    def _block(before: int, after: int, stride: int, padding: int) -> list[nn.Module]:
        layer = nn.ConvTranspose2d(before, after, 4, stride, padding)
        return [layer, nn.BatchNorm2d(after), nn.ReLU()]

    def forward(self, codes: Tensor) -> Tensor:
        return self.layers(codes)


@register_savable(name="tests.Upsampling")
class Upsampling(nn.Module):
    """Codes ``(2, 3, 3)`` to pictures ``(1, 6, 6)``; takes exactly one batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ConvTranspose2d(2, 3, 2, 2)
        self.last = nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        assert codes.dim() == 4
        return self.last(self.first(codes).tanh())


# Decoder, shape of a datum, shape of its codes.
GEOMETRIES = {
    "dense": (
        lambda: nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)),
        (4,),
        (6,),
    ),
    "picture": (Upsampling, (1, 6, 6), (2, 3, 3)),
    "series": (
        lambda: nn.Sequential(nn.ConvTranspose1d(3, 2, 4), nn.Softsign()),
        (2, 11),
        (3, 8),
    ),
    "shapes differ": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Unflatten(1, (1, 2, 4))),
        (1, 2, 4),
        (6,),
    ),
}
geometries = pytest.mark.parametrize("geometry", GEOMETRIES)


def make(geometry: str, **options: Any) -> tuple[DeepSparseCoding, tuple, tuple]:
    build, signal_shape, code_shape = GEOMETRIES[geometry]
    options = {"prior": dist.Laplace(0.0, 0.7)} | options
    shapes = {"signal_shape": signal_shape, "code_shape": code_shape}
    return DeepSparseCoding(build(), Gaussian(NOISE), **shapes, **options), signal_shape, code_shape


def trace(program: Any, *args: Any, **kwargs: Any) -> Any:
    found = poutine.trace(program).get_trace(*args, **kwargs)
    found.compute_log_prob()
    return found


@geometries
def test_sites_have_the_documented_shapes(geometry: str) -> None:
    model, signal_shape, code_shape = make(geometry)
    nodes = trace(model, torch.randn(5, *signal_shape), 40).nodes
    assert [name for name, node in nodes.items() if node["type"] == "sample"] == [
        "data",
        "codes",
        "obs",
    ]
    for name, shape in (("codes", code_shape), ("obs", signal_shape)):
        law = nodes[name]["fn"]
        assert (law.batch_shape, law.event_shape) == ((5,), shape)
        (frame,) = nodes[name]["cond_indep_stack"]
        assert (frame.name, frame.dim, nodes[name]["scale"]) == ("data", -1, 8.0)


@geometries
def test_log_joint_is_the_formula(geometry: str, dtype: torch.dtype) -> None:
    model, signal_shape, code_shape = make(geometry)
    model.to(dtype)
    y, codes = torch.randn(5, *signal_shape, dtype=dtype), torch.randn(5, *code_shape, dtype=dtype)
    found = trace(poutine.condition(model, {"codes": codes}), y, 20)
    predictor = model.decoder(codes).detach().double().numpy()
    prior = scipy.stats.laplace(0, 0.7).logpdf(codes.double().numpy())
    obs = scipy.stats.norm(predictor, NOISE).logpdf(y.double().numpy())
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-7}[dtype]  # 0.7 and 0.3 are float32
    expected = 20 / 5 * (prior.sum() + obs.sum())
    assert found.log_prob_sum().item() == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("lead", [(), (5,), (3, 5), (2, 3, 5), (3, 1)], ids=str)
@geometries
def test_leading_dimensions_are_those_of_a_loop(geometry: str, lead: tuple[int, ...]) -> None:
    model, signal_shape, code_shape = make(geometry)
    codes = torch.randn(*lead, *code_shape)
    predictor = model.decoder_sites(codes)(codes)
    each = [model.decoder(one[None])[0] for one in codes.reshape(-1, *code_shape)]
    assert predictor.shape == (*lead, *signal_shape)
    torch.testing.assert_close(predictor, torch.stack(each).reshape(*lead, *signal_shape))


@pytest.mark.parametrize("linear", ["dense", "conv"])
def test_with_a_dictionary_for_a_decoder_it_is_sparse_coding(linear: str) -> None:
    dictionary, signal_shape = {
        "dense": (Dense(6, 4), (4,)),
        "conv": (Conv(3, 2, 4), (2, 11)),
    }[linear]
    code_shape = tuple(dictionary.code_shape(signal_shape))
    options = {
        "prior": lambda rate: dist.Laplace(0.0, 1 / rate),
        "rate": dist.Gamma(4.0, 2.0),
        "signal_shape": signal_shape,
    }
    deep = DeepSparseCoding(dictionary, Gaussian(NOISE), code_shape=code_shape, **options)
    shallow = SparseCoding(dictionary, Gaussian(NOISE), **options)
    y, mask = torch.randn(5, *signal_shape), torch.rand(5, *signal_shape) < 0.7
    found = trace(deep, y, 20, mask)
    other = trace(poutine.replay(shallow, found), y, 20, mask)
    sites = {name for name, node in found.nodes.items() if node["type"] == "sample"}
    assert sites == {"rate", "data", "codes", "obs"}
    for name in sites - {"data"}:
        assert torch.equal(found.nodes[name]["log_prob"], other.nodes[name]["log_prob"])


class Gated(PyroModule):
    """Amortised gates, shifts and scales."""

    def __init__(self, signal_shape: tuple[int, ...], code_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.heads = nn.Linear(math.prod(signal_shape), 3 * math.prod(code_shape))
        self.shape = code_shape

    def forward(self, y: Tensor, num_data: int | None = None, mask: Tensor | None = None) -> None:
        y = y if mask is None else y.where(mask, 0.0)
        logits, loc, scale = self.heads(y.flatten(1)).reshape(len(y), 3, *self.shape).unbind(1)
        law = SpikeAndSlab(dist.Laplace(loc, scale.exp()), logits=logits)
        with pyro.plate("data", num_data or len(y), subsample=torch.arange(len(y))):
            pyro.sample("codes", law.to_event(len(self.shape)))


@geometries
def test_a_guide_with_an_atom_trains_it(geometry: str) -> None:
    model, signal_shape, code_shape = make(geometry, prior=SPIKE)
    guide = Gated(signal_shape, code_shape)
    pair = nn.ModuleList([model, guide])
    before = [p.detach().clone() for p in pair.parameters()]
    y = torch.randn(12, *signal_shape)
    options = {"loss": Trace_ELBO(), "epochs": 3, "batch_size": 5, "progress": False}
    history = fit(model, guide, y, **options)
    assert all(map(math.isfinite, history.step_loss))
    assert all(not torch.equal(old, new) for old, new in zip(before, pair.parameters()))


@geometries
def test_vectorised_particles_estimate_the_same_elbo(geometry: str) -> None:
    model, signal_shape, code_shape = make(geometry, prior=SPIKE)
    guide, y = Gated(signal_shape, code_shape), torch.randn(5, *signal_shape)
    elbo = Trace_ELBO(1000, vectorize_particles=True, max_plate_nesting=1)(model, guide)
    with torch.no_grad():
        apart = torch.stack([Trace_ELBO()(model, guide)(y, 20) for _ in range(300)])
        together = elbo(y, 20)
    error = apart.std() * math.sqrt(1 / 300 + 1 / 1000)
    assert abs(together - apart.mean()) < 4 * error


@geometries
def test_predictive_draws_from_the_prior(geometry: str) -> None:
    model, signal_shape, code_shape = make(geometry, prior=SPIKE)
    for parallel in (False, True):
        draws = Predictive(model, num_samples=3, parallel=parallel)(num_data=2)
        assert draws["codes"].shape == (3, 2, *code_shape)
        assert draws["obs"].shape == (3, 2, *signal_shape)
        assert not torch.equal(draws["obs"][0], draws["obs"][1])


@geometries
def test_mask_leaves_out_samples(geometry: str) -> None:
    model, signal_shape, code_shape = make(geometry)
    model.double()
    y, codes = torch.randn(5, *signal_shape).double(), torch.randn(5, *code_shape).double()
    mask = torch.rand(y.shape) < 0.6
    found = trace(poutine.condition(model, {"codes": codes}), y, mask=mask)
    law = scipy.stats.norm(model.decoder(codes).detach().numpy(), model.likelihood.scale.item())
    expected = law.logpdf(y.numpy())[mask.numpy()].sum()
    assert found.nodes["obs"]["log_prob_sum"].item() == pytest.approx(expected, rel=1e-12)


@geometries
def test_nan_under_the_mask_reaches_neither_value_nor_gradient(geometry: str) -> None:
    model, signal_shape, code_shape = make(geometry, prior=SPIKE)
    guide, y = Gated(signal_shape, code_shape), torch.randn(5, *signal_shape)
    mask = torch.rand(y.shape) < 0.6
    results = []
    for filler in (torch.nan, torch.inf, 7.0):
        torch.manual_seed(0)
        pair = nn.ModuleList([model, guide])
        pair.zero_grad()
        loss = Trace_ELBO()(model, guide)(torch.where(mask, y, filler), 20, mask)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in pair.parameters())])
    assert torch.isfinite(results[0][0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


# The published decoder


def dcgan(num_atoms: int = 10, width: int = 8) -> DeepSparseCoding:
    shapes = {"code_shape": (num_atoms,), "signal_shape": (1, 28, 28)}
    return DeepSparseCoding(Dcgan(num_atoms, width), Gaussian(0.5), SPIKE, **shapes)


def test_the_published_decoder_has_its_published_size() -> None:
    """Layers of section 1a.7: weights and biases, and two numbers a channel for each norm."""
    layers = [(128, 128), (128, 64), (64, 64), (64, 1)]
    expected = 64 * 128 + 128 + sum(16 * a * b + b for a, b in layers) + 2 * (128 + 64 + 64)
    assert sum(p.numel() for p in Dcgan(64, width=64).parameters()) == expected


def test_the_published_decoder_trains_and_draws_pictures() -> None:
    model, guide = dcgan(), Gated((1, 28, 28), (10,))
    y = torch.rand(12, 1, 28, 28)
    elbo = Trace_ELBO(5, vectorize_particles=True, max_plate_nesting=1)
    history = fit(model, guide, y, loss=elbo, epochs=2, batch_size=6, progress=False)
    assert all(map(math.isfinite, history.step_loss))
    gradients = [p.grad for p in model.decoder.parameters()]
    assert all(g is not None and torch.isfinite(g).all() and g.any() for g in gradients)
    model.eval()
    assert model(num_data=3).shape == (3, 1, 28, 28)


def test_batch_normalisation_is_over_draws_and_data_until_eval() -> None:
    """As documented: in training a datum's predictor depends on the rest of the batch."""
    model = dcgan()
    codes = torch.randn(4, 3, 10)
    decode = model.decoder_sites(codes)
    together = decode(codes)
    torch.testing.assert_close(together, model.decoder(codes.flatten(0, 1)).unflatten(0, (4, 3)))
    assert (together - torch.stack([decode(draw) for draw in codes])).abs().max() > 1e-3
    model.eval()
    each = torch.stack([decode(draw) for draw in codes])
    torch.testing.assert_close(decode(codes), each, rtol=1e-4, atol=1e-6)


# At the boundary


def test_everything_moves(dtype: torch.dtype, device: torch.device) -> None:
    model = dcgan().to(dtype).to(device)
    y = torch.rand(3, 1, 28, 28, dtype=dtype, device=device)
    nodes = trace(model, y).nodes
    for name in ("codes", "obs"):
        for tensor in (nodes[name]["value"], nodes[name]["log_prob"]):
            assert (tensor.dtype, tensor.device.type) == (dtype, device.type)
    assert model(num_data=2).dtype == dtype


def test_a_decoder_without_parameters_serves() -> None:
    model = DeepSparseCoding(
        nn.Softplus(), Gaussian(NOISE), SPIKE, code_shape=(4,), signal_shape=(4,)
    )
    assert model(num_data=2).shape == (2, 4)
    assert torch.isfinite(trace(model, torch.randn(3, 4)).log_prob_sum())


@pytest.mark.parametrize(
    "given", [{}, {"threshold": dist.Gamma(3.0, 12.0)}], ids=["plain", "drawn"]
)
def test_a_saved_model_is_the_same_model(given: dict, tmp_path: Path) -> None:
    model, signal_shape, code_shape = make("picture", **_prior(given))
    save(tmp_path / "bundle", model=model)
    loaded = load(tmp_path / "bundle")["model"]
    torch.manual_seed(1)
    first = model(num_data=4)
    torch.manual_seed(1)
    assert torch.equal(loaded(num_data=4), first)
    assert (loaded.code_shape, loaded.signal_shape) == (code_shape, signal_shape)


@register_savable(name="tests.deep_threshold")
def below(threshold: Tensor) -> SpikeAndSlab:
    return SpikeAndSlab(
        dist.Laplace(torch.zeros_like(threshold), 0.5), probs=(-2 * threshold).exp()
    )


def _prior(given: dict) -> dict:
    return {"prior": below if given else SPIKE, **given}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"decoder": torch.tanh}, TypeError, "decoder to be a torch.nn.Module, got builtin"),
        ({"likelihood": dist.Normal(0.0, 1.0)}, TypeError, "Expected a Likelihood.*got Normal"),
        ({"code_shape": (0,)}, ValueError, "code_shape to be a whole number >= 1"),
        ({"code_shape": ()}, ValueError, "code_shape to be a whole number >= 1"),
        ({"code_shape": 6}, ValueError, "a shape, a tuple of whole numbers"),
        ({"signal_shape": (2.5,)}, ValueError, "a shape, a tuple of whole numbers"),
        ({"rate": 2.0}, TypeError, "callable rate -> distribution when rate is given"),
        ({"prior": below}, TypeError, "Expected rate="),
    ],
)
def test_bad_arguments_are_refused(options: dict, error: type[Exception], message: str) -> None:
    good = {"decoder": nn.Linear(6, 4), "likelihood": Gaussian(NOISE), "prior": SPIKE}
    shapes = {"code_shape": (6,), "signal_shape": (4,)}
    with pytest.raises(error, match=message):
        DeepSparseCoding(**{**good, **shapes, **options})


@pytest.mark.parametrize(
    ("options", "y", "message"),
    [
        ({}, torch.zeros(3, 5), r"data of shape \(n, 4\), got \(n, 5\)"),
        ({}, torch.zeros(4), r"shape \(n, features\)"),
        ({}, torch.zeros(0, 4), "with n >= 1"),
        ({"code_shape": (5,)}, torch.zeros(3, 4), "mat1 and mat2"),
        (
            {"signal_shape": (2, 2)},
            torch.zeros(3, 2, 2),
            r"codes \(3, 6\) to a predictor \(3, 2, 2\), got \(3, 4\).*nn.Unflatten",
        ),
        (
            {"decoder": nn.Sequential(nn.Linear(6, 4), nn.Flatten(0))},
            torch.zeros(3, 4),
            r"predictor \(3, 4\), got \(12,\)",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(options: dict, y: Tensor, message: str) -> None:
    given = {"decoder": nn.Linear(6, 4), "code_shape": (6,), "signal_shape": (4,), **options}
    model = DeepSparseCoding(likelihood=Gaussian(NOISE), prior=SPIKE, **given)
    with pytest.raises((ValueError, RuntimeError), match=message):
        model(y)
