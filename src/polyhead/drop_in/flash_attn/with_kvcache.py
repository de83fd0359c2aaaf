"""Attention over a KV cache that is appended to in place, with a length per row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from polyhead.drop_in.flash_attn.attend import RaggedRows, attend
from polyhead.drop_in.flash_attn.cached_rows import check_pages, read_rows
from polyhead.drop_in.flash_attn.options import is_local, read_options
from polyhead.drop_in.flash_attn.rotary import check_positions, check_tables, rotate_at
from polyhead.drop_in.flash_attn.validate import (
    Names,
    check_integers,
    check_keys_and_values,
    check_queries,
    check_range,
    check_same_kind,
)
from polyhead.errors import ArgumentError, ShapeError, check_count

__all__ = ["flash_attn_with_kvcache"]

_BLOCK_TABLE = "(batch_size, max_num_blocks_per_seq)"


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over caches whose rows have different lengths, after an append in place.

    Everything is validated before the caches are written. There is no gradient, as in flash-attn.

    Args:
        q: (batch_size, seqlen, nheads, headdim). The last query is aligned with the last key of
            its row.
        k_cache, v_cache: (batch_size_cache, seqlen_cache, nheads_k, headdim), or with a block
            table (num_blocks, page_block_size, nheads_k, headdim). Read in place.
        k, v: (batch_size, seqlen_new, nheads_k, headdim) written to the caches after the
            cache_seqlens tokens of each row.
        rotary_cos, rotary_sin: (seqlen_rotary, rotary_dim / 2): k is rotated by the rows
            cache_seqlens, cache_seqlens + 1, ... before it is written. So is q if `causal` or with
            a window; otherwise all queries by row cache_seqlens. Only together with k and v.
        cache_seqlens: tokens in the cache before the append: a number, or (batch_size,). None,
            without k: seqlen_cache.
        cache_batch_idx: (batch_size,) the row of the caches of each row of q; None: the same. If
            two are equal and k is given, either of the two may be written. Not with a block table.
        cache_leftpad: (batch_size,) index of the first key of each row.
        block_table: (batch_size, max_num_blocks_per_seq): token s of row b is in block
            block_table[b, s // page_block_size], slot s % page_block_size. Blocks of any size.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in `flash_attn_func`.
        rotary_interleaved: the features of pair i: 2i and 2i + 1 if True, i and i + rotary_dim / 2
            if False.
        num_splits: no effect: keys are split among threads by a rule of the kernels.
        return_softmax_lse: return (output, softmax_lse).

    Returns:
        output (batch_size, seqlen, nheads, headdim), and softmax_lse (batch_size, nheads, seqlen)
        if requested, as in `flash_attn_func`.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: an argument breaks a rule. Nothing has
            been written.

    >>> k_cache = v_cache = torch.zeros(2, 16, 2, 8)
    >>> q, k, v = torch.ones(2, 1, 6, 8), torch.ones(2, 1, 2, 8), torch.ones(2, 1, 2, 8)
    >>> cache_seqlens = torch.tensor([3, 5], dtype=torch.int32)
    >>> out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens)
    >>> out.shape, k_cache[:, :, 0, 0].nonzero().tolist()
    (torch.Size([2, 1, 6, 8]), [[0, 3], [1, 5]])
    """
    with torch.no_grad():
        rows = _read_cache(
            q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, cache_leftpad, block_table
        )
        options = read_options(
            q, len(q), 0.0, softmax_scale, causal, window_size, softcap, alibi_slopes
        )
        if rotary_cos is not None or rotary_sin is not None:
            together = causal or is_local(window_size)
            q, k = _rotated(q, k, rotary_cos, rotary_sin, rows, together, rotary_interleaved)
        lengths = rows.lengths
        if k is not None and v is not None:
            places = _places(rows, k.shape[1], k_cache.shape[1])
            k_cache[places], v_cache[places] = k, v
            lengths = lengths + k.shape[1]
        key, value = read_rows(k_cache, v_cache, rows.table, lengths)
        ragged = RaggedRows(leftpad=cache_leftpad)
        query = q.transpose(1, 2)
        output, lse = attend(query, key, value, options, ragged, lse=return_softmax_lse)
        output = output.transpose(1, 2).contiguous()
        return output if lse is None else (output, lse)


class _Rows(NamedTuple):
    """Rows of the caches: (B,) int64 lengths before the append, and pages or None: row b itself."""

    lengths: Tensor
    table: Tensor | None


def _read_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
) -> _Rows:
    new = [(name, x) for name, x in (("k", k), ("v", v)) if x is not None]
    check_same_kind(("q", q), ("k_cache", k_cache), ("v_cache", v_cache), *new)
    check_queries("q", q, "(batch_size, seqlen, nheads, headdim)", 4)
    B = len(q)
    names = Names("q", "k_cache", "v_cache")
    layout = (
        "(batch_size_cache, seqlen_cache, nheads_k, headdim)"
        if block_table is None
        else "(num_blocks, page_block_size, nheads_k, headdim)"
    )
    check_keys_and_values(k_cache, v_cache, layout, (-1, -1), q, names)
    appended = 0
    if k is not None and v is not None:
        _check_new(k, v, k_cache, v_cache, B)
        appended = k.shape[1]
    elif new:
        raise ArgumentError(
            "k, v", "must be passed together", f"{new[0][0]} alone", "pass both, or neither"
        )
    capacity = k_cache.shape[1]
    if block_table is not None:
        check_integers("block_table", block_table, _BLOCK_TABLE, (B, -1), q)
        capacity *= block_table.shape[1]
    lengths = _lengths(cache_seqlens, B, capacity, appended, bool(new), q)
    if cache_leftpad is not None:
        check_integers("cache_leftpad", cache_leftpad, "(batch_size,)", (B,), q)
        rule = f"must be from 0 to the cache's {capacity} tokens"
        check_range("cache_leftpad", cache_leftpad, 0, capacity, rule, "count the padding")
    if block_table is not None:
        if cache_batch_idx is not None:
            raise ArgumentError(
                "cache_batch_idx",
                "must be None with a block table, which has the blocks of each row",
                tuple(cache_batch_idx.shape),
                "pass block_table[cache_batch_idx]",
            )
        check_pages(block_table, k_cache, lengths + appended, "cache_seqlens and k")
        return _Rows(lengths, block_table)
    if cache_batch_idx is not None:
        check_integers("cache_batch_idx", cache_batch_idx, "(batch_size,)", (B,), q)
        most = len(k_cache) - 1
        rule = f"must be from 0 to batch_size_cache - 1 = {most}"
        check_range("cache_batch_idx", cache_batch_idx, 0, most, rule, "pass rows of the caches")
        return _Rows(lengths, cache_batch_idx[:, None])
    if len(k_cache) < B:
        raise ShapeError(
            "k_cache",
            f"must have a row for each of q's {B}",
            len(k_cache),
            "pass cache_batch_idx if rows of q share one of the cache",
        )
    return _Rows(lengths, None)


def _lengths(
    cache_seqlens: int | Tensor | None,
    B: int,
    capacity: int,
    appended: int,
    has_new: bool,
    q: Tensor,
) -> Tensor:
    if cache_seqlens is None:
        if has_new:
            raise ArgumentError(
                "cache_seqlens",
                "must be given with k and v, which are written after it",
                None,
                "pass the number of tokens in the cache, 0 for none",
            )
        return torch.full((B,), capacity, device=q.device)
    if not isinstance(cache_seqlens, Tensor):
        check_count("cache_seqlens", cache_seqlens, 0, "count the tokens in the cache")
        lengths = torch.full((B,), cache_seqlens, device=q.device)
    else:
        check_integers("cache_seqlens", cache_seqlens, "(batch_size,)", (B,), q)
        lengths = cache_seqlens.long()
    most = capacity - appended
    new = f" less the {appended} new ones" if appended else ""
    rule = f"must be from 0 to the cache's {capacity} tokens{new}"
    remedy = "pass larger caches, or a block table with more columns"
    check_range("cache_seqlens", lengths, 0, most, rule, remedy)
    return lengths


def _check_new(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, B: int) -> None:
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        G, size = cache.shape[2:]
        if x.ndim != 4 or (x.shape[0], *x.shape[2:]) != (B, G, size) or x.shape[1] != k.shape[1]:
            raise ShapeError(
                name,
                f"must be (batch_size, seqlen_new, nheads_k, headdim) = ({B}, "
                f"{'any' if name == 'k' else k.shape[1]}, {G}, {size})",
                tuple(x.shape),
                "pass the new tokens of every row",
            )


def _rotated(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    rows: _Rows,
    moves: bool,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Queries and new keys rotated by their positions; `moves`: each query has its own."""
    if cos is None or sin is None or k is None:
        raise ArgumentError(
            "rotary_cos, rotary_sin",
            "must be passed together, and with k and v",
            ", ".join(n for n, x in (("rotary_cos", cos), ("rotary_sin", sin)) if x is not None),
            "pass all four, or rotate q with apply_rotary_emb",
        )
    check_tables("rotary_cos", cos, "rotary_sin", sin, q)
    of_k, of_q = (rows.lengths[:, None] + torch.arange(x.shape[1], device=q.device) for x in (k, q))
    if not moves:
        of_q = rows.lengths[:, None].expand_as(of_q)
    for positions in (of_k, of_q):
        check_positions("rotary_cos", positions, cos)
    return (
        rotate_at(q, cos, sin, of_q, interleaved),
        rotate_at(k, cos, sin, of_k, interleaved),
    )


def _places(rows: _Rows, new: int, page_size: int) -> tuple[Tensor, Tensor]:
    """Page and slot, (B, new), of the tokens that are appended."""
    device = rows.lengths.device
    token = rows.lengths[:, None] + torch.arange(new, device=device)
    if rows.table is None:
        return torch.arange(len(rows.lengths), device=device)[:, None], token
    return rows.table.long().gather(1, token // page_size), token % page_size
