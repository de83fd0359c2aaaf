"""The lecture's second mechanism (3.6.2): one projection for all heads, split into heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

import polyhead.mask
from polyhead.backends import BackendChoice
from polyhead.cache import Cache, KVCache
from polyhead.cache_view import CacheView
from polyhead.call import Aux, AuxRequest
from polyhead.errors import ArgumentError
from polyhead.functional import attention
from polyhead.mask import Mask
from polyhead.modules.caching import fitting_cache
from polyhead.modules.checkpoint import accept_either_projection, accept_lecture_mask
from polyhead.modules.contributions import split_by_head
from polyhead.modules.fusing import fuse, unfuse
from polyhead.modules.linear import onednn_linear
from polyhead.modules.pruning import prune_heads
from polyhead.modules.validate import (
    check_cache,
    check_dropout,
    check_input,
    check_mask,
    check_norm,
    check_position_bias,
    check_rope,
    check_sizes,
    combine_masks,
    head_sizes,
    kv_heads,
    split_heads,
)
from polyhead.positions import Rope, alibi_slopes, apply_rope
from polyhead.type_hints import MaybeNone, signature_of
from polyhead.validate import cached_query_offset, check_request, check_scale, check_softcap

__all__ = ["MultiHeadAttention"]


class MultiHeadAttention(nn.Module):
    """Weight-split heads (lecture section 3.6.2): one projection for all, split into heads.

        q, k, v = split(x W_query), split(x W_key), split(x W_value)    view, then transpose
        y = merge(softmax(q k^T / sqrt(head_dim)) v) W_out + b_out      transpose, contiguous, view

    **`d_out` is the size of all heads together**: each head has d_out / num_heads features. (In
    `MultiHeadAttentionWrapper` it is the size of one.) The signature, attribute names and
    initialisation order are the lecture's; the keywords add what modern decoders use.

    Args:
        d_in: features of the input.
        d_out: features of the output.
        context_length: the most tokens it accepts. It costs no memory.
        dropout: probability with which an attention weight is dropped in training, in [0, 1).
        num_heads: how many query heads, H.
        qkv_bias: whether W_query, W_key and W_value have a bias.
        num_kv_heads: how many key/value heads, G, a divisor of H; None: H. Query head h uses
            key head h // (H / G).
        head_dim: size of a head; None: d_out / num_heads, which must then be an integer.
        value_head_dim: size of a head's values, where it differs; None: head_dim.
        out_proj: whether a linear layer mixes the merged heads.
        out_bias: whether that layer has a bias.
        rope: rotary positions for queries and keys, or None.
        alibi: whether scores fall linearly with the distance, by `polyhead.alibi_slopes`.
        position_bias: a module called with (T, S) for numbers to add to the scores, broadcastable
            to (B, H, T, S), such as `polyhead.positions.RelativeBias` (T5). Or None.
        mask: who may attend to whom; None: everybody (as for cross-attention).
        scale: factor on the scores; None: 1 / sqrt(head_dim).
        softcap: scores become softcap * tanh(scores / softcap). Or None.
        sinks: whether each head learns a logit that takes weight and gives no value (`sinks`, H).
        qk_norm: makes the norm of queries and of keys from head_dim, before rope (`q_norm`,
            `k_norm`): `nn.RMSNorm`, `functools.partial(nn.RMSNorm, eps=1e-6)`. Or None.
        output_gate: whether the merged heads are multiplied by sigmoid(x W_gate).
        backend: as in `polyhead.attention`.
        device, dtype: of the parameters.

    Shapes:
        x (B, T, d_in) -> (B, T, d_out)

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: an argument breaks a rule.

    Source: Vaswani et al. 2017, section 3.2.2; grouped heads: Ainslie et al. 2023; norms of
    queries and keys: Henry et al. 2020; output gate: Qiu et al. 2025.

    >>> split = MultiHeadAttention(d_in=3, d_out=2, context_length=6, dropout=0.0, num_heads=2)
    >>> split(torch.ones(1, 6, 3)).shape                         # 2 heads of 1 feature
    torch.Size([1, 6, 2])
    """

    W_query: nn.Linear
    W_key: nn.Linear
    W_value: nn.Linear
    W_qkv: nn.Linear  # in place of the three once fused
    out_proj: nn.Linear | MaybeNone
    W_gate: nn.Linear | MaybeNone
    sinks: nn.Parameter | MaybeNone
    q_norm: nn.Module | MaybeNone
    k_norm: nn.Module | MaybeNone

    def __init__(
        self,
        d_in: int,
        d_out: int,
        context_length: int,
        dropout: float,
        num_heads: int,
        qkv_bias: bool = False,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        out_proj: bool = True,
        out_bias: bool = True,
        rope: Rope | None = None,
        alibi: bool = False,
        position_bias: nn.Module | None = None,
        mask: Mask | None = polyhead.mask.causal(),
        scale: float | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        qk_norm: Callable[[int], nn.Module] | None = None,
        output_gate: bool = False,
        backend: BackendChoice = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(d_in=d_in, d_out=d_out, context_length=context_length, num_heads=num_heads)
        check_dropout(dropout)
        head_dim, value_head_dim = head_sizes(
            d_out, num_heads, head_dim, value_head_dim, out_proj=out_proj
        )
        num_kv_heads = kv_heads(num_heads, num_kv_heads)
        check_rope(rope, head_dim)
        check_softcap(softcap)
        check_mask(mask)
        check_position_bias(position_bias)
        if qk_norm is not None:
            check_norm("qk_norm", qk_norm)
        check_scale(scale)
        self.d_in = d_in
        self.d_out = d_out
        self.context_length = context_length
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.value_head_dim = value_head_dim
        self.rope = rope
        self.alibi = alibi
        self._alibi_heads = num_heads
        self.mask = mask
        self.scale = scale
        self.softcap = softcap
        self.backend = backend

        def linear(features: int, out: int, bias: bool) -> nn.Linear:
            return nn.Linear(features, out, bias=bias, device=device, dtype=dtype)

        merged = num_heads * value_head_dim
        self.W_query = linear(d_in, num_heads * head_dim, qkv_bias)
        self.W_key = linear(d_in, num_kv_heads * head_dim, qkv_bias)
        self.W_value = linear(d_in, num_kv_heads * value_head_dim, qkv_bias)
        self.out_proj = linear(merged, d_out, out_bias) if out_proj else None
        # After what the lecture has, so that the same seed gives its digits.
        self.W_gate = linear(d_in, merged, qkv_bias) if output_gate else None
        self.sinks = (
            nn.Parameter(torch.zeros(num_heads, device=device, dtype=dtype)) if sinks else None
        )
        self.q_norm = None if qk_norm is None else qk_norm(head_dim).to(device, dtype)
        self.k_norm = None if qk_norm is None else qk_norm(head_dim).to(device, dtype)
        self.position_bias = position_bias
        self.dropout = nn.Dropout(dropout)
        for accept in (accept_lecture_mask, accept_either_projection):
            self.register_load_state_dict_pre_hook(accept)  # type: ignore[no-untyped-call]

    @overload
    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Mask | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        return_aux: None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Mask | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        *,
        return_aux: AuxRequest,
    ) -> tuple[Tensor, Aux]: ...

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Mask | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        return_aux: AuxRequest | None = None,
    ) -> Tensor | tuple[Tensor, Aux]:
        """Attend.

        Args:
            x: (B, T, d_in) what the queries are made of.
            memory: (B, S, d_in) what keys and values are made of; None: x itself.
            mask: who may attend, together with the module's own mask (both must allow). With a
                cache its keys are all tokens so far, cached ones included.
            cache: keys and values of the tokens before x (`make_cache`); those of x are added to
                it. Without gradients only.
            positions: (T,) or (B, T) for rope; None: the queries stand at the end of the keys.
            return_aux: what to return beside the output.

        Returns:
            (B, T, d_out), or (output, Aux) if `return_aux` is given.

        >>> mha = MultiHeadAttention(8, 8, context_length=4, dropout=0.0, num_heads=2).eval()
        >>> x = torch.randn(1, 4, 8)
        >>> with torch.no_grad():
        ...     cache = mha.make_cache(batch=1)
        ...     prompt, token = mha(x[:, :3], cache=cache), mha(x[:, 3:], cache=cache)
        ...     torch.allclose(torch.cat([prompt, token], dim=1), mha(x), atol=1e-6)
        True
        """
        request = check_request(return_aux)
        contexts_bhte, aux = self._attend(x, memory, mask, cache, positions, request)
        y = contexts_bhte.transpose(1, 2).flatten(2)
        if self.out_proj is not None:
            with onednn_linear(y, self):
                y = self.out_proj(y)
        return y if return_aux is None else (y, aux)

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def make_cache(self, batch: int, max_tokens: int | None = None, **options: Any) -> KVCache:
        """An empty `KVCache` that fits this module: its heads, sizes, dtype and device.

        Args:
            batch: rows.
            max_tokens: None: context_length.
            options: more of `KVCache`'s keywords, such as window= or storage_dtype=torch.int8.
        """
        most = self.context_length if max_tokens is None else max_tokens
        sizes = (self.num_kv_heads, self.head_dim, self.value_head_dim)
        return fitting_cache(self, batch, most, *sizes, options)

    def project_qkv(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as `attention` receives them: split, normed, turned by rope.

        Args:
            x, memory, positions: as in `forward`.

        Returns:
            query (B, H, T, head_dim), key (B, G, S, head_dim), value (B, G, S, value_head_dim);
            views where nothing turns or norms them.

        >>> mha = MultiHeadAttention(8, 8, context_length=4, dropout=0.0, num_heads=2)
        >>> query, key, value = mha.project_qkv(torch.randn(1, 4, 8))
        >>> query.shape
        torch.Size([1, 2, 4, 4])
        """
        projection = self.W_qkv if self.fused else self.W_query
        check_input("x", x, projection, self.d_in, self.context_length)
        if memory is not None:
            check_input("memory", memory, projection, self.d_in)
        with onednn_linear(x, self):
            query, key, value = self._project(x, memory)
        query_bhtd = split_heads("W_query", query, self.num_heads, self.head_dim)
        key_bgsd = split_heads("W_key", key, self.num_kv_heads, self.head_dim)
        value_bgse = split_heads("W_value", value, self.num_kv_heads, self.value_head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            query_bhtd, key_bgsd = self.q_norm(query_bhtd), self.k_norm(key_bgsd)
        if self.rope is not None:
            query_bhtd, key_bgsd = apply_rope(self.rope, query_bhtd, key_bgsd, positions, memory)
        return query_bhtd, key_bgsd, value_bgse

    def head_contexts(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Mask | None = None,
        *,
        positions: Tensor | None = None,
    ) -> Tensor:
        """What each head alone computes, (B, H, T, value_head_dim): its context vectors, gated."""
        return self._attend(x, memory, mask, None, positions, AuxRequest())[0]

    def head_contributions(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Mask | None = None,
        *,
        positions: Tensor | None = None,
    ) -> Tensor:
        """What each head adds to the output, (B, H, T, d_out).

        The output is the sum of these over heads, plus out_proj's bias: the heads work
        independently, and only this sum brings them together.

        >>> mha = MultiHeadAttention(8, 8, context_length=4, dropout=0.0, num_heads=2)
        >>> x = torch.randn(1, 4, 8)
        >>> total = mha.head_contributions(x).sum(dim=1) + mha.out_proj.bias
        >>> torch.allclose(total, mha(x), atol=1e-6)
        True
        """
        contexts_bhte = self.head_contexts(x, memory, mask, positions=positions)
        return split_by_head(contexts_bhte, self.out_proj)

    @property
    def fused(self) -> bool:
        """Whether one projection `W_qkv` stands for the three."""
        return hasattr(self, "W_qkv")

    fuse = fuse
    unfuse = unfuse
    prune_heads = prune_heads

    @property
    def qkv_sizes(self) -> list[int]:
        """Features of all queries, keys and values: the rows of W_qkv, in order."""
        return [
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
            self.num_kv_heads * self.value_head_dim,
        ]

    def _attend(
        self,
        x: Tensor,
        memory: Tensor | None,
        mask: Mask | None,
        cache: Cache | None,
        positions: Tensor | None,
        request: AuxRequest,
    ) -> tuple[Tensor, Aux]:
        """Context vectors (B, H, T, value_head_dim) of every head, gated, and the aux."""
        rule = combine_masks(self.mask, mask)
        if cache is not None:
            check_cache(cache, rule, x, memory, self.num_heads, self.context_length)
            if positions is None and self.rope is not None:
                positions = cache.next_positions(x.shape[1])
        key: Tensor | CacheView
        value: Tensor | CacheView
        query, *new = self.project_qkv(x, memory, positions=positions)
        key, value = new if cache is None else cache.append_as_views(*new)
        if cache is not None:
            rule = None if rule is None else rule.for_keys(cache.start, cache.length)
        T, S = query.shape[2], key.shape[2]
        offset = () if (first := cached_query_offset(key, T)) is None else (first,)
        contexts_bhte, aux = attention(
            query,
            key,
            value,
            mask=rule,
            scale=self.scale,
            bias=None if self.position_bias is None else self.position_bias(T, S, *offset),
            softcap=self.softcap,
            sinks=self.sinks,
            alibi_slopes=self._slopes(x.device) if self.alibi else None,
            dropout=self.dropout.p if self.training else 0.0,
            backend=self.backend,
            return_aux=request,
        )
        if self.W_gate is not None:
            with onednn_linear(x, self):
                gate = torch.sigmoid(self.W_gate(x)).unflatten(2, (self.num_heads, -1))
            contexts_bhte = contexts_bhte * gate.transpose(1, 2)
        return contexts_bhte, aux

    def _slopes(self, device: torch.device) -> Tensor:
        if self.num_heads != self._alibi_heads:
            raise ArgumentError(
                "num_heads",
                f"must stay {self._alibi_heads}, as built, with alibi: slopes follow from it",
                self.num_heads,
                "keep all heads, and switch some off with polyhead.look.ablate",
            )
        return alibi_slopes(self.num_heads, device=device)

    def _project(self, x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if not self.fused:
            source = x if memory is None else memory
            return self.W_query(x), self.W_key(source), self.W_value(source)
        query, key, value = self.W_qkv(x).split(self.qkv_sizes, dim=-1)
        if memory is not None:
            _, key, value = self.W_qkv(memory).split(self.qkv_sizes, dim=-1)
        return query, key, value

    def extra_repr(self) -> str:
        heads = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
        return (
            f"{heads}, head_dim={self.head_dim}, value_head_dim={self.value_head_dim}, "
            f"context_length={self.context_length}, mask={self.mask!r}, rope={self.rope}, "
            f"alibi={self.alibi}, softcap={self.softcap}, sinks={self.sinks is not None}"
        )
