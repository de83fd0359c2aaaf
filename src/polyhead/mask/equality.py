"""Equality and hash of masks: by structure, and by the values of the tensors that they hold."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

__all__ = ["equal_values", "field_values", "hashable"]


def field_values(mask: object) -> list[object]:
    """The fields of a dataclass, in order."""
    return [getattr(mask, field.name) for field in dataclasses.fields(mask)]  # type: ignore[arg-type]


def equal_values(a: object, b: object) -> bool:
    """True if two fields are equal; tensors by device, dtype and elements."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.device == b.device and a.dtype == b.dtype and _equal_tensors(a, b))
    return a == b


def hashable(value: object) -> object:
    """The contribution of a field to a hash: of a tensor its shape, without reading values."""
    return tuple(value.shape) if isinstance(value, Tensor) else value


def _equal_tensors(a: Tensor, b: Tensor) -> bool:
    """True if their values are equal; False if they cannot be read: in torch.compile, in vmap, on
    the meta device."""
    if torch.compiler.is_compiling():
        return False
    try:
        return torch.equal(a, b)
    except RuntimeError:
        return False
