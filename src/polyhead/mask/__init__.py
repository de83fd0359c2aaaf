"""Attention masks: primitives that combine with `&`, `|`, `~` and keep their structure.

A mask is a small immutable value. **True means "may attend"**, always. `a & b` requires both, `a |
b` either, `~a` is the complement. A backend reads the structure without building a T x S tensor;
`materialize` defines the semantics.

Positions are absolute: query t of T queries against S keys has position S - T + t, so that the last
query aligns with the last key, or query_offset + t if the call has a `query_offset`.
(`align="start"` gives query t position t instead: the upper-left rule of
`scaled_dot_product_attention` and ONNX.)

In the drawings a row is a query, a column is a key, `x` may attend and `.` may not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from polyhead.errors import ArgumentError, DtypeError, ShapeError, check_count, check_is_plain
from polyhead.mask.algebra import And, KeySlice, Mask, Not, Or, QuerySlice
from polyhead.mask.primitives import (
    Align,
    Causal,
    Custom,
    Dense,
    Documents,
    LeftPadding,
    Lengths,
    Prefix,
    Window,
)

# More than any number of tokens, and far from overflow when a position is added.
_FARTHEST = 2**40

__all__ = [
    "And",
    "Causal",
    "Custom",
    "Dense",
    "Documents",
    "KeySlice",
    "LeftPadding",
    "Lengths",
    "Mask",
    "Not",
    "Or",
    "Prefix",
    "QuerySlice",
    "Window",
    "causal",
    "cu_seqlens",
    "custom",
    "dense",
    "documents",
    "left_padding",
    "lengths",
    "prefix",
    "window",
]


def causal(align: Align = "end") -> Mask:
    """Causal mask: each query may attend to keys at its own position and before.

    With T = 3 queries and S = 5 keys (two earlier keys, for example from a cache)::

        causal()        causal(align="start")
        x x x . .       x . . . .
        x x x x .       x x . . .
        x x x x x       x x x . .

    With T = 4 and S = 2 the first two queries of `causal()` are before every key and attend to
    none; their output is zero::

        causal()        causal(align="start")
        . .             x .
        . .             x x
        x .             x x
        x x             x x

    Args:
        align: "end" (default, flash-attention's rule: the last query aligns with the last key) or
            "start" (the rule of `scaled_dot_product_attention` and ONNX: query t at key t).

    >>> causal()
    causal()
    """
    return Causal(_check_align(align))


def window(before: int | None = None, after: int | None = None, *, align: Align = "end") -> Mask:
    """Sliding window: `before` keys before each query, itself, and `after` keys after it.

    With T = S = 5::

        window(before=1)    window(before=1, after=1)   causal() & window(before=1)
        x x x x x           x x . . .                   x . . . .
        x x x x x           x x x . .                   x x . . .
        . x x x x           . x x x .                   . x x . .
        . . x x x           . . x x x                   . . x x .
        . . . x x           . . . x x                   . . . x x

    So `causal() & window(before=511)` allows 512 keys: 511 before the query, and its own.

    Args:
        before: number of keys before the query's position, at least 0; None: no limit.
        after: number of keys after the query's position, at least 0; None: no limit.
        align: as in `causal`.

    >>> window(before=1, after=0) == causal() & window(before=1)   # equal, but another structure
    False
    """
    for name, size in (("before", before), ("after", after)):
        if size is not None:
            check_count(name, size, 0, "count the keys, or pass None for no limit")
    if before is None and after is None:
        raise ArgumentError(
            "before, after", "must not both be None", "no limit at all", "give one of them"
        )
    before, after = (None if size is None else min(size, _FARTHEST) for size in (before, after))
    return Window(before, after, _check_align(align))


def lengths(lengths: Tensor | Sequence[int]) -> Mask:
    """Key lengths: batch row b may attend to its first `lengths[b]` keys (right padding).

    For a row with length 3, S = 5 (the same for all queries; a length of 0 allows no key)::

        x x x . .
        x x x . .

    Args:
        lengths: (B,) integers, in keys.

    >>> lengths([3, 5]).materialize(1, 5).int().tolist()
    [[[[1, 1, 1, 0, 0]]], [[[1, 1, 1, 1, 1]]]]
    """
    return Lengths(_batch_integers("lengths", lengths))


def left_padding(padding: Tensor | Sequence[int]) -> Mask:
    """Left padding: batch row b does not attend to its first `padding[b]` keys.

    For a row with 2 padding tokens, S = 5; with `causal()` the queries that are padding attend to
    no key, and their output is zero::

        left_padding([2])   causal() & left_padding([2])
        . . x x x           . . . . .
        . . x x x           . . . . .
        . . x x x           . . x . .
        . . x x x           . . x x .
        . . x x x           . . x x x

    Args:
        padding: (B,) integers, in keys.

    >>> left_padding([2]).materialize(1, 5).int().tolist()
    [[[[0, 0, 1, 1, 1]]]]
    """
    return LeftPadding(_batch_integers("padding", padding))


def prefix(n: int) -> Mask:
    """Prefix: every query may attend to the first n keys.

    `causal() | prefix(2)` is a prefix-LM mask, bidirectional in the prefix, then causal, S = 5::

        prefix(2)     causal() | prefix(2)
        x x . . .     x x . . .
        x x . . .     x x . . .
        x x . . .     x x x . .
        x x . . .     x x x x .
        x x . . .     x x x x x

    Args:
        n: number of keys, at least 0. If it differs by batch row, use `lengths`.

    >>> prefix(2).materialize(1, 5).int().tolist()
    [[1, 1, 0, 0, 0]]
    """
    check_count("n", n, 0, "use lengths(...) for one number per batch row")
    return Prefix(min(n, _FARTHEST))


def documents(ids: Tensor | Sequence[int]) -> Mask:
    """Document mask for packed sequences: tokens attend within their own document only.

    With ids 0 0 1 1 1::

        documents(ids)   causal() & documents(ids)
        x x . . .        x . . . .
        x x . . .        x x . . .
        . . x x x        . . x . .
        . . x x x        . . x x .
        . . x x x        . . x x x

    Args:
        ids: (S,) or (B, S) integers, the document of each key; queries are the last T of them.

    >>> documents([0, 0, 1]).materialize(3, 3).int().tolist()
    [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """
    tensor = _as_tensor("ids", ids)
    _check_integers("ids", tensor)
    if tensor.ndim not in (1, 2):
        raise ShapeError(
            "ids", "must be (S,) or (B, S)", tuple(tensor.shape), "give one id per key token"
        )
    return Documents(tensor)


def cu_seqlens(cu_seqlens: Tensor | Sequence[int]) -> Mask:
    """Document mask from cumulative sequence lengths, as flash-attention's `cu_seqlens`.

    Args:
        cu_seqlens: (N + 1,) integers that begin with 0 and never decrease: document i holds keys
            cu_seqlens[i] .. cu_seqlens[i + 1] - 1. The last is S.

    >>> cu_seqlens([0, 2, 5]) == documents([0, 0, 1, 1, 1])
    True
    """
    bounds = _batch_integers("cu_seqlens", cu_seqlens).long()
    check_bounds("cu_seqlens", bounds)
    sizes = bounds.diff()
    return Documents(torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes))


def dense(allowed: Tensor) -> Mask:
    """Mask from a bool tensor. **True means "may attend"**, as in `scaled_dot_product_attention`.

    `nn.MultiheadAttention` uses the opposite polarity (True = forbidden): pass `~their_mask`.

    Args:
        allowed: bool, (T, S), or four dimensions that broadcast to (B, H, T, S).

    >>> print(dense(torch.tensor([[True, False], [True, True]])).draw(2, 2))
    x .
    x x
    """
    if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
        got = allowed.dtype if isinstance(allowed, Tensor) else type(allowed).__name__
        raise DtypeError(
            "allowed",
            "must be a bool tensor, True = may attend",
            got,
            "pass an additive mask as attention(bias=...)",
        )
    check_is_plain("allowed", allowed)
    if allowed.ndim not in (2, 4):
        raise ShapeError(
            "allowed",
            "must have 2 dimensions (T, S) or 4 (B, H, T, S)",
            tuple(allowed.shape),
            "unsqueeze the missing ones: mask[:, None] if it differs by batch row",
        )
    return Dense(allowed)


def custom(
    fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    *,
    batch: int = 1,
    heads: int = 1,
    align: Align = "end",
) -> Mask:
    """Mask from a function of absolute positions. Only `reference` and `flex` run it.

    A combination of the other functions is faster, since backends use its structure. `custom` is
    for all other rules; here every second key, and the query's own::

        custom(lambda batch, head, query, key: (key % 2 == 0) | (key == query))
        x . x . x
        x x x . x
        x . x . x
        x . x x x
        x . x . x

    Args:
        fn: given integer tensors that broadcast against each other (batch row, head, position of
            the query, position of the key), returns a bool tensor, True = may attend. The order
            is that of `mask_mod` in `torch.nn.attention.flex_attention`.
        batch: the number of batch rows, or 1 if fn does not depend on the batch row.
        heads: the number of heads, or 1 if fn does not depend on the head.
        align: as in `causal`; "start" counts queries from 0, as `flex_attention` does.

    Raises:
        DtypeError, ShapeError: fn is not a function, or returns another dtype or shape (raised
            when it is called).

    >>> def strided(batch, head, query, key):
    ...     return (query - key) % 2 == 0
    >>> (causal() & custom(strided)).materialize(3, 3).int().tolist()
    [[[[1, 0, 0], [0, 1, 0], [1, 0, 1]]]]
    """
    if not callable(fn):
        raise DtypeError(
            "fn",
            "must be a function of (batch, head, query, key)",
            type(fn).__name__,
            "wrap a bool tensor in polyhead.mask.dense instead",
        )
    for name, size in (("batch", batch), ("heads", heads)):
        check_count(name, size, 1, f"pass the number of {name}, or 1")
    return Custom(fn, batch, heads, _check_align(align))


def check_bounds(name: str, bounds: Tensor) -> None:
    """Raise unless `bounds` are cumulative lengths: they begin with 0 and never decrease."""
    if not len(bounds) or bounds[0] != 0 or bool((bounds.diff() < 0).any()):
        raise ArgumentError(
            name,
            "must begin with 0 and never decrease",
            bounds.tolist(),
            "pass the cumulative sum of the lengths, with a leading 0",
        )


def _batch_integers(name: str, values: Tensor | Sequence[int]) -> Tensor:
    tensor = _as_tensor(name, values)
    _check_integers(name, tensor)
    if tensor.ndim != 1:
        raise ShapeError(
            name, "must have one entry per batch row, (B,)", tuple(tensor.shape), "flatten it"
        )
    return tensor


def _as_tensor(name: str, values: Tensor | Sequence[int]) -> Tensor:
    if isinstance(values, Tensor):
        check_is_plain(name, values)
        return values
    try:
        # An empty list would become float32.
        return torch.tensor(values, dtype=None if len(values) else torch.int64)
    except (TypeError, ValueError, RuntimeError):
        raise DtypeError(
            name, "must be a tensor or a list of integers", repr(values), "write [n] for one"
        ) from None


def _check_integers(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.int32, torch.int64):
        raise DtypeError(name, "must be int32 or int64", tensor.dtype, "convert with .long()")


def _check_align(align: Align) -> Align:
    if align not in ("end", "start"):
        raise ArgumentError("align", 'must be "end" or "start"', repr(align), "see mask.causal")
    return align
