import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_sparse.distributions import check_prior, codes_prior, match, spread

CODE_SHAPES = [(3,), (3, 5), (3, 4, 5)]


def laplace_of_rate(rate):
    return dist.Laplace(0.0, 1 / rate)


@pytest.mark.parametrize("shape", CODE_SHAPES)
@pytest.mark.parametrize(
    "law",
    [
        dist.Laplace(0.0, 1.0),
        dist.Exponential(torch.ones(1)),
        dist.Normal(0.0, 1.0).expand((1, 1)),
    ],
    ids=["laplace", "exponential", "normal"],
)
def test_spread_is_independent_over_the_whole_shape(law, shape):
    shape = (*(2,) * (2 - len(shape)), *shape)
    wide = spread(law, shape, like=torch.zeros(1))
    assert wide.event_shape == shape
    assert wide.batch_shape == ()
    draw = wide.sample()
    expected = law.log_prob(draw).sum()
    torch.testing.assert_close(wide.log_prob(draw), expected)


def test_spread_takes_a_law_whose_entries_depend_on_each_other():
    factor = torch.tril(torch.rand(4, 4)) + torch.eye(4)
    law = dist.MultivariateNormal(torch.zeros(4), scale_tril=factor)
    wide = spread(law, (3, 4), like=torch.zeros(1))
    assert wide.event_shape == (3, 4)
    draw = wide.sample()
    torch.testing.assert_close(wide.log_prob(draw), law.log_prob(draw).sum())
    assert spread(law, (4,), like=torch.zeros(1)).event_shape == (4,)


@pytest.mark.parametrize("batch", [(), (7,), (7, 1)])
def test_spread_keeps_leading_dimensions_as_a_batch(batch):
    law = dist.Laplace(torch.zeros(*batch, 3, 1), 1.0)
    wide = spread(law, (3, 5), like=torch.zeros(1), batch=batch)
    assert wide.batch_shape == batch
    assert wide.event_shape == (3, 5)


class Own(dist.TorchDistribution):
    """A user's law without an ``expand`` of its own: Pyro wraps it."""

    arg_constraints = {}
    support = dist.constraints.real

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape, validate_args=False)

    def log_prob(self, value):
        return -(value - self.loc).square()


@pytest.mark.parametrize(
    "law", [dist.Laplace(torch.zeros(5), 1.0), Own(torch.zeros(5)), dist.Laplace(0, 1).to_event(0)]
)
def test_spread_expands_along_the_last_dimension(law):
    assert spread(law, (3, 5), like=torch.zeros(1)).event_shape == (3, 5)


@pytest.mark.parametrize(
    ("law", "shape", "message"),
    [
        (dist.Laplace(torch.zeros(7), 1.0), (5,), r"the shape \(5,\), got batch shape \(7,\)"),
        (dist.Laplace(torch.zeros(3), 1.0), (3, 5), r"give it the batch shape \(3, 1\)"),
        (dist.Laplace(torch.zeros(3), 1.0), (3, 4, 5), r"give it the batch shape \(3, 1, 1\)"),
        (Own(torch.zeros(7)), (3, 5), r"a Own that expands.*batch shape \(3, 1\)"),
        (dist.Laplace(torch.zeros(2, 5), 1.0), (5,), r"got batch shape \(2, 5\)"),
        (dist.Laplace(torch.zeros(4), 1.0).to_event(1), (5,), r"event shape \(4,\)"),
        (dist.Laplace(torch.zeros(2, 5), 1.0).to_event(2), (5,), r"event shape \(2, 5\)"),
    ],
)
def test_a_prior_that_does_not_expand_is_refused_with_both_shapes(law, shape, message):
    with pytest.raises(ValueError, match=message):
        spread(law, shape, like=torch.zeros(1))
    with pytest.raises(ValueError, match=message):
        codes_prior(law, None, shape, like=torch.zeros(1))


@pytest.mark.parametrize("shape", CODE_SHAPES)
@pytest.mark.parametrize("batch", [(), (7,), (7, 1)])
def test_each_atoms_rate_is_shared_by_its_positions(shape, batch):
    rate = torch.rand(*batch, 3) + 0.5
    law = codes_prior(laplace_of_rate, rate, shape, like=torch.zeros(1))
    assert law.batch_shape == batch
    assert law.event_shape == shape
    codes = torch.randn(*batch, *shape)
    lengths = codes.abs().reshape(*batch, 3, -1)  # (*batch, atoms, positions)
    expected = ((rate / 2).log()[..., None] - rate[..., None] * lengths).sum((-2, -1))
    torch.testing.assert_close(law.log_prob(codes), expected)


@pytest.mark.parametrize("shape", CODE_SHAPES)
@pytest.mark.parametrize("rate", [2.0, torch.tensor(2.0)])
def test_one_rate_serves_all_atoms(shape, rate):
    law = codes_prior(laplace_of_rate, rate, shape, like=torch.zeros(1))
    assert law.batch_shape == ()
    # Laplace(0; 0, 1 / 2) is 1, and its logarithm falls off with the rate.
    torch.testing.assert_close(law.log_prob(torch.zeros(shape)), torch.tensor(0.0))
    codes = torch.randn(shape)
    torch.testing.assert_close(law.log_prob(codes), -2 * codes.abs().sum())


def test_a_rate_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"the shape \(3, 5\), got batch shape \(4, 1\)"):
        codes_prior(laplace_of_rate, torch.ones(4), (3, 5), like=torch.zeros(1))


def test_the_gradient_reaches_the_rate():
    rate = torch.ones(3, requires_grad=True)
    codes_prior(laplace_of_rate, rate, (3, 5), like=torch.zeros(1)).log_prob(
        torch.ones(3, 5)
    ).backward()
    # d/d rate of 5 log(rate / 2) - 5 rate at rate 1.
    torch.testing.assert_close(rate.grad, torch.zeros(3))


def test_a_callable_prior_may_be_a_module():
    class Prior(nn.Module):
        def forward(self, rate):
            return dist.Exponential(rate)

    assert codes_prior(Prior(), torch.ones(3), (3,), like=torch.zeros(1)).event_shape == (3,)


def test_codes_take_the_dtype_and_device_of_the_data(dtype, device):
    like = torch.zeros(1, dtype=dtype, device=device)
    laws = [
        codes_prior(dist.Laplace(0.0, 1.0), None, (3, 5), like),
        codes_prior(dist.Laplace(0.0, 1.0).mask(True), None, (3, 5), like),
        codes_prior(Own(torch.zeros(3, 1)), None, (3, 5), like),
        codes_prior(dist.Laplace(torch.zeros(5), 1.0).to_event(1), None, (3, 5), like),
        codes_prior(laplace_of_rate, torch.ones(3), (3, 5), like),
        codes_prior(laplace_of_rate, torch.ones(3, dtype=torch.float64), (3, 5), like),
    ]
    for law in laws:
        found = law.log_prob(torch.zeros(3, 5, dtype=dtype, device=device))
        assert found.dtype == dtype
        assert found.device.type == device.type


def test_match_copies_only_what_changes():
    law = dist.Laplace(torch.zeros(3), 1.0).to_event(1)
    assert match(law, torch.zeros(1)) is law
    moved = match(law, torch.zeros(1, dtype=torch.float64))
    assert type(moved) is type(law)
    assert moved.base_dist.scale.dtype == torch.float64
    assert law.base_dist.scale.dtype == torch.float32  # the user's own is left alone


def test_match_leaves_whole_numbers_alone():
    law = dist.Binomial(torch.tensor(3), logits=torch.zeros(()))
    moved = match(law, torch.zeros(1, dtype=torch.float64))
    assert moved.logits.dtype == torch.float64
    assert match(dist.Categorical(logits=torch.zeros(3)), torch.zeros(1))._num_events == 3


@pytest.mark.parametrize(
    ("prior", "has_rate"),
    [
        (dist.Laplace(0.0, 1.0), False),
        (dist.Laplace(0.0, 1.0).expand((3,)).to_event(1), False),
        (laplace_of_rate, True),
        (nn.Identity(), True),
    ],
)
def test_check_prior_lets_a_prior_pass(prior, has_rate):
    check_prior(prior, has_rate=has_rate)


@pytest.mark.parametrize(
    ("prior", "has_rate", "message"),
    [
        (dist.Laplace(0.0, 1.0), True, "callable rate -> distribution when rate is given"),
        (torch.distributions.Laplace(0.0, 1.0), False, r"pyro\.distributions\.Laplace"),
        (torch.distributions.Laplace(0.0, 1.0), True, "torch's own Laplace"),
        (laplace_of_rate, False, "Expected rate= for a prior that is a callable"),
        (3.0, False, "a callable rate -> distribution, got float"),
        (None, True, "a callable rate -> distribution, got NoneType"),
    ],
)
def test_check_prior_names_what_is_wrong(prior, has_rate, message):
    with pytest.raises(TypeError, match=message):
        check_prior(prior, has_rate=has_rate)


@pytest.mark.parametrize(
    "wrap", [lambda d: d, lambda d: d.expand((3,)).to_event(1), lambda d: d.mask(True)]
)
@pytest.mark.parametrize("scale", [nn.Parameter(torch.ones(())), 2 * nn.Parameter(torch.ones(()))])
def test_check_prior_refuses_a_parameter_inside_a_distribution(wrap, scale):
    with pytest.raises(ValueError, match=r"its \['scale'\] require a gradient.*state_dict"):
        check_prior(wrap(dist.Laplace(0.0, scale)), has_rate=False)
