"""What a mask's structure says to a kernel that takes ranges of keys instead of T x S booleans."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polyhead.mask import (
    All,
    AnyOf,
    Causal,
    Custom,
    Documents,
    LeftPadding,
    Lengths,
    Mask,
    Prefix,
    Rows,
    Window,
)

__all__ = ["Structure", "custom_reasons", "read_structure"]

UNBOUNDED = 2**40  # beyond any number of tokens, and far from overflow when one is added


@dataclass(frozen=True)
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


def custom_reasons(mask: Mask | None) -> list[str]:
    """Why a kernel that needs structure cannot run this mask: some rule of it has none."""
    if mask is None:
        return []
    return [
        f"runs masks of known structure, no {rule!r}"
        for rule in mask.primitives()
        if isinstance(rule, Custom)
    ]


def read_structure(mask: Mask | None, T: int, S: int) -> Structure:
    """The structure of a mask for T queries and S keys. Reads no tensor's values.

    >>> import polyhead as ph
    >>> structure = read_structure(ph.mask.causal() & ph.mask.window(before=2), 3, 5)
    >>> structure.lower, structure.upper                  # query t stands at key t + 2
    (0, 2)
    """
    structure = Structure()
    rest = []
    for part in () if mask is None else mask.conjuncts:
        narrowed = _with_part(structure, part, S, end=S - T, start=0)
        if narrowed is None:
            rest.append(part)
        else:
            structure = narrowed
    if not rest:
        return structure
    return replace(structure, rest=rest[0] if len(rest) == 1 else All(tuple(rest)))


def _with_part(structure: Structure, part: Mask, S: int, end: int, start: int) -> Structure | None:
    """The structure with one more rule, or None if the rule has no place in it.

    Query t stands at key t + end where positions count from the end, else at key t + start.
    """
    if isinstance(part, Causal):
        upper = end if part.align == "end" else start
        return replace(structure, upper=min(structure.upper, upper))
    if isinstance(part, Window):
        here = end if part.align == "end" else start
        lower = -UNBOUNDED if part.before is None else here - part.before
        upper = UNBOUNDED if part.after is None else here + part.after
        return replace(
            structure, lower=max(structure.lower, lower), upper=min(structure.upper, upper)
        )
    if isinstance(part, Prefix):
        return replace(structure, stop=min(structure.stop, part.n))
    if isinstance(part, Lengths):
        old = structure.lengths
        lengths = part.lengths if old is None else torch.minimum(old, part.lengths)
        return replace(structure, lengths=lengths)
    if isinstance(part, LeftPadding):
        old = structure.padding
        padding = part.padding if old is None else torch.maximum(old, part.padding)
        return replace(structure, padding=padding)
    if isinstance(part, Documents):
        return replace(structure, documents=part.ids) if structure.documents is None else None
    if isinstance(part, AnyOf):
        return _with_union(structure, part, S, end, start)
    if isinstance(part, Rows):
        if any(isinstance(inner, Documents) for inner in part.part.conjuncts):
            return None  # a kernel takes the queries for the last of the keys, and these may not be
        start += part.start
        return _with_all(structure, part.part, S, S - part.T + start, start)
    return None


def _with_all(structure: Structure, mask: Mask, S: int, end: int, start: int) -> Structure | None:
    for part in mask.conjuncts:
        narrowed = _with_part(structure, part, S, end, start)
        if narrowed is None:
            return None
        structure = narrowed
    return structure


def _with_union(
    structure: Structure, union: AnyOf, S: int, end: int, start: int
) -> Structure | None:
    """`causal() | prefix(n)`: what begins at the first key is still one range of keys."""
    if structure.joined_upper != UNBOUNDED:
        return None
    upper, prefix = -UNBOUNDED, 0
    for part in union.parts:
        alone = _with_part(Structure(), part, S, end, start)
        if alone is None or alone not in (Structure(upper=alone.upper), Structure(stop=alone.stop)):
            return None
        if alone.upper != UNBOUNDED:
            upper = max(upper, alone.upper)
        else:
            prefix = max(prefix, alone.stop)
    return replace(structure, joined_upper=upper, joined_prefix=prefix)
