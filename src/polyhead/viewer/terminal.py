"""Terminal view of a report: the grid of layers x heads in color, and the highlights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from polyhead.look import HeadReport
from polyhead.look.page.legend import NUMBERS
from polyhead.viewer.colors import colored
from polyhead.viewer.highlights import KINDS, Example, Highlight, highlights
from polyhead.viewer.tables import print_table

__all__ = ["print_report"]

_RECENT = 16  # tokens of `mass_recent`, which defines local heads
_LETTERS = {kind: kind[0].upper() for kind in KINDS}
_WIDE, _NARROW = 7, 2  # columns of a cell: with its number, with a digit
_EXAMPLE_AT = 59  # columns before the example
_LEAST = _EXAMPLE_AT + 13  # of the table, with room for the words of an example
_COLUMNS = ("mass_first", "mass_previous", "mass_recent", "mass_induction", "effective_keys")


def print_report(report: HeadReport, console: Console, by: str = "entropy") -> None:
    """Print the grid of all heads and the ten highlights.

    Args:
        report: a report with token ids and the text of each token.
        by: the statistic that colors the cells, a name in `HeadReport.rows`.
    """
    rows = report.rows()
    scale = _Scale([row[by] for row in rows if by in row], by)
    read = f"{report.model} read {len(report.tokens)} tokens: {len(report.layers)} layers"
    console.print(Text(f"{read}, {len(rows)} heads"), soft_wrap=True)
    for part in (
        _grid(rows, scale, console.width),
        _legend(scale, has_color=console.color_system is not None),
    ):
        console.print()
        console.print(part)
    if len(report.tokens) <= _RECENT:
        console.print("All tokens are among the last 16: local is true of every head.")
    console.print()
    print_table(console, _highlights(report, console.width), _LEAST)


class _Scale:
    """Scale of one statistic over all heads: its range, or 0 to 1 for shares."""

    def __init__(self, values: Sequence[float], by: str) -> None:
        self.by = by
        values = [0.0, 1.0] if NUMBERS[by][1] == "share" or not values else values
        self.least, self.most = min(values), max(values)
        widest = max(abs(self.least), abs(self.most))
        self.decimals = 2 if widest < 10 else 1 if widest < 100 else 0

    def place(self, value: float) -> float:
        return (value - self.least) / ((self.most - self.least) or 1.0)

    def text(self, value: float) -> str:
        return f"{value:.{self.decimals}f}"


def _grid(rows: list[dict[str, Any]], scale: _Scale, width: int) -> Text:
    """One line per layer, one cell per head: its letter, its number, and the number as a color.

    If that is too wide, a digit from 0 to 9 replaces the number; if that is still too wide, the
    heads are split into several blocks.
    """
    cells = {(row["layer"], row["head"]): row for row in rows}
    layers = sorted({layer for layer, _ in cells})
    heads = 1 + max(head for _, head in cells)
    margin = len(f"layer {layers[-1]} ")
    wide = margin + heads * _WIDE <= width
    cell_width = _WIDE if wide else _NARROW
    block = max(1, (width - margin) // cell_width)
    if not wide:
        block = max(5, block // 5 * 5)
    lines = []
    for first in range(0, heads, block):
        chosen = range(first, min(first + block, heads))
        # A narrow column has no room for its head's number: every fifth is labeled.
        numbers = "".join(
            f"{head:>{cell_width}}" if wide else f"{head:<10}" if head % 5 == 0 else ""
            for head in chosen
        )
        lines.append(Text(f"{'head ':>{margin}}{numbers}".rstrip(), "bold"))
        for layer in layers:
            line = Text.assemble((f"{f'layer {layer} ':>{margin}}", "bold"))
            for head in chosen:
                line.append_text(_cell(cells.get((layer, head)), scale, wide))
            lines.append(line)
    return Text("\n", no_wrap=True).join(lines)


def _cell(row: dict[str, Any] | None, scale: _Scale, wide: bool) -> Text:
    letter = "" if row is None else _LETTERS.get(row["name"], "")
    if row is None or scale.by not in row:
        return Text(f" {letter}".ljust(_WIDE) if wide else letter.ljust(_NARROW))
    place = scale.place(row[scale.by])
    if wide:
        return colored(f" {letter}{scale.text(row[scale.by]):>5}", place)
    return colored(f"{letter}{min(int(place * 10), 9)}", place)


def _legend(scale: _Scale, has_color: bool) -> Text:
    label, unit, says = NUMBERS[scale.by]
    label = f"weight on {label}" if unit == "share" else label
    legend = Text("   ".join(f"{letter} {kind}" for kind, letter in _LETTERS.items()) + "\n")
    legend.append(f"{'Color' if has_color else 'Number'}: {label}, from ")
    legend.append(scale.text(scale.least))
    if has_color:
        legend.append(" ")
        for step in range(16):
            legend.append_text(colored(" ", step / 15))
    legend.append(f" to {scale.text(scale.most)}" + ("" if unit == "share" else f" {unit}"))
    return legend.append(f". {says}")


def _highlights(report: HeadReport, width: int) -> Table:
    table = Table(
        title="Highlights: the best heads of each kind",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        caption="first, prev, near, next: its weight on the first token, the one before, the last "
        "16, what came after the same token last time; keys: over how many tokens it spreads.",
        caption_justify="left",
        caption_style="",
    )
    for heading in ("head", "does"):
        table.add_column(heading, no_wrap=True)
    for heading in ("first", "prev", "near", "next", "keys"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("for example", overflow="fold")
    for head in highlights(report):
        numbers = (_number(head, name) for name in _COLUMNS)
        example = _example(head.example, report.tokens, width - _EXAMPLE_AT)
        table.add_row(f"{head.layer}.{head.head}", head.name, *numbers, example)
    return table


def _number(head: Highlight, name: str) -> Text:
    value = head.numbers.get(name)
    decimals = 2 if NUMBERS[name][1] == "share" else 1
    text = "" if value is None else f"{value:.{decimals}f}"
    return Text(text, "bold" if KINDS[head.name] == name else "")


def _example(example: Example | None, tokens: Sequence[str], width: int) -> Text:
    if example is None:
        return Text("none in this text")
    lines = f"{tokens[example.query]!r} looks at", f"{tokens[example.key]!r} ({example.weight:.2f})"
    one = " ".join(lines)
    return Text(one if cell_len(one) <= width else "\n".join(lines))
