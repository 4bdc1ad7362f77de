import math

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import nn
from torch.nn import functional as F

from pyro_sparse.dictionaries import Conv, Dense, Overhang, Periodic
from pyro_sparse.distributions import codes_prior, register_prox, spread
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.solvers import FISTA, ISTA, Proximal, Unrolled, solve

RATE = 0.5


def double(value):
    return torch.tensor(value, dtype=torch.float64)


def one():
    return Gaussian(double(1.0))


def laplace(shape, rate=RATE):
    return spread(dist.Laplace(double(0.0), double(1 / rate)), shape, like=double(0.0))


def dense(atoms=20, features=12):
    return Dense(atoms, features, atoms=torch.randn(atoms, features, dtype=torch.float64))


# ---- many steps --------------------------------------------------------------------------------

DICTIONARIES = {
    "dense": (dense, (12,)),
    "conv1": (lambda: Conv(3, 2, 5, boundary=Overhang()).double(), (2, 20)),
    "conv2": (lambda: Conv(2, 1, (3, 3), boundary=Periodic()).double(), (1, 6, 5)),
}


@pytest.mark.parametrize("prior", [dist.Laplace(0.0, 1.0), dist.Exponential(1.0)])
@pytest.mark.parametrize("method", [ISTA(), FISTA(), FISTA(restart=True)])
@pytest.mark.parametrize("name", DICTIONARIES)
def test_many_tied_steps_equal_solve(name, method, prior):
    make, signal = DICTIONARIES[name]
    dictionary, batch = make(), (2, 1)
    y = torch.randn(*batch, *signal, dtype=torch.float64)
    sigma = Gaussian(double(0.8))
    shape = tuple(dictionary.code_shape(signal))
    net = Unrolled(dictionary, sigma, num_steps=3000, method=method)
    with torch.no_grad():
        codes = net(y, codes_prior(prior, None, shape, like=y))
    solution = solve(y, dictionary, prior, likelihood=sigma, tol=1e-14)
    assert codes.shape == (*batch, *shape)
    torch.testing.assert_close(codes, solution.codes, rtol=0, atol=1e-6)
    assert 0.05 < (codes != 0).double().mean() < 0.95


def test_masked_steps_equal_solve_and_ignore_what_was_not_observed():
    dictionary, y = dense(), torch.randn(3, 12, dtype=torch.float64)
    mask = torch.rand(3, 12) < 0.7
    net = Unrolled(dictionary, one(), num_steps=5000)
    with torch.no_grad():
        codes = net(y, laplace((20,)), mask=mask)
        torch.testing.assert_close(net(torch.where(mask, y, 9.0), laplace((20,)), mask=mask), codes)
    prior = dist.Laplace(double(0.0), double(1 / RATE))
    solution = solve(y, dictionary, prior, mask=mask, tol=1e-14)
    torch.testing.assert_close(codes, solution.codes, rtol=0, atol=1e-6)


def test_a_users_own_prior_is_unrolled():
    class Box(TorchDistribution):
        """Flat between two bounds."""

        arg_constraints = {}
        support = constraints.real

        def __init__(self, bound):
            self.bound = bound
            super().__init__(bound.shape, validate_args=False)

        def log_prob(self, value):
            return torch.where(value.abs() <= self.bound, 0.0, -torch.inf)

    net, y = Unrolled(dense(), one()), torch.randn(3, 12, dtype=torch.float64)
    law = spread(Box(double(0.1)), (20,), like=y)
    with pytest.raises(NotImplementedError, match="No proximal step is known for Box"):
        net(y, law)
    register_prox(Box)(lambda prior, value, step: value.clamp(-prior.bound, prior.bound))
    codes = net(y, law)
    assert codes.abs().max() == 0.1


# ---- two readings: recurrent, and a stack of layers --------------------------------------------


class TwoSided(nn.Module):
    """Soft thresholding as two rectifiers."""

    def __init__(self, threshold):
        super().__init__()
        self.threshold = threshold

    def forward(self, codes):
        return torch.relu(codes - self.threshold) - torch.relu(-codes - self.threshold)


class ResidualLayer(nn.Module):
    """``(y, w) -> shrink(encode(y) + inhibit(w))`` with weights of its own."""

    def __init__(self, encode, inhibit, threshold):
        super().__init__()
        self.encode, self.inhibit = encode, inhibit
        self.shrink = TwoSided(threshold)

    def forward(self, y, codes):
        return self.shrink(self.encode(y) + self.inhibit(codes))


def linear(weight):
    layer = nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return layer


class ConvInhibit(nn.Module):
    def __init__(self, atoms, step):
        super().__init__()
        self.atoms, self.step = nn.Parameter(atoms.clone()), step

    def forward(self, codes):
        return codes - self.step * F.conv1d(F.conv_transpose1d(codes, self.atoms), self.atoms)


def dense_layer(dictionary, step, threshold):
    columns = dictionary.atoms.detach().T  # D, (features, atoms)
    eye = torch.eye(columns.shape[1], dtype=columns.dtype)
    encode, inhibit = linear(step * columns.T), linear(eye - step * columns.T @ columns)
    return ResidualLayer(encode, inhibit, threshold)


def conv_layer(dictionary, step, threshold):
    atoms = dictionary.atoms.detach()
    encode = nn.Conv1d(atoms.shape[1], atoms.shape[0], atoms.shape[2], bias=False).double()
    encode.weight.data.copy_(step * atoms)
    return ResidualLayer(encode, ConvInhibit(atoms, step), threshold)


def stacked(layers, y, codes, accelerated):
    previous, weight = codes, 1.0
    point = codes
    for layer in layers:
        codes = layer(y, point)
        following = (1 + math.sqrt(1 + 4 * weight**2)) / 2
        slope = (weight - 1) / following if accelerated else 0.0
        point = (1 + slope) * codes - slope * previous
        previous, weight = codes, following
    return codes


@pytest.mark.parametrize("accelerated", [False, True], ids=["ista", "fista"])
@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_recurrent_form_equals_a_stack_of_residual_layers(kind, accelerated, decay):
    # CRsAE's two readings: T passes through one set of weights, or T layers with equal weights.
    make, layer, signal = {
        "dense": (dense, dense_layer, (12,)),
        "conv": (lambda: Conv(3, 2, 5).double(), conv_layer, (2, 20)),
    }[kind]
    dictionary, depth, lipschitz, sigma = make(), 12, 9.0, 0.5
    y = torch.randn(4, *signal, dtype=torch.float64)
    shape = tuple(dictionary.code_shape(signal))
    net = Unrolled(
        dictionary,
        Gaussian(double(sigma)),
        num_steps=depth,
        method=FISTA() if accelerated else ISTA(),
        shrinkage=Proximal(decay=decay),
        lipschitz=lipschitz,
    )
    # In the Lasso's units: step 1 / L on the dictionary, threshold rate * sigma^2 / L.
    rate = 4.0
    step, threshold = 1 / lipschitz, rate * sigma**2 / lipschitz
    layers = nn.ModuleList(layer(dictionary, step, threshold * decay**t) for t in range(depth))
    codes = net(y, laplace(shape, rate))
    expected = stacked(layers, y, torch.zeros(4, *shape, dtype=torch.float64), accelerated)
    torch.testing.assert_close(codes, expected, rtol=0, atol=1e-10)
    assert 0.05 < (codes != 0).double().mean() < 0.95
    # The gradient with regard to the data is the same too.
    y.requires_grad_()
    weight = torch.randn_like(codes)
    (recurrent,) = torch.autograd.grad((net(y, laplace(shape, rate)) * weight).sum(), y)
    start = torch.zeros(4, *shape, dtype=torch.float64)
    (layered,) = torch.autograd.grad((stacked(layers, y, start, accelerated) * weight).sum(), y)
    torch.testing.assert_close(recurrent, layered, rtol=0, atol=1e-10)


# ---- gradients ---------------------------------------------------------------------------------


def least_margin(atoms, y, step, threshold, num_steps, accelerated):
    """Distance of every pre-activation of every layer from its kinks, for the dense net."""
    codes = point = previous = torch.zeros(len(y), len(atoms), dtype=torch.float64)
    margin, weight = torch.inf, 1.0
    for _ in range(num_steps):
        value = point + step * (y - point @ atoms) @ atoms.T
        margin = min(margin, float((value.abs() - threshold).abs().min()))
        previous, codes = codes, value.sign() * (value.abs() - threshold).relu()
        following = (1 + math.sqrt(1 + 4 * weight**2)) / 2
        slope = (weight - 1) / following if accelerated else 0.0
        point, weight = codes + slope * (codes - previous), following
    return margin


@pytest.mark.parametrize("accelerated", [False, True], ids=["ista", "fista"])
def test_gradients_pass_gradcheck_away_from_the_kinks(accelerated):
    # The safe step size is detached from the atoms (as documented), so it is fixed here.
    depth, lipschitz = 5, 6.0
    dictionary = dense(6, 4)
    atoms = dictionary.atoms.detach().clone()
    threshold = RATE / lipschitz
    draws = torch.randn(200, 2, 4, dtype=torch.float64)
    margins = [least_margin(atoms, y, 1 / lipschitz, threshold, depth, accelerated) for y in draws]
    y = draws[margins.index(max(margins))]
    assert max(margins) > 1e-3
    net = Unrolled(
        dictionary,
        one(),
        num_steps=depth,
        method=FISTA() if accelerated else ISTA(),
        lipschitz=lipschitz,
        shrinkage=Proximal(6).double(),
    )
    log_threshold = net.shrinkage.log_factor.detach().clone()

    def run(y, atoms, log_threshold, rate):
        law = codes_prior(lambda rate: dist.Laplace(0.0, 1 / rate), rate, (6,), like=y)
        arguments = {"atoms": atoms}
        values = {"shrinkage.log_factor": log_threshold}
        return torch.func.functional_call(net, values, (y, law), arguments)

    rate = torch.full((6,), RATE, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (y, atoms, log_threshold, rate)]
    codes = run(*inputs)
    assert 0.2 < (codes != 0).double().mean() < 1
    assert torch.autograd.gradcheck(run, inputs, eps=1e-7, atol=1e-6)


def test_gradients_of_a_convolutional_net_pass_gradcheck():
    dictionary = Conv(2, 1, 3, boundary=Overhang()).double()
    net = Unrolled(dictionary, one(), num_steps=4, lipschitz=4.0, shrinkage=Proximal())
    law = laplace((2, 8), rate=0.2)
    y = torch.randn(1, 1, 6, dtype=torch.float64, requires_grad=True)
    atoms = dictionary.atoms.detach().clone().requires_grad_()
    assert (net(y, law, atoms=atoms) != 0).any()
    # A kink within eps of a pre-activation would show as a mismatch of order one.
    assert torch.autograd.gradcheck(
        lambda y, atoms: net(y, law, atoms=atoms), (y, atoms), eps=1e-7, atol=1e-6
    )


@pytest.mark.parametrize("untied", [False, True])
def test_every_parameter_gets_a_gradient(untied):
    dictionary = dense()
    own = {"analysis": dense(), "synthesis": dense()} if untied else {}
    net = Unrolled(dictionary, Gaussian(double(1.0), trainable=True), **own)
    loss = net(torch.randn(8, 12, dtype=torch.float64), laplace((20,))).square().sum()
    loss.backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    used = {name for name, g in gradients.items() if g is not None and bool((g != 0).any())}
    # With both maps replaced, the dictionary serves for its shapes alone.
    unused = {name for name in gradients if untied and name.startswith("dictionary.")}
    assert used == set(gradients) - unused
    assert (net.shrinkage.log_factor.grad != 0).sum() > 10


# ---- options -----------------------------------------------------------------------------------


def test_learned_thresholds_start_as_the_priors_and_scale_it_for_each_atom():
    dictionary, y = dense(), torch.randn(3, 12, dtype=torch.float64)
    fixed = Unrolled(dictionary, one(), shrinkage=Proximal())
    learned = Unrolled(dictionary, one())
    assert fixed.shrinkage.log_factor is None
    assert learned.shrinkage.log_factor.shape == (20,)
    torch.testing.assert_close(learned(y, laplace((20,))), fixed(y, laplace((20,))))
    factors = torch.rand(20, dtype=torch.float64) * 3 + 0.1
    with torch.no_grad():
        learned.shrinkage.log_factor.copy_(factors.log())
    scaled = codes_prior(lambda rate: dist.Laplace(0.0, 1 / rate), RATE * factors, (20,), like=y)
    torch.testing.assert_close(learned(y, laplace((20,))), fixed(y, scaled))


def test_a_convolutional_threshold_is_shared_by_the_positions():
    dictionary = Conv(3, 1, 5).double()
    y = torch.randn(2, 1, 20, dtype=torch.float64)
    net = Unrolled(dictionary, one())
    factors = torch.tensor([0.5, 1.0, 1e6], dtype=torch.float64)
    with torch.no_grad():
        net.shrinkage.log_factor.copy_(factors.log())
    codes = net(y, laplace((3, 16), rate=0.1))
    assert (codes[:, 2] == 0).all()
    assert (codes[:, :2] != 0).any()
    scaled = codes_prior(lambda r: dist.Laplace(0.0, 1 / r), 0.1 * factors, (3, 16), like=y)
    torch.testing.assert_close(Unrolled(dictionary, one())(y, scaled), codes)


def test_a_fixed_lipschitz_constant_is_used_as_it_is():
    dictionary, y = dense(), torch.randn(3, 12, dtype=torch.float64)
    codes = Unrolled(dictionary, Gaussian(double(0.5)), num_steps=1, lipschitz=7.0)(
        y, laplace((20,))
    )
    values = y @ dictionary.atoms.detach().T / 7
    expected = values.sign() * (values.abs() - RATE * 0.25 / 7).relu()
    torch.testing.assert_close(codes, expected)
    # The published nets choose it below the true norm; the safe default does not diverge.
    risky = Unrolled(dictionary, one(), num_steps=200, lipschitz=0.3, method=ISTA())
    safe = Unrolled(dictionary, one(), num_steps=200, method=ISTA())
    assert not risky(y, laplace((20,))).abs().max() < 1e6
    assert safe(y, laplace((20,))).abs().max() < 1e2


def test_the_safe_step_follows_the_atoms():
    dictionary = Dense(20, 12, atoms=torch.randn(20, 12, dtype=torch.float64), unit_norm=False)
    net, y = Unrolled(dictionary, one(), num_steps=300), torch.randn(3, 12, dtype=torch.float64)
    net(y, laplace((20,)))
    with torch.no_grad():
        dictionary.atoms.mul_(10)
    solution = solve(y, dictionary, dist.Laplace(double(0.0), double(1 / RATE)), tol=1e-12)
    longer = Unrolled(dictionary, one(), num_steps=5000)
    torch.testing.assert_close(longer(y, laplace((20,))), solution.codes, rtol=0, atol=1e-6)


def test_thresholds_decay_from_their_full_value():
    dictionary, y = dense(), torch.randn(3, 12, dtype=torch.float64)
    options = {"num_steps": 3, "method": ISTA(), "lipschitz": 5.0}
    codes = Unrolled(dictionary, one(), shrinkage=Proximal(decay=0.5), **options)(y, laplace((20,)))
    atoms = dictionary.atoms.detach()
    expected = torch.zeros_like(codes)
    for threshold in (RATE / 5, RATE / 10, RATE / 20):
        value = expected + (y - expected @ atoms) @ atoms.T / 5
        expected = value.sign() * (value.abs() - threshold).relu()
    torch.testing.assert_close(codes, expected)


@pytest.mark.parametrize("which", [("analysis",), ("synthesis",), ("analysis", "synthesis")])
def test_untied_maps_are_used_where_they_are_named(which):
    dictionary, y = dense(), torch.randn(3, 12, dtype=torch.float64)
    own = {name: dense() for name in which}
    options = {"num_steps": 4, "method": ISTA(), "lipschitz": 8.0}
    codes = Unrolled(dictionary, one(), **own, **options)(y, laplace((20,)))
    forwards = own.get("synthesis", dictionary).atoms.detach()
    backwards = own.get("analysis", dictionary).atoms.detach()
    expected = torch.zeros_like(codes)
    for _ in range(4):
        value = expected + (y - expected @ forwards) @ backwards.T / 8
        expected = value.sign() * (value.abs() - RATE / 8).relu()
    torch.testing.assert_close(codes, expected)


def test_untied_copies_start_as_the_tied_net():
    dictionary, y = dense(), torch.randn(3, 12, dtype=torch.float64)
    copies = {}
    for name in ("analysis", "synthesis"):
        copies[name] = Dense(20, 12, atoms=dictionary.atoms.detach())
    tied, untied = Unrolled(dictionary, one()), Unrolled(dictionary, one(), **copies)
    torch.testing.assert_close(untied(y, laplace((20,))), tied(y, laplace((20,))))


def test_sampled_atoms_take_the_place_of_the_dictionarys():
    dictionary, other = dense(), dense()
    y = torch.randn(3, 12, dtype=torch.float64)
    law = laplace((20,))
    replaced = Unrolled(dictionary, one())(y, law, atoms=other.atoms)
    torch.testing.assert_close(replaced, Unrolled(other, one())(y, law))
    # One dictionary for each particle: dimensions in front of the data's.
    atoms = torch.stack([dictionary.atoms, other.atoms])[:, None]  # (particles, 1, atoms, features)
    both = Unrolled(dictionary, one())(y, law, atoms=atoms)
    torch.testing.assert_close(both[0], Unrolled(dictionary, one())(y, law))
    torch.testing.assert_close(both[1], replaced)


def test_precision_and_device_are_those_of_the_dictionary(dtype, device):
    net = Unrolled(Dense(20, 12), Gaussian(1.0)).to(device, dtype)
    y = torch.randn(2, 3, 12, dtype=dtype, device=device)
    codes = net(y, spread(dist.Laplace(0.0, 5.0), (20,), like=y))
    assert codes.shape == (2, 3, 20)
    assert (codes.dtype, codes.device) == (y.dtype, y.device)
    assert (codes == 0).any()
    assert net.shrinkage.log_factor.dtype == dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps >= 1, got 0"),
        ({"step_size": 0.0}, "step_size > 0, got 0"),
        ({"step_size": 0.1, "lipschitz": 10.0}, r"step_size or lipschitz, got both: 0\.1, 10"),
        ({"lipschitz": 0.0}, "lipschitz > 0, got 0"),
        ({"lipschitz": float("nan")}, "lipschitz > 0, got nan"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Unrolled(dense(), one(), **options)
