"""`polyhead check`: conformance checks from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from polyhead.check.command import check_target, list_laws
from polyhead.cli.options import progress_bar
from polyhead.cli.parameters import NewFile, OneOf

__all__ = ["check_command"]


@click.command("check")
@click.argument("target", required=False)
@click.option(
    "--arg",
    "pairs",
    multiple=True,
    metavar="NAME=VALUE",
    help="For the constructor; config.NAME=VALUE for its configuration.",
)
@click.option("--causal/--bidirectional", default=None, help="Later tokens are masked, or not.")
@click.option(
    "--window", type=click.IntRange(min=1), help="Tokens a token attends to, including itself."
)
@click.option("--positions", help='Source of positions, such as "rope"; or "none".')
@click.option("--num-heads", type=click.IntRange(min=1), help="Number of heads.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="The most tokens it accepts.")
@click.option("--scale", type=float, help="Factor on the scores, if not 1 / sqrt(head_dim).")
@click.option("--d-in", type=click.IntRange(min=1), help="Features of its input.")
@click.option("--mask-true", type=OneOf(["attend", "ignore"]), help="Meaning of True in a mask.")
@click.option("--tokens-first", is_flag=True, help="A function takes (batch, tokens, heads, size).")
@click.option(
    "--float32", is_flag=True, help="Run the laws in float32, on the kernels used in inference."
)
@click.option(
    "--compile", is_flag=True, help="Also check the compiled module; takes tens of seconds."
)
@click.option("--only", multiple=True, metavar="LAW", help="One law; may be repeated.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of every random number.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=120.0,
    show_default=True,
    help="Seconds in all; laws judged by then are printed.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--junit", "junit_path", type=NewFile(), help="Also write a JUnit file.")
@click.option("--list", "as_list", is_flag=True, help="Print every law and its requirement.")
def check_command(
    target: str | None, as_json: bool, junit_path: Path | None, as_list: bool, **options: Any
) -> None:
    """Check an attention module or function, TARGET, against the laws of attention.

    TARGET is path/to/file.py:Name, path/to/notebook.ipynb:Name or package.module:Name; Name is a
    class, an instance or a function of query, key and value. THIS RUNS ITS CODE.

    A constructor that takes a configuration gets one of guessed sizes, of the annotated class:
    --arg config.NAME=VALUE overrides a value (before the dot, the parameter's own name).

    Exit code 0: no law is broken; 1: some law is; 2: it could not run, or not to the end;
    130: stopped by Ctrl-C.
    """
    if as_list:
        click.echo(list_laws())
        return
    if target is None:
        raise click.UsageError("give a TARGET, such as attention.py:MultiHeadAttention")
    try:
        with progress_bar() as show:
            report = check_target(target, progress=show, **options)
    except KeyboardInterrupt:
        click.echo("polyhead: stopped by the user before the first law", err=True)
        sys.exit(130)
    click.echo(json.dumps(report.as_dict(), indent=2) if as_json else str(report))
    if junit_path is not None:
        junit_path.write_text(report.as_junit(), encoding="utf-8")
    sys.exit(report.exit_code)
