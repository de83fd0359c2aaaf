"""`polyhead run`: both multi-head mechanisms on one layer of a real model."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from polyhead.cli.options import read_text
from polyhead.cli.parameters import ReadablePath
from polyhead.tour import HeadRow, RunReport, run
from polyhead.viewer.colors import colored
from polyhead.viewer.tables import print_table

__all__ = ["run_command"]

_LEAST = 78  # columns of the tables of numbers


@click.command("run")
@click.argument("text", required=False)
@click.option(
    "--file",
    type=ReadablePath(),
    help="Read the text from this file.",
)
@click.option("--model", help="A folder, a GGUF file or a hub id; default SmolLM2-135M-Instruct.")
@click.option("--layer", type=int, help="Which attention layer, from 0; default the middle one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def run_command(
    text: str | None, file: Path | None, model: str | None, layer: int | None, as_json: bool
) -> None:
    """Read TEXT with a real model, one layer of it by both mechanisms of the lecture.

    TEXT is the text itself, or - for standard input, or left out with --file.
    """
    words = read_text(text, file)
    with Console(stderr=True).status("starting") as status:
        report = run(words, model=model, layer=layer, progress=status.update)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
    else:
        _print_report(report, Console())


def _print_report(report: RunReport, console: Console) -> None:
    console.print(
        f"{report.model}, layer {report.layer} of {report.num_layers}: {report.num_heads} query "
        f"heads over {report.num_kv_heads} key/value heads, {report.tokens} tokens, "
        f"{report.threads} threads",
        highlight=False,
        soft_wrap=True,
    )
    print_table(console, _mechanism_table(report), _LEAST)
    stacked, split = report.mechanisms[:2]
    console.print(
        f"Stacked and split differ by {split.difference:.1e} at most, in outputs {split.output}; "
        f"query weights {stacked.query_weights} and {split.query_weights}.",
        highlight=False,
    )
    if report.compared_tokens < report.tokens:
        console.print(f"Compared on the first {report.compared_tokens} tokens.", highlight=False)
    print_table(console, _head_table(report), _LEAST)
    console.print(_next_token_table(report))
    console.print(
        "Step by step on small numbers: polyhead lesson --open\n"
        'Every head of the model on a text: polyhead look "your text" --open',
        highlight=False,
        soft_wrap=True,
    )


def _mechanism_table(report: RunReport) -> Table:
    table = Table(
        title="The same attention, three ways: median time, largest error against float64",
        title_justify="left",
    )
    table.add_column("mechanism", no_wrap=True)
    table.add_column("backend")
    for heading in ("time", "vs stacked", "error"):
        table.add_column(heading, justify="right")
    for row in report.mechanisms:
        table.add_row(
            row.mechanism,
            row.backend,
            f"{row.median_ms:.2f} ms",
            f"{row.speedup:.2f}x",
            f"{row.largest_error:.1e}",
        )
    return table


def _head_table(report: RunReport) -> Table:
    """One line per head; shares are colored from 0 to 1, others up to the largest possible."""
    table = Table(title="Attention of each head, on average", title_justify="left")
    table.add_column("head", justify="right")
    for heading in ("first token", "previous", "itself", "mean distance", "entropy (nats)"):
        table.add_column(heading, justify="right")
    most_distance = max(head.mean_distance for head in report.heads) or 1.0
    most_entropy = math.log(report.tokens) or 1.0
    for head in report.heads:
        table.add_row(str(head.head), *_head_cells(head, most_distance, most_entropy))
    return table


def _head_cells(head: HeadRow, most_distance: float, most_entropy: float) -> list[Text]:
    shares = [head.mass_first, head.mass_previous, head.mass_self]
    return [
        *(colored(f" {share:6.1%} ", share) for share in shares),
        colored(f" {head.mean_distance:7.1f} ", head.mean_distance / most_distance),
        colored(f" {head.entropy:6.2f} ", head.entropy / most_entropy),
    ]


def _next_token_table(report: RunReport) -> Table:
    table = Table(title="The most likely next tokens", title_justify="left")
    table.add_column("polyhead in every layer")
    table.add_column("the model's own attention")
    for ours, own in zip(report.next_polyhead, report.next_own, strict=True):
        cells = (f"{token.probability:6.2%}  {token.text!r}" for token in (ours, own))
        table.add_row(*(Text(cell) for cell in cells))
    return table
