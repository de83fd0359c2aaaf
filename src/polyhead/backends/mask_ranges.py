"""What a mask's structure says to a kernel that takes ranges of keys instead of T x S booleans."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polyhead.mask import (
    All,
    AnyOf,
    Causal,
    Documents,
    LeftPadding,
    Lengths,
    Mask,
    Prefix,
    Rows,
    Window,
)

__all__ = ["Structure", "read_structure"]

UNBOUNDED = 2**40  # beyond any number of tokens, and far from overflow when one is added


@dataclass
class Structure:
    """A mask as rules that must all hold for query t to attend to key s.

    Attributes:
        lower, upper: t + lower <= s <= t + upper.
        stop: s < stop.
        joined_upper, joined_prefix: s <= t + joined_upper or s < joined_prefix.
        lengths, padding: (B,) as in `mask.lengths` and `mask.left_padding`, or None.
        documents: (S,) or (B, S) as in `mask.documents`, or None.
        rest: what has no such structure, or None: it has to be written out.
    """

    lower: int = -UNBOUNDED
    upper: int = UNBOUNDED
    stop: int = UNBOUNDED
    joined_upper: int = UNBOUNDED
    joined_prefix: int = 0
    lengths: Tensor | None = None
    padding: Tensor | None = None
    documents: Tensor | None = None
    rest: Mask | None = None

    @property
    def band(self) -> list[int]:
        """The rules that depend on positions alone, in the order that csrc/ranges.hpp takes."""
        return [self.lower, self.upper, self.stop, self.joined_upper, self.joined_prefix]


def read_structure(mask: Mask | None, T: int, S: int) -> Structure:
    """The structure of a mask for T queries and S keys. Reads no tensor's values.

    >>> import polyhead as ph
    >>> structure = read_structure(ph.mask.causal() & ph.mask.window(before=2), 3, 5)
    >>> structure.lower, structure.upper                  # query t stands at key t + 2
    (0, 2)
    """
    structure = Structure()
    if mask is None:
        return structure
    rest = [part for part in mask.conjuncts if not _narrow(structure, part, S, S - T, 0)]
    if rest:
        structure.rest = rest[0] if len(rest) == 1 else All(tuple(rest))
    return structure


def _narrow(structure: Structure, part: Mask, S: int, end: int, start: int) -> bool:
    """Add a rule to the structure; False, and the structure as it was, if it has no place there.

    Query t stands at key t + end where positions count from the end, else at key t + start.
    """
    if isinstance(part, Causal):
        here = end if part.align == "end" else start
        structure.upper = min(structure.upper, here)
    elif isinstance(part, Window):
        here = end if part.align == "end" else start
        if part.before is not None:
            structure.lower = max(structure.lower, here - part.before)
        if part.after is not None:
            structure.upper = min(structure.upper, here + part.after)
    elif isinstance(part, Prefix):
        structure.stop = min(structure.stop, part.n)
    elif isinstance(part, Lengths):
        old = structure.lengths
        structure.lengths = part.lengths if old is None else torch.minimum(old, part.lengths)
    elif isinstance(part, LeftPadding):
        old = structure.padding
        structure.padding = part.padding if old is None else torch.maximum(old, part.padding)
    elif isinstance(part, Documents):
        if structure.documents is not None:
            return False
        structure.documents = part.ids
    elif isinstance(part, AnyOf):
        return _narrow_by_union(structure, part, S, end, start)
    elif isinstance(part, Rows):
        return _narrow_by_rows(structure, part, S, start)
    else:
        return False
    return True


def _narrow_by_rows(structure: Structure, rows: Rows, S: int, start: int) -> bool:
    """Some queries' rows of a mask: the same rules, of queries that stand elsewhere."""
    parts = rows.part.conjuncts
    if any(isinstance(part, Documents) for part in parts):
        return False  # a kernel takes the queries for the last of the keys, and these may not be
    start += rows.start
    narrowed = replace(structure)
    if not all(_narrow(narrowed, part, S, S - rows.T + start, start) for part in parts):
        return False
    vars(structure).update(vars(narrowed))
    return True


def _narrow_by_union(structure: Structure, union: AnyOf, S: int, end: int, start: int) -> bool:
    """`causal() | prefix(n)`: what begins at the first key is still one range of keys."""
    if structure.joined_upper != UNBOUNDED:
        return False
    upper, prefix = -UNBOUNDED, 0
    for part in union.parts:
        alone = Structure()
        is_range = _narrow(alone, part, S, end, start)
        if not is_range or alone not in (Structure(upper=alone.upper), Structure(stop=alone.stop)):
            return False
        if alone.upper != UNBOUNDED:
            upper = max(upper, alone.upper)
        else:
            prefix = max(prefix, alone.stop)
    structure.joined_upper, structure.joined_prefix = upper, prefix
    return True
