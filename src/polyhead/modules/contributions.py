"""The output of multi-head attention, taken apart by head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polyhead.errors import ArgumentError
from polyhead.modules.weights import read_parameter, why_not_linear

__all__ = ["split_by_head"]


def split_by_head(contexts_bhte: Tensor, out_proj: nn.Module | None) -> Tensor:
    """What each head adds to the output, (B, H, T, features).

    out_proj reads the heads side by side, so its weight falls apart into one block a head, and
    out_proj([c_1, ..., c_H]) = c_1 @ block_1 + ... + c_H @ block_H + bias. Without an output
    projection each head adds itself in its own features.
    """
    _, H, _, E = contexts_bhte.shape
    if out_proj is None:
        weight = torch.eye(H * E, device=contexts_bhte.device, dtype=contexts_bhte.dtype)
    else:
        weight = _weight_of(out_proj, contexts_bhte.device)
    return torch.einsum("bhte,ohe->bhto", contexts_bhte, weight.unflatten(1, (H, E)))


def _weight_of(out_proj: nn.Module, device: torch.device) -> Tensor:
    if unreadable := why_not_linear(out_proj):
        raise ArgumentError(
            "out_proj",
            "must be a plain linear layer to be taken apart by head",
            unreadable.kind,
            unreadable.remedy,
        )
    weight = read_parameter(out_proj, "weight")
    assert weight is not None
    return weight.to(device)
