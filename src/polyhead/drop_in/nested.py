"""Nested tensors, whose batch rows are each of its own length: padded, attended to, cut again."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from polyhead.errors import ArgumentError, ShapeError

__all__ = ["attend_nested", "is_nested"]


def is_nested(*inputs: Tensor) -> bool:
    return any(isinstance(x, Tensor) and x.is_nested for x in inputs)


def attend_nested(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    has_mask: bool,
    need_weights: bool,
    is_causal: bool,
) -> Tensor:
    """What the module gives for nested tensors, as one of the query's lengths and layout.

    `nn.TransformerEncoder` makes one of its input in inference, of what is not padding.

    Raises:
        ArgumentError, ShapeError: it is asked for what rows of different lengths do not have.
    """
    _check(module, (query, key, value), has_mask, need_weights)
    padded = {id(x): pad_sequence(list(x.unbind()), batch_first=True) for x in (query, key, value)}
    lengths = torch.tensor([len(row) for row in key.unbind()], device=key.device)
    key_tokens = torch.arange(padded[id(key)].shape[1], device=key.device)
    y, _ = module.forward(
        padded[id(query)],
        padded[id(key)],
        padded[id(value)],
        key_padding_mask=key_tokens >= lengths[:, None],
        need_weights=False,
        is_causal=is_causal,
    )
    rows = [y[b, : len(row)] for b, row in enumerate(query.unbind())]
    return torch.nested.as_nested_tensor(rows, layout=query.layout)


def _check(
    module: nn.MultiheadAttention, inputs: tuple[Tensor, ...], has_mask: bool, need_weights: bool
) -> None:
    remedy = "pad the rows, and pass a key_padding_mask"
    if not module.batch_first:
        raise ArgumentError("batch_first", "must be True for nested tensors", False, remedy)
    if not all(x.is_nested for x in inputs):
        raise ArgumentError("query, key, value", "must all be nested, or none", "some", remedy)
    if need_weights:
        raise ArgumentError("need_weights", "must be False for nested tensors", True, remedy)
    if has_mask:
        rule = "must be None for nested tensors, which have no padding"
        raise ArgumentError("attn_mask, key_padding_mask", rule, "a mask", remedy)
    if len({len(x.unbind()) for x in inputs}) > 1:
        sizes = [len(x.unbind()) for x in inputs]
        raise ShapeError("query, key, value", "must have the same batch rows", sizes, remedy)
