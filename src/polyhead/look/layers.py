"""Attention layers of a model, and hooks to read or replace the output of each head."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from polyhead.errors import ArgumentError
from polyhead.modules import (
    CausalAttention,
    MultiHeadAttention,
    MultiHeadAttentionWrapper,
    MultiHeadLatentAttention,
)

__all__ = [
    "AttentionLayer",
    "Head",
    "attention_layers",
    "bound_arguments",
    "check_heads",
    "check_not_compiled",
    "inference_kwargs",
    "input_embeddings",
    "is_ours",
]

Head = tuple[int, int]  # layer, head

_OURS = (
    MultiHeadAttention,
    MultiHeadLatentAttention,
    MultiHeadAttentionWrapper,
    CausalAttention,
)
# Names in transformers' models, by family; BERT's projection is a sibling of its attention.
_PROJECTIONS = ("out_proj", "o_proj", "c_proj", "dense", "o", "Wo", "wo")
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads")


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """One attention layer of a model.

    Attributes:
        index: its number in the model, from 0.
        name: its module name in the model.
        module: the layer.
        num_heads: its number of query heads.
        projection: the output projection; None: there is none, or it is not recognized.
    """

    index: int
    name: str
    module: nn.Module
    num_heads: int
    projection: nn.Module | None

    @property
    def shows_heads(self) -> bool:
        """True if the merged heads are accessible: at the projection, or as our module's output."""
        return self.projection is not None or isinstance(self.module, _OURS)

    def on_heads(self, see: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Call `see` with the merged heads, (B, T, H * E), in each forward.

        They are the input of the output projection: after a gate, before the heads are mixed. The
        result of `see` replaces them unless it is None.

        Raises:
            ArgumentError: the output projection is not recognized.
        """
        if not self.shows_heads:
            raise ArgumentError(
                "model",
                f"must have an output projection called one of {', '.join(_PROJECTIONS)}",
                f"{type(self.module).__name__} ({self.name}) without one",
                "give it such a name",
            )
        if self.projection is None:
            return self.module.register_forward_hook(_on_output(see))

        def on_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            changed = see(args[0])
            return None if changed is None else (changed, *args[1:])

        return self.projection.register_forward_pre_hook(on_input)


def _on_output(see: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    def on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        has_aux = isinstance(output, tuple)
        changed = see(output[0] if has_aux else output)
        if changed is None or not has_aux:
            return changed
        return (changed, *output[1:])

    return on_output


def attention_layers(model: nn.Module) -> tuple[AttentionLayer, ...]:
    """Return the attention layers of a model, in the order of its modules.

    A layer is a module of ours, or the innermost module with "Attention" in its class name, as in
    every model of transformers.

    Raises:
        ArgumentError: the model has none.

    >>> import polyhead as ph
    >>> block = nn.Sequential(nn.LayerNorm(8), ph.MultiHeadAttention(8, 8, 16, 0.0, num_heads=2))
    >>> [(layer.index, layer.name, layer.num_heads) for layer in attention_layers(block)]
    [(0, '1', 2)]
    """
    named = dict(model.named_modules())
    ours = [name for name, module in named.items() if isinstance(module, _OURS)]
    outermost = [name for name in ours if not any(_inside(name, other) for other in ours)]
    called = [
        name
        for name, module in named.items()
        if "Attention" in type(module).__name__
        and not isinstance(module, nn.MultiheadAttention)  # it calls no projection
        and not any(name == own or _inside(name, own) for own in outermost)
    ]
    innermost = [
        name for name in called if not any(_inside(x, name) for x in (*called, *outermost))
    ]
    chosen = {*outermost, *innermost}
    layers: list[AttentionLayer] = []
    for name in named:
        if name in chosen and (heads := _num_heads(named[name])) is not None:
            projection = _projection(named, name)
            layers.append(AttentionLayer(len(layers), name, named[name], heads, projection))
    if not layers:
        raise ArgumentError(
            "model",
            "must have attention layers, polyhead's modules or a transformers model's",
            type(model).__name__,
            "convert torch's own with polyhead.convert, or pass another model",
        )
    return tuple(layers)


def check_heads(heads: Collection[Head], layers: tuple[AttentionLayer, ...]) -> None:
    """Raise ArgumentError unless each (layer, head) is one of the model."""
    for layer, head in heads:
        if not 0 <= layer < len(layers):
            rule = f"must name layers from 0 to {len(layers) - 1}"
            raise ArgumentError("heads", rule, (layer, head), "see attention_layers(model)")
        if not 0 <= head < layers[layer].num_heads:
            rule = f"must name heads from 0 to {layers[layer].num_heads - 1} of layer {layer}"
            raise ArgumentError("heads", rule, (layer, head), "count query heads, not KV heads")


def check_not_compiled(model: nn.Module) -> None:
    """Raise ArgumentError for a compiled model: it runs without hooks."""
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ArgumentError(
                "model",
                "must not be compiled",
                f"{name or 'itself'}, compiled by torch.compile",
                "pass the model that was compiled",
            )


def inference_kwargs(model: nn.Module) -> dict[str, Any]:
    """Keywords that make a transformers model skip its cache and all logits but the last."""
    known = inspect.signature(model.forward).parameters
    spared = {"use_cache": False, "logits_to_keep": 1}
    return {name: value for name, value in spared.items() if name in known}


def bound_arguments(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a module call by name, including those of **kwargs."""
    signature = inspect.signature(module.forward)
    try:
        bound = dict(signature.bind_partial(*args, **kwargs).arguments)
    except TypeError:  # the module's own call will raise
        return dict(kwargs)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    return bound


def is_ours(module: nn.Module) -> bool:
    """True if a layer is one of polyhead's modules."""
    return isinstance(module, _OURS)


def input_embeddings(model: nn.Module) -> Any:
    """Return the input embeddings of a model of transformers; None without any."""
    try:
        return getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # raised by models of images and sounds
        return None


def _inside(name: str, other: str) -> bool:
    return name != other and (other == "" or name.startswith(other + "."))


def _num_heads(module: nn.Module) -> int | None:
    if isinstance(module, CausalAttention):
        return 1
    for place in (module, getattr(module, "config", None)):
        for attribute in _HEAD_COUNTS:
            if isinstance(count := getattr(place, attribute, None), int):
                return count
    return None


def _projection(named: dict[str, nn.Module], name: str) -> nn.Module | None:
    module = named[name]
    for attribute in _PROJECTIONS:
        if isinstance(found := getattr(module, attribute, None), nn.Module):
            return found
    parent = name.rpartition(".")[0]
    return named.get(f"{parent}.output.dense")
