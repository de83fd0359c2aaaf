"""Masks lowered to key ranges, for kernels that take one range of keys per query."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from polyhead.mask import (
    Causal,
    Documents,
    LeftPadding,
    Lengths,
    Mask,
    Or,
    Prefix,
    QuerySlice,
    Window,
)
from polyhead.mask.algebra import conjunction

__all__ = ["MaskRanges", "read_ranges"]

UNBOUNDED = 2**40  # beyond any number of tokens, and far from overflow when one is added


@dataclass
class MaskRanges:
    """A mask as rules that must all hold for a query to attend to key s.

    Attributes:
        lower, upper: q + lower <= s <= q + upper, where q is the query's index t, or its position
            t + query_offset if the call has one.
        stop: s < stop.
        joined_upper, joined_prefix: s <= q + joined_upper or s < joined_prefix.
        lengths, padding: (B,) as in `mask.lengths` and `mask.left_padding`, or None.
        documents: (S,) or (B, S) as in `mask.documents`, or None.
        unstructured: what has no such ranges, or None: it must be materialized.
    """

    lower: int = -UNBOUNDED
    upper: int = UNBOUNDED
    stop: int = UNBOUNDED
    joined_upper: int = UNBOUNDED
    joined_prefix: int = 0
    lengths: Tensor | None = None
    padding: Tensor | None = None
    documents: Tensor | None = None
    unstructured: Mask | None = None

    @property
    def band(self) -> list[int]:
        """The rules that depend on positions alone, in the order that csrc/key_ranges.hpp takes."""
        return [self.lower, self.upper, self.stop, self.joined_upper, self.joined_prefix]


class _Origin(NamedTuple):
    """Position of q = 0 in the two alignments of a mask. `start` is None if it is not known."""

    end: int
    start: int | None
    is_fixed: bool  # by the call's query_offset; else `end` depends on the number of queries

    def of(self, align: str) -> int | None:
        return self.end if align == "end" else self.start


def read_ranges(
    mask: Mask | None, T: int, S: int, query_offset: int | Tensor | None = None
) -> MaskRanges:
    """The ranges of a mask for T queries and S keys. Reads no tensor's values.

    >>> import polyhead as ph
    >>> ranges = read_ranges(ph.mask.causal() & ph.mask.window(before=2), 3, 5)
    >>> ranges.lower, ranges.upper                  # query t has position t + 2
    (0, 2)
    """
    ranges = MaskRanges()
    if mask is None:
        return ranges
    if query_offset is None:
        origin = _Origin(S - T, 0, is_fixed=False)
    else:
        start = None if isinstance(query_offset, Tensor) else -query_offset
        origin = _Origin(0, start, is_fixed=True)
    rest = [part for part in mask.conjuncts if not _intersect(ranges, part, S, origin)]
    ranges.unstructured = conjunction(rest)
    return ranges


def _intersect(ranges: MaskRanges, part: Mask, S: int, origin: _Origin) -> bool:
    """Add a rule to the ranges. Returns False, with the ranges unchanged, if it is not a range."""
    if isinstance(part, Causal):
        here = origin.of(part.align)
        if here is None:
            return False
        ranges.upper = min(ranges.upper, here)
    elif isinstance(part, Window):
        here = origin.of(part.align)
        if here is None:
            return False
        if part.before is not None:
            ranges.lower = max(ranges.lower, here - part.before)
        if part.after is not None:
            ranges.upper = min(ranges.upper, here + part.after)
    elif isinstance(part, Prefix):
        ranges.stop = min(ranges.stop, part.n)
    elif isinstance(part, Lengths):
        old = ranges.lengths
        ranges.lengths = part.lengths if old is None else torch.minimum(old, part.lengths)
    elif isinstance(part, LeftPadding):
        old = ranges.padding
        ranges.padding = part.padding if old is None else torch.maximum(old, part.padding)
    elif isinstance(part, Documents):
        if ranges.documents is not None:
            return False
        ranges.documents = part.ids
    elif isinstance(part, Or):
        return _intersect_union(ranges, part, S, origin)
    elif isinstance(part, QuerySlice):
        return _intersect_rows(ranges, part, S, origin)
    else:
        return False
    return True


def _intersect_rows(ranges: MaskRanges, rows: QuerySlice, S: int, origin: _Origin) -> bool:
    """Query slice: the same rules, for queries at other positions."""
    parts = rows.part.conjuncts
    if any(isinstance(part, Documents) for part in parts) and not origin.is_fixed:
        return False  # for a kernel the queries are the last of the keys, and these may not be
    start = None if origin.start is None else origin.start + rows.start
    if not origin.is_fixed:
        assert start is not None
        origin = origin._replace(end=S - rows.T + start)
    origin = origin._replace(start=start)
    narrowed = replace(ranges)
    if not all(_intersect(narrowed, part, S, origin) for part in parts):
        return False
    vars(ranges).update(vars(narrowed))
    return True


def _intersect_union(ranges: MaskRanges, union: Or, S: int, origin: _Origin) -> bool:
    """`causal() | prefix(n)`: a union of ranges that begin at the first key is one range."""
    if ranges.joined_upper != UNBOUNDED:
        return False
    upper, prefix = -UNBOUNDED, 0
    for part in union.parts:
        alone = MaskRanges()
        is_range = _intersect(alone, part, S, origin)
        if not is_range or alone not in (
            MaskRanges(upper=alone.upper),
            MaskRanges(stop=alone.stop),
        ):
            return False
        if alone.upper != UNBOUNDED:
            upper = max(upper, alone.upper)
        else:
            prefix = max(prefix, alone.stop)
    ranges.joined_upper, ranges.joined_prefix = upper, prefix
    return True
