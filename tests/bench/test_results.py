"""Benchmark results: speed-ups and JSON."""

import json

import pytest

from polyhead.bench.results import SCHEMA, VariantResult


def test_speedup_over_best_and_over_a_named_peer(case_result):
    case = case_result()
    assert case.best_peer.name == "sdpa"
    assert case.speedup_over("best") == 1.5
    assert case.speedup_over("eager") == 4.0


@pytest.mark.parametrize("name", ["flex", "OpenVINO", "nobody"])
def test_speedup_over_an_untimed_peer_is_none(case_result, name):
    assert case_result().speedup_over(name) is None


def test_speedup_of_untimed_polyhead_is_none(case_result, timed):
    wrong = VariantResult("polyhead", True, refused=("output is off by 1",), wrong=True)
    case = case_result(variants=(wrong, timed("sdpa", 3.0)))
    assert (case.ours, case.speedup_over("best")) == (None, None)
    assert case_result(variants=(timed("polyhead", 3.0),)).speedup_over("best") is None


def test_result_is_wrong_only_if_polyhead_is(bench_result, case_result):
    assert not bench_result().wrong
    wrong = VariantResult("polyhead", True, refused=("output is off by 1",), wrong=True)
    assert bench_result(case_result(), case_result(variants=(wrong,))).wrong


def test_result_json_has_everything_and_its_schema(bench_result):
    data = json.loads(bench_result(warnings=("careful",), left_out=("flex",)).to_json())
    assert data["schema"] == SCHEMA == 1
    assert set(data) == {
        *("schema", "machine", "ceilings", "cases", "warnings", "left_out", "refusal"),
        "interrupted",
    }
    assert data["warnings"] == ["careful"]
    (case,) = data["cases"]
    assert set(case) == {
        *("id", "what", "tokens", "unit", "ceiling", "gate", "others_share", "variants"),
        "targets",
    }
    assert set(case["variants"][0]) == {
        *("name", "ours", "backend", "refused", "wrong", "milliseconds", "lower", "upper"),
        *("samples", "rate", "share", "memory_mib"),
    }
    assert case["targets"][0] == {
        "what": "times as fast as the best peer",
        "wanted": 1.2,
        "got": 1.5,
        "met": True,
    }
