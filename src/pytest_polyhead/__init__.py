"""pytest plugin: `pytest --attention TARGET` checks the laws of attention, one test per law.

A separate module, not part of polyhead: pytest imports every installed plugin, and polyhead would
import torch into test suites that do not use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from polyhead.check import LawResult, Report


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("polyhead", "laws of attention")
    group.addoption(
        "--attention",
        action="append",
        default=[],
        metavar="TARGET",
        help="check FILE.py:NAME, FILE.ipynb:NAME or PACKAGE.MODULE:NAME against the laws of "
        "attention, one test per law; runs its code; may be repeated",
    )
    group.addoption(
        "--attention-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of its constructor; may be repeated",
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """Append the laws of each target to the collected tests."""
    result = yield
    for target in session.config.getoption("attention"):
        node = Target.from_parent(session, name=target)
        items = list(node.collect())
        session.config.hook.pytest_collection_modifyitems(
            session=session, config=session.config, items=items
        )
        session.items.extend(items)
        session.testscollected += len(items)
    return result


class Target(pytest.Collector):
    """Target of one --attention option, loaded and checked at collection."""

    def __init__(self, **options: Any) -> None:
        super().__init__(path=Path(options["name"].rpartition(":")[0]).absolute(), **options)

    def collect(self) -> Iterator[pytest.Item]:
        from polyhead.check.command import check_target
        from polyhead.errors import PolyheadError

        pairs = tuple(self.config.getoption("attention_arg"))
        try:
            report = check_target(self.name, pairs=pairs)
        except PolyheadError as error:
            raise pytest.UsageError(str(error)) from None
        for result in report.results:
            yield LawItem.from_parent(self, name=result.law, result=result, report=report)


class LawItem(pytest.Item):
    """One law of one target."""

    def __init__(self, *, result: LawResult, report: Report, **options: Any) -> None:
        super().__init__(**options)
        self.result = result
        self.report = report

    def runtest(self) -> None:
        from polyhead.check import Outcome

        verdict = self.result.verdict
        if verdict.outcome is Outcome.BROKEN:
            pytest.fail("\n".join([verdict.message, *self.report.diagnosis]), pytrace=False)
        if verdict.outcome in (Outcome.NOT_APPLICABLE, Outcome.NOT_RUN):
            pytest.skip(verdict.message)

    def reportinfo(self) -> tuple[Path, None, str]:
        assert self.parent is not None
        return self.path, None, f"{self.parent.name} {self.name}"
