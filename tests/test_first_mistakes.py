"""What a newcomer tries first, and what the library says to it."""

from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sparse import diagnostics, dictionaries, guides, infer, likelihoods, models, solvers
from pyro_sparse.testing import check_model

ARRAY = np.random.default_rng(0).standard_normal((20, 5))
Y = torch.from_numpy(ARRAY).float()


def pair() -> tuple[Any, Any]:
    dictionary = dictionaries.Dense(8, 5)
    gaussian, prior = likelihoods.Gaussian(0.1), dist.Laplace(0.0, 1.0)
    model = models.SparseCoding(dictionary, gaussian, prior)
    return model, guides.UnrolledFISTA(dictionary, gaussian, prior)


def fit(**options: Any) -> infer.History:
    return infer.fit(*pair(), Y, epochs=2, progress=False, **options)


def test_an_array_is_told_how_to_become_a_tensor() -> None:
    model, guide = pair()
    for call in (
        lambda: guide.encode(ARRAY),
        lambda: solvers.solve(ARRAY, model.dictionary, dist.Laplace(0.0, 1.0)),  # type: ignore
        lambda: check_model(model, ARRAY),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=r"got ndarray. Try torch.as_tensor\(y\).float\(\)"):
            call()


def test_a_class_in_place_of_an_object_is_named() -> None:
    dictionary, prior = dictionaries.Dense(8, 5), dist.Laplace(0.0, 1.0)
    match = r"a Likelihood.*the class Poisson, not an object: write Poisson\(...\)"
    with pytest.raises(TypeError, match=match):
        models.SparseCoding(dictionary, likelihoods.Poisson, prior)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=match):
        solvers.solve(Y, dictionary, prior, likelihood=likelihoods.Poisson)  # type: ignore
    with pytest.raises(TypeError, match=r"a Dictionary.*the class Dense"):
        models.SparseCoding(dictionaries.Dense, likelihoods.Poisson(), prior)  # type: ignore
    with pytest.raises(TypeError, match=r"loss to be an objective.*write SparseELBO\(...\)"):
        fit(loss=infer.SparseELBO)


def test_an_optimiser_of_pyro_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"torch.optim.Optimizer, got NoneType.*pyro.infer.SVI"):
        fit(optimizer=pyro.optim.Adam({"lr": 1e-2}))


def test_model_and_guide_in_the_wrong_order_are_suspected() -> None:
    model, guide = pair()
    with pytest.raises(NotImplementedError, match=r"'obs'.*is the guide the first argument"):
        infer.fit(guide, model, Y, progress=False)


def test_a_guide_in_place_of_its_encoder_is_told_where_that_is() -> None:
    _, guide = pair()
    with pytest.raises(TypeError, match=r"got UnrolledFISTA.*guide.encoder"):
        guides.UnrolledEncoder(guide, dist.Laplace(0.0, 1.0))
    guides.UnrolledEncoder(guide.encoder, dist.Laplace(0.0, 1.0))


def test_a_dictionary_in_place_of_its_atoms_is_told_where_they_are() -> None:
    model, _ = pair()
    with pytest.raises(TypeError, match=r"got ParametrizedDense. Try .* dictionary.atoms"):
        diagnostics.match_atoms(model.dictionary, torch.randn(8, 5))


def test_a_single_picture_lacks_its_channel() -> None:
    dictionary = dictionaries.Conv(4, 1, (3, 3))
    with pytest.raises(ValueError, match=r"A single channel is a dimension too: y\[None\]"):
        solvers.solve(torch.randn(10, 10), dictionary, dist.Laplace(0.0, 1.0))
    solvers.solve(torch.randn(10, 10)[None], dictionary, dist.Laplace(0.0, 1.0))


def test_what_a_notebook_prints_of_a_training_is_one_line() -> None:
    history = fit(optimizer=partial(torch.optim.Adam, lr=1e-3), batch_size=5)
    shown = repr(history)
    assert len(shown) < 100 and "\n" not in shown
    assert "2 epochs, 8 steps" in shown and f"{history.epoch_loss[-1]:.4g} nats" in shown
    assert repr(infer.History()) == "History(0 epochs, 0 steps, 0.0 s)"


def test_settings_are_shown() -> None:
    assert repr(likelihoods.Gaussian(0.05)) == "Gaussian(scale=0.05)"
    assert repr(likelihoods.Gaussian(torch.ones(3, 1))) == "Gaussian(scale=(3, 1))"
    assert (
        repr(solvers.ISTA()) == "ISTA()" and repr(solvers.Truncated(3)) == "Truncated(num_steps=3)"
    )
