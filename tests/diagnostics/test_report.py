"""A report finds planted faults, finds none where there are none, and says what it did not ask."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_sparse.diagnostics import Finding, Report, Thresholds, report, sbc, topics
from pyro_sparse.dictionaries import Conv, Dense
from pyro_sparse.distributions import SpikeAndSlab
from pyro_sparse.guides import Thresholded, UnrolledEncoder, UnrolledFISTA
from pyro_sparse.infer import enumerate_posterior, fit
from pyro_sparse.infer.findings import NotAsked
from pyro_sparse.infer.history import History
from pyro_sparse.likelihoods import Gaussian
from pyro_sparse.models import SparseCoding
from pyro_sparse.solvers import Unrolled

PRIOR = SpikeAndSlab(dist.Normal(0.0, 1.0), probs=0.3)
QUICK = {"num_samples": 200, "refine_steps": 10}
AT_REST = History(step_loss=[1.0 + 0.01 * (-1) ** t for t in range(100)])


class Problem:
    """Data of a model with few atoms, whose posterior is known."""

    def __init__(self, noise: float = 0.3, sd: float = 1.0, atoms: Tensor | None = None) -> None:
        self.atoms = torch.linalg.qr(torch.randn(8, 8))[0][:5] if atoms is None else atoms
        self.dictionary = Dense(5, 8, atoms=self.atoms)
        self.likelihood = Gaussian(noise)  # what the model says; the data have 0.3
        self.model = SparseCoding(self.dictionary, self.likelihood, PRIOR)
        self.sd = sd
        self.codes = PRIOR.sample((100, 5))
        self.y = self.codes @ self.atoms + 0.3 * torch.randn(100, 8)

    def guide(self, y: Tensor, num_data: int, mask: Tensor | None = None) -> None:
        """Exact for orthogonal atoms, if ``sd`` is one."""
        variance = self.likelihood.scale.detach() ** 2 / (1 + self.likelihood.scale.detach() ** 2)
        projected = y @ self.atoms.T
        wide, narrow = (1 + self.likelihood.scale.detach() ** 2).sqrt(), self.likelihood.scale
        odds = dist.Normal(0.0, wide).log_prob(projected) - dist.Normal(0.0, narrow).log_prob(
            projected
        )
        slab = dist.Normal((1 - variance) * projected, self.sd * variance.sqrt())
        with pyro.plate("data", num_data, subsample=torch.arange(len(y))):
            logits = odds.detach() + torch.tensor(0.3).logit()
            pyro.sample("codes", SpikeAndSlab(slab, logits=logits).to_event(1))


def problems(found: Report) -> set[str]:
    return {finding.topic for finding in found.findings if finding.verdict == "problem"}


def test_an_exact_posterior_of_the_true_model_has_no_problem() -> None:
    truth = Problem()
    found = report(
        truth.model, truth.guide, truth.y, history=AT_REST, sbc=200, true_atoms=truth.atoms,
        true_codes=truth.codes, other_atoms=[truth.atoms.flip(0)], num_samples=200,
    )  # fmt: skip
    asked = {f.topic: f.verdict for f in found.findings}
    assert set(asked.values()) == {"fine", "not asked"}
    assert [topic for topic, verdict in asked.items() if verdict == "not asked"] == ["amortisation"]
    assert "needs a guide with a method refine" in found["amortisation"].seen
    assert found.ok and found.lead == "No problem was found in what was asked."


def test_a_guide_that_is_too_narrow_is_found() -> None:
    truth = Problem(sd=0.3)
    options: dict[str, Any] = {"true_codes": truth.codes, "num_samples": 200}
    found = report(truth.model, truth.guide, truth.y, sbc=200, **options)
    assert {"calibration", "true codes"} <= problems(found)
    assert found["weights"].verdict != "fine"
    assert "too narrow" in found["true codes"].advice
    assert "too sure" in found["calibration"].advice
    # 90 % intervals of a normal law with 0.3 of its sd hold 38 %, and more of few draws.
    assert float(found["true codes"].value or 0) > 0.3


@pytest.mark.parametrize("noise", [0.2, 0.5])
def test_a_wrong_noise_scale_is_found_by_the_predictive_check(noise: float) -> None:
    truth = Problem(noise=noise)
    found = report(truth.model, truth.guide, truth.y, sbc=200, num_samples=200)
    assert problems(found) == {"predictive"}  # the guide is the posterior of the wrong model
    assert "log_likelihood" in found["predictive"].seen and "noise" in found["predictive"].advice


def test_dead_and_duplicate_atoms_are_found() -> None:
    base = torch.linalg.qr(torch.randn(8, 8))[0]
    truth = Problem(atoms=base[:5])
    # The third is a copy of the second; of the last nothing is in the data.
    atoms = torch.stack([base[0], base[1], base[1] + 0.1 * base[6], base[3], base[7]])
    data = PRIOR.sample((100, 4)) @ base[[0, 1, 3, 4]] + 0.3 * torch.randn(100, 8)
    data = data - data @ base[7:].T @ base[7:]
    dictionary, likelihood = Dense(5, 8, atoms=atoms), truth.likelihood
    model = SparseCoding(dictionary, likelihood, PRIOR)

    def guide(y: Tensor, num_data: int) -> None:
        law: Any = enumerate_posterior(y, dictionary, PRIOR, likelihood)
        with pyro.plate("data", len(y)):
            pyro.sample("codes", law)

    found = report(model, guide, data, **QUICK)
    assert "atoms" in problems(found)
    assert "1 of 5 dead, 1 duplicate" in found["atoms"].seen
    assert "dead atoms 4." in found["atoms"].advice
    assert re.search("1=2|2=1", found["atoms"].advice)


@pytest.mark.parametrize(
    ("history", "verdict", "says"),
    [
        (AT_REST, "fine", "fell"),
        (History(step_loss=[10 - 0.1 * t for t in range(100)]), "attention", "train longer"),
        (History(step_loss=[100 - t for t in range(100)]), "problem", "train longer"),
        (History(step_loss=[0.3 * t for t in range(100)]), "problem", "loss rises"),
        (History(step_loss=[1.0] * 90 + [float("nan")] * 10), "problem", "learning rate"),
        (History(AT_REST.step_loss, validation_loss=[3.0, 1.0, 4.0]), "problem", "Overfitted"),
        (History(AT_REST.step_loss, faults=["a step"]), "attention", "faults"),
        (History(step_loss=[9.0 * (-1) ** (t // 3) for t in range(100)]), "attention", "noisy"),
        # Epochs tell what noisy steps do not.
        (
            History([9.0 * (-1) ** (t // 3) for t in range(100)], epoch_loss=[1.0, 1.001] * 5),
            "fine",
            "the loss",
        ),
        (History([1.0] * 100, epoch_loss=[20.0 - t for t in range(10)]), "attention", "longer"),
    ],
)
def test_the_end_of_a_training_is_judged(history: History, verdict: str, says: str) -> None:
    found = topics.training(history, Thresholds())
    assert found.verdict == verdict
    assert says in f"{found.seen} {found.advice}"


def test_a_short_training_is_not_judged() -> None:
    with pytest.raises(NotAsked, match="50 steps, got 49"):
        topics.training(History(step_loss=[1.0] * 49), Thresholds())


def normal(y: Tensor, num_data: int) -> None:
    with pyro.plate("data", len(y)):
        codes = pyro.sample("codes", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(codes, 1.0), obs=y)


def posterior(y: Tensor, num_data: int) -> None:
    with pyro.plate("data", len(y)):
        pyro.sample("codes", dist.Normal(y / 2, 0.5**0.5))


def toy() -> tuple[Any, Any, Tensor]:
    return normal, posterior, torch.randn(20)


def pair(steps: int = 4) -> tuple[SparseCoding, Thresholded, Tensor]:
    dictionary, likelihood = Dense(6, 8), Gaussian(0.3)
    model = SparseCoding(dictionary, likelihood, PRIOR)
    with torch.no_grad():
        y = model(num_data=40)
    unrolled = Unrolled(dictionary, likelihood, num_steps=steps)
    return model, Thresholded(UnrolledEncoder(unrolled, dist.Laplace(0.0, 0.3))), y


def test_an_encoder_of_one_layer_gives_evidence_away() -> None:
    dictionary, likelihood = Dense(12, 8), Gaussian(0.1)
    model = SparseCoding(dictionary, likelihood, PRIOR)
    with torch.no_grad():
        y = model(num_data=40)
    unrolled = Unrolled(dictionary, likelihood, num_steps=1)
    guide = Thresholded(UnrolledEncoder(unrolled, dist.Laplace(0.0, 0.3)))
    found = report(model, guide, y, num_samples=200, refine_steps=50)
    assert found["amortisation"].verdict == "problem"
    assert float(found["amortisation"].value or 0) > 1


def test_a_point_estimate_is_told_as_one() -> None:
    prior, likelihood, dictionary = dist.Laplace(0.0, 0.3), Gaussian(0.1), Dense(6, 8)
    model = SparseCoding(dictionary, likelihood, prior)
    with torch.no_grad():
        y = model(num_data=30)
    short = UnrolledFISTA(dictionary, likelihood, prior, num_steps=1)
    long = UnrolledFISTA(dictionary, likelihood, prior, num_steps=300)
    poor, good = (report(model, guide, y, history=AT_REST) for guide in (short, long))
    assert poor["optimality"].verdict == "problem" and good["optimality"].verdict == "fine"
    assert good["training"].verdict == good["codes"].verdict == good["atoms"].verdict == "fine"
    for topic in ("weights", "predictive", "calibration", "P(active)", "true codes"):
        assert good[topic].verdict == "not asked"
    assert "point estimate" in good["weights"].seen
    assert good.facts["posterior"] == "none: point estimate"
    assert "not known: weights, predictive, calibration" in good.lead


class Page(HTMLParser):
    """Checks that tags nest, and collects attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_besides_itself(tmp_path: Path) -> None:
    model, guide, y = pair()
    path = tmp_path / "report.html"
    found = report(
        model, guide, y, history=AT_REST, sbc=60, image_shape=(2, 4), path=path,
        title="<Atoms> & \"codes\"", **QUICK,
    )  # fmt: skip
    text = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    kinds = [tag for tag, _ in page.tags]
    assert kinds.count("h1") == kinds.count("main") == kinds.count("table") == 1
    assert not {"script", "link", "iframe"} & set(kinds)
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == len(found.figures) == 9
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in images)
    assert all(len(str(image["alt"])) > 20 for image in images)
    references = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href")]
    assert all(str(reference).startswith("data:") for reference in references)
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert "&lt;Atoms&gt; &amp; &quot;codes&quot;" in text and "<Atoms>" not in text
    for finding in found.findings:
        assert f'<th scope="row">{finding.topic}</th>' in text


def test_the_text_fits_a_screen(tmp_path: Path) -> None:
    """However bad things are."""
    words = "many words that say what was seen in this place "
    topics = ["training", "weights", "predictive", "calibration", "P(active)", "true codes"]
    topics += ["amortisation", "codes", "atoms", "true atoms", "other seeds"]
    findings = [Finding(t, "problem", words * 2, 1.0, 0.5, "", words * 2) for t in topics]
    worst = Report("A title", tuple(findings), {"data": "200", "ELBO": "-3"}, (), {}, "")
    model, guide, y = pair()
    for found in (worst, report(model, guide, y, sbc=60, **QUICK)):
        lines = str(found).splitlines()
        assert len(lines) <= 40 and max(map(len, lines)) <= 100
    assert str(worst) == worst.text()
    assert worst.save(tmp_path / "worst.html").read_text(encoding="utf-8") == worst.html()


def state(module: nn.Module) -> list[Tensor]:
    return [value.clone() for value in module.state_dict().values()]


def test_a_report_disturbs_nothing_and_comes_out_alike() -> None:
    model, guide, y = pair()
    fit(model, guide, y, epochs=1, progress=False)
    model.eval()
    guide.train()
    guide.encoder.eval()
    guide.zero_grad()
    before, store = state(model) + state(guide), dict(pyro.get_param_store())
    random = torch.random.get_rng_state()
    first = report(model, guide, y, sbc=60, **QUICK)
    assert torch.equal(torch.random.get_rng_state(), random)
    torch.rand(5)  # another state of the generator
    again = report(model, guide, y, sbc=60, **QUICK)
    assert first.text() == again.text()
    assert [p.alt for p in first.pictures] == [p.alt for p in again.pictures]
    assert first.pictures[1].png() == again.pictures[1].png()
    assert all(map(torch.equal, before, state(model) + state(guide)))
    assert all(p.requires_grad and p.grad is None for p in guide.encoder.parameters())
    assert dict(pyro.get_param_store()) == store
    assert not model.training and guide.training and not guide.encoder.training
    other = report(model, guide, y, sbc=60, seed=1, **QUICK)
    assert other.facts["ELBO"] != first.facts["ELBO"]


def test_masks_many_data_and_a_finished_calibration() -> None:
    model, guide, y = pair()
    mask = torch.rand(y.shape) < 0.8
    hidden = torch.where(mask, y, 1e3)
    calibrated = sbc(model, guide, y, num_simulations=60, num_samples=30, progress=False)
    found = report(model, guide, hidden, mask=mask, max_data=25, sbc=calibrated, **QUICK)
    assert found.facts["data"] == "25 of 40"
    assert found.results["khat"].shape == (25,)
    assert found.results["sbc"] is calibrated
    assert "80 simulations" in found["calibration"].seen
    plain = report(model, guide, torch.where(mask, y, -1e3), mask=mask, max_data=25, **QUICK)
    assert plain.facts["ELBO"] == found.facts["ELBO"]


def test_convolutional_codes_are_drawn_as_events() -> None:
    dictionary, likelihood = Conv(2, 1, 5), Gaussian(0.2)
    prior = SpikeAndSlab(dist.Normal(0.0, 1.0), probs=0.05)
    model = SparseCoding(dictionary, likelihood, prior, signal_shape=(1, 20))
    with torch.no_grad():
        y = model(num_data=12)
    unrolled = Unrolled(dictionary, likelihood, num_steps=3)
    guide = Thresholded(UnrolledEncoder(unrolled, dist.Laplace(0.0, 0.3)))
    found = report(model, guide, y, **QUICK)
    assert found.figures["codes"].axes[0].get_xlabel() == "time (samples)"


def test_codes_in_another_order_than_the_truth_are_not_judged() -> None:
    truth = Problem()
    found = report(
        truth.model, truth.guide, truth.y, num_samples=200, true_codes=truth.codes,
        true_atoms=truth.atoms.flip(0),
    )  # fmt: skip
    assert found["true atoms"].verdict == "fine"
    assert found["true codes"].verdict == "not asked" and "order" in found["true codes"].seen


def test_thresholds_move_verdicts() -> None:
    truth = Problem(noise=0.36)
    usual = report(truth.model, truth.guide, truth.y, num_samples=200)
    limits = Thresholds(effect=50.0)
    lenient = report(truth.model, truth.guide, truth.y, num_samples=200, thresholds=limits)
    assert usual["predictive"].verdict == "problem"
    assert lenient["predictive"].verdict == "attention"


def test_errors() -> None:
    model, guide, y = toy()
    with pytest.raises(ValueError, match="num_samples >= 200"):
        report(model, guide, y, num_samples=100)
    with pytest.raises(TypeError, match="history that infer.fit returns"):
        report(model, guide, y, history=[1.0])  # type: ignore[arg-type]
    for wrong in (True, 0.5, "yes"):
        with pytest.raises(TypeError, match="number of simulations"):
            report(model, guide, y, sbc=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sbc >= 50"):
        report(model, guide, y, sbc=5)
    with pytest.raises(TypeError, match="Expected y to be a tensor"):
        report(model, guide, [1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="thresholds"):
        report(model, guide, y, thresholds=0.7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="true_codes of the 20 data"):
        report(model, guide, y, true_codes=torch.zeros(3))
    with pytest.raises(ValueError, match="true_codes of shape"):
        report(model, guide, y, true_codes=torch.zeros(20, 2), num_samples=200)
    with pytest.raises(ValueError, match="seed"):
        report(model, guide, y, seed=-1)
    with pytest.raises(KeyError, match="Expected a topic"):
        report(model, guide, y, num_samples=200)["colour"]
    with pytest.raises(ValueError, match="few"):
        Thresholds(few=2.0)
    with pytest.raises(TypeError, match="nats"):
        Thresholds(nats="one")  # type: ignore[arg-type]
