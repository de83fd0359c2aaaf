"""`polyhead lesson`: both mechanisms step by step, in a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from polyhead.cli.options import show_in_browser
from polyhead.cli.parameters import NewFile, ReadablePath
from polyhead.lesson import lesson
from polyhead.lesson.inputs import read_file, words
from polyhead.lesson.page import render
from polyhead.viewer.page_file import page_file

__all__ = ["lesson_command"]

_PAGE = Path("lesson.html")


@click.command("lesson")
@click.option("--out", type=NewFile(), help=f"Where to write the page; default {_PAGE}.")
@click.option("--force", is_flag=True, help="Replace a file that polyhead did not write.")
@click.option("--open", "opens", is_flag=True, help="Open the page in the browser.")
@click.option(
    "--file",
    type=ReadablePath(),
    help='JSON: rows of numbers, or {"x": rows, "tokens": texts}.',
)
@click.option("--text", help="Up to 12 words; 3 numbers are drawn for each.")
@click.option("--heads", "num_heads", type=int, default=2, show_default=True, help="1 to 4.")
@click.option("--d-out", type=int, default=2, show_default=True, help="Size of one head, 1 to 4.")
@click.option("--seed", type=int, default=123, show_default=True, help="Draws the weights.")
def lesson_command(
    out: Path | None,
    force: bool,
    opens: bool,
    file: Path | None,
    text: str | None,
    num_heads: int,
    d_out: int,
    seed: int,
) -> None:
    """Learn both mechanisms step by step: stacked heads, the weight split, and that they agree.

    Writes one HTML file that needs no network, on the lecture's six tokens or on numbers of yours.
    """
    if file is not None and text is not None:
        raise click.UsageError("give either --file or --text")
    x: Any = None
    tokens: Any = None
    if file is not None:
        x, tokens = read_file(file)
    elif text is not None:
        x, tokens = words(text, 123)
    learned = lesson(x, tokens, d_out=d_out, num_heads=num_heads, seed=seed)
    path = out or _PAGE
    with page_file(path, replace=force) as page:
        page.write(render(learned))
    click.echo(str(learned))
    click.echo(f"{path}: ten steps, {path.stat().st_size / 1e3:.0f} KB; open it in any browser")
    if opens:
        show_in_browser(path.resolve().as_uri())
