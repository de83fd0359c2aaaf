"""Primitive masks, small immutable values. The functions of `polyhead.mask` document them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from polyhead.errors import DeviceError, DtypeError, ShapeError
from polyhead.mask.algebra import Mask, MaskBlock

if TYPE_CHECKING:
    from typing_extensions import TypeIs

__all__ = [
    "Align",
    "Causal",
    "Custom",
    "Dense",
    "Documents",
    "LeftPadding",
    "Lengths",
    "Prefix",
    "Window",
]

Align = Literal["end", "start"]


@dataclass(frozen=True, eq=False, repr=False)
class Causal(Mask):
    """Causal mask: no later key. Made by `polyhead.mask.causal`."""

    align: Align = "end"

    def _materialize_block(self, at: MaskBlock) -> Tensor:
        query, key = _positions(at, self.align)
        return key <= query

    def key_range(
        self, start: int, stop: int, T: int, S: int, query_offset: int | Tensor | None = None
    ) -> tuple[int, int]:
        offset = _offset(T, S, self.align, query_offset)
        if _is_per_row(offset):
            return 0, S
        return 0, min(S, max(0, stop + offset))

    def _drop_keys_before(self, start: int, S: int) -> Mask:
        return self if self.align == "end" else super()._drop_keys_before(start, S)

    def __repr__(self) -> str:
        return "causal()" if self.align == "end" else f'causal(align="{self.align}")'


@dataclass(frozen=True, eq=False, repr=False)
class Window(Mask):
    """Sliding window: keys from `before` to `after` the query. Made by `polyhead.mask.window`."""

    before: int | None
    after: int | None
    align: Align = "end"

    def _materialize_block(self, at: MaskBlock) -> Tensor:
        query, key = _positions(at, self.align)
        allowed = torch.ones(1, dtype=torch.bool, device=at.device)
        if self.before is not None:
            allowed = allowed & (key >= query - self.before)
        if self.after is not None:
            allowed = allowed & (key <= query + self.after)
        return allowed

    def key_range(
        self, start: int, stop: int, T: int, S: int, query_offset: int | Tensor | None = None
    ) -> tuple[int, int]:
        offset = _offset(T, S, self.align, query_offset)
        if _is_per_row(offset):
            return 0, S
        k_start = 0 if self.before is None else start + offset - self.before
        k_stop = S if self.after is None else stop + offset + self.after
        return min(S, max(0, k_start)), min(S, max(0, k_stop))

    def _drop_keys_before(self, start: int, S: int) -> Mask:
        return self if self.align == "end" else super()._drop_keys_before(start, S)

    def __repr__(self) -> str:
        sides = {"before": self.before, "after": self.after}
        words = [f"{name}={size}" for name, size in sides.items() if size is not None]
        if self.align != "end":
            words.append(f'align="{self.align}"')
        return f"window({', '.join(words)})"


@dataclass(frozen=True, eq=False, repr=False)
class Lengths(Mask):
    """Padding on the right: `lengths` keys per batch row. Made by `polyhead.mask.lengths`."""

    lengths: Tensor

    def _materialize_block(self, at: MaskBlock) -> Tensor:
        key = torch.arange(at.k_start, at.k_stop, device=self.lengths.device)
        return (key < self.lengths[:, None])[:, None, None, :]

    def _drop_keys_before(self, start: int, S: int) -> Mask:
        return Lengths((self.lengths - start).clamp(min=0))

    def check(self, B: int, H: int, T: int, S: int, device: torch.device) -> None:
        _check_batch("mask.lengths(lengths)", self.lengths, B, device)

    def __repr__(self) -> str:
        return f"lengths({_brief(self.lengths)})"


@dataclass(frozen=True, eq=False, repr=False)
class LeftPadding(Mask):
    """Padding on the left: all but the first `padding` keys per batch row.

    Made by `polyhead.mask.left_padding`.
    """

    padding: Tensor

    def _materialize_block(self, at: MaskBlock) -> Tensor:
        key = torch.arange(at.k_start, at.k_stop, device=self.padding.device)
        return (key >= self.padding[:, None])[:, None, None, :]

    def _drop_keys_before(self, start: int, S: int) -> Mask:
        return LeftPadding((self.padding - start).clamp(min=0))

    def check(self, B: int, H: int, T: int, S: int, device: torch.device) -> None:
        _check_batch("mask.left_padding(padding)", self.padding, B, device)

    def __repr__(self) -> str:
        return f"left_padding({_brief(self.padding)})"


@dataclass(frozen=True, eq=False, repr=False)
class Prefix(Mask):
    """Prefix: the first `n` keys, for every query. Made by `polyhead.mask.prefix`."""

    n: int

    def _materialize_block(self, at: MaskBlock) -> Tensor:
        return (torch.arange(at.k_start, at.k_stop, device=at.device) < self.n).expand(
            at.q_stop - at.q_start, -1
        )

    def key_range(
        self, start: int, stop: int, T: int, S: int, query_offset: int | Tensor | None = None
    ) -> tuple[int, int]:
        return 0, min(S, self.n)

    def _drop_keys_before(self, start: int, S: int) -> Mask:
        return Prefix(max(0, self.n - start))

    def __repr__(self) -> str:
        return f"prefix({self.n})"


@dataclass(frozen=True, eq=False, repr=False)
class Documents(Mask):
    """Packed documents: keys with the query's own id.

    Made by `polyhead.mask.documents` and `polyhead.mask.cu_seqlens`.
    """

    ids: Tensor

    def _materialize_block(self, at: MaskBlock) -> Tensor:
        self._check_sizes(at.T, at.S)
        key_ids = self.ids[..., at.k_start : at.k_stop]
        if at.query_offset is None:
            offset = at.S - at.T
            query_ids = self.ids[..., offset + at.q_start : offset + at.q_stop]
            allowed = query_ids[..., :, None] == key_ids[..., None, :]
        else:
            allowed = self._with_offset(at, key_ids)
        return allowed if allowed.ndim == 2 else allowed[:, None]

    def _with_offset(self, at: MaskBlock, key_ids: Tensor) -> Tensor:
        """(q, k) or (B, q, k). A query at no key's position has no document."""
        query = _query_positions(at, "end")
        is_token = (query >= 0) & (query < at.S)
        index = query.clamp(0, at.S - 1)
        if self.ids.ndim == 1:
            query_ids = self.ids[index]
        else:
            query_ids = self.ids.gather(1, index.expand(len(self.ids), -1))
        return (query_ids[..., :, None] == key_ids[..., None, :]) & is_token[..., None]

    def _drop_keys_before(self, start: int, S: int) -> Mask:
        return Documents(self.ids[..., start:])

    def check(self, B: int, H: int, T: int, S: int, device: torch.device) -> None:
        self._check_sizes(T, S)
        if self.ids.ndim == 2:
            _check_batch("mask.documents(ids)", self.ids, B, device)
        _check_device("mask.documents(ids)", self.ids, device)

    def _check_sizes(self, T: int, S: int) -> None:
        if self.ids.shape[-1] != S or T > S:
            raise ShapeError(
                "mask.documents(ids)",
                f"must hold one id for each of the S = {S} keys, the T = {T} queries among them",
                tuple(self.ids.shape),
                "give one id per key token, cached tokens included",
            )

    @property
    def _fixed_size(self) -> tuple[int | None, int | None]:
        return self.ids.shape[-1], self.ids.shape[-1]

    def __repr__(self) -> str:
        shown = _brief(self.ids) if self.ids.ndim == 1 else "x".join(map(str, self.ids.shape))
        return f"documents({shown})"


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Mask):
    """Dense mask: one boolean per query and key. Made by `polyhead.mask.dense`."""

    allowed: Tensor

    def _materialize_block(self, at: MaskBlock) -> Tensor:
        allowed = self.allowed
        if allowed.shape[-2] not in (1, at.T) or allowed.shape[-1] not in (1, at.S):
            raise ShapeError(
                "mask.dense(allowed)",
                f"must broadcast to T = {at.T} queries by S = {at.S} keys",
                tuple(allowed.shape),
                "materialize it at its own size",
            )
        if allowed.shape[-2] > 1:
            allowed = allowed[..., at.q_start : at.q_stop, :]
        return allowed if allowed.shape[-1] == 1 else allowed[..., at.k_start : at.k_stop]

    def _drop_keys_before(self, start: int, S: int) -> Mask:
        return self if self.allowed.shape[-1] == 1 else Dense(self.allowed[..., start:])

    def check(self, B: int, H: int, T: int, S: int, device: torch.device) -> None:
        shape = (1,) * (4 - self.allowed.ndim) + tuple(self.allowed.shape)
        if any(have not in (1, want) for have, want in zip(shape, (B, H, T, S), strict=True)):
            raise ShapeError(
                "mask.dense(allowed)",
                f"must broadcast to (B, H, T, S) = {(B, H, T, S)}",
                tuple(self.allowed.shape),
                "give each dimension its full size or 1",
            )
        _check_device("mask.dense(allowed)", self.allowed, device)

    @property
    def _fixed_size(self) -> tuple[int | None, int | None]:
        T, S = self.allowed.shape[-2:]
        return None if T == 1 else T, None if S == 1 else S

    def __repr__(self) -> str:
        return f"dense({'x'.join(str(size) for size in self.allowed.shape)})"


@dataclass(frozen=True, eq=False, repr=False)
class Custom(Mask):
    """Custom mask: a function of batch, head, query and key. Made by `polyhead.mask.custom`."""

    fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    batch: int = 1
    heads: int = 1
    align: Align = "end"

    def _materialize_block(self, at: MaskBlock) -> Tensor:
        batch = torch.arange(self.batch, device=at.device)[:, None, None, None]
        head = torch.arange(self.heads, device=at.device)[:, None, None]
        query, key = _positions(at, self.align)
        query = query if query.ndim == 4 else query[None, None]
        rows = max(self.batch, len(query))
        shape = (rows, self.heads, at.q_stop - at.q_start, at.k_stop - at.k_start)
        return _checked(self, self.fn(batch, head, query, key[None, None]), shape)

    def check(self, B: int, H: int, T: int, S: int, device: torch.device) -> None:
        for name, have, want in (("batch", self.batch, B), ("heads", self.heads, H)):
            if have not in (1, want):
                raise ShapeError(
                    f"mask.custom({name}=)",
                    f"must be 1 or the call's {want}",
                    have,
                    f"pass {name}=1 if fn does not depend on it, else the call's {want}",
                )

    def __repr__(self) -> str:
        return f"custom({getattr(self.fn, '__name__', repr(self.fn))})"


def _checked(mask: Custom, allowed: object, shape: tuple[int, ...]) -> Tensor:
    """Check that the caller's function returned a mask of this shape."""
    rule = "mask.custom(fn)"
    if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
        got = allowed.dtype if isinstance(allowed, Tensor) else type(allowed).__name__
        raise DtypeError(rule, "must return a bool tensor, True = may attend", got, "compare")
    have = (1,) * (len(shape) - allowed.ndim) + tuple(allowed.shape)
    if len(have) > len(shape) or any(a not in (1, b) for a, b in zip(have, shape, strict=True)):
        raise ShapeError(
            rule,
            f"must return a tensor that broadcasts to (batch, heads, T, S) = {shape}",
            tuple(allowed.shape),
            "compute it from the four indices alone, and pass batch= and heads= if it uses them",
        )
    return allowed.expand(shape)


def _offset(T: int, S: int, align: Align, query_offset: int | Tensor | None) -> int | Tensor:
    """Absolute position of query 0."""
    if align == "start":
        return 0
    return S - T if query_offset is None else query_offset


def _is_per_row(offset: int | Tensor) -> TypeIs[Tensor]:
    # (A traced size is a tensor without dimensions.)
    return isinstance(offset, Tensor) and offset.ndim > 0


def _query_positions(at: MaskBlock, align: Align) -> Tensor:
    """Absolute positions of the queries, (q,), or (B, q) if they differ by batch row."""
    rows = torch.arange(at.q_start, at.q_stop, device=at.device)
    offset = _offset(at.T, at.S, align, at.query_offset)
    return rows + (offset[:, None] if _is_per_row(offset) else offset)


def _positions(at: MaskBlock, align: Align) -> tuple[Tensor, Tensor]:
    """Absolute positions of the queries as a column, (q, 1) or (B, 1, q, 1), and of the keys."""
    query = _query_positions(at, align)
    column = query[:, None] if query.ndim == 1 else query[:, None, :, None]
    return column, torch.arange(at.k_start, at.k_stop, device=at.device)[None, :]


def _check_batch(name: str, tensor: Tensor, B: int, device: torch.device) -> None:
    if tensor.shape[0] != B:
        raise ShapeError(
            name,
            f"must have one entry per batch row, B = {B}",
            tensor.shape[0],
            "give one for each",
        )
    _check_device(name, tensor, device)


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise DeviceError(
            name, f"must be on the query's device, {device}", tensor.device, f'.to("{device}")'
        )


def _brief(tensor: Tensor) -> str:
    # A meta tensor has no values to show.
    if tensor.is_meta or len(tensor) > 8:
        return f"<{len(tensor)} entries>"
    return repr(tensor.tolist())
