"""Right attentions in common styles. `flags` are arguments of the check."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


class CourseHead(nn.Module):
    """One causal head with a saved mask, as in courses."""

    def __init__(self, d_in=10, d_out=6, context_length=16, dropout=0.1):
        super().__init__()
        self.W_query = nn.Linear(d_in, d_out, bias=False)
        self.W_key = nn.Linear(d_in, d_out, bias=False)
        self.W_value = nn.Linear(d_in, d_out, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mask", torch.triu(torch.ones(context_length, context_length), 1))

    def forward(self, x):
        n = x.shape[1]
        keys, queries, values = self.W_key(x), self.W_query(x), self.W_value(x)
        scores = queries @ keys.transpose(1, 2)
        scores.masked_fill_(self.mask.bool()[:n, :n], -torch.inf)
        return self.dropout(torch.softmax(scores / keys.shape[-1] ** 0.5, dim=-1)) @ values


class CourseStacked(nn.Module):
    """Stacked heads, concatenated, with an output projection."""

    def __init__(self, d_in=10, d_out=6, num_heads=3):
        super().__init__()
        self.heads = nn.ModuleList(CourseHead(d_in, d_out) for _ in range(num_heads))
        self.out_proj = nn.Linear(d_out * num_heads, 12)

    def forward(self, x):
        return self.out_proj(torch.cat([head(x) for head in self.heads], dim=-1))


class CourseSplit(nn.Module):
    """One projection, split into heads."""

    def __init__(self, d_in=10, d_out=24, context_length=16, dropout=0.1, num_heads=4):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, d_out // num_heads
        self.W_query, self.W_key, self.W_value = (nn.Linear(d_in, d_out) for _ in range(3))
        self.out_proj = nn.Linear(d_out, d_out)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mask", torch.triu(torch.ones(context_length, context_length), 1))

    def forward(self, x):
        b, n, _ = x.shape
        split = (b, n, self.num_heads, self.head_dim)
        keys = self.W_key(x).view(split).transpose(1, 2)
        queries = self.W_query(x).view(split).transpose(1, 2)
        values = self.W_value(x).view(split).transpose(1, 2)
        scores = queries @ keys.transpose(2, 3)
        scores.masked_fill_(self.mask.bool()[:n, :n], -torch.inf)
        weights = self.dropout(torch.softmax(scores / self.head_dim**0.5, dim=-1))
        return self.out_proj((weights @ values).transpose(1, 2).contiguous().view(b, n, -1))


class GPTFused(nn.Module):
    """As a small GPT: one fused layer, a configuration object, dropout after it too."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.n_embd, self.dropout = config.n_head, config.n_embd, config.dropout

    def forward(self, x):
        B, T, width = x.size()
        q, k, v = (
            t.view(B, T, self.n_head, width // self.n_head).transpose(1, 2)
            for t in self.c_attn(x).split(self.n_embd, dim=2)
        )
        p = self.dropout if self.training else 0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(B, T, width)))


class Einsum(nn.Module):
    """Weights without layers, one einsum per step; queries are scaled first."""

    def __init__(self, dim=15, heads=3, dim_head=4):
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        self.qkv = nn.Parameter(torch.randn(3, heads, dim, dim_head) * dim**-0.5)
        self.out = nn.Parameter(torch.randn(heads, dim_head, dim) * dim**-0.5)

    def forward(self, x):
        q, k, v = torch.einsum("btc,nhcd->nbhtd", x, self.qkv)
        scores = torch.einsum("bhtd,bhsd->bhts", q * self.scale, k)
        future = torch.triu(torch.full_like(scores[0, 0], -math.inf), diagonal=1)
        weights = (scores + future).softmax(-1)
        return torch.einsum("bhts,bhsd,hdc->btc", weights, v, self.out)


class HeadsFirst(nn.Module):
    """Rows of the fused layer head by head, as in GPT-NeoX and BLOOM."""

    def __init__(self, hidden_size=20, num_heads=4):
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states):
        B, T, width = hidden_states.shape
        fused = self.query_key_value(hidden_states).view(B, T, self.num_heads, -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(*fused.chunk(3, dim=-1), is_causal=True)
        return self.dense(y.transpose(1, 2).reshape(B, T, width))


class FeaturesFirst(nn.Module):
    """Heads interleaved in each layer's rows: unusual, and right."""

    def __init__(self, dim=20, heads=4):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(0.1))

    def forward(self, x):
        B, T, width = x.shape
        q, k, v = (
            to(x).view(B, T, width // self.heads, self.heads).permute(0, 3, 1, 2)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(y.permute(0, 2, 3, 1).reshape(B, T, width))


class Grouped(nn.Module):
    """Shared KV heads and complex rotary positions, as in Llama's own code."""

    def __init__(self, dim=24, n_heads=6, n_kv_heads=2):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, dim // n_heads
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        angles = 10000.0 ** -(torch.arange(0, self.head_dim, 2) / self.head_dim)
        turns = torch.outer(torch.arange(64), angles)
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(turns), turns), False)

    def rotate(self, heads):
        wide = heads.float() if heads.dtype != torch.float64 else heads
        pairs = torch.view_as_complex(wide.reshape(*heads.shape[:-1], -1, 2))
        turned = pairs * self.freqs_cis[: heads.shape[1], None]
        return torch.view_as_real(turned).flatten(3).to(heads.dtype)

    def forward(self, x):
        B, T, _ = x.shape
        q = self.rotate(self.wq(x).view(B, T, self.n_heads, self.head_dim))
        k = self.rotate(self.wk(x).view(B, T, self.n_kv_heads, self.head_dim))
        v = self.wv(x).view(B, T, self.n_kv_heads, self.head_dim)
        k, v = (t.repeat_interleave(self.n_heads // self.n_kv_heads, dim=2) for t in (k, v))
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / math.sqrt(self.head_dim)
        scores = scores + torch.full((T, T), float("-inf")).triu(1).to(scores)
        return self.wo((scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).reshape(B, T, -1))


class Flex(nn.Module):
    """flex_attention with a causal window of 4."""

    flags = {"window": 4}  # noqa: RUF012

    def __init__(self, d_model=32, n_heads=2):
        super().__init__()
        self.n_heads = n_heads
        self.qkv_proj = nn.Linear(d_model, 3 * d_model)
        self.o_proj = nn.Linear(d_model, d_model)

    def forward(self, x):
        B, T, width = x.shape
        q, k, v = self.qkv_proj(x).view(B, T, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        mask = create_block_mask(
            lambda b, h, i, j: (j <= i) & (i - j < 4), None, None, T, T, device=x.device
        )
        y = flex_attention(q, k, v, block_mask=mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, width))


class Encoder(nn.Module):
    """Bidirectional; attention_mask is 1 for real tokens; returns its weights on request."""

    def __init__(self, hidden_size=18, num_attention_heads=3):
        super().__init__()
        self.num_heads = num_attention_heads
        self.query, self.key, self.value = (nn.Linear(hidden_size, hidden_size) for _ in range(3))
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states, attention_mask=None, output_attentions=False):
        split = (*hidden_states.shape[:2], self.num_heads, -1)
        q, k, v = (
            layer(hidden_states).view(split).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if attention_mask is not None:
            lowest = torch.finfo(scores.dtype).min
            scores = scores.masked_fill(attention_mask[:, None, None, :] == 0, lowest)
        weights = scores.softmax(-1)
        y = self.output((weights @ v).transpose(1, 2).flatten(2))
        return (y, weights) if output_attentions else (y,)


class Annotated(nn.Module):
    """Query, key and value are three inputs; the mask, 1 = may attend, is passed in."""

    flags = {"causal": True}  # noqa: RUF012

    def __init__(self, h=4, d_model=20):
        super().__init__()
        self.h, self.d_k = h, d_model // h
        self.linears = nn.ModuleList(nn.Linear(d_model, d_model) for _ in range(4))

    def forward(self, query, key, value, mask=None):
        B = query.size(0)
        query, key, value = (
            layer(x).view(B, -1, self.h, self.d_k).transpose(1, 2)
            for layer, x in zip(self.linears, (query, key, value), strict=False)
        )
        scores = query @ key.transpose(-2, -1) / math.sqrt(self.d_k)
        if mask is not None:
            scores = scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min)
        y = scores.softmax(dim=-1) @ value
        return self.linears[-1](y.transpose(1, 2).contiguous().view(B, -1, self.h * self.d_k))


class StatefulCache(nn.Module):
    """Keeps its own cache, as small teaching models do."""

    def __init__(self, d_in=20, num_heads=4):
        super().__init__()
        self.num_heads = num_heads
        self.W_query, self.W_key, self.W_value = (nn.Linear(d_in, d_in) for _ in range(3))
        self.out_proj = nn.Linear(d_in, d_in)
        self.reset_cache()

    def reset_cache(self):
        self.cached = None

    def forward(self, x, use_cache=False):
        B, T, _ = x.shape
        q, k, v = (
            W(x).view(B, T, self.num_heads, -1).transpose(1, 2)
            for W in (self.W_query, self.W_key, self.W_value)
        )
        if use_cache:
            if self.cached is not None:
                k = torch.cat([self.cached[0], k], dim=2)
                v = torch.cat([self.cached[1], v], dim=2)
            self.cached = (k, v)
        S = k.shape[2]
        future = torch.ones(T, S, dtype=torch.bool, device=x.device).triu(1 + S - T)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf)
        return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
