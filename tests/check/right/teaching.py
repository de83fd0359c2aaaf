"""Right attentions in the forms of well-known teaching code."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn


class SmallGPT(nn.Module):
    """nanoGPT without its fused kernel: the mask is a buffer called bias, of four dimensions."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_embd = config.n_head, config.n_embd
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout, self.resid_dropout = (nn.Dropout(config.dropout) for _ in range(2))
        ones = torch.ones(config.block_size, config.block_size)
        self.register_buffer("bias", torch.tril(ones).view(1, 1, *ones.shape))

    def forward(self, x):
        B, T, width = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (
            t.view(B, T, self.n_head, width // self.n_head).transpose(1, 2) for t in (q, k, v)
        )
        att = (q @ k.transpose(-2, -1)) * self.scale(q)
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        return self.resid_dropout(self.c_proj(self.merge(y)))

    def scale(self, q):
        return 1.0 / math.sqrt(q.size(-1))

    def merge(self, y):
        return y.transpose(1, 2).contiguous().view(y.shape[0], y.shape[2], -1)


class SmallestGPT(nn.Module):
    """minGPT's first form: key, query, value in that order, and a larger mask than needed."""

    def __init__(self, n_embd=24, n_head=4, block_size=32, attn_pdrop=0.1):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(n_embd, n_embd) for _ in range(3))
        self.attn_drop, self.proj = nn.Dropout(attn_pdrop), nn.Linear(n_embd, n_embd)
        self.register_buffer("mask", torch.tril(torch.ones(1, 1, block_size, block_size)))
        self.n_head = n_head

    def forward(self, x, layer_past=None):
        B, T, width = x.size()
        k = self.key(x).view(B, T, self.n_head, width // self.n_head).transpose(1, 2)
        q = self.query(x).view(B, T, self.n_head, width // self.n_head).transpose(1, 2)
        v = self.value(x).view(B, T, self.n_head, width // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.mask[:, :, :T, :T] == 0, float("-inf"))
        y = (self.attn_drop(F.softmax(att, dim=-1)) @ v).transpose(1, 2).contiguous()
        return self.proj(y.view(B, T, width))


class LectureHead(nn.Module):
    """A head of the lecture that builds a GPT by hand."""

    def __init__(self, n_embd=24, head_size=6, block_size=16, dropout=0.1):
        super().__init__()
        self.key, self.query, self.value = (
            nn.Linear(n_embd, head_size, bias=False) for _ in range(3)
        )
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        _, T, _ = x.shape
        k, q = self.key(x), self.query(x)
        wei = q @ k.transpose(-2, -1) * self.scale(x, k)
        wei = wei.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return self.dropout(F.softmax(wei, dim=-1)) @ self.value(x)

    def scale(self, x, k):
        return k.shape[-1] ** -0.5


class LectureHeads(nn.Module):
    kind = LectureHead

    def __init__(self, n_embd=24, num_heads=4):
        super().__init__()
        size = n_embd // num_heads
        self.heads = nn.ModuleList(self.kind(n_embd, size) for _ in range(num_heads))
        self.proj, self.dropout = nn.Linear(n_embd, n_embd), nn.Dropout(0.1)

    def forward(self, x):
        return self.dropout(self.proj(torch.cat([h(x) for h in self.heads], dim=-1)))


class AnnotatedHeads(nn.Module):
    """The Annotated Transformer's: cloned layers, one mask for all heads, weights kept."""

    flags = {"causal": True}  # noqa: RUF012

    def __init__(self, h=4, d_model=24, dropout=0.1):
        super().__init__()
        self.d_k, self.h = d_model // h, h
        layer = nn.Linear(d_model, d_model)
        self.linears = nn.ModuleList(copy.deepcopy(layer) for _ in range(4))
        for one in self.linears:
            nn.init.xavier_uniform_(one.weight)
        self.attn, self.dropout = None, nn.Dropout(p=dropout)

    def forward(self, query, key, value, mask=None):
        if mask is not None:
            mask = mask.unsqueeze(1)
        n = query.size(0)
        query, key, value = (
            lin(x).view(n, -1, self.h, self.d_k).transpose(1, 2)
            for lin, x in zip(self.linears, (query, key, value), strict=False)
        )
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(self.d_k)
        if mask is not None:
            scores = self.masked(scores, mask)
        self.attn = self.dropout(scores.softmax(dim=-1))
        x = torch.matmul(self.attn, value).transpose(1, 2).contiguous()
        return self.linears[-1](x.view(n, -1, self.h * self.d_k))

    def masked(self, scores, mask):
        return scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min)


class CombinedQKV(nn.Module):
    """LLMs-from-scratch's variant with one layer, split as (tokens, 3, heads, features)."""

    def __init__(self, d_in=24, d_out=24, num_heads=4, context_length=32, dropout=0.1):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, d_out // num_heads
        self.qkv, self.proj = nn.Linear(d_in, 3 * d_out), nn.Linear(d_out, d_out)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mask", torch.triu(torch.ones(context_length, context_length), 1))

    def forward(self, x):
        b, n, _ = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        queries, keys, values = qkv.unbind(0)
        scores = queries @ keys.transpose(-2, -1)
        scores = scores.masked_fill(self.mask.bool()[:n, :n], -torch.inf)
        weights = self.dropout(torch.softmax(scores / keys.shape[-1] ** 0.5, dim=-1))
        return self.proj((weights @ values).transpose(1, 2).contiguous().view(b, n, -1))


class EinsumWeights(nn.Module):
    """LLMs-from-scratch's variant with bare parameters and einsum, without layers."""

    def __init__(self, d_in=24, d_out=24, num_heads=4):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, d_out // num_heads
        self.W_query, self.W_key, self.W_value = (
            nn.Parameter(torch.randn(d_out, d_in) * d_in**-0.5) for _ in range(3)
        )
        self.out_proj = nn.Linear(d_out, d_out)

    def forward(self, x):
        b, n, _ = x.shape
        projected = [torch.einsum("bnd,od->bno", x, w) for w in self.parameters_of_roles()]
        q, k, v = (t.view(b, n, self.num_heads, self.head_dim).transpose(1, 2) for t in projected)
        scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / self.head_dim**0.5
        future = torch.triu(torch.ones(n, n, dtype=torch.bool), diagonal=1)
        weights = torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1)
        contexts = torch.einsum("bhnm,bhmd->bhnd", weights, v)
        return self.out_proj(contexts.transpose(1, 2).reshape(b, n, -1))

    def parameters_of_roles(self):
        return self.W_query, self.W_key, self.W_value


class FromScratch(nn.Module):
    """former's: heads folded into the batch; the root of the scale on queries and keys."""

    def __init__(self, emb=24, heads=4, mask=True):
        super().__init__()
        self.emb, self.heads, self.mask = emb, heads, mask
        self.tokeys, self.toqueries, self.tovalues = (
            nn.Linear(emb, emb, bias=False) for _ in range(3)
        )
        self.unifyheads = nn.Linear(emb, emb)

    def forward(self, x):
        b, t, e = x.size()
        h, s = self.heads, e // self.heads
        keys, queries, values = (
            layer(x).view(b, t, h, s).transpose(1, 2).contiguous().view(b * h, t, s)
            for layer in (self.tokeys, self.toqueries, self.tovalues)
        )
        root = self.size(e, s) ** (1 / 4)
        dot = torch.bmm(queries / root, (keys / root).transpose(1, 2))
        if self.mask:
            rows, columns = torch.triu_indices(t, t, offset=1)
            dot[..., rows, columns] = float("-inf")
        out = torch.bmm(F.softmax(dot, dim=2), values).view(b, h, t, s)
        return self.unifyheads(out.transpose(1, 2).contiguous().view(b, t, s * h))

    def size(self, e, s):
        return s


class SequenceToSequence(nn.Module):
    """pytorch-seq2seq's: three inputs, a scale that is a tensor on a device, two results."""

    def __init__(self, hid_dim=24, n_heads=4, dropout=0.1):
        super().__init__()
        self.hid_dim, self.n_heads, self.head_dim = hid_dim, n_heads, hid_dim // n_heads
        self.fc_q, self.fc_k, self.fc_v, self.fc_o = (nn.Linear(hid_dim, hid_dim) for _ in "qkvo")
        self.dropout = nn.Dropout(dropout)
        self.root = torch.sqrt(torch.FloatTensor([self.head_dim]))

    def forward(self, query, key, value, mask=None):
        n = query.shape[0]
        q, k, v = self.fc_q(query), self.fc_k(key), self.fc_v(value)
        q, k, v = (
            t.view(n, -1, self.n_heads, self.head_dim).permute(0, 2, 1, 3) for t in (q, k, v)
        )
        energy = torch.matmul(q, k.permute(0, 1, 3, 2)) / self.root.to(q)
        if mask is not None:
            energy = energy.masked_fill(mask == 0, -1e10 if q.dtype != torch.float16 else -6e4)
        attention = torch.softmax(energy, dim=-1)
        x = torch.matmul(self.dropout(attention), v).permute(0, 2, 1, 3).contiguous()
        return self.fc_o(x.view(n, -1, self.hid_dim)), attention


class _ScaledDot(nn.Module):
    def forward(self, q, k, v, mask=None):
        score = (q @ k.transpose(2, 3)) / math.sqrt(k.size(-1))
        if mask is not None:
            score = score.masked_fill(mask == 0, torch.finfo(score.dtype).min)
        score = torch.softmax(score, dim=-1)
        return score @ v, score


class ModulesOfModules(nn.Module):
    """The paper in small modules, one per box of its figure."""

    def __init__(self, d_model=24, n_head=4):
        super().__init__()
        self.n_head, self.attention = n_head, _ScaledDot()
        self.w_q, self.w_k, self.w_v, self.w_concat = (nn.Linear(d_model, d_model) for _ in "qkvc")

    def forward(self, q, k, v, mask=None):
        q, k, v = self.split(self.w_q(q)), self.split(self.w_k(k)), self.split(self.w_v(v))
        out, _ = self.attention(q, k, v, mask=mask)
        return self.w_concat(self.concat(out))

    def split(self, tensor):
        n, length, d_model = tensor.size()
        return tensor.view(n, length, self.n_head, d_model // self.n_head).transpose(1, 2)

    def concat(self, tensor):
        n, head, length, size = tensor.size()
        return tensor.transpose(1, 2).contiguous().view(n, length, head * size)


class WithItsResidual(nn.Module):
    """attention-is-all-you-need-pytorch's: the residual and the norm are inside."""

    def __init__(self, n_head=4, d_model=24, d_k=6, d_v=6, dropout=0.1):
        super().__init__()
        self.n_head, self.d_k, self.d_v = n_head, d_k, d_v
        self.w_qs, self.w_ks = (nn.Linear(d_model, n_head * d_k, bias=False) for _ in range(2))
        self.w_vs = nn.Linear(d_model, n_head * d_v, bias=False)
        self.fc = nn.Linear(n_head * d_v, d_model, bias=False)
        self.dropout, self.layer_norm = nn.Dropout(dropout), nn.LayerNorm(d_model, eps=1e-6)

    def forward(self, q, k, v, mask=None):
        n, residual = q.size(0), q
        q = self.w_qs(q).view(n, -1, self.n_head, self.d_k).transpose(1, 2)
        k = self.w_ks(k).view(n, -1, self.n_head, self.d_k).transpose(1, 2)
        v = self.w_vs(v).view(n, -1, self.n_head, self.d_v).transpose(1, 2)
        attn = torch.matmul(q / self.d_k**0.5, k.transpose(2, 3))
        if mask is not None:
            attn = attn.masked_fill(mask.unsqueeze(1) == 0, torch.finfo(attn.dtype).min)
        attn = self.dropout(F.softmax(attn, dim=-1))
        q = torch.matmul(attn, v)
        q = self.dropout(
            self.fc(q.transpose(1, 2).contiguous().view(n, -1, self.n_head * self.d_v))
        )
        return self.layer_norm(q + residual), attn
