"""What ``infer`` makes of drawn input: an answer, or a refusal by a ``raise`` of the library."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyro_sparse.dictionaries import Dense
from pyro_sparse.distributions import Rate
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.infer import (
    Checkpoints,
    EarlyStopping,
    NoiseEM,
    Phase,
    RateEM,
    RateLoss,
    RollBack,
    Stop,
    Update,
    fit,
    load,
    save,
)
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding
from tests.test_hypothesis import JUNK, REFUSED, answer, every

pytestmark = pytest.mark.filterwarnings("ignore:Data of dtype:UserWarning")

junk = st.sampled_from(JUNK)
numbers = st.one_of(st.integers(-2, 6), st.floats(-1.0, 3.0), junk)


def laplace(rate: Tensor) -> dist.Laplace:
    return dist.Laplace(0.0, 1 / rate)


def pair() -> tuple[SparseCoding, UnrolledFISTA]:
    dictionary, likelihood, prior = Dense(4, 3), Gaussian(0.5), dist.Laplace(0.0, 1.0)
    return (
        SparseCoding(dictionary, likelihood, prior),
        UnrolledFISTA(dictionary, likelihood, prior, num_steps=2),
    )


@st.composite
def rows(draw: st.DrawFn) -> Any:
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    shape = (6, 3) if draw(st.booleans()) else shape
    kind = draw(st.sampled_from(["float32", "float64", "int64", "uint8", "bool", "complex64"]))
    values = np.random.default_rng(draw(st.integers(0, 9))).standard_normal(shape)
    values = np.asarray(np.abs(values))  # of no dimension too: an array, not a scalar
    if values.size and kind.startswith("float") and draw(st.integers(0, 4)) == 0:
        values.reshape(-1)[0] = draw(st.sampled_from([np.nan, np.inf, 1e30]))
    array = np.asarray(values.astype(kind))
    return torch.from_numpy(array) if draw(st.booleans()) else array


@every
@given(
    data=st.one_of(rows(), junk),
    options=st.fixed_dictionaries(
        {},
        optional={
            "epochs": numbers,
            "batch_size": numbers,
            "seed": numbers,
            "mask": st.one_of(rows(), junk),
            "device": st.sampled_from([None, "cpu", "gpu", "", 3, "cpu:x"]),
            "optimizer": st.one_of(st.just(torch.optim.Adam), junk),
            "schedule": junk,
            "loss": junk,
            "phases": st.one_of(st.just([Phase(1)]), junk),
            "early_stopping": st.one_of(st.just(EarlyStopping(1)), junk),
            "callbacks": junk,
            "guard": st.one_of(st.just(RollBack()), junk),
            "checkpoints": junk,
        },
    ),
)
def test_fit_answers_or_refuses(data: Any, options: dict[str, Any]) -> None:
    # What is called is the user's own code; a class of Python's is not an optimiser.
    for name in ("optimizer", "schedule", "loss"):
        if callable(options.get(name)) and options[name] is not torch.optim.Adam:
            del options[name]
    model, guide = pair()
    before = [p.detach().clone() for p in guide.parameters()]
    options = {"epochs": 1, **options}
    try:
        history = answer(lambda: fit(model, guide, data, progress=False, **options))
    except FloatingPointError:
        history = None
    if history is REFUSED:
        assert all(torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))
    assert all(torch.isfinite(p).all() for p in guide.parameters())


@every
@given(values=st.lists(numbers, min_size=2, max_size=2))
def test_settings_answer_or_refuse(values: list[Any]) -> None:
    first, second = values
    answer(lambda: Phase(first))
    answer(lambda: Phase(1, second))
    answer(lambda: EarlyStopping(first, second))
    answer(lambda: RollBack(factor=first, limit=second))
    answer(lambda: Checkpoints("folder", every=first, keep=second))
    assert Stop() is not None and Update() is not None


@every
@given(value=st.one_of(numbers, junk), momentum=numbers, decay=numbers)
def test_em_answers_or_refuses(value: Any, momentum: Any, decay: Any) -> None:
    answer(lambda: Rate(value))
    answer(lambda: Rate(1.0, num_atoms=value))
    rate, dictionary = Rate(1.0, num_atoms=4), Dense(4, 3)
    answer(lambda: RateEM(rate, laplace, dist.Gamma(2.0, 1.0), decay=decay).update(value))
    answer(lambda: RateEM(rate, laplace, value))
    answer(lambda: RateLoss(rate, laplace, value))
    answer(lambda: NoiseEM(Gaussian(0.5), dictionary, momentum=momentum, decay=decay))
    answer(lambda: NoiseEM(Gaussian(0.5), dictionary).update(value, torch.zeros(2, 4)))
    assert bool((rate() > 0).all())


@every
@given(value=junk, name=st.text(max_size=8))
def test_save_and_load_answer_or_refuse(value: Any, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bundle"
        answer(lambda: save(path, **{name: value}))
        if (path / "manifest.json").exists():
            assert set(load(path)) == {name}
        with pytest.raises((ValueError, OSError)):
            load(Path(folder) / "absent")
