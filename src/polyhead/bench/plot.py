"""Plots: shares of the ceiling as bars, and time and memory against length."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from polyhead.bench.results import BenchResult, CaseResult, VariantResult
from polyhead.errors import ArgumentError, DependencyError, did_you_mean, install_command

__all__ = ["check_can_plot", "plot"]


def check_can_plot(path: Path) -> None:
    """Raise if matplotlib is missing, or if it writes no files of this kind.

    Raises:
        DependencyError: matplotlib is not installed.
        ArgumentError: the extension names no format of a plot.
    """
    try:
        import matplotlib  # noqa: F401
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise DependencyError(
            f"matplotlib is needed for --plot: {install_command('bench')}"
        ) from error
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        known = ", ".join(f".{name}" for name in sorted(formats))
        remedy = did_you_mean(path.suffix, known.split(", "), "name it .png")
        raise ArgumentError("--plot", f"must end in one of {known}", str(path), remedy)


def plot(result: BenchResult, path: Path) -> None:
    """Write a plot, in the format of the file's extension, by matplotlib.

    Args:
        result: scale cases (`L256` ... `L131072`) give curves against T, other cases bars.
        path: the file to write.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    check_can_plot(path)
    from matplotlib.figure import Figure

    curves = all(case.id.startswith("L") for case in result.cases)
    figure = Figure(figsize=(11, 5), layout="constrained")
    if curves:
        _curves(result, figure)
    else:
        _bars(result, figure)
    machine = " ".join([result.machine.cpu, *result.machine.features])
    figure.suptitle("\n".join([machine, *result.warnings]), fontsize="small")
    figure.savefig(path, dpi=150)


def _bars(result: BenchResult, figure: Any) -> None:
    """One bar per case, polyhead's; peers are marks on it; the ceiling is a line at 1.

    Cases without a ceiling are left out.
    """
    cases = [case for case in result.cases if any(v.share for v in case.variants)]
    figure.set_size_inches(9, 2 + 0.3 * len(cases))
    axes = figure.subplots()
    ours = [case.ours.share or 0.0 if case.ours else 0.0 for case in cases]
    axes.barh(range(len(cases)), ours, height=0.7, color="#9ebcda", label="polyhead")
    marks: dict[str, list[tuple[float, int]]] = {}
    for place, case in enumerate(cases):
        for variant in case.variants:
            if variant.share and variant is not case.ours:
                marks.setdefault(_kind(variant.name), []).append((variant.share, place))
    shapes = itertools.cycle("osD^vPX<>*hp8d")
    for (name, points), shape in zip(marks.items(), shapes, strict=False):
        shares, places = zip(*points, strict=True)
        axes.scatter(shares, places, marker=shape, s=24, label=name, zorder=3)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(range(len(cases)), [f"{case.id} of {case.ceiling}" for case in cases])
    axes.invert_yaxis()
    axes.set_xlim(0.0, 1.05)
    axes.set_xlabel("share of the ceiling measured in this run")
    if cases:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _kind(name: str) -> str:
    """Use one mark for all modules of the book: they are many, and close together."""
    return "the book's modules" if name.startswith("book: ") else name


def _curves(result: BenchResult, figure: Any) -> None:
    """Time against T, and memory where it was measured, both axes logarithmic."""
    wanted = [("milliseconds", "time (ms)")]
    if any(v.memory_mib is not None for case in result.cases for v in case.variants):
        wanted.append(("memory_mib", "memory beyond the inputs (MiB)"))
    all_axes = figure.subplots(1, len(wanted), squeeze=False)[0]
    for axes, (attribute, label) in zip(all_axes, wanted, strict=True):
        for name in _names(list(result.cases)):
            points = [(c.tokens, getattr(_of(c, name), attribute)) for c in result.cases]
            tokens = [tokens for tokens, value in points if value is not None]
            values = [value for _, value in points if value is not None]
            axes.plot(tokens, values, marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens (T)")
        axes.set_ylabel(label)
        axes.legend(fontsize="small")


def _names(cases: list[CaseResult]) -> list[str]:
    """Names of all peers timed in any case, polyhead first."""
    return list(dict.fromkeys(v.name for c in cases for v in c.variants if v.milliseconds))


def _of(case: CaseResult, name: str) -> VariantResult:
    missing = VariantResult(name, ours=False)
    return next((variant for variant in case.variants if variant.name == name), missing)
