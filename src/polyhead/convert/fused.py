"""Layout of a `MultiHeadAttention` after `fuse()`: one weight for its three projections.

W_qkv ((H + 2 G) * D, d_in)        everything else under the same name

+---------+-----+---------+---------+-----+-----------+---------+-----+-----------+
| query 0 | ... | query   | key 0   | ... | key G - 1 | value 0 | ... | value     |
|         |     | H - 1   |         |     |           |         |     | G - 1     |
+---------+-----+---------+---------+-----+-----------+---------+-----+-----------+
"""

from __future__ import annotations

from polyhead.convert.layout import Layout, blocks, linear, parameter

__all__ = ["LAYOUT"]

_AS_IT_IS = (
    "out_proj.weight",
    "out_proj.bias",
    "W_gate.weight",
    "W_gate.bias",
    "sinks",
    "q_norm.weight",
    "k_norm.weight",
    "position_bias.weight",
)
LAYOUT = Layout(
    "fused",
    linear("W_qkv", "W_query", "W_key", "W_value", rows=blocks),
    *(parameter(name, required=False) for name in _AS_IT_IS),
)
