"""`polyhead bench`: output, files and errors."""

import dataclasses
import importlib
import json

import pytest
from click.testing import CliRunner

from polyhead.bench import BenchResult, DisturbedError, VariantResult, run_bench
from polyhead.cli import main

command = importlib.import_module("polyhead.cli.bench")


@pytest.fixture
def bench(monkeypatch):
    """`bench(*args)`: run the command, recording the arguments of `run_bench`."""

    def invoke(*args):
        return CliRunner().invoke(main, ["bench", *args])

    def remember(cases, settings, progress):
        invoke.cases, invoke.settings = [case.id for case in cases], settings
        return invoke.run(cases, settings, progress)

    invoke.run = run_bench
    monkeypatch.setattr(command, "run_bench", remember)
    return invoke


TRIAL = ("--anyway", "--shrink", "64", "--seconds", "0", "--without", "flex")


def test_bench_prints_tables_and_writes_json_and_plot(bench, tmp_path):
    pytest.importorskip("matplotlib")
    json_path, plot_path = tmp_path / "x.json", tmp_path / "x.png"
    outputs = ("--json", str(json_path), "--plot", str(plot_path))
    result = bench("--case", "P2", "--case", "D1", *TRIAL, *outputs)
    assert result.exit_code == 0, result.output
    assert "P2: forward 1, 1/1, 64, 64, 64, causal(), float32" in result.stdout
    assert result.stdout.count("measured with --anyway") == 3
    data = json.loads(json_path.read_text())
    assert [case["id"] for case in data["cases"]] == ["P2", "D1"]
    assert data["warnings"][0].startswith("measured with --anyway")
    assert plot_path.read_bytes().startswith(b"\x89PNG")


def test_bench_default_suite_is_quick(bench, monkeypatch):
    monkeypatch.setattr(command, "print_result", lambda result, console: None)
    bench.run = lambda *args: BenchResult(None, (), ())
    assert bench().exit_code == 0
    assert bench.cases == ["P2", "P5", "D1", "D4", "D4/call", "T1", "M1"]
    assert (bench.settings.rounds, bench.settings.seconds) == (5, 2.0)
    assert bench.settings.without == ("flex", "book: flex")
    assert bench("--suite", "train", "--rounds", "9", "--without", "eager").exit_code == 0
    assert bench.cases == ["T1", "T2", "T3", "T4"]
    assert (bench.settings.rounds, bench.settings.without) == (9, ("eager",))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--case", "P99"), "--case must be one of P1"),
        (("--suite", "slow"), "Invalid value for '--suite'"),
        (("--suite", "full", "--case", "P1"), "give either --suite or --case"),
        (("--rounds", "4"), "4 is not in the range x>=5"),
        (("--threads", "0"), "0 is not in the range x>=1"),
        (("--json", "no-such-folder/x.json"), "there is no folder 'no-such-folder'"),
        (("--plot", "."), "is a directory"),
        (("--plot", "x.pgn"), "--plot must end in one of ."),
        (("--plot", "x.pgn"), "got x.pgn; did you mean '.png'?"),
        (("--plot", "x"), "got x; name it .png"),
        (("--case", "d1"), "got d1; did you mean 'D1'?"),
    ],
)
def test_bench_bad_options_exit_with_2(bench, args, message):
    result = bench(*args)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert not hasattr(bench, "settings")


def test_bench_on_a_busy_machine_refuses(bench):
    def disturbed(*args):
        raise DisturbedError("other processes must take at most 5%")

    bench.run = disturbed
    result = bench("--case", "P2")
    assert result.exit_code == 2
    assert "polyhead: other processes must take at most 5%" in result.stderr
    assert result.stdout == ""


def test_bench_disturbed_keeps_results_and_exits_with_2(bench):
    def disturbed(cases, settings, progress):
        kept = run_bench(cases[:1], settings, progress)
        return dataclasses.replace(kept, refusal="P3: others are busy")

    bench.run = disturbed
    result = bench("--case", "P2", "--case", "P3", *TRIAL)
    assert result.exit_code == 2
    assert "P2: forward" in result.stdout
    assert "polyhead: P3: others are busy" in result.stderr


def test_bench_interrupted_prints_results_and_exits_with_130(bench):
    def interrupted(cases, settings, progress):
        kept = run_bench(cases[:1], settings, progress)
        return dataclasses.replace(kept, refusal="P3: interrupted", interrupted=True)

    bench.run = interrupted
    result = bench("--case", "P2", "--case", "P3", *TRIAL)
    assert result.exit_code == 130
    assert "P2: forward" in result.stdout
    assert "polyhead: P3: interrupted" in result.stderr


def test_bench_wrong_polyhead_exits_with_1(bench):
    def wrong(cases, settings, progress):
        result = run_bench(cases, settings, progress)
        ours = VariantResult("polyhead", True, refused=("output is off by 1",), wrong=True)
        case = dataclasses.replace(result.cases[0], variants=(ours,))
        return dataclasses.replace(result, cases=(case,))

    bench.run = wrong
    result = bench("--case", "P2", *TRIAL)
    assert result.exit_code == 1
    assert "polyhead is wrong, so it is not measured: output is off by 1" in result.stdout


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("xyz", "got 'xyz'; choose one of these"),
        ("fle", "got 'fle'; did you mean 'flex'?"),
        ("polyhead", "got 'polyhead'; "),
    ],
)
def test_bench_without_unknown_peer_names_the_peers(bench, name, hint):
    result = bench("--without", name)
    assert result.exit_code == 2
    assert hint in " ".join(result.stderr.split())
    assert "sdpa, sdpa, gathered" in " ".join(result.stderr.split())
