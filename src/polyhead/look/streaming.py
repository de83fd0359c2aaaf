"""Streamed sums over keys, from which all per-head statistics are computed.

The weight that a query puts on a set of keys is exp(lse over the set - lse over all its keys), and
a fused kernel computes an lse without a T x S tensor. So the weight on any set of keys costs one
more pass of the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from polyhead.backends import choose_for_aux
from polyhead.backends.mask_ranges import read_ranges
from polyhead.backends.reference import compute_aux
from polyhead.call import AttentionCall, Aux, AuxRequest, HeadStats
from polyhead.mask import Dense, LeftPadding, Mask, Prefix
from polyhead.validate import autocasts

__all__ = [
    "chunks",
    "key_logsumexp",
    "slice_call",
    "stream_aux",
    "total_logsumexp",
    "weight_mass",
    "weights_by_chunk",
]

# Without a kernel, scores are computed in chunks of queries, of this many cells each.
_CELLS = 2**22


def total_logsumexp(call: AttentionCall, lse_bht: Tensor) -> Tensor:
    """Log of the softmax denominator, (B, H, T): the sum over keys and the sink."""
    if call.sinks is None:
        return lse_bht
    return torch.logaddexp(lse_bht, call.sinks.to(lse_bht.dtype)[:, None])


def weight_mass(lse_bht: Tensor, total_lse_bht: Tensor) -> Tensor:
    """Weight on the keys with this log-sum-exp; 0 for a query with no key to attend to."""
    return torch.exp(lse_bht - total_lse_bht).masked_fill(lse_bht == -torch.inf, 0.0)


def key_logsumexp(call: AttentionCall, keys: tuple[int, int] | None = None) -> Tensor:
    """Log-sum-exp of the scores over the keys each query may attend to, (B, H, T); -inf over none.

    Args:
        call: the call with these scores; its output is not computed.
        keys: (first, last), to sum over keys first .. last - 1 only.
    """
    lse = stream_aux(call, AuxRequest(lse=True), keys).lse
    assert lse is not None
    return lse


def stream_aux(
    call: AttentionCall, request: AuxRequest, keys: tuple[int, int] | None = None
) -> Aux:
    """Return lse and stats as `attention(..., return_aux=request)` does, in memory linear in T.

    They come from the first eligible backend that computes them in its own pass, else from the
    reference, in chunks. With `keys` = (first, last), only keys first .. last - 1 count.
    """
    first, last = (0, call.S) if keys is None else keys
    # Values of no features: there is no output to compute.
    asked = replace(
        call,
        value=call.key[..., :0],
        mask=_within(call, first, last),
        dropout=0.0,
        aux=request,
    )
    backend = choose_for_aux(asked, request.names) if _keeps_structure(asked) else None
    if backend is not None:
        with _autocast_off(call.query):
            return backend.run(asked)[1]
    with _autocast_off(call.query):
        return _by_reference(replace(asked, mask=call.mask), first, last)


def weights_by_chunk(call: AttentionCall) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, stop, weights of queries start .. stop - 1) of the reference, in compute dtype.

    The weights are of keys 0 .. last - 1, where `last` is the end of the mask's key range.
    """
    wide = {n: getattr(call, n).to(call.compute_dtype) for n in ("query", "key")}
    call = replace(call, **wide, value=wide["key"][..., :0], aux=AuxRequest(weights=True))
    for start, stop in chunks(call, call.B * call.H * call.S, _CELLS):
        last = max(0, call.key_range(start, stop)[1])
        part = slice_call(call, start, stop, 0, last)
        with _autocast_off(call.query):
            weights = compute_aux(part).weights
        assert weights is not None
        yield start, stop, weights


def chunks(call: AttentionCall, cells_a_row: int, cells: int) -> Iterator[tuple[int, int]]:
    """Yield ranges (start, stop) of queries, of at most `cells` cells (and at least one query)."""
    rows = max(1, cells // max(1, cells_a_row))
    for start in range(0, max(call.T, 1), rows):
        yield start, min(start + rows, call.T)


def slice_call(call: AttentionCall, start: int, stop: int, first: int, last: int) -> AttentionCall:
    """Return the call of queries start .. stop - 1 and keys first .. last - 1, mask materialized.

    The queries keep their positions.
    """
    allowed = call.allowed(start, stop, (first, last))
    mask = None if allowed is None else Dense(allowed)
    bias = call.bias
    if bias is not None:
        bias = bias if bias.ndim < 2 or bias.shape[-2] == 1 else bias[..., start:stop, :]
        bias = bias if bias.shape[-1] == 1 else bias[..., first:last]
    return replace(
        call,
        query=call.query[:, :, start:stop],
        key=call.key[:, :, first:last],
        value=call.value[:, :, first:last],
        mask=mask,
        bias=bias,
        query_offset=call.first_position + start - first,
    )


def _within(call: AttentionCall, first: int, last: int) -> Mask | None:
    """Restrict the call's mask to keys first .. last - 1, by masks that kernels read as ranges."""
    mask = call.mask
    rules: list[Mask] = []
    if first > 0:
        rules.append(LeftPadding(torch.full((call.B,), first, device=call.device)))
    if last < call.S:
        rules.append(Prefix(last))
    for rule in rules:
        mask = rule if mask is None else mask & rule
    return mask


def _keeps_structure(call: AttentionCall) -> bool:
    """True if a kernel can read the mask without materializing T x S booleans for it."""
    rest = read_ranges(call.mask, call.T, call.S, call.query_offset).unstructured
    return rest is None or isinstance(rest, Dense) or call.T * call.S <= _CELLS


@contextmanager
def _autocast_off(query: Tensor) -> Iterator[None]:
    """Disable autocast within, as `attention` does: it decides the dtype of its inputs only."""
    if autocasts(query):
        with torch.autocast(query.device.type, enabled=False):
            yield
    else:
        yield


def _by_reference(call: AttentionCall, first: int, last: int) -> Aux:
    parts = []
    for start, stop in chunks(call, call.B * call.H * (last - first), _CELLS):
        end = min(last, max(first, call.key_range(start, stop)[1]))
        parts.append(compute_aux(slice_call(call, start, stop, first, end)))
    return Aux(
        lse=torch.cat([p.lse for p in parts if p.lse is not None], dim=2) if call.aux.lse else None,
        stats=HeadStats.concat([p.stats for p in parts if p.stats is not None], dim=2)
        if call.aux.stats
        else None,
    )
