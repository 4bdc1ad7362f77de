"""Minibatches: which rows, in which order, how much of the data is read; data that are a trial."""

import functools
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyro_sparse.dictionaries import Dense
from pyro_sparse.guides import UnrolledFISTA
from pyro_sparse.infer import Phase, Update
from pyro_sparse.infer.batches import open_source
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding
from tests.training import Each, adam, draw, pair, parameters, quick, same

LIKE = torch.empty(0)


def rows(source: Any, epoch: int, skip: int = 0) -> list[list[int]]:
    return [batch.rows.tolist() for batch in source.epoch(epoch, LIKE, skip)]


class Items(Dataset):
    """A map-style data set, with a mask for each datum, some, or none; counts what is read."""

    def __init__(self, y: Tensor, mask: Tensor | None = None, every: int = 1) -> None:
        self.y, self.mask, self.every = y, mask, every
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        masked = self.mask is not None and index % self.every == 0
        return (self.y[index], self.mask[index] if masked else None)


# Order --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 10, 23])
def test_the_order_is_a_function_of_seed_and_epoch(batch_size: int) -> None:
    orders = {}
    for seed in range(3):
        source = open_source(draw(23), None, batch_size, seed)
        assert len(source) == -(-23 // batch_size)
        for epoch in (2, 1, 3):  # in any order
            random.random()
            torch.rand(1)
            batches = rows(source, epoch)
            assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(source) - 1)
            assert sorted(sum(batches, [])) == list(range(23))
            assert rows(open_source(draw(23), None, batch_size, seed), epoch) == batches
            orders[seed, epoch] = tuple(sum(batches, []))
    assert len(set(orders.values())) == 9


@pytest.mark.parametrize("skip", range(5))
def test_an_epoch_resumes_where_it_was(skip: int) -> None:
    source = open_source(draw(23), None, 6, 1)
    assert rows(source, 2, skip) == rows(source, 2)[skip:]
    numbers = [batch.number for batch in source.epoch(2, LIKE, skip)]
    assert numbers == list(range(skip, 4))


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_processes_share_every_minibatch(world_size: int) -> None:
    whole = rows(open_source(draw(23), None, 6, 1), 1)
    shares = [
        list(open_source(draw(23), None, 6, 1, rank, world_size).epoch(1, LIKE))
        for rank in range(world_size)
    ]
    for number, expected in enumerate(whole):
        batches = [share[number] for share in shares]
        own = [row for batch in batches for row in batch.rows[: batch.own].tolist()]
        assert sorted(own) == sorted(expected)
        assert {batch.size for batch in batches} == {len(expected)}
        assert all(len(batch.y) >= 1 for batch in batches)


# Sources ------------------------------------------------------------------------------------------


def test_a_data_set_trains_as_its_tensor_does() -> None:
    runs = []
    for data in (draw(), Items(draw()), TensorDataset(draw())):
        model, guide = pair()
        history = quick(model, guide, data, optimizer=adam, epochs=2, batch_size=7)
        runs.append((history.step_loss, parameters(model, guide)))
    for losses, weights in runs[1:]:
        assert losses == runs[0][0]
        assert same(weights, runs[0][1])


@pytest.mark.parametrize("every", [1, 2], ids=["all", "some"])
def test_masks_come_with_the_data_of_a_data_set(every: int) -> None:
    """Of all data or of some only: without one a datum is whole."""
    torch.manual_seed(0)
    mask = torch.rand(24, 4) < 0.6
    whole = torch.arange(24)[:, None] % every != 0
    y = torch.where(mask | whole, draw(), torch.nan)
    runs = []
    for data, given in ((y, mask | whole), (Items(y, mask, every), None)):
        model, guide = pair()
        history = quick(model, guide, data, mask=given, optimizer=adam, epochs=2, batch_size=7)
        runs.append((history.step_loss, parameters(model, guide)))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])
    assert np.isfinite(runs[0][0]).all()


def test_a_loader_gives_its_own_batches() -> None:
    torch.manual_seed(0)
    mask = torch.rand(24, 4) < 0.6
    seen: list[tuple[Tensor, Tensor]] = []
    look = Each(lambda progress: seen.append((progress.y, progress.mask)))
    loader = DataLoader(TensorDataset(draw(), mask), batch_size=10)
    history = quick(*pair(), loader, epochs=2, callbacks=[look])
    expected = [(draw()[k : k + 10], mask[k : k + 10]) for k in (0, 10, 20)] * 2
    for (y, observed), (given, given_mask) in zip(seen, expected, strict=True):
        assert torch.equal(y, given)
        assert torch.equal(observed, given_mask)
    sizes = np.array([10, 10, 4])
    steps = np.array(history.step_loss).reshape(2, 3)
    np.testing.assert_allclose(history.epoch_loss, steps @ sizes / 24, rtol=1e-12)


def test_a_loader_with_masks_trains_as_whole_batches_of_a_tensor_do() -> None:
    torch.manual_seed(0)
    mask, y = torch.rand(24, 4) < 0.6, draw()
    runs = []
    for data, given in ((y, mask), (DataLoader(TensorDataset(y, mask), batch_size=24), None)):
        model, guide = pair(random=False)
        quick(model, guide, data, mask=given, optimizer=adam, epochs=3)
        runs.append(parameters(model, guide))
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # sums in another order


class Counting(np.memmap):
    """A memory map that counts the rows read of it."""

    rows_read = 0

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if isinstance(found, np.ndarray) and found.ndim == 2:
            Counting.rows_read = max(Counting.rows_read, len(found))
        return found


def test_a_memory_map_is_read_by_the_minibatch(tmp_path: Path) -> None:
    draw(500).numpy().tofile(tmp_path / "data")
    Counting.rows_read = 0
    data = Counting(tmp_path / "data", dtype=np.float32, mode="r", shape=(500, 4))
    model, guide = pair()
    quick(model, guide, data, epochs=2, batch_size=7)
    assert Counting.rows_read == 7
    twin = pair()
    quick(*twin, draw(500), epochs=2, batch_size=7)
    assert same(parameters(model, guide), parameters(*twin))


def test_a_data_set_is_read_by_the_minibatch() -> None:
    data = Items(draw())
    reads: list[int] = []
    quick(*pair(), data, epochs=1, batch_size=8,
          callbacks=[Each(lambda progress: reads.append(len(data.read)))])  # fmt: skip
    # Two minibatches for the checks before the first step.
    assert reads == [24, 32, 40]


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        (DataLoader(TensorDataset(draw()), 8), {"batch_size": 8}, ValueError, "with a DataLoader"),
        (DataLoader(TensorDataset(draw()), 8), {"mask": True}, ValueError, "with a DataLoader"),
        (
            Items(draw()),
            {"mask": torch.ones(24, 4, dtype=torch.bool)},
            ValueError,
            "a Dataset: let",
        ),
        (Items(draw(0)), {}, ValueError, "at least one datum, got none"),
        (DataLoader(TensorDataset(draw(3)), 8, drop_last=True), {}, ValueError, "no batches"),
        (TensorDataset(draw(), torch.arange(24)), {}, TypeError, "mask.*boolean.*int64"),
        (
            DataLoader(TensorDataset(draw(), torch.arange(24)), 8),
            {},
            TypeError,
            "mask.*boolean.*int64",
        ),
        (Items(draw() / 0), {"batch_size": 5}, ValueError, "got 20 values.*of batch 0 .rows "),
    ],
)
def test_what_does_not_fit_is_refused(data: Any, options: dict, error: Any, message: str) -> None:
    model, guide = pair()
    before = parameters(model, guide)
    with pytest.raises(error, match=message):
        quick(model, guide, data, **options)
    assert same(parameters(model, guide), before)


# Missing samples ----------------------------------------------------------------------------------


def test_a_minibatch_without_an_observed_sample_is_skipped_and_counted() -> None:
    order = np.random.default_rng([0, 1]).permutation(24)
    mask = torch.ones(24, 4, dtype=torch.bool)
    mask[order[8:16]] = False  # the second minibatch of the first epoch
    model, guide = pair()
    seen: list[list[Tensor]] = []
    look = Each(lambda progress: seen.append(parameters(model, guide)))
    history = quick(model, guide, draw().where(mask, torch.nan), mask=mask, epochs=1, batch_size=8,
                    callbacks=[look])  # fmt: skip
    assert (history.skipped, len(history.step_loss), len(seen)) == (1, 2, 2)
    assert np.isfinite(history.step_loss).all()
    assert history.epoch_loss == pytest.approx([np.mean(history.step_loss)])


def test_nothing_moves_where_nothing_was_observed() -> None:
    model, guide = pair()
    before = parameters(model, guide)
    mask = torch.zeros(24, 4, dtype=torch.bool)
    history = quick(model, guide, draw(), mask=mask, epochs=2, batch_size=8)
    assert (history.skipped, history.step_loss) == (6, [])
    assert np.isnan(history.epoch_loss).all()
    assert same(parameters(model, guide), before)


# Data that are a trial: R6 ------------------------------------------------------------------------


def planted(num_data: int, features: int) -> Tensor:
    return draw(num_data, features)


TRIALS = {
    "zero": torch.zeros(30, 5),
    "constant": torch.full((30, 5), 3.0),
    "one datum": planted(1, 5),
    "one feature": planted(30, 1),
    "one number": torch.ones(1, 1),
    "duplicates": planted(1, 5).expand(30, 5),
    "two data, repeated": planted(2, 5).repeat(15, 1),
    "tiny": planted(30, 5) * 1e-6,
    "large": planted(30, 5) * 1e6,
    "of very different scales": planted(30, 5) * torch.logspace(-6, 6, 5),
    "one outlier": planted(30, 5).index_put((torch.tensor(3), torch.tensor(1)), torch.tensor(1e6)),
    "sparse": planted(30, 5) * (torch.arange(150).reshape(30, 5) % 29 == 0),
}


@pytest.mark.parametrize("dead", [False, True], ids=["", "dead atoms"])
@pytest.mark.parametrize("trainable", [False, True], ids=["fixed scale", "scale learned"])
@pytest.mark.parametrize("name", TRIALS)
def test_a_training_on_degenerate_data_ends_and_is_finite(
    name: str, trainable: bool, dead: bool
) -> None:
    y = TRIALS[name]
    atoms = torch.randn(6, y.shape[1], generator=torch.Generator().manual_seed(0))
    atoms[3:] *= 1e-12 if dead else 1.0
    dictionary = Dense(6, y.shape[1], atoms=atoms)
    likelihood, prior = Gaussian(0.3, trainable=trainable), dist.Laplace(0.0, 0.5)
    model = SparseCoding(dictionary, likelihood, prior)
    guide = UnrolledFISTA.untied(dictionary, likelihood, prior, num_steps=4)
    history = quick(model, guide, y, optimizer=adam, epochs=8, batch_size=min(8, len(y)))
    assert np.isfinite(history.step_loss).all()
    assert not history.faults
    assert all(p.isfinite().all() for p in parameters(model, guide))


@pytest.mark.parametrize("name", TRIALS)
def test_so_does_one_with_a_random_guide(name: str) -> None:
    y = TRIALS[name]
    model, guide = pair(features=y.shape[1])
    history = quick(model, guide, y, optimizer=adam, epochs=8, batch_size=min(8, len(y)))
    assert np.isfinite(history.step_loss).all()
    assert all(p.isfinite().all() for p in parameters(model, guide))


# Alone in the world: R8, R9 -----------------------------------------------------------------------


def surroundings() -> dict[str, Any]:
    store = pyro.get_param_store()
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),  # noqa: NPY002
        "random": random.getstate(),
        "store": {name: (id(p), p.tolist()) for name, p in store._params.items()},
        "validation": (
            torch.distributions.Distribution._validate_args,
            pyro.settings.get()["validate_distributions_pyro"],
        ),
        "settings": pyro.settings.get(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "warnings": list(warnings.filters),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def fails(progress: Any) -> None:
    raise RuntimeError("enough")


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("ends", ["well", "badly", "refused"])
def test_nothing_global_is_left_changed(ends: str, validate: bool) -> None:
    options, error = {
        "well": ({}, ()),
        "badly": ({"callbacks": [Each(fails)]}, RuntimeError),
        "refused": ({"batch_size": 99}, ValueError),
    }[ends]
    pyro.param("atoms", torch.ones(2))  # a name of the model's
    model, guide = pair()
    guide.linear.bias.requires_grad_(False)
    phases = [Phase(1, [Update(train=[model])]), Phase(1)]
    with pyro.validation_enabled(validate):
        before = surroundings()
        raised: Any = None
        try:
            quick(model, guide, draw(), phases=phases, **options)
        except Exception as found:
            raised = found
        assert surroundings() == before
        assert isinstance(raised, error or type(None))
    flags = {name: p.requires_grad for name, p in guide.named_parameters()}
    assert flags == {"linear.weight": True, "linear.bias": False, "spread_unconstrained": True}


def test_models_trained_in_turn_are_each_trained_alone_epoch_by_epoch() -> None:
    """Even if their trainings are interleaved: one's callback trains the other."""

    def train(data: Tensor, **options: Any) -> list[Tensor]:
        with torch.random.fork_rng():  # a layer draws its first weights
            model, guide = pair()
        quick(model, guide, data, optimizer=adam, epochs=2, batch_size=10, **options)
        return parameters(model, guide)

    alone = [train(draw(20)), train(draw(24))]
    inner: list[list[Tensor]] = []
    outer = train(draw(20), callbacks=[Each(lambda progress: inner.append(train(draw(24))))])
    assert same(outer, alone[0])
    assert all(same(found, alone[1]) for found in inner)
    assert len(inner) == 4


@pytest.mark.parametrize("part", ["linear.bias", "linear.weight", "spread_unconstrained"])
def test_a_frozen_parameter_of_a_pyro_module_stays(part: str) -> None:
    """Pyro's store would thaw it where it is registered first."""
    model, guide = pair()
    frozen = functools.reduce(getattr, part.split("."), guide)
    frozen.requires_grad_(False)
    before = frozen.clone()
    quick(model, guide, draw(), optimizer=adam, epochs=2)
    assert torch.equal(frozen, before)
    assert not frozen.requires_grad
