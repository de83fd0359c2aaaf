"""Mask algebra (`&`, `|`, `~`, slices) against rules in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyhead.errors import ArgumentError
from polyhead.mask import (
    And,
    Mask,
    Or,
    causal,
    custom,
    dense,
    documents,
    left_padding,
    lengths,
    prefix,
    window,
)

CPU = torch.device("cpu")
H = 2
ALIGNS = st.sampled_from(["end", "start"])


def stands_at(t, T, S, align):
    return S - T + t if align == "end" else t


def striped(batch, head, query, key):
    return (2 * batch + head + query + 3 * key) % 4 > 1


@st.composite
def primitives(draw, B, T, S):
    """A mask and its rule: `rule(b, h, t, s)`, in plain Python, is True if t may attend to s."""
    kinds = ["causal", "window", "lengths", "left_padding", "prefix", "dense", "custom"]
    kind = draw(st.sampled_from([*kinds, "documents"] if T <= S else kinds))
    if kind == "causal":
        align = draw(ALIGNS)
        return causal(align), lambda b, h, t, s: s <= stands_at(t, T, S, align)
    if kind == "window":
        align, size = draw(ALIGNS), st.integers(0, 9)
        before, after = draw(
            st.tuples(st.none() | size, st.none() | size).filter(lambda pair: pair != (None, None))
        )

        def in_window(b, h, t, s):
            distance = stands_at(t, T, S, align) - s
            return (before is None or distance <= before) and (after is None or -distance <= after)

        return window(before, after, align=align), in_window
    if kind == "lengths":
        sizes = draw(st.lists(st.integers(0, S + 1), min_size=B, max_size=B))
        return lengths(sizes), lambda b, h, t, s: s < sizes[b]
    if kind == "left_padding":
        sizes = draw(st.lists(st.integers(0, S + 1), min_size=B, max_size=B))
        return left_padding(sizes), lambda b, h, t, s: s >= sizes[b]
    if kind == "prefix":
        n = draw(st.integers(0, S + 1))
        return prefix(n), lambda b, h, t, s: s < n
    if kind == "documents":
        row = st.lists(st.integers(0, 2), min_size=S, max_size=S)
        if draw(st.booleans()):
            ids = draw(row)
            return documents(ids), lambda b, h, t, s: ids[S - T + t] == ids[s]
        table = draw(st.lists(row, min_size=B, max_size=B))
        return documents(torch.tensor(table)), lambda b, h, t, s: table[b][S - T + t] == table[b][s]
    if kind == "custom":
        align = draw(ALIGNS)
        batch, heads = draw(st.sampled_from([1, B])), draw(st.sampled_from([1, H]))
        mask = custom(striped, batch=batch, heads=heads, align=align)
        # With batch=1 or heads=1 the function receives index 0 for every row or head.
        return mask, lambda b, h, t, s: striped(b % batch, h % heads, stands_at(t, T, S, align), s)
    shape = [draw(st.sampled_from([1, size])) for size in (B, H, T, S)]
    shape = draw(st.sampled_from([shape, shape[2:]]))
    seed = draw(st.integers(0, 99))
    allowed = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    written = allowed.expand(B, H, T, S).tolist()
    return dense(allowed), lambda b, h, t, s: written[b][h][t][s]


@st.composite
def cases(draw, count=1):
    """B, T, S and `count` pairs of mask and rule, primitive or compound."""
    B, T, S = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 7))

    def combined(pairs):
        def both(two):
            (a, rule_a), (b, rule_b) = two
            return a & b, lambda *at: rule_a(*at) and rule_b(*at)

        def either(two):
            (a, rule_a), (b, rule_b) = two
            return a | b, lambda *at: rule_a(*at) or rule_b(*at)

        def opposite(one):
            mask, rule = one
            return ~mask, lambda *at: not rule(*at)

        two = st.tuples(pairs, pairs)
        return two.map(both) | two.map(either) | pairs.map(opposite)

    masks = st.recursive(primitives(B, T, S), combined, max_leaves=4)
    return B, T, S, [draw(masks) for _ in range(count)]


def materialized(mask, B, T, S):
    return mask.materialize(T, S).expand(B, H, T, S)


@given(cases())
@settings(max_examples=200, deadline=None)
def test_materialize_matches_the_rule(case):
    B, T, S, [(mask, rule)] = case
    want = [
        [[[bool(rule(b, h, t, s)) for s in range(S)] for t in range(T)] for h in range(H)]
        for b in range(B)
    ]
    allowed = mask.materialize(T, S)
    assert allowed.dtype == torch.bool
    assert allowed.ndim in (2, 4)
    assert allowed.expand(B, H, T, S).tolist() == want
    mask.check(B, H, T, S, CPU)


@given(cases(), st.data())
@settings(max_examples=100, deadline=None)
def test_materialize_rows_and_for_queries_are_slices(case, data):
    B, T, S, [(mask, _)] = case
    start = data.draw(st.integers(0, T))
    stop = data.draw(st.integers(start, T))
    want = materialized(mask, B, T, S)[:, :, start:stop]
    rows = mask.materialize_rows(start, stop, T, S).expand(B, H, stop - start, S)
    assert torch.equal(rows, want)
    chunk = mask.for_queries(start, stop, T)
    chunk.check(B, H, stop - start, S, CPU)
    assert torch.equal(materialized(chunk, B, stop - start, S), want)
    inner = chunk.for_queries(min(1, stop - start), stop - start, stop - start)
    assert torch.equal(
        materialized(inner, B, stop - start - min(1, stop - start), S),
        want[:, :, min(1, stop - start) :],
    )


@given(cases(), st.data())
@settings(max_examples=200, deadline=None)
def test_materialize_keys_and_for_keys_are_slices(case, data):
    B, T, S, [(mask, _)] = case
    k_start = data.draw(st.integers(0, S))
    k_stop = data.draw(st.integers(k_start, S))
    want = materialized(mask, B, T, S)[..., k_start:k_stop]
    rows = mask.materialize_rows(0, T, T, S, keys=(k_start, k_stop))
    assert torch.equal(rows.expand(B, H, T, k_stop - k_start), want)
    if S - k_start < T and "documents" in repr(mask):
        return  # the documents of the queries are those of the last keys, which are dropped here
    left = mask.for_keys(k_start, S)
    left.check(B, H, T, S - k_start, CPU)
    want = materialized(mask, B, T, S)[..., k_start:]
    assert torch.equal(materialized(left, B, T, S - k_start), want)
    for inner in (left.for_queries(1, T, T), mask.for_queries(1, T, T).for_keys(k_start, S)):
        assert torch.equal(materialized(inner, B, T - 1, S - k_start), want[:, :, 1:])
    again = data.draw(st.integers(0, S - k_start))
    if S - k_start - again >= T:
        fewer = left.for_keys(again, S - k_start)
        assert torch.equal(materialized(fewer, B, T, S - k_start - again), want[..., again:])


@given(cases(), st.data())
@settings(max_examples=300, deadline=None)
def test_key_range_contains_every_allowed_key(case, data):
    B, T, S, [(mask, _)] = case
    start = data.draw(st.integers(0, T))
    stop = data.draw(st.integers(start, T))
    cut = data.draw(st.integers(0, S))
    for rule, keys in ((mask, S), (mask.for_queries(0, T, T), S), (mask.for_keys(cut, S), S - cut)):
        if keys < T and "documents" in repr(mask):
            continue
        k_start, k_stop = rule.key_range(start, stop, T, keys)
        outside = materialized(rule, B, T, keys)[:, :, start:stop].clone()
        if k_start < k_stop:
            assert 0 <= k_start < k_stop <= keys
            outside[..., k_start:k_stop] = False
        assert not outside.any()


@pytest.mark.parametrize(
    ("mask", "key_range"),
    [
        (causal(), (0, 6)),
        (causal("start"), (0, 4)),
        (window(before=2), (2, 9)),
        (window(before=2, after=1), (2, 7)),
        (window(before=2, align="start"), (0, 9)),
        (causal() & window(before=2), (2, 6)),
        (causal() | prefix(8), (0, 8)),
        (prefix(2) & lengths([3]), (0, 2)),
        (~causal(), (0, 9)),
        ((causal() & window(before=2)).for_queries(0, 7, 7), (2, 6)),
        (causal("start").for_keys(3, 12), (0, 1)),
    ],
    ids=repr,
)
def test_key_range_is_as_narrow_as_the_structure(mask, key_range):
    """Queries 2 and 3 of 7 against 9 keys have positions 4 and 5."""
    assert mask.key_range(2, 4, 7, 9) == key_range


def test_key_range_of_a_query_slice_counts_from_the_slice():
    chunk = (causal() & window(before=2)).for_queries(1, 6, 7)
    assert chunk.key_range(1, 3, 5, 9) == (2, 6)


@given(cases(count=3))
@settings(max_examples=100, deadline=None)
def test_algebra_is_boolean(case):
    B, T, S, [(a, _), (b, _), (c, _)] = case

    def same(left, right):
        return torch.equal(materialized(left, B, T, S), materialized(right, B, T, S))

    assert ~~a == a
    assert a & a == a
    assert a | a == a
    assert same(~(a & b), ~a | ~b)
    assert same(~(a | b), ~a & ~b)
    assert (a & b) & c == a & (b & c)
    assert (a | b) | c == a | (b | c)
    assert same(a & (b | c), (a & b) | (a & c))
    assert same(a & b, b & a)
    assert not materialized(a & ~a, B, T, S).any()
    assert materialized(a | ~a, B, T, S).all()


@given(cases())
@settings(max_examples=100, deadline=None)
def test_equal_masks_hash_equal_and_every_mask_has_a_str(case):
    _, T, _, [(mask, _)] = case
    assert mask == mask & mask
    assert hash(mask) == hash(mask | mask)
    assert str(mask).startswith(f"{mask!r}\n")
    assert str(mask.for_queries(0, T, T))


def test_and_or_flatten_and_keep_each_part_once():
    a, b, c = causal(), window(before=2), window(after=1)
    assert (a & (b & (a & c))).conjuncts == (a, b, c)
    assert ((a | b) | (c | a)).parts == (a, b, c)
    assert isinstance(a & b, And)
    assert isinstance(a | b, Or)
    assert a.conjuncts == (a,)
    assert ((a & b) | c).conjuncts == ((a & b) | c,)
    assert (~a).conjuncts == (~a,)


def test_masks_with_unreadable_values_combine():
    """On the meta device, in torch.compile and in vmap."""
    a, b = torch.tensor([1, 2]), torch.tensor([2, 2])
    meta = lengths(a.to("meta")) & lengths(b.to("meta"))
    assert len(meta.conjuncts) == 2
    assert (meta & meta.conjuncts[1]) == meta

    def allowed(a, b):
        return (lengths(a) & causal() & lengths(b)).materialize(2, 3)

    want = allowed(a, b)
    assert torch.equal(torch.compile(allowed, fullgraph=True, backend="eager")(a, b), want)
    batched = torch.func.vmap(allowed)(a[:, None], b[:, None])
    assert torch.equal(batched, want[:, None])


@pytest.mark.parametrize("far", [2**62, 2**63 - 1, 2**63, 2**70])
def test_huge_window_or_prefix_does_not_overflow(far):
    ones = torch.ones(5, 3, dtype=torch.bool)
    for mask in (window(before=far), window(after=far), window(far, far), prefix(far)):
        assert torch.equal(mask.materialize(5, 3).expand(5, 3), ones)


def test_mask_combined_with_another_type_raises():
    with pytest.raises(TypeError, match="unsupported operand"):
        causal() & torch.ones(2, 2, dtype=torch.bool).numpy().tolist()
    with pytest.raises(TypeError, match="unsupported operand"):
        causal() | True
    with pytest.raises(NotImplementedError):
        Mask().materialize(2, 2)


@pytest.mark.parametrize(
    "mask",
    [
        causal(),
        causal() & window(1),
        causal() | prefix(2),
        ~causal(),
        causal().for_queries(0, 2, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "use",
    [
        bool,
        lambda mask: mask and window(1),
        lambda mask: mask or window(1),
        lambda mask: not mask,
        lambda mask: 1 if mask else 2,
        lambda mask: all([mask]),
        lambda mask: [*filter(None, [mask])],
    ],
    ids=["bool", "and", "or", "not", "if", "all", "filter"],
)
def test_mask_as_a_condition_raises_with_the_operators(mask, use):
    with pytest.raises(ArgumentError) as raised:
        use(mask)
    assert str(raised.value) == (
        "mask must not be a condition of `and`, `or`, `not` or `if`; "
        f"got {mask!r}; write &, | or ~, or compare with `is None`"
    )
