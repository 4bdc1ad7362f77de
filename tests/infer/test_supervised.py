"""Training against clean data: what is predicted, what it costs, and what moves."""

import functools
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_sparse.dictionaries import Conv, Dense
from pyro_sparse.guides import Heads, Thresholded, UnrolledFISTA
from pyro_sparse.infer import PerceptualLoss, Phase, Reconstruct, Supervised, Update, fit
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding

quick = functools.partial(fit, progress=False)
NOISE = 0.5


def make(size: int = 40) -> tuple[SparseCoding, UnrolledFISTA, Tensor]:
    """A model of sparse data, its guide, and clean data of other atoms."""
    dictionary, likelihood, prior = Dense(8, 5), Gaussian(NOISE), dist.Laplace(0.0, 0.7)
    model = SparseCoding(dictionary, likelihood, prior)
    guide = UnrolledFISTA(dictionary, likelihood, prior, num_steps=5)
    codes = torch.randn(size, 8) * (torch.rand(size, 8) < 0.2)
    return model, guide, Dense(8, 5)(codes).detach()


def noisy(clean: Tensor) -> Tensor:
    return clean + NOISE * torch.randn_like(clean)


class Recorded:
    """Noise that remembers what it was asked for and what it gave."""

    def __init__(self) -> None:
        self.clean: list[Tensor] = []
        self.given: list[Tensor] = []

    def __call__(self, clean: Tensor) -> Tensor:
        self.clean.append(clean.clone())
        self.given.append(noisy(clean))
        return self.given[-1]


# What is predicted


def test_a_point_guide_is_decoded_by_the_model() -> None:
    model, guide, y = make()
    expected = model.dictionary(guide.encode(y))
    torch.testing.assert_close(Reconstruct(model, guide)(y), expected)


def test_a_guide_with_laws_is_decoded_at_their_means() -> None:
    model, _, y = make()
    encoder = Heads(nn.Sequential(nn.Linear(5, 16), nn.ReLU()), 16, code_shape=8)
    guide = Thresholded(encoder)
    expected = model.dictionary(guide.posterior(y).mean)
    predicted = Reconstruct(model, guide)(y)
    torch.testing.assert_close(predicted, expected)
    predicted.sum().backward()
    moved = {name for name, p in encoder.heads.named_parameters() if p.grad is not None}
    assert moved == {"loc.weight", "loc.bias", "logits.weight", "logits.bias"}  # not the spread


def test_a_model_of_ones_own_is_predicted_by_the_mean_of_its_law() -> None:
    scale = torch.tensor([1.0, 3.0])

    def model(y: Tensor, num_data: int) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", num_data, subsample_size=len(y)):
            first = pyro.sample("first", dist.Normal(0.0, 1.0))
            second = pyro.sample("second", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            log_rate = first[:, None] * scale + second
            pyro.sample("obs", dist.Poisson(rate * log_rate.exp()).to_event(1), obs=y)

    def guide(y: Tensor, num_data: int) -> None:
        pyro.sample("rate", dist.Gamma(6.0, 3.0))  # of mean 2
        with pyro.plate("data", num_data, subsample_size=len(y)):
            pyro.sample("first", dist.Normal(y[:, 0], 0.1))
            pyro.sample("second", dist.Delta(y / 2, event_dim=1))

    y = torch.tensor([[0.0, 1.0], [0.5, 0.2], [1.0, 0.0]])
    expected = 2 * (y[:, :1] * scale + y / 2).exp()
    torch.testing.assert_close(Reconstruct(model, guide)(y), expected)


# The objective


def test_the_objective_is_num_data_times_the_loss_against_the_clean_data() -> None:
    model, guide, clean = make()
    corrupt = Recorded()
    value = Supervised(corrupt=corrupt)(model, guide)(clean, 1000)
    predicted = model.dictionary(guide.encode(corrupt.given[0]))
    torch.testing.assert_close(value, 1000 * (predicted - clean).square().mean())
    assert not torch.equal(corrupt.given[0], clean)


def test_without_corruption_the_input_is_the_target() -> None:
    model, guide, clean = make()
    value = Supervised(nn.L1Loss())(model, guide)(clean)
    predicted = model.dictionary(guide.encode(clean))
    torch.testing.assert_close(value, len(clean) * (predicted - clean).abs().mean())


def test_gradients_of_both_programs_are_those_of_the_error_by_hand() -> None:
    model, guide, clean = make()
    generator = torch.random.get_rng_state()
    Supervised(corrupt=noisy)(model, guide)(clean, 1).backward()
    found = {name: p.grad for name, p in guide.named_parameters()}
    guide.zero_grad()
    torch.random.set_rng_state(generator)
    (model.dictionary(guide.encode(noisy(clean))) - clean).square().mean().backward()
    assert len(found) >= 1
    for name, parameter in guide.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_a_predictor_of_ones_own_replaces_the_model() -> None:
    model, guide, clean = make()
    asked: list[Any] = []

    def half(y: Tensor, mask: Tensor | None) -> Tensor:
        asked.append(mask)
        return y / 2

    value = Supervised(predict=half)(model, guide)(clean, 7)
    torch.testing.assert_close(value, 7 * (clean / 2).square().mean())
    assert asked == [None]


def test_what_the_loss_holds_is_not_trained() -> None:
    model, guide, clean = make()

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0), requires_grad=False)

        def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
            return self.factor * (prediction - target).square().mean()

    objective = Supervised(Learned())(model, guide)
    own = {id(p) for p in (*model.parameters(), *guide.parameters())}
    assert {id(p) for p in objective.parameters()} == own
    torch.testing.assert_close(objective(clean), 2 * Supervised()(model, guide)(clean))


# Masks


def test_what_was_not_observed_has_no_part() -> None:
    model, guide, clean = make()
    mask = torch.rand(40, 5) < 0.7
    gaps = torch.where(mask, clean, torch.full_like(clean, torch.nan))
    value = Supervised()(model, guide)(gaps, mask=mask)
    predicted = model.dictionary(guide.encode(clean, mask))
    error = (predicted - clean).square()[mask].sum() / clean.numel()
    torch.testing.assert_close(value, 40 * error)
    value.backward()
    assert all(torch.isfinite(p.grad).all() for p in guide.parameters() if p.grad is not None)


def test_masked_data_count_alike_in_every_minibatch() -> None:
    model, guide, clean = make()
    mask = torch.rand(40, 5) < torch.linspace(0.1, 1, 40)[:, None]
    objective = Supervised()(model, guide)
    parts = [objective(clean[i : i + 10], 10, mask=mask[i : i + 10]) for i in range(0, 40, 10)]
    torch.testing.assert_close(sum(parts), objective(clean, 40, mask=mask))


def test_in_painting_hides_samples_from_the_guide_but_not_from_the_error() -> None:
    model, guide, clean = make()
    seen = torch.rand(40, 5) < 0.6
    value = Supervised(corrupt=lambda clean: (clean, seen))(model, guide)(clean)
    predicted = model.dictionary(guide.encode(clean, seen))
    torch.testing.assert_close(value, 40 * (predicted - clean).square().mean())
    known = torch.rand(40, 5) < 0.9
    both = Supervised(corrupt=lambda clean: (clean, seen))(model, guide)(clean, mask=known)
    predicted = model.dictionary(guide.encode(clean, seen & known))
    error = (predicted - clean).square()[known].sum() / clean.numel()
    torch.testing.assert_close(both, 40 * error)


# Training


def test_fit_corrupts_anew_at_every_step_and_denoises_better() -> None:
    model, guide, clean = make(300)
    clean, held_out = clean[:150], clean[150:]
    given = noisy(held_out)

    def error() -> float:
        with torch.no_grad():
            return float((Reconstruct(model, guide)(given) - held_out).square().mean())

    before, corrupt = error(), Recorded()
    pyro.clear_param_store()  # of what the programs claimed when they ran by themselves
    adam, loss = functools.partial(torch.optim.Adam, lr=0.02), Supervised(corrupt=corrupt)
    history = quick(model, guide, clean, loss=loss, optimizer=adam, epochs=30, batch_size=30)
    assert dict(pyro.get_param_store()) == {}
    # To four fifths, on noise that it has not seen: the clean data are those of other atoms.
    assert error() < 0.8 * before
    assert history.epoch_loss[-1] < history.epoch_loss[0] < 1  # of one sample, whatever num_data
    # The first call is of the look that fit takes at the programs, and leaves the random state as
    # it was: the first step has the same noise.
    noise = [given - clean for given, clean in zip(corrupt.given, corrupt.clean)][1:]
    assert len({float(n.sum()) for n in noise}) == len(noise) == 150


def test_fit_repeats_its_noise_from_a_seed() -> None:
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        model, guide, clean = make()
        torch.rand(len(losses))  # the state outside does not matter
        loss = Supervised(corrupt=noisy)
        losses.append(quick(model, guide, clean, loss=loss, epochs=2, seed=5).step_loss)
    assert losses[0] == losses[1]


def test_fit_takes_a_mask_and_updates_of_parts() -> None:
    model, guide, clean = make()
    atoms = model.dictionary.atoms.detach().clone()
    factor = guide.encoder.shrinkage.log_factor.detach().clone()
    update = Update(Supervised(corrupt=noisy), train=[guide.encoder.shrinkage.log_factor])
    mask = torch.rand(40, 5) < 0.8
    quick(model, guide, clean, mask=mask, phases=[Phase(2, [update])])
    assert torch.equal(model.dictionary.atoms, atoms)
    assert not torch.equal(guide.encoder.shrinkage.log_factor, factor)


def test_pictures_train_under_the_perceptual_loss() -> None:
    dictionary, likelihood, prior = Conv(6, 1, (4, 4), 2), Gaussian(0.1), dist.Laplace(0.0, 0.3)
    model = SparseCoding(dictionary, likelihood, prior)
    guide = UnrolledFISTA(dictionary, likelihood, prior, num_steps=3)
    clean = torch.rand(4, 1, 8, 8)
    clean = torch.nn.functional.interpolate(clean, (32, 32), mode="bilinear")
    loss = Supervised(
        PerceptualLoss(window_size=5, weights=(0.4, 0.6)),
        corrupt=lambda clean: clean + 0.1 * torch.randn_like(clean),
    )
    adam = functools.partial(torch.optim.Adam, lr=0.02)
    history = quick(model, guide, clean, loss=loss, optimizer=adam, epochs=15)
    assert history.epoch_loss[-1] < 0.8 * history.epoch_loss[0]


def test_a_loop_of_ones_own_trains_the_same_objective() -> None:
    model, guide, clean = make()
    objective = Supervised(corrupt=noisy)(model, guide)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.02)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = objective(clean)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Means of 20 draws, each with a standard deviation of a tenth: three standard errors are 0.1.
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])


# Refused


@pytest.mark.parametrize("name", ["loss", "corrupt", "predict"])
@pytest.mark.parametrize("bad", [3, nn.MSELoss])
def test_arguments_that_are_no_functions_are_refused(name: str, bad: Any) -> None:
    with pytest.raises(TypeError, match=f"Expected {name} to be called"):
        Supervised(**{name: bad})


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"corrupt": lambda y: y[:, :2]}, ValueError, "corrupt to keep the shape"),
        ({"corrupt": lambda y: y.double()}, TypeError, "corrupted data of dtype torch.float32"),
        ({"corrupt": lambda y: (y, y)}, TypeError, "mask to be a boolean tensor"),
        ({"predict": lambda y, mask: y[:, :2]}, ValueError, "prediction of the data's shape"),
        ({"loss": nn.MSELoss(reduction="none")}, ValueError, "gives a scalar.*reduction='mean'"),
        ({"loss": lambda x, y: 3.0}, ValueError, "gives a scalar, got float"),
    ],
)
def test_functions_that_give_something_else_are_refused(
    options: dict[str, Any], error: type[Exception], match: str
) -> None:
    model, guide, clean = make()
    with pytest.raises(error, match=match):
        Supervised(**options)(model, guide)(clean)


def test_programs_without_what_is_read_are_refused() -> None:
    model, guide, clean = make()

    def silent(y: Tensor, num_data: int) -> None:
        pass

    def endless(y: Tensor, num_data: int) -> None:
        pyro.sample("codes", dist.LogNormal(0.0, 1.0).to_event(0))
        pyro.sample("obs", dist.VonMises3D(torch.eye(3)[0]), obs=torch.eye(3)[0])

    with pytest.raises(ValueError, match=r"lacks \['codes'\]"):
        Reconstruct(model, silent)(clean)
    with pytest.raises(ValueError, match='site "obs"'):
        Reconstruct(silent, guide)(clean)
    with pytest.raises(NotImplementedError, match="law with a mean at site 'obs'"):
        Reconstruct(endless, endless_guide)(clean)
    with pytest.raises(TypeError, match="guide to be a program, got int"):
        Reconstruct(model, 3)  # type: ignore[arg-type]


def endless_guide(y: Tensor, num_data: int) -> None:
    pyro.sample("codes", dist.LogNormal(0.0, 1.0))
