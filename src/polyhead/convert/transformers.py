"""Conversion from and to attention layers of transformers, by class name: none is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from polyhead.convert.families import FAMILIES
from polyhead.convert.family import Converted, Family
from polyhead.convert.layout import Layout, Sizes
from polyhead.convert.linear import (
    copy_of,
    filled,
    parameters_of,
    separate_parameters,
    writable_parameters,
)
from polyhead.errors import ConversionError
from polyhead.modules import MultiHeadAttention, MultiHeadLatentAttention

__all__ = ["from_transformers", "to_transformers"]

M = TypeVar("M", bound=nn.Module)

_KNOWN: dict[str, Family] = {name: family for family in FAMILIES for name in family.classes}


def from_transformers(attention_layer: nn.Module) -> Converted:
    """Convert a transformers attention layer to a polyhead module with the same weights.

    Args:
        attention_layer: the attention of one layer, such as `model.model.layers[0].self_attn`.
            It is not modified; weights are copied.

    Returns:
        The same function of the layer's hidden states, rope included: a `MultiHeadAttention`, for
        DeepSeek V3 a `MultiHeadLatentAttention`.

    Raises:
        ConversionError: the class, or one of its options, is not supported, or a projection is no
            plain layer (adapters, quantization).
    """
    build, layout = _known(attention_layer)
    module = build(attention_layer)
    theirs = {
        name: copy_of(parameter)
        for name, parameter in _moving(parameters_of, attention_layer, layout).items()
    }
    return filled(module, layout.to_ours(theirs, _sizes(module)), attention_layer)


@torch.no_grad()
def to_transformers(mha: Converted, attention_layer: M) -> M:
    """Write the weights of a polyhead module into a transformers attention layer.

    The inverse of `from_transformers`.

    Args:
        mha: a module from `from_transformers`, perhaps trained since. It is not modified.
        attention_layer: receives the weights in place. Its other parameters (a norm after it)
            and every requires_grad are kept.

    Returns:
        The layer.

    Raises:
        ConversionError: the layer would compute another function than `mha`: an option, a shape
            or a dtype differs. Nothing is written then.
    """
    build, layout = _known(attention_layer)
    like = build(attention_layer)
    _check_alike(mha, like)
    moved = layout.to_theirs(
        {name: tensor.detach() for name, tensor in separate_parameters(mha).items()}, _sizes(like)
    )
    parameters = _moving(writable_parameters, attention_layer, layout)
    _check_fits(moved, parameters)
    for name, tensor in moved.items():
        parameters[name].copy_(tensor)
    return attention_layer


def _known(layer: nn.Module) -> tuple[Callable[[nn.Module], Converted], Layout]:
    kind = type(layer).__name__
    if kind not in _KNOWN:
        raise ConversionError(
            f"attention_layer must be one of {', '.join(_KNOWN)}; got {kind}; "
            "pass the attention of one layer, such as model.model.layers[0].self_attn"
        )
    family = _KNOWN[kind]
    names = {name for name, _ in layer.named_parameters()}
    fitting = (layout for layout in family.layouts if layout.their_marks <= names)
    return family.build, next(fitting, family.layouts[0])


def _moving(
    read: Callable[[nn.Module, Iterable[str]], dict[str, Tensor]], layer: nn.Module, layout: Layout
) -> dict[str, Tensor]:
    """Return their parameters, without those that stay with the model."""
    parameters = read(layer, layout.projections)
    return {name: tensor for name, tensor in parameters.items() if name not in layout.staying}


def _sizes(module: Converted) -> Sizes:
    if isinstance(module, MultiHeadAttention):
        return Sizes(module.num_heads, module.num_kv_heads)
    return Sizes(
        module.num_heads,
        nope_head_dim=module.nope_head_dim,
        value_head_dim=module.value_head_dim,
    )


def _check_alike(mha: Converted, like: Converted) -> None:
    """Raise unless `like`, their layer as one of our modules, has the options of `mha`."""
    if type(mha) is not type(like):
        raise ConversionError(
            f"mha must be a {type(like).__name__} to go into this layer; got {type(mha).__name__}; "
            "pass the module that from_transformers returns for it"
        )
    theirs = _options(like)
    for name, option in _options(mha).items():
        if option != theirs[name]:
            raise ConversionError(
                f"mha must have the {name} of the layer to become it, {theirs[name]!r}; got "
                f"{option!r}; change one of them"
            )


def _options(module: Converted) -> dict[str, object]:
    """Return all options that determine the function, without the weights."""
    options: dict[str, object] = {
        name: getattr(module, name) for name in ("d_in", "d_out", "num_heads", "rope", "mask")
    }
    options["dropout"] = module.dropout.p
    if isinstance(module, MultiHeadLatentAttention):
        names = ("kv_rank", "query_rank", "nope_head_dim", "rope_head_dim", "value_head_dim")
        norm = module.kv_norm
        return (
            options
            | {name: getattr(module, name) for name in (*names, "scale")}
            | {"norm": str(norm)}
        )
    names = ("num_kv_heads", "head_dim", "value_head_dim", "alibi", "softcap")
    return (
        options
        | {name: getattr(module, name) for name in names}
        | {
            "scale": module.head_dim**-0.5 if module.scale is None else module.scale,
            "qk_norm": repr(module.q_norm),
            "position_bias": repr(module.position_bias),
        }
    )


def _check_fits(moved: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
    if moved.keys() != parameters.keys():
        differing = ", ".join(sorted(moved.keys() ^ parameters.keys()))
        raise ConversionError(
            f"mha must have the same weights as the layer; {differing} is in only one of them; "
            "build mha with the same biases"
        )
    for name, tensor in moved.items():
        theirs = parameters[name]
        if (tensor.shape, tensor.dtype) != (theirs.shape, theirs.dtype):
            raise ConversionError(
                f"{name} must be {theirs.dtype} {tuple(theirs.shape)} in the layer; got "
                f"{tensor.dtype} {tuple(tensor.shape)}; cast or rebuild one of them"
            )
