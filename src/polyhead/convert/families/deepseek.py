"""Layout of DeepSeek V3: latents, and one weight with the keys and values of each head.

    kv_a_proj_with_mqa (C + R, d)    kv_a_layernorm (C,)    kv_b_proj (H * (N + E), C)
    q_a_proj (Q, d)    q_a_layernorm (Q,)    q_b_proj (H * (N + R), Q)     or q_proj (.., d) alone
    o_proj (d, H * E)

    kv_b_proj:  +-------+---------+-------+---------+-----
                | key 0 | value 0 | key 1 | value 1 | ...      N rows of keys, E of values
                +-------+---------+-------+---------+-----

C = kv_lora_rank, Q = q_lora_rank, N, R and E the head sizes without rope, with it and of values.
"""

from __future__ import annotations

from typing import Any

from polyhead.convert.config import causal, context_length, rope
from polyhead.convert.family import Family
from polyhead.convert.layout import Layout, Rows, Sizes, linear, parameter
from polyhead.convert.linear import rms_norm
from polyhead.modules import MultiHeadLatentAttention

__all__ = ["FAMILY"]


def latent_heads(sizes: Sizes) -> Rows:
    """Return the rows per head: features of its key, then of its value."""
    features = sizes.need("nope_head_dim"), sizes.need("value_head_dim")
    return sizes.need("num_heads"), features


_SHARED = (
    *linear("kv_a_proj_with_mqa", "W_kv_down"),
    *parameter("kv_a_layernorm.weight", "kv_norm.weight"),
    *linear("kv_b_proj", "W_key", "W_value", rows=latent_heads),
    *linear("o_proj", "out_proj"),
)
LAYOUT = Layout(
    "deepseek",
    linear("q_a_proj", "W_query_down"),
    parameter("q_a_layernorm.weight", "q_norm.weight"),
    linear("q_b_proj", "W_query"),
    _SHARED,
)
# Without a latent for the queries, as in DeepSeek V2 Lite.
DIRECT = Layout("deepseek_direct", linear("q_proj", "W_query"), _SHARED)


def build(layer: Any) -> MultiHeadLatentAttention:
    """Return a MultiHeadLatentAttention with the layer's options, on the meta device."""
    config = layer.config
    bias: bool = config.attention_bias
    return MultiHeadLatentAttention(
        config.hidden_size,
        config.hidden_size,
        context_length(config),
        config.attention_dropout,
        config.num_attention_heads,
        kv_rank=config.kv_lora_rank,
        query_rank=config.q_lora_rank,
        nope_head_dim=config.qk_nope_head_dim,
        rope_head_dim=config.qk_rope_head_dim,
        value_head_dim=config.v_head_dim,
        rope=rope(config, interleaved=config.rope_interleave),
        norm=rms_norm(layer.kv_a_layernorm),
        qkv_bias=bias,
        out_bias=bias,
        mask=causal(),
        scale=layer.scaling,
        device="meta",
    )


FAMILY = Family(
    names=("deepseek",),
    classes=("DeepseekV3Attention",),
    model_types=("deepseek_v3",),
    build=build,
    layouts=(LAYOUT, DIRECT),
)
