"""The attention of a checkpoint moved to other names, without building the model."""

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
from polyhead.errors import ArgumentError, ConversionError, DtypeError

__all__ = ["LAYOUTS", "Move", "plan", "state_dict"]

# Names of polyhead's modules. "split" is what the lecture calls the same names.
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

# Every name of a module of ours: one that the target has no place for must not be left behind.
_OUR_NAMES = {name for layouts in _THEIRS.values() for layout in layouts for name in layout.ours}
_OUR_NAMES |= {"W_gate.weight", "W_gate.bias"}


@dataclass(frozen=True)
class Move:
    """One attention layer on its way: the names of its tensors, and what becomes of them.

    Attributes:
        prefix: what stands before its names, such as "transformer.h.0.attn.".
        names: its tensors, below the prefix.
        source: their layout; None: ours.
        targets: the layouts it can become, of which the first that fits is taken; none: ours.
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
        """The full names that it takes."""
        return tuple(self.prefix + name for name in self.names)

    @property
    def dropped(self) -> tuple[str, ...]:
        """The full names of buffers that newer code computes."""
        return tuple(self.prefix + name for name in self.buffers)

    def outputs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What it gives for the tensors of `inputs`, by full name.

        Raises:
            ConversionError: they cannot be one layer's, or have no place in the target.
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
    """A checkpoint with its attention in another layout; every other tensor as it is.

    Every attention layer moves, or none does: its tensors are held against one another, and each
    name below it is one of them, or a buffer of older code, which is dropped (masks, rotary
    frequencies), or refused (adapters, codes of quantizers). Only names and rows move. What a
    layer does with them (rope, its mask, its scale) is not in a checkpoint: build the modules with
    the options that `from_transformers` would read.

    Args:
        tensors: by name, as `model.state_dict()`. It is left as it is.
        source, target: "polyhead" (or "split"), "stacked", or a family such as "gpt2".
        num_heads: H. Fused weights and stacked heads are cut by it, and a wrong number that
            divides the rows as well cannot be noticed.
        num_kv_heads: G, where a fused weight holds fewer key heads.
        nope_head_dim, value_head_dim: features of a head, for DeepSeek.
        config: the model's config.json as a dict, instead of these numbers or beside them.

    Returns:
        Tensors by name, in the order of the checkpoint. Those that are only renamed are the same
        objects; those of fused weights have memory of their own.

    Raises:
        ArgumentError: a layout is not known.
        DtypeError: the tensors are not by name.
        ConversionError: no layer of that layout is found, one is not whole, its tensors do not fit
            together or to the numbers, one is no plain floating point tensor of 16 bits or more, a
            name has no place, another layer would stay, or two would have one name.

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
                f"{name} must hold numbers; got a tensor on the meta device, which has none; load "
                "the weights first (an offloaded model: without device_map, or from its files)"
            )


def dropped(names: Iterable[str], moves: list[Move]) -> set[str]:
    """The names of all buffers that newer code computes, in layers and in a family's model."""
    of_layers = {name for move in moves for name in move.dropped}
    if moves[0].source is None or not moves[0].source.is_family:
        return of_layers
    return of_layers | {name for name in names if is_old_buffer_of_a_model(name)}


def check_masks(moves: list[Move], read: Callable[[str], Tensor]) -> None:
    """Masks that would be dropped say what a rule says: they are read, and held to it."""
    for move in moves:
        for below, name in zip(move.buffers, move.dropped, strict=True):
            if is_mask(below, mask := read(name)):
                check_mask(name, mask)


def add(moved: dict[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
    if both := moved.keys() & outputs.keys():
        raise ConversionError(
            f"{sorted(both)[0]} would be there twice, moved and as it was; rename the one that is "
            "no attention's"
        )
    moved.update(outputs)


def plan(
    tensors: Mapping[str, Tensor],
    source: str,
    target: str,
    sizes: Sizes,
    config: Mapping[str, Any] | None = None,
) -> list[Move]:
    """Every attention layer of a checkpoint, and how it moves; only names and shapes are read.

    Raises:
        ArgumentError: a layout is not known.
        ConversionError: no layer of that layout is found, one is not whole, a name below one is
            none of its tensors, or a layer of another layout would stay.
    """
    for argument, layout in (("source", source), ("target", target)):
        if layout not in LAYOUTS:
            raise ArgumentError(
                argument, f"must be one of {', '.join(LAYOUTS)}", repr(layout), "choose a layout"
            )
    froms, tos = _THEIRS.get(source, ()), _THEIRS.get(target, ())
    if froms == tos:
        raise ArgumentError(
            "target", f"must be another layout than source = {source!r}", repr(target), "choose one"
        )
    norms = {side[0].offset_norms for side in (froms, tos) if _has_family_norms(side)}
    if len(norms) > 1:
        raise ConversionError(
            f"norms must be of one kind to move from {source} to {target}; got one of Gemma's, "
            "whose weights are 1 less than others'; move to polyhead, add or take away the 1 in "
            "q_norm and k_norm, and move on"
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
    """How many layers with attention there are, where a family that is known says it."""
    said = config.get("text_config") or config
    if _family(said) is None:
        return None
    names = ("num_hidden_layers", "n_layer", "num_layers")
    return next((said[name] for name in names if isinstance(said.get(name), int)), None)


def _with_config(sizes: Sizes, layout: Layout, config: Mapping[str, Any]) -> Sizes:
    """The numbers given, and the config's where none is given."""
    said = layout.sizes(config.get("text_config") or config)
    if sizes.num_heads is not None and said.num_kv_heads == said.num_heads:
        said = replace(said, num_kv_heads=sizes.num_heads)
    given = {name: number for name, number in vars(sizes).items() if number is not None}
    return replace(said, **given)


def source_of(names: Iterable[str], config: Mapping[str, Any] | None) -> str:
    """The layout of a checkpoint, by the family that its config names."""
    said = (config or {}).get("text_config") or config or {}
    if (source := _family(said)) is not None:
        return source
    raise ConversionError(
        "source must be given (--from) where no config.json names a family that is known; got "
        f"model_type {said.get('model_type')!r}; {_what_is_there(list(names))}"
    )


def _family(config: Mapping[str, Any]) -> str | None:
    """The layout of the family that a config names, if it is known."""
    family = config.get("model_type")
    source = _MODEL_TYPES.get(family, family) if isinstance(family, str) else None
    return source if source in _THEIRS else None


def _none_found(names: list[str], source: str) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"source must be the layout of an attention layer of the checkpoint; got {source!r}, whose "
        f"names are not among {shown or 'no names'}; {_what_is_there(names)}"
    )


def _what_is_there(names: list[str]) -> str:
    fitting = [name for name, layouts in _THEIRS.items() if find(names, layouts)]
    if find(names, ()):
        fitting.append("polyhead")
    return f"those of {', '.join(fitting)} are there" if fitting else "none that is known is there"
