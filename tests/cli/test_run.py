"""`polyhead run`: output and errors."""

import json
import re

import pytest
from click.testing import CliRunner

import polyhead.tour
from polyhead.cli import main


@pytest.fixture
def cli(monkeypatch, smollm2):
    load = polyhead.tour.load_model
    monkeypatch.setattr(
        polyhead.tour,
        "load_model",
        lambda source, **options: smollm2 if source is None else load(source, **options),
    )

    def invoke(*args, **kwargs):
        return CliRunner().invoke(main, ["run", *args], **kwargs)

    return invoke


def test_run_prints_mechanisms_heads_and_next_tokens(cli):
    result = cli("The capital of France is")
    assert result.exit_code == 0, result.output
    assert "stacked heads (3.6.1)" in result.stdout
    assert "weight split (3.6.2)" in result.stdout
    assert "' Paris'" in result.stdout
    text = " ".join(result.stdout.split())
    assert re.search(
        r"Stacked and split differ by \d\.\de[-+]0\d at most, in outputs \(1, 5, 576\)", text
    )
    assert "query weights (9, 64, 576) and (576, 576)." in text
    lesson, look = result.stdout.splitlines()[-2:]
    assert lesson.endswith("polyhead lesson --open")
    assert look.endswith('polyhead look "your text" --open')
    assert "layer 15 of 30: 9 query heads over 3 key/value heads, 5 tokens" in result.stdout


def test_run_json_is_all_of_stdout(cli):
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
def test_run_bad_input_exits_with_2(cli, args, message):
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


def test_run_truncated_model_file_raises(cli, tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    result = cli("x", "--model", str(path))
    assert result.exit_code == 2
    assert "cut.gguf" in result.stderr
    assert "Traceback" not in result.output


def test_run_narrow_terminal_keeps_numbers_whole(cli):
    result = cli("The capital of France is", env={"COLUMNS": "40"})
    assert result.exit_code == 0, result.output
    for whole in ("reference", " ms ", "vs stacked", "entropy (nats)"):
        assert whole in result.stdout
    assert "…" not in result.stdout
