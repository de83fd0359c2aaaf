"""`polyhead bench`: speed of polyhead and its peers."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import click
from rich.console import Console

from polyhead.bench import SUITES, Settings, find_cases, run_bench
from polyhead.bench.memory import check_memory_is_told
from polyhead.bench.peers.registry import peers_of
from polyhead.bench.plot import check_can_plot, plot
from polyhead.bench.report import print_result
from polyhead.cli.options import progress_bar
from polyhead.cli.parameters import NewFile, OneOf
from polyhead.errors import ArgumentError, did_you_mean

__all__ = ["bench_command"]


@click.command("bench")
@click.option("--suite", type=OneOf(list(SUITES)), help="Which cases; default quick.")
@click.option("--case", "ids", multiple=True, help="One case, such as P5; may be repeated.")
@click.option("--json", "json_path", type=NewFile(), help="Write every number into this file.")
@click.option("--plot", "plot_path", type=NewFile(), help="Draw the results into this file.")
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
    """Measure polyhead and its peers on this machine.

    Every peer is first checked against float64. Exit code 1: polyhead was wrong; 2: it could not
    be measured, because other processes were busy or the options are wrong; 130: stopped by
    Ctrl-C, after the results so far are printed.
    """
    if suite is not None and ids:
        raise click.UsageError("give either --suite or --case")
    chosen = SUITES[suite or "quick"]
    cases = find_cases(ids) if ids else chosen.select()
    # Fail before, not after, minutes of measuring.
    _check_peers(without)
    if memory:
        check_memory_is_told()
    if plot_path is not None:
        check_can_plot(plot_path)
    settings = Settings(
        rounds=chosen.rounds if rounds is None else rounds,
        seconds=chosen.seconds if seconds is None else seconds,
        threads=threads,
        memory=memory,
        anyway=anyway,
        shrink=shrink,
        without=(*without, *(() if ids else chosen.without)),
    )
    with progress_bar() as show:
        result = run_bench(cases, settings, show)
    print_result(result, Console())
    if json_path is not None:
        json_path.write_text(result.to_json(), encoding="utf-8")
    if plot_path is not None and result.cases:
        plot(result, plot_path)
    if result.refusal is not None:
        click.echo(f"polyhead: {result.refusal}", err=True)
    code = 130 if result.interrupted else 2 if result.refusal else 0
    sys.exit(1 if result.wrong else code)


def _check_peers(names: Iterable[str]) -> None:
    cases = [case for suite in SUITES.values() for case in suite.select()]
    peers = sorted({peer.name for case in cases for peer in peers_of(case)} - {"polyhead"})
    for name in names:
        if name not in peers:
            rule = f"must be one of {', '.join(peers)}"
            remedy = did_you_mean(name, peers, "choose one of these")
            raise ArgumentError("--without", rule, repr(name), remedy)
