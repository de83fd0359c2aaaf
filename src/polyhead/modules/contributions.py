"""The output of multi-head attention, taken apart by head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["split_by_head"]


def split_by_head(contexts_bhte: Tensor, out_proj: nn.Linear | None) -> Tensor:
    """What each head adds to the output, (B, H, T, features).

    out_proj reads the heads side by side, so its weight falls apart into one block a head, and
    out_proj([c_1, ..., c_H]) = c_1 @ block_1 + ... + c_H @ block_H + bias. Without an output
    projection each head adds itself in its own features.
    """
    _, H, _, E = contexts_bhte.shape
    weight = (
        torch.eye(H * E, device=contexts_bhte.device, dtype=contexts_bhte.dtype)
        if out_proj is None
        else out_proj.weight
    )
    return torch.einsum("bhte,ohe->bhto", contexts_bhte, weight.unflatten(1, (H, E)))
