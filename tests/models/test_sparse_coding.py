"""The generative program: its sites, its density, its plate and its mask."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_sparse.dictionaries import Conv, Dense, Dictionary
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding

NOISE, SCALE = 0.3, 0.7
# Dictionary, shape of a datum, shape of its codes.
GEOMETRIES = {
    "dense": (lambda: Dense(6, 4), (4,), (6,)),
    "conv1d": (lambda: Conv(3, 2, 4), (2, 11), (3, 8)),
    "conv2d": (lambda: Conv(3, 1, (3, 2), stride=(2, 1)), (1, 7, 6), (3, 3, 5)),
}
geometries = pytest.mark.parametrize("geometry", GEOMETRIES)


def inverse_rate(rate: Tensor) -> dist.Laplace:
    return dist.Laplace(0.0, 1 / rate)


class LearnedRate(nn.Module):
    def __init__(self, num_atoms: int) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.linspace(-0.5, 0.5, num_atoms))

    def forward(self) -> Tensor:
        return self.log_rate.exp()


def make(geometry: str, **options: object) -> tuple[SparseCoding, tuple, tuple]:
    build, signal_shape, code_shape = GEOMETRIES[geometry]
    options = {"signal_shape": signal_shape, "prior": dist.Laplace(0.0, SCALE)} | options
    return SparseCoding(build(), Gaussian(NOISE), **options), signal_shape, code_shape


def trace(program, *args, **kwargs) -> poutine.Trace:
    found = poutine.trace(program).get_trace(*args, **kwargs)
    found.compute_log_prob()
    return found


def latents(found: poutine.Trace) -> dict:
    return {
        name: node
        for name, node in found.nodes.items()
        if node["type"] == "sample"
        and name not in ("data", "obs")
        and not node["infer"].get("is_auxiliary")  # an autoguide's unconstrained twin
    }


@geometries
def test_sites_have_the_documented_shapes(geometry: str) -> None:
    model, signal_shape, code_shape = make(geometry)
    nodes = trace(model, torch.randn(5, *signal_shape)).nodes
    sites = {name for name, node in nodes.items() if node["type"] == "sample"}
    assert sites == {"data", "codes", "obs"}
    for name, shape in (("codes", code_shape), ("obs", signal_shape)):
        law = nodes[name]["fn"]
        assert (law.batch_shape, law.event_shape) == ((5,), shape)
        assert nodes[name]["value"].shape == (5, *shape)
        (frame,) = [f for f in nodes[name]["cond_indep_stack"] if f.vectorized]
        assert (frame.name, frame.dim, frame.size) == ("data", -1, 5)


@geometries
def test_the_plate_scales_by_the_size_of_the_data_set(geometry: str) -> None:
    model, signal_shape, _ = make(geometry)
    y = torch.randn(5, *signal_shape)
    nodes = trace(model, y, 40).nodes
    assert nodes["codes"]["scale"] == nodes["obs"]["scale"] == 8.0
    assert trace(model, y).nodes["obs"]["scale"] == 1.0


@geometries
def test_log_joint_is_the_formula(geometry: str, dtype: torch.dtype) -> None:
    model, signal_shape, code_shape = make(geometry)
    model.to(dtype)
    y = torch.randn(5, *signal_shape, dtype=dtype)
    codes = torch.randn(5, *code_shape, dtype=dtype)
    found = trace(poutine.condition(model, {"codes": codes}), y, 20)
    predictor = model.dictionary(codes).detach().double().numpy()
    prior = scipy.stats.laplace(0, SCALE).logpdf(codes.double().numpy())
    obs = scipy.stats.norm(predictor, NOISE).logpdf(y.double().numpy())
    expected = 20 / 5 * (prior.sum() + obs.sum())
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-7}[dtype]  # scale 0.7, 0.3 are float32
    assert found.log_prob_sum().item() == pytest.approx(expected, rel=tolerance)
    per_datum = found.nodes["codes"]["unscaled_log_prob"].detach()
    np.testing.assert_allclose(per_datum, prior.reshape(5, -1).sum(1), rtol=10 * tolerance)


@geometries
def test_without_data_it_draws_from_the_prior(geometry: str) -> None:
    model, signal_shape, code_shape = make(geometry)
    num_data = 2000
    found = trace(model, num_data=num_data)
    codes = found.nodes["codes"]["value"]
    noise = found.nodes["_RETURN"]["value"] - model.dictionary(codes)
    assert codes.shape == (num_data, *code_shape)
    assert noise.shape == (num_data, *signal_shape)
    # Suite-wide failure rate: seeded, so these p-values are fixed; 1e-4 leaves room for versions.
    some = codes.flatten()[:5000].numpy()
    assert scipy.stats.kstest(some, scipy.stats.laplace(0, SCALE).cdf).pvalue > 1e-4
    some = noise.detach().flatten()[:5000].numpy()
    assert scipy.stats.kstest(some, scipy.stats.norm(0, NOISE).cdf).pvalue > 1e-4


def test_a_prior_of_one_value_per_atom_is_shared_by_its_positions() -> None:
    scale = torch.tensor([0.1, 1.0, 10.0])
    model, signal_shape, _ = make("conv1d", prior=dist.Laplace(0.0, scale[:, None]))
    codes = trace(model, num_data=4000).nodes["codes"]["value"]
    # Mean |z| of a Laplace is its scale; 32000 draws: standard error 0.6 %.
    torch.testing.assert_close(codes.abs().mean((0, 2)), scale, rtol=0.03, atol=0)


@geometries
def test_predictive_draws_from_the_prior(geometry: str) -> None:
    model, signal_shape, code_shape = make(geometry)
    draws = Predictive(model, num_samples=3)(num_data=2)
    assert draws["codes"].shape == (3, 2, *code_shape)
    assert draws["obs"].shape == (3, 2, *signal_shape)
    assert not torch.equal(draws["obs"][0], draws["obs"][1])


@geometries
def test_predictive_with_the_guide_gives_codes_and_posterior_draws(geometry: str) -> None:
    model, signal_shape, code_shape = make(geometry)
    guide = UnrolledFISTA(model.dictionary, model.likelihood, model.prior, num_steps=5)
    y = torch.randn(4, *signal_shape)
    draws = Predictive(model, guide=guide, num_samples=2)(y)
    codes = guide.encode(y)
    torch.testing.assert_close(draws["codes"], codes.expand(2, 4, *code_shape))

    model_of_new = poutine.uncondition(model)
    sites = ("codes", "obs")
    draws = Predictive(model_of_new, guide=guide, num_samples=100, return_sites=sites)(y)
    torch.testing.assert_close(draws["codes"][0], codes)
    noise = draws["obs"] - model.dictionary(codes)
    # 100 draws of sd NOISE: the standard error of the mean of each entry is NOISE / 10.
    assert noise.mean(0).abs().max() < 5 * NOISE / math.sqrt(100)
    assert noise.std().item() == pytest.approx(NOISE, rel=0.1)


@geometries
@pytest.mark.parametrize("per_datum", [True, False], ids=["mask-per-datum", "mask-shared"])
def test_mask_leaves_out_samples(geometry: str, per_datum: bool) -> None:
    model, signal_shape, code_shape = make(geometry)
    model.double()
    y = torch.randn(5, *signal_shape, dtype=torch.float64)
    codes = torch.randn(5, *code_shape, dtype=torch.float64)
    mask = torch.rand(5, *signal_shape)[slice(None) if per_datum else 0] < 0.6
    found = trace(poutine.condition(model, {"codes": codes}), y, mask=mask)
    everywhere = mask.expand_as(y)
    predictor = model.dictionary(codes).detach()
    scale = model.likelihood.scale.item()
    kept = scipy.stats.norm(predictor[everywhere].numpy(), scale).logpdf(y[everywhere].numpy())
    assert found.nodes["obs"]["log_prob_sum"].item() == pytest.approx(kept.sum(), rel=1e-12)
    without = trace(poutine.condition(model, {"codes": codes}), y)
    assert without.nodes["codes"]["log_prob_sum"] == found.nodes["codes"]["log_prob_sum"]


@geometries
def test_nan_under_the_mask_reaches_neither_value_nor_gradient(geometry: str) -> None:
    model, signal_shape, _ = make(geometry)
    guide = UnrolledFISTA.untied(model.dictionary, model.likelihood, model.prior, num_steps=4)
    pair = nn.ModuleList([model, guide])
    y = torch.randn(5, *signal_shape)
    mask = torch.rand(y.shape) < 0.6
    results = []
    for filler in (torch.nan, torch.inf, 7.0):
        pair.zero_grad()
        loss = Trace_ELBO()(model, guide)(torch.where(mask, y, filler), 20, mask)
        loss.backward()
        results.append([loss.detach()] + [p.grad.clone() for p in pair.parameters()])
    assert torch.isfinite(results[0][0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@geometries
@pytest.mark.parametrize("sizes", [(4, 4, 4), (7, 4, 1)])
def test_elbos_of_minibatches_average_to_that_of_the_whole(geometry: str, sizes: tuple) -> None:
    """Exact: each minibatch of n has scale N / n, so weights n / N give the sum over all data."""
    model, signal_shape, _ = make(geometry)
    guide = UnrolledFISTA(model.dictionary, model.likelihood, model.prior, num_steps=4)
    nn.ModuleList([model, guide]).double()
    y = torch.randn(12, *signal_shape, dtype=torch.float64)
    elbo = Trace_ELBO()(model, guide)
    parts = sum(len(part) / 12 * elbo(part, 12) for part in y.split(sizes))
    torch.testing.assert_close(parts, elbo(y), rtol=1e-12, atol=0)


def rest_of(model: SparseCoding) -> AutoNormal:
    return AutoNormal(poutine.block(model, hide=["codes", "obs"]), init_scale=0.05)


def sampled_pair(geometry: str, *, site: str) -> tuple[SparseCoding, UnrolledFISTA, tuple, tuple]:
    options = {
        "dictionary": {"dictionary_prior": dist.Normal(0.0, 0.5)},
        "rate": {"prior": inverse_rate, "rate": dist.Gamma(4.0, 2.0)},
    }[site]
    model, signal_shape, code_shape = make(geometry, **options)
    guide = UnrolledFISTA(
        model.dictionary, model.likelihood, model.prior, rest=rest_of(model), num_steps=4
    )
    return model, guide, signal_shape, code_shape


@geometries
@pytest.mark.parametrize("site", ["dictionary", "rate"])
def test_a_sampled_site_stands_outside_the_plate(geometry: str, site: str) -> None:
    model, guide, signal_shape, code_shape = sampled_pair(geometry, site=site)
    y = torch.randn(5, *signal_shape)
    guide_trace = trace(guide, y, 20)
    model_trace = trace(poutine.replay(model, guide_trace), y, 20)
    shape = {"dictionary": tuple(model.dictionary.atoms.shape), "rate": code_shape[:1]}[site]
    for found in (guide_trace, model_trace):
        assert set(latents(found)) == {site, "codes"}
        law = found.nodes[site]["fn"]
        assert (law.batch_shape, law.event_shape) == ((), shape)
        assert (found.nodes[site]["scale"], found.nodes["codes"]["scale"]) == (1.0, 4.0)
    drawn = guide_trace.nodes[site]["value"]
    torch.testing.assert_close(model_trace.nodes[site]["value"], drawn)
    torch.testing.assert_close(
        guide_trace.nodes["codes"]["value"], guide.encode(y, values={site: drawn})
    )


@geometries
def test_log_joint_with_a_sampled_dictionary_and_rate_is_the_formula(geometry: str) -> None:
    model, signal_shape, code_shape = make(
        geometry,
        prior=inverse_rate,
        rate=dist.Gamma(4.0, 2.0),
        dictionary_prior=dist.Normal(0.0, 0.5),
    )
    model.double()
    y = torch.randn(5, *signal_shape, dtype=torch.float64)
    values = {
        "codes": torch.randn(5, *code_shape, dtype=torch.float64),
        "rate": torch.rand(code_shape[0], dtype=torch.float64) + 0.5,
        # Not of unit norm: a drawn dictionary is used as drawn.
        "dictionary": torch.randn(model.dictionary.atoms.shape, dtype=torch.float64),
    }
    found = trace(poutine.condition(model, values), y, 10)
    rate = values["rate"].reshape(-1, *[1] * (len(code_shape) - 1))
    predictor = model.dictionary.bind(values["dictionary"]).forward(values["codes"])
    prior = scipy.stats.laplace(0, 1 / rate.numpy()).logpdf(values["codes"].numpy()).sum()
    obs = scipy.stats.norm(predictor, model.likelihood.scale).logpdf(y).sum()
    hyper = scipy.stats.gamma(4.0, scale=1 / 2.0).logpdf(values["rate"].numpy()).sum()
    atoms = scipy.stats.norm(0, 0.5).logpdf(values["dictionary"].numpy()).sum()
    expected = hyper + atoms + 10 / 5 * (prior + obs)
    assert found.log_prob_sum().item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rate", [2.0, torch.tensor(2.0), torch.full((6,), 2.0)], ids=str)
def test_a_fixed_rate_is_the_prior_with_that_rate(rate: Tensor | float) -> None:
    model, _, code_shape = make("dense", prior=inverse_rate, rate=rate)
    y, codes = torch.randn(3, 4), torch.randn(3, *code_shape)
    found = trace(poutine.condition(model, {"codes": codes}), y)
    expected = scipy.stats.laplace(0, 0.5).logpdf(codes.numpy()).sum()
    assert found.nodes["codes"]["log_prob_sum"].item() == pytest.approx(expected, rel=1e-5)
    assert set(latents(found)) == {"codes"}


@geometries
def test_a_learned_rate_is_a_parameter_of_the_model(geometry: str) -> None:
    _, _, code_shape = GEOMETRIES[geometry]
    rate = LearnedRate(code_shape[0])
    model, signal_shape, _ = make(geometry, prior=inverse_rate, rate=rate)
    assert "rate.log_rate" in dict(model.named_parameters())
    codes = torch.randn(3, *code_shape)
    found = trace(poutine.condition(model, {"codes": codes}), torch.randn(3, *signal_shape))
    found.log_prob_sum().backward()
    # d/d log_rate of sum (log rate - rate |z|) is (number of codes) - rate * sum |z|.
    size = codes[:, 0].numel()
    total = codes.abs().transpose(0, 1).flatten(1).sum(1)
    expected = size - rate.log_rate.detach().exp() * total
    torch.testing.assert_close(rate.log_rate.grad, expected)


@pytest.mark.parametrize("site", ["dictionary", "rate"])
def test_vectorised_particles_estimate_the_same_elbo(site: str) -> None:
    model, guide, signal_shape, _ = sampled_pair("dense", site=site)
    y = torch.randn(5, *signal_shape)
    guide(y)  # makes the parameters of the autoguide
    options = {"num_particles": 200, "max_plate_nesting": 1}
    with torch.no_grad():
        apart = [Trace_ELBO()(model, guide)(y, 20) for _ in range(200)]
        together = Trace_ELBO(vectorize_particles=True, **options)(model, guide)(y, 20)
        three = [
            Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)(
                model, guide
            )(y, 20)
            for _ in range(67)
        ]
    apart, three = torch.stack(apart), torch.stack(three)
    # Standard error of the difference of two independent means of 200 draws each.
    error = apart.std() * math.sqrt(2 / 200)
    assert abs(together - apart.mean()) < 4 * error
    assert abs(three.mean() - apart.mean()) < 4 * error


def test_vectorised_particles_train() -> None:
    model, guide, signal_shape, _ = sampled_pair("dense", site="dictionary")
    y = torch.randn(5, *signal_shape)
    guide(y)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    elbo(model, guide)(y, 20).backward()
    gradients = {name: p.grad for name, p in guide.rest.named_parameters()}
    assert len(gradients) == 2
    assert all(torch.isfinite(g).all() and (g != 0).any() for g in gradients.values())


def test_a_sampled_convolution_refuses_vectorised_particles_by_name() -> None:
    model, guide, signal_shape, _ = sampled_pair("conv1d", site="dictionary")
    y = torch.randn(5, *signal_shape)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    with pytest.raises(NotImplementedError, match="vectorize_particles=False"):
        elbo(model, guide)(y, 20)
    loss = Trace_ELBO(num_particles=3)(model, guide)(y, 20)
    assert torch.isfinite(loss)


def test_a_sampled_rate_of_a_convolution_takes_vectorised_particles() -> None:
    model, guide, signal_shape, _ = sampled_pair("conv1d", site="rate")
    y = torch.randn(5, *signal_shape)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    assert torch.isfinite(elbo(model, guide)(y, 20))


def test_double_moves_everything(dtype: torch.dtype, device: torch.device) -> None:
    rate = LearnedRate(6)
    model, _, _ = make("dense", prior=inverse_rate, rate=rate)
    model.to(dtype).to(device)
    found = trace(model, torch.randn(3, 4, dtype=dtype, device=device))
    for name in ("codes", "obs"):
        for tensor in (found.nodes[name]["value"], found.nodes[name]["log_prob"]):
            assert (tensor.dtype, tensor.device.type) == (dtype, device.type)
    assert model(num_data=2).dtype == dtype


def test_a_model_can_be_a_part_of_another_program() -> None:
    class Outer(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner, _, _ = make("dense")

        def forward(self, y: Tensor) -> Tensor:
            return pyro.deterministic("total", self.inner(y).sum())

    names = {"inner.dictionary$$$parametrizations.atoms.original"}
    found = trace(Outer(), torch.randn(3, 4))
    assert set(found.param_nodes) == names
    assert "codes" in found.nodes


def dense_model(**options: object) -> SparseCoding:
    return make("dense", **options)[0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(), ValueError, "num_data, the number of data to draw"),
        (lambda m: m(torch.zeros(3, 4, dtype=torch.long)), TypeError, "y to be a floating"),
        (lambda m: m(np.zeros((3, 4))), TypeError, "y to be a floating tensor, got ndarray"),
        (lambda m: m(torch.zeros(4)), ValueError, r"shape \(n, features\)"),
        (lambda m: m(torch.zeros(0, 4)), ValueError, "with n >= 1"),
        (lambda m: m(torch.zeros(3, 5)), ValueError, r"signal of shape \(..., 4\)"),
        (lambda m: m(torch.zeros(3, 4), 2), ValueError, r"num_data >= 3 \(the minibatch\), got 2"),
        (lambda m: m(torch.zeros(3, 4), None, torch.ones(3, 4)), TypeError, "boolean tensor"),
        (
            lambda m: m(torch.zeros(3, 4), None, torch.ones(2, 4, dtype=torch.bool)),
            ValueError,
            "mask that broadcasts",
        ),
    ],
)
def test_bad_calls_are_refused(call, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call(dense_model())


def test_drawing_from_a_dictionary_of_any_length_needs_a_signal_shape() -> None:
    model, _, _ = make("conv1d", signal_shape=None)
    with pytest.raises(ValueError, match="signal_shape"):
        model(num_data=3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prior": 0.3}, TypeError, "distribution or a callable"),
        ({"prior": inverse_rate}, TypeError, "Expected rate="),
        ({"rate": 2.0}, TypeError, "callable rate -> distribution when rate is given"),
        ({"prior": torch.distributions.Laplace(0.0, 1.0)}, TypeError, "Pyro distribution"),
        (
            {"prior": dist.Laplace(0.0, nn.Parameter(torch.tensor(1.0)))},
            ValueError,
            "scale.*require a gradient",
        ),
    ],
)
def test_bad_priors_are_refused_when_the_model_is_made(options, error, message) -> None:
    with pytest.raises(error, match=message):
        dense_model(**options)


def test_a_prior_that_does_not_expand_to_the_codes_is_refused() -> None:
    model = dense_model(prior=dist.Laplace(torch.zeros(5), 1.0))
    with pytest.raises(ValueError, match=r"expands to the shape \(6,\)"):
        model(torch.zeros(3, 4))


def test_a_dictionary_of_ones_own_serves() -> None:
    class Repeat(Dictionary):
        """One atom, (1, 1, ..., 1): its own class shows what the model relies on."""

        num_atoms, code_dims, signal_dims, signal_shape = 1, 1, 1, (4,)

        def __init__(self) -> None:
            super().__init__()
            self.atoms = nn.Parameter(torch.ones(1, 4))

        def bind(self, atoms: Tensor | None = None):
            return Dense(1, 4, atoms=self.atoms, unit_norm=False).bind(self.atoms)

        def code_shape(self, signal_shape: tuple[int, ...]) -> torch.Size:
            return torch.Size([*signal_shape[:-1], 1])

    model = SparseCoding(Repeat(), Gaussian(NOISE), dist.Laplace(0.0, SCALE))
    found = trace(poutine.condition(model, {"codes": torch.tensor([[2.0]])}), torch.zeros(1, 4))
    torch.testing.assert_close(found.nodes["obs"]["fn"].mean.detach(), torch.full((1, 4), 2.0))


def test_a_sampled_dictionary_leaves_no_parameter_without_a_gradient() -> None:
    dictionary = Dense(6, 4)
    prior = dist.Normal(0.0, 1.0)
    model = SparseCoding(dictionary, Gaussian(0.5), dist.Laplace(0.0, 1.0), dictionary_prior=prior)
    assert list(model.parameters()) == []
    assert set(dictionary.state_dict()) == {"parametrizations.atoms.original"}
    torch.testing.assert_close(dictionary.double().atoms.norm(dim=1), torch.ones(6).double())


def test_a_rate_that_is_a_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match="pyro_sparse.distributions.Rate"):
        SparseCoding(
            Dense(6, 4),
            Gaussian(0.5),
            lambda rate: dist.Laplace(0.0, 1 / rate),
            rate=torch.nn.Parameter(torch.ones(6)),
        )
