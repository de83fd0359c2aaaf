"""A mask that keeps its structure on its way through a transformers model.

transformers hands masks from where it makes them to the attention as tensors, and models look at
them on the way: their shape, a slice, a sum with something else. So this is a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from polyhead.mask import Mask

__all__ = ["StructuredMask"]

# What checkpointing and copy.deepcopy do.
_HANDING_ON = (torch.ops.aten.detach.default, torch.ops.aten.clone.default)


class StructuredMask(Tensor):
    """A bool tensor (B, 1, T, S), True = may attend, of which only the rule is held.

    Whatever is done with it but hand it on writes the booleans out, once, and goes on with them:
    a model that slices, adds or moves its mask gets what it would have got.

    Attributes:
        rule: the mask, or None for everybody.

    >>> import polyhead as ph
    >>> mask = StructuredMask(ph.mask.causal(), batch=1, T=2, S=3, device="cpu")
    >>> mask
    StructuredMask(causal(), shape=(1, 1, 2, 3))
    >>> mask[0, 0].int()
    tensor([[1, 1, 0],
            [1, 1, 1]], dtype=torch.int32)
    """

    rule: Mask | None
    _dense: Tensor | None

    # Else torch would call what an operation gives a StructuredMask too, without a rule.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(
        cls, rule: Mask | None, *, batch: int, T: int, S: int, device: torch.device | str
    ) -> StructuredMask:
        mask = Tensor._make_wrapper_subclass(
            cls, torch.Size((batch, 1, T, S)), dtype=torch.bool, device=torch.device(device)
        )
        mask.rule = rule
        mask._dense = None
        return mask

    def dense(self) -> Tensor:
        """The booleans, written out."""
        if self._dense is None:
            T, S = self.shape[2:]
            if self.rule is None:
                allowed = torch.ones(1, dtype=torch.bool, device=self.device)
            else:
                allowed = self.rule.materialize(T, S, device=self.device)
            self._dense = allowed.expand(self.shape)
        return self._dense

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _HANDING_ON:
            mask = args[0]
            batch, _, T, S = mask.shape
            return cls(mask.rule, batch=batch, T=T, S=S, device=mask.device)
        args, kwargs = tree_map_only(cls, cls.dense, (args, dict(kwargs or {})))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"StructuredMask({self.rule!r}, shape={tuple(self.shape)})"
