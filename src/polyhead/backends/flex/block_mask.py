"""Masks lowered for `flex_attention`: a rule on one pair, and what is known of blocks of pairs.

The kernel asks the rule of each (query, key) pair. It skips a block of pairs where nothing is
allowed, and asks nothing in a block where all is: what holds of a block is told from the mask's
structure alone, with a few numbers a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from polyhead.mask import (
    And,
    Causal,
    Custom,
    Dense,
    Documents,
    KeySlice,
    LeftPadding,
    Lengths,
    Mask,
    Not,
    Or,
    Prefix,
    QuerySlice,
    Window,
)

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = [
    "BLOCK",
    "PairRule",
    "Rule",
    "block_mask",
    "blocks",
    "entry",
    "is_opaque",
    "lower",
    "number",
    "unknown",
]

BLOCK = 128  # queries and keys to a block: what torch's kernels are tuned for

PairRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Rule(NamedTuple):
    """A mask, lowered.

    Attributes:
        allows: whether query q may attend to key k, for indices (b, h, q, k) of the call.
        some: bool, broadcasts to (B, H, query blocks, key blocks); where False, no pair of the
            block is allowed.
        every: likewise; where True, every pair of the block is allowed.

    A block with some and not every is asked, so these are always safe.
    """

    allows: PairRule
    some: Tensor
    every: Tensor


def lower(
    mask: Mask | None, T: int, S: int, device: torch.device, query_offset: int | None = None
) -> Rule:
    """A mask, or None for full attention, for T queries and S keys.

    Args:
        mask, T, S, device: of the call.
        query_offset: position of query 0; None: S - T.

    >>> import polyhead as ph
    >>> rule = lower(ph.mask.causal(), 300, 300, torch.device("cpu"))
    >>> rule.some.int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    >>> rule.every.int().tolist()
    [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    """
    view = _View(T, S, T, S, 0, 0, device, query_offset)
    return _everybody(view) if mask is None else _lower(mask, view)


def block_mask(
    mask: Mask | None, T: int, S: int, device: torch.device, query_offset: int | None = None
) -> BlockMask:
    """A mask as `flex_attention` takes it. Holds a few numbers per block, and no T x S tensor."""
    from torch.nn.attention.flex_attention import BlockMask

    allows, some, every = lower(mask, T, S, device, query_offset)
    # A block that the last tokens do not fill is asked: not all of its pairs exist.
    filled_t, filled_s = (_edges(n, device)[1] % BLOCK == BLOCK - 1 for n in (T, S))
    some, every = torch.broadcast_tensors(some, every & (filled_t[:, None] & filled_s)[None, None])
    some, every = some.contiguous(), every.contiguous()
    return BlockMask.from_kv_blocks(
        *_listed(some & ~every),
        *_listed(every),
        BLOCK_SIZE=BLOCK,
        mask_mod=allows,
        seq_lengths=(T, S),
    )


def unknown(mask: Mask | None) -> list[str]:
    """The kinds of mask in this one that have no lowering."""
    parts = [] if mask is None else [*mask.primitives()]
    return sorted({type(part).__name__ for part in parts if type(part) not in _LOWERED})


def is_opaque(mask: Mask | None) -> bool:
    """Whether nothing is known of a mask's blocks before its pairs are asked."""
    return mask is not None and all(isinstance(p, Dense | Custom) for p in mask.primitives())


def entry(table: Tensor) -> PairRule:
    """`table[b, h, q, k]`, where a dimension of size 1 serves every index."""
    shape = (1,) * (4 - table.ndim) + tuple(table.shape)
    kept = [dim for dim, size in enumerate(shape) if size > 1]
    packed = table.reshape([shape[dim] for dim in kept])

    def at(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        indices = (b, h, q, k)
        return packed[tuple(indices[dim] for dim in kept)] if kept else packed

    return at


def number(value: int, device: torch.device) -> Tensor | int:
    """A number that a rule reads, so that other numbers need no other kernel.

    Within torch.compile it stays Python's: what the graph computes, a rule on cpu cannot read.
    """
    return value if torch.compiler.is_compiling() else torch.full((), value, device=device)


def blocks(tokens: int) -> int:
    """How many blocks hold so many tokens."""
    return -(-tokens // BLOCK)


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks are chosen in each row of blocks, and their indices, these first."""
    order = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1, dtype=torch.int32), order.int()


@dataclass(frozen=True)
class _View:
    """The call's T queries and S keys, among the queries and keys that a mask speaks of."""

    T: int
    S: int
    rows: int
    columns: int
    first_query: int
    first_key: int
    device: torch.device
    query_offset: int | None  # of the call: position of query 0 among the call's keys

    def offset(self, align: str) -> int:
        """Position of the call's query 0 among the call's keys."""
        if align == "end" and self.query_offset is not None:
            return self.query_offset
        aligned = self.columns - self.rows if align == "end" else 0
        return self.first_query + aligned - self.first_key

    def number(self, value: int) -> Tensor | int:
        return number(value, self.device)

    def keys(self) -> tuple[Tensor, Tensor]:
        """First and last of the mask's keys in each block."""
        low, high = _edges(self.S, self.device)
        return low + self.first_key, high + self.first_key

    def distances(self, offset: int) -> tuple[Tensor, Tensor]:
        """Least and largest key position - query position in each block."""
        query_low, query_high = _edges(self.T, self.device)
        key_low, key_high = _edges(self.S, self.device)
        return key_low - query_high[:, None] - offset, key_high - query_low[:, None] - offset


def _edges(tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First and last token of each block."""
    low = torch.arange(0, tokens, BLOCK, device=device)
    return low, (low + BLOCK).clamp(max=tokens) - 1


def _lower(mask: Mask, view: _View) -> Rule:
    if isinstance(mask, And | Or):
        join = _both if isinstance(mask, And) else _either
        return functools.reduce(join, [_lower(part, view) for part in mask.parts])
    if isinstance(mask, Not):
        allows, some, every = _lower(mask.part, view)
        return Rule(lambda b, h, q, k: ~allows(b, h, q, k), ~every, ~some)
    if isinstance(mask, QuerySlice):
        first_query = view.first_query + mask.start
        return _lower(mask.part, replace(view, first_query=first_query, rows=mask.T))
    if isinstance(mask, KeySlice):
        first_key = view.first_key + mask.first
        return _lower(mask.part, replace(view, first_key=first_key, columns=mask.S))
    return _LOWERED[type(mask)](mask, view)


def _both(left: Rule, right: Rule) -> Rule:
    # The rules alone: a closure over blocks would make them inputs of the kernel.
    one, other = left.allows, right.allows
    return Rule(
        lambda b, h, q, k: one(b, h, q, k) & other(b, h, q, k),
        left.some & right.some,
        left.every & right.every,
    )


def _either(left: Rule, right: Rule) -> Rule:
    one, other = left.allows, right.allows
    return Rule(
        lambda b, h, q, k: one(b, h, q, k) | other(b, h, q, k),
        left.some | right.some,
        left.every | right.every,
    )


def _everybody(view: _View) -> Rule:
    every = torch.ones(blocks(view.T), blocks(view.S), dtype=torch.bool, device=view.device)
    return Rule(lambda b, h, q, k: b.new_ones((), dtype=torch.bool), every, every)


def _asked(allows: PairRule, view: _View) -> Rule:
    """A rule of which nothing is known before it is asked."""
    every = _everybody(view).every
    return Rule(allows, some=every, every=~every)


def _causal(mask: Causal, view: _View) -> Rule:
    offset = view.offset(mask.align)
    low, high = view.distances(offset)
    ahead = view.number(offset)
    return Rule(lambda b, h, q, k: k <= q + ahead, low <= 0, high <= 0)


def _window(mask: Window, view: _View) -> Rule:
    offset = view.offset(mask.align)
    low, high = view.distances(offset)
    rule = _everybody(view)
    if mask.before is not None:
        behind = view.number(mask.before - offset)
        since = Rule(lambda b, h, q, k: k >= q - behind, high >= -mask.before, low >= -mask.before)
        rule = _both(rule, since)
    if mask.after is not None:
        ahead = view.number(mask.after + offset)
        until = Rule(lambda b, h, q, k: k <= q + ahead, low <= mask.after, high <= mask.after)
        rule = _both(rule, until)
    return rule


def _lengths(mask: Lengths, view: _View) -> Rule:
    lengths, shift = mask.lengths, view.number(view.first_key)
    low, high = view.keys()
    end = lengths[:, None, None, None]
    return Rule(lambda b, h, q, k: k + shift < lengths[b], low < end, high < end)


def _left_padding(mask: LeftPadding, view: _View) -> Rule:
    padding, shift = mask.padding, view.number(view.first_key)
    low, high = view.keys()
    start = padding[:, None, None, None]
    return Rule(lambda b, h, q, k: k + shift >= padding[b], high >= start, low >= start)


def _prefix(mask: Prefix, view: _View) -> Rule:
    end = view.number(mask.n - view.first_key)
    low, high = view.keys()
    return Rule(lambda b, h, q, k: k < end, low < mask.n, high < mask.n)


def _documents(mask: Documents, view: _View) -> Rule:
    ids, first_key = mask.ids, view.first_key
    first_query = view.offset("end") + first_key
    query_shift, key_shift = view.number(first_query), view.number(first_key)

    def allows(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        query, key = q + query_shift, k + key_shift
        return ids[query] == ids[key] if ids.ndim == 1 else ids[b, query] == ids[b, key]

    # Blocks whose ranges of ids do not meet share no document.
    ids_b1n = ids.reshape(-1, 1, ids.shape[-1])
    query_low, query_high = _extremes(ids_b1n[..., first_query : first_query + view.T])
    key_low, key_high = _extremes(ids_b1n[..., first_key : first_key + view.S])
    query_low, query_high = query_low[..., :, None], query_high[..., :, None]
    key_low, key_high = key_low[..., None, :], key_high[..., None, :]
    some = (query_low <= key_high) & (key_low <= query_high)
    every = (query_low == key_high) & (key_low == query_high)
    return Rule(allows, some, every)


def _extremes(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest id in each block of tokens."""
    tokens = ids.shape[-1]
    index = torch.arange(blocks(tokens) * BLOCK, device=ids.device).clamp(max=tokens - 1)
    by_block = ids[..., index].unflatten(-1, (-1, BLOCK))
    return by_block.amin(dim=-1), by_block.amax(dim=-1)


def _dense(mask: Dense, view: _View) -> Rule:
    allowed = entry(mask.allowed)
    query_shift, key_shift = view.number(view.first_query), view.number(view.first_key)
    return _asked(lambda b, h, q, k: allowed(b, h, q + query_shift, k + key_shift), view)


def _custom(mask: Custom, view: _View) -> Rule:
    mask.materialize_rows(
        0, 1, 1, 1, device=view.device
    )  # raises if fn returns no mask, before the compiler
    query_shift = view.number(view.offset(mask.align) + view.first_key)
    fn, key_shift = mask.fn, view.number(view.first_key)
    by_row, by_head = mask.batch > 1, mask.heads > 1

    def allows(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # A fn that tells no batch rows or heads apart is asked about the first.
        return fn(b if by_row else b * 0, h if by_head else h * 0, q + query_shift, k + key_shift)

    return _asked(allows, view)


_LOWERED: dict[type[Mask], Callable[[Any, _View], Rule]] = {
    Causal: _causal,
    Window: _window,
    Lengths: _lengths,
    LeftPadding: _left_padding,
    Prefix: _prefix,
    Documents: _documents,
    Dense: _dense,
    Custom: _custom,
}
