"""Most attended keys of each query."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.call import AttentionCall
from polyhead.errors import ArgumentError
from polyhead.look.streaming import weights_by_chunk
from polyhead.mask import Mask
from polyhead.validate import build_call

__all__ = ["TopKeys", "most_attended", "top_keys", "top_keys_of"]

SINKS = 4  # tokens


@dataclass(frozen=True, eq=False)
class TopKeys:
    """Most attended keys of each query, in descending order of weight.

    Attributes:
        keys: (B, H, T, n) key indices; -1 where a query has fewer keys with any weight.
        weights: (B, H, T, n) the weight on each, in the compute dtype; 0 where there is none.
    """

    keys: Tensor
    weights: Tensor


@torch.no_grad()
def top_keys(
    query: Tensor,
    key: Tensor,
    n: int = 8,
    *,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> TopKeys:
    """Return the n most attended keys per query and head, and the weight on each.

    Exact; weights are materialized in chunks of queries. No gradients.

    Args:
        query: (B, H, T, D).
        key: (B, G, S, D), G a divisor of H.
        n: the number of keys to return; at most S.
        mask, bias, scale, softcap, sinks, alibi_slopes: as in `polyhead.attention`.

    >>> import polyhead as ph
    >>> query, key = torch.ones(1, 1, 3, 1), torch.tensor([1.0, 3.0, 2.0])[None, None, :, None]
    >>> ph.look.top_keys(query, key, n=2, mask=ph.mask.causal()).keys[0, 0]
    tensor([[ 0, -1],
            [ 1,  0],
            [ 1,  2]])
    """
    call = build_call(query, key, key, mask, bias, scale, softcap, sinks, alibi_slopes)
    return top_keys_of(call, n)


def top_keys_of(call: AttentionCall, n: int) -> TopKeys:
    """`top_keys` of an `AttentionCall`."""
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ArgumentError("n", "must be an integer of at least 1", repr(n), "use 8")
    n = min(n, call.S)
    found = []
    for _, _, weights_bhts in weights_by_chunk(call):
        most, keys = weights_bhts.topk(min(n, weights_bhts.shape[-1]), dim=-1)
        keys = keys.masked_fill(most == 0.0, -1)
        missing = (0, n - most.shape[-1])
        found.append((F.pad(most, missing), F.pad(keys, missing, value=-1)))
    weights, keys = (torch.cat(parts, dim=2) for parts in zip(*found, strict=True))
    return TopKeys(keys, weights)


def most_attended(keys: Tensor, weights: Tensor, n: int = SINKS) -> TopKeys:
    """The n keys with the largest sum of weight over all queries, and their mean weight.

    Counts the weight of the given keys of each query only: a lower bound, exact if the rest is 0.

    Args:
        keys, weights: (..., T, m) as in `TopKeys`.

    Returns:
        keys and weights of (..., n); fewer if there are fewer keys.
    """
    keys = keys.long().flatten(-2)
    S = 1 + int(keys.max()) if keys.numel() else 0
    columns = weights.new_zeros(*keys.shape[:-1], max(S, 1))
    columns.scatter_add_(-1, keys.clamp(min=0), weights.flatten(-2))  # a missing key weighs 0
    most = (columns / max(1, weights.shape[-2])).topk(min(n, columns.shape[-1]), dim=-1)
    return TopKeys(most.indices, most.values)
