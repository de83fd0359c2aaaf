"""The lowering of masks, held to `materialize`: the rule on pairs and what is said of blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import polyhead as ph
from polyhead.backends.flex import block_mask as flex_mask
from polyhead.errors import DtypeError, ShapeError
from polyhead.mask import KeySlice, QuerySlice

CPU = torch.device("cpu")
B, H = 2, 3
BLOCK = 4  # blocks small enough that few tokens fill several


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_mask, "BLOCK", BLOCK)
        yield


def crossed(batch, head, query, key):
    return (query * 3 + key + batch + 2 * head) % 4 != 0


def leaves(T, S):
    """One of every kind of mask that fits T queries and S keys."""
    generator = torch.Generator().manual_seed(T * 100 + S)

    def some(*shape):
        return torch.rand(shape, generator=generator) > 0.3

    ids = torch.arange(S) // 5
    masks = [
        ph.mask.causal(),
        ph.mask.causal(align="start"),
        ph.mask.window(before=3),
        ph.mask.window(after=2),
        ph.mask.window(before=5, after=1, align="start"),
        ph.mask.lengths([S // 2, 0]),
        ph.mask.left_padding([S // 3, S]),
        ph.mask.prefix(6),
        ph.mask.dense(some(T, S)),
        ph.mask.dense(some(B, 1, 1, S)),
        ph.mask.dense(some(1, H, T, 1)),
        ph.mask.dense(some(1, 1)),
        ph.mask.custom(crossed),
        ph.mask.custom(crossed, batch=B, heads=H),
        ph.mask.custom(crossed, heads=H, align="start"),
    ]
    if T <= S:
        masks += [ph.mask.documents(ids), ph.mask.documents(torch.stack([ids, ids.flip(0) % 2]))]
    return masks


@st.composite
def calls(draw):
    """A mask of any structure, its own T and S, and the rows and columns a call is left with."""
    T, S = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    mask = draw(
        st.recursive(
            st.sampled_from(leaves(T, S)),
            lambda parts: st.one_of(
                st.builds(lambda a, b: a & b, parts, parts),
                st.builds(lambda a, b: a | b, parts, parts),
                st.builds(lambda a: ~a, parts),
            ),
            max_leaves=4,
        )
    )
    start, first = draw(st.integers(0, T - 1)), draw(st.integers(0, S - 1))
    return mask, T, S, start, draw(st.integers(start + 1, T)), first


def asked(rule, T, S):
    """The rule's answer for every pair, (B, H, T, S)."""
    b, h, q, k = (torch.arange(size) for size in (B, H, T, S))
    allowed = rule.allows(b[:, None, None, None], h[:, None, None], q[:, None], k)
    return allowed.expand(B, H, T, S)


def by_block(allowed):
    """Whether any, and whether every, pair of each block is allowed."""
    T, S = allowed.shape[-2:]
    padding = (0, -S % BLOCK, 0, -T % BLOCK)

    def cut(value):
        padded = F.pad(allowed, padding, value=value)
        return padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))

    return cut(False).any(-1).any(-2), cut(True).all(-1).all(-2)


@settings(deadline=None, max_examples=150)
@given(calls())
def test_a_lowered_mask_is_the_mask(case):
    mask, T, S, start, stop, first = case
    truth = mask.materialize(T, S).expand(B, H, T, S)[..., start:stop, first:]
    row, column = start // 2, first // 2  # rows of rows, and columns of columns
    left = QuerySlice(KeySlice(KeySlice(mask, column, S), first - column, S - column), row, T, T)
    left = QuerySlice(left, start - row, stop - row, T - row)
    rule = flex_mask.lower(left, stop - start, S - first, CPU)
    assert torch.equal(asked(rule, stop - start, S - first), truth)

    some, every = by_block(truth)
    assert bool((rule.some | ~some).all()), "a block with allowed pairs would be skipped"
    assert bool((~rule.every | every).all()), "a block with forbidden pairs would not be asked"


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 13), (13, 13), (9, 14), (14, 9), (8, 8)])
def test_of_the_primitives_every_block_is_known(T, S):
    for mask in leaves(T, S):
        if flex_mask.is_opaque(mask) or "x" in repr(mask):  # documents in no order
            continue
        rule = flex_mask.lower(mask, T, S, CPU)
        some, every = by_block(mask.materialize(T, S).expand(B, H, T, S))
        assert torch.equal(rule.some.expand_as(some), some), mask
        assert torch.equal(rule.every.expand_as(every), every), mask


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 13), (13, 13), (9, 14), (14, 9), (8, 8)])
def test_a_block_mask_lists_each_block_once_and_full_ones_apart(T, S):
    for mask in [None, *leaves(T, S)]:
        rule = flex_mask.lower(mask, T, S, CPU)
        blocks = flex_mask.block_mask(mask, T, S, CPU)
        rows, columns = -(-T // BLOCK), -(-S // BLOCK)
        assert blocks.seq_lengths == (T, S)
        batch, heads = blocks.kv_num_blocks.shape[:2]
        assert batch in (1, B)
        assert heads in (1, H)
        grid = (batch, heads, rows, columns)
        some, every = rule.some.expand(grid), rule.every.expand(grid)
        for b, h, row in torch.cartesian_prod(*(torch.arange(n) for n in grid[:3])).tolist():
            full = set(taken(blocks.full_kv_num_blocks, blocks.full_kv_indices, b, h, row))
            partial = set(taken(blocks.kv_num_blocks, blocks.kv_indices, b, h, row))
            filled = [(row + 1) * BLOCK <= T and (c + 1) * BLOCK <= S for c in range(columns)]
            assert full == {c for c in range(columns) if every[b, h, row, c] and filled[c]}
            assert partial == {c for c in range(columns) if some[b, h, row, c]} - full


def taken(counts, indices, b, h, row):
    listed = indices[b, h, row, : counts[b, h, row]].tolist()
    assert len(listed) == len(set(listed))
    return listed


@pytest.mark.parametrize(
    "mask",
    [
        None,
        ph.mask.causal() & ph.mask.window(before=100) & ph.mask.lengths([4000, 3]),
        ph.mask.documents(torch.arange(4096) // 100) | ~ph.mask.prefix(7),
        ph.mask.custom(crossed),
    ],
    ids=["none", "window", "documents", "custom"],
)
def test_a_block_mask_holds_no_t_by_s_tensor(mask, tensor_sizes, monkeypatch):
    monkeypatch.setattr(flex_mask, "BLOCK", 128)
    T = S = 4096
    with tensor_sizes:
        flex_mask.block_mask(mask, T, S, CPU)
    assert tensor_sizes.largest <= 4096


def test_a_mask_of_another_kind_is_unknown():
    class Diagonal(ph.mask.Mask):
        pass

    assert flex_mask.unknown(None) == []
    assert flex_mask.unknown(~(ph.mask.causal() | ph.mask.custom(crossed))) == []
    assert flex_mask.unknown(ph.mask.causal() & ~Diagonal()) == ["Diagonal"]


def test_opaque_are_the_rules_known_only_by_asking():
    assert flex_mask.is_opaque(ph.mask.custom(crossed))
    assert flex_mask.is_opaque(~ph.mask.dense(torch.ones(1, 1, dtype=torch.bool)))
    assert not flex_mask.is_opaque(ph.mask.custom(crossed) & ph.mask.causal())
    assert not flex_mask.is_opaque(None)


@pytest.mark.parametrize(
    ("fn", "error", "message"),
    [
        (lambda b, h, q, k: k - q, DtypeError, "must return a bool tensor"),
        (lambda b, h, q, k: torch.ones(5, dtype=torch.bool), ShapeError, r"got \(5,\)"),
    ],
)
def test_a_function_that_returns_no_mask_is_refused_before_it_is_compiled(fn, error, message):
    with pytest.raises(error, match=message):
        flex_mask.lower(ph.mask.custom(fn), 3, 3, CPU)


@settings(deadline=None)
@given(st.tuples(*[st.booleans()] * 4), st.integers(0, 4))
def test_an_entry_of_size_one_serves_every_index(full, dropped):
    sizes = (2, 3, 5, 7)
    shape = [size if whole else 1 for size, whole in zip(sizes, full, strict=True)]
    while dropped and shape and shape[0] == 1:
        shape, dropped = shape[1:], dropped - 1
    table = torch.rand(shape)
    grid = torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")
    assert torch.equal(flex_mask.entry(table)(*grid).expand(sizes), table.expand(sizes))
