"""How much of an encoder is differentiated, against the exact gradient of deep ones."""

import pyro.distributions as dist
import pytest
import torch

from pyro_sparse.dictionaries import (
    Composition,
    Conv,
    ConvMap,
    Dense,
    LinearMap,
    Overhang,
    Periodic,
)
from pyro_sparse.dictionaries.composition import CompositionMap
from pyro_sparse.distributions import register_prox, spread
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.ops import group_soft_threshold
from pyro_sparse.solvers import (
    FISTA,
    ISTA,
    BackPropagation,
    Detached,
    HardThreshold,
    Implicit,
    Proximal,
    Truncated,
    Unrolled,
    differentiated,
)
from pyro_sparse.solvers.gradients import current_gradient
from tests.linear_maps import Mask

ONE = torch.ones((), dtype=torch.float64)


def dense_problem(prior=None):
    dictionary = Dense(20, 12).double()
    y = torch.randn(5, 12, dtype=torch.float64)
    prior = dist.Laplace(0.0, 1 / 0.3) if prior is None else prior
    return dictionary, y, spread(prior, (20,), y)


def conv_problem():
    dictionary = Conv(4, 1, 5).double()
    y = torch.randn(3, 1, 30, dtype=torch.float64)
    return dictionary, y, spread(dist.Laplace(0.0, 1 / 0.4), (4, 26), y)


PROBLEMS = {
    "dense": dense_problem,
    "conv": conv_problem,
    "nonnegative": lambda: dense_problem(dist.Exponential(0.3)),
    "ridge": lambda: dense_problem(dist.Normal(0.0, 1.5)),
}


def gradients(net, y, law, gradient):
    """Of a loss that depends on codes and dictionary, by all parameters; and the codes."""
    net.zero_grad()
    with differentiated(gradient):
        codes = net(y, law)
    (y - net.dictionary(codes)).square().sum().backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
    return torch.cat([g.flatten() for g in found]), codes.detach()


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("method", [ISTA(), FISTA(restart=True)], ids=["ista", "fista"])
def test_the_implicit_gradient_is_that_of_a_deep_net(problem, method):
    torch.manual_seed(0)
    dictionary, y, law = PROBLEMS[problem]()
    # The step is detached in both; 3000 steps converge to rounding here.
    net = Unrolled(dictionary, Gaussian(ONE), num_steps=3000, method=method)
    deep, codes = gradients(net, y, law, BackPropagation())
    implicit, fixed = gradients(net, y, law, Implicit(tol=1e-10))
    torch.testing.assert_close(fixed, codes, rtol=0, atol=1e-9)
    assert (implicit - deep).norm() <= 1e-4 * deep.norm()


def drawn_conv(*args, lengths, **options):
    def make():
        dictionary = Conv(*args, **options).double()
        y = torch.randn(2, args[1], *lengths, dtype=torch.float64)
        # Of independent Gaussian data every atom sees the same scale: few codes are active.
        law = spread(dist.Laplace(0.0, 1 / 2.2), dictionary.code_shape(y.shape)[1:], y)
        return dictionary, y, law

    return make


def composed():
    dictionary, _, law = drawn_conv(3, 1, (3, 3), lengths=(12, 12))()
    composition = Composition(Mask((1, 12, 12)).double(), dictionary, input_shape=(1, 12, 12))
    return composition, torch.randn(2, 1, 12, 12, dtype=torch.float64), law


FEW_CODES = {
    "dense": lambda: drawn_dense(),
    "1-D": drawn_conv(4, 1, 5, lengths=(40,)),
    "1-D, strided, channels": drawn_conv(4, 2, 5, 3, lengths=(41,)),
    "2-D": drawn_conv(3, 1, (3, 3), lengths=(12, 12)),
    "2-D, strided": drawn_conv(5, 1, (4, 3), (2, 1), lengths=(12, 12)),
    "2-D, channels, overhang": drawn_conv(3, 2, (2, 3), lengths=(12, 12), boundary=Overhang()),
    "2-D, periodic": drawn_conv(3, 1, (3, 2), lengths=(12, 12), boundary=Periodic()),
    "3-D": drawn_conv(3, 1, (2, 2, 2), lengths=(6, 6, 6)),
    "composition": composed,
}


def drawn_dense():
    dictionary, y, _ = dense_problem()
    return dictionary, y, spread(dist.Laplace(0.0, 1 / 2.0), (20,), y)


@pytest.mark.parametrize("problem", FEW_CODES)
def test_few_active_codes_have_the_gradient_that_all_would_give(problem, monkeypatch):
    torch.manual_seed(0)
    dictionary, y, law = FEW_CODES[problem]()
    net = Unrolled(dictionary, Gaussian(ONE), num_steps=600, method=FISTA(restart=True))
    few, codes = gradients(net, y, law, Implicit(tol=1e-12))
    assert 0 < (codes != 0).double().mean() < 0.12
    for kind in (ConvMap, CompositionMap):
        monkeypatch.setattr(kind, "at", LinearMap.at)
    general, same = gradients(net, y, law, Implicit(tol=1e-12))
    assert torch.equal(codes, same)
    torch.testing.assert_close(few, general, rtol=1e-8, atol=1e-8)
    deep, _ = gradients(net, y, law, BackPropagation())
    assert (few - deep).norm() <= 1e-4 * deep.norm()


def test_the_implicit_gradient_needs_its_solve():
    # Power of the test above: the one-step gradient, which leaves the solve out, is far off.
    torch.manual_seed(0)
    dictionary, y, law = dense_problem()
    net = Unrolled(dictionary, Gaussian(ONE), num_steps=3000)
    deep, _ = gradients(net, y, law, BackPropagation())
    for other in (Truncated(1), Detached()):
        wrong, _ = gradients(net, y, law, other)
        assert (wrong - deep).norm() > 0.05 * deep.norm()


def test_truncated_gradients_come_near_as_the_layers_taken_in_grow():
    torch.manual_seed(0)
    dictionary, y, law = dense_problem()
    net = Unrolled(dictionary, Gaussian(ONE), num_steps=400, method=ISTA())
    deep, codes = gradients(net, y, law, BackPropagation())
    errors = []
    for count in (1, 10, 100, 400):
        part, same = gradients(net, y, law, Truncated(count))
        assert torch.equal(same, codes)
        errors.append(float((part - deep).norm() / deep.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0 and errors[2] < errors[0] / 3
    longer, _ = gradients(net, y, law, Truncated(1000))
    assert torch.equal(longer, deep)


def test_detached_codes_are_constants():
    dictionary, y, law = dense_problem()
    net = Unrolled(dictionary, Gaussian(ONE), num_steps=10)
    with differentiated(Detached()):
        codes = net(y, law)
    assert not codes.requires_grad
    assert torch.equal(codes, net(y, law))
    (y - dictionary(codes)).square().sum().backward()
    assert net.shrinkage.log_factor.grad is None
    assert any(p.grad is not None for p in dictionary.parameters())


def test_at_converged_codes_the_decoders_gradient_is_that_of_the_lasso():
    # Danskin's theorem: what the codes' own dependence adds vanishes at the minimum.
    torch.manual_seed(0)
    dictionary, y, law = dense_problem()
    net = Unrolled(dictionary, Gaussian(ONE), num_steps=5000, shrinkage=Proximal())
    found = []
    for gradient in (Detached(), BackPropagation(), Implicit(tol=1e-10)):
        net.zero_grad()
        with differentiated(gradient):
            codes = net(y, law)
        loss = (y - dictionary(codes)).square().sum() / 2 + 0.3 * codes.abs().sum()
        loss.backward()
        found.append(next(dictionary.parameters()).grad.clone())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-7, atol=1e-7)


def test_an_implicit_gradient_takes_learned_thresholds_and_rates_along():
    torch.manual_seed(0)
    dictionary, y, _ = dense_problem()
    rate = torch.full((20,), 0.3, dtype=torch.float64, requires_grad=True)
    net = Unrolled(dictionary, Gaussian(ONE), num_steps=3000)
    found = []
    for gradient in (BackPropagation(), Implicit(tol=1e-10)):
        rate.grad = None
        with differentiated(gradient):
            codes = net(y, dist.Laplace(0.0, 1 / rate).to_event(1))
        (codes * torch.linspace(-1, 1, 20, dtype=torch.float64)).sum().backward()
        found.append((rate.grad.clone(), net.shrinkage.log_factor.grad.clone()))
        net.zero_grad()
    for deep, implicit in zip(*found):
        torch.testing.assert_close(implicit, deep, rtol=1e-5, atol=1e-7)
        assert (deep != 0).any()


def test_hard_thresholds_have_implicit_gradients_on_what_they_keep():
    torch.manual_seed(0)
    dictionary, y, law = dense_problem()
    net = Unrolled(
        dictionary, Gaussian(ONE), num_steps=3000, method=ISTA(), shrinkage=HardThreshold(0.5)
    )
    deep, _ = gradients(net, y, law, BackPropagation())
    implicit, _ = gradients(net, y, law, Implicit(tol=1e-10))
    assert (implicit - deep).norm() <= 1e-4 * deep.norm()


def test_an_implicit_gradient_keeps_one_layer_in_memory():
    dictionary, y, law = dense_problem()

    def saved(num_steps, gradient):
        total = 0

        def count(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        net = Unrolled(dictionary, Gaussian(ONE), num_steps=num_steps)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            with differentiated(gradient):
                net(y, law)
        return total

    assert saved(200, Implicit()) == saved(20, Implicit())
    assert saved(200, BackPropagation()) > 8 * saved(20, BackPropagation())
    assert saved(200, Implicit()) < 0.02 * saved(200, BackPropagation())


def test_codes_without_gradients_are_had_under_no_grad():
    dictionary, y, law = dense_problem()
    net = Unrolled(dictionary, Gaussian(ONE), num_steps=30)
    with torch.no_grad(), differentiated(Implicit()):
        codes = net(y, law)
    assert torch.equal(codes, net(y, law).detach())


def test_untied_layers_are_the_gradient_of_nothing():
    dictionary, y, law = dense_problem()
    net = Unrolled(dictionary, Gaussian(ONE), analysis=Dense(20, 12).double())
    with differentiated(Implicit()), pytest.raises(ValueError, match="tied weights"):
        net(y, law)


class Grouped(dist.Laplace):
    """Codes in pairs; only its prox is of interest here."""


@register_prox(Grouped)
def _(prior, value, step):
    pairs = value.unflatten(-1, (-1, 2))
    return group_soft_threshold(pairs, step / prior.scale.reshape(-1)[0]).flatten(-2)


def test_a_shrinkage_that_does_not_act_by_element_is_refused():
    torch.manual_seed(0)
    dictionary, y, law = dense_problem(Grouped(0.0, 1 / 0.3))
    net = Unrolled(dictionary, Gaussian(ONE), num_steps=500, shrinkage=Proximal())
    with differentiated(Implicit()):
        codes = net(y, law)
    with pytest.raises(NotImplementedError, match="acts on each code by itself"):
        codes.square().sum().backward()


def test_the_choice_ends_with_its_block_also_by_an_error():
    with pytest.raises(RuntimeError, match="inside"), differentiated(Detached()):
        with differentiated(Truncated(2)):
            assert isinstance(current_gradient(), Truncated)
        assert isinstance(current_gradient(), Detached)
        raise RuntimeError("inside")
    assert isinstance(current_gradient(), BackPropagation)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Truncated(0), ValueError, "num_steps to be a whole number >= 1"),
        (lambda: Implicit(tol=0.0), ValueError, "tol > 0, got 0.0"),
        (lambda: Implicit(max_steps=0), ValueError, "max_steps to be a whole number >= 1"),
        (lambda: differentiated("implicit").__enter__(), TypeError, "gradient to be BackProp"),
    ],
)
def test_arguments_out_of_range_are_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()
