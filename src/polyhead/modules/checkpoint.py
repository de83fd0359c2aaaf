"""Loading checkpoints that other spellings of the same module saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from polyhead.mask import Causal

__all__ = ["accept_either_projection", "accept_lecture_mask"]

_SEPARATE = ("W_query", "W_key", "W_value")


def accept_lecture_mask(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: Any
) -> None:
    """A load_state_dict pre-hook: the lecture's classes save a context_length^2 `mask` buffer.

    Ours hold the rule instead. The buffer is taken out if it says what the lecture's does (1
    above the diagonal: forbidden); another one would be lost, so loading it is an error.
    """
    saved = state_dict.pop(prefix + "mask", None)
    if saved is None:
        return
    error_messages: list[str] = args[-1]
    rule = getattr(module, "mask", None)
    if rule is None or Causal() not in rule.conjuncts:
        error_messages.append(
            f"{prefix}mask says that the checkpoint is causal; got a module with mask={rule!r}; "
            "build it with mask=polyhead.mask.causal(), or delete this entry"
        )
        return
    forbidden = saved.bool()
    square = saved.ndim == 2 and saved.shape[0] == saved.shape[1]
    expected = torch.ones_like(forbidden).triu(1) if square else None
    if expected is None or not torch.equal(forbidden, expected):
        inverted = expected is not None and torch.equal(forbidden, ~expected)
        what = "its inverse, 1 on and below the diagonal, as a" if inverted else "another"
        error_messages.append(
            f"{prefix}mask must be the lecture's causal mask, 1 above the diagonal; got {what} "
            f"{tuple(saved.shape)} tensor; pass the rule as mask= to the constructor and delete "
            "this entry"
        )


def accept_either_projection(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: Any
) -> None:
    """A load_state_dict pre-hook: a fused module loads separate projections, and the reverse."""
    fused = hasattr(module, "W_qkv")
    for kind in ("weight", "bias"):
        fused_key = f"{prefix}W_qkv.{kind}"
        separate_keys = [f"{prefix}{name}.{kind}" for name in _SEPARATE]
        if fused and all(key in state_dict for key in separate_keys):
            parts = [state_dict.pop(key) for key in separate_keys]
            rows = [part.shape[:1].numel() for part in parts]
            if rows != module.qkv_sizes:  # which may add up to as many
                error_messages: list[str] = args[-1]
                error_messages.append(
                    f"{prefix}W_query, W_key and W_value must have {module.qkv_sizes} rows of "
                    f"{kind}; got {rows}; load them into a module of the same num_heads, "
                    "num_kv_heads and head_dim"
                )
            state_dict[fused_key] = torch.cat(parts)
        elif not fused and fused_key in state_dict:
            sizes = [getattr(module, name).out_features for name in _SEPARATE]
            if state_dict[fused_key].shape[:1] != (sum(sizes),):
                error_messages = args[-1]
                error_messages.append(
                    f"{fused_key} must have {sum(sizes)} rows, {' + '.join(map(str, sizes))} of "
                    f"queries, keys and values; got {tuple(state_dict[fused_key].shape)}; load it "
                    "into a module of the same num_heads, num_kv_heads and head_dim"
                )
                continue
            # Copies: with assign=True they become parameters, which must not share memory.
            parts = [part.clone() for part in state_dict.pop(fused_key).split(sizes)]
            state_dict.update(zip(separate_keys, parts, strict=True))
