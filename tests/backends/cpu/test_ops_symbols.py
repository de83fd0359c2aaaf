"""The symbols of the kernels' objects: the instruction sets share no inline function.

Of a weak function that several objects define, the linker keeps one, perhaps the one compiled for
AVX-512: an older processor then crashes. Without optimization every inline function in use is such
a symbol, so the test depends on no decision of a compiler to inline.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
FLAGS = {
    "portable": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "neon": ["-DPOLYHEAD_NEON"],
    "neon_bf16": ["-DPOLYHEAD_NEON", "-march=armv8.2-a+bf16"],
}
IS_ARM64 = platform.machine() in ("aarch64", "arm64")
WEAK = "VvWwu"  # nm's letters for symbols of which the linker keeps one

pytestmark = [
    pytest.mark.skipif(not (shutil.which("g++") and shutil.which("nm")), reason="needs g++ and nm"),
]


def shared_symbols(source: Path, isa: str, folder: Path, compiler: str = "g++") -> list[str]:
    """Return the weak functions and objects outside the namespace of the instruction set."""
    compiled = folder / f"{isa}.o"
    options = ["-std=c++20", "-O0", "-w", "-fopenmp", "-Icsrc", *FLAGS[isa]]
    options += [f"-DPOLYHEAD_ISA={isa}", f'-DPOLYHEAD_ISA_NAME="{isa}"']
    subprocess.run([compiler, *options, "-c", source, "-o", compiled], cwd=ROOT, check=True)
    listing = subprocess.run(["nm", "-C", compiled], capture_output=True, text=True, check=True)
    symbols = [line[17:].split(" ", 1) for line in listing.stdout.splitlines()]
    return [
        name
        for letter, name in symbols
        # (A pointer to the exception handler is data.)
        if letter in WEAK and f"polyhead::{isa}::" not in name and not name.startswith("DW.ref.")
    ]


@pytest.mark.parametrize(
    "isa",
    [
        "portable",
        *(pytest.param(isa, marks=pytest.mark.slow) for isa in FLAGS if isa != "portable"),
    ],
)
def test_kernels_share_no_symbol_between_instruction_sets(isa, tmp_path):
    is_foreign = isa != "portable" and isa.startswith("neon") != IS_ARM64
    compiler = "aarch64-linux-gnu-g++" if is_foreign and not IS_ARM64 else "g++"
    if (is_foreign and IS_ARM64) or shutil.which(compiler) is None:
        pytest.skip(f"needs a compiler for {isa}")
    assert shared_symbols(ROOT / "csrc/kernels.cpp", isa, tmp_path, compiler) == []


def test_shared_symbols_finds_a_planted_one(tmp_path):
    source = tmp_path / "planted.cpp"
    source.write_text(
        "#include <algorithm>\n"
        "namespace polyhead::portable {\n"
        "inline int own(int x) { return std::max(x, 1); }\n"
        "int call(int x) { return own(x); }\n"
        "}\n"
    )
    (shared,) = shared_symbols(source, "portable", tmp_path)
    assert "std::max<int>" in shared
