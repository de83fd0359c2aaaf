"""The wheel script's own decisions; `make wheel` itself builds, audits, installs and runs one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_wheel", ROOT / "scripts/make_wheel.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_wheel"] = module  # a dataclass looks its module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["make_wheel"]


def test_glibc_of_reads_the_tag_that_auditwheel_gave(script):
    assert script.glibc_of(Path("polyhead-1.0-py3-none-manylinux_2_27_aarch64.whl")) == (2, 27)
    assert script.glibc_of(Path("polyhead-1.0-py3-none-manylinux_2_34_x86_64.whl")) > script.GLIBC
    with pytest.raises(SystemExit, match=r"no manylinux tag for polyhead-1\.0-py3-none-linux_x86"):
        script.glibc_of(Path("polyhead-1.0-py3-none-linux_x86_64.whl"))


def test_libomp_gets_the_name_that_rpath_finds(script, tmp_path):
    own = b"/opt/some/lib/libomp.dylib"
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libomp.dylib").write_bytes(b"\xcf\xfa" + own + b"\0\0code")
    named = script.libomp(tmp_path, tmp_path).read_bytes()
    # As long as before: nothing after it moves.
    assert named == b"\xcf\xfa" + b"@rpath/libomp.dylib".ljust(len(own), b"\0") + b"\0\0code"


def test_gcc_absent_names_the_package(script, monkeypatch):
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    target = script.Platform("Linux", "s390x", "2.13.0", ())
    with pytest.raises(
        SystemExit, match=r"s390x-linux-gnu-g\+\+ was not found; apt install g\+\+-s"
    ):
        script.gcc(target)


def test_tools_are_pinned():
    lines = (ROOT / "wheels.lock").read_text().splitlines()[1:]
    assert lines == sorted(lines)
    assert all("==" in line for line in lines)
