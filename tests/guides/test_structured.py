"""The guide with dependent gates: its site, its parameters, and what it is for."""

import math
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_sparse.dictionaries import Dense
from pyro_sparse.distributions import SpikeAndSlab
from pyro_sparse.distributions.structured import StructuredSpikeAndSlab
from pyro_sparse.guides import Heads, StructuredThresholded, Thresholded, UnrolledEncoder
from pyro_sparse.infer import LeaveOneOut, SparseELBO, enumerate_posterior, fit, load, save
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import Unrolled, coordinate_ascent

ATOMS, FEATURES = 6, 4


def slab_prior(probs: float = 0.25) -> SpikeAndSlab:
    return SpikeAndSlab(dist.Normal(0.0, 1.0), probs=probs)


def make(**options: object) -> tuple[SparseCoding, StructuredThresholded, Tensor]:
    torch.manual_seed(1)
    dictionary = Dense(ATOMS, FEATURES)
    encoder = Heads(nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh()), 8, ATOMS)
    atoms = dictionary.atoms.detach()
    guide = StructuredThresholded(encoder, atoms @ atoms.T, **options)
    return SparseCoding(dictionary, Gaussian(0.3), slab_prior()), guide, torch.randn(5, FEATURES)


class Emitting(nn.Module):
    """An encoder that emits what it was given."""

    def __init__(self, **emitted: Tensor) -> None:
        super().__init__()
        self.emitted = emitted

    def forward(self, y: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        return self.emitted


class Bare(nn.Module):
    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        return y


# Sites and values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_model_and_guide_agree_on_sites_and_shapes(masked: bool) -> None:
    model, guide, y = make()
    mask = torch.rand(y.shape) < 0.5 if masked else None
    guide_trace = poutine.trace(guide).get_trace(y, 20, mask=mask)
    model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(y, 20, mask=mask)
    ours, theirs = guide_trace.nodes["codes"], model_trace.nodes["codes"]
    assert theirs["value"] is ours["value"]
    assert ours["fn"].shape() == theirs["fn"].shape() == (5, ATOMS)
    assert ours["fn"].event_dim == theirs["fn"].event_dim == 1
    assert ours["scale"] == theirs["scale"] == 4.0
    assert [f.name for f in ours["cond_indep_stack"]] == ["data"]
    latent = set(guide_trace.stochastic_nodes) - {"data"}
    assert latent == set(model_trace.stochastic_nodes) - {"data"}
    assert (ours["value"] == 0).any() and (ours["value"] != 0).any()


def test_the_posterior_is_the_law_of_what_the_encoder_emits() -> None:
    loc, log_scale, logits = (torch.randn(3, ATOMS) for _ in range(3))
    couplings = torch.randn(ATOMS, ATOMS)
    encoder = Emitting(loc=loc, log_scale=log_scale, logits=logits)
    law = StructuredThresholded(encoder, couplings).posterior(torch.randn(3, FEATURES))
    expected = StructuredSpikeAndSlab(logits, loc, log_scale.exp(), couplings)
    value = expected.sample((10,))
    torch.testing.assert_close(law.log_prob(value), expected.log_prob(value))


@pytest.mark.parametrize("coupled", [False, True], ids=["zero", "coupled"])
def test_where_the_others_are_at_emitted_codes_the_numbers_are_those_of_independent_codes(
    coupled: bool,
) -> None:
    emitted = {name: torch.randn(3, ATOMS) for name in ("loc", "log_scale", "logits", "codes")}
    couplings = torch.randn(ATOMS, ATOMS) * coupled
    y = torch.randn(3, FEATURES)
    given = StructuredThresholded(Emitting(**emitted), couplings).posterior(y)
    given = given.given(emitted["codes"])
    expected = Thresholded(Emitting(**emitted)).posterior(y)
    torch.testing.assert_close(given.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(given.slab.mean, expected.slab.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(given.slab.stddev, expected.slab.stddev)


def test_codes_do_not_see_what_is_masked() -> None:
    _, guide, y = make()
    mask = torch.rand(y.shape) < 0.5
    blanked = guide.posterior(torch.where(mask, y, torch.nan), mask)
    assert torch.equal(blanked.loc, guide.posterior(torch.where(mask, y, 3.0), mask).loc)
    assert not torch.equal(blanked.loc, guide.posterior(y).loc)


def test_rest_is_called_first_with_the_same_arguments() -> None:
    seen: list[object] = []

    def rest(y: Tensor, num_data: int | None, mask: Tensor | None = None) -> None:
        seen.extend([y, num_data, mask])
        pyro.sample("rate", dist.Delta(torch.tensor(1.0)))

    _, guide, y = make(rest=rest)
    mask = torch.ones_like(y, dtype=torch.bool)
    names = list(poutine.trace(guide).get_trace(y, 20, mask=mask).stochastic_nodes)
    assert [n for n in names if n != "data"] == ["rate", "codes"]
    assert seen[0] is y and seen[1:] == [20, mask]


# Parameters ---------------------------------------------------------------------------------------


def bound(guide: StructuredThresholded, dictionary: Dense, y: Tensor, scale: float) -> Tensor:
    """Per-datum evidence bound with four draws, and its gradient (gates by leave-one-out)."""
    law = guide.posterior(y)
    value, log_gates = law.rsample_given_gates((4,))
    fit = dist.Normal(value @ dictionary.atoms.detach(), scale).log_prob(y).sum(-1)
    prior = slab_prior().expand((value.shape[-1],)).to_event(1)
    terms = fit - law.kl_given(value, prior)
    fixed = terms.detach()
    advantage = fixed - (fixed.sum(0) - fixed) / 3
    return (terms + advantage * (log_gates - log_gates.detach())).mean(0)


def test_every_parameter_gets_a_gradient() -> None:
    model, guide, y = make()
    bound(guide, model.dictionary, y, 0.3).sum().backward()
    found = dict(guide.named_parameters())
    assert "couplings.weight" in found
    for name, parameter in found.items():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name
    grad = guide.couplings.weight.grad
    assert grad is not None and (grad.triu() == 0).all()


def test_a_saved_guide_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = Heads(nn.Linear(FEATURES, 8), 8, ATOMS)
    guide = StructuredThresholded(encoder, torch.randn(ATOMS, ATOMS))
    y = torch.randn(3, FEATURES)
    save(tmp_path / "guide", guide=guide)
    again = load(tmp_path / "guide")["guide"]
    value = guide.posterior(y).sample((10,))
    assert torch.equal(again.posterior(y).log_prob(value), guide.posterior(y).log_prob(value))
    assert set(again.state_dict()) == set(guide.state_dict())


# Each datum for itself ----------------------------------------------------------------------------


@pytest.mark.parametrize("emitting_codes", [False, True], ids=["law", "codes"])
def test_refining_starts_from_the_law_of_the_encoder(emitting_codes: bool) -> None:
    """By steps of no length: the table holds the parameters of the law itself."""
    model, guide, y = make()
    if emitting_codes:
        encoder = UnrolledEncoder(Unrolled(model.dictionary, model.likelihood), dist.Laplace(0, 1))
        guide = StructuredThresholded(encoder, guide.couplings())
    refined = guide.refine(model, y, num_steps=1, optimizer=partial(torch.optim.SGD, lr=0.0))
    value = guide.posterior(y).sample((20,))
    torch.testing.assert_close(
        refined.posterior(y).log_prob(value), guide.posterior(y).log_prob(value)
    )
    assert refined(y, 24).shape == (5, ATOMS)
    with pytest.raises(ValueError, match="Expected the 5 data .* got 3"):
        refined(y[:3])


def test_refining_moves_the_table_alone() -> None:
    model, guide, y = make()
    pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.0}), SparseELBO(LeaveOneOut())).step(y)
    nn.ModuleList([model, guide]).zero_grad()
    before = {k: v.clone() for k, v in nn.ModuleList([model, guide]).state_dict().items()}
    store = {name: id(value) for name, value in pyro.get_param_store().items()}
    refined = guide.refine(model, y, num_steps=3)
    after = nn.ModuleList([model, guide]).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.grad is None for p in (*guide.parameters(), *model.parameters()))
    assert store == {name: id(value) for name, value in pyro.get_param_store().items()}
    assert refined.couplings.weight is not guide.couplings.weight
    assert torch.equal(refined.couplings.weight, guide.couplings.weight)
    start = guide.parameters_of(y)
    for name, values in refined.encoder.emitted.items():
        assert not torch.equal(values, start[name]), name


def test_refining_takes_a_mask_and_what_pyros_objectives_take() -> None:
    model, guide, y = make()
    mask = torch.rand(y.shape) < 0.7
    hidden = torch.where(mask, y, torch.nan)
    refined = guide.refine(model, hidden, mask=mask, num_steps=3, loss=SparseELBO())
    assert all(values.isfinite().all() for values in refined.parameters())
    with pytest.raises(TypeError, match="model to be a generative program, .* got NoneType"):
        guide.refine(None, y)
    with pytest.raises(TypeError, match="loss to be an ELBO"):
        guide.refine(model, y, loss=lambda model, guide: None)
    with pytest.raises(ValueError, match="num_steps >= 1"):
        guide.refine(model, y, num_steps=0)


def test_a_refined_guide_comes_back(tmp_path: Path) -> None:
    model, guide, y = make()
    refined = guide.refine(model, y, num_steps=2)
    save(tmp_path / "run", refined=refined)
    back = load(tmp_path / "run")["refined"]
    value = refined.posterior(y).sample((10,))
    assert torch.equal(back.posterior(y).log_prob(value), refined.posterior(y).log_prob(value))


def test_refining_closes_most_of_the_gap_to_the_evidence() -> None:
    """Correlated atoms, an untrained encoder; a factorised law of each datum cannot follow.

    Nats per datum below the evidence of enumeration: 1.9 at the start, 0.45 refined, and 0.93 for
    independent codes refined. Of 400 draws the error is about 0.02.
    """
    torch.manual_seed(0)
    dictionary = Dense(K, D, atoms=correlated_atoms())
    dictionary.freeze_()
    model = SparseCoding(dictionary, Gaussian(NOISE), slab_prior(PROBS))
    with torch.no_grad():
        y = model(num_data=200)
    evidence = float(enumerate_supports(y, dictionary.atoms)[1].sum())
    unrolled = Unrolled(dictionary, model.likelihood, num_steps=10)
    encoder = UnrolledEncoder(unrolled, dist.Laplace(0.0, 0.3), init_probs=PROBS)
    guide = StructuredThresholded(encoder, dictionary.atoms @ dictionary.atoms.T)
    refined = guide.refine(model, y)
    judge = SparseELBO(LeaveOneOut(), num_samples=400)
    start, end = ((judge.loss(model, each, y) + evidence) / 200 for each in (guide, refined))
    independent = Thresholded(encoder).refine(model, y)
    factorised = (SparseELBO().loss(model, independent, y) + evidence) / 200
    print(f"start {start:.3f}, refined {end:.3f}, independent {factorised:.3f}")
    assert -0.1 < end < 0.5 * start and end < 0.7 * factorised


# Errors -------------------------------------------------------------------------------------------


def test_what_is_no_part_of_a_guide_is_refused() -> None:
    square = torch.zeros(ATOMS, ATOMS)
    with pytest.raises(TypeError, match="encoder to be a module, got str"):
        StructuredThresholded("mlp", square)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(atoms, atoms\), got \(6, 4\). Try atoms @ atoms.T"):
        StructuredThresholded(Emitting(), torch.zeros(6, 4))
    with pytest.raises(TypeError, match="rest to be a guide"):
        StructuredThresholded(Emitting(), square, rest=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\['logits'\] are missing"):
        StructuredThresholded(Heads(nn.Linear(4, 8), 8, ATOMS, ("loc", "log_scale")), square)


def test_what_an_encoder_may_not_emit_is_refused() -> None:
    y, square = torch.randn(3, FEATURES), torch.zeros(ATOMS, ATOMS)
    good = {name: torch.zeros(3, ATOMS) for name in ("loc", "log_scale", "logits")}
    with pytest.raises(TypeError, match="return a dict from parameter name to tensor, got Tensor"):
        StructuredThresholded(Bare(), square).posterior(y)
    with pytest.raises(ValueError, match=r"\['loc'\] are missing"):
        StructuredThresholded(Emitting(log_scale=y, logits=y), square).posterior(y)
    for change in ({"loc": torch.zeros(3, 5)}, {"codes": torch.zeros(2, ATOMS)}):
        with pytest.raises(ValueError, match=r"of one shape \(n=3, atoms, .* got {'loc'"):
            StructuredThresholded(Emitting(**(good | change)), square).posterior(y)
    with pytest.raises(TypeError, match="'codes' to be a tensor, got float"):
        StructuredThresholded(Emitting(**good, codes=0.0), square).posterior(y)  # type: ignore
    for shape in ((3, 5), (3, ATOMS, 2)):
        other = {name: torch.zeros(shape) for name in good}
        with pytest.raises(ValueError, match=r"\(n, atoms\) = \(3, 6\), got \(3, "):
            StructuredThresholded(Emitting(**other), square).posterior(y)


# What it is for -----------------------------------------------------------------------------------

K, D, PROBS = 12, 12, 0.25
NOISE = math.sqrt(K * PROBS / (10 * D))  # SNR 10 dB: the predictor has variance K * PROBS / D


class Shrinking(nn.Module):
    """Layers of posterior-mean shrinkage with weights of their own, then a head.

    Locations are of what codes in ``taken`` leave over, the Gram matrix or its later half.
    """

    def __init__(self, atoms: Tensor, taken: Tensor, num_layers: int = 8, width: int = 64) -> None:
        super().__init__()
        gram = atoms @ atoms.T
        largest = torch.linalg.eigvalsh(gram)[-1]
        layers = (num_layers, 1, 1)
        prior = math.log(PROBS / (1 - PROBS))
        exact = NOISE**2 / (1 + NOISE**2)  # variance of a code given all others
        self.within = nn.Parameter((torch.eye(K) - gram / largest).repeat(layers))
        self.into = nn.Parameter((atoms.T / largest).repeat(layers))
        self.log_noise = nn.Parameter(torch.full((num_layers, K), math.log(0.3)))
        self.bias = nn.Parameter(torch.full((num_layers, K), prior + math.log(0.3)))
        self.project = nn.Parameter(atoms.T.clone())
        self.taken = nn.Parameter(taken)
        self.log_scale = nn.Parameter(torch.full((K,), math.log(exact) / 2 + 0.3))
        self.logits = nn.Parameter(torch.full((K,), prior + math.log(exact) / 2))
        self.correct = nn.Sequential(
            nn.Linear(D + 4 * K, width), nn.SiLU(), nn.Linear(width, 3 * K)
        )
        with torch.no_grad():
            self.correct[2].weight.mul_(0.1)
            self.correct[2].bias.zero_()

    def forward(self, y: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        codes = y.new_zeros(len(y), K)
        for layer in range(len(self.into)):
            point = y @ self.into[layer] + codes @ self.within[layer].T
            odds = self.bias[layer] + (point / self.log_noise[layer].exp()).square() / 2
            codes = odds.sigmoid() * point
        seen = [y, codes, point, odds.clamp(-10, 10) / 5, odds.sigmoid()]
        loc, log_scale, logits = self.correct(torch.cat(seen, -1)).split(K, -1)
        return {
            "loc": y @ self.project - codes @ self.taken.T + loc,
            "log_scale": self.log_scale + log_scale,
            "logits": self.logits + 3 * logits,
        }


def draw(atoms: Tensor, size: int) -> Tensor:
    codes = torch.randn(size, K) * (torch.rand(size, K) < PROBS)
    return codes @ atoms + NOISE * torch.randn(size, D)


def enumerate_supports(y: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor]:
    """P(active) and log evidence by brute force: a dense normal law of the data per support."""
    y, atoms = y.double(), atoms.double()
    supports = ((torch.arange(2**K)[:, None] >> torch.arange(K)) & 1).double()
    covariance = torch.einsum("sk,kd,ke->sde", supports, atoms, atoms)
    covariance = covariance + NOISE**2 * torch.eye(D, dtype=torch.float64)
    factor = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(factor, y.T.expand(2**K, -1, -1), upper=False)
    log_det = factor.diagonal(dim1=1, dim2=2).log().sum(1)[:, None]
    size = supports.sum(1)[:, None]
    joint = (
        -white.square().sum(1) / 2 - log_det - D * math.log(2 * math.pi) / 2
        + size * math.log(PROBS) + (K - size) * math.log1p(-PROBS)
    )  # fmt: skip
    evidence = joint.logsumexp(0)
    return (joint - evidence).exp().T @ supports, evidence


def correlated_atoms() -> Tensor:
    """Four groups of three atoms, cosine 0.9 within a group and 0 between groups."""
    group = torch.arange(K) // 3
    gram = 0.9 * (group[:, None] == group).double() + 0.1 * torch.eye(K).double()
    rotation = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0]
    return (torch.linalg.cholesky(gram) @ rotation).float()


def trained(atoms: Tensor, *, structured: bool, steps: int = 500) -> StructuredThresholded:
    gram = atoms @ atoms.T - torch.eye(K)
    encoder = Shrinking(atoms, gram.triu() if structured else gram)
    guide = StructuredThresholded(encoder, structured * gram)
    guide.couplings.requires_grad_(structured)
    dictionary = Dense(K, D, atoms=atoms)
    parameters = [p for p in guide.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps, pct_start=0.07)
    for _ in range(steps):
        optimizer.zero_grad()
        (-bound(guide, dictionary, draw(atoms, 128), NOISE).mean()).backward()
        nn.utils.clip_grad_norm_(parameters, 20.0)
        optimizer.step()
        schedule.step()
    return guide


@pytest.mark.slow
def test_dependent_gates_know_which_of_correlated_atoms_are_active() -> None:
    """P(active) of fresh data against enumeration, and the same encoder with independent gates."""
    torch.manual_seed(0)
    atoms = correlated_atoms()
    y = draw(atoms, 300)
    exact, evidence = enumerate_supports(y, atoms)
    errors, gaps = {}, {}
    for name, structured in (("structured", True), ("independent", False)):
        guide = trained(atoms, structured=structured)
        with torch.no_grad():
            found = guide.posterior(y).marginals(400).prob_active
            values = torch.stack([
                bound(guide, Dense(K, D, atoms=atoms), y, NOISE) for _ in range(50)
            ])  # fmt: skip
        errors[name] = float((found - exact).abs().mean())
        gaps[name] = evidence - values.mean(0)
        print(f"{name}: error of P(active) {errors[name]:.4f}, gap {float(gaps[name].mean()):.3f}")
        # On average over the data; for each the Monte Carlo error of 200 draws is left.
        error = float((gaps[name] - gaps[name].mean()).std()) / math.sqrt(len(y))
        assert gaps[name].mean() > -4 * error
    assert errors["structured"] <= 0.05
    assert errors["independent"] > 1.5 * errors["structured"]


@pytest.mark.slow
def test_the_librarys_own_parts_reach_the_same_from_data_alone() -> None:
    """An unrolled encoder, ``fit``, ``SparseELBO`` and ``enumerate_posterior`` put together."""
    torch.manual_seed(0)
    atoms = correlated_atoms()
    dictionary = Dense(K, D, atoms=atoms)
    dictionary.freeze_()
    likelihood, prior = Gaussian(NOISE), SpikeAndSlab(dist.Normal(0.0, 1.0), PROBS)
    model = SparseCoding(dictionary, likelihood, prior)
    with torch.no_grad():
        y, fresh = model(num_data=20_000), model(num_data=300)
    exact = enumerate_posterior(fresh, dictionary, prior, likelihood)
    own = [Dense(K, D, atoms=atoms) for _ in range(2)]
    unrolled = Unrolled(dictionary, likelihood, num_steps=10, analysis=own[0], synthesis=own[1])
    encoder = UnrolledEncoder(unrolled, dist.Laplace(0.0, 0.3), init_probs=PROBS)
    guide = StructuredThresholded(encoder, atoms @ atoms.T)
    fit(
        model,
        guide,
        y,
        loss=SparseELBO(LeaveOneOut(), num_samples=4),
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        schedule=partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5),
        epochs=6,
        batch_size=200,
        progress=False,
    )
    with torch.no_grad():
        found = guide.posterior(fresh).marginals(500).prob_active
    error = float((found - exact.prob_active).abs().mean())
    best = coordinate_ascent(fresh, dictionary, prior, likelihood)
    factorised = float((best.prob_active - exact.prob_active).abs().mean())
    print(f"structured {error:.4f}, best factorised {factorised:.4f}")
    assert error <= 0.05
    objective = SparseELBO(LeaveOneOut(), num_samples=20)
    bounds = torch.tensor([-objective.loss(model, guide, fresh) for _ in range(10)]) / len(fresh)
    gap = float(exact.log_evidence.mean() - bounds.mean())
    assert gap > -4 * float(bounds.std()) / 10**0.5
    assert gap < float((exact.log_evidence - best.elbo).mean()) / 2
