"""Module variants that the lecture's book compares, reimplemented from their description.

All compute the same function, for comparison: causal, without dropout, one output projection.
`qkv()` lists the query, key and value weights, whose rows in order are the rows of a combined
projection: the same weights are loaded into every layout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.bench.cases import Case

__all__ = [
    "Attend",
    "CombinedProjection",
    "EinsumHeads",
    "SplitHeads",
    "StackedHeads",
    "TorchModule",
    "sdpa",
    "sdpa_written_mask",
    "written_out",
]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class CausalHead(nn.Module):
    """One of the stacked heads, (B, T, width) -> (B, T, D)."""

    mask: Tensor

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.W_query = _linear(case.width, case.D)
        self.W_key = _linear(case.width, case.D)
        self.W_value = _linear(case.width, case.D)
        self.register_buffer("mask", _future(case), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weights = _causal_weights(self.W_query(x), self.W_key(x), self.mask)
        context: Tensor = weights @ self.W_value(x)
        return context


class StackedHeads(nn.Module):
    """(1) Separate causal heads, contexts concatenated."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.heads = nn.ModuleList(CausalHead(case) for _ in range(case.H))
        self.out_proj = _linear(case.width, case.width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out_proj(torch.cat([head(x) for head in self.heads], dim=-1))
        return y

    def qkv(self) -> list[Tensor]:
        names = ("W_query", "W_key", "W_value")
        return [getattr(head, name).weight for name in names for head in self.heads]


class SplitHeads(nn.Module):
    """(2) The book's own class: three projections, each split into heads."""

    mask: Tensor

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.num_heads = case.H
        self.W_query = _linear(case.width, case.width)
        self.W_key = _linear(case.width, case.width)
        self.W_value = _linear(case.width, case.width)
        self.out_proj = _linear(case.width, case.width, bias=True)
        self.register_buffer("mask", _future(case), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            linear(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for linear in (self.W_query, self.W_key, self.W_value)
        )
        context_bhtd = _causal_weights(query, key, self.mask) @ value
        y: Tensor = self.out_proj(context_bhtd.transpose(1, 2).flatten(2))
        return y

    def qkv(self) -> list[Tensor]:
        return [self.W_query.weight, self.W_key.weight, self.W_value.weight]


class EinsumHeads(nn.Module):
    """(4) All products as einsums over named dimensions."""

    mask: Tensor

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.num_heads = case.H
        shape = (case.width, case.width)
        self.W_query = nn.Parameter(torch.empty(shape))
        self.W_key = nn.Parameter(torch.empty(shape))
        self.W_value = nn.Parameter(torch.empty(shape))
        self.out_proj = _linear(case.width, case.width, bias=True)
        self.register_buffer("mask", _future(case), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            torch.einsum("btd,od->bto", x, weight).unflatten(2, (self.num_heads, -1))
            for weight in self.qkv()
        )
        scores_bhts = torch.einsum("bthd,bshd->bhts", query, key) * query.shape[-1] ** -0.5
        weights_bhts = torch.softmax(scores_bhts.masked_fill(self.mask, float("-inf")), dim=-1)
        context_bthd = torch.einsum("bhts,bshd->bthd", weights_bhts, value)
        y: Tensor = self.out_proj(context_bthd.flatten(2))
        return y

    def qkv(self) -> list[Tensor]:
        return [self.W_query, self.W_key, self.W_value]


class CombinedProjection(nn.Module):
    """(3, 5, 6, and flex) One projection for queries, keys and values, then `attend`."""

    def __init__(self, case: Case, attend: Attend) -> None:
        super().__init__()
        self.num_heads = case.H
        self.W_qkv = _linear(case.width, 3 * case.width)
        self.out_proj = _linear(case.width, case.width, bias=True)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.W_qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        context_bhtd = self.attend(*qkv.unbind(0))
        y: Tensor = self.out_proj(context_bhtd.transpose(1, 2).flatten(2))
        return y

    def qkv(self) -> list[Tensor]:
        return [self.W_qkv.weight]


class TorchModule(nn.Module):
    """(7, 8) `nn.MultiheadAttention`, with and without the weights that it returns by default."""

    mask: Tensor

    def __init__(self, case: Case, need_weights: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(case.width, case.H, batch_first=True)
        # Its one flag adds a bias to all projections; that of queries, keys and values stays zero.
        nn.init.zeros_(self.inner.in_proj_bias)
        self.need_weights = need_weights
        self.register_buffer("mask", _future(case), persistent=False)

    @property
    def out_proj(self) -> nn.Linear:
        return self.inner.out_proj

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(
            x, x, x, attn_mask=self.mask, need_weights=self.need_weights, is_causal=True
        )[0]
        return y

    def qkv(self) -> list[Tensor]:
        return [self.inner.in_proj_weight]


def written_out(case: Case) -> Attend:
    """(3) Eager attention: scores, mask, softmax, values."""
    mask = _future(case)
    return lambda query, key, value: _causal_weights(query, key, mask) @ value


def sdpa(case: Case) -> Attend:
    """(5) torch's fused kernel with is_causal=True."""
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)


def sdpa_written_mask(case: Case) -> Attend:
    """(6) The same function with a materialized mask, which rules out flash on some devices."""
    allowed = ~_future(case)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


def _linear(features: int, out: int, bias: bool = False) -> nn.Linear:
    """Uninitialized linear layer: every variant's weights are loaded."""
    linear: nn.Linear = nn.utils.skip_init(nn.Linear, features, out, bias=bias)
    return linear


def _future(case: Case) -> Tensor:
    """(T, S) True where a query must not attend."""
    return torch.ones(case.T, case.S, dtype=torch.bool).triu(1)


def _causal_weights(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    scores = (query @ key.mT).masked_fill(mask, float("-inf"))
    return torch.softmax(scores / key.shape[-1] ** 0.5, dim=-1)
