"""Masks: who may attend to whom.

A mask is a small immutable value. **True means "may attend"**, always. Masks combine with `&`
(both must allow), `|` (either allows) and `~` (the opposite), and keep their structure, so that a
backend can ask what a mask is made of without building a T x S tensor. `materialize` is the truth
every backend is held to.

Positions are absolute: query t of T queries against S keys stands at position S - T + t, so that
the last query stands at the last key. (`align="start"` puts query t at position t instead: the
upper-left rule of `scaled_dot_product_attention` and ONNX.)

In the drawings a row is a query, a column a key, `x` may attend and `.` may not.
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

# Beyond any number of tokens, and far from overflow when a position is added.
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
    """Each query may attend to keys at its own position and before.

    With T = 3 queries and S = 5 keys (two keys came before, say from a cache)::

        causal()        causal(align="start")
        x x x . .       x . . . .
        x x x x .       x x . . .
        x x x x x       x x x . .

    With T = 4 and S = 2 the first two queries of `causal()` stand before every key and see
    nothing; their output is zero::

        causal()        causal(align="start")
        . .             x .
        . .             x x
        x .             x x
        x x             x x

    Args:
        align: "end" (default, flash-attention's rule: the last query stands at the last key) or
            "start" (the rule of `scaled_dot_product_attention` and ONNX: query t at key t).

    >>> causal()
    causal()
    """
    return Causal(_check_align(align))


def window(before: int | None = None, after: int | None = None, *, align: Align = "end") -> Mask:
    """Each query may attend to `before` keys before it, itself, and `after` keys after it.

    With T = S = 5::

        window(before=1)    window(before=1, after=1)   causal() & window(before=1)
        x x x x x           x x . . .                   x . . . .
        x x x x x           x x x . .                   x x . . .
        . x x x x           . x x x .                   . x x . .
        . . x x x           . . x x x                   . . x x .
        . . . x x           . . . x x                   . . . x x

    So `causal() & window(before=511)` sees 512 keys: 511 before, and itself.

    Args:
        before: how many keys before the query's position, at least 0; None: no limit.
        after: how many keys after the query's position, at least 0; None: no limit.
        align: as in `causal`.

    >>> window(before=1, after=0) == causal() & window(before=1)   # same rule, other structure
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
    """Batch row b may attend to its first `lengths[b]` keys: right padding is never seen.

    For a row with length 3, S = 5 (all queries alike; a length of 0 sees nothing)::

        x x x . .
        x x x . .

    Args:
        lengths: (B,) integers, in keys.

    >>> lengths([3, 5]).materialize(1, 5).int().tolist()
    [[[[1, 1, 1, 0, 0]]], [[[1, 1, 1, 1, 1]]]]
    """
    return Lengths(_batch_integers("lengths", lengths))


def left_padding(padding: Tensor | Sequence[int]) -> Mask:
    """Batch row b never sees its first `padding[b]` keys: padding on the left.

    For a row with 2 padding tokens, S = 5; with `causal()` the queries that are padding themselves
    see nothing, and their output is zero::

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
    """Every query may attend to the first n keys: the part of a prompt that all may read.

    `causal() | prefix(2)` reads the prefix both ways and the rest causally, S = 5::

        prefix(2)     causal() | prefix(2)
        x x . . .     x x . . .
        x x . . .     x x . . .
        x x . . .     x x x . .
        x x . . .     x x x x .
        x x . . .     x x x x x

    Args:
        n: how many keys, at least 0. For a number that differs by batch row use `lengths`.

    >>> prefix(2).materialize(1, 5).int().tolist()
    [[1, 1, 0, 0, 0]]
    """
    check_count("n", n, 0, "use lengths(...) for one number a batch row")
    return Prefix(min(n, _FARTHEST))


def documents(ids: Tensor | Sequence[int]) -> Mask:
    """Tokens attend within their own document: packed sequences never see each other.

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
            "ids", "must be (S,) or (B, S)", tuple(tensor.shape), "give one id a key token"
        )
    return Documents(tensor)


def cu_seqlens(cu_seqlens: Tensor | Sequence[int]) -> Mask:
    """`documents`, told by where each begins, as flash-attention's `cu_seqlens` does.

    Args:
        cu_seqlens: (N + 1,) integers that begin with 0 and never fall: document i holds keys
            cu_seqlens[i] to cu_seqlens[i + 1] - 1. The last is S.

    >>> cu_seqlens([0, 2, 5]) == documents([0, 0, 1, 1, 1])
    True
    """
    bounds = _batch_integers("cu_seqlens", cu_seqlens).long()
    sizes = bounds.diff()
    if not len(bounds) or bounds[0] != 0 or bool((sizes < 0).any()):
        raise ArgumentError(
            "cu_seqlens",
            "must begin with 0 and never fall",
            bounds.tolist(),
            "pass the cumulative sum of the lengths, with 0 before it",
        )
    return Documents(torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes))


def dense(allowed: Tensor) -> Mask:
    """A mask written out. **True means "may attend"**, as in `scaled_dot_product_attention`.

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
            "pass numbers that are added to the scores as attention(bias=...)",
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
    """Any rule, as a function of absolute positions. Only `reference` and `flex` run it.

    A rule that the other functions here can say is faster: their structure is known. `custom` is
    for the rest; here every second key, and the query's own::

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
        batch: how many batch rows fn tells apart; 1: it does not look at the batch row.
        heads: how many heads fn tells apart; 1: it does not look at the head.
        align: as in `causal`; "start" counts queries from 0, as `flex_attention` does.

    Raises:
        DtypeError, ShapeError: fn is no function, or returned something else (when it is called).

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
        check_count(name, size, 1, "count them")
    return Custom(fn, batch, heads, _check_align(align))


def _batch_integers(name: str, values: Tensor | Sequence[int]) -> Tensor:
    tensor = _as_tensor(name, values)
    _check_integers(name, tensor)
    if tensor.ndim != 1:
        raise ShapeError(
            name, "must have one entry a batch row, (B,)", tuple(tensor.shape), "flatten it"
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
