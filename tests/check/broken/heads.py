"""Bugs of heads."""

import torch
from plain import Plain
from torch import nn


class MergedWithoutTransposing(Plain):
    law, cause = "heads_are_independent", "heads merged without transposing back"

    def merge(self, contexts):
        B, _, T, _ = contexts.shape
        return contexts.reshape(B, T, -1)


class SplitByView(Plain):
    law, cause = "heads_are_independent", "split"

    def split(self, projected):
        B, T, features = projected.shape
        return projected.view(B, features // self.head_dim, T, self.head_dim)


class EncoderSplitByView(SplitByView):
    law, cause, flags = "permutation_equivariant", "split", {"causal": False}

    def hidden(self, T):
        return torch.zeros(T, T, dtype=torch.bool)


class TiledGroups(Plain):
    law, cause = "kv_heads_are_shared_in_order", "tiled"

    def __init__(self, **sizes):
        super().__init__(n_kv_heads=2, **sizes)

    def share(self, heads):
        return heads.repeat(1, self.n_heads // self.n_kv_heads, 1, 1)


class DeadHead(Plain):
    law, cause = "no_head_is_dead", ""

    def merge(self, contexts):
        contexts = contexts.clone()
        contexts[:, -1] = 0.0
        return super().merge(contexts)


class HeadNotRead(Plain):
    law, cause = "no_head_is_dead", ""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        with torch.no_grad():
            self.out_proj.weight[:, -self.head_dim :] = 0.0


class _OneHead(nn.Module):
    """One head as a module, as in stacked heads."""

    def __init__(self, d_model, size):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(d_model, size) for _ in range(3))

    def forward(self, x):
        T = x.shape[1]
        scores = self.query(x) @ self.key(x).mT / self.key.out_features**0.5
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, float("-inf")).softmax(dim=-1) @ self.value(x)


class Stacked(nn.Module):
    """Right: stacked heads, concatenated."""

    def __init__(self, d_model=20, n_heads=4):
        super().__init__()
        self.heads = nn.ModuleList(self.make_heads(d_model, n_heads))

    def make_heads(self, d_model, n_heads):
        return [_OneHead(d_model, d_model // n_heads) for _ in range(n_heads)]

    def forward(self, x):
        return torch.cat([head(x) for head in self.heads], dim=-1)


class OneHeadManyTimes(Stacked):
    law, cause = "no_two_heads_are_identical", ""

    def make_heads(self, d_model, n_heads):
        return [_OneHead(d_model, d_model // n_heads)] * n_heads


class PlainList(Stacked):
    law, cause, flags = "parameters_are_registered", "", {"d_in": 20}

    def __init__(self, d_model=20, n_heads=4):
        nn.Module.__init__(self)
        self.n_heads = n_heads
        self.heads = self.make_heads(d_model, n_heads)


class TokensFirst(Plain):
    """Takes (tokens, batch, features) in spite of batch_first."""

    law, cause = "batch_rows_are_independent", "does it take (tokens, batch, features)?"
    batch_first = True

    def forward(self, query, key, value):
        return super().forward(query.transpose(0, 1)).transpose(0, 1)
