"""Zero-copy view of cached keys or values, for backends that read the cache in place."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["CacheView"]


@dataclass(frozen=True, eq=False)
class CacheView:
    """Zero-copy view of cached keys or values, contiguous or paged, optionally int8.

    `attention` takes it for key and value. It is materialized only for backends that read tensors
    only. Valid until the cache that returned it changes.

    Attributes:
        data: (B, G, S, size), or with a block table the pool (blocks, G, block_size, size).
            Elements in `dtype`, or int8.
        scales: of int8 data, one float32 per token and head: data.shape[:3]. An element is
            int8 * scale.
        block_table: of a paged cache, (B, columns) int32. Token s of row b is in block
            block_table[b, s // block_size], slot s % block_size.
        num_tokens: S.
        dtype: dtype of the keys or values that it represents.
        materialize: makes the tensor, (B, G, S, size) in `dtype`.

    >>> import polyhead as ph
    >>> cache = ph.PagedKVCache(1, 64, 2, 4, storage_dtype=torch.int8)
    >>> key, value = cache.append_as_views(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4))
    >>> print(key)
    int8 values in blocks of 16
    >>> ph.attention(torch.ones(1, 2, 1, 4), key, value).shape
    torch.Size([1, 2, 1, 4])
    """

    data: Tensor
    dtype: torch.dtype
    num_tokens: int
    materialize: Callable[[], Tensor]
    scales: Tensor | None = None
    block_table: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the tensor that it represents, (B, G, S, size)."""
        rows, G, _, size = self.data.shape
        return (
            rows if self.block_table is None else self.block_table.shape[0],
            G,
            self.num_tokens,
            size,
        )

    def placeholder(self) -> Tensor:
        """Return a placeholder tensor of its shape, dtype and device.

        Its elements are NaN, so that an output computed from it by mistake is detected.
        """
        nan = self.data.new_full((1, 1, 1, 1), math.nan, dtype=self.dtype)
        return nan.expand(self.shape)

    def narrow(self, size: int) -> CacheView:
        """View of the first `size` features of each token."""
        return replace(
            self, data=self.data[..., :size], materialize=lambda: self.materialize()[..., :size]
        )

    def __str__(self) -> str:
        held = "int8 values" if self.scales is not None else "unquantized values"
        return held if self.block_table is None else f"{held} in blocks of {self.data.shape[2]}"
