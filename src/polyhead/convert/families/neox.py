"""Layout of GPT-NeoX (Pythia): one weight with a query, a key and a value per head.

    query_key_value (H * 3 * D, d)        dense (d, d)

    +---------+-------+---------+---------+-------+---------+-----
    | query 0 | key 0 | value 0 | query 1 | key 1 | value 1 | ...
    +---------+-------+---------+---------+-------+---------+-----

Rope rotates the first part of each head, in the half-split order.
"""

from __future__ import annotations

from typing import Any

from polyhead.convert.config import causal, context_length, rope
from polyhead.convert.family import Family
from polyhead.convert.layout import Layout, by_head, linear
from polyhead.modules import MultiHeadAttention

__all__ = ["FAMILY", "PROJECTIONS"]

PROJECTIONS = (
    *linear("query_key_value", "W_query", "W_key", "W_value", rows=by_head),
    *linear("dense", "out_proj"),
)
LAYOUT = Layout("neox", PROJECTIONS)


def build(layer: Any) -> MultiHeadAttention:
    """Return a MultiHeadAttention with the layer's options, on the meta device."""
    config = layer.config
    d, H = config.hidden_size, config.num_attention_heads
    return MultiHeadAttention(
        d,
        d,
        context_length(config),
        config.attention_dropout,
        H,
        config.attention_bias,
        out_bias=config.attention_bias,
        rope=rope(config, partial_of=d // H),
        mask=causal(),
        device="meta",
    )


FAMILY = Family(
    names=("neox",),
    classes=("GPTNeoXAttention",),
    model_types=("gpt_neox",),
    build=build,
    layouts=(LAYOUT,),
)
