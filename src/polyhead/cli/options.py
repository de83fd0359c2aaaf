"""Input and progress bar shared by several commands."""

from __future__ import annotations

import sys
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from polyhead.errors import ArgumentError

__all__ = ["progress_bar", "read_text", "show_in_browser"]


def read_text(text: str | None, file: Path | None) -> str:
    if (text is None) == (file is None):
        raise click.UsageError("give either TEXT (or - for standard input) or --file")
    if text is not None and text != "-":
        return text
    name = "standard input" if file is None else str(file)
    if file is None and sys.stdin is None:
        raise ArgumentError("TEXT", "must be readable", f"{name}, which is closed", "open it")
    try:
        data = sys.stdin.buffer.read() if file is None else file.read_bytes()
        # The model must not continue after the file's final newline, nor read its byte order mark.
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise ArgumentError("TEXT", "must be readable", f"{name}: {error}", "check it") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(
            "TEXT", "must be UTF-8", f"{name}: {error}", "convert it, or give another file"
        ) from error


@contextmanager
def progress_bar() -> Iterator[Callable[[str, float], None]]:
    """Yield a function of a step's description and the fraction done; the bar is cleared after.

    It shows the elapsed time and an estimate of the remaining time.
    """
    left = (TimeRemainingColumn(elapsed_when_finished=False), TextColumn("left"))
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), *left)
    console = Console(stderr=True)
    # Where it cannot move the cursor, rich leaves an empty line behind.
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda step, done: bar.update(task, description=step, completed=done)


def show_in_browser(address: str) -> None:
    """Open a page in the browser, or print its address."""
    if not webbrowser.open(address):
        click.echo(f"No browser could be opened; the page is {address}", err=True)
