"""Reports: table, JSON, JUnit, exit code."""

import json
from types import SimpleNamespace
from xml.etree import ElementTree

from polyhead.check import LawResult, Report
from polyhead.check.law import NotApplicable, Outcome, Verdict, broken, holds

HOLDS = LawResult("one", "One.", holds(), 0.5)
BROKEN = LawResult("two", "Two.", broken("off by 3"), 0.25)
LEFT = LawResult("three", "Three.", Verdict(Outcome.NOT_APPLICABLE, "it has no cache"), 0.0)
NOT_RUN = LawResult("four", "Four.", Verdict(Outcome.NOT_RUN, "time was up"), 0.0)


def test_ok_and_exit_code():
    assert NotApplicable("x").args == ("x",)
    for results, stopped, ok, code in (
        ([HOLDS, LEFT], None, True, 0),
        ([HOLDS, BROKEN], None, False, 1),
        ([HOLDS, NOT_RUN], "time was up after 1 s", False, 2),
        ([BROKEN, NOT_RUN], "time was up after 1 s", False, 1),
    ):
        report = Report("x", {}, results, (), stopped)
        assert (report.ok, report.exit_code) == (ok, code)


def test_report_prints_as_a_table():
    report = Report("x.py:Y", {"causal": "yes"}, [HOLDS, BROKEN, LEFT], ["a mask"], None)
    text = str(report)
    assert "BROKEN   two    off by 3" in text
    assert "n/a      three: it has no cache" in text
    assert "1 hold, 1 broken, 1 not applicable, 0 reported, in 0.8 s" in text
    assert text.endswith("Probable cause: a mask")
    assert max(len(line) for line in text.splitlines()) <= 100
    shown = []
    report._repr_pretty_(SimpleNamespace(text=shown.append), False)  # in a notebook's cell
    assert shown == [text]


def test_report_as_json_and_junit():
    report = Report("x.py:Y", {}, [HOLDS, BROKEN, LEFT], ["a mask"], None)
    data = json.loads(json.dumps(report.as_dict()))
    assert [law["verdict"] for law in data["laws"]] == ["holds", "broken", "not applicable"]
    assert data["diagnosis"] == ["a mask"]
    suite = ElementTree.fromstring(report.as_junit())
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "1", "1")
    assert suite.find("testcase/failure").get("message") == "off by 3"
