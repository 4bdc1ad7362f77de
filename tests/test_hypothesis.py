"""No public call fails inside of torch, numpy or Python, whatever it is given.

Drawn are sizes, shapes, dtypes and layouts that do not fit, ``nan``, infinities, huge and negative
numbers, and strings or None in their place. A call either answers, in the documented shape and
with finite numbers for finite input, or is refused by a ``raise`` statement of the library.

What runs at every unrolled step checks nothing, by design, and is given documented input only:
the shrinkages of ``ops``, ``UnitNorm``, the bound maps, the boundaries, ``prox``, ``penalty``, the
score and losses of a likelihood, and the ``advance`` of a method. ``fit`` has its tests in
``tests/infer`` and ``tests/test_contract.py``.
"""
# ruff: noqa: B023 (a call made in a loop is over before the next turn)

import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pyro_sparse
import pyro_sparse.guides
import pyro_sparse.models
from pyro_sparse import ops
from pyro_sparse.diagnostics import match_atoms
from pyro_sparse.dictionaries import (
    Composition,
    Conv,
    Dense,
    Dictionary,
    Interior,
    Overhang,
    Periodic,
    UnitNorm,
    operator_norm_bound,
)
from pyro_sparse.distributions import (
    check_prior,
    check_rate,
    codes_prior,
    conjugate,
    match,
    penalty,
    prox,
    register_conjugate,
    register_prox,
    spread,
)
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.likelihoods import Gaussian, check_data, check_mask
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import FISTA, ISTA, Unrolled, solve

every = settings(max_examples=200, deadline=None, derandomize=True)

LIBRARY = tuple(
    str(Path(package.__file__ or "").parent)
    for package in (pyro_sparse, pyro_sparse.models, pyro_sparse.guides)
)
REFUSALS = (ValueError, TypeError, NotImplementedError)
REFUSED = object()


def answer(call: Callable[[], Any]) -> Any:
    """What a call gives; ``REFUSED`` where the library says no, in so many words."""
    try:
        return call()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        # An error out of compiled code has our line as its last frame too, but no raise there.
        ours = last.filename.startswith(LIBRARY) and (last.line or "").startswith("raise ")
        kind = isinstance(error, REFUSALS) or "device" in str(error)
        if ours and kind and len(str(error)) > 20:
            return REFUSED
        raise


def whole(result: Tensor, shape: tuple[int, ...], *, finite: bool = True) -> None:
    assert tuple(result.shape) == tuple(shape)
    assert not finite or bool(torch.isfinite(result).all())


# What is drawn ------------------------------------------------------------------------------------

JUNK: list[Any] = [
    None,
    "x",
    "",
    True,
    -1,
    0,
    3,
    2.5,
    1j,
    [],
    [1.0, 2.0],
    {},
    (),
    (2, "a"),
    object(),
    int,
    np.ones((2, 4)),
    np.array(["a"]),
    torch.tensor(2.0),
    torch.ones(2, 4).to_sparse(),
    torch.ones(2, 4, device="meta"),
    math.nan,
    math.inf,
    -1e300,
]
junk = st.sampled_from(JUNK)
numbers = st.one_of(st.integers(-3, 6), st.floats(), junk)
sizes = st.one_of(
    st.integers(-2, 5), st.integers(1, 4), st.just(math.nan), st.sampled_from(JUNK[:12])
)
few = st.integers(1, 4)
lengths = st.lists(st.integers(0, 6), max_size=4).map(tuple)
shapes = st.one_of(lengths, lengths, junk)
DTYPES = [torch.float32] * 6 + [
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.bool,
    torch.complex64,
]
FILLS = {
    "normal": 1.0,
    "zero": 0.0,
    "nan": torch.nan,
    "inf": torch.inf,
    "huge": 1e30,
    "tiny": 1e-38,
}


def modest(values: Any) -> bool:
    """Whether numbers are finite and far from overflow."""
    values = torch.as_tensor(values)
    if values.is_meta or values.layout != torch.strided:
        return False
    values = values.to(torch.complex128)
    return bool((torch.isfinite(values) & (values.abs() < 1e4)).all())


@st.composite
def tensors(draw: st.DrawFn, *fitting: tuple[int, ...], fills: Any = tuple(FILLS)) -> Tensor:
    """Half of them in one of the fitting shapes, in float32."""
    fits = draw(st.booleans())
    shape = draw(st.sampled_from(fitting) if fits else lengths)
    dtype = torch.float32 if fits else draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    values = torch.randn(shape, generator=generator)
    scale = FILLS[draw(st.sampled_from(fills))]
    if draw(st.booleans()):  # one number is wrong, or all of them
        values = values * scale
    elif values.numel():
        values.view(-1)[0] = scale
    strided = values.to(dtype)
    if values.dim() == 2 and draw(st.booleans()):
        strided = strided.T.contiguous().T
    return strided


def floats(*shape: int) -> st.SearchStrategy[Tensor]:
    """Documented input: finite numbers in one shape."""
    return st.integers(0, 99).map(
        lambda seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    )


def atoms(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def dense() -> Dense:
    return Dense(3, 4, atoms=atoms(3, 4))


def conv(boundary: Any = None) -> Conv:
    return Conv(3, 2, 3, 2, boundary=boundary, atoms=atoms(3, 2, 3))


class Twice:
    def forward(self, signal: Tensor) -> Tensor:
        return 2 * signal

    adjoint = forward


def composed() -> Composition:
    return Composition(Twice(), dense(), input_shape=(4,), operator_squared_norm=4.0)


DICTIONARIES: dict[str, Callable[[], Dictionary]] = {
    "dense": dense,
    "interior": conv,
    "overhang": lambda: conv(Overhang()),
    "periodic": lambda: conv(Periodic()),
    "composed": composed,
}
dictionaries = st.sampled_from(sorted(DICTIONARIES)).map(lambda name: DICTIONARIES[name]())
signals = st.one_of(junk, tensors((4,), (2, 4), (2, 7), (2, 6), (5, 2, 7), (5, 2, 6)))
LAPLACE = dist.Laplace(0.0, 0.5)
PRIORS = [LAPLACE, dist.Laplace(torch.zeros(3), 1.0), dist.Exponential(1.0), dist.Normal(0.0, 1.0)]
laws = st.one_of(
    st.sampled_from(PRIORS),
    st.just(dist.Exponential),
    st.sampled_from(
        [
            torch.distributions.Laplace(0.0, 1.0),
            dist.Laplace(torch.zeros(5), 1.0),
            dist.Gamma(2.0, 1.0),
            dist.Dirichlet(torch.ones(3)),
            lambda rate: rate,
            lambda rate: None,
        ]
    ),
    junk,
)
rates = st.one_of(st.none(), numbers, tensors((), (3,), (2, 1, 3)))
masks = st.one_of(
    st.none(),
    junk,
    tensors((2, 4)).map(lambda t: t.real > 0),
    st.lists(st.booleans(), min_size=4, max_size=4).map(torch.tensor),
)
methods = st.one_of(
    st.none(), st.booleans().map(lambda on: FISTA(restart=on)), st.just(ISTA()), junk
)
likelihoods = st.one_of(
    st.sampled_from([0.3, 1.0]).map(Gaussian),
    st.sampled_from([(4,), (1,), (3,), (5, 1, 4), (2, 1)]).map(lambda s: Gaussian(torch.ones(s))),
    st.just(Gaussian(torch.ones(4).double())),
    junk,
)


# ops ----------------------------------------------------------------------------------------------


@every
@given(lengths, st.floats(0, 1e3), st.booleans(), st.integers(0, 99))
def test_shrinkages(shape: tuple, threshold: float, tensor: bool, seed: int) -> None:
    codes = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    level: Any = torch.tensor(threshold) if tensor else threshold
    for shrink in (ops.soft_threshold, ops.soft_threshold_nonnegative, ops.hard_threshold):
        whole(shrink(codes, level), shape)
    assume(codes.dim() > 0)
    whole(ops.group_soft_threshold(codes, level), shape)
    whole(ops.group_soft_threshold(codes, level, tuple(range(codes.dim()))), shape)


@every
@given(lengths, st.integers(0, 99))
def test_positive(shape: tuple, seed: int) -> None:
    value = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.01
    torch.testing.assert_close(ops.Positive()(ops.Positive().right_inverse(value)), value)


@every
@given(st.one_of(junk, tensors((3, 3), (2, 3, 3), (1, 1))), st.booleans(), numbers, numbers)
def test_largest_eigenvalue_bound(matrix: Any, joint: bool, slack: Any, num_steps: Any) -> None:
    if isinstance(matrix, Tensor) and matrix.dim() > 1 and matrix.layout == torch.strided:
        if matrix.shape[-1] == matrix.shape[-2] and matrix.is_floating_point():
            matrix = matrix @ matrix.mT  # its documented input is positive semi-definite
    result = answer(lambda: ops.largest_eigenvalue_bound(matrix, joint=joint))
    if result is not REFUSED and not matrix.is_meta:
        whole(result, () if joint else matrix.shape[:-2], finite=modest(matrix))
    answer(lambda: ops.largest_eigenvalue_bound(torch.eye(2), slack=slack))
    answer(lambda: ops.largest_eigenvalue_bound(torch.eye(2), num_steps=num_steps))


@every
@given(st.one_of(junk, tensors((3,))), st.sampled_from([None, *map(torch.empty(0).to, DTYPES)]))
def test_check_tensor(value: Any, like: Tensor | None) -> None:
    if answer(lambda: ops.check_tensor("value", value, like)) is not REFUSED:
        assert value.is_floating_point()
        assert like is None or like.dtype == value.dtype


# dictionaries -------------------------------------------------------------------------------------


@every
@given(sizes, sizes, st.one_of(st.none(), junk, tensors((3, 4), (1, 1))), st.booleans())
def test_dense(num_atoms: Any, num_features: Any, given: Any, unit_norm: bool) -> None:
    for size in ((num_atoms, num_features), (3, 4)):
        assume(not isinstance(given, Tensor) or not given.is_meta)
        made = answer(lambda: Dense(*size, atoms=given, unit_norm=unit_norm))
        if made is not REFUSED:
            whole(made.atoms, size)
            whole(made(torch.ones(2, size[0], dtype=made.like.dtype)), (2, size[1]))


@every
@given(
    sizes,
    sizes,
    st.one_of(sizes, st.lists(sizes, max_size=4).map(tuple)),
    st.one_of(sizes, st.lists(sizes, max_size=4).map(tuple)),
    st.one_of(junk, st.sampled_from([None, Interior(), Overhang(), Periodic(), Interior])),
    st.one_of(st.none(), tensors((3, 2, 3))),
)
def test_conv(
    num_atoms: Any, channels: Any, kernel: Any, stride: Any, boundary: Any, given: Any
) -> None:
    made = answer(lambda: Conv(num_atoms, channels, kernel, stride, boundary=boundary))
    if made is not REFUSED:
        whole(made.atoms, (num_atoms, channels, *made.kernel_size))
    for options in ({"boundary": boundary}, {"atoms": given}, {"stride": stride}):
        made = answer(lambda: Conv(3, 2, 3, **options))
        assert made is REFUSED or torch.isfinite(made.atoms).all()


@every
@given(st.one_of(st.just(Twice()), junk), st.one_of(dictionaries, junk), shapes, numbers)
def test_composition(operator: Any, dictionary: Any, shape: Any, norm: Any) -> None:
    for call in (
        lambda: Composition(operator, dictionary, input_shape=shape, operator_squared_norm=norm),
        lambda: Composition(operator, dense(), input_shape=(4,), operator_squared_norm=1.0),
        lambda: Composition(Twice(), dictionary, input_shape=(4,), operator_squared_norm=1.0),
        lambda: Composition(Twice(), dense(), input_shape=shape, operator_squared_norm=1.0),
        lambda: Composition(Twice(), dense(), input_shape=(4,), operator_squared_norm=norm),
    ):
        made = answer(call)
        if made is not REFUSED:
            large = isinstance(norm, float) and norm > 1e30
            whole(made.squared_norm(), (), finite=not large)


@every
@given(st.one_of(junk, tensors((4,), (2, 4))), st.one_of(junk, tensors((4,), (2, 4))))
def test_an_operator_that_makes_anything(forward: Any, adjoint: Any) -> None:
    class Operator:
        def forward(self, signal: Tensor) -> Any:
            return forward

        def adjoint(self, measurement: Tensor) -> Any:
            return adjoint

    answer(lambda: Composition(Operator(), dense(), input_shape=(4,)))


@every
@given(shapes, numbers, numbers, st.one_of(junk, tensors((1,))))
def test_operator_norm_bound(shape: Any, probes: Any, steps: Any, like: Any) -> None:
    assume(not isinstance(like, Tensor) or not like.is_meta)
    one = torch.zeros(1)
    for call in (
        lambda: operator_norm_bound(Twice(), shape, like=one, num_steps=2),
        lambda: operator_norm_bound(Twice(), (3,), like=like, num_steps=2),
        lambda: operator_norm_bound(Twice(), (3,), like=one, num_probes=probes, num_steps=2),
        lambda: operator_norm_bound(Twice(), (3,), like=one, num_steps=steps),
    ):
        bound = answer(call)
        assert bound is REFUSED or float(bound) >= 4.0


@every
@given(dictionaries, shapes)
def test_code_shape(dictionary: Dictionary, shape: Any) -> None:
    result = answer(lambda: dictionary.code_shape(shape))
    if result is not REFUSED:
        assert len(result) - dictionary.code_dims == len(shape) - dictionary.signal_dims
        assert result[len(result) - dictionary.code_dims] == dictionary.num_atoms


@every
@given(dictionaries, st.one_of(junk, tensors((3,), (2, 3), (3, 4), (3, 1), (2, 3, 4))))
def test_forward(dictionary: Dictionary, codes: Any) -> None:
    result = answer(lambda: dictionary(codes))
    if result is not REFUSED and codes.numel():
        assert dictionary.code_shape(result.shape) == codes.shape
        assert torch.isfinite(result).all() or not modest(codes)


@every
@given(dictionaries, signals)
def test_adjoint(dictionary: Dictionary, signal: Any) -> None:
    result = answer(lambda: dictionary.adjoint(signal))
    if result is not REFUSED:
        whole(result, dictionary.code_shape(signal.shape), finite=modest(signal))


@every
@given(dictionaries, st.one_of(junk, tensors((3, 4), (3, 2, 3), (5, 3, 4))))
def test_atoms_from_outside(dictionary: Dictionary, given: Any) -> None:
    assume(not isinstance(given, Tensor) or not given.is_meta)
    shape = dictionary.atoms.shape
    if given is not None:
        answer(lambda: dictionary.bind(given))
    if answer(lambda: dictionary.init_atoms_(given)) is not REFUSED:
        whole(dictionary.atoms, shape)
    whole(dictionary.squared_norm(), ())
    dictionary.freeze_()
    assert not list(dictionary.parameters())


@every
@given(few, few, st.integers(1, 3), st.integers(0, 99))
def test_unit_norm(num_atoms: int, channels: int, dims: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(num_atoms, channels, *[2] * (dims - 1), generator=generator)
    norms = UnitNorm()(UnitNorm().right_inverse(made)).flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(num_atoms))


@every
@given(st.sampled_from([Interior(), Overhang(), Periodic()]), st.integers(-9, 20), few, st.data())
def test_boundaries(boundary: Any, length: int, kernel: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, kernel))
    positions = answer(lambda: boundary.num_positions(length, kernel, stride))
    if positions is not REFUSED:
        assert boundary.length(positions, kernel, stride) == length
        canvas = boundary.to_canvas(torch.ones(1, length), -1, kernel, stride)
        whole(canvas, (1, (positions - 1) * stride + kernel))
        whole(boundary.to_signal(canvas, -1, kernel, stride), (1, length))


# distributions ------------------------------------------------------------------------------------


@every
@given(laws, st.booleans(), rates)
def test_check_prior_and_check_rate(prior: Any, has_rate: bool, rate: Any) -> None:
    answer(lambda: check_prior(prior, has_rate=has_rate))
    answer(lambda: check_rate(rate))


@every
@given(
    laws, rates, st.one_of(shapes, st.just((3,)), st.just((3, 5))), st.one_of(junk, tensors((1,)))
)
def test_codes_prior(prior: Any, rate: Any, shape: Any, like: Any) -> None:
    one = torch.zeros(1)
    assume(not getattr(rate, "is_meta", False))
    assume(prior is not int)  # a callable of the user's that fails is theirs
    for call in (
        lambda: codes_prior(prior, rate, (3,), one),
        lambda: codes_prior(prior, None, shape, one),
        lambda: codes_prior(LAPLACE, None, shape, like),
        lambda: codes_prior(dist.Exponential, rate, shape, one),
    ):
        law = answer(call)
        if law is not REFUSED:
            assert tuple(law.event_shape) in {
                (3,),
                tuple(shape) if isinstance(shape, tuple | list) else (),
            }


@every
@given(laws, shapes, shapes, st.one_of(junk, tensors((1,))))
def test_spread_and_match(law: Any, shape: Any, batch: Any, like: Any) -> None:
    one = torch.zeros(1)
    result = answer(lambda: spread(law, shape, one))
    assert result is REFUSED or result.event_shape == torch.Size(shape)
    result = answer(lambda: spread(LAPLACE, (3,), one, batch=batch))
    assert result is REFUSED or result.batch_shape == torch.Size(batch)
    answer(lambda: spread(law, (3,), like))
    result = answer(lambda: match(law, one))
    assert result is REFUSED or type(result) is type(law)
    answer(lambda: match(LAPLACE, like))


@every
@given(st.sampled_from(PRIORS), lengths, st.floats(0, 1e3), st.integers(0, 99))
def test_prox_and_penalty(prior: Any, shape: tuple, step: float, seed: int) -> None:
    value = torch.randn(*shape, 3, generator=torch.Generator().manual_seed(seed)).abs()
    whole(prox(prior, value, step), value.shape)
    whole(penalty(prior, value), value.shape)
    one = spread(prior, (3,), value)
    whole(prox(one, value, step), value.shape)
    whole(penalty(one, value), shape)


@every
@given(laws)
def test_dispatch(prior: Any) -> None:
    found = answer(lambda: conjugate(prior))
    assert found is REFUSED or bool((found.lower <= found.upper).all())
    kinds = (dist.Laplace, dist.Exponential, dist.Normal)
    if not isinstance(prior, kinds):
        answer(lambda: prox(prior, torch.zeros(3), 1.0))
        if not isinstance(prior, torch.distributions.Distribution):
            answer(lambda: penalty(prior, torch.zeros(3)))
    if not isinstance(prior, type):
        answer(lambda: register_prox(prior))
        answer(lambda: register_conjugate(prior))


# likelihoods --------------------------------------------------------------------------------------


@every
@given(st.one_of(numbers, tensors((4,), (), (2, 1))), st.booleans(), signals)
def test_gaussian(scale: Any, trainable: bool, data: Any) -> None:
    assume(not isinstance(scale, Tensor) or not scale.is_meta)
    made = answer(lambda: Gaussian(scale, trainable=trainable))
    own = Gaussian(torch.ones(4), trainable=trainable)
    answer(lambda: own.assign_(scale))
    # The exponential of the logarithm of the largest float is infinite.
    assert torch.isfinite(own.scale).all() or float(torch.as_tensor(scale).max()) > 1e38
    for likelihood in (own, Gaussian(1.0), *([] if made is REFUSED else [made])):
        answer(lambda: likelihood.check(data))
        if isinstance(data, Tensor) and data.is_meta:
            continue
        # A predictor is finite: of one that is not, Pyro's own validation speaks.
        if not isinstance(data, Tensor) or modest(data):
            law = answer(lambda: likelihood(data))
            assert law is REFUSED or law.batch_shape == data.shape
    if made is not REFUSED:
        assert (made.scale > 0).all()
        bound = made.curvature(torch.ones(1))
        whole(bound, tuple(made.scale.shape), finite=bool((made.scale > 1e-15).all()))


@every
@given(lengths, st.floats(1e-3, 1e3), st.integers(0, 99))
def test_scores_and_losses(shape: tuple, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    predictor, y = torch.randn(2, *shape, generator=generator)
    likelihood = Gaussian(scale)
    whole(likelihood.mean(predictor), shape)
    for function in (likelihood.residual, likelihood.loss, likelihood.dual):
        whole(function(predictor, y), shape)


@every
@given(signals, masks, numbers, st.integers(1, 3))
def test_check_data_and_check_mask(y: Any, mask: Any, num_data: Any, dims: int) -> None:
    for like in (None, torch.empty(0)):
        for chosen in ((mask, None), (None, num_data)):
            result = answer(lambda: check_data(y, *chosen, dims, like))
            if result is not REFUSED:
                assert result[0].shape == y.shape
                assert result[1] is None or result[1].shape == y.shape
    result = answer(lambda: check_mask(y, mask))
    assert result is REFUSED or (result.dtype == torch.bool and result.shape == y.shape)


# solvers ------------------------------------------------------------------------------------------


@every
@given(dictionaries, signals, laws, rates, masks)
def test_solve(dictionary: Dictionary, y: Any, prior: Any, rate: Any, mask: Any) -> None:
    assume(prior is not int and not getattr(rate, "is_meta", False))
    for call in (
        lambda: solve(y, dictionary, LAPLACE, max_steps=2, mask=mask),
        lambda: solve(y, dictionary, LAPLACE, max_steps=2),
        lambda: solve(torch.ones(4), dense(), prior, rate=rate, max_steps=2),
    ):
        found = answer(call)
        if found is not REFUSED:
            assert found.gap.shape == found.num_steps.shape == found.converged.shape
            if isinstance(y, Tensor) and modest(y):
                assert torch.isfinite(found.codes).all()
                assert torch.isfinite(found.gap).all()


@every
@given(
    junk,
    likelihoods,
    numbers,
    st.one_of(st.integers(-1, 3), junk),
    st.one_of(st.none(), junk, tensors((2, 3))),
    methods,
)
def test_options_of_solve(
    dictionary: Any, likelihood: Any, tol: Any, steps: Any, init: Any, method: Any
) -> None:
    y = torch.ones(2, 4)
    answer(lambda: solve(y, dictionary, LAPLACE))
    for options in (
        {"likelihood": likelihood},
        {"tol": tol},
        {"max_steps": steps},
        {"init": init},
        {"method": method},
    ):
        found = answer(lambda: solve(y, dense(), LAPLACE, **{"max_steps": 2, **options}))
        if found is not REFUSED:
            whole(found.codes, (2, 3), finite=not isinstance(init, Tensor) or modest(init))


@every
@given(dictionaries, signals, laws, masks, st.one_of(st.none(), junk, tensors((3, 4), (3, 2, 3))))
def test_unrolled(dictionary: Dictionary, y: Any, law: Any, mask: Any, given: Any) -> None:
    encoder = Unrolled(dictionary, Gaussian(1.0), num_steps=2)
    shape = answer(lambda: dictionary.code_shape(tuple(getattr(y, "shape", ()))))
    fitting = LAPLACE
    if shape is not REFUSED:
        fitting = spread(LAPLACE, shape[len(shape) - dictionary.code_dims :], torch.empty(0))
    for call in (
        lambda: encoder(y, fitting, mask=mask),
        lambda: encoder(y, law),
        lambda: encoder(y, fitting, atoms=given),
    ):
        codes = answer(call)
        if codes is not REFUSED and given is None:
            whole(codes, shape, finite=modest(y))


options_of_layers = st.fixed_dictionaries(
    {},
    optional={
        "num_steps": st.one_of(st.integers(-1, 3), junk),
        "method": methods,
        "step_size": numbers,
        "lipschitz": numbers,
        "analysis": st.one_of(junk, dictionaries),
        "synthesis": st.one_of(junk, dictionaries),
    },
)


@every
@given(st.one_of(dictionaries, junk), likelihoods, options_of_layers)
def test_options_of_unrolled(dictionary: Any, likelihood: Any, options: dict[str, Any]) -> None:
    law = spread(LAPLACE, (3,), torch.empty(0))
    answer(lambda: Unrolled(dictionary, likelihood, **options))
    encoder = answer(lambda: Unrolled(dense(), likelihood, **options))
    if encoder is not REFUSED:
        codes = answer(lambda: encoder(torch.ones(2, 4), law))
        large = options.get("step_size") or 1 / (options.get("lipschitz") or 1.0)
        assert codes is REFUSED or large > 1e3 or whole(codes, (2, 3)) is None


@every
@given(st.sampled_from([FISTA(), FISTA(restart=True), ISTA()]), lengths, few)
def test_methods(method: Any, shape: tuple, steps: int) -> None:
    assert repr(method)
    codes = atoms(*shape, 3)
    state = method.start(codes)
    for _ in range(steps):
        state = method.advance(state, codes / 2, 1)
        whole(state.codes, (*shape, 3))
        whole(state.point, (*shape, 3))
    assert state.map(Tensor.double).point.dtype == torch.float64


# models and guides --------------------------------------------------------------------------------


@every
@given(dictionaries, signals, masks, numbers)
def test_calls_of_model_and_guide(dictionary: Dictionary, y: Any, mask: Any, size: Any) -> None:
    options = (
        {"signal_shape": (2, 7 if dictionary.boundary == Interior() else 6)}
        if isinstance(dictionary, Conv)
        else {}
    )
    model = SparseCoding(dictionary, Gaussian(1.0), LAPLACE, **options)
    guide = UnrolledFISTA(dictionary, Gaussian(1.0), LAPLACE, num_steps=2)
    for chosen in ((None, mask), (size, None)):
        result = answer(lambda: guide(y, *chosen))
        again = answer(lambda: guide.encode(y, chosen[1], num_data=chosen[0]))
        assert (result is REFUSED) == (again is REFUSED)
        if result is not REFUSED:
            whole(result, dictionary.code_shape(y.shape), finite=modest(y))
        if y is not None:
            drawn = answer(lambda: model(y, *chosen))
            assert (drawn is REFUSED) == (result is REFUSED)
            assert drawn is REFUSED or drawn.shape == y.shape
    drawn = answer(lambda: model(num_data=size))
    assert drawn is REFUSED or len(drawn) == size


@every
@given(st.one_of(dictionaries, junk), likelihoods, laws, rates, st.one_of(st.none(), laws), shapes)
def test_sparse_coding(
    dictionary: Any, likelihood: Any, prior: Any, rate: Any, atoms_prior: Any, shape: Any
) -> None:
    # Callables of the user's that fail are theirs.
    assume(prior is not int and rate is not int and not getattr(rate, "is_meta", False))
    parts = {"dictionary": dense(), "likelihood": Gaussian(1.0), "prior": LAPLACE}
    for options in (
        {"dictionary": dictionary},
        {"likelihood": likelihood},
        {"prior": prior, "rate": rate},
        {"dictionary_prior": atoms_prior},
        {"signal_shape": shape},
    ):
        model = answer(lambda: SparseCoding(**{**parts, **options}))
        if model is not REFUSED:
            y = answer(lambda: model(torch.ones(2, 4)))
            assert y is REFUSED or y.shape == (2, 4)
            drawn = answer(lambda: model(num_data=2))
            assert drawn is REFUSED or len(drawn) == 2


@every
@given(st.one_of(dictionaries, junk), likelihoods, laws, rates, options_of_layers, junk)
def test_unrolled_fista(
    dictionary: Any, likelihood: Any, prior: Any, rate: Any, layers: dict[str, Any], rest: Any
) -> None:
    assume(prior is not int and rate is not int and not getattr(rate, "is_meta", False))
    assume(rest is not int)
    parts = {"dictionary": dense(), "likelihood": Gaussian(1.0), "prior": LAPLACE, "num_steps": 2}
    for options in (
        {"dictionary": dictionary},
        {"likelihood": likelihood},
        {"prior": prior, "rate": rate},
        {"rest": rest},
        layers,
    ):
        guide = answer(lambda: UnrolledFISTA(**{**parts, **options}))
        if guide is not REFUSED:
            codes = answer(lambda: guide(torch.ones(2, 4)))
            assert codes is REFUSED or codes.shape[-2:] == (2, 3)
        if not {"analysis", "synthesis"} & set(options):
            answer(lambda: UnrolledFISTA.untied(**{**parts, **options}))


@every
@given(rates, st.one_of(junk, tensors((3, 4), (5, 1, 3, 4))), junk)
def test_values_of_other_sites(rate: Any, given: Any, values: Any) -> None:
    def rest(y: Tensor, num_data: int | None) -> Any:
        return values

    assume(not getattr(rate, "is_meta", False))
    guide = UnrolledFISTA(dense(), Gaussian(1.0), dist.Exponential, rest=rest, num_steps=2)
    y = torch.ones(2, 4)
    for call in (
        lambda: guide(y),
        lambda: guide.encode(y, values=values),
        lambda: guide.encode(y, values={"rate": rate}),
        lambda: guide.encode(y, values={"rate": 1.0, "dictionary": given}),
    ):
        codes = answer(call)
        assert codes is REFUSED or codes.shape[-2:] == (2, 3)


# diagnostics --------------------------------------------------------------------------------------


@every
@given(st.one_of(junk, tensors((3, 4), (3, 2, 4))), st.one_of(junk, tensors((3, 4), (5, 2, 3))))
def test_match_atoms(learned: Any, truth: Any) -> None:
    assume(not any(isinstance(given, Tensor) and given.is_meta for given in (learned, truth)))
    found = answer(lambda: match_atoms(learned, truth))
    if found is not REFUSED:
        whole(found.correlation, (len(truth),))
        assert ((found.correlation >= 0) & (found.correlation <= 1)).all()
        assert found.shift.shape == (len(truth), max(0, truth.dim() - 2))


def test_errors_from_elsewhere_are_not_taken_for_refusals() -> None:
    broken = nn.Linear(3, 2)
    for call in (
        lambda: broken(torch.ones(4)),
        lambda: [][1],
        lambda: torch.ones(2) @ torch.ones(3),
    ):
        try:
            answer(call)
        except (RuntimeError, IndexError):
            continue
        raise AssertionError
