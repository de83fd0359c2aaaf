"""The lecture's classes as it writes them, those of ours under one constructor, latent heads."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import polyhead as ph
from polyhead.modules.latent import MultiHeadLatentAttention


class CausalAttention(nn.Module):
    def __init__(self, d_in, d_out, context_length, dropout, qkv_bias=False):
        super().__init__()
        self.d_out = d_out
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer(
            "mask", torch.triu(torch.ones(context_length, context_length), diagonal=1)
        )

    def forward(self, x):
        num_tokens = x.shape[1]
        keys, queries, values = self.W_key(x), self.W_query(x), self.W_value(x)
        attn_scores = queries @ keys.transpose(1, 2)
        attn_scores.masked_fill_(self.mask.bool()[:num_tokens, :num_tokens], -torch.inf)
        attn_weights = torch.softmax(attn_scores / keys.shape[-1] ** 0.5, dim=-1)
        return self.dropout(attn_weights) @ values


class MultiHeadAttentionWrapper(nn.Module):
    def __init__(self, d_in, d_out, context_length, dropout, num_heads, qkv_bias=False):
        super().__init__()
        self.heads = nn.ModuleList(
            CausalAttention(d_in, d_out, context_length, dropout, qkv_bias)
            for _ in range(num_heads)
        )

    def forward(self, x):
        return torch.cat([head(x) for head in self.heads], dim=-1)


class MultiHeadAttention(nn.Module):
    def __init__(self, d_in, d_out, context_length, dropout, num_heads, qkv_bias=False):
        super().__init__()
        assert d_out % num_heads == 0
        self.d_out = d_out
        self.num_heads = num_heads
        self.head_dim = d_out // num_heads
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer(
            "mask", torch.triu(torch.ones(context_length, context_length), diagonal=1)
        )

    def forward(self, x):
        b, num_tokens, _ = x.shape
        keys, queries, values = self.W_key(x), self.W_query(x), self.W_value(x)
        keys = keys.view(b, num_tokens, self.num_heads, self.head_dim).transpose(1, 2)
        values = values.view(b, num_tokens, self.num_heads, self.head_dim).transpose(1, 2)
        queries = queries.view(b, num_tokens, self.num_heads, self.head_dim).transpose(1, 2)
        attn_scores = queries @ keys.transpose(2, 3)
        attn_scores.masked_fill_(self.mask.bool()[:num_tokens, :num_tokens], -torch.inf)
        attn_weights = torch.softmax(attn_scores / keys.shape[-1] ** 0.5, dim=-1)
        context_vec = (self.dropout(attn_weights) @ values).transpose(1, 2)
        return self.out_proj(context_vec.contiguous().view(b, num_tokens, self.d_out))


class Kind:
    """One of the three modules, ours and the lecture's, built with the same few arguments.

    Of 3 heads (or 1), so that sizes are distinct primes: d_in 5, head size 7 (or as asked).
    """

    def __init__(self, name, theirs, heads):
        self.name, self.theirs, self.heads = name, theirs, heads
        self.ours = getattr(ph, name)

    def arguments(self, head_dim=7, context_length=11, dropout=0.0):
        d_out = head_dim * self.heads if self.name == "MultiHeadAttention" else head_dim
        arguments = {"d_in": 5, "d_out": d_out}
        arguments |= {"context_length": context_length, "dropout": dropout}
        if self.name != "CausalAttention":
            arguments["num_heads"] = self.heads
        return arguments

    def build(self, head_dim=7, context_length=11, dropout=0.0, **options):
        return self.ours(**{**self.arguments(head_dim, context_length, dropout), **options})

    def build_lecture(self, head_dim=7, context_length=11, dropout=0.0, **options):
        return self.theirs(**self.arguments(head_dim, context_length, dropout), **options)


KINDS = [
    Kind("CausalAttention", CausalAttention, 1),
    Kind("MultiHeadAttentionWrapper", MultiHeadAttentionWrapper, 3),
    Kind("MultiHeadAttention", MultiHeadAttention, 3),
]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request):
    return request.param


@pytest.fixture
def lecture():
    return SimpleNamespace(
        CausalAttention=CausalAttention,
        MultiHeadAttentionWrapper=MultiHeadAttentionWrapper,
        MultiHeadAttention=MultiHeadAttention,
    )


@pytest.fixture
def lecture_input():
    """Six tokens of three features, twice in a batch of two."""
    tokens = torch.tensor(
        [
            [0.43, 0.15, 0.89],
            [0.55, 0.87, 0.66],
            [0.57, 0.85, 0.64],
            [0.22, 0.58, 0.33],
            [0.77, 0.25, 0.10],
            [0.05, 0.80, 0.55],
        ]
    )
    return torch.stack([tokens, tokens])


# Of latent heads: how many, the latent's features, a head's that do not turn, that do, its value's.
# Distinct, so that a swapped axis cannot pass.
LATENT_SIZES = H, C, N, R, E = 3, 11, 5, 4, 7


def build_latent(num_heads=H, context_length=17, dropout=0.0, **options):
    sizes = {"kv_rank": C, "nope_head_dim": N, "rope_head_dim": R, "value_head_dim": E}
    arguments = {**sizes, "rope": ph.Rope(interleaved=True), "out_bias": True, **options}
    mla = MultiHeadLatentAttention(19, 23, context_length, dropout, num_heads, **arguments)
    with torch.no_grad():
        for norm in (mla.kv_norm, mla.q_norm):
            if isinstance(norm, nn.RMSNorm) and not norm.weight.is_meta:
                norm.weight.uniform_(0.5, 1.5)  # ones would hide a norm that has lost its weight
    return mla


def build_latent_double(**options):
    mla = build_latent(dtype=torch.float64, **options)
    return mla, torch.randn(2, 9, 19, dtype=torch.float64)


def second_key_or_self(batch, head, query, key):
    return ((key + head) % 2 == 0) | (key == query)


BY_HEAD = ph.mask.custom(second_key_or_self, heads=H)
LATENT_MASKS = {
    "causal": ph.mask.causal(),
    "nobody forbids": None,
    "window": ph.mask.causal() & ph.mask.window(before=2),
    "both ways": ph.mask.window(before=1, after=3),
    "upper left": ph.mask.causal(align="start"),
    "lengths, of a row none": ph.mask.lengths([0, 6]),
    "left padding": ph.mask.causal() & ph.mask.left_padding([0, 3]),
    "prefix": ph.mask.causal() | ph.mask.prefix(4),
    "documents": ph.mask.causal() & ph.mask.documents([0, 0, 0, 1, 1, 2, 2, 2, 2]),
    "not": ph.mask.causal() & ~ph.mask.prefix(2),
    "dense": ph.mask.dense(
        torch.rand(2, H, 9, 9, generator=torch.Generator().manual_seed(0)) > 0.5
    ),
    "custom": ph.mask.causal() & BY_HEAD,
}


@pytest.fixture(scope="session")
def latent():
    """`build(**options)`, a module; `build_double`, it and an x; `sizes`; `by_head`, a mask."""
    return SimpleNamespace(
        build=build_latent, build_double=build_latent_double, sizes=LATENT_SIZES, by_head=BY_HEAD
    )


@pytest.fixture(params=LATENT_MASKS.values(), ids=LATENT_MASKS)
def latent_mask(request):
    """Every kind of mask, for the 9 tokens of `build_double`."""
    return request.param
