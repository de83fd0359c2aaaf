"""The `polyhead` command: the list of its commands, loaded when one is chosen, and how it ends.

A package of its own and not part of polyhead, which imports torch: `polyhead --help` should not.

Exit codes: 0; 1 where what was asked about is not so; 2 for what cannot be done as asked; 130
after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, all after files begun are removed.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import signal
import sys
from typing import Any, NoReturn

try:
    import click
except ImportError:
    print('polyhead needs click on the command line: pip install -e ".[cli]" in a checkout of it')
    raise SystemExit(2) from None

__all__ = ["entry", "main"]

_COMMANDS = {
    "bench": "Measure polyhead beside its peers.",
    "check": "Hold any attention to the laws of attention.",
    "convert": "Move weights between layouts.",
    "lesson": "Show both mechanisms of the lecture computed, step by step.",
    "look": "Show what each head of a model does on a text.",
    "run": "Read a text with one layer of a real model.",
}
_STREAM_ERRORS = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT)


class _Commands(click.Group):
    """Imports a command when it is chosen; ends with one line and the exit code for each error."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0].lower(), _COMMANDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose of {', '.join(_COMMANDS)}"
            ctx.fail(f"No such command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        try:
            module = importlib.import_module(f"polyhead.cli.{cmd_name}")
        except ImportError as error:
            if error.name != "rich":
                raise
            raise click.ClickException(
                'rich is needed: pip install -e ".[cli]" in a checkout of polyhead'
            ) from None
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _interrupted()
        except OSError as error:
            if error.errno not in _STREAM_ERRORS:
                raise
            _stream_failed(error)
        except Exception as error:
            errors = sys.modules.get("polyhead.errors")
            if errors is None or not isinstance(error, errors.PolyheadError):
                raise
            from polyhead_command.wording import in_options

            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            message = str(error) if command is None else in_options(error, command)
            click.echo(f"polyhead: {message}", err=True)
            ctx.exit(2)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="polyhead")
def main() -> None:
    """Multi-head attention: right, fast, seen."""


def entry() -> None:
    """Run the command as a process does."""
    # An exception, so that what writes files removes those it has begun.
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP; nohup ignores it
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, lambda signum, _: sys.exit(128 + signum))
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        _interrupted()
    except OSError as error:
        if error.errno not in _STREAM_ERRORS:
            raise
        _stream_failed(error)


def _interrupted() -> NoReturn:
    click.echo("polyhead: interrupted", err=True)
    raise SystemExit(128 + signal.SIGINT) from None


def _stream_failed(error: OSError) -> NoReturn:
    """End where the output has nowhere to go; a closed pipe (`| head`) is no failure to report."""
    if error.errno != errno.EPIPE:
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"polyhead: {where}{error.strerror}", err=True)
    # What is left in the buffer would fail again when Python flushes it.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    raise SystemExit(1) from None
