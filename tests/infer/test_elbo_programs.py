"""What an objective finds out about programs, keeps apart, and refuses."""

import copy
import itertools
import math
import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_sparse.dictionaries import Dense
from pyro_sparse.distributions.mixed import SpikeAndSlab
from pyro_sparse.distributions.structured import StructuredSpikeAndSlab
from pyro_sparse.guides import Heads, Thresholded
from pyro_sparse.infer import (
    ImplicitMixed,
    Importance,
    LeaveOneOut,
    SparseELBO,
    fit,
)
from pyro_sparse.infer.estimators import Exact
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding


def in_turn(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        a = pyro.sample("a", SpikeAndSlab(dist.Normal(torch.zeros(2), 0.5), 0.5).to_event(1))
        pyro.sample("b", SpikeAndSlab(dist.Normal(-2 * a, 0.5), 0.5).to_event(1))


def apart(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        for name in ("a", "b"):
            law = SpikeAndSlab(dist.Normal(torch.zeros(2), 0.5), 0.5)
            pyro.sample(name, law.to_event(1))


def gated(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        law = SpikeAndSlab(dist.Normal(torch.zeros(2), 1.0), 0.5).to_event(1)
        a, b = pyro.sample("a", law), pyro.sample("b", law)
        pyro.sample("obs", dist.Normal(a + b, 0.5).to_event(1), obs=y)


def test_what_was_found_out_about_one_guide_is_not_taken_for_another() -> None:
    y, objective = torch.randn(50, 2), SparseELBO()
    objective.loss(gated, apart, y)
    objective.loss(gated, in_turn, y)
    assert objective.choice(gated, apart) == "Exact()"
    assert "do not depend on codes drawn before" in objective.choice(gated, in_turn)


@pytest.mark.parametrize("how", ["comparison", "detached", "point"])
def test_exact_is_refused_where_a_guide_goes_on_with_its_draws(how: str) -> None:
    y = torch.randn(50, 2)

    def guide(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            a = pyro.sample("a", SpikeAndSlab(dist.Normal(torch.zeros(2), 0.5), 0.5).to_event(1))
            seen = {"comparison": lambda: (a != 0).float(), "detached": a.detach, "point": a.neg}
            loc = seen[how]()
            pyro.sample("b", SpikeAndSlab(dist.Normal(loc, 0.5), 0.5).to_event(1))

    with torch.inference_mode():
        SparseELBO().loss(gated, guide, y)
    objective = SparseELBO()
    objective.loss(gated, guide, y)
    assert objective.choice(gated).startswith("ImplicitMixed")
    with pytest.raises(NotImplementedError, match="do not depend on codes drawn before"):
        SparseELBO(Exact()).loss(gated, guide, y)


def test_a_discrete_latent_beside_codes_keeps_its_gradient() -> None:
    y = torch.tensor([1.0, 2.5], dtype=torch.float64)
    b = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    q = SpikeAndSlab(dist.Normal(torch.tensor([0.2, -0.5], dtype=torch.float64), 0.6), 0.4)
    p = SpikeAndSlab(dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0), 0.3)

    def model() -> None:
        with pyro.plate("data", 2):
            s = pyro.sample("s", dist.Bernoulli(torch.tensor(0.2, dtype=torch.float64)))
            z = pyro.sample("z", p)
            pyro.sample("obs", dist.Normal(z + 3 * s, 1.0), obs=y)

    def guide() -> None:
        with pyro.plate("data", 2):
            pyro.sample("s", dist.Bernoulli(logits=b.expand(2)))
            pyro.sample("z", q)

    probs = b.sigmoid()
    square = [(y - q.mean - 3 * s).square() + q.variance for s in (0, 1)]
    expected = -((1 - probs) * square[0] + probs * square[1]) / 2
    kl = probs * (probs / 0.2).log() + (1 - probs) * ((1 - probs) / 0.8).log()
    (truth,) = torch.autograd.grad((expected - kl).sum(), b)
    objective = SparseELBO(num_samples=500)
    found = torch.stack([
        torch.autograd.grad(-objective.differentiable_loss(model, guide), b)[0] for _ in range(40)
    ])  # fmt: skip
    error = found.std() / 40**0.5
    assert abs(found.mean() - truth) < 4 * error and error < 0.1 * abs(truth)


def test_plates_that_share_a_dimension_are_told_apart() -> None:
    atoms = torch.randn(2, 2, dtype=torch.float64)
    y = torch.randn(2, dtype=torch.float64)
    logits = torch.tensor([0.3, -0.4], dtype=torch.float64, requires_grad=True)
    prior = SpikeAndSlab(dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0), 0.3)

    def law() -> SpikeAndSlab:
        slab = dist.Normal(torch.tensor([1.5, -1.0], dtype=torch.float64), 0.3)
        return SpikeAndSlab(slab, logits=logits)

    def model() -> None:
        with pyro.plate("atoms", 2):
            z = pyro.sample("codes", prior)
        with pyro.plate("features", 2):
            pyro.sample("obs", dist.Normal(torch.tanh(z @ atoms), 0.5), obs=y)

    def guide() -> None:
        with pyro.plate("atoms", 2):
            pyro.sample("codes", law())

    codes, total = law().slab.sample((100_000,)), torch.zeros(())
    for first, second in itertools.product([0.0, 1.0], repeat=2):
        gates = torch.tensor([first, second], dtype=torch.float64)
        chance = dist.Bernoulli(logits=logits).log_prob(gates).sum().exp()
        likelihood = dist.Normal(torch.tanh((gates * codes) @ atoms), 0.5).log_prob(y)
        total = total + chance * likelihood.sum(-1).mean()
    (truth,) = torch.autograd.grad(total - kl_divergence(law(), prior).sum(), logits)
    objective = SparseELBO(LeaveOneOut(), num_samples=200)
    losses = (-objective.differentiable_loss(model, guide) for _ in range(40))
    found = torch.stack([torch.autograd.grad(loss, logits)[0] for loss in losses])
    error = found.std(0) / 40**0.5
    # The reference has a Monte Carlo error of its own, of 2e-4 in either entry.
    assert ((found.mean(0) - truth).abs() < 4 * (error + 2e-4)).all()
    assert (error < 0.1).all()


@pytest.mark.parametrize("options", [{}, {"estimator": Exact()}, {"num_samples": 5}], ids=str)
def test_data_wider_than_their_law_are_refused(options: dict[str, Any]) -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("codes", SpikeAndSlab(dist.Normal(torch.zeros(3), 1.0), 0.5))
            eta = z if "estimator" in options else z.tanh()
            pyro.sample("obs", dist.Normal(eta, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("data", 3):
            pyro.sample("codes", SpikeAndSlab(dist.Normal(torch.zeros(3), 1.0), 0.5))

    with pytest.raises(ValueError, match="Are the data wider than their law"):
        SparseELBO(**options).loss(model, guide, torch.zeros(5, 3))


def test_an_auxiliary_site_keeps_the_scale_of_its_plate() -> None:
    def model() -> None:
        with pyro.plate("data", 10, subsample_size=2):
            s = pyro.sample("s", dist.LogNormal(torch.zeros(2), 1.0))
            z = pyro.sample("codes", SpikeAndSlab(dist.Normal(torch.zeros(2), 1.0), 0.5))
            pyro.sample("obs", dist.Normal(z, s), obs=torch.ones(2))

    def guide() -> None:
        with pyro.plate("data", 10, subsample_size=2):
            u = pyro.sample("u", dist.Normal(torch.zeros(2), 0.5), infer={"is_auxiliary": True})
            pyro.sample("s", dist.Delta(u.exp(), log_density=-u))
            pyro.sample("codes", SpikeAndSlab(dist.Normal(torch.ones(2), 0.5), 0.6))

    def spread(loss: Any) -> tuple[Tensor, Tensor]:
        values = torch.tensor([loss(model, guide) for _ in range(400)])
        return values.mean(), values.var() / 400

    objective = SparseELBO()
    (own, own_error), (theirs, their_error) = spread(objective.loss), spread(Trace_ELBO().loss)
    assert objective.choice(model) == "Exact()"
    assert abs(own - theirs) < 4 * (own_error + their_error).sqrt()


def test_a_site_stands_in_the_same_plates_in_guide_and_model() -> None:
    prior = SpikeAndSlab(dist.Normal(torch.zeros(()), 1.0), 0.5)

    def model() -> None:
        z = pyro.sample("codes", prior)
        with pyro.plate("data", 3):
            pyro.sample("obs", dist.Normal(z, 1.0), obs=torch.ones(3))

    def guide() -> None:
        with pyro.plate("data", 3):
            pyro.sample("codes", prior)

    for options in ({}, {"estimator": ImplicitMixed()}, {"num_samples": 3}):
        with pytest.raises(ValueError, match=r"same plates in guide and model|its prior"):
            SparseELBO(**options).loss(model, guide)


def test_a_point_has_no_log_weights() -> None:
    def model() -> None:
        with pyro.plate("data", 2):
            z = pyro.sample("codes", dist.Laplace(torch.zeros(2), 1.0))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=torch.ones(2))

    def guide() -> None:
        with pyro.plate("data", 2):
            pyro.sample("codes", dist.Delta(torch.ones(2)))

    with pytest.raises(ValueError, match="a point has none"):
        SparseELBO(bound=Importance()).loss(model, guide)


def test_an_error_of_the_users_is_not_remembered() -> None:
    objective = SparseELBO()
    with pytest.raises(TypeError):
        objective.loss(gated, apart)
    objective.loss(gated, apart, torch.randn(3, 2))
    assert objective.choice(gated) == "Exact()"


def test_a_program_that_cannot_be_remembered_is_served() -> None:
    class Model:
        __slots__ = ()

        def __call__(self, y: Tensor) -> None:
            gated(y)

    assert math.isfinite(SparseELBO().loss(Model(), apart, torch.randn(3, 2)))


def test_a_structured_law_is_not_carried_by_moments() -> None:
    y = torch.randn(5, 2)
    law = StructuredSpikeAndSlab(
        torch.zeros(5, 2), torch.zeros(5, 2), torch.ones(5, 2), torch.zeros(2, 2)
    )

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            prior = SpikeAndSlab(dist.Normal(torch.zeros(2), 1.0), 0.5).to_event(1)
            pyro.sample("obs", dist.Normal(pyro.sample("codes", prior), 1.0).to_event(1), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("codes", law)

    with pytest.raises(
        NotImplementedError, match="site 'codes' of the guide, a StructuredSpikeAndSlab"
    ):
        SparseELBO(Exact()).loss(model, guide, y)
    objective = SparseELBO()
    objective.loss(model, guide, y)
    assert objective.choice(model).startswith(
        "ImplicitMixed(limit=50.0), since Exact carries codes"
    )


def test_the_choice_is_said_after_fit_and_an_objective_can_be_copied() -> None:
    dictionary = Dense(4, 3)
    model = SparseCoding(dictionary, Gaussian(0.5), SpikeAndSlab(dist.Normal(0.0, 1.0), 0.3))
    guide = Thresholded(Heads(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), 4, 4))
    objective = SparseELBO()
    with pytest.raises(ValueError, match="that this objective has been evaluated for"):
        objective.choice(model)
    fit(model, guide, torch.randn(20, 3), loss=objective, epochs=1, progress=False)
    assert objective.choice(model) == objective.choice(model, guide) == "Exact()"
    again = pickle.loads(pickle.dumps(objective))
    y = torch.randn(3, 3)
    assert again.loss(model, guide, y) == copy.deepcopy(objective).loss(model, guide, y)


def test_exact_takes_no_draws_and_other_bounds_take_several() -> None:
    with pytest.raises(ValueError, match=r"no num_samples with Exact\(\)"):
        SparseELBO(Exact(), num_samples=5)
    counts = []

    def counted(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("a", SpikeAndSlab(dist.Normal(torch.zeros(2), 1.0), 0.5).to_event(1))
            counts.append(z.shape)
            pyro.sample("obs", dist.Normal(z, 0.5).to_event(1), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("a", SpikeAndSlab(dist.Normal(torch.zeros(2), 0.5), 0.5).to_event(1))

    SparseELBO(bound=Importance()).loss(counted, guide, torch.randn(6, 2))
    assert counts[-1] == (10, 6, 2)
