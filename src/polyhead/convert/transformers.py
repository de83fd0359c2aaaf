"""From the attention layers of transformers, known by class name: none is imported."""

from __future__ import annotations

from torch import nn

from polyhead.convert import llama
from polyhead.errors import ConversionError
from polyhead.modules import MultiHeadAttention

__all__ = ["from_transformers"]

_LAYOUTS = {
    "LlamaAttention": llama.from_layer,
    "MistralAttention": llama.from_layer,
    "Qwen2Attention": llama.from_layer,
}


def from_transformers(attention_layer: nn.Module) -> MultiHeadAttention:
    """A transformers attention layer as a `MultiHeadAttention` of the same weights.

    Args:
        attention_layer: the attention of one decoder layer, such as
            `model.model.layers[0].self_attn`. It is left as it is; weights are copied.

    Returns:
        The same function of the hidden states that enter the layer, rope included.

    Raises:
        ConversionError: the class, or an option of it, is not known.
    """
    kind = type(attention_layer).__name__
    if kind not in _LAYOUTS:
        raise ConversionError(
            f"attention_layer must be one of {', '.join(_LAYOUTS)}; got {kind}; "
            "pass the attention of one layer, such as model.model.layers[0].self_attn"
        )
    return _LAYOUTS[kind](attention_layer)
