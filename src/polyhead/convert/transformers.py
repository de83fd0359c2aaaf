"""From the attention layers of transformers and back, known by class name: none is imported."""

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
    """A transformers attention layer as a module of ours with the same weights.

    Args:
        attention_layer: the attention of one layer, such as `model.model.layers[0].self_attn`.
            It is left as it is; weights are copied.

    Returns:
        The same function of the hidden states that enter the layer, rope included: a
        `MultiHeadAttention`, for DeepSeek V3 a `MultiHeadLatentAttention`.

    Raises:
        ConversionError: the class, or an option of it, is not known, or a projection is no plain
            layer (adapters, quantisation).
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
    """Write the weights of a module of ours into a transformers attention layer: the way back.

    Args:
        mha: what `from_transformers` made of such a layer, trained on, say. It is left as it is.
        attention_layer: takes the weights, in place. What it does not have in common with ours
            (a norm behind it, which parameters train) stays as it is.

    Returns:
        The layer.

    Raises:
        ConversionError: the layer would be another function than `mha`: an option, a shape or a
            dtype differs. Nothing is written then.
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
    """Their parameters, without those that stay with the model."""
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
    """Their layer, read as ours, has the options that ours has."""
    if type(mha) is not type(like):
        raise ConversionError(
            f"mha must be a {type(like).__name__} to go into this layer; got {type(mha).__name__}; "
            "pass what from_transformers gives for it"
        )
    theirs = _options(like)
    for name, option in _options(mha).items():
        if option != theirs[name]:
            raise ConversionError(
                f"mha must have the {name} of the layer to become it, {theirs[name]!r}; got "
                f"{option!r}; change one of them"
            )


def _options(module: Converted) -> dict[str, object]:
    """All that makes the function beside the weights."""
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
            f"mha must have just the weights that the layer has; {differing} is in one of them "
            "alone; build mha with the same biases"
        )
    for name, tensor in moved.items():
        theirs = parameters[name]
        if (tensor.shape, tensor.dtype) != (theirs.shape, theirs.dtype):
            raise ConversionError(
                f"{name} must be {theirs.dtype} {tuple(theirs.shape)} in the layer; got "
                f"{tensor.dtype} {tuple(tensor.shape)}; cast or rebuild one of them"
            )
