"""`cpu_kernel`: the kernel that the library runs for a call, and the notes that name it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import polyhead as ph
from polyhead.backends import cpu
from polyhead.backends.cpu import ops
from polyhead.validate import build_call

pytestmark = pytest.mark.usefixtures("kernels")

SIZES = {"B": 1, "H": 6, "G": 2, "T": 1, "S": 2100, "D": 8, "E": 8}


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("sizes", "kernel"),
    [
        ({"T": 1, "S": 1}, "decode"),
        ({"T": 3, "S": 12}, "decode"),
        ({"T": 3, "S": 11}, "prefill"),
        ({"T": 10}, "decode"),
        ({"T": 11}, "chunked prefill"),
        ({"H": 2, "T": 16}, "decode"),
        ({"H": 2, "T": 17}, "chunked prefill"),
        ({"H": 32, "G": 1}, "decode"),
        ({"H": 33, "G": 1}, "chunked prefill"),
        ({"T": 170}, "chunked prefill"),
        ({"T": 171}, "prefill"),
        ({"T": 37, "S": 2048}, "chunked prefill"),
        ({"T": 37, "S": 2047}, "prefill"),
        ({"H": 2, "T": 512, "S": 2048}, "chunked prefill"),
        ({"T": 1, "needs_grad": True}, "chunked prefill"),
        ({"T": 3, "S": 12, "needs_grad": True}, "prefill"),
    ],
    ids=str,
)
def test_kernel_at_each_threshold(isa, one_thread, sizes, kernel):
    assert ops.kernel(**({"needs_grad": False} | SIZES | sizes)) == kernel


@pytest.mark.parametrize(
    ("sizes", "kernel", "way"),
    [
        ({"T": 1, "S": 70}, "decode", "read once, in place"),
        ({"T": 37, "S": 70}, "prefill", "packed once per KV head"),
        ({"T": 37, "S": 2100}, "chunked prefill", "packed block by block"),
    ],
    ids=str,
)
def test_notes_name_the_kernel_that_runs(tensors, isa, one_thread, sizes, kernel, way):
    """A call of few queries and thousands of keys was explained as an ordinary prefill."""
    explanation = ph.explain(*tensors(**sizes), backend="cpu")
    assert explanation.notes[1].startswith(f"{kernel} kernel: ")
    assert way in explanation.notes[1]


def test_notes_of_a_call_with_gradients_name_no_decoding(tensors, isa, one_thread):
    query, key, value = tensors(T=1, S=2100)
    note = cpu.notes(build_call(query.requires_grad_(), key, value))[1]
    assert note.startswith("chunked prefill kernel: ")


@pytest.mark.parametrize(("S", "kernel"), [(2048, "prefill"), (4096, "chunked prefill")])
def test_kernel_depends_on_work_for_each_thread(two_threads, S, kernel):
    """One KV head keeps two threads busy only if its keys can be split."""
    if ops.isa() in ("avx2", "portable"):
        pytest.skip("smaller blocks of keys are split earlier")
    sizes = SIZES | {"H": 40, "G": 1, "T": 2, "S": S}
    assert ops.kernel(**sizes, needs_grad=False) == kernel


def test_kernel_rejects_heads_that_do_not_divide():
    with pytest.raises(RuntimeError, match="polyhead: H must be a multiple of G"):
        ops.kernel(**SIZES | {"H": 5}, needs_grad=False)
    with pytest.raises(RuntimeError, match="polyhead: H must be a multiple of G"):
        ops.kernel(**SIZES | {"G": 0}, needs_grad=False)


def test_limits_are_those_of_the_library(tensors):
    assert (ops.max_head_size, ops.max_tokens) == (576, 2**31 - 2)
    reasons = cpu.why_not(build_call(*tensors(D=577, E=7)))
    assert reasons == ["has heads of up to 576; got D = 577, E = 7"]


@pytest.mark.parametrize("T", [1, 2])
def test_fast_path_of_decode_only_takes_no_other_kernel(tensors, T):
    """Where matrix units are faster, only decoding stays with these kernels."""
    decode, prefill = tensors(T=T, S=40), tensors(T=40, S=40)
    fast = torch.ops.polyhead.attention_fast
    assert torch.equal(fast(*decode, None, decode_only=True), fast(*decode, None))
    assert fast(*prefill, None) is not None
    assert fast(*prefill, None, decode_only=True) is None


def test_thresholds_stand_in_the_library_alone():
    """A copy in Python drifted from the kernels before."""
    root = Path(__file__).parents[3]
    thresholds = [
        name
        for header in (root / "csrc").rglob("*.hpp")
        for name in re.findall(
            r"constexpr int64_t k((?:Decode|Chunk|Stream)\w+) =", header.read_text()
        )
    ]
    assert thresholds
    for path in (root / "src/polyhead/backends/cpu").glob("*.py"):
        source = path.read_text().lower().replace("_", "")
        assert not [name for name in thresholds if name.lower() in source]
        assert "as in csrc" not in path.read_text().lower()


@pytest.mark.parametrize("tracing_mode", ["fake", "symbolic"])
def test_kernel_is_not_recorded_in_a_traced_graph(tensors, monkeypatch, tracing_mode):
    """Where matrix units are faster, "auto" needs the kernel's name while a graph is traced."""
    monkeypatch.setattr(cpu, "_has_amx", lambda: True)
    inputs = tensors(T=2, dtype=torch.bfloat16)
    with torch.no_grad():
        graph = make_fx(lambda *qkv: ph.attention(*qkv), tracing_mode=tracing_mode)(*inputs)
    assert "attention_output" in graph.code
    assert "cpu_kernel" not in graph.code
