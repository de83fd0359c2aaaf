"""Attention layers of a model: which ones use transformers' AttentionInterface, from their code."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from polyhead.integrations.transformers.forward import KNOWN_ARGUMENTS

__all__ = ["AttentionLayer", "attention_layers"]


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer.

    Attributes:
        name: as in `model.named_modules()`.
        module: the layer.
        config: of the innermost model that it is in; None outside of any.
        uses_attention_interface: True if it calls a registered attention function.
        refused: arguments that it passes to that function and polyhead's refuses.
    """

    name: str
    module: nn.Module
    config: Any
    uses_attention_interface: bool
    refused: tuple[str, ...] = ()

    @property
    def is_polyhead(self) -> bool:
        """True for polyhead's own modules."""
        return type(self.module).__module__.startswith("polyhead.")

    @property
    def is_torch(self) -> bool:
        return isinstance(self.module, nn.MultiheadAttention) and not self.is_polyhead

    @property
    def has_custom_attention(self) -> bool:
        """True for an attention of transformers that bypasses AttentionInterface."""
        cls: Any = type(self.module)
        return not (
            self.uses_attention_interface or self.is_polyhead or self.is_torch
        ) and _attends(cls)


def attention_layers(module: nn.Module, name: str = "", config: Any = None) -> list[AttentionLayer]:
    """Return the innermost attention layers, in the order of `module.named_modules()`."""
    return list(_layers(module, name, config))


def _layers(module: nn.Module, name: str, config: Any) -> Iterator[AttentionLayer]:
    config = getattr(module, "config", None) or config
    inner = [
        layer
        for child_name, child in module.named_children()
        for layer in _layers(child, f"{name}.{child_name}".lstrip("."), config)
    ]
    cls: Any = type(module)
    dispatches = _dispatches(cls)
    if dispatches or ("Attention" in cls.__name__ and not inner):
        refused = _refused(cls) if dispatches else ()
        yield AttentionLayer(name, module, config, dispatches, refused)
    yield from inner


@functools.cache
def _dispatches(cls: Any) -> bool:
    return "ALL_ATTENTION_FUNCTIONS" in _source(cls.forward)


@functools.cache
def _refused(cls: Any) -> tuple[str, ...]:
    """Return keyword arguments of a class's attention call that polyhead refuses."""
    source = textwrap.dedent(_source(cls.forward))
    nodes = list(ast.walk(ast.parse(source)))
    functions = {
        ast.unparse(target)
        for node in nodes
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and node.value is not None
        and "ALL_ATTENTION_FUNCTIONS" in ast.unparse(node.value)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    }
    passed = [
        keyword.arg
        for node in nodes
        if isinstance(node, ast.Call) and ast.unparse(node.func) in functions
        for keyword in node.keywords
        if keyword.arg is not None and ast.unparse(keyword.value) != "None"
    ]
    return tuple(dict.fromkeys(name for name in passed if name not in KNOWN_ARGUMENTS))


@functools.cache
def _attends(cls: Any) -> bool:
    """True if a class multiplies by a softmax; linear attention does not."""
    source = _source(cls)
    if "scaled_dot_product_attention(" in source:
        return True
    return "softmax(" in source and re.search(r"matmul\(|bmm\(|einsum\(|@ ", source) is not None


def _source(code: Any) -> str:
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):  # typed into a prompt, or compiled
        return ""
