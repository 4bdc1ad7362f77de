"""Families of data given a predictor, against scipy, autograd and brute force."""

import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro.infer import Trace_ELBO

from pyro_sparse import infer
from pyro_sparse.dictionaries import Dense
from pyro_sparse.distributions import Moments, expected_log_prob
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.likelihoods import (
    Bernoulli,
    Binomial,
    Exponential,
    Gamma,
    Gaussian,
    Likelihood,
    NegativeBinomial,
    Offset,
    Poisson,
    Stabilised,
)
from pyro_sparse.models import SparseCoding


def double(value):
    return torch.tensor(value, dtype=torch.float64)


FAMILIES = {
    "poisson": (Poisson, [0.0, 1.0, 4.0, 30.0]),
    "binomial": (lambda: Binomial(7), [0.0, 1.0, 5.0, 7.0]),
    "bernoulli": (Bernoulli, [0.0, 1.0]),
    "negative binomial": (lambda: NegativeBinomial(double(1.7)), [0.0, 1.0, 4.0, 30.0]),
    "gamma": (lambda: Gamma(double(2.3)), [0.01, 1.0, 4.0, 30.0]),
    "exponential": (Exponential, [0.01, 1.0, 4.0]),
    "offset": (lambda: Offset(Poisson(), double(0.7)), [0.0, 1.0, 4.0]),
}
each = pytest.mark.parametrize("name", FAMILIES)
BOUNDED = ["binomial", "bernoulli", "negative binomial"]


def made(name):
    make, data = FAMILIES[name]
    y = double(data)[:, None]
    eta = torch.linspace(-4, 4, 41, dtype=torch.float64)
    return make().double(), *torch.broadcast_tensors(y, eta)


def reference(name, y, eta):
    mean = eta.exp().numpy()
    y = y.numpy()
    if name == "poisson":
        return scipy.stats.poisson(mean).logpmf(y)
    if name in ("binomial", "bernoulli"):
        return scipy.stats.binom(7 if name == "binomial" else 1, eta.sigmoid()).logpmf(y)
    if name == "negative binomial":
        return scipy.stats.nbinom(1.7, 1.7 / (1.7 + mean)).logpmf(y)
    if name == "offset":
        return scipy.stats.poisson(mean * double(0.7).exp().item()).logpmf(y)
    shape = 1.0 if name == "exponential" else 2.3
    return scipy.stats.gamma(shape, scale=mean / shape).logpdf(y)


@each
def test_log_densities_are_scipys(name):
    likelihood, y, eta = made(name)
    expected = torch.from_numpy(reference(name, y, eta))
    torch.testing.assert_close(likelihood(eta).log_prob(y), expected, rtol=1e-11, atol=1e-11)


@each
def test_residuals_are_the_score(name):
    likelihood, y, eta = made(name)
    eta = eta.clone().requires_grad_()
    (score,) = torch.autograd.grad(likelihood(eta).log_prob(y).sum(), eta)
    torch.testing.assert_close(likelihood.residual(eta, y), score, rtol=1e-10, atol=1e-10)


@each
def test_losses_are_log_densities_below_their_maximum(name):
    likelihood, y, eta = made(name)
    log_prob = likelihood(eta).log_prob(y)
    far = torch.linspace(-40, 40, 32001, dtype=torch.float64).unsqueeze(-1).unsqueeze(-1)
    best = likelihood(far).log_prob(y).amax(0)
    loss = likelihood.loss(eta, y)
    torch.testing.assert_close(loss, best - log_prob, rtol=1e-4, atol=1e-4)  # a grid of 0.0025
    differences = loss[:, 1:] - loss[:, :-1]
    expected = log_prob[:, :-1] - log_prob[:, 1:]
    torch.testing.assert_close(differences, expected, rtol=1e-9, atol=1e-10)


@each
def test_means_are_those_of_the_law_and_of_its_draws(name):
    likelihood, _, _ = made(name)
    eta = double([-1.0, 0.2, 1.5])
    law = likelihood(eta)
    torch.testing.assert_close(likelihood.mean(eta), law.mean)
    torch.manual_seed(0)
    draws = law.sample((40_000,))
    error = (draws.mean(0) - law.mean) / (law.variance / 40_000).sqrt()
    assert error.abs().max() < 4.5  # one in 150,000
    fourth = ((draws - law.mean) ** 4).mean(0)
    spread = ((fourth - law.variance.square()) / 40_000).sqrt()
    assert ((draws.var(0) - law.variance) / spread).abs().max() < 5
    likelihood.check(draws)
    assert law.support.check(draws).all()


@pytest.mark.parametrize("name", BOUNDED)
def test_curvatures_bound_the_second_derivative_and_are_reached(name):
    likelihood, y, eta = made(name)
    eta = eta.clone().requires_grad_()
    (score,) = torch.autograd.grad(likelihood(eta).log_prob(y).sum(), eta, create_graph=True)
    (second,) = torch.autograd.grad(score.sum(), eta)
    bound = likelihood.curvature(y).expand_as(y)
    assert (-second <= bound * (1 + 1e-9)).all()
    assert (-second / bound).amax(1).min() > 0.97
    assert not bound.requires_grad


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(BOUNDED)))
def test_a_family_without_a_bound_says_so_and_what_to_do(name):
    likelihood, y, _ = made(name)
    with pytest.raises(NotImplementedError, match=r"no bound of its curvature.*Stabilised"):
        likelihood.curvature(y)


@each
def test_the_dual_is_the_infimum_of_loss_plus_slope(name):
    likelihood, y, eta = made(name)
    # Feasible scores are those of predictors; by definition the infimum is attained there.
    score = likelihood.residual(eta, y)
    exact = likelihood.loss(eta, y) + score * eta
    torch.testing.assert_close(likelihood.dual(score, y), exact, rtol=1e-9, atol=1e-9)
    others = likelihood.loss(eta.flip(1), y) + score * eta.flip(1)
    assert (likelihood.dual(score, y) <= others + 1e-9).all()


@pytest.mark.parametrize(
    ("likelihood", "y", "score"),
    [
        (Poisson(), 2.0, 2.1),
        (Binomial(4), 1.0, 1.1),
        (Binomial(4), 1.0, -3.1),
        (NegativeBinomial(2.0), 3.0, 3.1),
        (NegativeBinomial(2.0), 3.0, -2.1),
        (Gamma(2.0), 3.0, -2.1),
    ],
)
def test_scores_that_no_predictor_has_are_infeasible(likelihood, y, score):
    assert likelihood.dual(torch.tensor(score), torch.tensor(y)) == -torch.inf


@pytest.mark.parametrize("name", ["poisson", "gamma"])
def test_expected_log_densities_are_means_over_the_codes(name):
    torch.manual_seed(0)
    likelihood, _, _ = made(name)
    law = dist.Normal(double([0.3, -0.2, 0.1]), double([0.4, 0.2, 0.3]))
    matrix = torch.randn(3, 4, dtype=torch.float64) / 2
    y = double([1.0, 2.0, 3.0, 0.0 if name == "poisson" else 0.5])
    exact = expected_log_prob(likelihood(Moments.of(law, "codes") @ matrix), y)
    draws = likelihood(law.sample((200_000,)) @ matrix).log_prob(y)
    error = (draws.mean(0) - exact) / (draws.var(0) / 200_000).sqrt()
    assert error.abs().max() < 4.5


@pytest.mark.parametrize("name", BOUNDED)
def test_families_without_a_closed_expectation_fall_back_on_draws(name):
    likelihood, _, _ = made(name)
    codes = Moments.of(dist.Normal(double([0.3]), double([0.4])), "codes")
    with pytest.raises(NotImplementedError, match="No expected log-density is known for Natural"):
        expected_log_prob(likelihood(codes), double([1.0]))


def test_large_dispersion_is_poisson():
    y, eta = double([0.0, 3.0, 100.0]), double([0.1, 1.0, 4.5])
    near = NegativeBinomial(double(1e12))(eta).log_prob(y)
    torch.testing.assert_close(near, Poisson()(eta).log_prob(y), rtol=1e-8, atol=1e-8)


def test_learned_parameters_stay_positive_and_find_the_truth():
    torch.manual_seed(0)
    eta = torch.linspace(-1, 2, 4000, dtype=torch.float64)
    for make, truth in ((NegativeBinomial, 1.5), (Gamma, 3.0)):
        y = make(double(truth))(eta).sample()
        likelihood = make(double(0.5), trainable=True)
        optimizer = torch.optim.LBFGS(likelihood.parameters(), line_search_fn="strong_wolfe")

        def closure(likelihood=likelihood, optimizer=optimizer, y=y):
            optimizer.zero_grad()
            loss = -likelihood(eta).log_prob(y).mean()
            loss.backward()
            return loss

        for _ in range(5):
            optimizer.step(closure)
        (found,) = (p.exp().item() for p in likelihood.parameters())
        assert abs(found / truth - 1) < 0.12  # a relative standard error of 3 %


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", ["poisson", "binomial", "negative binomial", "gamma"])
def test_a_model_of_each_family_trains_masked(name, exact):
    torch.manual_seed(0)
    likelihood, _, _ = made(name)
    dictionary = Dense(8, 5).double()
    prior = dist.Laplace(0.0, 0.5)
    model = SparseCoding(dictionary, likelihood, prior)
    with torch.no_grad():
        y = model(num_data=30)
    mask = torch.rand(y.shape) < 0.7
    y[~mask] = torch.nan
    guide = UnrolledFISTA(
        dictionary,
        likelihood if name in BOUNDED else Stabilised(likelihood, 1.0),
        prior,
        step_size=None if name != "gamma" else 0.01,  # the residual has no bound above
    )
    loss = infer.SparseELBO() if exact else Trace_ELBO()
    history = infer.fit(model, guide, y, mask=mask, loss=loss, epochs=15, progress=False)
    assert history.epoch_loss[-1] < history.epoch_loss[0]
    assert (guide.encode(torch.nan_to_num(y, 1.0), mask) == 0).any()


@pytest.mark.parametrize(
    ("likelihood", "data", "match"),
    [
        (Poisson(), [1.0, -1.0], r"whole counts >= 0, as Poisson.*1 value.*first at \(1,\): -1"),
        (Poisson(), [0.5, 1.5], r"2 values that are not, the first at \(0,\): 0.5.*Round them"),
        (Binomial(3), [1.0, 4.0], r"from 0 to total_count \(3\).*\(1,\): 4"),
        (Binomial(3), [1.0, 0.3], r"share of successes times total_count"),
        (Bernoulli(), [1.0, 2.0], r"total_count \(1\), as Bernoulli has"),
        (NegativeBinomial(1.0), [1.0, -2.0], "as NegativeBinomial has them"),
        (Gamma(1.0), [1.0, 0.0], r"data > 0 and finite, as Gamma.*\(1,\): 0.*detection limit"),
        (Exponential(), [1.0, float("inf")], "as Exponential has them"),
        (Offset(Poisson(), 1.0), [1.0, -1.0], "as Poisson has them"),
        (Stabilised(Poisson(), 1.0), [1.0, -1.0], "as Poisson has them"),
    ],
)
def test_data_out_of_range_are_refused_unless_they_were_not_observed(likelihood, data, match):
    y = torch.tensor(data)
    with pytest.raises(ValueError, match=match):
        likelihood.check(y)
    likelihood.check(y, torch.zeros(2, dtype=torch.bool))


def test_a_model_refuses_data_out_of_range_before_it_samples():
    model = SparseCoding(Dense(4, 3), Poisson(), dist.Laplace(0.0, 1.0))
    with pytest.raises(ValueError, match="Expected whole counts"):
        model(torch.full((2, 3), -1.0))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Binomial(0), ValueError, r"total_count > 0 and finite"),
        (lambda: Binomial(2.5), ValueError, "total_count to be whole numbers"),
        (lambda: Binomial("many"), TypeError, "total_count to be a real number.*got str"),
        (lambda: NegativeBinomial(-1.0), ValueError, r"total_count > 0 and finite.*got -1"),
        (lambda: Gamma(float("nan")), ValueError, r"concentration > 0 and finite"),
        (lambda: Gamma(torch.ones(2, dtype=torch.complex64)), TypeError, "got torch.complex64"),
        (lambda: Offset(dist.Poisson(1.0), 1.0), TypeError, "a Likelihood.*got Poisson"),
        (
            lambda: Offset(Poisson(), "much"),
            TypeError,
            "offset to be a number or a tensor, got str",
        ),
        (lambda: Offset(Poisson(), float("inf")), ValueError, "a finite offset, got inf"),
        (lambda: Stabilised(Poisson(), 0.0), ValueError, "finite alpha > 0, got 0.0"),
        (lambda: Stabilised(Poisson(), "one"), TypeError, "alpha to be a number, got 'one'"),
        (lambda: Stabilised(3, 1.0), TypeError, "a Likelihood.*got int"),
    ],
)
def test_parameters_out_of_range_are_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    "make", [NegativeBinomial, Gamma, Binomial, lambda v: Offset(Poisson(), v)]
)
def test_parameters_that_do_not_fit_the_data_are_refused(make):
    with pytest.raises(ValueError, match=r"broadcasts to the data, \(2, 3\), got \(4,\)"):
        make(torch.ones(4)).check(torch.ones(2, 3))
    with pytest.raises(TypeError, match="dtype"):
        make(torch.ones(3).double()).check(torch.ones(2, 3))


# ---- wrappers ----------------------------------------------------------------------------------


def test_an_offset_is_a_part_of_the_predictor():
    eta, y, offset = double([[0.3, -1.0]]), double([[2.0, 0.0]]), double([0.5, -0.2])
    inner, outer = Poisson(), Offset(Poisson(), offset)
    assert torch.equal(outer(eta).log_prob(y), inner(eta + offset).log_prob(y))
    for name in ("residual", "loss"):
        assert torch.equal(getattr(outer, name)(eta, y), getattr(inner, name)(eta + offset, y))
    assert torch.equal(outer.mean(eta), inner.mean(eta + offset))
    bounded = Offset(Binomial(3), 0.5)
    assert torch.equal(bounded.curvature(y), Binomial(3).curvature(y))
    assert Offset(Gamma(1.0), 0.0).placeholder == 1.0


def test_a_learned_offset_finds_the_baseline():
    torch.manual_seed(0)
    truth = torch.linspace(0, 2, 5, dtype=torch.float64)
    y = dist.Poisson(truth.exp()).sample((400,))
    offset = Offset(Poisson(), torch.zeros(5, dtype=torch.float64), trainable=True)
    dictionary, prior = Dense(3, 5).double(), dist.Laplace(0.0, 1e-3)
    model = SparseCoding(dictionary, offset, prior)
    guide = UnrolledFISTA(dictionary, Stabilised(offset, 1.0), prior, num_steps=2)
    adam = lambda p: torch.optim.Adam(p, lr=0.1)  # noqa: E731
    infer.fit(model, guide, y, optimizer=adam, epochs=200, progress=False)
    error = (offset.offset - truth).abs() / (-truth / 2).exp() * 20  # standard errors
    assert error.max() < 4.5


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
def test_a_stabilised_residual_is_bent_below_and_its_slope_is_bounded(alpha):
    y = double([0.0, 1.0, 3.0, 40.0])[:, None]
    eta = torch.linspace(-5, 12, 20_001, dtype=torch.float64)
    likelihood = Stabilised(Poisson(), alpha)
    residual = likelihood.residual(eta, y)
    plain = Poisson().residual(eta, y)
    above = plain >= 0
    assert torch.equal(residual[above], plain[above])
    assert residual.min() >= -alpha
    slope = (residual[:, :-1] - residual[:, 1:]) / (eta[1] - eta[0])
    bound = likelihood.curvature(y)
    assert (slope <= bound + 1e-9).all()
    assert (slope.amax(1) > 0.15 * bound.squeeze(1)).all()  # not far above what is there


def test_a_stabilised_net_stays_where_the_plain_one_explodes():
    torch.manual_seed(0)
    dictionary, prior = Dense(30, 20).double(), dist.Exponential(1.0)
    y = dist.Poisson(torch.full((4, 20), 3.0, dtype=torch.float64)).sample()
    nets = {}
    for name, likelihood in (("plain", Poisson()), ("bent", Stabilised(Poisson(), 3.0))):
        guide = UnrolledFISTA(dictionary, likelihood, prior, num_steps=15, step_size=1.0)
        nets[name] = dictionary(guide.encode(y)).abs().max()
    assert nets["bent"] < 100 < nets["plain"]


def test_a_stabilised_likelihood_gives_no_certificate():
    with pytest.raises(NotImplementedError, match=r"the likelihood itself.*Hand Poisson"):
        Stabilised(Poisson(), 1.0).dual(torch.zeros(1), torch.zeros(1))


def test_a_family_of_ones_own_is_one_small_class():
    class Cauchy(Likelihood):
        def forward(self, predictor):
            return dist.Cauchy(predictor, torch.ones_like(predictor))

        def mean(self, predictor):
            return predictor

        def residual(self, predictor, y):
            return 2 * (y - predictor) / (1 + (y - predictor) ** 2)

        def curvature(self, y):
            return torch.tensor(2.0)

    dictionary, prior = Dense(8, 5), dist.Laplace(0.0, 1.0)
    model = SparseCoding(dictionary, Cauchy(), prior)
    guide = UnrolledFISTA(dictionary, Cauchy(), prior)
    history = infer.fit(model, guide, torch.randn(20, 5), epochs=3, progress=False)
    assert history.epoch_loss[-1] < history.epoch_loss[0]


def test_gaussian_is_among_them():
    assert isinstance(Gaussian(1.0), Likelihood)
