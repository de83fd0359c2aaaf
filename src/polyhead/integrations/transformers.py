"""`attn_implementation="polyhead"` in Hugging Face models."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import polyhead.mask
from polyhead.errors import DependencyError
from polyhead.functional import attention
from polyhead.mask import Mask

__all__ = ["register"]


def register() -> None:
    """Make "polyhead" a name that transformers models accept as `attn_implementation`.

    Registers the attention function and, with it, a mask function: without one a padded batch
    would arrive without its mask.

    Raises:
        DependencyError: transformers is not installed.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise DependencyError(
            'transformers is needed to run inside its models: pip install "polyhead[hf]"'
        ) from error
    AttentionInterface.register("polyhead", attention_forward)
    AttentionMaskInterface.register("polyhead", sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: (B, H, T, D) in, (B, T, H, E) out.

    `attention_mask` is what `sdpa_mask` builds, bool with True = may attend, or numbers to add.
    None means that nothing is padded: plain causal for a causal layer, full for another.
    """
    mask: Mask | None = None
    bias: Tensor | None = None
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        mask = polyhead.mask.causal() if causal else None
    elif attention_mask.is_floating_point():
        bias = attention_mask
    else:
        mask = polyhead.mask.dense(attention_mask)
    output = attention(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        dropout=dropout,
    )
    return output.transpose(1, 2).contiguous(), None
