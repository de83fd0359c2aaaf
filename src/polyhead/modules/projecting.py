"""Projections in inference through oneDNN, where what torch takes for float32 is slow."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from polyhead.arguments import autocasts
from polyhead.backends.refusals import transform_reasons

__all__ = ["projecting"]

# With fewer weights oneDNN is no faster; with fewer inputs the context costs more than it gains.
_FEW = 2**18


def projecting(x: Tensor) -> AbstractContextManager[object]:
    """A context for the projections of x, in which `F.linear` is the faster of torch's two.

    torch multiplies float32 through MKL, and on AMD processors MKL is slower than oneDNN, which
    torch has too (docs/performance.md). The function is changed, and not who calls it: layers keep
    their hooks, adapters and parametrisations. oneDNN's has no derivative: it is for inference.

    Args:
        x: what is projected.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.numel() < _FEW:
        return nullcontext()
    if x.dtype != torch.float32 or x.device.type != "cpu" or not _mkl_is_slow():
        return nullcontext()
    if autocasts(x) or transform_reasons():
        return nullcontext()
    return _ThroughOneDNN()


class _ThroughOneDNN(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and not kwargs and _are_plain(*args):
            x, weight, bias = (*args, None)[:3]
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return func(*args, **(kwargs or {}))


def _are_plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether these are matrices of float32 that are worth it, in memory and nothing more."""
    return weight.numel() >= _FEW and all(
        tensor is None
        or (
            type(tensor) in (Tensor, torch.nn.Parameter)
            and tensor.dtype == torch.float32
            and tensor.device.type == "cpu"
            and tensor.layout == torch.strided
            and not tensor.is_nested
        )
        for tensor in (x, weight, bias)
    )


@functools.cache
def _mkl_is_slow() -> bool:
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and "AMD" in torch.cpu.get_capabilities().get("cpu_name", "")
    )
