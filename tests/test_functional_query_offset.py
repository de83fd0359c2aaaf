"""query_offset and rows of different lengths: each row as alone, at its own length."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polyhead as ph
from polyhead.cache_view import CacheView
from polyhead.errors import DtypeError, ShapeError

ALL_AUX = ph.AuxRequest(weights=True, lse=True, stats=True, mean_weights=True)
B, H, G, D, E = 3, 6, 2, 24, 40
SLOPES = ph.alibi_slopes(H)
MASKS = {
    "none": lambda S: None,
    "causal": lambda S: ph.mask.causal(),
    "window": lambda S: ph.mask.causal() & ph.mask.window(before=5),
    "both sides": lambda S: ph.mask.window(before=3, after=2),
    "start": lambda S: ph.mask.causal(align="start"),
    "prefix": lambda S: ph.mask.causal() | ph.mask.prefix(4),
    "documents": lambda S: ph.mask.causal() & ph.mask.documents(torch.arange(S) // 7),
    "documents per row": lambda S: ph.mask.documents(torch.arange(B * S).view(B, S) // 5),
    "not": lambda S: ~ph.mask.window(before=2),
    "custom": lambda S: ph.mask.custom(lambda b, h, q, k: (q - k) % 3 == 0),
    "custom by row": lambda S: ph.mask.custom(lambda b, h, q, k: (q - k + b) % 3 == 0, batch=B),
    "left padding": lambda S: ph.mask.causal() & ph.mask.left_padding([0, 2, 1]),
}


def inputs(T, S, dtype=torch.float64):
    torch.manual_seed(T * 100 + S)
    sizes = ((B, H, T, D), (B, G, S, D), (B, G, S, E))
    return tuple(torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes)


def plain(query, key, value, allowed, positions):
    """Output, lse and mean distance, in float64. positions: (B, T)."""
    query, key, value = (x.double() for x in (query, key, value))
    key, value = (x.repeat_interleave(H // G, 1) for x in (key, value))
    distance = (positions[:, None, :, None] - torch.arange(key.shape[2])).abs()
    scores = query @ key.transpose(-2, -1) / math.sqrt(D) - SLOPES[:, None, None] * distance
    scores = scores.masked_fill(~allowed, -math.inf)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    return weights @ value, torch.logsumexp(scores, -1), (weights * distance).sum(-1)


def allowed_at(mask, positions, T, S, row):
    """(B, H, T, S) of one row: the mask of a call whose query t has its position by S - T + t."""
    first = int(positions[row, 0])
    # T queries at first .. first + T - 1, among more keys on both sides.
    if mask is None:
        return torch.ones(1, 1, T, S, dtype=torch.bool)
    return mask.materialize(T, S, query_offset=first).expand(B, H, T, S)[row : row + 1]


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("backend", ["cpu", "reference", "sdpa"])
@pytest.mark.parametrize(("T", "S"), [(1, 17), (7, 40), (96, 130)])
def test_rows_with_an_offset_equal_rows_alone(name, backend, T, S):
    """A per-row offset gives each row what an int gives the row alone."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    query, key, value = inputs(T, S, dtype)
    offsets = torch.tensor([S - T, 0, -2])
    mask, options = MASKS[name](S), {"alibi_slopes": SLOPES, "backend": backend}
    if backend != "reference" and name.startswith("custom"):
        pytest.skip("only the reference runs custom masks here")
    value = value[..., :D] if backend == "sdpa" else value  # it needs E = D
    together, aux = ph.attention(
        query, key, value, mask=mask, query_offset=offsets, return_aux=ALL_AUX, **options
    )
    positions = offsets[:, None] + torch.arange(T)
    rows = [allowed_at(mask, positions, T, S, row) for row in range(B)]
    want, lse, distance = plain(query, key, value, torch.cat(rows), positions)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(together.double(), want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(aux.lse.double(), lse, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(
        aux.stats.mean_distance.double(), distance, atol=10 * tolerance, rtol=10 * tolerance
    )
    weights = aux.weights.double().mean(1)
    torch.testing.assert_close(aux.mean_weights.double(), weights, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["causal", "window", "documents", "start", "not"])
def test_materialize_at_an_offset_shifts_the_rows(name):
    """Query t at offset o is row o + t of the square mask."""
    S, T = 20, 6
    mask = MASKS[name](S)
    square = mask.materialize(S, S).expand(S, S)
    for offset in range(S - T + 1):
        want = square[:T] if name == "start" else square[offset : offset + T]
        assert torch.equal(mask.materialize(T, S, query_offset=offset).expand(T, S), want)
        by_row = mask.materialize(T, S, query_offset=torch.tensor([offset, 0]))
        assert torch.equal(by_row.expand(2, 1, T, S)[0, 0], want)


@pytest.mark.parametrize("name", ["causal", "window", "documents"])
def test_slices_of_a_mask_keep_the_offset(name):
    S, T = 20, 8
    mask = MASKS[name](S)
    whole = mask.materialize(T, S, query_offset=5)
    rows = mask.for_queries(2, 7, T).materialize(5, S, query_offset=7)
    assert torch.equal(rows, whole[2:7])
    keys = mask.for_keys(3, S).materialize(T, S - 3, query_offset=2)
    assert torch.equal(keys, whole[:, 3:])
    for sliced, offset, sizes in (
        (mask.for_queries(2, 7, T), 7, (5, S)),
        (mask.for_keys(3, S), 2, (T, S - 3)),
        (mask, 5, (T, S)),
    ):
        first, last = sliced.key_range(0, sizes[0], *sizes, offset)
        allowed = sliced.materialize(*sizes, query_offset=offset).expand(sizes)
        assert not allowed[:, :first].any()
        assert not allowed[:, last:].any()


def test_gradients_with_an_offset_are_those_of_the_reference():
    T, S = 33, 70
    offsets = torch.tensor([S - T, 3, 20])
    grads = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        tensors = [x.detach().requires_grad_() for x in inputs(T, S, dtype)]
        output = ph.attention(
            *tensors,
            mask=ph.mask.causal(),
            query_offset=offsets,
            alibi_slopes=SLOPES,
            backend=backend,
        )
        grads.append(torch.autograd.grad(output.square().sum(), tensors))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got.double(), want, atol=2e-4, rtol=2e-4)


def test_an_offset_of_the_default_changes_nothing():
    query, key, value = inputs(5, 9, torch.float32)
    for mask in (None, ph.mask.causal()):
        want = ph.attention(query, key, value, mask=mask)
        assert torch.equal(ph.attention(query, key, value, mask=mask, query_offset=4), want)


def test_flex_takes_one_offset_among_the_keys():
    query, key, value = inputs(5, 130, torch.float32)
    why = ph.explain(query, key, value, mask=ph.mask.causal(), query_offset=7).reasons["flex"]
    assert why == ()
    by_row = torch.tensor([7, 8, 9])
    why = ph.explain(query, key, value, query_offset=by_row).reasons["flex"]
    assert why == ("has one query_offset for all batch rows; got one per row",)
    why = ph.explain(query, key, value, query_offset=126).reasons["flex"]
    assert "got query_offset = 126, T = 5, S = 130" in why[0]


@pytest.mark.parametrize(
    ("offset", "error", "text"),
    [
        (1.5, DtypeError, r"query_offset must be an int or a tensor of integers; got 1\.5"),
        (True, DtypeError, "query_offset must be an int or a tensor of integers; got True"),
        (torch.ones(3), DtypeError, "query_offset must be int32 or int64; got torch.float32"),
        (torch.tensor([1]), ShapeError, r"query_offset must be \(B,\) = \(3,\).*got \(1,\)"),
    ],
)
def test_a_bad_query_offset_is_refused(offset, error, text):
    with pytest.raises(error, match=text):
        ph.attention(*inputs(2, 3), query_offset=offset)


def views(key, value, lengths, *, paged, dtype):
    """Keys with NaN beyond each row's length, and block indices that do not exist."""
    S = key.shape[2]
    beyond = (torch.arange(S) >= lengths[:, None])[:, None, :, None]
    held = [x.to(dtype).masked_fill(beyond, math.nan) for x in (key, value)]
    if not paged:
        return [CacheView(x, dtype, S, lambda x=x: x, lengths=lengths) for x in held]
    size = 16
    columns = -(-S // size)
    order = torch.randperm(B * columns).int().view(B, columns)
    used = torch.arange(columns) * size < lengths[:, None]
    made = []
    for x in held:
        padded = torch.nn.functional.pad(x, (0, 0, 0, columns * size - S), value=math.nan)
        pool = torch.full((B * columns, G, size, x.shape[3]), math.nan, dtype=dtype)
        blocks = padded.unflatten(2, (columns, size)).transpose(1, 2)
        pool[order.long()] = blocks
        table = torch.where(used, order, -7).int()
        made.append(CacheView(pool, dtype, S, lambda x=x: x, block_table=table, lengths=lengths))
    return made


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 7, 40])
@pytest.mark.parametrize("S", [60, 2100])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_cached_rows_of_different_lengths_are_read_alone(paged, dtype, T, S, backend):
    """Nothing beyond a row's length is read: not NaN, not an invalid block."""
    query, key, value = inputs(T, S, dtype)
    lengths = torch.tensor([S, S // 2 + 1, 3])
    held = views(key, value, lengths, paged=paged, dtype=dtype)
    for mask in (None, ph.mask.causal(), ph.mask.causal() & ph.mask.window(before=9)):
        with torch.no_grad():
            output, aux = ph.attention(
                query,
                *held,
                mask=mask,
                alibi_slopes=SLOPES,
                return_aux=ph.AuxRequest(lse=True),
                backend=backend,
            )
        for row, length in enumerate(lengths.tolist()):
            one = slice(row, row + 1)
            keys = key[one, :, :length].double(), value[one, :, :length].double()
            want, alone = ph.attention(
                query[one].double(),
                *keys,
                mask=mask,
                alibi_slopes=SLOPES,
                return_aux=ph.AuxRequest(lse=True),
            )
            tolerance = 2e-5 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(output[one].double(), want, atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(aux.lse[one].double(), alone.lse, atol=1e-2, rtol=tolerance)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 80),
    st.lists(st.integers(0, 80), min_size=B, max_size=B),
    st.booleans(),
)
def test_rows_of_any_length_equal_rows_alone(T, S, lengths, paged):
    lengths = torch.tensor([min(n, S) for n in lengths])
    query, key, value = inputs(T, S, torch.float32)
    held = views(key, value, lengths, paged=paged, dtype=torch.float32)
    with torch.no_grad():
        output = ph.attention(query, *held, mask=ph.mask.causal())
    for row, length in enumerate(lengths.tolist()):
        one = slice(row, row + 1)
        keys = key[one, :, :length], value[one, :, :length]
        want = ph.attention(query[one], *keys, mask=ph.mask.causal(), backend="reference")
        torch.testing.assert_close(output[one], want, atol=2e-5, rtol=2e-5)
