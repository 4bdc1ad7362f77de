"""A finding quotes an exception, not all that it has to say."""

import torch
from torch import Tensor, nn

from pyro_sparse.testing import check_dictionary, check_model
from pyro_sparse.testing.advice import gather, short
from tests.testing.test_parts import Broken


def test_a_message_of_usual_length_is_quoted_whole() -> None:
    table = "Expected equal sites, got\n" + 6 * "  codes  (4, 8) in [data]  (4, 9) in [data]\n"
    assert short(ValueError(table)) == table.strip()
    assert short(ValueError()) == ""


def test_of_a_long_message_the_first_line_is_kept() -> None:
    shapes = "\n".join(f"  site_{i} dist 3 2 | value 3 2 |" for i in range(100))
    assert short(ValueError(f"mismatch at site 'obs'\n{shapes}")) == "mismatch at site 'obs' ..."


def test_a_first_line_that_only_announces_is_kept_with_the_next() -> None:
    values = "\n".join(["while computing log_prob:", "expected positive numbers", *["0.1"] * 1000])
    assert short(ValueError(values)) == "while computing log_prob: expected positive numbers ..."


def test_a_long_line_is_cut_between_words() -> None:
    said = short(ValueError("word " * 1000))
    assert said.endswith("word ...") and len(said) <= 204
    assert short(ValueError("x" * 1000)) == "x" * 200 + " ..."


LONG = "so much to say\n" + "and more of it\n" * 100


class Talkative(nn.Module):
    """A program that cannot draw, and says so at length."""

    def forward(self, y: Tensor | None, num_data: int | None = None) -> None:
        if y is None:
            raise ValueError(LONG)


def test_findings_quote_the_head() -> None:
    def fails() -> str:
        raise RuntimeError(LONG)

    (found,) = gather("any", {"one": fails}).findings
    assert found.advice == "raised RuntimeError: so much to say ..."
    drawn = {f.check: f.advice for f in check_model(Talkative(), torch.zeros(2, 3)).findings}
    assert drawn["prior draws"] == "model(None, 2) does not draw data: so much to say ..."


def test_why_something_cannot_be_saved_is_quoted_by_its_head(monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise TypeError(LONG)

    monkeypatch.setattr("pyro_sparse.testing.saving.save", refuse)
    found = {f.check: f.advice for f in check_dictionary(Broken("none")).findings}
    assert found["save and load"] == "Cannot be saved: so much to say ..."
