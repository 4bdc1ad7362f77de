"""What is known of each datum stays with it; projections; sites left out."""

import functools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_sparse.dictionaries import Dense
from pyro_sparse.infer import EarlyStopping, Project, SparseELBO, Without, fit
from pyro_sparse.infer.callbacks import Progress

quick = functools.partial(fit, progress=False, epochs=2, batch_size=4)


class Seen(PyroModule):
    """A program that notes what it was called with; the model of the two observes a class."""

    def __init__(self, *, model: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.model = model
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, y: Tensor, num_data: int, label: Tensor) -> None:
        self.calls.append((y.clone(), label.clone()))
        with pyro.plate("data", num_data, subsample=torch.arange(len(y))):
            if not self.model:
                pyro.sample("codes", dist.Normal(self.weight, 1.0).expand([len(y)]))
                return
            codes = pyro.sample("codes", dist.Normal(0.0, 1.0))
            pyro.sample("label", dist.Bernoulli(logits=codes + self.weight), obs=label)
            pyro.sample("obs", dist.Normal(codes, 1.0), obs=y)


@pytest.mark.parametrize("kind", [Tensor.clone, Tensor.numpy, Tensor.tolist])
def test_each_datum_keeps_its_own(kind) -> None:
    y = torch.arange(10.0)
    model, guide = Seen(model=True), Seen(model=False)
    quick(model, guide, y, given={"label": kind((y > 4).float())})
    for program in (model, guide):
        seen, labels = (torch.cat(parts) for parts in zip(*program.calls))
        assert torch.equal(labels, (seen > 4).to(labels))
        assert len(program.calls) >= 6  # three minibatches in each of two epochs


def test_validation_data_have_their_own() -> None:
    y, held = torch.arange(10.0), torch.arange(20.0, 27.0)
    model, guide = Seen(model=True), Seen(model=False)
    stopping = EarlyStopping(3, data=held, given={"label": (held > 23).float()})
    history = quick(model, guide, y, given={"label": y * 0}, early_stopping=stopping)
    assert len(history.validation_loss) == 2
    seen, labels = (torch.cat(parts) for parts in zip(*model.calls))
    assert (seen == 26).any() and torch.equal(labels, (seen > 23).to(labels))


def test_what_does_not_fit_is_refused() -> None:
    y = torch.arange(10.0)
    pair = Seen(model=True), Seen(model=False)
    with pytest.raises(ValueError, match=r"given\['label'\] to have one entry .* 10 data.*\(9,\)"):
        quick(*pair, y, given={"label": np.zeros(9)})
    with pytest.raises(TypeError, match="given to be a dict by name, got Tensor"):
        quick(*pair, y, given=y)
    with pytest.raises(ValueError, match="no given= with a DataLoader"):
        loader = DataLoader(TensorDataset(y), batch_size=5)
        fit(*pair, loader, given={"label": y}, progress=False)


def test_without_refuses_what_it_cannot_leave_out() -> None:
    for arguments, error in (((3, "label"), TypeError), ((SparseELBO(),), ValueError)):
        with pytest.raises(error, match="Expected"):
            Without(*arguments)
    with pytest.raises(TypeError, match="names of sites"):
        Without(SparseELBO(), ["label"])


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3)])
def test_a_projection_is_the_nearest_point_that_is_allowed(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    parameter.data[0] *= 0.01  # already inside, but for its signs
    before = parameter.detach().flatten(1).clone()
    Project(parameter, max_norm=0.5, nonnegative=True).apply()
    found = parameter.detach().flatten(1)
    assert found.min() >= 0 and found.norm(dim=1).max() <= 0.5 + 1e-12
    # Of a convex set the nearest point z has (x - z)(c - z) <= 0 for every c in it.
    others = torch.rand(500, *found.shape, dtype=torch.float64)
    others = 0.5 * torch.rand(500, len(found), 1) * others / others.norm(dim=-1, keepdim=True)
    assert (((before - found) * (others - found)).sum(-1) <= 1e-12).all()


def test_a_projection_keeps_to_its_steps() -> None:
    parameter = nn.Parameter(torch.full((1, 2), -1.0))
    project = Project(parameter, nonnegative=True, every=3)
    for step in range(1, 4):
        assert bool((parameter == -1).all())
        project.after_step(Progress(None, None, None, None, 1, step, 1, 0, 0.0))
    assert bool((parameter == 0).all())


def test_a_projection_refuses_what_it_cannot_write_to() -> None:
    with pytest.raises(TypeError, match=r"nn.Parameter, got Tensor.*unit_norm=False"):
        Project(Dense(3, 2).atoms, max_norm=1.0)
    for options, error in (({"max_norm": 0.0}, ValueError), ({"every": 0}, ValueError)):
        with pytest.raises(error, match="Expected"):
            Project(nn.Parameter(torch.ones(2, 2)), **options)
