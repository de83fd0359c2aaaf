"""The layout of Llama, Mistral and Qwen 2: separate projections, grouped heads, half-split rope.

    q_proj (H * D, d_in)    k_proj, v_proj (G * D, d_in)    o_proj (d_in, H * D)

Row block h of q_proj is head h, as in MultiHeadAttention: only the names differ.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import polyhead.mask
from polyhead.convert.linear import check_plain, copied, filled
from polyhead.errors import ConversionError
from polyhead.modules import MultiHeadAttention
from polyhead.positions import Rope

__all__ = ["from_layer"]

_NAMES = {"q_proj": "W_query", "k_proj": "W_key", "v_proj": "W_value", "o_proj": "out_proj"}


def from_layer(layer: nn.Module) -> MultiHeadAttention:
    """The layer's weights and options as a MultiHeadAttention."""
    config: Any = layer.config
    projections: dict[str, Any] = {name: getattr(layer, name) for name in _NAMES}
    for name, projection in projections.items():
        check_plain(name, projection)
    mask = polyhead.mask.causal()
    sliding_window = getattr(layer, "sliding_window", getattr(config, "sliding_window", None))
    if sliding_window is not None:
        mask &= polyhead.mask.window(before=sliding_window - 1)
    q_proj, o_proj = projections["q_proj"], projections["o_proj"]
    mha = MultiHeadAttention(
        q_proj.in_features,
        o_proj.out_features,
        config.max_position_embeddings,
        config.attention_dropout,
        config.num_attention_heads,
        q_proj.bias is not None,
        num_kv_heads=config.num_key_value_heads,
        head_dim=q_proj.out_features // config.num_attention_heads,
        out_bias=o_proj.bias is not None,
        rope=_rope(config),
        mask=mask,
        scale=float(layer.scaling),  # type: ignore[arg-type]
        device="meta",
    )
    state: dict[str, Tensor] = {}
    for name, projection in projections.items():
        state |= copied(_NAMES[name], projection)
    return filled(mha, state, layer)


def _rope(config: Any) -> Rope:
    # transformers 5 keeps rope's options in rope_parameters, 4 in rope_theta and rope_scaling.
    options = getattr(config, "rope_parameters", None) or {
        "rope_theta": config.rope_theta,
        **(getattr(config, "rope_scaling", None) or {}),
    }
    kind = options.get("rope_type", options.get("type", "default"))
    if kind != "default":
        raise ConversionError(f'rope of type "default" can be converted; got "{kind}"')
    return Rope(theta=float(options["rope_theta"]))
