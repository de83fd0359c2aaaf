"""Where a page may be written."""

import os

import pytest

from polyhead.errors import ArgumentError
from polyhead.viewer.page_file import MARK, page_file

PAGE = f"<head>{MARK.decode()}</head>"


def write(path, text, **options):
    with page_file(path, **options) as file:
        file.write(text)


def test_a_page_of_ours_is_replaced_and_nothing_else(tmp_path):
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


def test_it_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "heads.html"
    write(path, PAGE)
    with pytest.raises(KeyError), page_file(path) as file:
        file.write({}["no such"])
    assert path.read_text() == PAGE
    assert os.listdir(tmp_path) == ["heads.html"]


def test_what_a_link_leads_to_is_replaced(tmp_path):
    target, link = tmp_path / "target.html", tmp_path / "link.html"
    write(target, PAGE)
    link.symlink_to(target)
    write(link, PAGE + "new")
    assert link.is_symlink()
    assert target.read_text() == PAGE + "new"


def test_a_folder_that_cannot_be_written_is_known_at_once(tmp_path):
    reached = False
    with (
        pytest.raises(ArgumentError, match=r"--out must be writable; got .*No such file"),
        page_file(tmp_path / "none" / "heads.html"),
    ):
        reached = True
    assert not reached


def test_the_mark_is_in_the_head_of_every_page(report):
    from polyhead.look.page import render

    assert MARK in render(report, live=True).encode()[:4096]
