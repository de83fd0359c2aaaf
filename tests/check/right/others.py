"""More right attentions, in styles that the laws were not designed for."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from styles import GPTFused
from torch import Tensor, nn


class _Projected(nn.Module):
    """Four layers and a split into heads, shared by subclasses."""

    def __init__(self, dim=24, heads=4):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def merge(self, contexts):
        return self.to_out(contexts.transpose(1, 2).flatten(2))

    def project(self, query, key, value):
        layers = (self.to_q, self.to_k, self.to_v)
        inputs = (query, key, value)
        return (self.split(to(x)) for to, x in zip(layers, inputs, strict=True))


class ValuesFirst(_Projected):
    """forward(values, keys, query, mask): the mask is required, and may be None."""

    def forward(self, values, keys, query, mask):
        q, k, v = self.project(query, keys, values)
        energy = torch.einsum("nhqd,nhkd->nhqk", q, k)
        if mask is not None:
            energy = energy.masked_fill(mask == 0, float("-inf"))
        weights = torch.softmax(energy / q.shape[-1] ** 0.5, dim=3).nan_to_num(0.0)
        return self.merge(torch.einsum("nhql,nhld->nhqd", weights, v))


class MaskMustBeGiven(_Projected):
    """forward(Q, K, V, mask): None is not accepted; it keeps its weights with their graph."""

    flags = {"causal": True}  # noqa: RUF012

    def forward(self, Q, K, V, mask):  # noqa: N803
        q, k, v = self.project(Q, K, V)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        self.kept = scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min).softmax(-1)
        return self.merge(self.kept @ v)


class KerasLike(_Projected):
    """query, value, and an optional key; a causal mask on request."""

    def forward(
        self,
        query,
        value,
        key=None,
        attention_mask=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=False,
    ):
        q, k, v = self.project(query, value if key is None else key, value)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if use_causal_mask:
            causal = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
            attention_mask = causal if attention_mask is None else attention_mask & causal
        if attention_mask is not None:
            shown = attention_mask if attention_mask.ndim == 2 else attention_mask[:, None]
            scores = scores.masked_fill(~shown, torch.finfo(scores.dtype).min)
        training = self.training if training is None else training
        weights = F.dropout(scores.softmax(-1), 0.1, training)
        y = self.merge(weights @ v)
        return (y, weights) if return_attention_scores else y


class KerasLikeCausal(KerasLike):
    flags = {"causal": True}  # noqa: RUF012


class MaskFirst(_Projected):
    """forward(key_padding_mask, x)."""

    def forward(self, key_padding_mask, x):
        q, k, v = self.project(x, x, x)
        shown = None if key_padding_mask is None else ~key_padding_mask[:, None, None, :]
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=shown))


@dataclass
class _Output:
    last_hidden_state: Tensor
    attentions: Tensor | None = None


class ReturnsDataclass(_Projected):
    def forward(self, x, output_attentions=False):
        q, k, v = self.project(x, x, x)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return _Output(self.merge(weights @ v), weights if output_attentions else None)


class RotaryWithCache(nn.Module):
    """Rotary positions, shared KV heads, a tuple as the cache."""

    def __init__(self, dim=24, num_heads=4, num_kv_heads=2):
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.q_proj, self.o_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.k_proj, self.v_proj = (
            nn.Linear(dim, dim * num_kv_heads // num_heads) for _ in range(2)
        )

    def rope(self, heads, first):
        half = heads.shape[-1] // 2
        speeds = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        places = torch.arange(first, first + heads.shape[2], dtype=torch.float64)
        angles = places[:, None] * speeds
        cos, sin = angles.cos().to(heads), angles.sin().to(heads)
        a, b = heads.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def forward(self, x, past_key_value=None, use_cache=False):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.num_heads, -1).transpose(1, 2)
        k, v = (
            layer(x).view(B, T, self.num_kv_heads, -1).transpose(1, 2)
            for layer in (self.k_proj, self.v_proj)
        )
        past = 0 if past_key_value is None else past_key_value[0].shape[2]
        q, k = self.rope(q, past), self.rope(k, past)
        if past_key_value is not None:
            old_k, old_v = past_key_value
            k, v = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)
        mask = torch.ones(T, k.shape[2], dtype=torch.bool, device=x.device).tril(past)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        y = self.o_proj(y.transpose(1, 2).reshape(B, T, -1))
        return y, (k, v) if use_cache else None


class Alibi(_Projected):
    """ALiBi slopes times distances, and the causal mask, in one saved table."""

    def __init__(self, dim=24, heads=4, max_len=32):
        super().__init__(dim, heads)
        slopes = 2.0 ** (-8 * torch.arange(1, heads + 1) / heads)
        places = torch.arange(max_len)
        table = slopes[:, None, None] * (places - places[:, None])
        future = torch.full((max_len, max_len), -math.inf).triu(1)
        self.register_buffer("alibi", table + future, persistent=False)

    def forward(self, x):
        q, k, v = self.project(x, x, x)
        T = x.shape[1]
        scores = q @ k.mT / math.sqrt(q.shape[-1]) + self.alibi[:, :T, :T]
        return self.merge(scores.softmax(-1) @ v)


class RelativeBias(_Projected):
    """As T5: learned distances, no scale, an additive mask."""

    flags = {"scale": 1.0}  # noqa: RUF012

    def __init__(self, dim=24, heads=4):
        super().__init__(dim, heads)
        self.relative_attention_bias = nn.Embedding(16, heads)

    def forward(self, hidden_states, mask=None):
        q, k, v = self.project(hidden_states, hidden_states, hidden_states)
        places = torch.arange(q.shape[2], device=q.device)
        distance = (places - places[:, None]).clamp(-8, 7) + 8
        scores = q @ k.mT + self.relative_attention_bias(distance).permute(2, 0, 1)
        return self.merge((scores if mask is None else scores + mask).softmax(-1) @ v)


class MultiQuery(nn.Module):
    """One KV head for all, in the style of x-transformers; True in the mask means attend."""

    def __init__(self, dim=24, heads=4, dim_head=6, causal=True):
        super().__init__()
        self.heads, self.causal, self.scale = heads, causal, dim_head**-0.5
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x, context=None, mask=None):
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.to_kv(x if context is None else context).chunk(2, dim=-1)
        scores = torch.einsum("bhid,bjd->bhij", q * self.scale, k)
        lowest = -torch.finfo(scores.dtype).max
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], lowest)
        if self.causal:
            i, j = scores.shape[-2:]
            future = torch.ones(i, j, dtype=torch.bool, device=x.device).triu(j - i + 1)
            scores = scores.masked_fill(future, lowest)
        y = torch.einsum("bhij,bjd->bhid", scores.softmax(dim=-1), v)
        return self.to_out(y.transpose(1, 2).flatten(2))


class MemoryAndGates(_Projected):
    """Memory keys, gated heads, dropout: extras of x-transformers."""

    def __init__(self, dim=24, heads=4):
        super().__init__(dim, heads)
        self.memory = nn.Parameter(torch.randn(2, heads, 1, dim // heads))
        self.opens = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        q, k, v = self.project(x, x, x)
        k, v = (
            torch.cat([m.expand(x.shape[0], -1, -1, -1), heads], dim=2)
            for m, heads in zip(self.memory, (k, v), strict=True)
        )
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(2)
        weights = self.dropout(scores.masked_fill(future, -math.inf).softmax(-1))
        return self.to_out((weights @ v).transpose(1, 2).flatten(2) * self.opens(x).sigmoid())


class PreNorm(nn.Module):
    """x + attention(norm(x)), followed by an MLP: a whole block."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.attn = GPTFused(config)
        self.norm = nn.LayerNorm(config.n_embd)
        self.mlp = nn.Sequential(nn.Linear(config.n_embd, 32), nn.GELU(), nn.Dropout(0.1))
        self.back = nn.Linear(32, config.n_embd)

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.back(self.mlp(x))


class PostNorm(PreNorm):
    """norm(x + attention(x)), without weights in the norm."""

    def __init__(self, config):
        super().__init__(config)
        del self.norm

    def forward(self, x):
        return F.layer_norm(x + self.back(self.mlp(self.attn(x))), x.shape[-1:])


class Residual(PreNorm):
    """x + attention(x), sometimes without the attention: stochastic depth."""

    def __init__(self, config):
        super().__init__(config)
        del self.mlp, self.back, self.norm

    def forward(self, x):
        kept = torch.rand(x.shape[0], 1, 1, device=x.device) < 0.8 if self.training else 1.0
        return x + self.attn(x) * kept / (0.8 if self.training else 1.0)


class AddedPositions(nn.Module):
    """Sinusoids, under an uncommon name, added to the tokens."""

    def __init__(self, d_model=24, n_head=4):
        super().__init__()
        places = torch.arange(64)[:, None] / 10000.0 ** (torch.arange(12) / 12)
        self.register_buffer("pe", torch.cat([places.sin(), places.cos()], dim=-1)[None])
        self.attn = nn.MultiheadAttention(d_model, n_head, batch_first=True)

    def forward(self, x):
        x = x + self.pe[:, : x.shape[1]].to(x)
        return self.attn(x, x, x, need_weights=False)[0]


class OneProjectionForAllHeads(nn.Module):
    """Heads are slices of the input, and share three small layers."""

    def __init__(self, embed_size=24, heads=4):
        super().__init__()
        self.heads, self.head_dim = heads, embed_size // heads
        self.queries, self.keys, self.values = (
            nn.Linear(self.head_dim, self.head_dim, bias=False) for _ in range(3)
        )
        self.fc_out = nn.Linear(embed_size, embed_size)

    def forward(self, x):
        heads = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = self.queries(heads), self.keys(heads), self.values(heads)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.fc_out(y.transpose(1, 2).flatten(2))


class Differential(nn.Module):
    """Difference of two softmaxes, and a norm per head."""

    def __init__(self, dim=24, num_heads=2):
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.share = nn.Parameter(torch.tensor(0.5))
        # Without eps the norm uses that of its dtype: another function in float64.
        self.after = nn.RMSNorm(dim // num_heads, eps=1e-5)

    def forward(self, x):
        T = x.shape[1]
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        q, k = (t.unflatten(-1, (2 * self.num_heads, -1)).transpose(1, 2) for t in (q, k))
        v = v.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        future = torch.full((T, T), -math.inf, dtype=x.dtype, device=x.device).triu(1)
        weights = (q @ k.mT / math.sqrt(q.shape[-1]) + future).softmax(-1)
        one, other = weights.unflatten(1, (-1, 2)).unbind(2)
        contexts = self.after((one - self.share * other) @ v)
        return self.to_out(contexts.transpose(1, 2).flatten(2))


class MaskUnsqueezed(_Projected):
    """As in the Annotated Transformer: every mask gets a head axis."""

    def forward(self, query, key, value, mask=None):
        q, k, v = self.project(query, key, value)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(mask.unsqueeze(1) == 0, -1e9)
        contexts = (scores.softmax(-1) @ v).transpose(1, 2).contiguous()
        return self.to_out(contexts.view(query.shape[0], -1, query.shape[-1]))


class MaskAdded(_Projected):
    """As BERT: attention_mask is additive, 0 and -inf."""

    def forward(self, hidden_states, attention_mask=None):
        q, k, v = self.project(*3 * [hidden_states])
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if attention_mask is not None:
            scores = scores + attention_mask
        return self.merge(scores.softmax(-1) @ v)


class OneKeyHeadFused(nn.Module):
    """One KV head for all, in one layer with the queries, without an attribute for it."""

    def __init__(self, dim=24, n_heads=4):
        super().__init__()
        self.n_heads, self.head_dim = n_heads, dim // n_heads
        self.qkv = nn.Linear(dim, dim + 2 * self.head_dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x):
        sizes = (x.shape[-1], self.head_dim, self.head_dim)
        q, k, v = self.qkv(x).split(sizes, dim=-1)
        q = q.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        k, v = (t[:, None].expand_as(q) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Saturated(nn.Module):
    """The course's first class: weights from 0 to 1 give scores so large that one token gets all
    the weight, and the others seem masked."""

    def __init__(self, d_in=48, d_out=48):
        super().__init__()
        sizes = (d_in, d_out)
        self.W_query = nn.Parameter(torch.rand(sizes))
        self.W_key = nn.Parameter(torch.rand(sizes))
        self.W_value = nn.Parameter(torch.rand(sizes))

    def forward(self, x):
        keys, queries = x @ self.W_key, x @ self.W_query
        weights = torch.softmax(queries @ keys.mT / keys.shape[-1] ** 0.5, dim=-1)
        return weights @ (x @ self.W_value)
