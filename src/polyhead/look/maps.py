"""Attention maps of fixed size, at any sequence length."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from polyhead.call import AttentionCall
from polyhead.errors import ArgumentError
from polyhead.look.streaming import key_logsumexp, total_logsumexp, weight_mass, weights_by_chunk
from polyhead.mask import Documents, Mask
from polyhead.validate import build_call

__all__ = ["attention_map", "bin_edges", "map_of"]

# For fewer keys per bin, a pass costs more than materializing their weights.
_KEYS_A_PASS = 32


@torch.no_grad()
def attention_map(
    query: Tensor,
    key: Tensor,
    bins: int = 128,
    *,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Attention weights averaged into bins x bins per head, without a T x S tensor.

    Exact; memory grows with T. The weight on a bin of keys is exp(lse over the bin - lse over all
    keys), so the map costs one pass per bin over that bin's keys: with the pass for the totals,
    two passes over all keys. No gradients.

    Args:
        query: (B, H, T, D).
        key: (B, G, S, D), G a divisor of H.
        bins: the most rows and columns of the map; at most one per token. Bin i of n holds tokens
            i * T // n to (i + 1) * T // n - 1 (`bin_edges`).
        mask, bias, scale, softcap, sinks, alibi_slopes: as in `polyhead.attention`.

    Returns:
        (B, H, min(bins, T), min(bins, S)): the mean weight in each cell; masked weights count as
        zeros. With bins >= T and S, the weights themselves.

    >>> import polyhead as ph
    >>> query, key = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8)   # equal weights
    >>> ph.look.attention_map(query, key, bins=2, mask=ph.mask.causal())[0, 0]
    tensor([[0.5000, 0.0000],
            [0.2917, 0.2083]])
    """
    call = build_call(query, key, key, mask, bias, scale, softcap, sinks, alibi_slopes)
    return map_of(call, bins)


def map_of(call: AttentionCall, bins: int) -> Tensor:
    """`attention_map` of an `AttentionCall`."""
    if not isinstance(bins, int) or isinstance(bins, bool) or bins < 1:
        raise ArgumentError("bins", "must be an integer of at least 1", repr(bins), "use 128")
    if call.S // bins < _KEYS_A_PASS:
        return _from_weights(call, bins)
    return _from_sums(call, bins, total_logsumexp(call, key_logsumexp(call)))


def _from_weights(call: AttentionCall, bins: int) -> Tensor:
    """Sum the weights, in chunks of queries, over the rows and then the columns of each bin."""
    rows, columns = Bins(call.T, bins, call.device), Bins(call.S, bins, call.device)
    dtype = call.compute_dtype
    cells = torch.zeros(call.B, call.H, rows.n, columns.n, dtype=dtype, device=call.device)
    for start, stop, weights_bhts in weights_by_chunk(call):
        keys = weights_bhts.shape[-1]
        bin_of = rows.bin_of[start:stop]
        first, last = (int(bin_of[0]), int(bin_of[-1]) + 1) if stop > start else (0, 0)
        of_rows = weights_bhts.new_zeros(call.B, call.H, last - first, keys)
        of_rows.index_add_(2, bin_of - first, weights_bhts)
        cells[:, :, first:last].index_add_(3, columns.bin_of[:keys], of_rows)
    return cells / rows.sizes[:, None] / columns.sizes


def _from_sums(call: AttentionCall, bins: int, total_lse_bht: Tensor) -> Tensor:
    """Compute each query's weight on each bin of keys, then the mean over the rows of each bin."""
    rows, columns = Bins(call.T, bins, call.device), Bins(call.S, bins, call.device)
    cells = []
    for first, last in pairwise(columns.edges.tolist()):
        start = _first_query(call, rows.edges.tolist(), first)
        sums_bht = key_logsumexp(_from_query(call, start), (first, last))
        mass_bht = weight_mass(sums_bht, total_lse_bht[..., start:])
        total = mass_bht.new_zeros(call.B, call.H, rows.n)
        cells.append(total.index_add_(2, rows.bin_of[start:], mass_bht))
    return torch.stack(cells, dim=-1) / rows.sizes[:, None] / columns.sizes


class Bins:
    """Even bins of tokens: their edges, their sizes, and the bin of each token."""

    def __init__(self, tokens: int, bins: int, device: torch.device) -> None:
        self.edges = bin_edges(tokens, bins)
        self.n = len(self.edges) - 1
        self.sizes = self.edges.diff().to(device)
        self.bin_of = torch.arange(self.n, device=device).repeat_interleave(self.sizes)


def _first_query(call: AttentionCall, rows: list[int], key: int) -> int:
    """The last edge before which no query reaches this key: skips half of a causal map."""
    mask = call.mask
    if mask is None or any(isinstance(rule, Documents) for rule in mask.primitives()):
        return 0  # a documents mask cannot be narrowed to some queries
    seen = bisect_left(
        rows,
        True,
        key=lambda stop: mask.key_range(0, stop, call.T, call.S, call.query_offset)[1] > key,
    )
    return rows[max(0, seen - 1)]


def _from_query(call: AttentionCall, start: int) -> AttentionCall:
    if start == 0 or call.mask is None:
        return call
    bias = call.bias
    if bias is not None and bias.ndim >= 2 and bias.shape[-2] > 1:
        bias = bias[..., start:, :]
    mask = call.mask.for_queries(start, call.T, call.T)
    offset = None if call.query_offset is None else call.query_offset + start
    query = call.query[:, :, start:]
    return replace(call, query=query, mask=mask, bias=bias, query_offset=offset)


def bin_edges(tokens: int, bins: int) -> Tensor:
    """Return the starts of min(bins, tokens) bins, and the end of the last one.

    >>> bin_edges(tokens=7, bins=3)
    tensor([0, 2, 4, 7])
    """
    n = min(bins, tokens)
    return torch.arange(n + 1) * tokens // max(n, 1)
