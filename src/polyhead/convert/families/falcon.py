"""Layout of Falcon: one weight; per KV group its query heads, its key and its value.

    query_key_value ((H + 2 G) * D, d)        dense (d, d)

    +---------+-----+---------------+-------+---------+-----------+-----
    | query 0 | ... | query H/G - 1 | key 0 | value 0 | query H/G | ...      group 0 | group 1 ...
    +---------+-----+---------------+-------+---------+-----------+-----

Falcon-40B has G groups; Falcon-7B has one (G = 1); without multi_query every head is a group, as in
GPT-NeoX. Positions: rope, or Falcon's own rounding of ALiBi (`FalconAlibi`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.convert.config import UNLIMITED, causal, context_length, rope
from polyhead.convert.family import Family
from polyhead.convert.layout import Layout, by_group, linear
from polyhead.modules import MultiHeadAttention
from polyhead.positions import alibi_slopes

__all__ = ["FAMILY", "FalconAlibi"]


def num_kv_heads(config: Mapping[str, Any]) -> int | None:
    """Return the number of KV heads, which depends on three options of the config."""
    heads: int | None = config.get("num_attention_heads")
    if config.get("new_decoder_architecture"):
        groups: int | None = config.get("num_kv_heads")
        return groups or heads
    return 1 if config.get("multi_query", True) else heads


LAYOUT = Layout(
    "falcon",
    linear("query_key_value", "W_query", "W_key", "W_value", rows=by_group),
    linear("dense", "out_proj"),
    num_kv_heads=num_kv_heads,
)


class FalconAlibi(nn.Module):
    """ALiBi as transformers computes it for Falcon: slope * position in bfloat16, over sqrt(D).

    Keys count from 0, and the bias is rounded to bfloat16: the weights were trained with that,
    not with the exact biases of `alibi_slopes`.

    >>> FalconAlibi(num_heads=2, head_dim=4)(1, 3)[0, :, 0]
    tensor([[0.0000, 0.0312, 0.0625],
            [0.0000, 0.0020, 0.0039]])
    """

    slopes: Tensor

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        # Not saved, as in transformers; a buffer, so that it moves with the weights.
        slopes = alibi_slopes(num_heads, dtype=torch.bfloat16).float()
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(self, T: int, S: int) -> Tensor:
        rounded = self.slopes.bfloat16()[:, None] * torch.arange(S, device=self.slopes.device)
        exact = torch.promote_types(self.slopes.dtype, torch.float32)
        return (rounded.to(exact) / math.sqrt(self.head_dim))[None, :, None]

    def extra_repr(self) -> str:
        return f"num_heads={len(self.slopes)}, head_dim={self.head_dim}"


def build(layer: Any) -> MultiHeadAttention:
    """Return a MultiHeadAttention with the layer's options, on the meta device."""
    config = layer.config
    dropout = layer.attention_dropout
    d, H = config.hidden_size, config.num_attention_heads
    alibi = FalconAlibi(H, d // H).to(layer.dense.weight) if config.alibi else None
    return MultiHeadAttention(
        d,
        d,
        UNLIMITED if config.alibi else context_length(config),
        dropout.p if config.alibi else 0.0,  # with rope, transformers drops no weights
        H,
        config.bias,
        num_kv_heads=num_kv_heads(vars(config)),
        out_bias=config.bias,
        rope=None if config.alibi else rope(config),
        position_bias=alibi,
        mask=causal(),
        device="meta",
    )


FAMILY = Family(names=("falcon",), classes=("FalconAttention",), build=build, layouts=(LAYOUT,))
