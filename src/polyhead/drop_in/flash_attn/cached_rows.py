"""Rows of a cache, of different lengths: contiguous, selected by index, or paged."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from polyhead.cache_view import CacheView
from polyhead.drop_in.flash_attn.validate import check_integers, check_range
from polyhead.errors import ShapeError

__all__ = ["check_pages", "end_aligned", "gather_rows", "read_rows"]


def end_aligned(lengths: Tensor, longest: int) -> Tensor:
    """Token of each column, (n, longest), if rows end at the last column; negative: padding."""
    columns = torch.arange(longest, device=lengths.device)
    return columns + (lengths - longest)[:, None]


def gather_rows(cache: Tensor, table: Tensor | None, lengths: Tensor) -> Tensor:
    """Copy the tokens of each row, so that all rows end at the last column.

    Args:
        cache: (rows, tokens, G, size), or with a table (pages, page size, G, size).
        table: (n, columns) the page of each `page size` tokens of a row; None: row b is cache[b].
        lengths: (n,) int64, the tokens of each row.

    Returns:
        (n, G, longest, size). Columns before a row's first token repeat it.
    """
    longest = int(lengths.max()) if len(lengths) else 0
    token = end_aligned(lengths, longest).clamp(min=0)
    size = cache.shape[1]
    if table is None:
        page = torch.arange(len(lengths), device=cache.device)[:, None]
    else:
        page = table.long().gather(1, token // size) if longest else token
    return cache[page, token % size].transpose(1, 2)


def check_pages(block_table: Tensor, k: Tensor, lengths: Tensor, named: str) -> None:
    """Raise unless `block_table` has a page of k for all tokens of each row."""
    check_integers(
        "block_table", block_table, "(batch_size, max_num_blocks_per_seq)", (len(lengths), -1), k
    )
    page_size = k.shape[1]
    most = block_table.shape[1] * page_size
    if len(lengths) and int(lengths.max()) > most:
        raise ShapeError(
            "block_table",
            f"must have enough columns for the lengths of {named}: {block_table.shape[1]} blocks "
            f"of {page_size} hold {most} keys",
            int(lengths.max()),
            "append columns",
        )
    used = block_table[_is_used(block_table, lengths, page_size)]
    rule = f"must be from 0 to num_blocks - 1 = {len(k) - 1} where a row has keys"
    check_range("block_table", used, 0, len(k) - 1, rule, "pass block indices")


def _is_used(block_table: Tensor, lengths: Tensor, page_size: int) -> Tensor:
    """(n, columns) True for the entries that hold keys of a row."""
    first = torch.arange(block_table.shape[1], device=block_table.device) * page_size
    return first < lengths[:, None]


def read_rows(
    k_cache: Tensor, v_cache: Tensor, table: Tensor | None, lengths: Tensor, leftpad: Tensor | None
) -> tuple[Tensor | CacheView, Tensor | CacheView, Tensor | None]:
    """Keys and values of rows for `attend`, (n, G, longest, size), and their padding."""
    longest = int(lengths.max()) if len(lengths) else 0
    needs_grad = torch.is_grad_enabled() and (k_cache.requires_grad or v_cache.requires_grad)
    is_readable = k_cache.stride(-1) == v_cache.stride(-1) == 1 and not needs_grad
    if is_readable and bool((lengths == longest).all()):
        key, value = (_view(cache, table, lengths, longest) for cache in (k_cache, v_cache))
        return key, value, leftpad
    key, value = (gather_rows(cache, table, lengths) for cache in (k_cache, v_cache))
    padding = longest - lengths
    return key, value, padding if leftpad is None else padding + leftpad


def _view(cache: Tensor, table: Tensor | None, lengths: Tensor, longest: int) -> Tensor | CacheView:
    """View of rows that have one length."""
    if table is None:
        return cache[: len(lengths), :longest].transpose(1, 2)
    used = _is_used(table, lengths, cache.shape[1])
    return CacheView(
        cache.transpose(1, 2),
        cache.dtype,
        longest,
        partial(gather_rows, cache, table, lengths),
        block_table=table.masked_fill(~used, 0).int().contiguous(),
    )
