"""Lazy tensor: a wrapper subclass without data that materializes on first use.

transformers passes masks, keys and values to the attention as tensors, and models use them on the
way: their shape, a slice, a sum. So a structured mask or a cache view must be a tensor too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["LazyTensor"]

# Used by checkpointing and copy.deepcopy; subclasses may stay lazy.
_ALIASING = (torch.ops.aten.detach.default, torch.ops.aten.clone.default)


class LazyTensor(Tensor):
    """Tensor without data, materialized once by the first operation on it (see `_alias`)."""

    _dense: Tensor | None

    # Otherwise torch would wrap the results of operations as LazyTensors without data.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def _wrap(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
        lazy = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=device)
        lazy._dense = None
        return lazy

    def dense(self) -> Tensor:
        """Return the plain tensor, materialized once."""
        if self._dense is None:
            self._dense = self._materialize()
        return self._dense

    def _materialize(self) -> Tensor:
        """Compute the plain tensor."""
        raise NotImplementedError

    def _alias(self) -> Tensor:
        """Return an equal tensor, lazy if possible."""
        return self.dense().clone()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _ALIASING:
            return args[0]._alias()
        args, kwargs = tree_map_only(LazyTensor, LazyTensor.dense, (args, dict(kwargs or {})))
        return func(*args, **kwargs)
