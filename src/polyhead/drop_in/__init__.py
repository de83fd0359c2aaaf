"""In place of others' attention: torch's module and flash-attn, over our masks and kernels."""

from polyhead.drop_in import flash_attn
from polyhead.drop_in.multihead import MultiheadAttention
from polyhead.drop_in.replace import Replacement, replace_attention

__all__ = ["MultiheadAttention", "Replacement", "flash_attn", "replace_attention"]
