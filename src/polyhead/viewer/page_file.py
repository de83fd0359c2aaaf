"""Atomic writing of the page's file, without replacing files of other origin."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from polyhead.errors import ArgumentError

__all__ = ["MARK", "page_file"]

# In the head of every page.
MARK = b'<meta name="generator" content="polyhead">'
_HEAD = 4096  # bytes that contain it


@contextmanager
def page_file(path: Path, *, replace: bool = False) -> Iterator[TextIO]:
    """Yield a temporary file that replaces `path` when the block ends without an error.

    It is created next to `path` when the block begins, so that an unwritable folder is an error
    before minutes of work.

    Args:
        path: the page's path. An existing page of ours is replaced.
        replace: replace any other file, too.

    Raises:
        ArgumentError: `path` is another file, or is not writable.
    """
    path = path.resolve()  # the target of a link is replaced, not the link
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if path.exists() and not path.is_file():  # a device would be replaced, not written to
            raise ArgumentError("--out", "must be a file", str(path), "give another path")
        if path.exists() and not replace and not _is_ours(path):
            raise ArgumentError(
                "--out",
                "must not replace a file that polyhead did not write",
                str(path),
                "give another path, or --force",
            )
        file = part.open("x", encoding="utf-8", newline="\n")
    except OSError as error:
        reason = f"{path} ({error.strerror or error})"
        raise ArgumentError("--out", "must be writable", reason, "give another path") from error
    try:
        with file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return MARK in file.read(_HEAD)
