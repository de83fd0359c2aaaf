"""The cache that fits a module."""

from __future__ import annotations

from typing import Any

from torch import nn

from polyhead.cache import KVCache

__all__ = ["fitting_cache"]


def fitting_cache(
    module: nn.Module,
    batch: int,
    max_tokens: int,
    num_kv_heads: int,
    head_dim: int,
    value_head_dim: int,
    options: dict[str, Any],
) -> KVCache:
    """An empty cache of these sizes in the module's dtype, on its device.

    Args:
        module: what will fill it; its projections may be adapters or quantised.
        batch, max_tokens, num_kv_heads, head_dim, value_head_dim: as in `KVCache`.
        options: more of `KVCache`'s keywords, dtype and device among them where asked for.
    """
    fit: dict[str, Any] = {"value_head_dim": value_head_dim}
    # Heads are in the dtype of no integer weight, as quantised layers have.
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    if like is not None:
        fit |= {"dtype": like.dtype, "device": like.device}
    return KVCache(batch, max_tokens, num_kv_heads, head_dim, **(fit | options))
