"""Benchmark tables."""

import io

import pytest
from rich.console import Console

from polyhead.bench.report import print_result


@pytest.fixture
def printed():
    def show(result, width=100):
        console = Console(file=io.StringIO(), width=width)
        print_result(result, console)
        return console.file.getvalue()

    return show


def line_of(text, name):
    return next(line for line in text.splitlines() if name in line)


def test_print_result_has_times_speedup_rate_and_share(printed, bench_result):
    text = printed(bench_result())
    assert "P2: forward 1, 2/2, 256, 256, 64, causal(), float32" in text
    assert "ceilings: float32 200 GFLOP/s (float32 matmul)" in text
    cells = [cell.strip() for cell in line_of(text, "sdpa").split("│")[1:-1]]
    assert cells == ["sdpa", "3.00", "2.70–3.30", "1.50x", "66.6", "33%"]
    ours = [cell.strip() for cell in line_of(text, "polyhead (").split("│")[1:-1]]
    assert ours == ["polyhead (reference)", "2.00", "1.80–2.20", "", "100", "50%"]
    assert "checked against float64: all of it; ceiling: float32" in text
    assert "other processes took 1.2%" in " ".join(text.split())


def test_print_result_lists_refused_peers_with_reasons(printed, bench_result):
    text = printed(bench_result())
    assert "  flex is wrong, so it is not measured: output is off by 1\n" in text
    assert "  OpenVINO is not measured: openvino is not installed\n" in text
    assert not any("│" in line for line in text.splitlines() if "flex" in line)


def test_print_result_warns_under_every_table(printed, bench_result, case_result):
    cases = (case_result("P2"), case_result("P3"))
    text = printed(bench_result(*cases, warnings=("trust no number here",)))
    assert text.count("trust no number here") == 3
    assert "left out: flex" in printed(bench_result(left_out=("flex",)))


def test_print_result_targets_are_met_or_missed(printed, bench_result, case_result):
    text = printed(bench_result(case_result("P2"), case_result("P3")), width=160)
    assert "1.20 times as fast as the best peer: 1.50, met" in text
    assert "85% of the ceiling (float32): 50%, missed" in text


def test_print_result_memory_and_missing_units(printed, bench_result, case_result, timed):
    variants = (timed("polyhead", 1234.5, memory_mib=1092.25), timed("sdpa", 0.01234))
    text = printed(bench_result(case_result(unit=None, ceiling=None, variants=variants)))
    ours = [cell.strip() for cell in line_of(text, "│ polyhead").split("│")[1:-1]]
    assert ours == ["polyhead", "1234", "1111–1358", "", "1092.2"]
    assert "GFLOP/s" not in text.partition("P2:")[2]
    assert "0.0123" in line_of(text, "│ sdpa")


def test_print_result_narrow_terminal_keeps_numbers(printed, bench_result, case_result, timed):
    long = timed("a peer with a name that is long", 12345.0, rate=123.0, share=1.0)
    text = printed(bench_result(case_result(variants=(timed("polyhead", 1.0), long))), width=60)
    assert "11110–13580" in text
