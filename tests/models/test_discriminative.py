"""Codes with a class: labels observed, missing and enumerated; the two phases; files."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceEnum_ELBO
from torch import Tensor, nn

from pyro_sparse.dictionaries import Conv, Dense
from pyro_sparse.distributions import SpikeAndSlab
from pyro_sparse.guides import SpikeAndSlabPosterior, Thresholded, UnrolledEncoder, UnrolledFISTA
from pyro_sparse.infer import Phase, Project, SparseELBO, Update, Without, fit, load, save
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import DiscriminativeSparseCoding, SparseCoding
from pyro_sparse.solvers import Unrolled

CLASSES = 3


def make(**options: bool) -> tuple[DiscriminativeSparseCoding, UnrolledFISTA, Tensor, Tensor]:
    torch.manual_seed(2)
    dictionary, likelihood = Dense(6, 4, unit_norm=False), Gaussian(0.5)
    prior = dist.Exponential(0.3)
    model = DiscriminativeSparseCoding(
        dictionary, likelihood, prior, num_classes=CLASSES, **options
    )
    guide = UnrolledFISTA.recurrent(dictionary, likelihood, prior, num_steps=4)
    return model, guide, torch.randn(5, 4), torch.tensor([0, 2, 1, -1, 2])


def joint(model: nn.Module, codes: Tensor, *args: object, **kwargs: object) -> Tensor:
    """Log-density of the program at given codes."""
    trace = poutine.trace(poutine.condition(model, {"codes": codes})).get_trace(*args, **kwargs)
    return trace.log_prob_sum()


def test_sites_stand_in_the_plate_and_are_scaled() -> None:
    model, _, y, label = make()
    nodes = poutine.trace(model).get_trace(y, 20, label=label).nodes
    assert {n for n, node in nodes.items() if node["type"] == "sample"} == {
        "data", "codes", "label", "obs",
    }  # fmt: skip
    assert nodes["label"]["fn"].batch_shape == (5,) and nodes["label"]["fn"].event_shape == ()
    assert {nodes[name]["scale"] for name in ("codes", "label", "obs")} == {4.0}


@pytest.mark.parametrize("normalise", [True, False])
def test_an_observed_label_adds_its_log_probability(normalise: bool) -> None:
    model, _, y, label = make(normalise=normalise)
    codes = torch.rand(5, 6)
    codes[1] = 0  # has no direction
    plain = SparseCoding(model.dictionary, model.likelihood, model.prior)
    directions = codes.double().numpy()
    if normalise:
        directions = directions / ((directions**2).sum(1, keepdims=True) + 1e-8) ** 0.5
    weights, bias = (p.detach().double().numpy() for p in (model.class_weights, model.class_bias))
    log_probs = scipy.special.log_softmax(directions @ weights.T + bias, axis=1)
    known = [k for k in range(5) if label[k] >= 0]
    expected = joint(plain, codes, y) + sum(log_probs[k, label[k]] for k in known)
    torch.testing.assert_close(joint(model, codes, y, label=label), expected.float())


def test_observed_labels_sum_to_a_missing_one_and_to_enumeration() -> None:
    model, _, y, _ = make()
    codes, y = torch.rand(1, 6), y[:1]
    missing = joint(model, codes, y, label=torch.tensor([-1]))
    each = torch.stack([joint(model, codes, y, label=torch.tensor([k])) for k in range(CLASSES)])
    torch.testing.assert_close(each.logsumexp(0), missing)

    found = TraceEnum_ELBO(max_plate_nesting=1).loss(model, Fixed(codes), y)
    assert found == pytest.approx(-missing.item(), rel=1e-6)


class Fixed(nn.Module):
    """A guide at given codes."""

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.codes = codes

    def forward(self, y: Tensor, *args: object, **kwargs: object) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("codes", dist.Delta(self.codes, event_dim=1))


@pytest.mark.parametrize("objective", [SparseELBO, Trace_ELBO])
def test_without_the_label_is_the_model_without_it(objective: type) -> None:
    model, guide, y, label = make()
    plain = SparseCoding(model.dictionary, model.likelihood, model.prior)
    expected = objective()(plain, guide)(y, 20)
    found = Without(objective(), "label")(model, guide)(y, 20, label=label)
    torch.testing.assert_close(found, expected)
    missing = objective()(model, guide)(y, 20, label=torch.full((5,), -1))
    torch.testing.assert_close(missing, expected)
    assert objective()(model, guide)(y, 20, label=label) > expected


def test_a_latent_label_is_refused_where_it_would_be_drawn() -> None:
    model, guide, y, _ = make()
    with pytest.raises(ValueError, match="neither for 'label'"):
        SparseELBO()(model, guide)(y)


def test_masked_samples_say_nothing() -> None:
    model, guide, y, label = make()
    mask = torch.rand(y.shape) < 0.5
    losses = [
        SparseELBO()(model, guide)(torch.where(mask, y, value), mask=mask, label=label)
        for value in (torch.nan, 3.0)
    ]
    assert torch.equal(*losses) and torch.isfinite(losses[0])


def test_labels_are_predicted_by_drawing_them() -> None:
    model, guide, y, _ = make()
    draws = Predictive(model, guide=guide, num_samples=2000)(y)["label"]
    assert draws.shape == (2000, 5)
    probs = model.logits(guide.encode(y)).softmax(-1)
    shares = nn.functional.one_hot(draws, CLASSES).float().mean(0)
    assert (shares - probs).abs().max() < 0.045  # four standard errors of 2000 draws
    free = Predictive(model, num_samples=1)(num_data=7)
    assert free["label"].shape == (1, 7) and free["obs"].shape == (1, 7, 4)


def test_codes_of_a_convolution_are_summed_over_positions() -> None:
    model = DiscriminativeSparseCoding(
        Conv(3, 2, 4), Gaussian(1.0), dist.Exponential(1.0), num_classes=2, normalise=False
    )
    codes = torch.rand(5, 3, 8)
    expected = codes.sum(-1) @ model.class_weights.T
    torch.testing.assert_close(model.logits(codes), expected)
    model(torch.randn(5, 2, 11), label=torch.zeros(5, dtype=torch.long))


def test_a_pair_comes_back_from_a_file(tmp_path) -> None:
    model, guide, y, label = make(normalise=False)
    with torch.no_grad():
        for parameter in (*model.parameters(), *guide.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    save(tmp_path / "pair", model=model, guide=guide)
    loaded = load(tmp_path / "pair")
    other, twin = loaded["model"], loaded["guide"]
    assert torch.equal(twin.encode(y), guide.encode(y))
    assert torch.equal(other.logits(guide.encode(y)), model.logits(guide.encode(y)))
    assert other.dictionary is twin.encoder.dictionary
    assert SparseELBO()(other, twin)(y, label=label) == SparseELBO()(model, guide)(y, label=label)


@pytest.mark.parametrize(("label", "error", "match"), [
    (torch.zeros(5), TypeError, "whole numbers, got torch.float32"),
    ([0, 1, 2, 0, 1], TypeError, "whole numbers, got list"),
    (torch.zeros(4, dtype=torch.long), ValueError, r"shape \(5,\), got \(4,\)"),
    (torch.zeros(5, 1, dtype=torch.long), ValueError, r"shape \(5,\), got \(5, 1\)"),
    (torch.tensor([0, 1, 2, 3, 0]), ValueError, "from 0 to 2, or -1 .*got 0 to 3"),
    (torch.tensor([0, 1, 2, -2, 0]), ValueError, "got -2 to 2"),
])  # fmt: skip
def test_labels_that_do_not_fit_are_refused(label: object, error: type, match: str) -> None:
    model, _, y, _ = make()
    with pytest.raises(error, match=match):
        model(y, label=label)


def test_arguments_that_do_not_fit_are_refused() -> None:
    model, _, _, _ = make()
    with pytest.raises(ValueError, match="without data"):
        model(num_data=3, label=torch.zeros(3, dtype=torch.long))
    for classes, match in ((1, "num_classes >= 2"), (0, "num_classes to be a whole")):
        with pytest.raises(ValueError, match=match):
            DiscriminativeSparseCoding(
                Dense(6, 4), Gaussian(1.0), dist.Exponential(1.0), num_classes=classes
            )
    with pytest.raises(TypeError, match="Expected a Dictionary"):
        DiscriminativeSparseCoding(
            nn.Linear(6, 4), Gaussian(1.0), dist.Exponential(1.0), num_classes=2
        )


def planted(size: int = 300) -> tuple[Tensor, Tensor]:
    """Data of two classes, which differ in which of six atoms they are made of."""
    generator = torch.Generator().manual_seed(0)
    atoms = nn.functional.normalize(torch.randn(6, 10, generator=generator))
    label = torch.randint(2, (size,), generator=generator)
    codes = torch.rand(size, 6, generator=generator) + 0.5
    codes[:, :3] *= (label == 0)[:, None]
    codes[:, 3:] *= (label == 1)[:, None]
    noise = 0.3 * torch.randn(size, 10, generator=generator)
    return codes @ atoms + noise, label


def test_two_phases_lower_the_error_and_keep_the_constraints() -> None:
    y, label = planted()
    torch.manual_seed(0)
    dictionary, likelihood = Dense(6, 10, unit_norm=False), Gaussian(0.4)
    prior = dist.Exponential(1.0)
    model = DiscriminativeSparseCoding(dictionary, likelihood, prior, num_classes=2)
    guide = UnrolledFISTA.recurrent(dictionary, likelihood, prior, num_steps=5)
    constraints = [
        Project(dictionary.atoms, max_norm=1.0, nonnegative=True),
        Project(guide.encoder.analysis.atoms, max_norm=1.0),
        Project(model.class_weights, max_norm=5.0),
    ]
    for constraint in constraints:
        constraint.apply()

    def error() -> float:
        return float((model.logits(guide.encode(y)).argmax(-1) != label).float().mean())

    adam = functools.partial(torch.optim.Adam, lr=1e-2)
    train = functools.partial(
        fit, model, guide, y, given={"label": label}, batch_size=50, progress=False,
        callbacks=constraints,
    )  # fmt: skip
    weights = model.class_weights.detach().clone()
    first = train(phases=[Phase(10, [Update(Without(SparseELBO(), "label"), adam)])])
    assert first.epoch_loss[-1] < first.epoch_loss[0]
    assert torch.equal(model.class_weights, weights)
    before = error()
    train(phases=[Phase(15, [Update(optimizer=adam)])])
    assert error() < min(before, 0.05)
    assert dictionary.atoms.min() >= 0
    assert dictionary.atoms.norm(dim=1).max() <= 1 + 1e-6


def test_a_thresholded_posterior_trains_with_labels() -> None:
    _, _, y, label = make()
    dictionary, likelihood = Dense(6, 4), Gaussian(0.5)
    prior = SpikeAndSlab(dist.Laplace(0.0, 1.0), probs=torch.tensor(0.2))
    model = DiscriminativeSparseCoding(dictionary, likelihood, prior, num_classes=CLASSES)
    solver = Unrolled(dictionary, likelihood, num_steps=3)
    encoder = UnrolledEncoder(solver, dist.Laplace(0.0, 1.0), init_probs=0.2)
    guide = Thresholded(encoder, SpikeAndSlabPosterior())
    history = fit(model, guide, y, given={"label": label}, epochs=2, progress=False)
    assert all(torch.isfinite(torch.tensor(history.step_loss)))
    assert model.class_weights.grad.abs().sum() > 0
