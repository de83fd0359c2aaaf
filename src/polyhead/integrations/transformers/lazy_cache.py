"""Keys or values that stay where a cache holds them on their way through a transformers model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyhead.cache_view import CacheView
from polyhead.integrations.transformers.lazy_tensor import LazyTensor

__all__ = ["LazyCacheTensor", "unwrap", "wrap"]


class LazyCacheTensor(LazyTensor):
    """Keys or values (B, G, S, size) of a cache that holds them as codes.

    Our attention function reads them where they are; whoever else computes with them gets a tensor
    made of them. Valid until the cache that gave it is changed.

    Attributes:
        cache_view: what the cache gave.

    >>> import polyhead as ph
    >>> cache = ph.KVCache(1, 8, 2, 4, storage_dtype=torch.int8)
    >>> key, _ = cache.append_as_views(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    >>> LazyCacheTensor(key)
    LazyCacheTensor(int8 values, shape=(1, 2, 3, 4))
    >>> LazyCacheTensor(key).sum()
    tensor(24.)
    """

    cache_view: CacheView

    def __new__(cls, cache_view: CacheView) -> LazyCacheTensor:
        held: LazyCacheTensor = cls._wrap(
            cache_view.shape, cache_view.dtype, cache_view.data.device
        )
        held.cache_view = cache_view
        return held

    def _materialize(self) -> Tensor:
        return self.cache_view.materialize()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dense().clone()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyCacheTensor({self.cache_view}, shape={tuple(self.shape)})"


def wrap(given: Tensor | CacheView) -> Tensor:
    """What a cache gave, as a tensor to hand through a model."""
    if not isinstance(given, CacheView):
        return given
    # torch.compile traces no tensor of our own making.
    return given.materialize() if torch.compiler.is_compiling() else LazyCacheTensor(given)


def unwrap(tensor: Tensor) -> Tensor | CacheView:
    """What a cache gave, of the tensor that came through a model."""
    return tensor.cache_view if isinstance(tensor, LazyCacheTensor) else tensor
