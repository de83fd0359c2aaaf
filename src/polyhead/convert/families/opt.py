"""Layout of OPT: separate projections with biases, no positions in the layer.

    q_proj, k_proj, v_proj (d, d)    out_proj (d, d)

Row block h of q_proj is head h, as in MultiHeadAttention: only the names differ.
"""

from __future__ import annotations

from typing import Any

from polyhead.convert.config import causal
from polyhead.convert.family import Family
from polyhead.convert.layout import Layout, linear
from polyhead.modules import MultiHeadAttention

__all__ = ["FAMILY"]

LAYOUT = Layout(
    "opt",
    linear("q_proj", "W_query"),
    linear("k_proj", "W_key"),
    linear("v_proj", "W_value"),
    linear("out_proj", "out_proj"),
    grouped=False,
)


def build(layer: Any) -> MultiHeadAttention:
    """Return a MultiHeadAttention with the layer's options, on the meta device."""
    config = layer.config
    return MultiHeadAttention(
        config.hidden_size,
        config.hidden_size,
        config.max_position_embeddings,
        config.attention_dropout,
        config.num_attention_heads,
        config.enable_bias,
        out_bias=config.enable_bias,
        mask=causal(),
        device="meta",
    )


FAMILY = Family(names=("opt",), classes=("OPTAttention",), build=build, layouts=(LAYOUT,))
