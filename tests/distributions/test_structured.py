"""Dependent spike-and-slab codes: density, draws, gradients and divergence by quadrature."""

import math

import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_sparse.distributions import SpikeAndSlab
from pyro_sparse.distributions.structured import StructuredSpikeAndSlab

# Two codes, with neither gate nearly decided, scales that are not small against the range of the
# quadrature, and a coupling that matters. The values above the diagonal are not to be read.
PARAMETERS = {
    "logits": torch.tensor([-0.6, -1.2], dtype=torch.float64),
    "loc": torch.tensor([0.5, 0.9], dtype=torch.float64),
    "scale": torch.tensor([0.6, 0.5], dtype=torch.float64),
    "couplings": torch.tensor([[7.0, 5.0], [0.8, 3.0]], dtype=torch.float64),
}
PRIOR = SpikeAndSlab(
    dist.Normal(torch.zeros(2, dtype=torch.float64), 1.3), probs=torch.tensor(0.3)
).to_event(1)
GRID = torch.linspace(-9, 9, 501, dtype=torch.float64)  # trapezoid: exact for smooth tails
STEP = float(GRID[1] - GRID[0])


def fresh(**changes: Tensor) -> dict[str, Tensor]:
    found = {name: value.clone() for name, value in (PARAMETERS | changes).items()}
    return {name: value.requires_grad_() for name, value in found.items()}


def normal(value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return (-((value - loc) ** 2) / (2 * scale**2)).exp() / (scale * math.sqrt(2 * math.pi))


def gate(logits: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return 1 / (1 + (-logits - loc**2 / (2 * scale**2)).exp())


def table(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Nodes (zero first) and their joint mass for two codes, by the formulas of the docstring."""
    nodes = torch.cat([torch.zeros(1, dtype=torch.float64), GRID])
    logits, loc, scale, coupling = (
        parameters["logits"],
        parameters["loc"],
        parameters["scale"],
        parameters["couplings"][1, 0],
    )
    first = gate(logits[0], loc[0], scale[0])
    mass_first = torch.cat([(1 - first)[None], first * normal(GRID, loc[0], scale[0]) * STEP])
    loc_second = loc[1] - coupling * nodes
    second = gate(logits[1], loc_second, scale[1])
    slab = normal(GRID, loc_second[:, None], scale[1]) * STEP
    mass_second = torch.cat([(1 - second)[:, None], second[:, None] * slab], 1)
    return nodes, mass_first[:, None] * mass_second


def mean_of(values: Tensor, mass: Tensor) -> Tensor:
    return (values * mass).sum()


def smooth(codes: Tensor) -> Tensor:
    """A function that is continuous across the atoms and couples the codes."""
    first, second = codes.unbind(-1)
    return (first + 0.4).sin() + (first - second) ** 2 / 3 + (first * second + second).tanh()


def pairs(nodes: Tensor) -> Tensor:
    return torch.stack(torch.meshgrid(nodes, nodes, indexing="ij"), -1)


def repeated(draws: int) -> dict[str, Tensor]:
    """Parameters of their own for every draw, so that each has a gradient of its own."""
    return {
        name: value.expand(draws, *value.shape).clone().requires_grad_()
        for name, value in PARAMETERS.items()
    }


def assert_mean(values: Tensor, expected: Tensor) -> None:
    error = values.std(0) / math.sqrt(len(values))
    score = (values.mean(0) - expected) / error.clamp(min=1e-12)
    assert score.abs().max() < 4, (score, values.mean(0), expected)


# Density ------------------------------------------------------------------------------------------


def test_the_density_is_that_of_the_formulas_and_has_mass_one() -> None:
    law = StructuredSpikeAndSlab(**PARAMETERS)
    nodes, mass = table(PARAMETERS)
    assert abs(float(mass.sum()) - 1) < 1e-10
    step = torch.tensor([1.0] + [STEP] * len(GRID), dtype=torch.float64)
    density = mass / (step[:, None] * step)
    # The grid has a node at zero, which stands for the atom in log_prob: leave it out.
    keep = torch.cat([torch.tensor([True]), GRID.abs() > 1e-9])
    found = law.log_prob(pairs(nodes)).exp()
    torch.testing.assert_close(found[keep][:, keep], density[keep][:, keep], rtol=1e-9, atol=1e-14)


def test_three_codes_follow_the_recursion() -> None:
    """scipy's normal law in a loop, at values with and without zeros."""
    torch.manual_seed(3)
    logits, loc, scale = torch.randn(3), torch.randn(3), torch.rand(3) + 0.3
    couplings = torch.randn(3, 3)
    law = StructuredSpikeAndSlab(logits, loc, scale, couplings)
    for value in ([0.0, 0.0, 0.0], [0.7, 0.0, -1.2], [0.3, -0.4, 0.0], [-1.0, 0.2, 0.5]):
        expected = 0.0
        for k in range(3):
            where = float(loc[k]) - sum(float(couplings[k, j]) * value[j] for j in range(k))
            odds = math.exp(float(logits[k]) + where**2 / (2 * float(scale[k]) ** 2))
            active = math.log(odds / (1 + odds)) + stats.norm(where, float(scale[k])).logpdf(
                value[k]
            )
            expected += active if value[k] else -math.log1p(odds)
        assert float(law.log_prob(torch.tensor(value))) == pytest.approx(expected, rel=2e-5)


def test_the_last_code_is_exact_for_gaussian_data() -> None:
    """Against the joint density of model and data on a grid of the last code."""
    torch.manual_seed(1)
    atoms = torch.randn(3, 4, dtype=torch.float64)
    y, noise, width, probs = torch.randn(4, dtype=torch.float64), 0.6, 1.4, 0.2
    scale = (atoms.square().sum(1) / noise**2 + 1 / width**2) ** -0.5
    couplings = scale[:, None] ** 2 * (atoms @ atoms.T) / noise**2
    logits = math.log(probs / (1 - probs)) + (scale / width).log()
    law = StructuredSpikeAndSlab(logits, scale**2 * (atoms @ y) / noise**2, scale, couplings)
    for before in ([0.0, 0.0], [0.8, 0.0], [-0.5, 1.1]):
        codes = torch.tensor([*before, 0.0], dtype=torch.float64)
        last = torch.cat([torch.zeros(1, dtype=torch.float64), GRID])
        residual = y - codes @ atoms - last[:, None] * atoms[2]
        weight = torch.cat(
            [
                torch.tensor([1 - probs], dtype=torch.float64),
                probs
                * normal(GRID, torch.zeros(()), torch.tensor(width, dtype=torch.float64))
                * STEP,
            ]
        )
        mass = weight * (-residual.square().sum(1) / (2 * noise**2)).exp()
        mass = mass / mass.sum()
        found = law.given(codes)
        torch.testing.assert_close(found.prob_active[2], 1 - mass[0], rtol=1e-9, atol=0)
        torch.testing.assert_close(found.mean[2], (mass * last).sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", [(), (3,), (2, 1)], ids=str)
def test_without_couplings_the_codes_are_independent(shape: tuple[int, ...]) -> None:
    logits, loc, scale = (torch.randn(*shape, 4) for _ in range(3))
    law = StructuredSpikeAndSlab(logits, loc, scale.exp(), torch.zeros(4, 4))
    same = SpikeAndSlab(
        dist.Normal(loc, scale.exp()), logits=logits + loc**2 / (2 * (2 * scale).exp())
    ).to_event(1)
    value = same.sample((50,))
    assert law.batch_shape == same.batch_shape and law.event_shape == same.event_shape
    torch.testing.assert_close(law.log_prob(value), same.log_prob(value))
    prior = SpikeAndSlab(dist.Normal(0.0, 1.0), probs=0.2).expand((4,)).to_event(1)
    expected = kl_divergence(same, prior.expand(shape)).expand(50, *shape)
    torch.testing.assert_close(law.kl_given(value, prior), expected, rtol=1e-4, atol=1e-4)


# Draws --------------------------------------------------------------------------------------------

DRAWS = {
    "sample": lambda law, shape: law.sample(shape),
    "rsample": lambda law, shape: law.rsample(shape),
    "given gates": lambda law, shape: law.rsample_given_gates(shape)[0],
}


@pytest.mark.parametrize("how", DRAWS)
def test_draws_have_the_frequencies_and_moments_of_the_density(how: str) -> None:
    law = StructuredSpikeAndSlab(**PARAMETERS)
    value = DRAWS[how](law, (40_000,)).detach()
    nodes, mass = table(PARAMETERS)
    atoms = torch.stack([mass[0, 0], mass[0, 1:].sum(), mass[1:, 0].sum(), mass[1:, 1:].sum()])
    active = (value != 0).long()
    counts = torch.bincount(2 * active[:, 0] + active[:, 1], minlength=4)
    assert stats.chisquare(counts, 40_000 * atoms / atoms.sum()).pvalue > 1e-4
    grid = pairs(nodes)
    assert_mean(smooth(value), mean_of(smooth(grid), mass))
    assert_mean(value.prod(-1), mean_of(grid.prod(-1), mass))


def test_the_log_probability_of_gates_is_that_of_the_zeros_drawn() -> None:
    law = StructuredSpikeAndSlab(**PARAMETERS)
    value, log_gates = law.rsample_given_gates((7, 5))
    active = law.given(value).prob_active
    expected = torch.where(value != 0, active, 1 - active).log().sum(-1)
    assert log_gates.shape == (7, 5)
    torch.testing.assert_close(log_gates, expected)


def test_marginals_are_those_of_the_density() -> None:
    torch.manual_seed(2)
    draws = 20_000
    found = StructuredSpikeAndSlab(**PARAMETERS).marginals(draws)
    nodes, mass = table(PARAMETERS)
    for k in range(2):
        codes = pairs(nodes)[..., k]
        mean = mean_of(codes, mass)
        variance = mean_of((codes - mean) ** 2, mass)
        prob = 1 - mass.select(k, 0).sum()
        # Conditional moments vary less than the codes themselves.
        assert abs(found.prob_active[k] - prob) < 4 * 0.5 / math.sqrt(draws)
        assert abs(found.mean[k] - mean) < 4 * math.sqrt(variance / draws)
        assert abs(found.variance[k] - variance) < 4 * 2 * variance / math.sqrt(draws)


# Gradients ----------------------------------------------------------------------------------------


def reference(kind: str) -> dict[str, Tensor]:
    """Gradients of an expectation by differentiating its quadrature."""
    parameters = fresh()
    nodes, mass = table(parameters)
    if kind == "smooth":
        total = mean_of(smooth(pairs(nodes)), mass)
    else:
        # Of the atom the density is a probability; log-ratios to the prior, by the same formulas.
        prior = torch.cat(
            [
                torch.tensor([0.7], dtype=torch.float64),
                0.3 * normal(GRID, torch.zeros(()), PRIOR.base_dist.slab.scale[0]) * STEP,
            ]
        )
        # Masses far in the tails underflow; they weigh nothing.
        ratio = mass.clamp(min=1e-300).log() - prior.log()[:, None] - prior.log()
        total = mean_of(ratio, mass)
    gradients = torch.autograd.grad(total, list(parameters.values()))
    return dict(zip(parameters, gradients)) | {"total": total.detach()}


@pytest.mark.parametrize("kind", ["smooth", "kl"])
@pytest.mark.parametrize("how", ["rsample", "given gates"])
def test_gradients_agree_with_quadrature(kind: str, how: str) -> None:
    draws = 30_000
    parameters = repeated(draws)
    law = StructuredSpikeAndSlab(**parameters)
    if how == "rsample":
        value, score = law.rsample(), torch.zeros(draws)
    else:
        value, score = law.rsample_given_gates()
    terms = smooth(value) if kind == "smooth" else law.kl_given(value, PRIOR)
    expected = reference(kind)
    centred = (terms - expected["total"]).detach()
    (terms + centred * score).sum().backward()
    assert_mean(terms.detach(), expected["total"])
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        assert_mean(parameter.grad, expected[name])


def test_a_draw_is_detached_and_a_pathwise_one_is_not_announced() -> None:
    parameters = fresh()
    law = StructuredSpikeAndSlab(**parameters)
    assert not law.has_rsample
    assert not law.sample((3,)).requires_grad
    assert law.rsample((3,)).requires_grad


# Shapes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_datum", [False, True])
def test_expand_keeps_the_law(per_datum: bool, dtype: torch.dtype) -> None:
    couplings = torch.randn(3, 4, 4, dtype=dtype) if per_datum else torch.randn(4, 4, dtype=dtype)
    law = StructuredSpikeAndSlab(
        torch.randn(3, 4, dtype=dtype), torch.randn(4, dtype=dtype), torch.ones(4).to(dtype),
        couplings,
    )  # fmt: skip
    more = law.expand((2, 3))
    assert (law.batch_shape, more.batch_shape, more.event_shape) == ((3,), (2, 3), (4,))
    value = more.sample((5,))
    assert value.shape == (5, 2, 3, 4) and value.dtype == dtype
    torch.testing.assert_close(more.log_prob(value), law.log_prob(value))
    again, log_gates = more.rsample_given_gates((5,))
    assert again.shape == (5, 2, 3, 4) and log_gates.shape == (5, 2, 3)
    assert law.support.check(value).all()
    assert not law.support.check(torch.full((4,), torch.nan)).all()


def test_couplings_of_each_datum_are_its_own() -> None:
    logits, loc, couplings = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4, 4)
    law = StructuredSpikeAndSlab(logits, loc, torch.ones(4), couplings)
    value = law.sample((6,))
    apart = [
        StructuredSpikeAndSlab(logits[n], loc[n], torch.ones(4), couplings[n]).log_prob(value[:, n])
        for n in range(3)
    ]
    torch.testing.assert_close(law.log_prob(value), torch.stack(apart, -1))


def test_a_small_scale_stays_finite_in_float32() -> None:
    """An atom of a strong signal: log-odds in the thousands, and its gradient."""
    loc = torch.tensor([3.0, 3.0], requires_grad=True)
    couplings = torch.tensor([[0.0, 0.0], [0.95, 0.0]], requires_grad=True)
    law = StructuredSpikeAndSlab(torch.tensor([-4.0, -4.0]), loc, torch.full((2,), 0.02), couplings)
    prior = SpikeAndSlab(dist.Normal(0.0, 1.0), probs=0.2).expand((2,)).to_event(1)
    value, log_gates = law.rsample_given_gates((100,))
    (law.kl_given(value, prior) + log_gates).sum().backward()
    assert torch.isfinite(law.log_prob(value.detach())).all()
    for parameter in (loc, couplings):
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all()


# Errors -------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    ones, square = torch.ones(3), torch.zeros(3, 3)
    with pytest.raises(TypeError, match="Expected scale to be a tensor, got float"):
        StructuredSpikeAndSlab(ones, ones, 1.0, square)
    for logits, couplings in ((torch.tensor(0.0), square), (ones, torch.zeros(2, 2)), (ones, ones)):
        with pytest.raises(ValueError, match=r"couplings of shape \(..., atoms, atoms\)"):
            StructuredSpikeAndSlab(logits, ones, ones, couplings)
    with pytest.raises(ValueError, match="scale"):
        StructuredSpikeAndSlab(ones, ones, -ones, square, validate_args=True)
    law = StructuredSpikeAndSlab(ones, ones, ones, square, validate_args=True)
    with pytest.raises(ValueError, match="support"):
        law.log_prob(torch.full((3,), torch.nan))


@pytest.mark.parametrize("name", ["prob_active", "mean", "variance"])
def test_a_marginal_without_a_closed_form_points_to_its_estimate(name: str) -> None:
    law = StructuredSpikeAndSlab(torch.ones(3), torch.ones(3), torch.ones(3), torch.zeros(3, 3))
    with pytest.raises(NotImplementedError, match=rf"marginals\(num_samples\).{name}"):
        getattr(law, name)
    assert getattr(law.marginals(10), name).shape == (3,)


def test_priors_without_a_closed_form_are_refused() -> None:
    ones = torch.ones(3)
    law = StructuredSpikeAndSlab(ones, ones, ones, torch.zeros(3, 3))
    value = law.sample()
    with pytest.raises(ValueError, match=r"event shape \(3,\), got \(\)"):
        law.kl_given(value, SpikeAndSlab(dist.Normal(ones, 1.0), probs=0.5))
    with pytest.raises(ValueError, match="atom at zero"):
        law.kl_given(value, dist.Normal(ones, 1.0).to_event(1))
    with pytest.raises(NotImplementedError, match="independent codes, got Structured"):
        law.kl_given(value, law)
