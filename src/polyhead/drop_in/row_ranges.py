"""Ranges of keys, one per row of a dense mask, as the rule of `polyhead.mask` that gives them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import polyhead.mask
from polyhead.mask import Mask
from polyhead.mask.algebra import conjunction
from polyhead.mask.primitives import Align

__all__ = ["EVERYTHING", "rule_of_ranges"]

EVERYTHING = "every key"  # a mask that forbids nothing has no rule


def rule_of_ranges(ranges: Tensor, T: int, S: int, B: int) -> Mask | str | None:
    """The rule that allows exactly these keys; None: there is no such rule.

    Every candidate is computed again as ranges and compared with the given ones: a rule is
    returned only if it is the same mask, row for row.

    Args:
        ranges: (B or 1, T or 1, 2) the first key of each row, and the one after its last; equal in
            a row without keys.
        T, S, B: sizes of the call.

    Returns:
        A mask, `EVERYTHING`, or None.

    >>> ranges = torch.tensor([[[0, 1], [0, 2], [1, 3]]])
    >>> rule_of_ranges(ranges, 3, 3, 1)
    causal() & window(before=1)
    """
    rows = _Rows(ranges, T, S, B)
    for rule, begin, end in _candidates(rows):
        if rows.are(begin, end):
            return rule
    return None


class _Rows:
    """Begin and end of every row, (N, T) each, with the sizes of the call."""

    def __init__(self, ranges: Tensor, T: int, S: int, B: int) -> None:
        if ranges.shape[0] > 1 and bool((ranges == ranges[:1]).all()):
            ranges = ranges[:1]
        self.begin, self.end = (x.expand(-1, T) for x in ranges.unbind(-1))
        self.T, self.S, self.B = T, S, B
        self.holds = self.begin < self.end
        self.query = torch.arange(T)
        # Of the rows that allow a key. (A batch row without any has a length of 0.)
        self.first = self.begin.masked_fill(~self.holds, S).amin(dim=1, keepdim=True)
        self.last = self.end.masked_fill(~self.holds, 0).amax(dim=1, keepdim=True)
        self.first = self.first.minimum(self.last)

    def are(self, begin: Tensor | int, end: Tensor | int) -> bool:
        """True if these are the ranges of all rows; a range that ends before it begins is empty."""
        begin = torch.as_tensor(begin).clamp(0, self.S).expand_as(self.begin)
        end = torch.as_tensor(end).clamp(0, self.S).expand_as(self.end)
        holds = begin < end
        same = (begin == self.begin) & (end == self.end) & self.holds
        return bool(((holds == self.holds) & (same | ~holds)).all())


def _candidates(rows: _Rows) -> Iterator[tuple[Mask | str, Tensor | int, Tensor | int]]:
    """Rules in the order of preference, the plainest first, each with its ranges."""
    S = rows.S
    # What bounds all rows of a batch row: nothing, a length, padding on the left, or both.
    bounds: list[tuple[list[Mask], Tensor | int, Tensor | int]] = [([], 0, S)]
    is_short, is_padded = bool((rows.last < S).any()), bool((rows.first > 0).any())
    if is_short:
        bounds.append(([_length(rows)], 0, rows.last))
    if is_padded:
        bounds.append(([_padding(rows)], rows.first, S))
    if is_short and is_padded:
        bounds.append(([_padding(rows), _length(rows)], rows.first, rows.last))
    for parts, first, last in bounds:
        yield _all(parts), first, last
    for parts, first, last in bounds:
        upper = _common(rows.end - 1 - rows.query, rows.holds & (rows.end < last))
        lower = _common(rows.begin - rows.query, rows.holds & (rows.begin > first))
        if upper is None and lower is None:
            continue
        begin = torch.as_tensor(first if lower is None else rows.query + lower).clamp(min=first)
        end = torch.as_tensor(last if upper is None else rows.query + upper + 1).clamp(max=last)
        if (rule := _band(lower, upper, rows)) is not None:
            yield _all([*rule, *parts]), begin, end
    for parts, first, last in bounds:
        if (joined := _prefix(rows, parts, first, last)) is not None:
            yield joined
    if rows.T == S:
        yield from _documents(rows)


def _all(parts: list[Mask]) -> Mask | str:
    rule = conjunction(parts)
    return EVERYTHING if rule is None else rule


def _length(rows: _Rows) -> Mask:
    lengths = rows.last.flatten()
    if len(lengths) == 1:
        return polyhead.mask.prefix(int(lengths))
    return polyhead.mask.lengths(lengths.clone())


def _padding(rows: _Rows) -> Mask:
    return polyhead.mask.left_padding(rows.first.flatten().expand(rows.B).clone())


def _common(values: Tensor, where: Tensor) -> int | None:
    """A value there; whether it is the value of all of them, the comparison of ranges shows."""
    found = values[where]
    return int(found[0]) if len(found) else None


def _band(lower: int | None, upper: int | None, rows: _Rows) -> list[Mask] | None:
    """t + lower <= s <= t + upper, as `causal` and `window`."""
    found: list[list[Mask]] = []
    aligns: tuple[tuple[Align, int], ...] = (("end", rows.S - rows.T), ("start", 0))
    for align, at in aligns:
        before = None if lower is None else at - lower
        after = None if upper is None else upper - at
        if min(before or 0, after or 0) < 0:
            continue
        if after != 0:
            found.append([polyhead.mask.window(before, after, align=align)])
        elif before is None:
            return [polyhead.mask.causal(align)]
        else:  # as people write it
            return [polyhead.mask.causal(align), polyhead.mask.window(before, align=align)]
    return next(iter(found), None)


def _prefix(
    rows: _Rows, parts: list[Mask], first: Tensor | int, last: Tensor | int
) -> tuple[Mask | str, Tensor | int, Tensor] | None:
    """`causal() | prefix(n)`: the ends are n, and then follow the diagonal."""
    if not bool(rows.holds.any()):
        return None
    n = int(rows.end[rows.holds].min())
    upper = _common(rows.end - 1 - rows.query, rows.holds & (rows.end > n) & (rows.end < last))
    offset = rows.S - rows.T
    if upper is None or upper not in (offset, 0):
        return None
    causal = polyhead.mask.causal("end" if upper == offset else "start")
    end = (rows.query + upper + 1).clamp(min=n).expand_as(rows.end)
    end = end.minimum(torch.as_tensor(last).expand_as(end))
    return _all([causal | polyhead.mask.prefix(n), *parts]), first, end


def _documents(rows: _Rows) -> Iterator[tuple[Mask | str, Tensor, Tensor]]:
    """Blocks of tokens that attend among themselves, causally or not; padding at the end or none.

    A block begins at each row whose range begins at its own key.
    """
    own = rows.query.expand_as(rows.begin)
    # Rows of padding, which allow nothing, are one block after the others.
    tail = own >= rows.last
    starts = (rows.holds & (rows.begin == own)) | (own == rows.last)
    starts = starts | (own == 0)
    ids = starts.long().cumsum(dim=1) - 1
    begin = own.masked_fill(~starts, 0).cummax(dim=1).values
    after = torch.where(starts, own, rows.S).flip(1).cummin(dim=1).values.flip(1)
    end = torch.cat([after[:, 1:], after.new_full((len(after), 1), rows.S)], dim=1)
    ids = ids.squeeze(0) if len(ids) == 1 else ids
    parts: list[Mask] = [polyhead.mask.documents(ids.clone())]
    if bool(tail.any()):
        parts.append(_length(rows))
        end = end.minimum(rows.last)
    yield _all(parts), begin, end
    causal = polyhead.mask.causal()
    yield _all([causal, *parts]), begin, end.minimum(own + 1)
