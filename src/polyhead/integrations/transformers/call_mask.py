"""Mask of one call: the attention_mask, combined with other arguments and flags of the layer.

None is no mask. Every other argument that masks (the layer's flag, a window, packed documents,
selected keys) is applied, or the call is refused.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor, nn

import polyhead.mask
from polyhead.errors import ArgumentError, ShapeError
from polyhead.integrations.transformers.packing import packed_documents, restarting_documents
from polyhead.integrations.transformers.structured_mask import StructuredMask
from polyhead.mask import Mask

__all__ = ["read_mask"]

# Layers whose cache is their window, and which attend to all of it, in both directions.
_WINDOW_IS_IN_CACHE = frozenset({"DiffusionGemmaDecoderTextAttention"})


def read_mask(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    *,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    indices: Tensor | None = None,
    position_ids: Tensor | None = None,
    **packing: Any,
) -> tuple[Mask | None, Tensor | None]:
    """Return the mask and the bias of a call.

    Args:
        module: the layer.
        query, key: (B, H, T, D) and (B, G, S, D).
        attention_mask: as in `attention_forward`. It includes causality and windows; without one
            the next two arguments apply.
        is_causal, sliding_window: as in `attention_forward`.
        indices: (B, T, K) the keys that a query may attend to, in addition to the mask.
        position_ids: (1 or B, T); read if attention_mask is None.
        packing: as in `packed_documents`.

    Raises:
        ShapeError, ArgumentError: a rule does not fit the queries and keys.
    """
    (B, _, T, _), S = query.shape, key.shape[2]
    rules, bias = [], None
    if attention_mask is None:
        rules = _own_rules(module, B, T, S, is_causal, sliding_window, position_ids)
    elif isinstance(attention_mask, StructuredMask) and attention_mask.shape[2:] == (T, S):
        rules = [attention_mask.rule]
    else:
        rule, bias = _materialized(attention_mask, S)
        rules = [rule]
    if packing:
        rules.append(packed_documents(query.shape, S, **packing))
    if indices is not None:
        rules.append(_chosen_keys(indices, B, T, S))
    known = [rule for rule in rules if rule is not None]
    return functools.reduce(operator.and_, known) if known else None, bias


def _own_rules(
    module: nn.Module,
    B: int,
    T: int,
    S: int,
    is_causal: bool | None,
    sliding_window: int | None,
    position_ids: Tensor | None,
) -> list[Mask | None]:
    """Return the masks of the layer's own flag and window, for a call without attention_mask."""
    causal = _is_causal(module, is_causal)
    rules: list[Mask | None] = []
    if causal and not (isinstance(T, int) and T == 1):  # the last query sees all
        # The queries are the last tokens: a model may drop queries whose output it does not need.
        rules.append(polyhead.mask.causal())
    if sliding_window is not None and type(module).__name__ not in _WINDOW_IS_IN_CACHE:
        rules.append(_window(sliding_window, T, S, is_causal=causal))
    if causal:
        rules.append(restarting_documents(position_ids, B, T, S))
    return rules


def _is_causal(module: nn.Module, is_causal: bool | None) -> bool:
    """Return the call's argument, else the layer's flag; cross-attention is never causal."""
    name = type(module).__name__
    if getattr(module, "is_cross_attention", False) or "CrossAttention" in name:
        return False
    return bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)


def _window(size: int, T: int, S: int, *, is_causal: bool) -> Mask | None:
    """Return the window of `size` keys, the query's own included, and as far ahead."""
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ArgumentError(
            "sliding_window",
            "must be an integer of at least 1 without an attention_mask",
            repr(size),
            "set it to None in the config for no window, or pass a mask",
        )
    if not torch.compiler.is_compiling() and size >= max(T, S):
        return None
    return polyhead.mask.window(before=size - 1, after=None if is_causal else size - 1)


def _materialized(attention_mask: Tensor, S: int) -> tuple[Mask | None, Tensor | None]:
    if isinstance(attention_mask, StructuredMask):  # of other sizes
        attention_mask = attention_mask.dense()
    if attention_mask.shape[-1] != S:  # such as a head_mask, which multiplies
        raise ShapeError(
            "attention_mask",
            f"must be (B or 1, H or 1, T or 1, S = {S})",
            tuple(attention_mask.shape),
            'use attn_implementation="eager" for other masks than of keys, '
            "and polyhead.look.ablate to switch heads off",
        )
    if attention_mask.is_floating_point():
        return None, attention_mask
    return polyhead.mask.dense(attention_mask), None


def _chosen_keys(indices: Tensor, B: int, T: int, S: int) -> Mask:
    """Return a dense mask of (B, T, K) key indices; those below 0 select none."""
    if indices.ndim != 3 or indices.shape[:2] != (B, T):
        raise ShapeError(
            "indices",
            f"must be (B, T, K) = ({B}, {T}, K), the keys of each query",
            tuple(indices.shape),
            'use attn_implementation="eager" for this model',
        )
    chosen = indices.long()
    allowed = torch.zeros(B, T, S + 1, dtype=torch.bool, device=indices.device)
    allowed = allowed.scatter(-1, torch.where(chosen < 0, S, chosen), True)
    return polyhead.mask.dense(allowed[:, None, :, :S])
