"""Tables of laws: documented, selectable, with a current page."""

import runpy
from pathlib import Path

import pytest

import polyhead as ph
from polyhead.check.law import Law, Outcome, broken, holds
from polyhead.check.laws import FUNCTION_LAWS, MODULE_LAWS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("law", [*MODULE_LAWS.values(), *FUNCTION_LAWS.values()], ids=str)
def test_law_docstring_has_requirement_reason_and_bug(law):
    required, why, caught = law.paragraphs
    assert required.endswith(".")
    assert why.startswith("Why: ")
    assert caught.startswith("Would have caught: ")


def test_page_of_laws_is_current():
    script = runpy.run_path(str(ROOT / "scripts/write_laws.py"))
    assert script["page"]() == (ROOT / "docs/laws.md").read_text("utf-8")


def raising(error):
    def law(subject):
        raise error

    return Law("law", law)


def test_exception_breaks_a_law_and_refusal_is_reported():
    verdict = raising(RuntimeError("no such size\nand more")).judge(None)
    assert verdict.outcome is Outcome.BROKEN
    assert verdict.message == "the call raised RuntimeError: no such size"
    verdict = raising(NotImplementedError("not on this device")).judge(None)
    assert verdict.outcome is Outcome.REPORTED
    assert verdict.message == "refused: not on this device"


def test_verdict_outcomes():
    assert holds().outcome is Outcome.HOLDS
    assert broken("why", at=3).evidence == {"at": 3}


def test_only_with_unknown_law_raises():
    mha = ph.MultiHeadAttention(8, 8, 8, 0.0, 2)
    with pytest.raises(ph.errors.ArgumentError, match=r"must name laws: .*; got no_such_law"):
        ph.check.check_module(mha, only=["no_such_law"])
