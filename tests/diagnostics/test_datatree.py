"""Groups, dims and numbers of the tree, and what ArviZ makes of them."""

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer.autoguide import AutoDelta, AutoNormal
from scipy import stats
from torch import Tensor

from pyro_sparse.diagnostics.datatree import GROUPS, to_datatree
from pyro_sparse.diagnostics.khat import khat
from pyro_sparse.dictionaries import Conv, Dense
from pyro_sparse.distributions import SpikeAndSlab
from pyro_sparse.infer.log_weights import log_weights
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding

F64 = torch.float64


def data_plate(y: Tensor, num_data: int | None) -> Any:
    return pyro.plate("data", num_data or len(y), subsample=torch.arange(len(y)))


def mixed(shape: tuple[int, ...], probs: float, dtype: torch.dtype = F64) -> Any:
    slab = dist.Normal(torch.zeros(shape, dtype=dtype), 1.0)
    return SpikeAndSlab(slab, probs).to_event(len(shape))


def guide(y: Tensor, num_data: int | None = None, mask: Tensor | None = None) -> None:
    with data_plate(y, num_data):
        pyro.sample("codes", mixed((3,), 0.4))


@pytest.fixture
def model() -> SparseCoding:
    prior = SpikeAndSlab(dist.Normal(torch.zeros((), dtype=F64), 1.0), 0.25)
    return SparseCoding(Dense(3, 4), Gaussian(0.5), prior).double()


@pytest.fixture
def y() -> Tensor:
    return torch.randn(5, 4, dtype=F64)


def test_groups_dims_and_attributes(model: SparseCoding, y: Tensor) -> None:
    tree = to_datatree(model, guide, y, num_samples=40, num_prior_samples=7, num_data=50, seed=3)
    assert isinstance(tree, xr.DataTree) and list(tree.children) == list(GROUPS)
    dims = {
        f"{group}.{name}": value.dims
        for group, child in tree.children.items()
        for name, value in child.data_vars.items()
    }
    drawn = ("chain", "draw", "data")
    codes, obs = (*drawn, "codes_dim_0"), (*drawn, "obs_dim_0")
    assert dims == {
        "posterior.codes": codes,
        "posterior.active": codes,
        "posterior_predictive.obs": obs,
        "log_likelihood.obs": drawn,
        "sample_stats.log_p": drawn,
        "sample_stats.log_q": drawn,
        "sample_stats.log_weight": drawn,
        "prior.codes": codes,
        "prior.active": codes,
        "prior_predictive.obs": obs,
        "observed_data.obs": ("data", "obs_dim_0"),
    }
    assert dict(tree["posterior"].sizes) == {
        "chain": 1,
        "draw": 40,
        "data": 5,
        "codes_dim_0": 3,
    }
    assert tree["prior"].sizes["draw"] == 7
    for attrs in (tree.attrs, *(child.attrs for child in tree.children.values())):
        assert attrs["inference"] == "variational"
        assert attrs["num_samples"] == 40 and attrs["seed"] == 3 and attrs["num_data"] == 50
        assert attrs["pyro_version"] == pyro.__version__
        assert "draws of the guide" in attrs["reweighted"]


def test_numbers_are_those_of_the_weights(model: SparseCoding, y: Tensor) -> None:
    tree = to_datatree(model, guide, y, num_samples=60, seed=1, chunk_size=11)
    weights = log_weights(model, guide, y, num_samples=60, seed=1, chunk_size=11)
    codes = tree["posterior"]["codes"].values[0]
    np.testing.assert_array_equal(codes, weights.draws["codes"])
    stats_of = tree["sample_stats"]
    np.testing.assert_allclose(stats_of["log_weight"][0], weights.local, rtol=1e-10)
    np.testing.assert_allclose(
        stats_of["log_p"][0] - stats_of["log_q"][0], weights.local, rtol=1e-10
    )
    np.testing.assert_allclose(stats_of["log_q"][0], weights.log_q["codes"], rtol=1e-10)
    predictor = codes @ model.dictionary.atoms.detach().numpy()
    data = stats.norm.logpdf(y.numpy(), predictor, 0.5)
    np.testing.assert_allclose(tree["log_likelihood"]["obs"][0], data.sum(-1), rtol=1e-9)
    elements = to_datatree(
        model, guide, y, num_samples=60, seed=1, chunk_size=11, per_observation=True
    )["log_likelihood"]["obs"]
    assert elements.dims == ("chain", "draw", "data", "obs_dim_0")
    np.testing.assert_allclose(elements[0], data, rtol=1e-9)
    np.testing.assert_array_equal(tree["observed_data"]["obs"], y)


def test_active_means_not_exactly_zero(model: SparseCoding, y: Tensor) -> None:
    tree = to_datatree(model, guide, y, num_samples=2000)
    for group, probs in (("posterior", 0.4), ("prior", 0.25)):
        active, codes = tree[group]["active"], tree[group]["codes"]
        assert active.dtype == np.int8
        np.testing.assert_array_equal(active, codes.values != 0)
        error = (probs * (1 - probs) / active.size) ** 0.5
        assert abs(float(active.mean()) - probs) < 4 * error
        slab = codes.values[active.values == 1]
        assert stats.kstest(slab, "norm").pvalue > 1e-5


@pytest.mark.parametrize("chunk_size", [None, 100])
def test_predictive_draws_follow_the_codes(
    model: SparseCoding, y: Tensor, chunk_size: int | None
) -> None:
    tree = to_datatree(model, guide, y, num_samples=2000, chunk_size=chunk_size)
    atoms = model.dictionary.atoms.detach().numpy()
    seen = []
    for codes, drawn in (("posterior", "posterior_predictive"), ("prior", "prior_predictive")):
        z = tree[codes]["codes"].values[0]
        noise = (tree[drawn]["obs"].values[0] - z @ atoms) / 0.5
        assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-5
        seen += [z[z != 0], noise.ravel()]
    # No stream of random numbers serves twice: all of these are standard normal, as drawn.
    numbers = np.round(np.concatenate(seen), 12)
    assert len(np.unique(numbers)) == len(numbers)


def test_sites_outside_the_plate_of_the_data() -> None:
    y = torch.randn(6, dtype=F64)

    def model(y: Tensor, num_data: int) -> None:
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=F64), 1.0))
        with pyro.plate("groups", 2):
            pyro.sample("levels", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        with data_plate(y, num_data):
            codes = pyro.sample("codes", dist.Normal(torch.zeros((), dtype=F64), scale))
            pyro.sample("obs", dist.Normal(codes, 1.0), obs=y)
            pyro.sample("more", dist.Normal(codes, 1.0), obs=y)

    tree = to_datatree(model, AutoNormal(model), y, num_samples=30)
    posterior = tree["posterior"]
    assert {name: value.dims[2:] for name, value in posterior.data_vars.items()} == {
        "scale": (),
        "levels": ("groups",),
        "codes": ("data",),
    }
    weights = log_weights(model, AutoNormal(model), y, num_samples=30)
    assert tree["sample_stats"]["shared_log_weight"].shape == (1, *weights.shared.shape)
    assert tree["sample_stats"]["shared_log_p"].dims == ("chain", "draw")
    assert {*tree["log_likelihood"].data_vars} == {"obs", "more"}
    assert bool((posterior["scale"] > 0).all())


def test_several_sites_with_an_atom_name_theirs() -> None:
    def program(y: Tensor, num_data: int) -> None:
        with data_plate(y, num_data):
            fast = pyro.sample("fast", mixed((), 0.3))
            slow = pyro.sample("slow", mixed((), 0.3))
            pyro.sample("obs", dist.Normal(fast + slow, 1.0), obs=y)

    tree = to_datatree(
        program, pyro.poutine.block(program, hide=["obs"]), torch.zeros(2, dtype=F64)
    )
    assert {*tree["posterior"].data_vars} == {"fast", "slow", "fast_active", "slow_active"}


def test_one_run_a_draw_for_sampled_convolutional_atoms() -> None:
    model = SparseCoding(
        Conv(2, 1, 3),
        Gaussian(0.5),
        SpikeAndSlab(dist.Normal(0.0, 1.0), torch.tensor(0.3)),
        dictionary_prior=dist.Normal(0.0, 1.0),
    )

    def guide(y: Tensor, num_data: int) -> None:
        pyro.sample("dictionary", dist.Normal(0.0, 0.5).expand((2, 1, 3)).to_event(3))
        with data_plate(y, num_data):
            pyro.sample("codes", mixed((2, 6), 0.4, torch.float32))

    y = torch.randn(4, 1, 8)
    tree = to_datatree(model, guide, y, num_samples=5, vectorize=False)
    assert tree["posterior"]["codes"].shape == (1, 5, 4, 2, 6)
    assert tree["posterior"]["codes"].dtype == np.float32
    assert tree["prior"]["dictionary"].shape == (1, 5, 2, 1, 3)
    assert tree["posterior_predictive"]["obs"].shape == (1, 5, 4, 1, 8)


def test_masked_samples_are_predicted_and_not_scored(model: SparseCoding, y: Tensor) -> None:
    mask = torch.rand(5, 4) < 0.6
    tree = to_datatree(model, guide, y, num_samples=20, mask=mask, per_observation=True)
    hidden = ~np.broadcast_to(mask.numpy(), (1, 20, 5, 4))
    assert (tree["log_likelihood"]["obs"].values[hidden] == 0).all()
    assert (tree["log_likelihood"]["obs"].values[~hidden] != 0).all()
    assert tree["posterior_predictive"]["obs"].values[hidden].std() > 0.3
    total = to_datatree(model, guide, y, num_samples=20, mask=mask)["log_likelihood"]["obs"]
    np.testing.assert_allclose(tree["log_likelihood"]["obs"].sum("obs_dim_0"), total)


def test_names_of_dims_and_coords(model: SparseCoding, y: Tensor) -> None:
    coords = {"atom": ["a", "b", "c"], "data": [10, 20, 30, 40, 50]}
    tree = to_datatree(
        model,
        guide,
        y,
        num_samples=4,
        dims={"codes": ["atom"], "obs": ["data", "pixel"]},
        coords=coords,
    )
    codes = tree["posterior"]["codes"]
    assert codes.dims == ("chain", "draw", "data", "atom")
    np.testing.assert_array_equal(codes.sel(atom="b", data=20), codes.isel(atom=1, data=1))
    assert tree["observed_data"]["obs"].dims == ("data", "pixel")
    np.testing.assert_array_equal(tree["observed_data"]["pixel"], np.arange(4))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"groups": ["posterior", "past"]}, ValueError, r"got \['past'\]"),
        ({"groups": "posterior"}, ValueError, "posterior"),
        ({"dims": {"code": ["atom"]}}, ValueError, r"got \['code'\]"),
        ({"dims": {"codes": ["atom", "more", "most"]}}, ValueError, "Expected 1 names"),
        ({"dims": {"codes": ["rows", "atom"]}}, ValueError, "Expected 1 names"),
        ({"dims": {"codes": ["draw"]}}, ValueError, "different names"),
        ({"dims": {"codes": "atom"}}, TypeError, "list of names"),
        ({"dims": {"codes": ["x"], "obs": ["x"]}}, ValueError, "one size, got 4"),
        ({"coords": {"atom": [1]}}, ValueError, r"got \['atom'\]"),
        ({"coords": {"data": [1, 2]}}, ValueError, "got 5 at site 'codes' and 2 in coords"),
        ({"num_samples": 0}, ValueError, "num_samples"),
        ({"num_prior_samples": 0}, ValueError, "num_prior_samples"),
        ({"max_bytes": 0}, ValueError, "max_bytes"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_are_checked(
    model: SparseCoding, y: Tensor, options: dict[str, Any], kind: Any, message: str
) -> None:
    with pytest.raises(kind, match=message):
        to_datatree(model, guide, y, **{"num_samples": 3, **options})


def test_a_point_estimate_is_refused() -> None:
    def model(y: Tensor, num_data: int) -> None:
        with data_plate(y, num_data):
            pyro.sample("obs", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    with pytest.raises(ValueError, match="point estimate"):
        to_datatree(model, AutoDelta(model), torch.zeros(3))


def test_memory_is_said_before_any_is_taken(
    model: SparseCoding, y: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    # 1e12 draws could not be allocated: the error comes before.
    with pytest.raises(ValueError, match=r"MiB.*posterior.*Nothing was allocated.*num_samples"):
        to_datatree(model, guide, y, num_samples=10**12)
    with caplog.at_level(logging.INFO, "pyro_sparse.diagnostics.datatree"):
        tree = to_datatree(model, guide, y, num_samples=1000, num_prior_samples=10)
    size = sum(
        value.nbytes for child in tree.children.values() for value in child.data_vars.values()
    )
    assert f"needs {size / 2**20:,.1f} MiB" in caplog.text
    to_datatree(model, guide, y, num_samples=1000, num_prior_samples=10, max_bytes=size)
    with pytest.raises(ValueError, match="Lower num_samples"):
        to_datatree(model, guide, y, num_samples=1000, num_prior_samples=10, max_bytes=size - 1)


def test_groups_are_left_out_on_request(model: SparseCoding, y: Tensor) -> None:
    tree = to_datatree(model, guide, y, num_samples=9, groups=["sample_stats", "posterior"])
    assert list(tree.children) == ["posterior", "sample_stats"]
    # Draws are a function of the seed, whatever else is drawn.
    whole = to_datatree(model, guide, y, num_samples=9)
    np.testing.assert_array_equal(tree["posterior"]["codes"], whole["posterior"]["codes"])


def test_draws_do_not_depend_on_what_else_is_drawn(model: SparseCoding, y: Tensor) -> None:
    some = to_datatree(model, guide, y, num_samples=9, chunk_size=2, groups=["posterior"])
    whole = to_datatree(model, guide, y, num_samples=9, chunk_size=2)
    np.testing.assert_array_equal(some["posterior"]["codes"], whole["posterior"]["codes"])


def test_nothing_global_moves(model: SparseCoding, y: Tensor) -> None:
    random, store = torch.get_rng_state(), pyro.get_param_store().get_state()
    to_datatree(model, guide, y, num_samples=3)
    assert torch.equal(random, torch.get_rng_state())
    assert pyro.get_param_store().get_state() == store


def test_arviz_reads_it(model: SparseCoding, y: Tensor, tmp_path: Path) -> None:
    tree = to_datatree(model, guide, y, num_samples=200)
    data = arviz.InferenceData.from_datatree(tree)
    assert data.groups() == list(GROUPS) and data.attrs["inference"] == "variational"
    summary = arviz.summary(data, kind="stats", var_names=["active"], round_to="none")
    np.testing.assert_allclose(
        summary["mean"], tree["posterior"]["active"].mean(("chain", "draw")).values.ravel()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arviz, about k-hat
        result = arviz.loo(data, pointwise=True)
    assert result.pareto_k.dims == ("data",)
    _, shape = arviz.psislw(tree["sample_stats"]["log_weight"].values[0].T.copy())
    ours = khat(torch.from_numpy(tree["sample_stats"]["log_weight"].values[0]))
    fitted = np.isfinite(shape)
    np.testing.assert_allclose(ours[torch.from_numpy(fitted)], shape[fitted], atol=1e-8)
    back = data.to_datatree()
    xr.testing.assert_identical(back["posterior"].to_dataset(), tree["posterior"].to_dataset())
    tree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    read = xr.open_datatree(tmp_path / "tree.nc", engine="h5netcdf")
    assert read["posterior"]["active"].dtype == np.int8 and read.attrs == tree.attrs
    xr.testing.assert_equal(read["posterior"].to_dataset(), tree["posterior"].to_dataset())
    read.close()
    from_file = arviz.from_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    assert from_file.groups() == list(GROUPS)


@pytest.mark.parametrize("plot", ["plot_trace", "plot_forest", "plot_violin"])
def test_arviz_plots_which_codes_are_active(model: SparseCoding, y: Tensor, plot: str) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    data = arviz.InferenceData.from_datatree(to_datatree(model, guide, y[:1], num_samples=50))
    pyplot.switch_backend("agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arviz, about layouts
        assert getattr(arviz, plot)(data, var_names=["active"]) is not None
    pyplot.close("all")


def test_arviz_plots_predictive_levels_of_each_observation(model: SparseCoding, y: Tensor) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    tree = to_datatree(model, guide, y, num_samples=200, per_observation=True)
    pyplot.switch_backend("agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arviz, about k-hat
        assert arviz.plot_loo_pit(arviz.InferenceData.from_datatree(tree), y="obs") is not None
    pyplot.close("all")


def test_every_figure_is_finite_where_a_guide_covers(model: SparseCoding, y: Tensor) -> None:
    tree = to_datatree(model, guide, y, num_samples=50)
    for child in tree.children.values():
        for value in child.data_vars.values():
            assert np.isfinite(value.astype(float)).all()
    assert math.isfinite(float(tree["sample_stats"]["log_weight"].mean()))
