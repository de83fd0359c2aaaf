"""Attention layers of a checkpoint, found by name; each must be complete, without other names.

transformer.h.0.attn.c_attn.weight
+------------------+ +-----------+
      prefix             below
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor

from polyhead.convert.layout import Layout
from polyhead.convert.leftovers import is_buffer, is_mask, remedy_for
from polyhead.errors import ConversionError

__all__ = ["OURS", "Found", "check_count_of_layers", "check_whole", "find", "leftovers"]

# Each of our modules has these; they locate it.
OURS = {"W_query.weight", "W_key.weight", "W_value.weight"}
_OUR_ROOTS = frozenset({"W_query", "W_key", "W_value", "W_query_down", "W_kv_down"})
_OUR_PARTS = _OUR_ROOTS | {"W_qkv", "W_gate", "out_proj", "q_norm", "k_norm", "kv_norm"}
_HEAD = re.compile(r"heads\.\d+\.")
_NUMBER = re.compile(r"\d+")


@dataclass
class Found:
    """Names of one layer below its prefix: tensors, and buffers that are dropped."""

    names: list[str] = field(default_factory=list)
    buffers: list[str] = field(default_factory=list)


def find(names: Iterable[str], layouts: Sequence[Layout]) -> list[str]:
    """Return the prefixes of all complete layers of these layouts; no layout: ours."""
    present = set(names)
    prefixes: dict[str, None] = {}
    for marks in [layout.their_marks for layout in layouts] or [OURS]:
        first = min(marks)
        for name in present:
            prefix = name.removesuffix(first)
            begins = name.endswith(first) and (prefix == "" or prefix.endswith("."))
            if begins and all(prefix + mark in present for mark in marks):
                prefixes[prefix] = None
    return sorted(prefixes, key=_by_numbers)


def _by_numbers(prefix: str) -> list[tuple[bool, int, str]]:
    parts = prefix.split(".")
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def leftovers(
    tensors: Mapping[str, Tensor],
    prefixes: Iterable[str],
    layouts: Sequence[Layout],
    owned: set[str],
) -> dict[str, Found]:
    """Return the names of each prefix's layer, which must own every name below it.

    Raises:
        ConversionError: a name below a layer is neither its tensor nor a buffer of older code.
    """
    layers = {prefix: Found() for prefix in prefixes}
    unknown: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        within = [start for start in starts(name) if name[:start] in layers]
        for start in within:
            if _owned(name[start:], layouts, owned):
                layers[name[:start]].names.append(name[start:])
                break
        else:
            if not within:
                continue
            prefix, below = name[: within[-1]], name[within[-1] :]
            if is_buffer(below) or is_mask(below, tensor):
                layers[prefix].buffers.append(below)
            elif not _may_stay(below, layouts):
                unknown.setdefault(prefix, []).append(below)
    for prefix, names in unknown.items():
        _refuse_unknown(prefix, names, layouts)
    _check_alike(layers, layouts)
    return layers


def _check_alike(layers: Mapping[str, Found], layouts: Sequence[Layout]) -> None:
    """Raise unless all numbered layers have the same tensors; T5's table is optional."""
    alone = {"position_bias.weight"} | {
        rule.theirs
        for layout in layouts
        for rule in layout.rules
        if rule.ours == ("position_bias.weight",)
    }
    stacks: dict[str, dict[str, str]] = {}
    for prefix, layer in layers.items():
        stack = stacks.setdefault(_NUMBER.sub("*", prefix), {})
        for name in layer.names:
            stack.setdefault(name, prefix)
    for prefix, layer in layers.items():
        for name, other in stacks[_NUMBER.sub("*", prefix)].items():
            if name not in layer.names and name not in alone:
                raise ConversionError(
                    f"{prefix}{name} must be present, as {other}{name} is; it is missing; give the "
                    "whole checkpoint (all its shards), or layers that differ one by one"
                )


def starts(name: str) -> list[int]:
    """Return the positions where a name below a prefix can begin."""
    return [0, *(i + 1 for i, letter in enumerate(name) if letter == ".")]


def _owned(below: str, layouts: Sequence[Layout], ours: set[str]) -> bool:
    if not layouts:
        return below in ours
    return any(layout.owns(below) for layout in layouts)


def _may_stay(below: str, layouts: Sequence[Layout]) -> bool:
    """True if a name in the layer's module belongs to another part of the model.

    A family lists those names. Next to our names any submodule may exist, but nothing directly in
    the module or below a projection.
    """
    if any(below in layout.staying for layout in layouts):
        return True
    if layouts and layouts[0].is_family:
        return False
    below = _HEAD.sub("", below, count=1)
    first, _, rest = below.partition(".")
    return bool(rest) and first not in _OUR_PARTS


def _refuse_unknown(prefix: str, names: list[str], layouts: Sequence[Layout]) -> None:
    what, remedy = remedy_for(names)
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    layout = layouts[0].name if layouts else "polyhead"
    raise ConversionError(
        f"{prefix or 'the layer'}: layout {layout} has no place for {shown}, {what}; {remedy}"
    )


def check_whole(
    names: Iterable[str],
    prefixes: Sequence[str],
    layouts: Sequence[Layout],
    others: Mapping[str, Sequence[Layout]],
) -> None:
    """Raise unless every attention layer among the names is converted.

    Args:
        names: of the whole checkpoint.
        prefixes: of the layers that were found.
        layouts: of these layers; none: ours.
        others: all other layouts by name; an empty sequence: ours.

    Raises:
        ConversionError: a layer is of another layout, or lacks a tensor.
    """
    names = list(names)
    found = set(prefixes)
    for name, other in others.items() if found else ():
        if any(kind.their_marks < mine.their_marks for kind in other for mine in layouts):
            continue  # such a layer is one of these without a tensor
        for prefix in find(names, other):
            is_head = bool(layouts) and layouts[0].name == "stacked" and _is_head(prefix)
            if not is_head and not any(prefix.startswith(start) for start in found):
                raise ConversionError(
                    f"{prefix or 'the whole'} is a layer of layout {name}, and would stay as it is "
                    f"next to the {len(found)} that move; pass the tensors of one layout only, or "
                    "convert that layout first"
                )
    _check_parts(names, found, layouts)
    if layouts and layouts[0].is_family:
        _check_numbers(names, prefixes)


def _is_head(prefix: str) -> bool:
    """True if a prefix ends with one of several stacked heads."""
    return any(_HEAD.fullmatch(prefix[start:]) for start in starts(prefix))


def _check_parts(names: list[str], found: set[str], layouts: Sequence[Layout]) -> None:
    """Raise if a projection of queries, keys or values is outside of a complete layer."""
    patterns = {_NUMBER.sub("*", prefix) for prefix in found}
    roots = (
        _OUR_ROOTS.union(*(layout.roots for layout in layouts))
        if not layouts
        else frozenset(root for layout in layouts for root in layout.roots)
    )
    # Outside of attention layers, an output projection's name may be another layer's.
    parts = roots.union(*(layout.projections for layout in layouts)) if layouts else _OUR_PARTS
    is_ours = not layouts or not layouts[0].one_width
    partial: dict[str, list[str]] = {}
    for name in names:
        for start in starts(name):
            prefix, below = name[:start], name[start:]
            if prefix in found:
                break
            among = parts if _NUMBER.sub("*", prefix) in patterns else roots
            below_head = _HEAD.sub("", below, count=1) if is_ours else below
            if any(below_head == root or below_head.startswith(f"{root}.") for root in among):
                partial.setdefault(prefix, []).append(below)
                break
    for prefix, some in partial.items():
        _refuse_partial(prefix, some, set(names), layouts)


def _refuse_partial(
    prefix: str, parts: list[str], names: set[str], layouts: Sequence[Layout]
) -> None:
    marks_of = {layout.name: layout.their_marks for layout in layouts} or {"polyhead": OURS}
    missing = {
        name: sorted(mark for mark in marks if prefix + mark not in names)
        for name, marks in marks_of.items()
    }
    layout = min(missing, key=lambda name: len(missing[name]))
    known = {name for layout in layouts for name in layout.theirs} or {
        f"{part}.{kind}" for part in _OUR_PARTS for kind in ("weight", "bias")
    }
    odd = [part for part in parts if part not in known and not is_buffer(part)]
    remedy = "give the whole checkpoint (all its shards), or choose another layout"
    shown = ", ".join((odd or parts)[:4]) + (", ..." if len(odd or parts) > 4 else "")
    if odd:
        what, remedy = remedy_for(odd)
        shown += f", {what}"
    raise ConversionError(
        f"{prefix or 'the layer'}: layout {layout} needs {', '.join(missing[layout])}, which "
        f"cannot be found; got {shown}; {remedy}"
    )


def _check_numbers(names: Sequence[str], prefixes: Sequence[str]) -> None:
    """Raise if a numbered layer of a stack has no attention, or a number is missing."""
    stacks: dict[tuple[str, str], set[int]] = {}
    for prefix in prefixes:
        for start in starts(prefix):
            index, _, rest = prefix[start:].partition(".")
            if index.isdecimal():
                stacks.setdefault((prefix[:start], rest), set()).add(int(index))
    held: dict[str, dict[int, set[str]]] = {stem: {} for stem, _ in stacks}
    for name in names:
        for start in starts(name):
            index, _, rest = name[start:].partition(".")
            if name[:start] in held and index.isdecimal():
                held[name[:start]].setdefault(int(index), set()).add(rest)
    for (stem, rest), numbers in stacks.items():
        layers = held[stem]
        there = sorted(layers)
        gaps = [low + 1 for low, high in pairwise(there) if high > low + 1]
        hollow = [
            number
            for number in there
            if number not in numbers and any(layers[number] <= layers[other] for other in numbers)
        ]
        for number in sorted({*hollow, *gaps}):
            if number in hollow or min(numbers) < number < max(numbers):
                _refuse_number(stem, number, rest, min(numbers))


def _refuse_number(stem: str, number: int, rest: str, other: int) -> None:
    raise ConversionError(
        f"{stem}{number}.{rest} must be an attention layer, as {stem}{other}.{rest} is; got none "
        "of its tensors; give the whole checkpoint (all its shards)"
    )


def check_count_of_layers(prefixes: Sequence[str], expected: int | None) -> None:
    """Raise if fewer numbered layers are found than the config has; None: unknown."""
    numbered = [prefix for prefix in prefixes if _NUMBER.search(prefix)]
    if expected is not None and numbered and len(numbered) < expected:
        raise ConversionError(
            f"all {expected} layers that the config names must be present; got attention of "
            f"{len(numbered)}; give the whole checkpoint (all its shards)"
        )
