"""Layout of GPT-2: one weight stored (in, out), all queries before all keys before all values.

c_attn (d, 3 * d)        c_proj (d, d)        each x @ weight + bias, with x a row

+---------+-----+-------------+---------+-----+-----------+---------+-----+-------------+
| query 0 | ... | query H - 1 | key 0   | ... | key H - 1 | value 0 | ... | value H - 1 |
+---------+-----+-------------+---------+-----+-----------+---------+-----+-------------+
   columns of c_attn: its transpose has these as rows, as every other layout does
"""

from __future__ import annotations

from typing import Any

from polyhead.convert.config import causal
from polyhead.convert.family import Family
from polyhead.convert.layout import Layout, linear, thirds
from polyhead.errors import ConversionError
from polyhead.modules import MultiHeadAttention

__all__ = ["FAMILY"]


LAYOUT = Layout(
    "gpt2",
    linear("c_attn", "W_query", "W_key", "W_value", rows=thirds, transposed=True),
    linear("c_proj", "out_proj", transposed=True),
)


def build(layer: Any) -> MultiHeadAttention:
    """Return a MultiHeadAttention with the layer's options, on the meta device."""
    if layer.is_cross_attention:
        raise ConversionError(
            "a GPT2Attention must attend to its own tokens; got one for cross-attention, whose "
            "queries are another layer's (q_attn); convert that of a decoder without an encoder"
        )
    config = layer.config
    d, H = config.hidden_size, config.num_attention_heads
    scale = float(d // H) ** -0.5 if config.scale_attn_weights else 1.0
    if config.scale_attn_by_inverse_layer_idx:
        scale /= layer.layer_idx + 1
    return MultiHeadAttention(
        d,
        d,
        config.max_position_embeddings,
        config.attn_pdrop,
        H,
        qkv_bias=True,
        mask=causal(),
        scale=scale,
        device="meta",
    )


FAMILY = Family(names=("gpt2",), classes=("GPT2Attention",), build=build, layouts=(LAYOUT,))
