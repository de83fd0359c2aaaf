"""PagedKVCache: shared blocks, copy-on-write, reuse of free blocks."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyhead.cache import PagedKVCache
from polyhead.errors import ArgumentError


def paged(batch, **options):
    return PagedKVCache(batch, 40, 3, 5, value_head_dim=2, block_size=4, **options)


def tokens(batch, T):
    return torch.randn(batch, 3, T, 5), torch.randn(batch, 3, T, 2)


def table(cache):
    return cache.block_table.tolist()


def test_reorder_shares_blocks_without_a_copy():
    cache = paged(1)
    key, value = cache.append(*tokens(1, 10))
    before = [pool.data_ptr() for pool in cache.pools]
    cache.reorder(torch.tensor([0, 0, 0]))
    assert cache.batch == 3
    assert table(cache) == [[0, 1, 2]] * 3
    assert cache.block_refcounts.tolist() == [3, 3, 3]
    assert [pool.data_ptr() for pool in cache.pools] == before
    for got, want in zip(cache.read(), (key, value), strict=True):
        assert torch.equal(got, want.expand(3, -1, -1, -1))


def test_append_copies_the_shared_partial_block_only():
    """The first row keeps the original."""
    cache = paged(1)
    prompt = cache.append(*tokens(1, 6))
    cache.reorder(torch.tensor([0, 0, 0]))
    new = tokens(3, 1)
    held = cache.append(*new)
    assert table(cache) == [[0, 1], [0, 2], [0, 3]]
    assert cache.block_refcounts[:4].tolist() == [3, 1, 1, 1]
    for got, before, after in zip(held, prompt, new, strict=True):
        assert torch.equal(got, torch.cat((before.expand(3, -1, -1, -1), after), dim=2))


def test_append_after_a_full_shared_block_copies_none():
    cache = paged(1)
    cache.append(*tokens(1, 8))
    cache.reorder(torch.tensor([0, 0]))
    cache.append(*tokens(2, 1))
    assert table(cache) == [[0, 1, 2], [0, 1, 3]]


def test_append_of_no_tokens_allocates_no_block():
    cache = paged(1)
    cache.append(*tokens(1, 6))
    cache.reorder(torch.tensor([0, 0]))
    cache.append(*tokens(2, 0))
    assert table(cache) == [[0, 1], [0, 1]]


def test_blocks_freed_by_rewind_and_reorder_are_reused():
    cache = paged(2, num_blocks=6)
    cache.append(*tokens(2, 9))
    assert table(cache) == [[0, 1, 2], [3, 4, 5]]
    cache.rewind(5)
    assert table(cache) == [[0], [3]]
    cache.append(*tokens(2, 5))
    assert table(cache) == [[0, 1, 2], [3, 4, 5]]
    cache.reorder(torch.tensor([1, 1]))
    assert cache.block_refcounts.tolist() == [0, 0, 0, 2, 2, 2]
    cache.append(*tokens(2, 4))
    assert table(cache) == [[3, 4, 5, 1], [3, 4, 0, 2]]
    cache.reset()
    assert cache.block_refcounts.tolist() == [0] * 6
    assert cache.num_blocks == 6


def test_append_to_a_full_fixed_pool_raises_with_the_numbers():
    cache = paged(2, num_blocks=5)
    cache.append(*tokens(2, 6))
    before = pickle.dumps(cache)
    message = (
        "num_blocks must leave 2 free blocks to append to batch = 2 rows at length = 6; "
        "got 1 free of 5; rewind or reset the cache, or make one with more num_blocks"
    )
    with pytest.raises(ArgumentError, match=message):
        cache.append(*tokens(2, 3))
    assert pickle.dumps(cache) == before
    cache.append(*tokens(2, 2))


def test_pool_doubles_up_to_max_tokens_of_all_rows():
    cache = paged(2)
    assert cache.num_blocks == 0
    sizes = []
    for _ in range(40):
        cache.append(*tokens(2, 1))
        sizes.append(cache.num_blocks)
    assert sorted(set(sizes)) == [2, 4, 8, 16, 20]
    assert cache.nbytes == 20 * 3 * 4 * (5 + 2) * 4 + cache.block_table.nbytes


@pytest.mark.parametrize("storage_dtype", [None, torch.int8], ids=["plain", "int8"])
def test_block_table_addresses_every_token(storage_dtype):
    cache = paged(3, storage_dtype=storage_dtype)
    cache.append(*tokens(3, 11))
    cache.reorder(torch.tensor([2, 0, 2]))
    key, value = cache.append(*tokens(3, 3))
    if storage_dtype is None:
        keys, values = cache.pools
    else:
        key_codes, key_scales, value_codes, value_scales = cache.pools
        keys, values = key_codes * key_scales[..., None], value_codes * value_scales[..., None]
    assert cache.block_table.dtype == torch.int32
    for b in range(3):
        for p in range(cache.length):
            block, slot = cache.block_table[b, p // 4], p % 4
            assert torch.equal(keys[block, :, slot], key[b, :, p])
            assert torch.equal(values[block, :, slot], value[b, :, p])


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_blocks_are_never_lost_or_written_for_two_rows(data):
    cache = paged(data.draw(st.integers(1, 3)))
    steps = st.sampled_from(["append", "rewind", "reorder"])
    for step in data.draw(st.lists(steps, min_size=3, max_size=20)):
        before = cache.read()[0]
        if step == "append":
            T = data.draw(st.integers(0, min(9, 40 - cache.length)))
            key, value = tokens(cache.batch, T)
            want = torch.cat((before, key), dim=2)
            cache.append(key, value)
        elif step == "rewind":
            n = data.draw(st.integers(0, cache.length))
            want = before[:, :, : cache.length - n]
            cache.rewind(n)
        else:
            rows = data.draw(st.lists(st.integers(0, cache.batch - 1), min_size=1, max_size=4))
            want = before[rows]
            cache.reorder(torch.tensor(rows))
        assert torch.equal(cache.read()[0], want)
        rows = table(cache)
        assert all(len(row) == -(-cache.length // 4) for row in rows)
        flat = [block for row in rows for block in row]
        assert cache.block_refcounts.tolist() == [flat.count(b) for b in range(cache.num_blocks)]
        for a in rows:
            for b in rows:
                shared = [one == other for one, other in zip(a, b, strict=True)]
                # Rows share whole prefixes: after the first difference they share no block.
                assert shared == sorted(shared, reverse=True)
                assert set(a) & set(b) == set(a[: sum(shared)])


def test_paged_cache_bad_size_raises():
    for name in ("block_size", "num_blocks"):
        with pytest.raises(ArgumentError, match=f"{name} must be an integer of at least 1; got 0"):
            PagedKVCache(1, 8, 1, 2, **{name: 0})
    with pytest.raises(ArgumentError, match="max_tokens must be an integer of at least 1; got Non"):
        PagedKVCache(1, None, 1, 2)


def test_repr_shows_the_number_of_blocks_in_use():
    cache = paged(1, num_blocks=7)
    cache.append(*tokens(1, 6))
    assert "block_size=4, blocks in use=2 of 7" in repr(cache)
