"""The mask function: what transformers says about a mask, told as a polyhead mask.

transformers describes a mask as a function of indices, composed of a few factories of its
`masking_utils`. Those are recognised by their code, and each is believed only after it gave, on a
small grid, what ours gives; a mask with any part that is not recognised is written out by
transformers' own function. So a mask may cost memory, and is never another mask.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import polyhead.mask
from polyhead.integrations.transformers.structured import StructuredMask
from polyhead.mask import Causal, Documents, Mask, Window

__all__ = ["make_mask"]

MaskFunction = Callable[..., Any]
Rules = tuple[Mask, ...]  # all must allow


@dataclass(frozen=True)
class _Keys:
    """Where the keys of a mask stand: at positions offset .. offset + S - 1."""

    S: int
    offset: int
    device: torch.device | str


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor | None:
    """What transformers calls once for each kind of layer in a forward pass.

    Args:
        batch_size, q_length, kv_length: B, T and S.
        q_offset, kv_offset: positions of the first query and of the first key.
        mask_function: the rule, of indices (batch row, head, query position, key position).
        attention_mask: (B, positions) bool, False = padding. Shorter than the keys: the rest is
            not there yet.
        allow_is_causal_skip, allow_is_bidirectional_skip: whether None may be returned where
            nothing is masked but by causality.
        device: where to make it.
        options: what other mask functions need.

    Returns:
        (B, 1, T, S), True = may attend: a `StructuredMask`, or booleans written out where the
        rule is not known or a graph is being traced; None where every query may attend to all, or
        where the layer's own causality is the whole mask.
    """
    from transformers import masking_utils

    rule = masking_utils.causal_mask_function if mask_function is None else mask_function
    # A step that transformers means to compile must not go without a mask, and wants a plain
    # tensor; for its one query that is a small one.
    may_skip = allow_is_causal_skip or allow_is_bidirectional_skip
    if not (_is_traced(attention_mask) or (q_length == 1 and not may_skip)):
        keys = _Keys(kv_length, int(kv_offset), device)
        rules = _recognise(rule, keys, _readers())
        if rules is not None:
            rules += _padding(attention_mask, keys)
            return _structured(rules, batch_size, q_length, int(q_offset) - keys.offset, keys)
    if (
        allow_is_causal_skip
        and rule is masking_utils.causal_mask_function
        and attention_mask is None
        and q_length == kv_length
    ):
        return None  # a prompt without padding in a traced graph: the layer says that it is causal
    return masking_utils.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]  # a static cache gives a tensor
        kv_offset=kv_offset,
        mask_function=rule,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        device=device,
        **options,
    )


def _structured(
    rules: Rules, batch: int, T: int, first_query: int, keys: _Keys
) -> StructuredMask | None:
    """All the rules for T queries, the first of which stands at key `first_query`."""
    rules = tuple(rule for rule in rules if not _allows_all(rule, T, first_query, keys.S))
    if T == 1 and not rules:
        return None
    mask = functools.reduce(operator.and_, rules) if rules else None
    if mask is not None and first_query != keys.S - T and any(map(_sees_queries, rules)):
        mask = mask.for_queries(first_query, first_query + T, keys.S)
    return StructuredMask(mask, batch=batch, T=T, S=keys.S, device=keys.device)


def _sees_queries(rule: Mask) -> bool:
    return isinstance(rule, Causal | Window | Documents)


def _allows_all(rule: Mask, T: int, first_query: int, S: int) -> bool:
    """Whether a rule forbids none of these queries any key."""
    last_query = first_query + T - 1
    if isinstance(rule, Causal):
        return first_query >= S - 1
    if isinstance(rule, Window):
        before_fits = rule.before is None or last_query - rule.before <= 0
        return before_fits and (rule.after is None or first_query + rule.after >= S - 1)
    return False


def _is_traced(attention_mask: Tensor | None) -> bool:
    """Whether numbers must not be looked at: a graph is being made, or there are none."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[no-untyped-call, attr-defined]
        return True
    return attention_mask is not None and (
        attention_mask.is_meta or isinstance(attention_mask, FakeTensor)
    )


def _padding(attention_mask: Tensor | None, keys: _Keys) -> Rules:
    """Which keys are padding, (B, positions) with False where they are: on which side, if so."""
    if attention_mask is None:
        return ()
    real = attention_mask[:, keys.offset : keys.offset + keys.S].to(torch.bool)
    if real.shape[1] < keys.S:
        real = torch.nn.functional.pad(real, (0, keys.S - real.shape[1]))
    count = real.sum(dim=1)
    if bool((count == keys.S).all()):
        return ()
    key = torch.arange(keys.S, device=real.device)
    if torch.equal(real, key < count[:, None]):
        return (polyhead.mask.lengths(count),)
    first = real.long().argmax(dim=1)
    if torch.equal(real, (key >= first[:, None]) & (key < (first + count)[:, None])):
        left = polyhead.mask.left_padding(first)
        to_the_end = torch.equal(first + count, torch.full_like(count, keys.S))
        return (left,) if to_the_end else (left, polyhead.mask.lengths(first + count))
    return (polyhead.mask.dense(real[:, None, None]),)


def _recognise(function: MaskFunction, keys: _Keys, readers: Readers) -> Rules | None:
    """The rules that a mask function of transformers stands for; None if any is not known."""
    reader = readers.get(getattr(function, "__code__", None))
    return None if reader is None else reader(_enclosed(function), keys, readers)


def _enclosed(function: MaskFunction) -> dict[str, Any]:
    """What a factory of mask functions was given, by name."""
    cells = function.__closure__ or ()
    names = function.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _read_causal(given: dict[str, Any], keys: _Keys, readers: Readers) -> Rules:
    return (polyhead.mask.causal(),)


def _read_everybody(given: dict[str, Any], keys: _Keys, readers: Readers) -> Rules:
    return ()


def _read_window(given: dict[str, Any], keys: _Keys, readers: Readers) -> Rules | None:
    size = given["sliding_window"]
    return (polyhead.mask.window(before=size - 1),) if isinstance(size, int) else None


def _read_two_sided(given: dict[str, Any], keys: _Keys, readers: Readers) -> Rules | None:
    size = given["sliding_window"]
    return (polyhead.mask.window(before=size, after=size),) if isinstance(size, int) else None


def _read_chunks(given: dict[str, Any], keys: _Keys, readers: Readers) -> Rules:
    position = torch.arange(keys.offset, keys.offset + keys.S, device=keys.device)
    padding = given["left_padding"].to(keys.device)
    chunk = (position - padding[:, None]).div(given["chunk_size"], rounding_mode="floor")
    return (polyhead.mask.documents(chunk),)


def _read_and(given: dict[str, Any], keys: _Keys, readers: Readers) -> Rules | None:
    rules: Rules = ()
    for part in given["mask_functions"]:
        read = _recognise(part, keys, readers)
        if read is None:
            return None
        rules += read
    return rules


def _read_packed(given: dict[str, Any], keys: _Keys, readers: Readers) -> Rules:
    return (polyhead.mask.documents(given["packed_sequence_mask"]),)


def _read_remapped(given: dict[str, Any], keys: _Keys, readers: Readers) -> Rules | None:
    """A rule of positions that start anew in each packed sequence.

    Within a sequence they differ as the indices do; and transformers only asks for this together
    with the rule that no sequence sees another.
    """
    rules = _recognise(given["mask_function"], keys, readers)
    relative = rules is not None and all(isinstance(rule, Causal | Window) for rule in rules)
    return rules if relative else None


Reader = Callable[[dict[str, Any], _Keys, "Readers"], Rules | None]
Readers = dict[CodeType | None, Reader]


@functools.cache
def _readers() -> Readers:
    """How to read each mask function of this release of transformers, by its code."""
    from transformers import masking_utils

    def made(name: str, *arguments: Any) -> MaskFunction | None:
        factory = getattr(masking_utils, name, None)
        return None if factory is None else factory(*arguments)

    position = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4]])
    sequence = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]])
    causal = getattr(masking_utils, "causal_mask_function", None)
    window = made("sliding_window_overlay", 3)
    two_sided = made("sliding_window_bidirectional_overlay", 2)
    chunks = made("chunked_overlay", 3, torch.tensor([0, 2]))
    everybody = getattr(masking_utils, "bidirectional_mask_function", None)
    both = made("and_masks", causal, window) if causal and window else None
    packed = made("packed_sequence_mask_function", sequence)
    remapped = made("remap_positions_for_packed_sequence", causal, position)
    # What to learn to read, how, and a whole mask to compare by; `and_masks` before what needs it.
    lessons: list[tuple[MaskFunction | None, Reader, MaskFunction | None]] = [
        (causal, _read_causal, causal),
        (window, _read_window, window),
        (everybody, _read_everybody, everybody),
        (two_sided, _read_two_sided, two_sided),
        (chunks, _read_chunks, chunks),
        (both, _read_and, both),
        (packed, _read_packed, packed),
        (remapped, _read_remapped, made("and_masks", packed, remapped)),
    ]
    readers: Readers = {}
    for function, reader, example in lessons:
        if function is None or example is None:
            continue  # another release
        readers[function.__code__] = reader
        if not _reads_right(example, readers):
            del readers[function.__code__]
    return readers


def _reads_right(function: MaskFunction, readers: Readers) -> bool:
    """Whether a mask function of 2 batch rows, 7 queries and 7 keys is what we read it as."""
    batch, head, query, key = torch.meshgrid(*map(torch.arange, (2, 1, 7, 7)), indexing="ij")
    try:
        rules = _recognise(function, _Keys(7, 0, "cpu"), readers)
    except KeyError:  # what it was given has another name in this release
        return False
    if rules is None:
        return False
    ours = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    for rule in rules:
        ours = ours & rule.materialize(7, 7)
    return torch.equal(ours, function(batch, head, query, key))
