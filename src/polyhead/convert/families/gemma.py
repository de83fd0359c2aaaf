"""Layouts of Gemma 2 and 3: as Llama; Gemma 3 normalizes queries and keys.

    q_proj (H * D, d_in)    k_proj, v_proj (G * D, d_in)    o_proj (d_in, H * D)
    q_norm, k_norm (D,)     Gemma 3; stored as the norm's weight minus 1

Scores are scaled by query_pre_attn_scalar, which need not be the head size. Gemma 2 caps them.
Gemma 3 has two ropes, one for the layers with a sliding window and one for the others.
"""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import polyhead.mask
from polyhead.convert.families import llama, qwen3
from polyhead.convert.family import Family
from polyhead.convert.layout import Layout
from polyhead.errors import ConversionError
from polyhead.mask import Mask
from polyhead.modules import MultiHeadAttention

__all__ = ["FAMILIES", "OffsetRMSNorm"]

GEMMA2 = Layout("gemma2", llama.PROJECTIONS)
GEMMA3 = Layout("gemma3", llama.PROJECTIONS, qwen3.NORMS, offset_norms=True)


class OffsetRMSNorm(nn.RMSNorm):
    """Gemma's norm: x / rms(x) * (1 + weight), the weight being trained around 0.

    >>> import torch
    >>> norm = OffsetRMSNorm(2, eps=0.0)
    >>> norm(torch.tensor([3.0, 3.0]))
    tensor([1., 1.], grad_fn=<MulBackward0>)
    """

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, 1.0 + self.weight, self.eps)


def build_gemma2(layer: Any) -> MultiHeadAttention:
    """Return a MultiHeadAttention with the layer's options, on the meta device."""
    if getattr(layer.config, "use_bidirectional_attention", None):
        raise ConversionError(
            "use_bidirectional_attention must be off; got True, and yet transformers' Gemma 2 "
            "passes the layer a causal mask; set it to None"
        )
    return llama.build(layer, softcap=layer.attn_logit_softcapping)


def build_gemma3(layer: Any) -> MultiHeadAttention:
    """Return a MultiHeadAttention with the layer's options, on the meta device."""
    options = {} if layer.is_causal else {"mask": _both_ways(layer.sliding_window)}
    norm = layer.q_norm
    return llama.build(
        layer,
        layer_type="full_attention" if layer.sliding_window is None else "sliding_attention",
        qk_norm=functools.partial(OffsetRMSNorm, eps=norm.eps),
        **options,
    )


def _both_ways(sliding_window: int | None) -> Mask | None:
    if sliding_window is None:
        return None
    return polyhead.mask.window(before=sliding_window - 1, after=sliding_window - 1)


FAMILIES = (
    Family(names=("gemma2",), classes=("Gemma2Attention",), build=build_gemma2, layouts=(GEMMA2,)),
    Family(
        names=("gemma3",),
        classes=("Gemma3Attention",),
        model_types=("gemma3_text",),
        build=build_gemma3,
        layouts=(GEMMA3,),
    ),
)
