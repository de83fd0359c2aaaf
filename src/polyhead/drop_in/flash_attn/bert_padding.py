"""Functions of `flash_attn.bert_padding`: padded rows to packed sequences, and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.drop_in.flash_attn.validate import check_integers
from polyhead.errors import ArgumentError, DtypeError, ShapeError, check_count
from polyhead.validate import check_is_tensor

__all__ = [
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input[indices], differentiable.

    Args:
        input: (n, ...), of any number of dimensions.
        indices: (m,) integers.

    >>> index_first_axis(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2, 0])).tolist()
    [[3.0], [1.0]]
    """
    check_is_tensor("input", input)
    check_integers("indices", indices, "(m,)", (-1,), input)
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros (first_axis_dim, ...) with `values` at `indices`, differentiable.

    Args:
        values: (m, ...).
        indices: (m,) different integers.
        first_axis_dim: size of the first dimension of the result.

    >>> index_put_first_axis(torch.tensor([[1.0], [2.0]]), torch.tensor([2, 0]), 3).tolist()
    [[2.0], [0.0], [1.0]]
    """
    check_is_tensor("values", values)
    check_count("first_axis_dim", first_axis_dim, 0)
    check_integers("indices", indices, "(m,)", (len(values),), values)
    zeros = values.new_zeros(first_axis_dim, *values.shape[1:])
    return zeros.index_copy(0, indices.long(), values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack the tokens that a padding mask selects.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen) bool or integers; 1: a token, 0: padding.
        unused_mask: (batch, seqlen) the same; 1: a token that is packed and not counted as used.

    Returns:
        The packed tokens (total, ...); their indices (total,) in the batch * seqlen tokens;
        cu_seqlens (batch + 1,) int32; the length of the longest sequence; and the number of used
        tokens per row, (batch,) int32.

    >>> tokens, indices, cu_seqlens, max_seqlen, used = unpad_input(
    ...     torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), torch.tensor([[1, 1], [0, 1]])
    ... )
    >>> tokens.flatten().tolist(), indices.tolist(), cu_seqlens.tolist(), max_seqlen
    ([1.0, 2.0, 4.0], [0, 1, 3], [0, 2, 3], 2)
    """
    _check_rows("hidden_states", hidden_states)
    shape = tuple(hidden_states.shape[:2])
    _check_mask("attention_mask", attention_mask, shape)
    packed = attention_mask
    if unused_mask is not None:
        _check_mask("unused_mask", unused_mask, shape)
        packed = attention_mask + unused_mask
    lengths = packed.sum(dim=-1, dtype=torch.int32)
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = packed.flatten().nonzero().flatten()
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, _cumulative(lengths), _longest(lengths), used


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Pack rows that hold several sequences each, followed by padding.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: (batch, seqlen) integers: the lengths of a row's sequences, then
            zeros.

    Returns:
        The packed tokens (total, ...); their indices (total,) in the batch * seqlen tokens;
        cu_seqlens (sequences + 1,) int32; and the length of the longest sequence.

    >>> lengths = torch.tensor([[2, 1, 0, 0], [3, 0, 0, 0]])
    >>> _, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(
    ...     torch.ones(2, 4, 8), lengths
    ... )
    >>> indices.tolist(), cu_seqlens.tolist(), max_seqlen
    ([0, 1, 2, 4, 5, 6], [0, 2, 3, 6], 3)
    """
    name = "attention_mask_in_length"
    _check_rows("hidden_states", hidden_states)
    B, T = hidden_states.shape[:2]
    check_integers(name, attention_mask_in_length, "(batch, seqlen)", (B, T), hidden_states)
    totals = attention_mask_in_length.sum(dim=-1)
    if bool((attention_mask_in_length < 0).any()) or bool((totals > T).any()):
        raise ArgumentError(
            name,
            f"must have rows of lengths whose sum is at most seqlen = {T}",
            totals.tolist(),
            "give the length of each sequence, then zeros",
        )
    indices = (torch.arange(T, device=totals.device) < totals[:, None]).flatten().nonzero()
    flat = attention_mask_in_length.flatten()
    lengths = flat[flat > 0].int()
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices.flatten())
    return tokens, indices.flatten(), _cumulative(lengths), _longest(lengths)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Unpack tokens into padded rows; padding is 0.

    Args:
        hidden_states: (total, ...).
        indices: (total,) the index of each in the batch * seqlen tokens, from `unpad_input`.
        batch, seqlen: sizes of the result.

    Returns:
        (batch, seqlen, ...).

    >>> pad_input(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([0, 1, 3]), 2, 2)[..., 0]
    tensor([[1., 2.],
            [0., 4.]])
    """
    check_count("batch", batch, 0)
    check_count("seqlen", seqlen, 0)
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.unflatten(0, (batch, seqlen))  # type: ignore[no-any-return]


def _check_rows(name: str, x: Tensor) -> None:
    check_is_tensor(name, x)
    if x.ndim < 2:
        raise ShapeError(name, "must be (batch, seqlen, ...)", tuple(x.shape), "add the batch")


def _check_mask(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    check_is_tensor(name, mask)
    if mask.is_floating_point() or mask.is_complex():
        remedy = "compare: mask == 1, or mask == 0 for an additive one"
        raise DtypeError(name, "must be bool or integers", mask.dtype, remedy)
    if mask.shape != shape:
        raise ShapeError(
            name, f"must be (batch, seqlen) = {shape}", tuple(mask.shape), "pass the 2-D mask"
        )
    if mask.dtype != torch.bool and bool(((mask != 0) & (mask != 1)).any()):
        raise ArgumentError(
            name, "must be 0 or 1", sorted(set(mask.flatten().tolist()))[:8], "compare: mask != 0"
        )


def _cumulative(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(dim=0, dtype=torch.int32), (1, 0))


def _longest(lengths: Tensor) -> int:
    return int(lengths.max()) if len(lengths) else 0
