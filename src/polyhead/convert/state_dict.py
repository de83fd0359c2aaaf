"""State dict conversion: the attention of a checkpoint in another layout, without its model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from polyhead.convert import fused, stacked, torch_mha
from polyhead.convert.families import FAMILIES
from polyhead.convert.find import (
    check_count_of_layers,
    check_whole,
    find,
    leftovers,
)
from polyhead.convert.layer import check_tensors, read, write
from polyhead.convert.layout import Layout, Sizes
from polyhead.convert.leftovers import check_mask, is_mask, is_old_buffer_of_a_model
from polyhead.errors import ArgumentError, ConversionError, DtypeError, did_you_mean

__all__ = ["LAYOUTS", "Move", "plan", "state_dict"]

# Names of polyhead's modules. "split" is the lecture's word for the same names.
_OURS = ("polyhead", "split")

# Of several, the first that a layer fits.
_THEIRS: dict[str, tuple[Layout, ...]] = {
    "stacked": (stacked.STACKED,),
    "fused": (fused.LAYOUT,),
    "torch": (torch_mha.PACKED, torch_mha.UNPACKED),
    **{name: family.layouts for family in FAMILIES for name in family.names},
}
LAYOUTS = (*_OURS, *_THEIRS)

# `model_type` of a config.json, where it is not the name of its layout.
_MODEL_TYPES = {kind: family.names[0] for family in FAMILIES for kind in family.model_types}

# Every name in our modules: a tensor without a place in the target must not be left out.
_OUR_NAMES = {name for layouts in _THEIRS.values() for layout in layouts for name in layout.ours}
_OUR_NAMES |= {"W_gate.weight", "W_gate.bias"}


@dataclass(frozen=True)
class Move:
    """Planned conversion of one attention layer.

    Attributes:
        prefix: of its names, such as "transformer.h.0.attn.".
        names: its tensors, below the prefix.
        source: their layout; None: ours.
        targets: the layouts it can become; the first that fits is used; none: ours.
        buffers: names below the prefix that are dropped.
    """

    prefix: str
    names: tuple[str, ...]
    source: Layout | None
    targets: tuple[Layout, ...]
    sizes: Sizes
    buffers: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        """Full names of its input tensors."""
        return tuple(self.prefix + name for name in self.names)

    @property
    def dropped(self) -> tuple[str, ...]:
        """Full names of buffers that newer code computes."""
        return tuple(self.prefix + name for name in self.buffers)

    def outputs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the converted tensors by full name.

        Args:
            tensors: those of `inputs`, by full name.

        Raises:
            ConversionError: they are not one layer, or have no place in the target.
        """
        layer = {name: tensors[self.prefix + name] for name in self.names}
        try:
            sizes = check_tensors(layer, self.source, self.sizes)
            layer = read(layer, self.source, sizes)
            if self.targets:
                fitting = (to for to in self.targets if to.our_marks <= layer.keys())
                layer = write(layer, next(fitting, self.targets[0]), sizes)
        except ConversionError as error:
            raise ConversionError(f"{self.prefix or 'the layer'}: {error}") from None
        return {self.prefix + name: tensor for name, tensor in layer.items()}


@torch.no_grad()
def state_dict(
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    target: str,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    nope_head_dim: int | None = None,
    value_head_dim: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Convert the attention of a checkpoint to another layout; other tensors are passed through.

    Every attention layer moves, or none does: the shapes of its tensors must fit together. Each
    other name below it is a buffer of older code (masks, rotary frequencies), which is dropped, or
    is refused (adapters, quantized weights). Only names and rows move. A layer's options (rope,
    mask, scale) are not in a checkpoint: build the modules with the options that
    `from_transformers` would read.

    Args:
        tensors: by name, as `model.state_dict()`. It is not modified.
        source, target: "polyhead" (or "split"), "stacked", or a family such as "gpt2".
        num_heads: H. Fused weights and stacked heads are split by it; a wrong number that divides
            the rows too cannot be detected.
        num_kv_heads: G, if a fused weight has fewer KV heads than query heads.
        nope_head_dim, value_head_dim: features per head, for DeepSeek.
        config: the model's config.json as a dict, instead of these numbers or in addition to them.

    Returns:
        Tensors by name, in the order of the checkpoint. Renamed tensors are the same objects;
        parts of fused weights are copies.

    Raises:
        ArgumentError: a layout is not known.
        DtypeError: the tensors are not by name.
        ConversionError: no layer of that layout is found, one is incomplete, its tensors do not
            fit together or to the numbers, one is no plain floating point tensor of 16 bits or
            more, a name has no place, another layer would stay, or two would have one name.

    >>> sd = {"h.0.attn.c_attn.weight": torch.arange(12.0).view(2, 6), "h.0.ln.bias": torch.ones(2),
    ...     "h.0.attn.c_proj.weight": torch.eye(2)}
    >>> ours = state_dict(sd, source="gpt2", target="polyhead")
    >>> list(ours)[:3]
    ['h.0.attn.W_query.weight', 'h.0.attn.W_key.weight', 'h.0.attn.W_value.weight']
    >>> ours["h.0.attn.W_key.weight"]                        # columns 2 and 3 of c_attn
    tensor([[2., 8.],
            [3., 9.]])
    >>> back = state_dict(ours, source="polyhead", target="gpt2")
    >>> all(torch.equal(back[name], sd[name]) for name in sd)
    True
    """
    if not isinstance(tensors, Mapping):
        raise DtypeError(
            "tensors", "must be tensors by name", type(tensors).__name__, "pass model.state_dict()"
        )
    _check_here(tensors)
    sizes = Sizes(num_heads, num_kv_heads, nope_head_dim, value_head_dim)
    moves = plan(tensors, source, target, sizes, config)
    check_masks(moves, tensors.__getitem__)
    move_of = {name: move for move in moves for name in move.inputs}
    out = dropped(tensors, moves)
    moved: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        move = move_of.get(name)
        if move is None:
            outputs = {} if name in out else {name: tensor}
        else:
            outputs = move.outputs(tensors) if name == move.inputs[0] else {}
        add(moved, outputs)
    return moved


def _check_here(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise DtypeError(
                "tensors", "must be tensors by name", f"a name {name!r}", "pass model.state_dict()"
            )
        if isinstance(tensor, Mapping):
            raise DtypeError(
                "tensors",
                "must be tensors by name",
                f"a {type(tensor).__name__} named {name!r}",
                f"pass tensors[{name!r}], if that is the model's state_dict",
            )
        if isinstance(tensor, Tensor) and tensor.is_meta:
            raise ConversionError(
                f"{name} must have values; got a tensor on the meta device, which has none; load "
                "the weights first (an offloaded model: without device_map, or from its files)"
            )


def dropped(names: Iterable[str], moves: list[Move]) -> set[str]:
    """Return the names of all buffers that newer code computes, in layers and in their model."""
    of_layers = {name for move in moves for name in move.dropped}
    if moves[0].source is None or not moves[0].source.is_family:
        return of_layers
    return of_layers | {name for name in names if is_old_buffer_of_a_model(name)}


def check_masks(moves: list[Move], read: Callable[[str], Tensor]) -> None:
    """Raise unless every mask that would be dropped is one that a mask object replaces."""
    for move in moves:
        for below, name in zip(move.buffers, move.dropped, strict=True):
            if is_mask(below, mask := read(name)):
                check_mask(name, mask)


def add(moved: dict[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
    if both := moved.keys() & outputs.keys():
        raise ConversionError(
            f"{sorted(both)[0]} would occur twice, converted and passed through; rename the one "
            "that is not attention's"
        )
    moved.update(outputs)


def plan(
    tensors: Mapping[str, Tensor],
    source: str,
    target: str,
    sizes: Sizes,
    config: Mapping[str, Any] | None = None,
) -> list[Move]:
    """Plan the conversion of every attention layer of a checkpoint from names and shapes alone.

    Raises:
        ArgumentError: a layout is not known.
        ConversionError: no layer of that layout is found, one is incomplete, a name below one is
            none of its tensors, or a layer of another layout would stay.
    """
    for argument, layout in (("source", source), ("target", target)):
        if layout not in LAYOUTS:
            remedy = did_you_mean(layout, LAYOUTS, "choose a layout")
            rule = f"must be one of {', '.join(LAYOUTS)}"
            raise ArgumentError(argument, rule, repr(layout), remedy)
    froms, tos = _THEIRS.get(source, ()), _THEIRS.get(target, ())
    if froms == tos:
        raise ArgumentError(
            "target", f"must be another layout than source={source!r}", repr(target), "choose one"
        )
    norms = {side[0].offset_norms for side in (froms, tos) if _has_family_norms(side)}
    if len(norms) > 1:
        raise ConversionError(
            f"norms must be of one kind to move from {source} to {target}; got one of Gemma's, "
            "whose weights are stored minus 1; convert to polyhead, add or subtract the 1 in "
            "q_norm and k_norm, and convert on"
        )
    if config is not None:
        sizes = _with_config(sizes, (froms or tos)[0], config)
    names = list(tensors)
    prefixes = find(names, froms)
    others = {
        name: layouts for name, layouts in {"polyhead": (), **_THEIRS}.items() if layouts != froms
    }
    layers = leftovers(tensors, prefixes, froms, _OUR_NAMES)
    if prefixes or not any(find(names, layouts) for layouts in others.values()):
        check_whole(names, prefixes, froms, others)
    if not layers:
        raise ConversionError(_none_found(names, source))
    if froms and froms[0].is_family and config is not None:
        check_count_of_layers(prefixes, _count_of_layers(config))
    moves = []
    for prefix, layer in layers.items():
        known = next((kind for kind in froms if kind.their_marks <= set(layer.names)), None)
        move = Move(prefix, tuple(layer.names), known, tos, sizes, tuple(layer.buffers))
        moves.append(move)
    return moves


def _has_family_norms(layouts: tuple[Layout, ...]) -> bool:
    return any(layout.is_family and "q_norm.weight" in layout.ours for layout in layouts)


def _count_of_layers(config: Mapping[str, Any]) -> int | None:
    """Return the number of attention layers in the config of a known family."""
    text = config.get("text_config") or config
    if _family(text) is None:
        return None
    names = ("num_hidden_layers", "n_layer", "num_layers")
    return next((text[name] for name in names if isinstance(text.get(name), int)), None)


def _with_config(sizes: Sizes, layout: Layout, config: Mapping[str, Any]) -> Sizes:
    """Return the given sizes, and the config's for those not given."""
    read = layout.sizes(config.get("text_config") or config)
    if sizes.num_heads is not None and read.num_kv_heads == read.num_heads:
        read = replace(read, num_kv_heads=sizes.num_heads)
    given = {name: number for name, number in vars(sizes).items() if number is not None}
    return replace(read, **given)


def source_of(names: Iterable[str], config: Mapping[str, Any] | None) -> str:
    """Return the layout of a checkpoint, by the family that its config names."""
    text = (config or {}).get("text_config") or config or {}
    if (source := _family(text)) is not None:
        return source
    raise ConversionError(
        "source must be given where no config.json names a known family; got "
        f"model_type {text.get('model_type')!r}; {_present(list(names))}"
    )


def _family(config: Mapping[str, Any]) -> str | None:
    """Return the layout of the family that a config names, if it is known."""
    family = config.get("model_type")
    source = _MODEL_TYPES.get(family, family) if isinstance(family, str) else None
    return source if source in _THEIRS else None


def _none_found(names: list[str], source: str) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"source must be the layout of an attention layer of the checkpoint; got {source!r}, whose "
        f"names are not among {shown or 'no names'}; {_present(names)}"
    )


def _present(names: list[str]) -> str:
    fitting = [name for name, layouts in _THEIRS.items() if find(names, layouts)]
    if find(names, ()):
        fitting.append("polyhead")
    return f"those of {', '.join(fitting)} are present" if fitting else "no known layout is present"
