"""The compiled operators: loaded, for one instruction set, alone, and what torch needs of them."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import polyhead as ph
from polyhead.backends import cpu
from polyhead.backends.cpu import ops
from polyhead.validate import build_call

pytestmark = pytest.mark.usefixtures("kernels")

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-include", "tests/csrc/avx512_intrinsics.hpp"]
LOOPS = {
    "portable": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-DPOLYHEAD_EMULATE_BF16"],
    "neon": ["-DPOLYHEAD_NEON"],
    "neon_bf16": ["-DPOLYHEAD_NEON", "-march=armv8.2-a+bf16"],
}
IS_ARM64 = platform.machine() in ("aarch64", "arm64")


def compiler_and_runner(isa: str, isas: list[str]) -> tuple[str, list[str]]:
    """Return what compiles for the instruction set and what runs it; skip where one is missing."""
    is_of_arm64 = isa.startswith("neon")
    if isa == "portable" or is_of_arm64 == IS_ARM64:
        if shutil.which("g++") is None:
            pytest.skip("needs g++")
        least = {"portable": "portable", "neon_bf16": "neon_bf16", "neon": "neon"}.get(isa, "avx2")
        if least not in isas:
            pytest.skip(f"needs a processor with {least}")
        return "g++", []
    if IS_ARM64:
        pytest.skip("needs an x86-64 processor")
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs the packages g++-aarch64-linux-gnu and qemu-user")
    return compiler, [emulator, "-L", "/usr/aarch64-linux-gnu", "-cpu", "max"]


@pytest.mark.slow
@pytest.mark.parametrize("isa", LOOPS)
def test_the_loops_agree_with_a_double_loop_and_keep_to_their_memory(isas, isa, tmp_path):
    """Without torch, under sanitizers. AVX-512's intrinsics are emulated, on any processor, and
    arm64's instructions by QEMU."""
    compiler, runner = compiler_and_runner(isa, isas)
    program = tmp_path / "test_loops"
    options = ["-std=c++20", "-O1", "-g1", "-fopenmp", "-ffp-contract=fast", "-Wno-psabi", "-Icsrc"]
    options += ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
    options += [f"-DPOLYHEAD_ISA={isa}", f'-DPOLYHEAD_ISA_NAME="{isa}"', *LOOPS[isa]]
    subprocess.run(
        [compiler, *options, "tests/csrc/test_loops.cpp", "-o", program],
        cwd=Path(__file__).parents[3],
        check=True,
    )
    # NaN in memory that nothing has been written to.
    sanitizer = "malloc_fill_byte=255:max_malloc_fill_size=1000000000"
    if runner:
        sanitizer += ":detect_leaks=0"  # which needs ptrace, and QEMU has none
    environment = {
        **os.environ,
        "ASAN_OPTIONS": sanitizer,
        # Fewer threads than some of the cases ask for.
        "OMP_THREAD_LIMIT": "2",
    }
    command = [*runner, program, "100" if runner else "200"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def operator_arguments(inputs, **options):
    call = build_call(*inputs, **options, aux=ph.AuxRequest(lse=True))
    captured = []

    class Operators:
        def attention_inference(self, *arguments):
            captured.extend(arguments)
            return torch.ops.polyhead.attention_inference(*arguments)

    cpu_run_globals = cpu.run.__globals__
    real = cpu_run_globals["torch"]

    class Torch:
        ops = type("ops", (), {"polyhead": Operators()})

        def __getattr__(self, name):
            return getattr(real, name)

    cpu_run_globals["torch"] = Torch()
    try:
        cpu.run(call)
    finally:
        cpu_run_globals["torch"] = real
    return tuple(captured)


@pytest.mark.parametrize(
    "options",
    [
        {"mask": ph.mask.causal() & ph.mask.lengths([4]), "bias": torch.zeros(2, 4, 5)},
        {
            "mask": ph.mask.dense(torch.ones(4, 5, dtype=torch.bool)),
            "sinks": torch.zeros(2),
            "dropout": 0.5,
        },
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_opcheck(tensors, options):
    arguments = operator_arguments(tensors(B=1, H=2, G=1, T=4, S=5, D=8), **options)
    torch.library.opcheck(torch.ops.polyhead.attention_inference, arguments)
    torch.library.opcheck(torch.ops.polyhead.attention_output, arguments[:-1])
    differentiable = [
        x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in arguments
    ]
    torch.library.opcheck(torch.ops.polyhead.attention_forward, tuple(differentiable))
    query, key, _, *masks, _, slopes, _, band, scale, softcap, _, _ = arguments
    details = torch.ops.polyhead.attention_inference(*arguments)[2]
    for mean in (True, False):
        weights = (query, key, *masks, slopes, band, scale, softcap, details, mean)
        torch.library.opcheck(torch.ops.polyhead.attention_weights, weights)


def wrong_sizes(B=2, H=4, G=2, T=3, S=5, D=8):
    """Pairs of an argument of `attention_output`, and a tensor of sizes that nothing else has."""
    wide = torch.zeros(B, G, S, D)
    yield "query", torch.zeros(B, H, T, 2 * D)[..., ::2]
    yield "key", torch.zeros(B + 1, G, S, D)
    yield "key", torch.zeros(B, G, S, D - 1)
    yield "key", torch.zeros(B, G, S, 2 * D)[..., ::2]
    yield "value", wide[:, :1]
    yield "value", wide[:, :, 1:]
    yield "bias", torch.zeros(H + 1, T, S)
    yield "bias", torch.zeros(1, B, H, T, S)
    yield "allowed", torch.ones(T, S - 1, dtype=torch.bool)
    yield "allowed", torch.ones(T, S)
    yield "lengths", torch.ones(B + 1, dtype=torch.int64)
    yield "padding", torch.ones(B, dtype=torch.int16)
    yield "documents", torch.zeros(S - 1, dtype=torch.int64)
    yield "documents", torch.zeros(B + 1, S, dtype=torch.int32)
    yield "query_offset", torch.zeros(B + 1, dtype=torch.int64)
    yield "query_offset", torch.zeros(B)
    yield "sinks", torch.zeros(H - 1)
    yield "alibi_slopes", torch.zeros(H, dtype=torch.float64)
    yield "seed", torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "wrong"), list(wrong_sizes()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_an_operator_called_by_itself_refuses_sizes_that_do_not_fit(tensors, name, wrong):
    """Whoever comes by `torch.ops`, an exported graph say, must not read beyond a tensor."""
    names = ("query", "key", "value", "bias", "allowed", "lengths", "padding", "documents")
    names += (
        "query_offset",
        "sinks",
        "alibi_slopes",
        "seed",
        "band",
        "scale",
        "softcap",
        "dropout",
    )
    arguments = dict.fromkeys(names) | {"band": [-9, 9, 9, 9, 0]}
    arguments |= {"scale": 1.0, "softcap": 0.0, "dropout": 0.0}
    sizes = {"B": 2, "H": 4, "G": 2, "T": 3, "S": 5, "D": 8}
    arguments |= dict(zip(names, tensors(**sizes), strict=False))
    torch.ops.polyhead.attention_output(**arguments)
    with pytest.raises(RuntimeError, match=f"polyhead: {name}"):
        torch.ops.polyhead.attention_output(**arguments | {name: wrong})


def test_exports(tensors):
    class Attend(torch.nn.Module):
        def forward(self, query, key, value):
            return ph.attention(query, key, value, mask=ph.mask.causal(), backend="cpu")

    inputs = tuple(tensors())
    program = torch.export.export(Attend(), inputs)
    assert "attention_output" in str(program.graph)
    assert torch.equal(program.module()(*inputs), Attend()(*inputs))


def test_kernels_that_cannot_be_loaded_are_a_reason_and_no_crash(monkeypatch, tmp_path):
    broken = tmp_path / "_kernels.so"
    broken.write_bytes(b"no library")
    spec = importlib.util.spec_from_file_location("polyhead._kernels", broken)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert ops._load().startswith("was built, and could not be loaded: ")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert ops._load().startswith("was not built: ")


def test_the_environment_chooses_the_instruction_set(isas):
    isa = isas[-1]
    code = "from polyhead.backends.cpu import ops; print(ops.isa())"
    chosen = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "POLYHEAD_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
    )
    assert chosen.stdout.strip() == isa


def test_an_unknown_instruction_set_in_the_environment_is_warned_of():
    imported = subprocess.run(
        [sys.executable, "-c", "import polyhead"],
        env={**os.environ, "POLYHEAD_CPU_ISA": "sse9"},
        capture_output=True,
        text=True,
        check=True,
    )
    warning = "POLYHEAD_CPU_ISA must name kernels of this processor and build; got 'sse9'; "
    assert warning in imported.stderr


def test_an_unknown_instruction_set_is_refused_and_changes_nothing():
    before = ops.isa()
    with pytest.raises(RuntimeError, match="lacks instruction set sse9"):
        ops.choose_isa("sse9")
    assert ops.isa() == before


def test_kernels_can_be_switched_off():
    code = "import polyhead as ph, torch; q = torch.ones(1, 1, 2, 8); print(ph.explain(q, q, q))"
    explained = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "POLYHEAD_CPU_ISA": "none"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "runs: sdpa" in explained.stdout
    assert "was switched off by POLYHEAD_CPU_ISA=none" in explained.stdout


@pytest.mark.parametrize(
    ("stack", "size"),
    [("16k", 16384), ("64", 65536), (" 2 M ", 2**21), ("1G", 2**30), ("512B", 512)],
)
def test_bytes_of_omp_stacksize(stack, size):
    assert ops._bytes_of(stack) == size


@pytest.mark.parametrize("stack", ["", "much", "-1"])
def test_bytes_of_no_omp_stacksize_are_no_limit(stack):
    assert ops._bytes_of(stack) == float("inf")


def test_small_stacks_of_threads_are_a_reason_and_no_crash(monkeypatch):
    monkeypatch.setenv("OMP_STACKSIZE", "16k")
    assert ops._load() == (
        "needs threads with stacks of 256 KiB; got OMP_STACKSIZE=16k; "
        "unset it, or set OMP_STACKSIZE=1M"
    )
    monkeypatch.setenv("OMP_STACKSIZE", "256K")
    assert ops._load() == ""


@pytest.mark.usefixtures("kernels")
def test_gradients_are_mapped_by_the_names_of_the_schema():
    forward, backward = (
        getattr(torch.ops.polyhead, f"attention_{name}").default._schema
        for name in ("forward", "backward")
    )
    assert [argument.name for argument in forward.arguments] == list(ops.forward_names)
    assert set(ops._OPTIONS) | set(ops._TENSORS) == set(ops.forward_names)
    taken = {argument.name for argument in backward.arguments}
    assert set(ops.forward_names) - {"stats"} <= taken
    given = {"query": 2.0, "key": 3.0, "value": 5.0, "bias": 7.0, "sinks": 11.0}
    assert [result.name for result in backward.returns] == list(given)
