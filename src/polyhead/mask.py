"""Masks: who may attend to whom.

A mask is a small immutable value. **True means "may attend"**, always. Masks combine with `&`
(both must allow), `|` (either allows) and `~` (the opposite), and keep their structure, so that a
backend can ask what a mask is made of without building a T x S tensor. `materialize` is the truth
every backend is held to.

Positions are absolute: query t of T queries against S keys stands at position S - T + t, so that
the last query stands at the last key. (`align="start"` puts query t at position t instead: the
upper-left rule of `scaled_dot_product_attention` and ONNX.)

In the drawings a row is a query, a column a key, `x` may attend and `.` may not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from polyhead.errors import ArgumentError, DeviceError, DtypeError, ShapeError

__all__ = ["Mask", "causal", "dense", "lengths", "window"]

Align = Literal["end", "start"]


class Mask:
    """A rule that says which query may attend to which key. Build one with the functions here."""

    def materialize(self, T: int, S: int, *, device: torch.device | str | None = None) -> Tensor:
        """The mask as a bool tensor, True = may attend.

        Args:
            T: number of queries.
            S: number of keys.
            device: where to build it. Masks that hold tensors stay on their own device.

        Returns:
            bool tensor that broadcasts to (B, H, T, S): (T, S), or four dimensions where the
            answer differs between batch rows or heads. Dimensions of size 1 are left unexpanded.

        >>> causal().materialize(2, 3).int().tolist()
        [[1, 1, 0], [1, 1, 1]]
        """
        return self.rows(0, T, T, S, device=device)

    def rows(
        self, start: int, stop: int, T: int, S: int, *, device: torch.device | str | None = None
    ) -> Tensor:
        """Queries start .. stop - 1 of `materialize(T, S)`, without building the others.

        >>> causal().rows(1, 2, 2, 3).int().tolist()
        [[1, 1, 1]]
        """
        raise NotImplementedError

    def for_queries(self, start: int, stop: int, T: int) -> Mask:
        """This mask for a call on queries start .. stop - 1 of T, against the same keys.

        >>> causal().for_queries(1, 2, 2).materialize(1, 3).int().tolist()
        [[1, 1, 1]]
        """
        return Rows(self, start, stop, T)

    def check(self, B: int, H: int, T: int, S: int, device: torch.device) -> None:
        """Raise ShapeError or DeviceError if this mask cannot apply to such a call."""

    @property
    def conjuncts(self) -> tuple[Mask, ...]:
        """The masks that must all allow: the parts of an `&`, or this mask alone.

        >>> (causal() & window(before=2)).conjuncts
        (causal(), window(before=2))
        """
        return (self,)

    def draw(self, T: int, S: int, *, batch: int = 0, head: int = 0) -> str:
        """The mask as text: a row a query, a column a key, `x` may attend, `.` may not.

        >>> print(causal().draw(3, 5))
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
    def _own_size(self) -> tuple[int | None, int | None]:
        """The T and S that this mask fits; None where it fits any."""
        return None, None

    def __and__(self, other: Mask) -> Mask:
        return _combine(All, self, other)

    def __or__(self, other: Mask) -> Mask:
        return _combine(AnyOf, self, other)

    def __invert__(self) -> Mask:
        return Not(self)

    def __str__(self) -> str:
        # 8 is small, and large enough to show a rule that fits any size.
        T, S = (8 if size is None else size for size in self._own_size)
        return f"{self!r}\n{self.draw(T, S)}"

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(_same(a, b) for a, b in zip(_values(self), _values(other), strict=True))

    def __hash__(self) -> int:
        # Equal masks have equal structure; tensors count by shape, since hashing reads no values.
        return hash((type(self), tuple(_static(value) for value in _values(self))))


@dataclass(frozen=True, eq=False, repr=False)
class Causal(Mask):
    align: Align = "end"

    def rows(
        self, start: int, stop: int, T: int, S: int, *, device: torch.device | str | None = None
    ) -> Tensor:
        query, key = _positions(start, stop, T, S, self.align, device)
        return key <= query

    def __repr__(self) -> str:
        return "causal()" if self.align == "end" else f'causal(align="{self.align}")'


@dataclass(frozen=True, eq=False, repr=False)
class Window(Mask):
    before: int | None
    after: int | None
    align: Align = "end"

    def rows(
        self, start: int, stop: int, T: int, S: int, *, device: torch.device | str | None = None
    ) -> Tensor:
        query, key = _positions(start, stop, T, S, self.align, device)
        allowed = torch.ones(stop - start, S, dtype=torch.bool, device=device)
        if self.before is not None:
            allowed = allowed & (key >= query - self.before)
        if self.after is not None:
            allowed = allowed & (key <= query + self.after)
        return allowed

    def __repr__(self) -> str:
        sides = {"before": self.before, "after": self.after}
        words = [f"{name}={size}" for name, size in sides.items() if size is not None]
        if self.align != "end":
            words.append(f'align="{self.align}"')
        return f"window({', '.join(words)})"


@dataclass(frozen=True, eq=False, repr=False)
class Lengths(Mask):
    lengths: Tensor

    def rows(
        self, start: int, stop: int, T: int, S: int, *, device: torch.device | str | None = None
    ) -> Tensor:
        key = torch.arange(S, device=self.lengths.device)
        return (key < self.lengths[:, None])[:, None, None, :]

    def check(self, B: int, H: int, T: int, S: int, device: torch.device) -> None:
        _check_batch("mask.lengths(lengths)", self.lengths, B, device)

    def __repr__(self) -> str:
        return f"lengths({_brief(self.lengths)})"


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Mask):
    allowed: Tensor

    def rows(
        self, start: int, stop: int, T: int, S: int, *, device: torch.device | str | None = None
    ) -> Tensor:
        return self.allowed if self.allowed.shape[-2] == 1 else self.allowed[..., start:stop, :]

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
    def _own_size(self) -> tuple[int | None, int | None]:
        T, S = self.allowed.shape[-2:]
        return None if T == 1 else T, None if S == 1 else S

    def __repr__(self) -> str:
        return f"dense({'x'.join(str(size) for size in self.allowed.shape)})"


@dataclass(frozen=True, eq=False, repr=False)
class _Several(Mask):
    """What `&` and `|` share: they hold parts and pass questions on to them."""

    parts: tuple[Mask, ...]

    def check(self, B: int, H: int, T: int, S: int, device: torch.device) -> None:
        for part in self.parts:
            part.check(B, H, T, S, device)

    @property
    def _own_size(self) -> tuple[int | None, int | None]:
        # A part with a size of its own decides; the others fit any size.
        sizes = [part._own_size for part in self.parts]
        T = next((T for T, _ in sizes if T is not None), None)
        S = next((S for _, S in sizes if S is not None), None)
        return T, S


class All(_Several):
    """All parts must allow."""

    def rows(
        self, start: int, stop: int, T: int, S: int, *, device: torch.device | str | None = None
    ) -> Tensor:
        allowed = self.parts[0].rows(start, stop, T, S, device=device)
        for part in self.parts[1:]:
            allowed = allowed & part.rows(start, stop, T, S, device=device)
        return allowed

    @property
    def conjuncts(self) -> tuple[Mask, ...]:
        return self.parts

    def __repr__(self) -> str:
        return " & ".join(_bracketed(part) for part in self.parts)


class AnyOf(_Several):
    """One part allowing is enough."""

    def rows(
        self, start: int, stop: int, T: int, S: int, *, device: torch.device | str | None = None
    ) -> Tensor:
        allowed = self.parts[0].rows(start, stop, T, S, device=device)
        for part in self.parts[1:]:
            allowed = allowed | part.rows(start, stop, T, S, device=device)
        return allowed

    def __repr__(self) -> str:
        return " | ".join(_bracketed(part) for part in self.parts)


@dataclass(frozen=True, eq=False, repr=False)
class Not(Mask):
    """Allows what its part forbids."""

    part: Mask

    def rows(
        self, start: int, stop: int, T: int, S: int, *, device: torch.device | str | None = None
    ) -> Tensor:
        return ~self.part.rows(start, stop, T, S, device=device)

    def check(self, B: int, H: int, T: int, S: int, device: torch.device) -> None:
        self.part.check(B, H, T, S, device)

    @property
    def _own_size(self) -> tuple[int | None, int | None]:
        return self.part._own_size

    def __invert__(self) -> Mask:
        return self.part

    def __repr__(self) -> str:
        return f"~{_bracketed(self.part)}"


@dataclass(frozen=True, eq=False, repr=False)
class Rows(Mask):
    """Some of the queries of a mask: what one chunk of queries may attend to."""

    part: Mask
    start: int
    stop: int
    T: int

    def rows(
        self, start: int, stop: int, T: int, S: int, *, device: torch.device | str | None = None
    ) -> Tensor:
        return self.part.rows(self.start + start, self.start + stop, self.T, S, device=device)

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
    def _own_size(self) -> tuple[int | None, int | None]:
        S = self.part._own_size[1]
        return self.stop - self.start, self.T if S is None else S

    def __repr__(self) -> str:
        return f"{_bracketed(self.part)}.for_queries({self.start}, {self.stop}, {self.T})"


def causal(align: Align = "end") -> Mask:
    """Each query may attend to keys at its own position and before.

    With T = 3 queries and S = 5 keys (two keys came before, say from a cache)::

        causal()        causal(align="start")
        x x x . .       x . . . .
        x x x x .       x x . . .
        x x x x x       x x x . .

    With T = 4 and S = 2 the first two queries of `causal()` stand before every key and see
    nothing; their output is zero::

        causal()        causal(align="start")
        . .             x .
        . .             x x
        x .             x x
        x x             x x

    Args:
        align: "end" (default, flash-attention's rule: the last query stands at the last key) or
            "start" (the rule of `scaled_dot_product_attention` and ONNX: query t at key t).

    >>> causal()
    causal()
    """
    return Causal(_check_align(align))


def window(before: int | None = None, after: int | None = None, *, align: Align = "end") -> Mask:
    """Each query may attend to `before` keys before it, itself, and `after` keys after it.

    With T = S = 5::

        window(before=1)    window(before=1, after=1)   causal() & window(before=1)
        x x x x x           x x . . .                   x . . . .
        x x x x x           x x x . .                   x x . . .
        . x x x x           . x x x .                   . x x . .
        . . x x x           . . x x x                   . . x x .
        . . . x x           . . . x x                   . . . x x

    So `causal() & window(before=511)` sees 512 keys: 511 before, and itself.

    Args:
        before: how many keys before the query's position, at least 0; None: no limit.
        after: how many keys after the query's position, at least 0; None: no limit.
        align: as in `causal`.

    >>> window(before=1, after=0) == causal() & window(before=1)   # same rule, other structure
    False
    """
    for name, size in (("before", before), ("after", after)):
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 0):
            raise ArgumentError(
                name, "must be an integer of at least 0, or None", repr(size), "count the keys"
            )
    if before is None and after is None:
        raise ArgumentError(
            "before, after", "must not both be None", "no limit at all", "give one of them"
        )
    return Window(before, after, _check_align(align))


def lengths(lengths: Tensor | Sequence[int]) -> Mask:
    """Batch row b may attend to its first `lengths[b]` keys: right padding is never seen.

    For a row with length 3, S = 5 (all queries alike; a length of 0 sees nothing)::

        x x x . .
        x x x . .

    Args:
        lengths: (B,) integers, in keys.

    >>> lengths([3, 5]).materialize(1, 5).int().tolist()
    [[[[1, 1, 1, 0, 0]]], [[[1, 1, 1, 1, 1]]]]
    """
    return Lengths(_batch_integers("lengths", lengths))


def dense(allowed: Tensor) -> Mask:
    """A mask written out. **True means "may attend"**, as in `scaled_dot_product_attention`.

    `nn.MultiheadAttention` uses the opposite polarity (True = forbidden): pass `~their_mask`.

    Args:
        allowed: bool, (T, S), or four dimensions that broadcast to (B, H, T, S).

    >>> print(dense(torch.tensor([[True, False], [True, True]])).draw(2, 2))
    x .
    x x
    """
    if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
        got = allowed.dtype if isinstance(allowed, Tensor) else type(allowed).__name__
        raise DtypeError(
            "allowed",
            "must be a bool tensor, True = may attend",
            got,
            "pass numbers that are added to the scores as attention(bias=...)",
        )
    if allowed.ndim not in (2, 4):
        raise ShapeError(
            "allowed",
            "must have 2 dimensions (T, S) or 4 (B, H, T, S)",
            tuple(allowed.shape),
            "unsqueeze the missing ones: mask[:, None] if it differs by batch row",
        )
    return Dense(allowed)


def _combine(kind: type[_Several], left: Mask, right: Mask) -> Mask:
    """`left op right`, flattened, each part once: `a & (b & a)` is `a & b`."""
    if not isinstance(right, Mask):
        return NotImplemented
    parts: list[Mask] = []
    for side in (left, right):
        for part in side.parts if isinstance(side, kind) else (side,):
            if part not in parts:
                parts.append(part)
    return parts[0] if len(parts) == 1 else kind(tuple(parts))


def _positions(
    start: int, stop: int, T: int, S: int, align: Align, device: torch.device | str | None
) -> tuple[Tensor, Tensor]:
    """Absolute positions of queries start .. stop - 1 as a column, and of the keys as a row."""
    offset = S - T if align == "end" else 0
    query = torch.arange(start, stop, device=device)[:, None] + offset
    return query, torch.arange(S, device=device)[None, :]


def _batch_integers(name: str, values: Tensor | Sequence[int]) -> Tensor:
    tensor = values if isinstance(values, Tensor) else torch.tensor(values)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise DtypeError(name, "must be int32 or int64", tensor.dtype, "convert with .long()")
    if tensor.ndim != 1:
        raise ShapeError(
            name, "must have one entry a batch row, (B,)", tuple(tensor.shape), "flatten it"
        )
    return tensor


def _check_batch(name: str, tensor: Tensor, B: int, device: torch.device) -> None:
    if tensor.shape[0] != B:
        raise ShapeError(
            name, f"must have one entry a batch row, B = {B}", tensor.shape[0], "give one for each"
        )
    _check_device(name, tensor, device)


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise DeviceError(
            name, f"must be on the query's device, {device}", tensor.device, f'.to("{device}")'
        )


def _check_align(align: Align) -> Align:
    if align not in ("end", "start"):
        raise ArgumentError("align", 'must be "end" or "start"', repr(align), "see mask.causal")
    return align


def _values(mask: Mask) -> list[object]:
    return [getattr(mask, field.name) for field in dataclasses.fields(mask)]  # type: ignore[arg-type]


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.device == b.device and a.dtype == b.dtype and torch.equal(a, b))
    return a == b


def _static(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else value


def _bracketed(mask: Mask) -> str:
    return f"({mask!r})" if isinstance(mask, _Several) else repr(mask)


def _brief(tensor: Tensor) -> str:
    # A meta tensor has no values to show.
    if tensor.is_meta or len(tensor) > 8:
        return f"<{len(tensor)} rows>"
    return repr(tensor.tolist())
