"""The build backend: scikit-build-core, and plain Python where kernels cannot be built.

`pyproject.toml` names it, so pip and `build` call these functions. Such a wheel keeps the reason
in its metadata, in `no_kernels.txt`, which `polyhead.explain()` repeats, and its file name, which
pip prints, carries the tag `0without_kernels`. With POLYHEAD_REQUIRE_KERNELS=1 the build fails
instead.

`python scripts/build_backend.py` prints where torch is: CMakeLists.txt uses it.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

REQUIRE = "POLYHEAD_REQUIRE_KERNELS"
TORCH = "POLYHEAD_TORCH"  # the folder of torch, of a build for another system
TAG = "0without_kernels"
NOTE = "no_kernels.txt"
COMPILER = "install a C++20 compiler (Debian: apt install g++; macOS: xcode-select --install)"

Settings = dict[str, Any] | None


def torch_folder() -> Path | None:
    """Where torch is: in this environment, or, hidden by isolation, in the one installed to."""
    if os.environ.get(TORCH):
        return Path(os.environ[TORCH])
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    paths = sysconfig.get_paths()
    folders = (Path(paths[name]) / "torch" for name in ("platlib", "purelib"))
    return next((folder for folder in folders if (folder / "include").is_dir()), None)


def __getattr__(name: str) -> Any:
    """The hooks that are scikit-build-core's own: what it requires, metadata, sdist."""
    if not name.startswith(("get_requires_for_", "prepare_metadata_for_", "build_")):
        raise AttributeError(name)
    return getattr(importlib.import_module("scikit_build_core.build"), name)


def build_wheel(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    return _build("build_wheel", wheel_directory, config_settings)


def build_editable(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    return _build("build_editable", wheel_directory, config_settings)


def _build(hook: str, folder: str, settings: Settings) -> str:
    settings = dict(settings or {})
    reason, first = "torch was not there when it was built", "install torch"
    if torch_folder() is not None:
        code, output = _run(hook, folder, settings)
        if code == 0:
            return output.splitlines()[-1]
        reason, first = reason_of(output)
    if os.environ.get(REQUIRE, "0") not in ("", "0"):
        raise SystemExit(f"polyhead: {REQUIRE} is set, and the kernels cannot be built: {reason}")
    plain = {"wheel.cmake": "false", "wheel.py-api": "", "wheel.build-tag": TAG}
    code, output = _run(hook, folder, settings | plain)
    if code != 0:
        raise SystemExit(f"polyhead: {hook} failed, without kernels too")
    name = output.splitlines()[-1]
    add_metadata(Path(folder) / name, NOTE, f"{reason}\n{first}\n")
    print(f"polyhead: built WITHOUT its C++ kernels: {reason}. Everything runs on torch's.")
    return name


def _run(hook: str, folder: str, settings: dict[str, Any]) -> tuple[int, str]:
    """Call scikit-build-core's hook in a process, whose output is shown and returned."""
    code = (
        "import json, sys; import scikit_build_core.build as b; "
        "print('\\n' + getattr(b, sys.argv[1])(sys.argv[2], json.loads(sys.argv[3])))"
    )
    command = [sys.executable, "-c", code, hook, folder, json.dumps(settings)]
    lines = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


_REASONS = {
    # First, as CMake reports the compiler as missing too where it has no program to build with.
    r"build program|CMAKE_MAKE_PROGRAM|(CMake|Ninja)NotFoundError": (
        "cmake with ninja or make was not there when it was built",
        "pip install cmake ninja",
    ),
    r"CMAKE_CXX_COMPILER not set|No CMAKE_CXX_COMPILER": (
        "no C++ compiler was there when it was built",
        COMPILER,
    ),
    r"not able to compile a simple test program": (
        "the C++ compiler made no program when it was built",
        COMPILER,
    ),
    r"Could NOT find OpenMP": (
        "the C++ compiler has no OpenMP",
        "install OpenMP for it, or take g++ (CXX=g++)",
    ),
}


def reason_of(output: str) -> tuple[str, str]:
    """Return why a build failed, from its output, and what to do before it is tried again."""
    for pattern, reason in _REASONS.items():
        if re.search(pattern, output):
            return reason
    lines = [line.strip() for line in output.splitlines()]
    errors = [line for line in lines if re.search(r"\berror: |\bError: |CMake Error", line)]
    first = errors[0] if errors else next(filter(None, reversed(lines)), "it printed nothing")
    return f"its C++ did not compile: {first}", "take another C++20 compiler (CXX=g++)"


def add_metadata(wheel: Path, name: str, text: str) -> None:
    """Add a file to the metadata of a wheel, and to its record."""
    data = text.encode()
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    with zipfile.ZipFile(wheel) as archive:
        files = {info: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for info, content in files.items():
            if info.filename.endswith(".dist-info/RECORD"):
                path = info.filename.removesuffix("RECORD") + name
                archive.writestr(path, data)
                content += f"{path},sha256={digest},{len(data)}\n".encode()
            archive.writestr(info, content)


if __name__ == "__main__":
    found = torch_folder()
    sys.exit("torch was not found" if found is None else print(found))
