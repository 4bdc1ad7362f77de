"""Summaries on disk equal those in memory, and what scipy and the draws say."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyro_sparse.diagnostics import CodeSummary, summarise_codes
from pyro_sparse.dictionaries import Dense
from pyro_sparse.distributions import SpikeAndSlab
from pyro_sparse.guides import Heads, StructuredThresholded, Thresholded
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding

LONG = os.environ.get("PYRO_SPARSE_LONG") == "1"


def amortised(num_atoms: int = 6) -> Thresholded:
    return Thresholded(Heads(torch.nn.Linear(4, 8), 8, code_shape=num_atoms))


def arrays(found: CodeSummary) -> list[Any]:
    return [found.mean, found.sd, found.prob_active, *found.quantiles.values()]


@pytest.mark.parametrize("num_samples", [None, 50])
def test_files_equal_what_is_in_memory(num_samples: int | None, tmp_path: Path) -> None:
    guide, y = amortised(), torch.randn(103, 4)
    options: dict[str, Any] = {"num_samples": num_samples, "batch_size": 20, "progress": False}
    memory = summarise_codes(guide, y, **options)
    disk = summarise_codes(guide, y, folder=tmp_path / "new" / "folder", **options)
    again = CodeSummary.open(tmp_path / "new" / "folder")
    for one, two, three in zip(arrays(memory), arrays(disk), arrays(again)):
        assert one.shape == two.shape == (103, 6)
        assert isinstance(two, np.memmap) and not two.flags.writeable
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)
    assert list(again.quantiles) == [0.05, 0.5, 0.95]
    np.testing.assert_allclose(disk.usage, memory.prob_active.mean(0), rtol=1e-6)


def test_closed_forms_are_those_of_the_law_and_do_not_depend_on_the_batches() -> None:
    guide, y = amortised(), torch.randn(50, 4)
    law = guide.posterior(y)
    found = summarise_codes(guide, y, batch_size=7, quantiles=[0.2, 0.9], progress=False)
    expected = [law.mean, law.variance.sqrt(), law.prob_active]
    expected += [law.icdf(torch.full_like(law.mean, level)) for level in (0.2, 0.9)]
    for one, two in zip(arrays(found), expected):
        np.testing.assert_allclose(one, two.detach(), rtol=1e-5, atol=1e-6)


def test_draws_agree_with_closed_forms() -> None:
    guide, y = amortised(), torch.randn(20, 4)
    exact = summarise_codes(guide, y, progress=False)
    drawn = summarise_codes(guide, y, num_samples=4000, progress=False)
    np.testing.assert_allclose(drawn.mean, exact.mean, atol=0.1)
    np.testing.assert_allclose(drawn.sd, exact.sd, rtol=0.1)
    np.testing.assert_allclose(drawn.prob_active, exact.prob_active, atol=0.04)
    np.testing.assert_allclose(drawn.quantiles[0.95], exact.quantiles[0.95], atol=0.25)


def zeros_or_ones(y: Tensor, num_data: int) -> None:
    with pyro.plate("data", len(y)):
        law = SpikeAndSlab(dist.Normal(y + 5, 0.01), 0.5)
        pyro.sample("codes", law.to_event(1))


def test_a_quantile_of_draws_is_a_draw() -> None:
    """Linear interpolation would make values between an exact zero and the active codes."""
    found = summarise_codes(
        zeros_or_ones, torch.zeros(400, 1), num_samples=9, quantiles=[0.5], progress=False
    )
    median = found.quantiles[0.5]
    assert ((median == 0) | (median > 4.9)).all()
    assert 0.4 < (median == 0).mean() < 0.6


def test_a_structured_guide_and_masks_are_served() -> None:
    guide = StructuredThresholded(
        Heads(torch.nn.Linear(4, 8), 8, code_shape=3), couplings=torch.eye(3)
    )
    y, mask = torch.randn(30, 4), torch.rand(30, 4) < 0.7
    options: dict[str, Any] = {"num_samples": 500, "progress": False}
    seen = summarise_codes(guide, torch.where(mask, y, torch.nan), mask=mask, **options)
    zeroed = summarise_codes(guide, y, mask=mask, **options)
    np.testing.assert_array_equal(seen.mean, zeroed.mean)
    exact = guide.posterior(y, mask).marginals(4000).prob_active
    np.testing.assert_allclose(seen.prob_active, exact.detach(), atol=0.12)


def test_convolutional_codes_and_several_plates_are_served() -> None:
    def guide(y: Tensor, num_data: int) -> None:
        with pyro.plate("data", len(y), dim=-1):
            with pyro.plate("channels", 3, dim=-2):
                pyro.sample("other", dist.Normal(y[:, 0], 1.0))
            loc = y[:, None, :].expand(-1, 2, -1)
            pyro.sample("codes", dist.Normal(loc, 1.0).to_event(2))

    y = torch.arange(30.0).reshape(10, 3)
    for vectorize in (True, False):
        found = summarise_codes(guide, y, num_samples=40, vectorize=vectorize, progress=False)
        assert found.mean.shape == (10, 2, 3)
        np.testing.assert_allclose(found.mean[:, 0], y, atol=1)
        assert found.usage.tolist() == [1, 1]


class Squares(Dataset[Tensor]):
    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((4,), float(index**2))


@pytest.mark.parametrize("kind", ["memmap", "float64", "dataset"])
def test_any_source_of_rows_is_read(kind: str, tmp_path: Path) -> None:
    rows = torch.arange(9.0).square()[:, None].expand(9, 4)
    np.save(tmp_path / "y.npy", rows.numpy())
    sources: dict[str, Callable[[], Any]] = {
        "memmap": lambda: np.load(tmp_path / "y.npy", mmap_mode="r"),
        "float64": lambda: rows.numpy().astype(float),
        "dataset": Squares,
    }
    guide = amortised()
    found = summarise_codes(guide, sources[kind](), batch_size=4, progress=False)
    np.testing.assert_allclose(found.mean, guide.posterior(rows).mean.detach(), rtol=1e-5)


def test_nothing_global_moves() -> None:
    guide = Thresholded(Heads(torch.nn.BatchNorm1d(4), 4, code_shape=3))
    y = torch.randn(8, 4)
    before = torch.random.get_rng_state(), [b.clone() for b in guide.buffers()]
    store = dict(pyro.get_param_store())
    summarise_codes(guide, y, num_samples=5, progress=False)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert all(map(torch.equal, before[1], guide.buffers()))
    assert dict(pyro.get_param_store()) == store


MEMORY = """
import resource, sys, torch
from pyro_sparse.diagnostics import summarise_codes
from pyro_sparse.guides import Heads, Thresholded
torch.set_num_threads(1)
torch.manual_seed(0)
guide = Thresholded(Heads(torch.nn.Identity(), 32, code_shape=1024))
y = torch.randn(int(sys.argv[1]), 32)
found = summarise_codes(guide, y, folder=sys.argv[2], progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # KiB
part = summarise_codes(guide, y[-256:], progress=False)
ends = [part.mean, part.sd, part.prob_active, *part.quantiles.values()]
disk = [found.mean, found.sd, found.prob_active, *found.quantiles.values()]
assert all(abs(a - b[-256:]).max() < 1e-5 for a, b in zip(ends, disk))
"""


def peak(size: int, folder: Path) -> int:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(size), str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    return 1024 * int(done.stdout)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tmp_path: Path, record_property: Any) -> None:
    size = 60_000 if LONG else 1500
    most = peak(size, tmp_path / "many")
    record_property("bytes", most)
    assert most < 2e9
    written = sum(file.stat().st_size for file in (tmp_path / "many").iterdir())
    assert written > 6 * 4 * 1024 * size
    assert most - peak(300, tmp_path / "few") < 0.3 * written


def test_an_unfinished_summary_is_not_opened(tmp_path: Path) -> None:
    guide, y = amortised(), torch.randn(30, 4)
    summarise_codes(guide, y, folder=tmp_path, progress=False)
    np.save(tmp_path / "y.npy", np.where(np.arange(30)[:, None] > 25, np.nan, y.numpy()))
    bad = np.load(tmp_path / "y.npy", mmap_mode="r")
    with pytest.raises(ValueError, match="not in batch 2"):
        summarise_codes(guide, bad, folder=tmp_path, batch_size=10, progress=False)
    with pytest.raises(FileNotFoundError, match="finished summary"):
        CodeSummary.open(tmp_path)


def test_errors() -> None:
    guide, y = amortised(), torch.randn(5, 4)
    with pytest.raises(TypeError, match="Pass num_samples="):
        summarise_codes(zeros_or_ones, y)
    with pytest.raises(TypeError, match="Pass num_samples="):
        structured = StructuredThresholded(
            Heads(torch.nn.Linear(4, 8), 8, code_shape=3), couplings=torch.eye(3)
        )
        summarise_codes(structured, y, progress=False)
    with pytest.raises(TypeError, match="Pass its dataset"):
        summarise_codes(guide, DataLoader(TensorDataset(y)))
    with pytest.raises(ValueError, match="quantiles"):
        summarise_codes(guide, y, quantiles=[1.0])
    with pytest.raises(ValueError, match="num_samples >= 2"):
        summarise_codes(guide, y, num_samples=1)
    with pytest.raises(ValueError, match="batch_size >= 1"):
        summarise_codes(guide, y, batch_size=0)
    with pytest.raises(ValueError, match="a site 'latent'"):
        summarise_codes(zeros_or_ones, y, num_samples=3, site="latent", progress=False)
    with pytest.raises(ValueError, match="finite"):
        summarise_codes(guide, y / 0, progress=False)

    def fixed(y: Tensor, num_data: int) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("codes", dist.Delta(y, event_dim=1))

    def scalar(y: Tensor, num_data: int) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("codes", dist.Normal(y[:, 0], 1.0))

    with pytest.raises(ValueError, match="n, \\*code_shape"):
        summarise_codes(scalar, y, num_samples=3, progress=False)
    summarise_codes(fixed, y, num_samples=3, progress=False)


def test_the_library_pair_is_summarised() -> None:
    dictionary = Dense(6, 4)
    model = SparseCoding(dictionary, Gaussian(0.1), SpikeAndSlab(dist.Normal(0.0, 1.0), probs=0.1))
    with torch.no_grad():
        y = model(num_data=30)
    assert summarise_codes(amortised(), y, progress=False).mean.dtype == np.float32
