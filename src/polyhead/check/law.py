"""Laws, verdicts and outcomes.

A law is one small function, `law(subject) -> Verdict`. Its docstring has three paragraphs: the
requirement; why; and a real bug that it would have caught. `docs/laws.md` is generated from them.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from polyhead.check.modes import own_modes
from polyhead.errors import PolyheadError

__all__ = [
    "Law",
    "NotApplicable",
    "OutOfTime",
    "Outcome",
    "Verdict",
    "broken",
    "first_line",
    "holds",
    "law",
    "reported",
]


class Outcome(str, Enum):
    """Outcome of a law for one subject."""

    HOLDS = "holds"
    BROKEN = "broken"
    NOT_APPLICABLE = "not applicable"
    REPORTED = "reported"  # a fact that is not judged
    NOT_RUN = "not run"  # time limit reached, or stopped by the user


@dataclass(frozen=True)
class Verdict:
    """Outcome of a law, and a message.

    Attributes:
        outcome: see `Outcome`.
        message: the smallest counterexample and its meaning; or why the law does not apply.
        evidence: values and patterns for the diagnosis.
    """

    outcome: Outcome
    message: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)


class NotApplicable(Exception):  # noqa: N818  (no error: a verdict that any helper may reach)
    """The subject lacks something that the law requires; the message names it."""


class OutOfTime(NotApplicable):
    """A law exceeded its time."""


# Per law. Quick modules need a tenth of a second.
SECONDS = 30.0


@dataclass(frozen=True)
class Law:
    """A named law.

    Attributes:
        name: name of the function.
        run: the function.
    """

    name: str
    run: Callable[[Any], Verdict]

    @property
    def paragraphs(self) -> list[str]:
        """Requirement, reason, and the bug it would have caught."""
        return [" ".join(p.split()) for p in (inspect.getdoc(self.run) or "").split("\n\n")]

    @property
    def required(self) -> str:
        return self.paragraphs[0]

    def __str__(self) -> str:
        return self.name

    def judge(self, subject: object) -> Verdict:
        """Run the law in its own modes, with its own time limit.

        Any exception of the target breaks the law, except NotImplementedError: an explicit refusal
        is reported. If polyhead refuses the call because an argument breaks a rule, the law is not
        applicable.
        """
        device = getattr(subject, "device", None)
        if hasattr(subject, "deadline"):
            subject.deadline = time.monotonic() + SECONDS
        try:
            with own_modes(device):
                return self.run(subject)
        except NotApplicable as reason:
            return Verdict(Outcome.NOT_APPLICABLE, str(reason))
        except NotImplementedError as error:
            return reported(f"refused: {first_line(error)}")
        except PolyheadError as error:
            return Verdict(
                Outcome.NOT_APPLICABLE, f"polyhead refuses the call: {first_line(error)}"
            )
        except (Exception, SystemExit) as error:  # unknown code may raise anything
            said = first_line(error)
            return broken(f"the call raised {type(error).__name__}: {said}", raised=said)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def law(run: Callable[[Any], Verdict]) -> Law:
    """Decorator that makes a function of a `Subject` or `FunctionSubject` a `Law`."""
    return Law(run.__name__, run)


def holds(message: str = "") -> Verdict:
    return Verdict(Outcome.HOLDS, message)


def broken(message: str, **evidence: Any) -> Verdict:
    return Verdict(Outcome.BROKEN, message, evidence)


def reported(message: str) -> Verdict:
    return Verdict(Outcome.REPORTED, message)
