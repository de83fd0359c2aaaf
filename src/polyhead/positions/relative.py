"""T5's relative position bias: a learned bias per head and distance bucket."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polyhead.errors import ShapeError, check_count
from polyhead.type_hints import signature_of

__all__ = ["RelativeBias"]


class RelativeBias(nn.Module):
    """Relative position bias: one learned bias per bucket and head, `weight` (buckets, H).

    Half of the buckets (per direction) hold one distance each, from 0; the others hold
    logarithmically longer ranges up to `max_distance`, and the last one all larger distances:

        bucket[n] = n                                                   n < exact = buckets / 2
        bucket[n] = exact + log(n / exact) / log(max_distance / exact) * (buckets - exact)

    Args:
        num_heads: H.
        num_buckets: rows of `weight`; with `bidirectional` half of them are for later keys.
        max_distance: larger distances share the last bucket; at least num_buckets.
        bidirectional: if True, later keys have separate buckets; else they count as distance 0.
        device, dtype: device and dtype of `weight`.

    Shapes:
        (T, S) -> (1, H, T, S): queries are the last T of S positions, as in a mask.
        (T, S, query_offset (B,)) -> (B, H, T, S): query 0 of row b has position query_offset[b].

    Raises:
        ShapeError: num_heads is not an integer of at least 1, or num_buckets not of at least 4.
        ArgumentError: max_distance is not an integer of at least num_buckets.

    Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning", section 2.1.

    >>> bias = RelativeBias(num_heads=2, num_buckets=4, max_distance=16, bidirectional=False)
    >>> bias.buckets(torch.tensor([-20, -3, -2, -1, 0, 5])).tolist()     # key minus query
    [3, 2, 2, 1, 0, 0]
    >>> bias(3, 5).shape
    torch.Size([1, 2, 3, 5])
    """

    def __init__(
        self,
        num_heads: int,
        *,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("num_heads", num_heads, 1, "count from 1", ShapeError)
        check_count("num_buckets", num_buckets, 4, "32 is usual", ShapeError)
        check_count("max_distance", max_distance, num_buckets, "128 is usual")
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self.weight = nn.Parameter(torch.zeros(num_buckets, num_heads, device=device, dtype=dtype))

    def forward(self, T: int, S: int, query_offset: int | Tensor | None = None) -> Tensor:
        device = self.weight.device
        offset = S - T if query_offset is None else query_offset
        if isinstance(offset, Tensor) and offset.ndim:  # a traced size has none
            offset = offset[:, None, None]
        query = torch.arange(T, device=device)[:, None] + offset
        bias_tsh = self.weight[self.buckets(torch.arange(S, device=device) - query)]
        return bias_tsh.movedim(-1, -3).view(-1, self.weight.shape[1], T, S)

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def buckets(self, offsets: Tensor) -> Tensor:
        """Return the bucket of each offset, key position minus query position."""
        count, later = self.num_buckets, torch.zeros_like(offsets)
        if self.bidirectional:
            count //= 2
            later = (offsets > 0).long() * count
            distances = offsets.abs()
        else:
            distances = (-offsets).clamp_min(0)
        exact = count // 2
        # The operation order and dtype of transformers: other rounding can change the bucket.
        octaves = torch.log(distances.float() / exact) / math.log(self.max_distance / exact)
        far = exact + (octaves.clamp_min(0.0) * (count - exact)).long()
        return later + torch.where(distances < exact, distances, far.clamp_max(count - 1))

    def extra_repr(self) -> str:
        return (
            f"num_buckets={self.num_buckets}, max_distance={self.max_distance}, "
            f"bidirectional={self.bidirectional}"
        )
