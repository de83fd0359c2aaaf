"""Modes in which laws run, independent of the caller's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["own_modes"]


@contextlib.contextmanager
def own_modes(device: torch.device | None = None) -> Iterator[None]:
    """Run the block in the laws' own modes, then restore the caller's.

    Gradients on; inference mode, autocast and anomaly detection off; deterministic algorithms not
    required; new tensors in float32 on the CPU, or on the module's device.

    Args:
        device: another allowed device for new tensors.
    """
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    allowed = {"cpu"} if device is None else {"cpu", device.type}
    with contextlib.ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        modes.enter_context(torch.autograd.set_detect_anomaly(False))
        for kind in {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}:
            modes.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type not in allowed:
            modes.enter_context(torch.device("cpu"))
        try:
            torch.set_default_dtype(torch.float32)
            torch.set_float32_matmul_precision("highest")
            torch.use_deterministic_algorithms(False)
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_float32_matmul_precision(precision)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
