"""Statistics of attention weights at any length: exact, and linear in T in memory."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from polyhead.arguments import build_call
from polyhead.backends.reference import compute_aux
from polyhead.call import AuxRequest, HeadStats
from polyhead.mask import Mask

__all__ = ["stats"]

# The scores of one chunk of queries are held at a time; this many cells of them.
_CELLS = 2**22


def stats(
    query: Tensor,
    key: Tensor,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> HeadStats:
    """What each head does for every query: entropy, distances, mass on the first token, and so on.

    Exact, against the definition; memory grows with T, not with T x S. (Under
    torch.no_grad: a gradient would keep every chunk.)

    Args:
        query: (B, H, T, D).
        key: (B, G, S, D), G a divisor of H.
        mask: who may attend, in terms of absolute positions; None: everybody.
        scale: factor on the scores; None: 1 / sqrt(D).
        softcap, sinks, alibi_slopes: as in `polyhead.attention`.

    Returns:
        HeadStats of (B, H, T) tensors; `.per_head()` gives one number a head.

    >>> import polyhead as ph
    >>> query, key = torch.zeros(1, 2, 4, 8), torch.zeros(1, 1, 4, 8)   # equal weights
    >>> ph.look.stats(query, key, mask=ph.mask.causal()).mass_first[0, 0]
    tensor([1.0000, 0.5000, 0.3333, 0.2500])
    """
    call = build_call(
        query,
        key,
        key,
        mask,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        aux=AuxRequest(stats=True),
    )
    T, S = call.T, call.S
    rows = max(1, _CELLS // max(1, call.B * call.H * S))
    chunks = []
    for start in range(0, max(T, 1), rows):
        stop = min(start + rows, T)
        chunk_mask = None if mask is None else mask.for_queries(start, stop, T)
        chunk = replace(call, query=query[:, :, start:stop], mask=chunk_mask)
        chunks.append(compute_aux(chunk, first_position=S - T + start).stats)
    names = [field.name for field in fields(HeadStats)]
    return HeadStats(*(torch.cat([getattr(c, name) for c in chunks], dim=2) for name in names))
