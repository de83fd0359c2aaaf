"""Packed documents: arguments of transformers' callers as a documents mask."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

import polyhead.mask
from polyhead.errors import ArgumentError, ShapeError
from polyhead.integrations.transformers.mask_functions import has_numbers
from polyhead.mask import Mask

__all__ = ["PACKING", "is_traced", "packed_documents", "restarting_documents"]

# Their names in transformers, for `flash_attn_varlen_func` and for state-space layers.
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def packed_documents(
    query_shape: torch.Size,
    S: int,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Mask | None:
    """Return the mask of packed documents; None if nothing is packed.

    Args:
        query_shape: (B, H, T, D).
        S: keys.
        cu_seq_lens_q, cu_seq_lens_k: (N + 1,) the start of each document in the B * T tokens of
            all rows concatenated, then the end of the last.
        max_length_q, max_length_k: the longest document's tokens.
        seq_idx: (1 or B, S) the document of each token.

    Raises:
        ArgumentError, ShapeError: they do not fit the rows, or one another. (Not compared in a
            traced graph.)
    """
    bounds = {"cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k}
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    if not given and seq_idx is None:
        return None
    B, _, T, _ = query_shape
    if T != S:
        raise ShapeError(
            ", ".join(given) or "seq_idx",
            f"must come with equal numbers of queries and keys: got T = {T}, S = {S}",
            "packed rows",
            "call the model on whole rows, with use_cache=False and without logits_to_keep",
        )
    lengths = {"max_length_q": max_length_q, "max_length_k": max_length_k}
    ids = [_ids(name, bound, B, S, lengths) for name, bound in given.items()]
    if seq_idx is not None:
        ids.append(_checked_ids(seq_idx, B, S))
    names = [*given, *(["seq_idx"] if seq_idx is not None else [])]
    for name, other in zip(names[1:], ids[1:], strict=True):
        if not is_traced(ids[0], other) and not torch.equal(*map(_begins, (ids[0], other))):
            raise ArgumentError(
                name,
                f"must name the documents that {names[0]} names",
                "others",
                "pass one of them, or the same documents in both",
            )
    return polyhead.mask.documents(ids[0])


def restarting_documents(position_ids: Tensor | None, B: int, T: int, S: int) -> Mask | None:
    """Return the documents of positions that restart; None: one document per row.

    As transformers' `find_packed_sequence_indices`, for calls without a mask that includes them.
    """
    if position_ids is None or position_ids.ndim != 2 or not 1 < T == S == position_ids.shape[1]:
        return None
    if position_ids.shape[0] not in (1, B) or is_traced(position_ids):
        return None
    ids = (position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1).cumsum(dim=1)
    return polyhead.mask.documents(ids.expand(B, S)) if bool((ids[:, -1] > 0).any()) else None


def is_traced(*given: Any) -> bool:
    """True if values cannot be read: a graph is being traced, or a tensor has no data."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[no-untyped-call, attr-defined]
        return True
    return any(isinstance(x, Tensor) and not has_numbers(x) for x in given)


def _ids(
    name: str, bounds: Tensor, B: int, S: int, lengths: dict[str, int | Tensor | None]
) -> Tensor:
    """Return the document of each token, (B, S)."""
    bounds = torch.as_tensor(bounds)
    if bounds.ndim != 1 or len(bounds) < 2 or bounds.is_floating_point():
        raise ShapeError(
            name,
            "must be integers of shape (documents + 1,)",
            f"{bounds.dtype} {tuple(bounds.shape)}",
            "pass the cumulative sum of the lengths, with 0 before it",
        )
    if not is_traced(bounds):
        _check_bounds(name, bounds.tolist(), B, S)
        longest = "max_length" + name.removeprefix("cu_seq_lens")
        _check_longest(longest, lengths[longest], int(bounds.diff().max()))
    token = torch.arange(B * S, device=bounds.device)
    return torch.searchsorted(bounds[1:].long().contiguous(), token, right=True).view(B, S)


def _check_bounds(name: str, bounds: list[int], B: int, S: int) -> None:
    falls = any(stop < start for start, stop in itertools.pairwise(bounds))
    if bounds[0] != 0 or falls or bounds[-1] != B * S:
        raise ArgumentError(
            name,
            f"must begin with 0, never fall, and end with B * T = {B} * {S} = {B * S}",
            bounds,
            "count every token of the rows: padding is a document of its own",
        )
    crossed = [row * S for row in range(1, B) if row * S not in bounds]
    if crossed:
        raise ArgumentError(
            name,
            f"must begin a document where a row begins, at {crossed[0]}",
            bounds,
            "pack whole documents into a row, or pass one row",
        )


def _check_longest(name: str, given: int | Tensor | None, longest: int) -> None:
    if given is not None and not is_traced(given) and int(given) < longest:
        raise ArgumentError(
            name,
            f"must be at least the longest document's {longest} tokens",
            int(given),
            "leave it out, or pass that of these documents",
        )


def _checked_ids(seq_idx: Tensor, B: int, S: int) -> Tensor:
    if seq_idx.ndim != 2 or seq_idx.shape[0] not in (1, B) or seq_idx.shape[1] != S:
        raise ShapeError(
            "seq_idx",
            f"must be (B, T) = ({B}, {S})",
            tuple(seq_idx.shape),
            "pass one document per token",
        )
    return seq_idx.expand(B, S)


def _begins(ids: Tensor) -> Tensor:
    """Return (B, S - 1), True if the next token begins another document."""
    return ids.diff(dim=1) != 0
