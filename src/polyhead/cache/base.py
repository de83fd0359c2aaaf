"""What every cache is to its callers, and the checks that all of them make."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from polyhead.cache.quantization import Int8, Parts, StorageFormat, Unquantized
from polyhead.cache_view import CacheView
from polyhead.errors import ArgumentError, DeviceError, DtypeError, ShapeError, check_count
from polyhead.validate import check_is_tensor

__all__ = ["Cache", "allocate_like", "materialize", "split_kv"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# typing.Self came with Python 3.11.
Self = TypeVar("Self", bound="Cache")


class Cache(ABC):
    """Keys and values of the tokens so far. A call that raises has changed nothing.

    The law: attention of a chunk of queries over what `append` returned is, row for row, attention
    without a cache, whatever the chunks were.

    Attributes:
        length: tokens so far, the same for every row: the position of the next token.
        start: position of the first key that `append` or `read` last returned, or after a rewind
            that `read` would return. The last key stands at length - 1, so that queries stand
            where masks put them: at the end. A mask for all length keys is cut to those returned
            by `mask.for_keys(start, length)`.
        batch: rows, B. `reorder` can change it.
        max_tokens: the most tokens it takes, or None.
        num_kv_heads, head_dim, value_head_dim: G, D and E.
        dtype: of what goes in and comes out.
        device: where it is held.
        window: a query sees at most so many tokens before it; None: all of them are held.
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
                "must be None (held in dtype) or torch.int8",
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

    @abstractmethod
    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add T tokens to every row.

        Args:
            key: (B, G, T, D) in the cache's dtype, on its device.
            value: (B, G, T, E).

        Returns:
            key (B, G, S, D) and value (B, G, S, E): all that the T new queries may need, from
            position `start` on. Views of the cache where possible: read them before the next call.

        Raises:
            ShapeError, DtypeError, DeviceError: a chunk that does not fit, by size or by room.
            ArgumentError: it needs a gradient.
        """

    @abstractmethod
    def read(self) -> tuple[Tensor, Tensor]:
        """Keys (B, G, S, D) and values (B, G, S, E) that the newest token may need, from `start`.

        Views of the cache where possible: use them before the next call.
        """

    def append_as_views(
        self, key: Tensor, value: Tensor
    ) -> tuple[Tensor | CacheView, Tensor | CacheView]:
        """As `append`, without making tensors of int8 codes or of blocks.

        Returns:
            what `attention` takes for key and value: tensors where the cache holds them so, or
            `CacheView`. Pass it on before the next call.
        """
        return self.append(key, value)

    def read_as_views(self) -> tuple[Tensor | CacheView, Tensor | CacheView]:
        """As `read`, without making tensors of int8 codes or of blocks: see `append_as_views`."""
        return self.read()

    @abstractmethod
    def rewind(self, n: int) -> None:
        """Forget the last n tokens of every row, as after a rejected draft.

        Raises:
            ArgumentError: there are no n tokens, or what came before them is no longer held.
        """

    @abstractmethod
    def reorder(self, rows: Tensor) -> None:
        """Make row i what row rows[i] was, as beam search needs; `batch` becomes len(rows).

        Args:
            rows: (N,) int32 or int64 on the cache's device; a row may come several times or never.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: `rows` breaks one of these rules.
                (Numbers are looked at on the CPU only: elsewhere that would wait for the device.)
        """

    @abstractmethod
    def reset(self) -> None:
        """Forget every token; the memory stays."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes allocated."""

    def clone(self: Self) -> Self:
        """A copy that shares no memory with this one."""
        # An inference tensor could never be written outside of inference mode again.
        with torch.inference_mode(False):
            return copy.deepcopy(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of copy.deepcopy and of unpickling."""
        vars(self).update(tree_map_only(Tensor, _writable, state))

    def __len__(self) -> int:
        return self.length

    def __bool__(self) -> bool:
        # By its length an empty cache would be false, and `if cache:` skip the first append.
        return True

    def _encode(self, key: Tensor, value: Tensor) -> Parts:
        return self._format.quantize(key) + self._format.quantize(value)

    def _nothing(self) -> Parts:
        """What is held of no tokens: it has the dtypes and sizes to allocate with."""
        shape = (self.batch, self.num_kv_heads, 0)
        key = torch.empty(*shape, self.head_dim, dtype=self.dtype, device=self.device)
        value = torch.empty(*shape, self.value_head_dim, dtype=self.dtype, device=self.device)
        return self._encode(key, value)

    def _check_chunk(self, key: Tensor, value: Tensor) -> None:
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
                    "must not need a gradient: a cache is for inference",
                    "requires_grad=True",
                    "call under torch.no_grad(), or pass it detached",
                )
        T = key.shape[2]
        if value.shape[2] != T:
            raise ShapeError(
                "value", f"must have the key's T = {T} tokens", value.shape[2], "pass them together"
            )
        if self.max_tokens is not None and self.length + T > self.max_tokens:
            raise ShapeError(
                "key",
                f"must have at most max_tokens - length = {self.max_tokens} - {self.length} = "
                f"{self.max_tokens - self.length} tokens",
                T,
                "rewind or reset the cache, or make one with more max_tokens",
            )

    def check_rewind(self, n: int) -> None:
        """Raise what `rewind(n)` would raise, and change nothing."""
        check_count("n", n, 0)
        if n > self.length:
            raise ArgumentError(
                "n", f"must be at most length = {self.length}", n, "rewind no further"
            )

    def _check_rows(self, rows: Tensor) -> None:
        check_is_tensor("rows", rows)
        if rows.dtype not in (torch.int32, torch.int64):
            raise DtypeError("rows", "must be int32 or int64", rows.dtype, "convert with .long()")
        if rows.ndim != 1 or len(rows) == 0:
            raise ShapeError(
                "rows",
                "must be (N,), N at least 1",
                tuple(rows.shape),
                "give one row's number each",
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
                "count rows",
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
    # An inference tensor could never be written outside of inference mode again.
    with torch.inference_mode(False):
        return tensor.clone() if tensor.is_inference() else tensor


def split_kv(held: Parts) -> tuple[Parts, Parts]:
    """What is held of keys, and of values."""
    half = len(held) // 2
    return held[:half], held[half:]


def materialize(key: Tensor | CacheView, value: Tensor | CacheView) -> tuple[Tensor, Tensor]:
    """Tensors of both."""
    return (
        key.gather() if isinstance(key, CacheView) else key,
        value.gather() if isinstance(value, CacheView) else value,
    )


def allocate_like(held: Parts, rows: int, tokens: int) -> Parts:
    """Uninitialised memory of the same kind, with other numbers of rows and tokens."""
    # An inference tensor could never be written outside of inference mode again.
    with torch.inference_mode(False):
        return tuple(
            part.new_empty((rows, part.shape[1], tokens, *part.shape[3:])) for part in held
        )
