"""Function transforms, which kernels do not know and the definition does."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

__all__ = ["transform_reasons"]


def transform_reasons() -> list[str]:
    """Why a kernel must not run now: torch.func or forward-mode differentiation looks on."""
    if torch.compiler.is_compiling():  # which cannot trace the question
        return []
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return ["has no forward-mode derivative and no torch.func transform; one is active"]
    return []
