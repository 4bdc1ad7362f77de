"""What a battery of checks found, in words that say what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pyro_sparse.infer.findings import NotAsked, table

_LONG, _HEAD = 500, 200
"""Characters of a message that is quoted whole, such as a table of sites, and of the head of a
longer one: Pyro lists the shapes of all sites, torch all values that are out of a range."""


class Finding(NamedTuple):
    """What one check found.

    Attributes:
        check: Name of the check.
        ok: Whether it passed; None where it could not be asked.
        advice: What was expected, what came, what to try; where it passed, what was seen.

    Example:
        >>> Finding("shapes", True, "(3,)").ok
        True
    """

    check: str
    ok: bool | None
    advice: str


class Failed(Exception):
    """Raised by a check that found a fault; its message is the advice."""


class Advice(NamedTuple):
    """All findings about one object. As text a table, the faults first.

    Attributes:
        subject: What was checked.
        findings: One for each check, in the order they ran.

    Example:
        >>> print(Advice("Toy", (Finding("shapes", True, "(3,)"), Finding("mean", False, "nan"))))
        Toy: 1 of 2 checks failed
          FAILED  mean    nan
          ok      shapes  (3,)
    """

    subject: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """No check failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(found.check for found in self.findings if found.ok is False)

    def raise_if_failed(self) -> None:
        """For a test of your own.

        Raises:
            AssertionError: If a check failed, with the whole table.
        """
        if self.failed:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        words = {False: "FAILED", None: "-", True: "ok"}
        order = sorted(self.findings, key=lambda found: (False, None, True).index(found.ok))
        head = f"{self.subject}: "
        head += (
            f"{len(self.failed)} of {len(self.findings)} checks failed"
            if self.failed
            else "nothing wrong was found"
        )
        rows = ((words[found.ok], found.check, found.advice) for found in order)
        return "\n".join([head, *table(rows)])


def short(error: BaseException) -> str:
    r"""What an exception says, as a finding quotes it: whole, or the head of a long message.

    Args:
        error: The exception.

    Returns:
        Its message if it has at most 500 characters. Of a longer one the first line, with the next
        where that only announces it by a colon, and of these at most 200 characters and " ...".

    Example:
        >>> short(ValueError("Error at site 'obs':\n" + "0.1, " * 5 + "\n" + 1000 * "0.1, "))
        "Error at site 'obs': 0.1, 0.1, 0.1, 0.1, 0.1, ..."
    """
    message = str(error).strip()
    if len(message) <= _LONG:
        return message
    head, *more = message.splitlines()
    if head.endswith(":") and more:
        head = f"{head} {more[0].strip()}"
    if len(head) > _HEAD:
        head = head[:_HEAD].rsplit(maxsplit=1)[0]
    return f"{head} ..."


def gather(subject: str, checks: dict[str, Callable[[], str]]) -> Advice:
    """Run all checks. One that raises something unforeseen has failed, with that as its advice."""
    findings = []
    for name, check in checks.items():
        try:
            found = Finding(name, True, check())
        except NotAsked as why:
            found = Finding(name, None, str(why))
        except Failed as fault:
            found = Finding(name, False, str(fault))
        except Exception as error:
            found = Finding(name, False, f"raised {type(error).__name__}: {short(error)}")
        findings.append(found)
    return Advice(subject, tuple(findings))
