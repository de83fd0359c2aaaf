"""The command line: what it prints, and how it refuses."""

import dataclasses
import json

import pytest
from click.testing import CliRunner

import polyhead.cli
import polyhead.run
from polyhead.bench import BenchResult, DisturbedError, VariantResult, run_bench
from polyhead.cli import main


@pytest.fixture
def cli(monkeypatch, smollm2):
    load = polyhead.run.load_model
    monkeypatch.setattr(
        polyhead.run, "load_model", lambda source: smollm2 if source is None else load(source)
    )

    def invoke(*args, **kwargs):
        return CliRunner().invoke(main, ["run", *args], **kwargs)

    return invoke


def test_prints_both_mechanisms_heads_and_next_tokens(cli):
    result = cli("The capital of France is")
    assert result.exit_code == 0, result.output
    assert "stacked heads (3.6.1)" in result.stdout
    assert "weight split (3.6.2)" in result.stdout
    assert "' Paris'" in result.stdout
    assert "layer 15 of 30: 9 query heads over 3 key/value heads, 5 tokens" in result.stdout


def test_json_is_all_that_stdout_holds(cli):
    result = cli("The capital of France is", "--json", "--layer", "3")
    report = json.loads(result.stdout)
    assert report["layer"] == 3
    assert len(report["heads"]) == 9
    assert len(report["mechanisms"]) == 3
    assert report["next_polyhead"][0]["text"] == " Paris"


def test_text_from_standard_input_and_from_a_file(cli, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The capital of France is")
    for args, kwargs in ((("-",), {"input": "The capital of France is"}), (("--file", path), {})):
        result = cli(*map(str, args), "--json", **kwargs)
        assert json.loads(result.stdout)["tokens"] == 5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("",), "TEXT must not be empty"),
        (("x", "--layer", "99"), "--layer must be from 0 to 29; got 99"),
        (("x", "--layer", "two"), "Invalid value for '--layer'"),
        (("x", "--model", "nowhere.gguf"), "nowhere.gguf"),
        ((), "give either TEXT"),
        (("x", "--file", __file__), "give either TEXT"),
        (("--file", "no-such-file.txt"), "no-such-file.txt"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(cli, args, message):
    result = cli(*args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_text_that_is_not_utf8(cli, tmp_path):
    path = tmp_path / "latin1.txt"
    path.write_bytes("café".encode("latin-1"))
    result = cli("--file", str(path))
    assert result.exit_code == 2
    assert "TEXT must be UTF-8" in result.stderr


def test_truncated_model_file(cli, tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    result = cli("x", "--model", str(path))
    assert result.exit_code == 2
    assert "cut.gguf" in result.stderr
    assert "Traceback" not in result.output


@pytest.fixture
def bench(monkeypatch):
    """`bench(*args)`: the command. It calls `bench.run`, and keeps what it asked of it."""

    def invoke(*args):
        return CliRunner().invoke(main, ["bench", *args])

    def remember(cases, settings, progress):
        invoke.cases, invoke.settings = [case.id for case in cases], settings
        return invoke.run(cases, settings, progress)

    invoke.run = run_bench
    monkeypatch.setattr(polyhead.cli, "run_bench", remember)
    return invoke


TRIAL = ("--anyway", "--shrink", "64", "--seconds", "0", "--without", "flex")


def test_bench_prints_tables_and_writes_json_and_a_picture(bench, tmp_path):
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


def test_bench_runs_the_quick_suite_unless_told(bench, monkeypatch):
    monkeypatch.setattr(polyhead.cli, "print_result", lambda result, console: None)
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
    ],
)
def test_bad_bench_options_are_one_message_and_exit_code_2(bench, args, message):
    result = bench(*args)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert not hasattr(bench, "settings")


def test_bench_refuses_to_print_when_other_processes_are_busy(bench):
    def disturbed(*args):
        raise DisturbedError("other processes must take at most 5%")

    bench.run = disturbed
    result = bench("--case", "P2")
    assert result.exit_code == 2
    assert "polyhead: other processes must take at most 5%" in result.stderr
    assert result.stdout == ""


def test_bench_keeps_what_came_before_a_disturbance_and_exits_with_2(bench):
    def disturbed(cases, settings, progress):
        kept = run_bench(cases[:1], settings, progress)
        return dataclasses.replace(kept, refusal="P3: others are busy")

    bench.run = disturbed
    result = bench("--case", "P2", "--case", "P3", *TRIAL)
    assert result.exit_code == 2
    assert "P2: forward" in result.stdout
    assert "polyhead: P3: others are busy" in result.stderr


def test_bench_exits_with_1_when_polyhead_is_wrong(bench):
    def wrong(cases, settings, progress):
        result = run_bench(cases, settings, progress)
        ours = VariantResult("polyhead", True, refused=("output is off by 1",), wrong=True)
        case = dataclasses.replace(result.cases[0], variants=(ours,))
        return dataclasses.replace(result, cases=(case,))

    bench.run = wrong
    result = bench("--case", "P2", *TRIAL)
    assert result.exit_code == 1
    assert "polyhead is wrong, so it is not measured: output is off by 1" in result.stdout


def test_convert_writes_the_other_layout(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    split = polyhead.MultiHeadAttention(6, 4, context_length=8, dropout=0.0, num_heads=2)
    path, output = str(tmp_path / "split.safetensors"), tmp_path / "stacked.safetensors"
    safetensors.save_file(split.state_dict(), path)
    arguments = ["convert", path, str(output), "--from", "split", "--to", "stacked", "--heads", "2"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "1 attention layers moved from split to stacked, 0 other tensors" in result.output
    want = polyhead.convert.split_to_stacked(split).state_dict()
    got = safetensors.load_file(output)
    assert got.keys() == want.keys()
    assert all(got[name].equal(tensor) for name, tensor in want.items())

    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 2
    assert "output must not exist yet" in again.output
    assert CliRunner().invoke(main, [*arguments, "--force"]).exit_code == 0
    unknown = CliRunner().invoke(main, [*arguments[:-4], "--to", "gpt3"])
    assert unknown.exit_code == 2
    assert "'gpt3' is not one of 'polyhead'" in unknown.output
