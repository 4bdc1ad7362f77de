"""One call after a training that tells what is fine, what is not, and what to do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sparse.diagnostics import report_figures as draw
from pyro_sparse.diagnostics import topics
from pyro_sparse.diagnostics.finding import Finding, Thresholds
from pyro_sparse.diagnostics.report_figures import Picture
from pyro_sparse.diagnostics.report_html import page
from pyro_sparse.diagnostics.report_results import Results
from pyro_sparse.diagnostics.sbc import SBC
from pyro_sparse.infer.findings import NotAsked, table
from pyro_sparse.infer.history import History
from pyro_sparse.infer.numbers import check_whole
from pyro_sparse.infer.runs import Program
from pyro_sparse.infer.weighable import check_arguments
from pyro_sparse.ops import check_tensor

COLUMNS = 100
"""Of a report as text."""

FEWEST_DRAWS = 200
"""Draws of which a tail probability of 0.01 can be told."""

_ORDER = ("problem", "attention", "fine", "not asked")
_NEEDED = ("weights", "predictive", "calibration")


@dataclass(frozen=True)
class Report:
    """What a report found.

    Attributes:
        title: Of the page.
        findings: One for each topic; problems first, what was not asked last.
        facts: Numbers without a verdict, in words, by name.
        pictures: Figures with what they show in words.
        results: What diagnostics returned, by name, such as ``"khat"`` or ``"predictive"``.
        made: How the report was made.

    Example:
        >>> bad = Finding("atoms", "problem", "3 of 8 dead", advice="Restart them.")
        >>> report = Report("Toy", (bad, Finding("weights", "fine", "all good")), {}, (), {}, "")
        >>> print(report)
        Toy: 1 problem, 1 fine
          PROBLEM  atoms    3 of 8 dead. Restart them.
          fine     weights  all good
        >>> report.ok, report["atoms"].verdict
        (False, 'problem')
    """

    title: str
    findings: tuple[Finding, ...]
    facts: Mapping[str, str]
    pictures: tuple[Picture, ...] = field(repr=False)
    results: Mapping[str, Any] = field(repr=False)
    made: str

    @property
    def ok(self) -> bool:
        """No problem was found; what was not asked may hold one."""
        return not any(found.verdict == "problem" for found in self.findings)

    @property
    def figures(self) -> dict[str, Any]:
        """Figures of matplotlib, by name."""
        return {picture.name: picture.figure for picture in self.pictures}

    @property
    def lead(self) -> str:
        """What was found, in a sentence or two."""
        named = {
            kind: [f.topic for f in self.findings if f.verdict == kind]
            for kind in ("problem", "attention")
        }
        said = [
            f"{text}: {', '.join(names)}."
            for text, names in (
                ("Problems", named["problem"]),
                ("To be kept in mind", named["attention"]),
            )
            if names
        ]
        if not named["problem"]:
            said.insert(0, "No problem was found in what was asked.")
        missing = [f.topic for f in self.findings if f.verdict == "not asked"]
        open_ones = [topic for topic in _NEEDED if topic in missing]
        if open_ones:
            said.append(f"Not asked, and so not known: {', '.join(open_ones)}.")
        return " ".join(said)

    def __getitem__(self, topic: str) -> Finding:
        """The finding of a topic.

        Raises:
            KeyError: If there is none of that name.
        """
        for found in self.findings:
            if found.topic == topic:
                return found
        raise KeyError(f"Expected a topic of {[f.topic for f in self.findings]}, got {topic!r}.")

    def text(self) -> str:
        """A screen of text, at most 100 columns."""
        counts = [(kind, sum(f.verdict == kind for f in self.findings)) for kind in _ORDER]
        words = {"problem": ("problem", "problems"), "attention": ("to attend to",) * 2}
        told = [f"{n} {words.get(kind, (kind,) * 2)[n > 1]}" for kind, n in counts if n]
        rows = []
        for found in self.findings:
            text = f"{found.seen}. {found.advice}" if found.advice else found.seen
            verdict = "PROBLEM" if found.verdict == "problem" else found.verdict
            rows.append((verdict, found.topic, text))
        facts = "; ".join(f"{name} {value}" for name, value in self.facts.items())
        head = table([("", "", f"{self.title}: {', '.join(told)}")], width=COLUMNS)
        body = table([("", "", facts)], width=COLUMNS) if facts else []
        lines = [line.strip() for line in (*head, *body)]
        return "\n".join([*lines, *table(rows, width=COLUMNS)])

    __str__ = text

    def html(self) -> str:
        """A page that needs nothing besides itself: no network, no script."""
        return page(self.title, self.lead, self.facts, self.findings, self.pictures, self.made)

    def save(self, path: str | Path) -> Path:
        """Write the page.

        Args:
            path: Of the file, in a folder that exists; overwritten if it is there.

        Returns:
            The path.
        """
        path = Path(path)
        path.write_text(self.html(), encoding="utf-8")
        return path


def report(
    model: Program,
    guide: Program,
    y: Tensor,
    *,
    num_data: int | None = None,
    mask: Tensor | None = None,
    history: History | None = None,
    sbc: SBC | int | None = None,
    atoms: Tensor | None = None,
    true_atoms: Tensor | None = None,
    true_codes: Tensor | None = None,
    other_atoms: Sequence[Tensor] | None = None,
    image_shape: Sequence[int] | None = None,
    thresholds: Thresholds | None = None,
    num_samples: int = 1000,
    max_data: int = 200,
    refine_steps: int = 100,
    site: str = "codes",
    plate: str = "data",
    title: str | None = None,
    path: str | Path | None = None,
    seed: int = 0,
    vectorize: bool = True,
) -> Report:
    """Tell the truth about a trained model and guide, on a screen of text and a page of figures.

    ================  ==========================  =============================================
    topic             needs                       asks
    ================  ==========================  =============================================
    ``training``      ``history``                 whether the loss is at rest
    ``weights``                                   ``khat``: the joint posterior of each datum
    ``predictive``                                ``predictive_check``: data like the model's?
    ``calibration``   ``sbc``                     ``sbc``: intervals, on data of the model
    ``P(active)``     ``sbc`` or ``true_codes``   ``reliability``
    ``true codes``    ``true_codes``              intervals, on these data
    ``amortisation``  ``guide.refine``            ``amortisation_gap``
    ``codes``         codes with exact zeros      how many are active, how many in doubt
    ``atoms``         atoms                       ``dictionary_summary``: dead ones, duplicates
    ``true atoms``    ``true_atoms``              ``match_atoms``: which were found
    ``other seeds``   ``other_atoms``             ``stability``
    ``optimality``    a point estimate            how far codes are from the MAP codes
    ================  ==========================  =============================================

    A topic whose needs are not met is listed as not asked. No verdict is stronger than what was
    measured: "fine" says that these data, with so many draws, show no fault. A point estimate (a
    Delta guide) has no posterior; of it the training, codes and atoms are told, and how near the
    codes are to the optimum.

    Both programs run in evaluation mode. That, parameters, running means, Pyro's parameter store
    and torch's random state are afterwards what they were before. Equal arguments give equal
    reports.

    Args:
        model: Generative program, called as in ``infer.log_weights``.
        guide: Variational program with the same latent sites.
        y: Data, shape ``(n, *signal_shape)``: best such that were not trained on.
        num_data: Size of the whole data set; by default ``n``.
        mask: True where a sample was observed, of the shape of ``y``.
        history: What ``infer.fit`` returned.
        sbc: What ``diagnostics.sbc`` found, or how many simulations of it to run, some 500 or more.
            Only for a guide that serves any data, not one with parameters of each datum.
        atoms: Shape ``(atoms, ...)``; by default those of ``model.dictionary``, if there is one, or
            the mean of a sampled site ``"dictionary"``.
        true_atoms: Those that made the data, if known.
        true_codes: Those that made the data, shape ``(n, atoms, *positions)``, in the order, sign
            and scale of the model's own atoms.
        other_atoms: Atoms of trainings from other seeds.
        image_shape: Of dense atoms that are pictures, as in ``plot_atoms``.
        thresholds: What numbers are held against; default ``Thresholds()``, which says why.
        num_samples: Draws at each datum, at least 200.
        max_data: Most data that are looked at; of more, evenly spaced ones. ``num_data`` stays.
        refine_steps: Steps of refining for the amortisation gap; 0 leaves it out. At most 64 data
            are refined.
        site: Name of the codes.
        plate: Name of the plate of the data.
        title: Of the report; default the names of model and guide.
        path: Where to save the page, if anywhere.
        seed: Seed of all draws.
        vectorize: As in ``infer.log_weights``.

    Returns:
        The report: print it, ``.save("report.html")``, or look at ``.findings``.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a number is out of range, a shape does not fit, or ``infer.log_weights``
            would refuse.
        NotImplementedError: As in ``infer.log_weights``.

    References:
        See ``Thresholds``; for the order of questions Gelman et al. (2020), Bayesian workflow,
        arXiv:2011.01808; Yao et al. (2018), ICML, for variational posteriors.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def model(y, num_data):
        ...     with pyro.plate("data", len(y)):
        ...         codes = pyro.sample("codes", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        ...         pyro.sample("obs", dist.Normal(codes, 0.5).to_event(1), obs=y)
        >>> def guide(y, num_data, shrink=1.0):
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("codes", dist.Normal(0.8 * y, shrink * 0.2**0.5).to_event(1))
        >>> y = 1.25**0.5 * torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
        >>> report(model, guide, y, sbc=200, num_samples=200).ok
        True
        >>> narrow = lambda y, num_data: guide(y, num_data, shrink=0.3)
        >>> found = report(model, narrow, y, sbc=200, num_samples=200)
        >>> [finding.topic for finding in found.findings if finding.verdict == "problem"]
        ['weights', 'predictive', 'calibration']
    """
    check_arguments(model, guide, y, num_data, mask, plate)
    check_whole("num_samples", num_samples, FEWEST_DRAWS)
    check_whole("max_data", max_data, 2)
    check_whole("refine_steps", refine_steps, 0)
    check_whole("seed", seed, 0)
    _check_known(history, sbc, thresholds)
    for name, value in (("atoms", atoms), ("true_atoms", true_atoms), ("true_codes", true_codes)):
        if value is not None:
            check_tensor(name, value)
    if true_codes is not None and len(true_codes) != len(y):
        raise ValueError(
            f"Expected true_codes of the {len(y)} data, got {len(true_codes)} of them."
        )
    total = num_data or len(y)
    keep = _rows(len(y), max_data)
    if mask is not None:
        mask = mask.expand(y.shape)[keep]
    limits = Thresholds() if thresholds is None else thresholds
    with _at_rest(model, guide), torch.random.fork_rng():
        torch.manual_seed(seed)
        results = Results(
            model,
            guide,
            y[keep],
            num_data=total,
            mask=mask,
            site=site,
            plate=plate,
            num_samples=num_samples,
            seed=seed,
            vectorize=vectorize,
            refine_steps=refine_steps,
            simulations=sbc,
            given_atoms=atoms,
            true_atoms=true_atoms,
            true_codes=None if true_codes is None else true_codes[keep],
            other_atoms=other_atoms,
            limits=limits,
        )
        found = _findings(results, history, limits)
        pictures = _pictures(results, found, history, image_shape, limits)
        made = Report(
            title=title or f"{_name(model)} with {_name(guide)}",
            findings=tuple(sorted(found.values(), key=lambda f: _ORDER.index(f.verdict))),
            facts=results.facts(len(y)),
            pictures=pictures,
            results=results.computed(),
            made=results.made(),
        )
    if path is not None:
        made.save(path)
    return made


def _findings(results: Results, history: History | None, limits: Thresholds) -> dict[str, Finding]:
    def trained() -> Finding:
        if history is None:
            raise NotAsked("needs history=, what infer.fit returns")
        return topics.training(history, limits)

    asked: dict[str, Callable[[], Finding]] = {
        "training": trained,
        "weights": lambda: topics.weights(results.khat, results.num_samples, limits),
        "predictive": lambda: topics.predictive(results.predictive, limits),
        "calibration": lambda: topics.calibration(results.sbc, limits),
        "P(active)": lambda: topics.prob_active(*results.reliability, limits),
        "true codes": lambda: topics.true_codes(results.ranks_of_truth, limits),
        "amortisation": lambda: topics.amortisation(results.amortisation, limits),
        "codes": lambda: topics.codes(torch.from_numpy(results.codes.prob_active), limits),
        "atoms": lambda: topics.atoms(results.dictionary, limits),
        "true atoms": lambda: topics.recovery(results.recovery, limits),
        "other seeds": lambda: topics.other_seeds(results.stability, limits),
    }
    if results.point:
        asked["optimality"] = lambda: topics.optimality(*results.optimality, limits)
    return {name: _asked(name, ask) for name, ask in asked.items()}


def _asked(name: str, ask: Callable[[], Finding]) -> Finding:
    try:
        return ask()
    except NotAsked as why:
        return Finding(name, "not asked", str(why))


def _pictures(
    results: Results,
    found: Mapping[str, Finding],
    history: History | None,
    image_shape: Sequence[int] | None,
    limits: Thresholds,
) -> tuple[Picture, ...]:
    def dictionary() -> Picture | None:
        try:
            summary = results.dictionary
        except NotAsked:
            summary = None
        return draw.dictionary(results.atoms, summary, image_shape)

    def ranks() -> Picture:
        return draw.ranks(*results.ranks)

    def trained() -> Picture:
        if history is None or not history.step_loss:
            raise NotAsked("no history")
        return draw.loss(history)

    wanted: list[Callable[[], Picture | None]] = [
        trained,
        lambda: draw.khat(results.khat, results.num_samples, found["weights"].seen),
        lambda: draw.predictive(results.predictive, limits.p_value),
        ranks,
        lambda: draw.active(*results.reliability),
        lambda: draw.gap(results.amortisation),
        lambda: draw.some_codes(results.codes, results.true_codes),
        dictionary,
        lambda: draw.usage(results.dictionary, topics.dead_atoms(results.dictionary, limits)),
    ]
    drawn = []
    for make in wanted:
        try:
            picture = make()
        except NotAsked:
            continue
        if picture is not None:
            drawn.append(picture)
    return tuple(drawn)


def _rows(size: int, most: int) -> Tensor:
    number = min(size, most)
    return torch.arange(number) * size // number


def _check_known(history: Any, sbc: Any, thresholds: Any) -> None:
    if not isinstance(history, History | None):
        raise TypeError(
            f"Expected the history that infer.fit returns, got {type(history).__name__}."
        )
    if not isinstance(sbc, SBC | None):
        if isinstance(sbc, bool) or not isinstance(sbc, int):
            raise TypeError(
                "Expected sbc to be what diagnostics.sbc returns, or a number of simulations, got "
                f"{type(sbc).__name__}."
            )
        check_whole("sbc", sbc, 50)
    if not isinstance(thresholds, Thresholds | None):
        raise TypeError(
            f"Expected thresholds to be diagnostics.Thresholds(...), got {type(thresholds)}."
        )


@contextmanager
def _at_rest(*programs: Any) -> Iterator[None]:
    """Evaluation mode, put back afterwards part by part."""
    modules = [program for program in programs if isinstance(program, nn.Module)]
    were = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, training in were:
            part.training = training


def _name(program: Any) -> str:
    if isinstance(program, functools.partial):
        return _name(program.func)
    name = getattr(program, "__name__", type(program).__name__)
    return "a function" if name == "<lambda>" else str(name)
