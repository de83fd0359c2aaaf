"""The lecture's second mechanism (3.6.2): one projection for all heads, split into heads."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor, nn

import polyhead.mask
from polyhead.backends import BackendChoice
from polyhead.call import Aux, AuxRequest
from polyhead.errors import ArgumentError, ShapeError
from polyhead.functional import attention
from polyhead.mask import Mask
from polyhead.modules.arguments import (
    check_dropout,
    check_input,
    check_mask,
    check_rope,
    check_sizes,
)
from polyhead.modules.causal import both, turn
from polyhead.modules.checkpoint import accept_either_projection, accept_lecture_mask
from polyhead.modules.contributions import split_by_head
from polyhead.positions import Rope

__all__ = ["MultiHeadAttention"]


class MultiHeadAttention(nn.Module):
    """Weight-split heads (lecture section 3.6.2): one projection, split into heads by a view.

        q, k, v = split(x W_query), split(x W_key), split(x W_value)
        y = merge(softmax(q k^T / sqrt(head_dim)) v) W_out + b_out

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
        out_proj: whether a linear layer mixes the merged heads.
        out_bias: whether that layer has a bias.
        rope: rotary positions for queries and keys, or None.
        mask: who may attend to whom; None: everybody (as for cross-attention).
        scale: factor on the scores; None: 1 / sqrt(head_dim).
        backend: as in `polyhead.attention`.
        device, dtype: of the parameters.

    Shapes:
        x (B, T, d_in) -> (B, T, d_out)

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: an argument breaks a rule.

    Source: Vaswani et al. 2017, section 3.2.2; grouped heads: Ainslie et al. 2023.

    >>> split = MultiHeadAttention(d_in=3, d_out=2, context_length=6, dropout=0.0, num_heads=2)
    >>> split(torch.ones(1, 6, 3)).shape                         # 2 heads of 1 feature
    torch.Size([1, 6, 2])
    """

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
        out_proj: bool = True,
        out_bias: bool = True,
        rope: Rope | None = None,
        mask: Mask | None = polyhead.mask.causal(),
        scale: float | None = None,
        backend: BackendChoice = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(d_in=d_in, d_out=d_out, context_length=context_length, num_heads=num_heads)
        check_dropout(dropout)
        head_dim = _head_dim(d_out, num_heads, head_dim, out_proj)
        num_kv_heads = _num_kv_heads(num_heads, num_kv_heads)
        check_rope(rope, head_dim)
        check_mask(mask)
        self.d_in = d_in
        self.d_out = d_out
        self.context_length = context_length
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.rope = rope
        self.mask = mask
        self.scale = scale
        self.backend = backend
        q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        self.W_query = nn.Linear(d_in, q_size, bias=qkv_bias, device=device, dtype=dtype)
        self.W_key = nn.Linear(d_in, kv_size, bias=qkv_bias, device=device, dtype=dtype)
        self.W_value = nn.Linear(d_in, kv_size, bias=qkv_bias, device=device, dtype=dtype)
        self.out_proj = (
            nn.Linear(q_size, d_out, bias=out_bias, device=device, dtype=dtype)
            if out_proj
            else None
        )
        self.dropout = nn.Dropout(dropout)
        for accept in (accept_lecture_mask, accept_either_projection):
            self.register_load_state_dict_pre_hook(accept)  # type: ignore[no-untyped-call]

    @overload
    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Mask | None = None,
        *,
        positions: Tensor | None = None,
        return_aux: None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Mask | None = None,
        *,
        positions: Tensor | None = None,
        return_aux: AuxRequest,
    ) -> tuple[Tensor, Aux]: ...

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Mask | None = None,
        *,
        positions: Tensor | None = None,
        return_aux: AuxRequest | None = None,
    ) -> Tensor | tuple[Tensor, Aux]:
        """Attend.

        Args:
            x: (B, T, d_in) what the queries are made of.
            memory: (B, S, d_in) what keys and values are made of; None: x itself.
            mask: who may attend, together with the module's own mask (both must allow).
            positions: (T,) or (B, T) for rope; None: the queries stand at the end of the keys.
            return_aux: what to return beside the output.

        Returns:
            (B, T, d_out), or (output, Aux) if `return_aux` is given.
        """
        contexts_bhte, aux = self._attend(x, memory, mask, positions, return_aux or AuxRequest())
        y = contexts_bhte.transpose(1, 2).flatten(2)
        if self.out_proj is not None:
            y = self.out_proj(y)
        return y if return_aux is None else (y, aux)

    def project_heads(
        self, x: Tensor, memory: Tensor | None = None, *, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as `attention` receives them: projected, split, turned by rope.

        Returns:
            query (B, H, T, head_dim), key and value (B, G, S, head_dim); views where rope allows.

        >>> mha = MultiHeadAttention(8, 8, context_length=4, dropout=0.0, num_heads=2)
        >>> query, key, value = mha.project_heads(torch.randn(1, 4, 8))
        >>> query.shape
        torch.Size([1, 2, 4, 4])
        """
        weight = self.W_qkv.weight if self.fused else self.W_query.weight
        check_input("x", x, weight, self.d_in, self.context_length)
        if memory is not None:
            check_input("memory", memory, weight, self.d_in)
        query, key, value = self._project(x, memory)
        query_bhtd = query.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
        key_bgsd = key.unflatten(2, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        value_bgsd = value.unflatten(2, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        if self.rope is not None:
            query_bhtd, key_bgsd = turn(self.rope, query_bhtd, key_bgsd, positions, memory)
        return query_bhtd, key_bgsd, value_bgsd

    def head_contexts(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Mask | None = None,
        *,
        positions: Tensor | None = None,
    ) -> Tensor:
        """What each head alone computes, (B, H, T, head_dim): its context vectors."""
        return self._attend(x, memory, mask, positions, AuxRequest())[0]

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

    def fuse(self) -> MultiHeadAttention:
        """Replace W_query, W_key and W_value by one W_qkv: one product instead of three.

        Weights are moved, not changed: `unfuse()` gives the same bits back, and a fused module
        loads an unfused checkpoint (and the reverse). It pays in inference with few tokens (see
        docs/performance.md); keep separate projections for LoRA and tensor parallelism.

        Raises:
            ArgumentError: a projection is no plain nn.Linear (adapters, quantisation), or some
                of their parameters are frozen and others are not.
        """
        if self.fused:
            return self
        parts = [self.W_query, self.W_key, self.W_value]
        if any(type(part) is not nn.Linear for part in parts):
            kinds = ", ".join(type(part).__name__ for part in parts)
            raise ArgumentError(
                "fuse()", "needs plain nn.Linear projections", kinds, "merge adapters first"
            )
        if len({p.requires_grad for part in parts for p in part.parameters()}) > 1:
            raise ArgumentError(
                "fuse()",
                "needs W_query, W_key and W_value all trainable or all frozen",
                "a mixture",
                "set requires_grad alike",
            )
        del self.W_query, self.W_key, self.W_value
        self.W_qkv = _linear_of(
            torch.cat([part.weight for part in parts]),
            None if parts[0].bias is None else torch.cat([part.bias for part in parts]),
            requires_grad=parts[0].weight.requires_grad,
        )
        self._projections_first()
        return self

    def unfuse(self) -> MultiHeadAttention:
        """Undo `fuse()`: W_query, W_key and W_value again, with the same bits."""
        if not self.fused:
            return self
        fused = self.W_qkv
        biases = [None] * 3 if fused.bias is None else fused.bias.split(self._qkv_sizes)
        del self.W_qkv
        self.W_query, self.W_key, self.W_value = (
            _linear_of(weight, bias, requires_grad=fused.weight.requires_grad)
            for weight, bias in zip(fused.weight.split(self._qkv_sizes), biases, strict=True)
        )
        self._projections_first()
        return self

    def _projections_first(self) -> None:
        """Parameters keep their order: an optimizer's saved state knows them by number alone."""
        for name in ("out_proj", "dropout"):
            if name in self._modules:
                self._modules[name] = self._modules.pop(name)

    @property
    def _qkv_sizes(self) -> list[int]:
        kv_size = self.num_kv_heads * self.head_dim
        return [self.num_heads * self.head_dim, kv_size, kv_size]

    def _attend(
        self,
        x: Tensor,
        memory: Tensor | None,
        mask: Mask | None,
        positions: Tensor | None,
        request: AuxRequest,
    ) -> tuple[Tensor, Aux]:
        """Context vectors (B, H, T, head_dim) of every head, and the aux."""
        query, key, value = self.project_heads(x, memory, positions=positions)
        return attention(
            query,
            key,
            value,
            mask=both(self.mask, mask),
            scale=self.scale,
            dropout=self.dropout.p if self.training else 0.0,
            backend=self.backend,
            return_aux=request,
        )

    def _project(self, x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if not self.fused:
            source = x if memory is None else memory
            return self.W_query(x), self.W_key(source), self.W_value(source)
        query, key, value = self.W_qkv(x).split(self._qkv_sizes, dim=-1)
        if memory is not None:
            _, key, value = self.W_qkv(memory).split(self._qkv_sizes, dim=-1)
        return query, key, value

    def extra_repr(self) -> str:
        heads = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
        return (
            f"{heads}, head_dim={self.head_dim}, context_length={self.context_length}, "
            f"mask={self.mask!r}, rope={self.rope}"
        )


def _head_dim(d_out: int, num_heads: int, head_dim: int | None, out_proj: bool) -> int:
    if head_dim is None:
        if d_out % num_heads:
            raise ShapeError(
                "d_out",
                f"must be divisible by num_heads = {num_heads}: it is split into heads",
                d_out,
                "change one of them, or say head_dim",
            )
        return d_out // num_heads
    check_sizes(head_dim=head_dim)
    if not out_proj and num_heads * head_dim != d_out:
        raise ShapeError(
            "d_out",
            f"must be num_heads * head_dim = {num_heads * head_dim} without an output projection",
            d_out,
            "leave out_proj on, or change head_dim",
        )
    return head_dim


def _num_kv_heads(num_heads: int, num_kv_heads: int | None) -> int:
    if num_kv_heads is None:
        return num_heads
    check_sizes(num_kv_heads=num_kv_heads)
    if num_heads % num_kv_heads:
        raise ShapeError(
            "num_kv_heads",
            f"must divide num_heads = {num_heads}",
            num_kv_heads,
            "every key head serves the same number of query heads",
        )
    return num_kv_heads


def _linear_of(weight: Tensor, bias: Tensor | None, *, requires_grad: bool) -> nn.Linear:
    """An nn.Linear that owns a copy of these."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=requires_grad)
    return linear
