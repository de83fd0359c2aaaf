"""Sizes at which torch's own kernel is as fast: thresholds in query-key pairs per head.

Measured in float32 with two threads on AVX-512, torch 2.13, as the least of many calls taken in
turn. A call of polyhead costs 30 us before its kernel, in training 300 us, and its tiles need some
rows to pay: below so many pairs torch's function has the call.
"""

from __future__ import annotations

import torch

from polyhead.drop_in.sdpa_arguments import SdpaArguments
from polyhead.mask import Dense

__all__ = ["size_reason"]

# Least T * S per head, in inference and in training.
_FULL = (2**16, 2**17)  # no mask, a dense mask, a mask that is added
_SPARSE = (2**14, 2**15)  # half of the pairs or less, by a rule: causal, windows, documents
_GROUPED = (2**11, 2**17)  # fewer KV heads than query heads
_MATH = (2**11, 2**14)  # dropout, or E != D: torch has no fused kernel
_LEARNED_MASK = (2**11, 2**15)  # nor for the gradient of a mask


def size_reason(a: SdpaArguments) -> str | None:
    """Reason why torch is as fast for these sizes; None: polyhead is faster."""
    T, D = a.query.shape[2:]
    S, E = a.value.shape[2:]
    trains = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (a.query, a.key, a.value, a.bias)
    )
    is_grouped = a.query.shape[1] != a.key.shape[1]
    learns_bias = a.bias is not None and a.bias.requires_grad and trains
    if a.dropout > 0.0 or D != E:
        least = _MATH
    elif learns_bias:
        least = _LEARNED_MASK
    elif is_grouped:
        least = _GROUPED
    elif a.mask is None or isinstance(a.mask, Dense) or a.bias is not None:
        least = _FULL
    else:
        least = _SPARSE
    if least[trains] <= T * S:
        return None
    kind = "training" if trains else "inference"
    return (
        f"T = {T} queries by S = {S} keys: torch is as fast in {kind} below {least[trains]} pairs"
    )
