"""Peak memory of one call."""

import pytest

from polyhead.bench import memory
from polyhead.bench.memory import (
    MemoryProbeError,
    check_memory_is_told,
    measure_here,
    peak_mebibytes,
)
from polyhead.errors import ArgumentError

pytestmark = pytest.mark.skipif(not memory._CLEAR.exists(), reason="needs /proc of Linux")


def test_measure_here_sees_materialized_scores():
    # 4096 tokens and one head: the scores are 64 MiB, and their softmax as much again. This process
    # has run other tests: some of their freed pages may be reused, and these raise no peak.
    assert 127 <= measure_here("L131072", "eager", 32) < 400
    assert measure_here("L131072", "sdpa", 32) < 64


@pytest.mark.slow
def test_peak_mebibytes_equals_measure_here():
    assert 128 <= peak_mebibytes("L131072", "eager", 32) < 400


def test_peak_mebibytes_failure_has_last_stderr_line(monkeypatch):
    monkeypatch.setattr(memory.sys, "executable", "/bin/false")
    with pytest.raises(MemoryProbeError, match="sdpa's memory on P2 must succeed; got exit code 1"):
        peak_mebibytes("P2", "sdpa", 1)


def test_memory_check_without_proc_raises(monkeypatch, tmp_path):
    check_memory_is_told()
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "none")
    with pytest.raises(ArgumentError, match="--memory must be used on Linux"):
        check_memory_is_told()
