"""Benchmark cases and suites."""

import pytest

from polyhead.bench.suites import CASES, SUITES, find_cases
from polyhead.errors import ArgumentError

ROWS = (
    *("P1", "P2", "P3", "P4", "P5", "P6", "P7", "P8", "W1", "D1", "D2", "D3", "D4", "D5"),
    *("D6", "C1", "T1", "T2", "T3", "T4", "S1", "M1", "M2", "E1"),
)


def rows(cases):
    return list(dict.fromkeys(case.id.partition("/")[0] for case in cases))


def test_full_suite_has_every_row_with_a_target():
    full = SUITES["full"].select()
    assert rows(full) == list(ROWS)
    assert all(case.targets or case.target_us for case in full)


@pytest.mark.parametrize(
    ("suite", "expected"),
    [
        ("quick", ["P2", "P5", "D1", "D4", "T1", "M1"]),
        ("decode", ["D1", "D2", "D3", "D4", "D5", "D6"]),
        ("train", ["T1", "T2", "T3", "T4"]),
        ("module", ["M1", "M2"]),
        ("hf", ["E1"]),
        ("models", ["N1"]),
    ],
)
def test_suites_have_the_documented_cases(suite, expected):
    assert rows(SUITES[suite].select()) == expected


def test_scale_suite_spans_256_to_131072_tokens():
    tokens = [case.T for case in SUITES["scale"].select()]
    assert tokens == [2**power for power in range(8, 18)]


def test_case_ids_are_unique_and_found():
    assert len({case.id for case in CASES}) == len(CASES)
    assert all(find_cases((case.id,)) == (case,) for case in CASES)


def test_find_cases_unknown_id_lists_the_known():
    with pytest.raises(ArgumentError, match=r"--case must be one of P1, P2, .*; got P99;"):
        find_cases(("P1", "P99"))
