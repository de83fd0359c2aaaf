"""One projection in place of three, and back, with the same bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from polyhead.errors import ArgumentError
from polyhead.modules.weights import check_in_place, make_linear

if TYPE_CHECKING:
    from polyhead.modules.multihead import MultiHeadAttention

__all__ = ["fuse", "unfuse"]

_PROJECTIONS = ("W_qkv", "W_query", "W_key", "W_value")


def fuse(mha: MultiHeadAttention) -> MultiHeadAttention:
    """Replace W_query, W_key and W_value by one W_qkv: one product instead of three.

    Weights are moved, not changed: `unfuse()` gives the same bits back, and a fused module loads an
    unfused checkpoint (and the reverse). It pays in inference with few tokens (see
    docs/performance.md); keep separate projections for LoRA and tensor parallelism.

    Raises:
        ArgumentError: a projection is no plain nn.Linear (adapters, quantisation), some have a bias
            and others have none, or some of their parameters are frozen and others are not; or
            their weights are elsewhere (offloaded, sharded, on the meta device).
    """
    if mha.fused:
        return mha
    parts = [mha.W_query, mha.W_key, mha.W_value]
    check_in_place("fuse()", mha, _PROJECTIONS[1:])
    if len({part.bias is None for part in parts}) > 1:
        biases = ", ".join(str(part.bias is not None) for part in parts)
        raise ArgumentError(
            "fuse()",
            "needs a bias in all of W_query, W_key and W_value, or in none",
            biases,
            "give those without one zeros",
        )
    if len({p.requires_grad for part in parts for p in part.parameters()}) > 1:
        raise ArgumentError(
            "fuse()",
            "needs W_query, W_key and W_value all trainable or all frozen",
            "a mixture",
            "set requires_grad alike",
        )
    fused = make_linear(
        torch.cat([part.weight for part in parts]),
        None if parts[0].bias is None else torch.cat([part.bias for part in parts]),
        parts[0],
    )
    del mha.W_query, mha.W_key, mha.W_value  # an error above leaves the module whole
    mha.W_qkv = fused
    _projections_first(mha)
    return mha


def unfuse(mha: MultiHeadAttention) -> MultiHeadAttention:
    """Undo `fuse()`: W_query, W_key and W_value again, with the same bits."""
    if not mha.fused:
        return mha
    check_in_place("unfuse()", mha, _PROJECTIONS[:1])
    fused = mha.W_qkv
    biases = [None] * 3 if fused.bias is None else fused.bias.split(mha.qkv_sizes)
    parts = [
        make_linear(weight.clone(), None if bias is None else bias.clone(), fused)
        for weight, bias in zip(fused.weight.split(mha.qkv_sizes), biases, strict=True)
    ]
    del mha.W_qkv
    mha.W_query, mha.W_key, mha.W_value = parts
    _projections_first(mha)
    return mha


def _projections_first(mha: MultiHeadAttention) -> None:
    """Parameters keep their order: an optimizer's saved state knows them by number alone."""
    for name in [name for name in mha._modules if name not in _PROJECTIONS]:
        mha._modules[name] = mha._modules.pop(name)
