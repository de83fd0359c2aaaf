"""Options shared by several commands."""

import io
import re
import sys

import pytest
from rich.console import Console

from polyhead.cli import options
from polyhead.cli.options import progress_bar, read_text
from polyhead.errors import ArgumentError


@pytest.mark.parametrize(
    "data",
    [b"one two", b"one two\n", b"one two\r\n", b"\xef\xbb\xbfone two\r\n"],
    ids=["as it is", "newline", "newline of Windows", "with its mark"],
)
def test_read_text_strips_bom_and_final_newline(tmp_path, monkeypatch, data):
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    assert read_text(None, path) == "one two"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert read_text("-", None) == "one two"


def test_read_text_keeps_inner_newlines(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"one\r\ntwo\n\n")
    assert read_text(None, path) == "one\r\ntwo\n"


def test_read_text_closed_stdin_raises(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ArgumentError, match="TEXT must be readable; got standard input, which is"):
        read_text("-", None)


def test_progress_bar_shows_elapsed_and_remaining_time(monkeypatch):
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=100)
    monkeypatch.setattr(options, "Console", lambda stderr: terminal)
    with progress_bar() as show:
        show("layer 1", 0.25)
        show("layer 2", 0.5)
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.getvalue())
    assert re.search(r"layer 2 .* 0:00:0\d (-:--:--|0:00:0\d) left", text)
