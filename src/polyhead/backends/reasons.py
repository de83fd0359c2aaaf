"""Reasons to refuse that several backends share, each told in the same words."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from polyhead.backends.tracing import is_traced
from polyhead.call import AttentionCall
from polyhead.mask import Custom, Mask

__all__ = [
    "custom_reasons",
    "dtype_name",
    "dtype_reasons",
    "tracing_reasons",
    "transform_reasons",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as people write it.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def dtype_reasons(call: AttentionCall) -> list[str]:
    """Why a fused kernel cannot run numbers of this type."""
    if call.dtype in _DTYPES:
        return []
    return [f"runs float32, bfloat16 and float16; got {dtype_name(call.dtype)}"]


def custom_reasons(mask: Mask | None) -> list[str]:
    """Why a kernel that needs structure cannot run this mask: some rule of it has none."""
    if mask is None:
        return []
    return [
        f"runs masks of known structure, no {rule!r}"
        for rule in mask.primitives()
        if isinstance(rule, Custom)
    ]


def transform_reasons() -> list[str]:
    """Why a kernel must not run now: torch.func or forward-mode differentiation looks on."""
    if torch.compiler.is_compiling():  # which cannot trace the question
        return []
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return ["has no forward-mode derivative and no torch.func transform; one is active"]
    return []


def tracing_reasons() -> list[str]:
    """Why a kernel that is not torch's own operator must not run now."""
    return ["is no operator of torch's own; torch.jit.trace records those only"] * is_traced()
