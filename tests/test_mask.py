"""Masks against rules written in plain Python, their algebra, their words and their errors."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polyhead as ph
from polyhead.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from polyhead.mask import (
    All,
    AnyOf,
    Mask,
    causal,
    cu_seqlens,
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
    """A mask and its rule: `rule(b, h, t, s)` says in plain Python whether t may attend to s."""
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
        # A function that is not told of other rows and heads sees the first everywhere.
        return mask, lambda b, h, t, s: striped(b % batch, h % heads, stands_at(t, T, S, align), s)
    shape = [draw(st.sampled_from([1, size])) for size in (B, H, T, S)]
    shape = draw(st.sampled_from([shape, shape[2:]]))
    seed = draw(st.integers(0, 99))
    allowed = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    written = allowed.expand(B, H, T, S).tolist()
    return dense(allowed), lambda b, h, t, s: written[b][h][t][s]


@st.composite
def cases(draw, count=1):
    """B, T, S and `count` pairs of mask and rule, compound ones among them."""
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


def written_out(mask, B, T, S):
    return mask.materialize(T, S).expand(B, H, T, S)


@given(cases())
@settings(max_examples=200, deadline=None)
def test_a_mask_allows_what_its_rule_allows(case):
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
def test_rows_and_for_queries_are_slices_of_the_whole(case, data):
    B, T, S, [(mask, _)] = case
    start = data.draw(st.integers(0, T))
    stop = data.draw(st.integers(start, T))
    want = written_out(mask, B, T, S)[:, :, start:stop]
    rows = mask.rows(start, stop, T, S).expand(B, H, stop - start, S)
    assert torch.equal(rows, want)
    chunk = mask.for_queries(start, stop, T)
    chunk.check(B, H, stop - start, S, CPU)
    assert torch.equal(written_out(chunk, B, stop - start, S), want)
    inner = chunk.for_queries(min(1, stop - start), stop - start, stop - start)
    assert torch.equal(
        written_out(inner, B, stop - start - min(1, stop - start), S),
        want[:, :, min(1, stop - start) :],
    )


@given(cases(), st.data())
@settings(max_examples=200, deadline=None)
def test_keys_and_for_keys_are_slices_of_the_whole(case, data):
    B, T, S, [(mask, _)] = case
    first = data.draw(st.integers(0, S))
    last = data.draw(st.integers(first, S))
    want = written_out(mask, B, T, S)[..., first:last]
    rows = mask.rows(0, T, T, S, keys=(first, last))
    assert torch.equal(rows.expand(B, H, T, last - first), want)
    if S - first < T and "documents" in repr(mask):
        return  # documents name the queries by their keys, which would be gone
    left = mask.for_keys(first, S)
    left.check(B, H, T, S - first, CPU)
    want = written_out(mask, B, T, S)[..., first:]
    assert torch.equal(written_out(left, B, T, S - first), want)
    for inner in (left.for_queries(1, T, T), mask.for_queries(1, T, T).for_keys(first, S)):
        assert torch.equal(written_out(inner, B, T - 1, S - first), want[:, :, 1:])
    again = data.draw(st.integers(0, S - first))
    if S - first - again >= T:
        fewer = left.for_keys(again, S - first)
        assert torch.equal(written_out(fewer, B, T, S - first - again), want[..., again:])


@given(cases(), st.data())
@settings(max_examples=300, deadline=None)
def test_no_key_out_of_reach_is_allowed(case, data):
    B, T, S, [(mask, _)] = case
    start = data.draw(st.integers(0, T))
    stop = data.draw(st.integers(start, T))
    cut = data.draw(st.integers(0, S))
    for rule, keys in ((mask, S), (mask.for_queries(0, T, T), S), (mask.for_keys(cut, S), S - cut)):
        if keys < T and "documents" in repr(mask):
            continue
        first, last = rule.reach(start, stop, T, keys)
        outside = written_out(rule, B, T, keys)[:, :, start:stop].clone()
        if first < last:
            assert 0 <= first < last <= keys
            outside[..., first:last] = False
        assert not outside.any()


@pytest.mark.parametrize(
    ("mask", "reach"),
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
def test_reach_is_as_narrow_as_the_structure_tells(mask, reach):
    """Queries 2 and 3 of 7 against 9 keys stand at 4 and 5."""
    assert mask.reach(2, 4, 7, 9) == reach


def test_reach_of_a_chunk_counts_from_the_chunk():
    chunk = (causal() & window(before=2)).for_queries(1, 6, 7)
    assert chunk.reach(1, 3, 5, 9) == (2, 6)


@given(cases(count=3))
@settings(max_examples=100, deadline=None)
def test_the_algebra_is_boolean(case):
    B, T, S, [(a, _), (b, _), (c, _)] = case

    def same(left, right):
        return torch.equal(written_out(left, B, T, S), written_out(right, B, T, S))

    assert ~~a == a
    assert a & a == a
    assert a | a == a
    assert same(~(a & b), ~a | ~b)
    assert same(~(a | b), ~a & ~b)
    assert (a & b) & c == a & (b & c)
    assert (a | b) | c == a | (b | c)
    assert same(a & (b | c), (a & b) | (a & c))
    assert same(a & b, b & a)
    assert not written_out(a & ~a, B, T, S).any()
    assert written_out(a | ~a, B, T, S).all()


@given(cases())
@settings(max_examples=100, deadline=None)
def test_equal_masks_have_equal_hashes_and_every_mask_can_be_printed(case):
    _, T, _, [(mask, _)] = case
    assert mask == mask & mask
    assert hash(mask) == hash(mask | mask)
    assert str(mask).startswith(f"{mask!r}\n")
    assert str(mask.for_queries(0, T, T))


def test_and_or_flatten_and_keep_each_part_once():
    a, b, c = causal(), window(before=2), window(after=1)
    assert (a & (b & (a & c))).conjuncts == (a, b, c)
    assert ((a | b) | (c | a)).parts == (a, b, c)
    assert isinstance(a & b, All)
    assert isinstance(a | b, AnyOf)
    assert a.conjuncts == (a,)
    assert ((a & b) | c).conjuncts == ((a & b) | c,)
    assert (~a).conjuncts == (~a,)


def test_causal_and_511_before_sees_512_keys():
    keys = (causal() & window(before=511)).materialize(1000, 1000).sum(dim=-1)
    assert keys.tolist() == [min(t + 1, 512) for t in range(1000)]


def test_a_window_sees_before_itself_and_after():
    keys = window(before=3, after=2).materialize(20, 20).sum(dim=-1).tolist()
    assert keys == [3, 4, 5, *[6] * 15, 5, 4]


@pytest.mark.parametrize(
    ("T", "S", "end", "start"),
    [
        (3, 5, "x x x . .\nx x x x .\nx x x x x", "x . . . .\nx x . . .\nx x x . ."),
        (4, 2, ". .\n. .\nx .\nx x", "x .\nx x\nx x\nx x"),
    ],
)
def test_causal_draws_as_documented(T, S, end, start):
    assert causal().draw(T, S) == end
    assert causal(align="start").draw(T, S) == start


@pytest.mark.parametrize(
    ("mask", "rows"),
    [
        (window(before=1), ["xxxxx", "xxxxx", ".xxxx", "..xxx", "...xx"]),
        (window(before=1, after=1), ["xx...", "xxx..", ".xxx.", "..xxx", "...xx"]),
        (causal() & window(before=1), ["x....", "xx...", ".xx..", "..xx.", "...xx"]),
        (left_padding([2]), ["..xxx"] * 5),
        (causal() & left_padding([2]), [".....", ".....", "..x..", "..xx.", "..xxx"]),
        (prefix(2), ["xx..."] * 5),
        (causal() | prefix(2), ["xx...", "xx...", "xxx..", "xxxx.", "xxxxx"]),
        (documents([0, 0, 1, 1, 1]), ["xx...", "xx...", "..xxx", "..xxx", "..xxx"]),
        (causal() & documents([0, 0, 1, 1, 1]), ["x....", "xx...", "..x..", "..xx.", "..xxx"]),
    ],
)
def test_other_masks_draw_as_documented(mask, rows):
    assert mask.draw(5, 5) == "\n".join(" ".join(row) for row in rows)


def test_cu_seqlens_are_documents_told_by_their_bounds():
    assert cu_seqlens([0, 2, 5]) == documents([0, 0, 1, 1, 1])
    assert cu_seqlens([0, 0, 3, 3]) == documents([1, 1, 1])
    assert cu_seqlens(torch.tensor([0, 2, 5], dtype=torch.int32)) == cu_seqlens([0, 2, 5])
    assert cu_seqlens([0]).materialize(0, 0).shape == (0, 0)


def test_draw_takes_one_batch_row_and_head():
    assert lengths([3, 5]).draw(2, 5) == "x x x . .\nx x x . ."
    assert lengths([3, 5]).draw(1, 5, batch=1) == "x x x x x"
    by_head = dense(torch.tensor([[[[True]], [[False]]]]))
    assert by_head.draw(1, 2) == "x x"
    assert by_head.draw(1, 2, head=1, batch=7) == ". ."


def test_str_is_the_expression_and_a_drawing():
    mask = dense(torch.tensor([[True, False], [True, True]]))
    assert str(mask) == "dense(2x2)\nx .\nx x"
    assert str(causal()) == "causal()\n" + causal().draw(8, 8)


@pytest.mark.parametrize(
    ("mask", "T", "S"),
    [
        (dense(torch.ones(3, 5, dtype=torch.bool)) & lengths([2]), 3, 5),
        (causal() | dense(torch.ones(1, 1, 3, 5, dtype=torch.bool)), 3, 5),
        (dense(torch.ones(3, 5, dtype=torch.bool)) & dense(torch.ones(1, 5).bool()), 3, 5),
        (~dense(torch.ones(3, 1, dtype=torch.bool)), 3, 8),
        (dense(torch.ones(3, 5, dtype=torch.bool)).for_queries(1, 3, 3), 2, 5),
        (causal().for_queries(12, 16, 16), 4, 16),
        (lengths([3, 5]), 8, 8),
        (documents([0, 0, 1]), 3, 3),
        (causal() & documents([0, 0, 1]), 3, 3),
        (documents([0, 0, 1]) & dense(torch.ones(2, 3, dtype=torch.bool)), 2, 3),
    ],
)
def test_str_draws_at_a_size_that_fits_every_part(mask, T, S):
    assert str(mask) == f"{mask!r}\n{mask.draw(T, S)}"


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (causal(), "causal()"),
        (causal(align="start"), 'causal(align="start")'),
        (window(before=2), "window(before=2)"),
        (window(after=0), "window(after=0)"),
        (window(2, 1, align="start"), 'window(before=2, after=1, align="start")'),
        (lengths([3, 0]), "lengths([3, 0])"),
        (lengths(range(9)), "lengths(<9 entries>)"),
        (lengths(torch.ones(2, dtype=torch.long, device="meta")), "lengths(<2 entries>)"),
        (left_padding([3, 0]), "left_padding([3, 0])"),
        (causal() | prefix(2), "causal() | prefix(2)"),
        (documents([0, 0, 1]), "documents([0, 0, 1])"),
        (documents(torch.zeros(2, 5, dtype=torch.long)), "documents(2x5)"),
        (cu_seqlens([0, 1, 3]), "documents([0, 1, 1])"),
        (dense(torch.ones(2, 1, 3, 4, dtype=torch.bool)), "dense(2x1x3x4)"),
        (causal() & ~window(after=1), "causal() & ~window(after=1)"),
        (
            causal() & (lengths([1]) | window(after=1)),
            "causal() & (lengths([1]) | window(after=1))",
        ),
        (~(causal() & lengths([1])), "~(causal() & lengths([1]))"),
        ((causal() & lengths([1])) | causal(), "(causal() & lengths([1])) | causal()"),
        (causal().for_queries(1, 2, 4), "causal().for_queries(1, 2, 4)"),
        (
            (causal() | lengths([1])).for_queries(0, 2, 4),
            "(causal() | lengths([1])).for_queries(0, 2, 4)",
        ),
        (custom(striped), "custom(striped)"),
        (causal("start").for_keys(2, 7), 'causal(align="start").for_keys(2, 7)'),
        (
            (causal() & lengths([3]) & left_padding([3]) & prefix(4)).for_keys(2, 7),
            "causal() & lengths([1]) & left_padding([1]) & prefix(2)",
        ),
        (prefix(1).for_keys(2, 7), "prefix(0)"),
        (documents([0, 0, 1]).for_keys(1, 3), "documents([0, 1])"),
        (custom(striped).for_keys(0, 7), "custom(striped)"),
    ],
)
def test_repr_is_the_expression(mask, text):
    assert repr(mask) == text


def test_masks_are_values():
    assert causal() == causal(align="end") != causal(align="start")
    assert window(before=1) != window(after=1)
    assert window(before=1, after=0) != causal() & window(before=1)
    assert causal() & window(before=1) != causal() | window(before=1)
    assert lengths([1, 2]) == lengths(torch.tensor([1, 2])) != lengths([1, 3])
    assert lengths([1]) != lengths(torch.tensor([1], dtype=torch.int32))
    assert dense(torch.tensor([[True]])) != dense(torch.tensor([[False]]))
    assert causal() != "causal()"
    assert len({causal(), causal(), window(1), lengths([1, 2]), lengths([1, 2])}) == 3
    with pytest.raises(AttributeError):
        causal().align = "start"


def test_materialize_goes_where_it_is_told():
    assert (causal() & window(before=2)).materialize(2, 3, device="meta").is_meta


def test_a_mask_combines_with_masks_only():
    with pytest.raises(TypeError, match="unsupported operand"):
        causal() & torch.ones(2, 2, dtype=torch.bool).numpy().tolist()
    with pytest.raises(TypeError, match="unsupported operand"):
        causal() | True
    with pytest.raises(NotImplementedError):
        Mask().materialize(2, 2)


MUST_BE_BOOL = (
    "allowed must be a bool tensor, True = may attend; got {}; "
    "pass numbers that are added to the scores as attention(bias=...)"
)
SIZE = "{} must be an integer of at least 0; got {}; count the keys, or pass None for no limit"


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: dense(torch.ones(2, 2)), DtypeError, MUST_BE_BOOL.format("torch.float32")),
        (lambda: dense([[True]]), DtypeError, MUST_BE_BOOL.format("list")),
        (
            lambda: dense(torch.ones(3, 4, 5, dtype=torch.bool)),
            ShapeError,
            "allowed must have 2 dimensions (T, S) or 4 (B, H, T, S); got (3, 4, 5); "
            "unsqueeze the missing ones: mask[:, None] if it differs by batch row",
        ),
        (
            lambda: custom(torch.ones(2, 2, dtype=torch.bool)),
            DtypeError,
            "fn must be a function of (batch, head, query, key); got Tensor; "
            "wrap a bool tensor in polyhead.mask.dense instead",
        ),
        (
            lambda: custom(striped, heads=0),
            ArgumentError,
            "heads must be an integer of at least 1; got 0; count them",
        ),
        (
            lambda: custom(striped, align="left"),
            ArgumentError,
            'align must be "end" or "start"; got \'left\'; see mask.causal',
        ),
        (
            lambda: custom(lambda batch, head, query, key: query - key).materialize(2, 2),
            DtypeError,
            "mask.custom(fn) must return a bool tensor, True = may attend; got torch.int64; "
            "compare",
        ),
        (
            lambda: custom(lambda batch, head, query, key: True).materialize(2, 2),
            DtypeError,
            "mask.custom(fn) must return a bool tensor, True = may attend; got bool; compare",
        ),
        (
            lambda: custom(lambda *_: torch.ones(2, 1, 2, 2) > 0).materialize(2, 2),
            ShapeError,
            "mask.custom(fn) must return what broadcasts to (batch, heads, T, S) = (1, 1, 2, 2); "
            "got (2, 1, 2, 2); compute it from the four indices alone, and say batch= and heads= "
            "if it uses them",
        ),
        (lambda: window(before=-3), ArgumentError, SIZE.format("before", -3)),
        (lambda: window(after=1.5), ArgumentError, SIZE.format("after", 1.5)),
        (lambda: window(before=True), ArgumentError, SIZE.format("before", True)),
        (
            lambda: window(),
            ArgumentError,
            "before, after must not both be None; got no limit at all; give one of them",
        ),
        (
            lambda: causal(align="middle"),
            ArgumentError,
            'align must be "end" or "start"; got \'middle\'; see mask.causal',
        ),
        (
            lambda: window(before=1, align="left"),
            ArgumentError,
            'align must be "end" or "start"; got \'left\'; see mask.causal',
        ),
        (
            lambda: prefix(-2),
            ArgumentError,
            "n must be an integer of at least 0; got -2; "
            "use lengths(...) for one number a batch row",
        ),
        (
            lambda: documents(torch.zeros(1, 2, 3).long()),
            ShapeError,
            "ids must be (S,) or (B, S); got (1, 2, 3); give one id a key token",
        ),
        (
            lambda: documents([0.0]),
            DtypeError,
            "ids must be int32 or int64; got torch.float32; convert with .long()",
        ),
        (
            lambda: left_padding([[1]]),
            ShapeError,
            "padding must have one entry a batch row, (B,); got (1, 1); flatten it",
        ),
        *(
            (
                lambda bounds=bounds: cu_seqlens(bounds),
                ArgumentError,
                f"cu_seqlens must begin with 0 and never fall; got {bounds}; "
                "pass the cumulative sum of the lengths, with 0 before it",
            )
            for bounds in ([1, 4], [0, 3, 2])
        ),
        (
            lambda: lengths([1.5]),
            DtypeError,
            "lengths must be int32 or int64; got torch.float32; convert with .long()",
        ),
        (
            lambda: lengths([[1, 2]]),
            ShapeError,
            "lengths must have one entry a batch row, (B,); got (1, 2); flatten it",
        ),
    ],
)
def test_building_errors_say_what_was_got(build, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        build()


META = torch.device("meta")


@pytest.mark.parametrize(
    ("mask", "device", "error", "message"),
    [
        (
            lengths([1, 2, 3]),
            CPU,
            ShapeError,
            "mask.lengths(lengths) must have one entry a batch row, B = 2; got 3; "
            "give one for each",
        ),
        (
            lengths([1, 2]),
            META,
            DeviceError,
            'mask.lengths(lengths) must be on the query\'s device, meta; got cpu; .to("meta")',
        ),
        (
            dense(torch.ones(5, 8, dtype=torch.bool)),
            CPU,
            ShapeError,
            "mask.dense(allowed) must broadcast to (B, H, T, S) = (2, 3, 5, 7); got (5, 8); "
            "give each dimension its full size or 1",
        ),
        (
            dense(torch.ones(5, 7, dtype=torch.bool)),
            META,
            DeviceError,
            'mask.dense(allowed) must be on the query\'s device, meta; got cpu; .to("meta")',
        ),
        (
            left_padding([1]),
            CPU,
            ShapeError,
            "mask.left_padding(padding) must have one entry a batch row, B = 2; got 1; "
            "give one for each",
        ),
        (
            documents([0, 0, 1]),
            CPU,
            ShapeError,
            "mask.documents(ids) must name the document of each of the S = 7 keys, the T = 5 "
            "queries among them; got (3,); give one id a key token, of cached tokens too",
        ),
        (
            documents(torch.zeros(3, 7, dtype=torch.long)),
            CPU,
            ShapeError,
            "mask.documents(ids) must have one entry a batch row, B = 2; got 3; give one for each",
        ),
        (
            documents([0] * 7),
            META,
            DeviceError,
            'mask.documents(ids) must be on the query\'s device, meta; got cpu; .to("meta")',
        ),
        (
            custom(striped, batch=3),
            CPU,
            ShapeError,
            "mask.custom(batch=) must be 1 or the call's 2; got 3; say how many batch fn tells "
            "apart",
        ),
        (
            custom(striped, heads=2),
            CPU,
            ShapeError,
            "mask.custom(heads=) must be 1 or the call's 3; got 2; say how many heads fn tells "
            "apart",
        ),
        (
            causal("start").for_keys(1, 9),
            CPU,
            ShapeError,
            "mask.for_keys(start, S) must leave the call's S = 7 keys; got 1 .. 9; "
            "give the first key that is left, and how many there were",
        ),
        (
            causal().for_queries(1, 4, 9),
            CPU,
            ShapeError,
            "mask.for_queries(start, stop) must cover the call's T = 5 queries; got 1 .. 4; "
            "give the range of this chunk",
        ),
    ],
)
def test_a_mask_that_does_not_fit_the_call_says_why(mask, device, error, message):
    anywhere = [
        mask,
        ~mask,
        causal() & mask,
        mask | causal(),
        (causal() | ~mask).for_queries(0, 5, 5),
    ]
    for compound in anywhere:
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            compound.check(2, 3, 5, 7, device)


def test_documents_need_an_id_for_every_query():
    with pytest.raises(ShapeError, match="S = 3 keys, the T = 5 queries among them"):
        documents([0, 0, 1]).check(1, 1, 5, 3, CPU)


def test_the_module_exports_its_functions():
    for name in ph.mask.__all__:
        assert hasattr(ph.mask, name)


@pytest.mark.parametrize("build", [ph.mask.lengths, ph.mask.left_padding, ph.mask.documents])
def test_an_empty_list_is_integers(build):
    assert build([]).materialize(0, 0).numel() == 0
