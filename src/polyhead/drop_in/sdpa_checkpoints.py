"""Calls made for `torch.utils.checkpoint`, which makes them again in the backward pass."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

__all__ = ["is_recomputed_outside"]

_CHECKPOINT_FILE = torch.utils.checkpoint.__file__
_CALL_FILE = nn.Module._call_impl.__code__.co_filename


def is_recomputed_outside(
    needs_grad: bool, dropout_p: Any, is_entered: Callable[[object], bool]
) -> bool:
    """True if a recomputation would not come by here: torch has to compute both.

    A recomputation has to save the same tensors as the forward pass, and to drop the same weights.
    It begins at the checkpoint's function, so it comes by here if a module that enters the mode
    stands between the two.

    Args:
        needs_grad: whether the call has a backward pass. (A reentrant checkpoint's first run has
            none: without dropout its recomputation may be torch's.)
        dropout_p: as in the call.
        is_entered: whether a module enters the mode when it is called.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks
    if not dropout_p and not (needs_grad and hooks(True) is not None):
        return False
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file == _CHECKPOINT_FILE:
            return True
        is_module = file == _CALL_FILE and frame.f_code.co_name == "_call_impl"
        if is_module and is_entered(frame.f_locals.get("self")):
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return False
