"""Packed sequences: each as if it were alone, whatever lies beside it in memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyhead.drop_in.flash_attn import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from polyhead.errors import ArgumentError, DtypeError, ShapeError

H, G, D, E = 6, 2, 8, 3

LENGTHS = {
    "same": ([3, 1, 7, 2], [3, 1, 7, 2]),
    "uniform": ([4, 4, 4], [4, 4, 4]),
    "uniform, more keys": ([2, 2, 2], [5, 5, 5]),
    "one sequence": ([5], [9]),
    "different": ([3, 1, 7, 2], [11, 1, 2, 17]),
    "decoding": ([1, 1, 1], [13, 2, 7]),
    "empty sequences": ([0, 3, 0, 2], [4, 0, 0, 5]),
    "same, empty sequences": ([0, 3, 0, 2, 0], [0, 3, 0, 2, 0]),
    "no queries": ([0, 0], [3, 4]),
    "no sequences": ([], []),
}
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "causal window, softcap": {"causal": True, "window_size": (1, -1), "softcap": 1.5},
    "slopes": {"alibi_slopes": torch.rand(H, generator=torch.Generator().manual_seed(1))},
}


def sequences(q, k, v, bounds_q, bounds_k):
    """Queries, keys and values of each sequence."""
    q_bounds, k_bounds = bounds_q.tolist(), bounds_k.tolist()
    for n in range(len(q_bounds) - 1):
        keys = slice(k_bounds[n], k_bounds[n + 1])
        yield q[q_bounds[n] : q_bounds[n + 1]], k[keys], v[keys]


@pytest.fixture(scope="session")
def one_by_one(one_sequence):
    """Output (total, H, E) and lse (H, total) of sequences that are computed alone."""

    def compute(q, k, v, bounds_q, bounds_k, alibi_slopes=None, softmax_scale=None, **options):
        linked = sum(x[:0].sum() for x in (q, k, v)).double()
        outputs = [linked + torch.zeros(0, H, v.shape[-1])]
        sums = [torch.zeros(H, 0, dtype=torch.float64)]
        for n, (q_n, k_n, v_n) in enumerate(sequences(q, k, v, bounds_q, bounds_k)):
            slopes = alibi_slopes
            if slopes is not None and slopes.ndim == 2:
                slopes = slopes[n]
            output, lse = one_sequence(q_n, k_n, v_n, slopes=slopes, scale=softmax_scale, **options)
            outputs.append(output)
            sums.append(lse)
        return torch.cat(outputs), torch.cat(sums, dim=1)

    return compute


def packed(random, lengths_q, lengths_k, dtype=torch.float32):
    return (
        random(sum(lengths_q), H, D, dtype=dtype).requires_grad_(),
        random(sum(lengths_k), G, D, dtype=dtype).requires_grad_(),
        random(sum(lengths_k), G, E, dtype=dtype, seed=1).requires_grad_(),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_equals_one_by_one(lengths, options, dtype, random, cumulative, one_by_one, close):
    lengths_q, lengths_k = LENGTHS[lengths]
    inputs = packed(random, lengths_q, lengths_k, dtype)
    bounds = cumulative(lengths_q), cumulative(lengths_k)
    output, lse, _ = flash_attn_varlen_func(
        *inputs, *bounds, 17, 17, return_attn_probs=True, **OPTIONS[options]
    )
    expected, expected_lse = one_by_one(*inputs, *bounds, **OPTIONS[options])
    close(output, expected)
    close(lse, expected_lse)
    assert output.is_contiguous()
    direction = random(*output.shape, dtype=dtype)
    ours = torch.autograd.grad(output, inputs, direction)
    theirs = torch.autograd.grad(
        expected, inputs, direction.double(), allow_unused=True, materialize_grads=True
    )
    for gradient, expected_gradient in zip(ours, theirs, strict=True):
        close(gradient, expected_gradient, 5)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_lengths_and_options_are_exact(data, random, cumulative, one_by_one, close):
    length = st.integers(0, 21)
    lengths_q = data.draw(st.lists(length, max_size=5))
    same = data.draw(st.booleans())
    count = len(lengths_q)
    lengths_k = lengths_q
    if not same:
        lengths_k = data.draw(st.lists(length, min_size=count, max_size=count))
    side = st.integers(-1, 9)
    options = {
        "causal": data.draw(st.booleans()),
        "window_size": (data.draw(side), data.draw(side)),
        "softcap": data.draw(st.sampled_from([0.0, 0.0, 2.5])),
        "softmax_scale": data.draw(st.sampled_from([None, 0.3])),
        "alibi_slopes": data.draw(st.sampled_from([None, random(H).abs(), random(count, H).abs()])),
    }
    q, k, v = (x.detach() for x in packed(random, lengths_q, lengths_k))
    bounds = cumulative(lengths_q), cumulative(lengths_k)
    output, lse, _ = flash_attn_varlen_func(
        q, k, v, *bounds, 21, 21, return_attn_probs=True, **options
    )
    expected, expected_lse = one_by_one(q, k, v, *bounds, **options)
    close(output, expected)
    close(lse, expected_lse)


def test_equal_bounds_in_other_tensors_are_one_call(random, cumulative, observed, kernels):
    inputs = packed(random, [3, 70, 2], [3, 70, 2])
    with observed() as calls:
        flash_attn_varlen_func(
            *inputs, cumulative([3, 70, 2]), cumulative([3, 70, 2]).long(), 70, 70
        )
    assert [(call.B, call.T, call.S) for call in calls] == [(1, 75, 75)]


def test_uniform_lengths_are_read_in_place(random, cumulative, observed):
    q, k, v = (x.detach() for x in packed(random, [2, 2, 2], [5, 5, 5]))
    with observed() as calls:
        flash_attn_varlen_func(q, k, v, cumulative([2, 2, 2]), cumulative([5, 5, 5]), 2, 5)
    (call,) = calls
    assert call.query.data_ptr() == q.data_ptr()
    assert call.key.data_ptr() == k.data_ptr()
    assert call.value.data_ptr() == v.data_ptr()


def test_padding_is_less_than_half(random, cumulative, observed):
    """One long sequence among short ones does not make them long."""
    lengths = [1] * 50 + [100]
    inputs = packed(random, lengths, [n + 1 for n in lengths])
    with observed() as calls:
        flash_attn_varlen_func(
            *inputs, cumulative(lengths), cumulative([n + 1 for n in lengths]), 100, 101
        )
    assert sorted((call.B, call.T, call.S) for call in calls) == [(1, 100, 101), (50, 1, 2)]
    assert sum(call.B * call.T for call in calls) < 2 * sum(lengths)


def test_long_sequences_are_not_padded_to_the_longest(random, cumulative, observed):
    """Where a call costs less than padding, there are more calls."""
    short, long = [8, 9, 10], [800, 900, 1000]
    for lengths, expected in ((short, [3]), (long, [1, 1, 1])):
        q, k, v = (x.detach() for x in packed(random, lengths, [n + 1 for n in lengths]))
        bounds = cumulative(lengths), cumulative([n + 1 for n in lengths])
        with observed() as calls:
            flash_attn_varlen_func(q, k, v, *bounds, 1001, 1001)
        assert [call.B for call in calls] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_tensor_of_all_queries_by_all_keys(dtype, random, cumulative, tensor_sizes, kernels):
    lengths = [7, 11] * 40
    total = sum(lengths)
    inputs = packed(random, lengths, lengths, dtype)
    bounds = cumulative(lengths)
    with tensor_sizes:
        output = flash_attn_varlen_func(*inputs, bounds, bounds, 11, 11, causal=True)
        output.sum().backward()
    assert tensor_sizes.largest < total * total


def test_nan_of_another_sequence_does_not_leak(random, cumulative):
    lengths_q, lengths_k = [2, 5, 3], [4, 9, 6]
    q, k, v = (x.detach().clone() for x in packed(random, lengths_q, lengths_k))
    for x, (first, stop) in ((q, (2, 7)), (k, (4, 13)), (v, (4, 13))):
        x[first:stop] = torch.nan
    output = flash_attn_varlen_func(
        q, k, v, cumulative(lengths_q), cumulative(lengths_k), 5, 9, causal=True
    )
    assert output.isnan().flatten(1).all(dim=1).tolist() == [False] * 2 + [True] * 5 + [False] * 3
    assert bool(output[[0, 1, 7, 8, 9]].isfinite().all())


def test_tokens_after_the_last_sequence_are_zero(random, cumulative, one_by_one, close):
    q, k, v = (x.detach().clone() for x in packed(random, [9], [12]))
    q[5:], k[7:], v[7:] = torch.nan, torch.nan, torch.nan
    bounds = cumulative([2, 3]), cumulative([3, 4])
    output, lse, _ = flash_attn_varlen_func(q, k, v, *bounds, 3, 4, return_attn_probs=True)
    close(output[:5], one_by_one(q, k, v, *bounds)[0])
    assert torch.equal(output[5:], torch.zeros(4, H, E))
    assert torch.equal(lse[:, 5:], torch.full((H, 4), torch.inf))


def test_keys_after_the_last_sequence_are_not_read(random, cumulative, one_by_one, close):
    """Queries of all tokens, keys of the first ones: sequences that begin at the same tokens."""
    q, k, v = (x.detach().clone() for x in packed(random, [10], [10]))
    k[8:], v[8:] = torch.nan, torch.nan
    bounds = cumulative([3, 7]), cumulative([3, 5])
    output = flash_attn_varlen_func(q, k, v, *bounds, 7, 5)
    close(output, one_by_one(q, k, v, *bounds)[0])


def test_packed_forms_equal_unpacked_with_gradients(random, cumulative):
    qkv = random(9, 3, H, D).requires_grad_()
    bounds = cumulative([4, 5])
    options = {"causal": True, "window_size": (3, 0)}
    calls = {
        "qkv": lambda: flash_attn_varlen_qkvpacked_func(qkv, bounds, 5, **options),
        "kv": lambda: flash_attn_varlen_kvpacked_func(
            qkv[:, 0], qkv[:, 1:], bounds, bounds, 5, 5, **options
        ),
        "none": lambda: flash_attn_varlen_func(*qkv.unbind(1), bounds, bounds, 5, 5, **options),
    }
    outputs = {name: call() for name, call in calls.items()}
    gradients = {
        name: torch.autograd.grad(output.square().sum(), qkv)[0] for name, output in outputs.items()
    }
    for name in ("qkv", "kv"):
        assert torch.equal(outputs[name], outputs["none"])
        torch.testing.assert_close(gradients[name], gradients["none"])


@pytest.mark.parametrize("lengths", ["same", "different", "empty sequences", "uniform"])
def test_dropout_is_what_s_dmask_says(lengths, random, cumulative):
    lengths_q, lengths_k = LENGTHS[lengths]
    q, k, v = packed(random, lengths_q, lengths_k)
    bounds = cumulative(lengths_q), cumulative(lengths_k)
    output, _, dropped = flash_attn_varlen_func(
        q, k, v, *bounds, 17, 17, 0.4, causal=True, return_attn_probs=True
    )
    assert dropped.shape == (len(lengths_q), H, max(lengths_q), max(lengths_k))
    assert bool((dropped < 0).any())
    for n, (t, s) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        assert not dropped[n, :, t:].any()
        assert not dropped[n, :, :, s:].any()
    kept = dropped.clamp(min=0) / 0.6
    expected = [
        torch.einsum(
            "hts,she->the",
            kept[n, :, : len(q_n), : len(v_n)],
            v_n.repeat_interleave(H // G, dim=1),
        )
        for n, (q_n, _, v_n) in enumerate(sequences(q, k, v, *bounds))
    ]
    torch.testing.assert_close(output, torch.cat(expected))


@pytest.mark.parametrize("page_size", [1, 4, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_pages_equal_packed_keys(page_size, causal, random, cumulative, one_by_one, close):
    """Pages in random order; those of no row, and slots after a row's end, hold NaN."""
    lengths_q, lengths_k = [3, 1, 2, 0], [11, 3, 5, 2]
    q, k, v = (x.detach() for x in packed(random, lengths_q, lengths_k))
    bounds = cumulative(lengths_q), cumulative(lengths_k)
    pools, table = paged([k, v], bounds[1].tolist(), page_size)
    slopes = random(4, H).abs()
    output, lse, _ = flash_attn_varlen_func(
        q,
        *pools,
        *bounds,
        3,
        11,
        causal=causal,
        alibi_slopes=slopes,
        return_attn_probs=True,
        block_table=table,
    )
    expected, expected_lse = one_by_one(q, k, v, *bounds, slopes, causal=causal)
    close(output, expected)
    close(lse, expected_lse)


def test_pages_are_read_in_place(random, cumulative, tensor_sizes, kernels):
    lengths_q, lengths_k = [3, 1, 2], [700, 3, 512]
    q, k, v = (x.detach() for x in packed(random, lengths_q, lengths_k))
    bounds = cumulative(lengths_q), cumulative(lengths_k)
    pools, table = paged([k, v], bounds[1].tolist(), 16)
    with tensor_sizes:
        flash_attn_varlen_func(q, *pools, *bounds, 3, 700, causal=True, block_table=table)
    in_pools = sum(x.untyped_storage().nbytes() for x in pools)
    assert tensor_sizes.peak - in_pools < v.nbytes


@pytest.mark.parametrize("q_needs_grad", [True, False])
def test_pages_have_gradients(q_needs_grad, random, cumulative, one_by_one, close):
    lengths_q, lengths_k = [3, 1], [11, 3]
    q, k, v = packed(random, lengths_q, lengths_k)
    inputs = (q, k, v) if q_needs_grad else (q.detach(), k, v)
    bounds = cumulative(lengths_q), cumulative(lengths_k)
    pools, table = paged(inputs[1:], bounds[1].tolist(), 4)
    output = flash_attn_varlen_func(
        inputs[0], *pools, *bounds, 3, 11, causal=True, block_table=table
    )
    expected, _ = one_by_one(*inputs, *bounds, causal=True)
    count = 3 if q_needs_grad else 2
    direction = random(*output.shape)
    ours = torch.autograd.grad(output, inputs[-count:], direction)
    theirs = torch.autograd.grad(expected, inputs[-count:], direction.double())
    for gradient, expected_gradient in zip(ours, theirs, strict=True):
        close(gradient, expected_gradient, 5)


def paged(tensors, bounds, page_size):
    """Packed tokens in pages of a shuffled pool of NaN, and the block table; unused entries: -7."""
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    columns = [-(-length // page_size) for length in lengths]
    pages = torch.randperm(sum(columns) + 3, generator=torch.Generator().manual_seed(4)).tolist()
    table = torch.full((len(lengths), max(columns) + 1), -7, dtype=torch.int32)
    pools = [
        torch.full((len(pages), page_size, *x.shape[1:]), torch.nan, dtype=x.dtype) for x in tensors
    ]
    for n, length in enumerate(lengths):
        for column in range(columns[n]):
            page = pages.pop()
            table[n, column] = page
            first = bounds[n] + column * page_size
            stop = min(first + page_size, bounds[n] + length)
            for pool, x in zip(pools, tensors, strict=True):
                pool[page, : stop - first] = x[first:stop]
    return pools, table


def test_max_seqlen_may_be_a_tensor(random, cumulative):
    """As transformers passes it."""
    q, k, v = (x.detach() for x in packed(random, [2, 3], [2, 3]))
    bounds = cumulative([2, 3])
    output = flash_attn_varlen_func(q, k, v, bounds, bounds, torch.tensor(3), torch.tensor(3))
    assert torch.equal(output, flash_attn_varlen_func(q, k, v, bounds, bounds, 3, 3))


def test_one_sequence_equals_batched(random, cumulative):
    q, k, v = (x.detach() for x in packed(random, [5], [9]))
    packed_output = flash_attn_varlen_func(
        q, k, v, cumulative([5]), cumulative([9]), 5, 9, causal=True
    )
    assert torch.equal(packed_output, flash_attn_func(q[None], k[None], v[None], causal=True)[0])


TABLE = torch.zeros(2, 2, dtype=torch.int32)
REFUSED = {
    "first bound": (
        {"cu_seqlens_q": torch.tensor([1, 2, 5])},
        ArgumentError,
        "cu_seqlens_q must begin with 0 and never decrease; got [1, 2, 5]",
    ),
    "falling bounds": (
        {"cu_seqlens_k": torch.tensor([0, 7, 6])},
        ArgumentError,
        "cu_seqlens_k must begin with 0 and never decrease; got [0, 7, 6]",
    ),
    "no bound": (
        {"cu_seqlens_q": torch.zeros(0).int()},
        ArgumentError,
        "cu_seqlens_q must begin with 0 and never decrease; got []",
    ),
    "last bound": (
        {"cu_seqlens_k": torch.tensor([0, 3, 8])},
        ArgumentError,
        "cu_seqlens_k must end with at most the number of packed tokens, 7; got 8",
    ),
    "numbers of bounds": (
        {"cu_seqlens_k": torch.tensor([0, 7])},
        ShapeError,
        "cu_seqlens_k must be (batch_size + 1,) = (3,); got (2,)",
    ),
    "bounds' dtype": (
        {"cu_seqlens_q": torch.tensor([0.0, 2.0, 5.0])},
        DtypeError,
        "cu_seqlens_q must be int32 or int64; got torch.float32; convert with .int()",
    ),
    "longest": (
        {"max_seqlen_q": 2},
        ArgumentError,
        "max_seqlen_q must be at least the longest sequence's 3 tokens; got 2; "
        "pass int(cu_seqlens_q.diff().max())",
    ),
    "dimensions": (
        {"q": torch.ones(1, 5, H, D)},
        ShapeError,
        "q must be (total_q, nheads, headdim), with at least 1 head",
    ),
    "slopes": (
        {"alibi_slopes": torch.ones(3, H)},
        ShapeError,
        "alibi_slopes must be (nheads,) = (6,) or (batch_size, nheads) = (2, 6); got (3, 6)",
    ),
    "packed keys and pages": (
        {"block_table": TABLE},
        ShapeError,
        "k must be (num_blocks, page_block_size, nheads_k, headdim) = (any, any, any, 8); got (7,",
    ),
    "pages": (
        {"block_table": TABLE - 1, "k": torch.ones(3, 2, G, D), "v": torch.ones(3, 2, G, E)},
        ArgumentError,
        "block_table must be from 0 to num_blocks - 1 = 2 where a row has keys; got [-1, -1",
    ),
    "columns": (
        {"block_table": TABLE[:, :1], "k": torch.ones(3, 2, G, D), "v": torch.ones(3, 2, G, E)},
        ShapeError,
        "block_table must have enough columns for the lengths of cu_seqlens_k: 1 blocks of 2 hold "
        "2 keys; got 4; append columns",
    ),
    "rows of pages": (
        {"block_table": TABLE[:1], "k": torch.ones(3, 2, G, D), "v": torch.ones(3, 2, G, E)},
        ShapeError,
        "block_table must be (batch_size, max_num_blocks_per_seq) = (2, any); got (1, 2)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_argument_raises_with_remedy(case, random):
    changed, error, message = REFUSED[case]
    arguments = {
        "q": random(5, H, D),
        "k": random(7, G, D),
        "v": random(7, G, E),
        "cu_seqlens_q": torch.tensor([0, 2, 5]),
        "cu_seqlens_k": torch.tensor([0, 3, 7]),
        "max_seqlen_q": 3,
        "max_seqlen_k": 4,
    }
    with pytest.raises(error) as raised:
        flash_attn_varlen_func(**arguments | changed)
    assert str(raised.value).startswith(message)


def test_packed_argument_is_named_in_errors(random, cumulative):
    bounds = cumulative([2, 3])
    with pytest.raises(ArgumentError, match=r"^max_seqlen must be at least"):
        flash_attn_varlen_qkvpacked_func(random(5, 3, H, D), bounds, 2)
    with pytest.raises(ArgumentError, match=r"^cu_seqlens must end with"):
        flash_attn_varlen_qkvpacked_func(random(4, 3, H, D), bounds, 3)
    with pytest.raises(ShapeError, match=r"^kv must be \(total_k, 2, nheads_k, headdim\)"):
        flash_attn_varlen_kvpacked_func(random(5, H, D), random(5, G, D), bounds, bounds, 3, 3)
