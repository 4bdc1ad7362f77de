"""check_likelihood and check_dictionary: they pass what is right and name what is planted."""

import math
from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_sparse import dictionaries as d
from pyro_sparse import likelihoods as l
from pyro_sparse.dictionaries.base import LinearMap
from pyro_sparse.testing import check_dictionary, check_likelihood

FAMILIES = [
    l.Gaussian(0.3),
    l.Poisson(),
    l.Binomial(10),
    l.Bernoulli(),
    l.NegativeBinomial(3.0),
    l.Gamma(2.0),
    l.Exponential(),
    l.Offset(l.Poisson(), 1.0),
]
DICTIONARIES: list[tuple[d.Dictionary, tuple[int, ...] | None]] = [
    (d.Dense(8, 5), None),
    (d.Dense(8, 5, unit_norm=False), None),
    (d.Conv(3, 1, 5), (1, 20)),
    (d.Conv(3, 2, (5, 4), (2, 3), boundary=d.Overhang()), (2, 20, 21)),
]


@pytest.mark.parametrize("likelihood", FAMILIES, ids=lambda one: type(one).__name__)
def test_the_librarys_families_pass(likelihood: l.Likelihood) -> None:
    advice = check_likelihood(likelihood)
    advice.raise_if_failed()


def test_in_double_precision() -> None:
    advice = check_likelihood(l.Poisson(), torch.linspace(-3, 3, 20, dtype=torch.float64))
    advice.raise_if_failed()


def test_state_is_left_alone() -> None:
    dictionary, before = d.Dense(8, 5), torch.get_rng_state()
    check_likelihood(l.Poisson())
    check_dictionary(dictionary)
    assert torch.equal(torch.get_rng_state(), before)


class Planted(l.Gaussian):
    """A Gaussian, to be broken."""


FAULTS: dict[str, tuple[str, Callable[..., object]]] = {
    "shapes": ("forward", lambda self, p: dist.Normal(p, 0.3).to_event(1)),
    "mean": ("mean", lambda self, p: 2 * p),
    "residual": ("residual", lambda self, p, y: p - y),
    "curvature": ("curvature", lambda self, y: torch.tensor(1.0)),
    "loss": ("loss", lambda self, p, y: (y - p).square()),
    "dual": ("dual", lambda self, score, y: torch.full_like(y, 100.0)),
    "own draws": ("check", lambda self, y, mask=None: 1 / 0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_of_a_family_is_named(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, method = FAULTS[fault]
    monkeypatch.setattr(Planted, name, method)
    advice = check_likelihood(Planted(0.3))
    assert fault in advice.failed, str(advice)
    with pytest.raises(AssertionError, match="Planted: .*\n  FAILED  "):
        advice.raise_if_failed()


@pytest.mark.parametrize(("factor", "says"), [(-1.0, "minus that"), (2.0, "stabilised")])
def test_a_residual_of_the_wrong_sign_is_told_from_another(
    factor: float, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Planted, "residual", lambda self, p, y: factor * (y - p) / 0.3**2)
    (found,) = (f for f in check_likelihood(Planted(0.3)).findings if f.check == "residual")
    assert found.ok is False and says in found.advice


def test_an_overflow_is_named() -> None:
    class Naive(l.Poisson):
        def forward(self, predictor: Tensor) -> dist.Poisson:  # type: ignore[override]
            return dist.Poisson(predictor.exp(), validate_args=False)

    assert "finite" in check_likelihood(Naive(), largest=200.0).failed
    assert "finite" not in check_likelihood(l.Poisson(), largest=80.0).failed


def test_a_dual_that_is_not_a_number_at_the_end_of_its_range_is_named() -> None:
    class Logistic(l.Likelihood):
        def forward(self, predictor: Tensor) -> dist.Logistic:
            return dist.Logistic(predictor, torch.ones_like(predictor))

        def mean(self, predictor: Tensor) -> Tensor:
            return predictor

        def residual(self, predictor: Tensor, y: Tensor) -> Tensor:
            return torch.tanh((y - predictor) / 2)

        def loss(self, predictor: Tensor, y: Tensor) -> Tensor:
            far = (y - predictor).abs()
            return far + 2 * (-far).exp().log1p() - 2 * math.log(2)

        def dual(self, score: Tensor, y: Tensor) -> Tensor:
            return score * y - torch.log1p(-(score**2)) - 2 * score * torch.atanh(score)

    advice = check_likelihood(Logistic())
    assert advice.failed == ("finite",), str(advice)
    assert "got a dual that is not" in str(advice)


def test_a_placeholder_out_of_range_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(l.Gamma, "placeholder", 0.0)
    assert "placeholder" in check_likelihood(l.Gamma(2.0)).failed


@pytest.mark.parametrize(
    ("dictionary", "shape"), DICTIONARIES, ids=[type(one).__name__ for one, _ in DICTIONARIES]
)
def test_the_librarys_dictionaries_pass(
    dictionary: d.Dictionary, shape: tuple[int, ...] | None
) -> None:
    advice = check_dictionary(dictionary, shape)
    advice.raise_if_failed()


class Map(LinearMap):
    """The map of a matrix, with a fault."""

    def __init__(self, atoms: Tensor, fault: str) -> None:
        self.atoms, self.fault = atoms, fault

    def forward(self, codes: Tensor) -> Tensor:
        predictor = codes @ self.atoms
        return predictor + 1 if self.fault == "linear" else predictor

    def adjoint(self, signal: Tensor) -> Tensor:
        codes = signal @ self.atoms.T
        return codes.flip(-1) if self.fault == "adjoint" else codes

    def squared_norm(self, signal_shape: tuple[int, ...] | None = None) -> Tensor:
        norm = torch.linalg.matrix_norm(self.atoms.detach(), 2).square()
        return norm / 2 if self.fault == "squared norm" else norm

    def double(self) -> LinearMap:
        atoms = self.atoms.double()
        if self.fault == "other in double":
            return Map(2 * atoms, self.fault)
        return Coarse(atoms, self.fault) if self.fault == "coarse" else Map(atoms, self.fault)


class Coarse(Map):
    """Takes and gives float64, and works in float32."""

    def forward(self, codes: Tensor) -> Tensor:
        return (codes.float() @ self.atoms.float()).to(codes.dtype)


class Silent(Map):
    """Does not say what it is in float64."""

    double = LinearMap.double


class Broken(d.Dense):
    """A dense dictionary with a fault."""

    def __init__(self, fault: str) -> None:
        super().__init__(8, 5, unit_norm=False)
        self.fault = fault

    def bind(self, atoms: Tensor | None = None) -> LinearMap:  # type: ignore[override]
        if atoms is None or self.fault == "bind":
            atoms = self.atoms.detach() if self.fault == "gradient" else self.atoms
        return (Silent if self.fault == "silent" else Map)(atoms, self.fault)

    def code_shape(self, signal_shape: tuple[int, ...]) -> torch.Size:
        extra = 1 if self.fault == "shapes" else 0
        return torch.Size((*signal_shape[:-1], self.num_atoms + extra))


@pytest.mark.parametrize(
    "fault", ["linear", "adjoint", "squared norm", "gradient", "bind", "shapes"]
)
def test_a_planted_fault_of_a_dictionary_is_named(fault: str) -> None:
    advice = check_dictionary(Broken(fault))
    assert fault in advice.failed, str(advice)


@pytest.mark.parametrize(
    ("fault", "says"), [("other in double", "relative difference"), ("coarse", "coarser precision")]
)
def test_a_map_that_is_another_in_double_is_named(fault: str, says: str) -> None:
    advice = check_dictionary(Broken(fault))
    assert advice.failed == ("double",), str(advice)
    assert says in str(advice)


def test_a_map_without_a_double_is_not_asked_and_says_who_needs_it() -> None:
    advice = check_dictionary(Broken("silent"))
    (found,) = (finding for finding in advice.findings if finding.check == "double")
    assert advice.ok and found.ok is None
    assert "solvers.solve needs it to certify codes" in found.advice


def test_an_operator_in_single_precision_passes_by_what_it_says_of_its_rounding() -> None:
    class Halve:
        def forward(self, signal: Tensor) -> Tensor:
            return signal / 3

        adjoint = forward

    check_dictionary(d.Composition(Halve(), d.Dense(8, 5), input_shape=(5,))).raise_if_failed()


def test_without_a_fault_nothing_is_named() -> None:
    advice = check_dictionary(Broken("none"))
    advice.raise_if_failed()


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: check_likelihood("Poisson"), TypeError, "Expected a Likelihood, got str"),
        (lambda: check_likelihood(l.Poisson(), 1.0), TypeError, "floating tensor"),
        (lambda: check_dictionary(l.Poisson()), TypeError, "Expected a Dictionary, got Poisson"),
        (lambda: check_dictionary(d.Conv(3, 1, 5)), ValueError, "Expected signal_shape"),
    ],
)
def test_bad_arguments(call: Callable[[], object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()
