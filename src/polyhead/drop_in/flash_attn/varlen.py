"""Functions over sequences of different lengths, packed into one: (total, H, D)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from polyhead.drop_in.flash_attn.batched import OutputAndProbabilities
from polyhead.drop_in.flash_attn.cached_rows import check_pages
from polyhead.drop_in.flash_attn.options import read_options
from polyhead.drop_in.flash_attn.packed import attend_packed, read_bounds
from polyhead.drop_in.flash_attn.validate import (
    Names,
    check_keys_and_values,
    check_packed,
    check_queries,
    check_same_kind,
)

__all__ = [
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | OutputAndProbabilities:
    """Attention within each of several sequences, packed without padding.

    Sequence n has queries cu_seqlens_q[n] .. cu_seqlens_q[n + 1] - 1 and keys cu_seqlens_k[n] ..
    cu_seqlens_k[n + 1] - 1. Causality, windows and ALiBi are aligned at the end of each.

    Args:
        q: (total_q, nheads, headdim).
        k, v: (total_k, nheads_k, headdim), or with a block table (num_blocks, page_block_size,
            nheads_k, headdim).
        cu_seqlens_q, cu_seqlens_k: (batch_size + 1,) int32 or int64 cumulative lengths, the first
            0. Tokens after the last sequence have zeros.
        max_seqlen_q, max_seqlen_k: at least the length of the longest sequence; no other effect.
        alibi_slopes: (nheads,) or (batch_size, nheads).
        block_table: (batch_size, max_num_blocks_per_seq): key s of sequence n is in block
            block_table[n, s // page_block_size], slot s % page_block_size. Blocks of any size.

    The other arguments and the errors are those of `flash_attn_func`.

    Returns:
        output (total_q, nheads, headdim). With `return_attn_probs` also softmax_lse (nheads,
        total_q) and S_dmask (batch_size, nheads, longest q, longest k), or (0,) without dropout.

    >>> import torch
    >>> q, k, v = torch.ones(3, 6, 8), torch.ones(9, 2, 8), torch.ones(9, 2, 8)
    >>> cu_seqlens_q, cu_seqlens_k = torch.tensor([0, 1, 3]), torch.tensor([0, 5, 9])
    >>> flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, 2, 5, causal=True).shape
    torch.Size([3, 6, 8])
    """
    return _attend_varlen(
        q,
        k,
        v,
        Names(),
        ("_q", "_k"),
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        return_attn_probs,
        block_table,
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | OutputAndProbabilities:
    """`flash_attn_varlen_func` with keys and values in one tensor.

    Args:
        q: (total_q, nheads, headdim).
        kv: (total_k, 2, nheads_k, headdim).

    The other arguments, the result and the errors are those of `flash_attn_varlen_func`.

    >>> import torch
    >>> q, kv, cu_seqlens = torch.ones(5, 6, 8), torch.ones(5, 2, 3, 8), torch.tensor([0, 2, 5])
    >>> flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens, cu_seqlens, 3, 3).shape
    torch.Size([5, 6, 8])
    """
    check_packed("kv", kv, "(total_k, 2, nheads_k, headdim)", 4, 2)
    k, v = kv.unbind(1)
    return _attend_varlen(
        q,
        k,
        v,
        Names("q", "kv", "kv"),
        ("_q", "_k"),
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | OutputAndProbabilities:
    """`flash_attn_varlen_func` with queries, keys and values in one tensor, of the same sequences.

    Args:
        qkv: (total, 3, nheads, headdim).
        cu_seqlens, max_seqlen: of queries and keys.

    The other arguments, the result and the errors are those of `flash_attn_varlen_func`.

    >>> import torch
    >>> qkv, cu_seqlens = torch.ones(5, 3, 6, 8), torch.tensor([0, 2, 5])
    >>> flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 3, causal=True).shape
    torch.Size([5, 6, 8])
    """
    check_packed("qkv", qkv, "(total, 3, nheads, headdim)", 4, 3)
    q, k, v = qkv.unbind(1)
    return _attend_varlen(
        q,
        k,
        v,
        Names("qkv", "qkv", "qkv"),
        ("", ""),
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        return_attn_probs,
    )


def _attend_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    names: Names,
    suffixes: tuple[str, str],
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int],
    softcap: float,
    alibi_slopes: Tensor | None,
    return_attn_probs: bool,
    block_table: Tensor | None = None,
) -> Tensor | OutputAndProbabilities:
    check_same_kind(*zip(names, (q, k, v), strict=True))
    check_queries(names.q, q, "(total_q, nheads, headdim)", 3)
    if block_table is None:
        check_keys_and_values(k, v, "(total_k, nheads_k, headdim)", (-1,), q, names)
    else:
        layout = "(num_blocks, page_block_size, nheads_k, headdim)"
        check_keys_and_values(k, v, layout, (-1, -1), q, names)
    total_k = None if block_table is not None else len(k)
    bounds_q = read_bounds(suffixes[0], cu_seqlens_q, max_seqlen_q, len(q), -1, q)
    sequences = len(bounds_q.lengths)
    bounds_k = read_bounds(suffixes[1], cu_seqlens_k, max_seqlen_k, total_k, sequences, q)
    if block_table is not None:
        check_pages(block_table, k, bounds_k.lengths, "cu_seqlens_k")
    options = read_options(
        q, sequences, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes
    )
    output, lse, weights = attend_packed(
        q,
        k,
        v,
        bounds_q,
        bounds_k,
        options,
        block_table,
        lse=return_attn_probs,
        dropped=return_attn_probs and options.dropout > 0.0,
    )
    if lse is None:
        return output
    return output, lse, q.new_empty(0) if weights is None else weights
