"""`attention()` with the options of flash-attn: the lse of empty rows, slopes per row, S_dmask."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import polyhead.mask
from polyhead.cache_view import CacheView
from polyhead.call import AuxRequest
from polyhead.drop_in.flash_attn.options import Options
from polyhead.functional import attention

__all__ = ["RaggedRows", "attend", "dropped_weights"]


class RaggedRows(NamedTuple):
    """Rows of different lengths; queries of a row are aligned with its last key.

    Attributes:
        lengths: (B,) int64 number of keys of each row; None: all, or those of the `CacheView`.
        query_offset: (B,) int64 position of query 0 of each row; None: from the lengths.
        leftpad: (B,) number of keys at the beginning of each row that are padding; None: none.
    """

    lengths: Tensor | None = None
    query_offset: Tensor | None = None
    leftpad: Tensor | None = None

    def row(self, b: int) -> RaggedRows:
        return RaggedRows(*(None if x is None else x[b : b + 1] for x in self))


_WHOLE = RaggedRows()


def attend(
    query: Tensor,
    key: Tensor | CacheView,
    value: Tensor | CacheView,
    options: Options,
    rows: RaggedRows = _WHOLE,
    *,
    lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of queries over keys.

    Args:
        query: (B, H, T, D).
        key, value: (B, G, S, D) and (B, G, S, E).
        options: of the call.
        rows: lengths of the batch rows, if they differ.
        lse: return the log-sum-exp, too.

    Returns:
        output (B, H, T, E), and lse (B, H, T) or None. A query without keys has zeros, and an lse
        of +inf, as in flash-attn.
    """
    if options.slopes is not None and options.slopes.ndim == 2:
        return _attend_row_by_row(query, key, value, options, rows, lse)
    if rows.lengths is not None:
        options = options.within(polyhead.mask.lengths(rows.lengths))
    if rows.leftpad is not None:
        options = options.within(polyhead.mask.left_padding(rows.leftpad))
    call = partial(
        attention,
        query,
        key,
        value,
        mask=options.mask,
        scale=options.scale,
        softcap=options.softcap,
        alibi_slopes=options.slopes,
        dropout=options.dropout,
        query_offset=rows.query_offset,
    )
    if not lse:
        return call(), None
    output, aux = call(return_aux=AuxRequest(lse=True))
    return output, aux.lse.masked_fill(aux.lse == -torch.inf, torch.inf)


def dropped_weights(
    query: Tensor, key: Tensor, value: Tensor, options: Options, rows: RaggedRows = _WHOLE
) -> Tensor:
    """S_dmask (B, H, T, S) of the call that `attend` runs next: weights, negative if dropped.

    The random numbers are those of the next call, which still draws them: values that are rows of
    the identity give the kept weights, and a call without dropout gives the others.
    """
    S, E = key.shape[2], value.shape[-1]
    identity = torch.eye(S, dtype=value.dtype, device=value.device)

    def weights(dropout: float) -> Tensor:
        columns = []
        for first in range(0, S, max(E, 1)):
            one_hot = torch.zeros_like(value[:1, :1])
            part = identity[:, first : first + E]
            one_hot[..., : part.shape[-1]] = part
            with torch.random.fork_rng([query.device] if query.is_cuda else []):
                # The same shapes and the same need of gradients: the same backend.
                probe = one_hot.expand(value.shape).requires_grad_(value.requires_grad)
                output, _ = attend(query, key, probe, replace(options, dropout=dropout), rows)
            columns.append(output.detach()[..., : part.shape[-1]])
        return torch.cat(columns, dim=-1) if columns else query.new_zeros(*query.shape[:3], 0)

    every, kept = weights(0.0), weights(options.dropout)
    return torch.where((kept == 0) & (every > 0), -every, every)


def _attend_row_by_row(
    query: Tensor,
    key: Tensor | CacheView,
    value: Tensor | CacheView,
    options: Options,
    rows: RaggedRows,
    lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """One call per batch row, each with its own slopes. No row is copied."""
    outputs, sums = [], []
    for b in range(len(query)):
        output, row_lse = attend(
            query[b : b + 1],
            _row(key, b),
            _row(value, b),
            options.for_rows(torch.tensor([b], device=query.device)),
            rows.row(b),
            lse=lse,
        )
        outputs.append(output)
        sums.append(row_lse)
    return torch.cat(outputs), torch.cat(sums) if lse else None  # type: ignore[arg-type]


def _row(x: Tensor | CacheView, b: int) -> Tensor | CacheView:
    if isinstance(x, Tensor):
        return x[b : b + 1]
    table = x.block_table
    return replace(
        x,
        data=x.data[b : b + 1] if table is None else x.data,
        block_table=None if table is None else table[b : b + 1],
        lengths=None if x.lengths is None else x.lengths[b : b + 1],
        materialize=lambda: x.materialize()[b : b + 1],
    )
