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
        lengths: (B,) integers, the number of keys of each batch row, at most S, or None: S for all.
            Keys from there on are masked, and never read by a backend that reads the view in
            place. The last query of row b has position lengths[b] - 1.
        query_offset: (B,) position of query 0 of each row, if the queries of a row are fewer than
            T and not its last keys. None: lengths - T.

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
    lengths: Tensor | None = None
    query_offset: Tensor | None = None

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

    def materialize_valid(self) -> Tensor:
        """The tensor, with zeros for the keys from `lengths` on: 0 * NaN would reach an output."""
        dense = self.materialize()
        if self.lengths is None:
            return dense
        beyond = torch.arange(self.num_tokens, device=dense.device) >= self.lengths[:, None]
        return dense.masked_fill(beyond[:, None, :, None], 0.0)

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
        if self.block_table is not None:
            held += f" in blocks of {self.data.shape[2]}"
        return held if self.lengths is None else f"{held}, rows of different lengths"
