"""Atomic writing of the page's file."""

import os

import pytest

from polyhead.errors import ArgumentError
from polyhead.viewer.page_file import MARK, page_file

PAGE = f"<head>{MARK.decode()}</head>"


def write(path, text, **options):
    with page_file(path, **options) as file:
        file.write(text)


def test_page_file_replaces_only_pages_of_ours(tmp_path):
    path = tmp_path / "heads.html"
    write(path, PAGE)
    write(path, PAGE + "again")
    assert path.read_text() == PAGE + "again"
    path.write_text("mine")
    with pytest.raises(ArgumentError, match=r"must not replace .*heads.html; .*--force"):
        write(path, PAGE)
    assert path.read_text() == "mine"
    write(path, PAGE, replace=True)
    assert path.read_text() == PAGE
    assert os.listdir(tmp_path) == ["heads.html"]


def test_page_file_is_atomic(tmp_path):
    path = tmp_path / "heads.html"
    write(path, PAGE)
    with pytest.raises(KeyError), page_file(path) as file:
        file.write({}["no such"])
    assert path.read_text() == PAGE
    assert os.listdir(tmp_path) == ["heads.html"]


def test_page_file_replaces_the_target_of_a_link(tmp_path):
    target, link = tmp_path / "target.html", tmp_path / "link.html"
    write(target, PAGE)
    link.symlink_to(target)
    write(link, PAGE + "new")
    assert link.is_symlink()
    assert target.read_text() == PAGE + "new"


@pytest.mark.parametrize("replace", [False, True])
def test_page_file_device_is_not_replaced(tmp_path, replace):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(ArgumentError, match=r"--out must be a file; got .*pipe; give another path"):
        write(path, PAGE, replace=replace)
    assert path.is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]


def test_page_file_unwritable_folder_raises_at_once(tmp_path):
    reached = False
    with (
        pytest.raises(ArgumentError, match=r"--out must be writable; got .*No such file"),
        page_file(tmp_path / "none" / "heads.html"),
    ):
        reached = True
    assert not reached


def test_page_file_mark_is_in_every_page(report):
    from polyhead.look.page import render

    assert MARK in render(report, live=True).encode()[:4096]
