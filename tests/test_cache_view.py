"""Kernels on int8 and paged KV caches, read in place, against the float64 oracle."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import polyhead as ph
from polyhead.backends import cpu
from polyhead.cache_view import CacheView
from polyhead.errors import DtypeError
from polyhead.functional import observe
from polyhead.validate import build_call

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["int8", "blocks", "int8 blocks"]


def poison(parts):
    for part in parts:
        part.fill_(math.nan if part.is_floating_point() else 127)


def filled_cache(kind, key, value, block_size=5):
    """A cache of these tokens: NaN in unused slots, block tables that differ between rows."""
    B, G, S, D = key.shape
    sizes = {"value_head_dim": value.shape[-1], "dtype": key.dtype}
    storage_dtype = torch.int8 if "int8" in kind else None
    if "blocks" not in kind:
        cache = ph.KVCache(B, S + 30, G, D, **sizes, storage_dtype=storage_dtype, preallocate=True)
        poison(cache._held)
        cache.append(key, value)
        return cache
    spare = 9
    cache = ph.PagedKVCache(
        B, S + 30, G, D, **sizes, storage_dtype=storage_dtype, block_size=block_size,
        num_blocks=B * math.ceil(S / block_size) + spare,
    )  # fmt: skip
    poison(cache.pools)
    # In chunks, so that the blocks of a row are not contiguous; then the rows are rolled.
    rolled = torch.arange(B).roll(1)
    for part in torch.arange(S).split(max(1, S // 3)):
        cache.append(key[rolled][:, :, part], value[rolled][:, :, part])
    cache.reorder(torch.arange(B).roll(-1))
    return cache


def exact_elements(stored):
    """The elements that a `CacheView` represents, in float64, gathered token by token."""
    elements = stored.data.double()
    if stored.scales is not None:
        elements = elements * stored.scales.double()[..., None]
    if stored.block_table is None:
        return elements
    size = stored.data.shape[2]
    tokens = [
        elements[stored.block_table[:, p // size].long(), :, p % size]
        for p in range(stored.num_tokens)
    ]
    return torch.stack(tokens, dim=2)


def case(kind, B=2, H=6, G=2, T=3, S=70, D=24, E=None, dtype=torch.float32, block_size=5):
    """A query, and cached keys and values as `CacheView`s."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(B, H, T, D), (B, G, S, D), (B, G, S, E or D)]
    query, key, value = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    # Tokens of different magnitude, to detect the scale of another token.
    key[:, :, 1::3] *= 4
    value[:, :, ::2] *= 0.25
    stored = filled_cache(kind, key, value, block_size).read_as_views()
    assert all(isinstance(part, CacheView) for part in stored)
    return query, *stored


def assert_agrees(naive_attention, assert_as_good_as_eager, query, key, value, mask, **options):
    T, S = query.shape[2], key.num_tokens
    allowed = None if mask is None else mask.materialize(T, S)
    exact_options = {
        name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()
    }
    exact = naive_attention(
        query.double(), exact_elements(key), exact_elements(value), allowed=allowed, **exact_options
    )
    eager = naive_attention(
        query, key.materialize(), value.materialize(), allowed=allowed, **options
    )
    output = ph.attention(query, key, value, mask=mask, **options, backend="cpu")
    assert_as_good_as_eager(output, eager, exact)


SIZES = [
    {"T": 1, "S": 257, "D": 80, "block_size": 16},
    {"H": 7, "G": 1, "T": 3, "D": 96, "E": 1, "block_size": 1},
    {"H": 3, "G": 3, "T": 16, "S": 17, "D": 24, "E": 33},
    {"B": 1, "H": 1, "G": 1, "T": 1, "S": 1, "D": 1, "E": 3},
    {"T": 40, "S": 600, "D": 24, "E": 130, "B": 1},
    {"B": 3, "T": 19, "S": 23, "D": 97, "block_size": 64},
    {"B": 1, "T": 18, "S": 2100, "D": 24, "block_size": 64},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_cpu_cached_sizes(naive_attention, assert_as_good_as_eager, isa, size, dtype, kind):
    inputs = case(kind, **size, dtype=dtype)
    assert_agrees(naive_attention, assert_as_good_as_eager, *inputs, ph.mask.causal())


RULES = {
    "window": (ph.mask.causal() & ph.mask.window(before=9), {}),
    "lengths": (ph.mask.lengths([70, 31]), {}),
    "padding": (ph.mask.causal() & ph.mask.left_padding([0, 64]), {}),
    "documents": (ph.mask.causal() & ph.mask.documents(torch.arange(70) * 5 % 3), {}),
    "dense": (ph.mask.dense((torch.arange(70) % 3 > 0)[None]), {}),
    "all but a mask": (
        None,
        {"bias": torch.linspace(-1, 1, 70), "softcap": 2.0, "sinks": torch.ones(6), "scale": 0.5},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [2, 21])
@pytest.mark.parametrize("rule", RULES)
def test_cpu_cached_rules(naive_attention, assert_as_good_as_eager, rule, T, kind):
    mask, options = RULES[rule]
    assert_agrees(naive_attention, assert_as_good_as_eager, *case(kind, T=T), mask, **options)


@pytest.mark.parametrize("block_size", [5, 16, 100])
@pytest.mark.parametrize("T", [1, 30])
@pytest.mark.usefixtures("two_threads")
def test_cpu_paged_with_two_threads_equals_contiguous(isa, T, block_size):
    """With splits of the keys, and with groups of heads or single heads per task."""
    sizes = {"B": 1, "H": 12, "G": 6, "D": 40, "E": 72, "block_size": block_size}
    query, key, value = case("blocks", T=T, S=900, **sizes)
    got = ph.attention(query, key, value, backend="cpu")
    want = ph.attention(query, key.materialize(), value.materialize(), backend="cpu")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert T == 1 or torch.equal(got, want)
    assert torch.equal(got, ph.attention(query, key, value, backend="cpu"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [2, 30])
def test_cpu_cached_aux_matches_reference(kind, T):
    query, key, value = case(kind, T=T)
    mask = ph.mask.causal() & ph.mask.window(before=20)
    request = ph.AuxRequest(lse=True, stats=True)
    _, got = ph.attention(query, key, value, mask=mask, backend="cpu", return_aux=request)
    _, want = ph.attention(
        query.double(), exact_elements(key), exact_elements(value), mask=mask, backend="reference",
        return_aux=request,
    )  # fmt: skip
    for name, elements in {"lse": want.lse, **want.stats.tensors}.items():
        ours = got.lse if name == "lse" else getattr(got.stats, name)
        torch.testing.assert_close(ours.double(), elements, rtol=5e-6, atol=5e-6, msg=name)


@pytest.mark.parametrize("T", [2, 30])
@pytest.mark.parametrize("kind", ["int8", "int8 blocks"])
def test_cpu_cached_nonfinite_token_reaches_its_queries(isa, kind, T):
    query, key, value = case(kind, T=T)
    block = 0 if key.block_table is None else int(key.block_table[0, 0])
    key.scales[block, 1, 2] = math.nan
    value.scales[block, 0, 1] = math.inf
    output = ph.attention(query, key, value, mask=ph.mask.causal(), backend="cpu")
    want = ph.attention(query, key, value, mask=ph.mask.causal(), backend="reference")
    assert not bool(want.isfinite().all())
    assert torch.equal(output.isfinite(), want.isfinite())


class Made(TorchDispatchMode):
    """Records operations, and the most elements of a tensor that shares no memory with others."""

    def __init__(self, others):
        super().__init__()
        self.known = {part.untyped_storage().data_ptr() for part in others}
        self.largest = 0
        self.operations = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations.add(func.overloadpacket.__name__)
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, torch.Tensor):
                storage_dtype = item.untyped_storage()
                if storage_dtype.data_ptr() not in self.known:
                    self.largest = max(self.largest, storage_dtype.nbytes() // item.element_size())
        return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 20])
def test_cpu_cached_allocates_nothing_of_the_cache_s_size(kind, T):
    mha = ph.MultiHeadAttention(8, 8, 600, 0.0, 2, backend="cpu").eval()
    blank = torch.zeros(1, 2, 400, 4)
    with torch.no_grad():
        cache = filled_cache(kind, blank, blank)
        with Made(cache.pools if "blocks" in kind else cache._held) as made:
            mha(torch.randn(1, T, 8), cache=cache)
    assert "attention_cached" in made.operations
    assert made.largest < 400 * 2 * 4 / 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["cpu", "sdpa", "reference", "auto"])
def test_module_with_a_cache_equals_without(backend, kind):
    torch.manual_seed(0)
    mha = ph.MultiHeadAttention(12, 24, 64, 0.0, 6, num_kv_heads=2, backend=backend).eval()
    x = torch.randn(2, 30, 12)
    options = {"storage_dtype": torch.int8 if "int8" in kind else None}
    make = ph.PagedKVCache if "blocks" in kind else ph.KVCache
    with torch.no_grad():
        cache = make(2, 64, 2, 4, **options)
        parts = [mha(part, cache=cache) for part in x.split([20, 1, 1, 3, 5], dim=1)]
        got, want = torch.cat(parts, dim=1), mha(x)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-2 if "int8" in kind else 2e-6)


def test_explain_reports_in_place_reads_and_materialization():
    query, key, value = case("int8 blocks", D=32)
    explained = ph.explain(query, key, value, backend="cpu")
    how = "int8 values in blocks of 5"
    assert f"cached keys and values read in place: {how}" in explained.notes
    gathered = f"keys and values made of what the cache holds ({how}): 0.1 MiB"
    assert gathered in ph.explain(query, key, value, backend="sdpa").notes
    weights = ph.AuxRequest(weights=True)
    assert gathered in ph.explain(query, key, value, backend="cpu", return_aux=weights).notes
    assert gathered not in explained.notes


def test_cpu_materializes_for_weights_and_gradients():
    query, key, value = case("int8 blocks", T=4)
    request = ph.AuxRequest(weights=True, mean_weights=True)
    tensors = key.materialize(), value.materialize()
    got = ph.attention(query, key, value, backend="cpu", return_aux=request)
    want = ph.attention(query, *tensors, backend="reference", return_aux=request)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1].weights, want[1].weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1].mean_weights, want[1].mean_weights, rtol=1e-5, atol=1e-6)
    query.requires_grad_()
    grads = [
        torch.autograd.grad(ph.attention(query, *keys, backend="cpu").sum(), query)[0]
        for keys in ((key, value), tensors)
    ]
    assert torch.equal(*grads)


def test_backend_without_reads_cache_views_receives_tensors():
    seen = []

    def run(call):
        seen.append(call)
        return call.query, ph.Aux()

    query, key, value = case("int8 blocks")
    ph.attention(query, key, value, backend=ph.Backend("mine", lambda call: [], run))
    assert seen[0].cache_views is None
    assert torch.equal(seen[0].key, key.materialize())
    with observe(seen.append):
        ph.attention(query, key, value, backend="cpu")
    assert torch.equal(seen[1].value, value.materialize())


def test_cache_view_with_a_tensor_raises():
    query, key, value = case("int8")
    message = "value must be a CacheView if the other of key and value is; got Tensor"
    with pytest.raises(DtypeError, match=message):
        ph.attention(query, key, value.materialize())


def operator_arguments(kind, **sizes):
    query, key, value = case(kind, **sizes)
    return (
        query, key.data, value.data, key.scales, value.scales, key.block_table, key.num_tokens,
        *(None,) * 9, [-(2**40), 2**40, 2**40, 2**40, 0], 0.2, 0.0, 0.0, True,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_attention_cached_passes_opcheck(kind):
    arguments = operator_arguments(kind)
    torch.library.opcheck(torch.ops.polyhead.attention_cached, arguments)
    query, key, value = case(kind)
    output = torch.ops.polyhead.attention_cached(*arguments)[0]
    assert torch.equal(output, ph.attention(query, key, value, scale=0.2, backend="cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {5: torch.full((2, 14), 99, dtype=torch.int32)},
            "block_table must have numbers of blocks, 0 to 36",
        ),
        (
            {5: torch.full((2, 14), -1, dtype=torch.int32)},
            "block_table must have numbers of blocks, 0 to 36",
        ),
        ({5: torch.zeros(2, 13, dtype=torch.int32)}, "table must have a block for each token"),
        ({5: torch.zeros(3, 14, dtype=torch.int32)}, "table must be"),
        ({5: torch.zeros(2, 14)}, "table must be"),
        ({3: torch.zeros(37, 2, 4)}, "must have one scale per token and head"),
        ({3: None, 4: None}, "needs float32, bfloat16 or float16"),
        ({4: None}, "needs float32, bfloat16 or float16"),
        ({1: torch.zeros(37, 2, 5, 24)}, "quantized key must be int8"),
    ],
    ids=str,
)
def test_attention_cached_out_of_bounds_argument_raises(change, message):
    arguments = list(operator_arguments("int8 blocks"))
    assert arguments[1].shape == (37, 2, 5, 24)
    for at, what in change.items():
        arguments[at] = what
    with pytest.raises(RuntimeError, match=message):
        torch.ops.polyhead.attention_cached(*arguments)


@pytest.mark.parametrize("T", [1, 20])
def test_step_with_an_int8_cache_compiles_to_one_graph(T):
    torch.compiler.reset()
    mha = ph.MultiHeadAttention(8, 8, 64, 0.0, 2, backend="cpu").eval()
    x = torch.randn(1, 40 + T, 8)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(mha, fullgraph=True, backend=backend)
    with torch.no_grad():
        ours, theirs = (
            mha.make_cache(1, storage_dtype=torch.int8, preallocate=True) for _ in range(2)
        )
        for cache in (ours, theirs):
            mha(x[:, :40], cache=cache)
        assert torch.equal(compiled(x[:, 40:], cache=ours), mha(x[:, 40:], cache=theirs))
    assert "attention_cached" in graphs[0].code


def test_cache_views_export():
    query, key, value = case("int8 blocks")
    mask = ph.mask.causal()

    class Attend(torch.nn.Module):
        def forward(self, query, codes, key_scales, value_codes, value_scales, table):
            stored = (
                CacheView(data, torch.float32, key.num_tokens, key.materialize, scales, table)
                for data, scales in ((codes, key_scales), (value_codes, value_scales))
            )
            return ph.attention(query, *stored, mask=mask, backend="cpu")

    inputs = (query, key.data, key.scales, value.data, value.scales, key.block_table)
    program = torch.export.export(Attend(), inputs)
    assert "attention_cached" in str(program.graph)
    want = ph.attention(query, key, value, mask=mask, backend="cpu")
    assert torch.equal(program.module()(*inputs), want)


def test_cached_call_with_amx_chooses_cpu(monkeypatch):
    monkeypatch.setattr(cpu, "_has_amx", lambda: True)
    inputs = case("int8", dtype=torch.bfloat16)
    assert not cpu.auto_skip(build_call(*inputs), lambda name: True)
    assert ph.explain(*inputs).chosen == "cpu"
