"""Bugs of KV caches, with rotary positions."""

import math

import torch
from plain import Plain


class Cached(Plain):
    """Right: forward(x, cache=None) returns the output and a new cache; keys are rotated."""

    def forward(self, x, cache=None):
        q, k, v = (self.split(W(x)) for W in (self.W_query, self.W_key, self.W_value))
        first = 0 if cache is None else cache[0].shape[2]
        q, k = self.rope(q, self.position(first)), self.rope(k, self.position(first))
        if cache is not None:
            k, v = self.grow(cache, k, v)
        scores = self.scores(q, k).masked_fill(self.behind(q.shape[2], k.shape[2]), -math.inf)
        return self.out_proj(self.merge(scores.softmax(dim=-1) @ v)), (k, v)

    def position(self, first):
        return first

    def grow(self, cache, k, v):
        return torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)

    def behind(self, T, S):
        return torch.ones(T, S, dtype=torch.bool).triu(1 + S - T)

    def rope(self, heads, first):
        half = heads.shape[-1] // 2
        at = torch.arange(first, first + heads.shape[2], dtype=torch.float64)
        angles = at[:, None] * 10.0 ** -torch.arange(half, dtype=torch.float64)
        cos, sin = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
        a, b = heads[..., :half], heads[..., half : 2 * half]
        return torch.cat([a * cos - b * sin, a * sin + b * cos, heads[..., 2 * half :]], dim=-1)


class PositionStartsAgain(Cached):
    law, cause = "cache_token_by_token_agrees", "wrong cache position"

    def position(self, first):
        return 0


class PositionOffByOne(Cached):
    law, cause = "cache_token_by_token_agrees", "wrong cache position"

    def position(self, first):
        return max(first - 1, 0)


class ChunkAtTheUpperLeft(Cached):
    law, cause = "cache_in_chunks_agrees", "upper left"

    def behind(self, T, S):
        return torch.ones(T, S, dtype=torch.bool).triu(1) & (T > 1)


class ChunkWithoutMask(Cached):
    law, cause = "cache_in_chunks_agrees", "has no mask"

    def behind(self, T, S):
        return super().behind(T, S) & (T == S)


class ForgetsTheOldest(Cached):
    law, cause = "cache_token_by_token_agrees", ""

    def grow(self, cache, k, v):
        k, v = super().grow(cache, k, v)
        return k[:, :, -4:], v[:, :, -4:]
