"""The primitive rules, each a small immutable value. `polyhead.mask` has their documentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from polyhead.errors import DeviceError, ShapeError
from polyhead.mask.algebra import Mask

__all__ = ["Align", "Causal", "Dense", "Documents", "LeftPadding", "Lengths", "Prefix", "Window"]

Align = Literal["end", "start"]


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
class LeftPadding(Mask):
    padding: Tensor

    def rows(
        self, start: int, stop: int, T: int, S: int, *, device: torch.device | str | None = None
    ) -> Tensor:
        key = torch.arange(S, device=self.padding.device)
        return (key >= self.padding[:, None])[:, None, None, :]

    def check(self, B: int, H: int, T: int, S: int, device: torch.device) -> None:
        _check_batch("mask.left_padding(padding)", self.padding, B, device)

    def __repr__(self) -> str:
        return f"left_padding({_brief(self.padding)})"


@dataclass(frozen=True, eq=False, repr=False)
class Prefix(Mask):
    n: int

    def rows(
        self, start: int, stop: int, T: int, S: int, *, device: torch.device | str | None = None
    ) -> Tensor:
        return (torch.arange(S, device=device) < self.n).expand(stop - start, S)

    def __repr__(self) -> str:
        return f"prefix({self.n})"


@dataclass(frozen=True, eq=False, repr=False)
class Documents(Mask):
    ids: Tensor

    def rows(
        self, start: int, stop: int, T: int, S: int, *, device: torch.device | str | None = None
    ) -> Tensor:
        query_ids = self.ids[..., S - T + start : S - T + stop]
        allowed = query_ids[..., :, None] == self.ids[..., None, :]
        return allowed if allowed.ndim == 2 else allowed[:, None]

    def check(self, B: int, H: int, T: int, S: int, device: torch.device) -> None:
        name = "mask.documents(ids)"
        if self.ids.shape[-1] != S or T > S:
            raise ShapeError(
                name,
                f"must name the document of each of the S = {S} keys, the T = {T} queries among "
                "them",
                tuple(self.ids.shape),
                "give one id a key token, of cached tokens too",
            )
        if self.ids.ndim == 2:
            _check_batch(name, self.ids, B, device)
        _check_device(name, self.ids, device)

    @property
    def _own_size(self) -> tuple[int | None, int | None]:
        return self.ids.shape[-1], self.ids.shape[-1]

    def __repr__(self) -> str:
        shown = _brief(self.ids) if self.ids.ndim == 1 else "x".join(map(str, self.ids.shape))
        return f"documents({shown})"


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


def _positions(
    start: int, stop: int, T: int, S: int, align: Align, device: torch.device | str | None
) -> tuple[Tensor, Tensor]:
    """Absolute positions of queries start .. stop - 1 as a column, and of the keys as a row."""
    offset = S - T if align == "end" else 0
    query = torch.arange(start, stop, device=device)[:, None] + offset
    return query, torch.arange(S, device=device)[None, :]


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


def _brief(tensor: Tensor) -> str:
    # A meta tensor has no values to show.
    if tensor.is_meta or len(tensor) > 8:
        return f"<{len(tensor)} entries>"
    return repr(tensor.tolist())
