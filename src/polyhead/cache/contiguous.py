"""Contiguous KV cache: one tensor per row, of all tokens or of a sliding window."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from polyhead.cache.base import Cache, allocate_like, materialize, split_kv
from polyhead.cache.quantization import Parts
from polyhead.cache.row_lengths import appended_tokens
from polyhead.cache_view import CacheView
from polyhead.errors import ArgumentError, check_count

__all__ = ["KVCache"]


class KVCache(Cache):
    """Contiguous KV cache: memory grows by doubling, and `append` returns views of it.

    With `window` it holds about 2 * (window + 1 + max_rewind) tokens, for any number of appended
    tokens: new tokens are written after the old ones, and when the memory is full the window moves
    to its front, amortized O(1) per token. A chunk longer than the memory is returned together with
    the window before it, and only its end is stored.

    Args:
        batch: number of rows, B.
        max_tokens: the most tokens it takes; None, only with a window: no limit.
        num_kv_heads: key/value heads, G.
        head_dim: D.
        value_head_dim: E; None: D. 0 is allowed: a latent cache stores everything in the key.
        dtype: dtype of the keys and values that are appended and returned.
        storage_dtype: None: unquantized, in `dtype`. torch.int8: quantized, with one float32
            scale per token and head. Then, with a = the largest absolute element of a token and
            head, each element is restored within a / 254 (and rounding). Let a_k and a_v be the
            largest a of all keys and values, and d = scale * sum |query| * a_k / 254. A score
            changes by at most d, the weights of a query together by 2 * tanh(d / 2), and every
            output by at most

                a_v / 254 + 2 * tanh(d / 2) * a_v

        device: device of the memory.
        window: the `before` of the `polyhead.mask.window(before=...)` of the calls: a query attends
            to the `window` tokens before it, and to itself. None: all tokens are kept.
        max_rewind: with a window, the reach of `rewind`: it can always go back to this number of
            tokens before the largest length so far. A new value applies to tokens appended later.
        preallocate: allocate all memory now: addresses then never change (except in a `reorder`
            that changes `batch`). Under torch.compile(fullgraph=True) a step with `append` is one
            graph, and does not recompile per length. A captured CUDA graph would replay one length.

    Raises:
        ArgumentError, DtypeError: an argument breaks a rule.

    >>> cache = KVCache(batch=1, max_tokens=64, num_kv_heads=2, head_dim=4, window=3)
    >>> prompt, token = torch.zeros(1, 2, 10, 4), torch.ones(1, 2, 1, 4)
    >>> _ = cache.append(prompt, prompt)
    >>> key, value = cache.append(token, token)
    >>> key.shape, cache.length, cache.start                # the 3 tokens before, and itself
    (torch.Size([1, 2, 4, 4]), 11, 7)
    """

    def __init__(
        self,
        batch: int,
        max_tokens: int | None,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        storage_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        window: int | None = None,
        max_rewind: int = 0,
        preallocate: bool = False,
    ) -> None:
        super().__init__(
            batch, max_tokens, num_kv_heads, head_dim, value_head_dim, dtype, storage_dtype, device
        )
        if window is not None:
            check_count("window", window, 0)
        elif max_tokens is None:
            raise ArgumentError(
                "max_tokens",
                "must be given without a window",
                None,
                "pass the largest number of tokens",
            )
        self.window = window
        self.max_rewind = max_rewind
        self._first_held = 0  # position of the token in slot 0
        self._held = allocate_like(self._nothing(), batch, self._most_slots if preallocate else 0)

    @property
    def max_rewind(self) -> int:
        return self._rewindable

    @max_rewind.setter
    def max_rewind(self, tokens: int) -> None:
        check_count("max_rewind", tokens, 0)
        self._rewindable = tokens
        self._most_slots = _most_slots(self.max_tokens, self.window, tokens)

    def append(
        self, key: Tensor, value: Tensor, *, lengths: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        return materialize(*self.append_as_views(key, value, lengths=lengths))

    def append_as_views(
        self, key: Tensor, value: Tensor, *, lengths: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor | CacheView, Tensor | CacheView]:
        counts = self._check_chunk(key, value, lengths)
        new, T = self._encode(key, value), key.shape[2]
        if counts is not None:
            return self._append_per_row(new, T, counts)
        if self.length - self._first_held + T > self._most_slots:
            end = self._needed_from(self.length - self.max_rewind)
            if self.length - end + T > self._most_slots:
                return self._append_long(new, T)
            self._drop_before(end)
        self._reserve(self.length - self._first_held + T)
        self.start = self._needed_from(self.length)
        self.length += T
        _copy(new, self._slots(self.length - T, self.length))
        return self._stored(self._slots(self.start, self.length))

    def read(self) -> tuple[Tensor, Tensor]:
        return materialize(*self.read_as_views())

    def read_as_views(self) -> tuple[Tensor | CacheView, Tensor | CacheView]:
        self.start = self._needed_from(self.length - 1)
        return self._stored(self._slots(self.start, self.length))

    def quantized(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quantized contents that `read` dequantizes: read-only views.

        Returns:
            int8 keys (B, G, S, D), float32 key scales (B, G, S), int8 values (B, G, S, E), float32
            value scales (B, G, S). An element is int8 * scale.

        Raises:
            ArgumentError: the cache was not made with storage_dtype=torch.int8.
        """
        if self.storage_dtype != torch.int8:
            raise ArgumentError(
                "storage_dtype",
                "must be torch.int8 to hold quantized values",
                self.storage_dtype,
                "use read()",
            )
        self.start = self._needed_from(self.length - 1)
        key_codes, key_scales, value_codes, value_scales = self._slots(self.start, self.length)
        return key_codes, key_scales, value_codes, value_scales

    def check_rewind(self, n: int | Tensor) -> None:
        super().check_rewind(n)
        if isinstance(n, Tensor):
            self._check_no_window("n", n)
            return
        length = self.length - n
        if length > 0 and self._needed_from(length - 1) < self._first_held:
            most = self._needed_from(self.length - 1) - self._first_held
            raise ArgumentError(
                "n",
                f"must be at most {most}: with window = {self.window} the tokens before position "
                f"{self._first_held} were dropped",
                n,
                f"make the cache with max_rewind = {n} or more, or reset it",
            )

    def rewind(self, n: int | Tensor) -> None:
        self.check_rewind(n)
        if isinstance(n, Tensor) or self._row_lengths is not None:
            self._set_row_lengths(self._row_lengths_on_cpu() - torch.as_tensor(n).cpu())
            return
        length = self.length - n
        if length == 0:
            self.reset()
            return
        self.length = length
        self.start = self._needed_from(length - 1)

    def reorder(self, rows: Tensor) -> None:
        self._check_rows(rows)
        held = self._slots(self._first_held, self.length)
        moved = tuple(part.index_select(0, rows) for part in held)
        if len(rows) != self.batch:
            self._held = allocate_like(self._held, len(rows), self._held[0].shape[2])
            self.batch = len(rows)
        _copy(moved, self._slots(self._first_held, self.length))
        if self._row_lengths is not None:
            self._set_row_lengths(self._row_lengths[rows.cpu()])

    def reset(self) -> None:
        self.length = self.start = self._first_held = 0
        self._row_lengths = None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._held)

    def _needed_from(self, position: int) -> int:
        """First position that a query at `position` may need."""
        return 0 if self.window is None else max(0, position - self.window)

    def _slots(self, first: int, stop: int) -> Parts:
        """Views of the tokens at positions first .. stop - 1."""
        first, stop = first - self._first_held, stop - self._first_held
        return tuple(part[:, :, first:stop] for part in self._held)

    def _reserve(self, tokens: int) -> None:
        slots = self._held[0].shape[2]
        if tokens > slots:
            held = allocate_like(
                self._held, self.batch, min(max(2 * slots, tokens), self._most_slots)
            )
            used = self.length - self._first_held
            _copy(self._slots(self._first_held, self.length), tuple(p[:, :, :used] for p in held))
            self._held = held

    def _drop_before(self, position: int) -> None:
        # Cloned, since source and target may overlap.
        kept = tuple(part.clone() for part in self._slots(position, self.length))
        self._first_held = position
        _copy(kept, self._slots(position, self.length))

    def _stored(
        self, held: Parts, query_offset: Tensor | None = None
    ) -> tuple[Tensor | CacheView, Tensor | CacheView]:
        if self.storage_dtype is None and self._row_lengths is None:
            return held[0], held[1]
        lengths = None if self._row_lengths is None else self.lengths
        key, value = (
            CacheView(
                parts[0],
                self.dtype,
                parts[0].shape[2],
                partial(self._format.dequantize, parts),
                scales=parts[1] if len(parts) > 1 else None,
                lengths=lengths,
                query_offset=query_offset,
            )
            for parts in split_kv(held)
        )
        return key, value

    def _append_per_row(
        self, new: Parts, T: int, counts: Tensor
    ) -> tuple[Tensor | CacheView, Tensor | CacheView]:
        """Append the first counts[b] tokens of row b, behind its own."""
        self._check_no_window("lengths", counts)
        before = self._row_lengths_on_cpu()
        self._reserve(int((before + counts).max()))
        row, token = appended_tokens(counts, T)
        slot = before[row] + token
        row, token, slot = (x.to(self.device) for x in (row, token, slot))
        for held, part in zip(self._held, new, strict=True):
            held[row, :, slot] = part[row, :, token]
        self._set_row_lengths(before + counts)
        return self._stored(self._slots(0, self.length), before.to(self.device))

    def _check_no_window(self, name: str, numbers: Tensor) -> None:
        if self.window is not None:
            raise ArgumentError(
                name,
                f"must be None with window = {self.window}: the rows of a window have one length",
                numbers.tolist(),
                "make the cache without a window; the mask keeps it",
            )

    def _append_long(self, new: Parts, T: int) -> tuple[Tensor | CacheView, Tensor | CacheView]:
        """Append a chunk that does not fit with its window: only its end is stored."""
        first = self._needed_from(self.length)
        before = self._slots(first, self.length)
        seen = new
        if first < self.length:
            seen = tuple(torch.cat(parts, dim=2) for parts in zip(before, new, strict=True))
        end = self._needed_from(self.length + T - 1 - self.max_rewind)
        self._reserve(self.length + T - end)
        self.start = first
        self.length += T
        self._first_held = end
        kept = self._slots(end, self.length)
        _copy(tuple(part[:, :, -kept[0].shape[2] :] for part in new), kept)
        return self._stored(seen)

    def _extra_repr(self) -> str:
        return (
            "" if self.window is None else f", window={self.window}, max_rewind={self.max_rewind}"
        )


def _most_slots(max_tokens: int | None, window: int | None, max_rewind: int) -> int:
    """The most tokens to allocate: twice the window, so that at most half of it is moved."""
    limits = [] if max_tokens is None else [max_tokens]
    limits += [] if window is None else [2 * (window + 1 + max_rewind)]
    return min(limits)


def _copy(source: Parts, target: Parts) -> None:
    for from_part, to_part in zip(source, target, strict=True):
        to_part.copy_(from_part)
