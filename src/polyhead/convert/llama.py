"""The layout of Llama, Mistral and Qwen 2: separate projections, grouped heads, half-split rope.

    q_proj (H * D, d_in)    k_proj, v_proj (G * D, d_in)    o_proj (d_in, H * D)

Row block h of q_proj is head h, as in MultiHeadAttention: only the names differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import polyhead.mask
from polyhead.convert.linear import check_plain, copied, filled
from polyhead.errors import ConversionError
from polyhead.modules import MultiHeadAttention
from polyhead.positions import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    RopeScaling,
    YarnScaling,
)

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
        _context_length(config),
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


def _context_length(config: Any) -> int:
    """The most tokens that the layer is for: many configs with a scaled rope, all those of type
    "dynamic", keep the unscaled model's limit in max_position_embeddings."""
    options = _rope_options(config)
    longest: int = config.max_position_embeddings
    scaled = (options.get("factor") or 1.0) * _original_context(options, config)
    return max(longest, int(scaled))


def _rope(config: Any) -> Rope:
    options = _rope_options(config)
    kind = options.get("rope_type", options.get("type", "default"))
    if kind not in _SCALINGS:
        known = ", ".join(f'"{name}"' for name in _SCALINGS)
        raise ConversionError(f'rope of type {known} can be converted; got "{kind}"')
    return Rope(theta=float(options["rope_theta"]), scaling=_SCALINGS[kind](options, config))


def _rope_options(config: Any) -> dict[str, Any]:
    # transformers 5 keeps rope's options in rope_parameters, 4 in rope_theta and rope_scaling.
    return getattr(config, "rope_parameters", None) or {
        "rope_theta": config.rope_theta,
        **(getattr(config, "rope_scaling", None) or {}),
    }


def _linear(options: dict[str, Any], config: Any) -> LinearScaling:
    return LinearScaling(options["factor"])


def _dynamic(options: dict[str, Any], config: Any) -> DynamicNTKScaling:
    # transformers takes the model's own limit here, whatever original context the options name.
    return DynamicNTKScaling(options["factor"], config.max_position_embeddings)


def _yarn(options: dict[str, Any], config: Any) -> YarnScaling:
    attention_factor = options.get("attention_factor")
    # The mscales count in pairs, where neither is 0 and no attention_factor is given.
    mscale, mscale_all_dim = options.get("mscale"), options.get("mscale_all_dim")
    if attention_factor is not None or not (mscale and mscale_all_dim):
        mscale = mscale_all_dim = None
    return YarnScaling(
        _factor(options, config),
        _original_context(options, config),
        beta_fast=options.get("beta_fast") or 32.0,
        beta_slow=options.get("beta_slow") or 1.0,
        attention_factor=attention_factor,
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
        truncate=options.get("truncate", True),
    )


def _longrope(options: dict[str, Any], config: Any) -> LongRopeScaling:
    return LongRopeScaling(
        _factor(options, config),
        _original_context(options, config),
        short_factor=options["short_factor"],
        long_factor=options["long_factor"],
        attention_factor=options.get("attention_factor"),
    )


def _llama3(options: dict[str, Any], config: Any) -> Llama3Scaling:
    return Llama3Scaling(
        options["factor"],
        options["low_freq_factor"],
        options["high_freq_factor"],
        _original_context(options, config),
    )


_SCALINGS: dict[str, Callable[[dict[str, Any], Any], RopeScaling | None]] = {
    "default": lambda options, config: None,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}


def _original_context(options: dict[str, Any], config: Any) -> int:
    context: int = options.get("original_max_position_embeddings", config.max_position_embeddings)
    return context


def _factor(options: dict[str, Any], config: Any) -> float:
    factor: float | None = options.get("factor")
    if factor is None:
        return float(config.max_position_embeddings / _original_context(options, config))
    return factor
