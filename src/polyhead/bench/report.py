"""Tables of benchmark results for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from polyhead.bench.results import BenchResult, CaseResult, Target, VariantResult

__all__ = ["print_result"]


def print_result(result: BenchResult, console: Console) -> None:
    """Print the machine, its ceilings, one table per case, and a summary table."""
    console.print(str(result.machine), highlight=False)
    ceilings = ", ".join(str(ceiling) for ceiling in result.ceilings)
    console.print(f"ceilings: {ceilings}", highlight=False)
    if result.left_out:
        console.print(f"left out: {', '.join(result.left_out)}", highlight=False)
    for case in result.cases:
        console.print()
        console.print(_case_table(case, result.warnings))
        for variant in case.variants:
            if variant.refused:
                verb = "is wrong, so it is not measured" if variant.wrong else "is not measured"
                why = "; ".join(variant.refused)
                console.print(f"  {variant.name} {verb}: {why}", highlight=False, soft_wrap=True)
    if len(result.cases) > 1:
        console.print()
        console.print(_summary(result))


def _case_table(case: CaseResult, warnings: tuple[str, ...]) -> Table:
    """Table of one case: polyhead first, then its peers; the speed-up is polyhead's over them."""
    checked = f"checked against float64: {case.gate}"
    if case.ceiling:
        checked += f"; ceiling: {case.ceiling}"
    if case.others_share is not None:
        checked += f"; other processes took {case.others_share:.1%} of the processors"
    table = Table(
        title=f"{case.id}: {case.what}",
        title_justify="left",
        caption="\n".join([*warnings, checked]),
        caption_justify="left",
    )
    table.add_column("")
    columns = ["ms", "quartiles", "speed-up"]
    columns += [case.unit] if case.unit else []
    columns += ["ceiling"] if case.ceiling else []
    has_memory = any(variant.memory_mib is not None for variant in case.variants)
    columns += ["MiB"] if has_memory else []
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for variant in case.variants:
        if variant.milliseconds is not None:
            table.add_row(*_cells(variant, case, has_memory))
    return table


def _cells(variant: VariantResult, case: CaseResult, has_memory: bool) -> list[str]:
    assert variant.milliseconds is not None
    assert variant.lower is not None
    assert variant.upper is not None
    over = None if variant.ours else case.speedup_over(variant.name)
    cells = [
        f"{variant.name} ({variant.backend})" if variant.backend else variant.name,
        _number(variant.milliseconds),
        f"{_number(variant.lower)}–{_number(variant.upper)}",
        "" if over is None else f"{over:.2f}x",
    ]
    if case.unit:
        cells.append("" if variant.rate is None else _number(variant.rate))
    if case.ceiling:
        cells.append("" if variant.share is None else f"{variant.share:.0%}")
    if has_memory:
        cells.append("" if variant.memory_mib is None else f"{variant.memory_mib:.1f}")
    return cells


def _summary(result: BenchResult) -> Table:
    table = Table(
        title="All cases",
        title_justify="left",
        caption="\n".join(result.warnings) or None,
        caption_justify="left",
    )
    table.add_column("case", no_wrap=True)
    for column in ("polyhead", "best peer", "speed-up"):
        table.add_column(column, justify="right")
    table.add_column("wanted: got")
    for case in result.cases:
        ours, best, speedup = case.ours, case.best_peer, case.speedup_over("best")
        table.add_row(
            case.id,
            "not measured" if ours is None else f"{_number(ours.milliseconds or 0.0)} ms",
            "" if best is None else f"{best.name} {_number(best.milliseconds or 0.0)} ms",
            "" if speedup is None else f"{speedup:.2f}x",
            Text("\n").join(_verdict(target) for target in case.targets),
        )
    return table


def _verdict(target: Target) -> Text:
    """One target: wanted, got, and the verdict in words, not in color only."""
    share = target.what.startswith("of ")

    def shown(value: float) -> str:
        return f"{value:.0%}" if share else _number(value)

    got = "not measured" if target.got is None else shown(target.got)
    said = {None: "not judged", True: "met", False: "missed"}[target.met]
    style = {None: "", True: "green", False: "red"}[target.met]
    return Text(f"{shown(target.wanted)} {target.what}: {got}, {said}", style=style)


def _number(value: float) -> str:
    """Format with three significant digits, without exponent."""
    if value >= 100:
        return f"{value:.0f}"
    digits = 1 if value >= 10 else 2 if value >= 1 else 3 if value >= 0.1 else 4
    return f"{value:.{digits}f}"
