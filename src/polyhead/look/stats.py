"""`HeadStats` of attention weights at any length: exact, with memory linear in T."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from polyhead.call import AttentionCall, AuxRequest, HeadStats
from polyhead.look.streaming import key_logsumexp, stream_aux, total_logsumexp, weight_mass
from polyhead.look.token_mass import check_token_ids, token_masses
from polyhead.mask import Mask, Window
from polyhead.validate import build_call

__all__ = ["BY_POSITION", "RECENT", "stats", "stats_of"]

RECENT = 16  # tokens
# Statistics that compare positions of queries and keys: meaningless if these are of two texts.
BY_POSITION = frozenset({"mean_distance", "mass_previous", "mass_self", "mass_recent"})


@torch.no_grad()
def stats(
    query: Tensor,
    key: Tensor,
    *,
    mask: Mask | None = None,
    token_ids: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> HeadStats:
    """Attention statistics per head and query: entropy, distance, mass on the first token, ...

    Equal to those of the materialized weights; memory grows with T, not with T x S. The C++
    kernels compute most of them in one pass without values; elsewhere the reference runs in
    chunks of queries. No gradients.

    Args:
        query: (B, H, T, D).
        key: (B, G, S, D), G a divisor of H.
        mask: a mask of absolute positions; None: every query may attend to every key.
        token_ids: (S,) or (B, S) integers, the token of each key; the queries are the last T of
            them. For `mass_same_token` and `mass_induction`, which take a pass each.
        bias, scale, softcap, sinks, alibi_slopes: as in `polyhead.attention`.

    Returns:
        `HeadStats` of (B, H, T) tensors; `.per_head()` returns one value per head.

    >>> import polyhead as ph
    >>> query, key = torch.zeros(1, 2, 4, 8), torch.zeros(1, 1, 4, 8)   # equal weights
    >>> ids = torch.tensor([5, 7, 5, 7])
    >>> found = ph.look.stats(query, key, mask=ph.mask.causal(), token_ids=ids)
    >>> found.mass_first[0, 0]
    tensor([1.0000, 0.5000, 0.3333, 0.2500])
    >>> found.mass_induction[0, 0]                  # token 7 came after the first 5, 5 after the 7
    tensor([0.0000, 0.0000, 0.3333, 0.2500])
    """
    call = build_call(query, key, key, mask, bias, scale, softcap, sinks, alibi_slopes)
    return stats_of(call, token_ids)


def stats_of(call: AttentionCall, token_ids: Tensor | None = None) -> HeadStats:
    """`stats` of an `AttentionCall`."""
    if token_ids is not None:
        check_token_ids(token_ids, call)
    aux = stream_aux(call, AuxRequest(lse=True, stats=True))
    assert aux.lse is not None
    assert aux.stats is not None
    totals = total_logsumexp(call, aux.lse)
    window = Window(before=RECENT - 1, after=0)
    recent = replace(call, mask=window if call.mask is None else call.mask & window)
    same = induction = repeats = None
    if token_ids is not None:
        same, induction, repeats = token_masses(call, token_ids, totals)
    return replace(
        aux.stats,
        mass_recent=weight_mass(key_logsumexp(recent), totals),
        mass_same_token=same,
        mass_induction=induction,
        repeats=repeats,
        lse=aux.lse,
    )
