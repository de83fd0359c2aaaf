"""`polyhead look`: page, output, server and errors."""

import importlib
import json
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
from click.testing import CliRunner

from polyhead.cli import main, options

command = importlib.import_module("polyhead.cli.look")
TEXT = "the cat sat on a mat and the cat saw a dog ."


@pytest.fixture
def look(monkeypatch, tmp_path, tiny_model):
    """`look(*args)`: run the command with a tiny model, in a temporary folder."""
    asked = []

    def load(source):
        asked.append(source)
        return tiny_model

    def invoke(*args, **kwargs):
        return CliRunner().invoke(main, ["look", *args], **kwargs)

    monkeypatch.setattr(command, "load_model", load)
    monkeypatch.chdir(tmp_path)
    invoke.models = asked
    return invoke


def test_look_writes_a_page_and_prints_highlights(look, tmp_path):
    result = look(TEXT)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "heads.html").read_text("utf-8")
    assert page.startswith("<!doctype html>")
    assert '" cat"' in page
    assert 'id="live"' in page
    assert "api/read" not in page  # it sends no requests
    first, second = result.stdout.splitlines()
    assert first.startswith("heads.html: 8 heads of tiny on 13 tokens, 0.1 MB")
    assert second.startswith("Look first at heads ")
    assert second.count("(") == 5
    assert look(TEXT).exit_code == 0  # our own page is replaced


def test_text_from_a_file_and_from_standard_input(look, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT + "\n")
    for args, kwargs in ((("--file", "text.txt"), {}), (("-",), {"input": TEXT})):
        result = look(*args, "--json", "--model", "mine", **kwargs)
        assert "".join(json.loads(result.stdout)["tokens"]) == TEXT
    assert look.models == ["mine", "mine"]
    assert not (tmp_path / "heads.html").exists()


def test_look_json_with_out_writes_both(look, tmp_path):
    result = look(TEXT, "--json", "--out", "here.html")
    assert len(json.loads(result.stdout)["heads"]) == 8
    assert "here.html: 8 heads of tiny" in result.stderr
    assert (tmp_path / "here.html").exists()


def test_look_terminal_by_sets_the_colors(look, tmp_path):
    result = look(TEXT, "--terminal", "--by", "mass_first")
    assert result.exit_code == 0, result.output
    assert "layer 1 " in result.stdout
    assert "Number: weight on first token, from 0.00 to 1.00." in result.stdout
    assert "looks at" in result.stdout
    assert "\x1b" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert not (tmp_path / "heads.html").exists()


def test_look_open_shows_the_page_in_the_browser(look, monkeypatch, tmp_path):
    opened = []
    monkeypatch.setattr(options.webbrowser, "open", lambda address: opened.append(address))
    result = look(TEXT, "--open")
    assert opened == [(tmp_path / "heads.html").as_uri()]
    assert f"No browser could be opened; the page is {opened[0]}" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("",), "TEXT must not be empty"),
        ((), "give either TEXT"),
        ((TEXT, "--file", __file__), "give either TEXT"),
        (("--file", "none.txt"), "none.txt"),
        (("--file", "latin1.txt"), "TEXT must be UTF-8"),
        ((TEXT, "--out", "none/x.html"), "there is no folder 'none'"),
        ((TEXT, "--out", "."), "is a directory"),
        ((TEXT, "--out", "latin1.txt"), "must not replace a file that polyhead did not write"),
        ((TEXT, "--by", "beauty"), "Invalid value for '--by'"),
        ((TEXT, "--by", "lse"), "--by is for --terminal"),
        (("--serve", "--by", "lse"), "--serve writes and prints nothing"),
        (("--serve", "--host", "a..b"), "--host must be a name or an address of this machine"),
        ((TEXT, "--terminal", "--json"), "give either --terminal or --json"),
        ((TEXT, "--json", "--open"), "--open needs a page"),
        ((TEXT, "--port", "80"), "are for --serve"),
        ((TEXT, "--serve", "--out", "x.html"), "--serve writes and prints nothing"),
        (("--serve", "--port", "65536"), "65536 is not in the range"),
    ],
)
def test_look_bad_input_raises_before_loading(look, tmp_path, args, message):
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    result = look(*args)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert look.models == []
    assert [path.name for path in tmp_path.iterdir()] == ["latin1.txt"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("cat", "TEXT must have at least 2 tokens"), ("the " * 65, "at most 64 tokens, the context")],
)
def test_texts_of_the_wrong_length_leave_no_file(look, tmp_path, text, message):
    result = look(text)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def port():
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        return held.getsockname()[1]


@pytest.mark.usefixtures("own_loop")
@pytest.mark.parametrize(("args", "begins"), [((), "Yusuf"), ((TEXT,), "the cat")])
def test_look_serve_runs_until_ctrl_c(look, port, monkeypatch, args, begins):
    told = []

    def visit(address):
        def ask():
            with urllib.request.urlopen(address + "api/start", timeout=10) as answer:
                told.append(json.load(answer))
            signal.raise_signal(signal.SIGINT)

        threading.Thread(target=ask).start()
        return True

    monkeypatch.setattr(options.webbrowser, "open", visit)
    result = look(*args, "--serve", "--port", str(port), "--max-tokens", "30", "--open")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"Look at http://127.0.0.1:{port}/ (Ctrl-C stops)\n"
    assert told[0]["most"] == 30
    assert told[0]["text"].startswith(begins)


def test_look_serve_taken_port_raises_before_loading(look):
    with socket.create_server(("127.0.0.1", 0)) as held:
        result = look("--serve", "--port", str(held.getsockname()[1]))
    assert result.exit_code == 2
    assert "--port must be free on 127.0.0.1" in result.stderr
    assert look.models == []


def test_look_needs_server_packages_only_for_serve():
    code = (
        "import sys; sys.modules['starlette'] = None; from polyhead.cli import main; "
        "assert 'uvicorn' not in sys.modules; main(['look', '--serve'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    install = 'pip install -e ".[serve]" in a checkout of polyhead'
    assert result.stderr == f"polyhead: starlette is needed to serve: {install}\n"


@pytest.mark.slow
def test_look_default_model_on_persuasion(monkeypatch, smollm2, tmp_path):
    monkeypatch.setattr(command, "load_model", lambda source: smollm2)
    page = tmp_path / "heads.html"
    text = Path(__file__).parents[2] / "examples/persuasion.txt"
    arguments = ["look", "--terminal", "--out", str(page), "--file", str(text)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "16.0   previous token" in result.stdout
    assert "'-' looks at" in result.stdout
    assert "' fifty' (0.9" in result.stdout
    assert "layer 29 " in result.stdout
    assert page.stat().st_size < 5e6
