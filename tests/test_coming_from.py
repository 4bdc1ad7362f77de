"""The page for users of other libraries: its code runs, and its formulas hold."""

import importlib.util
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.linear_model import Lasso

from pyro_sparse import dictionaries, likelihoods, solvers

PAGE = Path(__file__).parent.parent / "docs/coming_from.md"
PEERS = ("sporco", "alphacsc")


@pytest.fixture(scope="module")
def names() -> dict[str, dict[str, Any]]:
    """What the blocks of each section leave behind; a peer's run where it is installed."""
    found: dict[str, Any] = {}
    after = {}
    for section in PAGE.read_text().split("\n## From ")[1:]:
        peer = section.partition("\n")[0]
        for block in re.findall(r"```python\n(.*?)```", section, re.S):
            head = block.partition("\n")[0].removeprefix("# ")
            if head in PEERS and importlib.util.find_spec(head) is None:
                continue
            with warnings.catch_warnings():
                if head != "pyro_sparse":
                    warnings.simplefilter("ignore")
                exec(compile(block, f"{PAGE.name}, {head}", "exec"), found)
        after[peer] = dict(found)
    pyro.clear_param_store()
    return after


def test_every_block_says_whose_it_is() -> None:
    heads = re.findall(r"```python\n# (.*)\n", PAGE.read_text())
    assert len(heads) == PAGE.read_text().count("```python")
    assert set(heads) == {"scikit-learn", "Pyro", "pyro_sparse", "data", *PEERS}


@pytest.mark.slow
def test_codes_are_those_of_sparse_encode(names: dict[str, dict[str, Any]]) -> None:
    found = names["scikit-learn"]
    theirs = torch.from_numpy(found["theirs"])
    assert found["solution"].converged.all()
    assert (theirs != 0).any() and (theirs == 0).any()
    # scikit-learn stops at a gap of 1e-8 of the squared data, ours at 1e-6 of the objective.
    torch.testing.assert_close(found["solution"].codes, theirs, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_the_learned_dictionary_is_the_one_that_made_the_data(
    names: dict[str, dict[str, Any]],
) -> None:
    found = names["scikit-learn"]
    assert found["found"].correlation.median() > 0.95
    assert found["learned"].shape == found["dictionary"].atoms.shape
    assert (found["codes"] == 0).any()


@pytest.mark.slow
def test_autoguides_have_no_zeros_and_free_atoms_while_encoders_have_them(
    names: dict[str, dict[str, Any]],
) -> None:
    found = names["plain Pyro"]
    assert (found["dense"] != 0).all()
    assert (found["sparse"] == 0).float().mean() > 0.5
    lengths = found["program"].dictionary.atoms.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(40))


def test_lasso_divides_by_the_number_of_features() -> None:
    random = np.random.default_rng(0)
    atoms, y = random.standard_normal((8, 30)), random.standard_normal(30)
    alpha, sigma = 0.1, 0.5
    lasso = Lasso(alpha=alpha, fit_intercept=False, tol=1e-12, max_iter=10_000).fit(atoms.T, y)
    dictionary = dictionaries.Dense(8, 30, atoms=torch.from_numpy(atoms), unit_norm=False)
    prior = dist.Laplace(0.0, sigma**2 / (30 * alpha))
    gaussian = likelihoods.Gaussian(sigma)
    found = solvers.solve(torch.from_numpy(y), dictionary, prior, likelihood=gaussian, tol=1e-12)
    assert 0 < (found.codes == 0).sum() < 8
    torch.testing.assert_close(found.codes, torch.from_numpy(lasso.coef_), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_codes_are_those_of_sporco(names: dict[str, dict[str, Any]]) -> None:
    pytest.importorskip("sporco", reason="sporco is not installed (the extra `bench` has it)")
    compare(names["sporco"]["ours"], names["sporco"]["maps"][:, :, 0, 0])


@pytest.mark.slow
def test_codes_are_those_of_alphacsc(names: dict[str, dict[str, Any]]) -> None:
    pytest.importorskip("alphacsc", reason="alphacsc is not installed (the extra `bench` has it)")
    compare(names["alphacsc"]["ours"], names["alphacsc"]["z"])


def compare(ours: torch.Tensor, theirs: Any) -> None:
    assert (theirs != 0).any() and (theirs == 0).any()
    # Theirs stop early, at about 1e-3 of the codes.
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-2)


@pytest.mark.slow
def test_no_code_is_active_above_the_largest_correlation(names: dict[str, dict[str, Any]]) -> None:
    found = names["alphacsc"]
    y, dictionary, largest = found["y"], found["dictionary"], found["largest"]
    below = solvers.solve(y, dictionary, dist.Exponential(0.99 * largest)).codes
    above = solvers.solve(y, dictionary, dist.Exponential(1.01 * largest)).codes
    assert (below > 0).any() and (above == 0).all()
