"""Mask function of transformers' AttentionMaskInterface: returns a structured polyhead mask.

A mask with any unknown part (`mask_functions.py`) is materialized by transformers' own function. So
a mask may cost memory, and is never another mask.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor

import polyhead.mask
from polyhead.integrations.transformers.mask_functions import (
    KeySpan,
    MaskFunction,
    Rules,
    recognize,
)
from polyhead.integrations.transformers.packing import is_traced
from polyhead.integrations.transformers.structured_mask import StructuredMask
from polyhead.mask import Causal, Documents, Mask, Window

__all__ = ["make_mask"]


def make_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    cache_position: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """Make the mask of one kind of layer; transformers calls it once per forward pass.

    Args:
        batch_size, q_length, kv_length: B, T and S.
        q_offset, kv_offset: positions of the first query and of the first key.
        mask_function: of indices (batch row, head, query position, key position).
        attention_mask: (B, positions) bool, False = padding. Shorter than the keys: the rest is
            not filled yet.
        allow_is_causal_skip, allow_is_bidirectional_skip: True if None may be returned for a
            causal mask, or for none.
        device: of the mask.
        cache_position: (T,) positions of the queries, in transformers 4 instead of q_length,
            q_offset and device.
        options: of other mask functions.

    Returns:
        (B, 1, T, S), True = may attend: a `StructuredMask`, or materialized booleans if the
        function is unknown or a graph is being traced; None if every query may attend to all keys,
        or if the layer's own causality is the whole mask.
    """
    from transformers import masking_utils

    rule = masking_utils.causal_mask_function if mask_function is None else mask_function
    queries: dict[str, Any] = {"q_length": q_length, "q_offset": q_offset, "device": device}
    if cache_position is not None:
        queries = {"cache_position": cache_position}
        # Not len(), which specializes an exported program to one length.
        q_length, q_offset = cache_position.shape[0], cache_position[0]
        device = cache_position.device
    assert q_length is not None
    # A decoding step that transformers compiles needs a mask, as a plain tensor; for one query
    # it is small.
    may_skip = allow_is_causal_skip or allow_is_bidirectional_skip
    if not (
        is_traced(attention_mask, cache_position, q_offset) or (q_length == 1 and not may_skip)
    ):
        keys = KeySpan(kv_length, int(kv_offset), device)
        rules = recognize(rule, keys)
        if rules is not None:
            rules += _padding(attention_mask, keys)
            return _structured(rules, batch_size, q_length, int(q_offset) - keys.offset, keys)
    if (
        allow_is_causal_skip
        and rule is masking_utils.causal_mask_function
        and attention_mask is None
        and q_length == kv_length
    ):
        return None  # a prompt without padding in a traced graph: the layer's flag is causal
    return masking_utils.sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=rule,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **queries,
        **options,
    )


def _structured(
    rules: Rules, batch: int, T: int, first_query: int, keys: KeySpan
) -> StructuredMask | None:
    """Intersect the masks for T queries, the first of which is at key `first_query`."""
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
    """True if a mask allows all these queries all keys."""
    last_query = first_query + T - 1
    if isinstance(rule, Causal):
        return first_query >= S - 1
    if isinstance(rule, Window):
        before_fits = rule.before is None or last_query - rule.before <= 0
        return before_fits and (rule.after is None or first_query + rule.after >= S - 1)
    return False


def _padding(attention_mask: Tensor | None, keys: KeySpan) -> Rules:
    """Return the masks of (B, positions) padding (False): lengths, left padding or dense."""
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
