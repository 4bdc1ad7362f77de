"""Which laws of a guide and a model can be compared."""

import itertools
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_sparse.distributions import GammaThresholded, RelaxedSpikeAndSlab, SpikeAndSlab
from pyro_sparse.infer.sites import check_sites

LAWS = {
    "Laplace": lambda: dist.Laplace(torch.zeros(3), 1.0),
    "Exponential": lambda: dist.Exponential(torch.ones(3)),
    "SpikeAndSlab": lambda: SpikeAndSlab(dist.Laplace(torch.zeros(3), 1.0), probs=0.3),
    "GammaThresholded": lambda: GammaThresholded(torch.zeros(3), *torch.ones(3)),
    "RelaxedSpikeAndSlab": lambda: RelaxedSpikeAndSlab(
        dist.Laplace(torch.zeros(3), 1.0), 0.5, probs=0.3
    ),
    "Delta": lambda: dist.Delta(torch.zeros(3)),
}
WITH_ATOM = {"SpikeAndSlab", "GammaThresholded"}
WRAPPERS = {
    "to_event": lambda law: law.to_event(1),
    "mask": lambda law: law.to_event(1).mask(torch.tensor(True)),
    "expand": lambda law: law.expand((4, 3)).to_event(1),
}


def program(law: Any) -> Any:
    def run(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("codes", law)

    return run


PAIRS = list(itertools.product(LAWS, LAWS))  # of guide and model
INFINITE = [(g, m) for g, m in PAIRS if g in WITH_ATOM and m not in WITH_ATOM]
POINTS = [(g, m) for g, m in PAIRS if g == "Delta" and m in WITH_ATOM]
wrappers = pytest.mark.parametrize("wrapper", WRAPPERS)


def check(pair: tuple[str, str], wrapper: str) -> None:
    guide, model = (program(WRAPPERS[wrapper](LAWS[name]())) for name in pair)
    check_sites(model, guide, torch.zeros(4, 2))


@wrappers
@pytest.mark.parametrize("pair", INFINITE, ids="-".join)
def test_an_atom_against_none_is_an_infinite_kl(pair: tuple[str, str], wrapper: str) -> None:
    message = (
        "atom at zero at site 'codes', as the guide's {} has one, got {}: their KL is infinite"
    )
    with pytest.raises(ValueError, match=message.format(*pair)):
        check(pair, wrapper)


@wrappers
@pytest.mark.parametrize("pair", POINTS, ids="-".join)
def test_a_point_against_an_atom_has_no_optimum(pair: tuple[str, str], wrapper: str) -> None:
    message = "a law at site 'codes', got {} against {}: .*independent of units"
    with pytest.raises(ValueError, match=message.format(*pair)):
        check(pair, wrapper)


@wrappers
@pytest.mark.parametrize("pair", sorted({*PAIRS} - {*INFINITE} - {*POINTS}), ids="-".join)
def test_all_others_pass(pair: tuple[str, str], wrapper: str) -> None:
    check(pair, wrapper)


def test_other_sites_are_looked_at_too() -> None:
    def model(y: Tensor) -> None:
        pyro.sample("first", dist.Normal(0.0, 1.0))
        pyro.sample("second", SpikeAndSlab(dist.Normal(0.0, 1.0), 0.5))

    def guide(y: Tensor) -> None:
        pyro.sample("first", SpikeAndSlab(dist.Normal(0.0, 1.0), 0.5))
        pyro.sample("second", SpikeAndSlab(dist.Normal(0.0, 1.0), 0.5))

    with pytest.raises(
        ValueError, match="'first', as the guide's SpikeAndSlab has one, got Normal"
    ):
        check_sites(model, guide, torch.zeros(2))


@pytest.mark.parametrize("model", ["Laplace", "RelaxedSpikeAndSlab"])
def test_the_advice_is_a_prior_that_exists(model: str) -> None:
    advice = r"Use SpikeAndSlab\(Laplace\(\.\.\.\), probs=\.\.\.\) in the model"
    with pytest.raises(ValueError, match=advice):
        check(("SpikeAndSlab", model), "to_event")
