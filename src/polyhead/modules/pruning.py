"""Fewer heads for good: weights without the rows and columns of those that are gone."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from polyhead.errors import ArgumentError
from polyhead.modules.weights import check_in_place, make_linear, make_parameter

if TYPE_CHECKING:
    from polyhead.modules.multihead import MultiHeadAttention

__all__ = [
    "KeptHeads",
    "check_can_be_pruned",
    "kept_heads",
    "prune_heads",
    "without_columns",
    "without_rows",
]


@dataclass(frozen=True)
class KeptHeads:
    """What stays of a layer's heads.

    Attributes:
        queries: numbers of the query heads that stay, in order.
        keys: for each new key head, which old one it is.
    """

    queries: list[int]
    keys: list[int]


def kept_heads(
    num_heads: int, num_kv_heads: int, heads: Collection[int], *, repeat_keys: bool = False
) -> KeptHeads:
    """What stays when query heads go. A key head that no query head reads goes with them.

    Args:
        num_heads, num_kv_heads: of the layer as it is.
        heads: the query heads to remove.
        repeat_keys: if the key heads that stay would serve different numbers of query heads,
            repeat some of them until the numbers are even; else that is an error.

    Raises:
        ArgumentError: there are no such heads, none would stay, or the rest is uneven.

    >>> kept_heads(6, 3, {0, 1, 2, 4}).keys            # heads 3 and 5 read key heads 1 and 2
    [1, 2]
    >>> kept_heads(6, 2, {0}, repeat_keys=True).keys   # 2 query heads, then 3
    [0, 0, 1, 1, 1]
    """
    heads = list(heads)  # a generator would be gone after one look
    unknown = [head for head in heads if head not in range(num_heads)]
    if unknown:
        raise ArgumentError(
            "heads", f"must be from 0 to {num_heads - 1}", repr(unknown[0]), "count query heads"
        )
    queries = [head for head in range(num_heads) if head not in heads]
    if not queries:
        raise ArgumentError("heads", "must leave one", f"all {num_heads}", "keep a head")
    group = num_heads // num_kv_heads
    readers = [sum(head // group == key for head in queries) for key in range(num_kv_heads)]
    served = {count for count in readers if count}
    if len(served) > 1 and not repeat_keys:
        raise ArgumentError(
            "heads",
            "must leave as many query heads to each key head that stays",
            f"{readers} for key heads 0 to {num_kv_heads - 1}",
            "remove as many of each group or whole groups, or pass repeat_keys=True",
        )
    even = math.gcd(*served)
    keys = [key for key, count in enumerate(readers) for _ in range(count // even)]
    return KeptHeads(queries, keys)


def prune_heads(
    mha: MultiHeadAttention, heads: Collection[int], *, repeat_keys: bool = False
) -> MultiHeadAttention:
    """Remove query heads for good: smaller weights, and the same output as if they gave zeros.

    Key heads that no query head reads any more go with them; d_out stays. The module is then one of
    fewer heads: MultiHeadAttention(..., num_heads=, num_kv_heads=, head_dim=) of its new numbers
    loads its state_dict.

    Args:
        mha: changed in place.
        heads: numbers of the query heads to remove; those that stay are numbered anew.
        repeat_keys: if the key heads that stay would serve different numbers of query heads, repeat
            some of them until the numbers are even; else that is an error.

    Raises:
        ArgumentError: there are no such heads, none would stay, or the rest is uneven; or the
            module has no output projection, ALiBi's slopes, or projections that are no plain
            nn.Linear in place (adapters, hooks, offloaded weights).

    >>> import polyhead as ph
    >>> mha = ph.MultiHeadAttention(8, 8, context_length=4, dropout=0.0, num_heads=4)
    >>> mha.prune_heads([0, 2]).W_query.weight.shape
    torch.Size([4, 8])
    """
    check_can_be_pruned(mha)
    kept = kept_heads(mha.num_heads, mha.num_kv_heads, heads, repeat_keys=repeat_keys)
    fused = mha.fused
    mha.unfuse()
    mha.W_query = without_rows(mha.W_query, kept.queries, mha.head_dim)
    mha.W_key = without_rows(mha.W_key, kept.keys, mha.head_dim)
    mha.W_value = without_rows(mha.W_value, kept.keys, mha.value_head_dim)
    mha.out_proj = without_columns(mha.out_proj, kept.queries, mha.value_head_dim)
    if mha.W_gate is not None:
        mha.W_gate = without_rows(mha.W_gate, kept.queries, mha.value_head_dim)
    if mha.sinks is not None:
        mha.sinks = make_parameter(mha.sinks.detach()[kept.queries], mha.sinks)
    mha.num_heads, mha.num_kv_heads = len(kept.queries), len(kept.keys)
    return mha.fuse() if fused else mha


def without_rows(linear: nn.Module | None, heads: list[int], size: int) -> nn.Linear:
    """A linear layer that gives only these heads, of `size` features each, in this order."""
    assert isinstance(linear, nn.Linear)
    rows = _features(heads, size, linear.weight)
    bias = None if linear.bias is None else linear.bias.detach()[rows]
    return make_linear(linear.weight.detach()[rows], bias, linear)


def without_columns(linear: nn.Module | None, heads: list[int], size: int) -> nn.Linear:
    """A linear layer that reads only these heads, of `size` features each."""
    assert isinstance(linear, nn.Linear)
    columns = _features(heads, size, linear.weight)
    bias = None if linear.bias is None else linear.bias.detach().clone()
    return make_linear(linear.weight.detach()[:, columns].contiguous(), bias, linear)


def _features(heads: list[int], size: int, weight: Tensor) -> Tensor:
    first = torch.tensor(heads, device=weight.device) * size
    return (first[:, None] + torch.arange(size, device=weight.device)).flatten()


def check_can_be_pruned(mha: MultiHeadAttention) -> None:
    """Raise ArgumentError where fewer heads could not keep the function of those that stay."""
    if mha.out_proj is None:
        raise ArgumentError(
            "prune_heads()",
            "needs an output projection, which keeps d_out as it is",
            "out_proj=False",
            "build the module with one",
        )
    if mha.alibi:
        raise ArgumentError(
            "prune_heads()",
            "cannot keep the slopes of the heads that stay",
            "alibi=True, whose slopes follow from the number of heads",
            "use polyhead.look.ablate",
        )
    names = ("W_qkv",) if mha.fused else ("W_query", "W_key", "W_value")
    check_in_place("prune_heads()", mha, (*names, "out_proj", "W_gate"))
