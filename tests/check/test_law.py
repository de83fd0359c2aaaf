"""The tables of laws: documented, selectable, and their page current."""

import runpy
from pathlib import Path

import pytest

import polyhead as ph
from polyhead.check.law import Law, Outcome, broken, holds
from polyhead.check.laws import FUNCTION_LAWS, MODULE_LAWS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("law", [*MODULE_LAWS.values(), *FUNCTION_LAWS.values()], ids=str)
def test_a_law_says_what_it_requires_why_and_what_it_catches(law):
    required, why, caught = law.paragraphs
    assert required.endswith(".")
    assert why.startswith("Why: ")
    assert caught.startswith("Would have caught: ")


def test_the_page_of_laws_is_current():
    script = runpy.run_path(str(ROOT / "scripts/write_laws.py"))
    assert script["page"]() == (ROOT / "docs/laws.md").read_text("utf-8")


def raising(error):
    def law(subject):
        raise error

    return Law("law", law)


def test_what_a_target_raises_breaks_the_law_but_a_refusal_is_a_fact():
    verdict = raising(RuntimeError("no such size\nand more")).judge(None)
    assert verdict.outcome is Outcome.BROKEN
    assert verdict.message == "the call raised RuntimeError: no such size"
    verdict = raising(NotImplementedError("not on this device")).judge(None)
    assert verdict.outcome is Outcome.REPORTED
    assert verdict.message == "refused: not on this device"


def test_verdicts():
    assert holds().outcome is Outcome.HOLDS
    assert broken("why", at=3).evidence == {"at": 3}


def test_a_law_that_does_not_exist():
    mha = ph.MultiHeadAttention(8, 8, 8, 0.0, 2)
    with pytest.raises(ph.errors.ArgumentError, match=r"must name laws: .*; got no_such_law"):
        ph.check.check_module(mha, only=["no_such_law"])
