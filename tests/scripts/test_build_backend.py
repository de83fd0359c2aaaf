"""The build backend: where it finds torch, and the reason that a wheel without kernels keeps."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def backend():
    spec = importlib.util.spec_from_file_location(
        "build_backend", ROOT / "scripts/build_backend.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("place", ["platlib", "purelib"])
def test_torch_hidden_by_isolation_is_found(backend, monkeypatch, tmp_path, place):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    paths = {"platlib": str(tmp_path / "a"), "purelib": str(tmp_path / "b")}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    assert backend.torch_folder() is None
    folder = Path(paths[place]) / "torch"
    (folder / "include").mkdir(parents=True)
    assert backend.torch_folder() == folder


def test_torch_named_for_another_system_is_taken(backend, monkeypatch, tmp_path):
    monkeypatch.setenv("POLYHEAD_TORCH", str(tmp_path))
    assert backend.torch_folder() == tmp_path


NO_COMPILER = """\
CMake Error at CMakeDetermineCXXCompiler.cmake:47 (message):
CMake Error: CMAKE_CXX_COMPILER not set, after EnableLanguage
"""
NO_NINJA = """\
CMake Error: CMake was unable to find a build program corresponding to "Unix Makefiles".
CMake Error: CMAKE_CXX_COMPILER not set, after EnableLanguage
"""
NO_CMAKE = "scikit_build_core.errors.CMakeNotFoundError: Could not find CMake with version >=3.19"
WRONG = (
    "[1/2] Building\ncsrc/simd/vec.hpp:7:1: error: 'omp' was not declared\nsome.cpp:8: error: b\n"
)


@pytest.mark.parametrize(
    ("output", "reason", "first"),
    [
        (NO_COMPILER, "no C++ compiler was there when it was built", "install a C++20 compiler"),
        (NO_NINJA, "cmake with ninja or make was not there when", "pip install cmake ninja"),
        (NO_CMAKE, "cmake with ninja or make was not there when", "pip install cmake ninja"),
        ("Could NOT find OpenMP_CXX", "the C++ compiler has no OpenMP", "CXX=g++"),
        (WRONG, "its C++ did not compile: csrc/simd/vec.hpp:7:1: error: 'omp' was not", "CXX=g++"),
        ("killed\n", "its C++ did not compile: killed", "CXX=g++"),
        ("ModuleNotFoundError: No module named 'x'", "ModuleNotFoundError: No", "CXX=g++"),
        ("", "it printed nothing", "CXX=g++"),
    ],
)
def test_reason_of_output_names_the_cause(backend, output, reason, first):
    assert reason in backend.reason_of(output)[0]
    assert first in backend.reason_of(output)[1]


def fake_run(results):
    calls = []

    def run(hook, folder, settings):
        calls.append(settings)
        code = results[len(calls) - 1]
        wheel = Path(folder) / "a-1-py3-none-any.whl"
        if code == 0:
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr("a/b.py", "x = 1\n")
                archive.writestr("a-1.dist-info/RECORD", "a/b.py,,\na-1.dist-info/RECORD,,\n")
        return code, WRONG if code else f"built\n{wheel.name}\n"

    return run, calls


def test_build_that_fails_gives_plain_wheel_with_reason(backend, monkeypatch, tmp_path, capsys):
    run, calls = fake_run([1, 0])
    monkeypatch.setattr(backend, "_run", run)
    name = backend.build_wheel(str(tmp_path), {"a": "b"})
    assert calls[0] == {"a": "b"}
    assert calls[1]["wheel.cmake"] == "false"
    assert calls[1]["wheel.build-tag"] == "0without_kernels"
    assert (
        "WITHOUT its C++ kernels: its C++ did not compile: csrc/simd/vec.hpp"
        in capsys.readouterr()[0]
    )
    with zipfile.ZipFile(tmp_path / name) as archive:
        kept = archive.read("a-1.dist-info/no_kernels.txt").decode()
        assert kept.splitlines()[0].startswith(
            "its C++ did not compile: csrc/simd/vec.hpp:7:1: error"
        )
        assert b"a-1.dist-info/no_kernels.txt,sha256=" in archive.read("a-1.dist-info/RECORD")
        assert archive.read("a/b.py") == b"x = 1\n"


def test_build_where_kernels_are_required_fails(backend, monkeypatch, tmp_path):
    run, calls = fake_run([1, 0])
    monkeypatch.setattr(backend, "_run", run)
    monkeypatch.setenv("POLYHEAD_REQUIRE_KERNELS", "1")
    with pytest.raises(SystemExit, match="POLYHEAD_REQUIRE_KERNELS is set, and the kernels cannot"):
        backend.build_editable(str(tmp_path))
    assert len(calls) == 1


def test_build_without_torch_does_not_try(backend, monkeypatch, tmp_path):
    run, calls = fake_run([0])
    monkeypatch.setattr(backend, "_run", run)
    monkeypatch.setattr(backend, "torch_folder", lambda: None)
    with zipfile.ZipFile(tmp_path / backend.build_wheel(str(tmp_path))) as archive:
        kept = archive.read("a-1.dist-info/no_kernels.txt").decode()
    assert kept == "torch was not there when it was built\ninstall torch\n"
    assert calls[0]["wheel.cmake"] == "false"


def test_output_is_shown_and_returned(backend, monkeypatch, tmp_path, capsys):
    (tmp_path / "scikit_build_core").mkdir()
    (tmp_path / "scikit_build_core/__init__.py").touch()
    (tmp_path / "scikit_build_core/build.py").write_text(
        "def build_wheel(folder, settings):\n"
        "    print('at work', settings['x'])\n"
        "    return folder\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code, output = backend._run("build_wheel", "name.whl", {"x": "1"})
    assert (code, output) == (0, "at work 1\n\nname.whl\n")
    assert capsys.readouterr().out == output


def test_hooks_not_of_wheels_are_those_of_scikit_build_core(backend):
    if "scikit_build_core" not in sys.modules:
        pytest.importorskip("scikit_build_core")
    import scikit_build_core.build as inner

    assert backend.build_sdist is inner.build_sdist
    assert backend.get_requires_for_build_wheel is inner.get_requires_for_build_wheel
    with pytest.raises(AttributeError):
        _ = backend.anything
