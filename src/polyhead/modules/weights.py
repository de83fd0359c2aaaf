"""Weights of live layers: read where their values are, or refused with the reason and a remedy.

A layer computes more than its `weight` shows if it is an adapter, quantized, or wrapped by hooks;
and the values may be elsewhere: offloaded by accelerate, sharded over ranks, not loaded yet. Every
function that copies, splits or multiplies a weight by itself reads it here, and not at the layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.errors import ArgumentError

__all__ = [
    "Unreadable",
    "check_in_place",
    "describe_layer",
    "execution_device",
    "make_linear",
    "make_parameter",
    "read_parameter",
    "takes_what_it_holds",
    "why_not_in_place",
    "why_not_linear",
    "why_unreadable",
]

# Linear layers of torch and transformers under other names; transformers is not imported.
_LINEAR = {"Conv1D", "FalconLinear", "NonDynamicallyQuantizableLinear"}
# Tensors whose values are their own. The last two stand for them in torch.export and torch.compile.
_PLAIN_TENSORS = {"Tensor", "Parameter", "FakeTensor", "FunctionalTensor"}
# accelerate's hooks that move weights and inputs, and change no value.
_MOVING_HOOKS = {"AlignDevicesHook", "CpuOffload"}

_GATHER = (
    "gather the weights first, on every rank: DTensor.full_tensor(), or the full state dict of "
    "torch.distributed.checkpoint, loaded into an unsharded module"
)


@dataclass(frozen=True)
class Unreadable:
    """The reason why a layer's weights do not define its output.

    Attributes:
        kind: the layer and what it holds, to follow "got".
        remedy: the step after which they do.
    """

    kind: str
    remedy: str


def why_not_linear(layer: nn.Module) -> Unreadable | None:
    """The reason why a layer is not x W^T + b of a weight that can be read; None: it is.

    >>> why_not_linear(nn.Linear(2, 2)) is None
    True
    >>> why_not_linear(nn.Linear(2, 2, device="meta")).kind
    'Linear with weight on the meta device, without values'
    """
    kind = type(layer)
    if hasattr(layer, "parametrizations"):
        return why_unreadable(layer)
    if kind is not nn.Linear and kind.__name__ not in _LINEAR:
        full = f"{kind.__module__}.{kind.__name__}"
        if hasattr(layer, "base_layer") or hasattr(layer, "lora_A"):
            return Unreadable(f"{full}, an adapter", "merge it first: model.merge_and_unload()")
        if unreadable := why_unreadable(layer):
            return Unreadable(f"{full}: {unreadable.kind}", unreadable.remedy)
        return Unreadable(full, "replace it by an nn.Linear that computes the same")
    for name in ("weight", "bias"):
        if name not in layer._parameters:
            return Unreadable(
                f"{kind.__name__} with hooks that make its {name}", _how_to_keep(layer, name)
            )
    return why_unreadable(layer)


def why_unreadable(layer: nn.Module, *, ignore_hooks: bool = False) -> Unreadable | None:
    """The reason why a layer's own parameters do not define its output; None: they do.

    Reads hooks, tensor types and dtypes, and never values. Parameters that accelerate has offloaded
    can be read, by `read_parameter`.

    Args:
        layer: any module.
        ignore_hooks: for a whole module whose hooks belong to the model around it.
    """
    kind = type(layer).__name__
    if (made := getattr(layer, "parametrizations", None)) is not None:
        name = next(iter(made), "weight")
        return Unreadable(
            f"{kind} with a parametrization of its {name}",
            f'call torch.nn.utils.parametrize.remove_parametrizations(layer, "{name}")',
        )
    for name, parameter in layer._parameters.items():
        if parameter is not None and (reason := _why_no_values(layer, name, parameter)):
            return Unreadable(f"{kind} with {name} {reason.kind}", reason.remedy)
    return None if ignore_hooks else _foreign_hook(layer)


def read_parameter(layer: nn.Module, name: str) -> Tensor | None:
    """A parameter of a layer with its values, offloaded or not; None: the layer has none.

    Args:
        layer: readable, by `why_unreadable`.
        name: such as "weight".

    Returns:
        The parameter itself, or a tensor of the values that accelerate's hook holds.
    """
    parameter = layer._parameters[name]
    if parameter is None or not parameter.is_meta:
        return parameter
    values = _offloaded(layer, name)
    return parameter if values is None else values.detach().requires_grad_(parameter.requires_grad)


def takes_what_it_holds(layer: nn.Module) -> bool:
    """Whether the dtype and device of a layer's weight are those of its input, for certain.

    So it is for an nn.Linear without hooks: hooks may move or cast weights and inputs, and adapters
    and quantized layers compute in another dtype than they keep.
    """
    return (
        type(layer) is nn.Linear
        and not layer._forward_pre_hooks
        and not layer._forward_hooks
        and "forward" not in layer.__dict__
        and type(layer._parameters.get("weight")).__name__ in _PLAIN_TENSORS
    )


def why_not_in_place(layer: nn.Module) -> Unreadable | None:
    """The reason why an nn.Linear cannot be replaced by one of other weights; None: it can.

    Hooks would be lost with the layer, and a class of its own too.
    """
    kind = type(layer)
    if any(_hooks_of_accelerate(layer)):
        return Unreadable(
            f"{kind.__name__} with accelerate's hooks, which hold its weights",
            "take them off with accelerate.hooks.remove_hook_from_module(model, recurse=True)",
        )
    if unreadable := why_not_linear(layer):
        return unreadable
    hooks = (
        layer._forward_pre_hooks,
        layer._forward_hooks,
        layer._backward_pre_hooks,
        layer._backward_hooks,
    )
    if kind is not nn.Linear or any(hooks):
        what = kind.__name__ if kind is not nn.Linear else "Linear with hooks"
        return Unreadable(what, "make it a plain nn.Linear without hooks")
    return None


def check_in_place(action: str, module: nn.Module, names: Iterable[str]) -> None:
    """Raise ArgumentError unless these layers of a module can be replaced by others.

    Args:
        action: the caller, such as "fuse()".
        module: its layers are plain nn.Linear, with their values, without hooks; None passes.
        names: of the layers.
    """
    for name in names:
        layer = getattr(module, name)
        if layer is not None and (unreadable := why_not_in_place(layer)):
            raise ArgumentError(
                action,
                f"needs {name} to be a plain nn.Linear, in place and without hooks",
                unreadable.kind,
                unreadable.remedy,
            )


def describe_layer(layer: nn.Module) -> str:
    """A layer's class, and what makes it other than a plain nn.Linear."""
    unreadable = why_not_in_place(layer)
    return type(layer).__name__ if unreadable is None else unreadable.kind


def make_parameter(values: Tensor, like: Tensor) -> nn.Parameter:
    """A parameter of these values, trainable if the other is, made in inference mode or not.

    A tensor that was made in inference mode could never train.
    """
    with torch.inference_mode(False):
        values = values.detach().clone() if values.is_inference() else values.detach()
        return nn.Parameter(values, requires_grad=like.requires_grad)


def make_linear(weight: Tensor, bias: Tensor | None, like: nn.Linear) -> nn.Linear:
    """An nn.Linear of these values, in the mode of another layer and trainable as that one is."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = make_parameter(weight, like.weight)
    if bias is not None:
        made.bias = make_parameter(bias, like.bias)
    return made.train(like.training)


def execution_device(module: nn.Module) -> torch.device | None:
    """The device on which a module computes, where accelerate's hooks decide it."""
    for layer in module.modules():
        for hook in _hooks_of_accelerate(layer):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return None


def _how_to_keep(layer: nn.Module, name: str) -> str:
    """The call that makes permanent what hooks of torch.nn.utils compute."""
    if f"{name}_g" in layer._parameters:
        return f'call torch.nn.utils.remove_weight_norm(layer, "{name}")'
    if f"{name}_mask" in layer._buffers:
        return f'call torch.nn.utils.prune.remove(layer, "{name}")'
    if f"{name}_u" in layer._buffers:
        return f'call torch.nn.utils.remove_spectral_norm(layer, "{name}")'
    return f"make {name} a parameter of the layer"


def _foreign_hook(layer: nn.Module) -> Unreadable | None:
    """A hook of others around a layer's forward. Those of accelerate that move are no such."""
    kind, remedy = type(layer).__name__, "remove it and call again"
    for hook in (*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()):
        origin = str(getattr(hook, "__module__", None))
        if origin.startswith("torch.distributed."):
            return Unreadable(f"{kind} sharded by torch.distributed", _GATHER)
        if not origin.startswith("polyhead."):
            name = getattr(hook, "__qualname__", type(hook).__name__)
            return Unreadable(f"{kind} with a forward hook, {name}, which may change it", remedy)
    for hook in _hooks_of_accelerate(layer):
        name = type(hook).__name__
        if name not in _MOVING_HOOKS:
            return Unreadable(f"{kind} with the hook {name}, which may change it", remedy)
    forward = vars(layer).get("forward")
    if forward is None or hasattr(layer, "_hf_hook") or _is_own_forward(layer, forward):
        return None
    return Unreadable(f"{kind} with a forward of its own, set on the instance", "delete it")


def _is_own_forward(layer: nn.Module, forward: object) -> bool:
    """Whether this is the method of the class, as accelerate leaves it behind."""
    return (
        isinstance(forward, MethodType)
        and forward.__self__ is layer
        and forward.__func__ is type(layer).forward
    )


def _hooks_of_accelerate(layer: nn.Module) -> Iterator[Any]:
    hook = vars(layer).get("_hf_hook")
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def _offloaded(layer: nn.Module, name: str) -> Tensor | None:
    for hook in _hooks_of_accelerate(layer):
        weights = getattr(hook, "weights_map", None)
        if weights is not None:
            try:
                values: Tensor = weights[name]
            except KeyError:
                continue
            return values
    return None


def _why_no_values(layer: nn.Module, name: str, parameter: Tensor) -> Unreadable | None:
    kind = type(parameter).__name__
    if kind == "DTensor":
        return Unreadable("sharded over ranks (DTensor)", _GATHER)
    if kind not in _PLAIN_TENSORS:
        return Unreadable(f"that is a {kind}", "dequantize or unwrap the layer first")
    values = parameter
    if parameter.is_meta:
        offloaded = _offloaded(layer, name)
        if offloaded is None:
            return Unreadable(
                "on the meta device, without values",
                "load the weights first: to_empty(device=...), then load_state_dict",
            )
        values = offloaded
    if not values.is_floating_point() or values.dtype.itemsize < 2:
        return Unreadable(
            f"of {values.dtype}, whose scales are kept elsewhere",
            "dequantize the layer first, or load the model without quantization",
        )
    return None
