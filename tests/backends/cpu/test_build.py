"""What a package without kernels gives as the reason, and the command that it names."""

from __future__ import annotations

import json
import sys
from importlib import metadata

import pytest

from polyhead.backends.cpu.build import why_not_built


class Distribution:
    version = "1.2"

    def __init__(self, **files: str) -> None:
        self.files = {name.replace("__", "."): text for name, text in files.items()}

    def read_text(self, name: str) -> str | None:
        return self.files.get(name)


def reason(monkeypatch, **files):
    monkeypatch.setattr(metadata, "distribution", lambda name: Distribution(**files))
    return why_not_built()


PIP = f"{sys.executable} -m pip install --force-reinstall --no-deps --no-cache-dir"


def test_why_not_built_repeats_the_reason_kept(monkeypatch):
    got = reason(monkeypatch, no_kernels__txt="no C++ compiler was there\ninstall one\n")
    assert got == (
        "was not built: no C++ compiler was there; install one, then run: "
        f"{PIP} --no-binary polyhead polyhead==1.2"
    )


def test_why_not_built_without_torch_needs_no_first_step(monkeypatch):
    got = reason(monkeypatch, no_kernels__txt="torch was not there\ninstall torch\n")
    assert got.startswith(f"was not built: torch was not there; run: {PIP}")


@pytest.mark.parametrize(
    ("origin", "end"),
    [
        ({"url": "file:///a%20b/c", "dir_info": {"editable": True}}, " --editable '/a b/c'"),
        ({"url": "file:///a/b", "dir_info": {}}, "--no-cache-dir /a/b"),
        ({"url": "file:///a/b.tar.gz", "archive_info": {}}, "--no-cache-dir /a/b.tar.gz"),
        ({"url": "https://c.invalid/b.tar.gz"}, "polyhead https://c.invalid/b.tar.gz"),
    ],
)
def test_why_not_built_installs_again_from_where_it_came(monkeypatch, origin, end):
    got = reason(monkeypatch, direct_url__json=json.dumps(origin))
    assert got.endswith(end)
    assert "its library is not among the package's files" in got


def test_why_not_built_without_metadata_is_a_reason(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    assert "polyhead is not installed here" in why_not_built()
