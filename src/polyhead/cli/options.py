"""What several commands read and show in the same way."""

from __future__ import annotations

import sys
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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

__all__ = ["NEW_FILE", "progress_bar", "read_text", "show_in_browser"]


def _in_a_folder(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Refuse a file that could not be written, before minutes of work for it."""
    if value is not None and not value.parent.is_dir():
        raise click.BadParameter(f"there is no folder {str(value.parent)!r}")
    return value


NEW_FILE: dict[str, Any] = {
    "type": click.Path(dir_okay=False, writable=True, path_type=Path),
    "callback": _in_a_folder,
}


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
        # The newline that ends a text file is not part of what the model should go on from, and
        # neither is the mark that some editors begin it with.
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise ArgumentError("TEXT", "must be readable", f"{name}: {error}", "check it") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(
            "TEXT", "must be UTF-8", f"{name}: {error}", "convert it, or give another file"
        ) from error


@contextmanager
def progress_bar() -> Iterator[Callable[[str, float], None]]:
    """What to call with a step and the share done; cleared at the end.

    It shows the time so far, and the time that is left as the steps so far let expect.
    """
    left = (TimeRemainingColumn(elapsed_when_finished=False), TextColumn("left"))
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), *left)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda step, done: bar.update(task, description=step, completed=done)


def show_in_browser(address: str) -> None:
    """Open a page in the browser, or say where it is."""
    if not webbrowser.open(address):
        click.echo(f"No browser could be opened; the page is {address}", err=True)
