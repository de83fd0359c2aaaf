"""Lazy tensors over cached keys and values: read in place by polyhead, materialized by others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyhead.cache_view import CacheView
from polyhead.integrations.transformers.lazy_tensor import LazyTensor

__all__ = ["LazyCacheTensor", "unwrap", "wrap"]


class LazyCacheTensor(LazyTensor):
    """Keys or values (B, G, S, size) of a quantized cache.

    polyhead's attention function reads them in place; any other operation materializes them.
    Valid until the cache is changed.

    Attributes:
        cache_view: the view of the cache.

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
        lazy: LazyCacheTensor = cls._wrap(
            cache_view.shape, cache_view.dtype, cache_view.data.device
        )
        lazy.cache_view = cache_view
        return lazy

    def _materialize(self) -> Tensor:
        return self.cache_view.materialize()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dense().clone()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyCacheTensor({self.cache_view}, shape={tuple(self.shape)})"


def wrap(given: Tensor | CacheView) -> Tensor:
    """Return cached keys or values as a tensor that can pass through a model."""
    if not isinstance(given, CacheView):
        return given
    # torch.compile does not trace this tensor subclass.
    return given.materialize() if torch.compiler.is_compiling() else LazyCacheTensor(given)


def unwrap(tensor: Tensor) -> Tensor | CacheView:
    """Return the cache view in a tensor from `wrap`, or the tensor itself."""
    return tensor.cache_view if isinstance(tensor, LazyCacheTensor) else tensor
