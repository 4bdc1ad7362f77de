"""Finished models as files: what comes back, and what a stranger can do."""

import hashlib
import json
import math
import os
import pickle
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import safetensors.torch
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_sparse.dictionaries import Composition, Conv, Dense, Interior, Overhang, Periodic
from pyro_sparse.distributions import GroupLaplace, KnownSupport, SignedLaplace
from pyro_sparse.guides import UnrolledEncoder, UnrolledFISTA
from pyro_sparse.infer import bundle, storage
from pyro_sparse.infer.bundle import load, register_savable, save
from pyro_sparse.likelihoods import (
    Bernoulli,
    Binomial,
    Exponential,
    Gamma,
    Gaussian,
    Likelihood,
    NegativeBinomial,
    Offset,
    Poisson,
    Stabilised,
)
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import (
    FISTA,
    ISTA,
    Backtracking,
    Bias,
    Fixed,
    HardThreshold,
    NonMaximumSuppression,
    PowerIteration,
    Proximal,
    Shrinkage,
    TopK,
    Unrolled,
)


class LearnedRate(nn.Module):
    """A user's module."""

    def __init__(self, rate: Tensor) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(rate.log())

    @property
    def rate(self) -> Tensor:
        return self.log_rate.exp()

    def forward(self) -> Tensor:
        return self.rate


class Mask:
    """A user's operator."""

    def __init__(self, kept: Tensor) -> None:
        self.kept = kept

    def forward(self, signal: Tensor) -> Tensor:
        return self.kept * signal

    adjoint = forward


def laplace_of(rate: Tensor) -> dist.Laplace:
    """A user's prior."""
    return dist.Laplace(torch.zeros_like(rate), 1 / rate)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The registry as it was, with what these tests need."""
    before = dict(bundle._BY_NAME), dict(bundle._BY_TARGET)
    for target in (LearnedRate, Mask, laplace_of):
        register_savable(target)
    yield
    for table, old in zip((bundle._BY_NAME, bundle._BY_TARGET), before):
        table.clear()
        table.update(old)


def shake(*modules: nn.Module) -> None:
    """Move every parameter off its initial value."""
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))


def round_trip(tmp_path: Path, **objects: Any) -> dict[str, Any]:
    save(tmp_path / "run", **objects)
    return load(tmp_path / "run")


def same_state(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    assert list(one) == list(two)
    return all(torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one)


PRIORS: dict[str, Callable[[], Any]] = {
    "Laplace": lambda: dist.Laplace(0.0, 0.7),
    "per atom": lambda: dist.Laplace(torch.zeros(6), torch.linspace(0.5, 2, 6)),
    "Exponential": lambda: dist.Exponential(1.3),
    "Normal": lambda: dist.Normal(0.0, 0.7),
    "Independent": lambda: dist.Laplace(torch.zeros(6), torch.ones(6)).to_event(1),
    "expanded": lambda: dist.Laplace(0.0, 0.7).expand([6]).to_event(1),
    "SignedLaplace": lambda: SignedLaplace(1.3, torch.tensor([1, -1, 0, 0, 1, -1])),
    "KnownSupport": lambda: KnownSupport(dist.Laplace(0.0, 0.7), torch.arange(6) % 3 > 0),
}

# What comes back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make_prior", PRIORS.values(), ids=PRIORS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_dense_model_and_its_guide_come_back_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, tied: bool, make_prior: Callable[[], Any]
) -> None:
    dictionary = Dense(6, 4, atoms=torch.randn(6, 4, dtype=dtype))
    likelihood = Gaussian(torch.tensor(0.3, dtype=dtype), trainable=True)
    prior = make_prior()
    make = UnrolledFISTA if tied else UnrolledFISTA.untied
    model = SparseCoding(dictionary, likelihood, prior)
    guide = make(dictionary, likelihood, prior, num_steps=4)
    shake(guide)
    loaded = round_trip(tmp_path, model=model, guide=guide)
    again, other = loaded["model"], loaded["guide"]
    assert type(again) is SparseCoding and type(other) is UnrolledFISTA
    y = torch.randn(5, 4, dtype=dtype)
    assert torch.equal(other.encode(y), guide.encode(y))
    assert torch.equal(again.dictionary.atoms, dictionary.atoms)
    assert torch.equal(again.likelihood.scale, likelihood.scale)
    assert same_state(again, model) and same_state(other, guide)
    assert type(again.prior) is type(prior) and again.prior.batch_shape == prior.batch_shape
    # Shared as before, and no more than before.
    assert other.encoder.dictionary is again.dictionary
    assert other.encoder.likelihood is again.likelihood
    assert other.encoder_prior is again.prior
    assert (other.encoder.analysis is None) == tied
    assert (other.encoder.analysis is again.dictionary) is False
    assert all(parameter.requires_grad for parameter in other.parameters())


@pytest.mark.parametrize("boundary", [Interior(), Overhang(), Periodic()], ids=repr)
@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize(("kernel", "stride"), [((5,), (2,)), ((3, 3), (1, 1))], ids=str)
def test_convolutional_dictionaries_come_back(
    tmp_path: Path, boundary: Any, unit_norm: bool, kernel: Any, stride: Any
) -> None:
    dictionary = Conv(4, 2, kernel, stride, boundary=boundary, unit_norm=unit_norm)
    shake(dictionary)
    back = round_trip(tmp_path, dictionary=dictionary)["dictionary"]
    assert repr(back) == repr(dictionary) and back.boundary == boundary
    assert same_state(back, dictionary)
    codes = torch.randn(2, 4, *[7] * len(kernel))
    assert torch.equal(back(codes), dictionary(codes))


@pytest.mark.parametrize("method", [ISTA(), FISTA(), FISTA(restart=True)])
@pytest.mark.parametrize("learn", [True, False])
def test_settings_of_a_guide_come_back(tmp_path: Path, method: Any, learn: bool) -> None:
    dictionary = Dense(6, 4, unit_norm=False)
    guide = UnrolledFISTA(
        dictionary,
        Gaussian(torch.tensor([0.1, 0.2, 0.3, 0.4])),
        dist.Laplace(0.0, 1.0),
        num_steps=7,
        method=method,
        shrinkage=Proximal(6 if learn else None, decay=0.9),
        lipschitz=3.5,
    )
    shake(guide)
    back = round_trip(tmp_path, guide=guide)["guide"]
    y = torch.randn(5, 4)
    assert torch.equal(back.encode(y), guide.encode(y))
    assert type(back.encoder.method) is type(method)
    assert vars(back.encoder.method) == vars(method)
    assert (back.encoder.num_steps, back.encoder.lipschitz) == (7, 3.5)


@pytest.mark.parametrize(
    "shrinkage",
    [
        HardThreshold(torch.linspace(0.1, 0.6, 6), decay=0.9),
        Bias(0.2, two_sided=True),
        TopK(Bias(torch.linspace(-0.1, 0.4, 6)), 3, every=2),
    ],
)
def test_a_shrinkage_comes_back(tmp_path: Path, shrinkage: Shrinkage) -> None:
    guide = UnrolledFISTA(
        Dense(6, 4), Gaussian(0.5), dist.Laplace(0.0, 1.0), shrinkage=shrinkage, step_size=0.1
    )
    back = round_trip(tmp_path, guide=guide)["guide"]
    y = torch.randn(5, 4)
    assert torch.equal(back.encode(y), guide.encode(y))
    assert type(back.encoder.shrinkage) is type(shrinkage)
    assert same_state(back, guide)


@pytest.mark.parametrize("gap", [2, (2,)])
def test_a_shrinkage_with_a_gap_comes_back(tmp_path: Path, gap: int | tuple[int, ...]) -> None:
    shrinkage = NonMaximumSuppression(Proximal(2), gap)
    guide = UnrolledFISTA(Conv(2, 1, 4), Gaussian(0.5), dist.Laplace(0.0, 1.0), shrinkage=shrinkage)
    back = round_trip(tmp_path, guide=guide)["guide"]
    y = torch.randn(5, 1, 30)
    assert torch.equal(back.encode(y), guide.encode(y))
    assert back.encoder.shrinkage.gap == gap and same_state(back, guide)


def test_a_rate_that_is_learned_comes_back_shared(tmp_path: Path) -> None:
    rate = LearnedRate(torch.linspace(1, 2, 6))
    dictionary, likelihood = Dense(6, 4), Gaussian(0.1)
    model = SparseCoding(dictionary, likelihood, laplace_of, rate=rate)
    guide = UnrolledFISTA(dictionary, likelihood, laplace_of, rate=rate)
    shake(model)
    loaded = round_trip(tmp_path, model=model, guide=guide)
    assert loaded["model"].rate is loaded["guide"].encoder_rate
    assert loaded["model"].prior is laplace_of
    assert torch.equal(loaded["model"].rate(), rate())
    y = torch.randn(5, 4)
    assert torch.equal(loaded["guide"].encode(y), guide.encode(y))


def test_a_rate_that_is_a_tensor_comes_back_shared(tmp_path: Path) -> None:
    rate = torch.ones(6)
    model = SparseCoding(Dense(6, 4), Gaussian(0.1), laplace_of, rate=rate)
    guide = UnrolledFISTA(model.dictionary, model.likelihood, laplace_of, rate=rate)
    loaded = round_trip(tmp_path, model=model, guide=guide)
    assert torch.equal(loaded["model"].rate, rate)
    assert loaded["model"].rate is loaded["guide"].encoder_rate


def test_parameters_come_back_as_parameters_tied_as_they_were(tmp_path: Path) -> None:
    @register_savable
    class Scaled(nn.Module):
        def __init__(self, scale: nn.Parameter) -> None:
            super().__init__()
            self.scale = scale

    scale = nn.Parameter(torch.randn(3))
    loaded = round_trip(
        tmp_path, a=Scaled(scale), b=Scaled(scale), c=Scaled(nn.Parameter(scale.clone()))
    )
    assert isinstance(loaded["a"].scale, nn.Parameter) and torch.equal(loaded["a"].scale, scale)
    assert loaded["a"].scale is loaded["b"].scale is not loaded["c"].scale


def test_a_model_with_laws_of_rate_and_dictionary_comes_back(tmp_path: Path) -> None:
    model = SparseCoding(
        Conv(3, 1, 5),
        Gaussian(0.1),
        laplace_of,
        rate=dist.Gamma(2.0, 3.0),
        dictionary_prior=dist.Normal(0.0, 1.0),
        signal_shape=(1, 20),
    )
    back = round_trip(tmp_path, model=model)["model"]
    assert back.signal_shape == (1, 20)
    torch.manual_seed(0)
    first = model(num_data=2)
    torch.manual_seed(0)
    assert torch.equal(back(num_data=2), first)


@pytest.mark.parametrize(
    "law",
    [
        dist.Gamma(torch.tensor([1.0, 2.0]), 3.0),
        dist.HalfNormal(torch.tensor([1.0, 2.0])),
        dist.LogNormal(torch.tensor([[1.0], [2.0]]), 0.3),
        dist.Normal(0.0, torch.tensor(2.0, dtype=torch.float64)),
        dist.Exponential(torch.ones(3)).to_event(1),
    ],
    ids=lambda law: type(law).__name__,
)
def test_laws_come_back(tmp_path: Path, law: Any) -> None:
    back = round_trip(tmp_path, law=law)["law"]
    assert (type(back), back.batch_shape, back.event_shape) == (
        type(law),
        law.batch_shape,
        law.event_shape,
    )
    value = law.sample()
    assert torch.equal(back.log_prob(value), law.log_prob(value))


def test_a_composition_with_a_registered_operator_comes_back(tmp_path: Path) -> None:
    seen = Composition(Mask(torch.tensor([1.0, 0.0, 1.0])), Dense(5, 3), input_shape=(3,))
    shake(seen)
    back = round_trip(tmp_path, seen=seen)["seen"]
    codes = torch.randn(2, 5)
    assert torch.equal(back(codes), seen(codes))
    assert torch.equal(back.squared_norm(), seen.squared_norm())


def test_modules_inside_lists_come_back_with_their_weights(tmp_path: Path) -> None:
    guides = [UnrolledFISTA(Dense(3, 2), Gaussian(0.1), dist.Laplace(0.0, 1.0)) for _ in range(2)]
    shake(*guides)
    things = {"n": 3, "mean": torch.ones(2), "shape": (1, 2), "bad": math.inf, "none": None}
    loaded = round_trip(tmp_path, guides=guides, things=things)
    y = torch.randn(4, 2)
    assert all(torch.equal(a.encode(y), b.encode(y)) for a, b in zip(loaded["guides"], guides))
    assert torch.equal(loaded["things"].pop("mean"), things.pop("mean"))
    assert loaded["things"] == things


def test_frozen_parameters_come_back_frozen(tmp_path: Path) -> None:
    guide = UnrolledFISTA.untied(**parts())
    guide.encoder.dictionary.requires_grad_(False)
    back = round_trip(tmp_path, guide=guide)["guide"]
    flags = [
        {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        for module in (guide, back)
    ]
    assert flags[0] == flags[1] and set(flags[0].values()) == {True, False}


def test_weights_are_stored_once(tmp_path: Path) -> None:
    dictionary = Dense(100, 100)
    prior = dist.Laplace(0.0, 1.0)
    model = SparseCoding(dictionary, Gaussian(0.1), prior)
    guide = UnrolledFISTA(dictionary, model.likelihood, prior)
    save(tmp_path / "run", model=model, guide=guide, dictionary=dictionary)
    assert (tmp_path / "run" / "weights.safetensors").stat().st_size < 40_000 + 2000


def test_saving_and_loading_leave_random_state_and_objects_alone(tmp_path: Path) -> None:
    dictionary = Dense(6, 4)
    before = dictionary.atoms.clone(), torch.get_rng_state()
    loaded = round_trip(tmp_path, dictionary=dictionary)["dictionary"]
    assert torch.equal(torch.get_rng_state(), before[1])
    shake(loaded)
    assert torch.equal(dictionary.atoms, before[0])


def test_versions_are_recorded(tmp_path: Path) -> None:
    save(tmp_path / "run", x=1)
    versions = json.loads((tmp_path / "run" / "record.json").read_text())["versions"]
    assert set(versions) == {"python", "torch", "pyro", "pyro_sparse"}
    assert versions["torch"] == torch.__version__


# Registering --------------------------------------------------------------------------------------


def test_a_class_registers_as_a_decorator_with_and_without_options(tmp_path: Path) -> None:
    @register_savable
    class Plain:
        def __init__(self, size: int, *, name: str = "a") -> None:
            self.size, self.name = size, name

    @register_savable(name="Other", arguments=lambda other: {"half": other.size // 2})
    class Doubled:
        def __init__(self, half: int) -> None:
            self.size = 2 * half

    loaded = round_trip(tmp_path, plain=Plain(3, name="b"), doubled=Doubled(4))
    assert (loaded["plain"].size, loaded["plain"].name) == (3, "b")
    assert loaded["doubled"].size == 8


def test_a_name_is_given_once_but_a_class_may_be_defined_anew() -> None:
    def define() -> type:
        class Again:
            pass

        return register_savable(Again)

    assert define() is not define()
    with pytest.raises(ValueError, match=r"name that is free, got 'Mask'.*Pass name="):
        register_savable(Stranger, name="Mask")
    with pytest.raises(TypeError, match="a class or a function with a name"):
        register_savable(lambda rate: rate)
    with pytest.raises(TypeError, match="a class or a function with a name"):
        register_savable(3)  # type: ignore[call-overload]


class Stranger(nn.Module):
    def forward(self) -> Tensor:
        return torch.ones(())


class Sub(Dense):
    pass


def parts(**changes: Any) -> dict[str, Any]:
    return {
        "dictionary": Dense(6, 4),
        "likelihood": Gaussian(0.1),
        "prior": dist.Laplace(0.0, 1.0),
        **changes,
    }


def test_what_is_not_registered_is_named_with_the_remedy(tmp_path: Path) -> None:
    masked = dist.Laplace(0.0, 1.0).mask(False)
    simple = SparseCoding(**parts())
    cases: list[tuple[str, dict[str, Any]]] = [
        (
            r"model\.prior: .*a lambda.*register_savable",
            {"model": SparseCoding(**parts(prior=lambda rate: dist.Laplace(0.0, rate)), rate=1.0)},
        ),
        (
            r"guide\.rest: .*class AutoNormal.*register_savable\(AutoNormal\)",
            {"guide": UnrolledFISTA(**parts(), rest=AutoNormal(simple))},
        ),
        (r"model\.rate: .*class Stranger", {
            "model": SparseCoding(**parts(prior=laplace_of), rate=Stranger())
        }),
        (r"model\.dictionary: .*class Sub", {"model": SparseCoding(**parts(dictionary=Sub(6, 4)))}),
        (r"a\[1\]\['b'\]: .*class Stranger", {"a": [0, {"b": Stranger()}]}),
        (r"law: .*class MaskedDistribution", {"law": masked}),
        (r"f: .*a function.*register_savable\(parts\)", {"f": parts}),
        (r"f: .*class builtin_function_or_method", {"f": os.mkdir}),
        (r"cls: .*class type", {"cls": Dense}),
        (r"s: .*class set", {"s": {1}}),
        (r"d: expected keys that are str", {"d": {1: 2}}),
        (r"d: expected keys that are str, without an @", {"d": {"@object": 0}}),
    ]  # fmt: skip
    for match, objects in cases:
        with pytest.raises(TypeError, match=f"Cannot save {match}"):
            save(tmp_path / "run", **objects)
    assert list(tmp_path.iterdir()) == []


def test_what_would_not_load_is_not_saved(tmp_path: Path) -> None:
    class Grown(nn.Module):
        def __init__(self) -> None:
            super().__init__()

    register_savable(Grown)
    grown = Grown()
    grown.extra = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="This would not load: expected no weights"):
        save(tmp_path / "run", grown=grown)
    encoder = UnrolledEncoder(Unrolled(Dense(6, 4), Gaussian(0.1)), dist.Laplace(0.0, 1.0))
    encoder.gain = nn.Parameter(torch.ones(6, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"gain of a UnrolledEncoder.*float32.*float64"):
        save(tmp_path / "run", encoder=encoder)
    register_savable(Grown, arguments=lambda _: {"size": 2})
    with pytest.raises(ValueError, match=r"Grown refuses its arguments.*unexpected keyword"):
        save(tmp_path / "run", grown=Grown())
    register_savable(Grown, arguments=lambda value: {"value": value})
    with pytest.raises(TypeError, match=r"grown\.value: it holds itself"):
        save(tmp_path / "run", grown=Grown())
    dictionary = Dense(6, 4, unit_norm=False)
    with torch.no_grad():
        dictionary.atoms[0, 0] = math.nan
    with pytest.raises(ValueError, match="finite"):
        save(tmp_path / "run", dictionary=dictionary)
    with pytest.raises(ValueError, match="Expected objects to save"):
        save(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_attributes_that_a_constructor_does_not_leave_are_named(tmp_path: Path) -> None:
    @register_savable
    class Forgetful:
        def __init__(self, size: int) -> None:
            self.length = size

    with pytest.raises(TypeError, match=r"Forgetful.*none named \['size'\].*arguments="):
        save(tmp_path / "run", x=Forgetful(3))


class OwnLaw(dist.TorchDistribution):
    arg_constraints = {"rate": dist.constraints.positive}
    support = dist.constraints.real

    def __init__(self, rate: Tensor, *, validate_args: bool | None = None) -> None:
        self.rate = rate
        super().__init__(rate.shape, validate_args=validate_args)


def test_a_law_of_ones_own_needs_no_attribute_for_the_switch_of_validation(tmp_path: Path) -> None:
    register_savable(OwnLaw)
    save(tmp_path / "law", law=OwnLaw(torch.tensor([1.0, 2.0]), validate_args=True))
    loaded = load(tmp_path / "law")["law"]
    assert type(loaded) is OwnLaw
    assert torch.equal(loaded.rate, torch.tensor([1.0, 2.0]))


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    save(tmp_path / "run", x=1)
    with pytest.raises(FileExistsError, match="Choose another name"):
        save(tmp_path / "run", x=2)
    assert load(tmp_path / "run") == {"x": 1}


# Strangers ----------------------------------------------------------------------------------------


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    model = SparseCoding(**parts())
    guide = UnrolledFISTA(model.dictionary, model.likelihood, model.prior, num_steps=2)
    save(tmp_path / "run", model=model, guide=guide)
    return tmp_path / "run"


def reseal(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = [len(data), hashlib.sha256(data).hexdigest()]
    manifest["digest"] = storage._digest(manifest["files"], manifest["aliases"])
    (folder / "manifest.json").write_text(json.dumps(manifest))


def refused(folder: Path, match: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=match) as caught:
        load(folder)
    assert type(caught.value) is ValueError and str(folder) in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # in kB


def index(record: Any, name: str) -> int:
    return [entry["class"].rpartition(".")[2] for entry in record["objects"]].index(name)


def arguments(record: Any, name: str) -> Any:
    return record["objects"][index(record, name)]["arguments"]


def set_class(name: Any) -> Callable[[Any], None]:
    return lambda r: r["objects"][0].update({"class": name})


def set_argument(of: str, key: str, value: Any) -> Callable[[Any], None]:
    return lambda r: arguments(r, of).update({key: value})


HOSTILE: dict[str, tuple[Callable[[Any], object], str]] = {
    "an unknown class": (set_class("Evil"), "registered class, got 'Evil'.*register_savable"),
    "a function of the system": (set_class("os.system"), "got 'os.system'"),
    "a builtin": (set_class("builtins.eval"), "got 'builtins.eval'"),
    "a torch class": (set_class("torch.nn.Bilinear"), "got 'torch.nn.Bilinear'"),
    "a dunder": (set_class("__import__"), "got '__import__'"),
    "a class that is a list": (set_class(["Dense"]), "registered class"),
    "a class that is null": (set_class(None), "registered class"),
    "a class of a megabyte": (set_class("x" * 10**5), "registered class"),
    "another kind": (lambda r: r.update(kind="x"), "expected a record of"),
    "more than a record": (lambda r: r.update(code="x"), "expected a record of"),
    "objects in a table": (lambda r: r.update(objects={}), "expected a list of"),
    "roots in a list": (lambda r: r.update(roots=[]), "expected a list of"),
    "1001 objects": (lambda r: r.update(objects=r["objects"] * 300), "at most 1000 objects"),
    "an object that is text": (lambda r: r["objects"].insert(0, "x"), "object with a class"),
    "frozen in a table": (lambda r: r["objects"][0].update(frozen={}), "names that are frozen"),
    "frozen names that are not there": (
        lambda r: r["objects"][0].update(frozen=[["x"]]), "names that are frozen"
    ),
    "arguments in a list": (lambda r: r["objects"][0].update(arguments=[]), "table of arguments"),
    "an argument too many": (set_argument("Dense", "x", 1), "Dense refuses its arguments.*'x'"),
    "self as an argument": (set_argument("FISTA", "self", 1), "FISTA refuses its arguments"),
    "an argument missing": (lambda r: arguments(r, "Dense").pop("atoms"), "Dense refuses"),
    "atoms that are a number": (set_argument("Dense", "atoms", 3), "Dense refuses"),
    "a size instead of atoms": (set_argument("Dense", "num_atoms", 10**12), "Dense refuses"),
    "a dictionary that is a number": (
        set_argument("UnrolledFISTA", "dictionary", 3), "UnrolledFISTA refuses"
    ),
    "a prior that is text": (
        set_argument("SparseCoding", "prior", "x"), "SparseCoding refuses its arguments.*TypeError"
    ),
    "no steps": (set_argument("UnrolledFISTA", "num_steps", -1), "num_steps >= 1, got -1"),
    "steps that are text": (set_argument("UnrolledFISTA", "num_steps", "9"), "Unrolled.*refuses"),
    "an object to come": (
        set_argument("UnrolledFISTA", "method", {"@object": 99}), "expected an earlier object"
    ),
    "an object before the first": (
        set_argument("UnrolledFISTA", "method", {"@object": -1}), "expected an earlier object"
    ),
    "an object that is true": (
        set_argument("UnrolledFISTA", "method", {"@object": True}), "expected an earlier object"
    ),
    "an object by name": (
        set_argument("UnrolledFISTA", "method", {"@object": "os"}), "expected an earlier object"
    ),
    "a reference of two": (
        set_argument("UnrolledFISTA", "method", {"@object": 0, "a": 1}), "earlier object"
    ),
    "an unknown reference": (
        set_argument("UnrolledFISTA", "method", {"@code": "x"}), "earlier object or a tensor"
    ),
    "an object that holds itself": (
        lambda r: arguments(r, "Dense").update(atoms={"@object": index(r, "Dense")}),
        "expected an earlier object",
    ),
    "a tensor that is not there": (
        set_argument("Dense", "atoms", {"@tensor": "x"}), "expected weights 'x', got none"
    ),
    "a tensor by a list": (set_argument("Dense", "atoms", {"@tensor": []}), "earlier object or a"),
    "weights nobody asks for": (lambda r: r.update(roots={}, objects=[]), "expected no weights"),
    "another shape than the state": (
        lambda r: arguments(r, "Dense").update(atoms=arguments(r, "Laplace")["loc"]),
        "Dense refuses",
    ),
    "a state without its module": (
        set_argument("Proximal", "log_factor", None), "expected no weights"
    ),
    "a module without its state": (
        set_argument("Dense", "unit_norm", False), "expected weights 'state:"
    ),
    "a tag of storage": (set_argument("Dense", "atoms", {"$x": 1}), "expected .float or .tuple"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "match"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_configuration_is_refused(
    victim: Path, change: Callable[[Any], object], match: str
) -> None:
    record = json.loads((victim / "record.json").read_text())
    change(record)
    (victim / "record.json").write_text(json.dumps(record))
    reseal(victim)
    refused(victim, match)


def with_weights(victim: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = victim / "weights.safetensors"
    weights = safetensors.torch.load(file.read_bytes())
    change(weights)
    safetensors.torch.save_file(weights, file)
    reseal(victim)


@pytest.mark.parametrize(
    ("new", "match"),
    [
        (lambda w: w.double(), r"dtype torch.float32, got torch.float64"),
        (lambda w: w[:5].clone(), r"each atom, shape \(6,\), got \(5,\)"),
        (lambda w: w.reshape(6, 1), r"got \(6, 1\)"),
        (lambda w: w.long(), r"torch.int64"),
        (lambda w: w.to(torch.complex64), r"torch.complex64"),
        (lambda w: torch.full_like(w, math.nan), r"weights\.safetensors.*finite values, got nan"),
        (lambda w: torch.full_like(w, math.inf), r"weights\.safetensors.*finite values, got inf"),
    ],
    ids=["float64", "shorter", "rank", "whole", "complex", "nan", "inf"],
)
def test_weights_that_do_not_fit_are_refused(
    victim: Path, new: Callable[[Tensor], Tensor], match: str
) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        [name] = [name for name, values in weights.items() if values.shape == (6,)]
        weights[name] = new(weights[name])

    with_weights(victim, change)
    refused(victim, match)


def test_a_law_out_of_its_domain_is_refused_also_without_validation(tmp_path: Path) -> None:
    save(tmp_path / "run", law=dist.Laplace(0.0, 1.0))
    with_weights(tmp_path / "run", lambda weights: [weight.sub_(2) for weight in weights.values()])
    dist.enable_validation(False)
    try:
        refused(tmp_path / "run", "Laplace refuses its arguments.*scale")
    finally:
        dist.enable_validation(True)


def test_a_zero_atom_is_refused(victim: Path) -> None:
    with_weights(victim, lambda weights: [w.zero_() for w in weights.values() if w.dim() == 2])
    refused(victim, "Dense refuses its arguments.*non-zero length")


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.canary),))


@pytest.mark.parametrize("name", ["manifest.json", "record.json", "weights.safetensors"])
@pytest.mark.parametrize("dump", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_a_pickle_under_an_expected_name_does_not_run(
    victim: Path, tmp_path: Path, name: str, dump: Callable[..., None]
) -> None:
    canary = tmp_path / "canary"
    with open(victim / name, "wb") as file:
        dump(Bomb(canary), file)
    if name != "manifest.json":
        reseal(victim)
    refused(victim, name.replace(".", r"\."))
    assert not canary.exists()


def test_loading_imports_nothing(victim: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "evil.py").write_text("open('canary', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    record = json.loads((victim / "record.json").read_text())
    set_class("evil.Evil")(record)
    (victim / "record.json").write_text(json.dumps(record))
    reseal(victim)
    refused(victim, r"got 'evil\.Evil'")
    assert not (tmp_path / "canary").exists()


def test_a_thousand_copies_of_one_tensor_do_not_fill_the_memory(tmp_path: Path) -> None:
    dictionary = Dense(1000, 1000, unit_norm=False)  # 4 MB; a thousand of them are 4 GB
    save(tmp_path / "run", dictionary=dictionary)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    record["objects"] *= 1000
    (tmp_path / "run" / "record.json").write_text(json.dumps(record))
    reseal(tmp_path / "run")
    refused(tmp_path / "run", "Dense refuses its arguments.*bytes in all")


@pytest.mark.parametrize("shape", [(10**12,), (2**40, 1), (-5,), ("a",), 3, (1.5,), ()], ids=str)
def test_a_composition_on_signals_of_another_size_is_refused(tmp_path: Path, shape: Any) -> None:
    seen = Composition(Mask(torch.ones(1, 8)), Conv(2, 1, 3), input_shape=(1, 8))
    save(tmp_path / "run", seen=seen)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    value = {"$tuple": list(shape)} if isinstance(shape, tuple) else shape
    arguments(record, "Composition")["input_shape"] = value
    (tmp_path / "run" / "record.json").write_text(json.dumps(record))
    reseal(tmp_path / "run")
    refused(tmp_path / "run", "Composition refuses its arguments")


@pytest.mark.parametrize("dims", [-1, 2, 10**50, True, 0.5, "1", None])
def test_a_wrapper_of_other_dims_is_refused(tmp_path: Path, dims: Any) -> None:
    save(tmp_path / "run", law=dist.Laplace(torch.zeros(3), 1.0).to_event(1))
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    arguments(record, "Independent")["dims"] = dims
    (tmp_path / "run" / "record.json").write_text(json.dumps(record))
    reseal(tmp_path / "run")
    refused(tmp_path / "run", "Independent refuses its arguments")


def test_laws_of_shapes_that_would_broadcast_to_a_terabyte_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "run", law=dist.Laplace(torch.zeros(2), torch.ones(2)))

    def change(weights: dict[str, Tensor]) -> None:
        names = sorted(weights)
        weights[names[0]], weights[names[1]] = torch.zeros(2**20, 1), torch.ones(1, 2**20)

    with_weights(tmp_path / "run", change)
    refused(tmp_path / "run", "Laplace refuses its arguments.*tensors of one shape")


@pytest.mark.parametrize("shape", [[2**30, 2**10], [-1], [0], "4", 3, [10**50]])
def test_groups_of_a_size_that_nothing_holds_are_refused(tmp_path: Path, shape: Any) -> None:
    save(tmp_path / "run", law=GroupLaplace(torch.ones(1), (2,)))
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    arguments(record, "GroupLaplace").update(event_shape=shape, group=shape)
    (tmp_path / "run" / "record.json").write_text(json.dumps(record))
    reseal(tmp_path / "run")
    refused(tmp_path / "run", "GroupLaplace refuses its arguments")


def test_other_groups_and_larger_files_are_refused(victim: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at most 10 bytes of tensors \(max_bytes\)"):
        load(victim, max_bytes=10)
    storage.write_folder(tmp_path / "other", {"weights": {}, "code": {}}, {})
    refused(tmp_path / "other", "expected a bundle with weights.safetensors, got other files")
    with pytest.raises(FileNotFoundError, match="Expected a folder"):
        load(tmp_path / "none")


def test_weights_that_are_not_finite_pass_on_request(victim: Path) -> None:
    with_weights(victim, lambda weights: [w.fill_(math.nan) for w in weights.values() if len(
        w.shape) == 1])  # fmt: skip
    refused(victim, "finite")
    guide = load(victim, finite=False)["guide"]
    assert bool(guide.encoder.shrinkage.log_factor.isnan().all())


@pytest.mark.parametrize(
    "likelihood",
    [
        Poisson(),
        Bernoulli(),
        Exponential(),
        Binomial(torch.tensor([1.0, 2.0, 3.0, 4.0])),
        NegativeBinomial(1.5),
        NegativeBinomial(torch.rand(4) + 0.5, trainable=True),
        Gamma(torch.rand(4) + 0.5),
        Gamma(2.0, trainable=True),
        Offset(Poisson(), torch.rand(4), trainable=True),
        Stabilised(Offset(Poisson(), 0.5), 2.0),
    ],
    ids=repr,
)
def test_a_likelihood_comes_back(tmp_path: Path, likelihood: Likelihood) -> None:
    shake(likelihood)
    back = round_trip(tmp_path, likelihood=likelihood)["likelihood"]
    assert repr(back) == repr(likelihood) and same_state(back, likelihood)
    predictor, y = torch.randn(3, 4), torch.ones(3, 4)
    assert torch.equal(back.residual(predictor, y), likelihood.residual(predictor, y))
    trained = [name for name, _ in likelihood.named_parameters()]
    assert [name for name, _ in back.named_parameters()] == trained


def test_a_search_for_steps_comes_back(tmp_path: Path) -> None:
    for step in (Backtracking(), Backtracking(0.5, shrink=0.7), Fixed(0.1), PowerIteration(5)):
        assert repr(round_trip(tmp_path / repr(step)[:20], step=step)["step"]) == repr(step)
