"""Benchmark plots."""

import sys
from pathlib import Path

import pytest

from polyhead.bench.plot import check_can_plot, plot
from polyhead.errors import DependencyError


@pytest.mark.parametrize("memory", [None, 3.5])
def test_plot_draws_curves_for_scale_and_bars_otherwise(
    bench_result, case_result, timed, tmp_path, memory
):
    pytest.importorskip("matplotlib")
    variants = (
        timed("polyhead", 2.0, memory_mib=memory, share=0.5),
        timed("sdpa", 3.0, share=0.25),
    )
    curves = (case_result("L256", variants=variants), case_result("L512", tokens=512))
    bars = (case_result("P2", variants=variants), case_result("D4", ceiling=None, variants=()))
    for name, cases in (("curves", curves), ("bars", bars)):
        path = tmp_path / f"{name}.png"
        plot(bench_result(*cases, warnings=("careful",)), path)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_raises(bench_result, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DependencyError, match=r'pip install -e "\.\[bench\]"'):
        check_can_plot(Path("x.png"))
    with pytest.raises(DependencyError):
        plot(bench_result(), tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []
