"""Attention as `nn.Module`s: one head, stacked heads, split heads, latent heads."""

from polyhead.modules.causal import CausalAttention
from polyhead.modules.latent import MultiHeadLatentAttention
from polyhead.modules.multihead import MultiHeadAttention
from polyhead.modules.stacked import MultiHeadAttentionWrapper

__all__ = [
    "CausalAttention",
    "MultiHeadAttention",
    "MultiHeadAttentionWrapper",
    "MultiHeadLatentAttention",
]
