"""Model family: its names, its attention classes, how they are built and their weight layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from polyhead.convert.layout import Layout
from polyhead.modules import MultiHeadAttention, MultiHeadLatentAttention

__all__ = ["Converted", "Family"]

Converted: TypeAlias = MultiHeadAttention | MultiHeadLatentAttention


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of `families.FAMILIES`.

    Attributes:
        names: layout names in `convert.state_dict`; none: its layers move by `from_transformers`
            only.
        classes: names of its attention classes in transformers; none: its checkpoints move by
            `state_dict` only.
        model_types: values of `model_type` in config.json that are not among `names`; they stand
            for the first name.
        build: returns a module with a layer's options, on the meta device.
        layouts: the first one whose required tensors a layer has is used.
    """

    names: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    build: Callable[[Any], Converted]
    layouts: tuple[Layout, ...]
