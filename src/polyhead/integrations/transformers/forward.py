"""Attention function of transformers' AttentionInterface, called by every layer of a model."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.cache_view import CacheView
from polyhead.call import AuxRequest
from polyhead.errors import ArgumentError
from polyhead.functional import attention
from polyhead.integrations.transformers.call_mask import read_mask
from polyhead.integrations.transformers.lazy_cache import unwrap
from polyhead.integrations.transformers.packing import PACKING
from polyhead.validate import autocasts

__all__ = ["KNOWN_ARGUMENTS", "attention_forward"]

_WEIGHTS, _NOTHING = AuxRequest(weights=True), AuxRequest()

# Arguments of models and callers that change no weight: positions are in the queries, keys and
# mask; the kernels are always deterministic; dropout is a number of its own.
_HARMLESS = frozenset(
    {
        *("cache_position", "position_embeddings", "layer_idx"),
        *("use_cache", "return_dict", "output_hidden_states", "output_router_logits"),
        *("num_items_in_batch", "logits_to_keep", "labels", "deterministic", "training"),
    }
)
# Models of transformers 4 always pass these: None is harmless, and anything else raises.
_HEAD_MASKS = ("head_mask", "layer_head_mask", "cross_attn_head_mask", "decoder_head_mask")
_EAGER = 'use attn_implementation="eager" for this model'
_REMEDIES = {
    **dict.fromkeys(_HEAD_MASKS, "switch heads off with polyhead.look.ablate(model, heads)"),
    "cache": 'call model.set_attn_implementation("sdpa") for continuous batching',
}


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
    sliding_window: int | None = None,
    indices: Tensor | None = None,
    position_ids: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention in transformers' convention: (B, H, T, D) in, (B, T, H, E) out.

    Args:
        module: the layer.
        query, key, value: (B, H, T, D), (B, G, S, D), (B, G, S, E).
        attention_mask: from `make_mask`; or (B, 1, T, S), bool with True = may attend, or
            additive. None: no mask but that of the arguments below.
        scaling: factor on the scores; None: 1 / sqrt(D).
        dropout: probability with which a weight is dropped.
        is_causal: without a mask, True if the queries, the last of the keys, see no later key;
            None: `module.is_causal`, or False without one.
        softcap: as in `polyhead.attention`.
        s_aux: (H,) sinks.
        position_bias: (1 or B, H, T, S) additive bias.
        output_attentions: True to return the weights. They are also returned if the model was
            called with `output_attentions=True`.
        sliding_window: without a mask, the keys back that a query sees, its own included, and as
            far ahead if the layer is not causal. An attention_mask already includes it.
        indices: (B, T, K) the only keys that each query may attend to.
        position_ids: (1 or B, T). Without a mask, in a causal layer: a packed document begins
            where they do not increase by 1.
        options: packed documents (`packed_documents`: `cu_seq_lens_q`, ..., `seq_idx`), and
            arguments that change no weight.

    Returns:
        output, and the weights (B, H, T, S) before dropout or None.

    Raises:
        ArgumentError: an unknown option; packed documents that do not fit; or as
            `polyhead.attention` raises.
    """
    packing = {name: options.pop(name) for name in PACKING if name in options}
    if not options.keys() <= _HARMLESS:
        _check_options(options)
    mask, bias = read_mask(
        module,
        query,
        key,
        attention_mask,
        is_causal=is_causal,
        sliding_window=sliding_window,
        indices=indices,
        position_ids=position_ids,
        **packing,
    )
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    heads: tuple[Tensor, Tensor | CacheView, Tensor | CacheView]
    heads = query, unwrap(key), unwrap(value)
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
    query: Tensor, key: Tensor | CacheView, value: Tensor | CacheView
) -> tuple[Tensor, Tensor | CacheView, Tensor | CacheView]:
    """Cast to one dtype, as torch's functions do: rotated queries and keys may be float32."""
    if isinstance(key, CacheView) or isinstance(value, CacheView):
        return query.to(key.dtype), key, value  # int8 values, read as key.dtype
    if query.dtype == torch.float64:  # autocast leaves it alone
        return query, key, value
    dtype = torch.get_autocast_dtype(query.device.type)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _are_wanted() -> bool:
    """True if the model returns its attentions: some layers do not pass output_attentions on."""
    if torch.compiler.is_compiling():  # the lookup below cannot be traced
        return False
    capturing = sys.modules.get("transformers.utils.output_capturing")
    if capturing is None:  # transformers 4: layers receive the flag, and do not pass it on
        layer = sys._getframe(2)
        return bool(layer.f_locals.get("output_attentions"))
    collected = capturing._active_collector.get()
    return collected is not None and any(name.endswith("attentions") for name in collected)


def _check_options(options: dict[str, Any]) -> None:
    unknown = {
        name: value
        for name, value in options.items()
        if name not in _HARMLESS and value is not None and value is not False
    }
    if unknown:
        raise ArgumentError(
            ", ".join(unknown),
            "must not be given: its effect on attention is unknown",
            ", ".join(type(value).__name__ for value in unknown.values()),
            "; ".join(dict.fromkeys(_REMEDIES.get(name, _EAGER) for name in unknown)),
        )


KNOWN_ARGUMENTS = _HARMLESS.union(
    PACKING, _HEAD_MASKS, inspect.signature(attention_forward).parameters
)
