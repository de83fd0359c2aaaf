"""Layout of Qwen 3: as Llama, with a norm per head of queries and keys before rope.

    q_proj (H * D, d_in)    k_proj, v_proj (G * D, d_in)    o_proj (d_in, H * D)
    q_norm, k_norm (D,)     one for all heads

The norms have the same names as in MultiHeadAttention.
"""

from __future__ import annotations

from typing import Any

from polyhead.convert.families import llama
from polyhead.convert.family import Family
from polyhead.convert.layout import Layout, parameter
from polyhead.convert.linear import rms_norm
from polyhead.modules import MultiHeadAttention

__all__ = ["FAMILY", "NORMS"]

NORMS = (*parameter("q_norm.weight"), *parameter("k_norm.weight"))
LAYOUT = Layout("qwen3", llama.PROJECTIONS, NORMS)


def build(layer: Any, **options: Any) -> MultiHeadAttention:
    """Return a MultiHeadAttention with the layer's options, on the meta device."""
    return llama.build(layer, qk_norm=rms_norm(layer.q_norm), **options)


FAMILY = Family(names=("qwen3",), classes=("Qwen3Attention",), build=build, layouts=(LAYOUT,))
