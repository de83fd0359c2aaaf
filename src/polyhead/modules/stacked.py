"""The lecture's first mechanism (3.6.1): several heads side by side, each a module of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor, nn

import polyhead.mask
from polyhead.backends import BackendChoice
from polyhead.call import Aux, AuxRequest, HeadStats
from polyhead.errors import ShapeError
from polyhead.mask import Mask
from polyhead.modules.causal import CausalAttention
from polyhead.modules.contributions import split_by_head
from polyhead.modules.linear import onednn_linear
from polyhead.modules.validate import check_sizes
from polyhead.positions import Rope
from polyhead.type_hints import MaybeNone, signature_of
from polyhead.validate import check_request

__all__ = ["MultiHeadAttentionWrapper"]

if TYPE_CHECKING:

    class _Heads(nn.ModuleList):
        @overload
        def __getitem__(self, idx: slice) -> nn.ModuleList: ...
        @overload
        def __getitem__(self, idx: int) -> CausalAttention: ...
        def __getitem__(self, idx: int | slice) -> CausalAttention | nn.ModuleList: ...
        def __iter__(self) -> Iterator[CausalAttention]: ...


class MultiHeadAttentionWrapper(nn.Module):
    """Stacked heads (lecture section 3.6.1): independent heads, outputs side by side.

        y = [head_1(x), ..., head_n(x)]          concatenated on the last dimension

    **`d_out` is the size of one head**: the output has num_heads * d_out features. (In
    `MultiHeadAttention` it is the size of all heads together.) Exactly the same function as a
    weight split of the same weights: `polyhead.convert.stacked_to_split`.

    Args:
        d_in: features of the input.
        d_out: features of **each head's** output.
        context_length: the most tokens it accepts. It costs no memory.
        dropout: probability with which an attention weight is dropped in training, in [0, 1).
        num_heads: how many heads.
        qkv_bias: whether the projections have a bias.
        out_proj: whether a linear layer mixes the heads' outputs (the lecture has none here).
        out_features: features of that layer's output; None: num_heads * d_out.
        out_bias: whether that layer has a bias.
        rope, mask, scale, backend, device, dtype: as in `CausalAttention`, for every head.

    Shapes:
        x (B, T, d_in) -> (B, T, num_heads * d_out), or (B, T, out_features)

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: an argument breaks a rule.

    >>> stacked = MultiHeadAttentionWrapper(3, 2, context_length=6, dropout=0.0, num_heads=2)
    >>> stacked(torch.ones(1, 6, 3)).shape                       # 2 heads of 2 features
    torch.Size([1, 6, 4])
    """

    out_proj: nn.Linear | MaybeNone

    def __init__(
        self,
        d_in: int,
        d_out: int,
        context_length: int,
        dropout: float,
        num_heads: int,
        qkv_bias: bool = False,
        *,
        out_proj: bool = False,
        out_features: int | None = None,
        out_bias: bool = True,
        rope: Rope | None = None,
        mask: Mask | None = polyhead.mask.causal(),
        scale: float | None = None,
        backend: BackendChoice = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(num_heads=num_heads)
        self.num_heads = num_heads
        heads = nn.ModuleList(
            CausalAttention(
                d_in,
                d_out,
                context_length,
                dropout,
                qkv_bias,
                rope=rope,
                mask=mask,
                scale=scale,
                backend=backend,
                device=device,
                dtype=dtype,
            )
            for _ in range(num_heads)
        )
        self.heads = cast("_Heads", heads)
        merged = num_heads * d_out
        if out_features is None:
            out_features = merged
        elif not out_proj and out_features != merged:
            raise ShapeError(
                "out_features",
                f"must be num_heads * d_out = {merged} without an output projection",
                out_features,
                "pass out_proj=True, or leave it out",
            )
        check_sizes(out_features=out_features)
        self.out_proj = (
            nn.Linear(merged, out_features, bias=out_bias, device=device, dtype=dtype)
            if out_proj
            else None
        )

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
        """Attend with every head in turn; arguments as in `CausalAttention.forward`.

        Returns:
            (B, T, num_heads * d_out), or (B, T, out_features) with an output projection; with
            `return_aux` also an Aux of all heads.
        """
        request = check_request(return_aux)
        runs = [
            head(x, memory, mask, positions=positions, return_aux=request) for head in self.heads
        ]
        y = torch.cat([output for output, _ in runs], dim=-1)
        if self.out_proj is not None:
            with onednn_linear(y, self):
                y = self.out_proj(y)
        return y if return_aux is None else (y, _side_by_side([aux for _, aux in runs]))

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def project_qkv(
        self, x: Tensor, memory: Tensor | None = None, *, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, H, T, d_out), key and value (B, H, S, d_out) of all heads, each as its own
        W_query, W_key and W_value give them.

        Args:
            x, memory, positions: as in `forward`.
        """
        heads: Any = self.heads
        parts = [head.project_qkv(x, memory, positions=positions) for head in heads]
        query, key, value = (torch.cat(of_heads, dim=1) for of_heads in zip(*parts, strict=True))
        return query, key, value

    def head_contexts(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Mask | None = None,
        *,
        positions: Tensor | None = None,
    ) -> Tensor:
        """What each head alone computes, (B, H, T, d_out): its context vectors."""
        return torch.stack(
            [head(x, memory, mask, positions=positions) for head in self.heads], dim=1
        )

    def head_contributions(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Mask | None = None,
        *,
        positions: Tensor | None = None,
    ) -> Tensor:
        """What each head adds to the output, (B, H, T, features); see `MultiHeadAttention`."""
        contexts_bhte = self.head_contexts(x, memory, mask, positions=positions)
        return split_by_head(contexts_bhte, self.out_proj)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


def _side_by_side(parts: list[Aux]) -> Aux:
    """The Aux of several heads as one, on the head dimension."""

    def joined(tensors: list[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present, dim=1) if present else None

    means = [part.mean_weights for part in parts if part.mean_weights is not None]
    stats = [part.stats for part in parts if part.stats is not None]
    return Aux(
        weights=joined([part.weights for part in parts]),
        lse=joined([part.lse for part in parts]),
        stats=HeadStats.concat(stats, dim=1) if stats else None,
        mean_weights=torch.stack(means).mean(dim=0) if means else None,
    )
