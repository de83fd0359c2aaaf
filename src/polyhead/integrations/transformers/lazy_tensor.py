"""A tensor that stands for numbers it does not hold, and makes them for whoever computes with it.

transformers hands masks, keys and values from where they are made to the attention as tensors, and
models look at them on the way: their shape, a slice, a sum with something else. So what keeps a
structure on that way is a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["LazyTensor"]

# What checkpointing and copy.deepcopy do.
_HANDING_ON = (torch.ops.aten.detach.default, torch.ops.aten.clone.default)


class LazyTensor(Tensor):
    """Whatever is done with it but hand it on makes the numbers, once, and goes on with them."""

    _numbers: Tensor | None

    # Else torch would call what an operation gives a LazyTensor too, of nothing.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def _wrap(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
        stand_in = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=device)
        stand_in._numbers = None
        return stand_in

    def dense(self) -> Tensor:
        """The numbers, as a plain tensor."""
        if self._numbers is None:
            self._numbers = self._materialize()
        return self._numbers

    def _materialize(self) -> Tensor:
        """The numbers."""
        raise NotImplementedError

    def _alias(self) -> Tensor:
        """What stands for the same where it is only handed on."""
        return self.dense().clone()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _HANDING_ON:
            return args[0]._alias()
        args, kwargs = tree_map_only(LazyTensor, LazyTensor.dense, (args, dict(kwargs or {})))
        return func(*args, **kwargs)
