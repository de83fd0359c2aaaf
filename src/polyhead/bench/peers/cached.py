"""KV cache peers: polyhead reading an int8 or paged cache in place, and the alternatives."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.bench.cases import Case, Inputs
from polyhead.bench.peers.attention import POLYHEAD, Peer, Run, attention_run
from polyhead.cache import Cache, KVCache, PagedKVCache
from polyhead.functional import attention

__all__ = ["CACHES"]


def _filled(case: Case, inputs: Inputs) -> Cache:
    key, value = inputs["key"], inputs["value"]
    sizes = (case.B, case.S, case.G, case.D)
    storage_dtype = torch.int8 if case.codes else None
    cache: Cache
    if case.blocks:
        cache = PagedKVCache(
            *sizes, dtype=case.dtype, storage_dtype=storage_dtype, block_size=case.blocks
        )
    else:
        cache = KVCache(*sizes, dtype=case.dtype, storage_dtype=storage_dtype)
    cache.append(key, value)
    return cache


def _prepare_in_place(case: Case, inputs: Inputs) -> Run:
    cache = _filled(case, inputs)
    return attention_run(case, inputs, lambda query, *_: attention(query, *cache.read_as_views()))


def _prepare_gathered(case: Case, inputs: Inputs) -> Run:
    cache = _filled(case, inputs)

    def attend(query: Tensor, *_: Tensor) -> Tensor:
        key, value = cache.read()
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=case.H != case.G)

    return attention_run(case, inputs, attend)


CACHES = (
    replace(POLYHEAD, prepare=_prepare_in_place),
    # The same keys and values as contiguous tensors, to measure the cost or gain of the format.
    replace(POLYHEAD, name="side by side", ours=False),
    # Materialized first, as for a kernel that reads tensors only.
    Peer("sdpa, gathered", lambda case: [], _prepare_gathered),
)
