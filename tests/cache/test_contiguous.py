"""KVCache: growth, rolling window, preallocation, int8."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

import polyhead as ph
from polyhead.cache import KVCache
from polyhead.errors import ArgumentError, ShapeError

BYTES_A_TOKEN = 2 * 3 * (5 + 5) * 4  # B = 2, G = 3, D = E = 5, float32


def tokens(T, first=0):
    """Keys whose elements are their position, and values, its negative."""
    key = torch.arange(first, first + T).float()[:, None].expand(2, 3, T, 5)
    return key, -key


def positions(held):
    key, value = held
    assert torch.equal(value, -key)
    return key[1, 2, :, 4].int().tolist()


def storages(cache):
    return [x.untyped_storage().data_ptr() for x in cache.read()]


def test_append_doubles_memory_up_to_max_tokens():
    cache = KVCache(2, 11, 3, 5)
    slots = []
    for t in range(11):
        cache.append(*tokens(1, t))
        slots.append(cache.nbytes // BYTES_A_TOKEN)
    assert slots == [1, 2, 4, 4, 8, 8, 8, 8, 11, 11, 11]
    assert positions(cache.read()) == list(range(11))
    cache.reset()
    assert cache.nbytes == 11 * BYTES_A_TOKEN


def test_append_that_grows_keeps_earlier_views_valid():
    cache = KVCache(2, 11, 3, 5)
    earlier = cache.append(*tokens(2))
    cache.append(*tokens(5, 2))
    assert positions(earlier) == [0, 1]


@pytest.mark.parametrize("window", [None, 2])
def test_preallocated_memory_keeps_its_addresses(window):
    cache = KVCache(2, 40, 3, 5, window=window, preallocate=True)
    assert cache.nbytes == (40 if window is None else 6) * BYTES_A_TOKEN
    cache.append(*tokens(3))
    at = storages(cache)
    for t in range(3, 20):
        key, value = cache.append(*tokens(1, t))
        assert [x.untyped_storage().data_ptr() for x in (key, value)] == at
        cache.reorder(torch.tensor([1, 1]))
    cache.rewind(1)
    assert storages(cache) == at
    cache.reset()
    cache.append(*tokens(1))
    assert storages(cache) == at


def test_rolling_cache_has_constant_memory_and_work(tensor_sizes):
    cache = KVCache(2, None, 3, 5, window=7)
    with tensor_sizes:
        for t in range(1000):
            held = cache.append(*tokens(1, t))
            assert positions(held) == list(range(max(0, t - 7), t + 1))
    assert cache.nbytes == 2 * (7 + 1) * BYTES_A_TOKEN
    # A move (one clone of keys, one of values) frees 16 - 7 slots; the first 16 tokens need none.
    assert tensor_sizes.operations.count("clone") == 2 * -(-(1000 - 16) // 9)


def test_large_window_with_few_tokens_allocates_few_slots():
    cache = KVCache(2, None, 3, 5, window=4095)
    cache.append(*tokens(3))
    assert cache.nbytes == 3 * BYTES_A_TOKEN


def test_append_longer_than_the_memory_returns_it_whole():
    """Only its end is stored."""
    cache = KVCache(2, None, 3, 5, window=3, max_rewind=1)
    cache.append(*tokens(6))
    held = cache.append(*tokens(20, 6))
    assert cache.start == 3
    assert positions(held) == list(range(3, 26))
    assert positions(cache.read()) == [22, 23, 24, 25]
    assert cache.start == 22
    assert cache.nbytes <= 2 * (3 + 1 + 1) * BYTES_A_TOKEN
    cache.rewind(1)
    assert positions(cache.append(*tokens(1, 25))) == [22, 23, 24, 25]


def test_window_0_keeps_the_token_itself():
    cache = KVCache(2, None, 3, 5, window=0)
    assert [positions(cache.append(*tokens(1, t))) for t in range(5)] == [[0], [1], [2], [3], [4]]


def test_window_larger_than_max_tokens_keeps_all():
    cache = KVCache(2, 10, 3, 5, window=8)
    for t in range(10):
        cache.append(*tokens(1, t))
    assert cache.nbytes == 10 * BYTES_A_TOKEN
    assert positions(cache.read()) == list(range(1, 10))
    with pytest.raises(ShapeError, match="max_tokens - length = 10 - 10 = 0 tokens; got 1"):
        cache.append(*tokens(1))


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_rewind_reaches_max_rewind_before_the_largest_length(data):
    window, max_rewind = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
    cache = KVCache(2, None, 3, 5, window=window, max_rewind=max_rewind)
    furthest = 0
    # Small chunks fill the memory and then move its end; large ones pass it by.
    for T in data.draw(st.lists(st.integers(0, 3) | st.integers(0, 20), min_size=4, max_size=25)):
        cache.append(*tokens(T, cache.length))
        furthest = max(furthest, cache.length)
        back_to = data.draw(st.integers(max(0, furthest - max_rewind), furthest))
        cache.rewind(max(0, cache.length - back_to))
        length = cache.length
        assert cache.start == max(0, length - 1 - window)
        assert positions(cache.read()) == list(range(cache.start, length))
    length = cache.length
    held = cache.append(*tokens(2, length))
    assert positions(held) == list(range(max(0, length - window), length + 2))


def test_rewind_before_the_kept_tokens_raises_with_the_numbers():
    cache = KVCache(2, None, 3, 5, window=3, max_rewind=2)
    cache.append(*tokens(40))
    message = (
        "n must be at most 2: with window = 3 the tokens before position 34 were dropped; got 5; "
        "make the cache with max_rewind = 5 or more, or reset it"
    )
    with pytest.raises(ArgumentError, match=message):
        cache.rewind(5)
    assert cache.length == 40
    cache.rewind(2)
    assert positions(cache.read()) == [34, 35, 36, 37]
    with pytest.raises(ArgumentError, match=r"n must be at most 0: .* got 1"):
        cache.rewind(1)
    cache.rewind(38)
    assert positions(cache.append(*tokens(2))) == [0, 1]


def test_kv_cache_bad_option_raises():
    with pytest.raises(ArgumentError, match="max_tokens must be given without a window; got None"):
        KVCache(2, None, 3, 5)
    for name in ("window", "max_rewind"):
        with pytest.raises(ArgumentError, match=f"{name} must be an integer of at least 0; got -1"):
            KVCache(2, 8, 3, 5, **{name: -1})


def test_int8_nbytes_is_one_per_element_and_4_per_scale():
    """One scale per token and head."""
    cache = KVCache(2, 7, 3, 64, dtype=torch.bfloat16, storage_dtype=torch.int8, preallocate=True)
    assert cache.nbytes == 2 * 7 * (2 * 3 * (64 + 4))


@pytest.mark.parametrize("window", [None, 3])
def test_quantized_values_and_scales_dequantize_to_read(window):
    cache = KVCache(2, 64, 3, 5, value_head_dim=4, storage_dtype=torch.int8, window=window)
    for T in (9, 1, 30, 1):
        cache.append(torch.randn(2, 3, T, 5), torch.randn(2, 3, T, 4))
        key, value = cache.read()
        start = cache.start
        key_codes, key_scales, value_codes, value_scales = cache.quantized()
        assert cache.start == start
        assert (key_codes.dtype, value_codes.dtype) == (torch.int8, torch.int8)
        assert torch.equal(key_codes * key_scales[..., None], key)
        assert torch.equal(value_codes * value_scales[..., None], value)
        assert key_codes.data_ptr() == cache.quantized()[0].data_ptr()  # a view


def test_quantized_of_an_unquantized_cache_raises():
    with pytest.raises(
        ArgumentError, match=r"storage_dtype must be torch.int8 to hold quantized values; got None"
    ):
        KVCache(2, 8, 3, 5).quantized()


@pytest.mark.parametrize(
    ("window", "storage_dtype"),
    [
        (None, None),
        pytest.param(None, torch.int8, marks=pytest.mark.slow),
        pytest.param(3, None, marks=pytest.mark.slow),
        pytest.param(3, torch.int8, marks=pytest.mark.slow),
    ],
)
def test_step_compiles_to_one_graph_for_all_lengths(window, storage_dtype):
    mask = ph.mask.causal() if window is None else ph.mask.causal() & ph.mask.window(before=window)

    @torch.no_grad()
    def step(query, key, value, cache):
        key, value = cache.append(key, value)
        return ph.attention(query, key, value, mask=mask, backend="reference")

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    max_tokens = 64 if window is None else None
    caches = [
        KVCache(2, max_tokens, 3, 5, window=window, storage_dtype=storage_dtype, preallocate=True)
        for _ in range(2)
    ]
    compiles = []
    for T in [7] + [1] * 24:
        query, key, value = torch.randn(2, 6, T, 5), *torch.randn(2, 2, 3, T, 5)
        got, want = (
            f(query, key, value, cache) for f, cache in zip((compiled, step), caches, strict=True)
        )
        torch.testing.assert_close(got, want)
        assert (caches[0].length, caches[0].start) == (caches[1].length, caches[1].start)
        compiles.append(counter.frame_count)
    # One for the prompt, one for all tokens; a rolling cache has others for a move of its memory,
    # and for the first time it is full. None in the second half.
    assert compiles[-1] <= (2 if window is None else 6)
    assert compiles[-1] == compiles[len(compiles) // 2]


def test_max_rewind_new_value_applies_to_later_tokens():
    cache = KVCache(1, None, 2, 4, window=3)
    for T in (9, 1, 1):
        x = torch.zeros(1, 2, T, 4)
        cache.append(x, x)
    cache.max_rewind = 20
    token = torch.arange(11.0, 41.0)[None, None, :, None].expand(1, 2, 30, 4)
    cache.append(token, token)
    cache.rewind(20)
    assert cache.read()[0][0, 0, :, 0].tolist() == [17.0, 18.0, 19.0, 20.0]
    with pytest.raises(ArgumentError, match=r"max_rewind must be an integer of at least 0; got -1"):
        cache.max_rewind = -1
