"""`flash_attn_with_kvcache`: rows of different lengths, appended to and read in place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyhead.drop_in.flash_attn import flash_attn_func, flash_attn_with_kvcache
from polyhead.drop_in.flash_attn.rotary import apply_rotary_emb
from polyhead.errors import ArgumentError, DeviceError, DtypeError, ShapeError

B, T, H, G, D, E, CAPACITY = 3, 2, 6, 2, 8, 5, 13
LENGTHS = torch.tensor([7, 0, 4], dtype=torch.int32)


def caches(random, lengths, rows=None, capacity=CAPACITY, dtype=torch.float32):
    """Caches whose slots from a row's length on hold NaN."""
    rows = len(lengths) if rows is None else rows
    k, v = random(rows, capacity, G, D, dtype=dtype), random(rows, capacity, G, E, dtype=dtype)
    for b, length in enumerate(lengths):
        k[b, length:], v[b, length:] = torch.nan, torch.nan
    return k, v


def new_tokens(random, tokens, dtype=torch.float32):
    k, v = random(B, tokens, G, D, dtype=dtype), random(B, tokens, G, E, dtype=dtype, seed=1)
    return k, v


def row_by_row(one_sequence, q, rows, slopes=None, **options):
    """Output (B, T, H, E) and lse (B, H, T) of rows = [(keys (S, G, D), values (S, G, E)), ...]."""
    results = [
        one_sequence(
            q[b],
            k,
            v,
            slopes=slopes if slopes is None or slopes.ndim == 1 else slopes[b],
            **options,
        )
        for b, (k, v) in enumerate(rows)
    ]
    outputs, sums = zip(*results, strict=True)
    return torch.stack(outputs), torch.stack(sums)


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "causal window, softcap": {"causal": True, "window_size": (1, -1), "softcap": 1.5},
    "slopes": {"alibi_slopes": torch.rand(H, generator=torch.Generator().manual_seed(1))},
    "slopes per row": {
        "alibi_slopes": torch.rand(B, H, generator=torch.Generator().manual_seed(2)),
        "causal": True,
    },
}


def expected_of(one_sequence, q, rows, alibi_slopes=None, **options):
    return row_by_row(one_sequence, q, rows, slopes=alibi_slopes, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_append_and_read_equal_no_cache(tokens, options, dtype, random, one_sequence, close):
    k_cache, v_cache = caches(random, LENGTHS, dtype=dtype)
    before = k_cache.clone(), v_cache.clone()
    q = random(B, tokens, H, D, dtype=dtype)
    k, v = new_tokens(random, tokens, dtype)
    output, lse = flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens=LENGTHS,
        return_softmax_lse=True,
        **OPTIONS[options],
    )
    rows = [
        (torch.cat([before[0][b, :n], k[b]]), torch.cat([before[1][b, :n], v[b]]))
        for b, n in enumerate(LENGTHS)
    ]
    expected, expected_lse = expected_of(one_sequence, q, rows, **OPTIONS[options])
    close(output, expected)
    close(lse, expected_lse)
    for cache, old, new in zip((k_cache, v_cache), before, (k, v), strict=True):
        for b, n in enumerate(LENGTHS):
            old[b, n : n + tokens] = new[b]
        assert torch.equal(cache.nan_to_num(99.0), old.nan_to_num(99.0))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_cache_is_exact(data, random, one_sequence, close):
    """Contiguous, by index or paged; left padding; any lengths, windows and slopes."""
    kind = data.draw(st.sampled_from(["contiguous", "index", "paged"]))
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=B, max_size=B))
    leftpad = [data.draw(st.integers(0, length)) for length in lengths]
    T, new = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 4))
    side = st.integers(-1, 6)
    options = {
        "causal": data.draw(st.booleans()),
        "window_size": (data.draw(side), data.draw(side)),
        "softcap": data.draw(st.sampled_from([0.0, 0.0, 2.5])),
        "alibi_slopes": data.draw(st.sampled_from([None, random(H).abs(), random(B, H).abs()])),
    }
    q = random(B, T, H, D)
    k, v = new_tokens(random, new)
    tokens = caches(random, lengths)
    arguments = {}
    if kind == "contiguous":
        stored = [x.clone() for x in tokens]
    elif kind == "index":
        arguments["cache_batch_idx"] = torch.tensor([3, 0, 4], dtype=torch.int32)
        stored = [torch.full((5, *x.shape[1:]), torch.nan) for x in tokens]
        for cache, x in zip(stored, tokens, strict=True):
            cache[arguments["cache_batch_idx"].long()] = x
    else:
        stored, arguments["block_table"] = paged(tokens, data.draw(st.sampled_from([1, 4, 5, 16])))
    if new:
        arguments |= {"k": k, "v": v}
    output, lse = flash_attn_with_kvcache(
        q,
        *stored,
        cache_seqlens=torch.tensor(lengths, dtype=torch.int32),
        cache_leftpad=torch.tensor(leftpad, dtype=torch.int32),
        return_softmax_lse=True,
        **options,
        **arguments,
    )
    rows = [
        (
            torch.cat([tokens[0][b, leftpad[b] : n], k[b]]),
            torch.cat([tokens[1][b, leftpad[b] : n], v[b]]),
        )
        for b, n in enumerate(lengths)
    ]
    expected, expected_lse = expected_of(one_sequence, q, rows, **options)
    close(output, expected)
    close(lse, expected_lse)


def paged(tensors, page_size):
    """Rows in pages of a shuffled pool of NaN, with room for every slot, and the block table."""
    rows, capacity = tensors[0].shape[:2]
    columns = -(-capacity // page_size)
    pages = torch.randperm(rows * columns + 3, generator=torch.Generator().manual_seed(4))
    table = pages[: rows * columns].view(rows, columns)
    pools = []
    for x in tensors:
        padded = x.new_full((rows, columns * page_size, *x.shape[2:]), torch.nan)
        padded[:, :capacity] = x
        pool = x.new_full((len(pages), page_size, *x.shape[2:]), torch.nan)
        pool[table] = padded.unflatten(1, (columns, page_size))
        pools.append(pool)
    return pools, table.int()


def test_steps_equal_whole_text(random, close):
    """A prompt in chunks, then tokens, in rows that began at different times."""
    q, k, v = random(B, 9, H, D), random(B, 9, G, D), random(B, 9, G, E, seed=1)
    whole = flash_attn_func(q, k, v, causal=True)
    k_cache, v_cache = caches(random, [0] * B)
    lengths, outputs = torch.zeros(B, dtype=torch.int32), []
    for step in (4, 1, 3, 1):
        first = int(lengths[0])
        chunk = slice(first, first + step)
        outputs.append(
            flash_attn_with_kvcache(
                q[:, chunk],
                k_cache,
                v_cache,
                k[:, chunk],
                v[:, chunk],
                cache_seqlens=lengths,
                causal=True,
            )
        )
        lengths += step
    close(torch.cat(outputs, dim=1), whole)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("mode", [{"causal": True}, {"window_size": (3, -1)}, {}])
def test_rotary_of_each_row_is_at_its_position(interleaved, mode, random, one_sequence, close):
    rotary_dim = 6
    angles = torch.arange(20)[:, None] * torch.tensor([1.0, 0.3, 0.01])
    cos, sin = angles.cos(), angles.sin()
    k_cache, v_cache = caches(random, LENGTHS)
    before = k_cache.clone(), v_cache.clone()
    q = random(B, T, H, D)
    k, v = new_tokens(random, T)
    output = flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cos,
        sin,
        cache_seqlens=LENGTHS,
        rotary_interleaved=interleaved,
        **mode,
    )

    def rotated(x, positions):
        """Features as complex numbers, one per pair."""
        turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
        pairs = turned.unflatten(-1, (-1, 2) if interleaved else (2, -1))
        pairs = pairs if interleaved else pairs.transpose(-1, -2)
        turn = torch.polar(torch.ones(()), angles[positions]).unsqueeze(1)
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
        turned = turned if interleaved else turned.transpose(-1, -2)
        return torch.cat([turned.flatten(-2), rest], dim=-1)

    rows, queries = [], []
    for b, n in enumerate(LENGTHS.tolist()):
        positions = torch.arange(n, n + T)
        k_new = rotated(k[b], positions)
        close(k_cache[b, n : n + T], k_new)
        assert torch.equal(v_cache[b, n : n + T], v[b])
        rows.append((torch.cat([before[0][b, :n], k_new]), torch.cat([before[1][b, :n], v[b]])))
        queries.append(rotated(q[b], positions if mode else torch.full((T,), n)))
    close(output, row_by_row(one_sequence, torch.stack(queries), rows, **mode)[0])


def test_rotary_equals_apply_rotary_emb(random):
    cos, sin = random(20, D // 2), random(20, D // 2, seed=1)
    k_cache, v_cache = caches(random, LENGTHS)
    k, v = new_tokens(random, T)
    flash_attn_with_kvcache(
        random(B, T, H, D), k_cache, v_cache, k, v, cos, sin, cache_seqlens=LENGTHS
    )
    expected = apply_rotary_emb(k, cos, sin, interleaved=True, seqlen_offsets=LENGTHS)
    written = torch.stack([k_cache[b, n : n + T] for b, n in enumerate(LENGTHS)])
    assert torch.equal(written, expected)


def test_16_bit_rotary_is_rounded_once(random):
    dtype = torch.bfloat16
    cos, sin = random(20, D // 2).to(dtype), random(20, D // 2, seed=1).to(dtype)
    k, v = new_tokens(random, T, dtype)
    k_cache, v_cache = caches(random, LENGTHS, dtype=dtype)
    flash_attn_with_kvcache(
        random(B, T, H, D, dtype=dtype), k_cache, v_cache, k, v, cos, sin, cache_seqlens=LENGTHS
    )
    exact = apply_rotary_emb(
        k.float(), cos.float(), sin.float(), interleaved=True, seqlen_offsets=LENGTHS
    )
    written = torch.stack([k_cache[b, n : n + T] for b, n in enumerate(LENGTHS)])
    assert torch.equal(written, exact.to(dtype))


def test_number_of_tokens_may_be_one_for_all_rows(random):
    k_cache, v_cache = caches(random, [5] * B)
    q = random(B, T, H, D)
    by_number = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=5)
    by_row = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=torch.tensor([5] * B))
    assert torch.equal(by_number, by_row)
    assert torch.equal(by_number, flash_attn_func(q, k_cache[:, :5], v_cache[:, :5]))


def test_no_number_of_tokens_is_the_whole_cache(random):
    k_cache, v_cache = caches(random, [CAPACITY] * B)
    q = random(B, T, H, D)
    whole = flash_attn_with_kvcache(q, k_cache, v_cache, causal=True)
    assert torch.equal(whole, flash_attn_func(q, k_cache, v_cache, causal=True))


def test_larger_cache_serves_its_first_rows(random):
    k_cache, v_cache = caches(random, [5, 5, 5, 0, 0], rows=5)
    q = random(B, T, H, D)
    output = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=5)
    assert torch.equal(output, flash_attn_func(q, k_cache[:B, :5], v_cache[:B, :5]))


def test_slices_of_one_storage_are_caches(random, close):
    """Keys and values of several layers in one tensor; and features that are not contiguous."""
    q = random(B, T, H, D)
    k, v = random(B, T, G, D), random(B, T, G, D, seed=1)
    storage = random(B, CAPACITY, 2, 3, G, D)
    transposed = random(B, CAPACITY, G, D, 2)
    outputs = []
    for k_cache, v_cache in (
        (storage[:, :, 0, 1], storage[:, :, 1, 1]),
        (transposed[..., 0], transposed[..., 1]),
    ):
        before = k_cache.clone(), v_cache.clone()
        other = storage[:, :, :, [0, 2]].clone()
        output = flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=LENGTHS, causal=True
        )
        expected = flash_attn_with_kvcache(q, *before, k, v, cache_seqlens=LENGTHS, causal=True)
        close(output, expected)
        assert torch.equal(k_cache, before[0])
        assert torch.equal(v_cache, before[1])
        assert torch.equal(storage[:, :, :, [0, 2]], other)
        outputs.append(output)
    assert not torch.equal(*outputs)


def test_rows_may_share_one_of_the_cache(random, one_sequence, close):
    k_cache, v_cache = caches(random, [4, 9])
    q = random(B, T, H, D)
    rows = torch.tensor([1, 1, 0], dtype=torch.int32)
    lengths = torch.tensor([9, 6, 4], dtype=torch.int32)
    output = flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=lengths, cache_batch_idx=rows, causal=True
    )
    kept = [(k_cache[r, :n], v_cache[r, :n]) for r, n in zip(rows, lengths, strict=True)]
    close(output, row_by_row(one_sequence, q, kept, causal=True)[0])


def test_row_without_keys_is_zero_with_lse_inf(random):
    k_cache, v_cache = caches(random, LENGTHS)
    output, lse = flash_attn_with_kvcache(
        random(B, T, H, D), k_cache, v_cache, cache_seqlens=LENGTHS, return_softmax_lse=True
    )
    assert torch.equal(output[1], torch.zeros(T, H, E))
    assert torch.equal(lse[1], torch.full((H, T), torch.inf))
    assert bool(output.isfinite().all())


@pytest.mark.parametrize("options", ["plain", "causal window, softcap", "slopes per row"])
@pytest.mark.parametrize("kind", ["contiguous", "index", "paged"])
def test_caches_are_read_in_place(kind, options, random, tensor_sizes, kernels):
    lengths = torch.tensor([700, 3, 512], dtype=torch.int32)
    stored = caches(random, lengths, capacity=1024)
    arguments = {}
    if kind == "index":
        arguments["cache_batch_idx"] = torch.tensor([1, 0, 2])
        lengths = lengths[[1, 0, 2]]
    elif kind == "paged":
        stored, arguments["block_table"] = paged(stored, 16)
    q = random(B, T, H, D)
    k, v = new_tokens(random, T)
    with tensor_sizes:
        output = flash_attn_with_kvcache(
            q, *stored, k, v, cache_seqlens=lengths, **arguments, **OPTIONS[options]
        )
    assert bool(output.isfinite().all())
    held = lengths.sum().item() * G * E
    in_caches = {x.untyped_storage().nbytes() // x.element_size() for x in stored}
    assert tensor_sizes.largest in in_caches  # views of the caches themselves
    assert tensor_sizes.peak - sum(x.untyped_storage().nbytes() for x in stored) < held


def test_num_splits_has_no_effect(random):
    k_cache, v_cache = caches(random, LENGTHS)
    q = random(B, T, H, D)
    outputs = [
        flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=LENGTHS, num_splits=n)
        for n in (0, 1, 7)
    ]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_there_is_no_gradient_as_in_theirs(random):
    k_cache, v_cache = caches(random, LENGTHS)
    q = random(B, T, H, D).requires_grad_()
    k, v = (x.requires_grad_() for x in new_tokens(random, T))
    output = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=LENGTHS)
    assert not output.requires_grad
    assert not k_cache.requires_grad


TABLE = torch.zeros(B, 2, dtype=torch.int32)
REFUSED = {
    "k alone": ({"v": None}, ArgumentError, "k, v must be passed together; got k alone"),
    "no number": (
        {"cache_seqlens": None},
        ArgumentError,
        "cache_seqlens must be given with k and v, which are written after it; got None",
    ),
    "no room": (
        {"cache_seqlens": torch.tensor([12, 0, 4])},
        ArgumentError,
        "cache_seqlens must be from 0 to the cache's 13 tokens less the 2 new ones; got [12, 0, 4]",
    ),
    "no room for a number": (
        {"cache_seqlens": 14, "k": None, "v": None},
        ArgumentError,
        "cache_seqlens must be from 0 to the cache's 13 tokens; got [14, 14, 14]",
    ),
    "negative number": (
        {"cache_seqlens": -1},
        ArgumentError,
        "cache_seqlens must be an integer of at least 0; got -1",
    ),
    "negative numbers": (
        {"cache_seqlens": torch.tensor([-1, 0, 4])},
        ArgumentError,
        "cache_seqlens must be from 0 to",
    ),
    "number of numbers": (
        {"cache_seqlens": torch.tensor([1, 2])},
        ShapeError,
        "cache_seqlens must be (batch_size,) = (3,); got (2,)",
    ),
    "dtype": (
        {"k_cache": torch.zeros(B, CAPACITY, G, D, dtype=torch.int8)},
        DtypeError,
        "k_cache must be floating point; got torch.int8",
    ),
    "dtypes": (
        {"v_cache": torch.zeros(B, CAPACITY, G, E, dtype=torch.bfloat16)},
        DtypeError,
        "v_cache must have q's dtype, torch.float32; got torch.bfloat16",
    ),
    "device": (
        {"cache_leftpad": torch.zeros(B, device="meta").int()},
        DeviceError,
        "cache_leftpad must be on q's device, cpu; got meta",
    ),
    "heads": (
        {"k_cache": torch.zeros(B, CAPACITY, 4, D)},
        ShapeError,
        "k_cache must have a number of heads that divides q's 6; got 4",
    ),
    "values": (
        {"v_cache": torch.zeros(B, CAPACITY - 1, G, E)},
        ShapeError,
        "v_cache must be (batch_size_cache, seqlen_cache, nheads_k, headdim) with k_cache's",
    ),
    "new keys": (
        {"k": torch.zeros(B, T, G, D + 1)},
        ShapeError,
        "k must be (batch_size, seqlen_new, nheads_k, headdim) = (3, any, 2, 8); got (3, 2, 2, 9)",
    ),
    "new values": (
        {"v": torch.zeros(B, T + 1, G, E)},
        ShapeError,
        "v must be (batch_size, seqlen_new, nheads_k, headdim) = (3, 2, 2, 5); got (3, 3, 2, 5)",
    ),
    "rows": (
        {"q": torch.zeros(4, T, H, D), "k": None, "v": None, "cache_seqlens": 3},
        ShapeError,
        "k_cache must have a row for each of q's 4; got 3; pass cache_batch_idx",
    ),
    "index": (
        {"cache_batch_idx": torch.tensor([0, 1, 3])},
        ArgumentError,
        "cache_batch_idx must be from 0 to batch_size_cache - 1 = 2; got [0, 1, 3]",
    ),
    "left padding": (
        {"cache_leftpad": torch.tensor([0, -1, 0])},
        ArgumentError,
        "cache_leftpad must be from 0 to the cache's 13 tokens; got [0, -1, 0]",
    ),
    "index and pages": (
        {"cache_batch_idx": torch.tensor([0, 1, 2]), "block_table": TABLE},
        ArgumentError,
        "cache_batch_idx must be None with a block table, which has the blocks of each row; got "
        "(3,); pass block_table[cache_batch_idx]",
    ),
    "pages": (
        {"block_table": TABLE + 3},
        ArgumentError,
        "block_table must be from 0 to num_blocks - 1 = 2 where a row has keys; got [3, 3, 3]",
    ),
    "table": (
        {"block_table": TABLE[0]},
        ShapeError,
        "block_table must be (batch_size, max_num_blocks_per_seq) = (3, any); got (2,)",
    ),
    "table's type": ({"block_table": [[0]] * B}, DtypeError, "block_table must be a tensor"),
    "rotary without sin": (
        {"rotary_cos": torch.ones(20, 4)},
        ArgumentError,
        "rotary_cos, rotary_sin must be passed together, and with k and v; got rotary_cos; pass",
    ),
    "rotary without k": (
        {"rotary_cos": torch.ones(20, 4), "rotary_sin": torch.ones(20, 4), "k": None, "v": None},
        ArgumentError,
        "rotary_cos, rotary_sin must be passed together, and with k and v; got rotary_cos, rot",
    ),
    "short rotary": (
        {"rotary_cos": torch.ones(8, 4), "rotary_sin": torch.ones(8, 4)},
        ShapeError,
        "rotary_cos must have a row for each position, 0 to 8; got 8 rows; pass longer tables",
    ),
    "wide rotary": (
        {"rotary_cos": torch.ones(20, 5), "rotary_sin": torch.ones(20, 5)},
        ShapeError,
        "rotary_cos must be (seqlen_rotary, rotary_dim / 2), the second from 1 to headdim / 2 = 4",
    ),
    "rotary's dtype": (
        {"rotary_cos": torch.ones(20, 4).half(), "rotary_sin": torch.ones(20, 4)},
        DtypeError,
        "rotary_cos must be torch.float32, as the features, or float32; got torch.float16",
    ),
    "window": ({"window_size": (1,)}, ArgumentError, "window_size must be (left, right)"),
    "scale": ({"softmax_scale": float("nan")}, ArgumentError, "softmax_scale must be finite"),
    "slopes": ({"alibi_slopes": torch.ones(2)}, ShapeError, "alibi_slopes must be (nheads,) = (6,"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_argument_raises_and_writes_nothing(case, random):
    changed, error, message = REFUSED[case]
    k_cache, v_cache = caches(random, LENGTHS)
    k, v = new_tokens(random, T)
    arguments = {
        "q": random(B, T, H, D),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "k": k,
        "v": v,
        "cache_seqlens": LENGTHS,
    }
    before = k_cache.clone(), v_cache.clone()
    with pytest.raises(error) as raised:
        flash_attn_with_kvcache(**arguments | changed)
    assert str(raised.value).startswith(message)
    for cache, old in zip((k_cache, v_cache), before, strict=True):
        assert torch.equal(cache.nan_to_num(99.0), old.nan_to_num(99.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_cache_is_as_good_as_eager(
    dtype, random, one_sequence, naive_attention, assert_as_good_as_eager
):
    k_cache, v_cache = caches(random, LENGTHS, dtype=dtype)
    q = random(B, T, H, D, dtype=dtype)
    output = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=LENGTHS)
    rows = [(k_cache[b, :n], v_cache[b, :n]) for b, n in enumerate(LENGTHS)]
    eager = [
        naive_attention(*(x.transpose(0, 1)[None] for x in (q[b], *row)))[0].transpose(0, 1)
        for b, row in enumerate(rows)
    ]
    exact, _ = row_by_row(one_sequence, q, rows)
    assert_as_good_as_eager(output, torch.stack(eager), exact)


@pytest.mark.parametrize("D", [24, 80, 96])
@pytest.mark.parametrize("T", [1, 17, 257])
@pytest.mark.parametrize("group", [1, 3, 7])
def test_odd_sizes_are_exact(D, T, group, random, one_sequence, close):
    """Decoding, chunks and prompts, in pages of 3."""
    lengths = torch.tensor([301, 40])
    tokens = [random(2, 320, 1, D), random(2, 320, 1, D, seed=1)]
    for x in tokens:
        x[0, 301:], x[1, 40:] = torch.nan, torch.nan
    pools, table = paged(tokens, 3)
    q = random(2, T, group, D)
    options = {"causal": True, "window_size": (100, 0)}
    output = flash_attn_with_kvcache(q, *pools, cache_seqlens=lengths, block_table=table, **options)
    rows = [tuple(x[b, :n] for x in tokens) for b, n in enumerate(lengths)]
    close(output, row_by_row(one_sequence, q, rows, **options)[0])
