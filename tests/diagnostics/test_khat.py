"""k-hat against ArviZ and known tails; leaving out against exact predictive densities."""

import math
import warnings
from typing import Any

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from pyro_sparse.diagnostics.datatree import to_datatree
from pyro_sparse.diagnostics.khat import khat, loo, psis
from pyro_sparse.dictionaries import Dense
from pyro_sparse.distributions import SpikeAndSlab
from pyro_sparse.infer.exact import enumerate_posterior
from pyro_sparse.infer.log_weights import log_weights
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import coordinate_ascent

F64 = torch.float64


def data_plate(y: Tensor, num_data: int | None) -> Any:
    return pyro.plate("data", num_data or len(y), subsample=torch.arange(len(y)))


def columns(num_samples: int) -> Tensor:
    """Log-weights with light, heavy, bounded and tied tails."""
    normal = [scale * torch.randn(num_samples, 8, dtype=F64) for scale in (1e-6, 0.1, 1, 3, 10)]
    pareto = [-k * torch.rand(num_samples, 8, dtype=F64).log() for k in (0.2, 0.7, 1.5)]
    bounded = [torch.rand(num_samples, 8, dtype=F64).log()]
    tied = [torch.round(2 * torch.randn(num_samples, 8, dtype=F64)) / 2]
    zeros = torch.randn(num_samples, 8, dtype=F64)
    zeros[torch.rand(num_samples, 8) < 0.3] = -math.inf
    return torch.cat([*normal, *pareto, *bounded, *tied, zeros], 1)


@pytest.mark.parametrize("num_samples", [21, 60, 225, 1000, 4001])
def test_shapes_and_weights_are_those_of_arviz(num_samples: int) -> None:
    values = columns(num_samples)
    smoothed, shape = psis(values)
    weights, reference = arviz.psislw(values.T.numpy().copy())
    fitted = np.isfinite(reference)
    assert fitted.mean() > 0.9
    # The target is 0.02; the same formulas differ by rounding alone.
    np.testing.assert_allclose(shape.numpy()[fitted], reference[fitted], atol=1e-8)
    assert bool(shape.isinf()[torch.from_numpy(~fitted)].all())
    # Sorted: which of two equal values gets the larger order statistic is open.
    np.testing.assert_allclose(
        np.sort(smoothed.exp().numpy(), 0), np.sort(np.exp(weights).T, 0), atol=1e-8
    )
    torch.testing.assert_close(khat(values), shape)


@pytest.mark.parametrize("k", [0.3, 0.8, 1.5])
def test_a_pareto_tail_is_found(k: float) -> None:
    uniform = torch.rand(4000, 400, dtype=F64)
    found = khat(-k * uniform.log())  # weights with P(w > t) = t ** (-1 / k)
    tail = 3 * 4000**0.5
    shrunk = (tail * k + 5) / (tail + 10)  # the prior of ten values' worth of 0.5
    # Asymptotic spread of the estimate (1 + k) / sqrt(tail), and as much for its bias in one fit.
    assert abs(float(found.mean()) - shrunk) < 0.35 * (1 + k) / tail**0.5
    assert float(found.std()) == pytest.approx((1 + k) / tail**0.5, rel=0.3)


@given(st.integers(0, 2**31 - 1), st.floats(-600, 600), st.floats(0.01, 20))
def test_order_and_constants_do_not_matter(seed: int, constant: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(100, 3, dtype=F64, generator=generator)
    order = torch.randperm(100, generator=generator)
    shape = khat(values)
    moved = khat(values[order] + constant)
    torch.testing.assert_close(moved, shape, rtol=0, atol=1e-6)  # of rounding the constant
    assert khat(values[:, 0]).shape == () and khat(values[:, :, None]).shape == (3, 1)


def test_where_no_tail_can_be_fitted() -> None:
    equal = torch.zeros(100)
    many_at_the_top = torch.cat([torch.zeros(40), -1 - torch.rand(60)])
    one_above = torch.cat([torch.ones(1), torch.zeros(40), -1 - torch.rand(59)])
    alone = torch.cat([torch.zeros(1), torch.full((99,), -1e4)])
    impossible = torch.full((100,), -math.inf)
    found = khat(torch.stack([equal, many_at_the_top, one_above, alone, impossible], 1))
    assert found.tolist() == [-math.inf, -math.inf, math.inf, math.inf, math.inf]
    smoothed, _ = psis(torch.stack([equal, impossible], 1))
    torch.testing.assert_close(smoothed.exp(), torch.full((100, 2), 0.01, dtype=F64))


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (torch.zeros(20, 3), ValueError, "at least 21"),
        (torch.tensor(1.0), ValueError, "at least 21"),
        (torch.full((30,), math.nan), ValueError, "30 that are nan"),
        (torch.full((30, 2), math.inf), ValueError, "inf"),
        (np.zeros((30, 2)), TypeError, "ndarray"),
        (torch.zeros(30, dtype=torch.complex64), TypeError, r"real.*got torch\.complex64"),
    ],
    ids=["few", "scalar", "nan", "inf", "array", "complex"],
)
def test_weights_are_checked(values: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        khat(values)


def test_weights_are_read_from_a_tree_and_from_log_weights() -> None:
    model, guide, draw = sparse_pair()
    y = draw(3)
    weights = log_weights(model, guide, y, num_samples=200, seed=5)
    tree = to_datatree(model, guide, y, num_samples=200, seed=5)
    expected = khat(weights.local)
    assert expected.shape == (3,)
    for source in (weights, tree):
        torch.testing.assert_close(khat(source), expected)
        for found, reference in zip(psis(source), psis(weights.local)):
            torch.testing.assert_close(found, reference)
    alone = to_datatree(model, guide, y, num_samples=30, groups=["posterior"])
    with pytest.raises(ValueError, match=r"sample_stats.*got groups \['posterior'\]"):
        khat(alone)


# For each datum, whatever the number of data


def sparse_pair() -> tuple[SparseCoding, Any, Any]:
    """A linear-Gaussian model with a spike-and-slab prior, and a plain amortised guide of it."""
    generator = torch.Generator().manual_seed(0)
    prior = SpikeAndSlab(dist.Normal(torch.zeros((), dtype=F64), 1.0), 0.3)
    model = SparseCoding(Dense(4, 6), Gaussian(0.5), prior).double()
    atoms = torch.randn(4, 6, dtype=F64, generator=generator)
    model.dictionary.init_atoms_(atoms / atoms.norm(dim=1, keepdim=True))
    atoms = model.dictionary.atoms.detach()

    def guide(y: Tensor, num_data: int | None = None, mask: Tensor | None = None) -> None:
        gram = atoms @ atoms.T + 0.25 * torch.eye(4, dtype=F64)
        loc = torch.linalg.solve(gram, atoms @ y.T).T  # ridge codes
        slab = dist.Normal(loc, 0.55)
        with data_plate(y, num_data):
            pyro.sample("codes", SpikeAndSlab(slab, logits=4 * loc.abs() - 2).to_event(1))

    def draw(n: int) -> Tensor:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(7)
            return model(num_data=n)

    return model, guide, draw


def test_the_figure_of_a_datum_does_not_depend_on_the_number_of_data() -> None:
    model, guide, draw = sparse_pair()
    y = draw(4096)
    all_of_them = khat(log_weights(model, guide, y, num_samples=1000, keep_draws=False))
    assert all_of_them.shape == (4096,)
    batches, joint, same = [], [], []
    for first in range(0, 4096, 128):  # 32 batches of 16, each with draws of its own
        weights = log_weights(model, guide, y[first : first + 16], num_samples=1000, seed=first)
        batches.append(khat(weights))
        joint.append(khat(weights.joint))
        same.append(all_of_them[first : first + 16])
    median = torch.cat(batches).median()
    assert abs(float(median - torch.cat(same).median())) <= 0.05  # of the same data
    assert abs(float(median - all_of_them.median())) <= 0.05
    # Power: the joint figure of 16 data already is far above that of each.
    assert float(torch.stack(joint).mean() - median) > 0.5


# Leaving out


def spread_guide(loc: float, scale: float) -> Any:
    def guide(y: Tensor, num_data: int) -> None:
        with data_plate(y, num_data):
            pyro.sample("codes", dist.Normal(loc * y, scale))

    return guide


def normal_model(y: Tensor, num_data: int) -> None:
    with data_plate(y, num_data):
        codes = pyro.sample("codes", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        pyro.sample("obs", dist.Normal(codes, 1.0), obs=y)


def test_a_datum_with_sites_of_its_own_leaves_the_prior() -> None:
    y = 1.4 * torch.randn(20, dtype=F64)
    # A guide too wide and off: only the correction makes it right.
    tree = to_datatree(normal_model, spread_guide(0.4, 1.1), y, num_samples=20000)
    result = loo(tree)
    exact = stats.norm.logpdf(y, 0, 2**0.5)
    assert result.elpd_i.dims == ("data",) and result.n_data_points == 20
    # Pointwise spread of the estimate, from ten repetitions with other seeds: below 0.01.
    np.testing.assert_allclose(result.elpd_i, exact, atol=0.05)
    assert result.elpd == pytest.approx(exact.sum(), abs=0.2)
    assert not result.warning and float(result.pareto_k.max()) < 0.7
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = arviz.loo(arviz.InferenceData.from_datatree(tree), pointwise=True)
    assert float(np.abs(plain.loo_i - exact).max()) > 0.2  # power: without the correction


def test_leaving_out_spike_and_slab_codes() -> None:
    y = torch.tensor([0.0, 0.1, 1.0, -2.0], dtype=F64)

    def model(y: Tensor, num_data: int) -> None:
        with data_plate(y, num_data):
            slab = dist.Normal(torch.zeros((), dtype=F64), 2.0)
            codes = pyro.sample("codes", SpikeAndSlab(slab, 0.3))
            pyro.sample("obs", dist.Normal(codes, 0.5), obs=y)

    def guide(y: Tensor, num_data: int) -> None:
        with data_plate(y, num_data):
            pyro.sample("codes", SpikeAndSlab(dist.Normal(0.5 * y, 1.8), 0.5))

    result = loo(to_datatree(model, guide, y, num_samples=20000))
    exact = np.log(0.7 * stats.norm.pdf(y, 0, 0.5) + 0.3 * stats.norm.pdf(y, 0, (4 + 0.25) ** 0.5))
    np.testing.assert_allclose(result.elpd_i, exact, atol=0.05)


def test_leaving_out_a_datum_of_many_codes_is_its_evidence() -> None:
    # The general form, a ratio of two noisy sums, would be off by much more than its error.
    torch.manual_seed(0)
    prior = SpikeAndSlab(dist.Normal(torch.zeros(12, dtype=F64), 1.0), 0.25)
    dictionary = Dense(12, 24, atoms=torch.randn(12, 24, dtype=F64))
    likelihood = Gaussian(torch.tensor(0.5, dtype=F64))
    model = SparseCoding(dictionary, likelihood, prior)
    with torch.no_grad():
        y = model(num_data=30)
    law = coordinate_ascent(y, dictionary, prior, likelihood).law.base_dist
    wide = SpikeAndSlab(dist.Normal(law.slab.mean, 1.2 * law.slab.stddev), logits=0.8 * law.logits)

    def guide(y: Tensor, num_data: int, mask: Tensor | None = None) -> None:
        with data_plate(y, num_data):
            pyro.sample("codes", wide.to_event(1))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tree = to_datatree(model, guide, y, num_samples=4000)
        result = loo(tree)
    exact = enumerate_posterior(y, dictionary, prior, likelihood).log_evidence
    weights = np.exp(tree["sample_stats"]["log_weight"].values[0] - result.elpd_i.values)
    error = weights.std(0) / 4000**0.5  # of the log of their mean; below k = 0.5 it exists
    reliable = result.pareto_k.values < 0.5
    assert reliable.sum() >= 10 and error[reliable].max() < 0.1
    assert (np.abs(result.elpd_i.values - exact.numpy()) < 4 * error)[reliable].all()
    likelihoods = torch.from_numpy(tree["log_likelihood"]["obs"].values[0])
    smoothed, _ = psis(torch.from_numpy(tree["sample_stats"]["log_weight"].values[0]) - likelihoods)
    general = (likelihoods + smoothed).logsumexp(0)
    missed = np.abs((general - exact).numpy()) > 4 * error
    assert missed[reliable].mean() > 0.5  # power: the general form does not pass


def shared_model(y: Tensor, num_data: int) -> None:
    mean = pyro.sample("mean", dist.Normal(torch.zeros((), dtype=F64), 10.0))
    with data_plate(y, num_data):
        pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)


def shared_truth(y: Tensor) -> tuple[float, float, np.ndarray]:
    """Posterior mean and scale, and the exact predictive density of each datum left out."""
    found = []
    for i in range(len(y)):
        rest = np.delete(y.numpy(), i)
        variance = 1 / (len(rest) + 0.01)
        found.append(stats.norm.logpdf(y[i], variance * rest.sum(), (1 + variance) ** 0.5))
    variance = 1 / (len(y) + 0.01)
    return variance * float(y.sum()), variance**0.5, np.array(found)


@pytest.mark.parametrize("spread", [1.0, 1.5])
def test_a_datum_leaves_the_sites_that_it_shares(spread: float) -> None:
    y = torch.randn(12, dtype=F64)
    loc, scale, exact = shared_truth(y)

    def guide(y: Tensor, num_data: int) -> None:
        pyro.sample("mean", dist.Normal(torch.tensor(loc, dtype=F64), spread * scale))

    tree = to_datatree(shared_model, guide, y, num_samples=20000)
    result = loo(tree)
    density = np.exp(tree["log_likelihood"]["obs"].values[0])
    target = stats.norm.pdf(tree["posterior"]["mean"].values[0], loc, scale)
    proposal = stats.norm.pdf(tree["posterior"]["mean"].values[0], loc, spread * scale)
    ratio = (target / proposal)[:, None] / density
    ratio /= ratio.sum(0)
    error = np.sqrt((ratio**2 * (density / np.exp(exact) - 1) ** 2).sum(0))
    assert error.max() < 0.03
    assert (np.abs(result.elpd_i - exact) < 4 * error + 1e-3).all()
    # One parameter; p counts the densities of the draws, which are wider than the posterior's.
    if spread == 1.0:
        assert result.p == pytest.approx(
            (stats.norm.logpdf(y, loc, (1 + scale**2) ** 0.5) - exact).sum(), abs=0.05
        )
    series = result.to_arviz()
    assert isinstance(series, arviz.ELPDData) and "elpd_loo" in str(series)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pandas, about what arviz calls
        assert list(arviz.compare({"a": series, "b": series}).index) == ["a", "b"]


def test_an_exact_guide_gives_what_arviz_gives() -> None:
    y = torch.randn(12, dtype=F64)
    loc, scale, _ = shared_truth(y)

    def guide(y: Tensor, num_data: int) -> None:
        pyro.sample("mean", dist.Normal(torch.tensor(loc, dtype=F64), scale))

    tree = to_datatree(shared_model, guide, y, num_samples=1000)
    ours = loo(tree)
    reference = arviz.loo(arviz.InferenceData.from_datatree(tree), pointwise=True)
    assert ours.elpd == pytest.approx(reference.elpd_loo, abs=1e-8)
    assert ours.se == pytest.approx(reference.se, abs=1e-8)
    assert ours.p == pytest.approx(reference.p_loo, abs=1e-8)
    np.testing.assert_allclose(ours.pareto_k, reference.pareto_k, atol=1e-6)
    assert ours.good_k == reference.good_k


def test_unreliable_figures_are_said() -> None:
    y = torch.tensor([0.0, 6.0], dtype=F64)
    tree = to_datatree(normal_model, spread_guide(0.5, 0.1), y, num_samples=1000)
    with pytest.warns(UserWarning, match="of 2 data have a Pareto k"):
        assert loo(tree).warning


def test_what_loo_is_given_is_checked() -> None:
    y = torch.zeros(3, dtype=F64)
    tree = to_datatree(
        normal_model, spread_guide(0.5, 1.0), y, num_samples=30, groups=["log_likelihood"]
    )
    with pytest.raises(ValueError, match=r"got no \['sample_stats'\]"):
        loo(tree)
    tree = to_datatree(normal_model, spread_guide(0.5, 1.0), y, num_samples=30)
    with pytest.raises(ValueError, match=r"sites \['obs'\], got 'y'"):
        loo(tree, var_name="y")
    with pytest.raises(TypeError, match="Dataset"):
        loo(tree["posterior"].to_dataset())
