"""Conversion of one attention layer of a checkpoint, with checks of its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from polyhead.convert.layout import Layout, Sizes
from polyhead.convert.shapes import Shapes
from polyhead.errors import ConversionError

__all__ = ["check_tensors", "read", "write"]

_DEQUANTIZE = (
    "dequantize the model first, as model.dequantize() of transformers does, and save that one"
)


_HEAD = re.compile(r"heads\.(\d+)\.")


def check_tensors(layer: Mapping[str, Tensor], layout: Layout | None, sizes: Sizes) -> Sizes:
    """Check each tensor of a layer separately, under its original name.

    Args:
        layer: by name below the layer.
        layout: of these names; None: ours.
        sizes: known sizes.

    Returns:
        The sizes, with the number of stacked heads.

    Raises:
        ConversionError: one is no plain floating point tensor, or has another rank.
    """
    ours = {rule.theirs: rule.ours[0] for rule in layout.rules} if layout else {}
    stacked = layout is not None and not layout.one_width
    heads: set[int] = set()
    first: dict[str, tuple[str, Tensor]] = {}
    for name, tensor in layer.items():
        alone = name
        if stacked and (head := _HEAD.match(name)):
            heads.add(int(head[1]))
            alone = name[head.end() :]
        if layout and alone not in ours:
            continue  # the layout refuses it by name
        check_numbers(name, tensor)
        rank = _rank(ours.get(alone, alone))
        if tensor.ndim != rank:
            raise ConversionError(
                f"{name} must have {rank} dimension{'s' * (rank > 1)}; got {tuple(tensor.shape)}; "
                "get the checkpoint again, or choose the layout of its family"
            )
        if alone is not name:
            other, like = first.setdefault(alone, (name, tensor))
            if like.shape != tensor.shape:
                raise ConversionError(
                    f"{name} must have the shape {tuple(like.shape)} of {other}; got "
                    f"{tuple(tensor.shape)}; stacked heads are alike"
                )
    if not heads:
        return sizes
    if sizes.num_heads not in (None, H := len(heads)):
        raise ConversionError(
            f"num_heads must be the {H} heads that are stacked; got {sizes.num_heads}; leave it out"
        )
    return replace(sizes, num_heads=H)


def read(theirs: Mapping[str, Tensor], layout: Layout | None, sizes: Sizes) -> dict[str, Tensor]:
    """Return a layer under our names; its shapes must fit each other and the sizes.

    Args:
        theirs: the layer under the layout's names.
        layout: of the layer; None: ours.
        sizes: known sizes.

    Raises:
        ConversionError: the tensors do not form one layer of that layout.
    """
    if layout is None:
        # The target's layout splits the heads, with errors that are more precise.
        Shapes(theirs, _as_here(theirs)).check(Sizes(), None, is_read=True)
        return dict(theirs)
    name_of = {name: rule.theirs for rule in layout.rules for name in rule.ours}

    def named(name: str) -> tuple[str, str]:
        name = name_of[name]
        # Each of our tensors is several tensors of stacked heads.
        shape = tuple(theirs[name].shape) if name in theirs else tuple(ours[name].shape)
        return name, str(shape)

    try:
        ours = layout.to_ours(theirs, sizes)
        Shapes(ours, named).check(sizes, layout, is_read=True)
    except ConversionError as error:
        if not _fits_transposed(theirs, layout, sizes):
            raise
        weights = ", ".join(name for name, tensor in theirs.items() if tensor.ndim == 2)
        raise ConversionError(f"{error}; {_TRANSPOSE.format(weights)}") from None
    return ours


def write(ours: Mapping[str, Tensor], layout: Layout, sizes: Sizes) -> dict[str, Tensor]:
    """Return one of our layers under a layout's names; the inverse of `read`.

    Raises:
        ConversionError: its tensors do not form one layer of that layout.
    """
    theirs = layout.to_theirs(ours, sizes)
    Shapes(ours, _as_here(ours)).check(sizes, layout, is_read=False)
    return theirs


def _as_here(ours: Mapping[str, Tensor]) -> Callable[[str], tuple[str, str]]:
    return lambda name: (name, str(tuple(ours[name].shape)))


_TRANSPOSE = (
    "or, as all of it fits when transposed (nanoGPT stores weights so under GPT-2's names), "
    "transpose {} first (tensor.T)"
)


def _fits_transposed(theirs: Mapping[str, Tensor], layout: Layout, sizes: Sizes) -> bool:
    """True if the layer would be valid with its weights transposed."""
    transposed = {
        name: tensor.detach().to("meta").T if tensor.ndim == 2 else tensor.detach().to("meta")
        for name, tensor in theirs.items()
    }
    try:
        ours = layout.to_ours(transposed, sizes)
        Shapes(ours, lambda name: (name, "")).check(sizes, layout, is_read=True)
    except ConversionError:
        return False
    return True


def _rank(ours: str) -> int:
    """Return the rank of our tensor of this name."""
    is_norm = ours.rpartition(".")[0].endswith("_norm")
    return 1 if ours.endswith("bias") or ours == "sinks" or is_norm else 2


def check_numbers(name: str, tensor: object) -> None:
    """Raise unless a tensor is dense floating point of 16 bits or more.

    Raises:
        ConversionError: it is quantized, or of a tensor subclass.
    """
    if not isinstance(tensor, Tensor):
        kind = type(tensor).__name__
        raise ConversionError(f"{name} must be a tensor; got a {kind}; pass torch's tensors alone")
    if type(tensor) not in (Tensor, nn.Parameter):
        kind = type(tensor).__name__
        remedy = "gather it first (tensor.full_tensor())" if kind == "DTensor" else _DEQUANTIZE
        raise ConversionError(
            f"{name} must be a plain tensor to be converted; got a {kind}; {remedy}"
        )
    dtype = tensor.dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ConversionError(
            f"{name} must be floating point of 16 bits or more; got {dtype}, quantized values; "
            f"{_DEQUANTIZE}"
        )
    if tensor.layout is not torch.strided:
        raise ConversionError(
            f"{name} must be a dense tensor to be converted; got {tensor.layout}; "
            "call to_dense() first"
        )
