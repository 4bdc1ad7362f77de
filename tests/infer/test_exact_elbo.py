"""Programs run on moments: SparseCoding and a user's own, against Monte Carlo and enumeration."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.nn import functional as F

from pyro_sparse.dictionaries import Composition, Conv, Dense, Overhang, Periodic
from pyro_sparse.distributions.mixed import SpikeAndSlab
from pyro_sparse.distributions.moments import Moments, NotAffine
from pyro_sparse.infer.exact_elbo import expected_log_likelihood, refusal
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding
from tests.linear_maps import Mask

N, K, D = 3, 4, 5
DRAWS = 20_000


def constant(*shape):
    """Numbers without a pattern that are the same at each import and each call."""
    return torch.sin(torch.arange(1, math.prod(shape) + 1, dtype=torch.float64) ** 2).reshape(shape)


def fixed(module):
    """A module in float64 whose parameters are such constants."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(constant(*parameter.shape))
    return module


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def posterior(*shape):
    slab = dist.Laplace(randn(*shape), 0.2 + torch.rand(shape, dtype=torch.float64))
    return SpikeAndSlab(slab, logits=randn(*shape)).to_event(len(shape) - 1)


def single():
    """The law of one datum's codes."""
    return SpikeAndSlab(dist.Laplace(randn(K), 0.5), probs=0.3).to_event(1)


PRIOR = dist.Laplace(torch.zeros((), dtype=torch.float64), 1.0)
MATRIX, OTHER, BIAS = constant(K, D), constant(2, D), constant(D)
LAYER = fixed(nn.Linear(K, D))
KERNEL = constant(1, 1, 2)


def program(predictor, *, sites=("codes",), sizes=(K,), family=None):
    """A user's program without anything of this library."""

    def model(y, num_data=None):
        index = torch.arange(len(y))
        with pyro.plate("data", num_data or len(y), subsample=index):
            codes = [
                pyro.sample(site, PRIOR.expand([size]).to_event(1))
                for site, size in zip(sites, sizes)
            ]
            law = (family or (lambda eta: dist.Normal(eta, 0.7)))(predictor(*codes))
            pyro.sample("obs", law.to_event(1), obs=y)

    return model


def monte_carlo(model, laws, args, size=DRAWS):
    """Mean and standard error of a log-likelihood, from Pyro alone: draw, condition, log_prob."""
    totals = []
    for _ in range(size // 500):
        # 500 draws at once in a plate of their own.
        data = {site: law.sample((500,)) for site, law in laws.items()}
        with pyro.plate("draws", 500, dim=-2), torch.no_grad():
            trace = poutine.trace(poutine.condition(model, data)).get_trace(*args)
            trace.compute_log_prob(lambda site, _: site == "obs")
        totals.append(trace.nodes["obs"]["log_prob"])
    each = torch.cat(totals)
    return each.mean(0), each.std(0) / math.sqrt(len(each))


USERS = {
    "z @ A": (program(lambda z: z @ MATRIX), {"codes": K}),
    "z @ A + b": (program(lambda z: BIAS - 2 * (z @ MATRIX) / 3), {"codes": K}),
    "nn.Linear": (program(LAYER), {"codes": K}),
    "two sites": (
        program(lambda z, w: z @ MATRIX - w @ OTHER, sites=("codes", "other"), sizes=(K, 2)),
        {"codes": K, "other": 2},
    ),
    "conv_transpose": (
        program(
            lambda z: F.conv_transpose1d(z.reshape(-1, 1, K), KERNEL).reshape(*z.shape[:-1], D)
        ),
        {"codes": K},
    ),
}


@pytest.mark.parametrize("name", USERS)
def test_a_users_program_agrees_with_monte_carlo(name):
    model, sizes = USERS[name]
    laws = {site: posterior(N, size) for site, size in sizes.items()}
    y = randn(N, D)
    with torch.no_grad():
        terms = expected_log_likelihood(model, laws, args=(y,)).terms
    assert set(terms) == {"obs"}
    mean, error = monte_carlo(model, laws, (y,))
    assert terms["obs"].shape == (N,)
    assert ((terms["obs"] - mean).abs() / error).max() < 4


def test_poisson_in_a_users_program_agrees_with_monte_carlo():
    model = program(lambda z: 0.3 * z @ MATRIX, family=lambda eta: dist.Poisson(torch.exp(eta)))
    slab = dist.Laplace(randn(N, K), 0.3)
    law = SpikeAndSlab(slab, logits=randn(N, K)).to_event(1)
    y = torch.poisson(torch.ones(N, D, dtype=torch.float64))
    term = expected_log_likelihood(model, {"codes": law}, args=(y,)).terms["obs"]
    mean, error = monte_carlo(model, {"codes": law}, (y,))
    assert ((term - mean).abs() / error).max() < 4


DICTIONARIES = {
    "dense": (lambda: Dense(K, D), (D,)),
    "interior": (lambda: Conv(2, 1, 3, 2), (1, 9)),
    "overhang": (lambda: Conv(2, 2, 3, boundary=Overhang()), (2, 6)),
    "periodic": (lambda: Conv(2, 1, 3, boundary=Periodic()), (1, 6)),
    "picture": (lambda: Conv(2, 1, (2, 3), boundary=Periodic()), (1, 3, 4)),
    "composed": (lambda: Composition(Mask((D,)), Dense(K, D), input_shape=(D,)), (D,)),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", DICTIONARIES)
def test_sparse_coding_agrees_with_monte_carlo(name, masked):
    make, signal_shape = DICTIONARIES[name]
    dictionary = make().double()
    model = SparseCoding(dictionary, Gaussian(0.5).double(), PRIOR)
    y = randn(N, *signal_shape)
    mask = torch.rand(y.shape) < 0.6 if masked else None
    law = posterior(N, *dictionary.code_shape(signal_shape))
    with torch.no_grad():
        found = expected_log_likelihood(model, {"codes": law}, args=(y, 12, mask))
        samples = law.sample((DRAWS,))
        predictor = dictionary(samples)
        each = dist.Normal(predictor, model.likelihood.scale).log_prob(y)
        each = (each * (mask if masked else 1)).flatten(2).sum(-1) * 12 / N
    term = found.terms["obs"]
    assert term.shape == (N,)
    error = each.std(0) / math.sqrt(DRAWS)
    assert ((term - each.mean(0)).abs() / error).max() < 4
    site = found.trace.nodes["codes"]
    assert site["scale"] == 12 / N
    assert site["fn"].shape() == law.shape()


def test_sparse_coding_is_the_formula_on_the_matrix():
    dictionary = Conv(2, 1, 3, boundary=Periodic()).double()
    model = SparseCoding(dictionary, Gaussian(0.5).double(), PRIOR)
    y, law = randn(N, 1, 6), posterior(N, 2, 6)
    term = expected_log_likelihood(model, {"codes": law}, args=(y,)).terms["obs"]
    with torch.no_grad():
        matrix = dictionary(torch.eye(12, dtype=torch.float64).reshape(12, 2, 6)).flatten(1)
    mean, variance = law.mean.flatten(1) @ matrix, law.variance.flatten(1) @ matrix**2
    distance = (y.flatten(1) - mean) ** 2 + variance
    want = -(distance / (2 * 0.25) + math.log(2 * math.pi * 0.25) / 2).sum(1)
    torch.testing.assert_close(term, want, rtol=1e-10, atol=1e-10)


def test_the_expectation_over_gates_is_their_enumeration():
    """Codes that are zero or one value: 2**K supports, each with its log-likelihood."""
    probs, y = torch.rand(K, dtype=torch.float64), randn(D)
    gates = dist.Bernoulli(probs).to_event(1)

    def model():
        gate = pyro.sample("gates", gates)
        pyro.sample("obs", dist.Normal((2 * gate - 1) @ MATRIX, 0.7).to_event(1), obs=y)

    term = expected_log_likelihood(model, {"gates": gates}).terms["obs"]
    supports = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * K)
    scale = torch.tensor(0.7, dtype=torch.float64)
    each = dist.Normal((2 * supports - 1) @ MATRIX, scale).log_prob(y).sum(-1)
    want = (gates.log_prob(supports).exp() * each).sum()
    torch.testing.assert_close(term, want, rtol=1e-7, atol=1e-7)  # log_prob clamps at float eps


def test_nothing_is_drawn():
    model, law, y = USERS["z @ A"][0], posterior(N, K), randn(N, D)
    before = torch.get_rng_state()
    first = expected_log_likelihood(model, {"codes": law}, args=(y,)).terms["obs"]
    assert torch.equal(torch.get_rng_state(), before)
    again = expected_log_likelihood(model, {"codes": law}, args=(y,)).terms["obs"]
    assert torch.equal(first, again)


def test_a_minibatch_is_scaled_and_the_whole_is_its_mean():
    model, y = USERS["z @ A"][0], randn(6, D)
    slab = dist.Laplace(randn(6, K), 0.5)
    whole = SpikeAndSlab(slab, probs=0.3)
    full = expected_log_likelihood(model, {"codes": whole.to_event(1)}, args=(y,)).terms["obs"]
    parts = []
    for rows in torch.arange(6).split(2):
        part = SpikeAndSlab(dist.Laplace(slab.loc[rows], slab.scale[rows]), probs=0.3)
        found = expected_log_likelihood(
            model, {"codes": part.to_event(1)}, args=(y[rows],), kwargs={"num_data": 6}
        )
        parts.append(found.terms["obs"].sum())
    torch.testing.assert_close(torch.stack(parts).mean(), full.sum())


def test_gradients_reach_the_law_and_the_program():
    matrix, logits = randn(K, D).requires_grad_(), randn(N, K).requires_grad_()
    y, model = randn(N, D), program(lambda z: z @ matrix)

    def total(logits, matrix_):
        law = SpikeAndSlab(dist.Laplace(torch.ones_like(logits), 0.5), logits=logits).to_event(1)
        changed = program(lambda z: z @ matrix_)
        return expected_log_likelihood(changed, {"codes": law}, args=(y,)).terms["obs"]

    assert torch.autograd.gradcheck(total, (logits, matrix))
    assert refusal(model, {"codes": posterior(N, K)}, args=(y,)) is None


def test_other_sites_take_the_values_they_are_given():
    dictionary = Dense(K, D).double()
    rate = torch.full((K,), 2.0, dtype=torch.float64)
    model = SparseCoding(
        dictionary,
        Gaussian(0.5).double(),
        lambda rate: dist.Laplace(0.0, 1 / rate),
        rate=dist.Gamma(torch.tensor(2.0, dtype=torch.float64), 1.0),
        dictionary_prior=dist.Normal(torch.zeros((), dtype=torch.float64), 1.0),
    )
    y, law = randn(N, D), posterior(N, K)
    values = {"rate": rate, "dictionary": MATRIX}
    found = expected_log_likelihood(model, {"codes": law}, values, args=(y,))
    prior = found.trace.nodes["codes"]["fn"]
    torch.testing.assert_close(prior.variance, torch.full((N, K), 0.5, dtype=torch.float64))
    assert torch.equal(found.trace.nodes["rate"]["value"], rate)
    distance = (y - law.mean @ MATRIX) ** 2 + law.variance @ MATRIX**2
    want = -(distance / (2 * 0.25) + math.log(2 * math.pi * 0.25) / 2).sum(1)
    torch.testing.assert_close(found.terms["obs"], want)


def test_several_observed_sites_may_share_the_codes():
    y, label = randn(D), torch.tensor(1.0, dtype=torch.float64)
    law = single()

    def model():
        z = pyro.sample("codes", PRIOR.expand([K]).to_event(1))
        predictor = pyro.deterministic("predictor", z @ MATRIX)
        pyro.sample("obs", dist.Normal(predictor, 0.7).to_event(1), obs=y)
        pyro.sample("label", dist.Normal(z.sum(-1), 1.0), obs=label)
        pyro.sample("constant", dist.Gamma(2.0, 1.0), obs=torch.tensor(1.5))
        pyro.factor("score", 0.5 * z[0] + 1)

    terms = expected_log_likelihood(model, {"codes": law}).terms
    assert set(terms) == {"obs", "label", "constant", "score"}
    second = (label - law.mean.sum()) ** 2 + law.variance.sum()
    torch.testing.assert_close(terms["label"], -second / 2 - math.log(2 * math.pi) / 2)
    torch.testing.assert_close(terms["constant"], dist.Gamma(2.0, 1.0).log_prob(torch.tensor(1.5)))
    torch.testing.assert_close(terms["score"], 0.5 * law.mean[0] + 1)


def test_masks_and_scales_around_a_program_count():
    model, law, y = USERS["z @ A"][0], posterior(N, K), randn(N, D)
    plain = expected_log_likelihood(model, {"codes": law}, args=(y,)).terms["obs"]
    kept = torch.tensor([True, False, True])
    changed = poutine.mask(poutine.scale(model, scale=0.5), mask=kept)
    term = expected_log_likelihood(changed, {"codes": law}, args=(y,)).terms["obs"]
    torch.testing.assert_close(term, 0.5 * plain * kept)


def test_an_observed_code_is_not_replaced():
    y, z = randn(N, D), randn(N, K)
    model = poutine.condition(
        program(lambda z, w: z @ MATRIX + w @ OTHER, sites=("codes", "other"), sizes=(K, 2)),
        {"codes": z},
    )
    law = posterior(N, 2)
    terms = expected_log_likelihood(model, {"other": law}, args=(y,)).terms
    distance = (y - z @ MATRIX - law.mean @ OTHER) ** 2 + law.variance @ OTHER**2
    want = -(distance / (2 * 0.49) + math.log(2 * math.pi * 0.49) / 2).sum(1)
    torch.testing.assert_close(terms["obs"], want)


def hierarchical(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("codes", PRIOR.expand([K]).to_event(1))
        w = pyro.sample("other", dist.Normal(z[:, :2], 1.0).to_event(1))
        pyro.sample("obs", dist.Normal(w @ OTHER, 1.0).to_event(1), obs=y)


def about_codes(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("codes", PRIOR.expand([K]).to_event(1))
        pyro.sample("obs", dist.Normal(torch.zeros(K), 1.0).to_event(1), obs=z)


def traced(z):
    with pytest.warns(DeprecationWarning):
        compiled = torch.jit.trace(torch.tanh, torch.zeros(2))
    return compiled(z) @ MATRIX


REFUSED = {
    "tanh": (program(lambda z: torch.tanh(z @ MATRIX)), "met torch.tanh"),
    "decoder": (
        program(nn.Sequential(LAYER, nn.ReLU(), nn.Linear(D, D, dtype=torch.float64))),
        "relu",
    ),
    "codes twice": (program(lambda z: z @ MATRIX + z @ MATRIX), "twice"),
    "laplace noise": (
        program(lambda z: z @ MATRIX, family=lambda eta: dist.Laplace(eta, 1.0)),
        "known for Laplace",
    ),
    "compiled": (program(traced), "compiled code"),
    "hierarchical": (hierarchical, "priors that do not depend on codes.*'other'"),
    "data": (about_codes, "codes as the data of site 'obs'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_program_without_a_closed_form_says_why(name):
    model, message = REFUSED[name]
    given = ({"codes": posterior(N, K)}, {"other": randn(N, 2)}, (randn(N, D),))
    with pytest.raises(NotImplementedError, match=message):
        expected_log_likelihood(model, *given)
    assert "Use SparseELBO(estimator=ImplicitMixed())" in refusal(model, *given)


def test_a_site_without_law_or_value_is_named():
    model = USERS["two sites"][0]
    with pytest.raises(ValueError, match="neither for 'other'"):
        expected_log_likelihood(model, {"codes": posterior(N, K)}, args=(randn(N, D),))


def test_a_law_without_a_site_is_named():
    laws = {"codes": posterior(N, K), "code": posterior(N, K)}
    with pytest.raises(ValueError, match="'code' to be a latent site.*which has 'codes'"):
        expected_log_likelihood(USERS["z @ A"][0], laws, args=(randn(N, D),))


@pytest.mark.parametrize("shape", [(N, K + 1), (N + 1, K), (K,)], ids=str)
def test_a_law_of_another_shape_is_refused(shape):
    slab = dist.Laplace(randn(*shape), 0.5)
    law = SpikeAndSlab(slab, probs=0.3).to_event(1)
    with pytest.raises(ValueError, match=r"batch shape \(3,\) and event shape \(4,\)"):
        expected_log_likelihood(USERS["z @ A"][0], {"codes": law}, args=(randn(N, D),))


def test_a_random_subsample_is_replayed():
    index = torch.tensor([4, 0, 2])
    y = randn(6, D)

    def model():
        with pyro.plate("data", 6, subsample_size=3) as rows:
            z = pyro.sample("codes", PRIOR.expand([K]).to_event(1))
            pyro.sample("obs", dist.Normal(z @ MATRIX, 1.0).to_event(1), obs=y[rows])

    law = posterior(N, K)
    found = expected_log_likelihood(model, {"codes": law}, {"data": index})
    plain = program(lambda z: z @ MATRIX, family=lambda eta: dist.Normal(eta, 1.0))
    want = expected_log_likelihood(plain, {"codes": law}, args=(y[index],)).terms["obs"]
    torch.testing.assert_close(found.terms["obs"], 2 * want)
    assert set(found.trace.nodes) == {"codes", "obs"}
    assert isinstance(found.trace.nodes["codes"]["value"], Moments)


def test_not_affine_is_a_not_implemented_error():
    assert issubclass(NotAffine, NotImplementedError)
