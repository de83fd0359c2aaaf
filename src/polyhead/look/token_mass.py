"""Attention mass by token identity: on repeated tokens, and on the tokens after these."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from polyhead.call import AttentionCall
from polyhead.errors import DtypeError, ShapeError
from polyhead.look.streaming import chunks, key_logsumexp, slice_call, weight_mass
from polyhead.mask import Dense
from polyhead.validate import check_is_tensor

__all__ = ["check_token_ids", "token_masses"]

# The mask of counted keys is materialized in chunks of queries, of this many bytes each.
_CELLS = 2**24


def token_masses(
    call: AttentionCall, token_ids: Tensor, total_lse_bht: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight on earlier keys of the query's token and on the keys just after those, (B, H, T).

    Third, True for each query whose token came before, so that there are any: (B or 1, 1, T).
    """
    T, S = call.T, call.S
    ids_bs = torch.atleast_2d(token_ids.to(call.device))
    masses = []
    for start, stop in chunks(call, ids_bs.shape[0] * S, _CELLS):
        # No later key counts; without these the last query is again at the last key's position.
        first_query, last = S - T + start, S - T + stop
        key = torch.arange(last, device=call.device)
        earlier_ts = key < torch.arange(first_query, last, device=call.device)[:, None]
        same_bts = (ids_bs[:, first_query:last, None] == ids_bs[:, None, :last]) & earlier_ts
        after_bts = torch.zeros_like(same_bts)
        after_bts[..., 1:] = same_bts[..., :-1]
        part = slice_call(call, start, stop, 0, last)
        total = total_lse_bht[..., start:stop]
        same, after = (
            weight_mass(key_logsumexp(_only(part, on)), total) for on in (same_bts, after_bts)
        )
        masses.append((same, after, same_bts.any(dim=-1)[:, None]))
    same, after, repeats = (torch.cat(parts, dim=2) for parts in zip(*masses, strict=True))
    return same, after, repeats


def _only(part: AttentionCall, allowed_bts: Tensor) -> AttentionCall:
    allowed = allowed_bts[:, None]
    if isinstance(part.mask, Dense):
        allowed = allowed & part.mask.allowed
    return replace(part, mask=Dense(allowed))


def check_token_ids(token_ids: Tensor, call: AttentionCall) -> None:
    """Raise unless there is one integer id per key of the call, the queries being the last T."""
    check_is_tensor("token_ids", token_ids)
    if token_ids.is_floating_point() or token_ids.is_complex():
        raise DtypeError("token_ids", "must be integers", token_ids.dtype, "pass the ids as read")
    if tuple(token_ids.shape) not in ((call.S,), (call.B, call.S)) or call.T > call.S:
        raise ShapeError(
            "token_ids",
            f"must name the token of each of the S = {call.S} keys, (S,) or (B, S) with "
            f"B = {call.B}, the T = {call.T} queries among them",
            tuple(token_ids.shape),
            "give one id per key token, of cached tokens too",
        )
