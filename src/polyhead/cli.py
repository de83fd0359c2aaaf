"""The `polyhead` command. Each subcommand reads its arguments, calls one function and prints."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import click
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    print(f'polyhead needs {error.name} on the command line: pip install "polyhead[cli]"')
    raise SystemExit(2) from None

from polyhead.bench import SUITES, Settings, find_cases, run_bench
from polyhead.bench.memory import check_memory_is_told
from polyhead.bench.plot import check_can_plot, plot
from polyhead.bench.report import print_result
from polyhead.check.command import check_target, list_laws
from polyhead.convert import convert_file
from polyhead.convert.state_dict import LAYOUTS
from polyhead.errors import ArgumentError, PolyheadError
from polyhead.run import HeadRow, RunReport, run

__all__ = ["main"]

# Dark blue to yellow through green, the order of viridis: told apart by the colour-blind too.
_SCALE = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def _in_a_folder(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Refuse a file that could not be written, before minutes of work for it."""
    if value is not None and not value.parent.is_dir():
        raise click.BadParameter(f"there is no folder {str(value.parent)!r}")
    return value


_NEW_FILE: dict[str, Any] = {
    "type": click.Path(dir_okay=False, writable=True, path_type=Path),
    "callback": _in_a_folder,
}


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


@main.command("run")
@click.argument("text", required=False)
@click.option("--file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", help="A folder, a GGUF file or a hub id; default SmolLM2-135M-Instruct.")
@click.option("--layer", type=int, help="Which attention layer, from 0; default the middle one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def run_command(
    text: str | None, file: Path | None, model: str | None, layer: int | None, as_json: bool
) -> None:
    """Read TEXT with a real model, one layer of it by both mechanisms of the lecture.

    TEXT is the text itself, or - for standard input, or left out with --file.
    """
    words = _read_text(text, file)
    with Console(stderr=True).status("starting") as status:
        report = run(words, model=model, layer=layer, progress=status.update)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
    else:
        _print_report(report, Console())


@main.command("bench")
@click.option("--suite", type=click.Choice(list(SUITES)), help="Which cases; default quick.")
@click.option("--case", "ids", multiple=True, help="One case, such as P5; may be repeated.")
@click.option("--json", "json_path", **_NEW_FILE, help="Write every number into this file.")
@click.option("--plot", "plot_path", **_NEW_FILE, help="Draw the results into this file.")
@click.option("--memory", is_flag=True, help="Measure peak memory too, in processes of their own.")
@click.option("--threads", type=click.IntRange(min=1), help="For every peer; default torch's.")
@click.option("--rounds", type=click.IntRange(min=5), help="The least rounds of each case.")
@click.option("--seconds", type=click.FloatRange(min=0), help="The least seconds of each case.")
@click.option("--without", multiple=True, metavar="PEER", help="Leave out peers; may be repeated.")
@click.option("--anyway", is_flag=True, help="Measure although other processes are busy.")
@click.option("--shrink", type=click.IntRange(min=1), default=1, help="Divide sizes: a trial run.")
def bench_command(
    suite: str | None,
    ids: tuple[str, ...],
    json_path: Path | None,
    plot_path: Path | None,
    memory: bool,
    threads: int | None,
    rounds: int | None,
    seconds: float | None,
    without: tuple[str, ...],
    anyway: bool,
    shrink: int,
) -> None:
    """Measure polyhead beside its peers on this machine.

    Every peer is first held to float64. Exit code 1: polyhead was wrong; 2: it could not be
    measured, because other processes were busy or the options are wrong.
    """
    if suite is not None and ids:
        raise click.UsageError("give either --suite or --case")
    chosen = SUITES[suite or "quick"]
    cases = find_cases(ids) if ids else chosen.select()
    # Found out before, not after, minutes of measuring.
    if memory:
        check_memory_is_told()
    if plot_path is not None:
        check_can_plot()
    settings = Settings(
        rounds=chosen.rounds if rounds is None else rounds,
        seconds=chosen.seconds if seconds is None else seconds,
        threads=threads,
        memory=memory,
        anyway=anyway,
        shrink=shrink,
        without=(*without, *(() if ids else chosen.without)),
    )
    with _progress_bar() as show:
        result = run_bench(cases, settings, show)
    print_result(result, Console())
    if json_path is not None:
        json_path.write_text(result.to_json(), encoding="utf-8")
    if plot_path is not None and result.cases:
        plot(result, plot_path)
    if result.refusal is not None:
        click.echo(f"polyhead: {result.refusal}", err=True)
    sys.exit(1 if result.wrong else 2 if result.refusal else 0)


@main.command("convert")
@click.argument("path", metavar="IN", type=click.Path(exists=True, path_type=Path))
@click.argument("output", metavar="OUT", **_NEW_FILE)
@click.option("--from", "source", type=click.Choice(LAYOUTS), required=True, help="Its layout.")
@click.option("--to", "target", type=click.Choice(LAYOUTS), required=True, help="OUT's layout.")
@click.option("--heads", type=click.IntRange(min=1), help="Query heads, if no config.json says.")
@click.option("--kv-heads", type=click.IntRange(min=1), help="Key/value heads.")
@click.option("--nope-head-dim", type=click.IntRange(min=1), help="DeepSeek's qk_nope_head_dim.")
@click.option("--value-head-dim", type=click.IntRange(min=1), help="DeepSeek's v_head_dim.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
def convert_command(
    path: Path,
    output: Path,
    source: str,
    target: str,
    heads: int | None,
    kv_heads: int | None,
    nope_head_dim: int | None,
    value_head_dim: int | None,
    force: bool,
) -> None:
    """Write the checkpoint IN as OUT, its attention weights in another layout.

    IN is a .safetensors file, a folder with one or with shards and their index, or a .pt file. OUT
    is a .safetensors or .pt file. A config.json beside IN says what the options leave out.
    """
    with _progress_bar() as show:
        report = convert_file(
            path,
            output,
            source=source,
            target=target,
            num_heads=heads,
            num_kv_heads=kv_heads,
            nope_head_dim=nope_head_dim,
            value_head_dim=value_head_dim,
            overwrite=force,
            progress=show,
        )
    click.echo(
        f"{output}: {report.layers} attention layers moved from {source} to {target}, "
        f"{report.unchanged} other tensors as they were, {report.bytes / 1e6:.1f} MB"
    )


@main.command("check")
@click.argument("target", required=False)
@click.option("--arg", "pairs", multiple=True, metavar="NAME=VALUE", help="For the constructor.")
@click.option("--causal/--bidirectional", default=None, help="Whether it hides later tokens.")
@click.option("--window", type=click.IntRange(min=1), help="Tokens a token sees, itself included.")
@click.option("--positions", help='What gives it positions, such as "rope"; or "none".')
@click.option("--d-in", type=click.IntRange(min=1), help="Features of its input.")
@click.option("--mask-true", type=click.Choice(["show", "hide"]), help="What True in a mask means.")
@click.option("--float32", is_flag=True, help="Run the laws in float32: on the kernels that serve.")
@click.option("--compile", is_flag=True, help="Compile it too; takes tens of seconds.")
@click.option("--only", multiple=True, metavar="LAW", help="One law; may be repeated.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of every random number.")
@click.option("--timeout", type=float, default=120.0, show_default=True, help="Seconds in all.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--junit", "junit_path", **_NEW_FILE, help="Write a JUnit file too.")
@click.option("--list", "as_list", is_flag=True, help="Print the laws and what each requires.")
def check_command(
    target: str | None, as_json: bool, junit_path: Path | None, as_list: bool, **options: Any
) -> None:
    """Is this attention right? Holds TARGET, anybody's, to the laws of attention.

    TARGET is path/to/file.py:Name, path/to/notebook.ipynb:Name or package.module:Name; Name is a
    class, an instance or a function of query, key and value. THIS RUNS ITS CODE.

    Exit code 0: all laws hold; 1: some law is broken; 2: it could not be run.
    """
    if as_list:
        click.echo(list_laws())
        return
    if target is None:
        raise click.UsageError("give a TARGET, such as attention.py:MultiHeadAttention")
    with _progress_bar() as show:
        report = check_target(target, progress=show, **options)
    click.echo(json.dumps(report.as_dict(), indent=2) if as_json else str(report))
    if junit_path is not None:
        junit_path.write_text(report.as_junit(), encoding="utf-8")
    sys.exit(report.exit_code)


@contextmanager
def _progress_bar() -> Iterator[Callable[[str, float], None]]:
    """What to call with a step and the share done; cleared at the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda step, done: bar.update(task, description=step, completed=done)


def _read_text(text: str | None, file: Path | None) -> str:
    if (text is None) == (file is None):
        raise click.UsageError("give either TEXT (or - for standard input) or --file")
    if text is not None and text != "-":
        return text
    name = "standard input" if file is None else str(file)
    try:
        data = sys.stdin.buffer.read() if file is None else file.read_bytes()
        # The newline that ends a text file is not part of what the model should go on from.
        return data.decode().removesuffix("\n")
    except OSError as error:
        raise ArgumentError("TEXT", "must be readable", f"{name}: {error}", "check it") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(
            "TEXT", "must be UTF-8", f"{name}: {error}", "convert it, or give another file"
        ) from error


def _print_report(report: RunReport, console: Console) -> None:
    console.print(
        f"{report.model}, layer {report.layer} of {report.num_layers}: {report.num_heads} query "
        f"heads over {report.num_kv_heads} key/value heads, {report.tokens} tokens, "
        f"{report.threads} threads",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_mechanism_table(report))
    if report.compared_tokens < report.tokens:
        console.print(f"Compared on the first {report.compared_tokens} tokens.", highlight=False)
    console.print(_head_table(report))
    console.print(_next_token_table(report))


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
    """One line a head; shares coloured from 0 to 1, the rest up to the largest possible."""
    table = Table(title="What each head looks at, on average", title_justify="left")
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
        *(_coloured(f"{share:6.1%}", share) for share in shares),
        _coloured(f"{head.mean_distance:7.1f}", head.mean_distance / most_distance),
        _coloured(f"{head.entropy:6.2f}", head.entropy / most_entropy),
    ]


def _coloured(text: str, share: float) -> Text:
    """The text on a background that says where `share` stands between 0 and 1."""
    place = min(max(share, 0.0), 1.0) * (len(_SCALE) - 1)
    left = min(int(place), len(_SCALE) - 2)
    part = place - left
    pairs = zip(_SCALE[left], _SCALE[left + 1], strict=True)
    red, green, blue = (round(a + (b - a) * part) for a, b in pairs)
    ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 110 else "white"
    return Text(f" {text} ", style=f"{ink} on rgb({red},{green},{blue})")


def _next_token_table(report: RunReport) -> Table:
    table = Table(title="The most likely next tokens", title_justify="left")
    table.add_column("polyhead in every layer")
    table.add_column("the model's own attention")
    for ours, own in zip(report.next_polyhead, report.next_own, strict=True):
        cells = (f"{token.probability:6.2%}  {token.text!r}" for token in (ours, own))
        table.add_row(*(Text(cell) for cell in cells))
    return table


if __name__ == "__main__":
    sys.exit(main())
