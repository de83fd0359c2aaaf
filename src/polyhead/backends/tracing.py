"""Whether a program is being recorded that must run where this library is not installed."""

from __future__ import annotations

import torch

__all__ = ["is_recorded", "is_traced"]


def is_recorded() -> bool:
    """By `torch.export`, by `torch.jit.trace` or by either of `torch.onnx.export`'s ways."""
    return torch.compiler.is_exporting() or is_traced()


def is_traced() -> bool:
    """By `torch.jit.trace`, which knows neither all types of operators' arguments nor autograd
    functions."""
    # torch.compile cannot trace the question.
    return not torch.compiler.is_compiling() and bool(torch.jit.is_tracing())  # type: ignore[no-untyped-call, attr-defined]
