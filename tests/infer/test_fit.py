"""Training: what it changes, what it leaves alone, what it refuses."""

import functools
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_sparse.dictionaries import Conv, Dense
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.infer import Callback, Progress, fit
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding

adam = functools.partial(torch.optim.Adam, lr=0.02)
quick = functools.partial(fit, progress=False)


def make(seed: int = 0, *, trainable: bool = False) -> tuple[SparseCoding, UnrolledFISTA]:
    generator = torch.Generator().manual_seed(seed)
    dictionary = Dense(6, 4, atoms=torch.randn(6, 4, generator=generator))
    likelihood, prior = Gaussian(0.3, trainable=trainable), dist.Laplace(0.0, 0.5)
    model = SparseCoding(dictionary, likelihood, prior)
    return model, UnrolledFISTA.untied(dictionary, likelihood, prior, num_steps=4)


def draw(num_data: int = 40, *shape: int) -> Tensor:
    return torch.randn(num_data, *(shape or (4,)), generator=torch.Generator().manual_seed(3))


def parameters(*modules: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for module in modules for p in module.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    assert len(first) == len(second) > 0
    return all(torch.equal(a, b) for a, b in zip(first, second))


class MeanModel(PyroModule):
    """A plain Pyro program: Normal data around one unknown mean."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = PyroParam(torch.tensor(2.0), constraints.positive)

    def forward(self, y: Tensor, num_data: int) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("data", num_data, subsample_size=len(y)):
            pyro.sample("obs", dist.Normal(mean, self.scale), obs=y)


class MeanGuide(PyroModule):
    """Its parameter has the name of the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.0))
        self.scale = PyroParam(torch.tensor(0.5), constraints.positive)

    def forward(self, y: Tensor, num_data: int) -> None:
        pyro.sample("mean", dist.Normal(self.loc, self.scale))


# What it does -------------------------------------------------------------------------------------


def test_loss_falls_and_history_has_every_step() -> None:
    model, guide = make(trainable=True)
    before = parameters(model, guide)
    history = quick(model, guide, draw(40), optimizer=adam, epochs=20, batch_size=15)
    assert history.epoch_loss[-1] < history.epoch_loss[0] - 0.1
    assert (len(history.step_loss), len(history.epoch_loss)) == (60, 20)
    assert history.seconds > 0
    sizes = np.array([15, 15, 10])
    steps = np.array(history.step_loss).reshape(20, 3)
    np.testing.assert_allclose(history.epoch_loss, steps @ sizes / 40, rtol=1e-12)
    for old, new in zip(before, parameters(model, guide)):
        assert not torch.equal(old, new)


def test_a_step_is_that_of_the_elbo_module() -> None:
    y = draw(40)
    model, guide = make()
    history = quick(model, guide, y, optimizer=adam, epochs=3, batch_size=40)
    twin_model, twin_guide = make()
    elbo = Trace_ELBO()(twin_model, twin_guide)
    optimizer = adam(elbo.parameters())
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = elbo(y) / 40
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # The same sums in another order.
    np.testing.assert_allclose(history.step_loss, losses, rtol=1e-5)
    for one, other in zip(parameters(model, guide), parameters(twin_model, twin_guide)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [40, 10, 7, 1])
def test_minibatches_estimate_the_loss_of_the_whole(batch_size: int) -> None:
    """Nothing moves at learning rate zero, and the epoch's weighted mean is then exact."""
    model, guide = make()
    still = functools.partial(torch.optim.SGD, lr=1e-30)  # moves no float32
    y = draw(40)
    history = quick(model, guide, y, optimizer=still, epochs=2, batch_size=batch_size)
    whole = Trace_ELBO().loss(model, guide, y) / 40
    assert history.epoch_loss == pytest.approx([whole, whole], rel=1e-5)
    assert len(history.step_loss) == 2 * -(-40 // batch_size)


def test_every_datum_comes_once_an_epoch_in_an_order_of_its_own() -> None:
    seen = []

    def model(y: Tensor, num_data: int) -> None:
        seen.append((y.clone(), num_data))
        pyro.sample("mean", dist.Normal(0.0, 1.0))

    y = torch.arange(10.0)
    quick(model, MeanGuide(), y, epochs=3, batch_size=4)
    assert {num_data for _, num_data in seen} == {10}
    rows = [row for row, _ in seen[2:]]  # two calls only check and set up
    assert [len(row) for row in rows] == [4, 4, 2] * 3
    epochs = [torch.cat(rows[i : i + 3]) for i in (0, 3, 6)]
    assert all(torch.equal(epoch.sort().values, y) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in (y, *epochs)}) == 4


@pytest.mark.parametrize(
    "optimizer",
    [
        functools.partial(torch.optim.SGD, lr=1e-2),
        functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
        torch.optim.Adam,
        functools.partial(torch.optim.AdamW, lr=1e-2),
        functools.partial(torch.optim.RMSprop, lr=1e-2),
        functools.partial(torch.optim.Adagrad, lr=1e-1),
    ],
    ids=lambda o: getattr(o, "func", o).__name__,
)
def test_any_optimiser_serves(optimizer: Callable) -> None:
    model, guide = make()
    history = quick(model, guide, draw(40), optimizer=optimizer, epochs=10, batch_size=10)
    assert history.epoch_loss[-1] < history.epoch_loss[0]


def test_a_frozen_parameter_stays() -> None:
    model, guide = make()
    model.dictionary.requires_grad_(False)
    guide.eval()  # Pyro warns of frozen parameters in a module that trains
    model.eval()
    atoms, rest = model.dictionary.atoms.clone(), guide.encoder.analysis.atoms.detach().clone()
    quick(model, guide, draw(40), optimizer=adam, epochs=2)
    assert torch.equal(model.dictionary.atoms, atoms)
    assert not torch.equal(guide.encoder.analysis.atoms, rest)


def test_another_loss_serves() -> None:
    model, guide = make()
    history = quick(model, guide, draw(), loss=TraceMeanField_ELBO(num_particles=2), epochs=1)
    twin = make()
    assert history.step_loss[0] == pytest.approx(Trace_ELBO().loss(*twin, draw()) / 40, rel=1e-5)


def test_convolutional_pairs_train() -> None:
    dictionary = Conv(3, 1, 5)
    likelihood, prior = Gaussian(0.3), dist.Laplace(0.0, 0.5)
    model = SparseCoding(dictionary, likelihood, prior)
    guide = UnrolledFISTA(dictionary, likelihood, prior, num_steps=4)
    history = quick(model, guide, draw(20, 1, 30), optimizer=adam, epochs=10, batch_size=5)
    assert history.epoch_loss[-1] < history.epoch_loss[0]


# Plain Pyro programs ------------------------------------------------------------------------------


def conjugate_posterior(y: Tensor, scale: float) -> tuple[float, float]:
    precision = 1 / 10.0**2 + len(y) / scale**2
    return (y.sum().item() / scale**2) / precision, precision**-0.5


def mean_program(y: Tensor, num_data: int) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    with pyro.plate("data", num_data, subsample_size=len(y)):
        pyro.sample("obs", dist.Normal(mean, 2.0), obs=y)


@pytest.mark.parametrize(
    ("make_guide", "site"),
    [(MeanGuide, "mean"), (lambda: AutoNormal(mean_program), "mean_unconstrained")],
    ids=["guide", "autoguide"],
)
def test_a_function_and_its_guide_find_the_conjugate_posterior(make_guide, site: str) -> None:
    y, guide = 3.0 + draw(50, 1)[:, 0], make_guide()
    for lr in (0.3, 0.01):
        optimizer = functools.partial(torch.optim.Adam, lr=lr)
        loss = TraceMeanField_ELBO(num_particles=4)
        quick(mean_program, guide, y, loss=loss, optimizer=optimizer, epochs=50, batch_size=25)
    loc, scale = conjugate_posterior(y, 2.0)
    found = poutine.trace(guide).get_trace(y, 50).nodes[site]["fn"]
    # Within half a posterior sd and a quarter of it: the noise of the last steps.
    assert found.mean.item() == pytest.approx(loc, abs=scale / 2)
    assert found.stddev.item() == pytest.approx(scale, rel=0.25)


def test_equal_names_in_model_and_guide_are_not_shared() -> None:
    model, guide = MeanModel(), MeanGuide()
    own = {id(p) for p in (*model.parameters(), *guide.parameters())}
    quick(model, guide, draw(20, 1)[:, 0], optimizer=adam, epochs=2)
    assert {id(p) for p in (*model.parameters(), *guide.parameters())} == own
    assert len(own) == 3
    assert 0 < abs(model.scale.item() - 2.0) < 0.1
    assert 0 < abs(guide.scale.item() - 0.5) < 0.1


def test_parts_that_set_themselves_up_at_the_first_call_are_trained() -> None:
    model = MeanModel()
    guide = AutoNormal(model)
    assert not list(guide.parameters())
    quick(model, guide, 3.0 + draw(20, 1)[:, 0], optimizer=adam, epochs=1)
    first = parameters(guide)
    assert len(first) == 2
    quick(model, guide, 3.0 + draw(20, 1)[:, 0], optimizer=adam, epochs=1)
    assert not any(torch.equal(a, b) for a, b in zip(first, parameters(guide)))


@pytest.mark.parametrize("local", [False, True], ids=["store", "local"])
def test_modules_made_with_local_parameters_train_the_same(local: bool) -> None:
    reference = MeanModel(), MeanGuide()
    quick(*reference, draw(20, 1)[:, 0], epochs=2)
    with pyro.settings.context(module_local_params=local):
        pair = MeanModel(), MeanGuide()
        quick(*pair, draw(20, 1)[:, 0], epochs=2)
    assert same(parameters(*pair), parameters(*reference))


# Reproducible, and alone in the world -------------------------------------------------------------


def test_equal_seeds_give_equal_bits_and_others_do_not() -> None:
    runs = []
    for seed in (5, 5, 6):
        torch.rand(len(runs))  # the caller's random state has no say
        pair = make()
        history = quick(*pair, draw(), optimizer=adam, epochs=2, batch_size=10, seed=seed)
        runs.append((history.step_loss, parameters(*pair)))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]
    assert not same(runs[0][1], runs[2][1])


def test_the_seed_reaches_the_draws_of_a_random_guide() -> None:
    losses = []
    for seed in (5, 5, 6):
        whole_batches = {"epochs": 2, "batch_size": 20, "seed": seed}  # the order does not matter
        losses.append(quick(MeanModel(), MeanGuide(), draw(20, 1)[:, 0], **whole_batches).step_loss)
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("make_pair", [make, lambda: (MeanModel(), MeanGuide())])
def test_nothing_global_is_touched(make_pair: Callable) -> None:
    pyro.param("mine", torch.tensor(3.0), constraint=constraints.positive)
    pyro.param("loc", torch.tensor(4.0))  # the name of a parameter of the guide
    store = pyro.get_param_store()

    def state() -> tuple:
        return (
            torch.get_rng_state().tolist(),
            str(np.random.get_state()),  # noqa: NPY002
            random.getstate(),
            {name: (id(store._params[name]), value.item()) for name, value in store.items()},
            torch.distributions.Distribution._validate_args,
            dist.Distribution._validate_args if hasattr(dist.Distribution, "_validate_args") else 0,
            pyro.settings.get(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.get_num_threads(),
        )

    before = state()
    data = draw(20, 4) if make_pair is make else draw(20, 1)[:, 0]
    quick(*make_pair(), data, epochs=2)
    assert state() == before
    with pytest.raises(FloatingPointError):
        quick(*make_pair(), data * 1e30, epochs=2)
    assert state() == before


def test_gradients_may_be_off_for_the_caller_without_losing_them() -> None:
    model, guide = make()
    before = parameters(model, guide)
    quick(model, guide, draw(), epochs=1)
    assert not same(parameters(model, guide), before)


def test_models_trained_in_turn_are_each_trained_alone() -> None:
    alone = []
    for seed in (0, 1):
        pair = make(seed)
        quick(*pair, draw(), optimizer=adam, epochs=2, batch_size=10)
        alone.append(parameters(*pair))
        pyro.clear_param_store()
    pairs = [make(0), make(1)]
    for pair in pairs:
        quick(*pair, draw(), optimizer=adam, epochs=2, batch_size=10)
    assert all(same(parameters(*pair), expected) for pair, expected in zip(pairs, alone))
    assert not same(*alone)


# Data ---------------------------------------------------------------------------------------------


def test_what_is_masked_has_no_say() -> None:
    y, mask = draw(40), torch.rand(40, 4) < 0.7
    runs = []
    for filler in (torch.nan, 7.0):
        pair = make()
        values = torch.where(mask, y, filler)
        history = quick(*pair, values, mask=mask, optimizer=adam, epochs=2, batch_size=10)
        runs.append((history.step_loss, parameters(*pair)))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])
    assert np.isfinite(runs[0][0]).all()


def test_a_mask_goes_with_its_rows() -> None:
    y = draw(40)
    model, guide = make()
    still = functools.partial(torch.optim.SGD, lr=1e-30)  # moves no float32
    mask = torch.rand(40, 4) < 0.7
    history = quick(model, guide, y, mask=mask, optimizer=still, epochs=1, batch_size=7)
    whole = Trace_ELBO().loss(model, guide, y, None, mask) / 40
    assert history.epoch_loss == pytest.approx([whole], rel=1e-5)
    shared = quick(model, guide, y, mask=mask[0], optimizer=still, epochs=1, batch_size=7)
    whole = Trace_ELBO().loss(model, guide, y, None, mask[0]) / 40
    assert shared.epoch_loss == pytest.approx([whole], rel=1e-5)


def as_memmap(y: np.ndarray, folder: Path) -> np.ndarray:
    y.tofile(folder / "data")
    return np.memmap(folder / "data", dtype=y.dtype, mode="r", shape=y.shape)


def frozen(y: np.ndarray) -> np.ndarray:
    y = y.copy()
    y.flags.writeable = False
    return y


@pytest.mark.parametrize(
    "form",
    {
        "array": lambda y, folder: y,
        "float64": lambda y, folder: y.astype(np.float64),
        "read-only": lambda y, folder: frozen(y),
        "memmap": as_memmap,
        "strided": lambda y, folder: np.repeat(y, 2, axis=0)[::2],
        "transposed": lambda y, folder: np.asfortranarray(y),
        "negative strides": lambda y, folder: y[::-1, ::-1].copy()[::-1, ::-1],
        "tensor": lambda y, folder: torch.from_numpy(y.copy()),
        "strided tensor": lambda y, folder: torch.from_numpy(y.T.copy()).T,
        "list": lambda y, folder: y.tolist(),
        "data frame": lambda y, folder: pd.DataFrame(y),
    }.items(),
    ids=lambda item: item[0],
)
def test_data_in_any_form_train_the_same_and_are_not_written_to(form, tmp_path: Path) -> None:
    y = draw(40).numpy()
    reference = make()
    quick(*reference, torch.from_numpy(y.copy()), optimizer=adam, epochs=2, batch_size=10)
    data = form[1](y.copy(), tmp_path)
    pair = make()
    quick(*pair, data, optimizer=adam, epochs=2, batch_size=10)
    assert same(parameters(*pair), parameters(*reference))
    values = data.detach().numpy() if isinstance(data, Tensor) else np.asarray(data, np.float32)
    np.testing.assert_array_equal(values, y)
    assert getattr(data, "grad", None) is None


@pytest.mark.parametrize("kind", [np.int16, np.int64, np.uint8, np.bool_])
def test_whole_numbers_become_the_parameters_dtype_and_this_is_said_once(kind: type) -> None:
    y = (np.arange(80).reshape(20, 4) % 5).astype(kind)
    pair, reference = make(), make()
    with pytest.warns(UserWarning, match="are cast to the model's dtype") as said:
        quick(*pair, y, epochs=1, batch_size=5)
    assert len(said) == 1
    quick(*reference, y.astype(np.float32), epochs=1, batch_size=5)
    assert same(parameters(*pair), parameters(*reference))


def test_data_take_the_dtype_and_device_of_the_parameters(
    dtype: torch.dtype, device: torch.device
) -> None:
    model, guide = (part.to(dtype).to(device) for part in make())
    history = quick(model, guide, draw(), mask=torch.ones(4, dtype=torch.bool), epochs=1)
    assert np.isfinite(history.step_loss).all()
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(dtype, device.type)}


# Refusals -----------------------------------------------------------------------------------------

MASK = torch.ones(40, 4, dtype=torch.bool)
WITH_NAN = draw().index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(torch.nan))


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        (WITH_NAN, {}, ValueError, r"1 values that are not, the first at index \(2, 1\).*mask="),
        (WITH_NAN.numpy(), {}, ValueError, r"the first at index \(2, 1\)"),
        (draw() / 0.0, {}, ValueError, "160 values that are not"),
        (WITH_NAN, {"mask": MASK}, ValueError, r"the first at index \(2, 1\)"),
        (torch.zeros(0, 4), {}, ValueError, r"at least one datum, got shape \(0, 4\)"),
        (torch.zeros(4, 0), {}, ValueError, r"at least one datum, got shape \(4, 0\)"),
        (torch.tensor(1.0), {}, ValueError, r"at least one datum, got shape \(\)"),
        (torch.zeros(3, 5), {}, ValueError, r"signal of shape \(..., 4\)"),
        (torch.zeros(3, 4, dtype=torch.complex64), {}, TypeError, "real.*one of torch.complex64"),
        (np.zeros((3, 4), dtype=complex), {}, TypeError, "real.*ndarray of dtype complex128"),
        (np.array([[1.0, None]], dtype=object), {}, TypeError, "real.*dtype object"),
        (np.array([["a"]]), {}, TypeError, "real.*dtype <U1"),
        (draw().requires_grad_(), {}, TypeError, "one that requires a gradient.*detach"),
        (draw().to_sparse(), {}, TypeError, "one in torch.sparse_coo layout.*to_dense"),
        (
            draw(),
            {"batch_size": 41},
            ValueError,
            r"between 1 and 40 \(the number of data\), got 41",
        ),
        (
            draw(),
            {"optimizer": functools.partial(torch.optim.SGD, lr=0.0)},
            ValueError,
            "rates > 0",
        ),
        (draw(), {"epochs": 0}, ValueError, "epochs >= 1, got 0"),
        (draw(), {"batch_size": 0}, ValueError, "batch_size between 1 and 40.*got 0"),
        (draw(), {"mask": MASK.float()}, TypeError, "boolean tensor, True = observed"),
        (draw(), {"mask": MASK[:3]}, ValueError, "mask that broadcasts to the data"),
    ],
    ids=range(20),
)
def test_bad_input_is_refused_before_anything_moves(data, options, error, message) -> None:
    model, guide = make()
    before = parameters(model, guide)
    with pytest.raises(error, match=message):
        quick(model, guide, data, **options)
    assert same(parameters(model, guide), before)


def test_programs_without_parameters_are_refused() -> None:
    def guide(y: Tensor, num_data: int) -> None:
        pyro.sample("mean", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="parameters to train.*got none"):
        quick(mean_program, guide, draw(20, 1)[:, 0])


@pytest.mark.parametrize("where", ["function", "guide module"])
def test_parameters_that_live_in_no_module_are_refused_by_name(where: str) -> None:
    class Stray(MeanGuide):
        def forward(self, y: Tensor, num_data: int) -> None:
            pyro.param("stray", torch.tensor(1.0), constraint=constraints.positive)
            super().forward(y, num_data)

    def stray_program(y: Tensor, num_data: int) -> None:
        pyro.param("stray", torch.tensor(1.0))
        mean_program(y, num_data)

    pairs = {
        "function": (stray_program, MeanGuide()),
        "guide module": (mean_program, Stray()),
    }
    with pytest.raises(ValueError, match=r"pyro.param sites \['stray'\].*PyroParam"):
        quick(*pairs[where], draw(20, 1)[:, 0])
    assert "stray" not in pyro.get_param_store()


def test_a_module_used_by_a_function_is_refused_not_left_untrained() -> None:
    net = nn.Linear(1, 1)

    def program(y: Tensor, num_data: int) -> None:
        pyro.module("net", net)
        mean_program(y, num_data)

    with pytest.raises(ValueError, match=r"net\$\$\$bias"):
        quick(program, MeanGuide(), draw(20, 1)[:, 0])


@pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")
def test_an_objective_that_stops_being_finite_leaves_the_step_before() -> None:
    class Breaks(MeanGuide):
        broken = False

        def forward(self, y: Tensor, num_data: int) -> None:
            loc = self.loc * (torch.nan if self.broken else 1.0)
            pyro.sample("mean", dist.Delta(loc))

    class Break(Callback):
        def after_step(self, progress: Progress) -> None:
            guide.broken = progress.step == 2

    y = draw(20, 1)[:, 0]
    with pyro.validation_enabled(False):
        guide = Breaks()
        with pytest.raises(
            FloatingPointError, match="objective not finite.*at step 3.*learning rate"
        ):
            quick(mean_program, guide, y, epochs=10, batch_size=20, callbacks=[Break()])
        twin = Breaks()
        quick(mean_program, twin, y, epochs=2, batch_size=20)
    assert twin.loc.item() != 0.0
    assert torch.equal(guide.loc, twin.loc)


# The bar ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("progress", "something"), [(False, False), (True, True)])
def test_progress_is_shown_if_asked(capfd, progress: bool, something: bool) -> None:
    fit(*make(), draw(), epochs=2, batch_size=10, progress=progress)
    out, err = capfd.readouterr()
    assert out == ""
    assert ("fit" in err and "nats per datum" in err) == something
    assert bool(err) == something


def test_parameters_that_a_function_only_refers_to_are_refused() -> None:
    scale = torch.nn.Parameter(torch.tensor(1.0))

    def program(y: Tensor, num_data: int) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("data", num_data, subsample_size=len(y)):
            pyro.sample("obs", dist.Normal(mean, scale.exp()), obs=y)

    with pytest.raises(ValueError, match=r"shape \[\(\)\] that a function only refers to"):
        quick(program, MeanGuide(), draw(20, 1)[:, 0])


def test_sites_that_differ_are_listed_side_by_side() -> None:
    class Other(MeanGuide):
        def forward(self, y: Tensor, num_data: int) -> None:
            pyro.sample("average", dist.Delta(self.loc))

    with pytest.raises(ValueError, match=r"(?s)site +model +guide\n +average +- .*<-\n +mean .*<-"):
        quick(mean_program, Other(), draw(20, 1)[:, 0])


def test_a_missing_plate_is_named() -> None:
    class NoPlate(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codes = torch.nn.Parameter(torch.zeros(40, 6))

        def forward(self, y: Tensor, num_data: int) -> None:
            pyro.sample("codes", dist.Delta(self.codes[: len(y)], event_dim=2))

    model, _ = make()
    with pytest.raises(ValueError, match=r"(?s)codes .* in \[data\] .* in \[\] +<-"):
        quick(model, NoPlate(), draw())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 2.5}, TypeError, "epochs to be a whole number, got 2.5"),
        ({"epochs": "x"}, TypeError, "epochs to be a whole number, got 'x'"),
        ({"batch_size": True}, TypeError, "batch_size to be a whole number, got True"),
        ({"seed": -1}, ValueError, "seed >= 0, got -1"),
        ({"device": "gpu0"}, ValueError, "device such as 'cuda', got 'gpu0'"),
        ({"optimizer": "adam"}, TypeError, "optimizer to be something to call.*got 'adam'"),
        ({"loss": 3}, TypeError, "loss to be something to call.*Trace_ELBO.*got 3"),
        ({"phases": 3}, TypeError, "phases to be a list of infer.Phase objects, got 3"),
        ({"phases": [3]}, TypeError, "phases to be a list of infer.Phase objects, got 3"),
        ({"callbacks": [3]}, TypeError, "callbacks to be a list of infer.Callback objects, got 3"),
        ({"early_stopping": 3}, TypeError, "early_stopping to be an infer.EarlyStopping object"),
        ({"guard": "stop"}, TypeError, "guard to be an infer.Guard object, got 'stop'"),
        ({"checkpoints": "run"}, TypeError, "checkpoints to be an infer.Checkpoints object"),
    ],
    ids=range(13),
)
def test_arguments_of_a_wrong_kind_are_refused_by_name(options, error, message) -> None:
    model, guide = make()
    before = parameters(model, guide)
    with pytest.raises(error, match=message):
        quick(model, guide, draw(), **options)
    assert same(parameters(model, guide), before)


def test_a_program_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match="guide to be a program, a module or a function, got 3"):
        quick(make()[0], 3, draw())
