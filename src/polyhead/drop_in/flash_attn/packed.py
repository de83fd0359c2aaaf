"""Attention of packed sequences: one call if queries and keys share their bounds, else few calls.

Sequences whose queries and keys differ in number are copied into rows, whose keys have a length and
whose queries an offset, so that masks, windows and ALiBi are aligned at the end of each. Rows of
similar lengths share a call: less than half of it is padding.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

import polyhead.mask
from polyhead.backends import choose
from polyhead.cache.base import materialize
from polyhead.cache_view import CacheView
from polyhead.drop_in.flash_attn.attend import RaggedRows, attend, dropped_weights
from polyhead.drop_in.flash_attn.cached_rows import read_rows
from polyhead.drop_in.flash_attn.options import Options
from polyhead.drop_in.flash_attn.validate import check_integers
from polyhead.errors import ArgumentError
from polyhead.validate import build_call

__all__ = ["Bounds", "attend_packed", "read_bounds"]

# Backends that read document masks without T x S tensors.
_READS_DOCUMENTS = ("cpu", "flex")
# Multiplications that take as long as one more call.
_CALL = 2**22

_Groups: TypeAlias = list[list[tuple[int, int, int]]]


@dataclass(frozen=True, eq=False)
class Bounds:
    """Sequences of a packed tensor.

    Attributes:
        starts: (N,) int64, the first token of each sequence.
        lengths: (N,) int64.
        cumulative: the argument, (N + 1,).
    """

    starts: Tensor
    lengths: Tensor
    cumulative: Tensor

    def rows(self, indices: Tensor) -> Bounds:
        return Bounds(self.starts[indices], self.lengths[indices], self.cumulative)

    @property
    def longest(self) -> int:
        return int(self.lengths.max()) if len(self.lengths) else 0

    @property
    def is_uniform(self) -> bool:
        """True if the sequences are contiguous and of one length."""
        ends = self.starts + self.longest
        return bool((self.lengths == self.longest).all() and (ends[:-1] == self.starts[1:]).all())


def read_bounds(
    suffix: str, cu_seqlens: Tensor, max_seqlen: int, total: int | None, sequences: int, q: Tensor
) -> Bounds:
    """Validate cu_seqlens and max_seqlen, of the names with this suffix.

    Args:
        total: tokens of the packed tensor; None: they are in pages.
        sequences: the number of sequences, -1 for any.
    """
    name = f"cu_seqlens{suffix}"
    size = sequences + 1 if sequences >= 0 else -1
    check_integers(name, cu_seqlens, "(batch_size + 1,)", (size,), q)
    bounds = cu_seqlens.long()
    polyhead.mask.check_bounds(name, bounds)
    last = int(bounds[-1])
    if total is not None and last > total:
        raise ArgumentError(
            name,
            f"must end with at most the number of packed tokens, {total}",
            last,
            "pass the tensor that it was made for",
        )
    read = Bounds(bounds[:-1], bounds.diff(), cu_seqlens)
    if int(max_seqlen) < read.longest:
        raise ArgumentError(
            f"max_seqlen{suffix}",
            f"must be at least the longest sequence's {read.longest} tokens",
            int(max_seqlen),
            f"pass int({name}.diff().max())",
        )
    return read


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds_q: Bounds,
    bounds_k: Bounds,
    options: Options,
    block_table: Tensor | None = None,
    *,
    lse: bool = False,
    dropped: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Attention of the queries of each sequence over its keys, aligned at its end.

    Args:
        q: (total_q, H, D).
        k, v: (total_k, G, size), or with a block table (pages, page size, G, size).
        bounds_q, bounds_k: of the same number of sequences, N.
        options: of the call.
        block_table: (N, columns) page of each `page size` keys of a sequence.
        lse, dropped: return these, too.

    Returns:
        output (total_q, H, E), lse (H, total_q) or None, and S_dmask (N, H, longest, longest) or
        None. Tokens after the last sequence have zeros and +inf.
    """
    if block_table is None and not dropped and _shares_bounds(q, k, bounds_q, bounds_k, options):
        in_one_call = _attend_in_one_call(q, k, v, bounds_q, options, lse)
        if in_one_call is not None:
            return (*in_one_call, None)
    key: Tensor | CacheView
    value: Tensor | CacheView
    outputs, all_sums, weights = [], [], None
    if dropped:  # in one tensor
        groups = [((bounds_q.lengths > 0) & (bounds_k.lengths > 0)).nonzero().flatten()]
    else:
        multiplications = q.shape[1] * (q.shape[2] + v.shape[-1])
        groups = _similar_rows(bounds_q, bounds_k, block_table is not None, multiplications)
    for rows in groups:
        of_q, of_k = bounds_q.rows(rows), bounds_k.rows(rows)
        query, of_rows = _rows(q, of_q), options.for_rows(rows)
        ragged = _ragged(of_q, of_k)
        if block_table is None:
            key, value = _rows(k, of_k), _rows(v, of_k)
        else:
            key, value = read_rows(k, v, block_table[rows], of_k.lengths)
            if dropped or _needs_grad(k, v):
                key, value = materialize(key, value)
            else:
                ragged = ragged._replace(lengths=None)  # which the views have
        if dropped:
            assert isinstance(key, Tensor)
            assert isinstance(value, Tensor)
            weights = q.new_zeros(
                len(bounds_q.lengths), q.shape[1], bounds_q.longest, bounds_k.longest
            )
            of_group = dropped_weights(query, key, value, of_rows, ragged)
            is_query = torch.arange(of_q.longest, device=q.device) < of_q.lengths[:, None]
            of_group = of_group.masked_fill(~is_query[:, None, :, None], 0.0)
            weights[rows, :, : of_q.longest, : of_k.longest] = of_group
        output, sums = attend(query, key, value, of_rows, ragged, lse=lse)
        outputs.append((of_q, output.transpose(1, 2)))
        if sums is not None:
            all_sums.append((of_q, sums.transpose(1, 2)))
    shape = q.shape[:2]
    # The graph of a call without any token has gradients, too.
    linked = sum(x[:0].sum() for x in (q, k, v))
    output = _unpadded(outputs, q.new_zeros(*shape, v.shape[-1]) + linked)
    if not lse:
        return output, None, weights
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    sums = _unpadded(all_sums, q.new_full(shape, torch.inf, dtype=dtype))
    return output, sums.transpose(0, 1).contiguous(), weights


def _attend_in_one_call(
    q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, options: Options, lse: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Attention whose mask keeps the sequences apart; None: it would hold a T x S tensor."""
    query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
    options = options.within(polyhead.mask.cu_seqlens(bounds.cumulative))
    call = build_call(query, key, value, options.mask, dropout=options.dropout)
    if choose(call).name not in _READS_DOCUMENTS:
        return None
    output, sums = attend(query, key, value, options, lse=lse)
    return output[0].transpose(0, 1).contiguous(), None if sums is None else sums[0]


def _shares_bounds(
    q: Tensor, k: Tensor, bounds_q: Bounds, bounds_k: Bounds, options: Options
) -> bool:
    """True if all tokens of q and k belong to the same sequences, of different lengths."""
    same = bounds_q.cumulative is bounds_k.cumulative or torch.equal(
        bounds_q.starts, bounds_k.starts
    )
    has_row_slopes = options.slopes is not None and options.slopes.ndim == 2
    return (
        same
        and not has_row_slopes
        and not bounds_q.is_uniform
        and q.shape[0] == k.shape[0] == int(bounds_q.cumulative[-1])
        and torch.equal(bounds_q.lengths, bounds_k.lengths)
    )


def _similar_rows(
    bounds_q: Bounds, bounds_k: Bounds, is_paged: bool, multiplications: int
) -> list[Tensor]:
    """Indices of sequences with queries, in groups whose lengths differ by less than a factor of 2.

    Groups are as narrow as pays: padding costs work, and each group a call. Keys in pages are not
    padded, so that their numbers do not count.

    Args:
        multiplications: per score.
    """
    lengths = [
        (row, T, 1 if is_paged else S)
        for row, (T, S) in enumerate(
            zip(bounds_q.lengths.tolist(), bounds_k.lengths.tolist(), strict=True)
        )
        if T
    ]

    def cost(groups: _Groups) -> int:
        padded = sum(
            len(group) * max(T for _, T, _ in group) * max(S for _, _, S in group)
            for group in groups
        )
        return padded * multiplications + len(groups) * _CALL

    groups = min((_grouped(lengths, steps) for steps in (1, 2, 4, 16)), key=cost)
    device = bounds_q.starts.device
    return [torch.tensor([row for row, _, _ in group], device=device) for group in groups]


def _grouped(lengths: list[tuple[int, int, int]], steps: int) -> _Groups:
    """Groups of (row, T, S), `steps` of them within a factor of 2 of each length."""
    groups: dict[tuple[int, ...], list[tuple[int, int, int]]] = defaultdict(list)
    for row, T, S in lengths:
        step = tuple(math.floor(steps * math.log2(size)) if size else -1 for size in (T, S))
        groups[step].append((row, T, S))
    return list(groups.values())


def _ragged(of_q: Bounds, of_k: Bounds) -> RaggedRows:
    """Lengths of keys, and positions of queries that are aligned with the last key of their row."""
    offset = of_k.lengths - of_q.lengths
    same = bool((of_q.lengths == of_q.longest).all() and (of_k.lengths == of_k.longest).all())
    return RaggedRows() if same else RaggedRows(of_k.lengths, offset)


def _rows(x: Tensor, of: Bounds) -> Tensor:
    """Sequences of x as (n, heads, longest, size), in place if they have one length."""
    n, longest = len(of.lengths), of.longest
    if of.is_uniform:
        first = int(of.starts[0])
        x = x[first : first + n * longest]
    else:
        # Padding repeats the sequence's own last token: nothing of another sequence is read.
        last = (of.lengths - 1).clamp(min=0)[:, None]
        token = torch.arange(longest, device=x.device).minimum(last)
        x = x.index_select(0, (of.starts[:, None] + token).flatten())
    return x.unflatten(0, (n, longest)).transpose(1, 2)  # type: ignore[no-any-return]


def _unpadded(parts: list[tuple[Bounds, Tensor]], empty: Tensor) -> Tensor:
    """Rows (n, longest, ...) as packed tokens; those of no sequence are as in `empty`."""
    if not parts:
        return empty
    of_q, rows = parts[0]
    if of_q.is_uniform and rows.shape[0] * rows.shape[1] == len(empty):
        return rows.flatten(0, 1).contiguous()
    tokens, real = [], []
    for of_q, part in parts:
        token = torch.arange(of_q.longest, device=part.device).expand(len(part), -1)
        is_real = (token < of_q.lengths[:, None]).flatten().nonzero().flatten()
        tokens.append((of_q.starts[:, None] + token).flatten()[is_real])
        real.append(part.flatten(0, 1).index_select(0, is_real))
    return empty.index_copy(0, torch.cat(tokens), torch.cat(real))


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
