"""What a mask's ranges says to a kernel that takes ranges of keys instead of T x S booleans."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polyhead.mask import (
    And,
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

__all__ = ["MaskRanges", "read_ranges"]

UNBOUNDED = 2**40  # beyond any number of tokens, and far from overflow when one is added


@dataclass
class MaskRanges:
    """A mask as rules that must all hold for query t to attend to key s.

    Attributes:
        lower, upper: t + lower <= s <= t + upper.
        stop: s < stop.
        joined_upper, joined_prefix: s <= t + joined_upper or s < joined_prefix.
        lengths, padding: (B,) as in `mask.lengths` and `mask.left_padding`, or None.
        documents: (S,) or (B, S) as in `mask.documents`, or None.
        unstructured: what has no such ranges, or None: it has to be written out.
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


def read_ranges(mask: Mask | None, T: int, S: int) -> MaskRanges:
    """The ranges of a mask for T queries and S keys. Reads no tensor's values.

    >>> import polyhead as ph
    >>> ranges = read_ranges(ph.mask.causal() & ph.mask.window(before=2), 3, 5)
    >>> ranges.lower, ranges.upper                  # query t stands at key t + 2
    (0, 2)
    """
    ranges = MaskRanges()
    if mask is None:
        return ranges
    rest = [part for part in mask.conjuncts if not _intersect(ranges, part, S, S - T, 0)]
    if rest:
        ranges.unstructured = rest[0] if len(rest) == 1 else And(tuple(rest))
    return ranges


def _intersect(ranges: MaskRanges, part: Mask, S: int, end: int, start: int) -> bool:
    """Add a rule to the ranges; False, and the ranges as it was, if it has no place there.

    Query t stands at key t + end where positions count from the end, else at key t + start.
    """
    if isinstance(part, Causal):
        here = end if part.align == "end" else start
        ranges.upper = min(ranges.upper, here)
    elif isinstance(part, Window):
        here = end if part.align == "end" else start
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
        return _intersect_union(ranges, part, S, end, start)
    elif isinstance(part, QuerySlice):
        return _intersect_rows(ranges, part, S, start)
    else:
        return False
    return True


def _intersect_rows(ranges: MaskRanges, rows: QuerySlice, S: int, start: int) -> bool:
    """Some queries' rows of a mask: the same rules, of queries that stand elsewhere."""
    parts = rows.part.conjuncts
    if any(isinstance(part, Documents) for part in parts):
        return False  # a kernel takes the queries for the last of the keys, and these may not be
    start += rows.start
    narrowed = replace(ranges)
    if not all(_intersect(narrowed, part, S, S - rows.T + start, start) for part in parts):
        return False
    vars(ranges).update(vars(narrowed))
    return True


def _intersect_union(ranges: MaskRanges, union: Or, S: int, end: int, start: int) -> bool:
    """`causal() | prefix(n)`: what begins at the first key is still one range of keys."""
    if ranges.joined_upper != UNBOUNDED:
        return False
    upper, prefix = -UNBOUNDED, 0
    for part in union.parts:
        alone = MaskRanges()
        is_range = _intersect(alone, part, S, end, start)
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
