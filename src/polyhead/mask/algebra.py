"""Mask base class and algebra: `&`, `|`, `~`, and slices of queries or keys."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from polyhead.errors import ArgumentError, ShapeError
from polyhead.mask.equality import equal_values, field_values, hashable

__all__ = ["And", "KeySlice", "Mask", "MaskBlock", "Not", "Or", "QuerySlice", "conjunction"]


class MaskBlock(NamedTuple):
    """Queries q_start .. q_stop - 1 of T against keys k_start .. k_stop - 1 of S.

    `query_offset` is the position of query 0, (B,) if it differs by batch row; None: S - T.
    """

    q_start: int
    q_stop: int
    T: int
    k_start: int
    k_stop: int
    S: int
    device: torch.device | str | None
    query_offset: int | Tensor | None = None


class Mask:
    """Attention mask: a predicate of query and key. Built by the functions of `polyhead.mask`."""

    def materialize(
        self,
        T: int,
        S: int,
        *,
        query_offset: int | Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The mask as a bool tensor, True = may attend.

        Args:
            T: number of queries.
            S: number of keys.
            query_offset: position of query 0 among the keys, as in `attention`; None: S - T.
            device: device of the result. Masks that hold tensors stay on their own device.

        Returns:
            bool tensor that broadcasts to (B, H, T, S): (T, S), or four dimensions if it differs
            between batch rows or heads. Dimensions of size 1 are not expanded.

        >>> import polyhead as ph
        >>> ph.mask.causal().materialize(2, 3).int().tolist()
        [[1, 1, 0], [1, 1, 1]]
        """
        return self.materialize_rows(0, T, T, S, query_offset=query_offset, device=device)

    def materialize_rows(
        self,
        start: int,
        stop: int,
        T: int,
        S: int,
        *,
        keys: tuple[int, int] | None = None,
        query_offset: int | Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Queries start .. stop - 1 of `materialize(T, S)`, without building the others.

        With `keys` = (k_start, k_stop) only the columns of keys k_start .. k_stop - 1.

        >>> import polyhead as ph
        >>> ph.mask.causal().materialize_rows(1, 2, 2, 3).int().tolist()
        [[1, 1, 1]]
        >>> ph.mask.causal().materialize_rows(0, 2, 2, 3, keys=(1, 3)).int().tolist()
        [[1, 0], [1, 1]]
        """
        k_start, k_stop = (0, S) if keys is None else keys
        return self._materialize_block(
            MaskBlock(start, stop, T, k_start, k_stop, S, device, query_offset)
        )

    def _materialize_block(self, at: MaskBlock) -> Tensor:
        raise NotImplementedError

    def for_queries(self, start: int, stop: int, T: int) -> Mask:
        """This mask for a call on queries start .. stop - 1 of T, against the same keys.

        >>> import polyhead as ph
        >>> ph.mask.causal().for_queries(1, 2, 2).materialize(1, 3).int().tolist()
        [[1, 1, 1]]
        """
        return QuerySlice(self, start, stop, T)

    def for_keys(self, start: int, S: int) -> Mask:
        """This mask for a call on keys start .. S - 1 of S; queries keep their positions.

        For a rolling cache, which has dropped the keys before `start`.

        >>> import polyhead as ph
        >>> ph.mask.prefix(3).for_keys(1, 5)                        # keys 1 and 2 remain
        prefix(2)
        """
        return self if start == 0 else self._drop_keys_before(start, S)

    def key_range(
        self, start: int, stop: int, T: int, S: int, query_offset: int | Tensor | None = None
    ) -> tuple[int, int]:
        """Range (k_start, k_stop) of keys that queries start .. stop - 1 may attend to.

        Keys outside of k_start .. k_stop - 1 are masked. Tensors are not read, so the range can be
        too wide. `query_offset` is as in `materialize`.

        >>> import polyhead as ph
        >>> (ph.mask.causal() & ph.mask.window(before=2)).key_range(10, 12, 100, 100)
        (8, 12)
        """
        return 0, S

    def _drop_keys_before(self, start: int, S: int) -> Mask:
        return KeySlice(self, start, S)

    def check(self, B: int, H: int, T: int, S: int, device: torch.device) -> None:
        """Raise ShapeError or DeviceError if this mask cannot apply to such a call."""

    def primitives(self) -> Iterator[Mask]:
        """The primitive rules of this mask, however they are combined.

        >>> import polyhead as ph
        >>> [*(ph.mask.causal() | ~ph.mask.prefix(3)).primitives()]
        [causal(), prefix(3)]
        """
        yield self

    @property
    def conjuncts(self) -> tuple[Mask, ...]:
        """The masks that must all allow: the parts of an `&`, or this mask alone.

        >>> import polyhead as ph
        >>> (ph.mask.causal() & ph.mask.window(before=2)).conjuncts
        (causal(), window(before=2))
        """
        return (self,)

    def draw(self, T: int, S: int, *, batch: int = 0, head: int = 0) -> str:
        """The mask as text: one row per query, one column per key, `x` may attend, `.` may not.

        >>> import polyhead as ph
        >>> print(ph.mask.causal().draw(3, 5))
        x x x . .
        x x x x .
        x x x x x
        """
        allowed = self.materialize(T, S)
        if allowed.ndim == 4:  # a dimension of size 1 serves every batch row or head
            allowed = allowed[min(batch, allowed.shape[0] - 1), min(head, allowed.shape[1] - 1)]
        rows = allowed.expand(T, S).tolist()
        return "\n".join(" ".join("x" if may else "." for may in row) for row in rows)

    @property
    def _fixed_size(self) -> tuple[int | None, int | None]:
        """The T and S that this mask fits; None if it fits any."""
        return None, None

    def __and__(self, other: Mask) -> Mask:
        return _combine(And, self, other)

    def __or__(self, other: Mask) -> Mask:
        return _combine(Or, self, other)

    def __invert__(self) -> Mask:
        return Not(self)

    def __bool__(self) -> bool:
        """Raise ArgumentError: `and`, `or` and `not` would silently drop a mask."""
        raise ArgumentError(
            "mask",
            "must not be a condition of `and`, `or`, `not` or `if`",
            repr(self),
            "write &, | or ~, or compare with `is None`",
        )

    def __str__(self) -> str:
        # 8 is small, and large enough to show a rule that fits any size.
        T, S = (8 if size is None else size for size in self._fixed_size)
        return f"{self!r}\n{self.draw(T, S)}"

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(
            equal_values(a, b) for a, b in zip(field_values(self), field_values(other), strict=True)
        )

    def __hash__(self) -> int:
        # Equal masks have equal structure; tensors are hashed by shape, without reading values.
        return hash((type(self), tuple(hashable(value) for value in field_values(self))))


@dataclass(frozen=True, eq=False, repr=False)
class _Several(Mask):
    """Base of `And` and `Or`: a tuple of parts, to which methods are delegated."""

    parts: tuple[Mask, ...]

    def check(self, B: int, H: int, T: int, S: int, device: torch.device) -> None:
        for part in self.parts:
            part.check(B, H, T, S, device)

    def primitives(self) -> Iterator[Mask]:
        for part in self.parts:
            yield from part.primitives()

    def _drop_keys_before(self, start: int, S: int) -> Mask:
        return type(self)(tuple(part.for_keys(start, S) for part in self.parts))

    @property
    def _fixed_size(self) -> tuple[int | None, int | None]:
        # A part of fixed size decides; documents fit any smaller T, the others any size.
        sizes = [part._fixed_size for part in self.parts]
        T = min((T for T, _ in sizes if T is not None), default=None)
        S = min((S for _, S in sizes if S is not None), default=None)
        return T, S


class And(_Several):
    """Conjunction: every part must allow."""

    def _materialize_block(self, at: MaskBlock) -> Tensor:
        return functools.reduce(operator.and_, (part._materialize_block(at) for part in self.parts))

    def key_range(
        self, start: int, stop: int, T: int, S: int, query_offset: int | Tensor | None = None
    ) -> tuple[int, int]:
        k_starts, k_stops = zip(
            *(part.key_range(start, stop, T, S, query_offset) for part in self.parts), strict=True
        )
        return max(k_starts), min(k_stops)

    @property
    def conjuncts(self) -> tuple[Mask, ...]:
        return self.parts

    def __repr__(self) -> str:
        return " & ".join(_bracketed(part) for part in self.parts)


class Or(_Several):
    """Disjunction: at least one part must allow."""

    def _materialize_block(self, at: MaskBlock) -> Tensor:
        return functools.reduce(operator.or_, (part._materialize_block(at) for part in self.parts))

    def key_range(
        self, start: int, stop: int, T: int, S: int, query_offset: int | Tensor | None = None
    ) -> tuple[int, int]:
        k_starts, k_stops = zip(
            *(part.key_range(start, stop, T, S, query_offset) for part in self.parts), strict=True
        )
        return min(k_starts), max(k_stops)

    def __repr__(self) -> str:
        return " | ".join(_bracketed(part) for part in self.parts)


@dataclass(frozen=True, eq=False, repr=False)
class Not(Mask):
    """Complement: allows exactly the pairs that its part forbids."""

    part: Mask

    def _materialize_block(self, at: MaskBlock) -> Tensor:
        return ~self.part._materialize_block(at)

    def primitives(self) -> Iterator[Mask]:
        return self.part.primitives()

    def _drop_keys_before(self, start: int, S: int) -> Mask:
        return Not(self.part.for_keys(start, S))

    def check(self, B: int, H: int, T: int, S: int, device: torch.device) -> None:
        self.part.check(B, H, T, S, device)

    @property
    def _fixed_size(self) -> tuple[int | None, int | None]:
        return self.part._fixed_size

    def __invert__(self) -> Mask:
        return self.part

    def __repr__(self) -> str:
        return f"~{_bracketed(self.part)}"


@dataclass(frozen=True, eq=False, repr=False)
class QuerySlice(Mask):
    """Query slice of a mask: queries start .. stop - 1 of T."""

    part: Mask
    start: int
    stop: int
    T: int

    def _materialize_block(self, at: MaskBlock) -> Tensor:
        return self.part._materialize_block(
            at._replace(
                q_start=self.start + at.q_start,
                q_stop=self.start + at.q_stop,
                T=self.T,
                query_offset=_shifted(at.query_offset, -self.start),
            )
        )

    def primitives(self) -> Iterator[Mask]:
        return self.part.primitives()

    def key_range(
        self, start: int, stop: int, T: int, S: int, query_offset: int | Tensor | None = None
    ) -> tuple[int, int]:
        offset = _shifted(query_offset, -self.start)
        return self.part.key_range(self.start + start, self.start + stop, self.T, S, offset)

    def _drop_keys_before(self, start: int, S: int) -> Mask:
        return QuerySlice(self.part.for_keys(start, S), self.start, self.stop, self.T)

    def check(self, B: int, H: int, T: int, S: int, device: torch.device) -> None:
        if self.stop - self.start != T:
            raise ShapeError(
                "mask.for_queries(start, stop)",
                f"must cover the call's T = {T} queries",
                f"{self.start} .. {self.stop}",
                "give the range of this chunk",
            )
        self.part.check(B, H, self.T, S, device)

    @property
    def _fixed_size(self) -> tuple[int | None, int | None]:
        S = self.part._fixed_size[1]
        return self.stop - self.start, self.T if S is None else S

    def __repr__(self) -> str:
        return f"{_bracketed(self.part)}.for_queries({self.start}, {self.stop}, {self.T})"


@dataclass(frozen=True, eq=False, repr=False)
class KeySlice(Mask):
    """Key slice of a mask: keys first .. S - 1 of S."""

    part: Mask
    first: int
    S: int

    def _materialize_block(self, at: MaskBlock) -> Tensor:
        return self.part._materialize_block(
            at._replace(
                k_start=self.first + at.k_start,
                k_stop=self.first + at.k_stop,
                S=self.S,
                query_offset=_shifted(at.query_offset, self.first),
            )
        )

    def primitives(self) -> Iterator[Mask]:
        return self.part.primitives()

    def key_range(
        self, start: int, stop: int, T: int, S: int, query_offset: int | Tensor | None = None
    ) -> tuple[int, int]:
        offset = _shifted(query_offset, self.first)
        k_start, k_stop = self.part.key_range(start, stop, T, self.S, offset)
        return max(k_start - self.first, 0), k_stop - self.first

    def _drop_keys_before(self, start: int, S: int) -> Mask:
        return self.part.for_keys(self.first + start, self.S)

    def check(self, B: int, H: int, T: int, S: int, device: torch.device) -> None:
        if self.S - self.first != S:
            raise ShapeError(
                "mask.for_keys(start, S)",
                f"must leave the call's S = {S} keys",
                f"{self.first} .. {self.S}",
                "give the first remaining key, and the number of keys before the slice",
            )
        self.part.check(B, H, T, self.S, device)

    @property
    def _fixed_size(self) -> tuple[int | None, int | None]:
        return self.part._fixed_size[0], self.S - self.first

    def __repr__(self) -> str:
        return f"{_bracketed(self.part)}.for_keys({self.first}, {self.S})"


def _shifted(query_offset: int | Tensor | None, by: int) -> int | Tensor | None:
    return None if query_offset is None else query_offset + by


def conjunction(parts: Sequence[Mask]) -> Mask | None:
    """The mask that all parts must allow; None without parts.

    Unlike `&` it compares no masks by their values, which torch.compile cannot trace.
    """
    return And(tuple(parts)) if len(parts) > 1 else next(iter(parts), None)


def _combine(kind: type[_Several], left: Mask, right: Mask) -> Mask:
    """Combine two masks, flattened, each part once: `a & (b & a)` is `a & b`."""
    if not isinstance(right, Mask):
        return NotImplemented
    parts: list[Mask] = []
    for side in (left, right):
        for part in side.parts if isinstance(side, kind) else (side,):
            if part not in parts:
                parts.append(part)
    return parts[0] if len(parts) == 1 else kind(tuple(parts))


def _bracketed(mask: Mask) -> str:
    return f"({mask!r})" if isinstance(mask, _Several) else repr(mask)
