"""Right attentions with operations without weights around them, or undeclared masks."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def distance(T):
    return torch.arange(T)[:, None] - torch.arange(T)


class _Core(nn.Module):
    """One fused layer; subclasses replace the operations before, after and in between."""

    causal = True

    def __init__(self, embed_dim=24, num_heads=4):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.out_proj = nn.Linear(embed_dim, 3 * embed_dim), nn.Linear(embed_dim, 24)
        self.plain = nn.LayerNorm(embed_dim, elementwise_affine=False)

    def forward(self, x):
        B, T, width = x.shape
        fused = self.qkv(self.front(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = fused.permute(2, 0, 3, 1, 4)
        scores = self.between(q) @ self.between(k).mT / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(~self.shown(T), -torch.inf).softmax(-1)
        merged = (weights @ v).transpose(1, 2).reshape(B, T, width)
        return self.behind(self.out_proj(merged), x)

    def front(self, x):
        return x

    def behind(self, y, x):
        return y

    def between(self, heads):
        return heads

    def shown(self, T):
        return distance(T) >= 0


class NormInFront(_Core):
    words = "before its projections"

    def front(self, x):
        return self.plain(x)


class RootMeanSquareInFront(_Core):
    words = "before its projections"

    def front(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class HalfResidual(_Core):
    words = "0.5 times the projection's and 1 times the input"

    def behind(self, y, x):
        return x + 0.5 * y


class Divided(_Core):
    words = "0.7071 times the projection's"

    def behind(self, y, x):
        return y / math.sqrt(2)


class NormAndResidual(NormInFront):
    words = "1 times the projection's and 1 times the input"

    def behind(self, y, x):
        return x + y


class NormBehind(_Core):
    words = "after its output projection"

    def behind(self, y, x):
        return self.plain(x + y)


class Squashed(_Core):
    words = "other operations follow"

    def behind(self, y, x):
        return torch.tanh(y)


class Clipped(_Core):
    words = "something other than its input"

    def front(self, x):
        return x.clamp(-2, 2)


class UnitQueriesAndKeys(_Core):
    def between(self, heads):
        return heads / heads.norm(dim=-1, keepdim=True)


class StandardQueriesAndKeys(_Core):
    def between(self, heads):
        centered = heads - heads.mean(-1, keepdim=True)
        return centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()


class BoundedQueriesAndKeys(_Core):
    def between(self, heads):
        return 3 * torch.tanh(heads / 3)


class FourBack(_Core):
    sees = "5"

    def shown(self, T):
        return (distance(T) >= 0) & (distance(T) <= 4)


class OneBack(_Core):
    sees = "2"

    def shown(self, T):
        return (distance(T) >= 0) & (distance(T) < 2)


class SixteenBack(_Core):
    sees = "17"

    def shown(self, T):
        return (distance(T) >= 0) & (distance(T) <= 16)


class BothSides(_Core):
    causal = False
    sees = "3"

    def shown(self, T):
        return distance(T).abs() <= 2


class MoreBackThanAhead(_Core):
    causal = False
    sees = "3 tokens back and 1 ahead"

    def shown(self, T):
        return (distance(T) <= 3) & (distance(T) >= -1)


class Chunked(_Core):
    sees = "chunks of 4 tokens"

    def shown(self, T):
        chunk = torch.arange(T) // 4
        return (distance(T) >= 0) & (chunk[:, None] == chunk)


class ChunkAndTheOneBefore(_Core):
    sees = "chunks of 3 tokens and the chunk before"

    def shown(self, T):
        chunk = torch.arange(T) // 3
        return (distance(T) >= 0) & (chunk[:, None] - chunk <= 1)


class Dilated(_Core):
    sees = "one token of 2"

    def shown(self, T):
        return (distance(T) >= 0) & (distance(T) % 2 == 0)


class FirstTokenAndWindow(_Core):
    sees = "3 tokens, and the first 1 of the sequence"

    def shown(self, T):
        return (distance(T) >= 0) & ((distance(T) < 3) | (torch.arange(T) < 1))


class GlobalToken(_Core):
    causal = False
    sees = "2 tokens on each side, the first 1 of the sequence, which attend to all"

    def shown(self, T):
        first = torch.arange(T) == 0
        return (distance(T).abs() < 3) | first | first[:, None]


class MaskOfTheDefaultDtype(_Core):
    """torch's fused kernel misreads a float32 mask with float64 queries."""

    def forward(self, x):
        B, T, width = x.shape
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mask = torch.full((T, T), -math.inf).triu(1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q) if self.half(q) else mask)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, width))

    def half(self, q):
        return q.dtype in (torch.float16, torch.bfloat16)


class OnlyFloat32(_Core):
    def front(self, x):
        return x.float()


def turned(heads):
    """Rotary positions by an external function, visible in no name of the module."""
    T, size = heads.shape[-2:]
    angles = torch.outer(torch.arange(T).double(), 10.0 ** -torch.arange(size // 2).double())
    a, b = heads[..., ::2], heads[..., 1::2]
    c, s = angles.cos().to(heads), angles.sin().to(heads)
    return torch.stack([a * c - b * s, a * s + b * c], dim=-1).flatten(-2)


class TurnedElsewhere(_Core):
    def between(self, heads):
        return turned(heads)
