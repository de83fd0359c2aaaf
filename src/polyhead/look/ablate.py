"""Head ablation: heads switched off in a model temporarily."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from polyhead.errors import ArgumentError
from polyhead.look.layers import (
    AttentionLayer,
    Head,
    attention_layers,
    check_heads,
    check_not_compiled,
)
from polyhead.look.padding import Padding

__all__ = ["How", "ablate"]

How = Literal["zero", "mean"]
M = TypeVar("M", bound=nn.Module)


@contextmanager
def ablate(model: M, heads: Collection[Head], how: How = "zero") -> Iterator[M]:
    """Switch off some heads of a model within a `with` block.

    A head's output is replaced at the input of the output projection, so this works with any
    kernel and any number of query heads per KV head. Gradients flow through the other heads.

    Args:
        model: built of polyhead's modules, or of transformers, whatever attention it runs.
        heads: (layer, head) pairs; layers count from 0 (`attention_layers`), heads are query heads.
        how: "zero": the head adds nothing. "mean": it adds its average over the tokens of the same
            sequence in this forward, so that only the differences between tokens are lost. Padding
            is left out of the average: tokens masked by attention_mask (B, S), or by `lengths` and
            `left_padding` for our modules; without a mask all tokens count. (With one token, as in
            generation with a cache, the average is that token's.)

    Raises:
        ArgumentError: the model has no such heads or is compiled; or, in a forward, a layer's
            output projection did not run, or how="mean" and its padding is not certain, as with
            packed sequences and masks of other shapes.

    >>> import polyhead as ph
    >>> mha = ph.MultiHeadAttention(8, 8, context_length=4, dropout=0.0, num_heads=2)
    >>> x = torch.randn(1, 4, 8)
    >>> with ph.look.ablate(mha, {(0, 1)}):
    ...     y = mha(x)
    >>> torch.allclose(y, mha.head_contributions(x)[:, 0] + mha.out_proj.bias, atol=1e-6)
    True
    """
    check_not_compiled(model)
    if how not in ("zero", "mean"):
        raise ArgumentError("how", 'must be "zero" or "mean"', repr(how), "choose one")
    layers = attention_layers(model)
    check_heads(heads, layers)
    asked = [layer for layer in layers if any(index == layer.index for index, _ in heads)]
    ran: set[int] = set()

    def check_that_all_ran(*_: Any) -> None:
        for layer in asked:
            if layer.index not in ran:
                raise ArgumentError(
                    "heads",
                    "must be of layers that run",
                    f"layer {layer.index} ({layer.name}), whose output projection did not",
                    "leave it out",
                )
        ran.clear()

    padding = Padding(model, asked)
    with ExitStack() as stack:
        if how == "mean":
            stack.enter_context(padding.watching())
        for layer in asked:
            gone = [head for index, head in heads if index == layer.index]
            stack.callback(layer.on_heads(_without(layer, gone, how, padding, ran)).remove)
        stack.callback(model.register_forward_hook(check_that_all_ran).remove)
        yield model


def _without(
    layer: AttentionLayer, heads: list[int], how: How, padding: Padding, ran: set[int]
) -> Callable[[Tensor], Tensor]:
    def see(merged: Tensor) -> Tensor:
        ran.add(layer.index)
        by_head = merged.unflatten(-1, (layer.num_heads, -1))
        gone = torch.zeros(layer.num_heads, 1, dtype=torch.bool, device=merged.device)
        gone[heads] = True
        if how == "zero":
            instead = by_head.new_zeros(())
        else:
            instead = _mean(by_head, padding.real_tokens(layer, merged))
        return torch.where(gone, instead, by_head).flatten(-2)

    return see


def _mean(by_head: Tensor, real: Tensor | None) -> Tensor:
    """Mean over the real tokens of each sequence, (B, 1, H, E); zeros where there are none."""
    if real is None:
        return by_head.mean(dim=1, keepdim=True)
    total = by_head.masked_fill(~real[..., None, None], 0.0).sum(dim=1, keepdim=True)
    return total / real.sum(dim=1).clamp(min=1)[:, None, None, None].to(by_head.dtype)
