"""Keys or values that stay where a cache holds them on their way through a transformers model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyhead.integrations.transformers.lazy_tensor import StandIn
from polyhead.cache_view import Stored

__all__ = ["HeldTensor", "as_stored", "as_tensor"]


class HeldTensor(StandIn):
    """Keys or values (B, G, S, size) of a cache that holds them as codes.

    Our attention function reads them where they are; whoever else computes with them gets a tensor
    made of them. Valid until the cache that gave it is changed.

    Attributes:
        stored: what the cache gave.

    >>> import polyhead as ph
    >>> cache = ph.KVCache(1, 8, 2, 4, storage=torch.int8)
    >>> key, _ = cache.append_stored(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    >>> HeldTensor(key)
    HeldTensor(int8 codes, shape=(1, 2, 3, 4))
    >>> HeldTensor(key).sum()
    tensor(24.)
    """

    stored: Stored

    def __new__(cls, stored: Stored) -> HeldTensor:
        held: HeldTensor = cls._of_shape(stored.shape, stored.dtype, stored.data.device)
        held.stored = stored
        return held

    def _make(self) -> Tensor:
        return self.stored.gather()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dense().clone()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"HeldTensor({self.stored}, shape={tuple(self.shape)})"


def as_tensor(given: Tensor | Stored) -> Tensor:
    """What a cache gave, as a tensor to hand through a model."""
    if not isinstance(given, Stored):
        return given
    # torch.compile traces no tensor of our own making.
    return given.gather() if torch.compiler.is_compiling() else HeldTensor(given)


def as_stored(tensor: Tensor) -> Tensor | Stored:
    """What a cache gave, of the tensor that came through a model."""
    return tensor.stored if isinstance(tensor, HeldTensor) else tensor
