"""Layout of GPT-OSS: as Llama, with biases and a learned sink per head.

    q_proj (H * D, d_in)    k_proj, v_proj (G * D, d_in)    o_proj (d_in, H * D)    sinks (H,)

Every name but those of the projections is the same in MultiHeadAttention.
"""

from __future__ import annotations

from typing import Any

from polyhead.convert.families import llama
from polyhead.convert.family import Family
from polyhead.convert.layout import Layout, parameter
from polyhead.modules import MultiHeadAttention

__all__ = ["FAMILY"]

LAYOUT = Layout("gpt_oss", llama.PROJECTIONS, parameter("sinks"))


def build(layer: Any) -> MultiHeadAttention:
    """Return a MultiHeadAttention with the layer's options, on the meta device."""
    return llama.build(layer, sinks=True)


FAMILY = Family(names=("gpt_oss",), classes=("GptOssAttention",), build=build, layouts=(LAYOUT,))
