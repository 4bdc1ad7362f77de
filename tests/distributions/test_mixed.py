"""Laws with an atom at zero: density, draws, gradients, and who refuses them."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from scipy import integrate, special, stats

from pyro_sparse.distributions import (
    Mixed,
    RelaxedSpikeAndSlab,
    SpikeAndSlab,
    check_prior,
    codes_prior,
    match,
    spread,
)
from pyro_sparse.infer import load, save

# Slabs in float64, each with scipy's own law.
SLABS = {
    "Laplace": (dist.Laplace, (0.3, 0.5), stats.laplace(0.3, 0.5)),
    "Normal": (dist.Normal, (-0.4, 0.7), stats.norm(-0.4, 0.7)),
    "Exponential": (dist.Exponential, (1.7,), stats.expon(scale=1 / 1.7)),
    "Gamma": (dist.Gamma, (2.0, 3.0), stats.gamma(2.0, scale=1 / 3.0)),
    "LogNormal": (dist.LogNormal, (0.2, 0.3), stats.lognorm(0.3, scale=math.exp(0.2))),
}
PROB = 0.3


def double(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.fixture(params=SLABS.values(), ids=SLABS)
def pair(request):
    """A law in float64 and scipy's law of its slab."""
    kind, arguments, reference = request.param
    return SpikeAndSlab(kind(*map(double, arguments)), probs=double(PROB)), reference


def integral(function, low=-40.0, high=40.0, points=(0.0, 0.3, -0.4)):
    """Adaptive quadrature, split where the densities of these tests bend."""
    edges = sorted({low, high, *points, -4.0, 4.0, -1.0, 1.0})
    return sum(
        integrate.quad(function, a, b, epsabs=1e-13, epsrel=1e-12, limit=200)[0]
        for a, b in zip(edges, edges[1:])
    )


# The law ------------------------------------------------------------------------------------------


def test_the_density_and_the_atom_are_what_they_are_said_to_be(pair):
    law, reference = pair
    z = np.linspace(0.01, 3, 31)
    ours = law.log_prob(torch.from_numpy(z)).numpy()
    np.testing.assert_allclose(ours, math.log(PROB) + reference.logpdf(z), rtol=1e-12)
    assert law.log_prob(double(0.0)).item() == pytest.approx(math.log(1 - PROB), rel=1e-14)
    assert law.log_prob(double(-0.0)).item() == pytest.approx(math.log(1 - PROB), rel=1e-14)


def test_moments_and_entropy_agree_with_quadrature(pair):
    law, reference = pair

    def active(f):
        # Quad's error: 1e-12; none of the slabs has mass of more than 1e-15 beyond 40.
        return PROB * integral(lambda z: reference.pdf(z) * f(z))

    mean, square = active(lambda z: z), active(np.square)
    assert law.mean.item() == pytest.approx(mean, abs=1e-10)
    assert law.variance.item() == pytest.approx(square - mean**2, abs=1e-10)
    assert law.prob_active.item() == pytest.approx(PROB, rel=1e-14)
    log_density = active(lambda z: special.xlogy(1, PROB) + np.maximum(reference.logpdf(z), -1e3))
    entropy = -log_density - (1 - PROB) * math.log(1 - PROB)
    assert law.entropy().item() == pytest.approx(entropy, abs=1e-9)


def test_cdf_is_the_slabs_with_a_jump(pair):
    law, reference = pair
    z = np.array([-3.0, -0.4, -1e-9, 0.0, 1e-9, 0.3, 2.0, 5.0])
    expected = PROB * reference.cdf(z) + (1 - PROB) * (z >= 0)
    np.testing.assert_allclose(law.cdf(torch.from_numpy(z)).numpy(), expected, atol=1e-14)


@pytest.mark.parametrize("name", ["Laplace", "Normal", "Exponential", "LogNormal"])
def test_icdf_inverts_cdf_and_is_zero_on_the_atom(name):
    kind, arguments, reference = SLABS[name]
    law = SpikeAndSlab(kind(*map(double, arguments)), probs=double(PROB))
    low = PROB * reference.cdf(0.0)
    u = np.linspace(0.001, 0.999, 400)
    z = law.icdf(torch.from_numpy(u))
    atom = (u > low) & (u < low + 1 - PROB)
    assert (z.numpy()[atom] == 0).all() and (z.numpy()[~atom] != 0).all()
    np.testing.assert_allclose(law.cdf(z).numpy()[~atom], u[~atom], atol=1e-10)
    back = law.icdf(law.cdf(z))
    np.testing.assert_allclose(back.numpy()[~atom], z.numpy()[~atom], atol=1e-8)


@pytest.mark.parametrize("name", ["Laplace", "Normal", "Exponential"])
def test_slopes_of_cdf_and_icdf_agree_with_finite_differences(name):
    kind, arguments, _ = SLABS[name]
    leaves = [double(a).requires_grad_() for a in (0.2, *arguments)]
    # The last two: on the atom, and the median of the slab where the gate is open.
    u = torch.tensor([0.01, 0.15, 0.9, 0.97, 0.5], dtype=torch.float64, requires_grad=True)
    z = torch.tensor([-0.7, 0.2, 0.8, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda u, z, logit, *x: (
            SpikeAndSlab(kind(*x), logits=logit).icdf(u),
            SpikeAndSlab(kind(*x, validate_args=False), logits=logit).cdf(z),
            SpikeAndSlab(kind(*x), logits=logit + 100).icdf(u),
        ),
        (u, z, *leaves),
    )


@pytest.mark.parametrize("method", ["sample", "rsample"])
def test_draws_follow_the_law(pair, method):
    law, reference = pair
    codes = getattr(law, method)((40_000,)).numpy()
    active = codes[codes != 0]
    # With another seed one of a thousand would fail by chance.
    assert stats.binomtest(len(active), len(codes), PROB).pvalue > 1e-3
    assert stats.kstest(active, reference.cdf).pvalue > 1e-3


def test_draws_are_seeded_and_detached(pair):
    law, _ = pair
    torch.manual_seed(7)
    first = law.sample((50,))
    torch.manual_seed(7)
    assert torch.equal(law.sample((50,)), first)
    gated = SpikeAndSlab(dist.Laplace(0.0, 1.0), logits=torch.zeros(3, requires_grad=True))
    assert not gated.sample().requires_grad and gated.rsample().requires_grad
    assert not gated.has_rsample and not gated.to_event(1).has_rsample


# Limits -------------------------------------------------------------------------------------------

EXTREME = [-math.inf, -1e4, -200.0, -27.6, 0.0, 16.1, 200.0, 1e4, math.inf]


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("logit", EXTREME)
def test_log_prob_and_its_gradient_hold_at_the_ends(dtype, logit, scale):
    logits = torch.tensor(logit, dtype=dtype, requires_grad=True)
    width = torch.tensor(scale, dtype=dtype, requires_grad=True)
    law = SpikeAndSlab(dist.Laplace(torch.zeros((), dtype=dtype), width), logits=logits)
    z = torch.tensor([0.0, 0.5, -3.0], dtype=dtype) * scale
    log_prob = law.log_prob(z)
    scale = width.item()  # in float32 not quite the power of ten
    slab = stats.laplace(0, scale).logpdf(z[1:].numpy().astype(float))
    gate = -np.logaddexp(0, -logit), -np.logaddexp(0, logit)
    expected = np.array([gate[1], *(gate[0] + slab)])
    rounding = torch.finfo(dtype).eps
    np.testing.assert_allclose(
        log_prob.detach().numpy(), expected, rtol=8 * rounding, atol=40 * rounding
    )
    # Where it is -inf the slope by the logit still is +-1.
    by_gate = [torch.autograd.grad(x, logits, retain_graph=True)[0].item() for x in log_prob]
    active = special.expit(logit)
    np.testing.assert_allclose(by_gate, [-active, 1 - active, 1 - active], atol=8 * rounding)
    by_width = [torch.autograd.grad(x, width, retain_graph=True)[0].item() for x in log_prob]
    size = np.array([0.5, 3.0])
    np.testing.assert_allclose(
        np.array(by_width) * scale, [0, *(size - 1)], rtol=20 * rounding, atol=20 * rounding
    )


@pytest.mark.parametrize("slab", ["Laplace", "Normal", "Exponential"])
@pytest.mark.parametrize("logit", EXTREME)
def test_everything_and_every_gradient_is_finite_at_the_ends(dtype, slab, logit):
    kind, arguments, _ = SLABS[slab]
    leaves = [torch.tensor(a, dtype=dtype, requires_grad=True) for a in arguments]
    logits = torch.tensor(logit, dtype=dtype, requires_grad=True)
    law = SpikeAndSlab(kind(*leaves), logits=logits)
    u = torch.tensor([1e-12, 1e-6, 0.3, 0.999, 1 - 1e-7], dtype=dtype)
    z = torch.tensor([0.0, 0.1, 3.0], dtype=dtype)
    results = [law.mean, law.variance, law.entropy(), law.prob_active, law.cdf(z), law.icdf(u)]
    results += [law.rsample((20,))]
    for result in results:
        assert result.isfinite().all()
        grads = torch.autograd.grad(
            result.sum(), [logits, *leaves], allow_unused=True, retain_graph=True
        )
        assert all(grad.isfinite().all() for grad in grads if grad is not None)


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_a_sure_gate_given_by_probability_makes_no_nan(prob):
    probs = torch.tensor([prob, 0.4], requires_grad=True)
    law = SpikeAndSlab(dist.Laplace(0.0, 1.0), probs)
    assert torch.equal(law.probs[0], probs[0].detach())
    (law.log_prob(torch.tensor([1.0 - prob, 0.7])).exp() + law.entropy()).sum().backward()
    assert probs.grad.isfinite().all() and probs.grad[1] != 0
    inactive = law.sample((100,))[:, 0] == 0
    assert inactive.float().mean() == 1 - prob


def test_a_gate_of_float32_keeps_its_digits_by_logits():
    logits = torch.tensor([-27.6, 16.1])
    law = SpikeAndSlab(dist.Laplace(0.0, 1.0), logits=logits)
    atom = law.log_prob(torch.zeros(2)).numpy()
    exact = -np.log1p(np.exp(logits.double().numpy()))
    np.testing.assert_allclose(atom, exact, rtol=2e-7)
    rare = -27.6 - math.log(2) - 1
    np.testing.assert_allclose(law.log_prob(torch.ones(2))[0].item(), rare, rtol=2e-7)


@pytest.mark.parametrize("logit", [-60.0, -20.0, -1.0, 0.0, 1.0, 20.0, 60.0])
def test_the_slope_of_the_gate_keeps_its_digits(logit):
    logits = torch.tensor(logit, requires_grad=True)
    active = SpikeAndSlab(dist.Laplace(0.0, 1.0), logits=logits).prob_active
    np.testing.assert_allclose(active.item(), special.expit(logit), rtol=3e-7)
    active.backward()
    slope = special.expit(logit) * special.expit(-logit)
    np.testing.assert_allclose(logits.grad.item(), slope, rtol=3e-7)


def test_float32_tails_agree_with_scipy():
    # Far below: 1e-30 of a Laplace and a Normal slab, where torch's own icdf says -inf.
    u = torch.tensor([1e-30, 1e-20, 1e-9])
    level = u.double().numpy() / PROB
    laplace = SpikeAndSlab(dist.Laplace(0.3, 0.5), PROB)
    normal = SpikeAndSlab(dist.Normal(0.3, 0.5), PROB)
    for law, reference in [(laplace, stats.laplace(0.3, 0.5)), (normal, stats.norm(0.3, 0.5))]:
        z = law.icdf(u)
        np.testing.assert_allclose(z.numpy(), reference.ppf(level), rtol=2e-6)
        expected = PROB * reference.cdf(z.double().numpy())
        # The cdf magnifies the rounding of z by its distance in scales, at most about 70.
        np.testing.assert_allclose(law.cdf(z).numpy(), expected, rtol=1e-4)
        # Near one, (1 - u) / g keeps the digits that u has.
        v = torch.tensor([1 - 2.0**-20, 1 - 2.0**-23])
        above = reference.isf((1 - v.double().numpy()) / PROB)
        np.testing.assert_allclose(law.icdf(v).numpy(), above, rtol=2e-6)


# Pathwise gradients -------------------------------------------------------------------------------


def smooth(z):
    return torch.tanh(z - 0.4) + 0.2 * z * z


REFERENCES = {
    "Laplace": lambda loc, scale: stats.laplace(loc, scale),
    "Normal": lambda loc, scale: stats.norm(loc, scale),
    "Exponential": lambda rate: stats.expon(scale=1 / rate),
}


def expected_smooth(name, logit, *arguments):
    prob, law = special.expit(logit), REFERENCES[name](*arguments)

    def f(z):
        return np.tanh(z - 0.4) + 0.2 * z * z

    slab = integral(lambda z: law.pdf(z) * f(z), points=(0.0, arguments[0], 0.4))
    return prob * slab + (1 - prob) * f(0.0)


@pytest.mark.parametrize("name", REFERENCES)
def test_the_pathwise_gradient_is_unbiased(name):
    # d E f(z) by the gate and by each parameter of the slab, against finite differences of
    # quadrature (1e-8); 200,000 draws of a law each with parameters of its own.
    values = [-0.7, *SLABS[name][1]]
    leaves = [torch.full((200_000,), v, dtype=torch.float64, requires_grad=True) for v in values]
    law = SpikeAndSlab(SLABS[name][0](*leaves[1:]), logits=leaves[0])
    grads = torch.autograd.grad(smooth(law.rsample()).sum(), leaves)
    for i, grad in enumerate(grads):
        step = np.eye(len(values))[i] * 1e-4
        up, down = (expected_smooth(name, *(values + s)) for s in (step, -step))
        truth = (up - down) / 2e-4
        error = grad.std().item() / math.sqrt(len(grad))
        assert abs(grad.mean().item() - truth) < 4 * error
        assert error < 0.1 * abs(truth)  # so that a term left out would be seen


def test_a_slab_that_codes_cannot_leave_the_atom_for_has_no_pathwise_draw():
    apart = SpikeAndSlab(dist.Uniform(1.0, 2.0), 0.5)
    with pytest.raises(NotImplementedError, match="reaches down to zero, got Uniform"):
        apart.rsample()
    assert apart.sample((50,)).unique().numel() > 2
    none = SpikeAndSlab(dist.VonMises(0.0, 1.0), 0.5)
    with pytest.raises(NotImplementedError, match="pathwise draw, got VonMises"):
        none.rsample()


def test_the_gate_velocity_of_a_one_sided_slab_is_constant():
    # (1 - F) / s = 1 / rate for an exponential.
    law = SpikeAndSlab(dist.Exponential(2.0), logits=torch.tensor(0.3))
    speed = law.gate_velocity(torch.tensor([1e-6, 1.0, 30.0]))
    expected = torch.full((3,), (1 - special.expit(0.3)) / 2)
    torch.testing.assert_close(speed, expected.float())


# Shapes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slab", SLABS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 1)], ids=str)
def test_shapes_expand_and_broadcast(shape, slab, dtype):
    kind, arguments, _ = SLABS[slab]
    law = SpikeAndSlab(
        kind(*(torch.tensor(a, dtype=dtype) for a in arguments)),
        logits=torch.linspace(-1, 1, math.prod(shape), dtype=dtype).reshape(shape),
    )
    assert law.batch_shape == shape and law.event_shape == ()
    for wide in (law, law.expand((4, 2, 3)), law.expand_by((5,))):
        draw = wide.sample((6,))
        assert draw.shape == (6, *wide.batch_shape) and draw.dtype == dtype
        torch.testing.assert_close(wide.log_prob(draw), law.log_prob(draw))
        for name in ("mean", "variance", "prob_active"):
            value = getattr(wide, name)
            assert value.shape == wide.batch_shape
            torch.testing.assert_close(value, getattr(law, name).expand(wide.batch_shape))
        assert wide.entropy().shape == wide.batch_shape
    assert type(law.expand((4, 2, 3))) is SpikeAndSlab
    event = law.expand((4, 2, 3)).to_event(2)
    assert event.batch_shape == (4,) and event.event_shape == (2, 3)
    draw = event.sample()
    torch.testing.assert_close(event.log_prob(draw), law.log_prob(draw).sum((-1, -2)))


def test_slab_and_gate_broadcast():
    law = SpikeAndSlab(dist.Laplace(torch.zeros(4, 1), 1.0), torch.full((3,), 0.2))
    assert law.batch_shape == (4, 3) == law.slab.batch_shape == law.logits.shape


def test_masks_and_plates():
    law = SpikeAndSlab(dist.Laplace(0.0, 1.0), 0.3)
    kept = torch.tensor([True, False])
    masked = law.expand((2,)).mask(kept)
    torch.testing.assert_close(
        masked.log_prob(torch.ones(2)), law.log_prob(torch.ones(2)) * kept.float()
    )

    def model():
        with pyro.plate("outer", 4, dim=-2), pyro.plate("inner", 3, dim=-1):
            return pyro.sample("codes", law)

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["codes"]["value"].shape == (4, 3)
    assert trace.nodes["codes"]["log_prob"].shape == (4, 3)


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1.0, 0.5), TypeError, "Expected slab to be a distribution"),
        ((dist.Normal(torch.zeros(2), 1.0).to_event(1), 0.5), ValueError, r"event shape \(2,\)"),
        ((SpikeAndSlab(dist.Laplace(0.0, 1.0), 0.5), 0.5), ValueError, "without an atom"),
        ((dist.Poisson(1.0), 0.5), ValueError, "continuous slab.*got Poisson"),
        ((dist.Delta(torch.tensor(1.0)), 0.5), ValueError, "continuous slab.*got Delta"),
        ((dist.Laplace(0.0, 1.0).mask(True), 0.5), ValueError, "got MaskedDistribution"),
        ((dist.Laplace(0.0, 1.0),), ValueError, "exactly one of probs and logits"),
        ((dist.Laplace(0.0, 1.0), 1.5), ValueError, r"probs in \[0, 1\]"),
        ((dist.Laplace(0.0, 1.0), math.nan), ValueError, r"probs in \[0, 1\]"),
        ((dist.Laplace(0.0, 1.0), "a"), TypeError, "probs to be a number or a tensor, got 'a'"),
        (
            (dist.Laplace(torch.zeros(3), 1.0), torch.ones(2)),
            ValueError,
            r"slab of \(3,\), probs of \(2,\)",
        ),
        (
            (RelaxedSpikeAndSlab(dist.Laplace(0.0, 1.0), 0.5, 0.5), 0.5),
            ValueError,
            r"without a gate of its own, got Relaxed.*SpikeAndSlab\(law\.slab, probs\)",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        SpikeAndSlab(*arguments)


def test_logits_are_refused_by_their_own_name():
    slab = dist.Laplace(torch.zeros(3), 1.0)
    with pytest.raises(TypeError, match="logits to be a number"):
        SpikeAndSlab(slab, logits="a")
    with pytest.raises(ValueError, match=r"slab of \(3,\), logits of \(2,\)"):
        SpikeAndSlab(slab, logits=torch.zeros(2))


@pytest.mark.parametrize(
    ("slab", "method", "missing"),
    [
        (dist.Gamma(2.0, 1.0), "icdf", "icdf"),
        (dist.StudentT(3.0), "cdf", "cdf"),
        (dist.StudentT(3.0), "icdf", "cdf"),
    ],
    ids=["Gamma-icdf", "StudentT-cdf", "StudentT-icdf"],
)
def test_a_slab_without_a_method_is_named_with_it(slab, method, missing):
    name = type(slab).__name__
    message = f"slab with a method {missing}, got {name}, which has none"
    with pytest.raises(NotImplementedError, match=message):
        getattr(SpikeAndSlab(slab, 0.3), method)(torch.tensor(0.9))


def test_a_slab_that_says_itself_what_is_missing_is_heard():
    class Told(dist.Gamma):
        def cdf(self, value):
            raise NotImplementedError("Expected less")

    with pytest.raises(NotImplementedError, match="Expected less"):
        SpikeAndSlab(Told(2.0, 1.0), 0.3).cdf(torch.tensor(0.9))


def test_both_and_nan_logits_are_refused():
    with pytest.raises(ValueError, match="exactly one"):
        SpikeAndSlab(dist.Laplace(0.0, 1.0), 0.5, logits=0.0)
    with pytest.raises(ValueError, match="logits"):
        SpikeAndSlab(dist.Laplace(0.0, 1.0), logits=math.nan, validate_args=True)


def test_values_outside_of_the_support_are_refused():
    law = SpikeAndSlab(dist.Exponential(1.0), 0.5, validate_args=True)
    with pytest.raises(ValueError, match="WithAtom"):
        law.log_prob(torch.tensor(-1.0))
    assert law.log_prob(torch.tensor([0.0, 1.0])).isfinite().all()
    positive = SpikeAndSlab(dist.LogNormal(0.0, 1.0), 0.5, validate_args=True)
    torch.testing.assert_close(positive.log_prob(torch.tensor(0.0)).exp(), torch.tensor(0.5))
    torch.testing.assert_close(law.cdf(torch.tensor(-1.0)), torch.tensor(0.0))


def test_autoguides_and_nuts_refuse_the_site():
    def model():
        pyro.sample("codes", SpikeAndSlab(dist.Laplace(torch.zeros(3), 1.0), 0.3).to_event(1))

    with pytest.raises(NotImplementedError, match="Cannot transform"):
        AutoNormal(model)()
    with pytest.raises(NotImplementedError, match="Cannot transform"):
        MCMC(NUTS(model), num_samples=1, warmup_steps=1, disable_progbar=True).run()


# As a prior ---------------------------------------------------------------------------------------


def test_a_prior_moves_and_spreads(device):
    prior = SpikeAndSlab(dist.Laplace(torch.zeros(3, 1), 0.5), probs=0.2)
    assert prior.prob_active.dtype == torch.float32  # read first: nothing must be cached
    like = torch.zeros(1, dtype=torch.float64, device=device)
    moved = match(prior, like)
    assert moved.logits.dtype == moved.slab.scale.dtype == torch.float64
    assert moved.prob_active.dtype == torch.float64 and moved.sample().dtype == torch.float64
    assert prior.logits.dtype == torch.float32 and match(prior, torch.zeros(1)) is prior
    wide = spread(prior, (3, 5), like=like)
    assert wide.event_shape == (3, 5)
    draw = wide.sample()
    torch.testing.assert_close(wide.log_prob(draw), moved.log_prob(draw).sum())
    per_rate = codes_prior(
        lambda rate: SpikeAndSlab(dist.Laplace(0.0, 1 / rate), 0.2),
        torch.rand(7, 3) + 1,
        (3, 5),
        like=like,
    )
    assert per_rate.batch_shape == (7,) and per_rate.event_shape == (3, 5)


@pytest.mark.parametrize("name", ["scale", "logits"])
def test_a_prior_that_holds_a_parameter_is_refused(name):
    parameters = {"scale": torch.ones(3), "logits": torch.zeros(3)}
    parameters[name].requires_grad_()
    law = SpikeAndSlab(dist.Laplace(0.0, parameters["scale"]), logits=parameters["logits"])
    with pytest.raises(ValueError, match=f"SpikeAndSlab prior of constants.*{name}"):
        check_prior(law, has_rate=False)


@pytest.mark.parametrize("slab", SLABS)
@pytest.mark.parametrize("kind", [SpikeAndSlab, RelaxedSpikeAndSlab])
def test_a_bundle_brings_it_back(tmp_path, kind, slab):
    cls, arguments, _ = SLABS[slab]
    more = {RelaxedSpikeAndSlab: {"temperature": 0.5}}.get(kind, {})
    law = kind(cls(*map(double, arguments)), probs=torch.tensor([0.1, 0.4]), **more)
    save(tmp_path / "run", law=law, joint=law.to_event(1))
    loaded = load(tmp_path / "run")
    back = loaded["law"]
    assert type(back) is kind and type(back.slab) is cls and loaded["joint"].base_dist is back
    z = law.sample((20,))
    assert torch.equal(back.log_prob(z), law.log_prob(z)) and back.logits.dtype == torch.float64


# Pyro's own objectives ----------------------------------------------------------------------------

NOISE, DATA, ATOM = 0.6, 0.9, 1.3


def program(n):
    """A code, seen through one atom; its guide has the parameters logits, loc, log_scale."""

    def model():
        with pyro.plate("data", n):
            z = pyro.sample("codes", SpikeAndSlab(dist.Normal(double(0.0), 1.0), 0.2))
            pyro.sample("obs", dist.Normal(ATOM * z, NOISE), obs=double(DATA).expand(n))

    def guide():
        logits, loc, log_scale = (
            pyro.param(name, double(start))
            for name, start in {"logits": 0.4, "loc": 0.5, "log_scale": -0.3}.items()
        )
        with pyro.plate("data", n):
            slab = dist.Normal(loc, log_scale.exp())
            pyro.sample("codes", SpikeAndSlab(slab, logits=logits))

    return model, guide


def negative_elbo(logit, loc, log_scale):
    """By enumerating the gate and integrating over the slab."""
    g, q = special.expit(logit), stats.norm(loc, math.exp(log_scale))

    def likelihood(z):
        return stats.norm(ATOM * z, NOISE).logpdf(DATA)

    def active(z):
        ratio = math.log(0.2 / g) + stats.norm.logpdf(z) - q.logpdf(z)
        return q.pdf(z) * (likelihood(z) + ratio)

    width = 12 * math.exp(log_scale)
    inside = integrate.quad(active, loc - width, loc + width, epsabs=1e-12)[0]
    return -(g * inside + (1 - g) * (likelihood(0.0) + math.log(0.8 / (1 - g))))


def test_trace_elbo_is_unbiased():
    model, guide = program(2000)
    names, start = ["logits", "loc", "log_scale"], np.array([0.4, 0.5, -0.3])
    losses, grads = [], []
    for _ in range(100):
        losses.append(Trace_ELBO().loss_and_grads(model, guide) / 2000)
        grads.append([pyro.param(name).grad.item() / 2000 for name in names])
        for name in names:
            pyro.param(name).grad = None
    # Independent groups of 2000 draws each; 100 of them give the error of their mean.
    error = np.std(losses, ddof=1) / 10
    assert abs(np.mean(losses) - negative_elbo(*start)) < 4 * error
    for i, values in enumerate(np.transpose(grads)):
        step = np.eye(3)[i] * 1e-4
        truth = (negative_elbo(*(start + step)) - negative_elbo(*(start - step))) / 2e-4
        error = np.std(values, ddof=1) / 10
        assert abs(np.mean(values) - truth) < 4 * error
        assert error < 0.1 * abs(truth)


def test_the_mean_field_elbo_refuses_rather_than_drop_the_score_term():
    model, guide = program(5)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
    with pytest.raises(NotImplementedError, match="fully reparameterized"):
        svi.step()


def test_a_law_of_ones_own_needs_only_a_gate_and_a_slab():
    class Own(Mixed):
        arg_constraints = {}

        def __init__(self):
            self.logits, self.slab = torch.zeros(2), dist.Normal(torch.zeros(2), 1.0)
            super().__init__(torch.Size([2]))

    law = Own()
    assert law.sample((3,)).shape == (3, 2)
    torch.testing.assert_close(law.log_prob(torch.zeros(2)).exp(), torch.full((2,), 0.5))
