"""Layouts of ViT: separate projections, bidirectional attention.

    q_proj, k_proj, v_proj (d, d)                                      o_proj (d, d)
    attention.query, attention.key, attention.value (d, d)             output.dense (d, d)

The first row is transformers 5's layer, the second transformers 4's and that of checkpoints.
"""

from __future__ import annotations

from typing import Any

from polyhead.convert.config import UNLIMITED
from polyhead.convert.families import llama
from polyhead.convert.family import Family
from polyhead.convert.layout import Layout, linear
from polyhead.modules import MultiHeadAttention

__all__ = ["FAMILIES"]

VIT = Layout("vit", llama.PROJECTIONS, grouped=False)
VIT_SAVED = Layout(
    "vit_saved",
    linear("attention.query", "W_query"),
    linear("attention.key", "W_key"),
    linear("attention.value", "W_value"),
    linear("output.dense", "out_proj"),
    grouped=False,
)


def build(layer: Any) -> MultiHeadAttention:
    """Return a MultiHeadAttention with the layer's options, on the meta device."""
    is_as_saved = hasattr(layer, "attention")
    config = layer.attention.config if is_as_saved else layer.config
    o_proj = layer.output.dense if is_as_saved else layer.o_proj
    return MultiHeadAttention(
        config.hidden_size,
        config.hidden_size,
        UNLIMITED,
        config.attention_probs_dropout_prob,
        config.num_attention_heads,
        config.qkv_bias,
        head_dim=o_proj.in_features // config.num_attention_heads,
        mask=None,
        device="meta",
    )


FAMILIES = (
    Family(names=("vit",), classes=("ViTAttention",), build=build, layouts=(VIT, VIT_SAVED)),
    Family(names=("vit_saved",), build=build, layouts=(VIT_SAVED,)),
)
