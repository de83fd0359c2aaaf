"""The cache that fits a module."""

from __future__ import annotations

from typing import Any

from torch import nn

from polyhead.cache import KVCache
from polyhead.errors import ArgumentError
from polyhead.modules.weights import execution_device

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
        module: what will fill it; its projections may be adapters or quantized.
        batch, max_tokens, num_kv_heads, head_dim, value_head_dim: as in `KVCache`.
        options: more of `KVCache`'s keywords, dtype and device among them where asked for.

    Raises:
        ArgumentError: all weights are quantized, and options have no dtype.
    """
    fit: dict[str, Any] = {"value_head_dim": value_head_dim}
    parameters = list(module.parameters())
    # Heads are in the dtype of no quantized weight.
    like = next((p for p in parameters if p.is_floating_point() and p.itemsize > 1), None)
    if like is not None:
        # Offloaded weights are on the meta device between calls.
        fit |= {"dtype": like.dtype, "device": execution_device(module) or like.device}
    elif parameters and "dtype" not in options:
        raise ArgumentError(
            "dtype",
            "must be given where no weight of the module has the dtype of its heads",
            f"weights of {parameters[0].dtype}",
            "pass the dtype that the projections return: make_cache(batch, dtype=torch.bfloat16)",
        )
    return KVCache(batch, max_tokens, num_kv_heads, head_dim, **(fit | options))
