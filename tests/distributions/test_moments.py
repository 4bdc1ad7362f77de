"""Programs run on moments against their own Jacobian, and everything that must be refused."""

import copy
import itertools
import math
import pickle

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate
from torch.nn import functional as F

from pyro_sparse.dictionaries import Composition, Conv, Dense, LinearMap, Overhang, Periodic
from pyro_sparse.distributions.cumulants import log_mgf
from pyro_sparse.distributions.expected import mean_exp
from pyro_sparse.distributions.mixed import SpikeAndSlab
from pyro_sparse.distributions.moments import ExpMoments, Moments, NotAffine
from tests.linear_maps import Blur, Mask

N, K, D = 4, 6, 3


def constant(*shape):
    """Numbers without a pattern that are the same at each import and each call."""
    return torch.sin(torch.arange(1, math.prod(shape) + 1, dtype=torch.float64) ** 2).reshape(shape)


def fixed(module):
    """A module in float64 whose parameters are such constants."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(constant(*parameter.shape))
    return module


def tensor(*shape):
    return constant(*shape) / 2


def spike_and_slab(*shape):
    slab = dist.Laplace(
        torch.randn(shape, dtype=torch.float64), 0.2 + torch.rand(shape, dtype=torch.float64)
    )
    return SpikeAndSlab(slab, logits=torch.randn(shape, dtype=torch.float64))


@pytest.fixture
def law():
    return spike_and_slab(N, K).to_event(1)


@pytest.fixture
def codes(law):
    return Moments.of(law, "codes")


dense = fixed(Dense(K, D))
layer = fixed(torch.nn.Linear(K, D))
mask = Mask((D,)).double()
mask.kept = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
masked = Composition(mask, dense, input_shape=(D,))


class Plain(LinearMap):
    """A user's map that states nothing about its entries."""

    def forward(self, codes):
        return codes @ tensor(K, D) * 2


class Changed(type(dense.bind())):
    """Inherits the squares of a dense map, but is another map."""

    def forward(self, codes):
        return codes @ (self.atoms + 1)


# Programs whose predictor has cumulants as well.
AFFINE = {
    "matmul": lambda z: z @ tensor(K, D),
    "matmul, shift and scale": lambda z: 1.5 - 2 * (tensor(D) + z @ tensor(K, D)) / 3,
    "matmul from the left": lambda z: (tensor(D, K) @ z.T).T,
    "vector from the left": lambda z: tensor(N) @ z,
    "vector from the right": lambda z: torch.mv(z, tensor(K)),
    "vector and matrix": lambda z: z[1] @ tensor(K, D),
    "matrix and vector": lambda z: tensor(D, K) @ z[1],
    "reflected": lambda z: z.__rmatmul__(tensor(D, N)),
    "batched": lambda z: z @ tensor(5, K, D),
    "batched, one vector": lambda z: z[0] @ tensor(5, K, D),
    "bmm": lambda z: torch.bmm(z[:, None], tensor(N, K, D)),
    "nn.Linear": layer,
    "dense": lambda z: dense(z),
    "bound": lambda z: dense.bind().forward(z),
    "masked": lambda z: masked(z),
    "plain map": lambda z: Plain().forward(z),
    "changed map": lambda z: Changed(tensor(K, D)).forward(z),
    "integers": lambda z: (z / torch.arange(1, K + 1) - torch.arange(K)) @ tensor(K, D),
    "rescaled codes": lambda z: (tensor(K) * z + 1) @ tensor(K, D),
    "picked codes": lambda z: z[:, [3, 0]] @ tensor(2, D),
    "masked codes": lambda z: z[..., torch.arange(K) > 1] @ tensor(K - 2, D),
    "rows": lambda z: (z.reshape(2, 2, K).flip(0) @ tensor(K, D)).transpose(0, 1)[:, 1:],
    "turned": lambda z: (z.mT.permute(1, 0).unsqueeze(1) @ tensor(K, D)).squeeze(1),
    "columns": lambda z: z.unflatten(-1, (2, 3)).movedim(1, 0).flatten(1) @ tensor(12, D),
    "broadcast": lambda z: (z @ tensor(K, D)).unsqueeze(1) * tensor(5, 1) + tensor(2, N, 1, D),
    "expanded": lambda z: (z @ tensor(K, D))[:, None].expand(N, 2, D).reshape(N, -1),
    "identity": lambda z: (+z).clone().contiguous(),
    "conversion": lambda z: z.to(torch.float64).double() @ tensor(K, D),
    "zeros": lambda z: z @ tensor(K, D) + torch.zeros_like(z)[:, :D] + z.new_ones(D),
    "conv": lambda z: CONV["interior"](z.reshape(N, 2, 3)),
    "conv, overhang": lambda z: CONV["overhang"](z.reshape(N, 2, 3)),
    "conv, periodic": lambda z: CONV["periodic"](z.reshape(N, 2, 3)),
    "conv, picture": lambda z: CONV["picture"](z.reshape(N, 1, 2, 3)),
    "conv, volume": lambda z: CONV["volume"](z.reshape(N, 1, 1, 2, 3)),
}
CONV = {
    "interior": fixed(Conv(2, 2, 3, 2)),
    "overhang": fixed(Conv(2, 1, 3, boundary=Overhang())),
    "periodic": fixed(Conv(2, 1, 3, boundary=Periodic())),
    "picture": fixed(Conv(1, 2, (2, 3), (1, 2))),
    "volume": fixed(Conv(1, 1, (1, 2, 2))),
}
# Programs with mean and variance alone.
MEAN_AND_VARIANCE = {
    "einsum": lambda z: torch.einsum("nk,kd->nd", z, tensor(K, D)),
    "einsum, shared": lambda z: torch.einsum("kd, nk -> dn", tensor(K, D), z),
    "einsum, implicit": lambda z: torch.einsum("nk,kd", z, tensor(K, D)),
    "einsum, alone": lambda z: torch.einsum("nk->n", z),
    "sum": lambda z: z.sum(-1),
    "sum of all": lambda z: torch.sum(z) + 1,
    "mean": lambda z: torch.mean(z, 0, keepdim=True),
    "conv_transpose1d": lambda z: F.conv_transpose1d(z[:, None], tensor(1, 2, 3), stride=2),
    "conv_transpose2d": lambda z: F.conv_transpose2d(
        z.reshape(N, 1, 2, 3), tensor(1, 2, 2, 2), tensor(2), 2, 1, 1
    ),
    "conv_transpose3d": lambda z: F.conv_transpose3d(
        z.reshape(N, 1, 1, 2, 3), tensor(1, 1, 2, 2, 2), dilation=2
    ),
    "conv1d": lambda z: F.conv1d(z.reshape(N, 2, 3), tensor(4, 1, 2), tensor(4), 1, 1, 1, 2),
    "conv2d": lambda z: torch.conv2d(z.reshape(N, 1, 2, 3), tensor(1, 1, 2, 2), padding="same"),
    "conv3d": lambda z: F.conv3d(z.reshape(N, 1, 1, 2, 3), tensor(2, 1, 1, 2, 2)),
    "nn.ConvTranspose1d": lambda z: UPSAMPLE(z.reshape(N, 2, 3)),
    "repeated codes": lambda z: z[:, [0, 0]] * tensor(2),
    "repeated by index_select": lambda z: torch.index_select(z, 1, torch.tensor([0, 0])),
}
UPSAMPLE = fixed(torch.nn.ConvTranspose1d(2, 3, 2))


def jacobian(program, law):
    """Matrix and offset of an affine program, from plain tensors by autograd alone."""
    with torch.no_grad():
        offset = program(torch.zeros(law.shape(), dtype=torch.float64))
    matrix = torch.autograd.functional.jacobian(program, law.mean)
    return matrix.reshape(offset.numel(), -1), offset


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch, of even kernels
@pytest.mark.parametrize("name", [*AFFINE, *MEAN_AND_VARIANCE])
def test_mean_and_variance_are_those_of_the_matrix(name, law, codes):
    program = (AFFINE | MEAN_AND_VARIANCE)[name]
    matrix, offset = jacobian(program, law)
    predictor = program(codes)
    assert isinstance(predictor, Moments)
    assert predictor.shape == offset.shape
    assert predictor.dtype == offset.dtype
    mean = (matrix @ law.mean.flatten()).reshape(offset.shape) + offset
    variance = (matrix.square() @ law.variance.flatten()).reshape(offset.shape)
    torch.testing.assert_close(predictor.expectation, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(predictor.variance, variance, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", AFFINE)
def test_cumulants_are_those_of_the_matrix(name, law, codes):
    program = AFFINE[name]
    matrix, offset = jacobian(program, law)
    predictor = program(codes)
    # A scale so small that every expectation is finite, and other at each entry.
    value = torch.linspace(0.05, 0.1, offset.numel(), dtype=torch.float64)
    entries = (matrix * value[:, None]).reshape(-1, N, K)
    want = log_mgf(law, entries).sum((1, 2)) + value * offset.flatten()
    got = predictor.log_mgf(value.reshape(offset.shape))
    torch.testing.assert_close(got.flatten(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(set(MEAN_AND_VARIANCE) - {"sum of all"}))
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_cumulants_that_are_not_known_are_refused(name, codes):
    with pytest.raises(NotAffine, match="cumulants"):
        MEAN_AND_VARIANCE[name](codes).log_mgf()


def test_two_sites_add_up(law):
    other = spike_and_slab(N, 2)
    one, two = Moments.of(law, "codes"), Moments.of(other.to_event(1), "other")
    predictor = one @ tensor(K, D) - two @ tensor(2, D)
    left = Moments.of(law, "codes") @ tensor(K, D)
    right = Moments.of(other, "other") @ -tensor(2, D)
    torch.testing.assert_close(predictor.expectation, left.expectation + right.expectation)
    torch.testing.assert_close(predictor.variance, left.variance + right.variance)
    torch.testing.assert_close(predictor.log_mgf(), left.log_mgf() + right.log_mgf())
    assert predictor.sources == {"codes", "other"}


class Detached(torch.autograd.Function):
    """Linear going forward; what comes back is a law of its own."""

    @staticmethod
    def forward(ctx, codes, matrix):
        return codes @ matrix

    @staticmethod
    def backward(ctx, gradient):
        return None, None


REFUSED = {
    # Not affine.
    "tanh": (lambda z: torch.tanh(z @ tensor(K, D)), r"met torch\.tanh"),
    "relu": (lambda z: z.relu(), r"met torch\.Tensor\.relu"),
    "nn.ReLU": (torch.nn.ReLU(), "relu"),
    "softmax": (lambda z: z.softmax(-1), "softmax"),
    "square": (lambda z: z**2, "pow"),
    "absolute": (abs, "abs"),
    "dropout": (torch.nn.Dropout(0.5), "dropout"),
    "division by codes": (lambda z: tensor(K) / z, "division by codes"),
    "number over codes": (lambda z: 1 / z, "rtruediv"),
    "product": (lambda z: z * z, "a product of two random arrays"),
    "matrix product of codes": (lambda z: z @ z.T, "a matrix product of two random arrays"),
    "einsum of codes": (lambda z: torch.einsum("nk,nk->n", z, z), "einsum of two random arrays"),
    "weight": (lambda z: F.linear(tensor(2, K), z), "input of a linear layer only"),
    "bias": (lambda z: F.linear(tensor(2, N), tensor(K, N), z[0]), "input of a linear layer only"),
    "kernel": (lambda z: F.conv1d(tensor(1, 4, 9), z[:1, None][..., :4].mT), "a convolution only"),
    "exp of exp": (lambda z: z.exp().exp(), "exp"),
    "sum of exp": (lambda z: z.exp() + z, r"add"),
    "log of exp": (lambda z: z.exp().log(), "log"),
    "map of exp": (lambda z: dense.bind().forward(z.exp()), "affine"),
    # Correlated.
    "codes twice": (lambda z: z @ tensor(K, D) + z @ tensor(K, D), "site 'codes' twice"),
    "residual": (lambda z: z @ tensor(K, K) + z, "site 'codes' twice"),
    "two maps": (lambda z: z @ tensor(K, D) @ tensor(D, D), "second linear map"),
    "two layers": (lambda z: layer(z) @ tensor(D, 2), "second linear map"),
    "sum of a map": (lambda z: (z @ tensor(K, D)).sum(-1), "second linear map"),
    "blur": (
        lambda z: Composition(Blur((9,)).double(), fixed(Dense(K, 9)), input_shape=(9,))(z),
        "second linear map.*In CompositionMap",
    ),
    "repeated codes": (lambda z: z[:, [0, 0]] @ tensor(2, D), "were repeated"),
    "expanded codes": (lambda z: z[:, :1].expand(N, K) @ tensor(K, D), "were repeated"),
    "broadcast codes": (lambda z: (z[:, :1] + tensor(K)) @ tensor(K, D), "were repeated"),
    "selected twice": (
        lambda z: z.index_select(1, torch.tensor([1, 1])) @ tensor(2, D),
        "were repeated",
    ),
    "einsum that sums first": (
        lambda z: torch.einsum("nk,kd->n", z, tensor(K, D)),
        "meet one entry",
    ),
    "einsum with dots": (lambda z: torch.einsum("...k,kd->...d", z, tensor(K, D)), "without"),
    # Values asked for.
    "float": (lambda z: float(z[0, 0]), "__float__"),
    "int": (lambda z: int(z[0, 0]), "__int__"),
    "bool": (lambda z: bool(z[0, 0]), "__bool__"),
    "item": (lambda z: z[0, 0].item(), "item"),
    "tolist": (lambda z: z.tolist(), "tolist"),
    "numpy": (lambda z: z.numpy(), "numpy"),
    "asarray": (np.asarray, "__array__"),
    "numpy function": (np.tanh, "__array__"),
    "math": (lambda z: math.exp(z[0, 0]), "__float__"),
    "detach": (lambda z: z.detach(), "detach"),
    "data": (lambda z: z.data, "data"),
    "grad": (lambda z: z.grad, "grad"),
    "storage": (lambda z: z.untyped_storage(), "untyped_storage"),
    "data pointer": (lambda z: z.data_ptr(), "data_ptr"),
    "iteration": (list, "unbind"),
    "unbind": (lambda z: z.unbind(), "unbind"),
    "deep copy": (copy.deepcopy, "__deepcopy__"),
    "pickle": (pickle.dumps, "__reduce_ex__"),
    "parameter": (torch.nn.Parameter, "detach"),
    "tensor constructor": (lambda z: torch.Tensor(z), "no values"),
    "plain tensor": (lambda z: z.as_subclass(torch.Tensor), "no values"),
    "dlpack": (torch.from_dlpack, "dlpack"),
    "rounding": (lambda z: z.to(torch.int64), "rounded to torch.int64"),
    "bits": (lambda z: z.view(torch.int64), "bits are read as torch.int64"),
    "vmap": (torch.vmap(torch.tanh), "affine|no values"),
    "aten": (lambda z: torch.ops.aten.tanh(z), "tanh"),
    # Branches.
    "greater": (lambda z: z > 0, "gt"),
    "zero": (lambda z: z == 0, "a comparison of codes"),
    "not zero": (lambda z: z != 0, "ne"),
    "where": (lambda z: torch.where(tensor(K) > 0, z, -z), "where"),
    "allclose": (lambda z: torch.allclose(z, z), "allclose"),
    "contains": (lambda z: 0.0 in z, "__contains__"),
    "sort": (lambda z: z.sort(), "sort"),
    "codes as index": (lambda z: tensor(K)[z], "affine|indexing"),
    "exp below": (lambda z: z.exp() >= 1, "a comparison of codes"),
    # In place.
    "add in place": (lambda z: z.add_(1), r"add_"),
    "augmented": (lambda z: z.__iadd__(1), r"add_"),
    "into a tensor": (lambda z: tensor(N, K).add_(z), "add_"),
    "copied": (lambda z: tensor(N, K).copy_(z), "copy_"),
    "item set": (lambda z: z.__setitem__(0, 1.0), "__setitem__"),
    "set into a tensor": (lambda z: tensor(N, K).__setitem__(0, z[0]), "__setitem__"),
    "out": (lambda z: torch.add(z, 1, out=tensor(N, K)), "with these arguments.*out="),
    "alpha": (lambda z: torch.add(z, 1, alpha=2), "with these arguments.*alpha="),
    "requires_grad": (lambda z: z.requires_grad_(), "requires_grad_"),
    # Others.
    "concatenation": (lambda z: torch.cat([z, z]), "cat"),
    "pad": (lambda z: F.pad(z, (1, 1)), "pad"),
    "fold": (
        lambda z: F.fold(z.reshape(1, N, K), (3, 4), (2, 2)),
        "fold",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_affine_is_refused_by_name(name, codes):
    program, message = REFUSED[name]
    with pytest.raises(NotAffine, match=message) as refused:
        program(codes)
    assert "Use SparseELBO(estimator=ImplicitMixed())" in str(refused.value)


@pytest.mark.parametrize("learned", ["law", "matrix"])
def test_an_autograd_function_does_not_lose_the_gradient(learned, law):
    loc = torch.zeros(N, K, dtype=torch.float64, requires_grad=learned == "law")
    matrix = tensor(K, D).requires_grad_(learned == "matrix")
    codes = Moments.of(dist.Normal(loc, 1.0).to_event(1), "codes")
    with pytest.raises(NotAffine, match=r"autograd\.Function|no values"):
        dist.Normal(Detached.apply(codes, matrix), 1.0)


def test_no_values_are_printed(codes):
    assert repr(codes) == f"{codes}" == "Moments(shape=(4, 6), dtype=torch.float64)"


def test_questions_about_shape_are_answered(codes):
    assert (codes.shape, codes.dim(), codes.size(-1), len(codes)) == ((N, K), 2, K, N)
    assert (codes.dtype, codes.device.type, codes.numel()) == (torch.float64, "cpu", N * K)
    assert codes.is_floating_point()
    assert not codes.requires_grad
    assert isinstance(codes, torch.Tensor)


def test_correlated_entries_are_used_once():
    law = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.9], [0.9, 1.0]]))
    codes = Moments.of(law, "codes")
    torch.testing.assert_close((2 * codes).variance, torch.tensor([4.0, 4.0]))
    with pytest.raises(NotAffine, match="second linear map"):
        codes @ torch.ones(2, 1)


@pytest.mark.parametrize("wrap", ["to_event", "expand", "mask"])
def test_wrappers_of_a_law_are_looked_through(wrap):
    law = spike_and_slab(K)
    wrapped = {
        "to_event": lambda: law.to_event(1),
        "expand": lambda: law.expand((N, K)).to_event(1),
        "mask": lambda: law.mask(torch.arange(K) > 1).to_event(1),
    }[wrap]()
    codes = Moments.of(wrapped, "codes")
    assert codes.independent
    assert codes.shape == wrapped.shape()
    torch.testing.assert_close(codes.variance[..., 0], law.variance[0].expand(codes.shape[:-1]))
    want = log_mgf(law, torch.tensor(0.1, dtype=torch.float64))
    torch.testing.assert_close(codes.log_mgf(0.1), want.expand(codes.shape))


def test_exp_carries_its_predictor_through_shapes(codes):
    rate = torch.exp(codes @ tensor(K, D))
    assert isinstance(rate, ExpMoments)
    moved = rate.unsqueeze(0).expand(2, N, D)[1].reshape(-1)
    torch.testing.assert_close(
        moved.exponent.expectation, (codes @ tensor(K, D)).expectation.flatten()
    )
    assert dist.Poisson(rate, validate_args=True).rate.shape == (N, D)


def double(value):
    return torch.tensor(value, dtype=torch.float64)


ELEMENTS = {
    "normal": lambda: dist.Normal(double(0.3), 0.7),
    "laplace": lambda: dist.Laplace(double(-0.4), 0.6),
    "exponential": lambda: dist.Exponential(double(2.5)),
    "spike and laplace": lambda: SpikeAndSlab(dist.Laplace(double(0.5), 0.4), 0.3),
    "spike and normal": lambda: SpikeAndSlab(dist.Normal(double(0.5), 0.4), 0.8),
    "spike and exponential": lambda: SpikeAndSlab(dist.Exponential(double(3.0)), 0.2),
}


@pytest.mark.parametrize("value", [-1.2, -0.3, 0.0, 0.9, 1.4])
@pytest.mark.parametrize("name", ELEMENTS)
def test_log_mgf_is_the_integral(name, value):
    law = ELEMENTS[name]()
    slab = getattr(law, "slab", law)
    active = getattr(law, "prob_active", double(1.0)).item()
    ends = {"exponential": (0.0, 1.0, 120.0), "spike and exponential": (0.0, 1.0, 120.0)}
    points = ends.get(name, (-120.0, float(getattr(slab, "loc", 0.0)), 120.0))

    def integrand(z):
        return math.exp(value * z + slab.log_prob(double(z)).item())

    halves = [
        integrate.quad(integrand, lower, upper, epsabs=1e-12, limit=200)[0]
        for lower, upper in itertools.pairwise(points)
    ]
    want = math.log(active * sum(halves) + 1 - active)
    assert log_mgf(law, double(value)).item() == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_log_mgf_is_infinite_where_the_tail_is_too_heavy(sign):
    laplace = dist.Laplace(torch.zeros(3), torch.tensor([0.5, 1.0, 2.0]))
    values = log_mgf(laplace, torch.tensor(sign))
    assert values.isinf().tolist() == [False, True, True]
    mixed = log_mgf(SpikeAndSlab(laplace, 0.5), torch.tensor(sign))
    assert mixed.isinf().tolist() == [False, True, True]
    exponential = log_mgf(dist.Exponential(torch.tensor([0.5, 1.0, 2.0])), torch.tensor(sign))
    assert exponential.isinf().tolist() == [sign > 0, sign > 0, False]


def test_log_mgf_beside_an_infinite_one_has_a_finite_gradient():
    scale = torch.tensor([0.5, 2.0], requires_grad=True)
    law = SpikeAndSlab(dist.Laplace(torch.zeros(2), scale), 0.5)
    log_mgf(law, torch.tensor(1.0))[0].backward()
    assert torch.isfinite(scale.grad).all()
    assert scale.grad[1] == 0


def test_a_law_states_its_own_generating_function():
    class Uniform(dist.Uniform):
        def log_mgf(self, value):
            return ((value * self.high).exp() - (value * self.low).exp()).div(value).log()

    law = Uniform(torch.zeros(()), 1.0)
    assert log_mgf(law, torch.tensor(1.0)).item() == pytest.approx(math.log(math.e - 1), rel=1e-6)
    assert mean_exp(Moments.of(law, "codes")).item() == pytest.approx(math.e - 1, rel=1e-6)


def test_an_unknown_generating_function_is_named():
    with pytest.raises(NotImplementedError, match="known for StudentT.*log_mgf.register"):
        log_mgf(dist.StudentT(3.0), torch.tensor(1.0))
