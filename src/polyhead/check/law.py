"""What a law is, what it may say, and its verdict.

A law is one small function, `law(subject) -> Verdict`. Its docstring has three paragraphs: what is
required; why; and a real bug that it would have caught. `docs/laws.md` is made of them.
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
    """What a law says of its subject."""

    HOLDS = "holds"
    BROKEN = "broken"
    NOT_APPLICABLE = "not applicable"
    REPORTED = "reported"  # a fact that is nobody's fault
    NOT_RUN = "not run"  # time was up, or the user stopped


@dataclass(frozen=True)
class Verdict:
    """An outcome, and a sentence.

    Attributes:
        outcome: see `Outcome`.
        message: the smallest counterexample and what it means; or why the law does not apply.
        evidence: numbers and patterns for the diagnosis.
    """

    outcome: Outcome
    message: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)


class NotApplicable(Exception):  # noqa: N818  (no error: a verdict that any helper may reach)
    """The law asks for something that the subject does not have; the message says what."""


class OutOfTime(NotApplicable):
    """A law has used up its time."""


# For one law. Quick modules need a tenth of a second.
SECONDS = 30.0


@dataclass(frozen=True)
class Law:
    """A named law.

    Attributes:
        name: of its function.
        run: the function.
    """

    name: str
    run: Callable[[Any], Verdict]

    @property
    def paragraphs(self) -> list[str]:
        """What is required, why, and which bug it would have caught."""
        return [" ".join(p.split()) for p in (inspect.getdoc(self.run) or "").split("\n\n")]

    @property
    def required(self) -> str:
        return self.paragraphs[0]

    def __str__(self) -> str:
        return self.name

    def judge(self, subject: object) -> Verdict:
        """Run the law, in modes and a time of its own. What the target raises breaks it, but for
        NotImplementedError: a refusal in so many words is a fact and no wrong answer. A call that
        polyhead refuses, as its arguments break a rule, judges nothing."""
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
        except (Exception, SystemExit) as error:  # whatever unknown code may raise
            said = first_line(error)
            return broken(f"the call raised {type(error).__name__}: {said}", raised=said)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def law(run: Callable[[Any], Verdict]) -> Law:
    """Make a function of a `Subject` or `FunctionSubject` a law."""
    return Law(run.__name__, run)


def holds(message: str = "") -> Verdict:
    return Verdict(Outcome.HOLDS, message)


def broken(message: str, **evidence: Any) -> Verdict:
    return Verdict(Outcome.BROKEN, message, evidence)


def reported(message: str) -> Verdict:
    return Verdict(Outcome.REPORTED, message)
