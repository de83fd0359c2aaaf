"""Options read from a transformers config: rope and its scaling, the context length, the mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import polyhead.mask
from polyhead.errors import ConversionError
from polyhead.mask import Mask
from polyhead.positions import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    RopeScaling,
    YarnScaling,
)

__all__ = ["UNLIMITED", "causal", "context_length", "is_causal", "rope"]

# The context length of a layer whose positions are unbounded: no memory is allocated for it.
UNLIMITED = 2**31 - 1


def causal(sliding_window: int | None = None) -> Mask:
    """Return a causal mask, within a window of `sliding_window` tokens if one is given."""
    mask = polyhead.mask.causal()
    return (
        mask if sliding_window is None else mask & polyhead.mask.window(before=sliding_window - 1)
    )


def is_causal(layer: Any) -> bool:
    """True if a layer of a class that encoders and decoders share is causal.

    Raises:
        ConversionError: it is a decoder's in transformers 4, where self-attention and
            cross-attention look alike.
    """
    flag: bool | None = getattr(layer, "is_causal", None)
    if flag is not None:
        return flag
    if getattr(layer, "is_decoder", False):
        raise ConversionError(
            f"a {type(layer).__name__} of a decoder must have the attribute is_causal; got one of "
            "transformers 4, without it; use transformers 5, or move weights by "
            "convert.state_dict"
        )
    return False


def context_length(config: Any, layer_type: str | None = None) -> int:
    """Return the longest context of the layer.

    Many configs with a scaled rope, all those of type "dynamic", have the unscaled model's limit
    in max_position_embeddings.
    """
    options = _rope_options(config, layer_type)
    longest: int = config.max_position_embeddings
    scaled = (options.get("factor") or 1.0) * _original_context(options, config)
    return max(longest, int(scaled))


def rope(
    config: Any,
    layer_type: str | None = None,
    *,
    partial_of: int | None = None,
    interleaved: bool = False,
) -> Rope:
    """Return the config's `Rope`.

    Args:
        config: of the model.
        layer_type: selects one of several ropes (Gemma 3).
        partial_of: the head size of a layer that rotates `partial_rotary_factor` of it.
        interleaved: as in `Rope`.
    """
    options = _rope_options(config, layer_type)
    kind = options.get("rope_type", options.get("type", "default"))
    if kind not in _SCALINGS:
        known = ", ".join(f'"{name}"' for name in _SCALINGS)
        raise ConversionError(f'rope of type {known} can be converted; got "{kind}"')
    share = options.get("partial_rotary_factor", 1.0)
    return Rope(
        theta=float(options["rope_theta"]),
        interleaved=interleaved,
        rotary_dim=None if partial_of is None else int(partial_of * share),
        scaling=_SCALINGS[kind](options, config),
    )


def _rope_options(config: Any, layer_type: str | None) -> dict[str, Any]:
    options: dict[str, Any] | None = getattr(config, "rope_parameters", None)
    if options:
        return options if layer_type is None else options[layer_type]
    return _rope_options_of_4(config, layer_type)


def _rope_options_of_4(config: Any, layer_type: str | None) -> dict[str, Any]:
    """Return rope's options from the several places of transformers 4's config."""
    share = getattr(config, "partial_rotary_factor", 1.0)
    if layer_type == "sliding_attention" and hasattr(config, "rope_local_base_freq"):
        return {"rope_theta": config.rope_local_base_freq, "partial_rotary_factor": share}
    scaling = dict(getattr(config, "rope_scaling", None) or {})
    if scaling.get("rope_type", scaling.get("type")) == "longrope":
        original = getattr(config, "original_max_position_embeddings", None)
        scaling["original_max_position_embeddings"] = original or config.max_position_embeddings
        if original:
            scaling["factor"] = None  # by the contexts
    return {"rope_theta": config.rope_theta, "partial_rotary_factor": share, **scaling}


def _linear(options: dict[str, Any], config: Any) -> LinearScaling:
    return LinearScaling(options["factor"])


def _dynamic(options: dict[str, Any], config: Any) -> DynamicNTKScaling:
    # transformers uses the model's own limit here, even if the options name an original context.
    return DynamicNTKScaling(options["factor"], config.max_position_embeddings)


def _yarn(options: dict[str, Any], config: Any) -> YarnScaling:
    attention_factor = options.get("attention_factor")
    # The mscales apply as a pair: neither is 0, and no attention_factor is given.
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
