"""Paged KV cache: fixed-size blocks from a pool, addressed by a block table."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from polyhead.cache.base import Cache, allocate_like, materialize, split_kv
from polyhead.cache.quantization import Parts
from polyhead.cache.row_lengths import appended_tokens
from polyhead.cache_view import CacheView
from polyhead.errors import ArgumentError, check_count

__all__ = ["PagedKVCache"]

_NO_BLOCK = -1
_Count = TypeVar("_Count", int, Tensor)


class PagedKVCache(Cache):
    """Paged KV cache: sequences with a common prefix share blocks, copy-on-write.

    Token p of row b is in block `block_table[b, p // block_size]`, slot p % block_size. `reorder`
    changes the block table only: `cache.reorder(torch.tensor([0, 0, 0, 0]))` makes four rows of
    one prompt without a copy. A partly filled block that several rows share is copied when they
    append. A block with refcount 0 is free and is reused.

    `append` and `read` make a contiguous copy. `append_as_views` and `read_as_views` do not:
    backend `cpu` reads blocks in place, and modules use these methods.

    Args:
        batch: number of rows, B.
        max_tokens: the most tokens per row.
        num_kv_heads: key/value heads, G.
        head_dim: D.
        value_head_dim: E; None: D. 0 is allowed.
        dtype: dtype of the keys and values that are appended and returned.
        storage_dtype: None or torch.int8, as in `KVCache`.
        device: device of the pools and the block table.
        block_size: tokens per block.
        num_blocks: size of the pool, allocated now; None: it grows by doubling.

    Attributes:
        block_table: (B, blocks per row) int32 on the device: block indices; -1 after the last
            block of a shorter row. Read-only.

    Raises:
        ArgumentError, DtypeError: an argument breaks a rule.

    Source: Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with
    PagedAttention".

    >>> cache = PagedKVCache(batch=1, max_tokens=64, num_kv_heads=2, head_dim=4, block_size=4)
    >>> prompt, tokens = torch.zeros(1, 2, 6, 4), torch.ones(3, 2, 1, 4)
    >>> _ = cache.append(prompt, prompt)
    >>> cache.reorder(torch.tensor([0, 0, 0]))              # three answers to one prompt
    >>> key, value = cache.append(tokens, tokens)
    >>> key.shape, cache.block_table.tolist()
    (torch.Size([3, 2, 7, 4]), [[0, 1], [0, 2], [0, 3]])
    """

    def __init__(
        self,
        batch: int,
        max_tokens: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        storage_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        block_size: int = 16,
        num_blocks: int | None = None,
    ) -> None:
        check_count("max_tokens", max_tokens, 1)
        super().__init__(
            batch, max_tokens, num_kv_heads, head_dim, value_head_dim, dtype, storage_dtype, device
        )
        check_count("block_size", block_size, 1)
        if num_blocks is not None:
            check_count("num_blocks", num_blocks, 1)
        self.block_size = block_size
        self._fixed = num_blocks is not None
        self._most_columns = -(-max_tokens // block_size)
        self._pools = allocate_like(self._nothing(), num_blocks or 0, block_size)
        self._table = torch.empty(batch, 0, dtype=torch.int32)
        self._set_table(self._table)

    @property
    def num_blocks(self) -> int:
        """Number of blocks in the pool, used or free."""
        return self._pools[0].shape[0]

    @property
    def block_refcounts(self) -> Tensor:
        """Refcounts, (num_blocks,) int64 on the CPU: the number of rows per block; 0: free."""
        return torch.bincount(self._table[self._table >= 0], minlength=self.num_blocks)

    @property
    def pools(self) -> Parts:
        """Contents of the blocks. Read-only.

        Returns:
            (key, value), (num_blocks, G, block_size, D) and (..., E); with storage_dtype=torch.int8
            (int8 keys, key scales, int8 values, value scales), the scales (..., block_size).
        """
        return self._pools

    def append(
        self, key: Tensor, value: Tensor, *, lengths: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        return materialize(*self.append_as_views(key, value, lengths=lengths))

    def append_as_views(
        self, key: Tensor, value: Tensor, *, lengths: Tensor | Sequence[int] | None = None
    ) -> tuple[CacheView, CacheView]:
        counts = self._check_chunk(key, value, lengths)
        new, T = self._encode(key, value), key.shape[2]
        if counts is not None:
            return self._append_per_row(new, T, counts)
        if T:
            self._ensure_capacity(torch.full((self.batch,), T))
            position = torch.arange(self.length, self.length + T, device=self.device)
            block_bt = self.block_table[:, position // self.block_size]
            slot_t = position % self.block_size
            for pool, part in zip(self._pools, new, strict=True):
                pool[block_bt, :, slot_t] = part.transpose(1, 2)
            self.length += T
        return self.read_as_views()

    def _append_per_row(self, new: Parts, T: int, counts: Tensor) -> tuple[CacheView, CacheView]:
        """Append the first counts[b] tokens of row b, behind its own."""
        before = self._row_lengths_on_cpu()
        self._ensure_capacity(counts)
        row, token = appended_tokens(counts, T)
        position = before[row] + token
        block = self._table[row, position // self.block_size].long()
        row, token, block, slot = (
            x.to(self.device) for x in (row, token, block, position % self.block_size)
        )
        for pool, part in zip(self._pools, new, strict=True):
            pool[block, :, slot] = part[row, :, token]
        self._set_row_lengths(before + counts)
        return self._views(before.to(self.device))

    def read(self) -> tuple[Tensor, Tensor]:
        return materialize(*self.read_as_views())

    def read_as_views(self) -> tuple[CacheView, CacheView]:
        return self._views(None)

    def _views(self, query_offset: Tensor | None) -> tuple[CacheView, CacheView]:
        table, tokens = self.block_table, self.length
        lengths = None if self._row_lengths is None else self.lengths
        key, value = (
            CacheView(
                pools[0],
                self.dtype,
                tokens,
                partial(self._gather, pools, table, tokens),
                scales=pools[1] if len(pools) > 1 else None,
                block_table=table,
                lengths=lengths,
                query_offset=None if lengths is None else query_offset,
            )
            for pools in split_kv(self._pools)
        )
        return key, value

    def _gather(self, pools: Parts, table: Tensor, tokens: int) -> Tensor:
        # (B, blocks, G, block_size, ...) to (B, G, tokens, ...)
        blocks = (pool[table].transpose(1, 2).flatten(2, 3) for pool in pools)
        return self._format.dequantize(tuple(part[:, :, :tokens] for part in blocks))

    def rewind(self, n: int | Tensor) -> None:
        self.check_rewind(n)
        lengths = self._row_lengths_on_cpu() - torch.as_tensor(n).cpu()
        self._set_row_lengths(lengths)
        self._drop_unused_blocks(lengths)

    def reorder(self, rows: Tensor) -> None:
        self._check_rows(rows)
        lengths = self._row_lengths_on_cpu()[rows.cpu()]
        self._table = self._table[rows.cpu()]
        self.batch = len(rows)
        self._set_row_lengths(lengths)
        self._drop_unused_blocks(lengths)

    def reset(self) -> None:
        self.rewind(self._row_lengths_on_cpu())

    def _drop_unused_blocks(self, lengths: Tensor) -> None:
        columns = self._columns(self.length)
        is_used = torch.arange(columns) < self._columns(lengths)[:, None]
        self._set_table(self._table[:, :columns].masked_fill(~is_used, _NO_BLOCK))

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in self._pools) + self.block_table.nbytes

    def _columns(self, length: _Count) -> _Count:
        """Number of blocks that hold so many tokens."""
        return (length + self.block_size - 1) // self.block_size

    def _set_table(self, table: Tensor) -> None:
        # Free blocks are computed on the CPU, without a device synchronization.
        self._table = table
        self.block_table = table.to(self.device)

    def _ensure_capacity(self, counts: Tensor) -> None:
        """Allocate blocks for counts[b] more tokens of row b; copy shared blocks before a write."""
        before = self._row_lengths_on_cpu()
        first, last = self._columns(before), self._columns(before + counts)
        column = torch.arange(int(last.max()))
        missing = (column >= first[:, None]) & (column < last[:, None])
        copying = self._rows_to_copy_on_write(before, counts)
        if not copying and not bool(missing.any()):
            return
        taken = self._allocate_blocks(len(copying) + int(missing.sum()))
        width = max(self._table.shape[1], len(column))
        table = self._table.new_full((self.batch, width), _NO_BLOCK)
        table[:, : self._table.shape[1]] = self._table
        table[:, : len(column)][missing] = taken[len(copying) :]
        if copying:
            partial_block, copies = first[copying] - 1, taken[: len(copying)]
            source = table[copying, partial_block].to(self.device)
            target = copies.to(self.device)
            for pool in self._pools:
                pool[target] = pool[source]
            table[copying, partial_block] = copies
        self._set_table(table)

    def _rows_to_copy_on_write(self, before: Tensor, counts: Tensor) -> list[int]:
        """Rows that write to a partial block that another row keeps; the first of several keeps."""
        writing = ((counts > 0) & (before % self.block_size > 0)).nonzero().flatten().tolist()
        uses = self.block_refcounts
        copying = []
        for row in reversed(writing):
            block = int(self._table[row, before[row] // self.block_size])
            if uses[block] > 1:
                uses[block] -= 1
                copying.append(row)
        return copying[::-1]

    def _allocate_blocks(self, count: int) -> Tensor:
        """Indices of `count` free blocks, int32."""
        uses = self.block_refcounts
        missing = count - int((uses == 0).sum())
        if missing > 0:
            if self._fixed:
                raise ArgumentError(
                    "num_blocks",
                    f"must leave {count} free blocks to append to batch = {self.batch} rows at "
                    f"length = {self.length}",
                    f"{count - missing} free of {self.num_blocks}",
                    "rewind or reset the cache, or make one with more num_blocks",
                )
            self._grow(self.num_blocks + missing)
            uses = self.block_refcounts
        return (uses == 0).nonzero().flatten()[:count].int()

    def _grow(self, least: int) -> None:
        num_blocks = self.num_blocks
        pools = allocate_like(
            self._pools,
            max(least, min(2 * num_blocks, self.batch * self._most_columns)),
            self.block_size,
        )
        for old, new in zip(self._pools, pools, strict=True):
            new[:num_blocks].copy_(old)
        self._pools = pools

    def _extra_repr(self) -> str:
        in_use = int((self.block_refcounts > 0).sum())
        return f", block_size={self.block_size}, blocks in use={in_use} of {self.num_blocks}"
