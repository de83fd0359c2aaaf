"""`nn.MultiheadAttention`, its arguments and its state, over `polyhead.attention`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.call import AuxRequest
from polyhead.drop_in.nested import attend_nested, is_nested
from polyhead.drop_in.validate import check_embed_dim, check_inputs, lower_masks
from polyhead.functional import attention
from polyhead.modules.linear import onednn_linear
from polyhead.modules.validate import check_dropout
from polyhead.type_hints import MaybeNone, signature_of

__all__ = ["MultiheadAttention", "keep_from_fast_path"]


class MultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with the same constructor, parameters, call and result.

        q, k, v = split(query W_q), split(key W_k), split(value W_v)
        y = merge(softmax(q k^T / sqrt(head_dim) + masks) v) W_out + b_out

    It is one, so that `nn.TransformerEncoderLayer` and all that looks for one take it; its
    parameters have the same names, order and first values. docs/drop-in.md lists where it
    differs on purpose: a query with nothing to attend to gives out_proj's bias and not NaN,
    `is_causal` is the causal rule whether or not an `attn_mask` comes with it, and weights are
    those before dropout.

    Args:
        embed_dim: features of the queries and of the output, split among the heads.
        num_heads: how many heads.
        dropout: probability with which an attention weight is dropped in training, in [0, 1).
        bias: whether the projections have biases.
        add_bias_kv: whether a learnt key and value stand beside the given ones.
        add_zero_attn: whether a key and value of zeros stand beside the given ones.
        kdim, vdim: features of the keys and of the values; None: embed_dim.
        batch_first: whether inputs are (B, T, features), and not (T, B, features).
        device, dtype: of the parameters.

    Shapes:
        query (B, T, embed_dim), key (B, S, kdim), value (B, S, vdim) -> (B, T, embed_dim) and
        weights (B, T, S); with the first two dimensions of inputs and output changed about unless
        `batch_first`, and none of B where the inputs have two dimensions.

    Raises:
        ShapeError, DtypeError, ArgumentError: an argument breaks a rule.

    Source: `torch.nn.MultiheadAttention`; Vaswani et al. 2017, section 3.2.2.

    >>> attend = MultiheadAttention(8, num_heads=2, batch_first=True).eval()
    >>> x = torch.ones(3, 5, 8)
    >>> y, weights = attend(x, x, x, is_causal=True)
    >>> y.shape, weights.shape, weights[0, 1].tolist()
    (torch.Size([3, 5, 8]), torch.Size([3, 5, 5]), [0.5, 0.5, 0.0, 0.0, 0.0])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_embed_dim(embed_dim, num_heads)
        check_dropout(dropout)
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        keep_from_fast_path(self)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | MaybeNone]:
        """Attend. **True in a mask means "forbidden"** here, as in `nn.MultiheadAttention`.

        Args:
            query, key, value: as in the class; or nested tensors, each batch row of its own
                length, with need_weights=False and no mask but is_causal.
            key_padding_mask: (B, S), for unbatched inputs (S,): bool, True = ignore this key; or
                numbers added to the scores.
            need_weights: whether to return weights. It never changes the output.
            attn_mask: (T, S) or (B * num_heads, T, S): bool, True = forbidden; or numbers added
                to the scores. Both masks hold together, of one kind or not.
            average_attn_weights: weights as the mean over heads, (B, T, S), or else
                (B, num_heads, T, S).
            is_causal: query t may attend to keys 0 .. t only, beside what the masks forbid.

        Returns:
            The output, and the weights before dropout, or None.
        """
        if is_nested(query, key, value):
            has_mask = attn_mask is not None or key_padding_mask is not None
            options = {"has_mask": has_mask, "need_weights": need_weights, "is_causal": is_causal}
            return attend_nested(self, query, key, value, **options), None
        # torch.onnx's traced export makes tensors of them.
        need_weights, average_attn_weights = bool(need_weights), bool(average_attn_weights)
        check_inputs(self, query, key, value)
        batch_dim = 0 if self.batch_first else 1
        is_batched = query.ndim == 3
        with onednn_linear(query, self):
            heads = self._project(query, key, value)
        if not is_batched:
            heads = tuple(x.unsqueeze(batch_dim) for x in heads)
        query_bhtd, key_bhsd, value_bhsd = (self._split(x) for x in heads)
        extra = int(self.bias_k is not None) + int(self.add_zero_attn)
        mask, bias = lower_masks(
            attn_mask, key_padding_mask, is_causal, query_bhtd, key_bhsd, extra, is_batched
        )
        if extra:
            key_bhsd = self._behind_extra(self.bias_k, key_bhsd)
            value_bhsd = self._behind_extra(self.bias_v, value_bhsd)
        contexts_bhtd, aux = attention(
            query_bhtd,
            key_bhsd,
            value_bhsd,
            mask=mask,
            bias=bias,
            dropout=self.dropout if self.training else 0.0,
            return_aux=AuxRequest(
                weights=need_weights and not average_attn_weights,
                mean_weights=need_weights and average_attn_weights,
            ),
        )
        y = self._merge(contexts_bhtd)
        with onednn_linear(y, self):
            y = self.out_proj(y)
        weights = aux.mean_weights if average_attn_weights else aux.weights
        if weights is not None and extra:
            weights = weights.roll(-extra, dims=-1)  # where torch has the extra keys: at the end
        if is_batched:
            return y, weights
        return y.squeeze(batch_dim), None if weights is None else weights.squeeze(0)

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of all heads side by side, in the layout of the inputs."""
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(map(F.linear, (query, key, value), weights, biases))

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, embed_dim), or (T, B, embed_dim), as (B, H, T, D); a view."""
        heads: Tensor = x.unflatten(-1, (self.num_heads, self.head_dim))
        return heads.transpose(1, 2) if self.batch_first else heads.permute(1, 2, 0, 3)

    def _merge(self, contexts_bhtd: Tensor) -> Tensor:
        """(B, H, T, D) as (B, T, embed_dim), or (T, B, embed_dim)."""
        if self.batch_first:
            return contexts_bhtd.transpose(1, 2).flatten(2)
        return contexts_bhtd.permute(2, 0, 1, 3).flatten(2)

    def _behind_extra(self, learnt: Tensor | None, heads_bhsd: Tensor) -> Tensor:
        """Keys or values behind the extra ones: in front, a causal rule leaves these to all."""
        B, H, _, D = heads_bhsd.shape
        tokens = [heads_bhsd]
        if self.add_zero_attn:
            tokens.insert(0, heads_bhsd.new_zeros(B, H, 1, D))
        if learnt is not None:
            tokens.insert(0, learnt.to(heads_bhsd.dtype).view(1, H, 1, D).expand(B, H, 1, D))
        return torch.cat(tokens, dim=2)


def keep_from_fast_path(module: nn.MultiheadAttention) -> None:
    """Let an `nn.TransformerEncoderLayer` call this module.

    In inference the layer passes its attention by and gives its weights to a kernel of torch's
    own, unless some module in it has a hook: this one, which does nothing.
    """
    module.register_forward_pre_hook(_is_called)


def _is_called(module: nn.Module, arguments: tuple[Any, ...]) -> None:
    """See `keep_from_fast_path`."""
