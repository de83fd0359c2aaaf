"""Rows of a cache, of different lengths: contiguous, selected by index, or paged."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.backends.layout import maybe_contiguous
from polyhead.cache_view import CacheView
from polyhead.drop_in.flash_attn.validate import check_integers, check_range
from polyhead.errors import ShapeError

__all__ = ["check_pages", "read_rows"]


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
    k_cache: Tensor, v_cache: Tensor, table: Tensor | None, lengths: Tensor
) -> tuple[Tensor | CacheView, Tensor | CacheView]:
    """Views of the keys and values of each row, (n, G, longest, size), for `attention`.

    Args:
        k_cache, v_cache: (rows, tokens, G, size), or with a table (pages, page size, G, size).
        table: (n, columns) the page of each `page size` tokens of a row; None: row b is cache[b].
        lengths: (n,) int64, the tokens of each row.
    """
    longest = int(lengths.max()) if len(lengths) else 0
    of_rows = lengths if bool((lengths != longest).any()) else None
    key, value = (x.transpose(1, 2) for x in (k_cache, v_cache))
    if table is None:
        key, value = (x[: len(lengths), :, :longest] for x in (key, value))
        return (key, value) if of_rows is None else (_view(key, of_rows), _view(value, of_rows))
    used = _is_used(table, lengths, k_cache.shape[1])
    table = table.masked_fill(~used, 0).int().contiguous()
    return _paged_view(key, table, longest, of_rows), _paged_view(value, table, longest, of_rows)


def _view(data: Tensor, lengths: Tensor) -> CacheView:
    return CacheView(
        maybe_contiguous(data), data.dtype, data.shape[2], lambda: data, lengths=lengths
    )


def _paged_view(pool: Tensor, table: Tensor, tokens: int, lengths: Tensor | None) -> CacheView:
    return CacheView(
        maybe_contiguous(pool),
        pool.dtype,
        tokens,
        # (n, columns, G, page size, size) to (n, G, tokens, size)
        lambda: pool[table].transpose(1, 2).flatten(2, 3)[:, :, :tokens],
        block_table=table,
        lengths=lengths,
    )
