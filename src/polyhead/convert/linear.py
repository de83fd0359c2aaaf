"""Parameters of linear layers: validation, copies, and modules filled with them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from polyhead.errors import ConversionError
from polyhead.modules import MultiHeadAttention
from polyhead.modules.weights import (
    make_parameter,
    read_parameter,
    why_not_linear,
    why_unreadable,
)

__all__ = [
    "check_kind",
    "check_plain",
    "copied",
    "copy_of",
    "filled",
    "parameters_of",
    "rms_norm",
    "separate_parameters",
    "values_of",
    "writable_parameters",
]

M = TypeVar("M", bound=nn.Module)


def check_kind(argument: str, module: object, kind: type[nn.Module], remedy: str) -> None:
    if not isinstance(module, kind):
        raise ConversionError(
            f"{argument} must be a {kind.__name__}; got {type(module).__name__}; {remedy}"
        )


def check_plain(name: str, projection: nn.Module) -> None:
    """Raise unless a projection is x W^T + b of a readable weight: no adapter, not quantized."""
    if unreadable := why_not_linear(projection):
        raise ConversionError(
            f"{name} must be a plain nn.Linear to be converted; got {unreadable.kind}; "
            f"{unreadable.remedy}"
        )


def copied(name: str, projection: nn.Module) -> dict[str, Tensor]:
    """Copy a layer's parameters to state-dict entries below `name`; requires_grad is kept."""
    return {f"{name}.{kind}": copy_of(value) for kind, value in values_of(name, projection).items()}


def copy_of(parameter: Tensor) -> Tensor:
    """Copy a parameter with its requires_grad, in inference mode or not."""
    with torch.inference_mode(False):
        return parameter.detach().clone().requires_grad_(parameter.requires_grad)


def values_of(name: str, layer: nn.Module) -> dict[str, Tensor]:
    """Return a layer's own parameters by name, with their values wherever they are stored.

    Args:
        name: below the module that is converted, which itself is "".
        layer: of this name.

    Raises:
        ConversionError: they are sharded, quantized, on the meta device, or hooks change the layer.
    """
    if unreadable := why_unreadable(layer, ignore_hooks=not name):
        place = f"{name} must have weights" if name else "the layer must have weights of its own"
        raise ConversionError(
            f"{place} that can be read; got {unreadable.kind}; {unreadable.remedy}"
        )
    values = {kind: read_parameter(layer, kind) for kind in layer._parameters}
    return {kind: value for kind, value in values.items() if value is not None}


def parameters_of(module: nn.Module, projections: Iterable[str]) -> dict[str, Tensor]:
    """Return all parameters by name with their values; projections must be plain layers.

    Raises:
        ConversionError: a projection is an adapter or quantized, or a weight cannot be read.
    """
    for name in projections:
        parent, _, child = name.rpartition(".")
        layer = getattr(module.get_submodule(parent), child, None)
        if layer is not None:
            check_plain(name, layer)
    return {
        f"{name}.{kind}" if name else kind: value
        for name, layer in module.named_modules()
        for kind, value in values_of(name, layer).items()
    }


def writable_parameters(module: nn.Module, projections: Iterable[str]) -> dict[str, Tensor]:
    """Return the parameters as `parameters_of` does, to be written in place.

    Raises:
        ConversionError: the above, or a write would be lost: a hook of accelerate's replaces the
            parameter at each call.
    """
    values = parameters_of(module, projections)
    parameters: dict[str, Tensor] = dict(module.named_parameters())
    if elsewhere := [name for name in values if values[name] is not parameters[name]]:
        raise ConversionError(
            f"{elsewhere[0]} must be in memory to be written; got one that accelerate has "
            "offloaded; take its hooks off with "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        )
    return parameters


def separate_parameters(mha: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of one of our modules, with a fused W_qkv split."""
    projections = [name for name, _ in mha.named_children() if name.startswith(("W_", "out_proj"))]
    parameters = parameters_of(mha, projections)
    for kind in ("weight", "bias") if isinstance(mha, MultiHeadAttention) and mha.fused else ():
        fused = parameters.pop(f"W_qkv.{kind}", None)
        if fused is not None:
            names = [f"{name}.{kind}" for name in ("W_query", "W_key", "W_value")]
            parts = fused.detach().split(mha.qkv_sizes)
            for name, part in zip(names, parts, strict=True):
                parameters[name] = part.requires_grad_(fused.requires_grad)
    return parameters


def filled(module: M, state: dict[str, Tensor], source: nn.Module) -> M:
    """Load weights into `module`, built on the meta device so that no random numbers are drawn."""
    if without := [name for name, tensor in state.items() if tensor.is_meta]:
        raise ConversionError(
            f"{without[0]} must have values to be converted; got a tensor on the meta device; load "
            "the weights first"
        )
    made = {name: make_parameter(tensor, like=tensor) for name, tensor in state.items()}
    module.load_state_dict(made, assign=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(state[name].requires_grad)
    return module.train(source.training)


def rms_norm(theirs: Any) -> Callable[[int], nn.Module]:
    """Return a factory of RMSNorm with the eps of `theirs`."""
    return functools.partial(nn.RMSNorm, eps=theirs.variance_epsilon)
