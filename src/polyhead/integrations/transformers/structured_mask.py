"""Structured mask: a lazy bool tensor that carries a polyhead mask through a transformers model."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.integrations.transformers.lazy_tensor import LazyTensor
from polyhead.mask import Mask

__all__ = ["StructuredMask"]


class StructuredMask(LazyTensor):
    """Lazy bool tensor (B, 1, T, S), True = may attend, that stores only a polyhead mask.

    It is materialized if a model slices it, adds to it or moves it.

    Attributes:
        rule: the mask, or None if everything is allowed.

    >>> import polyhead as ph
    >>> mask = StructuredMask(ph.mask.causal(), batch=1, T=2, S=3, device="cpu")
    >>> mask
    StructuredMask(causal(), shape=(1, 1, 2, 3))
    >>> mask[0, 0].int()
    tensor([[1, 1, 0],
            [1, 1, 1]], dtype=torch.int32)
    """

    rule: Mask | None

    def __new__(
        cls, rule: Mask | None, *, batch: int, T: int, S: int, device: torch.device | str
    ) -> StructuredMask:
        mask: StructuredMask = cls._wrap((batch, 1, T, S), torch.bool, torch.device(device))
        mask.rule = rule
        return mask

    def _materialize(self) -> Tensor:
        T, S = self.shape[2:]
        if self.rule is None:
            allowed = torch.ones(1, dtype=torch.bool, device=self.device)
        else:
            allowed = self.rule.materialize(T, S, device=self.device)
        return allowed.expand(self.shape)

    def _alias(self) -> StructuredMask:
        batch, _, T, S = self.shape
        return StructuredMask(self.rule, batch=batch, T=T, S=S, device=self.device)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"StructuredMask({self.rule!r}, shape={tuple(self.shape)})"
