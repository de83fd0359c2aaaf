"""Attention status of a transformers model: the implementation that runs in each layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from polyhead.integrations.transformers.attention_layers import AttentionLayer, attention_layers
from polyhead.integrations.transformers.guard import NAME

__all__ = ["LayerStatus", "ModelStatus", "status"]


@dataclass(frozen=True)
class LayerStatus:
    """Status of one attention layer.

    Attributes:
        name: as in `model.named_modules()`.
        cls: its class.
        runs: "polyhead", the name of another attention, "its own", or "nothing": polyhead refuses
            an argument of the layer.
        reason: why not polyhead, and the remedy; empty if it is polyhead.
    """

    name: str
    cls: str
    runs: str
    reason: str = ""

    @property
    def attends_through_polyhead(self) -> bool:
        return self.runs == NAME


@dataclass(frozen=True)
class ModelStatus:
    """Status of all attention layers of a model; `str()` gives a table.

    Attributes:
        model: its class.
        layers: in the order of `model.named_modules()`.
    """

    model: str
    layers: tuple[LayerStatus, ...]

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


def status(model: nn.Module) -> ModelStatus:
    """Report for each attention layer if it runs polyhead, and if not why.

    Read from the layers' code and the model's config; nothing is run.

    >>> import polyhead
    >>> from transformers import LlamaConfig, LlamaModel
    >>> polyhead.integrations.transformers.register()
    >>> config = LlamaConfig(
    ...     hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=6,
    ...     vocab_size=31, attn_implementation="polyhead",
    ... )
    >>> print(status(LlamaModel(config)))
    LlamaModel: 2 of 2 attention layers run polyhead
      layers.0.self_attn  LlamaAttention  polyhead
      layers.1.self_attn  LlamaAttention  polyhead
    """
    return ModelStatus(type(model).__name__, tuple(map(_reported, attention_layers(model))))


def _reported(layer: AttentionLayer) -> LayerStatus:
    runs, reason = "its own", "computes attention in its forward, without AttentionInterface"
    if layer.is_polyhead:
        runs, reason = NAME, ""
    elif layer.is_torch:
        reason = "is torch's; call polyhead.drop_in.replace_attention(model)"
    elif layer.refused:
        runs = str(getattr(layer.config, "_attn_implementation", None))
        runs = "nothing" if runs == NAME else runs
        reason = f'passes {", ".join(layer.refused)}, which polyhead does not support; keep "eager"'
    elif layer.uses_attention_interface:
        runs = str(getattr(layer.config, "_attn_implementation", None))
        reason = "" if runs == NAME else f'call model.set_attn_implementation("{NAME}")'
    return LayerStatus(layer.name, type(layer.module).__name__, runs, reason)


def _columns(layer: LayerStatus) -> tuple[str, str, str]:
    return layer.name, layer.cls, layer.runs
