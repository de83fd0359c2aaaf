"""How to call attention layers of transformers: as their models do, which pass them rotary
positions and an additive mask.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.check.calling import Calling, MaskArgument
from polyhead.errors import ArgumentError

__all__ = ["calling_of_transformers"]


def calling_of_transformers(
    module: nn.Module, parameters: Mapping[str, inspect.Parameter]
) -> Calling:
    """How to call a layer whose class is one of transformers.

    Raises:
        ArgumentError: it needs what only its model can make.
    """
    config: Any = getattr(module, "config", None)
    rotary = _rotary(module, config) if "position_embeddings" in parameters else None
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind < p.VAR_KEYWORD]
    none = dict.fromkeys(n for n in (*needed[1:], "attention_mask") if n in parameters)
    none.pop("position_embeddings", None)

    def run(layer: nn.Module, x: Tensor, keywords: dict[str, Any]) -> Any:
        first = keywords.pop("_first", 0)
        places = torch.arange(first, first + x.shape[1], device=x.device)[None]
        given = dict(none)
        if rotary is not None:
            cos, sin = rotary(x, places, **_layer_type(module, rotary))
            given["position_embeddings"] = (cos.to(x.dtype), sin.to(x.dtype))
        elif "position_ids" in parameters:
            given["position_ids"] = places
        return layer(x, **(given | keywords))

    mask = MaskArgument("attention_mask", "full", "add", "as the model passes it")
    eager = getattr(config, "_attn_implementation", None) == "eager"
    asks = {"output_attentions": True} if "output_attentions" in parameters else {}
    cache = next((n for n in ("past_key_values", "past_key_value") if n in parameters), "")
    return Calling(
        "transformers",
        run,
        mask=mask if "attention_mask" in parameters else None,
        weights=asks if eager else None,
        weights_come=eager,
        cache="transformers" if cache else None,
        cache_name=cache,
    )


def _rotary(module: nn.Module, config: Any) -> nn.Module:
    source = sys.modules[type(module).__module__]
    for name in dir(source):
        if name.endswith("RotaryEmbedding"):
            rotary: nn.Module = getattr(source, name)(config=config)
            return rotary
    raise ArgumentError(
        "call",
        "must be given for a layer whose rotary positions cannot be made",
        type(module).__name__,
        "pass call=lambda module, x: ...",
    )


def _layer_type(module: nn.Module, rotary: nn.Module) -> dict[str, Any]:
    """Models with several kinds of layers have rotary positions for each."""
    if "layer_type" not in inspect.signature(rotary.forward).parameters:
        return {}
    types = getattr(getattr(module, "config", None), "layer_types", [None])
    index: Any = getattr(module, "layer_idx", 0)
    return {"layer_type": getattr(module, "layer_type", None) or types[index or 0]}
