"""The attention function: what every layer of a transformers model calls."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

import polyhead.mask
from polyhead.arguments import autocasts
from polyhead.call import AuxRequest
from polyhead.errors import ArgumentError, ShapeError
from polyhead.functional import attention
from polyhead.integrations.transformers.held import as_stored
from polyhead.integrations.transformers.structured import StructuredMask
from polyhead.mask import Mask
from polyhead.stored import Stored

__all__ = ["attention_forward"]

_WEIGHTS, _NOTHING = AuxRequest(weights=True), AuxRequest()

# What models and their callers send along that says nothing about attention, or nothing that the
# mask does not say.
_HARMLESS = frozenset(
    {
        *("position_ids", "cache_position", "position_embeddings", "layer_idx", "sliding_window"),
        *("use_cache", "return_dict", "output_hidden_states", "output_router_logits"),
        *("num_items_in_batch", "logits_to_keep", "labels", "deterministic", "training"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    }
)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers asks for it: (B, H, T, D) in, (B, T, H, E) out.

    Args:
        module: the layer.
        query, key, value: (B, H, T, D), (B, G, S, D), (B, G, S, E).
        attention_mask: what `make_mask` made; or (B, 1, T, S), bool with True = may attend, or
            numbers to add. None, for a causal layer: query t may attend to keys 0 .. t, and a
            single query to all, as in transformers' own function.
        scaling: factor on the scores; None: 1 / sqrt(D).
        dropout: probability with which a weight is dropped.
        is_causal: whether the layer is causal; None: what `module.is_causal` says.
        softcap: as in `polyhead.attention`.
        s_aux: (H,) sinks.
        position_bias: (1 or B, H, T, S) numbers to add.
        output_attentions: whether to return the weights. They are, too, where the model was
            called with `output_attentions=True`.
        options: what says nothing about attention.

    Returns:
        output, and the weights (B, H, T, S) before dropout or None.

    Raises:
        ArgumentError: an option that is not known; or what `polyhead.attention` raises.
    """
    if not options.keys() <= _HARMLESS:
        _check_options(options)
    mask, bias = _mask_and_bias(module, query, key, attention_mask, is_causal, position_bias)
    heads: tuple[Tensor, Tensor | Stored, Tensor | Stored]
    heads = query, as_stored(key), as_stored(value)
    if autocasts(query):
        heads = _autocast(*heads)
    output, aux = attention(
        *heads,
        mask=mask,
        bias=bias,
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        dropout=dropout,
        return_aux=_WEIGHTS if output_attentions or _are_wanted() else _NOTHING,
    )
    return output.transpose(1, 2).contiguous(), aux.weights


def _autocast(
    query: Tensor, key: Tensor | Stored, value: Tensor | Stored
) -> tuple[Tensor, Tensor | Stored, Tensor | Stored]:
    """In one dtype, as torch's own functions cast: what a model rotates stays float32."""
    if isinstance(key, Stored) or isinstance(value, Stored):
        return query.to(key.dtype), key, value  # codes, of no dtype but what is made of them
    if query.dtype == torch.float64:  # which autocast leaves alone
        return query, key, value
    dtype = torch.get_autocast_dtype(query.device.type)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _are_wanted() -> bool:
    """Whether the model is to return its attentions: some keep that from what they ask."""
    if torch.compiler.is_compiling():  # which cannot trace the question
        return False
    capturing = sys.modules.get("transformers.utils.output_capturing")
    if capturing is None:  # transformers 4, where layers are told, and do not hand it on
        layer = sys._getframe(2)
        return bool(layer.f_locals.get("output_attentions"))
    collected = capturing._active_collector.get()
    return collected is not None and any(name.endswith("attentions") for name in collected)


def _mask_and_bias(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None,
    bias: Tensor | None,
) -> tuple[Mask | None, Tensor | None]:
    T = query.shape[2]
    if attention_mask is None:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        return (polyhead.mask.causal(align="start") if is_causal and T > 1 else None), bias
    if isinstance(attention_mask, StructuredMask):
        if attention_mask.shape[2:] == (T, key.shape[2]):
            return attention_mask.rule, bias
        attention_mask = attention_mask.dense()
    if attention_mask.shape[-1] != key.shape[2]:  # such as a mask of heads, that multiplies
        raise ShapeError(
            "attention_mask",
            f"must be (B or 1, H or 1, T or 1, S = {key.shape[2]})",
            tuple(attention_mask.shape),
            'use attn_implementation="eager" for what is no mask of keys',
        )
    if attention_mask.is_floating_point():
        return None, attention_mask if bias is None else bias + attention_mask
    return polyhead.mask.dense(attention_mask), bias


def _check_options(options: dict[str, Any]) -> None:
    unknown = {
        name: value
        for name, value in options.items()
        if name not in _HARMLESS and value is not None and value is not False
    }
    if unknown:
        raise ArgumentError(
            ", ".join(unknown),
            "must not be given: polyhead does not know what it means for attention",
            ", ".join(type(value).__name__ for value in unknown.values()),
            'use attn_implementation="eager" for this model',
        )
