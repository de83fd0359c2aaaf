"""One head of attention: the lecture's `CausalAttention`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

import polyhead.mask
from polyhead.backends import BackendChoice
from polyhead.call import Aux, AuxRequest
from polyhead.functional import attention
from polyhead.mask import Mask
from polyhead.modules.checkpoint import accept_lecture_mask
from polyhead.modules.linear import onednn_linear
from polyhead.modules.validate import (
    check_dropout,
    check_input,
    check_mask,
    check_rope,
    check_sizes,
    combine_masks,
)
from polyhead.positions import Rope, apply_rope
from polyhead.type_hints import signature_of
from polyhead.validate import check_request, check_scale

__all__ = ["CausalAttention"]


class CausalAttention(nn.Module):
    """One causal head: softmax(x W_q (x W_k)^T / sqrt(d_out)) x W_v, with position i seeing <= i.

    The signature, attribute names and initialisation order are those of the lecture (section
    3.5), so that the same seed gives the same digits and checkpoints load both ways.

    Args:
        d_in: features of the input.
        d_out: features of the output: the size of this head.
        context_length: the most tokens it accepts. It costs no memory.
        dropout: probability with which an attention weight is dropped in training, in [0, 1).
        qkv_bias: whether the three projections have a bias.
        rope: rotary positions for queries and keys, or None.
        mask: who may attend to whom; None: everybody.
        scale: factor on the scores; None: 1 / sqrt(d_out).
        backend: as in `polyhead.attention`.
        device, dtype: of the parameters.

    Shapes:
        x (B, T, d_in) -> (B, T, d_out)

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: an argument breaks a rule.

    >>> head = CausalAttention(d_in=3, d_out=2, context_length=6, dropout=0.0)
    >>> head(torch.ones(1, 6, 3)).shape
    torch.Size([1, 6, 2])
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        context_length: int,
        dropout: float,
        qkv_bias: bool = False,
        *,
        rope: Rope | None = None,
        mask: Mask | None = polyhead.mask.causal(),
        scale: float | None = None,
        backend: BackendChoice = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(d_in=d_in, d_out=d_out, context_length=context_length)
        check_dropout(dropout)
        check_rope(rope, d_out)
        check_mask(mask)
        check_scale(scale)
        self.d_in = d_in
        self.d_out = d_out
        self.context_length = context_length
        self.rope = rope
        self.mask = mask
        self.scale = scale
        self.backend = backend
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias, device=device, dtype=dtype)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias, device=device, dtype=dtype)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.register_load_state_dict_pre_hook(accept_lecture_mask)  # type: ignore[no-untyped-call]

    @overload
    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Mask | None = None,
        positions: Tensor | None = None,
        return_aux: None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Mask | None = None,
        positions: Tensor | None = None,
        *,
        return_aux: AuxRequest,
    ) -> tuple[Tensor, Aux]: ...

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Mask | None = None,
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
            (B, T, d_out), or (output, Aux) if `return_aux` is given; Aux has one head.
        """
        output, aux = attention(
            *self.project_qkv(x, memory, positions=positions),
            mask=combine_masks(self.mask, mask),
            scale=self.scale,
            dropout=self.dropout.p if self.training else 0.0,
            backend=self.backend,
            return_aux=check_request(return_aux),
        )
        y = output.squeeze(1)
        return y if return_aux is None else (y, aux)

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def project_qkv(
        self, x: Tensor, memory: Tensor | None = None, *, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, 1, T, d_out), key and value (B, 1, S, d_out), rotated by rope if there is one.

        Args:
            x, memory, positions: as in `forward`.
        """
        check_input("x", x, self.W_query, self.d_in, self.context_length)
        if memory is not None:
            check_input("memory", memory, self.W_query, self.d_in)
        source = x if memory is None else memory
        with onednn_linear(x, self):
            query, key, value = self.W_query(x), self.W_key(source), self.W_value(source)
        query_bhtd, key_bgsd, value_bgse = query[:, None], key[:, None], value[:, None]
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
        """The context vectors, (B, 1, T, d_out): the output, as that of one head among several."""
        return self(x, memory, mask, positions=positions)[:, None]

    def extra_repr(self) -> str:
        return f"context_length={self.context_length}, mask={self.mask!r}, rope={self.rope}"
