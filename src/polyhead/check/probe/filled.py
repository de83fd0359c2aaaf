"""Parameters that a constructor leaves as the memory was: found, and filled from the seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from polyhead.check.subject import copied, seeded

__all__ = ["filled", "unfilled"]


def unfilled(make: Callable[[], nn.Module] | None, seed: int) -> Sequence[str]:
    """Names of parameters and buffers that `make` makes by torch.empty and never fills.

    torch fills fresh memory with NaN where deterministic algorithms are required: NaN that is left
    was never written over.
    """
    if make is None:
        return ()
    memory: Any = torch.utils.deterministic
    before = memory.fill_uninitialized_memory
    required = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = True
        with seeded(seed, torch.device("cpu")):
            made = make()
    except Exception:  # of unknown code
        return ()
    finally:
        torch.use_deterministic_algorithms(required)
        memory.fill_uninitialized_memory = before
    tensors = [*made.named_parameters(), *made.named_buffers()]
    return [name for name, t in tensors if t.is_floating_point() and t.isnan().any()]


def filled(module: nn.Module, names: Sequence[str], seed: int) -> nn.Module:
    """A copy of the module in which these are random numbers, the same for the same seed."""
    module = copied(module)
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in names:
            size = tensors[name].shape[-1] ** -0.5 if tensors[name].ndim else 1.0
            drawn = torch.randn(tensors[name].shape, generator=generator, dtype=torch.float64)
            tensors[name].copy_(size * drawn)
    return module
