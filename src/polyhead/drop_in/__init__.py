"""In place of others' attention: torch's module and function, and flash-attn."""

from polyhead.drop_in import flash_attn
from polyhead.drop_in.multihead import MultiheadAttention
from polyhead.drop_in.replace import Replacement, replace_attention
from polyhead.drop_in.sdpa_calls import SdpaCalls
from polyhead.drop_in.sdpa_function import (
    SdpaExplanation,
    explain_sdpa,
    scaled_dot_product_attention,
)
from polyhead.drop_in.sdpa_mode import SdpaMode, SdpaUse, sdpa, use_for_sdpa

__all__ = [
    "MultiheadAttention",
    "Replacement",
    "SdpaCalls",
    "SdpaExplanation",
    "SdpaMode",
    "SdpaUse",
    "explain_sdpa",
    "flash_attn",
    "replace_attention",
    "scaled_dot_product_attention",
    "sdpa",
    "use_for_sdpa",
]
