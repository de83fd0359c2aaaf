"""How a tensor must lie in memory for a fused kernel."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["maybe_contiguous"]


def maybe_contiguous(tensor: Tensor) -> Tensor:
    """The tensor with its features side by side, the one layout that fused kernels ask for."""
    if tensor.stride(-1) == 1:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
