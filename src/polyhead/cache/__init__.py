"""Key/value caches: what earlier tokens left, so that a new token computes only itself.

`KVCache` holds each row's tokens side by side, all of them or a window; `PagedKVCache` in blocks
that rows can share. Either holds numbers as they come, or as int8.
"""

from polyhead.cache.base import Cache
from polyhead.cache.contiguous import KVCache
from polyhead.cache.paged import PagedKVCache

__all__ = ["Cache", "KVCache", "PagedKVCache"]
