"""Type hints shared by modules and results, for type checkers and editors alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

__all__ = ["MaybeNone", "signature_of"]

_F = TypeVar("_F", bound=Callable[..., Any])

# `X | MaybeNone`: None unless requested, so that the requester need not assert that it is there.
MaybeNone: TypeAlias = Any


def signature_of(forward: _F) -> Callable[[Callable[..., Any]], _F]:
    """Decorator of a `__call__` with the signature and the overloads of `forward`.

    `nn.Module` declares `__call__: Callable[..., Any]`. Under `TYPE_CHECKING` a module replaces
    that declaration, and at run time it keeps `nn.Module.__call__`, with its hooks.
    """
    raise NotImplementedError("signature_of is for type checkers: use it under TYPE_CHECKING")
