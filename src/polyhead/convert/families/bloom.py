"""Layout of Bloom: as GPT-NeoX, one weight with a query, a key and a value per head; ALiBi.

    query_key_value (H * 3 * D, d)        dense (d, d)

    +---------+-------+---------+---------+-------+---------+-----
    | query 0 | key 0 | value 0 | query 1 | key 1 | value 1 | ...
    +---------+-------+---------+---------+-------+---------+-----

Theirs adds the residual it is given to the output; ours is given none.
"""

from __future__ import annotations

from typing import Any

from polyhead.convert.config import UNLIMITED, causal
from polyhead.convert.families import neox
from polyhead.convert.family import Family
from polyhead.convert.layout import Layout
from polyhead.modules import MultiHeadAttention

__all__ = ["FAMILY"]

LAYOUT = Layout("bloom", neox.PROJECTIONS)


def build(layer: Any) -> MultiHeadAttention:
    """Return a MultiHeadAttention with the layer's options, on the meta device."""
    dropout = layer.attention_dropout
    d = layer.hidden_size
    return MultiHeadAttention(
        d,
        d,
        UNLIMITED,
        dropout.p,
        layer.num_heads,
        qkv_bias=True,
        alibi=True,
        mask=causal(),
        device="meta",
    )


FAMILY = Family(names=("bloom",), classes=("BloomAttention",), build=build, layouts=(LAYOUT,))
