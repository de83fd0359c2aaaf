"""What runs in each attention layer of a transformers model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from polyhead.integrations.transformers.interface import NAME

__all__ = ["LayerReport", "ModelReport", "report"]


@dataclass(frozen=True)
class LayerReport:
    """One attention layer.

    Attributes:
        name: as in `model.named_modules()`.
        cls: its class.
        runs: "polyhead", the name of another attention, or "its own".
        reason: why not polyhead, and what to do; empty where it is.
    """

    name: str
    cls: str
    runs: str
    reason: str = ""

    @property
    def attends_through_polyhead(self) -> bool:
        return self.runs == NAME


@dataclass(frozen=True)
class ModelReport:
    """All attention layers of a model. Printing it gives a table.

    Attributes:
        model: its class.
        layers: in the order of `model.named_modules()`.
    """

    model: str
    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        ours = sum(layer.attends_through_polyhead for layer in self.layers)
        lines = [f"{self.model}: {ours} of {len(self.layers)} attention layers run polyhead"]
        if self.layers:
            widths = [
                max(map(len, column)) for column in zip(*map(_columns, self.layers), strict=True)
            ]
        for layer in self.layers:
            cells = zip(_columns(layer), widths, strict=True)
            line = "  ".join(text.ljust(width) for text, width in cells)
            lines.append(f"  {line}  {layer.reason}".rstrip())
        return "\n".join(lines)


def report(model: nn.Module) -> ModelReport:
    """Say for each attention layer whether it attends through polyhead, and if not why.

    Told from the layers' code and the model's config; nothing is run.

    >>> import polyhead
    >>> from transformers import LlamaConfig, LlamaModel
    >>> polyhead.integrations.transformers.register()
    >>> config = LlamaConfig(
    ...     hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=6,
    ...     vocab_size=31, attn_implementation="polyhead",
    ... )
    >>> print(report(LlamaModel(config)))
    LlamaModel: 2 of 2 attention layers run polyhead
      layers.0.self_attn  LlamaAttention  polyhead
      layers.1.self_attn  LlamaAttention  polyhead
    """
    return ModelReport(type(model).__name__, tuple(_layers(model, "", None)))


def _layers(module: nn.Module, name: str, config: Any) -> Iterator[LayerReport]:
    config = getattr(module, "config", None) or config
    inner = [
        layer
        for child_name, child in module.named_children()
        for layer in _layers(child, f"{name}.{child_name}".lstrip("."), config)
    ]
    if _asks(type(module).forward):
        yield _asking(module, name, config)
    elif "Attention" in type(module).__name__ and not inner:
        yield LayerReport(
            name,
            type(module).__name__,
            "its own",
            "computes attention in its forward, and asks no attention function",
        )
    yield from inner


def _asking(module: nn.Module, name: str, config: Any) -> LayerReport:
    runs = str(getattr(config, "_attn_implementation", None))
    advice = f'call model.set_attn_implementation("{NAME}")'
    return LayerReport(name, type(module).__name__, runs, "" if runs == NAME else advice)


@functools.cache
def _asks(forward: Callable[..., Any]) -> bool:
    """Whether a layer's forward asks transformers for a registered attention function."""
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(forward)
    except (OSError, TypeError):  # typed into a prompt, or compiled
        return False


def _columns(layer: LayerReport) -> tuple[str, str, str]:
    return layer.name, layer.cls, layer.runs
