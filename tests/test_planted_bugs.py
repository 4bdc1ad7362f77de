"""The bugs of planted_bugs.md, each planted in the library's own code, are noticed.

A bug is an edit of a function's source. The battery is a handful of small checks against references
of their own (numpy, scipy, scikit-learn, finite differences); each bug says which one it falls to.
"""

import __future__

import inspect
import math
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from sklearn.linear_model import Lasso
from torch import Tensor

from pyro_sparse.diagnostics import match_atoms, sbc
from pyro_sparse.diagnostics.calibration import Counts
from pyro_sparse.dictionaries import Conv, Dense
from pyro_sparse.dictionaries.conv import ConvMap
from pyro_sparse.dictionaries.dense import DenseMap
from pyro_sparse.distributions import SpikeAndSlab, kl, prox
from pyro_sparse.distributions.mixed import Mixed
from pyro_sparse.guides import Heads, SpikeAndSlabPosterior, Thresholded, emission
from pyro_sparse.infer import (
    Importance,
    LeaveOneOut,
    Mean,
    SparseELBO,
    enumerate_posterior,
    gibbs,
    log_weights,
)
from pyro_sparse.infer import exact as exact_module
from pyro_sparse.likelihoods import Gaussian, Poisson
from pyro_sparse.models import SparseCoding
from pyro_sparse.models.program import CodesProgram
from pyro_sparse.ops import soft_threshold
from pyro_sparse.solvers import solve
from pyro_sparse.solvers.problem import Problem

gibbs_module = inspect.getmodule(gibbs)
F64 = torch.float64
SCALE, PROBS, NOISE = 1.25, 0.3, 0.5
PRIOR = SpikeAndSlab(
    dist.Normal(torch.zeros((), dtype=F64), SCALE), probs=torch.tensor(PROBS, dtype=F64)
)


# Checks -------------------------------------------------------------------------------------------


def orthonormal(num_atoms: int = 3) -> SparseCoding:
    """Codes are independent given the data, so that everything has a closed form."""
    dictionary = Dense(num_atoms, num_atoms, atoms=torch.eye(num_atoms, dtype=F64))
    return SparseCoding(dictionary, Gaussian(torch.tensor(NOISE, dtype=F64)), PRIOR)


def log_evidence(y: Tensor) -> Any:
    """Of each sample, by scipy."""
    both = [
        math.log(weight) + stats.norm.logpdf(y.numpy(), 0, scale)
        for weight, scale in ((1 - PROBS, NOISE), (PROBS, math.hypot(SCALE, NOISE)))
    ]
    return np.logaddexp(*both)


def exact_guide(y: Tensor, num_data: int | None = None, mask: Tensor | None = None) -> None:
    """The posterior under an orthonormal dictionary."""
    gain = SCALE**2 / (SCALE**2 + NOISE**2)
    odds = math.log(PROBS / (1 - PROBS)) + math.log(1 - gain) / 2 + gain * (y / NOISE) ** 2 / 2
    law = dist.Normal(gain * y, torch.full_like(y, NOISE * gain**0.5))
    odds_prior = torch.full_like(y, math.log(PROBS / (1 - PROBS)))
    if mask is not None:
        law = dist.Normal(torch.where(mask, law.loc, 0.0), torch.where(mask, law.scale, SCALE))
        odds = torch.where(mask, odds, odds_prior)
    with pyro.plate("data", num_data or len(y), subsample=torch.arange(len(y))):
        pyro.sample("codes", SpikeAndSlab(law, logits=odds).to_event(1))


def data(size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return 1.5 * torch.randn(size, 3, generator=generator, dtype=F64)


def check_elbo() -> None:
    """Of the exact posterior the bound is the log evidence."""
    y = data()
    loss = SparseELBO().loss(orthonormal(), exact_guide, y)
    assert loss == pytest.approx(-log_evidence(y).sum(), abs=1e-8)


def check_scale() -> None:
    y = data()
    single, many = (SparseELBO().loss(orthonormal(), exact_guide, y, n) for n in (8, 80))
    assert many == pytest.approx(10 * single)


def check_bounds() -> None:
    """Every bound of the exact posterior is the log evidence, whatever the number of draws."""
    y = data()
    for bound in (Mean(sampled_kl=True), Importance()):
        objective = SparseELBO(LeaveOneOut(), bound=bound, num_samples=3, num_plates=1)
        loss = objective.loss(orthonormal(), exact_guide, y)
        assert loss == pytest.approx(-log_evidence(y).sum(), abs=1e-8)


def check_weights() -> None:
    """Each draw of the exact posterior weighs the evidence, with masked samples left out."""
    y = data()
    mask = torch.rand(y.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    for given in (None, mask):
        found = log_weights(orthonormal(), exact_guide, y, num_samples=30, mask=given).local
        seen = log_evidence(y) * (1 if given is None else given.numpy())
        np.testing.assert_allclose(found, np.tile(seen.sum(1), (30, 1)), atol=1e-8)


def check_masked_encoder() -> None:
    torch.manual_seed(0)
    guide = Thresholded(Heads(torch.nn.Linear(3, 4), 4, code_shape=3)).double()
    y = data()
    mask = torch.arange(3) < 2
    laws = [guide.posterior(torch.where(mask, y, other), mask) for other in (0.0, 9.0)]
    torch.testing.assert_close(laws[0].logits, laws[1].logits)


def check_gradients() -> None:
    """Of every parameter of model and guide, against finite differences."""
    torch.manual_seed(0)
    dictionary = Dense(3, 3).double()
    model = SparseCoding(dictionary, Gaussian(torch.tensor(NOISE, dtype=F64)), PRIOR)
    guide = Thresholded(Heads(torch.nn.Linear(3, 4), 4, code_shape=3)).double()
    y, objective = data(4), SparseELBO()

    def loss() -> Tensor:
        value: Tensor = objective.differentiable_loss(model, guide, y)
        return value

    parameters = [*dictionary.parameters(), *guide.parameters()]
    found = torch.autograd.grad(loss(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, found):
        assert gradient is not None
        way = torch.randn_like(parameter)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-5 * way
                ends.append(float(loss()))
                parameter -= sign * 1e-5 * way
        slope = (ends[0] - ends[1]) / 2e-5
        assert float((gradient * way).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-6)


def check_score_gradient() -> None:
    """The gradient from draws is that without any noise, up to noise."""
    y, logits = data(), torch.zeros(3, dtype=F64, requires_grad=True)

    def guide(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            law = SpikeAndSlab(dist.Normal(0.5 * y, 0.4), logits=logits.expand(y.shape))
            pyro.sample("codes", law.to_event(1))

    gradients = []
    for objective in (
        SparseELBO(),
        SparseELBO(LeaveOneOut(), bound=Mean(sampled_kl=True), num_samples=4000, num_plates=1),
    ):
        loss = objective.differentiable_loss(orthonormal(), guide, y)
        gradients += torch.autograd.grad(loss, [logits])
    np.testing.assert_allclose(gradients[1], gradients[0], atol=0.3, rtol=0.05)


def check_sbc() -> None:
    options: dict[str, Any] = {"num_simulations": 400, "num_samples": 40, "progress": False}
    assert not sbc(orthonormal(), exact_guide, torch.zeros(400, 3, dtype=F64), **options).alarm


def check_draws() -> None:
    law = SpikeAndSlab(dist.Normal(2.0, 1.0), probs=0.2)
    active = law.sample((4000,)) != 0
    assert float(active.double().mean()) == pytest.approx(0.2, abs=0.03)


def check_map() -> None:
    """MAP codes under a Laplace prior are the Lasso of scikit-learn."""
    generator = torch.Generator().manual_seed(1)
    atoms = torch.randn(6, 8, generator=generator, dtype=F64)
    y = torch.randn(4, 8, generator=generator, dtype=F64)
    noise, scale = 0.7, 0.4
    found = solve(
        y,
        Dense(6, 8, atoms=atoms, unit_norm=False),
        dist.Laplace(torch.zeros((), dtype=F64), scale),
        likelihood=Gaussian(noise),
        tol=1e-9,
        max_steps=3000,
    ).codes
    lasso = Lasso(alpha=noise**2 / scale / 8, fit_intercept=False, tol=1e-12, max_iter=100_000)
    np.testing.assert_allclose(found, lasso.fit(atoms.T.numpy(), y.T.numpy()).coef_, atol=1e-5)


def check_adjoint() -> None:
    for kernel in ((4,), (3, 4)):
        atoms = torch.randn(2, 3, *kernel, dtype=F64)
        dictionary = Conv(2, 3, kernel, atoms=atoms)
        signal = torch.randn(1, 3, *[11] * len(kernel), dtype=F64)
        codes = torch.randn(1, *dictionary.code_shape(tuple(signal.shape[1:])), dtype=F64)
        there = (dictionary(codes) * signal).sum()
        back = (codes * dictionary.adjoint(signal)).sum()
        torch.testing.assert_close(there, back)


def check_poisson() -> None:
    eta, count = torch.tensor([-1.0, 0.5, 2.0], dtype=F64), torch.tensor([0.0, 2.0, 9.0], dtype=F64)
    expected = stats.poisson.logpmf(count.numpy(), np.exp(eta.numpy()))
    np.testing.assert_allclose(Poisson()(eta).log_prob(count), expected, atol=1e-10)


def small() -> tuple[Tensor, Dense, Gaussian]:
    generator = torch.Generator().manual_seed(4)
    atoms = torch.randn(3, 4, generator=generator, dtype=F64) / 3
    y = 2 * torch.randn(3, 4, generator=generator, dtype=F64)
    return y, Dense(3, 4, atoms=atoms, unit_norm=False), Gaussian(torch.tensor(NOISE, dtype=F64))


def supports() -> tuple[Any, Any, Any]:
    """Probability of each support, its log evidence, and P(active), by scipy."""
    y, dictionary, _ = small()
    atoms, levels, masks = dictionary.atoms.detach().numpy(), [], []
    for number in range(8):
        active = np.array([number >> k & 1 for k in range(3)], dtype=bool)
        part = atoms[active]
        covariance = NOISE**2 * np.eye(4) + SCALE**2 * part.T @ part
        prior = active.sum() * math.log(PROBS) + (~active).sum() * math.log(1 - PROBS)
        likelihood = stats.multivariate_normal(np.zeros(4), covariance).logpdf(y.numpy())
        levels.append(prior + likelihood)
        masks.append(active)
    level = np.stack(levels, 1)
    total = np.logaddexp.reduce(level, 1)
    weight = np.exp(level - total[:, None])
    return weight, total, weight @ np.stack(masks)


def check_enumeration() -> None:
    y, dictionary, noise = small()
    found = enumerate_posterior(y, dictionary, PRIOR, noise)
    _, total, active = supports()
    np.testing.assert_allclose(found.log_evidence, total, atol=1e-9)
    np.testing.assert_allclose(found.prob_active, active, atol=1e-9)


def check_gibbs() -> None:
    """P(active) and variance of 2000 nearly independent draws against enumeration."""
    y, dictionary, noise = small()
    no_pairs = torch.zeros(0, 2, dtype=torch.long)
    options: dict[str, Any] = {"num_samples": 10, "num_warm_up": 30, "num_chains": 200}
    generator = torch.Generator().manual_seed(0)
    codes = gibbs(
        y, dictionary, PRIOR, noise, pairs=no_pairs, generator=generator, **options
    ).codes.flatten(0, 1)
    exact = enumerate_posterior(y, dictionary, PRIOR, noise)
    np.testing.assert_allclose((codes != 0).double().mean(0), supports()[2], atol=0.06)
    np.testing.assert_allclose(codes.var(0), exact.variance, rtol=0.2)


def check_recovery() -> None:
    truth = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    found = match_atoms(-truth[[2, 0, 3, 1]], truth)
    assert found.match.tolist() == [1, 3, 0, 2] and bool((found.sign == -1).all())
    assert found.correlation.min() > 0.999


BATTERY = [
    check_elbo,
    check_scale,
    check_bounds,
    check_weights,
    check_masked_encoder,
    check_gradients,
    check_score_gradient,
    check_sbc,
    check_draws,
    check_map,
    check_adjoint,
    check_poisson,
    check_enumeration,
    check_gibbs,
    check_recovery,
]


# Bugs ---------------------------------------------------------------------------------------------


class Bug(NamedTuple):
    where: Any
    old: str
    new: str
    found_by: Callable[[], None]


BUGS = {
    1: Bug(
        SparseELBO._kl, "kl_divergence(law, prior)", "0 * kl_divergence(law, prior)", check_elbo
    ),
    2: Bug(kl._kl_mixed_mixed, "active * slab", "slab", check_elbo),
    3: Bug(kl._kl_mixed_mixed, "return kl_gates", "return -kl_gates", check_elbo),
    4: Bug(emission.emit, "y, mask = check_data", "_, mask = check_data", check_masked_encoder),
    5: Bug(CodesProgram.run, "if mask is not None:", "if False:", check_weights),
    6: Bug(CodesProgram.run, "num_data or size, subsample=index", "size", check_scale),
    7: Bug(
        SpikeAndSlabPosterior.forward,
        'parameters["loc"]',
        'parameters["loc"].detach()',
        check_gradients,
    ),
    8: Bug(DenseMap.forward, "codes @ self.atoms", "codes @ self.atoms.detach()", check_gradients),
    9: Bug(prox.dispatch(dist.Laplace), "step / prior.scale", "step * prior.scale", check_map),
    10: Bug(Gaussian.forward, "(predictor, scale)", "(predictor, scale.square())", check_elbo),
    11: Bug(Counts.add, "abs() <= self.tolerance", "abs() < self.tolerance", check_sbc),
    12: Bug(Mean.__call__, "terms.mean(0)", "terms.sum(0)", check_score_gradient),
    13: Bug(Importance.__call__, " - math.log(len(terms))", "", check_bounds),
    14: Bug(
        Mixed.log_prob,
        "logsigmoid(-self.logits),",
        "logsigmoid(-self.logits) + slab,",
        check_weights,
    ),
    15: Bug(
        Mixed.log_prob,
        "logsigmoid(-self.logits), logsigmoid(self.logits)",
        "logsigmoid(self.logits), logsigmoid(-self.logits)",
        check_weights,
    ),
    16: Bug(Mixed.sample_active, "< probs", "> probs", check_draws),
    17: Bug(Problem.proximal_step, "step), step)", "step), 1.0)", check_map),
    18: Bug(
        soft_threshold,
        "codes - torch.clamp(codes, -threshold, threshold)",
        "(codes.abs() - threshold).relu()",
        check_map,
    ),
    19: Bug(ConvMap.adjoint, "self.atoms,", "self.atoms.flip(-1),", check_adjoint),
    20: Bug(
        Poisson.forward, "NaturalPoisson(predictor", "NaturalPoisson(predictor.exp()", check_poisson
    ),
    21: Bug(gibbs_module._sweep, "variance.sqrt()", "variance", check_gibbs),
    22: Bug(gibbs_module._sweep, " + problem.energy[:, k] * codes[..., k]", "", check_gibbs),
    23: Bug(
        exact_module._Sweep.posterior, " + logsigmoid(problem.logits[k])", "", check_enumeration
    ),
    24: Bug(log_weights, "local=local_p - local_q", "local=local_q - local_p", check_weights),
    25: Bug(match_atoms, "flat.abs().max(-1)", "flat.max(-1)", check_recovery),
}


def plant(monkeypatch: pytest.MonkeyPatch, bug: Bug) -> None:
    """Put the edited code in place of a function's own, wherever it is registered or bound."""
    function = inspect.unwrap(bug.where)
    source = textwrap.dedent(inspect.getsource(function))
    source = source[source.index("def ") :]  # decorators stay where they are
    assert bug.old in source, "the library has moved on: say the bug anew"
    edited = source.replace(bug.old, bug.new)
    assert edited != source
    flags = __future__.annotations.compiler_flag
    names: dict[str, Any] = {}
    exec(
        compile(edited, function.__code__.co_filename, "exec", flags, True),
        dict(function.__globals__),
        names,
    )
    (planted,) = names.values()
    monkeypatch.setattr(function, "__code__", planted.__code__)


@pytest.mark.parametrize("check", BATTERY, ids=lambda check: check.__name__)
def test_the_library_passes(check: Callable[[], None]) -> None:
    check()


def test_every_bug_of_the_list_is_planted() -> None:
    text = (Path(__file__).parent / "planted_bugs.md").read_text()
    assert [int(number) for number in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)] == [*BUGS]
    assert {bug.found_by for bug in BUGS.values()} == set(BATTERY)


@pytest.mark.parametrize("number", BUGS)
def test_a_planted_bug_is_found(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    BUGS[number].found_by()
    with monkeypatch.context() as context:
        plant(context, BUGS[number])
        with pytest.raises((AssertionError, ValueError)):
            BUGS[number].found_by()
