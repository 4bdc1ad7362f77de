"""The unrolled guide: its site, its parameters, and every way to train it."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_sparse.dictionaries import Conv, Dense
from pyro_sparse.distributions import register_prox
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding
from pyro_sparse.ops import soft_threshold
from pyro_sparse.solvers import ISTA, Proximal, solve

GEOMETRIES = {
    "dense": (lambda: Dense(6, 4), (4,), (6,)),
    "conv1d": (lambda: Conv(3, 2, 4), (2, 11), (3, 8)),
    "conv2d": (lambda: Conv(3, 1, (3, 2), stride=(2, 1)), (1, 7, 6), (3, 3, 5)),
}
geometries = pytest.mark.parametrize("geometry", GEOMETRIES)
GUIDES = {"tied": UnrolledFISTA, "untied": UnrolledFISTA.untied}
weights = pytest.mark.parametrize("weights", GUIDES)
ATOMS = "parametrizations.atoms.original"
SCALE = "parametrizations.scale.original"


class LearnedRate(nn.Module):
    def __init__(self, num_atoms: int) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.zeros(num_atoms))

    def forward(self) -> Tensor:
        return self.log_rate.exp()


def inverse_rate(rate: Tensor) -> dist.Laplace:
    return dist.Laplace(0.0, 1 / rate)


def make(
    geometry: str = "dense",
    weights: str = "tied",
    *,
    trainable: bool = False,
    learned_rate: bool = False,
    **options: object,
) -> tuple[SparseCoding, UnrolledFISTA, Tensor]:
    """A model, its guide and data of sd 1, from one seed."""
    build, signal_shape, code_shape = GEOMETRIES[geometry]
    torch.manual_seed(1)
    dictionary, likelihood = build(), Gaussian(0.5, trainable=trainable)
    rate = LearnedRate(code_shape[0]) if learned_rate else None
    prior = inverse_rate if learned_rate else dist.Laplace(0.0, 0.7)
    model = SparseCoding(dictionary, likelihood, prior, rate=rate)
    guide = GUIDES[weights](
        dictionary, likelihood, prior, **({"num_steps": 4, "rate": rate} | options)
    )
    return model, guide, torch.randn(5, *signal_shape)


def everything(model: nn.Module, guide: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of a pair under every name it has."""
    pair = nn.ModuleDict({"model": model, "guide": guide})
    return dict(pair.named_parameters(remove_duplicate=False))


@contextmanager
def module_local(on: bool) -> Iterator[None]:
    with pyro.settings.context(module_local_params=on):
        yield


# Sites and values ---------------------------------------------------------------------------------


@geometries
@weights
def test_the_site_is_a_delta_with_the_event_shape_of_the_codes(geometry: str, weights: str) -> None:
    _, guide, y = make(geometry, weights)
    code_shape = GEOMETRIES[geometry][2]
    nodes = poutine.trace(guide).get_trace(y, 20).nodes
    assert {n for n, node in nodes.items() if node["type"] == "sample"} == {"data", "codes"}
    law = nodes["codes"]["fn"]
    assert isinstance(law, dist.Delta)
    assert (law.batch_shape, law.event_shape) == ((5,), code_shape)
    assert nodes["codes"]["scale"] == 4.0
    assert torch.equal(nodes["codes"]["value"], nodes["_RETURN"]["value"])
    assert (nodes["codes"]["value"] == 0).any()


@geometries
@weights
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_model_and_guide_agree_on_sites_and_shapes(
    geometry: str, weights: str, masked: bool
) -> None:
    model, guide, y = make(geometry, weights)
    mask = torch.rand(y.shape) < 0.5 if masked else None
    guide_trace = poutine.trace(guide).get_trace(y, 20, mask=mask)
    model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(y, 20, mask=mask)
    ours, theirs = guide_trace.nodes["codes"], model_trace.nodes["codes"]
    assert theirs["value"] is ours["value"]
    assert ours["fn"].shape() == theirs["fn"].shape()
    assert ours["fn"].event_dim == theirs["fn"].event_dim
    assert ours["scale"] == theirs["scale"]
    assert [f.name for f in ours["cond_indep_stack"]] == [
        f.name for f in theirs["cond_indep_stack"]
    ]
    latent = set(guide_trace.stochastic_nodes) - {"data"}
    assert latent == set(model_trace.stochastic_nodes) - {"data"}


@geometries
def test_many_steps_reach_the_map_codes(geometry: str) -> None:
    model, guide, y = make(geometry, num_steps=2000)
    nn.ModuleList([model, guide]).double()
    y = y.double()
    solution = solve(y, model.dictionary, model.prior, likelihood=model.likelihood, tol=1e-10)
    assert solution.converged.all()
    torch.testing.assert_close(guide.encode(y).detach(), solution.codes, rtol=0, atol=1e-4)


@geometries
@weights
def test_encode_is_the_value_of_the_site_and_has_no_site(geometry: str, weights: str) -> None:
    _, guide, y = make(geometry, weights)
    found = poutine.trace(guide.encode).get_trace(y)
    assert not found.stochastic_nodes
    assert torch.equal(found.nodes["_RETURN"]["value"], guide(y))


@geometries
@weights
def test_codes_do_not_see_what_is_masked(geometry: str, weights: str) -> None:
    _, guide, y = make(geometry, weights)
    mask = torch.rand(y.shape) < 0.5
    assert torch.equal(
        guide.encode(torch.where(mask, y, torch.nan), mask),
        guide.encode(torch.where(mask, y, 3.0), mask),
    )
    assert not torch.equal(guide.encode(y, mask), guide.encode(y))


@weights
def test_a_masked_feature_is_one_that_is_not_there(weights: str) -> None:
    """A mask is not a datum of zero: the residual is left out, at every layer."""
    atoms, y = torch.randn(6, 4), torch.randn(5, 4)
    mask = torch.tensor([True, False, True, True])
    law, options = dist.Laplace(0.0, 0.7), {"lipschitz": 9.0, "num_steps": 5}
    whole = Dense(6, 4, atoms=atoms, unit_norm=False)
    part = Dense(6, 3, atoms=atoms[:, mask], unit_norm=False)
    codes = GUIDES[weights](whole, Gaussian(0.5), law, **options)(y, 20, mask)
    expected = GUIDES[weights](part, Gaussian(0.5), law, **options)(y[:, mask], 20)
    assert (expected != 0).any()
    torch.testing.assert_close(codes, expected)


@geometries
def test_values_of_other_sites_replace_those_of_the_objects(geometry: str) -> None:
    build, signal_shape, code_shape = GEOMETRIES[geometry]
    y, rate = torch.randn(5, *signal_shape), torch.rand(code_shape[0]) + 0.5
    dictionary, other = build(), build()
    given = {"rate": rate, "dictionary": other.atoms.detach()}

    def rest(y: Tensor, num_data: int | None, mask: Tensor | None = None) -> dict[str, Tensor]:
        return given

    guide = UnrolledFISTA(dictionary, Gaussian(0.5), inverse_rate, rest=rest)
    expected = UnrolledFISTA(other, Gaussian(0.5), inverse_rate, rate=rate).encode(y)
    torch.testing.assert_close(guide.encode(y, values=given), expected)
    torch.testing.assert_close(guide(y, 20), expected)
    # Rates of two particles, each with its own codes.
    rates = torch.stack([rate, 2 * rate])[:, None]
    both = guide.encode(y, values=given | {"rate": rates})
    assert both.shape == (2, 5, *code_shape)
    torch.testing.assert_close(both[0], expected)


@weights
def test_a_datum_is_encoded_the_same_in_any_minibatch(weights: str) -> None:
    _, guide, y = make("conv1d", weights)
    guide.double()
    y = y.double()
    apart = torch.cat([guide.encode(row[None]) for row in y])
    torch.testing.assert_close(guide.encode(y), apart, rtol=1e-12, atol=1e-12)


def test_untied_starts_where_tied_starts() -> None:
    _, tied, y = make("dense", "tied")
    _, untied, _ = make("dense", "untied")
    torch.testing.assert_close(untied.encode(y), tied.encode(y))


def test_a_prior_of_ones_own_serves_once_its_prox_is_registered() -> None:
    class Cauchyish(dist.Laplace):
        pass

    @register_prox(Cauchyish)
    def _(prior, value, step):
        return soft_threshold(value, 2 * step / prior.scale)

    dictionary, y = Dense(6, 4), torch.randn(5, 4)
    own = UnrolledFISTA(dictionary, Gaussian(0.5), Cauchyish(0.0, 1.0))
    same = UnrolledFISTA(dictionary, Gaussian(0.5), dist.Laplace(0.0, 0.5))
    torch.testing.assert_close(own.encode(y), same.encode(y))


# Parameters ---------------------------------------------------------------------------------------

DECODER = {f"model.dictionary.{ATOMS}", f"guide.encoder.dictionary.{ATOMS}"}
COPIES = {f"guide.encoder.analysis.{ATOMS}", f"guide.encoder.synthesis.{ATOMS}"}
THRESHOLDS = {"guide.encoder.shrinkage.log_factor"}
NOISE = {f"model.likelihood.{SCALE}", f"guide.encoder.likelihood.{SCALE}"}
RATE = {"model.rate.log_rate", "guide.encoder_rate.log_rate"}


@geometries
@pytest.mark.parametrize("local", [False, True], ids=["store", "local"])
@pytest.mark.parametrize(
    ("weights", "options", "alone", "shared"),
    [
        ("tied", {}, THRESHOLDS, [DECODER]),
        ("untied", {}, THRESHOLDS | COPIES, [DECODER]),
        ("tied", {"trainable": True}, THRESHOLDS, [DECODER, NOISE]),
        ("untied", {"trainable": True}, THRESHOLDS | COPIES, [DECODER, NOISE]),
        ("tied", {"learned_rate": True}, THRESHOLDS, [DECODER, RATE]),
        ("tied", {"shrinkage": Proximal()}, set(), [DECODER]),
        ("untied", {"shrinkage": Proximal()}, COPIES, [DECODER]),
    ],
)
def test_every_parameter_is_listed_and_gets_a_gradient(
    geometry: str, local: bool, weights: str, options: dict, alone: set, shared: list
) -> None:
    with module_local(local):
        model, guide, y = make(geometry, weights, **options)
        found = everything(model, guide)
        Trace_ELBO()(model, guide)(y, 20).backward()
    assert set(found) == alone.union(*shared)
    groups = [{name} for name in alone] + shared
    tensors = [{id(found[name]) for name in group} for group in groups]
    assert all(len(ids) == 1 for ids in tensors)  # one tensor a group, however many names
    assert len(set.union(*tensors)) == len(groups)  # and none shared between groups
    storages = {parameter.data_ptr() for parameter in found.values()}
    assert len(storages) == len(groups)
    # The objective replaced none of them, under either route.
    assert {n: id(p) for n, p in everything(model, guide).items()} == {
        n: id(p) for n, p in found.items()
    }
    for name, parameter in found.items():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name


@geometries
def test_the_tied_gradient_is_the_sum_of_the_untied_ones(geometry: str) -> None:
    """Chain rule: the tied atoms act as decoder, as analysis and as synthesis."""
    gradients = {}
    for weights in GUIDES:
        model, guide, y = make(geometry, weights)
        nn.ModuleList([model, guide]).double()
        Trace_ELBO()(model, guide)(y.double()).backward()
        gradients[weights] = {
            name: p.grad for name, p in everything(model, guide).items() if name.endswith(ATOMS)
        }
    decoder = f"model.dictionary.{ATOMS}"
    parts = [gradients["untied"][name] for name in sorted({decoder} | COPIES)]
    assert len(parts) == 3
    torch.testing.assert_close(gradients["tied"][decoder], sum(parts), rtol=1e-10, atol=1e-10)


def test_untied_the_models_atoms_are_moved_by_the_decoder_alone() -> None:
    model, guide, y = make("dense", "untied")
    Trace_ELBO()(model, guide)(y).backward()
    codes = guide.encode(y).detach()
    atoms = model.dictionary.atoms.detach().clone().requires_grad_()
    (((y - codes @ atoms) / 0.5).square().sum() / 2).backward()
    # On the sphere: the part of the gradient along an atom is gone, the raw length divides it.
    raw = model.dictionary.parametrizations.atoms.original
    unit = atoms.detach()
    tangent = atoms.grad - (atoms.grad * unit).sum(1, keepdim=True) * unit
    expected = tangent / raw.detach().norm(dim=1, keepdim=True)
    torch.testing.assert_close(raw.grad, expected, rtol=1e-4, atol=1e-5)


# Training -----------------------------------------------------------------------------------------


def by_svi(model: nn.Module, guide: nn.Module, y: Tensor, steps: int) -> list[float]:
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    return [svi.step(y, 20) for _ in range(steps)]


def by_module(model: nn.Module, guide: nn.Module, y: Tensor, steps: int) -> list[float]:
    elbo = Trace_ELBO()(model, guide)
    elbo(y, 20)
    optimizer = torch.optim.Adam(elbo.parameters(), lr=0.02)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = elbo(y, 20)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@geometries
@weights
@pytest.mark.parametrize("options", [{}, {"trainable": True}, {"learned_rate": True}], ids=str)
def test_every_route_gives_the_same_losses_and_parameters(
    geometry: str, weights: str, options: dict
) -> None:
    results = {}
    for name, local, train in (
        ("svi", False, by_svi),
        ("module with the store", False, by_module),
        ("module with local parameters", True, by_module),
    ):
        pyro.clear_param_store()
        with module_local(local):
            model, guide, y = make(geometry, weights, **options)
            nn.ModuleList([model, guide]).double()
            losses = train(model, guide, y.double(), 12)
        final = {n: p.detach().clone() for n, p in everything(model, guide).items()}
        results[name] = torch.tensor(losses), final
    reference, final = results.pop("svi")
    assert reference[-1] < reference[0]
    for losses, parameters in results.values():
        torch.testing.assert_close(losses, reference, rtol=1e-9, atol=0)
        torch.testing.assert_close(parameters, final, rtol=1e-8, atol=1e-9)


@weights
def test_after_svi_the_store_holds_what_the_modules_hold(weights: str) -> None:
    model, guide, y = make("dense", weights, trainable=True)
    before = {name: p.detach().clone() for name, p in everything(model, guide).items()}
    by_svi(model, guide, y, 5)
    store = dict(pyro.get_param_store().named_parameters())
    names = {  # as the store spells them -> as the modules do
        name.replace("$$$", "."): name for name in store
    }
    expected = {name.split(".", 1)[1]: p for name, p in everything(model, guide).items()}
    assert set(names) == set(expected)
    for name, parameter in expected.items():
        assert store[names[name]] is parameter, name
        assert torch.equal(pyro.param(names[name]), parameter), name
    for name, parameter in everything(model, guide).items():
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("train", [by_svi, by_module])
@geometries
def test_untied_weights_evolve_apart(geometry: str, train: Callable) -> None:
    model, guide, y = make(geometry, "untied")
    encoder = guide.encoder
    three = [model.dictionary, encoder.analysis, encoder.synthesis]
    assert all(torch.equal(three[0].atoms, d.atoms) for d in three)
    train(model, guide, y, 5)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (three[first].atoms - three[second].atoms).abs().max() > 1e-3


def test_tied_weights_stay_one() -> None:
    model, guide, y = make("dense", "tied")
    by_svi(model, guide, y, 5)
    assert guide.encoder.dictionary is model.dictionary
    assert torch.equal(guide.encoder.dictionary.atoms, model.dictionary.atoms)


def test_a_guide_may_have_a_rate_and_a_prior_of_its_own_under_svi() -> None:
    """Under the store a parameter of the model at the same path would be replaced or lost."""

    class OwnPrior(LearnedRate):
        def forward(self, rate: Tensor) -> dist.Laplace:
            return dist.Laplace(0.0, self.log_rate.exp() / rate)

    y, dictionary = torch.randn(5, 4), Dense(6, 4)
    ours, theirs = (OwnPrior(6), LearnedRate(6)), (OwnPrior(6), LearnedRate(6))
    model = SparseCoding(dictionary, Gaussian(0.5), ours[0], rate=ours[1])
    guide = UnrolledFISTA(dictionary, Gaussian(0.5), theirs[0], rate=theirs[1])
    by_svi(model, guide, y, 3)
    found = everything(model, guide)
    assert len({id(p) for p in found.values()}) == 6
    for own in (*ours, *theirs):
        assert (own.log_rate != 0).all()
    assert not torch.equal(ours[1].log_rate, theirs[1].log_rate)


@geometries
@pytest.mark.parametrize(
    "elbo",
    [
        functools.partial(Trace_ELBO, num_particles=3),
        functools.partial(
            Trace_ELBO, num_particles=3, vectorize_particles=True, max_plate_nesting=1
        ),
        TraceMeanField_ELBO,
        functools.partial(TraceMeanField_ELBO, num_particles=2),
        TraceGraph_ELBO,
    ],
    ids=["particles", "vectorised", "mean-field", "mean-field-particles", "graph"],
)
def test_other_elbos_give_the_same_value(geometry: str, elbo: Callable) -> None:
    """A Delta guide draws nothing at random, so that all of them are one number."""
    model, guide, y = make(geometry)
    expected = Trace_ELBO().loss(model, guide, y, 20)
    assert elbo().loss(model, guide, y, 20) == pytest.approx(expected, rel=1e-5)


def test_the_loss_is_the_negative_log_joint_at_the_codes() -> None:
    model, guide, y = make("dense")
    codes = guide.encode(y)
    joint = torch.distributions.Laplace(0.0, 0.7).log_prob(codes).sum()
    joint = joint + torch.distributions.Normal(model.dictionary(codes), 0.5).log_prob(y).sum()
    assert Trace_ELBO().loss(model, guide, y, 20) == pytest.approx(-4 * joint.item(), rel=1e-5)


@pytest.mark.parametrize("train", [by_svi, by_module])
def test_the_rest_guide_is_trained_too(train: Callable) -> None:
    torch.manual_seed(1)
    dictionary, likelihood = Dense(6, 4), Gaussian(0.5)
    model = SparseCoding(dictionary, likelihood, inverse_rate, rate=dist.Gamma(4.0, 2.0))
    rest = AutoNormal(poutine.block(model, hide=["codes", "obs"]))
    guide = UnrolledFISTA(dictionary, likelihood, inverse_rate, rest=rest, num_steps=4)
    y = torch.randn(5, 4)
    train(model, guide, y, 1)
    before = {name: p.detach().clone() for name, p in everything(model, guide).items()}
    assert {name for name in before if "rest" in name} == {
        "guide.rest.locs.rate_unconstrained",
        "guide.rest.scales.rate_unconstrained",
    }
    train(model, guide, y, 3)
    for name, parameter in everything(model, guide).items():
        assert not torch.equal(parameter, before[name]), name


# Dtype, device, copies, errors --------------------------------------------------------------------


@geometries
@weights
def test_dtype_and_device_follow_the_module(
    geometry: str, weights: str, dtype: torch.dtype, device: torch.device
) -> None:
    model, guide, y = make(geometry, weights, trainable=True, learned_rate=True)
    nn.ModuleList([model, guide]).to(dtype).to(device)
    y = y.to(device, dtype)
    codes = guide(y)
    assert (codes.dtype, codes.device.type) == (dtype, device.type)
    Trace_ELBO()(model, guide)(y, 20).backward()
    for name, parameter in everything(model, guide).items():
        assert (parameter.dtype, parameter.grad.dtype) == (dtype, dtype), name


def test_a_fixed_rate_follows_the_data() -> None:
    guide = UnrolledFISTA(Dense(6, 4), Gaussian(0.5), inverse_rate, rate=torch.ones(6)).double()
    assert guide.encode(torch.randn(5, 4, dtype=torch.float64)).dtype == torch.float64


@weights
def test_a_copied_pair_keeps_its_ties(weights: str) -> None:
    model, guide, y = make("dense", weights)
    model_copy, guide_copy = copy.deepcopy((model, guide))
    assert guide_copy.encoder.dictionary is model_copy.dictionary
    torch.testing.assert_close(guide_copy(y), guide(y))
    by_module(model_copy, guide_copy, y, 3)
    assert not torch.equal(model_copy.dictionary.atoms, model.dictionary.atoms)


@weights
def test_a_state_dict_carries_everything(weights: str) -> None:
    model, guide, y = make("dense", weights, trainable=True)
    by_module(model, guide, y, 3)
    fresh_model, fresh_guide, _ = make("dense", weights, trainable=True)
    assert not torch.equal(fresh_guide(y), guide(y))
    fresh_model.load_state_dict(model.state_dict())
    fresh_guide.load_state_dict(guide.state_dict())
    assert torch.equal(fresh_guide(y), guide(y))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_steps": 0}, ValueError, "num_steps >= 1, got 0"),
        ({"step_size": 0.0}, ValueError, "step_size > 0, got 0.0"),
        ({"shrinkage": 0.9}, TypeError, "shrinkage to be a Shrinkage, got 0.9"),
        ({"lipschitz": 0.0}, ValueError, "lipschitz > 0, got 0.0"),
        ({"lipschitz": float("nan")}, ValueError, "lipschitz > 0, got nan"),
        ({"prior": 0.3}, TypeError, "distribution or a callable"),
        ({"prior": inverse_rate}, TypeError, "Expected rate="),
        ({"rate": 2.0}, TypeError, "callable rate -> distribution when rate is given"),
        (
            {"prior": dist.Laplace(0.0, nn.Parameter(torch.tensor(1.0)))},
            ValueError,
            "scale.*require a gradient",
        ),
    ],
)
@weights
def test_bad_settings_are_refused(weights: str, options: dict, error: type, message: str) -> None:
    settings = {"prior": dist.Laplace(0.0, 1.0), "method": ISTA()} | options
    with pytest.raises(error, match=message):
        GUIDES[weights](Dense(6, 4), Gaussian(0.5), **settings)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda g: g(torch.zeros(3, 4, dtype=torch.long)), TypeError, "y to be a floating"),
        (lambda g: g(torch.zeros(4)), ValueError, r"shape \(n, features\)"),
        (lambda g: g(torch.zeros(0, 4)), ValueError, "with n >= 1"),
        (lambda g: g(torch.zeros(3, 5)), ValueError, r"signal of shape \(..., 4\)"),
        (lambda g: g(torch.zeros(3, 4), 2), ValueError, r"num_data >= 3 \(the minibatch\), got 2"),
        (lambda g: g(torch.zeros(3, 4), 3, torch.ones(3, 4)), TypeError, "boolean tensor"),
        (lambda g: g.encode(torch.zeros(4)), ValueError, r"shape \(n, features\)"),
        (
            lambda g: g.encode(torch.zeros(3, 4), torch.ones(2, 4, dtype=torch.bool)),
            ValueError,
            "mask that broadcasts",
        ),
    ],
)
def test_bad_calls_are_refused(call: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call(make("dense")[1])


def test_a_prior_without_a_prox_is_refused_by_name() -> None:
    guide = UnrolledFISTA(Dense(6, 4), Gaussian(0.5), dist.StudentT(3.0))
    with pytest.raises(NotImplementedError, match=r"StudentT.*register_prox\(StudentT\)"):
        guide(torch.zeros(3, 4))


def test_a_second_pair_under_svi_trains_as_alone() -> None:
    def losses(pair: tuple) -> list[float]:
        model, guide, y = pair
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        return [svi.step(y) for _ in range(5)]

    alone = losses(make("dense", "tied"))
    pyro.clear_param_store()
    losses(make("dense", "untied"))
    losses(make("dense", "tied"))
    again = losses(make("dense", "tied"))  # the store still holds the parameters of the others
    assert again == alone
    assert again[-1] < again[0]


def test_a_rate_with_a_distribution_needs_a_guide_of_its_own() -> None:
    dictionary = Dense(6, 4)
    with pytest.raises(TypeError, match="latent site of the model. Give the guide rest="):
        UnrolledFISTA(dictionary, Gaussian(0.5), inverse_rate, rate=dist.Gamma(2.0, 1.0))
    with pytest.raises(ValueError, match="constant or a module, got a parameter"):
        UnrolledFISTA(dictionary, Gaussian(0.5), inverse_rate, rate=nn.Parameter(torch.ones(6)))


def test_rest_that_returns_no_values_is_refused_by_name() -> None:
    guide = UnrolledFISTA(
        Dense(6, 4), Gaussian(0.5), inverse_rate, rest=lambda y, num_data=None: None
    )
    with pytest.raises(TypeError, match="rest to return a dict.*got NoneType"):
        guide(torch.randn(3, 4))
    with pytest.raises(ValueError, match="rate that rest samples: pass values="):
        guide.encode(torch.randn(3, 4))


def test_data_of_another_dtype_are_refused_by_name() -> None:
    guide = UnrolledFISTA(Dense(6, 4), Gaussian(0.5), dist.Laplace(0.0, 1.0))
    with pytest.raises(TypeError, match="dtype torch.float32, got torch.float64"):
        guide.encode(torch.randn(3, 4, dtype=torch.float64))


def test_a_forgotten_channel_is_named() -> None:
    guide = UnrolledFISTA(Conv(3, 1, 5), Gaussian(0.5), dist.Laplace(0.0, 1.0))
    with pytest.raises(ValueError, match=r"A single channel is a dimension too: y\[:, None\]"):
        guide(torch.randn(10, 30))
