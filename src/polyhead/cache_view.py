"""Keys or values where a cache holds them, for a backend that can read them there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["CacheView"]


@dataclass(frozen=True, eq=False)
class CacheView:
    """Keys or values, (B, G, S, size), where a cache holds them: `attention` takes it for either.

    No tensor is made of it unless the backend that runs reads tensors only. Valid until the cache
    that gave it is changed.

    Attributes:
        data: (B, G, S, size); with a table (blocks, G, block_size, size), of which the table says
            what is used. Numbers in `dtype`, or int8 codes.
        scales: of codes, one float32 for each token and head: data.shape[:3]. A number is
            code * scale.
        table: (B, columns) int32. Token s of row b is in block table[b, s // block_size], slot
            s % block_size.
        tokens: S.
        dtype: of the numbers it stands for.
        gather: makes the tensor, (B, G, S, size) in `dtype`.

    >>> import polyhead as ph
    >>> cache = ph.PagedKVCache(1, 64, 2, 4, storage_dtype=torch.int8)
    >>> key, value = cache.append_as_views(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4))
    >>> print(key)
    int8 codes in blocks of 16
    >>> ph.attention(torch.ones(1, 2, 1, 4), key, value).shape
    torch.Size([1, 2, 1, 4])
    """

    data: Tensor
    dtype: torch.dtype
    tokens: int
    gather: Callable[[], Tensor]
    scales: Tensor | None = None
    table: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, G, S, size), as of the tensor it stands for."""
        rows, G, _, size = self.data.shape
        return rows if self.table is None else self.table.shape[0], G, self.tokens, size

    def placeholder(self) -> Tensor:
        """A tensor of its shape, dtype and device without its numbers, to be asked for those.

        It is NaN throughout, so that an output made of it by mistake shows.
        """
        nan = self.data.new_full((1, 1, 1, 1), math.nan, dtype=self.dtype)
        return nan.expand(self.shape)

    def first(self, size: int) -> CacheView:
        """The first so many features of each token, in the same place."""
        return replace(self, data=self.data[..., :size], gather=lambda: self.gather()[..., :size])

    def __str__(self) -> str:
        numbers = "int8 codes" if self.scales is not None else "numbers"
        return numbers if self.table is None else f"{numbers} in blocks of {self.data.shape[2]}"
