"""The `polyhead` command. Each subcommand reads its arguments, calls one function and prints."""

from __future__ import annotations

try:
    import click
    import rich  # noqa: F401
except ImportError as error:
    print(f'polyhead needs {error.name} on the command line: pip install "polyhead[cli]"')
    raise SystemExit(2) from None

from polyhead.cli.bench import bench_command
from polyhead.cli.check import check_command
from polyhead.cli.convert import convert_command
from polyhead.cli.lesson import lesson_command
from polyhead.cli.look import look_command
from polyhead.cli.run import run_command
from polyhead.errors import PolyheadError

__all__ = ["main"]


class _Commands(click.Group):
    """Prints polyhead's errors as one message and exits with 2, as click does for bad usage."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except PolyheadError as error:
            click.echo(f"polyhead: {error}", err=True)
            ctx.exit(2)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="polyhead")
def main() -> None:
    """Multi-head attention: right, fast, seen."""


for command in (
    run_command,
    lesson_command,
    look_command,
    check_command,
    bench_command,
    convert_command,
):
    main.add_command(command)
