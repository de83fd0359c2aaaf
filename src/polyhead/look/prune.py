"""Heads taken out of a model for good."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from torch import nn

from polyhead.errors import ArgumentError
from polyhead.look.layers import AttentionLayer, Head, attention_layers, check_heads
from polyhead.modules import MultiHeadAttention
from polyhead.modules.pruning import (
    KeptHeads,
    check_can_be_pruned,
    kept_heads,
    without_columns,
    without_rows,
)
from polyhead.modules.weights import make_parameter

__all__ = ["prune"]

M = TypeVar("M", bound=nn.Module)
_THEIRS = ("q_proj", "k_proj", "v_proj", "o_proj")


def prune(model: M, heads: Collection[Head], *, repeat_keys: bool = False) -> M:
    """Remove heads from a model for good: its weights get smaller, and it computes less.

    The function is that of `ablate(model, heads, how="zero")`. Heads that stay are numbered anew,
    from 0 in each layer.

    Saving and loading: the weights are an ordinary `state_dict`. A fresh model with the same heads
    pruned loads it, so keep the list of heads beside the file. One of our modules can be built in
    its new size instead: num_heads=, num_kv_heads= and head_dim= say it all.

    Args:
        model: whose attention is `MultiHeadAttention`, or of transformers with separate q_proj,
            k_proj, v_proj and o_proj, as in Llama, Mistral, Qwen and SmolLM. Changed in place.
        heads: (layer, head) pairs; layers count from 0 (`attention_layers`), heads are query heads.
        repeat_keys: as in `MultiHeadAttention.prune_heads`.

    Raises:
        ArgumentError: there are no such heads, a layer would lose all, or is of another kind; the
            model is then left as it was.

    >>> import polyhead as ph
    >>> mha = ph.MultiHeadAttention(8, 8, 16, 0.0, num_heads=4, num_kv_heads=2)
    >>> ph.look.prune(mha, {(0, 0), (0, 1)}).W_key.weight.shape     # key head 0 is gone too
    torch.Size([2, 8])
    """
    layers = attention_layers(model)
    check_heads(heads, layers)
    gone = {
        layer: {head for index, head in heads if index == layer.index}
        for layer in layers
        if any(index == layer.index for index, _ in heads)
    }
    plans = _plans(gone, repeat_keys)
    for layer, kept in plans.items():
        if isinstance(layer.module, MultiHeadAttention):
            layer.module.prune_heads(gone[layer], repeat_keys=repeat_keys)
        else:
            _prune_theirs(layer.module, kept)
    return model


def _plans(
    gone: Mapping[AttentionLayer, Collection[int]], repeat_keys: bool
) -> dict[AttentionLayer, KeptHeads]:
    """What stays in each layer: errors come before anything is changed."""
    plans = {}
    for layer, heads in gone.items():
        if isinstance(layer.module, MultiHeadAttention):
            check_can_be_pruned(layer.module)
            num_kv_heads = layer.module.num_kv_heads
        else:
            num_kv_heads = _num_kv_heads(layer)
        plans[layer] = kept_heads(layer.num_heads, num_kv_heads, heads, repeat_keys=repeat_keys)
    return plans


def _num_kv_heads(layer: AttentionLayer) -> int:
    module: Any = layer.module
    size: int | None = getattr(module, "head_dim", None)
    plain = all(type(getattr(module, name, None)) is nn.Linear for name in _THEIRS)
    # A norm over all heads together would change with their number.
    norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    by_head = all(norm is None or norm.weight.shape == (size,) for norm in norms)
    if size is None or not plain or not by_head:
        raise ArgumentError(
            "model",
            f"must have layers with plain nn.Linear {', '.join(_THEIRS)}, each head normed alone",
            f"{type(module).__name__} ({layer.name})",
            "use polyhead.look.ablate, or merge adapters first",
        )
    keys: int = module.k_proj.out_features
    return keys // size


def _prune_theirs(module: Any, kept: KeptHeads) -> None:
    size = module.head_dim
    module.q_proj = without_rows(module.q_proj, kept.queries, size)
    module.k_proj = without_rows(module.k_proj, kept.keys, size)
    module.v_proj = without_rows(module.v_proj, kept.keys, size)
    module.o_proj = without_columns(module.o_proj, kept.queries, size)
    if isinstance(sinks := getattr(module, "sinks", None), nn.Parameter):
        module.sinks = make_parameter(sinks.detach()[kept.queries], sinks)
    # The config, which all layers share, still has the old numbers: these are read first.
    module.num_heads = len(kept.queries)
    module.num_key_value_heads = len(kept.keys)
    module.num_key_value_groups = len(kept.queries) // len(kept.keys)
