"""KV cache interface, and the validation that all caches share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from polyhead.cache.quantization import Int8, Parts, StorageFormat, Unquantized
from polyhead.cache.row_lengths import check_per_row
from polyhead.cache_view import CacheView
from polyhead.errors import ArgumentError, DeviceError, DtypeError, ShapeError, check_count
from polyhead.validate import check_is_tensor

__all__ = ["Cache", "allocate_like", "materialize", "split_kv"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# typing.Self came with Python 3.11.
Self = TypeVar("Self", bound="Cache")


class Cache(ABC):
    """KV cache: keys and values of the tokens so far. A call that raises changes nothing.

    The law: attention of a chunk of queries over the keys and values that `append` returned equals,
    row for row, attention without a cache, for any chunks.

    Rows may have different lengths (continuous batching): `append(..., lengths=)` and
    `rewind(tensor)` change each row by its own number of tokens. Then the views that
    `append_as_views` and `read_as_views` return carry the lengths, and `attention` treats each row
    as if it were alone. The law holds per row.

    Attributes:
        length: number of tokens so far, of the longest row: the position of its next token.
        start: position of the first key that `append` or `read` last returned, or after a rewind
            that `read` would return. The last key has position length - 1, so that queries align
            with the end, as in masks. `mask.for_keys(start, length)` cuts a mask for all length
            keys to the returned ones.
        batch: number of rows, B. `reorder` can change it.
        max_tokens: the most tokens it takes, or None.
        num_kv_heads, head_dim, value_head_dim: G, D and E.
        dtype: dtype of the keys and values that are appended and returned.
        device: device of the memory.
        window: the most tokens before it that a query attends to; None: all tokens are kept.
    """

    length: int
    start: int
    window: int | None = None

    def __init__(
        self,
        batch: int,
        max_tokens: int | None,
        num_kv_heads: int,
        head_dim: int,
        value_head_dim: int | None,
        dtype: torch.dtype,
        storage_dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        value_head_dim = head_dim if value_head_dim is None else value_head_dim
        check_count("batch", batch, 1)
        check_count("num_kv_heads", num_kv_heads, 1)
        check_count("head_dim", head_dim, 1)
        check_count("value_head_dim", value_head_dim, 0)
        if max_tokens is not None:
            check_count("max_tokens", max_tokens, 1)
        if dtype not in _DTYPES:
            names = ", ".join(map(str, _DTYPES))
            raise DtypeError("dtype", f"must be one of {names}", dtype, "pass that of the keys")
        if storage_dtype not in (None, torch.int8):
            raise DtypeError(
                "storage_dtype",
                "must be None (unquantized) or torch.int8",
                storage_dtype,
                "pass one of them",
            )
        self.batch = batch
        self.max_tokens = max_tokens
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.value_head_dim = value_head_dim
        self.dtype = dtype
        self.storage_dtype = storage_dtype
        self.device = torch.empty(0, device=device).device  # with its index: cuda is cuda:0
        self._format: StorageFormat = Unquantized() if storage_dtype is None else Int8(dtype)
        self.length = 0
        self.start = 0
        self._row_lengths: Tensor | None = None  # (B,) int64 on the CPU; None: all are `length`

    @abstractmethod
    def append(
        self, key: Tensor, value: Tensor, *, lengths: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Append T tokens to every row.

        Args:
            key: (B, G, T, D) in the cache's dtype, on its device.
            value: (B, G, T, E).
            lengths: (B,) integers, 0 to T: row b appends its first lengths[b] tokens, and the rest
                is padding. None: T.

        Returns:
            key (B, G, S, D) and value (B, G, S, E): all that the T new queries may need, from
            position `start` on. Views of the cache if possible: read them before the next call.
            Where rows have different lengths, a copy with zeros after each row's end: pass
            `mask.lengths(cache.lengths)` and a `query_offset`, or use `append_as_views`.

        Raises:
            ShapeError, DtypeError, DeviceError: the chunk does not fit the cache or its space.
            ArgumentError: the chunk requires grad.
        """

    @abstractmethod
    def read(self) -> tuple[Tensor, Tensor]:
        """Return keys (B, G, S, D) and values (B, G, S, E) that the newest token may need.

        They begin at position `start`. Views of the cache if possible: use them before the next
        call.
        """

    def append_as_views(
        self, key: Tensor, value: Tensor, *, lengths: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor | CacheView, Tensor | CacheView]:
        """Append like `append`, without dequantizing int8 values or gathering blocks.

        Returns:
            key and value for `attention`: tensors if the cache is contiguous and unquantized, and
            its rows have one length; else `CacheView`s. Use them before the next call.
        """
        return self.append(key, value, lengths=lengths)

    def read_as_views(self) -> tuple[Tensor | CacheView, Tensor | CacheView]:
        """Read like `read`, without dequantizing or gathering: see `append_as_views`."""
        return self.read()

    @abstractmethod
    def rewind(self, n: int | Tensor) -> None:
        """Drop the last n tokens of every row, as after a rejected draft.

        Prompts of different lengths, padded at the right, become rows of their own lengths by
        `cache.rewind(T - lengths)` after they are appended. `cache.rewind(cache.lengths * done)`
        empties finished rows for new sequences.

        Args:
            n: number of tokens, or (B,) integers, one number per row.

        Raises:
            ArgumentError: there are fewer than n tokens, or the window before them was dropped.
        """

    @abstractmethod
    def reorder(self, rows: Tensor) -> None:
        """Replace row i by row rows[i], as in beam search; `batch` becomes len(rows).

        Args:
            rows: (N,) int32 or int64 on the cache's device; a row may occur several times or never.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: `rows` breaks one of these rules.
                (The range is checked on the CPU only: elsewhere it would synchronize the device.)
        """

    @abstractmethod
    def reset(self) -> None:
        """Drop all tokens; the memory stays allocated."""

    @property
    def lengths(self) -> Tensor:
        """Number of tokens so far of each row, (B,) int64 on the cache's device."""
        return self._row_lengths_on_cpu().to(self.device)

    def next_positions(self, T: int) -> Tensor:
        """Positions of the next T tokens, (T,), or (B, T) where rows have different lengths."""
        token = torch.arange(T, device=self.device)
        if self._row_lengths is None:
            return token + self.length
        return token + self.lengths[:, None]

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Allocated bytes."""

    def clone(self: Self) -> Self:
        """A copy that shares no memory with this one."""
        # An inference tensor cannot be written outside of inference mode.
        with torch.inference_mode(False):
            return copy.deepcopy(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore state for copy.deepcopy and unpickling."""
        vars(self).update(tree_map_only(Tensor, _writable, state))

    def __len__(self) -> int:
        return self.length

    def __bool__(self) -> bool:
        # With __len__ alone an empty cache is false, and `if cache:` skips the first append.
        return True

    def _encode(self, key: Tensor, value: Tensor) -> Parts:
        return self._format.quantize(key) + self._format.quantize(value)

    def _nothing(self) -> Parts:
        """Parts of zero tokens, with the dtypes and sizes for `allocate_like`."""
        shape = (self.batch, self.num_kv_heads, 0)
        key = torch.empty(*shape, self.head_dim, dtype=self.dtype, device=self.device)
        value = torch.empty(*shape, self.value_head_dim, dtype=self.dtype, device=self.device)
        return self._encode(key, value)

    def _check_chunk(
        self, key: Tensor, value: Tensor, lengths: Tensor | Sequence[int] | None
    ) -> Tensor | None:
        """Raise unless the chunk fits; return `_new_lengths`."""
        for name, x, size in (("key", key, self.head_dim), ("value", value, self.value_head_dim)):
            check_is_tensor(name, x)
            B, G = self.batch, self.num_kv_heads
            if x.ndim != 4 or x.shape[0] != B or x.shape[1] != G or x.shape[3] != size:
                raise ShapeError(
                    name,
                    f"must be (B, G, T, {'D' if name == 'key' else 'E'}) = ({B}, {G}, T, {size})",
                    tuple(x.shape),
                    "check the order of dimensions, or make a cache of these sizes",
                )
            if x.dtype != self.dtype:
                raise DtypeError(
                    name, f"must have the cache's dtype, {self.dtype}", x.dtype, "cast one"
                )
            if x.device != self.device:
                raise DeviceError(
                    name, f"must be on the cache's device, {self.device}", x.device, "move one"
                )
            if x.requires_grad and torch.is_grad_enabled():
                raise ArgumentError(
                    name,
                    "must not require grad: a cache is for inference",
                    "requires_grad=True",
                    "call under torch.no_grad(), or pass it detached",
                )
        T = key.shape[2]
        if value.shape[2] != T:
            raise ShapeError(
                "value", f"must have the key's T = {T} tokens", value.shape[2], "pass them together"
            )
        counts = self._new_lengths(T, lengths)
        if counts is not None:
            T = int((self._row_lengths_on_cpu() + counts).max()) - self.length
        if self.max_tokens is not None and self.length + T > self.max_tokens:
            raise ShapeError(
                "key",
                f"must have at most max_tokens - length = {self.max_tokens} - {self.length} = "
                f"{self.max_tokens - self.length} tokens",
                T,
                "rewind or reset the cache, or make one with more max_tokens",
            )
        return counts

    def check_rewind(self, n: int | Tensor) -> None:
        """Raise the error that `rewind(n)` would raise, without changing the cache."""
        if isinstance(n, Tensor):
            check_per_row("n", n, self._row_lengths_on_cpu())
            return
        check_count("n", n, 0)
        shortest = self.length if self._row_lengths is None else int(self._row_lengths.min())
        if n > shortest:
            raise ArgumentError("n", f"must be at most length = {shortest}", n, "rewind no further")

    def _row_lengths_on_cpu(self) -> Tensor:
        if self._row_lengths is None:
            return torch.full((self.batch,), self.length)
        return self._row_lengths

    def _set_row_lengths(self, lengths: Tensor) -> None:
        self.length = int(lengths.max())
        self._row_lengths = None if bool((lengths == self.length).all()) else lengths

    def _new_lengths(self, T: int, lengths: Tensor | Sequence[int] | None) -> Tensor | None:
        """Number of tokens that each row appends, on the CPU; None: T, and rows stay equal."""
        if lengths is None:
            return None if self._row_lengths is None else torch.full((self.batch,), T)
        counts = check_per_row("lengths", lengths, torch.full((self.batch,), T))
        return None if self._row_lengths is None and bool((counts == T).all()) else counts

    def _check_rows(self, rows: Tensor) -> None:
        check_is_tensor("rows", rows)
        if rows.dtype not in (torch.int32, torch.int64):
            raise DtypeError("rows", "must be int32 or int64", rows.dtype, "convert with .long()")
        if rows.ndim != 1 or len(rows) == 0:
            raise ShapeError(
                "rows",
                "must be (N,), N at least 1",
                tuple(rows.shape),
                "give one row index per new row",
            )
        if rows.device != self.device:
            raise DeviceError(
                "rows", f"must be on the cache's device, {self.device}", rows.device, "move one"
            )
        if rows.device.type == "cpu" and not bool(((rows >= 0) & (rows < self.batch)).all()):
            raise ArgumentError(
                "rows",
                f"must be from 0 to batch - 1 = {self.batch - 1}",
                rows.tolist(),
                "pass row indices",
            )

    def __repr__(self) -> str:
        sizes = f"batch={self.batch}, max_tokens={self.max_tokens}, "
        sizes += f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
        if self.value_head_dim != self.head_dim:
            sizes += f", value_head_dim={self.value_head_dim}"
        held = f"dtype={self.dtype}" + (
            f", storage_dtype={self.storage_dtype}" if self.storage_dtype else ""
        )
        state = f"length={self.length}, nbytes={self.nbytes}"
        return f"{type(self).__name__}({sizes}, {held}{self._extra_repr()}): {state}"

    def _extra_repr(self) -> str:
        return ""


def _writable(tensor: Tensor) -> Tensor:
    # An inference tensor cannot be written outside of inference mode.
    with torch.inference_mode(False):
        return tensor.clone() if tensor.is_inference() else tensor


def split_kv(held: Parts) -> tuple[Parts, Parts]:
    """Split the parts of a cache into those of keys and those of values."""
    half = len(held) // 2
    return held[:half], held[half:]


def materialize(key: Tensor | CacheView, value: Tensor | CacheView) -> tuple[Tensor, Tensor]:
    """Materialize key and value as tensors."""
    return (
        key.materialize_valid() if isinstance(key, CacheView) else key,
        value.materialize_valid() if isinstance(value, CacheView) else value,
    )


def allocate_like(held: Parts, rows: int, tokens: int) -> Parts:
    """Allocate uninitialized parts of the same kind, with other numbers of rows and tokens."""
    # An inference tensor cannot be written outside of inference mode.
    with torch.inference_mode(False):
        return tuple(
            part.new_empty((rows, part.shape[1], tokens, *part.shape[3:])) for part in held
        )
