"""Layout of T5: separate projections without biases, and a learned bias per distance.

    q, k, v (H * D, d)    o (d, H * D)    relative_attention_bias (buckets, H)

Row block h of q is head h; scores are not scaled. Only a stack's first layer has the table. The
others are given its bias, so here they share its module:

    later.position_bias = first.position_bias
"""

from __future__ import annotations

from typing import Any

from polyhead.convert.config import UNLIMITED, causal, is_causal
from polyhead.convert.family import Family
from polyhead.convert.layout import Layout, linear, parameter
from polyhead.modules import MultiHeadAttention
from polyhead.positions import RelativeBias

__all__ = ["FAMILY"]

LAYOUT = Layout(
    "t5",
    linear("q", "W_query"),
    linear("k", "W_key"),
    linear("v", "W_value"),
    linear("o", "out_proj"),
    parameter("relative_attention_bias.weight", "position_bias.weight", required=False),
    grouped=False,
)


def build(layer: Any) -> MultiHeadAttention:
    """Return a MultiHeadAttention with the layer's options, on the meta device."""
    heads: int = layer.n_heads
    table = None
    if layer.has_relative_attention_bias:
        table = RelativeBias(
            heads,
            num_buckets=layer.relative_attention_num_buckets,
            max_distance=layer.relative_attention_max_distance,
            bidirectional=not layer.is_decoder,
            device="meta",
        )
    return MultiHeadAttention(
        layer.d_model,
        layer.d_model,
        UNLIMITED,
        layer.dropout,
        heads,
        head_dim=layer.key_value_proj_dim,
        out_bias=False,
        position_bias=table,
        mask=causal() if is_causal(layer) else None,
        scale=1.0,
        device="meta",
    )


FAMILY = Family(names=("t5",), classes=("T5Attention",), build=build, layouts=(LAYOUT,))
