"""Caches whose rows have different lengths: each row as a cache of its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polyhead as ph
from polyhead.errors import ArgumentError, DtypeError, ShapeError

B, G, D, E, MOST = 3, 2, 8, 4, 40
CACHES = {
    "contiguous": lambda: ph.KVCache(B, MOST, G, D, value_head_dim=E),
    "preallocated": lambda: ph.KVCache(B, MOST, G, D, value_head_dim=E, preallocate=True),
    "int8": lambda: ph.KVCache(B, MOST, G, D, value_head_dim=E, storage_dtype=torch.int8),
    "paged": lambda: ph.PagedKVCache(B, MOST, G, D, value_head_dim=E, block_size=4),
    "paged int8": lambda: ph.PagedKVCache(
        B, MOST, G, D, value_head_dim=E, block_size=4, storage_dtype=torch.int8
    ),
}


def tokens(T):
    return torch.randn(B, G, T, D), torch.randn(B, G, T, E)


class Rows:
    """The model: one list of tokens per row."""

    def __init__(self):
        self.rows = [(torch.zeros(G, 0, D), torch.zeros(G, 0, E))] * B

    def append(self, key, value, counts):
        self.rows = [
            (torch.cat((k, key[b, :, :n]), 1), torch.cat((v, value[b, :, :n]), 1))
            for b, ((k, v), n) in enumerate(zip(self.rows, counts, strict=True))
        ]

    def rewind(self, counts):
        keep = [k.shape[1] - n for (k, _), n in zip(self.rows, counts, strict=True)]
        self.rows = [(k[:, :n], v[:, :n]) for (k, v), n in zip(self.rows, keep, strict=True)]

    @property
    def lengths(self):
        return [k.shape[1] for k, _ in self.rows]


def assert_holds(cache, model):
    assert cache.lengths.tolist() == model.lengths
    assert cache.length == max(model.lengths)
    key, value = cache.read()
    tolerance = 0.05 if cache.storage_dtype == torch.int8 else 0.0
    for row, (k, v) in enumerate(model.rows):
        n = k.shape[1]
        torch.testing.assert_close(key[row, :, :n], k, atol=tolerance, rtol=0)
        torch.testing.assert_close(value[row, :, :n], v, atol=tolerance, rtol=0)
        assert not key[row, :, n:].any()
    for name in ("block_refcounts",):
        if hasattr(cache, name):
            used = sum(-(-n // cache.block_size) for n in model.lengths)
            assert int(cache.block_refcounts.sum()) == used


steps = st.one_of(
    st.tuples(st.just("append"), st.lists(st.integers(0, 6), min_size=B, max_size=B)),
    st.tuples(st.just("rewind"), st.lists(st.integers(0, 9), min_size=B, max_size=B)),
    st.tuples(st.just("token"), st.none()),
    st.tuples(st.just("reorder"), st.lists(st.integers(0, B - 1), min_size=B, max_size=B)),
)


@pytest.mark.parametrize("kind", CACHES)
@settings(max_examples=25, deadline=None)
@given(st.lists(steps, max_size=7))
def test_cache_rows_of_any_lengths_equal_rows_alone(kind, program):
    torch.manual_seed(len(program))
    cache, model = CACHES[kind](), Rows()
    for step, numbers in program:
        if step == "append" and max(model.lengths) <= MOST - 6:
            key, value = tokens(6)
            cache.append(key, value, lengths=numbers)
            model.append(key, value, numbers)
        elif step == "rewind":
            numbers = [min(n, most) for n, most in zip(numbers, model.lengths, strict=True)]
            cache.rewind(torch.tensor(numbers))
            model.rewind(numbers)
        elif step == "token" and max(model.lengths) < MOST:
            key, value = tokens(1)
            cache.append(key, value)
            model.append(key, value, [1] * B)
        elif step == "reorder":
            cache.reorder(torch.tensor(numbers))
            model.rows = [model.rows[row] for row in numbers]
    refcounts = getattr(cache, "block_refcounts", None)
    if refcounts is not None and any(step == "reorder" for step, _ in program):
        assert cache.lengths.tolist() == model.lengths
        return
    assert_holds(cache, model)


@pytest.mark.parametrize("kind", ["contiguous", "paged", "paged int8"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_attention_over_cached_rows_equals_rows_alone(kind, backend):
    """The law of caches, per row: prompts of other lengths, then chunks of other lengths."""
    if backend == "cpu" and ph.explain(*[torch.ones(1, 1, 1, 8)] * 3).reasons["cpu"]:
        pytest.skip("no kernels")
    cache, H = CACHES[kind](), 4
    every = [[] for _ in range(B)]
    query_all, output_all = [[] for _ in range(B)], [[] for _ in range(B)]
    for T, counts in ((9, [9, 2, 5]), (1, None), (4, [0, 4, 3]), (1, None)):
        query = torch.randn(B, H, T, D)
        key, value = tokens(T)
        views = cache.append_as_views(key, value, lengths=counts)
        with torch.no_grad():
            output = ph.attention(query, *views, mask=ph.mask.causal(), backend=backend)
        for row, n in enumerate([T] * B if counts is None else counts):
            every[row].append((key[row, :, :n], value[row, :, :n]))
            query_all[row].append(query[row, :, :n])
            output_all[row].append(output[row, :, :n])
    tolerance = 0.1 if "int8" in kind else 1e-5
    for row in range(B):
        key, value = (torch.cat(parts, 1)[None] for parts in zip(*every[row], strict=True))
        query = torch.cat(query_all[row], 1)[None]
        want = ph.attention(query, key, value, mask=ph.mask.causal(), backend="reference")
        got = torch.cat(output_all[row], 1)[None]
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def modules():
    yield ph.MultiHeadAttention(12, 12, 64, 0.0, 3, rope=ph.Rope(4))
    yield ph.MultiHeadAttention(12, 12, 64, 0.0, 3, alibi=True)
    bias = ph.positions.RelativeBias(3, bidirectional=False, num_buckets=4, max_distance=16)
    torch.nn.init.normal_(bias.weight)
    yield ph.MultiHeadAttention(12, 12, 64, 0.0, 3, position_bias=bias)
    yield ph.MultiHeadLatentAttention(
        12, 12, 64, 0.0, 3, kv_rank=6, nope_head_dim=4, rope_head_dim=2, value_head_dim=4,
        rope=ph.Rope(2),
    )  # fmt: skip


@pytest.mark.parametrize("at", range(4), ids=["rope", "alibi", "bias", "latent"])
def test_module_over_rows_of_different_lengths_equals_rows_alone(at):
    """Right-padded prompts, then `rewind` of the padding: continuous batching in two calls."""
    torch.manual_seed(0)
    mha = list(modules())[at].eval()
    lengths = torch.tensor([7, 3, 5])
    x, later = torch.randn(B, 7, 12), torch.randn(B, 2, 12)
    with torch.no_grad():
        cache = mha.make_cache(batch=B)
        prompt = mha(x, cache=cache)
        cache.rewind(7 - lengths)
        chunk = mha(later, cache=cache)
        for row, n in enumerate(lengths.tolist()):
            whole = torch.cat((x[row, :n], later[row]))[None]
            want = mha(whole)
            torch.testing.assert_close(prompt[row, :n], want[0, :n], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(chunk[row], want[0, n:], atol=1e-5, rtol=1e-5)


def test_finished_rows_are_emptied_by_rewind():
    cache = CACHES["paged"]()
    cache.append(*tokens(9))
    done = torch.tensor([False, True, False])
    cache.rewind(cache.lengths * done)
    assert cache.lengths.tolist() == [9, 0, 9]
    assert cache.block_table[1].tolist() == [-1, -1, -1]
    cache.reset()
    assert cache.lengths.tolist() == [0, 0, 0]


def test_a_shared_block_is_copied_for_the_row_that_writes():
    """Row 1 rewinds into a block that row 0 keeps."""
    cache = CACHES["paged"]()
    cache.append(*tokens(6))
    cache.reorder(torch.tensor([0, 0, 0]))
    kept = cache.read()[0][0].clone()
    cache.rewind(torch.tensor([0, 1, 0]))
    key, value = tokens(1)
    cache.append(key, value, lengths=[0, 1, 0])
    got = cache.read()[0]
    assert torch.equal(got[0], kept)
    assert torch.equal(got[2], kept)
    assert torch.equal(got[1, :, 5], key[1, :, 0])


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize(
    ("lengths", "error", "text"),
    [
        ([1, 2], ShapeError, r"lengths must be \(B,\) = \(3,\), one per row; got \(2,\)"),
        ([1, 2, 4], ArgumentError, r"lengths must be from 0 to \[3, 3, 3\]; got \[1, 2, 4\]"),
        ([1, -1, 0], ArgumentError, r"got \[1, -1, 0\]"),
        ([1.0, 2.0, 0.0], DtypeError, "lengths must be int32 or int64; got torch.float32"),
    ],
)
def test_bad_lengths_are_refused_and_change_nothing(kind, lengths, error, text):
    cache = CACHES[kind]()
    cache.append(*tokens(2))
    with pytest.raises(error, match=text):
        cache.append(*tokens(3), lengths=lengths)
    assert cache.lengths.tolist() == [2, 2, 2]
    with pytest.raises(ArgumentError, match=r"n must be from 0 to \[2, 2, 2\]; got \[0, 3, 0\]"):
        cache.rewind(torch.tensor([0, 3, 0]))
    cache.rewind(torch.tensor([0, 2, 1]))
    with pytest.raises(ArgumentError, match="n must be at most length = 0; got 1"):
        cache.rewind(1)
    assert cache.lengths.tolist() == [2, 0, 1]


def test_rows_of_a_window_have_one_length():
    cache = ph.KVCache(B, None, G, D, value_head_dim=E, window=4)
    cache.append(*tokens(2))
    text = "must be None with window = 4: the rows of a window have one length"
    with pytest.raises(ArgumentError, match=f"lengths {text}"):
        cache.append(*tokens(2), lengths=[1, 2, 2])
    with pytest.raises(ArgumentError, match=f"n {text}"):
        cache.rewind(torch.tensor([1, 0, 0]))
    assert cache.length == 2


def test_max_tokens_counts_the_longest_row():
    cache = CACHES["contiguous"]()
    cache.append(*tokens(MOST), lengths=[MOST, 1, 5])
    cache.append(*tokens(MOST), lengths=[0, MOST - 1, 3])
    with pytest.raises(ShapeError, match="key must have at most max_tokens"):
        cache.append(*tokens(1))
    assert cache.lengths.tolist() == [MOST, MOST, 8]
