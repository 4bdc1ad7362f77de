"""The input contract: one row of bad or unusual input after the other, at every public entry point.

Rows of the project's table that have no entry point yet, and so no test here: negative or
fractional counts, values outside [0, 1] and zeros for Gamma (no such families), transform before
fit and another feature count than in fit (no scikit-learn adapter), unknown names of options with
the closest one suggested (no option is a name: methods, boundaries and families are objects).

``SparseCoding`` and ``UnrolledFISTA`` run at every step and do not search their data for ``nan``:
``fit`` and ``solve`` do so, once. They and ``solve`` cast nothing: another dtype is refused there.
"""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_sparse.diagnostics import match_atoms
from pyro_sparse.dictionaries import Composition, Conv, Dense, Dictionary
from pyro_sparse.distributions import Rate, codes_prior, prox
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.infer import fit
from pyro_sparse.likelihoods import Gaussian, check_data
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import Unrolled, solve

LAPLACE = dist.Laplace(0.0, 0.5)
quick = functools.partial(fit, progress=False, epochs=1)


def dense() -> Dense:
    return Dense(6, 4, atoms=torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))


def conv() -> Conv:
    return Conv(3, 2, 4, atoms=torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)))


def make(
    build: Callable[[], Dictionary] = dense, likelihood: Gaussian | None = None
) -> tuple[SparseCoding, UnrolledFISTA]:
    dictionary, likelihood = build(), Gaussian(0.3) if likelihood is None else likelihood
    model = SparseCoding(dictionary, likelihood, LAPLACE)
    return model, UnrolledFISTA.untied(dictionary, likelihood, LAPLACE, num_steps=3)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape or (12, 4), generator=torch.Generator().manual_seed(3))


def state(*modules: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for module in modules for t in module.state_dict().values()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) > 0 and all(map(torch.equal, first, second))


def refused(error: type[Exception], match: str, data: Any, **options: Any) -> None:
    """``fit`` refuses, and nothing has moved: parameters, optimiser and random state."""
    model, guide = pair = make(options.pop("build", dense))
    before, random, store = state(*pair), torch.random.get_rng_state(), dict(pyro.get_param_store())
    with pytest.raises(error, match=match):
        quick(model, guide, data, **options)
    assert same(state(*pair), before)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert dict(pyro.get_param_store()) == store
    assert all(p.grad is None for p in nn.ModuleList(pair).parameters())


# What takes one batch of dense data, by name: each refuses in the same words.
CALLS: dict[str, Callable[..., Any]] = {
    "model": lambda y, mask=None: make()[0](y, None, mask),
    "guide": lambda y, mask=None: make()[1](y, None, mask),
    "encode": lambda y, mask=None: make()[1].encode(y, mask),
    "solve": lambda y, mask=None: solve(y, dense(), LAPLACE, max_steps=3, mask=mask),
    "unrolled": lambda y, mask=None: Unrolled(dense(), Gaussian(1.0))(
        y, codes_prior(LAPLACE, None, (6,), like=torch.empty(0)), mask=mask
    ),
    "adjoint": lambda y, mask=None: dense().adjoint(y),
    "check_data": lambda y, mask=None: check_data(y, mask, None, 1, torch.empty(0)),
}
calls = pytest.mark.parametrize("call", CALLS)
batch_calls = pytest.mark.parametrize("call", ["model", "guide", "encode"])
masked_calls = pytest.mark.parametrize("call", ["model", "guide", "encode", "solve", "unrolled"])


# Not a number, infinite ---------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", [Tensor.clone, Tensor.numpy, Tensor.tolist, Tensor.double])
def test_data_that_are_not_finite_are_counted_and_placed(kind: Callable, bad: float) -> None:
    y = draw()
    y[2, 1] = y[7, 3] = bad
    message = r"finite data, got 2 values that are not, the first at index \(2, 1\).*mask="
    refused(ValueError, message, kind(y))
    refused(ValueError, message, kind(y), mask=torch.ones(12, 4, dtype=torch.bool))
    with pytest.raises(
        ValueError, match=r"got 2 values that are not, the first at \(2, 1\).*mask="
    ):
        solve(y, dense(), LAPLACE)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_memory_map_is_searched_before_the_step_that_would_read_it(
    bad: float, tmp_path: Path
) -> None:
    y = draw().numpy().copy()
    y[:, 1] = bad
    y.tofile(tmp_path / "data")
    data = np.memmap(tmp_path / "data", dtype=np.float32, mode="r", shape=(12, 4))
    refused(ValueError, r"3 values that are not.*of batch 0 \(rows .*mask=", data, batch_size=3)


def test_what_a_mask_hides_may_be_anything() -> None:
    y, mask = draw(), torch.ones(12, 4, dtype=torch.bool)
    y[2, 1], mask[2, 1] = torch.nan, False
    pair, twin = make(), make()
    quick(*pair, y, mask=mask)
    quick(*twin, y.nan_to_num(5.0), mask=mask)
    assert same(state(*pair), state(*twin))
    assert torch.isfinite(solve(y, dense(), LAPLACE, mask=mask).codes).all()
    assert torch.isfinite(make()[1](y, None, mask)).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0, -1.0])
def test_numbers_that_must_be_positive_and_finite_are(bad: float) -> None:
    with pytest.raises(ValueError, match="Expected scale > 0 and finite.*standard deviation"):
        Gaussian(bad)
    with pytest.raises(ValueError, match="Expected scale > 0 and finite"):
        Gaussian(1.0).assign_(bad)
    with pytest.raises(ValueError, match="Expected a finite lipschitz > 0, got"):
        UnrolledFISTA(dense(), Gaussian(1.0), LAPLACE, lipschitz=bad)
    with pytest.raises(ValueError, match=r"atoms of finite, non-zero length.*Replace it"):
        Dense(2, 2, atoms=torch.tensor([[1.0, 0.0], [max(bad, 0.0), 0.0]]))
    with pytest.raises(ValueError, match="operator_squared_norm > 0 and finite"):
        Composition(Same(), dense(), input_shape=(4,), operator_squared_norm=bad)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_atoms_that_are_not_finite_are_placed(bad: float) -> None:
    learned = torch.eye(3)
    learned[1, 2] = bad
    message = r"Expected learned to be finite, got 1 values.*at \(1, 2\). Leave out"
    with pytest.raises(ValueError, match=message):
        match_atoms(learned, torch.eye(3))
    with pytest.raises(ValueError, match="Expected truth to be finite"):
        match_atoms(torch.eye(3), learned)


@pytest.mark.parametrize("bad", [torch.nan, -1.0])
def test_a_rate_that_the_prior_refuses_is_named(bad: float) -> None:
    model = SparseCoding(dense(), Gaussian(1.0), lambda rate: dist.Laplace(0.0, 1 / rate), rate=bad)
    with pytest.raises(ValueError, match=r"Expected a rate that the prior accepts.*rate > 0.*got"):
        model(draw())


# Empty --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,), ()])
@pytest.mark.parametrize("kind", [Tensor.clone, Tensor.numpy])
def test_empty_data_are_refused(shape: tuple[int, ...], kind: Callable) -> None:
    refused(
        ValueError,
        r"Expected data with at least one datum, got shape \(",
        kind(draw()[0, 0].expand(shape)),
    )


@batch_calls
def test_an_empty_batch_is_refused(call: str) -> None:
    with pytest.raises(ValueError, match=r"shape \(n, features\) with n >= 1, got \(0, 4\)"):
        CALLS[call](torch.zeros(0, 4))


def test_no_data_have_no_codes() -> None:
    """Of any leading dimensions of ``solve``, none is an answer too."""
    assert solve(torch.zeros(0, 4), dense(), LAPLACE).codes.shape == (0, 6)


@pytest.mark.parametrize("shapes", [((0, 3), (3, 3)), ((3, 3), (0, 3)), ((3, 0), (3, 0))])
def test_no_atoms_cannot_be_matched(shapes: tuple) -> None:
    with pytest.raises(ValueError, match=r"with at least one atom and feature, got \("):
        match_atoms(*map(torch.zeros, shapes))


@pytest.mark.parametrize("hidden", [3, 12])
def test_a_batch_without_an_observed_sample_is_skipped_and_counted(hidden: int) -> None:
    y, mask = draw(), torch.ones(12, 4, dtype=torch.bool)
    mask[:hidden] = False
    model, guide = make()
    before = state(model, guide)
    history = quick(model, guide, y, mask=mask, batch_size=1, epochs=2)
    assert history.skipped == 2 * hidden
    assert len(history.step_loss) == 2 * (12 - hidden)
    assert all(torch.isfinite(t).all() for t in state(model, guide))
    assert same(state(model, guide), before) == (hidden == 12)


@masked_calls
def test_a_masked_batch_has_the_codes_of_nothing(call: str) -> None:
    result = CALLS[call](draw(), torch.zeros(12, 4, dtype=torch.bool))
    assert (getattr(result, "codes", result) == 0).all()


# Shapes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "match"), [
    ((12, 5), r"signal of shape \(..., 4\) \(features last\), got"),
    ((12,), r"shape \(n, features\) with n >= 1, got \(\d+,\).*minibatch of one: y\[None\]"),
    ((3, 12, 4), r"shape \(n, features\) with n >= 1, got \(\d+, 12, 4\)"),
])  # fmt: skip
@pytest.mark.parametrize("entry", ["fit", "model", "guide", "encode"])
def test_the_shape_of_dense_data(entry: str, shape: tuple, match: str) -> None:
    if entry == "fit":
        refused(ValueError, match, draw(*shape))
    else:
        with pytest.raises(ValueError, match=match):
            CALLS[entry](draw(*shape))


@pytest.mark.parametrize("shape", [(12, 5), (5,), ()])
@pytest.mark.parametrize("call", ["solve", "unrolled", "adjoint"])
def test_the_width_of_signals_with_any_leading_dimensions(call: str, shape: tuple) -> None:
    with pytest.raises(ValueError, match=r"shape \(..., 4\) \(features last\), got \("):
        CALLS[call](torch.zeros(shape))


@pytest.mark.parametrize(("shape", "match"), [
    ((12, 3, 11), r"\(..., channels=2, length\), got \((12, )?3, 11\).*y\[:, None\]"),
    ((12, 2, 3), "a length of 4.*got 3. Pad the signal to 4 samples"),
])  # fmt: skip
def test_the_channels_and_length_of_pictures(shape: tuple, match: str) -> None:
    y = draw(*shape)
    refused(ValueError, match, y, build=conv)
    model, guide = make(conv)
    calls = (model, guide, guide.encode, lambda y: solve(y, conv(), LAPLACE), conv().adjoint)
    for call in calls:
        with pytest.raises(ValueError, match=match):
            call(y)


def test_channels_are_a_dimension() -> None:
    match = r"shape \(n, channels, \*lengths\).*got \(12, 11\).*A single channel is a dimension too"
    refused(ValueError, match, draw(12, 11), build=conv)
    for program in make(conv):
        with pytest.raises(ValueError, match=match):
            program(draw(12, 11))


@pytest.mark.parametrize(("build", "shape", "match"), [
    (dense, (3, 5), r"codes of shape \(..., atoms=6\), got \(3, 5\)"),
    (dense, (), r"codes of shape \(..., atoms=6\), got \(\)"),
    (conv, (4, 5), r"codes of shape \(..., atoms=3, \*positions\), got \(4, 5\)"),
    (conv, (3, 0), r"codes of shape \(..., atoms=3, \*positions\), got \(3, 0\)"),
    (lambda: Composition(Same(), dense(), input_shape=(4,)), (5,), r"\(..., atoms=6\), got \(5,\)"),
])  # fmt: skip
def test_the_shape_of_codes(build: Callable, shape: tuple, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build()(torch.zeros(shape))


@pytest.mark.parametrize("build", [dense, conv])
def test_the_shape_of_atoms(build: Callable) -> None:
    dictionary = build()
    other = torch.ones(5, *dictionary.atoms.shape[1:])
    for call in (dictionary.bind, dictionary.init_atoms_):
        with pytest.raises(ValueError, match=r"Expected atoms of shape .*got \(5, "):
            call(other)
    with pytest.raises(ValueError, match="Atoms come first: transpose"):
        Dense(6, 4, atoms=torch.ones(4, 6))
    with pytest.raises(ValueError, match=r"\(atoms, channels, \*kernel\) = \(3, 2, 4\), got"):
        Conv(3, 2, 4, atoms=torch.ones(3, 1, 4))


@pytest.mark.parametrize("shape", [(3,), (5, 12, 4), (2, 1, 4)])
def test_the_shape_of_a_scale(shape: tuple) -> None:
    likelihood = Gaussian(torch.ones(shape))
    match = r"scale of Gaussian that broadcasts to the data, \(12, 4\), got \("
    model, guide = make(likelihood=likelihood)
    solver = functools.partial(solve, dictionary=dense(), prior=LAPLACE, likelihood=likelihood)
    for call in (model, guide, solver, likelihood, likelihood.check):
        with pytest.raises(ValueError, match=match):
            call(draw())
    with pytest.raises(ValueError, match=match):
        model(num_data=12)


def test_the_shape_of_a_scale_that_is_assigned() -> None:
    with pytest.raises(ValueError, match=r"Expected a scale of shape \(4,\), got \(3,\)"):
        Gaussian(torch.ones(4)).assign_(torch.ones(3))


def test_the_shape_of_a_prior_and_of_a_rate() -> None:
    with pytest.raises(ValueError, match=r"expands to the shape \(6,\), got batch shape \(5,\)"):
        SparseCoding(dense(), Gaussian(1.0), dist.Laplace(torch.zeros(5), 1.0))(draw())
    rated = SparseCoding(dense(), Gaussian(1.0), dist.Exponential, rate=torch.ones(5))
    with pytest.raises(ValueError, match=r"expands to the shape \(6,\)"):
        rated(draw())


def test_layers_with_other_codes_than_the_dictionary() -> None:
    guide = UnrolledFISTA(dense(), Gaussian(1.0), LAPLACE, analysis=Dense(7, 4))
    with pytest.raises(ValueError, match=r"analysis to make codes.*\(12, 6\), got \(12, 7\)"):
        guide(draw())


def test_atoms_that_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"equal channels, got \(3, 4\) and \(3, 5\)"):
        match_atoms(torch.ones(3, 4), torch.ones(3, 5))


@masked_calls
def test_the_shape_of_a_mask(call: str) -> None:
    with pytest.raises(
        ValueError, match=r"mask that broadcasts to the data, \(12, 4\), got \(3,\)"
    ):
        CALLS[call](draw(), torch.ones(3, dtype=torch.bool))


# Kinds of numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.int16, torch.int64, torch.uint8, torch.bool])
def test_whole_numbers_are_cast_once_and_said_once(kind: torch.dtype) -> None:
    y = (torch.arange(48).reshape(12, 4) % 3).to(kind)
    pair, twin = make(), make()
    with pytest.warns(UserWarning, match=f"{kind}".removeprefix("torch.")) as said:
        quick(*pair, y, batch_size=4)
    assert len(said) == 1
    quick(*twin, y.float(), batch_size=4)
    assert same(state(*pair), state(*twin))


@calls
@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.complex64])
def test_a_call_takes_floating_numbers_only(call: str, kind: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"to be a floating tensor.*got {kind}. Try .*float"):
        CALLS[call](torch.ones(12, 4, dtype=kind))


@calls
@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_a_call_takes_the_dtype_of_the_parameters_only(call: str, kind: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"dtype torch.float32, got {kind}. (Try|Convert)"):
        CALLS[call](draw().to(kind))


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_fit_casts_the_data_and_never_the_weights(kind: torch.dtype) -> None:
    y = draw().half().float().bfloat16().to(kind)  # the same numbers in each
    pair, twin = make(), make()
    quick(*pair, y, batch_size=4)
    quick(*twin, y.float(), batch_size=4)
    assert {p.dtype for p in nn.ModuleList(pair).parameters()} == {torch.float32}
    assert same(state(*pair), state(*twin))


def test_codes_atoms_and_scales_of_another_dtype() -> None:
    with pytest.raises(TypeError, match="codes of dtype torch.float32, got torch.float64. Try"):
        dense()(torch.zeros(6).double())
    with pytest.raises(TypeError, match="atoms of dtype torch.float32, got torch.float64. Try"):
        make()[1].encode(draw(), values={"dictionary": torch.ones(6, 4).double()})
    likelihood = Gaussian(torch.ones(4).double())
    for program in make(likelihood=likelihood):
        with pytest.raises(TypeError, match="scale of Gaussian is, of dtype torch.float64, got"):
            program(draw())


# Devices ------------------------------------------------------------------------------------------


@calls
def test_another_device_is_named_with_the_call_that_mends_it(call: str) -> None:
    with pytest.raises(RuntimeError, match=r"device cpu, got meta. Try .*\.to\('cpu'\)"):
        CALLS[call](draw().to("meta"))


@pytest.mark.parametrize("call", ["model", "guide", "encode", "solve"])
def test_a_mask_on_another_device(call: str) -> None:
    with pytest.raises(RuntimeError, match=r"mask on the data's device cpu, got meta. Try mask.to"):
        CALLS[call](draw(), torch.ones(12, 4, dtype=torch.bool, device="meta"))


def test_codes_atoms_and_scales_on_another_device() -> None:
    with pytest.raises(RuntimeError, match="codes on the device cpu, got meta. Try"):
        dense()(torch.zeros(6, device="meta"))
    with pytest.raises(RuntimeError, match="atoms on the device cpu, got meta. Try"):
        make()[1].encode(draw(), values={"dictionary": torch.ones(6, 4, device="meta")})
    for program in make(likelihood=Gaussian(1.0).to("meta")):
        with pytest.raises(RuntimeError, match="scale of Gaussian is, on the device meta, got cpu"):
            program(draw())


def test_fit_moves_the_data_to_a_gpu_a_batch_at_a_time() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: fit moves data from the CPU to the parameters' device")
    model, guide = make()
    quick(model, guide, draw(), device="cuda", batch_size=4)
    assert {p.device.type for p in nn.ModuleList([model, guide]).parameters()} == {"cuda"}
    with pytest.raises(RuntimeError, match="device cuda:0, got cpu"):
        model(draw())


# Containers ---------------------------------------------------------------------------------------


def memmap(y: np.ndarray, folder: Path) -> np.ndarray:
    y.tofile(folder / "data")
    return np.memmap(folder / "data", dtype=y.dtype, mode="r", shape=y.shape)


def frozen(y: np.ndarray, folder: Path) -> np.ndarray:
    y.flags.writeable = False
    return y


@pytest.mark.parametrize("form", [
    pytest.param(memmap, id="read-only memmap"),
    pytest.param(frozen, id="read-only"),
    pytest.param(lambda y, _: np.asfortranarray(y), id="non-contiguous"),
    pytest.param(lambda y, _: y[::-1, ::-1].copy()[::-1, ::-1], id="negative strides"),
    pytest.param(lambda y, _: pd.DataFrame(y), id="DataFrame"),
    pytest.param(lambda y, _: y.tolist(), id="list"),
    pytest.param(lambda y, _: y.astype(np.float64), id="float64"),
    pytest.param(lambda y, _: memmap(y.astype(np.float64), _), id="float64 memmap"),
    pytest.param(lambda y, _: torch.from_numpy(y.T.copy()).T, id="strided tensor"),
    pytest.param(lambda y, _: torch.from_numpy(y).expand(12, 4), id="tensor"),
])  # fmt: skip
@pytest.mark.parametrize("masked", [False, True])
def test_any_container_is_accepted_and_never_written_to(
    form: Callable, masked: bool, tmp_path: Path
) -> None:
    y, mask = draw(), draw().abs() < 1
    options = {"batch_size": 5, "epochs": 2, "mask": mask if masked else None}
    data = form(y.numpy().copy(), tmp_path)
    pair, twin = make(), make()
    quick(*pair, data, **options)
    quick(*twin, y, **options)
    assert same(state(*pair), state(*twin))
    np.testing.assert_array_equal(np.asarray(data), y.numpy())
    assert torch.equal(mask, draw().abs() < 1)


@calls
def test_a_call_reads_strided_data_and_writes_nothing(call: str) -> None:
    y = draw().T.contiguous().T
    mask = torch.ones(4, dtype=torch.bool)
    assert not y.is_contiguous()
    CALLS[call](y, mask)
    assert torch.equal(y, draw())


@calls
@pytest.mark.parametrize("kind", [Tensor.numpy, Tensor.tolist, lambda y: pd.DataFrame(y.numpy())])
def test_a_call_takes_tensors_only(call: str, kind: Callable) -> None:
    with pytest.raises(
        TypeError, match="to be a floating tensor, got (ndarray|list|DataFrame). Try"
    ):
        CALLS[call](kind(draw()))


# What is no data ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "match"), [
    (np.ones((12, 4), complex), "real numbers.*got ndarray of dtype complex128"),
    (torch.ones(12, 4, dtype=torch.complex64), "real, dense tensor.*got one of torch.complex64"),
    (np.array([[1.0, None]] * 3, dtype=object), "real numbers.*of dtype object"),
    (np.array([["a", "b"]] * 3), "real numbers.*of dtype <U1"),
    ([["a", "b"]] * 3, "real numbers.*got list of dtype <U1"),
    ("data.npy", "real numbers.*got str of dtype"),
    (None, "real numbers.*got NoneType of dtype object"),
    (pd.DataFrame({"a": ["x"], "b": [1.0]}), "real numbers.*got DataFrame of dtype object"),
    (draw().to_sparse(), r"got one in torch.sparse_coo layout. Try .*to_dense\(\)"),
    (draw().requires_grad_(), r"got one that requires a gradient. Try data.detach\(\)"),
], ids=range(10))  # fmt: skip
def test_fit_refuses_what_is_no_data(data: Any, match: str) -> None:
    refused(TypeError, match, data)


@calls
@pytest.mark.parametrize("bad", ["y", object(), 3.0])  # a model makes a draw of None
def test_a_call_refuses_what_is_no_data(call: str, bad: Any) -> None:
    with pytest.raises(TypeError, match="floating tensor, got (str|object|float). Try"):
        CALLS[call](bad)


@calls
def test_a_call_refuses_sparse_tensors(call: str) -> None:
    with pytest.raises(TypeError, match="dense.*got torch.sparse_coo. Try .*to_dense"):
        CALLS[call](draw().to_sparse())


@pytest.mark.parametrize("call", ["guide", "encode", "unrolled"])
def test_an_encoder_passes_gradients_to_the_data(call: str) -> None:
    """Where others refuse or detach: sensitivities of codes are a reason to run an encoder."""
    y = draw().requires_grad_()
    (CALLS[call](y) ** 2).sum().backward()
    assert torch.isfinite(y.grad).all()


def test_a_solver_takes_no_gradient() -> None:
    assert not solve(draw().requires_grad_(), dense(), LAPLACE).codes.requires_grad


@pytest.mark.parametrize("bad", ["mask", True, np.ones((12, 4), bool), torch.ones(12, 4)])
@masked_calls
def test_a_mask_is_a_boolean_tensor(call: str, bad: Any) -> None:
    with pytest.raises(TypeError, match="mask to be a boolean tensor, True = observed; got"):
        CALLS[call](draw(), bad)


def test_fit_takes_a_mask_in_any_container_but_of_truth_values() -> None:
    mask = draw().abs() < 1
    pair, twin = make(), make()
    quick(*pair, draw(), mask=mask)
    quick(*twin, draw(), mask=mask.numpy())
    assert same(state(*pair), state(*twin))
    refused(TypeError, "mask to be a boolean tensor", draw(), mask=mask.float())
    refused(ValueError, "mask that broadcasts to the data", draw(), mask=mask[:3])


NO_ATOMS = [
    torch.eye(2).long(),
    torch.eye(2) * 1j,
    torch.eye(2).to_sparse(),
    np.eye(2),
    [[1.0, 0.0]],
    "atoms",
]


@pytest.mark.parametrize("bad", NO_ATOMS, ids=range(6))
def test_atoms_are_dense_floating_tensors(bad: Any) -> None:
    for call in (
        lambda: Dense(2, 2, atoms=bad),
        lambda: Dense(2, 2).init_atoms_(bad),
        lambda: Dense(2, 2).bind(bad),
        lambda: Conv(2, 1, 2, atoms=bad),
    ):
        with pytest.raises(TypeError, match="atoms to be a floating tensor.*got.*Try"):
            call()


@pytest.mark.parametrize("bad", ["1", None, 1j, torch.tensor(1j), object()])
def test_a_scale_is_numbers(bad: Any) -> None:
    for call in (Gaussian, Gaussian(1.0).assign_):
        with pytest.raises(TypeError, match="scale to be a real number or a dense tensor.*got"):
            call(bad)


@pytest.mark.parametrize("bad", ["a", np.eye(2), torch.eye(2) * 1j, torch.eye(2).to_sparse()])
def test_atoms_to_match_are_tensors(bad: Any) -> None:
    with pytest.raises(TypeError, match="learned to be a dense tensor of real numbers, got"):
        match_atoms(bad, torch.eye(2))


def test_parts_of_another_kind_are_named() -> None:
    for build in (SparseCoding, UnrolledFISTA):
        with pytest.raises(TypeError, match="Expected .*Dictionary.*got ('dense'|str)"):
            build("dense", Gaussian(1.0), LAPLACE)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="Likelihood.*got .*"):
            build(dense(), 0.1, LAPLACE)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="prior to be a distribution or a callable.*got str"):
            build(dense(), Gaussian(1.0), "laplace")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="rate to be real numbers.*got str"):
            build(dense(), Gaussian(1.0), dist.Exponential, rate="1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Expected a Dictionary.*got str"):
        solve(draw(), "dense", LAPLACE)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"method to be FISTA\(\) or ISTA\(\), got 'fista'"):
        solve(draw(), dense(), LAPLACE, method="fista")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="boundary to be Interior.*got 'periodic'"):
        Conv(3, 1, 4, boundary="periodic")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Expected a Dictionary.*got Tensor"):
        Composition(Same(), torch.eye(4), input_shape=(4,))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"methods forward\(signal\) and adjoint"):
        Composition("blur", dense(), input_shape=(4,))  # type: ignore[arg-type]
    with pytest.raises(
        NotImplementedError, match="No proximal step is known for str.*register_prox"
    ):
        prox("laplace", draw(), 1.0)


# Numbers out of range -----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, -1, 2.5, "3", None, True], ids=str)
def test_sizes_are_whole_numbers_of_at_least_one(bad: Any) -> None:
    for name, call in {
        "num_atoms": lambda: Dense(bad, 4),
        "num_features": lambda: Dense(4, bad),
        "channels": lambda: Conv(3, bad, 4),
        "kernel_size": lambda: Conv(3, 1, bad),
        "stride": lambda: Conv(3, 1, 4, stride=bad),
    }.items():
        with pytest.raises(ValueError, match=rf"Expected {name} to be a whole number >= 1.*got"):
            call()


@pytest.mark.parametrize(("options", "match"), [
    ({"optimizer": functools.partial(torch.optim.Adam, lr=0.0)}, r"learning rates > 0, got \[0"),
    ({"batch_size": 13}, r"batch_size between 1 and 12 \(the number of data\), got 13"),
    ({"batch_size": 0}, "batch_size between 1 and 12.*got 0"),
    ({"epochs": 0}, "epochs >= 1, got 0"),
    ({"loss": pyro.infer.Trace_ELBO(), "phases": []}, "loss and schedule inside the phases"),
])  # fmt: skip
def test_options_of_fit_out_of_range(options: dict, match: str) -> None:
    refused(ValueError, match, draw(), **options)


@pytest.mark.parametrize(("options", "error", "match"), [
    ({"num_steps": 0}, ValueError, "num_steps >= 1, got 0"),
    ({"num_steps": "many"}, TypeError, "num_steps to be a Integral, got 'many'"),
    ({"step_size": -1.5}, ValueError, "finite step_size > 0, got -1.5"),
    ({"shrinkage": 0.5}, TypeError, "shrinkage to be a Shrinkage, got 0.5"),
    ({"lipschitz": -1.0}, ValueError, "finite lipschitz > 0, got -1.0"),
    ({"method": "fista"}, TypeError, "method to be a Method, got 'fista'"),
    ({"rest": 3}, TypeError, "rest to be a guide of the other sites.*got int"),
])  # fmt: skip
def test_options_of_the_guide_out_of_range(options: dict, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        UnrolledFISTA(dense(), Gaussian(1.0), LAPLACE, **options)


@pytest.mark.parametrize(("options", "error", "match"), [
    ({"tol": 0.0}, ValueError, r"tol > 0 \(or None\), max_steps >= 1; got 0.0"),
    ({"tol": "fine"}, TypeError, "tol to be a number.*got 'fine'"),
    ({"max_steps": 0}, ValueError, "max_steps >= 1; got 1e-05, 0"),
    ({"max_steps": 2.5}, TypeError, "max_steps a whole number, got 1e-05, 2.5"),
    ({"init": torch.zeros(12, 5)}, ValueError, r"init of shape \(12, 6\), got \(12, 5\)"),
    ({"init": torch.full((12, 6), torch.nan)}, ValueError, "init to be finite. Leave it out"),
    ({"init": [0.0]}, TypeError, "init to be a floating tensor, got list"),
])  # fmt: skip
def test_options_of_solve_out_of_range(options: dict, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        solve(draw(), dense(), LAPLACE, **options)


@batch_calls
def test_the_size_of_the_data_set(call: str) -> None:
    model, guide = make()
    entry = {"model": model, "guide": guide, "encode": functools.partial(guide.encode)}[call]
    with pytest.raises(ValueError, match=r"num_data >= 12 \(the minibatch\), got 11"):
        entry(draw(), num_data=11)
    with pytest.raises(TypeError, match="num_data to be a whole number.*got str"):
        entry(draw(), num_data="12")


@pytest.mark.parametrize("bad", [0, -1, 2.5, "3"])
def test_the_number_of_draws(bad: Any) -> None:
    with pytest.raises(ValueError, match="num_data to be a whole number >= 1, got"):
        make()[0](num_data=bad)


def test_a_learned_rate_is_a_module() -> None:
    with pytest.raises(ValueError, match="a constant or a module, got a parameter.*Rate"):
        SparseCoding(dense(), Gaussian(1.0), dist.Exponential, rate=nn.Parameter(torch.ones(6)))
    assert SparseCoding(dense(), Gaussian(1.0), dist.Exponential, rate=Rate(6))(draw()) is not None


# Sites --------------------------------------------------------------------------------------------


class Guide(PyroModule):
    """Samples all of its sites, in the plate of the data or outside of it."""

    def __init__(self, *sites: str, plate: bool) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(6))
        self.sites = sites
        self.plate = plate

    def forward(self, y: Tensor, num_data: int) -> None:
        law = dist.Delta(self.loc.expand(len(y), 6), event_dim=1)
        law = law if self.plate else law.to_event(1)
        plate = pyro.plate("data", num_data, subsample_size=len(y))
        with plate if self.plate else contextlib.nullcontext():
            for name in self.sites:
                pyro.sample(name, law)


@pytest.mark.parametrize(("sites", "plate", "match"), [
    (("other",), True, r"(?s)site +model +guide\n +codes +\(12, 6\) in \[data\] +- +<-\n +other"),
    (("codes", "other"), True, r"(?s)site +model +guide\n +codes .*\n +other +- .* <-"),
    (("codes",), False, r"(?s)codes +\(12, 6\) in \[data\] +\(12, 6\) in \[\] +<-"),
])  # fmt: skip
def test_sites_of_model_and_guide_that_differ_are_listed(
    sites: tuple, plate: bool, match: str
) -> None:
    model, guide = make()[0], Guide(*sites, plate=plate)
    before = state(model, guide)
    with pytest.raises(ValueError, match=match):
        quick(model, guide, draw())
    assert same(state(model, guide), before)


def test_a_site_sampled_twice_is_refused() -> None:
    model, guide = make()[0], Guide("codes", "codes", plate=False)
    before = state(model, guide)
    with pytest.raises((RuntimeError, ValueError), match="codes"):
        quick(model, guide, draw())
    assert same(state(model, guide), before)


# Degenerate data ----------------------------------------------------------------------------------


@pytest.mark.parametrize("y", [
    pytest.param(torch.zeros(12, 4), id="zero"),
    pytest.param(torch.ones(12, 4), id="constant"),
    pytest.param(draw()[:1], id="one datum"),
    pytest.param(draw()[:1].expand(12, 4), id="duplicates"),
    pytest.param(draw() * 1e6, id="large"),
    pytest.param(draw() * 1e-30, id="tiny"),
])  # fmt: skip
def test_degenerate_data_end_in_finite_parameters(y: Tensor) -> None:
    pair = make()
    history = quick(*pair, y, epochs=3, batch_size=min(5, len(y)))
    assert np.isfinite(history.step_loss).all()
    assert all(torch.isfinite(t).all() for t in state(*pair))


def test_data_too_large_to_train_on_end_by_name_and_change_nothing() -> None:
    pair = make()
    before = state(*pair)
    with pytest.raises(FloatingPointError, match="not finite.*at step 1, epoch 1, batch 0"):
        quick(*pair, draw() * 1e30)
    assert same(state(*pair), before)


def test_one_feature_and_one_atom_train() -> None:
    pair = make(lambda: Dense(1, 1, atoms=torch.ones(1, 1)))
    assert np.isfinite(quick(*pair, draw(12, 1), epochs=3).step_loss).all()


class Same:
    """The identity, as an operator."""

    def forward(self, signal: Tensor) -> Tensor:
        return signal

    adjoint = forward
