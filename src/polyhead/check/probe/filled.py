"""Parameters that a constructor leaves uninitialized: found, and filled from the seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from polyhead.check.subject import copied, seeded

__all__ = ["filled", "unfilled"]


def unfilled(make: Callable[[], nn.Module] | None, seed: int) -> Sequence[str]:
    """Return names of parameters and buffers that `make` creates by torch.empty and never
    initializes.

    torch fills fresh memory with NaN if deterministic algorithms are required: remaining NaN was
    never overwritten.
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
    """Return a copy of the module with random values in these, the same for the same seed."""
    module = copied(module)
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in names:
            size = tensors[name].shape[-1] ** -0.5 if tensors[name].ndim else 1.0
            drawn = torch.randn(tensors[name].shape, generator=generator, dtype=torch.float64)
            tensors[name].copy_(size * drawn)
    return module
