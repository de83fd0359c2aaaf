"""KV caches: keys and values of earlier tokens, contiguous or paged, optionally int8.

`KVCache` stores each row's tokens contiguously, all of them or a sliding window. `PagedKVCache`
stores them in blocks that sequences can share.
"""

from polyhead.cache.base import Cache
from polyhead.cache.contiguous import KVCache
from polyhead.cache.paged import PagedKVCache

__all__ = ["Cache", "KVCache", "PagedKVCache"]
