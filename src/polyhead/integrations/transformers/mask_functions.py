"""Conversion of transformers' mask functions to polyhead masks.

transformers describes a mask as a function of indices, composed of a few factories of its
`masking_utils`. These are recognized by their code object; each is trusted only if it equals our
mask on a small grid.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

import polyhead.mask
from polyhead.mask import Causal, Mask, Window

__all__ = ["KeySpan", "MaskFunction", "Rules", "has_numbers", "recognize"]

MaskFunction = Callable[..., Any]
Rules = tuple[Mask, ...]  # all must allow


@dataclass(frozen=True)
class KeySpan:
    """Keys of a mask: positions offset .. offset + S - 1."""

    S: int
    offset: int
    device: torch.device | str


Matcher = Callable[[dict[str, Any], KeySpan, "Matchers"], Rules | None]
Matchers = dict[CodeType | None, Matcher]


def has_numbers(tensor: Tensor) -> bool:
    """True if the tensor has data: not a meta or fake tensor."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def recognize(function: MaskFunction, keys: KeySpan) -> Rules | None:
    """Return the masks that a mask function combines; None if any is unknown."""
    return _recognize(function, keys, _matchers())


def _recognize(function: MaskFunction, keys: KeySpan, matchers: Matchers) -> Rules | None:
    matcher = matchers.get(getattr(function, "__code__", None))
    return None if matcher is None else matcher(_enclosed(function), keys, matchers)


def _enclosed(function: MaskFunction) -> dict[str, Any]:
    """Return the closure of a mask function, by name: the arguments of its factory."""
    cells = function.__closure__ or ()
    names = function.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _read_causal(given: dict[str, Any], keys: KeySpan, matchers: Matchers) -> Rules:
    return (polyhead.mask.causal(),)


def _read_bidirectional(given: dict[str, Any], keys: KeySpan, matchers: Matchers) -> Rules:
    return ()


def _read_window(given: dict[str, Any], keys: KeySpan, matchers: Matchers) -> Rules | None:
    size = given["sliding_window"]
    # Size 0 hides a query's own key too; Qwen2-MoE makes such a mask, and no layer uses it.
    known = isinstance(size, int) and size > 0
    return (polyhead.mask.window(before=size - 1),) if known else None


def _read_two_sided(given: dict[str, Any], keys: KeySpan, matchers: Matchers) -> Rules | None:
    size = given["sliding_window"]
    known = isinstance(size, int) and size >= 0
    return (polyhead.mask.window(before=size, after=size),) if known else None


def _read_chunks(given: dict[str, Any], keys: KeySpan, matchers: Matchers) -> Rules:
    position = torch.arange(keys.offset, keys.offset + keys.S, device=keys.device)
    padding = given["left_padding"].to(keys.device)
    chunk = (position - padding[:, None]).div(given["chunk_size"], rounding_mode="floor")
    return (polyhead.mask.documents(chunk),)


def _read_and(given: dict[str, Any], keys: KeySpan, matchers: Matchers) -> Rules | None:
    rules: Rules = ()
    for part in given["mask_functions"]:
        read = _recognize(part, keys, matchers)
        if read is None:
            return None
        rules += read
    return rules


def _read_packed(given: dict[str, Any], keys: KeySpan, matchers: Matchers) -> Rules | None:
    sequence = given["packed_sequence_mask"]
    if not has_numbers(sequence):
        return None
    if bool((sequence == sequence[:, :1]).all()):  # one sequence a row, as before transformers 5
        return ()
    return (polyhead.mask.documents(sequence),)


def _read_remapped(given: dict[str, Any], keys: KeySpan, matchers: Matchers) -> Rules | None:
    """Match a mask of positions that restart in each packed sequence.

    Within a sequence, differences of positions are those of indices; and transformers combines it
    with the mask that separates sequences.
    """
    rules = _recognize(given["mask_function"], keys, matchers)
    relative = rules is not None and all(isinstance(rule, Causal | Window) for rule in rules)
    return rules if relative else None


@functools.cache
def _matchers() -> Matchers:
    """Return the matchers for this release of transformers, by code object."""
    # On real data, even if the first mask is made under fake tensors or another device.
    with _disable_current_modes(), torch.device("cpu"):
        return _build_matchers()


def _build_matchers() -> Matchers:
    from transformers import masking_utils

    def made(name: str, *arguments: Any) -> MaskFunction | None:
        factory = getattr(masking_utils, name, None)
        missing = factory is None or any(argument is None for argument in arguments)
        return None if missing else factory(*arguments)  # type: ignore[misc]

    position = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4]])
    sequence = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]])
    causal = getattr(masking_utils, "causal_mask_function", None)
    window = made("sliding_window_overlay", 3)
    two_sided = made("sliding_window_bidirectional_overlay", 2)
    chunks = made("chunked_overlay", 3, torch.tensor([0, 2]))
    bidirectional = getattr(masking_utils, "bidirectional_mask_function", None)
    both = made("and_masks", causal, window)
    packed = made("packed_sequence_mask_function", sequence)
    remapped = made("remap_positions_for_packed_sequence", causal, position)
    # Mask function, its matcher, a complete mask as the probe; `and_masks` before its uses.
    candidates: list[tuple[MaskFunction | None, Matcher, MaskFunction | None]] = [
        (causal, _read_causal, causal),
        (window, _read_window, window),
        (bidirectional, _read_bidirectional, bidirectional),
        (two_sided, _read_two_sided, two_sided),
        (chunks, _read_chunks, chunks),
        (both, _read_and, both),
        (packed, _read_packed, packed),
        (remapped, _read_remapped, made("and_masks", packed, remapped)),
    ]
    matchers: Matchers = {}
    for function, matcher, example in candidates:
        if function is None or example is None:
            continue  # another release
        matchers[function.__code__] = matcher
        if not _matches_on_probe(example, matchers):
            del matchers[function.__code__]
    return matchers


def _matches_on_probe(function: MaskFunction, matchers: Matchers) -> bool:
    """True if our mask equals a mask function on 2 batch rows, 7 queries and 7 keys."""
    batch, head, query, key = torch.meshgrid(*map(torch.arange, (2, 1, 7, 7)), indexing="ij")
    try:
        rules = _recognize(function, KeySpan(7, 0, "cpu"), matchers)
    except KeyError:  # the factory's arguments have other names in this release
        return False
    if rules is None:
        return False
    ours = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    for rule in rules:
        ours = ours & rule.materialize(7, 7)
    return torch.equal(ours, function(batch, head, query, key))
