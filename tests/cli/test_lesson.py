"""`polyhead lesson`: files, output and errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from polyhead.cli import main, options


@pytest.fixture
def cli(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(main, ["lesson", *map(str, args)])


def data_of(path):
    text = path.read_text("utf-8")
    begin = text.index('id="data">') + len('id="data">')
    return json.loads(text[begin : text.index("</script>", begin)])


def test_lesson_writes_the_page_and_prints_the_steps(cli, tmp_path):
    result = cli()
    assert result.exit_code == 0, result.output
    assert "Lesson(6 tokens of 3 features, 2 heads of 2, seed 123)" in result.stdout
    assert "largest difference of the two" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("lesson.html: ten steps, ")
    assert data_of(tmp_path / "lesson.html")["tokens"][1] == "journey"
    assert cli().exit_code == 0  # a page of ours is replaced


def test_lesson_with_own_numbers_words_and_sizes(cli, tmp_path):
    (tmp_path / "numbers.json").write_text('{"x": [[1, 2], [3, 4]], "tokens": ["a", "b"]}')
    out = tmp_path / "own.html"
    result = cli("--file", "numbers.json", "--out", out, "--heads", 3, "--d-out", 1, "--seed", 5)
    assert result.exit_code == 0, result.output
    data = data_of(out)
    assert (data["x"], data["tokens"], data["heads"]) == ([[1, 2], [3, 4]], ["a", "b"], 3)
    assert (data["size"], data["seed"]) == (1, 5)
    assert cli("--text", "to be or not to be", "--out", out).exit_code == 0
    assert data_of(out)["tokens"] == ["to", "be", "or", "not", "to", "be"]


def test_lesson_open_shows_the_page_in_the_browser(cli, monkeypatch, tmp_path):
    opened = []
    monkeypatch.setattr(options.webbrowser, "open", lambda address: opened.append(address) or True)
    assert cli("--open").exit_code == 0
    assert opened == [(tmp_path / "lesson.html").as_uri()]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--heads", 5), "--heads must be an integer from 1 to 4; got 5"),
        (("--d-out", 0), "--d-out must be an integer from 1 to 4; got 0"),
        (("--text", ""), "--text must have 1 to 12 words"),
        (("--text", "a", "--file", __file__), "give either --file or --text"),
        (("--file", __file__), "--file must be JSON"),
        (("--file", "none.json"), "none.json"),
        (("--out", "no/such/folder.html"), "there is no folder"),
        (("--out", "other.txt"), "must not replace a file that polyhead did not write"),
    ],
)
def test_lesson_bad_input_writes_nothing(cli, tmp_path, args, message):
    (tmp_path / "other.txt").write_text("mine")
    result = cli(*args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["other.txt"]
    assert (tmp_path / "other.txt").read_text() == "mine"


def test_lesson_loads_no_model_library(tmp_path):
    """Limits this process's CPU time, after torch."""
    code = (
        "import sys, time, torch; begin = time.process_time(); import polyhead.cli\n"
        f"sys.argv = ['polyhead', 'lesson', '--out', {str(tmp_path / 'lesson.html')!r}]\n"
        "try: polyhead.cli.main()\nexcept SystemExit: pass\n"
        "heavy = sorted({'transformers', 'torch._dynamo'} & set(sys.modules))\n"
        "print(time.process_time() - begin, *heavy, file=sys.stderr)"
    )
    command, one = [sys.executable, "-c", code], {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=one)
    seconds, *heavy = run.stderr.split()
    assert heavy == []
    assert float(seconds) < 2.0  # 0.7 s where nothing else runs
