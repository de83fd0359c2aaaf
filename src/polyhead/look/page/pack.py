"""Maps and keys in few characters: quantised, deflated, base64; coarser until they fit."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Sequence
from ctypes import string_at
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

__all__ = ["pack_keys", "pack_maps"]

# Levels of a cell, and how often its map is halved; the first that fits.
_MAPS = ((255, 0), (127, 0), (63, 0), (31, 0), (31, 1), (31, 2), (15, 3))
# Keys of a token, levels of a weight, and the least weight kept; the first that fits.
_KEYS = (
    *((n, levels, 0.0) for n, levels in ((99, 255), (99, 63), (99, 31), (8, 31), (6, 31))),
    *((n, 15, 0.0) for n in (4, 3, 2, 1)),
    *((1, 15, least) for least in (0.05, 0.1, 0.2, 0.4, 0.7)),
)


def pack_maps(maps: Sequence[Tensor], edges: Sequence[int], budget: int) -> dict[str, Any]:
    """The maps of all heads in `budget` characters at most, if any detail allows it.

    A cell holds round(levels * sqrt(weight / scale)), scale being the largest weight of its map.

    Args:
        maps: (n, n) mean weights, one a head.
        edges: n + 1 numbers: which tokens each row, and each column, stands for.
        budget: characters.
    """
    for levels, halvings in _MAPS:
        bins = [*edges[: -1 : 2**halvings], edges[-1]]
        join = _joining(edges, bins)
        coarse = [join @ cells.float() @ join.mT for cells in maps] if halvings else list(maps)
        scales = [max(cells.max().item(), 1e-30) for cells in coarse]
        data = _within(
            budget, (_codes(c / scale, levels) for c, scale in zip(coarse, scales, strict=True))
        )
        if data is not None:
            break
    scales = [float(f"{scale:.6g}") for scale in scales]
    return {"edges": bins, "levels": levels, "scales": scales, "data": data or []}


def pack_keys(
    keys: Sequence[Tensor], weights: Sequence[Tensor], budget: int
) -> dict[str, Any] | None:
    """The most attended keys of all tokens and heads in `budget` characters; None: too many.

    A head holds, for each rank from the most attended down, a code a token: round(levels *
    sqrt(weight)), 0 where there is none. Then, for each rank, `bytes` planes of a byte a token,
    the low one first: (query - key) mod T of each key, T itself for the first token. Most of
    these repeat from token to token, which is what deflate needs.

    Args:
        keys, weights: (T, n) as of `top_keys`, one a head.
        budget: characters.
    """
    T, given = keys[0].shape
    size = 1 + (T > 0xFF) + (T > 0xFFFF)
    for n, levels, least in _KEYS:
        n = min(n, given)
        kept = [_kept(w[:, :n], levels, least) for w in weights]
        planes = (
            torch.cat([codes.mT.flatten(), *_distances(k[:, :n], codes, size)])
            for k, codes in zip(keys, kept, strict=True)
        )
        data = _within(budget, planes)
        if data is not None:
            held = [_held(w[:, :n], codes) for w, codes in zip(weights, kept, strict=True)]
            return {
                "n": n,
                "given": given,
                "levels": levels,
                "least": least,
                "bytes": size,
                "held": held,
                "data": data,
            }
    return None


def _joining(edges: Sequence[int], bins: Sequence[int]) -> Tensor:
    """(bins, cells): the mean over the tokens of each bin, of means over those of cells."""
    sizes = torch.tensor(edges).diff().float()
    join = torch.zeros(len(bins) - 1, len(sizes))
    at = {edge: i for i, edge in enumerate(edges)}
    for row, (first, last) in enumerate(pairwise(bins)):
        cells = slice(at[first], at[last])
        join[row, cells] = sizes[cells] / sizes[cells].sum()
    return join


def _codes(shares: Tensor, levels: int) -> Tensor:
    return (shares.float().clamp(0.0, 1.0).sqrt() * levels).round().to(torch.uint8)


def _kept(weights_tn: Tensor, levels: int, least: float) -> Tensor:
    return _codes(weights_tn, levels).masked_fill_(weights_tn < least, 0)


def _distances(keys_tn: Tensor, codes_tn: Tensor, size: int) -> Iterable[Tensor]:
    T = len(keys_tn)
    distance = (torch.arange(T)[:, None] - keys_tn.long()) % T
    distance = distance.masked_fill_(keys_tn == 0, T).masked_fill_(codes_tn == 0, 0)
    for rank in distance.mT:
        for place in range(size):
            yield (rank >> (8 * place) & 0xFF).to(torch.uint8)


def _held(weights_tn: Tensor, codes_tn: Tensor) -> float:
    """How much of its weight a token has on the keys that are kept, on average."""
    share = weights_tn.float().masked_fill(codes_tn == 0, 0.0).sum(dim=1).mean().item()
    return round(share, 3)


def _within(budget: int, parts: Iterable[Tensor]) -> list[str] | None:
    """Each deflated, in base64; None as soon as they are too many characters."""
    packed: list[str] = []
    for part in parts:
        part = part.contiguous()
        raw = string_at(part.data_ptr(), part.numel())
        packed.append(base64.b64encode(zlib.compress(raw, 9)).decode())
        budget -= len(packed[-1])
        if budget < 0:
            return None
    return packed
