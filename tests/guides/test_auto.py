"""The unrolled encoder of any program: its codes, its plates, and what it refuses."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.optimize
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from pyro_sparse import infer
from pyro_sparse.dictionaries import Conv, Dense
from pyro_sparse.distributions import SpikeAndSlab, register_prox
from pyro_sparse.guides import AutoUnrolled, UnrolledFISTA
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding
from pyro_sparse.ops import group_soft_threshold
from pyro_sparse.solvers import (
    FISTA,
    ISTA,
    Backtracking,
    Fixed,
    PowerIteration,
    Proximal,
    StepSize,
)

double = partial(torch.tensor, dtype=torch.float64)
GEOMETRIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (lambda: Dense(12, 7), (7,)),
    "conv1d": (lambda: Conv(3, 2, 4), (2, 11)),
    "conv2d": (lambda: Conv(3, 1, (3, 2), stride=(2, 1)), (1, 7, 6)),
}
geometries = pytest.mark.parametrize("geometry", GEOMETRIES)


def sparse_coding(geometry: str) -> tuple[SparseCoding, Tensor, float]:
    """A model in float64, data of sd 1, and the step that ``UnrolledFISTA`` takes."""
    build, signal_shape = GEOMETRIES[geometry]
    dictionary, likelihood = build().double(), Gaussian(0.5).double()
    model = SparseCoding(dictionary, likelihood, dist.Laplace(double(0.0), double(0.7)))
    y = torch.randn(5, *signal_shape, dtype=torch.float64)
    step = 1 / (likelihood.curvature(torch.ones(1)).max() * dictionary.squared_norm(signal_shape))
    return model, y, float(step)


def reference(model: SparseCoding, **options: Any) -> UnrolledFISTA:
    return UnrolledFISTA(
        model.dictionary, model.likelihood, model.prior, shrinkage=Proximal(), **options
    )


class TwoDictionaries(PyroModule):
    """Counts from signed and from non-negative codes over a baseline, not by ``SparseCoding``."""

    def __init__(self, num_signed: int = 9, num_positive: int = 5, num_features: int = 12) -> None:
        super().__init__()
        self.A = nn.Parameter(0.6 * torch.randn(num_signed, num_features, dtype=torch.float64))
        self.B = nn.Parameter(0.5 * torch.rand(num_positive, num_features, dtype=torch.float64))
        self.base = nn.Parameter(torch.linspace(-0.5, 2.0, num_features, dtype=torch.float64))

    def forward(self, counts: Tensor, size: int | None = None) -> None:
        K, M = len(self.A), len(self.B)
        ones = torch.ones(K, dtype=torch.float64)
        with pyro.plate("trials", len(counts), subsample_size=size) as index:
            a = pyro.sample("signed", dist.Laplace(0 * ones, 0.5 * ones).to_event(1))
            w = pyro.sample("positive", dist.Exponential(1.5 * ones.new_ones(M)).to_event(1))
            rate = (a @ self.A + w @ self.B + self.base).exp()
            pyro.sample("counts", dist.Poisson(rate).to_event(1), obs=counts[index])

    def draw(self, num: int) -> Tensor:
        with torch.no_grad():
            K, M = len(self.A), len(self.B)
            a = torch.randn(num, K, dtype=torch.float64) * (torch.rand(num, K) < 0.3)
            w = torch.rand(num, M, dtype=torch.float64) * (torch.rand(num, M) < 0.4)
            return dist.Poisson((a @ self.A + w @ self.B + self.base).exp()).sample()


def convex_map(model: TwoDictionaries, counts: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """MAP codes by L-BFGS-B on positive and negative parts, where the problem is smooth."""
    A, B, base = (p.detach().numpy() for p in (model.A, model.B, model.base))
    atoms = np.concatenate([A, -A, B])
    price = np.concatenate([np.full(2 * len(A), 1 / 0.5), np.full(len(B), 1.5)])
    signed, positive = [], []
    for y in counts.numpy():

        def cost(x: np.ndarray, y: np.ndarray = y) -> tuple[float, np.ndarray]:
            eta = x @ atoms + base
            rate = np.exp(eta)
            return float((rate - y * eta).sum() + price @ x), atoms @ (rate - y) + price

        found = scipy.optimize.minimize(
            cost,
            np.zeros(len(atoms)),
            jac=True,
            method="L-BFGS-B",
            bounds=[(0, None)] * len(atoms),
            options={"maxiter": 20000, "maxfun": 40000, "ftol": 1e-16, "gtol": 1e-9, "maxcor": 30},
        )
        plus, minus, rest = np.split(found.x, [len(A), 2 * len(A)])
        signed.append(plus - minus)
        positive.append(rest)
    return np.stack(signed), np.stack(positive)


def names_of(nodes: Any) -> set[str]:
    return {name for name, node in nodes.items() if node["type"] == "sample"}


# Codes --------------------------------------------------------------------------------------------


@geometries
@pytest.mark.parametrize("method", [FISTA(), ISTA()], ids=["fista", "ista"])
def test_a_sparse_coding_model_gets_the_codes_of_unrolled_fista(
    geometry: str, method: FISTA | ISTA
) -> None:
    model, y, step = sparse_coding(geometry)
    guide = AutoUnrolled(model, step=step, num_steps=15, method=method)
    expected = reference(model, num_steps=15, method=method).encode(y)
    assert (expected != 0).any()
    torch.testing.assert_close(guide.encode(y)["codes"], expected, rtol=0, atol=1e-12)


@geometries
def test_defaults_converge_to_the_same_codes(geometry: str) -> None:
    model, y, _ = sparse_coding(geometry)
    method = FISTA(restart=True)
    with torch.no_grad():
        expected = reference(model, num_steps=600, method=method).encode(y)
        found = AutoUnrolled(model, num_steps=300, method=method).encode(y)["codes"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_two_dictionaries_under_poisson_counts_get_a_convex_solvers_codes() -> None:
    model = TwoDictionaries()
    counts = model.draw(8)
    guide = AutoUnrolled(model, num_steps=1500, method=FISTA(restart=True))
    with torch.no_grad():
        codes = guide.encode(counts)
    signed, positive = convex_map(model, counts)
    assert (np.abs(signed) > 0.1).any() and (positive > 0.1).any()
    np.testing.assert_allclose(codes["signed"].numpy(), signed, rtol=0, atol=1e-5)
    np.testing.assert_allclose(codes["positive"].numpy(), positive, rtol=0, atol=1e-5)


def test_zeros_are_exact() -> None:
    model = TwoDictionaries()
    codes = AutoUnrolled(model).encode(model.draw(20))
    assert 0.1 < (codes["signed"] == 0).double().mean() < 0.9
    assert (codes["positive"] >= 0).all() and (codes["positive"] == 0).any()


def test_gradients_of_parameters_are_those_of_unrolled_fista() -> None:
    model, y, step = sparse_coding("dense")
    guides = AutoUnrolled(model, step=step, num_steps=6), reference(model, num_steps=6)
    gradients = []
    for guide in guides:
        loss = Trace_ELBO()(model, guide)(y, 40)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_the_gradient_through_the_layers_is_that_of_finite_differences() -> None:
    model = TwoDictionaries(3, 2, 4)
    counts = 8 + model.draw(2)
    guide = AutoUnrolled(model, step=0.02, num_steps=4)

    def codes(*values: Tensor) -> Tensor:
        program = torch.func.functional_call
        held = AutoUnrolled(
            lambda c: program(model, dict(zip(("A", "B", "base"), values)), (c,)),
            step=0.02,
            num_steps=4,
        )
        return torch.cat(list(held.encode(counts).values()), -1)

    own = [p.detach().clone().requires_grad_() for p in (model.A, model.B, model.base)]
    expected = torch.cat(list(guide.encode(counts).values()), -1)
    assert torch.equal(codes(*own), expected) and (expected != 0).sum() > 3
    assert torch.autograd.gradcheck(codes, own, eps=1e-6, atol=1e-6)


def test_no_graph_is_kept_where_no_gradient_is_taken() -> None:
    model = TwoDictionaries()
    guide, counts = AutoUnrolled(model), model.draw(3)
    with_graph = guide.encode(counts)["signed"]
    with torch.no_grad():
        without = guide.encode(counts)["signed"]
    assert with_graph.requires_grad and not without.requires_grad
    assert torch.equal(with_graph, without)


def test_a_call_draws_nothing() -> None:
    model, y, _ = sparse_coding("dense")
    before = torch.get_rng_state()
    AutoUnrolled(model)(y)
    assert torch.equal(torch.get_rng_state(), before)


def test_codes_of_a_datum_do_not_depend_on_the_others() -> None:
    model = TwoDictionaries()
    counts = model.draw(6)
    guide = AutoUnrolled(model)
    torch.testing.assert_close(
        guide.encode(counts)["signed"][2:4], guide.encode(counts[2:4])["signed"]
    )


# Step sizes ---------------------------------------------------------------------------------------


class Probe(StepSize):
    """Keeps the step size that another one takes."""

    def __init__(self, inner: StepSize) -> None:
        self.inner = inner
        self.steps: list[Tensor] = []

    def first(self, smooth: Any) -> Tensor:
        self.steps = [self.inner.first(smooth)]
        return self.steps[0]

    def advance(self, smooth: Any, point: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        codes, step = self.inner.advance(smooth, point, step)
        self.steps.append(step)
        return codes, step


def masked_gaussian(y: Tensor, atoms: Tensor, mask: Tensor, scale: Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Laplace(y.new_zeros(len(atoms)), y.new_ones(())).to_event(1))
        law = dist.Normal(z @ atoms, scale).mask(mask)
        pyro.sample("y", law.to_event(1), obs=y)


@pytest.mark.parametrize("num_atoms", [1, 3, 40, 300])
def test_power_iteration_bounds_each_datums_curvature(num_atoms: int) -> None:
    atoms = torch.randn(num_atoms, 25, dtype=torch.float64)
    y, mask = torch.randn(6, 25, dtype=torch.float64), torch.rand(6, 25) < 0.5
    scale = 0.5 + torch.rand(25, dtype=torch.float64)
    probe = Probe(PowerIteration(slack=0.1))
    AutoUnrolled(masked_gaussian, step=probe, num_steps=1).encode(y, atoms, mask, scale)
    weighted = atoms * mask[:, None] / scale  # (data, atoms, features)
    truth = torch.linalg.svdvals(weighted)[:, 0].square()
    bound = 1 / probe.steps[0].squeeze(-1)
    assert (bound >= truth).all()
    assert (bound <= 1.1 * truth * (1 + 1e-9)).all()  # an estimate from below, times the slack


def test_power_iteration_takes_all_code_sites_together() -> None:
    A = torch.randn(4, 6, dtype=torch.float64)

    def model(y: Tensor) -> None:
        zero = y.new_zeros(4)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Laplace(zero, zero + 1).to_event(1))
            w = pyro.sample("w", dist.Normal(zero, zero + 1).to_event(1))
            pyro.sample("y", dist.Normal(z @ A + w @ A, y.new_ones(())).to_event(1), obs=y)

    probe = Probe(PowerIteration(slack=0.05))
    AutoUnrolled(model, step=probe).encode(torch.randn(3, 6, dtype=torch.float64))
    truth = 2 * torch.linalg.svdvals(A)[0].square()  # of both dictionaries side by side
    torch.testing.assert_close(1 / probe.steps[0], (1.05 * truth).expand(3, 1))


def test_a_datum_without_observations_keeps_the_priors_mode() -> None:
    atoms, y = torch.randn(4, 5), torch.randn(3, 5)
    mask = torch.tensor([True, False, True])[:, None].expand(3, 5)
    for step in (PowerIteration(), Backtracking()):
        codes = AutoUnrolled(masked_gaussian, step=step).encode(y, atoms, mask, torch.ones(()))
        assert (codes["z"][1] == 0).all() and codes["z"].isfinite().all()


def test_backtracking_descends_from_a_step_that_is_far_too_long() -> None:
    model = TwoDictionaries()
    counts = model.draw(4)
    probe = Probe(Backtracking(first=1e3))
    with torch.no_grad():
        guide = AutoUnrolled(model, step=probe, num_steps=1500, method=FISTA(restart=True))
        codes = guide.encode(counts)
    signed, _ = convex_map(model, counts)
    np.testing.assert_allclose(codes["signed"].numpy(), signed, rtol=0, atol=1e-5)
    for earlier, later in zip(probe.steps, probe.steps[1:]):
        assert (later <= earlier).all()  # as FISTA needs


def test_backtracking_in_single_precision_does_not_shrink_at_convergence() -> None:
    atoms, y = torch.randn(30, 20), 30 * torch.randn(5, 20)
    probe = Probe(Backtracking())
    guide = AutoUnrolled(masked_gaussian, step=probe, num_steps=400, method=FISTA(restart=True))
    with torch.no_grad():
        guide.encode(y, atoms, torch.ones(5, 20, dtype=torch.bool), torch.ones(()))
    longest = 1 / torch.linalg.svdvals(atoms)[0].square()
    assert (probe.steps[-1] >= longest / 8).all()


def test_a_fixed_step_may_be_one_for_each_datum_or_made_anew() -> None:
    model, y, step = sparse_coding("dense")
    steps = [step, torch.full((5,), step, dtype=torch.float64), Fixed(lambda: double(step))]
    codes = [AutoUnrolled(model, step=each).encode(y)["codes"] for each in steps]
    assert torch.equal(codes[0], codes[1]) and torch.equal(codes[0], codes[2])
    with pytest.raises(ValueError, match=r"broadcasts to the data, \(5,\), got \(4,\)"):
        AutoUnrolled(model, step=torch.ones(4)).encode(y)


# Plates, scales and masks -------------------------------------------------------------------------


def test_a_subsample_scales_the_loss_and_leaves_the_step() -> None:
    model = TwoDictionaries()
    counts = model.draw(20)
    probe = Probe(PowerIteration())
    guide = AutoUnrolled(model, step=probe, num_steps=3)
    nodes = poutine.trace(guide).get_trace(counts, 5).nodes
    part, index = probe.steps[0], nodes["trials"]["value"]
    codes = guide.encode(counts)
    torch.testing.assert_close(part, probe.steps[0][index])
    assert nodes["signed"]["scale"] == 4.0
    torch.testing.assert_close(nodes["signed"]["value"], codes["signed"][index])


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, infer.SparseELBO])
def test_the_loss_of_a_subsample_is_scaled_to_all_data(elbo: Any) -> None:
    model = TwoDictionaries()
    one = model.draw(1).expand(20, -1)  # every subsample is alike
    guide = AutoUnrolled(model)
    whole, part = elbo()(model, guide)(one, 20), elbo()(model, guide)(one, 5)
    torch.testing.assert_close(whole, part)


def test_model_and_guide_see_the_same_subsample() -> None:
    model = TwoDictionaries()
    counts = model.draw(20)
    guide = AutoUnrolled(model)
    ours = poutine.trace(guide).get_trace(counts, 5)
    theirs = poutine.trace(poutine.replay(model, trace=ours)).get_trace(counts, 5)
    assert names_of(ours.nodes) == {"trials", "signed", "positive"}
    assert torch.equal(ours.nodes["trials"]["value"], theirs.nodes["trials"]["value"])
    seen = theirs.nodes["counts"]["value"]
    expected = AutoUnrolled(model).encode(seen)
    torch.testing.assert_close(ours.nodes["signed"]["value"], expected["signed"])
    # What replays the guide reaches the program inside it too.
    again = poutine.trace(poutine.replay(guide, trace=ours)).get_trace(counts, 5)
    assert torch.equal(again.nodes["trials"]["value"], ours.nodes["trials"]["value"])
    assert torch.equal(again.nodes["signed"]["fn"].v, ours.nodes["signed"]["fn"].v)


def test_a_subsample_that_the_program_states_is_used() -> None:
    model, y, step = sparse_coding("dense")
    nodes = poutine.trace(AutoUnrolled(model, step=step)).get_trace(y, 50).nodes
    assert nodes["codes"]["scale"] == 10.0
    torch.testing.assert_close(nodes["codes"]["value"], reference(model).encode(y))


@pytest.mark.parametrize("weight", [0.25, 3.0])
def test_scales_of_codes_and_data_weigh_them(weight: float) -> None:
    atoms, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)

    def model(scale: Any, price: float) -> None:
        with pyro.plate("data", 3):
            zero = y.new_zeros(6)
            with poutine.scale(scale=scale):
                z = pyro.sample("z", dist.Laplace(zero, zero + 1 / price).to_event(1))
            pyro.sample("y", dist.Normal(z @ atoms, y.new_ones(())).to_event(1), obs=y)

    guide = AutoUnrolled(model, num_steps=250, method=FISTA(restart=True))
    with torch.no_grad():
        expected = guide.encode(1.0, weight)["z"]  # a Laplace of another rate
        torch.testing.assert_close(guide.encode(weight, 1.0)["z"], expected)
        each = torch.tensor([1.0, weight, 1.0], dtype=torch.float64)
        found = guide.encode(each, 1.0)["z"]
        torch.testing.assert_close(found[1], expected[1])
        torch.testing.assert_close(found[[0, 2]], guide.encode(1.0, 1.0)["z"][[0, 2]])


def test_sites_of_different_scales_have_their_own() -> None:
    atoms, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)

    def model(first: float, second: float, scaled: bool) -> None:
        zero = y.new_zeros(3)
        with pyro.plate("data", 3):
            with poutine.scale(scale=first if scaled else 1.0):
                z = pyro.sample(
                    "z", dist.Laplace(zero, zero + (1 if scaled else 1 / first)).to_event(1)
                )
            with poutine.scale(scale=second if scaled else 1.0):
                w = pyro.sample(
                    "w", dist.Laplace(zero, zero + (1 if scaled else 1 / second)).to_event(1)
                )
            predictor = torch.cat([z, w], -1) @ atoms
            pyro.sample("y", dist.Normal(predictor, y.new_ones(())).to_event(1), obs=y)

    guide = AutoUnrolled(model, num_steps=500, method=FISTA(restart=True))
    with torch.no_grad():
        found, expected = guide.encode(0.3, 2.0, True), guide.encode(0.3, 2.0, False)
    for name in "zw":
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("how", ["law", "handler"])
def test_what_is_masked_moves_no_codes(how: str) -> None:
    atoms, y = torch.randn(6, 4), torch.randn(3, 4)
    mask = torch.tensor([True, False, True])

    def model(y: Tensor) -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Laplace(torch.zeros(6), 1.0).to_event(1))
            law = dist.Normal(z @ atoms, 1.0).to_event(1)
            with poutine.mask(mask=mask if how == "handler" else torch.tensor(True)):
                pyro.sample("y", law.mask(mask) if how == "law" else law, obs=y)

    guide = AutoUnrolled(model)
    other = torch.where(mask[:, None], y, 5.0)
    assert torch.equal(guide.encode(y)["z"], guide.encode(other)["z"])
    assert (guide.encode(y)["z"][1] == 0).all() and (guide.encode(y)["z"][0] != 0).any()


@pytest.mark.parametrize("how", ["law", "handler"])
def test_a_masked_code_has_no_penalty(how: str) -> None:
    atoms, y = torch.randn(3, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    mask = torch.tensor([True, False])

    def model() -> None:
        law = dist.Laplace(y.new_zeros(3), y.new_full((), 0.3)).to_event(1)
        with pyro.plate("data", 2):
            with poutine.mask(mask=mask if how == "handler" else torch.tensor(True)):
                z = pyro.sample("z", law.expand([2]).mask(mask) if how == "law" else law)
            pyro.sample("y", dist.Normal(z @ atoms, y.new_ones(())).to_event(1), obs=y)

    guide = AutoUnrolled(model, num_steps=500, method=FISTA(restart=True))
    with torch.no_grad():
        codes = guide.encode()["z"]
    free = torch.linalg.lstsq(atoms.T, y[1, :, None]).solution.squeeze(-1)
    torch.testing.assert_close(codes[1], free)
    assert (codes[0] - torch.linalg.lstsq(atoms.T, y[0, :, None]).solution.squeeze(-1)).norm() > 0.1


def test_codes_shared_along_a_plate_of_the_data_are_one_datum() -> None:
    """Codes in one plate, data in two: rows are data, columns belong to them."""
    atoms = torch.randn(5, 8, dtype=torch.float64)
    y = torch.randn(3, 4, 8, dtype=torch.float64)

    def model(y: Tensor) -> None:
        zero = y.new_zeros(5)
        with pyro.plate("rows", len(y), dim=-2):
            z = pyro.sample("z", dist.Laplace(zero, zero + 1).to_event(1))  # (rows, 1, 5)
            with pyro.plate("columns", y.shape[1], dim=-1):
                pyro.sample("y", dist.Normal(z @ atoms, y.new_ones(())).to_event(1), obs=y)

    def flat(y: Tensor) -> None:
        zero = y.new_zeros(5)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Laplace(zero, zero + 1).to_event(1))
            predictor = (z @ atoms).unsqueeze(-2).expand_as(y)
            pyro.sample("y", dist.Normal(predictor, y.new_ones(())).to_event(2), obs=y)

    probe = Probe(PowerIteration())
    codes = AutoUnrolled(model, step=probe)(y)["z"]
    assert codes.shape == (3, 1, 5) and probe.steps[0].shape == (3, 1)
    torch.testing.assert_close(codes.squeeze(1), AutoUnrolled(flat, step=PowerIteration())(y)["z"])
    Trace_ELBO().differentiable_loss(model, AutoUnrolled(model), y)


def test_codes_of_a_finer_plate_than_the_data_are_packed_into_their_datum() -> None:
    """Codes for every row and column whose sum along columns makes a row's data."""
    atoms = torch.randn(4, 2, 6, dtype=torch.float64)  # columns, codes, features
    y = torch.randn(3, 6, dtype=torch.float64)

    def model() -> None:
        zero = y.new_zeros(2)
        rows = pyro.plate("rows", 3, dim=-1)
        with rows, pyro.plate("columns", 4, dim=-2):
            z = pyro.sample("z", dist.Laplace(zero, zero + 1).to_event(1))  # (4, 3, 2)
        with rows:
            b = pyro.sample("b", dist.Normal(zero, zero + 1).to_event(1))
            predictor = torch.einsum("crk,ckf->rf", z, atoms) + b @ atoms[0]
            pyro.sample("y", dist.Normal(predictor, y.new_ones(())).to_event(1), obs=y)

    def flat() -> None:
        zero = y.new_zeros(8)
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Laplace(zero, zero + 1).to_event(1))
            b = pyro.sample("b", dist.Normal(zero[:2], zero[:2] + 1).to_event(1))
            predictor = z @ atoms.flatten(0, 1) + b @ atoms[0]
            pyro.sample("y", dist.Normal(predictor, y.new_ones(())).to_event(1), obs=y)

    options = {"num_steps": 300, "method": FISTA(restart=True)}
    with torch.no_grad():
        codes, expected = AutoUnrolled(model, **options)(), AutoUnrolled(flat, **options)()
    assert codes["z"].shape == (4, 3, 2)
    torch.testing.assert_close(codes["z"].transpose(0, 1).flatten(1), expected["z"])
    torch.testing.assert_close(codes["b"], expected["b"])
    infer.SparseELBO()(model, AutoUnrolled(model))()


def test_a_program_without_plates_is_one_datum() -> None:
    atoms, y = torch.randn(6, 9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)

    def model() -> None:
        zero = y.new_zeros(6)
        z = pyro.sample("z", dist.Laplace(zero, zero + 1).to_event(1))
        pyro.sample("y", dist.Normal(z @ atoms, y.new_ones(())).to_event(1), obs=y)

    def batch() -> None:
        zero = y.new_zeros(6)
        with pyro.plate("data", 1):
            z = pyro.sample("z", dist.Laplace(zero, zero + 1).to_event(1))
            pyro.sample("y", dist.Normal(z @ atoms, y.new_ones(())).to_event(1), obs=y[None])

    torch.testing.assert_close(AutoUnrolled(model)()["z"], AutoUnrolled(batch)()["z"][0])


def test_particles_have_codes_of_their_own() -> None:
    model, guide, y = with_noise()
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    assert elbo.differentiable_loss(model, guide, y).isfinite()
    with pyro.plate("particles", 3, dim=-2):
        nodes = poutine.trace(guide).get_trace(y).nodes
    codes, sigma = nodes["z"]["value"], nodes["sigma"]["value"]
    assert codes.shape == (3, 4, 6) and sigma.shape == (3, 1)
    one = guide.encode(y, rest_values={"sigma": sigma[1, 0]})["z"]
    torch.testing.assert_close(codes[1], one)


# Other latent sites -------------------------------------------------------------------------------


def with_noise() -> tuple[PyroModule, AutoUnrolled, Tensor]:
    class Noisy(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.atoms = nn.Parameter(torch.randn(6, 5))

        def forward(self, y: Tensor) -> None:
            sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
            with pyro.plate("data", len(y)):
                z = pyro.sample("z", dist.Laplace(torch.zeros(6), 1.0).to_event(1))
                law = dist.Normal(z @ self.atoms, sigma.unsqueeze(-1)).to_event(1)
                pyro.sample("y", law, obs=y)

    model = Noisy()
    rest = AutoNormal(poutine.block(model, expose=["sigma"]))
    return model, AutoUnrolled(model, rest=rest), torch.randn(4, 5)


def test_rest_is_called_first_and_its_values_are_used() -> None:
    model, guide, y = with_noise()
    nodes = poutine.trace(guide).get_trace(y).nodes
    values = nodes["_RETURN"]["value"]
    assert set(values) == {"sigma", "z"}
    expected = guide.encode(y, rest_values={"sigma": values["sigma"]})
    assert torch.equal(nodes["z"]["value"], expected["z"])
    assert not torch.equal(
        guide.encode(y, rest_values={"sigma": double(9.0).float()})["z"], values["z"]
    )


def test_every_parameter_gets_a_gradient() -> None:
    model, guide, y = with_noise()
    guide(y)  # autoguides make their parameters at the first call
    loss = Trace_ELBO()(model, guide)
    loss(y).backward()
    names = {name for name, _ in loss.named_parameters()}
    assert "model.atoms" in names and not any("guide.model" in name for name in names)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loss.parameters())


def test_rest_may_stand_in_the_same_subsampled_plate() -> None:
    y = torch.randn(20, 5)
    atoms = torch.randn(6, 5)

    def model(size: int) -> None:
        with pyro.plate("data", 20, subsample_size=size) as index:
            gain = pyro.sample("gain", dist.LogNormal(0.0, 1.0))
            z = pyro.sample("z", dist.Laplace(torch.zeros(6), 1.0).to_event(1))
            law = dist.Normal(gain[:, None] * (z @ atoms), 1.0).to_event(1)
            pyro.sample("y", law, obs=y[index])

    def rest(size: int) -> dict[str, Tensor]:
        with pyro.plate("data", 20, subsample_size=size) as index:
            return {"gain": pyro.sample("gain", dist.Delta(1.0 + index))}

    trace = poutine.trace(AutoUnrolled(model, rest=rest)).get_trace(4)
    assert torch.equal(trace.nodes["gain"]["value"], 1.0 + trace.nodes["data"]["value"])
    replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace(4)
    assert torch.equal(replayed.nodes["data"]["value"], trace.nodes["data"]["value"])


def test_data_of_codes_may_be_latent_and_given_by_rest() -> None:
    """A latent between codes and data: its law is what the codes are fitted to."""
    atoms = torch.randn(6, 5)

    def between(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Laplace(torch.zeros(6), 1.0).to_event(1))
            x = pyro.sample("x", dist.Normal(z @ atoms, 0.5).to_event(1))
            pyro.sample("y", dist.Poisson(x.exp()).to_event(1), obs=y)

    def direct(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Laplace(torch.zeros(6), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ atoms, 0.5).to_event(1), obs=x)

    x = torch.randn(3, 5)
    found = AutoUnrolled(between).encode(torch.ones(3, 5), rest_values={"x": x})["z"]
    assert torch.equal(found, AutoUnrolled(direct).encode(x)["z"])


# Refusals -----------------------------------------------------------------------------------------


def observed(z: Tensor, name: str = "y") -> None:
    pyro.sample(name, dist.Normal(z.sum(-1), 1.0), obs=torch.ones(3))


def laplace(name: str = "z", scale: Any = 1.0) -> Tensor:
    return pyro.sample(name, dist.Laplace(torch.zeros(2), scale).to_event(1))


def no_prox() -> None:
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    count = pyro.sample("count", dist.Poisson(3.0))
    with pyro.plate("data", 3):
        slab = dist.Normal(torch.zeros(2), 1.0)
        spike = pyro.sample("spike", SpikeAndSlab(slab, probs=torch.full((2,), 0.5)).to_event(1))
        observed(laplace() * sigma + count + spike)


def shared_code() -> None:
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        observed(laplace() + shift)


def dependent_codes() -> None:
    with pyro.plate("data", 3):
        z = laplace()
        observed(z + laplace("child", 1 + z.square()))


def quietly_dependent_codes() -> None:
    with pyro.plate("data", 3):
        z = laplace()
        observed(5 * z + laplace("child", torch.where(z.detach() > 0.05, 1.0, 3.0)))


def coupled_data() -> None:
    with pyro.plate("data", 3):
        z = laplace()
        observed(z - z.mean(0))


def loop() -> None:
    for index in pyro.plate("data", 3):
        z = pyro.sample(f"z_{index}", dist.Laplace(0.0, 1.0))
        pyro.sample(f"y_{index}", dist.Normal(z, 1.0), obs=torch.ones(()))


def no_data() -> None:
    with pyro.plate("data", 3):
        laplace()
        pyro.sample("y", dist.Normal(torch.zeros(3), 1.0), obs=torch.ones(3))


def no_codes() -> None:
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(torch.zeros(3), 1.0), obs=torch.ones(3))


def no_plate() -> None:
    z = pyro.sample("z", dist.Laplace(torch.zeros(3, 2), 1.0).to_event(1))
    observed(z)


def changing() -> None:
    with pyro.plate("data", 3):
        z = laplace(scale=5.0)
        observed(z)
        if (z != 0).any():
            laplace("late")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            no_prox,
            r"'sigma' \(LogNormal, without a registered prox\), 'count' \(Poisson, which is "
            r"discrete\), 'spike' \(SpikeAndSlab, which has an atom at zero\).*rest=AutoNormal\("
            r"poutine.block\(model, expose=\['sigma', 'count', 'spike'\]\)\)",
        ),
        (
            shared_code,
            r"inside plates, as \['z'\] are, got \['shift'\] outside.*expose=\['shift'\]",
        ),
        (dependent_codes, "do not depend on other codes, got 'child'"),
        (quietly_dependent_codes, "do not depend on other codes, got 'child'"),
        (coupled_data, r"codes of their own alone in the plates \['data'\], got terms of \['y'\]"),
        (loop, r"'z_0' \(Laplace, in a plate that is a loop\)"),
        (no_data, r"data that depend on the codes \['z'\], got none among \['y'\]"),
        (no_codes, r"a latent site that rest does not sample.*\['y'\]"),
        (no_plate, r"site 'z' with the dimensions of its plates, \[\], got the shape \(3,\)"),
        (changing, r"same latent sites whatever the codes are, got 'late'"),
    ],
)
def test_a_program_that_cannot_be_encoded_is_refused_by_name(
    model: Callable[[], None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AutoUnrolled(model)()


def test_what_the_refusal_says_to_write_works() -> None:
    rest = AutoDelta(poutine.block(shared_code, expose=["shift"]))
    assert set(AutoUnrolled(shared_code, rest=rest)()) == {"shift", "z"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": 3}, TypeError, "model to be a Pyro program, got int"),
        ({"rest": 3}, TypeError, "rest to be a guide of the other sites"),
        ({"num_steps": 0}, ValueError, "num_steps >= 1, got 0"),
        ({"num_steps": 1.5}, TypeError, "num_steps to be a whole number"),
        ({"method": "fista"}, TypeError, "method to be a Method"),
        ({"step": "long"}, TypeError, "step to be a StepSize"),
        ({"step": True}, TypeError, "step to be a number"),
        ({"step": -1.0}, ValueError, "finite step > 0, got -1.0"),
        ({"step": torch.ones(2, requires_grad=True)}, ValueError, "requires no gradient"),
        ({"learn_thresholds": 1}, TypeError, "learn_thresholds as a bool"),
    ],
)
def test_arguments_are_checked(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        AutoUnrolled(**({"model": no_codes} | options))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Fixed("long"), TypeError, "step to be a number"),
        (lambda: PowerIteration(0), ValueError, "num_products to be a whole number >= 1"),
        (lambda: PowerIteration(slack=0.0), ValueError, "slack > 0"),
        (lambda: PowerIteration(slack="a"), TypeError, "slack to be a number"),
        (lambda: Backtracking(shrink=1.0), ValueError, r"shrink in \(0, 1\)"),
        (lambda: Backtracking(shrink="a"), TypeError, "shrink to be a number"),
        (lambda: Backtracking(first=0.0), ValueError, "finite step > 0"),
    ],
)
def test_step_sizes_check_their_arguments(
    make: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def test_rest_has_to_return_values_by_name() -> None:
    guide = AutoUnrolled(shared_code, rest=lambda: torch.ones(()))
    with pytest.raises(TypeError, match="rest to return a dict"):
        guide()


# Learned thresholds and priors of one's own -------------------------------------------------------


def test_learned_thresholds_start_at_one_and_belong_to_atoms() -> None:
    model, y, step = sparse_coding("conv2d")
    plain = AutoUnrolled(model, step=step)
    learned = AutoUnrolled(model, step=step, learn_thresholds=True)
    torch.testing.assert_close(learned.encode(y)["codes"], plain.encode(y)["codes"])
    (factor,) = learned.parameters()
    assert factor.shape == (3,) and factor.dtype == torch.float64
    published = reference(model)
    published.encoder.shrinkage = Proximal(3).double()
    with torch.no_grad():
        published.encoder.shrinkage.log_factor.copy_(double([0.0, 1.0, -1.0]))
    factor.data = double([0.0, 1.0, -1.0])
    torch.testing.assert_close(learned.encode(y)["codes"], published.encode(y))
    Trace_ELBO()(model, learned)(y).backward()
    assert (factor.grad != 0).all()
    with pytest.raises(ValueError, match=r"codes 'codes' of \(3,\) atoms"):
        other = SparseCoding(Dense(8, 7).double(), model.likelihood, model.prior)
        learned._model = (other,)
        learned.encode(torch.randn(2, 7, dtype=torch.float64))


def test_a_prior_of_ones_own_is_taken_by_its_prox() -> None:
    class Group(dist.TorchDistribution):
        """Density ~ exp(-|z|) of a vector's length."""

        arg_constraints: dict[str, Any] = {}
        support = dist.constraints.real_vector

        def __init__(self, size: int) -> None:
            super().__init__(torch.Size(), torch.Size([size]))

        def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
            new = type(self)(*self.event_shape)
            new._batch_shape = torch.Size(batch_shape)
            return new

        def sample(self, sample_shape: Any = ()) -> Tensor:
            return torch.zeros(*sample_shape, *self.batch_shape, *self.event_shape)

        def log_prob(self, value: Tensor) -> Tensor:
            return -value.norm(dim=-1)

    @register_prox(Group)
    def _(prior: Group, value: Tensor, step: Any) -> Tensor:
        return group_soft_threshold(value, step)

    y = torch.tensor([[3.0, 4.0], [0.3, 0.4]])

    def model() -> None:
        with pyro.plate("data", 2):
            z = pyro.sample("z", Group(2))
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)

    codes = AutoUnrolled(model, step=1.0, num_steps=3)()["z"]
    torch.testing.assert_close(codes, group_soft_threshold(y, 1.0))


# Training -----------------------------------------------------------------------------------------


def test_fit_recovers_atoms_through_the_encoder() -> None:
    """The whole path: atoms of a user's program, trained by fit, from a disturbed start."""

    class Program(PyroModule):
        def __init__(self, atoms: Tensor) -> None:
            super().__init__()
            self.atoms = nn.Parameter(atoms)

        def forward(self, y: Tensor, num_data: int) -> None:
            index = torch.arange(len(y))
            unit = nn.functional.normalize(self.atoms, dim=1)
            with pyro.plate("data", num_data, subsample=index):
                z = pyro.sample("z", dist.Laplace(torch.zeros(len(unit)), 0.3).to_event(1))
                pyro.sample("y", dist.Normal(z @ unit, 0.1).to_event(1), obs=y)

    torch.manual_seed(0)
    truth = nn.functional.normalize(torch.randn(8, 12), dim=1)
    z = torch.randn(600, 8) * (torch.rand(600, 8) < 0.15)
    y = z @ truth + 0.05 * torch.randn(600, 12)
    model = Program(truth + 0.25 * torch.randn(8, 12))
    guide = AutoUnrolled(model, step=PowerIteration(8), num_steps=8)

    def match() -> Tensor:
        unit = nn.functional.normalize(model.atoms.detach(), dim=1)
        return (unit * truth).sum(1)

    assert match().min() < 0.75
    adam = partial(torch.optim.Adam, lr=3e-2)
    infer.fit(model, guide, y, optimizer=adam, epochs=20, batch_size=60, progress=False)
    assert match().min() > 0.97
    assert not pyro.get_param_store().keys()


@pytest.mark.parametrize(
    "elbo", [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, infer.SparseELBO]
)
def test_svi_moves_every_parameter(elbo: Any) -> None:
    model, guide, y = with_noise()
    guide.thresholds = AutoUnrolled(model, learn_thresholds=True).thresholds
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), elbo())
    atoms = model.atoms.detach().clone()
    for _ in range(3):
        svi.step(y)
    assert (model.atoms != atoms).all()
    assert (guide.thresholds.log_z != 0).all()
    keys = set(pyro.get_param_store().keys())
    assert "atoms" in keys and len(keys) == 4  # the model's once, thresholds, two of rest


def test_a_second_pair_in_one_session_is_trained_too() -> None:
    for _ in range(2):
        model, y, _ = sparse_coding("dense")
        guide = AutoUnrolled(model, learn_thresholds=True)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
        before = model.dictionary.atoms.detach().clone()
        for _ in range(2):
            svi.step(y)
        assert (model.dictionary.atoms != before).any()
        assert (guide.thresholds.log_codes != 0).any()


def test_a_sampled_rate_of_a_sparse_coding_model_is_left_to_rest() -> None:
    model = SparseCoding(
        Dense(6, 4),
        Gaussian(0.5),
        lambda rate: dist.Laplace(0.0, 1 / rate),
        rate=dist.Gamma(2.0, 2.0),
    )
    rest = AutoNormal(poutine.block(model, expose=["rate"]))
    guide = AutoUnrolled(model, rest=rest)
    history = infer.fit(model, guide, torch.randn(30, 4), epochs=2, batch_size=10, progress=False)
    assert np.isfinite(history.epoch_loss).all()


def test_a_bayesian_module_is_left_to_rest() -> None:
    class Program(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = PyroModule[nn.Linear](4, 5)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([5, 4]).to_event(2))

        def forward(self, y: Tensor) -> None:
            assert self.linear.weight.shape == (5, 4)  # drawn here, outside the plate
            with pyro.plate("data", len(y)):
                z = pyro.sample("inner.z", dist.Laplace(torch.zeros(4), 1.0).to_event(1))
                pyro.sample("y", dist.Normal(self.linear(z), 1.0).to_event(1), obs=y)

    model, y = Program(), torch.randn(3, 5)
    rest = AutoNormal(poutine.block(model, expose=["linear.weight"]))
    guide = AutoUnrolled(model, rest=rest, learn_thresholds=True)
    assert guide(y)["inner.z"].shape == (3, 4)
    Trace_ELBO()(model, guide)(y).backward()
    assert model.linear.bias.grad is not None


def test_a_copy_of_both_stays_a_pair() -> None:
    model, y, _ = sparse_coding("dense")
    model_copy, guide_copy = copy.deepcopy((model, AutoUnrolled(model)))
    assert guide_copy.model is model_copy
    assert list(AutoUnrolled(model).parameters()) == []


# Saving -------------------------------------------------------------------------------------------


def test_a_guide_of_a_savable_program_is_saved_with_it(tmp_path: Path) -> None:
    model, y, _ = sparse_coding("dense")
    for name, step in (
        ("a", Backtracking(shrink=0.7)),
        ("b", PowerIteration(5)),
        ("c", Fixed(0.01)),
    ):
        guide = AutoUnrolled(model, step=step, num_steps=3, learn_thresholds=True)
        expected = guide.encode(y)["codes"]
        infer.save(tmp_path / name, model=model, guide=guide)
        loaded = infer.load(tmp_path / name)
        assert loaded["guide"].model is loaded["model"]
        assert repr(loaded["guide"].step) == repr(step)
        assert torch.equal(loaded["guide"].encode(y)["codes"], expected)


def test_a_guide_of_another_program_says_what_to_register(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="guide.model: .* registered class, got .*TwoDictionaries"):
        infer.save(tmp_path / "run", guide=AutoUnrolled(TwoDictionaries()))
