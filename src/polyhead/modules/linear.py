"""Projections in inference through oneDNN, where what torch takes for float32 is slow."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from polyhead.backends.reasons import transform_reasons
from polyhead.backends.tracing import is_recorded
from polyhead.errors import DeviceError
from polyhead.modules.weights import takes_what_it_holds
from polyhead.validate import autocasts

__all__ = ["onednn_linear"]

# With a weight on the meta device and an input elsewhere these return uninitialized memory.
_PRODUCTS = (F.linear, F.conv1d, torch.addmm, torch.matmul, Tensor.matmul, Tensor.__matmul__)
# With fewer weights oneDNN is no faster; with fewer inputs the context costs more than it gains.
_FEW = 2**18


def onednn_linear(x: Tensor, module: nn.Module) -> AbstractContextManager[object]:
    """A context for the projections of x, in which `F.linear` is the faster of torch's two.

    torch multiplies float32 through MKL, and on AMD processors MKL is slower than oneDNN, which
    torch has too (docs/performance.md). The function is changed, and not who calls it: layers keep
    their hooks, adapters and parametrisations. oneDNN's has no derivative: it is for inference.

    No weight on the meta device meets an input elsewhere: torch 2.13 returns memory that nothing
    has written, and no error.

    Args:
        x: what is projected.
        module: the owner of the projections.

    Raises:
        DeviceError: a projection's weight has no values: at once where the layer has no hooks that
            could load it, or when they have not.
    """
    if torch.compiler.is_compiling() or is_recorded():
        return nullcontext()
    if not x.is_meta and (on_meta := _on_meta(module)):
        for name, layer in on_meta.items():
            if takes_what_it_holds(layer):
                raise _no_values(name, x.device)
        return _RefusingMeta()
    if torch.is_grad_enabled() or x.numel() < _FEW:
        return nullcontext()
    if x.dtype != torch.float32 or x.device.type != "cpu" or not _mkl_is_slow():
        return nullcontext()
    if autocasts(x) or transform_reasons():
        return nullcontext()
    return _ThroughOneDNN()


def _on_meta(module: nn.Module) -> dict[str, nn.Module]:
    """The layers of a module whose weight is on the meta device, by name."""
    layers = module._modules.items()
    return {
        name: layer
        for name, layer in layers
        if layer is not None
        and (weight := layer._parameters.get("weight")) is not None
        and weight.is_meta
    }


def _no_values(name: str, device: torch.device) -> DeviceError:
    return DeviceError(
        name,
        f"must hold values on the device of its input, {device}",
        "a weight on meta",
        "load the weights first: to_empty(device=...), then load_state_dict",
    )


class _RefusingMeta(TorchFunctionMode):
    """Raises where a product of an input and a weight on the meta device would be garbage."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _PRODUCTS:
            tensors = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)]
            elsewhere = [tensor for tensor in tensors if not tensor.is_meta]
            if elsewhere and len(elsewhere) < len(tensors):
                raise _no_values("the weight", elsewhere[0].device)
        return func(*args, **(kwargs or {}))


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
