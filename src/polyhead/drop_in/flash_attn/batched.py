"""Functions over rows of one length: (B, T, H, D), or with keys and values packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from polyhead.drop_in.flash_attn.attend import attend, dropped_weights
from polyhead.drop_in.flash_attn.options import read_options
from polyhead.drop_in.flash_attn.validate import (
    Names,
    check_keys_and_values,
    check_packed,
    check_queries,
    check_same_kind,
)

__all__ = ["flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func"]

OutputAndProbabilities: TypeAlias = tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | OutputAndProbabilities:
    """Attention with flash-attn's arguments, layout and alignment, on any device and dtype.

    Args:
        q: (batch_size, seqlen, nheads, headdim), float32, bfloat16, float16 or float64.
        k, v: (batch_size, seqlen_k, nheads_k, headdim), nheads_k a divisor of nheads: query head h
            uses KV head h // (nheads / nheads_k). The heads of v may have another size.
        dropout_p: probability of dropping a weight, whenever it is not 0.
        softmax_scale: factor on the scores; None: 1 / sqrt(headdim).
        causal: True: the last query is aligned with the last key, and no query attends to a key
            after its own position (bottom right).
        window_size: (left, right): the number of keys before and after a query's position that it
            attends to, in addition to that at its position. -1: no limit.
        softcap: scores become softcap * tanh(scores / softcap); 0.0: no cap.
        alibi_slopes: (nheads,) or (batch_size, nheads): a score decreases by slope * distance.
            They get no gradient, as in flash-attn.
        deterministic: no effect: on a CPU all gradients are deterministic.
        return_attn_probs: return (output, softmax_lse, S_dmask).

    Returns:
        output (batch_size, seqlen, nheads, headdim); a query without keys has zeros. With
        `return_attn_probs` also softmax_lse (batch_size, nheads, seqlen), float32 or float64, +inf
        for a query without keys; and S_dmask (batch_size, nheads, seqlen, seqlen_k), the weights,
        negative where dropped, or (0,) without dropout. Both as in flash-attn, but S_dmask is not
        rounded up to blocks.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: an argument breaks a rule.

    >>> import torch
    >>> q, k, v = torch.ones(1, 2, 6, 8), torch.ones(1, 5, 2, 8), torch.ones(1, 5, 2, 8)
    >>> flash_attn_func(q, k, v, causal=True).shape
    torch.Size([1, 2, 6, 8])
    """
    return _attend_batched(
        q,
        k,
        v,
        Names(),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        return_attn_probs,
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | OutputAndProbabilities:
    """`flash_attn_func` with keys and values in one tensor, read in place.

    Args:
        q: (batch_size, seqlen, nheads, headdim).
        kv: (batch_size, seqlen_k, 2, nheads_k, headdim).

    The other arguments, the result and the errors are those of `flash_attn_func`.

    >>> import torch
    >>> flash_attn_kvpacked_func(torch.ones(1, 2, 6, 8), torch.ones(1, 5, 2, 3, 8)).shape
    torch.Size([1, 2, 6, 8])
    """
    check_packed("kv", kv, "(batch_size, seqlen_k, 2, nheads_k, headdim)", 5, 2)
    k, v = kv.unbind(2)
    return _attend_batched(
        q,
        k,
        v,
        Names("q", "kv", "kv"),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | OutputAndProbabilities:
    """`flash_attn_func` with queries, keys and values in one tensor, read in place.

    Args:
        qkv: (batch_size, seqlen, 3, nheads, headdim).

    The other arguments, the result and the errors are those of `flash_attn_func`.

    >>> import torch
    >>> flash_attn_qkvpacked_func(torch.ones(1, 5, 3, 6, 8), causal=True).shape
    torch.Size([1, 5, 6, 8])
    """
    check_packed("qkv", qkv, "(batch_size, seqlen, 3, nheads, headdim)", 5, 3)
    q, k, v = qkv.unbind(2)
    return _attend_batched(
        q,
        k,
        v,
        Names("qkv", "qkv", "qkv"),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        return_attn_probs,
    )


def _attend_batched(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    names: Names,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int],
    softcap: float,
    alibi_slopes: Tensor | None,
    return_attn_probs: bool,
) -> Tensor | OutputAndProbabilities:
    check_same_kind(*zip(names, (q, k, v), strict=True))
    check_queries(names.q, q, "(batch_size, seqlen, nheads, headdim)", 4)
    B = q.shape[0]
    layout = "(batch_size, seqlen_k, nheads_k, headdim)"
    check_keys_and_values(k, v, layout, (B, -1), q, names)
    options = read_options(
        q, B, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes
    )
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    if not return_attn_probs:
        return attend(query, key, value, options)[0].transpose(1, 2).contiguous()
    dropped = q.new_empty(0)
    if options.dropout > 0.0:
        dropped = dropped_weights(query, key, value, options)
    output, lse = attend(query, key, value, options, lse=True)
    assert lse is not None
    return output.transpose(1, 2).contiguous(), lse, dropped
