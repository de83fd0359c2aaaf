"""`polyhead look`: per-head analysis of a model on a text."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import click
from rich.console import Console

from polyhead.cli.options import progress_bar, read_text, show_in_browser
from polyhead.cli.parameters import NewFile, OneOf, ReadablePath
from polyhead.errors import DependencyError, install_command
from polyhead.look import HeadReport
from polyhead.look.page import render
from polyhead.look.page.legend import NUMBERS
from polyhead.models.load import load_model
from polyhead.models.text import check_text
from polyhead.viewer.highlights import as_dict, highlights
from polyhead.viewer.page_file import page_file
from polyhead.viewer.reader import read
from polyhead.viewer.terminal import print_report

__all__ = ["look_command"]

_PAGE = Path("heads.html")
_PORT = 8765
_LOOPBACK = "127.0.0.1"
# The next token, the surname, occurs in the first sentence only: induction heads copy it.
_TEXT = (
    "Yusuf Adeyemi paints ships. In the harbour they say that no ship is lost if it was painted "
    "by Yusuf"
)


@click.command("look")
@click.argument("text", required=False)
@click.option(
    "--file",
    type=ReadablePath(),
    help="Read the text from this file.",
)
@click.option("--model", help="A folder, a GGUF file or a hub id; default SmolLM2-135M-Instruct.")
@click.option(
    "--out",
    type=NewFile(),
    help=f"Where to write the page; default {_PAGE}.",
)
@click.option("--force", is_flag=True, help="Replace a file that polyhead did not write.")
@click.option("--open", "open_page", is_flag=True, help="Open the page in the browser.")
@click.option("--terminal", is_flag=True, help="Print the heads; write no page unless --out.")
@click.option(
    "--by",
    type=OneOf(list(NUMBERS)),
    help="Statistic that colors the heads with --terminal; default entropy.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object; no page unless --out."
)
@click.option("--serve", is_flag=True, help="Serve a live page: other texts, heads switched off.")
@click.option("--port", type=click.IntRange(0, 65535), help=f"To serve on; default {_PORT}.")
@click.option("--host", help=f"To serve on; default {_LOOPBACK}, which only this machine reaches.")
@click.option("--max-tokens", type=click.IntRange(min=2), help="Limit with --serve; default 500.")
def look_command(
    text: str | None,
    file: Path | None,
    model: str | None,
    out: Path | None,
    force: bool,
    open_page: bool,
    terminal: bool,
    by: str | None,
    as_json: bool,
    serve: bool,
    port: int | None,
    host: str | None,
    max_tokens: int | None,
) -> None:
    """Analyze each head of a model on TEXT: in a page, in the terminal, or live.

    TEXT is the text itself, or - for standard input, or left out with --file (and with --serve,
    which then begins with a built-in text).
    """
    if serve:
        if out or force or terminal or as_json or by:
            raise click.UsageError("--serve writes and prints nothing: leave out the others")
        words = _TEXT if text is None and file is None else read_text(text, file)
        _serve(
            words, model, host or _LOOPBACK, _PORT if port is None else port, max_tokens, open_page
        )
        return
    if port is not None or host is not None or max_tokens is not None:
        raise click.UsageError("--port, --host and --max-tokens are for --serve")
    if by is not None and not terminal:
        raise click.UsageError("--by is for --terminal")
    if terminal and as_json:
        raise click.UsageError("give either --terminal or --json")
    words = read_text(text, file)
    path = out if out or terminal or as_json else _PAGE
    if open_page and path is None:
        raise click.UsageError("--open needs a page: give --out")
    check_text(words)
    with ExitStack() as stack:
        page = stack.enter_context(page_file(path, replace=force)) if path else None
        with progress_bar() as show:
            show("loading the model", 0.0)
            report = read(words, load_model(model), progress=show).report
            if page is not None:
                show("drawing the page", 1.0)
                page.write(render(report))
    if as_json:
        click.echo(json.dumps(as_dict(report)))
    elif terminal:
        print_report(report, Console(), by or "entropy")
    if path is not None:
        _print_summary(path, report, quiet=terminal or as_json)
        if open_page:
            show_in_browser(path.resolve().as_uri())


def _print_summary(path: Path, report: HeadReport, quiet: bool) -> None:
    heads = sum(len(layer.heads) for layer in report.layers)
    size = path.stat().st_size / 1e6
    click.echo(
        f"{path}: {heads} heads of {report.model} on {len(report.tokens)} tokens, {size:.1f} MB",
        err=quiet,
    )
    if not quiet:
        first = ", ".join(f"{h.layer}.{h.head} ({h.name})" for h in highlights(report, 5))
        click.echo(f"Look first at heads {first}.")


def _serve(
    text: str, model: str | None, host: str, port: int, most: int | None, open_page: bool
) -> None:
    try:
        from polyhead.viewer import server
        from polyhead.viewer.request_guard import is_loopback
        from polyhead.viewer.session import Session
    except ImportError as error:
        package = (error.name or "starlette").partition(".")[0]
        raise DependencyError(
            f"{package} is needed to serve: {install_command('serve')}"
        ) from error
    check_text(text)
    with server.listen(host, port) as listening:  # fail early if the port is taken
        with progress_bar() as show:
            show("loading the model", 0.0)
            seen = Session(load_model(model), text, most or 500, show)
        name, bound = listening.getsockname()[:2]
        address = f"http://{f'[{name}]' if ':' in name else name}:{bound}/"

        def ready() -> None:
            click.echo(f"Look at {address} (Ctrl-C stops)")
            if not is_loopback(host):
                click.echo(
                    "Anyone who can reach this machine on that port can use the model.", err=True
                )
            if open_page:
                show_in_browser(address)

        server.serve(seen, host, listening, ready)
