"""Layout of Llama, Mistral and Qwen 2: separate projections, grouped heads, half-split rope.

    q_proj (H * D, d_in)    k_proj, v_proj (G * D, d_in)    o_proj (d_in, H * D)

Row block h of q_proj is head h, as in MultiHeadAttention: only the names differ.
"""

from __future__ import annotations

from typing import Any

from polyhead.convert.config import causal, context_length, rope
from polyhead.convert.family import Family
from polyhead.convert.layout import Layout, linear
from polyhead.modules import MultiHeadAttention

__all__ = ["FAMILY", "PROJECTIONS", "build"]

PROJECTIONS = (
    *linear("q_proj", "W_query"),
    *linear("k_proj", "W_key"),
    *linear("v_proj", "W_value"),
    *linear("o_proj", "out_proj"),
)
LAYOUT = Layout("llama", PROJECTIONS)


def build(layer: Any, *, layer_type: str | None = None, **options: Any) -> MultiHeadAttention:
    """Return a MultiHeadAttention with the layer's options, on the meta device.

    Args:
        layer: with Llama's attributes.
        layer_type: selects one of the config's ropes, if it has several.
        options: of MultiHeadAttention, where they differ from Llama.
    """
    config = layer.config
    q_proj = layer.q_proj
    o_proj = layer.o_proj
    sliding_window = getattr(layer, "sliding_window", getattr(config, "sliding_window", None))
    return MultiHeadAttention(
        q_proj.in_features,
        o_proj.out_features,
        context_length(config, layer_type),
        config.attention_dropout,
        config.num_attention_heads,
        q_proj.bias is not None,
        num_kv_heads=config.num_key_value_heads,
        head_dim=q_proj.out_features // config.num_attention_heads,
        out_bias=o_proj.bias is not None,
        rope=rope(config, layer_type),
        scale=float(layer.scaling),
        device="meta",
        **{"mask": causal(sliding_window), **options},
    )


FAMILY = Family(
    names=("llama", "mistral", "qwen2"),
    classes=("LlamaAttention", "MistralAttention", "Qwen2Attention"),
    build=build,
    layouts=(LAYOUT,),
)
