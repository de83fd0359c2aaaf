"""Report of a check: a table for people, JSON and JUnit for machines."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

from polyhead.check.law import Outcome, Verdict

__all__ = ["STOPPED", "LawResult", "Report"]

STOPPED = "stopped by the user"

_WIDTH = 100
_MARKS = {
    Outcome.HOLDS: "holds",
    Outcome.BROKEN: "BROKEN",
    Outcome.NOT_APPLICABLE: "n/a",
    Outcome.REPORTED: "fact",
    Outcome.NOT_RUN: "not run",
}

_GROUPED = (Outcome.NOT_APPLICABLE, Outcome.NOT_RUN)


@dataclass(frozen=True)
class LawResult:
    """Verdict of one law.

    Attributes:
        law: name of the law.
        required: its requirement, one sentence.
        verdict: its verdict.
        seconds: its run time.
    """

    law: str
    required: str
    verdict: Verdict
    seconds: float


@dataclass(frozen=True)
class Report:
    """Verdicts of all laws. Prints as a table.

    Attributes:
        target: the checked module or function.
        facts: inferred facts about it, with their origin.
        results: one per law, in order.
        diagnosis: the probable causes, the likeliest first.
        stopped: reason why laws did not run ("time limit reached"), or None.
    """

    target: str
    facts: Mapping[str, str]
    results: Sequence[LawResult]
    diagnosis: Sequence[str] = field(default_factory=tuple)
    stopped: str | None = None

    @property
    def failures(self) -> list[LawResult]:
        """Broken laws."""
        return [r for r in self.results if r.verdict.outcome is Outcome.BROKEN]

    @property
    def ok(self) -> bool:
        """True if every law ran and none is broken."""
        return not self.failures and self.stopped is None

    @property
    def exit_code(self) -> int:
        """0: all laws hold; 1: some law is broken; 2: not every law could run; 130: stopped by the
        user (the shell's code for Ctrl-C).
        """
        if self.stopped is None or self.failures:
            return 1 if self.failures else 0
        return 130 if self.stopped == STOPPED else 2

    def count(self, outcome: Outcome) -> int:
        return sum(r.verdict.outcome is outcome for r in self.results)

    def __str__(self) -> str:
        lines = [f"{self.target}"]
        lines += [f"  {name}: {value}" for name, value in self.facts.items()]
        lines.append("")
        wide = max((len(r.law) for r in self.results), default=0)
        for result in self.results:
            if result.verdict.outcome not in _GROUPED:
                head = f"{_MARKS[result.verdict.outcome]:<8} {result.law:<{wide}}  "
                lines += _wrapped(head, result.verdict.message)
        for outcome in _GROUPED:
            for reason, laws in self._by_reason(outcome).items():
                lines += _wrapped(f"{_MARKS[outcome]:<8} ", f"{', '.join(laws)}: {reason}")
        lines += ["", self.summary]
        for cause in self.diagnosis:
            lines += _wrapped("Probable cause: ", cause)
        return "\n".join(lines)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Print as a table in notebooks."""
        printer.text(str(self))

    def _by_reason(self, outcome: Outcome) -> dict[str, list[str]]:
        """Laws of one outcome, grouped by reason."""
        grouped: dict[str, list[str]] = {}
        for r in self.results:
            if r.verdict.outcome is outcome:
                grouped.setdefault(r.verdict.message, []).append(r.law)
        return grouped

    @property
    def summary(self) -> str:
        """Counts of verdicts, in one line."""
        counts = [
            f"{self.count(Outcome.HOLDS)} hold",
            f"{self.count(Outcome.BROKEN)} broken",
            f"{self.count(Outcome.NOT_APPLICABLE)} not applicable",
            f"{self.count(Outcome.REPORTED)} reported",
        ]
        seconds = sum(r.seconds for r in self.results)
        line = f"{', '.join(counts)}, in {seconds:.1f} s"
        return line if self.stopped is None else f"{line}; {self.stopped}"

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a JSON-compatible dict."""
        return {
            "target": self.target,
            "ok": self.ok,
            "facts": dict(self.facts),
            "diagnosis": list(self.diagnosis),
            "stopped": self.stopped,
            "laws": [
                {
                    "law": r.law,
                    "verdict": r.verdict.outcome.value,
                    "message": r.verdict.message,
                    "required": r.required,
                    "seconds": round(r.seconds, 4),
                }
                for r in self.results
            ],
        }

    def as_junit(self) -> str:
        """Return the report as JUnit XML for CI."""
        suite = ElementTree.Element(
            "testsuite",
            name=f"polyhead check {self.target}",
            tests=str(len(self.results)),
            failures=str(len(self.failures)),
            skipped=str(self.count(Outcome.NOT_APPLICABLE) + self.count(Outcome.NOT_RUN)),
            errors="0",
        )
        for r in self.results:
            case = ElementTree.SubElement(
                suite, "testcase", classname=self.target, name=r.law, time=f"{r.seconds:.4f}"
            )
            if r.verdict.outcome is Outcome.BROKEN:
                failure = ElementTree.SubElement(case, "failure", message=r.verdict.message)
                failure.text = "\n".join([r.required, *self.diagnosis])
            elif r.verdict.outcome in (Outcome.NOT_APPLICABLE, Outcome.NOT_RUN):
                ElementTree.SubElement(case, "skipped", message=r.verdict.message)
        ElementTree.indent(suite)
        return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)


def _wrapped(head: str, text: str) -> list[str]:
    """Lines of a table row, with a hanging indent."""
    indent = " " * len(head)
    return textwrap.wrap(head + text, _WIDTH, subsequent_indent=indent) or [head.rstrip()]
