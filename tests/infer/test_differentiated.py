"""Gradients of a dictionary as choices of objective."""

import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_sparse.dictionaries import Dense
from pyro_sparse.distributions import SpikeAndSlab
from pyro_sparse.guides import Thresholded, UnrolledEncoder, UnrolledFISTA
from pyro_sparse.infer import Differentiated, Reconstruction, SparseELBO, fit
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import Detached, Implicit, Proximal, Truncated, Unrolled

RATE = 0.3


def pair(num_steps=20):
    dictionary = Dense(15, 10).double()
    likelihood = Gaussian(torch.ones((), dtype=torch.float64))
    prior = dist.Laplace(0.0, torch.tensor(1 / RATE, dtype=torch.float64))
    model = SparseCoding(dictionary, likelihood, prior)
    guide = UnrolledFISTA(dictionary, likelihood, prior, num_steps=num_steps, shrinkage=Proximal())
    return model, guide, torch.randn(6, 10, dtype=torch.float64)


def gradient_of(objective, model, guide, *args, **kwargs):
    model.zero_grad()
    objective(model, guide)(*args, **kwargs).backward()
    return next(model.dictionary.parameters()).grad.clone()


def by_hand(model, guide, y, detach, rate):
    model.zero_grad()
    codes = guide.encode(y)
    codes = codes.detach() if detach else codes
    loss = (y - model.dictionary(codes)).square().sum() / 2 + rate * codes.abs().sum()
    loss.backward()
    return next(model.dictionary.parameters()).grad.clone()


@pytest.mark.parametrize(
    ("objective", "detach", "rate"),
    [
        (Differentiated(SparseELBO(), Detached()), True, RATE),
        (Differentiated(Trace_ELBO(), Detached()), True, RATE),
        (SparseELBO(), False, RATE),
        (Differentiated(SparseELBO(), Truncated(20)), False, RATE),
        (Reconstruction(), False, 0.0),
        (Differentiated(Reconstruction(), Detached()), True, 0.0),
    ],
    ids=["decoder", "of Pyro", "lasso", "all layers", "least squares", "decoder, no penalty"],
)
def test_the_three_gradients_are_those_written_by_hand(objective, detach, rate):
    torch.manual_seed(0)
    model, guide, y = pair()
    expected = by_hand(model, guide, y, detach, rate)
    found = gradient_of(objective, model, guide, y, len(y))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_reconstruction_is_scaled_by_its_plate_and_leaves_out_what_is_masked():
    torch.manual_seed(0)
    model, guide, y = pair()
    loss = Reconstruction()(model, guide)
    torch.testing.assert_close(loss(y, 60), 10 * loss(y, 6), rtol=1e-12, atol=0)
    mask = torch.rand(6, 10) < 0.7
    log_prob = dist.Normal(model.dictionary(guide.encode(y, mask)), 1.0).log_prob(y)
    expected = -torch.where(mask, log_prob, torch.zeros_like(log_prob)).sum()
    torch.testing.assert_close(loss(y, 6, mask=mask), expected, rtol=1e-12, atol=0)


def test_a_choice_reaches_encoders_inside_other_guides():
    torch.manual_seed(0)
    model, _, y = pair()
    spiky = SparseCoding(
        model.dictionary, model.likelihood, SpikeAndSlab(dist.Normal(0.0, 1.0), probs=0.2)
    )
    solver = Unrolled(model.dictionary, model.likelihood, num_steps=400)
    guide = Thresholded(UnrolledEncoder(solver, dist.Laplace(0.0, 1 / RATE))).double()
    deep = gradient_of(SparseELBO(), spiky, guide, y, 6)
    implicit = gradient_of(Differentiated(SparseELBO(), Implicit(tol=1e-9)), spiky, guide, y, 6)
    detached = gradient_of(Differentiated(SparseELBO(), Detached()), spiky, guide, y, 6)
    assert (implicit - deep).norm() < 1e-3 * deep.norm() < (detached - deep).norm()


def test_fit_trains_by_each_of_them():
    torch.manual_seed(0)
    for loss in (
        Differentiated(SparseELBO(), Detached()),
        Differentiated(Reconstruction(), Implicit()),
        Reconstruction(),
    ):
        model, guide, y = pair(num_steps=50)
        history = fit(model, guide, y, epochs=30, loss=loss, progress=False)
        assert history.epoch_loss[-1] < history.epoch_loss[0]


def test_reconstruction_needs_data():
    model, guide, y = pair()
    with pytest.raises(ValueError, match="a model with observed data, got the sites"):
        Reconstruction()(lambda y: None, lambda y: None)(y)


def test_arguments_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="Expected an objective, such as SparseELBO"):
        Differentiated("elbo", Detached())
    with pytest.raises(TypeError, match="gradient to be BackPropagation"):
        Differentiated(SparseELBO(), "detached")
