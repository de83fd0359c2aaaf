"""Head pruning: heads removed from a model permanently."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from torch import nn

from polyhead.errors import ArgumentError
from polyhead.look.layers import (
    AttentionLayer,
    Head,
    attention_layers,
    check_heads,
    check_not_compiled,
)
from polyhead.look.proof import Proof
from polyhead.modules import MultiHeadAttention
from polyhead.modules.pruning import (
    KeptHeads,
    check_can_be_pruned,
    kept_heads,
    without_columns,
    without_rows,
)
from polyhead.modules.weights import make_parameter, why_not_in_place

__all__ = ["prune"]

M = TypeVar("M", bound=nn.Module)
_THEIRS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")  # per-head norms, with one weight shared by all heads
# Numbers that layers of transformers read in forward, each under one of its names.
_QUERY_COUNTS = ("num_heads", "num_attention_heads", "n_heads")
_KEY_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


def prune(
    model: M,
    heads: Collection[Head],
    *,
    repeat_keys: bool = False,
    inputs: Mapping[str, Any] | None = None,
) -> M:
    """Remove heads from a model permanently: its weights get smaller, and it computes less.

    The function is that of `ablate(model, heads, how="zero")`. This is checked before `prune`
    returns: the model runs once with the heads ablated and once pruned. Heads that stay are
    renumbered from 0 in each layer.

    Saving and loading: the weights are an ordinary `state_dict`. A fresh model with the same heads
    pruned loads it, so keep the list of heads with the file. One of our modules can be built in
    its new size instead, by num_heads=, num_kv_heads= and head_dim=.

    Args:
        model: a model with `MultiHeadAttention`, or of transformers with separate q_proj, k_proj,
            v_proj and o_proj, as in Llama, Mistral, Qwen and SmolLM. Changed in place.
        heads: (layer, head) pairs; layers count from 0 (`attention_layers`), heads are query heads.
        repeat_keys: as in `MultiHeadAttention.prune_heads`.
        inputs: keywords of the model's forward for the check; None: a few token ids, or random
            features if all layers are ours. Required where the layers run on other inputs.

    Raises:
        ArgumentError: there are no such heads; a layer would lose all its heads, is not supported,
            or has per-head parameters that cannot be pruned; or the pruned model computes another
            result than the ablated one. The model is then unchanged.

    >>> import polyhead as ph
    >>> mha = ph.MultiHeadAttention(8, 8, 16, 0.0, num_heads=4, num_kv_heads=2)
    >>> ph.look.prune(mha, {(0, 0), (0, 1)}).W_key.weight.shape     # KV head 0 is gone too
    torch.Size([2, 8])
    """
    check_not_compiled(model)
    layers = attention_layers(model)
    heads = set(heads)
    check_heads(heads, layers)
    gone = {
        layer: {head for index, head in heads if index == layer.index}
        for layer in layers
        if any(index == layer.index for index, _ in heads)
    }
    if not gone:
        return model
    plans = _plans(gone, repeat_keys)
    proof = Proof(model, {layer: kept.queries for layer, kept in plans.items()}, heads, inputs)
    before = [(layer.module, _state_of(layer.module)) for layer in plans]
    try:
        for layer, kept in plans.items():
            if isinstance(layer.module, MultiHeadAttention):
                layer.module.prune_heads(gone[layer], repeat_keys=repeat_keys)
            else:
                _prune_theirs(layer.module, kept)
        proof.check()
    except BaseException:
        for module, state in before:
            _restore(module, state)
        raise
    return model


def _plans(
    gone: Mapping[AttentionLayer, Collection[int]], repeat_keys: bool
) -> dict[AttentionLayer, KeptHeads]:
    """Compute the heads kept per layer; raises before the model is changed."""
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
    parts: dict[str, Any] = {name: getattr(module, name, None) for name in _THEIRS}
    has_all = all(isinstance(part, nn.Module) for part in parts.values())
    for name, part in parts.items() if has_all else ():
        if unreadable := why_not_in_place(part):
            raise ArgumentError(
                "model",
                f"must have layers with plain nn.Linear {', '.join(_THEIRS)}, in place",
                f"{type(module).__name__} ({layer.name}) with {name}: {unreadable.kind}",
                f"use polyhead.look.ablate, or: {unreadable.remedy}",
            )
    # A norm over all heads jointly would change with their number.
    norms = [getattr(module, name, None) for name in _NORMS]
    by_head = all(norm is None or _shape_of(norm) in (None, (size,)) for norm in norms)
    if size is None or not has_all or not by_head:
        raise ArgumentError(
            "model",
            f"must have layers with plain nn.Linear {', '.join(_THEIRS)}, with per-head norms",
            f"{type(module).__name__} ({layer.name})",
            "use polyhead.look.ablate",
        )
    _check_no_other_parts(layer)
    keys: int = module.k_proj.out_features
    want = {"q_proj": layer.num_heads * size, "v_proj": keys}
    rows = {name: getattr(module, name).out_features for name in want}
    rows["o_proj"] = module.o_proj.in_features
    want["o_proj"] = layer.num_heads * size
    num_kv_heads = keys // size
    if rows != want or keys % size or num_kv_heads == 0 or layer.num_heads % num_kv_heads:
        raise ArgumentError(
            "model",
            f"must have layers whose projections hold {layer.num_heads} query heads of {size} "
            "features, and equal keys and values",
            f"{type(module).__name__} ({layer.name}) with q_proj {rows['q_proj']}, k_proj {keys}, "
            f"v_proj {rows['v_proj']}, o_proj {rows['o_proj']}",
            "use polyhead.look.ablate",
        )
    return num_kv_heads


def _shape_of(norm: Any) -> tuple[int, ...] | None:
    """Shape of a norm's weight; None without one."""
    weight = getattr(norm, "weight", None)
    return None if weight is None else tuple(weight.shape)


def _check_no_other_parts(layer: AttentionLayer) -> None:
    """Raise if the layer has a parameter other than those that pruning slices or may keep."""
    size: Any = layer.module.head_dim
    known: dict[str, tuple[int, ...] | None] = {"sinks": (layer.num_heads,)}
    known |= {f"{name}.{part}": None for name in _THEIRS for part in ("weight", "bias")}
    known |= {f"{name}.{part}": (size,) for name in _NORMS for part in ("weight", "bias")}
    others = [
        f"{name} {tuple(parameter.shape)}" + (" on the meta device" if parameter.is_meta else "")
        for name, parameter in layer.module.named_parameters(remove_duplicate=False)
        if parameter.is_meta or known.get(name, ()) not in (None, tuple(parameter.shape))
    ]
    if others:
        raise ArgumentError(
            "model",
            f"must have layers with no parameters but those of {', '.join(_THEIRS)}, per-head "
            "norms and sinks",
            f"{type(layer.module).__name__} ({layer.name}) with {', '.join(others)}",
            "use polyhead.look.ablate",
        )


def _prune_theirs(module: Any, kept: KeptHeads) -> None:
    size = module.head_dim
    module.q_proj = without_rows(module.q_proj, kept.queries, size)
    module.k_proj = without_rows(module.k_proj, kept.keys, size)
    module.v_proj = without_rows(module.v_proj, kept.keys, size)
    module.o_proj = without_columns(module.o_proj, kept.queries, size)
    if isinstance(sinks := getattr(module, "sinks", None), nn.Parameter):
        module.sinks = make_parameter(sinks.detach()[kept.queries], sinks)
    # The config, shared by all layers, keeps the old numbers: these attributes are read first.
    for names, count in ((_QUERY_COUNTS, len(kept.queries)), (_KEY_COUNTS, len(kept.keys))):
        for name in names:
            if name == names[0] or hasattr(module, name):
                setattr(module, name, count)
    module.num_key_value_groups = len(kept.queries) // len(kept.keys)


def _state_of(module: nn.Module) -> dict[str, Any]:
    """Copy of the module's attributes, to undo assignments to it."""
    return {
        name: dict(value) if isinstance(value, dict) else value
        for name, value in vars(module).items()
    }


def _restore(module: nn.Module, state: Mapping[str, Any]) -> None:
    held = vars(module)
    for name in [name for name in held if name not in state]:
        del held[name]
    for name, value in state.items():
        if isinstance(value, dict):
            held[name].clear()
            held[name].update(value)
        else:
            held[name] = value
