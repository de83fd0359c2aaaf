"""Right attention in steps. Each broken twin replaces one step."""

import math

import torch
from torch import nn


class Plain(nn.Module):
    """Causal multi-head attention as in courses. (B, T, d_model) -> (B, T, d_model)."""

    def __init__(self, d_model=20, n_heads=4, n_kv_heads=4, context_length=16, dropout=0.0):
        super().__init__()
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        self.context_length = context_length
        self.head_dim = d_model // n_heads
        self.W_query = nn.Linear(d_model, d_model)
        self.W_key = nn.Linear(d_model, n_kv_heads * self.head_dim)
        self.W_value = nn.Linear(d_model, n_kv_heads * self.head_dim)
        self.out_proj = nn.Linear(d_model, d_model)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        weights, v = self.attend(x)
        return self.out_proj(self.merge(weights @ v))

    def attend(self, x):
        q = self.split(self.W_query(x))
        k, v = self.split(self.W_key(x)), self.split(self.W_value(x))
        scores = self.scores(q, self.share(k))
        return self.drop(self.weights(scores)), self.share(v)

    def split(self, projected):
        B, T, features = projected.shape
        return projected.view(B, T, features // self.head_dim, self.head_dim).transpose(1, 2)

    def share(self, heads):
        return heads.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)

    def scores(self, q, k):
        return q @ k.mT / math.sqrt(self.head_dim)

    def hidden(self, T):
        """(T, T) True where a query may not attend."""
        return torch.ones(T, T, dtype=torch.bool).triu(1)

    def weights(self, scores):
        return scores.masked_fill(self.hidden(scores.shape[-1]), -math.inf).softmax(dim=-1)

    def merge(self, contexts):
        return contexts.transpose(1, 2).flatten(2)
