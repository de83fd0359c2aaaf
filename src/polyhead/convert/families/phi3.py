"""Layout of Phi 3: one weight, all queries before all keys before all values.

qkv_proj ((H + 2 G) * D, d_in)        o_proj (d_in, H * D)

+---------+-----+---------+---------+-----+-----------+---------+-----+-----------+
| query 0 | ... | query   | key 0   | ... | key G - 1 | value 0 | ... | value     |
|         |     | H - 1   |         |     |           |         |     | G - 1     |
+---------+-----+---------+---------+-----+-----------+---------+-----+-----------+
"""

from __future__ import annotations

from typing import Any

from polyhead.convert.config import causal, context_length, rope
from polyhead.convert.family import Family
from polyhead.convert.layout import Layout, blocks, linear
from polyhead.modules import MultiHeadAttention

__all__ = ["FAMILY"]

LAYOUT = Layout(
    "phi3",
    linear("qkv_proj", "W_query", "W_key", "W_value", rows=blocks),
    linear("o_proj", "out_proj"),
)


def build(layer: Any) -> MultiHeadAttention:
    """Return a MultiHeadAttention with the layer's options, on the meta device."""
    config = layer.config
    qkv_proj = layer.qkv_proj
    o_proj = layer.o_proj
    head_dim = o_proj.in_features // config.num_attention_heads
    return MultiHeadAttention(
        qkv_proj.in_features,
        o_proj.out_features,
        context_length(config),
        config.attention_dropout,
        config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        out_bias=False,
        rope=rope(config, partial_of=head_dim),
        mask=causal(config.sliding_window),
        scale=layer.scaling,
        device="meta",
    )


FAMILY = Family(names=("phi3",), classes=("Phi3Attention",), build=build, layouts=(LAYOUT,))
