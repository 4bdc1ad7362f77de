import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_sparse.likelihoods import Gaussian

PER_CHANNEL = torch.tensor([[0.5], [2.0], [0.1]], dtype=torch.float64)  # (channels, 1)
SCALES = [
    torch.tensor(0.3, dtype=torch.float64),
    PER_CHANNEL,
]
scales = pytest.mark.parametrize("scale", SCALES, ids=["one", "per_channel"])


def pair(*leading):
    shape = (*leading, 3, 4)
    return torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


@scales
@pytest.mark.parametrize("leading", [(), (3,), (2, 1)])
def test_log_prob_and_mean_are_scipys(scale, leading):
    predictor, y = pair(*leading)
    likelihood = Gaussian(scale)
    law = likelihood(predictor)
    assert law.batch_shape == predictor.shape
    assert law.event_shape == ()
    reference = scipy.stats.norm(predictor.numpy(), scale.expand_as(predictor).numpy())
    np.testing.assert_allclose(law.log_prob(y), reference.logpdf(y.numpy()), rtol=1e-12)
    np.testing.assert_allclose(likelihood.mean(predictor), reference.mean())


@scales
def test_residual_is_the_derivative_of_log_prob(scale):
    predictor, y = pair(2)
    predictor.requires_grad_()
    likelihood = Gaussian(scale)
    (score,) = torch.autograd.grad(likelihood(predictor).log_prob(y).sum(), predictor)
    torch.testing.assert_close(likelihood.residual(predictor, y), score, rtol=1e-12, atol=1e-12)


@scales
def test_curvature_is_the_largest_second_derivative(scale):
    predictor, y = pair()
    predictor.requires_grad_()
    likelihood = Gaussian(scale)
    log_prob = likelihood(predictor).log_prob(y).sum()
    (score,) = torch.autograd.grad(log_prob, predictor, create_graph=True)
    (second,) = torch.autograd.grad(score.sum(), predictor)  # elementwise: a diagonal Hessian
    bound = likelihood.curvature(y)
    torch.testing.assert_close(bound.expand_as(y), -second.expand_as(y), rtol=1e-12, atol=0)
    assert not bound.requires_grad


@scales
def test_loss_is_the_log_density_below_its_maximum(scale):
    predictor, y = pair(2)
    likelihood = Gaussian(scale)
    lost = likelihood(y).log_prob(y) - likelihood(predictor).log_prob(y)
    torch.testing.assert_close(likelihood.loss(predictor, y), lost, rtol=1e-10, atol=1e-12)


@given(y=st.floats(-3, 3), score=st.floats(-3, 3), scale=st.floats(0.2, 3))
def test_dual_is_the_infimum_over_predictors(y, score, scale):
    likelihood = Gaussian(torch.tensor(scale, dtype=torch.float64))
    y, score = torch.tensor([y, score], dtype=torch.float64)
    dual = likelihood.dual(score, y)
    predictors = torch.linspace(-40, 40, 4001, dtype=torch.float64)
    bounded = likelihood.loss(predictors, y) + score * predictors
    assert (bounded >= dual - 1e-10).all()
    # The infimum lies within half a spacing (0.01) of a grid point: 0.01**2 / (2 scale**2).
    assert bounded.min() <= dual + 0.01**2 / (2 * scale**2) + 1e-10
    # ... and at the predictor whose residual is the score it is attained.
    optimum = y - scale**2 * score
    torch.testing.assert_close(likelihood.residual(optimum, y), score, rtol=1e-9, atol=1e-12)
    attained = likelihood.loss(optimum, y) + score * optimum
    torch.testing.assert_close(attained, dual, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [5.0, torch.tensor([[3.0], [0.5]])])
def test_a_trainable_scale_stays_positive_and_finds_the_noise(scale, device):
    likelihood = Gaussian(scale, trainable=True).to(device)
    torch.testing.assert_close(likelihood.scale.detach().cpu(), torch.as_tensor(scale))
    truth = torch.tensor([[0.05], [0.02]], device=device)
    y = truth * torch.randn(2, 500, device=device)
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=0.1)
    scales = []
    for _ in range(200):
        optimizer.zero_grad()
        (-likelihood(torch.zeros_like(y)).log_prob(y).mean()).backward()
        optimizer.step()
        scales.append(likelihood.scale.detach())
    assert min(float(s.min()) for s in scales) > 0
    # The optimum is the root mean square over what shares the scale.
    squared = y.square().mean(1, keepdim=True)
    expected = squared if likelihood.scale.dim() else squared.mean()
    torch.testing.assert_close(likelihood.scale.detach(), expected.sqrt(), rtol=1e-3, atol=0)


def test_a_fixed_scale_is_a_buffer_and_a_trainable_one_a_parameter():
    fixed, learned = Gaussian(0.5), Gaussian(0.5, trainable=True)
    assert not list(fixed.parameters())
    assert list(fixed.state_dict()) == ["scale"]
    assert len(list(learned.parameters())) == 1
    assert fixed.double().scale.dtype == learned.double().scale.dtype == torch.float64
    other = Gaussian(3.0, trainable=True)
    other.load_state_dict(learned.state_dict())
    torch.testing.assert_close(other.scale, learned.scale.float())


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (1, torch.float32),
        (0.5, torch.float32),
        (np.float64(0.5), torch.float32),
        (torch.tensor(2), torch.float32),
        (torch.tensor(0.5, dtype=torch.float64), torch.float64),
    ],
)
def test_scale_is_a_floating_tensor_that_shares_nothing(scale, dtype):
    likelihood = Gaussian(scale)
    assert likelihood.scale.dtype == dtype
    likelihood.scale.fill_(9.0)
    assert float(scale) != 9.0


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(
    "scale", [0.0, -1.0, float("nan"), float("inf"), torch.tensor([1.0, 0.0]), 0]
)
def test_a_scale_that_is_none_is_refused(scale, trainable):
    with pytest.raises(ValueError, match="Expected scale > 0 and finite"):
        Gaussian(scale, trainable=trainable)
